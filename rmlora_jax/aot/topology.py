"""The devices of a TPU that is not there, for its real compiler to compile for."""

import importlib.util
import math
import os
import platform
import re
from typing import NamedTuple

import jax

from rmlora_jax.errors import UserError, did_you_mean
from rmlora_jax.parallel.mesh import Devices, in_groups

EXAMPLES = "v5e:4x4, v6e:8x8, v4:2x2x2 or v5p:2x2x2"


class Chip(NamedTuple):
    """A generation of TPU."""

    memory: int  # bytes of HBM of a chip
    axes: int  # numbers in the name of a topology
    options: dict  # what makes libtpu give one device a chip


# Source: "HBM capacity" of https://cloud.google.com/tpu/docs/v4, /v5e, /v5p and /v6e. A chip of v4
# has two cores that a program uses as one device, "megacore", which libtpu does not assume here.
CHIPS = {
    "v4": Chip(32 * 2**30, 3, {"chip_config_name": "megacore"}),
    "v5e": Chip(16 * 2**30, 2, {}),
    "v5p": Chip(95 * 2**30, 3, {}),
    "v6e": Chip(32 * 2**30, 2, {}),
}

# Without these libtpu asks Google's metadata server who it is, refuses to be loaded by two
# processes at once, and complains that it knows neither its host nor its type, whatever they are.
QUIET = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
}


def chip_of(topology: str) -> Chip:
    """The chip that a name such as ``v5e:4x4`` is of.

    Raises:
      UserError: it is no such name.

    >>> chip_of("v5e:4x4").memory // 2**30
    16
    """
    generation, _, shape = topology.partition(":")
    if generation not in CHIPS:
        raise UserError(
            f"--topology={topology}: no TPU {generation!r}; there are {', '.join(CHIPS)}"
            f"{did_you_mean(generation, CHIPS)}, as in {EXAMPLES}"
        )
    chip = CHIPS[generation]
    if not re.fullmatch("x".join([r"[1-9]\d*"] * chip.axes), shape):
        raise UserError(
            f"--topology={topology}: chips of {generation} are counted along {chip.axes} axes, as "
            f"in {next(e for e in re.findall(r'v[^ ,]+', EXAMPLES) if e.startswith(generation))}"
        )
    return chip


def tpu_devices(topology: str, fsdp: int = 1) -> Devices:
    """The devices of a topology, in the order of a real run.

    Raises:
      UserError: no such topology, or no libtpu.
    """
    chip = chip_of(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "--topology needs the TPU compiler, libtpu, which runs without a TPU on Linux on "
            f"x86-64 (this machine: {platform.system()} on {platform.machine()}); "
            "type pip install '.[tpu]'"
        )
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", "cpu")
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=topology, **chip.options
        ).devices
    except (jax.errors.JaxRuntimeError, RuntimeError) as e:
        raise UserError(
            f"--topology={topology}: libtpu has none such ({str(e).splitlines()[0]}); "
            f"type one as {EXAMPLES}"
        ) from e
    chips = math.prod(map(int, topology.partition(":")[2].split("x")))
    if len(found) != chips:
        raise UserError(
            f"--topology={topology}: libtpu gives {len(found)} devices for {chips} chips; "
            "type pip install --upgrade '.[tpu]'"
        )
    row = sorted(found, key=lambda d: (d.process_index, d.id))
    return in_groups(row, fsdp)
