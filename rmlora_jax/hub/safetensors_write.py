"""Writing ``*.safetensors`` one tensor at a time, in several files where one would be too large."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rmlora_jax.hub.safetensors_file import DTYPES

MOST_BYTES = 5 * 10**9  # of a file, as huggingface_hub splits models
INDEX = "model.safetensors.index.json"
ALIGNMENT = 8  # bytes: the values start at a multiple of it
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}


class Tensor(NamedTuple):
    """What a file's header says of a tensor."""

    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(
    folder: Path,
    tensors: Mapping[str, Tensor],
    values: Iterable[tuple[str, np.ndarray]],
    *,
    most: int | None = None,
) -> None:
    """Writes ``model.safetensors``, or its shards and their index where it has more bytes.

    A shard ends before the tensor that would make it larger than ``most`` bytes (None: 5 GB). Only
    one value is in memory at a time.

    Args:
      folder: to write into.
      tensors: all names, in the order in which ``values`` come.
      values: (name, contiguous value) of each.

    Raises:
      OSError: the files cannot be written.
    """
    limit, files = most or MOST_BYTES, list[dict[str, Tensor]]()
    for name, tensor in tensors.items():
        full = files and sum(x.size for x in files[-1].values()) + tensor.size > limit
        if full or not files:
            files.append({})
        files[-1][name] = tensor
    count, rest = len(files), iter(values)
    shards = [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    for shard, inside in zip(shards, files, strict=True):
        with open(folder / (shard if count > 1 else "model.safetensors"), "wb") as file:
            file.write(_header(inside))
            for name, tensor in inside.items():
                given, value = next(rest)
                if (given, value.dtype, value.shape) != (name, *tensor):
                    raise ValueError(f"{given!r} {value.dtype} {value.shape} came for {name!r} "
                                     f"{tensor.dtype} {tensor.shape}")
                file.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
    if count > 1:
        total = sum(tensor.size for tensor in tensors.values())
        where = {name: shard for shard, inside in zip(shards, files, strict=True)
                 for name in inside}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _header(tensors: Mapping[str, Tensor]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, tensor in tensors.items():
        entries[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape),
                         "data_offsets": [start, start + tensor.size]}
        start += tensor.size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
