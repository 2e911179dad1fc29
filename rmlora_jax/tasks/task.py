"""What a task is: its checks, the data and the model it opens, its loss, its predictions.

A new task is one file of this room and one line of the registry in ``tasks/__init__.py``.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from rmlora_jax import data
from rmlora_jax.config import Mistake
from rmlora_jax.errors import UserError
from rmlora_jax.fields import Run
from rmlora_jax.hub import Info, Pretrained, PretrainedText
from rmlora_jax.parallel.mesh import Devices
from rmlora_jax.tasks.scores import score


class Opening(NamedTuple):
    """What a task gets beside its config when it opens its data and its model.

    Attributes:
      devices: that the run is on.
      key: for the parameters that the pretrained model does not have, such as its head.
      read_run: ``(folder, task, advice) -> (config, parameters)`` of a finished run of method full.
    """

    devices: Devices
    key: jax.Array
    read_run: Callable[[Path, str, str], tuple[Run, dict]]


class Objective(NamedTuple):
    """What a run minimises, and what it predicts.

    Both functions get ``call``, which runs the model on the inputs of a micro-batch (keywords, such
    as ``method``, are passed on to it), and the labels. A task whose logits are too large to exist
    at once thus calls a method of the model that returns losses.

    Attributes:
      loss: -> (sum of losses, weight, {name: sum}). The step adds all of them up over micro-batches
        and devices in float32 and divides by the weight once. The weight None is 1 an example, as
        in classification: a number that is known before tracing.
      predict: -> {"prediction": (B,), "loss": (B,) float32} of an evaluation.
    """

    loss: Callable[[Callable, Any], tuple[jax.Array, jax.Array | None, dict[str, jax.Array]]]
    predict: Callable[[Callable, Any], dict[str, jax.Array]]


class Feed(NamedTuple):
    """The inputs of a run.

    ``train(step)`` iterates over this process's batches from that step on, ``evaluate(split)``
    over those of one of ``sizes``; leaves are numpy arrays, among them "id", and for evaluation
    "mask". ``prepare_train`` and ``prepare_eval`` run inside the step and give (inputs, labels),
    inputs being the model's positional arguments; ``resident`` is what they index into, {} where
    batches are streamed.
    """

    sizes: dict[str, int]  # split -> examples: train, validation, test, maybe more
    train: Callable[[int], Iterator[dict]]
    evaluate: Callable[[str], Iterator[dict]]
    resident: dict
    prepare_train: Callable  # (key, positions, resident, batch)
    prepare_eval: Callable  # (resident, batch)
    tests: tuple[str, ...] = ("test",)  # splits that are reported; the first without a suffix
    unlabelled: tuple[str, ...] = ()  # splits that are predicted only
    absent: tuple[str, ...] = ()  # classes of which there is no training example
    varies: bool = False  # whether batches differ in their shape

    @property
    def train_size(self) -> int:
        return self.sizes["train"]


class Problem(NamedTuple):
    """Data, model and measure, before anything is adapted."""

    model: nn.Module
    params: dict
    new: tuple[str, ...]  # paths of the parameters that the checkpoint does not have
    reseeded: Callable[[jax.Array], dict]  # key -> params with the new ones drawn from it
    example: tuple[jax.ShapeDtypeStruct, ...]  # the model's arguments for one example
    open_feed: Callable[[], Feed]  # what takes long (decoding, tokenising) happens here
    objective: Objective
    metrics: tuple[str, ...]  # names of tasks/scores.py; the first picks the best step
    notes: tuple[str, ...]  # what a person should know of the checkpoint and the data
    write_predictions: Callable[..., Any] | None = None  # (folder, split, ids, predictions)
    pretrained: Pretrained | PretrainedText | None = None  # None: a model that is only ours
    info: Info | None = None  # what else a user of the trained model must know
    skipped: tuple[str, ...] = ()  # records of the data that cannot be used, and why


class Shapes(NamedTuple):
    """A run without data and weights: what ``--compile_only`` compiles.

    ``resident`` and ``batch`` are ``jax.ShapeDtypeStruct``; ``outputs`` are those of the head, and
    ``words`` say what a batch holds beside its examples.
    """

    model: nn.Module
    example: tuple[jax.ShapeDtypeStruct, ...]
    outputs: int
    objective: Objective
    prepare_train: Callable
    resident: dict
    batch: dict
    words: str = ""


class Task(NamedTuple):
    """A kind of run.

    Attributes:
      name: as ``--config.task`` has it.
      help: what is learnt, in a few words.
      check: config -> what is wrong with it for this task, as (field, what it must be).
      missing: config -> a line for each file or folder that it names and that is not there.
      open: (config, opening) -> the problem; raises UserError.
      shapes: config -> the run as shapes; raises UserError.
      training_examples: config -> how many there are, without a network; raises UserError.
      section: the fields that it reads beside those of every run.
      unit: of the loss, for an axis.
      facts: config as ``config.json`` has it -> rows of the report beside those of all tasks.
    """

    name: str
    help: str
    check: Callable[[Run], Iterator[Mistake]]
    missing: Callable[[Run], Iterator[str]]
    open: Callable[[Run, Opening], Problem]
    shapes: Callable[[Run], Shapes]
    training_examples: Callable[[Run], int]
    section: type | None = None
    unit: str = "nats per example"
    facts: Callable[[Mapping[str, Any]], dict[str, str]] = lambda config: {}


def classification(label_smoothing: float = 0.0) -> Objective:
    """Cross-entropy in nats of logits (B, classes) against int labels (B,), which training mixes
    with the uniform distribution by ``label_smoothing``; the class of the largest logit, int32."""

    def losses(logits, labels, smoothing=0.0):
        logits = logits.astype(jnp.float32)
        targets = jax.nn.one_hot(labels, logits.shape[-1])
        return optax.softmax_cross_entropy(logits, optax.smooth_labels(targets, smoothing))

    def loss(call, labels):
        logits = call()
        total = losses(logits, labels, label_smoothing).sum()
        return total, None, {"accuracy": (logits.argmax(-1) == labels).sum(dtype=jnp.float32)}

    def predict(call, labels):
        logits = call()
        return {
            "prediction": logits.argmax(-1).astype(jnp.int32), "loss": losses(logits, labels)
        }

    return Objective(loss, predict)


def regression() -> Objective:
    """The square of the difference between outputs (B, 1) and float labels (B,)."""

    def run(call, labels):
        values = call().astype(jnp.float32)[:, 0]
        return values, jnp.square(values - labels)

    def loss(call, labels):
        _, found = run(call, labels)
        return found.sum(), None, {}

    def predict(call, labels):
        values, found = run(call, labels)
        return {"prediction": values, "loss": found}

    return Objective(loss, predict)


class Outputs(NamedTuple):
    """A whole split, evaluated: arrays (n,) on the host."""

    ids: np.ndarray
    predictions: np.ndarray
    labels: np.ndarray
    losses: np.ndarray


def measured(outputs: Outputs, metrics: tuple[str, ...]) -> dict[str, float]:
    """The metrics over a whole split, the first of them first, and the mean loss."""
    found = score(outputs.predictions, outputs.labels, metrics)
    return found | {"loss": float(outputs.losses.mean(dtype=np.float64))}


def numbered(config: Run, sizes: dict[str, int]) -> tuple[Callable, Callable]:
    """``train`` and ``evaluate`` of a `Feed` whose splits, of these sizes, lie on the device one
    behind the other: a batch is numbers into them, so that the evaluation step compiles once."""
    first = dict(zip(sizes, np.cumsum([0, *sizes.values()]).tolist(), strict=False))
    process = {"process_index": jax.process_index(), "process_count": jax.process_count()}

    def train(step):
        ids = data.batch_ids(
            sizes["train"], config.batch_size, seed=config.data_seed, start_step=step, **process
        )
        return ({"id": i} for i in ids)

    def evaluate(split):
        for batch in data.eval_batches(sizes[split], config.eval_batch_size, **process):
            yield {"id": batch["id"] + np.int32(first[split]), "mask": batch["mask"]}

    return train, evaluate


def absent_classes(labels: np.ndarray, names: tuple[str, ...]) -> tuple[str, ...]:
    """The classes that do not occur among int ``labels`` (n,).

    >>> absent_classes(np.array([0, 2, 0]), ("cat", "dog", "owl"))
    ('dog',)
    """
    return tuple(names[i] for i in np.setdiff1d(np.arange(len(names)), labels))


def data_notes(problem: Problem, feed: Feed, batch_size: int) -> tuple[str, ...]:
    """What a person should know of the data before they are trained on."""
    notes, n = [], feed.train_size
    if problem.skipped:
        count = f"{len(problem.skipped)} record{'s' * (len(problem.skipped) > 1)}"
        notes.append(f"left out {count} that cannot be used: {data.listed(problem.skipped)}")
    if feed.absent:
        notes.append(f"no training example of {len(feed.absent)} of the classes, which cannot be "
                     f"learnt: {', '.join(feed.absent[:10])}{', ...' * (len(feed.absent) > 10)}")
    if n < batch_size:
        notes.append(f"training examples: {n}, fewer than batch_size {batch_size}; a step has each "
                     f"{batch_size / n:.3g} times on average")
    return tuple(notes)


def checkpoint_notes(pretrained) -> tuple[str, ...]:
    """What was left out of a checkpoint and what was made new, in words."""
    notes = []
    if pretrained.dropped:
        notes.append(f"not used from {pretrained.source}: {', '.join(pretrained.dropped)}")
    if pretrained.new:
        notes.append(f"newly initialised: {', '.join(pretrained.new)}")
    return tuple(notes)


@contextlib.contextmanager
def fields(names: str) -> Iterator[None]:
    """Turns a ValueError or RuntimeError of the library into a UserError that names the fields
    ``names`` to correct."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, RuntimeError) as e:
        raise UserError(f"{str(e).splitlines()[0]}\nCorrect --config.{names}") from e
