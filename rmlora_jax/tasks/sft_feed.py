"""From chats to batches: tokenised once or as they are needed, in rows that examples share."""

import itertools
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rmlora_jax import data, hub
from rmlora_jax.data.dataset import BadRecord
from rmlora_jax.data.packing import taken
from rmlora_jax.errors import UserError
from rmlora_jax.fields import Run
from rmlora_jax.hub import chat_template
from rmlora_jax.tasks import targets, task
from rmlora_jax.tasks.sft_fields import Sft, streams


class Split(NamedTuple):
    """A split in tokens.

    Attributes:
      tokens: of each example, once; ``types`` is 1 for a token that the loss is over.
      order: int64 (n,), the examples of a pass.
      rows: which of them share a row; None where each has one of its own.
    """

    tokens: data.Tokens
    order: np.ndarray
    rows: data.Rows | None


def open_feed(
    config: Run,
    chats: data.ChatDataset,
    tokenizer: Any,
    template: hub.Template,
    architecture: Any,
) -> task.Feed:
    """Tokenises each split, or reads its tokens from the cache, and packs them into rows."""
    t = config.own(Sft)
    notes: list[str] = []
    every = {"train": chats.train, "validation": chats.validation, **chats.tests}
    splits = {
        name: open_split(config, name, split, chats.skipped, tokenizer, template, notes)
        for name, split in every.items()
        if not (name == "train" and streams(config))
    }
    sizes = {name: len(split) for name, split in every.items()}
    sizes |= {name: len(split.order) for name, split in splits.items()}
    content = {name: data.hash_of(*split.tokens, split.order) for name, split in splits.items()}
    if streams(config):
        read = reader(config, chats.train, tokenizer, template)
        first, epoch = first_read(read, len(chats.train)), 0
        content["train"] = data.content_of(chats.train)

        def train(step: int) -> Iterator[dict]:
            counted = counts_file(config, chats.train, tokenizer, template)
            size = len(chats.train)
            return streamed(config, read, size, chats.skipped, tokenizer, step, counted)
    else:
        own = splits["train"]
        first, epoch = first_of(own), len(own.order if own.rows is None else own.rows)

        def train(step: int) -> Iterator[dict]:
            return batches(config, own, tokenizer, step)

    notes.append(described(tokenizer, *first))
    watched = {f"test_{name}" for name, _ in t.evaluate}

    def prepare(resident, batch):
        return targets.shifted(batch, t.pack)

    return task.Feed(
        sizes=sizes,
        train=train,
        evaluate=lambda name: eval_batches(config, splits[name], tokenizer),
        resident={},
        prepare_train=lambda key, positions, *given: prepare(*given),
        prepare_eval=prepare,
        tests=tuple(chats.tests),
        watched=tuple(name for name in chats.tests if name in watched),
        varies=not t.pack,
        epoch=epoch,
        examples=lambda name, ids: examples_in(splits[name], ids) if name in splits else ids,
        content=content,
        notes=tuple(notes),
        token_flops=attention_flops(architecture, splits.get("train")),
    )


def attention_flops(architecture: Any, split: Split | None) -> float:
    """Operations of attention's two products for a token, forward, on average over a pass.

    A token at position p reads p + 1 keys, or those in its window.
    """
    if split is None:
        return 0.0
    c, lengths = architecture, split.tokens.lengths[split.order].astype(np.float64)
    width = 4 * c.num_attention_heads * c.head_dim  # of a query with a key: scores and values
    keys = 0.0
    for slides in c.sliding:
        seen = np.minimum(lengths, c.sliding_window) if slides else lengths
        keys += (seen * (seen + 1) / 2 + (lengths - seen) * seen).sum()
    return float(width * keys / lengths.sum())


def open_split(
    config: Run,
    name: str,
    chats: data.Chats,
    skipped: Any,
    tokenizer: Any,
    template: hub.Template,
    notes: list[str],
) -> Split:
    """A split in tokens; what a person should know is added to ``notes``."""
    t, cache = config.own(Sft), None
    if t.cache:
        key = chat_template.fingerprint(tokenizer, template, **written(config))
        folder = Path(t.cache).expanduser()
        cache = data.cache_file(folder, chats, key, **fitted(config, tokenizer))
    read = reader(config, chats, tokenizer, template)
    encoded = data.encode_chats(chats, read, skipped, cache=cache, desc=f"tokenising {name}")
    tokens, order, counts = encoded
    notes += counted(name, counts)
    if not t.pack:
        return Split(tokens, order, None)
    lengths = tokens.lengths[order]
    rows = data.pack(lengths, t.length, seed=config.data_seed)
    notes.append(
        f"{name}: {len(order):,} examples in {len(rows):,} rows of {t.length:,} tokens, of which "
        f"{100 * rows.padding(lengths, t.length):.1f} % are padding"
    )
    return Split(tokens, order, data.Rows(order[rows.examples], rows.starts))


def written(config: Run) -> dict[str, Any]:
    """How an example becomes tokens, see `hub.encode`."""
    t = config.own(Sft)
    return {"loss": t.loss, "system": t.system or None}


def fitted(config: Run, tokenizer: Any) -> dict[str, Any]:
    """What becomes of long examples, see `data.chat_reader`."""
    t = config.own(Sft)
    return {"length": t.length, "too_long": t.too_long, "bos": tokenizer.bos_token_id}


def reader(config: Run, chats: data.Chats, tokenizer: Any, template: hub.Template) -> Any:
    """The number of an example -> its tokens and targets, see `data.chat_reader`."""

    def encode(example):
        return hub.encode(tokenizer, example, template, **written(config))

    return data.chat_reader(chats, encode, **fitted(config, tokenizer))


def counted(name: str, counts: Any) -> Iterator[str]:
    """What became of examples that are too long."""
    if counts.cut:
        targets_too = f" ({counts.cut_targets:,} of them also tokens of the loss)"
        yield (f"{name}: {counts.cut:,} of {counts.examples:,} examples are longer than "
               f"sft.length and lost their first tokens" + targets_too * bool(counts.cut_targets))
    if counts.skipped:
        yield f"{name}: {counts.skipped:,} examples are longer than sft.length and were left out"


def first_of(split: Split) -> tuple[np.ndarray, np.ndarray]:
    """The tokens and the targets of the first example of a pass."""
    first = int(split.order[0])
    own = slice(*split.tokens.offsets[first : first + 2])
    return split.tokens.ids[own], split.tokens.types[own]


def first_read(read: Any, examples: int) -> tuple[np.ndarray, np.ndarray]:
    """The same of examples that are read as they are needed: of the first that can be used.

    What is wrong with those before it is reported when their batch comes.
    """
    wrong = None
    for index in range(examples):
        try:
            tokens, wanted, _ = read(index)
        except BadRecord as error:
            wrong = wrong or error
            continue
        if len(tokens):
            return tokens, wanted
    raise wrong or UserError("no example is left to train on: all are too long")


def described(tokenizer: Any, tokens: np.ndarray, wanted: np.ndarray) -> str:
    """The first example in words, with what the loss covers marked."""
    wanted = (np.arange(len(tokens)) > 0) & (wanted > 0)  # nothing predicts the first token
    text = hub.describe(tokens, wanted, tokenizer)
    return "the first example, with what the loss covers marked:\n" + textwrap.indent(text, "  ")


def batches(config: Run, split: Split, tokenizer: Any, step: int) -> Iterator[dict]:
    """The training batches from a step on."""
    t = config.own(Sft)
    own = {"seed": config.data_seed, "start_step": step, "pad_id": filler(tokenizer)}
    if split.rows is None:
        return data.single_batches(
            split.tokens, split.order, config.batch_size, max_length=t.length, **own,
            **task.process(),
        )
    return data.packed_batches(
        split.tokens, split.rows, config.batch_size, length=t.length, **own, **task.process()
    )


def streamed(
    config: Run,
    read: Any,
    examples: int,
    skipped: Any,
    tokenizer: Any,
    step: int,
    counted: Path | None,
) -> Iterator[dict]:
    """The training batches from a step on, of examples that are read as they are needed."""
    t = config.own(Sft)
    return data.streamed_batches(
        read,
        examples,
        config.batch_size,
        seed=config.data_seed,
        length=t.length,
        pad_id=filler(tokenizer),
        skipped=skipped,
        packed=t.pack,
        counted=counted,
        start_step=step,
        **task.process(),
    )


def counts_file(
    config: Run, chats: data.Chats, tokenizer: Any, template: hub.Template
) -> Path | None:
    """Where the rows that a stream has made are noted, so that a run that goes on need not count
    them anew."""
    t = config.own(Sft)
    if not t.cache:
        return None
    key = chat_template.fingerprint(tokenizer, template, **written(config))
    own = fitted(config, tokenizer) | {"seed": config.data_seed, "packed": t.pack}
    batch = None if t.pack else config.batch_size
    return data.counts_file(Path(t.cache).expanduser(), chats, key, **own, batch=batch)


def eval_batches(config: Run, split: Split, tokenizer: Any) -> Iterator[dict]:
    """The batches of an evaluated split, each example of a pass once."""
    t = config.own(Sft)
    own = {"pad_id": filler(tokenizer), **task.process()}
    if split.rows is None:
        tokens = taken(split.tokens, split.order)
        return data.eval_single_batches(
            tokens, config.eval_batch_size, max_length=t.length, **own
        )
    return data.eval_packed_batches(
        split.tokens, split.rows, config.eval_batch_size, length=t.length, **own
    )


def filler(tokenizer: Any) -> int:
    """The token that fills rows up. Nothing attends to it or predicts it: any will do."""
    return tokenizer.pad_token_id or 0


def examples_in(split: Split, ids: np.ndarray) -> np.ndarray:
    """The numbers, in ``split.tokens``, of the examples in rows."""
    if split.rows is None:
        return split.order[ids]
    return np.concatenate([split.rows[i] for i in ids])


def questions_of(config: Run, tests: Mapping[str, data.Chats]) -> task.Questions | None:
    """What the trained model is asked: the first questions of the test split."""
    t, chats = config.own(Sft), tests["test"]
    exam = (t.asked or len(chats)) if t.answer else 0
    found = tuple(itertools.islice(asked(chats), max(t.samples, exam)))
    if not found:
        return None
    return task.Questions(found[: t.samples], found[:exam], t.answer, t.longest_answer)


def asked(chats: data.Chats) -> Iterator[task.Question]:
    """The examples that ask something, with the right answer."""
    for i in range(len(chats)):
        try:
            example = chats[i]
        except BadRecord:  # tokenising tells of it
            continue
        if "completion" in example:
            yield task.Question({"prompt": example["prompt"]}, example["completion"])
        elif "messages" in example:
            *before, last = example["messages"]
            if before and last["role"] == "assistant":
                given = {"messages": before} | {k: example[k] for k in ("tools",) if k in example}
                yield task.Question(given, str(last.get("content") or ""))
