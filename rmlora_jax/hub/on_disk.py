"""Parameters that stay in their files until they are used."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from rmlora_jax.hub.placing import placed

SMALL = 2**20  # bytes of a parameter that the host may hold


@dataclasses.dataclass(frozen=True, eq=False)
class OnDisk:
    """A parameter in its file: a leaf of a tree of parameters that is read each time it is used.

    ``numpy.asarray`` reads all of it and ``x[layer]`` a layer, both to the host. `place` reads it
    to devices, and the functions of `jax.numpy` read it to the first one.

    Attributes:
      shape: of the parameter.
      dtype: that it is cast to when it is read.
      stored: the number of a layer -> its tensor as the file has it; without a stack that of 0.
      forget: the number of a layer -> nothing; gives the memory of the file's pages back.
      axes: for numpy.transpose from file to parameter (of one layer); None: as it is.
      stacked: whether the parameter has the layers on axis 0.

    >>> layers = [np.arange(6.0).reshape(2, 3), np.ones((2, 3))]
    >>> x = OnDisk((2, 3, 2), np.dtype("float16"), layers.__getitem__, print, (1, 0), True)
    >>> x[0].tolist(), x.astype("float32").place().dtype
    0
    0
    1
    ([[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]], dtype('float32'))
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    stored: Callable[[int], np.ndarray]
    forget: Callable[[int], None]
    axes: tuple[int, ...] | None = None
    stacked: bool = False

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def T(self) -> "OnDisk":
        """The transpose of a matrix without a stack."""
        assert self.ndim == 2 and not self.stacked
        axes = (self.axes or (0, 1))[::-1]
        return dataclasses.replace(self, shape=self.shape[::-1], axes=axes)

    def astype(self, dtype) -> "OnDisk":
        """The same parameter, cast to its dtype and then to another one when it is read."""
        old, new, stored = self.dtype, jnp.dtype(dtype), self.stored
        if jnp.promote_types(old, new) == old:  # the old one rounds nothing that the new one keeps
            return dataclasses.replace(self, dtype=new)
        return dataclasses.replace(self, dtype=new, stored=lambda layer: stored(layer).astype(old))

    def place(self, sharding: Sharding | None = None) -> jax.Array:
        """The parameter where ``sharding`` says, else on the first device.

        The host never holds more of it than one layer, or `SMALL` bytes.
        """
        sharding = sharding or SingleDeviceSharding(jax.local_devices()[0])
        if self.size * self.dtype.itemsize <= SMALL:  # nothing to compile
            host = np.asarray(self)
            return jax.make_array_from_callback(self.shape, sharding, lambda index: host[index])
        return placed(
            self.shape, self.dtype, sharding, self.stored, self.axes, self.stacked, self.forget
        )

    def every(self, stride: int) -> np.ndarray:
        """``numpy.asarray(x).ravel()[::stride]``, of which the host holds one layer at most."""
        inner = self.shape[self.stacked :]
        size, found = math.prod(inner), []
        for layer in range(self.shape[0] if self.stacked else 1):
            numbers = np.arange(-layer * size % stride, size, stride)
            found.append(self._layer(layer)[np.unravel_index(numbers, inner)].astype(self.dtype))
            self.forget(layer)
        return np.concatenate(found)

    def __getitem__(self, layer: int) -> np.ndarray:
        assert self.stacked
        own = np.array(self._layer(layer), self.dtype, order="C")
        self.forget(layer)
        return own

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("a parameter on disk cannot be seen as an array without a copy")
        out = np.empty(self.shape, self.dtype)
        for layer in range(self.shape[0] if self.stacked else 1):
            out[layer if self.stacked else ...] = self._layer(layer)
            self.forget(layer)
        return out if dtype is None else out.astype(dtype, copy=False)

    def __jax_array__(self) -> jax.Array:
        return self.place()

    def _layer(self, layer: int) -> np.ndarray:
        """A layer in its stored dtype, where possible a view of the file."""
        own = self.stored(layer)
        return own if self.axes is None else own.transpose(self.axes)


def on_device(tree: Any) -> Any:
    """A tree whose parameters on disk are read to the first device, one at a time."""
    return jax.tree.map(lambda x: x.place() if isinstance(x, OnDisk) else x, tree)
