"""From a config to everything a run needs: data, model, method, compiled-to-be steps."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

import rmlora_jax as rm
from rmlora_jax.errors import UserError
from rmlora_jax.train import images, method, text
from rmlora_jax.train.config import KINDS, REGRESSION
from rmlora_jax.train.fields import fields
from rmlora_jax.train.mesh import Devices, check_divisible, replicate, spread
from rmlora_jax.train.step import Constants, State, init_state, make_eval_step, make_train_step
from rmlora_jax.train.task import Feed


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
    metrics: tuple[str, ...]  # names of train/scores.py; the first picks the best step
    notes: tuple[str, ...]  # what a person should know of the checkpoint that was read
    write_predictions: Callable | None  # (folder, split, ids, predictions)


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
    open_problem = images.open_problem if config.task == KINDS[0] else text.open_problem
    head_key, factors_key = jax.random.split(jax.random.key(config.seed))
    problem = open_problem(config, devices, head_key)
    with fields("lora.*"):
        lora = method.description(config)
        adapted = rm.adapt(problem.model, lora)
        params = rm.attach(factors_key, adapted, problem.params, *problem.example)
        trainable, frozen = rm.split(params, lora)
    count = lambda tree: sum(math.prod(x.shape) for x in jax.tree.leaves(tree))  # noqa: E731

    feed = problem.open_feed()
    steps = config.steps or max(1, round(config.epochs * feed.train_size / config.batch_size))
    schedule = method.learning_rate(config, steps)
    with fields("rm.* and --config.lora.rank"):
        tx = method.optimizer(config, schedule, steps)
        state = init_state(tx, _cast(trainable, jnp.float32))

    def apply(params, inputs, rngs=None):
        return adapted.apply({"params": params}, *inputs, train=rngs is not None, rngs=rngs)

    regression = config.task == REGRESSION
    penalty = functools.partial(rm.orthogonality, kind=config.rm.kind)
    train_step = make_train_step(
        apply,
        tx,
        feed.prepare_train,
        regression=regression,
        penalty=penalty if lora.target is not None else None,
        accumulate=config.accumulate,
        label_smoothing=config.optimizer.label_smoothing,
    )
    frozen = replicate(_cast(frozen, jnp.dtype(config.model.base_dtype)), devices)
    return Job(
        lora=lora,
        state=replicate(state, devices),
        constants=Constants(frozen, feed.resident, replicate(np.uint32(config.seed), devices)),
        train_step=spread(train_step, devices, donate=True),
        eval_step=spread(
            make_eval_step(apply, feed.prepare_eval, regression=regression), devices
        ),
        feed=feed,
        schedule=schedule,
        steps=steps,
        eval_every=config.eval_every or math.ceil(feed.train_size / config.batch_size),
        total_parameters=count(params),
        trainable_parameters=count(trainable),
        metrics=problem.metrics,
        notes=problem.notes,
        write_predictions=problem.write_predictions,
    )


def _cast(tree: Any, dtype) -> Any:
    return jax.tree.map(
        lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )
