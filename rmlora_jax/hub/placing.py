"""Parameters from a file to their devices, without a copy of the model on the host."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np


def placed(
    shape: tuple[int, ...],
    dtype,
    sharding: jax.sharding.Sharding,
    stored: Callable[[int], np.ndarray],
    axes: tuple[int, ...] | None,
    stacked: bool,
) -> jax.Array:
    """A parameter where ``sharding`` says, filled layer by layer.

    The host never holds more than one layer, and of that only what its devices hold. A layer goes
    to a device as it is stored, and is transposed and cast there.

    Args:
      shape, dtype: of the parameter.
      sharding: of the parameter.
      stored: the number of a layer -> its tensor as the file has it; without a stack that of 0.
      axes: for numpy.transpose from file to parameter (of one layer); None: as it is.
      stacked: whether the parameter has the layers on axis 0.
    """
    bounds = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        whole = index or (slice(None),) * len(shape)
        bounds[device] = tuple(s.indices(n)[:2] for s, n in zip(whole, shape, strict=True))
    parts = {}
    for device, own in bounds.items():
        local = [end - start for start, end in own]
        parts[device] = jnp.zeros(local if stacked else [1, *local], dtype, device=device)
    for layer in range(shape[0] if stacked else 1):
        holders = [d for d, own in bounds.items() if not stacked or own[0][0] <= layer < own[0][1]]
        tensor, cut = stored(layer) if holders else None, {}
        for device in holders:
            assert tensor is not None
            first = bounds[device][0][0] if stacked else 0
            inside = bounds[device][stacked:]
            if inside not in cut:  # several devices may hold the same part
                cut[inside] = _cut(tensor, inside, axes)
            piece = jax.device_put(cut[inside], device)
            parts[device] = _filled(parts[device], piece, layer - first, axes=axes)
        jax.block_until_ready([*parts.values()])  # before the host reads the next layer
    arrays = [part if stacked else part.reshape(part.shape[1:]) for part in parts.values()]
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _cut(tensor: np.ndarray, inside, axes: tuple[int, ...] | None) -> np.ndarray:
    """The part of a stored tensor that becomes the part ``inside`` of a layer."""
    order = range(tensor.ndim) if axes is None else np.argsort(axes)
    part = tensor[tuple(slice(*inside[axis]) for axis in order)]
    wide = part.dtype.itemsize > 4  # JAX has no float64 by default
    return np.ascontiguousarray(part, np.float32 if wide else None)


@functools.partial(jax.jit, static_argnames="axes", donate_argnums=0)
def _filled(stack, piece, layer, *, axes):
    piece = piece if axes is None else piece.transpose(axes)
    return jax.lax.dynamic_update_index_in_dim(stack, piece.astype(stack.dtype), layer, 0)
