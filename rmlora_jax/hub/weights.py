"""Tensors of Hugging Face checkpoints as parameter trees, through the table of a model family."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from rmlora_jax.errors import UserError
from rmlora_jax.hub.pickled import PickledTensors
from rmlora_jax.hub.safetensors_file import SafetensorsFile
from rmlora_jax.hub.source import KINDS, weight_files
from rmlora_jax.models.family import Entry

LFS_POINTER = b"version https://git-lfs"

MISMATCH = "Do its config.json and weights belong together?"


class Tensors(Mapping[str, np.ndarray]):
    """The tensors of a folder by name, sharded or not; each is read when it is asked for.

    The first of these is taken: ``model.safetensors``, its shards, ``pytorch_model.bin``, its
    shards. Files are memory-mapped. Values keep their stored dtype (bfloat16 and the 8-bit floats
    through ml_dtypes).

    Raises:
      UserError: no weights in the folder, a missing shard, or a file that is damaged or holds
        anything but tensors.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._files = {}
        for path in whole_files(folder):
            file = PickledTensors(path) if path.suffix == ".bin" else SafetensorsFile(path)
            if twice := sorted(self._files.keys() & file.keys()):
                raise UserError(f"{folder}: {some(twice)} is in two shards; copy them again")
            self._files.update(dict.fromkeys(file, file))

    def __getitem__(self, name: str) -> np.ndarray:
        return self._files[name][name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._files))

    def __len__(self) -> int:
        return len(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without its values."""
        return self._files[name].shape(name)


def whole_files(folder: Path) -> list[Path]:
    """The files of a folder that hold its weights.

    Raises:
      UserError: there are no weights, or a file that an index lists is missing or only points to
        its content, as Git LFS leaves it.
    """
    files = weight_files(folder)
    for path in files:
        if not path.exists():
            raise UserError(f"{folder} lacks {path.name}, which its index lists; copy it too")
        if not path.is_file():
            raise UserError(f"{path} is not a file; copy the model's folder again")
        with open(path, "rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise UserError(
                    f"{path} only points to its content; type `git lfs pull` where it was cloned"
                )
    if not files:
        names = ", ".join(name for kind in KINDS for name in kind)
        raise UserError(f"{folder} has no weights ({names}); is it a model's folder?")
    return files


class Read(NamedTuple):
    """What ``read_params`` returns.

    Attributes:
      params: nested dict of numpy arrays.
      dropped: names of the leftovers that were found.
      absent: paths of the optional parameters that were not.
    """

    params: dict
    dropped: tuple[str, ...]
    absent: tuple[str, ...]


def read_params(
    tensors: Tensors,
    table: Sequence[Entry],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    prefix: str,
    leftovers: Iterable[str],
    optional: Iterable[str] = (),
    trained: Iterable[str] = (),
    dtype,
) -> Read:
    """The parameters that ``shapes`` asks for, read through the family's table.

    Args:
      tensors: the checkpoint.
      table: one entry a parameter.
      shapes: '/'-joined path -> shape of every parameter to read; stacked ones start with L.
      prefix: the part of the table's names that a file may leave out, such as ``"vit."``.
      leftovers: regular expressions (full match) of tensors to leave out.
      optional: regular expressions (full match) of paths whose module may be missing as a whole.
      trained: regular expressions (full match) of paths that are float32 whatever ``dtype`` is.
      dtype: of the parameters; each tensor is cast once.

    The names' older endings ``.gamma`` and ``.beta`` mean ``.weight`` and ``.bias``.

    Raises:
      UserError: a tensor is missing, unexpected, twice there, of another shape, or not floating.
    """
    table = [entry for entry in table if entry.path in shapes]
    places = [
        (entry, layer)
        for entry in table
        for layer in range(shapes[entry.path][0] if entry.stacked else 1)
    ]
    slots = {
        name: (entry.path, layer)
        for entry, layer in places
        for spelling in entry.names
        for name in (spelling.format(layer), spelling.format(layer).removeprefix(prefix))
    }
    found: dict[tuple[str, int], str] = {}
    dropped, unexpected = [], []
    for name in tensors:
        modern = re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", name))
        if modern in slots:
            twin = found.setdefault(slots[modern], name)
            if twin != name:
                raise UserError(f"{tensors.folder}: {twin!r} and {name!r} are the same parameter")
        elif any(re.fullmatch(pattern, name) for pattern in leftovers):
            dropped.append(name)
        else:
            unexpected.append(name)
    modules = {path.rpartition("/")[0] for path, _ in found}
    absent = tuple(
        entry.path
        for entry in table
        if any(re.fullmatch(pattern, entry.path) for pattern in optional)
        and entry.path.rpartition("/")[0] not in modules
    )
    missing = [
        entry.names[0].format(layer)
        for entry, layer in places
        if entry.path not in absent and (entry.path, layer) not in found
    ]
    if missing or unexpected:
        raise UserError(f"{tensors.folder}: {differences(missing, unexpected)}. {MISMATCH}")
    flat = {}
    for entry in table:
        if entry.path in absent:
            continue
        exact = any(re.fullmatch(pattern, entry.path) for pattern in trained)
        kind = np.float32 if exact else dtype
        flat[entry.path] = _read(tensors, entry, found, shapes[entry.path], kind)
    return Read(unflatten_dict(flat, sep="/"), tuple(dropped), absent)


def _read(tensors: Tensors, entry: Entry, found, shape, dtype) -> np.ndarray:
    layers = range(shape[0] if entry.stacked else 1)
    expected = stored_shape(shape[entry.stacked :], entry.axes)
    for layer in layers:  # before there is memory for any of them
        name = found[entry.path, layer]
        if tensors.shape(name) != expected:
            raise UserError(
                f"{tensors.folder}: {name!r} has shape {tensors.shape(name)}, but config.json "
                f"asks for {expected}. {MISMATCH}"
            )
    out = np.empty(shape, dtype)
    for layer in layers:
        name, target = found[entry.path, layer], out[layer] if entry.stacked else out
        tensor = tensors[name]
        if not jnp.issubdtype(tensor.dtype, jnp.floating):
            raise UserError(
                f"{tensors.folder}: {name!r} is {tensor.dtype}; only floating-point weights can be "
                "read, not quantised ones"
            )
        target[...] = tensor if entry.axes is None else tensor.transpose(entry.axes)
    return out


def to_stored(value: np.ndarray, axes: tuple[int, ...] | None) -> np.ndarray:
    """A parameter (of one layer) as files keep it: the inverse of ``Entry.axes``.

    It is contiguous, because safetensors writes an array's raw buffer, whatever its strides.

    >>> to_stored(np.array([[1, 2, 3], [4, 5, 6]]), axes=(1, 0)).tolist()
    [[1, 4], [2, 5], [3, 6]]
    """
    value = np.asarray(value)
    return np.ascontiguousarray(value if axes is None else value.transpose(np.argsort(axes)))


def stored_tensors(
    flat: Mapping[str, np.ndarray], table: Sequence[Entry], *, old_names: bool
) -> dict[str, np.ndarray]:
    """The tensors of a file from parameters by their paths: the inverse of `read_params`.

    ``old_names`` takes the first spelling of a name, else the last. Paths without an entry in
    ``table`` are left out.
    """
    found = {}
    for entry in table:
        if entry.path not in flat:
            continue
        name, value = entry.names[0 if old_names else -1], np.asarray(flat[entry.path])
        for layer, one in enumerate(value if entry.stacked else [value]):
            found[name.format(layer)] = to_stored(one, entry.axes)
    return found


def stored_shape(shape: tuple[int, ...], axes: tuple[int, ...] | None) -> tuple[int, ...]:
    """The shape in the file of a parameter (of one layer): the inverse of ``Entry.axes``.

    >>> stored_shape((16, 16, 3, 768), axes=(2, 3, 1, 0))
    (768, 3, 16, 16)
    """
    return shape if axes is None else tuple(shape[i] for i in np.argsort(axes))


def differences(missing: Sequence[str], unexpected: Sequence[str]) -> str:
    """What is missing and what is there besides, for an error message."""
    parts = [("lacks", missing), ("has unexpected", unexpected)]
    return "; ".join(f"{verb} {some(names)}" for verb, names in parts if names)


def some(names: Sequence[str], shown: int = 3) -> str:
    """The first few names for an error message.

    >>> some(["a", "b", "c", "d", "e"])
    "'a', 'b', 'c' and 2 more"
    """
    text = ", ".join(repr(name[:200]) for name in names[:shown])
    return text if len(names) <= shown else f"{text} and {len(names) - shown} more"
