"""``rmlora train --compile_only``: what a training step needs, before any device is paid for.

    config -> shapes -> the compiler of the devices -> memory, flops, collectives -> does it fit?
"""

import collections
import functools
import re
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

import rmlora_jax as rm
from rmlora_jax import methods
from rmlora_jax.aot.counts import Collective, collectives, flops, total_bytes
from rmlora_jax.aot.topology import chip_of, tpu_devices
from rmlora_jax.errors import UserError
from rmlora_jax.fields import Run
from rmlora_jax.models.attention import blaming
from rmlora_jax.parallel import memory
from rmlora_jax.parallel.mesh import (
    Devices,
    all_devices,
    base_sharding,
    spread,
    use_compilation_cache,
)
from rmlora_jax.report.records import amount
from rmlora_jax.sweep import many
from rmlora_jax.sweep.grid import runs
from rmlora_jax.tasks import TASKS
from rmlora_jax.tasks.task import Feed, Shapes, fields
from rmlora_jax.train import setup, terminal
from rmlora_jax.train.shortage import too_large
from rmlora_jax.train.step import Constants

STEPS = 1000  # where the config counts epochs; a step's program differs in constants only


def compile_only(config: Run, topology: str | None = None) -> None:
    """Compiles the training step, prints what it needs, and writes nothing.

    Args:
      config: of the run.
      topology: of a TPU, such as ``v5e:4x4``; None: the devices of this machine.

    Raises:
      UserError: the step does not fit into the memory of a device, with what would make it
        smaller; or config or topology cannot be used.
    """
    if topology:
        devices, limit = tpu_devices(topology, config.fsdp), chip_of(topology).memory
        jax.config.update("jax_enable_compilation_cache", False)  # it asks the devices
    else:
        use_compilation_cache(config.compilation_cache)
        devices, limit = all_devices(config.parallel, fsdp=config.fsdp), memory.available()
    run = open_shapes(config, devices)
    where = topology or "this machine"
    began = time.monotonic()
    traced = run.step.trace(*run.arguments)
    try:
        with blaming(config.model.dtype, "config.model.dtype"):
            program = traced.lower().compile()
    except jax.errors.JaxRuntimeError as e:
        if not memory.is_short(e):
            raise
        need, limit = refused(e) or (None, limit)  # some of a chip's memory is the runtime's
        raise UserError(too_large(need, limit, where, config, devices)) from e
    base = run.base
    gradients = 4 * base.trainable_parameters * run.runs  # bytes
    counted = terminal.count_devices(list(devices.mesh.devices.flat))
    batch = f"{config.batch_size}, {config.batch_size // devices.count} a device"
    if config.accumulate > 1:
        batch += f" in {config.accumulate} micro-batches"
    rows = [
        ("model", f"{config.model.source}, {run.task.outputs} outputs"),
        ("method", config.method),
        ("parameters", terminal.parameters(base.trainable_parameters, base.total_parameters)),
        ("runs", f"{run.runs} at once" if run.runs > 1 else None),
        ("devices", counted + (f" ({topology})" if topology else "")),
        ("batch", batch + run.task.words),
        ("compiled in", terminal.duration(time.monotonic() - began)),
        ("memory", memory_row(program, limit)),
        ("flops", f"{flops(traced) / 1e12:.4g} TFLOP a device and step, products alone"),
        *collective_rows(collectives(program.as_text()), gradients),
    ]
    print(terminal.format_table("training step", rows), flush=True)
    if memory.needed(program) > limit:
        raise UserError(too_large(memory.needed(program), limit, where, config, devices))


def memory_row(program, limit: int) -> str:
    """Bytes of the compiled program on one device."""
    plan, need = memory.planned(program), memory.needed(program)
    if not plan:
        return "unknown to the compiler"
    return (f"{amount(need)} a device of {amount(limit)} ({100 * need / limit:.1f} %): "
            f"arguments {amount(plan['argument'])}, temporary {amount(plan['temp'])}, "
            f"results {amount(plan['output'] - plan['alias'])}")


def collective_rows(found: list[Collective], gradients: int) -> list[tuple[str, str]]:
    """A line for each kind and number of turns, and the bytes of a step and of the gradients."""
    groups = collections.defaultdict(list)
    for one in found:
        loop = "" if one.times == 1 else f" in a loop of {one.times} turns"
        if one.times is None:
            loop = " in a loop without a known end"
        groups[one.kind + loop].append(one.bytes)
    lines = [f"{len(sizes)} {kind}, {amount(sum(sizes))} in all" for kind, sizes in groups.items()]
    whole = total_bytes(found)
    told = "in loops without a known end" if whole is None else f"{whole:,} bytes"
    lines = lines or ["none: one device"]
    return [("collectives", line) for line in lines] + [
        ("", f"a step {told}; gradients are {gradients:,} bytes")
    ]


def refused(error: Exception) -> tuple[int, int] | None:
    """Needed and available bytes, from the error of a TPU compiler that ran out of memory.

    >>> refused(RuntimeError("memory required for HLO temporaries (2.5G) exceeds available HBM "
    ...                      "(2.00G)."))
    (2684354560, 2147483648)
    """
    size = r"([\d.]+[KMGT])"
    ways = (rf"\({size}\) exceeds available HBM \({size}\)", rf"Used {size} of {size} hbm")
    for found in filter(None, (re.search(way, str(error)) for way in ways)):
        need, limit = (int(float(x[:-1]) * 1024 ** " KMGT".index(x[-1])) for x in found.groups())
        return need, limit
    return None


class RunShapes(NamedTuple):
    """A training step that is ready to compile."""

    step: Any  # as setup.Job.train_step: step.lower(*arguments)
    arguments: tuple  # state, constants and batch, as shapes on the devices
    task: Shapes
    base: setup.Base
    runs: int  # trained at once; 1 without a sweep


def open_shapes(config: Run, devices: Devices) -> RunShapes:
    """The training step of a config for these devices, which may be a topology's.

    Raises:
      UserError: a field whose shapes are unknown without the data or the weights.
    """
    if config.model.adapter:
        raise UserError("--compile_only reads no adapter; type --config.model.adapter= with the "
                        "adapter's own lora.rank and lora.target")
    if config.parallel != "mesh":
        raise UserError("--compile_only compiles jit(shard_map), which jax.pmap uses too; "
                        "type --config.parallel=mesh")
    setup.check_batches(config, devices)
    task = TASKS[config.task].shapes(config)
    base = _base(config, task, devices)
    every = runs(config)
    count = min(config.sweep.at_once or len(every), len(every))
    whole = PartitionSpec()
    if config.is_sweep:
        state = many.shapes(every[0], count, base)
        values = many.values_of(every[:count])
        constants = many.ManyConstants(base.constants, _on(values, devices, whole))
        step = many.train_step(base)
    else:
        start = functools.partial(setup.start, config, base)
        state = _on(jax.eval_shape(start, base.trainable), devices, whole)
        constants, step = base.constants, setup.train_step(base)
    arguments = (state, constants, _on(task.batch, devices, devices.rows))
    return RunShapes(spread(step, devices, donate=True), arguments, task, base, count)


def _base(config: Run, task: Shapes, devices: Devices) -> setup.Base:
    with fields("lora.*"):
        lora = methods.description(config)
        adapted = rm.adapt(task.model, lora)

    def both(key):
        params = rm.attach(key, adapted, task.model.init(key, *example)["params"], *example)
        trainable, frozen = rm.split(params, lora)
        base_dtype = jnp.dtype(config.model.base_dtype)
        return setup.cast(trainable, jnp.float32), setup.cast(frozen, base_dtype)

    example = tuple(jnp.zeros(x.shape, x.dtype) for x in task.example)
    with fields("lora.*, model.attention or text.max_length"):
        trainable, frozen = jax.eval_shape(both, jax.random.key(0))
    steps = config.steps or STEPS
    setup.check_optimizer(config, steps, trainable)
    seed: Any = jax.ShapeDtypeStruct((), jnp.uint32)
    absent: Any = None  # read only where there is data
    frozen = jax.tree.map(
        lambda x: _on(x, devices, base_sharding(x.shape, devices).spec), frozen
    )
    return setup.Base(
        config=config,
        devices=devices,
        problem=absent,
        feed=Feed({}, absent, absent, task.resident, task.prepare_train, absent),
        objective=TASKS[config.task].objective(config),
        lora=lora,
        adapted=adapted,
        trainable=trainable,
        constants=Constants(frozen, *_on((task.resident, seed, seed), devices, PartitionSpec())),
        steps=steps,
        total_parameters=setup.count(trainable) + setup.count(frozen),
        trainable_parameters=setup.count(trainable),
    )


def _on(tree: Any, devices: Devices, spec: PartitionSpec) -> Any:
    sharding = NamedSharding(devices.mesh, spec)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
    )
