"""From a config to everything a run needs: data, model, method, compiled-to-be steps."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

import rmlora_jax as rm
from rmlora_jax.errors import UserError
from rmlora_jax.hub import find_folder, load_vit
from rmlora_jax.models import ViT
from rmlora_jax.train import feed, method
from rmlora_jax.train.mesh import Devices, check_divisible, replicate, spread
from rmlora_jax.train.step import Constants, State, init_state, make_eval_step, make_train_step


class Job(NamedTuple):
    """A run before its first step."""

    lora: rm.LoRA
    state: State
    constants: Constants
    train_step: Callable  # (state, constants, batch) -> (state, metrics); donates state
    eval_step: Callable  # (trainable, constants, batch) -> sums
    feed: feed.Feed
    schedule: optax.Schedule
    steps: int
    eval_every: int
    total_parameters: int
    trainable_parameters: int
    notes: tuple[str, ...]  # what a person should know of the checkpoint that was read


def build(config: ml_collections.ConfigDict, devices: Devices) -> Job:
    """Reads data and weights, adapts the model and makes the two steps.

    Raises:
      UserError: whatever of the config cannot be had, with what to type.
    """
    sizes = {"batch_size": config.batch_size, "eval_batch_size": config.eval_batch_size}
    check_divisible(devices, **sizes)
    if config.batch_size % (devices.count * config.accumulate):
        raise UserError(
            f"config.batch_size={config.batch_size} cannot be split into config.accumulate="
            f"{config.accumulate} micro-batches on each of {devices.count} devices; type "
            f"--config.batch_size={devices.count * config.accumulate}, or a multiple of it"
        )
    find_folder(config.model.source)  # a mistyped model is said before any data is fetched
    data = feed.load(config)
    head_key, factors_key = jax.random.split(jax.random.key(config.seed))
    pretrained = load_vit(
        config.model.source,
        num_classes=data.num_classes,
        image_size=config.model.image_size or None,
        key=head_key,
    )
    model = ViT(
        pretrained.config,
        data.num_classes,
        dtype=jnp.dtype(config.model.dtype),
        attention=config.model.attention,
        unroll=min(config.model.unroll, pretrained.config.num_hidden_layers),
        remat=config.model.remat,
    )
    size = pretrained.image_size
    image = jax.ShapeDtypeStruct((1, size, size, pretrained.config.num_channels), jnp.float32)
    with _fields("model.attention"):
        jax.eval_shape(model.init, head_key, image)
    with _fields("lora.*"):
        lora = method.description(config)
        adapted = rm.adapt(model, lora)
        params = rm.attach(factors_key, adapted, pretrained.params, image)
        trainable, frozen = rm.split(params, lora)
    count = lambda tree: sum(math.prod(x.shape) for x in jax.tree.leaves(tree))  # noqa: E731

    inputs = feed.open_feed(config, data, pretrained, devices)
    steps = config.steps or max(1, round(config.epochs * inputs.train_size / config.batch_size))
    schedule = method.learning_rate(config, steps)
    with _fields("rm.* and --config.lora.rank"):
        tx = method.optimizer(config, schedule)
        state = init_state(tx, _cast(trainable, jnp.float32))

    def apply(params, images, rngs=None):
        return adapted.apply({"params": params}, images, train=rngs is not None, rngs=rngs)

    penalty = functools.partial(rm.orthogonality, kind=config.rm.kind)
    train_step = make_train_step(
        apply,
        tx,
        inputs.prepare_train,
        penalty=penalty if lora.target is not None else None,
        accumulate=config.accumulate,
        label_smoothing=config.optimizer.label_smoothing,
    )
    frozen = replicate(_cast(frozen, jnp.dtype(config.model.base_dtype)), devices)
    return Job(
        lora=lora,
        state=replicate(state, devices),
        constants=Constants(frozen, inputs.resident, replicate(np.uint32(config.seed), devices)),
        train_step=spread(train_step, devices, donate=True),
        eval_step=spread(make_eval_step(apply, inputs.prepare_eval), devices),
        feed=inputs,
        schedule=schedule,
        steps=steps,
        eval_every=config.eval_every or math.ceil(inputs.train_size / config.batch_size),
        total_parameters=count(params),
        trainable_parameters=count(trainable),
        notes=_notes(pretrained),
    )


@contextlib.contextmanager
def _fields(names: str) -> Iterator[None]:
    """Says which fields of the config to correct where the library refuses their values."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, RuntimeError) as e:
        raise UserError(f"{str(e).splitlines()[0]}\nCorrect --config.{names}") from e


def _cast(tree: Any, dtype) -> Any:
    return jax.tree.map(
        lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )


def _notes(pretrained) -> tuple[str, ...]:
    notes = []
    if pretrained.dropped:
        notes.append(f"not used from {pretrained.source}: {', '.join(pretrained.dropped)}")
    if pretrained.new:
        notes.append(f"newly initialised: {', '.join(pretrained.new)}")
    return tuple(notes)
