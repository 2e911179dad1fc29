"""How one per-device function runs on every device: jit(shard_map), or jax.pmap.

The step is written for one device: it sees its own part of the batch, knows the axis name ``AXIS``
and adds up with ``jax.lax.psum``. What differs between the two maps is only here.

With ``fsdp`` above 1 so many devices share one copy of the base. The step then sees each such group
as one device: along ``GROUP`` the compiler splits the group's part of the batch, gathers each
layer's weights when it comes to them, and adds up.
"""

import dataclasses
import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rmlora_jax.errors import UserError

AXIS = "data"
GROUP = "model"  # the devices that share a copy of the base
SMALL = 2**16  # parameters with fewer numbers are on every device all the same


@dataclasses.dataclass(frozen=True)
class Devices:
    """Every device of every process in one row, and the map that uses them."""

    mesh: Mesh  # of one axis, or with fsdp of groups and the devices of each
    parallel: str  # mesh or pmap

    @property
    def count(self) -> int:
        return self.mesh.size

    @property
    def rows(self) -> PartitionSpec:
        """Of a batch: its rows over all devices."""
        return PartitionSpec(self.mesh.axis_names)


def all_devices(parallel: str = "mesh", *, limit: int | None = None, fsdp: int = 1) -> Devices:
    """A mesh over all devices of all processes, or over the first ``limit``.

    Raises:
      UserError: they do not form groups of ``fsdp``.
    """
    # In the order of the processes, so that the rows of a global batch lie in the order in which
    # the processes read them; make_mesh may permute devices, and its Explicit axes break ordinary
    # Linen models.
    row = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
    return in_groups(row[:limit], fsdp, parallel)


def in_groups(row: Sequence, fsdp: int, parallel: str = "mesh") -> Devices:
    """Devices in this order, neighbours sharing a copy of the base."""
    if len(row) % fsdp:
        fit = [n for n in range(1, len(row) + 1) if not len(row) % n]
        raise UserError(
            f"config.fsdp={fsdp} does not divide the {len(row)} devices; type --config.fsdp= with "
            f"one of {', '.join(map(str, fit))}"
        )
    names, shape = ((AXIS,), (-1,)) if fsdp == 1 else ((AXIS, GROUP), (-1, fsdp))
    kinds = (jax.sharding.AxisType.Auto,) * len(names)
    return Devices(Mesh(np.array(row).reshape(shape), names, axis_types=kinds), parallel)


def base_sharding(shape: tuple[int, ...], devices: Devices) -> NamedSharding:
    """Where a parameter of the base lies: on every device, or with fsdp in parts over the group.

    It is cut along its longest axis that the group divides, the last of equals; never along the
    first of three or more, which is that of the layers: a layer is gathered when its turn comes.
    """
    group = dict(devices.mesh.shape).get(GROUP, 1)
    first = 1 if len(shape) > 2 else 0
    fit = [i for i in range(first, len(shape)) if shape[i] % group == 0]
    spec: list[str | None] = [None] * len(shape)
    if group > 1 and fit and math.prod(shape) >= SMALL:
        spec[max(fit, key=lambda i: (shape[i], i))] = GROUP
    return NamedSharding(devices.mesh, PartitionSpec(*spec))


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
    return place(tree, lambda shape: NamedSharding(devices.mesh, PartitionSpec()))


def place_base(tree, devices: Devices):
    """Puts the frozen parameters where `base_sharding` says."""
    return place(tree, lambda shape: base_sharding(shape, devices))


def place(tree, sharding: Callable[[tuple[int, ...]], NamedSharding]):
    """Puts every (host) leaf where the sharding of its shape says."""

    def put(x):
        host = np.asarray(x)
        return jax.make_array_from_callback(
            host.shape, sharding(host.shape), lambda index: host[index]
        )

    return jax.tree.map(put, tree)


def shard(tree, devices: Devices):
    """Spreads this process's rows of a batch over its devices; leaves are numpy arrays."""
    sharding = NamedSharding(devices.mesh, devices.rows)

    def put(x):
        if devices.parallel == "pmap":  # pmap wants the device axis apart
            local = devices.count // jax.process_count()
            x = x.reshape(local, x.shape[0] // local, *x.shape[1:])
        return jax.make_array_from_process_local_data(sharding, x)

    return jax.tree.map(put, tree)


def in_rows(x: jax.Array) -> jax.Array:
    """``x`` split by its first axis over the group, in a step with fsdp."""
    return jax.lax.with_sharding_constraint(x, PartitionSpec(GROUP))


def spread(fn: Callable, devices: Devices, *, donate: bool = False) -> Any:
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
        axis_names={AXIS},
        check_vma=False,
    )
    # Else the compiler may leave a result in parts over a group.
    whole = NamedSharding(devices.mesh, replicated)
    return jax.jit(mapped, donate_argnums=donated, out_shardings=whole)
