"""How much of a GLUE task's training batches is text, and how fast texts become batches, here.

Prints the shares of real tokens of rmlora_jax/data/README.md:
``python tests/measure_padding.py --data_dir=DATA_DIR cola rte``
"""

import argparse
import itertools
import time

from rmlora_jax.data.glue import TASKS
from rmlora_jax.data.sources import load_texts
from rmlora_jax.data.tokens import text_batches, tokenise
from rmlora_jax.hub import find_folder, load_tokenizer


def measure(task, tokenizer, data_dir, batch, longest):
    train = load_texts(f"glue/{task}", columns=TASKS[task].columns, data_dir=data_dir).train
    start = time.perf_counter()
    tokens = tokenise(train.texts, tokenizer, longest)
    rate = len(train.ids) / (time.perf_counter() - start)
    print(f"{task}: {rate:,.0f} examples/s tokenised")
    steps = len(train.ids) // batch
    for grouped in (False, True):
        options = {"seed": 0, "pad_id": 0, "max_length": longest, "group_by_length": grouped}
        batches = text_batches(tokens, train.labels, batch, **options)
        start = time.perf_counter()
        masks = [b["attention_mask"] for b in itertools.islice(batches, steps)]
        rate = steps * batch / (time.perf_counter() - start)
        real, size = sum(m.sum() for m in masks), sum(m.size for m in masks)
        lengths = sorted({m.shape[1] for m in masks})
        print(f"  {'grouped' if grouped else 'plain':8}{real / size:.3f} of the tokens are text, "
              f"{real / (steps * batch * longest):.3f} at {longest}; lengths {lengths}, "
              f"{rate:,.0f} examples/s batched")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tasks", nargs="+", choices=TASKS)
    parser.add_argument("--data_dir")
    parser.add_argument("--source", default="all-MiniLM-L6-v2")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--longest", type=int, default=128)
    args = parser.parse_args()
    tokenizer = load_tokenizer(find_folder(args.source))
    for task in args.tasks:
        measure(task, tokenizer, args.data_dir, args.batch, args.longest)
