"""How one per-device function runs on every device: jit(shard_map), or jax.pmap.

The step is written for one device: it sees its own part of the batch, knows the axis name ``AXIS``
and adds up with ``jax.lax.psum``.

With ``fsdp`` above 1, groups of ``fsdp`` devices share one copy of the base. The step sees a group
as one device: along ``GROUP`` the compiler splits the group's part of the batch, gathers the
weights of a layer before it runs, and adds up.
"""

import dataclasses
import math
import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rmlora_jax.errors import UserError
from rmlora_jax.files import is_writable

AXIS = "data"
GROUP = "model"  # the devices that share a copy of the base
SMALL = 2**16  # a parameter with fewer numbers is copied to every device


@dataclasses.dataclass(frozen=True)
class Devices:
    """Every device of every process, and the map that uses them."""

    mesh: Mesh  # one axis; with fsdp two: groups, and the devices of a group
    parallel: str  # mesh or pmap

    @property
    def count(self) -> int:
        return self.mesh.size

    @property
    def rows(self) -> PartitionSpec:
        """The sharding of a batch: its rows over all devices."""
        return PartitionSpec(self.mesh.axis_names)


def all_devices(
    parallel: str = "mesh",
    *,
    limit: int | None = None,
    fsdp: int = 1,
    among: Sequence | None = None,
) -> Devices:
    """A mesh over all devices of all processes, or over the first ``limit`` of them or ``among``.

    Raises:
      UserError: they do not form groups of ``fsdp``.
    """
    # In the order of the processes, so that the rows of a global batch lie in the order in which
    # the processes read them; make_mesh may permute devices, and its Explicit axes break ordinary
    # Linen models.
    found = jax.devices() if among is None else among
    row = sorted(found, key=lambda d: (d.process_index, d.id))[:limit]
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
    """The sharding of a parameter of the base: copied, or with fsdp split over the group.

    It is split along the longest axis that the group divides, the last of equals; never along the
    first of three or more, the axis of the layers, so that layers are gathered one at a time.
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
    """Raises a UserError if ``repr(value)`` differs between the processes."""
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
    """Puts a copy of every (host) leaf on every device."""
    return place(tree, lambda shape: NamedSharding(devices.mesh, PartitionSpec()))


def place_base(tree, devices: Devices):
    """Puts every (host) leaf where `base_sharding` says."""
    return place(tree, lambda shape: base_sharding(shape, devices))


def place(tree, sharding: Callable[[tuple[int, ...]], NamedSharding]):
    """Puts every (host) leaf where the sharding of its shape says; one in a file (`hub.OnDisk`) is
    read there, without a copy on the host."""

    def put(x):
        if hasattr(x, "place"):
            return x.place(sharding(x.shape))
        # Through numpy: the result may be donated, which would delete an array shared with ``x``.
        host = np.asarray(x)
        return jax.make_array_from_callback(
            host.shape, sharding(host.shape), lambda index: host[index]
        )

    return jax.tree.map(put, tree)


def shard(tree, devices: Devices):
    """Spreads this process's rows of a batch over its devices; leaves are numpy arrays."""
    sharding = NamedSharding(devices.mesh, devices.rows)

    def put(x):
        if devices.parallel == "pmap":  # which maps over an axis of devices
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
    # Otherwise the compiler may leave a result split over a group.
    whole = NamedSharding(devices.mesh, replicated)
    return jax.jit(mapped, donate_argnums=donated, out_shardings=whole)


def use_compilation_cache(folder: str) -> None:
    """Keeps compiled programs on disk, so that the next start of the same run is quick."""
    place = Path(os.path.expanduser(folder))
    if folder and is_writable(place):
        jax.config.update("jax_compilation_cache_dir", str(place))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
