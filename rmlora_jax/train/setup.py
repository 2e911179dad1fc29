"""From a config to everything a run needs: data, model, method, compiled-to-be steps."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

import rmlora_jax as rm
from rmlora_jax import hub
from rmlora_jax import methods as method
from rmlora_jax.errors import UserError
from rmlora_jax.models.blocks import with_inserts
from rmlora_jax.parallel.mesh import (
    Devices,
    check_divisible,
    check_same,
    in_rows,
    place_base,
    replicate,
    spread,
)
from rmlora_jax.tasks import images, speech, text
from rmlora_jax.tasks.task import Feed, Problem, data_notes
from rmlora_jax.train.config import INSERTED, KINDS, REGRESSION, SPEECH, data_seed
from rmlora_jax.train.fields import fields
from rmlora_jax.train.nonfinite import make_look
from rmlora_jax.train.step import Constants, State, init_state, make_eval_step, make_train_step


class Job(NamedTuple):
    """A run before its first step."""

    lora: rm.LoRA
    state: State
    constants: Constants
    train_step: Callable  # (state, constants, batch) -> (state, metrics); donates state
    eval_step: Callable  # (trainable, constants, batch) -> outputs
    feed: Feed
    schedule: optax.Schedule
    steps: int
    eval_every: int
    total_parameters: int
    trainable_parameters: int
    problem: Problem
    look: Callable  # (trainable, constants, batch, step) -> where a number is first not finite


class Base(NamedTuple):
    """What a run, or all runs of a sweep, starts from: data, pretrained weights, adapted model."""

    problem: Problem
    feed: Feed
    lora: rm.LoRA
    adapted: nn.Module  # the model with its factors
    trainable: dict  # before the first step, of the config's own seed
    constants: Constants
    steps: int
    total_parameters: int
    trainable_parameters: int


def build(config: ml_collections.ConfigDict, devices: Devices) -> Job:
    """Reads data and weights, adapts the model and makes the two steps.

    Raises:
      UserError: whatever of the config cannot be had, with what to type.
    """
    base = open_base(config, devices)
    return Job(
        lora=base.lora,
        state=replicate(start(config, base, base.trainable), devices),
        constants=base.constants,
        train_step=spread(train_step(config, base), devices, donate=True),
        eval_step=spread(eval_step(config, base), devices),
        feed=base.feed,
        schedule=method.learning_rate(config, base.steps),
        steps=base.steps,
        eval_every=eval_every(config, base),
        total_parameters=base.total_parameters,
        trainable_parameters=base.trainable_parameters,
        problem=base.problem,
        look=look(config, base),
    )


def open_base(config: ml_collections.ConfigDict, devices: Devices) -> Base:
    """The base of a run or of a sweep.

    Raises:
      UserError: as `build`.
    """
    check_batches(config, devices)
    task = {KINDS[0]: images, SPEECH: speech}.get(config.task, text)
    head_key, factors_key = keys(config)
    problem = task.open_problem(config, devices, head_key)
    with fields("lora.*"):
        lora, adapted, params = with_new(config, problem, problem.params, factors_key)
        trainable, frozen = rm.split(params, lora)
    if config.model.adapter:
        found = f"goes on from {config.model.adapter}: {lora.rank=}, {lora.alpha=}, {lora.target=}"
        problem = problem._replace(notes=(*problem.notes, found.replace("lora.", "")))
    count = lambda tree: sum(math.prod(x.shape) for x in jax.tree.leaves(tree))  # noqa: E731

    feed = problem.open_feed()
    check_same("the data", (feed.sizes, problem.skipped))
    notes = (*problem.notes, *data_notes(problem, feed, config.batch_size))
    problem = problem._replace(notes=notes)
    steps = config.steps or max(1, round(config.epochs * feed.train_size / config.batch_size))
    trainable = cast(trainable, jnp.float32)
    with fields("rm.*, adalora.*, sora.* or lora.rank"):
        tx = method.optimizer(config, steps)
        jax.eval_shape(tx.init, trainable)
    return Base(
        problem=problem,
        feed=feed,
        lora=lora,
        adapted=adapted,
        trainable=trainable,
        constants=Constants(
            frozen=place_base(cast(frozen, jnp.dtype(config.model.base_dtype)), devices),
            data=feed.resident,
            data_seed=replicate(np.uint32(data_seed(config)), devices),
            seed=replicate(np.uint32(config.seed), devices),
        ),
        steps=steps,
        total_parameters=count(params),
        trainable_parameters=count(trainable),
    )


def check_batches(config: ml_collections.ConfigDict, devices: Devices) -> None:
    """Raises a UserError for batches that the devices cannot share equally."""
    sizes = {"batch_size": config.batch_size, "eval_batch_size": config.eval_batch_size}
    check_divisible(devices, **sizes)
    if config.batch_size % (devices.count * config.accumulate):
        raise UserError(
            f"config.batch_size={config.batch_size} cannot be split into config.accumulate="
            f"{config.accumulate} micro-batches on each of {devices.count} devices; type "
            f"--config.batch_size={devices.count * config.accumulate}, or a multiple of it"
        )


def keys(config: ml_collections.ConfigDict) -> jax.Array:
    """The keys of what is new in the pretrained model, such as its head, and of the factors."""
    return jax.random.split(jax.random.key(config.seed))


def with_new(
    config: ml_collections.ConfigDict, problem: Problem, params: dict, key: jax.Array
) -> tuple[rm.LoRA, nn.Module, dict]:
    """Description, adapted model, and pretrained parameters with what the method adds to them:
    factors, new or of ``model.adapter``, bottlenecks or prefixes."""
    if config.model.adapter:
        params, lora = from_adapter(config, problem, params)
        return lora, rm.adapt(problem.model, lora), params
    lora = method.description(config)
    adapted = rm.adapt(problem.model, lora)
    if config.method in INSERTED:
        params = with_inserts(key, problem.model, params, *problem.example)
    return lora, adapted, rm.attach(key, adapted, params, *problem.example)


def from_adapter(config, problem: Problem, params: dict) -> tuple[dict, rm.LoRA]:
    """The factors of ``model.adapter``, and its head where that is for as many classes."""
    folder, base = Path(config.model.adapter).expanduser(), problem.pretrained
    whole = hub.stored_labels(folder) == base.num_labels
    params, lora = hub.load_peft(folder, base._replace(params=params), saved=whole)
    rules = [*map(re.escape, lora.train or ()), config.lora.train]
    return params, dataclasses.replace(lora, train="|".join(rules), dropout=config.lora.dropout)


def start(config: ml_collections.ConfigDict, base: Base, trainable: dict) -> State:
    """The state of a run before its first step."""
    return init_state(method.optimizer(config, base.steps), trainable)


def reseeded(config: ml_collections.ConfigDict, base: Base) -> dict:
    """What the run of another seed (or alpha) trains before its first step, on the same base."""
    head_key, factors_key = keys(config)
    params = base.problem.reseeded(head_key)
    lora, _, params = with_new(config, base.problem, params, factors_key)
    return cast(rm.split(params, lora)[0], jnp.float32)


def eval_every(config: ml_collections.ConfigDict, base: Base) -> int:
    return config.eval_every or math.ceil(base.feed.train_size / config.batch_size)


def train_step(config: ml_collections.ConfigDict, base: Base, prepare_params=None) -> Callable:
    """The step of one device; fields of ``SWEEPABLE`` in the config may be traced.

    ``prepare_params`` changes the parameters on their way into the model.
    """
    return make_train_step(
        _apply(base, prepare_params, config.fsdp > 1),
        method.optimizer(config, base.steps),
        base.feed.prepare_train,
        regression=config.task == REGRESSION,
        figures=functools.partial(method.figures, config),
        accumulate=config.accumulate,
        label_smoothing=config.optimizer.label_smoothing,
    )


def eval_step(config: ml_collections.ConfigDict, base: Base, prepare_params=None) -> Callable:
    """The evaluation step of one device, as `train_step`."""
    regression = config.task == REGRESSION
    return make_eval_step(
        _apply(base, prepare_params, config.fsdp > 1), base.feed.prepare_eval, regression=regression
    )


def look(config: ml_collections.ConfigDict, base: Base, prepare_params=None) -> Callable:
    """`nonfinite.make_look` of a run."""
    regression = config.task == REGRESSION
    return make_look(
        _apply(base, prepare_params), base.feed.prepare_train, regression=regression
    )


def _apply(base: Base, prepare_params: Callable | None, split: bool = False) -> Callable:
    def apply(params, inputs, rngs=None):
        params = prepare_params(params) if prepare_params else params
        rows = jax.tree.leaves(inputs)[0].shape[0]
        with nn.intercept_methods(_in_rows(rows)) if split else nullcontext():
            return base.adapted.apply(
                {"params": params}, *inputs, train=rngs is not None, rngs=rngs
            )

    return apply


def _in_rows(rows: int) -> Callable:
    """An interceptor of Flax: what goes into and out of every module stays in rows of the batch.

    Left alone the compiler would follow the parts of the weights and split features instead.
    """

    def hold(x):
        return in_rows(x) if getattr(x, "ndim", 0) > 1 and x.shape[0] == rows else x

    def intercept(call, arguments, keywords, context):
        return jax.tree.map(hold, call(*jax.tree.map(hold, arguments), **keywords))

    return intercept


def cast(tree: Any, dtype) -> Any:
    return jax.tree.map(
        lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )
