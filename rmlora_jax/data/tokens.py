"""Texts as numbers: tokenised once and cached, then batched.

A batch is padded to the shortest of a few lengths that holds its longest text. The order is that of
``pipeline.batch_ids``: any number of processes sees the same global batches, and a run starts at
any step. The length is that of the global batch, so that all processes run the same program.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rmlora_jax.data.content import add_texts
from rmlora_jax.data.pipeline import batch_ids, local_size
from rmlora_jax.errors import UserError, progress
from rmlora_jax.files import read_arrays, write_arrays

FORMAT = 1  # of the cached files
CHUNK = 2048  # texts between two steps of the progress bar
WINDOW = 64  # batches that are sorted by length together


class Tokens(NamedTuple):
    """The tokens of n examples, one after another.

    Attributes:
      ids: int32 (total,).
      types: uint8 (total,): 0 or 1, the text of a pair that a token belongs to.
      offsets: int64 (n + 1,): example i has the tokens from ``offsets[i]`` to ``offsets[i + 1]``.
    """

    ids: np.ndarray
    types: np.ndarray
    offsets: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)


def tokenise(
    texts: Sequence[Sequence[str]],
    tokenizer,
    max_length: int,
    *,
    cache_dir: Path | None = None,
    desc: str = "tokenising",
    model: Any = None,
    name: Callable[[int], str] | None = None,
) -> Tokens:
    """The tokens of texts, or of pairs of texts, with the tokenizer's special tokens.

    Args:
      texts: one list of strings, or two of equal length.
      tokenizer: a fast tokenizer of transformers.
      max_length: tokens of an example; a longer one is cut, of a pair the longer text first.
      cache_dir: folder of tokenised splits, made if missing, or None. A damaged file in it is made
        again, and two processes at once each leave a whole one.
      model: the config of the model that looks the tokens up; None checks nothing.
      name: what an error calls an example, from its number; by default its text.

    Raises:
      UserError: `check_tables`.
    """
    tokens = _tokenised(texts, tokenizer, max_length, cache_dir, desc)
    if model is not None:
        check_tables(tokens, tokenizer, model, name or (lambda i: repr(texts[0][i])[:60]))
    return tokens


def check_tables(tokens: Tokens, tokenizer, model: Any, name: Callable[[int], str]) -> None:
    """Raises a UserError for a token or token type without a row in the model's table.

    A lookup beyond a table gives nan, without an error. (The model itself refuses more tokens than
    its table of positions has rows.)

    Args:
      tokens: of n examples.
      tokenizer: that made them; its padding is looked up, too.
      model: a config with ``vocab_size`` and ``type_vocab_size`` (0: no table).
      name: what the message calls an example, from its number.
    """
    rows, fit = model.vocab_size, "use the tokenizer that was trained with this model"
    if (tokenizer.pad_token_id or 0) >= rows:
        raise UserError(f"the tokenizer's padding {tokenizer.pad_token!r} has number "
                        f"{tokenizer.pad_token_id}, but the model's vocab_size is {rows}; {fit}")

    def example(place: int) -> str:
        return name(int(np.searchsorted(tokens.offsets, place, side="right")) - 1)

    if (wrong := np.flatnonzero(tokens.ids >= rows)).size:
        number = int(tokens.ids[wrong[0]])
        token = tokenizer.convert_ids_to_tokens(number)
        raise UserError(f"{example(wrong[0])}: token {token!r} has number {number}, but the "
                        f"model's vocab_size is {rows}; {fit}, or leave such words out")
    rows = getattr(model, "type_vocab_size", 0)
    if rows and (wrong := np.flatnonzero(tokens.types >= rows)).size:
        raise UserError(f"{example(wrong[0])}: the tokenizer gives token type "
                        f"{tokens.types[wrong[0]]}, but the model's type_vocab_size is {rows}; "
                        f"{fit}")


def _tokenised(
    texts: Sequence[Sequence[str]], tokenizer, max_length: int, cache_dir: Path | None, desc: str
) -> Tokens:
    n = len(texts[0])
    path = cache_dir and cache_dir / f"{fingerprint(texts, tokenizer, max_length)}.npz"
    if path and (arrays := read_arrays(path, Tokens._fields)):
        found = Tokens(*arrays)
        if len(found.offsets) == n + 1 and found.offsets[-1] == len(found.ids) == len(found.types):
            return found
    ids, types, lengths = [], [], []
    with progress(n, desc, " texts", disable=n < 20_000) as bar:
        for start in range(0, n, CHUNK):
            part = [column[start : start + CHUNK] for column in texts]
            encoded = tokenizer(
                *part, truncation=True, max_length=max_length, return_token_type_ids=True
            )
            lengths += [len(row) for row in encoded["input_ids"]]
            ids += [np.array(row, np.int32) for row in encoded["input_ids"]]
            types += [np.array(row, np.uint8) for row in encoded["token_type_ids"]]
            bar.update(len(part[0]))
    offsets = np.cumsum([0, *lengths], dtype=np.int64)
    tokens = Tokens(np.concatenate(ids), np.concatenate(types), offsets)
    if path:
        write_arrays(path, tokens._asdict())
    return tokens


def fingerprint(texts: Sequence[Sequence[str]], tokenizer, max_length: int) -> str:
    """Hexadecimal SHA-256 of the texts, the tokenizer, its release and the length."""
    import tokenizers

    digest = hashlib.sha256()
    facts = [FORMAT, tokenizers.__version__, max_length, len(texts), len(texts[0])]
    digest.update(json.dumps(facts).encode())
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    # Each call of the tokenizer sets these anew.
    backend |= {"truncation": None, "padding": None}
    digest.update(json.dumps(backend, sort_keys=True).encode())
    digest.update(f"{type(tokenizer).__name__} {tokenizer.truncation_side}".encode())
    add_texts(digest, texts)
    return digest.hexdigest()


# Batches


def buckets(max_length: int) -> tuple[int, ...]:
    """The lengths that batches are padded to: steps of 16 up to 64, of 32 to 128, of 64 beyond.

    >>> buckets(100)
    (16, 32, 48, 64, 96, 100)
    """
    lengths = [*range(16, 64, 16), *range(64, 128, 32), *range(128, max_length, 64)]
    return (*(n for n in lengths if n < max_length), max_length)


def text_batches(
    tokens: Tokens,
    labels: np.ndarray,
    global_batch: int,
    *,
    seed: int,
    pad_id: int,
    max_length: int,
    start_step: int = 0,
    group_by_length: bool = False,
    one_length: bool = False,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[dict]:
    """Endless training batches of this process, from ``start_step`` on.

    Args:
      tokens, labels: of n examples; labels (n,).
      global_batch: examples of all processes, of which each yields its part.
      pad_id: token that stands for padding.
      max_length: the largest of the lengths, see :func:`buckets`.
      group_by_length: put examples of similar length together, within a window of 64 batches. Each
        window has the same examples as without.
      one_length: pad every batch to ``max_length``.

    Yields:
      ``{"input_ids": int32 (b, L), "attention_mask": bool (b, L), "token_type_ids": int32 (b, L),
      "label": (b,), "id": int32 (b,)}`` with ``b = global_batch / process_count``.
    """
    local = local_size(global_batch, process_count)
    mine = slice(process_index * local, (process_index + 1) * local)
    lengths = (max_length,) if one_length else buckets(max_length)
    orders = batch_ids(len(labels), global_batch, seed=seed, start_step=start_step)
    if group_by_length:
        orders = _grouped(tokens.lengths, global_batch, seed, start_step)
    for ids in orders:
        length = _bucket(tokens, ids, lengths)
        yield padded(tokens, ids[mine], length, pad_id) | {"label": labels[ids[mine]]}


def _grouped(lengths: np.ndarray, global_batch: int, seed: int, step: int) -> Iterator[np.ndarray]:
    while True:
        window, first = divmod(step, WINDOW)
        source = batch_ids(len(lengths), global_batch, seed=seed, start_step=window * WINDOW)
        ids = np.concatenate([next(source) for _ in range(WINDOW)])
        batches = ids[np.argsort(lengths[ids], kind="stable")].reshape(WINDOW, global_batch)
        yield from np.random.RandomState([seed, window]).permutation(batches)[first:]
        step = (window + 1) * WINDOW


def eval_text_batches(
    tokens: Tokens,
    labels: np.ndarray,
    global_batch: int,
    *,
    pad_id: int,
    max_length: int,
    one_length: bool = False,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[dict]:
    """Each example once, by length, padded to whole global batches; see :func:`text_batches`.

    The lengths are 32, 64, 128 and so on: few, since each costs a compilation.

    "id" is the example's number from 0 to n - 1. Rows that fill the last batch repeat an example
    with "mask" False.
    """
    local = local_size(global_batch, process_count)
    mine = slice(process_index * local, (process_index + 1) * local)
    n, lengths = len(labels), (max_length,)
    if not one_length:
        lengths = (*(32 << i for i in range(30) if 32 << i < max_length), max_length)
    order = np.argsort(tokens.lengths, kind="stable").astype(np.int32)
    rows = np.full(math.ceil(n / global_batch) * global_batch, order[-1])
    rows[:n] = order
    real = np.arange(len(rows)) < n
    for start in range(0, len(rows), global_batch):
        ids = rows[start : start + global_batch]
        batch = padded(tokens, ids[mine], _bucket(tokens, ids, lengths), pad_id)
        mask = real[start : start + global_batch][mine]
        yield batch | {"label": labels[ids[mine]], "mask": mask}


def _bucket(tokens: Tokens, ids: np.ndarray, lengths: tuple[int, ...]) -> int:
    longest = (tokens.offsets[ids + 1] - tokens.offsets[ids]).max()
    return next(length for length in lengths if length >= longest)


def padded(tokens: Tokens, ids: np.ndarray, length: int, pad_id: int) -> dict[str, np.ndarray]:
    """The tokens of the examples ``ids`` (b,), padded on the right to ``length``."""
    starts, ends = tokens.offsets[ids], tokens.offsets[ids + 1]
    mask = np.arange(length) < (ends - starts)[:, None]
    places = np.where(mask, starts[:, None] + np.arange(length), 0)
    return {
        "input_ids": np.where(mask, tokens.ids[places], np.int32(pad_id)),
        "attention_mask": mask,
        "token_type_ids": np.where(mask, tokens.types[places], 0).astype(np.int32),
        "id": ids.astype(np.int32),
    }
