"""``pytorch_model.bin`` without PyTorch and without running anything that is in it.

The file is a pickle beside raw bytes. Python's own unpickler calls what a pickle names, so none is
used here: a small machine of our own knows the instructions that PyTorch writes for a dictionary of
tensors, and for everything else there is an error. What it builds are plain values, and
descriptions of tensors that point into the memory-mapped file. Its time and memory grow no faster
than the file.
"""

import math
import mmap
import pickletools
import struct
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import ml_dtypes
import numpy as np

from rmlora_jax.errors import UserError

# What a file may name, and nothing of it is called: a dictionary, a tensor, a parameter, a type.
DICT = "collections OrderedDict"
TENSOR = "torch._utils _rebuild_tensor_v2"
TYPED_TENSOR = "torch._utils _rebuild_tensor_v3"  # its storage has no type: the 8-bit floats
PARAMETER = "torch._utils _rebuild_parameter"
BYTES = "torch.storage UntypedStorage"
STORAGES = {
    "torch DoubleStorage": np.dtype(np.float64),
    "torch FloatStorage": np.dtype(np.float32),
    "torch HalfStorage": np.dtype(np.float16),
    "torch BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch LongStorage": np.dtype(np.int64),
    "torch IntStorage": np.dtype(np.int32),
    "torch ShortStorage": np.dtype(np.int16),
    "torch CharStorage": np.dtype(np.int8),
    "torch ByteStorage": np.dtype(np.uint8),
    "torch BoolStorage": np.dtype(np.bool_),
    BYTES: np.dtype(np.uint8),
}
TYPES = {
    "torch float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "torch float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
}
KNOWN = {DICT, TENSOR, TYPED_TENSOR, PARAMETER, *STORAGES, *TYPES}

MAGIC = 0x1950A86A20F9469CFC6C  # first pickle of a file of PyTorch before 1.6
VERSION = 1001  # its second
LOCAL_HEADER = b"PK\x03\x04"
MOST_AXES = 8
LARGEST = 2**48  # of a size, an offset, a stride


@dataclass(frozen=True, slots=True)
class Name:
    """A global that a pickle names."""

    text: str


@dataclass(frozen=True, slots=True)
class Storage:
    """Raw values in the file, ``size`` of them."""

    dtype: np.dtype
    key: str
    size: int


@dataclass(frozen=True, slots=True)
class Tensor:
    """Where a tensor's values are; strides and offset count values."""

    storage: Storage
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def extent(self) -> int:
        """How many values of the storage it reaches over, from its offset on."""
        if 0 in self.shape:
            return 0
        return 1 + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))


class _Refused(Exception):
    """Why a file is not read."""


class PickledTensors(Mapping[str, np.ndarray]):
    """The tensors of a ``pytorch_model.bin`` by name, as read-only views of the file.

    Reads PyTorch's zip format and the one before it (until PyTorch 1.5).

    Raises:
      UserError: the file is damaged, or holds anything but tensors, which is then named.
    """

    def __init__(self, path: Path):
        try:
            with open(path, "rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            zipped = self._data[:4] == LOCAL_HEADER
            self._tensors, places = (_zipped if zipped else _legacy)(self._data, path)
            for tensor in self._tensors.values():
                _check(tensor, places)
            self._starts = {key: start for key, (start, _) in places.items()}
        except _Refused as error:
            raise UserError(
                f"{path} is not read: {error}. Only tensors are taken from such a file; copy it "
                "again, or save it as safetensors where PyTorch is"
            ) from None
        except Exception as error:  # whatever a damaged file does to a parser
            reason = str(error)[:200] or type(error).__name__
            raise UserError(f"{path} is damaged or cut short ({reason}); copy it again") from None

    def __getitem__(self, name: str) -> np.ndarray:
        tensor = self._tensors[name]
        size = tensor.dtype.itemsize
        start = self._starts[tensor.storage.key] + tensor.offset * size
        flat = np.frombuffer(self._data, tensor.dtype, tensor.extent, start)
        strides = [stride * size for stride in tensor.strides]
        return np.lib.stride_tricks.as_strided(flat, tensor.shape, strides, writeable=False)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._tensors))

    def __len__(self) -> int:
        return len(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without its values."""
        return self._tensors[name].shape


def _check(tensor: Tensor, places: Mapping[str, tuple[int, int]]) -> None:
    """The storage is there as long as it says, and the tensor within it."""
    storage = tensor.storage
    _, held = places.get(storage.key, (0, -1))
    if storage.size * storage.dtype.itemsize > held:
        raise _Refused(f"the values of storage {storage.key[:80]!r} are missing or cut short")
    values = storage.size * storage.dtype.itemsize // tensor.dtype.itemsize
    # The second test is for strides of 0, which would make much out of few values.
    if tensor.offset + tensor.extent > values or math.prod(tensor.shape) > values:
        raise _Refused(f"a tensor of shape {tensor.shape} reaches beyond its storage")


def _zipped(data, path: Path):
    """The tensors, and key -> (start, bytes) of the storages, of a file of PyTorch 1.6 or later."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    places = {entry.filename: _stored(data, entry) for entry in entries}
    if len(places) < len(entries):
        raise _Refused("it has two parts of one name")
    pickles = [name for name in places if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise _Refused("it is a zip file without a data.pkl")
    root = pickles[0].removesuffix("data.pkl")
    start, size = places.get(f"{root}byteorder", (0, 0))
    if data[start : start + size] not in (b"", b"little"):
        raise _Refused("its numbers are big-endian")
    start, size = places[pickles[0]]
    tensors = _state_dict(_Machine().run(_Stream(data, start, start + size)))
    values = f"{root}data/"
    return tensors, {
        name.removeprefix(values): place
        for name, place in places.items()
        if name.startswith(values)
    }


def _stored(data, entry: zipfile.ZipInfo) -> tuple[int, int]:
    """(start, size) of an entry's bytes, which must be stored as they are."""
    what, at = f"its part {entry.filename[:80]!r}", entry.header_offset
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
        raise _Refused(f"{what} is compressed or encrypted")
    if at < 0 or data[at : at + 4] != LOCAL_HEADER:
        raise _Refused(f"{what} has no header")
    name, extra = struct.unpack("<HH", data[at + 26 : at + 30])
    start = at + 30 + name + extra
    if not 0 <= entry.file_size == entry.compress_size <= len(data) - start:
        raise _Refused(f"{what} is cut short")
    return start, entry.file_size


def _legacy(data, path: Path):
    """The same of an older file: five pickles in a row, then size and values of each storage."""
    stream = _Stream(data, 0, len(data))
    magic, version, system = (_Machine().run(stream) for _ in range(3))
    if (magic, version) != (MAGIC, VERSION) or not isinstance(system, dict):
        raise _Refused("it is no file of PyTorch")
    if system.get("little_endian") is not True:
        raise _Refused("its numbers are big-endian")
    tensors = _state_dict(_Machine().run(stream))
    keys = _Machine().run(stream)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise _Refused("it has no list of storages")
    storages: dict[str, Storage] = {}
    for storage in (tensor.storage for tensor in tensors.values()):
        if storages.setdefault(storage.key, storage) != storage:
            raise _Refused(f"it describes storage {storage.key[:80]!r} in two ways")
    if sorted(keys) != sorted(storages):
        raise _Refused("its list of storages is not that of its tensors")
    places = {}
    for key in keys:
        size, item = struct.unpack("<q", stream.read(8))[0], storages[key].dtype.itemsize
        if size != storages[key].size:
            raise _Refused(f"the values of storage {key[:80]!r} are missing or cut short")
        places[key] = (stream.tell(), min(size * item, stream.end - stream.tell()))
        stream.at += size * item
    return tensors, places


class _Stream:
    """What pickletools reads from: a part of the mapped file, of which nothing is copied ahead."""

    def __init__(self, data, start: int, end: int):
        self.data, self.at, self.end = data, start, end

    def read(self, size: int) -> bytes:
        piece = self.data[self.at : min(self.at + max(size, 0), self.end)]
        self.at += len(piece)
        return piece

    def readline(self) -> bytes:
        newline = self.data.find(b"\n", self.at, self.end)
        return self.read((self.end if newline < 0 else newline + 1) - self.at)

    def tell(self) -> int:
        return self.at


def _state_dict(value: Any) -> dict[str, Tensor]:
    if not isinstance(value, dict):
        raise _Refused(f"it holds a {type(value).__name__}, not a dictionary of tensors")
    for name, tensor in value.items():
        if not isinstance(tensor, Tensor):
            kind = type(tensor).__name__
            raise _Refused(f"its entry {name[:80]!r} is a {kind}, not a tensor")
    return value


# Instructions of pickle protocol 2 and later. Those of protocols 0 and 1, of objects, of
# extensions and of bytes are not among them: PyTorch writes none for a dictionary of tensors.
_IGNORED = {"PROTO", "FRAME"}
_VALUES = {
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_PUT = {"BINPUT", "LONG_BINPUT", "MEMOIZE"}
_GET = {"BINGET", "LONG_BINGET"}
_MARK = object()


class _Machine:
    """Runs one pickle: its values alone, on a stack, with no object of Python's made by name."""

    def __init__(self):
        self.stack, self.memo, self.made = [], [], 0

    def run(self, stream: _Stream) -> Any:
        start = stream.tell()
        for opcode, argument, at in pickletools.genops(cast(IO[bytes], stream)):
            if opcode.name == "STOP":
                return self.pop()
            if opcode.name not in _IGNORED:
                self.step(opcode.name, argument)
            # An empty dictionary takes one byte there and 64 here. PyTorch's pickles have a
            # container in about 15 bytes.
            if self.made > 1000 + (cast(int, at) - start) / 4:
                raise _Refused("its pickle is made of empty containers")
        raise _Refused("its pickle has no end")

    def step(self, name: str, argument: Any) -> None:
        push = self.stack.append
        if name in _VALUES:
            push(argument)
        elif name in _CONSTANTS:
            push(_CONSTANTS[name])
        elif name in _EMPTY:
            push(self.new(_EMPTY[name]()))
        elif name == "MARK":
            push(_MARK)
        elif name in _PUT:
            self.remember(len(self.memo) if name == "MEMOIZE" else argument)
        elif name in _GET:
            if argument >= len(self.memo):
                raise _Refused("its pickle refers to what is not there")
            push(self.memo[argument])
        elif name == "TUPLE":
            push(self.new(tuple(self.marked())))
        elif name in _TUPLES:
            push(self.new(tuple(self.pop() for _ in range(_TUPLES[name]))[::-1]))
        elif name in ("APPEND", "APPENDS"):
            values = [self.pop()] if name == "APPEND" else self.marked()
            self.top(list).extend(values)
        elif name in ("SETITEM", "SETITEMS"):
            values = [self.pop(), self.pop()][::-1] if name == "SETITEM" else self.marked()
            self.top(dict).update(_pairs(values))
        elif name == "GLOBAL":
            push(self.new(_known(argument)))
        elif name == "STACK_GLOBAL":
            attribute, module = self.pop(str), self.pop(str)
            push(self.new(_known(f"{module} {attribute}")))
        elif name == "BINPERSID":
            push(self.new(_storage(self.pop(tuple))))
        elif name == "REDUCE":
            arguments, called = self.pop(tuple), self.pop(Name)
            push(self.new(_built(called.text, arguments)))
        elif name == "BUILD":
            self.pop(dict)  # the _metadata of a state dict, which says nothing of its tensors
            self.top(dict)
        else:
            raise _Refused(f"its pickle has the instruction {name}")

    def new(self, value: Any) -> Any:
        self.made += 1
        return value

    def remember(self, index: int) -> None:
        value = self.top()
        if index > len(self.memo):
            raise _Refused("its pickle remembers out of order")
        self.memo[index : index + 1] = [value]

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
    if text not in KNOWN:
        raise _Refused(f"it asks for {text.replace(' ', '.', 1)[:120]!r}")
    return Name(text)


def _pairs(values: list) -> list[tuple[str, Any]]:
    # Only strings are keys: their hashes are salted, so that no file can make them collide.
    if len(values) % 2 or not all(isinstance(key, str) for key in values[::2]):
        raise _Refused("it has a dictionary whose keys are not names")
    return list(zip(values[::2], values[1::2], strict=True))


def _storage(description: tuple) -> Storage:
    # PyTorch before 1.6 adds a view of the storage, which is always None in what it saves.
    if len(description) == 6 and description[5] is None:
        description = description[:5]
    match description:
        case ("storage", Name(text=text), str(key), str(), int(size)) if text in STORAGES:
            if _sizes(size):
                return Storage(STORAGES[text], key, size)
    raise _Refused("it has a storage of an unknown kind")


def _built(name: str, arguments: tuple) -> Any:
    """What a call would return; nothing is called."""
    match name, arguments:
        case _ if len(arguments) > 8:
            pass
        case str(text), () if text == DICT:
            return {}
        case str(text), (list(pairs),) if text == DICT:  # as Python 2 wrote it
            return _from_pairs(pairs)
        case str(text), (Tensor() as tensor, *_) if text == PARAMETER:
            return tensor
        case str(text), (Storage() as storage, offset, tuple(shape), tuple(strides), *_) if (
            text == TENSOR
        ):
            return _tensor(storage, storage.dtype, offset, shape, strides)
        case str(text), (
            Storage() as storage,
            offset,
            tuple(shape),
            tuple(strides),
            _,
            _,
            Name(text=dtype),
            *_,
        ) if text == TYPED_TENSOR and dtype in TYPES:
            return _tensor(storage, TYPES[dtype], offset, shape, strides)
    raise _Refused(f"it calls {name.replace(' ', '.', 1)!r} with unknown arguments")


def _from_pairs(pairs: list) -> dict:
    if not all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in pairs):
        raise _Refused("it has a dictionary that is not made of pairs")
    return dict(_pairs([value for pair in pairs for value in pair]))


def _tensor(storage: Storage, dtype: np.dtype, offset, shape: tuple, strides: tuple) -> Tensor:
    fits = len(shape) == len(strides) <= MOST_AXES
    if not fits or not _sizes(offset, *shape, *strides):
        raise _Refused("it has a tensor without a proper shape")
    return Tensor(storage, dtype, offset, shape, strides)


def _sizes(*numbers) -> bool:
    return all(type(n) is int and 0 <= n < LARGEST for n in numbers)
