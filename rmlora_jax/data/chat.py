"""Chats: data sets of conversations, of prompts with completions, or of texts.

Rows come from files (`chat_files`) or from TFDS, and `chat_examples` makes an example of each. They
are read when they are asked for, so that a data set may be larger than memory.
"""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rmlora_jax.data.chat_examples import Names, NoSuchColumn, conversation_of, example_of
from rmlora_jax.data.chat_files import RowSource, missing_file, open_rows
from rmlora_jax.data.dataset import BadRecord, Request, Skipped, Source
from rmlora_jax.data.subsets import held_out_count, hold_out
from rmlora_jax.errors import UserError, progress

NAME = "chats"  # what a config calls files of chats
BUNDLED = Path(__file__).parent.parent / "assets" / "chat"
TRIED = 100  # rows that a column is looked for in
SEED = 0  # of the rows that a weight with a fraction takes


class FoundChats(NamedTuple):
    """The chats of a source.

    Attributes:
      train: sources of rows, each with its weight.
      validation: None: a part of ``train`` is held out.
      tests: the splits that are reported.
      place: what error messages call the data.
      notes: what a person should know.
    """

    train: tuple[tuple[RowSource, float], ...]
    validation: RowSource | None
    tests: dict[str, RowSource]
    place: object = "the data set"
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Chats:
    """Examples by number, read when they are asked for.

    Attributes:
      sources: of rows, numbered through.
      names: of their columns.
      ids: int64 (n,), the row of each example; a row may occur twice.
    """

    sources: tuple[RowSource, ...]
    names: Names
    ids: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Raises `BadRecord` for a row that holds no example."""
        rows, row = self._row(index)
        return example_of(rows[row], self.names, rows.where(row))

    def where(self, index: int) -> str:
        rows, row = self._row(index)
        return rows.where(row)

    def content(self, index: int) -> bytes:
        """The example as bytes, for `content.content_of`: the columns that are used, and no other.
        """
        return json.dumps(self[index], sort_keys=True, ensure_ascii=False).encode()

    def identity(self) -> str:
        """A hash of all the files' bytes, the columns and the order of the examples."""
        digest = hashlib.sha256(repr(self.names).encode() + self.ids.tobytes())
        for rows in self.sources:
            digest.update(rows.identity().encode())
        return digest.hexdigest()

    def at(self, rows: Sequence[int] | np.ndarray) -> "Chats":
        """The given examples, in that order."""
        return dataclasses.replace(self, ids=self.ids[np.asarray(rows, np.int64)])

    def _row(self, index: int) -> tuple[RowSource, int]:
        row = int(self.ids[index])
        for rows in self.sources:
            if row < len(rows):
                return rows, row
            row -= len(rows)
        raise IndexError(index)


def chats_of(sources: Sequence[RowSource], names: Names) -> Chats:
    """All rows of these sources."""
    count = sum(len(rows) for rows in sources)
    return Chats(tuple(sources), names, np.arange(count, dtype=np.int64))


@dataclasses.dataclass(frozen=True)
class ChatDataset:
    """Chats, split for training, choosing and reporting.

    Attributes:
      train: a row of a file with weight 2 occurs twice.
      validation: no example is in it and in ``train``, unless ``Request.apart`` is False.
      skipped: takes the records that cannot be used, from opening to encoding.
      notes: what a person should know.
    """

    name: str
    train: Chats
    validation: Chats
    tests: dict[str, Chats]
    skipped: Skipped
    notes: tuple[str, ...] = ()


def digest_of(chats: Chats, index: int) -> bytes:
    """A hash of an example: equal ones have the same, in whatever form their rows are."""
    said = json.dumps(conversation_of(chats[index]), sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(said.encode(), digest_size=16).digest()


def usable_chats(chats: Chats, skipped: Skipped) -> tuple[Chats, list[bytes]]:
    """The examples that can be read, and `digest_of` each.

    Raises:
      UserError: more cannot be read than may be left out.
    """
    kept, hashes = [], []
    with progress(len(chats), "reading chats", " rows", disable=len(chats) < 50_000) as bar:
        for i in range(len(chats)):
            try:
                hashes.append(digest_of(chats, i))
                kept.append(i)
            except BadRecord as error:
                skipped.add(error)
            bar.update()
    return (chats if len(kept) == len(chats) else chats.at(kept)), hashes


def check_columns(rows: RowSource, names: Names) -> None:
    """Raises a UserError if none of the first rows has the columns: leaving out rows does not help.
    """
    wrong = None
    for i in range(min(len(rows), TRIED)):
        try:
            example_of(rows[i], names, rows.where(i))
        except NoSuchColumn as error:
            wrong = wrong or error
            continue
        except BadRecord:
            pass
        return
    raise UserError(str(wrong))


def weighted(chats: Chats, weights: Sequence[float]) -> Chats:
    """Each example as often as the weight of its source says.

    Of a fraction, 0.5 say, that part of the source's rows is drawn, the same for ever.
    """
    if all(weight == 1 for weight in weights):
        return chats
    ends = np.cumsum([len(rows) for rows in chats.sources])
    which, parts = np.searchsorted(ends, chats.ids, side="right"), []
    for number, weight in enumerate(weights):
        own = np.flatnonzero(which == number)
        more = np.random.RandomState([SEED, number]).permutation(len(own))
        parts += [own] * int(weight) + [own[np.sort(more[: round(len(own) * (weight % 1))])]]
    return chats.at(np.concatenate(parts))


def split_chats(found: FoundChats, names: Names, request: Request) -> ChatDataset:
    """The splits of a request; a part of the training chats is held out where none are given.

    A "test" that ``request.test_splits`` asks for and no file gives is as large as the validation.
    Equal examples stay together, whatever their other columns hold. With ``request.apart`` False no
    row is read before it is needed.

    Raises:
      UserError: too many rows cannot be used, or nothing is left to train on.
    """
    skipped = Skipped(request.bad_records)
    given = (*(rows for rows, _ in found.train), found.validation, *found.tests.values())
    for rows in given:
        if rows is not None:
            check_columns(rows, names)
    train = chats_of([rows for rows, _ in found.train], names)
    groups, hash_of = None, {}
    if request.apart:
        train, hashes = usable_chats(train, skipped)
        hash_of = dict(zip(train.ids.tolist(), hashes, strict=True))
        numbers: dict[bytes, int] = {}
        groups = np.array([numbers.setdefault(one, len(numbers)) for one in hashes], np.int64)

    def held_out(seed: int, why: str, field: str) -> Chats:
        nonlocal train, groups
        count = held_out_count(len(train), request.validation, found.place)
        if not count:
            raise UserError(f"validation={request.validation!r}: must be above 0, to {why}, or "
                            f"name a file with --config.sft.{field}")
        kept, held = hold_out(len(train), count, seed=seed, groups=groups)
        held, train = train.at(held), train.at(kept)
        groups = None if groups is None else groups[kept]
        return held

    tests = {name: chats_of([rows], names) for name, rows in found.tests.items()}
    if "test" in (request.test_splits or {}) and "test" not in tests:
        tests = {"test": held_out(request.seed + 1, "report figures of", "test_file"), **tests}
    if found.validation is not None:
        validation = chats_of([found.validation], names)
    else:
        validation = held_out(request.seed, "choose the best step on", "validation_file")
    if request.limit and request.limit < len(train):
        train = train.at(range(request.limit))
    train = weighted(train, [weight for _, weight in found.train])
    if not len(train):
        raise UserError(f"{found.place}: no example is left to train on")
    apart = ({} if found.validation is None else {"validation": validation}) | {
        name: tests[name] for name in found.tests
    }
    trained = {hash_of[i] for i in train.ids.tolist()} if hash_of else set()
    notes = found.notes + seen(apart, trained)
    return ChatDataset(request.name, train, validation, tests, skipped, notes)


def seen(splits: Mapping[str, Chats], train: set[bytes]) -> tuple[str, ...]:
    """A line for each split with examples whose `digest_of` is among those of ``train``."""
    notes = []
    for name, chats in splits.items() if train else ():
        same = 0
        for i in range(len(chats)):
            with contextlib.suppress(BadRecord):  # encoding tells of it
                same += digest_of(chats, i) in train
        if same:
            notes.append(f"{same:,} of {len(chats):,} examples of {name!r} are training examples, "
                         "too")  # fmt: skip
    return tuple(notes)


# The source of files


def names_of(request: Request) -> Names:
    """The columns that a request names."""
    names = Names(**{k: v for k, v in (request.names or {}).items() if v})
    if not isinstance(names.prompt, str):
        names = names._replace(prompt=tuple(names.prompt))
    names.check()
    return names


def _missing(request: Request) -> list[str]:
    names_of(request)
    wrong = []
    if request.weights and len(request.weights) != len(request.files):
        wrong.append(f"config.sft.weights={tuple(request.weights)}: give one for each of the "
                     f"{len(request.files)} files")
    if any(not 0 < weight < 1000 for weight in request.weights):
        wrong.append(f"config.sft.weights={tuple(request.weights)}: above 0 and below 1000")
    files = [("files", file) for file in request.files]
    files += [("validation_file", request.validation_file)] if request.validation_file else []
    files += [("test_file" if name == "test" else "evaluate", file)
              for name, file in (request.test_files or {}).items()]
    return wrong + [f"config.sft.{field}: {str(file)!r}: {why}"
                    for field, file in files if (why := missing_file(file))]


def _chats(request: Request) -> FoundChats:
    if mistakes := _missing(request):
        raise UserError(mistakes[0])
    if not request.files:
        return _bundled()
    weights = tuple(request.weights) or (1.0,) * len(request.files)
    return FoundChats(
        tuple((open_rows(file), weight)
              for file, weight in zip(request.files, weights, strict=True)),
        open_rows(request.validation_file) if request.validation_file else None,
        {name: open_rows(file) for name, file in (request.test_files or {}).items()},
        place=", ".join(map(str, request.files))[:300],
    )


def _bundled() -> FoundChats:
    """200 questions on this package with short answers, and 20 of the same in other words."""
    train, test = open_rows(BUNDLED / "train.jsonl"), open_rows(BUNDLED / "test.jsonl")
    note = (f"no sft.files were given: the model learns the {len(train)} answers that come with "
            "this package; for data of your own type --config.sft.files=\"('chats.jsonl',)\"")
    return FoundChats(((train, 1.0),), None, {"test": test}, place=BUNDLED, notes=(note,))


SOURCE = Source(
    handles=lambda request: bool(request.files) or request.name == NAME,
    missing=_missing,
    chats=_chats,
)
