"""Rows of tokens: one example a row, or several that share it, in batches of one shape or a few.

The order is that of ``pipeline.batch_ids`` over rows: any number of processes sees the same global
batches, and a run starts at any step.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rmlora_jax.data.pipeline import batch_ids, eval_batches, local_size
from rmlora_jax.data.tokens import grouped_ids
from rmlora_jax.errors import UserError, progress
from rmlora_jax.files import read_arrays, write_arrays

SHOWN = 20_000  # examples from which on tokenising shows its progress


class Examples(NamedTuple):
    """The tokens of n examples, one after another.

    Attributes:
      tokens: int32 (total,).
      wanted: bool (total,): the tokens that the loss is over.
      offsets: int64 (n + 1,): example i has the tokens from ``offsets[i]`` to ``offsets[i + 1]``.
    """

    tokens: np.ndarray
    wanted: np.ndarray
    offsets: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)


def encoded(
    records: Sequence[Any],
    encode: Callable[[Any], tuple[Any, Any]],
    *,
    path: Path | None = None,
    desc: str = "tokenising",
    name: Callable[[int], str] = "example {}".format,
) -> Examples:
    """Every record as tokens, from ``path`` where they were kept there before.

    Args:
      records: n of them, such as conversations.
      encode: a record -> (tokens (n,), wanted (n,)).
      path: a file that keeps the result, made if missing; its name must stand for all that decides
        it, see `fingerprint_of`. A damaged one is made again.
      name: what an error calls a record, from its number.

    Raises:
      UserError: what ``encode`` raises, behind the record's name.
    """
    if path and (arrays := read_arrays(path, Examples._fields)):
        found = Examples(*arrays)
        whole = len(found.offsets) == len(records) + 1 and found.offsets[-1] == len(found.tokens)
        if whole and len(found.tokens) == len(found.wanted):
            return found
    tokens, wanted = [], []
    with progress(len(records), desc, " examples", disable=len(records) < SHOWN) as bar:
        for i, record in enumerate(records):
            try:
                own, targets = encode(record)
            except UserError as error:
                raise UserError(f"{name(i)}: {error}") from error
            tokens.append(np.asarray(own, np.int32))
            wanted.append(np.asarray(targets, bool))
            bar.update()
    offsets = np.cumsum([0, *map(len, tokens)], dtype=np.int64)
    found = Examples(
        np.concatenate([np.zeros(0, np.int32), *tokens]),
        np.concatenate([np.zeros(0, bool), *wanted]),
        offsets,
    )
    if path:
        write_arrays(path, found._asdict())
    return found


def fitted(
    examples: Examples, length: int, too_long: str, name: Callable[[int], str]
) -> tuple[Examples, np.ndarray, dict[str, int]]:
    """The examples that fit into rows of ``length`` tokens and have a target.

    Args:
      too_long: "cut" keeps the last tokens of an example, "skip" leaves it out, "refuse" raises.
      name: what an error calls an example, from its number.

    Returns:
      (examples, their numbers among those given, {"cut": n, "skipped": n, "without": n}); the last
      are examples without a target after the first token, which nothing predicts.

    Raises:
      UserError: an example is too long, and ``too_long`` is "refuse".

    >>> one = Examples(np.arange(5), np.array([0, 0, 0, 1, 1], bool), np.array([0, 5]))
    >>> fitted(one, 3, "cut", str)[0].tokens.tolist(), fitted(one, 3, "skip", str)[2]["skipped"]
    ([2, 3, 4], 1)
    """
    starts, ends = examples.offsets[:-1], examples.offsets[1:]
    long = ends - starts > length
    if long.any() and too_long == "refuse":
        i = int(np.flatnonzero(long)[0])
        raise UserError(f"{name(i)} has {ends[i] - starts[i]:,} tokens, more than {length:,}")
    starts = np.where(long & (too_long == "cut"), ends - length, starts)
    total = np.concatenate([[0], np.cumsum(examples.wanted)])
    lacking = total[ends] - total[np.minimum(starts + 1, ends)] == 0
    skipped = long & (too_long == "skip")
    kept = np.flatnonzero(~lacking & ~skipped)
    counts = {
        "cut": int((long & ~lacking).sum()) if too_long == "cut" else 0,
        "skipped": int((skipped & ~lacking).sum()),
        "without": int(lacking.sum()),
    }
    if len(kept) == len(starts) and not counts["cut"]:
        return examples, kept, counts
    places = [np.arange(starts[i], ends[i]) for i in kept]
    every = np.concatenate([np.zeros(0, np.int64), *places])
    offsets = np.cumsum([0, *map(len, places)], dtype=np.int64)
    return Examples(examples.tokens[every], examples.wanted[every], offsets), kept, counts


def repeated(weights: Sequence[float], sizes: Sequence[int], seed: int) -> np.ndarray:
    """Which examples a pass has, where each source of ``sizes`` examples has a weight.

    An example of a source with weight 2.5 is there twice, and half of them once more, drawn from
    ``seed``.

    >>> repeated((1, 0.5), (3, 4), seed=0).tolist()
    [0, 1, 2, 4, 5]
    """
    found, first = [], 0
    for number, (weight, size) in enumerate(zip(weights, sizes, strict=True)):
        whole, part = divmod(weight, 1)
        extra = np.random.RandomState([seed, number]).permutation(size)[: round(part * size)]
        own = np.concatenate([np.tile(np.arange(size), int(whole)), np.sort(extra)])
        found.append(first + own)
        first += size
    return np.concatenate(found).astype(np.int64)


def row_batches(
    examples: Examples,
    rows: Sequence[np.ndarray],
    global_batch: int,
    lengths: Sequence[int],
    *,
    seed: int,
    pad_id: int,
    start_step: int = 0,
    group_by_length: bool = False,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[dict]:
    """Endless training batches of this process, from ``start_step`` on.

    Args:
      examples: tokenised.
      rows: the numbers of the examples in each row, in their order.
      global_batch: rows of all processes, of which each yields its part.
      lengths: that a batch may have, ascending; it has the first that its longest row fits in.
      group_by_length: put rows of similar length together, within a window of 64 batches.

    Yields:
      `filled` of the rows of each step.
    """
    local = local_size(global_batch, process_count)
    mine = slice(process_index * local, (process_index + 1) * local)
    sizes = sizes_of(examples, rows)
    if group_by_length:
        orders = grouped_ids(sizes, global_batch, seed, start_step)
    else:
        orders = batch_ids(len(rows), global_batch, seed=seed, start_step=start_step)
    for ids in orders:
        length = fitting(sizes[ids], lengths)
        yield filled(examples, [rows[i] for i in ids[mine]], length, pad_id) | {"id": ids[mine]}


def eval_row_batches(
    examples: Examples,
    rows: Sequence[np.ndarray],
    global_batch: int,
    lengths: Sequence[int],
    *,
    pad_id: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[dict]:
    """Each row once, the shortest first, as `row_batches`, with "mask" False for rows that fill the
    last batch."""
    sizes = sizes_of(examples, rows)
    order = np.argsort(sizes, kind="stable").astype(np.int32)
    starts = itertools.count(0, global_batch)
    own = {"process_index": process_index, "process_count": process_count}
    for start, batch in zip(starts, eval_batches(len(rows), global_batch, **own), strict=False):
        length = fitting(sizes[order[start : start + global_batch]], lengths)
        ids = order[batch["id"]]
        found = filled(examples, [rows[i] for i in ids], length, pad_id)
        yield found | {"id": ids, "mask": batch["mask"]}


def sizes_of(examples: Examples, rows: Sequence[np.ndarray]) -> np.ndarray:
    """The number of tokens in each row, int64 (n,)."""
    lengths = examples.lengths
    return np.array([lengths[row].sum() for row in rows], np.int64)


def fitting(sizes: np.ndarray, lengths: Sequence[int]) -> int:
    """The first of ``lengths`` that all sizes fit in."""
    return next(length for length in lengths if length >= sizes.max())


def filled(
    examples: Examples, rows: Sequence[np.ndarray], length: int, pad_id: int
) -> dict[str, np.ndarray]:
    """The arrays (b, length) of some rows: tokens, wanted, segments and positions.

    Examples stand one after another, padding behind them. ``segments`` are 1, 2, ... for the
    examples of a row and 0 for padding; ``positions`` count the tokens of each example from 0.

    >>> two = Examples(np.array([7, 8, 9]), np.array([False, True, True]), np.array([0, 2, 3]))
    >>> batch = filled(two, [np.array([0, 1])], 4, pad_id=0)
    >>> batch["tokens"].tolist(), batch["segments"].tolist(), batch["positions"].tolist()
    ([[7, 8, 9, 0]], [[1, 1, 2, 0]], [[0, 1, 0, 0]])
    """
    shape = len(rows), length
    batch = {
        "tokens": np.full(shape, pad_id, np.int32),
        "wanted": np.zeros(shape, bool),
        "segments": np.zeros(shape, np.int32),
        "positions": np.zeros(shape, np.int32),
    }
    for i, row in enumerate(rows):
        place = 0
        for number, example in enumerate(row, 1):
            start, end = examples.offsets[example : example + 2]
            own = slice(place, place + end - start)
            batch["tokens"][i, own] = examples.tokens[start:end]
            batch["wanted"][i, own] = examples.wanted[start:end]
            batch["segments"][i, own] = number
            batch["positions"][i, own] = np.arange(end - start)
            place = own.stop
    return batch
