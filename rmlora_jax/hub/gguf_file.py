"""``*.gguf``: llama.cpp's files of models, mapped; a tensor is dequantised when it is asked for.

A file holds metadata (names with values), then a table of tensors, then their values, mostly in
blocks of few bits. The header is read here: the reader of the package ``gguf`` takes seconds for a
large vocabulary, and loops without end where a damaged file claims 2**60 values. Formulas of the
blocks are the package's. A large model may be split, ``NAME-00001-of-00003.gguf``.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import mmap
import re
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rmlora_jax import extras
from rmlora_jax.errors import UserError

SUFFIX = ".gguf"
SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32  # of tensors, unless the metadata says another
MOST_AXES = 4
LONGEST_HEAD = 100_000_000  # bytes of metadata and table; those of Gemma 3, a large one, are 7 MB
MOST_VALUES = 2**24  # in a list of the metadata
MOST_SHARDS = 1000
CHUNK = 2**20  # values that are dequantised at once: the package needs a multiple of their memory

# The types of values in the metadata, by their numbers.
SCALARS = {
    **{0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?"},
    **{10: "<Q", 11: "<q", 12: "<d"},
}
TEXT, LIST = 8, 9

MISSING = f"GGUF files need the package gguf; type: {extras.install('gguf')}"


class Packed(NamedTuple):
    """Where a tensor is: its shape as in numpy, the name of its type, its first byte."""

    shard: int
    shape: tuple[int, ...]
    kind: str
    start: int


class GGUFFile:
    """The metadata and the tensors of a model in one file or in several.

    Attributes:
      path: of the first file.
      fields: name -> int, float, bool, str or a list of these.
      tensors: name -> `Packed`.

    Raises:
      UserError: a file is missing, damaged, cut short or not GGUF, or has numbers of a type that
        the package cannot dequantise; or the package is missing.
    """

    def __init__(self, files: Sequence[Path]):
        self._gguf = package()
        self.path = files[0]
        self.fields: dict[str, Any] = {}
        self.tensors: dict[str, Packed] = {}
        self._data = []
        self._kinds: dict[str, Any] = {}  # types whose formulas were tried
        for number, path in enumerate(files):
            try:
                self._read(path, number, len(files))
            except UserError:
                raise
            except (OSError, ValueError) as error:
                raise UserError(
                    f"{path} is damaged or cut short ({error}); copy it again"
                ) from None

    def values(self, name: str, rows: Any = slice(None)) -> np.ndarray:
        """A tensor in float32, or those of its rows (axis 0) that an index or a slice names."""
        packed = self.tensors[name]
        kind = self._gguf.GGMLQuantizationType[packed.kind]
        shape = self._gguf.quant_shape_to_byte_shape(packed.shape, kind)
        data = np.frombuffer(self._data[packed.shard], np.uint8, math.prod(shape), packed.start)
        part = data.reshape(shape)[rows]
        flat, width = part.reshape(-1, part.shape[-1]), packed.shape[-1]
        if packed.kind in ("F32", "F16"):
            flat = np.ascontiguousarray(flat).view(np.float32 if packed.kind == "F32" else "<f2")
        out = np.empty((len(flat), width), np.float32)
        step = max(1, CHUNK // width)
        for start in range(0, len(flat), step):
            out[start : start + step] = self._gguf.dequantize(flat[start : start + step], kind)
        return out.reshape(*part.shape[:-1], width)

    def _read(self, path: Path, number: int, count: int) -> None:
        """Adds the metadata and the table of one file."""
        with open(path, "rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        head = _Head(data)
        tensors, fields = head.counts()
        found = {}
        for _ in range(fields):
            name = head.text()
            if name in found:
                raise ValueError(f"it has the field {name[:80]!r} twice")
            found[name] = head.value(head.number("<I"))
        shards = (found.get("split.no", 0), found.get("split.count", 1) or 1)
        if shards != (number, count):
            raise ValueError(f"it says that it is file {shards[0]!r} of {shards[1]!r}, "
                             f"its name {number} of {count}")
        self.fields = found | self.fields
        table = [head.tensor() for _ in range(tensors)]
        alignment = found.get("general.alignment", ALIGNMENT)
        if type(alignment) is not int or not 1 <= alignment <= 2**16:
            raise ValueError(f"its general.alignment is {alignment!r}")
        first = end = -(-head.position // alignment) * alignment
        self._data.append(data)
        for name, shape, kind, offset in sorted(table, key=lambda entry: entry[3]):
            # One after the other: what is within the file cannot be more than the file.
            if name in self.tensors:
                raise ValueError(f"it has the tensor {name[:80]!r} twice")
            if first + offset < end:
                raise ValueError(f"{name[:80]!r} begins before the tensor before it ends")
            packed = Packed(number, shape, self._kind(path, name, kind, shape), first + offset)
            end = packed.start + self._size(packed)
            if end > len(data):
                raise ValueError(f"it ends before {name[:80]!r} does")
            self.tensors[name] = packed

    def _size(self, packed: Packed) -> int:
        block, size = self._kinds[packed.kind]
        return math.prod(packed.shape) // block * size

    def _kind(self, path: Path, name: str, number: int, shape: tuple[int, ...]) -> str:
        """The name of a type, which the package can dequantise and whose blocks fill the rows."""
        try:
            kind = self._gguf.GGMLQuantizationType(number)
        except ValueError:
            kind = None
        if kind is not None and kind.name not in self._kinds:
            block, size = self._gguf.GGML_QUANT_SIZES.get(kind, (1, 1))
            plain = kind.name in ("F32", "F16")
            try:
                empty = np.zeros((1, 1), np.float32) if plain else np.zeros((1, size), np.uint8)
                with np.errstate(all="ignore"):
                    self._gguf.dequantize(empty, kind)
                self._kinds[kind.name] = (block, size)
            except NotImplementedError:
                pass
        if kind is None or kind.name not in self._kinds:
            what = f"type {number}" if kind is None else f"type {kind.name}"
            raise UserError(
                f"{path}: {name[:80]!r} is of {what}, which the package gguf cannot dequantise; "
                "update the package, or take the file in another quantisation (Q8_0, Q4_K_M)"
            )
        if shape[-1] % self._kinds[kind.name][0]:
            raise ValueError(f"{name[:80]!r} of type {kind.name} has rows of {shape[-1]} values")
        return kind.name


class _Head:
    """Reads the head of a file from its start; a number or a text beyond the end is an error."""

    def __init__(self, data: mmap.mmap):
        self.data, self.position = data, 0
        self.end = min(len(data), LONGEST_HEAD)

    def counts(self) -> tuple[int, int]:
        """How many tensors and how many fields the file has."""
        if self.data[:4] != MAGIC:
            raise ValueError("it does not begin as a GGUF file")
        self.position = 4
        version = self.number("<I")
        if version not in VERSIONS:
            raise ValueError(f"it is of version {version}, known are {VERSIONS}")
        return self.number("<Q"), self.number("<Q")

    def number(self, form: str) -> Any:
        start = self.skip(struct.calcsize(form))
        return struct.unpack_from(form, self.data, start)[0]

    def text(self) -> str:
        start = self.skip(self.number("<Q"))
        return self.data[start : self.position].decode()

    def skip(self, size: int) -> int:
        """Where the next ``size`` bytes begin."""
        start, self.position = self.position, self.position + size
        if self.position > self.end:
            raise ValueError("its head goes beyond its end")
        return start

    def value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == TEXT:
            return self.text()
        if kind != LIST:
            raise ValueError(f"it has a value of the unknown type {kind}")
        kind, count = self.number("<I"), self.number("<Q")
        if count > MOST_VALUES or (kind not in SCALARS and kind != TEXT):
            raise ValueError(f"it has a list of {count} values of type {kind}")
        if kind == TEXT:
            return [self.text() for _ in range(count)]
        form = np.dtype(SCALARS[kind])
        start = self.skip(count * form.itemsize)
        return np.frombuffer(self.data, form, count, start).tolist()

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape as in numpy, number of the type, place among the values."""
        name, axes = self.text(), self.number("<I")
        if not 1 <= axes <= MOST_AXES:
            raise ValueError(f"{name[:80]!r} has {axes} axes")
        shape = tuple(self.number("<Q") for _ in range(axes))[::-1]
        if not all(1 <= n < 2**48 for n in shape):
            raise ValueError(f"{name[:80]!r} has the shape {shape}")
        return name, shape, self.number("<I"), self.number("<Q")


def package():
    """The module gguf.

    Raises:
      UserError: it is not installed.
    """
    try:
        import gguf
    except ImportError as error:  # it may itself lack what it imports
        raise UserError(f"{MISSING} ({error})") from None
    return gguf


def files_of(path: Path) -> list[Path]:
    """The files of a model in order, from the path of any of them.

    >>> [file.name for file in files_of(Path("m-00002-of-00002.gguf"))]
    ['m-00001-of-00002.gguf', 'm-00002-of-00002.gguf']

    Raises:
      UserError: the name says an impossible number of files.
    """
    split = SPLIT.fullmatch(path.name)
    if not split:
        return [path]
    name, number, count = split[1], int(split[2]), int(split[3])
    if not 1 <= number <= count <= MOST_SHARDS:
        raise UserError(f"{path} cannot be file {number} of {count}; rename it as it was published")
    return [path.with_name(f"{name}-{i + 1:05}-of-{count:05}.gguf") for i in range(count)]


def files_in(folder: Path) -> list[Path]:
    """The files of the one GGUF model in a folder, in order; none where there is none.

    Projectors of images (``mmproj*``) are left aside.

    Raises:
      UserError: there are several models.
    """
    found = {
        files_of(path)[0]
        for path in sorted(folder.glob(f"*{SUFFIX}"))
        if not path.name.startswith("mmproj")
    }
    if len(found) > 1:
        names = ", ".join(sorted(path.name for path in found)[:5])
        raise UserError(f"{folder} has {len(found)} GGUF models ({names}); give the path of one")
    return [file for path in found for file in files_of(path)]
