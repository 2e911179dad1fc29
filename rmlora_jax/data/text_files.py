"""Texts and labels from CSV, TSV and JSON-lines files, each row known by its line."""

import contextlib
import csv
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from rmlora_jax.data.dataset import BadRecord, FoundTexts, Request, Skipped, Source, TextSplit
from rmlora_jax.errors import UserError
from rmlora_jax.files import near

SUFFIXES = (".csv", ".tsv", ".jsonl")
CONVERT = "files of texts end in .csv, .tsv or .jsonl; convert it to one"


def read_rows(
    path: Path, columns: Sequence[str], label_key: str | None, skipped: Skipped
) -> tuple[TextSplit, list[int]]:
    """The rows of a file, with words as labels, and the line that each of them ends in, from 1 on.

    Args:
      path: of a file .csv, .tsv (with a heading) or .jsonl (an object a line), in UTF-8.
      columns: names of the texts.
      label_key: name of the label. None: the rows are to be predicted, and all must be usable.
      skipped: takes the rows that cannot be used.

    Raises:
      UserError: the file cannot be read, or too many rows cannot be used.
    """
    names = [*columns, *([] if label_key is None else [label_key])]
    rows, lines, numbers = [], [], []
    number = -1
    for number, (line, raw) in enumerate(_raw_rows(path)):
        try:
            row = _checked(path, line, raw)
            rows.append([_cell(path, line, row, name) for name in names])
        except BadRecord as error:
            if label_key is None:
                raise
            skipped.add(error)
            continue
        lines.append(line)
        numbers.append(number)
    if not rows:
        raise UserError(f"{path} has no rows" + " that can be used" * (number >= 0))
    cells = [list(column) for column in zip(*rows, strict=True)]
    words = [] if label_key is None else cells.pop()
    return TextSplit(tuple(cells), np.array(words, object), np.array(numbers)), lines


def _raw_rows(path: Path) -> Iterator[tuple[int, dict | str]]:
    """(line number, row) of a file; a row of JSON lines is not parsed yet."""
    kind = path.suffix.lower()
    if kind not in SUFFIXES:
        raise UserError(f"{path}: {CONVERT}")
    try:
        # Bytes that are not UTF-8 become surrogates; a row with surrogates is refused later.
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            if kind == ".jsonl":
                yield from ((n, line) for n, line in enumerate(file, 1) if line.strip())
                return
            reader = csv.DictReader(file, delimiter="," if kind == ".csv" else "\t", strict=True)
            try:
                if not all(map(_is_unicode, reader.fieldnames or ())):
                    raise UserError(f"{path}, line 1: the heading is not UTF-8; convert the file")
                for row in reader:
                    yield reader.line_num, row
            except csv.Error as error:
                where = f"{path}, line {reader.line_num}"
                raise UserError(f"{where}: {error}; check its quotes") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def _checked(path: Path, line: int, raw: dict | str) -> dict:
    """A row as an object of strings."""
    where = f"{path}, line {line}"
    if isinstance(raw, dict):
        if None in raw:
            raise BadRecord(
                f"{where}: more cells than the heading has names; put texts with commas or tabs in "
                "double quotes"
            )
        return raw
    if not _is_unicode(raw):
        raise BadRecord(f"{where}: not UTF-8; convert it")
    try:
        row = json.loads(raw)
        if isinstance(row, dict):
            return {k: v if v is None or isinstance(v, str) else json.dumps(v)
                    for k, v in row.items()}
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"{where}: not JSON ({error})") from None
    raise BadRecord(f"{where}: a {type(row).__name__}, not an object")


def _cell(path: Path, line: int, row: dict, name: str) -> str:
    if name not in row:
        # In a file with a heading, every row lacks it.
        kind = BadRecord if path.suffix.lower() == ".jsonl" else UserError
        raise kind(
            f"{path}, line {line}: no {name!r}; it has {', '.join(map(repr, row))[:200]}\n"
            "Name the columns with --config.text.columns and --config.data.label_key"
        )
    value = row[name]
    if value is None or not value.strip():
        raise BadRecord(f"{path}, line {line}: {name!r} is empty; fill it in or delete the line")
    if not _is_unicode(value):
        raise BadRecord(f"{path}, line {line}: {name!r} is not UTF-8; convert it")
    return value


def _is_unicode(text: str) -> bool:
    """Whether a text has no surrogates, which no tokenizer accepts."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def class_names(path: Path, words: list[str], label_key: str) -> tuple[str, ...]:
    """The words that occur, sorted; whole numbers by value."""
    names = sorted(set(words))
    if all(_is_whole(word) for word in names):
        names.sort(key=int)
    if len(names) < 2:
        raise UserError(f"{path}: every {label_key!r} is {names[0]!r}; two classes are needed")
    if len(names) > 1000 and len(names) > len(words) // 2:
        raise UserError(
            f"{path}: {label_key!r} has {len(names)} different values in {len(words)} rows; for "
            "numbers to be predicted use --config.task=text_regression"
        )
    return tuple(names)


def _is_whole(word: str) -> bool:
    digits = word.removeprefix("-")
    return digits.isascii() and digits.isdigit() and len(digits) < 20


def _class(word: str, label_key: str, numbers: dict[str, int]) -> int:
    if word not in numbers:
        known = ", ".join(list(numbers)[:10])
        raise BadRecord(f"label {word[:80]!r} is not in the training file: {known[:400]}")
    return numbers[word]


def _value(word: str, label_key: str, numbers: dict[str, int]) -> float:
    with contextlib.suppress(ValueError):
        if math.isfinite(value := float(word)):
            return value
    raise BadRecord(f"{label_key!r} is {word[:80]!r}, not a number")


def _texts(request: Request, skipped: Skipped) -> FoundTexts:
    columns, label_key, names = tuple(request.columns), request.label_key, None
    if not columns:
        raise UserError("name the columns with text: --config.text.columns=\"('text',)\"")
    dtype, unknown = (np.float32, np.nan) if request.regression else (np.int32, -1)

    def labelled(file: str | os.PathLike) -> TextSplit:
        nonlocal names
        path = Path(file).expanduser()
        rows, lines = read_rows(path, columns, label_key, skipped)
        words, numbers = rows.labels.tolist(), {}
        if not request.regression:
            names = names or class_names(path, words, label_key)  # those of the training file
            numbers = {word: number for number, word in enumerate(names)}
        number_of = _value if request.regression else _class
        kept, labels = [], []
        for i, (line, word) in enumerate(zip(lines, words, strict=True)):
            try:
                labels.append(number_of(word, label_key, numbers))
                kept.append(i)
            except BadRecord as error:
                skipped.add(BadRecord(f"{path}, line {line}: {error}"))
        if not kept:
            raise UserError(f"{path} has no row that can be used")
        return rows.at(kept)._replace(labels=np.array(labels, dtype))

    def unlabelled(file: str | os.PathLike) -> TextSplit:
        rows, lines = read_rows(Path(file).expanduser(), columns, None, skipped)
        return rows._replace(labels=np.full(len(lines), unknown, dtype))

    assert request.train_file
    train = labelled(request.train_file)
    tests = {"test": labelled(request.test_file)} if request.test_file else {}
    predicted = {"predict": unlabelled(request.predict_file)} if request.predict_file else {}
    return FoundTexts(columns, names, train, tests, predicted, place=request.train_file)


def _missing(request: Request) -> list[str]:
    wrong = []
    for name in ("train_file", "test_file", "predict_file"):
        file = getattr(request, name)
        path = Path(file or "").expanduser()
        if not file or (path.is_file() and path.suffix.lower() in SUFFIXES):
            continue
        absent = f"there is no such file{near(path)}"
        why = absent if path.suffix.lower() in SUFFIXES else CONVERT
        wrong.append(f"config.text.{name}={file!r}: {why}")
    return wrong


SOURCE = Source(handles=lambda request: bool(request.train_file), missing=_missing, texts=_texts)
