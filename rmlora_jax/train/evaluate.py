"""The two steps of a program, compiled; whole splits evaluated by them, and spectra of factors."""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

import rmlora_jax as rm
from rmlora_jax.errors import UserError
from rmlora_jax.models.attention import blaming
from rmlora_jax.parallel.memory import needed
from rmlora_jax.parallel.mesh import shard
from rmlora_jax.tasks.task import Outputs, measured
from rmlora_jax.train import nonfinite
from rmlora_jax.train.setup import Job
from rmlora_jax.train.step import State


class Compiled:
    """A mapped step, compiled once for each shape of its batch; ``seconds`` is the time it took.

    Compilation is thus apart from training in every figure, also where the batches of a long text
    come late in a run.
    """

    def __init__(self, step: Any):
        self.step, self.programs, self.seconds = step, {}, 0.0

    def program(self, changed, constants, batch) -> Callable:
        shapes = tuple((name, x.shape) for name, x in sorted(batch.items()))
        if shapes not in self.programs:
            began = time.monotonic()
            self.programs[shapes] = self.step.lower(changed, constants, batch).compile()
            self.seconds += time.monotonic() - began
        return self.programs[shapes]

    def __call__(self, changed, constants, batch):
        return self.program(changed, constants, batch)(changed, constants, batch)


class Steps(NamedTuple):
    train: Compiled
    evaluate: Compiled

    @property
    def seconds(self) -> float:
        return self.train.seconds + self.evaluate.seconds

    @property
    def need(self) -> int:
        """Bytes on a device that the larger of the compiled programs allocates; 0: unknown."""
        return max(needed(program) for step in self for program in step.programs.values())


def compile_steps(job: Job, state: State, start: int) -> Steps:
    """Both steps, compiled for the shapes of their first batches from step ``start`` on."""
    steps = Steps(Compiled(job.train_step), Compiled(job.eval_step))
    with blaming(job.base.config.model.dtype, "config.model.dtype"):
        batch = shard(next(iter(job.feed.train(start))), job.base.devices)
        steps.train.program(state, job.constants, batch)
        batch = shard(next(iter(job.feed.evaluate("validation"))), job.base.devices)
        steps.evaluate.program(state.trainable, job.constants, batch)
    return steps


def evaluate(compiled: Steps, trainable, job: Job, split: str) -> list[Outputs]:
    """The outputs of each run for every example of a split, in the order of their ids."""
    batches = jax.device_get(
        [
            compiled.evaluate(trainable, job.constants, shard(batch, job.base.devices))
            for batch in job.feed.evaluate(split)
        ]
    )
    rows = {k: np.concatenate([b[k] for b in batches], axis=-1) for k in batches[0]}
    ids, mask, labels = rows.pop("id"), rows.pop("mask"), rows.pop("label", None)
    order = np.argsort(ids, kind="stable")
    order = order[mask[order]]
    labels = labels if labels is None else labels[order]
    found = {k: x[..., order].reshape(len(job.runs), -1) for k, x in rows.items()}
    return [outputs_of(ids[order], labels, {k: x[i] for k, x in found.items()})
            for i in range(len(job.runs))]


def outputs_of(ids: np.ndarray, labels: Any, rows: dict[str, np.ndarray]) -> Outputs:
    """The outputs of one run from the rows that the objective's ``predict`` gave."""
    losses, weights = rows.pop("loss"), rows.pop("weight", None)
    predictions = rows.pop("prediction", None)
    return Outputs(ids, predictions, labels, losses, weights, rows)


def tested(compiled: Steps, trainable, job: Job) -> dict[str, list[Outputs]]:
    """The outputs of each run on every reported split."""
    return {split: final(compiled, trainable, job, split) for split in job.feed.tests}


def reported(compiled: Steps, trainable, job: Job) -> list[dict[str, float]]:
    """The figures of each run on every reported split; those of split "test_x" end in "_x"."""
    return figures_of(tested(compiled, trainable, job), job)


def figures_of(splits: dict[str, list[Outputs]], job: Job) -> list[dict[str, float]]:
    """`reported`, of outputs that are at hand; of watched splits the loss alone."""
    figures: list[dict[str, float]] = [{} for _ in job.runs]
    for split, outputs in splits.items():
        suffix = split.removeprefix("test")
        for own, found in zip(figures, outputs, strict=True):
            values = measured(found, job.problem.metrics, job.problem.positive)
            if split in job.feed.watched:
                values = {"loss": values["loss"]}
            own |= {name + suffix: value for name, value in values.items()}
    return figures


def unanswered(
    job: Job, split: str, outputs: list[Outputs], note: Callable = print
) -> list[str | None]:
    """Reports each run that has an output that is not finite; returns what was said of each."""
    found = [nonfinite.unanswered(own, split) for own in outputs]
    if jax.process_index() == 0:
        for run, words in zip(job.runs, found, strict=True):
            if words:
                note(f"seed {run.seed}: {words}" if job.stacked else words)
    return found


def final(compiled: Steps, trainable, job: Job, split: str) -> list[Outputs]:
    """`evaluate` for figures and predictions that a finished run leaves.

    Raises:
      UserError: every run has an output that is not finite; no class is made of it.
    """
    outputs = evaluate(compiled, trainable, job, split)
    found = unanswered(job, split, outputs)
    if all(found):
        raise UserError(f"{found[0]}\n{nonfinite.ADVICE}")
    return outputs


def spectrum(job: Job, i: int, trainable) -> dict:
    """`rmlora_jax.intrinsic_dimension` of what run ``i`` adapts; {} where it adapts nothing."""
    if job.lora[i].target is None:
        return {}
    return jax.device_get(_spectrum(trainable, job.base.constants.frozen, job.lora[i]))


@functools.partial(jax.jit, static_argnums=2)
def _spectrum(trainable, frozen, lora):
    return rm.intrinsic_dimension(rm.join(trainable, frozen), lora)
