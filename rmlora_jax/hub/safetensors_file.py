"""``*.safetensors``: a JSON header and raw values, which are mapped and not copied.

The package of that name reads the same files into numpy, except the 8-bit floats.
"""

import json
import math
import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from rmlora_jax.errors import UserError

DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    **{f"I{bits}": f"i{bits // 8}" for bits in (8, 16, 32, 64)},
    **{f"U{bits}": f"u{bits // 8}" for bits in (8, 16, 32, 64)},
    "BOOL": np.bool_,
}

LONGEST_HEADER = 100_000_000  # bytes, as in the published format
MOST_AXES = 8


class SafetensorsFile(Mapping[str, np.ndarray]):
    """The tensors of one file by name, as read-only views of the file.

    Raises:
      UserError: the file is damaged or cut short, or has numbers of an unknown type.
    """

    def __init__(self, path: Path):
        try:
            self._data, self._tensors = _parts(path)
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{path} is damaged or cut short ({error}); copy it again") from None

    def __getitem__(self, name: str) -> np.ndarray:
        dtype, shape, start = self._tensors[name]
        return np.frombuffer(self._data, dtype, math.prod(shape), start).reshape(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._tensors))

    def __len__(self) -> int:
        return len(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without its values."""
        return self._tensors[name][1]

    def forget(self, name: str) -> None:
        """Gives the memory of a tensor's pages back; they are read again when they are used."""
        dtype, shape, start = self._tensors[name]
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        size = start + math.prod(shape) * dtype.itemsize - first
        if size > 0 and hasattr(mmap, "MADV_DONTNEED"):
            self._data.madvise(mmap.MADV_DONTNEED, first, size)


def _parts(path: Path):
    """The mapped file, and name -> (dtype, shape, where its values start)."""
    with open(path, "rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    length = int.from_bytes(data[:8], "little")
    if length > min(LONGEST_HEADER, len(data) - 8):
        raise ValueError(f"its header has {length} bytes")
    header = json.loads(data[8 : 8 + length], object_pairs_hook=_unique)
    if not isinstance(header, dict):
        raise ValueError("its header is no object")
    header.pop("__metadata__", None)
    found = {name: _tensor(name, entry) for name, entry in header.items()}
    # Values lie one after the other and fill the file: no gap, no overlap, nothing cut off.
    start = 8 + length
    tensors = {}
    for name, (dtype, shape, begin, end) in sorted(found.items(), key=lambda item: item[1][2:]):
        if begin + 8 + length != start:
            raise ValueError(f"{name[:80]!r} does not start where the tensor before it ends")
        tensors[name] = (dtype, shape, start)
        start += end - begin
    if start != len(data):
        raise ValueError(f"it has {len(data)} bytes, its header speaks of {start}")
    return data, tensors


def _tensor(name: str, entry) -> tuple[np.dtype, tuple[int, ...], int, int]:
    match entry:
        case {"dtype": str(kind), "shape": [*shape], "data_offsets": [int(begin), int(end)]}:
            if kind not in DTYPES:
                raise ValueError(f"{name[:80]!r} is of the unknown type {kind[:80]!r}")
            dtype = np.dtype(DTYPES[kind])
            whole = all(type(n) is int and 0 <= n < 2**48 for n in (begin, end, *shape))
            fits = whole and len(shape) <= MOST_AXES
            if fits and end - begin == math.prod(shape) * dtype.itemsize:
                return dtype, tuple(shape), begin, end
    raise ValueError(f"its header describes {name[:80]!r} wrongly")


def _unique(pairs: list[tuple]) -> dict:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("its header has a name twice")
    return found
