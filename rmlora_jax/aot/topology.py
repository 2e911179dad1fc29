"""The devices of a TPU that this machine does not have, for its compiler to compile for."""

import importlib.util
import math
import os
import platform
import re
from typing import NamedTuple

import jax

from rmlora_jax import extras
from rmlora_jax.errors import UserError, did_you_mean, first_line
from rmlora_jax.parallel.mesh import Devices, all_devices

EXAMPLES = "v5e:4x4, v6e:8x8, v4:2x2x2 or v5p:2x2x2"


class Chip(NamedTuple):
    """A generation of TPU."""

    memory: int  # bytes of HBM
    axes: int  # numbers in the name of a topology
    options: dict  # with which libtpu gives one device a chip


# Source: "HBM capacity" of https://cloud.google.com/tpu/docs/v4, /v5e, /v5p and /v6e. A program
# uses the two cores of a v4 chip as one device, "megacore", which is not libtpu's default.
CHIPS = {
    "v4": Chip(32 * 2**30, 3, {"chip_config_name": "megacore"}),
    "v5e": Chip(16 * 2**30, 2, {}),
    "v5p": Chip(95 * 2**30, 3, {}),
    "v6e": Chip(32 * 2**30, 2, {}),
}

# Without these libtpu asks Google's metadata server for its host and type, warns when it does not
# get them, and cannot be loaded by two processes at once.
QUIET = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
}


def chip_of(topology: str) -> Chip:
    """The chip of a topology such as ``v5e:4x4``.

    Raises:
      UserError: another name.

    >>> chip_of("v5e:4x4").memory // 2**30
    16
    """
    generation, _, shape = topology.partition(":")
    if generation not in CHIPS:
        raise UserError(
            f"--topology={topology}: unknown TPU {generation!r}; there are {', '.join(CHIPS)}"
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
      UserError: libtpu does not know the topology, or is not installed.
    """
    chip = chip_of(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "--topology needs the TPU compiler, libtpu, which runs without a TPU on Linux on "
            f"x86-64 (this machine: {platform.system()} on {platform.machine()}); "
            f"type {extras.install('tpu')}"
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
            f"--topology={topology}: libtpu does not know it ({first_line(e)}); "
            f"type one as {EXAMPLES}"
        ) from e
    chips = math.prod(map(int, topology.partition(":")[2].split("x")))
    if len(found) != chips:
        raise UserError(
            f"--topology={topology}: libtpu gives {len(found)} devices for {chips} chips; "
            "type pip install --upgrade 'jax[tpu]'"
        )
    return all_devices(fsdp=fsdp, among=found)
