"""Files that are whole or absent: written under a temporary name, then renamed into place."""

import contextlib
import json
import math
import os
import pathlib
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np

from rmlora_jax.errors import UserError, did_you_mean
from rmlora_jax.stopping import later


def write_bytes_atomic(path: str | os.PathLike, data: bytes) -> pathlib.Path:
    """`write_atomic` of ``data``."""
    return write_atomic(path, lambda file: file.write(data))


def write_atomic(
    path: str | os.PathLike, write: Callable[[BinaryIO], object]
) -> pathlib.Path:
    """Writes a file so that a reader, or a crash, sees the old file or the new one.

    ``write`` is given a temporary file in the same folder (created if missing). The file is then
    flushed to the disk and renamed to ``path``. Returns the path.

    Raises:
      OSError: the folder cannot be written; nothing of the attempt is left behind.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    with later(f"finishing {path.name}"):
        try:
            with open(temporary, "xb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)
    return path


def write_text_atomic(path: str | os.PathLike, text: str) -> pathlib.Path:
    """`write_bytes_atomic` of ``text`` in UTF-8."""
    return write_bytes_atomic(path, text.encode())


def write_arrays(path: str | os.PathLike, arrays: Mapping[str, Any]) -> None:
    """Keeps arrays for `read_arrays`. Where the folder cannot be written, nothing is kept."""
    with contextlib.suppress(OSError):
        write_atomic(path, lambda file: np.savez(file, **arrays))


def read_arrays(path: str | os.PathLike, names: Iterable[str]) -> list[np.ndarray] | None:
    """The arrays of these names that `write_arrays` kept; None for a missing or damaged file."""
    try:
        with open(path, "rb") as stored, np.load(stored, allow_pickle=False) as file:
            # Each array's checksum is verified.
            return [file[name] for name in names]
    except Exception:  # numpy, zipfile and zlib raise many kinds for a damaged file
        return None


def placed(path: str | os.PathLike) -> pathlib.Path:
    """The absolute path that a person means: ``~`` is the home folder.

    Raises:
      UserError: it begins with ``~``, and that home folder is unknown.
    """
    try:
        return pathlib.Path(path).expanduser().absolute()
    except RuntimeError as error:
        raise UserError(f"{os.fspath(path)!r}: {error}; write the whole path") from error


def is_writable(folder: pathlib.Path) -> bool:
    """Whether a folder, or the nearest existing folder above it, can be written.

    >>> is_writable(pathlib.Path("~/cache"))  # as os.path.expanduser leaves it without a home
    False
    """
    if folder.parts[:1] == ("~",):
        return False  # nobody's home
    there = next((p for p in (folder, *folder.absolute().parents) if os.path.lexists(p)), folder)
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def given_path(path: str | os.PathLike) -> pathlib.Path:
    """A path that a person gave: as it is where that exists, or else with ``~`` as the home."""
    path = pathlib.Path(path)
    return path if os.path.lexists(path) else pathlib.Path(os.path.expanduser(path))


def near(path: pathlib.Path) -> str:
    """A hint for a path that does not exist: the most similar name beside it, or nothing."""
    parent = path.parent
    names = [one.name for one in parent.iterdir()] if parent.is_dir() else []
    return did_you_mean(path.name, names)


def write_json(path: str | os.PathLike, value: Any) -> pathlib.Path:
    """Writes ``value`` (as `plain` makes it) as indented JSON, atomically.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     read_json(write_json(folder + "/a.json", {"loss": np.float32(0.1), "rank": (4, 8)}))
    {'loss': 0.1, 'rank': [4, 8]}

    Raises:
      TypeError: ``value`` holds something JSON has no word for.
    """
    return write_text_atomic(path, json.dumps(plain(value), indent=2, allow_nan=False) + "\n")


@contextlib.contextmanager
def new_folder(path: str | os.PathLike, *, overwrite: bool = False) -> Iterator[pathlib.Path]:
    """A folder that is whole or absent: yields a temporary one, then puts it at ``path``.

    The temporary folder lies beside ``path``. When the block ends, its files are flushed to the
    disk and it is renamed; when the block raises, it is removed. With ``overwrite`` the old folder
    is moved aside, the new one put in its place, and then the old one removed: a failure before
    the last step puts the old one back, and should the machine stop between the two renames, it is
    still whole, as ``.NAME.<hex>.old``.

    Args:
      path: the folder to make; missing parents are made too. A link to a folder stays a link.
      overwrite: replaces a folder that is there, with all that is in it.

    Raises:
      UserError: before anything is written: ``path`` is there and ``overwrite`` is not given, it is
        no folder, or the current or the home folder lies in it.
      OSError: the folder cannot be written.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as root:
    ...     with new_folder(root + "/model") as folder:
    ...         _ = write_json(folder / "config.json", {"rank": 4})
    ...     [path.name for path in pathlib.Path(root).rglob("*")]
    ['model', 'config.json']
    """
    path = pathlib.Path(path).expanduser().resolve()
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file; give the name of a folder")
    home = pathlib.Path(os.path.expanduser("~")).resolve()
    if any(place.is_relative_to(path) for place in (pathlib.Path.cwd(), home)):
        raise UserError(f"{path} holds your home or the folder you are in; give one of its own")
    if path.exists() and not overwrite:
        raise UserError(f"{path} is there already; give another folder, or overwrite=True")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    with later(f"finishing {path.name}/"):
        try:
            temporary.mkdir()
            yield temporary
            _sync_tree(temporary)
            if path.exists() and overwrite:
                _swap(temporary, path)
            else:
                os.rename(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _sync_folder(path.parent)


def _swap(new: pathlib.Path, path: pathlib.Path) -> None:
    old = path.with_name(f".{path.name}.{uuid.uuid4().hex}.old")
    os.rename(path, old)
    try:
        os.rename(new, path)
    except BaseException:
        os.rename(old, path)
        raise
    shutil.rmtree(old)


def read_json(path: str | os.PathLike) -> Any:
    """The value in a JSON file. Raises FileNotFoundError or json.JSONDecodeError, a ValueError."""
    return json.loads(pathlib.Path(path).read_text(encoding="utf-8"))


def read_object(path: str | os.PathLike) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
      UserError: the file is missing, cannot be read, is not JSON, or holds something else.
    """
    path = pathlib.Path(path)
    try:
        value = read_json(path)
    except FileNotFoundError:
        raise UserError(f"{path.parent} has no {path.name}; is it the right folder?") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}); copy it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}, not a JSON object; copy it again")
    return value


def read_json_lines(path: str | os.PathLike, key: str, kind: type, wrong: str) -> list[dict]:
    """The objects of a JSON-lines file, [] without one; each has a ``key`` of this ``kind``.

    A last line that a killed process left half written is left out.

    Raises:
      UserError: another line is no such object: "PATH: line N " and then ``wrong``.
    """
    path = pathlib.Path(path)
    if not path.exists():
        return []
    lines, rows = path.read_bytes().split(b"\n"), []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not isinstance(row[key], kind):
                raise TypeError(key)
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            if number == len(lines):
                break  # empty after a whole line, or torn
            raise UserError(f"{path}: line {number} {wrong}") from error
        rows.append(row)
    return rows


def plain(value: Any) -> Any:
    """``value`` in the types of strict JSON: numbers and arrays of numpy and jax included.

    A float32 becomes the shortest decimal that reads back as the same float32 (0.1, not
    0.10000000149011612). NaN and infinities, which strict JSON lacks, become None.

    >>> plain({"a": np.float32([0.1, np.nan]), "b": np.int32(3), "c": (1, True)})
    {'a': [0.1, None], 'b': 3, 'c': [1, True]}
    """
    if hasattr(value, "items"):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "dtype"):
        array = np.asarray(value)
        if array.dtype.kind in "biu":
            return array.tolist()
        if array.dtype.kind != "f":
            array = array.astype(np.float32)  # bfloat16 and its relatives are not floats to numpy
        if array.ndim:
            return [plain(v) for v in array]
        value = float(str(array))
    finite = not isinstance(value, float) or math.isfinite(value)
    return value if finite else None  # of other types, json.dumps gives the name in its own error


def _sync_tree(folder: pathlib.Path) -> None:
    for path in (*folder.rglob("*"), folder):
        if path.is_file():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
        else:
            _sync_folder(path)


def _sync_folder(folder: pathlib.Path) -> None:
    """Makes a rename survive a power cut, on systems whose folders can be flushed."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
