"""A run as shapes: its real training step and the step's arguments, without data and weights."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

import rmlora_jax as rm
from rmlora_jax import methods
from rmlora_jax.errors import UserError
from rmlora_jax.fields import Run
from rmlora_jax.parallel.mesh import Devices, base_sharding, spread
from rmlora_jax.sweep import many
from rmlora_jax.sweep.grid import runs
from rmlora_jax.tasks import TASKS
from rmlora_jax.tasks.task import Feed, Shapes, fields
from rmlora_jax.train import setup
from rmlora_jax.train.step import Constants

STEPS = 1000  # where the config counts epochs; a step's program differs in constants only


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
