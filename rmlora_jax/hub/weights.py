"""Tensors of Hugging Face checkpoints as parameter trees, through the table of a model family."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from rmlora_jax.errors import UserError
from rmlora_jax.hub.gguf_file import SUFFIX
from rmlora_jax.hub.gguf_tensors import open_gguf
from rmlora_jax.hub.on_disk import OnDisk
from rmlora_jax.hub.pickled import PickledTensors
from rmlora_jax.hub.safetensors_file import SafetensorsFile
from rmlora_jax.hub.source import KINDS, weight_files
from rmlora_jax.models.family import AS_IS, Entry, Family

LFS_POINTER = b"version https://git-lfs"

MISMATCH = "Do its config.json and weights belong together?"


class Tensors(Mapping[str, np.ndarray]):
    """The tensors of a folder by name, sharded or not; each is read when it is asked for.

    The first of these is taken: ``model.safetensors``, its shards, ``pytorch_model.bin``, its
    shards, a GGUF model. Files are memory-mapped. Values keep their stored dtype (bfloat16 and the
    8-bit floats through ml_dtypes); those of GGUF are dequantised to float32. A file that is
    missing, damaged or holds anything else is a UserError.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._files = {}
        paths = whole_files(folder)
        self._states = {path: _state(path) for path in paths}
        for file in [open_gguf(paths)] if paths[0].suffix == SUFFIX else map(_tensors, paths):
            if twice := sorted(self._files.keys() & file.keys()):
                raise UserError(f"{folder}: {some(twice)} is in two shards; copy them again")
            self._files.update(dict.fromkeys(file, file))

    def __getitem__(self, name: str) -> np.ndarray:
        return self._files[name][name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._files))

    def __len__(self) -> int:
        return len(self._files)

    def check(self) -> None:
        """Raises a UserError if a file was written to since it was opened.

        A file that another took the place of, under its name, stays readable.
        """
        for path, (inode, *written) in self._states.items():
            now = _state(path)
            if now and now[0] == inode and now[1:] != (*written,):
                raise UserError(f"{path} was changed while it was in use; start again")

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without its values."""
        return self._files[name].shape(name)

    def forget(self, name: str) -> None:
        """Gives the memory of a mapped tensor back to the system."""
        if isinstance(file := self._files[name], SafetensorsFile):
            file.forget(name)


def _state(path: Path) -> tuple[int, ...]:
    """What tells that a file was written to; () where there is none any more."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _tensors(path: Path) -> Mapping[str, np.ndarray]:
    return PickledTensors(path) if path.suffix == ".bin" else SafetensorsFile(path)


def whole_files(folder: Path) -> list[Path]:
    """The files of a folder that hold its weights, each whole: Git LFS may leave only pointers."""
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


def layers_of(entry: Entry, shapes: Mapping[str, tuple[int, ...]]) -> range:
    """The layers that a parameter is stacked over; layer 0 alone without a stack."""
    return range(shapes[entry.path][0] if entry.stacked else 1)


def places(family: Family, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[str, int]]:
    """Each name that a file may give a parameter -> (path, layer), for the paths in ``shapes``."""
    return {
        name: (entry.path, layer)
        for entry in family.table
        if entry.path in shapes
        for layer in layers_of(entry, shapes)
        for spelled in (spelling.format(layer) for spelling in entry.names)
        for name in (spelled, spelled.removeprefix(family.prefix))
    }


def read_params(
    tensors: Tensors,
    family: Family,
    shapes: Mapping[str, tuple[int, ...]],
    leftovers: Iterable[str],
    dtype,
) -> tuple[dict[str, OnDisk], tuple[str, ...]]:
    """('/'-joined path -> parameter, names of the leftovers), found through the family's table.

    A module whose parameters are all among ``family.new`` may be missing as a whole. The older
    endings ``.gamma`` and ``.beta`` mean ``.weight`` and ``.bias``.

    Args:
      tensors: the checkpoint.
      family: of the model.
      shapes: path -> shape of every parameter to read; stacked ones start with L.
      leftovers: regular expressions (full match) of tensors to leave out.
      dtype: of the parameters but those in ``family.new``, which are float32.

    Raises:
      UserError: a tensor is missing, unexpected, stored twice, or of another shape. That a tensor
        is not floating is found when it is read.
    """
    slots = places(family, shapes)
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
    read, missing = {}, []
    for entry in family.table:
        new = any(re.fullmatch(pattern, entry.path) for pattern in family.new)
        if entry.path in shapes and not (new and entry.path.rpartition("/")[0] not in modules):
            read[entry] = np.float32 if new else dtype
            layers = layers_of(entry, shapes)
            missing += [entry.names[0].format(i) for i in layers if (entry.path, i) not in found]
    if missing or unexpected:
        raise UserError(f"{tensors.folder}: {differences(missing, unexpected)}. {MISMATCH}")
    for entry in read:  # before memory is allocated for any of them
        _check_shapes(tensors, entry, found, shapes)

    def on_disk(entry: Entry, kind) -> OnDisk:
        shape = shapes[entry.path]
        names = [found[entry.path, layer] for layer in layers_of(entry, shapes)]

        def stored(layer: int) -> np.ndarray:
            tensors.check()
            return from_stored(tensors, names[layer], AS_IS, tensors.folder)

        def forget(layer: int) -> None:
            tensors.forget(names[layer])

        return OnDisk(shape, np.dtype(kind), stored, forget, entry.axes, entry.stacked)

    return {entry.path: on_disk(entry, kind) for entry, kind in read.items()}, tuple(dropped)


def _check_shapes(tensors: Tensors, entry: Entry, found, shapes) -> None:
    expected = stored_shape(shapes[entry.path][entry.stacked :], entry.axes)
    for layer in layers_of(entry, shapes):
        name = found[entry.path, layer]
        if tensors.shape(name) != expected:
            raise UserError(
                f"{tensors.folder}: {name!r} has shape {tensors.shape(name)}, but config.json "
                f"asks for {expected}. {MISMATCH}"
            )


def from_stored(tensors, name: str, axes: tuple[int, ...] | None, where: Path) -> np.ndarray:
    """A tensor with the axes of a parameter (of one layer), in its stored dtype.

    Raises:
      UserError: the tensor, which is in ``where``, is not floating.
    """
    value = tensors[name]
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise UserError(f"{where}: {name!r} is {value.dtype}; it must be floating, not quantised")
    return value if axes is None else value.transpose(axes)


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
