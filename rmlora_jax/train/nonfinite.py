"""Non-finite values: in which step, examples and layer; and losses far above the others.

A step leaves out a non-finite update by itself (`step.make_train_step`). Here skipped steps are
counted on the host, from metrics that exist already. The model runs once more only when a run ends.
"""

import collections
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.core
import jax.numpy as jnp
import numpy as np

import rmlora_jax as rm
from rmlora_jax.errors import UserError
from rmlora_jax.tasks.task import Outputs
from rmlora_jax.train.step import Constants, keys_of

WINDOW = 100  # steps that a loss is held against
FAR = 10.0  # median absolute deviations above their median
SHOWN = 64  # ids of examples
ADVICE = "A lower --config.optimizer.learning_rate and --config.model.dtype=float32 help"


class Watched:
    """The losses of one run, step by step.

    Attributes:
      over: whether ``limit`` steps in a row were skipped; once true it stays true. 0: never.
      first: the first step of the latest row of skipped steps.
      length: the number of steps in that row; 0 after a step that was not skipped.
    """

    def __init__(self, limit: int):
        self.limit, self.over, self.first, self.length = limit, False, 0, 0
        self.spikes = Spikes()

    def add(self, first_step: int, metrics: Sequence[Mapping[str, float]]) -> list[str]:
        """Goes on with the metrics of the steps from ``first_step``; returns what to tell.

        >>> watched = Watched(limit=2)
        >>> good, bad = {"loss": 1.0, "skipped": 0.0}, {"loss": float("nan"), "skipped": 1.0}
        >>> watched.add(1, [good, bad]), watched.over
        (['step 2: skipped, as its loss or gradient is not finite'], False)
        >>> watched.add(3, [good, bad, bad])
        ['step 4: skipped, as its loss or gradient is not finite (and 1 more)']
        >>> watched.over, watched.first, watched.length
        (True, 4, 2)
        """
        skipped = [step for step, m in enumerate(metrics, first_step) if m["skipped"]]
        for step, m in enumerate(metrics, first_step):
            if self.over and not m["skipped"]:
                break
            self.length = self.length + 1 if m["skipped"] else 0
            self.first = step if self.length == 1 else self.first
            self.over = bool(self.limit) and self.length >= self.limit
        notes = []
        if skipped:
            more = f" (and {len(skipped) - 1} more)" if skipped[1:] else ""
            first = f"step {skipped[0]:,}: skipped"
            notes.append(f"{first}, as its loss or gradient is not finite{more}")
        spike = self.spikes.add(first_step, [m["loss"] for m in metrics])
        return notes + ([spike] if spike else [])


class Spikes:
    """Finds losses above median + 10 MAD of the hundred steps before them."""

    def __init__(self):
        self.before = collections.deque(maxlen=WINDOW)

    def add(self, first_step: int, losses: Sequence[float]) -> str | None:
        """Goes on with these losses; says in words which of them are far off.

        >>> spikes = Spikes()
        >>> spikes.add(1, [1.0, 1.2] * 60), spikes.add(121, [1.1, 5.0])
        (None, 'step 122: the loss 5 is above 1.65, median + 10 MAD of the 100 steps before')
        """
        own = np.asarray(losses, np.float64)
        every = np.concatenate([self.before, own])
        every = np.where(np.isfinite(every), every, np.nan)
        self.before.extend(own)
        start = len(every) - len(own)
        if start + len(own) <= WINDOW:
            return None
        judged = max(start, WINDOW)
        windows = np.lib.stride_tricks.sliding_window_view(every, WINDOW)[judged - WINDOW : -1]
        median = np.median if np.isfinite(windows).all() else np.nanmedian  # the latter is slow
        middle = median(windows, axis=1)
        spread = median(np.abs(windows - middle[:, None]), axis=1)
        limit = middle + FAR * spread
        far = np.flatnonzero((every[judged:] > limit) & (spread > 0))
        if not far.size:
            return None
        i = int(far[0])
        step = first_step + judged - start + i
        more = f" (and {far.size - 1} more)" if far.size > 1 else ""
        return (
            f"step {step:,}: the loss {every[judged + i]:.4g} is above {limit[i]:.4g}, median + "
            f"{FAR:g} MAD of the {WINDOW} steps before{more}"
        )


def _listed(ids: np.ndarray) -> str:
    return ", ".join(map(str, ids[:SHOWN].tolist())) + (", ..." if ids.size > SHOWN else "")


def unanswered(outputs: Outputs, split: str) -> str | None:
    """Which examples of an evaluated split have outputs that are not finite, in words, or None."""
    wrong = ~outputs.finite
    if not wrong.any():
        return None
    ids = outputs.ids[wrong]
    if outputs.weights is not None:
        return (f"{split}: the losses of {ids.size:,} of {wrong.size:,} rows of examples are not "
                f"finite: rows {_listed(ids)}")
    return (f"{split}: the outputs of {ids.size:,} of {wrong.size:,} examples are not finite, so "
            f"they have no prediction: examples {_listed(ids)}")


def ended(job: Any, trainable: Any, watched: Watched, step: int) -> UserError:
    """The error of a run that ends after ``step``: which examples, and which layer."""
    batch = next(iter(job.feed.train(watched.first - 1)))
    where = job.look(trainable, job.constants, batch, watched.first - 1)
    ids = job.feed.examples("train", np.ravel(batch["id"]))
    return UserError(
        f"{watched.length} steps in a row with a loss or gradient that is not finite, the first "
        f"step {watched.first:,} with the training examples {_listed(ids)}: {where}\n"
        f"What was trained before it is saved as step {step:,}; the same command goes on from "
        f"there. {ADVICE}"
    )


def look(
    apply: Callable, loss: Callable, prepare: Callable,
    trainable: Any, constants: Constants, batch: dict, step: int,
) -> str:
    """Where the forward pass of a training step first gives a non-finite value, in words.

    The model runs outside of jit, where each layer's output is at hand, also inside of scans, and
    on one device. ``apply``, ``loss`` and ``prepare`` are those of `step.make_train_step`.
    """
    trainable, constants, batch = jax.device_get((trainable, constants, batch))
    augment_key, dropout_key = keys_of(constants, step)
    positions = jnp.arange(jax.tree.leaves(batch)[0].shape[0])
    for path, leaf in jax.tree.leaves_with_path(trainable):
        if _any_nonfinite([leaf]):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            return f"the parameter {name} is not finite before the step"
    found: list[str] = []
    calls = collections.Counter()

    def check(next_fun, args, kwargs, context):
        out = next_fun(*args, **kwargs)
        path = "/".join(context.module.path) or "the model"
        leaves = [x for x in jax.tree.leaves(out) if hasattr(x, "dtype")]
        if any(isinstance(x, jax.core.Tracer) for x in leaves):
            return out  # flax looks at the shapes of a scan before it runs it
        calls[path, context.method_name] += 1
        if not found and _any_nonfinite(leaves):
            nth = calls[path, context.method_name]
            found.append(f"the output of {path} ({context.method_name}, call {nth})")
        return out

    with jax.disable_jit(), jax.default_device(jax.local_devices()[0]):
        inputs, labels = prepare(augment_key, positions, constants.data, batch)
        if _any_nonfinite(jax.tree.leaves(inputs)):
            return "the inputs are not finite"
        rngs = {"dropout": jax.random.fold_in(dropout_key, 0)}
        with nn.intercept_methods(check):
            params = rm.join(trainable, constants.frozen)
            total, *_ = loss(functools.partial(apply, params, inputs, rngs), labels)
    if found:
        return f"first not finite is {found[0]}"
    if _any_nonfinite([total]):
        return "every layer's output is finite, the loss of these labels is not"
    return "every layer's output and the loss are finite; the gradient is not"


def _any_nonfinite(leaves: Sequence[Any]) -> bool:
    return any(
        jnp.issubdtype(x.dtype, jnp.inexact) and not bool(jnp.isfinite(x).all()) for x in leaves
    )
