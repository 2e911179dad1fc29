"""One optimizer step and one evaluation step, as one device sees them.

    gradients of this device's examples -> one sum over all devices -> tx -> new factors

The penalty and the mask are parts of ``tx``; the step knows nothing of them beyond what it logs.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import rmlora_jax as rm
from rmlora_jax.parallel.mesh import AXIS
from rmlora_jax.tasks.task import divided


class State(NamedTuple):
    """All that a step changes, hence all that a checkpoint holds."""

    step: Any  # int32: optimizer steps done
    trainable: Any  # nested dicts
    opt_state: optax.OptState


class Constants(NamedTuple):
    """What a step reads and does not change; arguments of it, so that nothing is compiled in.
    Arrays, or shapes where nothing is run."""

    frozen: dict  # the base
    data: dict  # the resident data, {} where batches are streamed
    data_seed: Any  # uint32: of the augmentation; folded with the step
    seed: Any  # uint32: of dropout; folded with the step


def make_train_step(
    apply: Callable,
    loss: Callable,
    tx: optax.GradientTransformation,
    prepare: Callable,
    *,
    figures: Callable | None = None,
    accumulate: int = 1,
    means: Callable = divided,
) -> Callable:
    """Builds ``step(state, constants, batch) -> (state, metrics)``, to be mapped over devices.

    Args:
      apply: ``(params, inputs, rngs) -> outputs`` of the adapted model in training.
      loss: `tasks.task.Objective.loss`: ``(call, labels) -> (sum, weight, counts)``.
      tx: the optimizer, penalty and mask included.
      prepare: ``(key, positions, data, batch) -> (inputs, labels)``; ``positions`` is each
        example's place in the global batch, so that random crops do not depend on the number of
        devices or micro-batches.
      figures: ``(trainable before the update, optimizer state after it) -> {name: scalar}``, more
        metrics.
      accumulate: micro-batches, run one after another; gradients are added in float32.
      means: `tasks.task.Objective.means`: ``(sums of the task, weight) -> {name: scalar}``.

    Metrics (float32 scalars, equal on all devices): loss and the counts of the task, such as
    accuracy, sums over the global batch divided by its weight once (the loss without the penalty);
    grad_norm; skipped, 1 where loss or grad_norm is not finite; and ``figures``. A skipped step
    leaves parameters and optimizer state, and with it the mask's and the allocation's, as they
    were; only the step's number goes on, and so do data.
    """

    def loss_of(trainable, constants, batch, keys, positions):
        augment_key, dropout_key = keys
        inputs, labels = prepare(augment_key, positions, constants.data, batch)
        # Dropout alone differs with the number of devices: its masks are drawn per micro-batch.
        rngs = {"dropout": jax.random.fold_in(dropout_key, positions[0])}
        params = rm.join(trainable, constants.frozen)
        total, weight, counts = loss(functools.partial(apply, params, inputs, rngs), labels)
        return total, (weight, counts)

    def step(state: State, constants: Constants, batch):
        keys = keys_of(constants, state.step)
        local = jax.tree.leaves(batch)[0].shape[0]
        positions = jax.lax.axis_index(AXIS) * local + jnp.arange(local)

        def gradients(micro):
            batch, positions = micro
            (total, (weight, counts)), grads = jax.value_and_grad(loss_of, has_aux=True)(
                state.trainable, constants, batch, keys, positions
            )
            grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
            return (grads, total, counts), weight

        if accumulate == 1:
            sums, weight = gradients((batch, positions))
        else:
            micros = jax.tree.map(
                lambda x: x.reshape(accumulate, -1, *x.shape[1:]), (batch, positions)
            )
            zeros = jax.tree.map(
                lambda x: jnp.zeros(x.shape, x.dtype),
                jax.eval_shape(gradients, jax.tree.map(lambda x: x[0], micros))[0],
            )

            def add(total, micro):
                sums, weight = gradients(micro)
                return jax.tree.map(jnp.add, total, sums), weight

            sums, weights = jax.lax.scan(add, zeros, micros)
            weight = None if weights is None else weights.sum()
        # The only reduction between devices in the step.
        sums, weight = jax.lax.psum((sums, weight), AXIS)
        weight = local * jax.lax.axis_size(AXIS) if weight is None else weight
        grads, total, counts = sums
        grads, mean_loss = jax.tree.map(lambda x: x / weight, (grads, total))
        updates, opt_state = tx.update(grads, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        # Of sums over all devices, so that all of them come to the same answer.
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(mean_loss) & jnp.isfinite(grad_norm)
        trainable, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (trainable, opt_state),
            (state.trainable, state.opt_state),
        )
        metrics = {"loss": mean_loss} | means(counts, weight)
        metrics |= {"grad_norm": grad_norm, "skipped": 1.0 - finite}
        if figures is not None:
            metrics |= figures(state.trainable, opt_state)
        return State(state.step + 1, trainable, opt_state), metrics

    return step


def first_keys(seed: int) -> jax.Array:
    """The keys of what is new in the pretrained model, such as its head, and of the factors."""
    return jax.random.split(jax.random.key(seed))


def keys_of(constants: Constants, step: jax.Array | int) -> tuple[jax.Array, jax.Array]:
    """The keys of augmentation and of dropout in the step after ``step`` steps.

    If the two seeds are equal, they are the halves of one key. Nothing of a run enters the first,
    so that runs mapped over a step share what it draws.
    """

    def halves(seed):
        return jax.random.split(jax.random.fold_in(jax.random.key(seed), step))

    return halves(constants.data_seed)[0], halves(constants.seed)[1]


def updates_done(opt_state: optax.OptState) -> jax.Array:
    """How often the optimizer moved the parameters: fewer times than there were steps where some
    were skipped. Schedules go by it."""
    return optax.tree.get_all_with_path(opt_state, "count")[0][1]


def make_eval_step(apply: Callable, predict: Callable, prepare: Callable) -> Callable:
    """Builds ``step(trainable, constants, batch) -> outputs``, to be mapped over devices.

    ``predict`` is `tasks.task.Objective.predict`. ``batch["mask"]`` (bool) is False for the rows
    that pad the last batch. The outputs are those of the global batch, each (B,) and the same on
    every device: what ``predict`` gives, id, mask.
    """

    def step(trainable, constants: Constants, batch):
        batch = dict(batch)
        rows = {"mask": batch.pop("mask"), "id": batch["id"]}
        inputs, labels = prepare(constants.data, batch)
        params = rm.join(trainable, constants.frozen)
        rows |= predict(functools.partial(apply, params, inputs), labels)
        return jax.tree.map(lambda x: jax.lax.all_gather(x, AXIS, tiled=True), rows)

    return step
