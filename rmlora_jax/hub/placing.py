"""Parameters from a file to their devices, without a copy of the model on the host."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding


def placed(
    shape: tuple[int, ...],
    dtype,
    sharding: Sharding,
    stored: Callable[[int], np.ndarray],
    axes: tuple[int, ...] | None,
    stacked: bool,
    forget: Callable[[int], None] = lambda layer: None,
) -> jax.Array:
    """A parameter where ``sharding`` says, filled layer by layer.

    The host never holds more than one layer, and of that only what its devices hold. A layer goes
    to a device as it is stored, and is transposed and cast there.

    Args:
      shape, dtype: of the parameter.
      sharding: of the parameter, over a mesh or of one device.
      stored: the number of a layer -> its tensor as the file has it; without a stack that of 0.
      axes: for numpy.transpose from file to parameter (of one layer); None: as it is.
      stacked: whether the parameter has the layers on axis 0.
      forget: is called with the number of a layer when its tensor is no longer needed.
    """
    order = [*range(len(shape) - stacked)] if axes is None else np.argsort(axes).tolist()
    own = _of_a_layer(sharding, order, stacked)
    if not stacked:
        found = _turned(sharding, jnp.dtype(dtype), axes)(_on_devices(stored(0), own))
        found.block_until_ready()
        forget(0)
        return found
    found = jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)()
    for layer in range(shape[0]):
        found = _filled(sharding, axes)(found, _on_devices(stored(layer), own), layer)
        found.block_until_ready()  # before the host reads the next layer
        forget(layer)
    return found


def _of_a_layer(sharding: Sharding, order: list[int], stacked: bool) -> Sharding:
    """The sharding of a layer with the file's order of axes."""
    if isinstance(sharding, SingleDeviceSharding):
        return sharding
    assert isinstance(sharding, NamedSharding)
    spec = [*sharding.spec, *[None] * (len(order) + stacked - len(sharding.spec))][stacked:]
    return NamedSharding(sharding.mesh, PartitionSpec(*(spec[axis] for axis in order)))


def _on_devices(tensor: np.ndarray, sharding: Sharding) -> jax.Array:
    """A stored tensor on its devices; the host cuts each part that they hold once."""
    cut, parts = {}, []
    for device, index in sharding.addressable_devices_indices_map(tensor.shape).items():
        whole = index or (slice(None),) * tensor.ndim
        inside = tuple(s.indices(n)[:2] for s, n in zip(whole, tensor.shape, strict=True))
        if inside not in cut:
            cut[inside] = _cut(tensor, inside)
        parts.append(jax.device_put(cut[inside], device))
    return jax.make_array_from_single_device_arrays(tensor.shape, sharding, parts)


def _cut(tensor: np.ndarray, inside) -> np.ndarray:
    part = tensor[tuple(slice(*bounds) for bounds in inside)]
    wide = part.dtype.itemsize > 4  # JAX has no float64 by default
    return np.ascontiguousarray(part, np.float32 if wide else None)


@functools.lru_cache(256)
def _filled(sharding: Sharding, axes: tuple[int, ...] | None) -> Callable[..., jax.Array]:
    """(stack, piece, layer) -> the stack with this layer; one program for all devices."""

    def filled(stack, piece, layer):
        piece = piece if axes is None else piece.transpose(axes)
        return jax.lax.dynamic_update_index_in_dim(stack, piece.astype(stack.dtype), layer, 0)

    return jax.jit(filled, donate_argnums=0, out_shardings=sharding)


@functools.lru_cache(256)
def _turned(sharding: Sharding, dtype, axes: tuple[int, ...] | None) -> Callable[..., jax.Array]:
    """A piece -> the parameter."""
    return jax.jit(
        lambda piece: (piece if axes is None else piece.transpose(axes)).astype(dtype),
        out_shardings=sharding,
    )
