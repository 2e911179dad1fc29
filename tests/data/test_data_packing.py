"""Packing against counting and first fit; batches the same for any processes and from any step."""

import itertools

import numpy as np
import pytest

from rmlora_jax.data import (
    Tokens,
    eval_packed_batches,
    eval_single_batches,
    pack,
    packed_batches,
    single_batches,
    streamed_batches,
)
from rmlora_jax.data.dataset import BadRecord, Skipped
from rmlora_jax.data.packing import best_fit, filled, taken
from rmlora_jax.errors import UserError

LENGTH, PAD = 32, 99


def lengths_of(seed: int, n: int, most: int = LENGTH) -> np.ndarray:
    draw = np.random.RandomState(seed)
    return np.clip((draw.lognormal(2, 0.8, n)).astype(int), 1, most)


def tokens_of(lengths) -> Tokens:
    """Example i has the tokens 1000 i, 1000 i + 1, ...; those at odd places are targets."""
    ids = np.concatenate([1000 * i + np.arange(n) for i, n in enumerate(lengths)])
    offsets = np.cumsum([0, *lengths])
    return Tokens(ids.astype(np.int32), (ids % 2).astype(np.uint8), offsets.astype(np.int64))


def first_fit(lengths, length: int) -> int:
    """How many rows the plainest way needs: each example into the first row that has room."""
    rooms: list[int] = []
    for size in lengths:
        for r, room in enumerate(rooms):
            if room >= size:
                rooms[r] -= size
                break
        else:
            rooms.append(length - size)
    return len(rooms)


def fewest(lengths, length: int) -> int:
    """The fewest rows, by trying every division of the examples."""
    best = len(lengths)

    def place(i: int, rows: list[int]) -> None:
        nonlocal best
        if len(rows) >= best:
            return
        if i == len(lengths):
            best = len(rows)
            return
        for r in range(len(rows)):
            if rows[r] + lengths[i] <= length:
                rows[r] += lengths[i]
                place(i + 1, rows)
                rows[r] -= lengths[i]
        place(i + 1, [*rows, lengths[i]])

    place(0, [])
    return best


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("window", [7, 64, 10_000])
def test_every_example_once_and_no_row_too_long(seed, window):
    lengths = lengths_of(seed, 500)
    rows = pack(lengths, LENGTH, window=window, seed=seed)
    assert np.sort(rows.examples).tolist() == list(range(500))
    sums = [lengths[rows[r]].sum() for r in range(len(rows))]
    assert len(rows) == len(sums) and min(len(rows[r]) for r in range(len(rows))) >= 1
    assert max(sums) <= LENGTH and sum(sums) == lengths.sum()
    assert rows.padding(lengths, LENGTH) == 1 - sum(sums) / (LENGTH * len(sums))
    order = np.random.RandomState(seed).permutation(500)
    plain = sum(first_fit(lengths[order[i : i + window]], LENGTH) for i in range(0, 500, window))
    assert len(rows) <= plain
    again = pack(lengths, LENGTH, window=window, seed=seed)
    assert (again.examples == rows.examples).all() and (again.starts == rows.starts).all()
    assert (pack(lengths, LENGTH, window=window, seed=seed + 9).examples != rows.examples).any()


def test_best_fit_is_near_the_fewest_rows():
    worse = 0
    for seed in range(60):
        lengths = np.random.RandomState(seed).randint(1, 13, 9).tolist()
        found, least = len(best_fit(lengths, 16)), fewest(lengths, 16)
        assert least <= found <= 11 / 9 * least + 2 / 3
        worse += found > least
    assert worse <= 3
    # Into the fullest row that has room, and an exact fit first.
    assert best_fit([9, 7, 8, 3, 1], 10) == [[0, 4], [2], [1, 3]]
    assert best_fit([], 10) == [] and len(pack(np.zeros(0, int), 10)) == 0
    for wrong in ([3, 11], [3, 0]):
        with pytest.raises(ValueError, match=r"example 1 has \d+ tokens"):
            best_fit(wrong, 10)


def test_long_rows_pack_quickly():
    lengths = np.random.RandomState(0).randint(50, 4000, 100_000)
    rows = pack(lengths, 8192)
    assert rows.padding(lengths, 8192) < 0.01  # 2 % of 8,192 and more with windows of 100


def check(batch: dict, tokens: Tokens, seen: list) -> None:
    """Takes rows apart again, by their segments."""
    for r in range(len(batch["id"])):
        row = {name: batch[name][r] for name in ("tokens", "wanted", "segments", "positions")}
        used = int((row["segments"] > 0).sum())
        assert (row["segments"][used:] == 0).all() and (row["tokens"][used:] == PAD).all()
        assert not row["wanted"][used:].any() and not row["positions"][used:].any()
        for segment, part in itertools.groupby(range(used), row["segments"].__getitem__):
            places = list(part)
            example = row["tokens"][places[0]] // 1000
            first, last = tokens.offsets[example], tokens.offsets[example + 1]
            assert row["tokens"][places].tolist() == tokens.ids[first:last].tolist()
            assert row["wanted"][places].tolist() == (tokens.types[first:last] > 0).tolist()
            assert row["positions"][places].tolist() == list(range(last - first))
            assert segment == 1 or row["segments"][places[0] - 1] == segment - 1
            seen.append(int(example))


def of_type(batch: dict) -> None:
    kinds = {name: array.dtype for name, array in batch.items() if name != "mask"}
    assert kinds == {
        "id": np.int32, "tokens": np.int32, "wanted": bool, "segments": np.int32,
        "positions": np.int32,
    }  # fmt: skip


def read_of(tokens: Tokens, without=()):
    def read(i):
        if i in without:
            raise BadRecord(f"row {i} is bad\nadvice")
        part = slice(*tokens.offsets[i : i + 2])
        fate = "whole" if i % 10 else "skipped"
        end = part.stop if i % 10 else part.start
        return tokens.ids[part.start : end], tokens.types[part.start : end] > 0, fate

    return read


LENGTHS = lengths_of(5, 203)
TOKENS = tokens_of(LENGTHS)
ROWS = pack(LENGTHS, LENGTH, window=50, seed=3)
KEPT = [i for i in range(203) if i % 10]


def packed(**options):
    return packed_batches(TOKENS, ROWS, 8, seed=7, length=LENGTH, pad_id=PAD, **options)


def single(**options):
    order = np.concatenate([np.arange(203), np.arange(40)])  # some twice
    return single_batches(TOKENS, order, 8, seed=7, max_length=LENGTH, pad_id=PAD, **options)


def streamed(packed=True, counted=None, skipped=None, without=(), **options):
    return streamed_batches(
        read_of(TOKENS, without), 203, 8, seed=7, length=LENGTH, pad_id=PAD, window=30,
        packed=packed, counted=counted, skipped=skipped or Skipped(0), **options,
    )  # fmt: skip


FEEDS = {
    "packed": (packed, range(203)),
    "single": (single, [*range(203), *range(40)]),
    "streamed": (streamed, KEPT),
    "streamed single": (lambda **options: streamed(packed=False, **options), KEPT),
}


@pytest.mark.parametrize("name", FEEDS)
def test_batches_hold_each_example_once_a_pass(name):
    feed, examples = FEEDS[name]
    seen: list[int] = []
    for batch in itertools.islice(feed(), 64):
        of_type(batch)
        check(batch, TOKENS, seen)
    once = np.bincount(list(examples), minlength=203)
    passes = len(seen) // len(examples)
    assert passes >= 2
    counts = np.bincount(seen, minlength=203)
    # Each as often as any other, but for the pass that has begun, and a shuffle within windows.
    assert (counts >= once * (passes - 1)).all() and (counts <= once * (passes + 2)).all()
    if name == "packed":
        n = len(ROWS)
        rows = np.concatenate([batch["id"] for batch in itertools.islice(feed(), n)])
        assert np.bincount(rows).tolist() == [8] * n


@pytest.mark.parametrize("name", FEEDS)
def test_any_processes_and_any_step(name):
    feed, _ = FEEDS[name]
    whole = list(itertools.islice(feed(), 12))
    for count in (2, 4):
        parts = [
            list(itertools.islice(feed(process_index=p, process_count=count), 12))
            for p in range(count)
        ]
        for step, batch in enumerate(whole):
            for key, value in batch.items():
                joined = np.concatenate([part[step][key] for part in parts])
                assert joined.shape == value.shape and (joined == value).all(), key
    for start in (1, 5, 11):
        for batch, later in zip(whole[start:], feed(start_step=start), strict=False):
            assert all((batch[key] == later[key]).all() for key in batch)
    with pytest.raises(UserError, match="a batch of 8 cannot be shared by 3 processes"):
        next(feed(process_count=3))


def test_a_stream_starts_at_once_where_windows_were_counted(tmp_path):
    file = tmp_path / "counts.npz"
    whole = list(itertools.islice(streamed(counted=file), 110))
    counts = np.load(file)["counts"]
    assert len(counts) % 16 == 0 and counts.min() > 0
    reads = []

    def read(i):
        reads.append(i)
        return read_of(TOKENS)(i)

    later = streamed_batches(
        read, 203, 8, seed=7, length=LENGTH, pad_id=PAD, window=30, counted=file,
        skipped=Skipped(0), start_step=100,
    )  # fmt: skip
    batch = next(later)
    assert all((batch[key] == whole[100][key]).all() for key in batch)
    assert len(reads) <= 60
    for wrong in (counts[::-1], counts + 1, counts[:, None], counts / 1, -counts):
        np.savez(file, counts=wrong)
        batch = next(streamed(counted=file, start_step=100))
        assert all((batch[key] == whole[100][key]).all() for key in batch)
    file.write_bytes(b"damaged")
    batch = next(streamed(counted=file, start_step=100))
    assert all((batch[key] == whole[100][key]).all() for key in batch)


def test_a_stream_leaves_out_bad_records_once():
    skipped = Skipped(2)
    seen: list[int] = []
    for batch in itertools.islice(streamed(without=(3, 4), skipped=skipped), 50):
        check(batch, TOKENS, seen)
    assert sorted(skipped.records) == ["row 3 is bad", "row 4 is bad"] and len(seen) > 406
    assert not {3, 4} & set(seen)
    with pytest.raises(UserError, match=r"row \d is bad"):
        list(itertools.islice(streamed(without=(3, 4)), 60))
    nothing = streamed_batches(
        lambda i: (TOKENS.ids[:0], TOKENS.types[:0] > 0, "skipped"), 10, 2, seed=0, length=8,
        pad_id=0, skipped=Skipped(0),
    )  # fmt: skip
    with pytest.raises(UserError, match="no example is left"):
        next(nothing)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_evaluation_has_each_example_once(count):
    for make in (
        lambda **o: eval_packed_batches(TOKENS, ROWS, 8, length=LENGTH, pad_id=PAD, **o),
        lambda **o: eval_single_batches(TOKENS, 8, max_length=LENGTH, pad_id=PAD, **o),
    ):
        seen: list[int] = []
        parts = [list(make(process_index=p, process_count=count)) for p in range(count)]
        assert len({len(part) for part in parts}) == 1
        targets = 0
        for part in parts:
            for batch in part:
                of_type(batch)
                assert not batch["wanted"][~batch["mask"]].any()
                targets += batch["wanted"].sum()
                check({k: v[batch["mask"]] for k, v in batch.items()}, TOKENS, seen)
        assert sorted(seen) == list(range(203)) and targets == TOKENS.types.sum()


def test_taken_and_filled():
    some = taken(TOKENS, np.array([5, 0, 5]))
    part = lambda i: TOKENS.ids[TOKENS.offsets[i] : TOKENS.offsets[i + 1]].tolist()  # noqa: E731
    assert some.ids.tolist() == part(5) + part(0) + part(5)
    assert some.lengths.tolist() == LENGTHS[[5, 0, 5]].tolist()
    assert filled(TOKENS, [], LENGTH, PAD)["tokens"].shape == (0, LENGTH)
