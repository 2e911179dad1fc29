"""``pytorch_model.bin`` without PyTorch and without running anything that is in it.

The file is a pickle beside raw bytes. Python's own unpickler calls what a pickle names, so none is
used here: a small machine of our own knows the opcodes that PyTorch writes for a dictionary of
tensors, and for everything else there is an error. What it builds are plain values, and
descriptions of tensors that point into the memory-mapped file.
"""

import math
import mmap
import pickletools
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from rmlora_jax.errors import UserError

DTYPES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}

# What a file may name: a dictionary, a tensor, a parameter, a storage. Nothing of these is called.
DICT = "collections OrderedDict"
TENSOR = "torch._utils _rebuild_tensor_v2"
PARAMETER = "torch._utils _rebuild_parameter"
STORAGES = {f"torch {name}": name for name in DTYPES}

MAGIC = 0x1950A86A20F9469CFC6C  # first pickle of a file of PyTorch before 1.6
MOST_AXES = 8


class Name(NamedTuple):
    """A global that a pickle names."""

    text: str


class Storage(NamedTuple):
    """Raw values in the file."""

    dtype: np.dtype
    key: str
    size: int  # in values


class Tensor(NamedTuple):
    """Where a tensor's values are; strides and offset count values."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Refused(Exception):
    """Why a file is not read."""


class PickledTensors(Mapping[str, np.ndarray]):
    """The tensors of a ``pytorch_model.bin`` by name; each is read when it is asked for.

    Raises:
      UserError: the file is damaged, or holds anything but tensors, which is then named.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self._bytes = _mapped(path)
            parts = _zip_parts if self._bytes[:4] == b"PK\x03\x04" else _legacy_parts
            self._tensors, self._starts = parts(self._bytes, path)
            for tensor in self._tensors.values():
                _check(tensor, self._starts, len(self._bytes))
        except _Refused as error:
            raise UserError(
                f"{path} is not read: {error}. Only tensors are taken from such a file; save it "
                "as safetensors where PyTorch is, or copy it again"
            ) from None
        except Exception as error:  # whatever a damaged file does to a parser
            raise UserError(
                f"{path} is damaged or cut short ({type(error).__name__}: {error}); copy it again"
            ) from None

    def __getitem__(self, name: str) -> np.ndarray:
        tensor = self._tensors[name]
        dtype = np.dtype(tensor.storage.dtype)
        start = self._starts[tensor.storage.key] + tensor.offset * dtype.itemsize
        count = _extent(tensor)
        flat = np.frombuffer(self._bytes, dtype, count, start)
        strides = [stride * dtype.itemsize for stride in tensor.strides]
        return np.lib.stride_tricks.as_strided(flat, tensor.shape, strides, writeable=False)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._tensors))

    def __len__(self) -> int:
        return len(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without its values."""
        return self._tensors[name].shape


def _mapped(path: Path):
    with open(path, "rb") as file:
        try:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            raise _Refused("it is empty") from None


def _extent(tensor: Tensor) -> int:
    """How many values of the storage the tensor reaches over, from its offset on."""
    if 0 in tensor.shape:
        return 0
    return 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.strides, strict=True))


def _check(tensor: Tensor, starts: Mapping[str, int], length: int) -> None:
    storage = tensor.storage
    if storage.key not in starts:
        raise _Refused(f"the values of storage {storage.key!r} are missing")
    end = starts[storage.key] + storage.size * np.dtype(storage.dtype).itemsize
    if end > length:
        raise _Refused(f"the values of storage {storage.key!r} are cut short")
    if tensor.offset + _extent(tensor) > storage.size or math.prod(tensor.shape) > storage.size:
        raise _Refused(f"a tensor of shape {tensor.shape} reaches beyond its storage")


def _zip_parts(data, path: Path):
    """The tensors, and where each storage starts, of a file of PyTorch 1.6 or later."""
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
    pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise _Refused("it is a zip file without a data.pkl")
    root = pickles[0].removesuffix("data.pkl")
    places = {name: _stored(data, entry) for name, entry in entries.items()}
    order = places.get(f"{root}byteorder")
    if order and data[order[0] : order[0] + order[1]] != b"little":
        raise _Refused("its numbers are big-endian")
    start, size = places[pickles[0]]
    tensors = _state_dict(_Machine(data[start : start + size]).run())
    prefix = f"{root}data/"
    starts = {n.removeprefix(prefix): at for n, (at, _) in places.items() if n.startswith(prefix)}
    for tensor in tensors.values():
        storage = tensor.storage
        held = places.get(prefix + storage.key, (0, 0))[1]
        if storage.size * np.dtype(storage.dtype).itemsize > held:
            raise _Refused(f"the values of storage {storage.key!r} are missing or cut short")
    return tensors, starts


def _stored(data, entry: zipfile.ZipInfo) -> tuple[int, int]:
    """(start, size) of an entry's bytes, which must be stored as they are."""
    if entry.compress_type != zipfile.ZIP_STORED:
        raise _Refused(f"its part {entry.filename!r} is compressed")
    at = entry.header_offset
    if data[at : at + 4] != b"PK\x03\x04":
        raise _Refused(f"its part {entry.filename!r} has no header")
    name, extra = struct.unpack("<HH", data[at + 26 : at + 30])
    start = at + 30 + name + extra
    if entry.file_size != entry.compress_size or start + entry.file_size > len(data):
        raise _Refused(f"its part {entry.filename!r} is cut short")
    return start, entry.file_size


def _legacy_parts(data, path: Path):
    """The same of an older file: five pickles in a row, then size and values of each storage."""
    stream = _Stream(data)
    if _Machine(stream).run() != MAGIC:
        raise _Refused("it is no file of PyTorch")
    if _Machine(stream).run() != 1001:
        raise _Refused("it has an unknown version")
    system = _Machine(stream).run()
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise _Refused("its numbers are big-endian")
    tensors = _state_dict(_Machine(stream).run())
    keys = _Machine(stream).run()
    if not isinstance(keys, list):
        raise _Refused("it has no list of storages")
    storages = {tensor.storage.key: tensor.storage for tensor in tensors.values()}
    starts = {}
    for key in keys:
        if key not in storages:
            raise _Refused("it has a storage that no tensor uses")
        storage = storages[key]
        (size,) = struct.unpack("<q", stream.read(8))
        if size != storage.size:
            raise _Refused(f"the values of storage {key!r} are cut short")
        starts[key] = stream.tell()
        stream.skip(size * np.dtype(storage.dtype).itemsize)
    return tensors, starts


class _Stream:
    """A file object over bytes that are not copied."""

    def __init__(self, data):
        self.data, self.at = data, 0

    def read(self, size: int) -> bytes:
        if size < 0:
            raise _Refused("it has a part of negative size")
        piece = self.data[self.at : self.at + size]
        self.at += len(piece)
        return piece

    def readline(self) -> bytes:
        end = self.data.find(b"\n", self.at)
        return self.read((len(self.data) if end < 0 else end + 1) - self.at)

    def skip(self, size: int) -> None:
        self.at += size

    def tell(self) -> int:
        return self.at


def _state_dict(value: Any) -> dict[str, Tensor]:
    if not isinstance(value, dict):
        raise _Refused(f"it holds a {type(value).__name__}, not a dictionary of tensors")
    for name, tensor in value.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            kind = type(tensor).__name__
            raise _Refused(f"its entry {str(name)[:80]!r} is a {kind}, not a tensor")
    return value


_MARK = object()
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_VALUES = {
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "INT", "LONG", "BINFLOAT", "FLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE"),
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}


class _Machine:
    """Runs one pickle: its values alone, on a stack, with no object of Python's made by name."""

    def __init__(self, stream):
        self.stream, self.stack, self.memo = stream, [], {}

    def run(self) -> Any:
        for opcode, argument, _ in pickletools.genops(self.stream):
            if opcode.name == "STOP":
                if len(self.stack) != 1:
                    raise _Refused("its pickle leaves something behind")
                return self.stack[0]
            self.step(opcode.name, argument)
        raise _Refused("its pickle has no end")

    def step(self, name: str, argument: Any) -> None:
        push = self.stack.append
        if name in ("PROTO", "FRAME"):
            return
        if name in _VALUES:
            push(argument)
        elif name in _CONSTANTS:
            push(_CONSTANTS[name])
        elif name in _EMPTY:
            push(_EMPTY[name]())
        elif name == "MARK":
            push(_MARK)
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            self.memo[argument] = self.top()
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = self.top()
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            if argument not in self.memo:
                raise _Refused("its pickle refers to what is not there")
            push(self.memo[argument])
        elif name == "TUPLE":
            push(tuple(self.marked()))
        elif name in _TUPLES:
            push(tuple(self.pop() for _ in range(_TUPLES[name]))[::-1])
        elif name in ("APPEND", "APPENDS"):
            values = [self.pop()] if name == "APPEND" else self.marked()
            self.top(list).extend(values)
        elif name in ("SETITEM", "SETITEMS"):
            values = [self.pop(), self.pop()][::-1] if name == "SETITEM" else self.marked()
            self.top(dict).update(_pairs(values))
        elif name == "GLOBAL":
            push(_known(argument))
        elif name == "STACK_GLOBAL":
            attribute, module = self.pop(str), self.pop(str)
            push(_known(f"{module} {attribute}"))
        elif name == "BINPERSID":
            push(_storage(self.pop()))
        elif name == "REDUCE":
            arguments = self.pop(tuple)
            push(_built(self.pop(Name), arguments))
        elif name == "BUILD":
            self.pop(dict)  # the _metadata of a state dict, which says nothing of its tensors
            self.top(dict)
        else:
            raise _Refused(f"its pickle has the instruction {name}")

    def pop(self, kind: type = object) -> Any:
        self.top(kind)
        return self.stack.pop()

    def top(self, kind: type = object) -> Any:
        value = self.stack[-1] if self.stack else _MARK
        if value is _MARK or not isinstance(value, kind):
            raise _Refused("its pickle is not made of a dictionary of tensors")
        return value

    def marked(self) -> list:
        """What was pushed since the last mark."""
        values = []
        while self.stack and self.stack[-1] is not _MARK:
            values.append(self.stack.pop())
        if not self.stack:
            raise _Refused("its pickle lacks a mark")
        self.stack.pop()
        return values[::-1]


def _known(text: str) -> Name:
    if text not in {DICT, TENSOR, PARAMETER, *STORAGES}:
        raise _Refused(f"it asks for {text.replace(' ', '.', 1)[:120]!r}")
    return Name(text)


def _pairs(values: list) -> list[tuple]:
    keys = values[::2]
    if len(values) % 2 or not all(isinstance(key, (str, int)) for key in keys):
        raise _Refused("it has a dictionary whose keys are not names")
    return list(zip(keys, values[1::2], strict=True))


def _storage(description: Any) -> Storage:
    match description:
        case ("storage", Name(text), str(key), str(), int(size), *rest) if text in STORAGES:
            if size >= 0 and all(extra is None for extra in rest):
                return Storage(DTYPES[STORAGES[text]], key, size)
    raise _Refused("it has a storage of an unknown kind")


def _built(name: Name, arguments: tuple) -> Any:
    match name.text, arguments:
        case "collections OrderedDict", ():
            return {}
        case "collections OrderedDict", ([*pairs],) if all(
            isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in pairs
        ):
            return dict(_pairs([value for pair in pairs for value in pair]))
        case "torch._utils _rebuild_parameter", (Tensor() as tensor, *_):
            return tensor
        case "torch._utils _rebuild_tensor_v2", (
            Storage() as storage,
            int(offset),
            tuple(shape),
            tuple(strides),
            *_,
        ):
            sizes = (offset, *shape, *strides)
            fits = len(shape) == len(strides) <= MOST_AXES
            if fits and all(type(n) is int and 0 <= n < 2**48 for n in sizes):
                return Tensor(storage, offset, shape, strides)
    raise _Refused(f"it calls {name.text.replace(' ', '.', 1)!r} with unknown arguments")
