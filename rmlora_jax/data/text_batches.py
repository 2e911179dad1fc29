"""Batches of tokenised texts, each padded to the shortest of a few lengths that holds it.

The order is that of ``pipeline.batch_ids``: any number of processes sees the same global batches,
and a run starts at any step. The length is that of the global batch, so that all processes run the
same program.
"""

import math
from collections.abc import Iterator

import numpy as np

from rmlora_jax.data.pipeline import batch_ids, local_size
from rmlora_jax.data.tokens import Tokens

WINDOW = 64  # batches that are sorted by length together


def buckets(max_length: int) -> tuple[int, ...]:
    """The lengths that batches are padded to: steps of 16 up to 64, of 32 to 128, of 64 beyond.

    >>> buckets(100)
    (16, 32, 48, 64, 96, 100)
    """
    lengths = [*range(16, 64, 16), *range(64, 128, 32), *range(128, max_length, 64)]
    return (*(n for n in lengths if n < max_length), max_length)


def train_batches(
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
    """Endless batches of this process, from ``start_step`` on.

    Args:
      tokens, labels: of n examples; labels (n,).
      global_batch: examples of all processes.
      seed: of the order.
      pad_id: token that stands for padding.
      max_length: the largest of the lengths, see :func:`buckets`.
      start_step: steps that are done.
      group_by_length: within a window of 64 batches, put examples of similar length together; which
        examples a window has, and so that a pass has each once, stays as it is.
      one_length: pad every batch to ``max_length``.
      process_index, process_count: which part of each global batch is yielded.

    Yields:
      ``{"input_ids": int32 (b, L), "attention_mask": bool (b, L), "token_type_ids": int32 (b, L),
      "label": (b,), "id": int32 (b,)}`` with ``b = global_batch / process_count``.
    """
    local = local_size(global_batch, process_count)
    mine = slice(process_index * local, (process_index + 1) * local)
    lengths = (max_length,) if one_length else buckets(max_length)
    if not group_by_length:
        orders = batch_ids(len(labels), global_batch, seed=seed, start_step=start_step)
    else:
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


def eval_batches(
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
    """Each example once, by length, padded to whole global batches; see :func:`train_batches`.

    The lengths are 32, 64, 128 and so on: a split takes a moment, and each length a compilation.

    "id" is the example's number from 0 to n - 1. Rows that fill the last batch repeat an example
    with "mask" False.
    """
    local = local_size(global_batch, process_count)
    mine = slice(process_index * local, (process_index + 1) * local)
    lengths, n = (max_length,) if one_length else _doubling(max_length), len(labels)
    order = np.argsort(tokens.lengths, kind="stable").astype(np.int32)
    rows = np.full(math.ceil(n / global_batch) * global_batch, order[-1])
    rows[:n] = order
    real = np.arange(len(rows)) < n
    for start in range(0, len(rows), global_batch):
        ids = rows[start : start + global_batch]
        batch = padded(tokens, ids[mine], _bucket(tokens, ids, lengths), pad_id)
        mask = real[start : start + global_batch][mine]
        yield batch | {"label": labels[ids[mine]], "mask": mask}


def _doubling(max_length: int) -> tuple[int, ...]:
    lengths = [32]
    while lengths[-1] < max_length:
        lengths.append(2 * lengths[-1])
    return (*lengths[:-1], max_length) if lengths[-1] > max_length else tuple(lengths)


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
