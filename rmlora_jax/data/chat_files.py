"""Rows of files of chats by number: JSON lines, JSON, parquet, compressed or not.

A row is read when it is asked for, so that files may be larger than memory: of JSON lines the
places where they begin are kept, a parquet file is converted once to one that needs no memory, and
a compressed file is unpacked to a temporary one.
"""

import contextlib
import gzip
import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
import weakref
import zlib
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from rmlora_jax.data.dataset import BadRecord
from rmlora_jax.data.hf_datasets import INSTALL, open_splits
from rmlora_jax.data.text_files import parse_object
from rmlora_jax.errors import UserError, first_line
from rmlora_jax.files import given_path, near

SUFFIXES = (".jsonl", ".json", ".parquet", ".jsonl.gz", ".json.gz")
BLOCK = 64 << 20  # bytes of a file that are searched for line breaks at a time
SHORT = 16  # bytes of the longest line that may be blank
ZIPPED = ".gz"


class RowSource(Protocol):
    """Rows by number, and what an error calls one.

    ``rows[i]`` raises `BadRecord` for a row that cannot be read.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...

    def where(self, index: int) -> str: ...

    def identity(self) -> str:
        """A hash of all that is read, without reading it row by row."""
        ...


def missing_file(file: str | os.PathLike) -> str | None:
    """Why a file cannot be read, as far as its name and place tell."""
    path = given_path(file)
    if not path.name.lower().endswith(SUFFIXES):
        return f"files of chats end in {', '.join(SUFFIXES)}"
    if not path.is_file():
        return f"there is no such file{near(path)}"
    spec = importlib.util.find_spec("datasets") if path.suffix.lower() == ".parquet" else path
    return f"parquet files need a library that is not here: {INSTALL}" if spec is None else None


def open_rows(file: str | os.PathLike) -> RowSource:
    """The rows of a file with one of the `SUFFIXES`.

    Raises:
      UserError: the file cannot be read, or has no rows.
    """
    if why := missing_file(file):
        raise UserError(f"{file}: {why}")
    path = given_path(file)
    if path.suffix.lower() == ".parquet":
        rows = Table(path)
    else:
        try:
            rows = _json_rows(path)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"cannot read {path}: {first_line(error)}") from error
    if not len(rows):
        raise UserError(f"{path} has no rows")
    return rows


def _json_rows(path: Path) -> RowSource:
    file: BinaryIO = open(path, "rb")  # noqa: SIM115  the rows keep it
    name = path.name.lower()
    if name.endswith(ZIPPED):
        file = _unpacked(file)
        name = name.removesuffix(ZIPPED)
    if name.endswith(".json"):
        file.seek(0)
        if file.read(1 << 16).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
            with file:
                return JsonArray(path, file)
    return JsonLines(path, file)


def _unpacked(file: BinaryIO) -> BinaryIO:
    with file, gzip.open(file) as packed, contextlib.ExitStack() as stack:
        whole = stack.enter_context(tempfile.TemporaryFile())
        shutil.copyfileobj(packed, whole)
        stack.pop_all()  # it stays open
    return whole


class JsonLines(RowSource):
    """An object a line; blank lines are left out."""

    def __init__(self, path: Path, file: BinaryIO):
        self._path, self._file = path, file
        weakref.finalize(self, file.close)
        ends, at = [], 0
        file.seek(0)
        while block := file.read(BLOCK):
            ends.append(np.flatnonzero(np.frombuffer(block, np.uint8) == 10) + at + 1)
            at += len(block)
        edges = np.unique(np.concatenate([[0], *ends, [at]])).astype(np.int64)
        sizes = np.diff(edges)
        kept = sizes > 0
        for line in np.flatnonzero(sizes <= SHORT).tolist():  # longer ones are not blank
            kept[line] = bool(os.pread(file.fileno(), int(sizes[line]), int(edges[line])).strip())
        self._numbers = np.flatnonzero(kept)
        self._edges = edges

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> dict[str, Any]:
        first, last = self._edges[self._numbers[index] :][:2].tolist()
        # Another thread may read at the same time: no common position in the file.
        line = os.pread(self._file.fileno(), last - first, first)
        text = line.decode("utf-8-sig" if first == 0 else "utf-8", "surrogateescape")
        return parse_object(self.where(index), text)

    def where(self, index: int) -> str:
        return f"{self._path}, line {self._numbers[index] + 1}"

    def identity(self) -> str:
        file: Any = self._file
        file.seek(0)
        return hashlib.file_digest(file, "sha256").hexdigest()


class JsonArray(RowSource):
    """An array of objects, held in memory."""

    def __init__(self, path: Path, file: BinaryIO):
        self._path = path
        file.seek(0)
        text = file.read()
        self._identity = hashlib.sha256(text).hexdigest()
        try:
            self._rows = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: not JSON ({error})") from None

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self._rows[index]
        if not isinstance(row, dict):
            raise BadRecord(f"{self.where(index)}: a {type(row).__name__}, not an object")
        return row

    def where(self, index: int) -> str:
        return f"{self._path}, row {index + 1}"

    def identity(self) -> str:
        return self._identity


class Table(RowSource):
    """A parquet file, which the library ``datasets`` converts once and maps into memory."""

    def __init__(self, path: Path):
        self._path = path
        self._rows = open_splits(path)["train"].with_format("arrow")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            row = self._rows[index : index + 1].to_pylist()[0]
        except Exception as error:  # pyarrow raises many kinds for damaged files
            why = f"it cannot be read: {first_line(error)}"
            raise BadRecord(f"{self.where(index)}: {why}") from None
        return {name: without_none(value) for name, value in row.items()}

    def where(self, index: int) -> str:
        return f"{self._path}, row {index + 1}"

    def identity(self) -> str:
        with open(self._path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def without_none(value: Any) -> Any:
    """A value without the keys that have none: a column holds every key of any of its rows."""
    if isinstance(value, dict):
        return {key: without_none(one) for key, one in value.items() if one is not None}
    return [without_none(one) for one in value] if isinstance(value, list) else value
