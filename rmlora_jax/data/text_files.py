"""Texts and labels from CSV, TSV and JSON-lines files, each row known by its line."""

import contextlib
import csv
import itertools
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rmlora_jax.data.dataset import BadRecord, FoundTexts, Request, Skipped, Source, TextSplit
from rmlora_jax.errors import UserError
from rmlora_jax.files import given_path, near

SUFFIXES = (".csv", ".tsv", ".jsonl")
CONVERT = "files of texts end in .csv, .tsv or .jsonl; convert it to one"
NAME_COLUMNS = "Name the columns with --config.text.columns and --config.data.label_key"
DELIMITERS = ",;\t|"
QUOTED = re.compile(r'"([^"]*+(?:""[^"]*+)*+)"')
MISSING = ("nan", "null")  # in lower case; what programs write into a table for no value


def read_rows(
    path: Path,
    columns: Sequence[str],
    label_key: str | None,
    skipped: Skipped,
    advice: str = NAME_COLUMNS,
) -> tuple[TextSplit, list[int]]:
    """The rows of a file, with words as labels, and the line that each of them ends in, from 1 on.

    Args:
      path: of a file .csv, .tsv (with a heading) or .jsonl (an object a line), in UTF-8.
      columns: names of the texts.
      label_key: name of the label. None: the rows are to be predicted, and all must be usable.
      skipped: takes the rows that cannot be used.
      advice: what to do where the file does not have these names.

    Raises:
      UserError: the file cannot be read, or too many rows cannot be used.
    """
    names = [*columns, *([] if label_key is None else [label_key])]
    rows, lines, numbers = [], [], []
    number = -1
    for number, (line, raw) in enumerate(_raw_rows(path, names, advice)):
        where = f"{path}, line {line}"
        try:
            if isinstance(raw, str):
                row = parse_object(where, raw)
                _check_names(where, row, names, advice, BadRecord)
                rows.append([_json_cell(where, name, row[name]) for name in names])
            elif None in raw:
                raise BadRecord(
                    f"{where}: more cells than the heading has names; put texts with commas or "
                    "tabs in double quotes"
                )
            else:
                rows.append([_cell(where, name, raw.get(name)) for name in names])
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
    words = [] if label_key is None else [word.strip() for word in cells.pop()]
    return TextSplit(tuple(cells), np.array(words, object), np.array(numbers)), lines


def has_columns(path: Path, columns: Sequence[str]) -> bool:
    """Whether a file .csv or .tsv begins with a heading that has these columns."""
    return any(set(columns) <= set(one.names) for one in _headings(path, _lines(path), columns))


def _raw_rows(path: Path, names: Sequence[str], advice: str) -> Iterator[tuple[int, dict | str]]:
    """(line number, row) of a file; a row of JSON lines is not parsed yet."""
    kind = path.suffix.lower()
    if kind not in SUFFIXES:
        raise UserError(f"{path}: {CONVERT}")
    lines = _lines(path)
    if kind == ".jsonl":
        yield from ((n, line) for n, line in enumerate(lines, 1) if line.strip())
        return
    if not (found := _headings(path, lines, names)):
        return
    heading = next((one for one in found if set(names) <= set(one.names)), found[0])
    where = f"{path}, line {heading.lines}"
    if not all(map(is_unicode, heading.names)):
        raise UserError(f"{where}: the heading is not UTF-8; convert the file")
    _check_names(where, heading.names, names, advice, UserError)
    if twice := [name for name in names if heading.names.count(name) > 1]:
        raise UserError(f"{where}: the heading has {twice[0]!r} twice; rename one of them")
    if heading.delimiter == "\t":
        records = _tab_records(path, lines, heading.lines, len(heading.names))
    else:
        records = itertools.islice(_records(path, lines, heading.delimiter), 1, None)
    for line, cells in records:
        row: dict = dict(zip(heading.names, cells, strict=False))
        yield line, row if len(cells) <= len(heading.names) else row | {None: cells}


def _lines(path: Path) -> list[str]:
    try:
        # Bytes that are not UTF-8 become surrogates; a row with surrogates is refused later.
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            return list(file)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


class _Heading(NamedTuple):
    """The first row of a table, as one delimiter splits it."""

    delimiter: str
    names: list[str]
    lines: int  # that it takes


def _headings(path: Path, lines: list[str], names: Sequence[str]) -> list[_Heading]:
    """The heading by each delimiter, that of the file's suffix first; [] for an empty file.

    Spaces around a name are left out, unless they are in the one that is asked for.
    """
    # No cell is longer than its file; csv's own limit is 131,072 letters.
    csv.field_size_limit(max(csv.field_size_limit(), sum(map(len, lines))))
    own, found = "\t" if path.suffix.lower() == ".tsv" else ",", []
    for delimiter in dict.fromkeys(own + DELIMITERS):
        try:
            for line, cells in itertools.islice(_records(path, lines, delimiter), 1):
                heading = [cell if cell in names else cell.strip() for cell in cells]
                found.append(_Heading(delimiter, heading, line))
        except UserError:
            if delimiter == own:
                raise
    return found


def _records(path: Path, lines: list[str], delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """(number of its last line, cells) of each row that is not blank."""
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        yield from ((reader.line_num, cells) for cells in reader if cells)
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: {error}; check its quotes") from error


def _tab_records(
    path: Path, lines: list[str], start: int, width: int
) -> Iterator[tuple[int, list[str]]]:
    """`_records` of a file with tabs, from line ``start`` on.

    Such files are written with quotes around cells, as CSV is, and without, as GLUE's are. A line
    of ``width`` cells is a row, and of its quotes only those around a whole cell are left out. Any
    other line is read as CSV, where its quotes allow that.
    """
    while start < len(lines):
        cells, end = _cells(lines[start]), start + 1
        whole = [QUOTED.fullmatch(cell) for cell in cells]
        alone = len(cells) == width and not any(
            cell.startswith('"') and not quoted for cell, quoted in zip(cells, whole, strict=True)
        )
        if not alone and (found := _spanning(path, lines, start, width)):
            cells, end = found
        else:
            cells = [quoted[1].replace('""', '"') if quoted else cell
                     for cell, quoted in zip(cells, whole, strict=True)]
        if cells != [""]:
            yield end, cells
        start = end


def _spanning(
    path: Path, lines: list[str], start: int, width: int
) -> tuple[list[str], int] | None:
    """The row from line ``start`` on whose quoted cells hold tabs or line breaks, and where it
    ends; None where its quotes are not those of CSV."""
    reader = csv.reader(
        map(lines.__getitem__, range(start, len(lines))), delimiter="\t", strict=True
    )
    try:
        cells = next(reader)
    except csv.Error:
        return None
    end = start + reader.line_num
    if all(len(_cells(line)) == width for line in lines[start:end]):
        raise UserError(
            f"{path}, line {start + 1}: its quotation mark may be a letter, or the beginning of a "
            f"cell that ends in line {end}; convert the file to .jsonl"
        )
    return cells or [""], end


def _cells(line: str) -> list[str]:
    return line.rstrip("\r\n").split("\t")


def _check_names(
    where: str, found: Iterable[str], names: Sequence[str], advice: str, kind: type[UserError]
) -> None:
    found = list(found)
    if lacking := [name for name in names if name not in found]:
        seen = ", ".join(map(repr, found))[:200]
        raise kind(f"{where}: no {lacking[0]!r}; it has {seen}\n{advice}")


def parse_object(where: str, line: str) -> dict:
    """The object in a line of JSON."""

    def once(pairs: list[tuple[str, Any]]) -> dict:
        row = {}
        for key, value in pairs:
            if key in row:
                raise BadRecord(f"{where}: {key[:80]!r} is given twice; leave out one of them")
            row[key] = value
        return row

    if not is_unicode(line):
        raise BadRecord(f"{where}: not UTF-8; convert it")
    try:
        row = json.loads(line, object_pairs_hook=once)
    except BadRecord:
        raise
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"{where}: not JSON ({error})") from None
    if not isinstance(row, dict):
        raise BadRecord(f"{where}: a {type(row).__name__}, not an object")
    return row


def _json_cell(where: str, name: str, value: Any) -> str:
    if value is None or isinstance(value, str):
        return _filled(where, name, value)
    if isinstance(value, list | dict):
        raise BadRecord(f"{where}: {name!r} is a {type(value).__name__}, not a text or a number")
    if isinstance(value, float) and not math.isfinite(value):
        raise BadRecord(
            f"{where}: {name!r} is {value}, which counts as missing; fill it in or delete the line"
        )
    return json.dumps(value)


def _cell(where: str, name: str, value: str | None) -> str:
    if value is not None and value.strip().lower() in MISSING:
        raise BadRecord(
            f"{where}: {name!r} is {value.strip()!r}, which counts as missing; delete the line, or "
            "write it as a string in a .jsonl file if it is meant"
        )
    return _filled(where, name, value)


def _filled(where: str, name: str, value: str | None) -> str:
    if value is None or not value.strip():
        raise BadRecord(f"{where}: {name!r} is empty; fill it in or delete the line")
    if not is_unicode(value):
        raise BadRecord(f"{where}: {name!r} is not UTF-8; convert it")
    return value


def is_unicode(text: str) -> bool:
    """Whether a text has no surrogates, which no tokenizer accepts."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def class_names(path: Path, words: list[str], label_key: str) -> tuple[str, ...]:
    """The words that occur, sorted; whole numbers by value.

    Equal numbers are one class, called by the shortest of its words: "1" and "1.0".
    """
    spelt = {class_key(word): word for word in sorted(set(words), key=len, reverse=True)}
    names = sorted(spelt.values())
    truths = [name for name in names if name.lower() in ("true", "false")]
    if truths and any(map(_is_number, names)) and all(
        name in truths or _is_number(name) for name in names
    ):
        raise UserError(f"{path}: {label_key!r} is {truths[0]!r} in some rows and a number in "
                        "others; write all as words or all as numbers")
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


def class_key(word: str) -> str:
    """What the labels of one class have in common: 1.0 is 1.

    >>> class_key("1.0"), class_key("1.5"), class_key("v1.0")
    ('1', '1.5', 'v1.0')
    """
    whole = re.fullmatch(r"(-?[0-9]+)\.0+", word)
    return whole[1] if whole else word


def _is_number(word: str) -> bool:
    return re.fullmatch(r"[-+]?[0-9.]+(e[-+]?[0-9]+)?", word) is not None


def _is_whole(word: str) -> bool:
    digits = word.removeprefix("-")
    return digits.isascii() and digits.isdigit() and len(digits) < 20


def _class(word: str, label_key: str, numbers: dict[str, int]) -> int:
    key = class_key(word)
    if key not in numbers:
        known = ", ".join(list(numbers)[:10])
        raise BadRecord(f"label {word[:80]!r} is not in the training file: {known[:400]}")
    return numbers[key]


def _value(word: str, label_key: str, numbers: dict[str, int]) -> float:
    with contextlib.suppress(ValueError):
        # Python reads 1_000 and digits of every script; a file that has them is not what it seems.
        if word.isascii() and "_" not in word and math.isfinite(value := float(word)):
            return value
    raise BadRecord(f"{label_key!r} is {word[:80]!r}, not a number")


def _texts(request: Request, skipped: Skipped) -> FoundTexts:
    columns, label_key, names = tuple(request.columns), request.label_key, None
    if not columns:
        raise UserError("name the columns with text: --config.text.columns=\"('text',)\"")
    dtype, unknown = (np.float32, np.nan) if request.regression else (np.int32, -1)

    def labelled(file: str | os.PathLike) -> TextSplit:
        nonlocal names
        path = given_path(file)
        rows, lines = read_rows(path, columns, label_key, skipped)
        words, numbers = rows.labels.tolist(), {}
        if not request.regression:
            names = names or class_names(path, words, label_key)  # those of the training file
            numbers = {class_key(name): number for number, name in enumerate(names)}
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
        rows, lines = read_rows(given_path(file), columns, None, skipped)
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
        path = given_path(file or "")
        if not file or (path.is_file() and path.suffix.lower() in SUFFIXES):
            continue
        absent = f"there is no such file{near(path)}"
        why = absent if path.suffix.lower() in SUFFIXES else CONVERT
        wrong.append(f"config.text.{name}={file!r}: {why}")
    return wrong


SOURCE = Source(handles=lambda request: bool(request.train_file), missing=_missing, texts=_texts)
