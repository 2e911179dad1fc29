"""What transformers makes of GGUF files. Run by the python of ``oracle.py``; it needs gguf, too.

python gguf_model.py FILE TEXTS.json TOKENS.npz OUT.json OUT.npz [weights]

TEXTS is a list of texts. OUT.json gets the tokens of each and the texts of these; SmolLM's
tokenizer also as it is in the published tokenizer.json, which cuts off digits first. TOKENS holds
``text`` (B, N), and ``prompt0``, ``prompt1``, ...: OUT.npz gets ``logits`` (B, N/STRIDE, V) of
every STRIDE-th place, and for each prompt the 64 greedy tokens and by how much the logit of each is
above the second. With ``weights`` it also gets all parameters.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

STRIDE, NEW = 13, 64

torch.set_num_threads(1)  # more wait for each other where other tests run, too


def greedy(model, prompt: torch.Tensor) -> tuple[list[int], list[float]]:
    found, above, ids, cache = [], [], prompt[None], None
    for _ in range(NEW):
        out = model(ids, past_key_values=cache, use_cache=True)
        best = out.logits[0, -1].topk(2)
        cache, ids = out.past_key_values, best.indices[None, :1]
        found.append(int(best.indices[0]))
        above.append(float(best.values[0] - best.values[1]))
    return found, above


@torch.no_grad()
def main(file: str, texts: str, tokens: str, spelled: str, made: str, *more: str) -> None:
    path = Path(file)
    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    rows = json.loads(Path(texts).read_text())
    ids = [tokenizer(row)["input_ids"] for row in rows]
    answer = {"ids": ids, "texts": [tokenizer.decode(row) for row in ids]}
    backend = tokenizer.backend_tokenizer
    if isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel):
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
        answer["digits"] = [backend.encode(row).ids for row in rows]
    Path(spelled).write_text(json.dumps(answer))

    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()
    given = {name: torch.from_numpy(value).long() for name, value in np.load(tokens).items()}
    out = {"logits": model(given.pop("text")).logits[:, ::STRIDE].numpy()}
    for name, prompt in given.items():
        out[name], out[f"{name}_above"] = greedy(model, prompt)
    if "weights" in more:
        out |= {f"weight:{name}": value.numpy() for name, value in model.state_dict().items()}
    np.savez(made, **out)


if __name__ == "__main__":
    main(*sys.argv[1:])
