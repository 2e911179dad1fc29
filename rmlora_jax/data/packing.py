"""Examples that share rows, and batches of such rows.

Which examples share a row follows from their lengths and a seed. The order of the rows is that of
``pipeline.batch_ids``. So any number of processes sees the same global batches, and a run starts at
any step. Examples that do not fit in memory are packed a window at a time, see ``data.streaming``.

A batch is ``{"id": int32 (b,), "tokens": int32 (b, L), "wanted": bool (b, L), "segments": int32
(b, L), "positions": int32 (b, L)}``: ``wanted`` marks the targets of the loss, ``segments`` numbers
the examples of a row from 1 on (0: padding), ``positions`` counts from 0 in each of them.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from rmlora_jax.data.pipeline import batch_ids, eval_batches, local_size
from rmlora_jax.data.tokens import Tokens, eval_text_batches, text_batches

WINDOW = 8192  # examples that are packed together


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """Which examples share a row: ``rows[r]`` are the numbers of those in row r, in their order.

    Attributes:
      examples: int64 (n,), row after row.
      starts: int64 (rows + 1,), where each row begins in ``examples``.
    """

    examples: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.examples[self.starts[row] : self.starts[row + 1]]

    def padding(self, lengths: np.ndarray, length: int) -> float:
        """The share of places that hold no token, where ``lengths`` (n,) are the examples'."""
        return 1 - float(lengths[self.examples].sum()) / max(len(self) * length, 1)


def pack(lengths: np.ndarray, length: int, *, window: int = WINDOW, seed: int = 0) -> Rows:
    """Puts examples into as few rows as `best_fit` finds, each example once.

    The examples are shuffled, and each ``window`` of them is packed by itself.

    Args:
      lengths: (n,) tokens of each example.
      length: tokens of a row.
      window: how many examples are packed together. More of them leave less padding.
      seed: of the shuffle.

    Raises:
      ValueError: an example is longer than a row, or has no token.

    >>> rows = pack(np.array([5, 3, 2, 6]), 8)
    >>> sorted(rows[r].tolist() for r in range(len(rows))), rows.padding(np.array([5, 3, 2, 6]), 8)
    ([[0, 1], [3, 2]], 0.0)
    """
    order = np.random.RandomState(seed).permutation(len(lengths))
    rows: list[np.ndarray] = []
    for start in range(0, len(order), window):
        part = order[start : start + window]
        rows += [part[row] for row in best_fit(lengths[part], length)]
    starts = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    return Rows(np.concatenate([np.zeros(0, np.int64), *rows]), starts)


def best_fit(lengths: Sequence[int] | np.ndarray, length: int) -> list[list[int]]:
    """Rows of at most ``length`` tokens: longest example first, into the fullest row it fits in.

    Best-fit decreasing needs at most 11/9 of the fewest rows, and two thirds of a row more (Dosa,
    "The tight bound of first fit decreasing bin-packing", 2007, whose bound holds for it, too).
    Equal lengths go in their order.

    >>> best_fit([5, 3, 2, 6], 8)
    [[3, 2], [0, 1]]
    """
    sizes = np.asarray(lengths, np.int64)
    if len(sizes) and not 0 < sizes.min() <= sizes.max() <= length:
        wrong = int(np.flatnonzero((sizes < 1) | (sizes > length))[0])
        raise ValueError(f"example {wrong} has {sizes[wrong]} tokens, and a row holds {length}")
    rows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(length + 1)]  # rows with so much room left
    rooms = 0  # bit r: there is a row with room r. A search for the least such r is two operations.
    for example in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[example])
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            room, row = length, len(rows)
            rows.append([])
        rows[row].append(example)
        by_room[room - size].append(row)
        rooms |= 1 << (room - size)
    return rows


def filled(
    tokens: Tokens, rows: Sequence[Sequence[int] | np.ndarray], length: int, pad_id: int
) -> dict[str, np.ndarray]:
    """The arrays (b, length) of rows of examples, without "id"; ``tokens.types`` are the targets.

    >>> tokens = Tokens(np.array([7, 8, 9]), np.array([0, 1, 1]), np.array([0, 2, 3]))
    >>> for name, array in filled(tokens, [[1, 0]], 4, pad_id=0).items():
    ...     print(name, array.astype(int).tolist())
    tokens [[9, 7, 8, 0]]
    wanted [[1, 0, 1, 0]]
    segments [[1, 2, 2, 0]]
    positions [[0, 0, 1, 0]]
    """
    shape = len(rows), length
    arrays = {name: np.zeros(shape, np.int32) for name in ("tokens", "segments", "positions")}
    arrays["tokens"][:] = pad_id
    wanted = np.zeros(shape, bool)
    for r, row in enumerate(rows):
        at = 0
        for segment, example in enumerate(row, 1):
            first, last = tokens.offsets[example], tokens.offsets[example + 1]
            here = r, slice(at, at := at + int(last - first))
            arrays["tokens"][here] = tokens.ids[first:last]
            wanted[here] = tokens.types[first:last] > 0
            arrays["segments"][here] = segment
            arrays["positions"][here] = np.arange(last - first)
    return {"tokens": arrays.pop("tokens"), "wanted": wanted, **arrays}


def packed_batches(
    tokens: Tokens,
    rows: Rows,
    global_batch: int,
    *,
    seed: int,
    length: int,
    pad_id: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[dict]:
    """Endless training batches of this process, from ``start_step`` on; "id" is a row's number.

    Each pass over the rows has its own shuffle.

    Args:
      tokens: of all examples; ``types`` are the targets.
      rows: of `pack`, for rows of ``length`` tokens.
      global_batch: rows of all processes, of which each yields its part.
      pad_id: token that stands for padding.
    """
    local = local_size(global_batch, process_count)
    mine = slice(process_index * local, (process_index + 1) * local)
    for ids in batch_ids(len(rows), global_batch, seed=seed, start_step=start_step):
        own = ids[mine]
        yield {"id": own, **filled(tokens, [rows[r] for r in own], length, pad_id)}


def eval_packed_batches(
    tokens: Tokens,
    rows: Rows,
    global_batch: int,
    *,
    length: int,
    pad_id: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[dict]:
    """Each row once and in order, padded to whole global batches with rows of "mask" False.

    Those rows have no targets.
    """
    for batch in eval_batches(
        len(rows), global_batch, process_index=process_index, process_count=process_count
    ):
        found = filled(tokens, [rows[r] for r in batch["id"]], length, pad_id)
        found["wanted"] &= batch["mask"][:, None]
        yield {**batch, **found}


def single_batches(tokens: Tokens, order: np.ndarray, *args, **options) -> Iterator[dict]:
    """Training batches with one example a row, of similar lengths; see `tokens.text_batches`.

    ``order`` (n,) are the examples of a pass; one that occurs twice is seen twice. "id" is a place
    in it.
    """
    if not np.array_equal(order, np.arange(len(tokens.lengths))):
        tokens = taken(tokens, order)
    labels = np.zeros(len(tokens.lengths), np.int8)
    for batch in text_batches(tokens, labels, *args, group_by_length=True, **options):
        yield _single(batch)


def eval_single_batches(tokens: Tokens, *args, **options) -> Iterator[dict]:
    """Each example once, one a row; see `tokens.eval_text_batches`."""
    labels = np.zeros(len(tokens.lengths), np.int8)
    for batch in eval_text_batches(tokens, labels, *args, **options):
        found = _single(batch)
        found["wanted"] &= batch["mask"][:, None]
        yield {**found, "mask": batch["mask"]}


def taken(tokens: Tokens, examples: np.ndarray) -> Tokens:
    """The tokens of the examples (n,), in that order."""
    lengths = tokens.lengths[examples]
    offsets = np.cumsum([0, *lengths], dtype=np.int64)
    # Where each token was: the start of its example, and its place within.
    places = np.repeat(tokens.offsets[examples] - offsets[:-1], lengths) + np.arange(offsets[-1])
    return Tokens(tokens.ids[places], tokens.types[places], offsets)


def _single(batch: dict) -> dict:
    real = batch["attention_mask"]
    places = np.arange(real.shape[1], dtype=np.int32)
    return {
        "id": batch["id"],
        "tokens": batch["input_ids"],
        "wanted": batch["token_type_ids"] > 0,
        "segments": real.astype(np.int32),
        "positions": np.where(real, places, 0),
    }
