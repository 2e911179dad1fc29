"""A run as shapes: its real training step and what goes into it, without data and weights."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import NamedSharding, PartitionSpec

import rmlora_jax as rm
from rmlora_jax import data
from rmlora_jax import methods as method
from rmlora_jax.errors import UserError
from rmlora_jax.hub.pretrained import find_architecture
from rmlora_jax.models.family import IMAGES
from rmlora_jax.parallel.mesh import Devices, base_sharding, spread
from rmlora_jax.sweep import many
from rmlora_jax.tasks import images, text
from rmlora_jax.tasks.task import Feed
from rmlora_jax.train import setup
from rmlora_jax.train.config import KINDS, REGRESSION, SPEECH, is_sweep, runs
from rmlora_jax.train.fields import fields
from rmlora_jax.train.step import Constants

# Classes, training and test images, and their shape.
# Source: Krizhevsky 2009, https://www.cs.toronto.edu/~kriz/cifar.html.
KNOWN_IMAGES = {
    "cifar10": (10, 50_000, 10_000, (32, 32, 3)),
    "cifar100": (100, 50_000, 10_000, (32, 32, 3)),
}
STEPS = 1000  # where the config counts epochs; a step's program differs in constants only


class RunShapes(NamedTuple):
    """What compiles a run's training step.

    Attributes:
      step: as ``setup.Job.train_step``: ``step.lower(*arguments)``.
      arguments: state, constants and batch, as shapes on the devices.
      outputs: of the head.
      trainable_parameters, total_parameters: of one run.
      runs: trained at once; 1 where the config has no sweep.
    """

    step: Callable
    arguments: tuple
    outputs: int
    trainable_parameters: int
    total_parameters: int
    runs: int


class _Task(NamedTuple):
    model: nn.Module
    example: tuple  # the model's arguments for one example
    outputs: int
    prepare_train: Callable
    resident: dict  # shapes
    batch: dict


def open_shapes(config: ml_collections.ConfigDict, devices: Devices) -> RunShapes:
    """The training step of a config for these devices, which may be a topology's.

    Texts have their greatest length. The number of classes is that of CIFAR, of the GLUE task, of
    a data set that is on this machine, or ``data.classes``.

    Raises:
      UserError: what of the config is not known without more than is here.
    """
    if config.task == SPEECH:
        raise UserError("config.task='speech_classification' is not compiled alone; leave out "
                        "--compile_only, it trains in a minute")
    if config.model.adapter:
        raise UserError("--compile_only reads no adapter; type --config.model.adapter= with the "
                        "adapter's own lora.rank and lora.target")
    if config.parallel != "mesh":
        raise UserError("--compile_only compiles jit(shard_map), which jax.pmap is made of, too; "
                        "type --config.parallel=mesh")
    setup.check_batches(config, devices)
    task = _images(config) if config.task == KINDS[0] else _texts(config)
    base = _base(config, task, devices)
    every = runs(config)
    count = min(config.sweep.at_once or len(every), len(every))
    replicated = lambda tree: _on(tree, devices, PartitionSpec())  # noqa: E731
    if is_sweep(config):
        state = many.shapes(every[0], count, base, devices)
        values = {"seed": jax.ShapeDtypeStruct((count,), jnp.uint32)}
        values |= {n: jax.ShapeDtypeStruct((count,), jnp.float32) for n in every[0].setting}
        constants = many.ManyConstants(base.constants, replicated(values))
        step = many.train_step(config, base)
    else:
        tree = base.trainable
        state = replicated(jax.eval_shape(lambda tree: setup.start(config, base, tree), tree))
        constants, step = base.constants, setup.train_step(config, base)
    return RunShapes(
        step=spread(step, devices, donate=True),
        arguments=(state, constants, _on(task.batch, devices, devices.rows)),
        outputs=task.outputs,
        trainable_parameters=base.trainable_parameters,
        total_parameters=base.total_parameters,
        runs=count,
    )


def _base(config, task: _Task, devices: Devices) -> setup.Base:
    with fields("lora.*"):
        lora = method.description(config)
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
    with fields("rm.*, adalora.*, sora.* or lora.rank"):
        jax.eval_shape(method.optimizer(config, steps).init, trainable)
    count = lambda tree: sum(math.prod(x.shape) for x in jax.tree.leaves(tree))  # noqa: E731
    seed = jax.ShapeDtypeStruct((), jnp.uint32)
    constants = Constants(frozen, task.resident, seed, seed)
    return setup.Base(
        problem=None,
        feed=Feed({}, None, None, task.resident, task.prepare_train, None),
        lora=lora,
        adapted=adapted,
        trainable=trainable,
        constants=_on(constants, devices, PartitionSpec())._replace(
            frozen=jax.tree.map(lambda x: _in(x, base_sharding(x.shape, devices)), frozen)
        ),
        steps=steps,
        total_parameters=count(trainable) + count(frozen),
        trainable_parameters=count(trainable),
    )


def _images(config: ml_collections.ConfigDict) -> _Task:
    _, architecture = _architecture(config)
    classes, storage, examples = _image_data(config, architecture.image_size)
    b, struct = config.batch_size, jax.ShapeDtypeStruct
    batch, resident = {"id": struct((b,), jnp.int32)}, {}
    held = lambda n: {"image": struct((n, *storage.shape), jnp.uint8),  # noqa: E731
                      "label": struct((n,), jnp.int32)}
    if storage.resident:
        resident = held(examples)
    else:
        batch |= held(b)
    channels = architecture.num_channels
    size = architecture.image_size
    prepare_train, _ = images.preparation(
        config,
        image_size=size,
        center=storage.center,
        mean=(0.5,) * channels,
        std=(0.5,) * channels,
    )
    model = images.build_model(config, architecture, classes)
    example = (struct((1, size, size, channels), jnp.float32),)
    return _Task(model, example, classes, prepare_train, resident, batch)


def _image_data(config, image_size: int) -> tuple[int, data.Storage, int]:
    """Classes, how the images are held, and how many there are."""
    c = config.data
    if c.name in KNOWN_IMAGES:
        every, train, test, shape = KNOWN_IMAGES[c.name]
        classes = min(c.classes or every, every)
        train, test = train * classes // every, test * classes // every
        train = min(train, c.per_class * classes or train, c.limit or train)
        size, center = data.stored_as(shape, image_size)
        shape = shape if size is None else (size, size, shape[-1])
        examples = train + test
        nbytes = examples * math.prod(shape)
        resident = c.mode == "resident" or (c.mode == "auto" and nbytes <= data.RESIDENT_LIMIT)
        return classes, data.Storage(resident, size, shape, center, nbytes), examples
    try:
        found = images.load(config, download=False)
    except UserError as e:
        if not c.classes:
            raise UserError(
                f"{e}\nTo compile without it, say how many classes it has: --config.data.classes=N"
            ) from e
        size, center = data.stored_as(None, image_size)
        return c.classes, data.Storage(False, size, (size, size, 3), center, 0), 0
    storage = data.plan_storage(found, image_size, mode=c.mode)
    return found.num_classes, storage, sum(map(len, (found.train, found.validation, found.test)))


def _texts(config: ml_collections.ConfigDict) -> _Task:
    family, architecture = _architecture(config)
    outputs = _labels(config)
    example = text.example_of(config)
    b, length, struct = config.batch_size, config.text.max_length, jax.ShapeDtypeStruct
    names = ("input_ids", "attention_mask", "token_type_ids")
    batch = {n: struct((b, length), x.dtype) for n, x in zip(names, example, strict=True)}
    kind = jnp.float32 if config.task == REGRESSION else jnp.int32
    batch |= {"id": struct((b,), jnp.int32), "label": struct((b,), kind)}
    model = text.build_model(config, family, architecture, outputs)
    return _Task(model, example, outputs, lambda k, p, r, batch: text.prepare(batch), {}, batch)


def _labels(config: ml_collections.ConfigDict) -> int:
    if config.task == REGRESSION:
        return 1
    glue = data.glue_task(config.data.name)
    if glue is not None:
        return len(glue.words or (0, 1))
    return len(text.load(config, None, download=False).label_names)


def _architecture(config: ml_collections.ConfigDict) -> tuple[Any, Any]:
    family, found = find_architecture(
        config.model.source, image_size=config.model.image_size or None
    )
    if (family.inputs is IMAGES) != (config.task == KINDS[0]):
        raise UserError(
            f"config.model.source={config.model.source!r} is a {family.classifier}, which does not "
            f"fit config.task={config.task!r}; give another --config.model.source"
        )
    return family, found


def _on(tree: Any, devices: Devices, spec: PartitionSpec) -> Any:
    return jax.tree.map(lambda x: _in(x, NamedSharding(devices.mesh, spec)), tree)


def _in(x, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
