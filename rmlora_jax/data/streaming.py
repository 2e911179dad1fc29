"""Batches of chats that do not fit in memory: read, encoded and packed a window at a time.

A window is a fixed number of examples of the endless order of ``pipeline.batch_ids``. How many rows
it makes is known when it was read once. Every process reads every window, so all agree; to start
at a later step, the rows of the windows before it are taken from a file that earlier runs left, or
counted again.
"""

import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from rmlora_jax.data.chat import Chats
from rmlora_jax.data.chat_tokens import Read
from rmlora_jax.data.dataset import BadRecord, Skipped
from rmlora_jax.data.packing import best_fit, filled
from rmlora_jax.data.pipeline import batch_ids, local_size
from rmlora_jax.data.tokens import Tokens, buckets
from rmlora_jax.errors import UserError
from rmlora_jax.files import read_arrays, write_arrays

WINDOW = 1024  # examples that are packed together
EVERY = 16  # windows between two times that their rows are noted
FORMAT = 1  # of the file that notes them


def streamed_batches(
    read: Read,
    n: int,
    global_batch: int,
    *,
    seed: int,
    length: int,
    pad_id: int,
    skipped: Skipped,
    packed: bool = True,
    window: int = WINDOW,
    counted: Path | None = None,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[dict]:
    """Endless training batches of this process, from ``start_step`` on, as ``packing`` has them.

    Each example occurs once a pass. "id" is a row's number, counted from the start of the run.

    Args:
      read: of `chat_tokens.reader`, for ``n`` examples.
      global_batch: rows of all processes, of which each yields its part.
      skipped: takes the records that cannot be used.
      packed: False: one example a row, of similar lengths.
      window: how many examples are packed together.
      counted: a file that holds how many rows each window made, see `counts_file`. One that is
        damaged, or of other data, is made again.
    """
    local = local_size(global_batch, process_count)
    mine = slice(process_index * local, (process_index + 1) * local)

    def windows(first: int) -> Iterator[tuple[int, Tokens, list[list[int]]]]:
        orders = batch_ids(n, window, seed=seed, start_step=first)
        for number in itertools.count(first):
            tokens = _encoded(read, next(orders), skipped)
            draw = [seed % (1 << 32), number]
            yield number, tokens, _rows(tokens, length, packed, global_batch, draw)

    counts = _noted(counted)
    first, skip = _start(counts, start_step * global_batch)
    found = windows(first)
    if first < len(counts):
        one = next(found)
        found = itertools.chain([one], found)
        if len(one[2]) != counts[first]:
            counts, skip, found = [], start_step * global_batch, windows(0)
    rows: list[tuple[Tokens, list[int]]] = []
    step, empty = start_step, 0
    for number, tokens, grouped in found:
        empty = 0 if grouped else empty + 1
        if empty * window > 2 * n:
            raise UserError("no example is left: all are too long, or cannot be used")
        if number == len(counts):
            counts.append(len(grouped))
            if counted and number % EVERY == EVERY - 1:
                write_arrays(counted, {"counts": np.array(counts, np.int64)})
        dropped = min(skip, len(grouped))
        skip -= dropped
        rows += [(tokens, row) for row in grouped[dropped:]]
        while len(rows) >= global_batch:
            batch, rows = rows[:global_batch], rows[global_batch:]
            yield _batch(batch, mine, step * global_batch, length, pad_id, packed)
            step += 1


def counts_file(folder: Path, chats: Chats, key: str, **options: Any) -> Path:
    """Where the rows of the windows are noted: a name made of all that decides their number.

    The files of the chats are read once for it, and no row is tokenised.

    Args:
      key: of what encodes them, ``hub.chat_template.fingerprint``.
      **options: of `chat_tokens.reader`, beside ``encode``, and of `streamed_batches`: the seed,
        ``packed``, and the batch.
    """
    facts = json.dumps([FORMAT, WINDOW, key, chats.identity(), options], sort_keys=True)
    return folder / f"{hashlib.sha256(facts.encode()).hexdigest()}.npz"


def _noted(counted: Path | None) -> list[int]:
    """The rows of the windows, from the first on, that a file notes; [] without such a file."""
    found = read_arrays(counted, ("counts",)) if counted else None
    if not found or found[0].ndim != 1 or found[0].dtype != np.int64 or (found[0] < 0).any():
        return []
    return found[0].tolist()


def _start(counts: list[int], skip: int) -> tuple[int, int]:
    """The window to begin with to leave out ``skip`` rows, and how many of them are in it."""
    ends = np.cumsum(counts, dtype=np.int64)
    first = int(np.searchsorted(ends, skip, side="right"))
    return first, skip - (int(ends[first - 1]) if first else 0)


def _encoded(read: Read, ids: np.ndarray, skipped: Skipped) -> Tokens:
    """The tokens of the examples of a window, without those that cannot be used or do not fit."""
    parts = []
    for index in ids.tolist():
        try:
            tokens, wanted, _ = read(index)
        except BadRecord as error:
            # Each pass meets it again.
            if str(error).partition("\n")[0] not in skipped.records:
                skipped.add(error)
            continue
        if len(tokens):
            parts.append((tokens, wanted))
    none = np.zeros(0, np.int32)
    return Tokens(
        np.concatenate([none, *(tokens for tokens, _ in parts)]),
        np.concatenate([none, *(wanted for _, wanted in parts)]).astype(np.uint8),
        np.cumsum([0, *(len(tokens) for tokens, _ in parts)], dtype=np.int64),
    )


def _rows(
    tokens: Tokens, length: int, packed: bool, batch: int, seed: list[int]
) -> list[list[int]]:
    """The examples of each row of a window, in the order of training."""
    draw = np.random.RandomState(seed)
    if packed:
        rows = best_fit(tokens.lengths, length)
        return [rows[r] for r in draw.permutation(len(rows))]
    order = np.argsort(tokens.lengths, kind="stable").tolist()
    parts = [order[i : i + batch] for i in range(0, len(order), batch)]
    return [[example] for p in draw.permutation(len(parts)) for example in parts[p]]


def _batch(
    rows: list[tuple[Tokens, list[int]]], mine: slice, start: int, length: int, pad_id: int,
    packed: bool,
) -> dict[str, np.ndarray]:
    """This process's part of a batch. Its length is that of the whole, so that all agree."""
    if not packed:
        longest = max(int(tokens.lengths[row].sum()) for tokens, row in rows)
        length = next(size for size in buckets(length) if size >= longest)
    parts = [filled(tokens, [row], length, pad_id) for tokens, row in rows[mine]]
    # Ids are int32; a run that has more rows counts on from 0.
    ids = (np.arange(start, start + len(rows)) % (1 << 31))[mine].astype(np.int32)
    return {"id": ids, **{name: np.concatenate([part[name] for part in parts])
                          for name in parts[0]}}
