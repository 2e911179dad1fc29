"""How one per-device function runs on every device: jit(shard_map), or jax.pmap.

The step is written for one device: it sees its own part of the batch, knows the axis name ``AXIS``
and adds up with ``jax.lax.psum``. What differs between the two maps is only here.
"""

import zlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rmlora_jax.errors import UserError

AXIS = "data"


class Devices(NamedTuple):
    """Every device of every process in one row, and the map that uses them."""

    mesh: Mesh
    parallel: str  # mesh or pmap

    @property
    def count(self) -> int:
        return self.mesh.size


def all_devices(parallel: str = "mesh", *, limit: int | None = None) -> Devices:
    """A mesh of one axis over all devices of all processes, or over the first ``limit``."""
    # In the order of the processes, so that the rows of a global batch lie in the order in which
    # the processes read them; make_mesh may permute devices, and its Explicit axes break ordinary
    # Linen models.
    row = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
    mesh = Mesh(np.array(row[:limit]), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,))
    return Devices(mesh, parallel)


def check_divisible(devices: Devices, **sizes: int) -> None:
    """Raises a UserError for a batch that the devices cannot share equally."""
    for field, size in sizes.items():
        if size % devices.count:
            near = max(devices.count, round(size / devices.count) * devices.count)
            raise UserError(
                f"config.{field}={size} cannot be shared equally by {devices.count} devices; "
                f"type --config.{field}={near}"
            )


def check_same(what: str, value) -> None:
    """Raises a UserError where the processes do not all have this value, told by its ``repr``."""
    if jax.process_count() == 1:
        return
    own = np.uint32(zlib.crc32(repr(value).encode("utf-8", "backslashreplace")))
    every = multihost_utils.process_allgather(own)
    others = np.flatnonzero(every != every[0])
    if others.size:
        raise UserError(
            f"{what} of process {others[0]} is not that of process 0: {repr(value)[:300]} in "
            f"process {jax.process_index()}; give all of them the same files"
        )


def replicate(tree, devices: Devices):
    """Puts a copy of every (host) leaf on every device.

    The leaves go through numpy so that no buffer is shared with the argument: what is replicated
    may be donated, and donation would delete the caller's arrays.
    """
    sharding = NamedSharding(devices.mesh, PartitionSpec())

    def put(x):
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(put, tree)


def shard(tree, devices: Devices):
    """Spreads this process's rows of a batch over its devices; leaves are numpy arrays."""
    sharding = NamedSharding(devices.mesh, PartitionSpec(AXIS))

    def put(x):
        if devices.parallel == "pmap":  # pmap wants the device axis apart
            local = devices.count // jax.process_count()
            x = x.reshape(local, x.shape[0] // local, *x.shape[1:])
        return jax.make_array_from_process_local_data(sharding, x)

    return jax.tree.map(put, tree)


def spread(fn: Callable, devices: Devices, *, donate: bool = False) -> Callable:
    """Maps ``fn(state, constants, batch) -> tree`` over the devices.

    ``state``, ``constants`` and the result are the same on every device, ``batch`` is split on its
    first axis. With ``donate`` the buffers of ``state`` are reused for the result. The value can be
    called, or lowered and compiled ahead.
    """
    donated = (0,) if donate else ()
    if devices.parallel == "pmap":
        return jax.pmap(
            fn,
            axis_name=AXIS,
            in_axes=(None, None, 0),
            out_axes=None,
            devices=list(devices.mesh.devices.flat),
            donate_argnums=donated,
        )
    replicated, split = PartitionSpec(), PartitionSpec(AXIS)
    # check_vma would insert a reduction of its own at every use of a replicated value, inside the
    # backward pass; the step does it once, at the end.
    mapped = jax.shard_map(
        fn,
        mesh=devices.mesh,
        in_specs=(replicated, replicated, split),
        out_specs=replicated,
        check_vma=False,
    )
    return jax.jit(mapped, donate_argnums=donated)
