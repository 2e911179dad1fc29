"""What a task is, and what tasks have in common.

A new task is one file in this folder and one line of the registry in ``tasks/__init__.py``.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from rmlora_jax import data, methods
from rmlora_jax.config import Mistake
from rmlora_jax.data.dataset import Kind
from rmlora_jax.errors import UserError, first_line
from rmlora_jax.fields import Run
from rmlora_jax.hub import Info, Pretrained, new_head
from rmlora_jax.parallel.mesh import Devices
from rmlora_jax.tasks.places import missing_adapter, missing_model
from rmlora_jax.tasks.scores import score, score_sums
from rmlora_jax.tasks.top5 import top5


class Opening(NamedTuple):
    """What a task gets beside its config when it opens its data and its model."""

    devices: Devices  # of the run
    key: jax.Array  # for the parameters that the pretrained model lacks, such as the head
    # (folder, task, advice) -> the config and the parameters of a finished run of method full
    read_run: Callable[[Path, str, str], tuple[Run, dict]]


def divided(sums: dict[str, jax.Array], weight: Any) -> dict[str, jax.Array]:
    """The metrics of a step from sums over its global batch: each divided by the weight."""
    return {name: x / weight for name, x in sums.items()}


class Objective(NamedTuple):
    """What a run minimises, and what it predicts.

    Both functions get ``call`` and the labels. ``call`` runs the model on a micro-batch and hands
    keywords such as ``method`` on to it. A task whose logits would not fit in memory calls a method
    of the model that returns losses.

    Attributes:
      loss: -> (sum of losses, weight, {name: sum}). The step adds these up over micro-batches and
        devices in float32, and divides by the weight once. None stands for a weight of 1 for each
        example, which is known before tracing.
      predict: -> a row of figures for each example, for evaluation. Either ``{"prediction": (B,),
        "loss": (B,) float32, "label": (B,)}`` and more figures whose means are metrics; or, of
        examples with several targets each, ``{"loss": (B,) float32, "weight": (B,) float32}`` and
        more sums over the targets.
      means: (sums over the global batch, its weight) -> the metrics that a step logs. Those named
        "tokens" make the speed in tokens per second.
    """

    loss: Callable[[Callable, Any], tuple[jax.Array, jax.Array | None, dict[str, jax.Array]]]
    predict: Callable[[Callable, Any], dict[str, jax.Array]]
    means: Callable[[dict[str, jax.Array], Any], dict[str, jax.Array]] = divided


class Feed(NamedTuple):
    """The inputs of a run.

    ``train(step)`` iterates over this process's training batches from that step on,
    ``evaluate(split)`` over its batches of a split. Leaves are numpy arrays; one is "id", and for
    evaluation one is "mask". ``prepare_train`` and ``prepare_eval`` run inside the step. They
    return the model's positional arguments and the labels. ``resident`` are the arrays that they
    index into; {} where batches are streamed.
    """

    sizes: dict[str, int]  # split -> examples: train, validation, test, maybe more
    train: Callable[[int], Iterator[dict]]
    evaluate: Callable[[str], Iterator[dict]]
    resident: dict
    prepare_train: Callable  # (key, positions, resident, batch)
    prepare_eval: Callable  # (resident, batch)
    tests: tuple[str, ...] = ("test",)  # splits that are reported; the first without a suffix
    watched: tuple[str, ...] = ()  # those of ``tests`` that are measured with each validation
    unlabelled: tuple[str, ...] = ()  # splits that are predicted only
    absent: tuple[str, ...] = ()  # classes without a training example
    varies: bool = False  # whether batches differ in shape
    epoch: int = 0  # rows of one pass, where several examples share a row; 0: an example is a row
    # (split, ids of rows (n,)) -> the numbers of the examples in them
    examples: Callable[[str, np.ndarray], np.ndarray] = lambda split, ids: ids
    content: Mapping[str, str] = {}  # what was read -> its hash, see `train.record`
    notes: tuple[str, ...] = ()  # what a person should know of the batches
    token_flops: float = 0.0  # of attention, forward, for each token on average

    @property
    def train_size(self) -> int:
        """How many rows a pass over the training examples has."""
        return self.epoch or self.sizes["train"]


class Question(NamedTuple):
    """What a language model is asked, in a form of `inference.prompts`, and the right answer."""

    prompt: Mapping[str, Any]
    answer: str


class Questions(NamedTuple):
    """What a trained language model is asked at the end of a run.

    Attributes:
      samples: are answered before and after training, for a person to read.
      exam: are answered after training. The answer is right where ``pattern``, a regular expression
        with one group, finds the same in it as in the right one.
      longest: tokens of an answer.
    """

    samples: tuple[Question, ...] = ()
    exam: tuple[Question, ...] = ()
    pattern: str = ""
    longest: int = 256


class Problem(NamedTuple):
    """Data, model and measure, before anything is adapted."""

    model: nn.Module
    params: dict
    new: tuple[str, ...]  # paths of the parameters that the checkpoint does not have
    reseeded: Callable[[jax.Array], dict]  # key -> params with the new ones drawn from it
    example: tuple[jax.ShapeDtypeStruct, ...]  # the model's arguments for one example
    open_feed: Callable[[], Feed]  # what takes long (decoding, tokenising) happens here
    metrics: tuple[str, ...]  # names of tasks/scores.py; the first picks the best step
    notes: tuple[str, ...]  # what a person should know of the checkpoint and the data
    positive: int = 1  # the class that metric f1 is of
    write_predictions: Callable[..., Any] | None = None  # (folder, split, ids, predictions)
    pretrained: Pretrained | None = None  # None: a model that only this package knows
    info: Info | None = None  # what else a user of the trained model must know
    skipped: Sequence[str] = ()  # records that were left out of the data, and why
    questions: Questions | None = None

    @property
    def labels(self) -> tuple[str, ...] | None:
        """The names of the classes; None where they are numbers."""
        return self.info.labels if self.info else None

    @property
    def positive_label(self) -> str | None:
        """The name of the class that f1 is of; None where it is not measured."""
        names = self.labels
        return names[self.positive] if names and "f1" in self.metrics else None


class Shapes(NamedTuple):
    """A run without data and weights, for ``--compile_only``; fields as in `Problem` and `Feed`."""

    model: nn.Module
    example: tuple[jax.ShapeDtypeStruct, ...]
    outputs: int  # of the head
    prepare_train: Callable
    resident: dict  # of jax.ShapeDtypeStruct
    batch: dict  # of jax.ShapeDtypeStruct
    words: str = ""  # added to the number of examples in a batch, such as ", of 128 tokens"


class Task(NamedTuple):
    """What a run learns to do. ``open``, ``shapes`` and ``training_examples`` raise UserError."""

    name: str  # as ``--config.task`` has it
    help: str  # what is learnt, in a few words
    kind: Kind  # of the data
    request: Callable[[Run], data.Request]  # the data that a config names
    check: Callable[[Run], Iterator[Mistake]]  # what is wrong with a config for this task
    open: Callable[[Run, Opening], Problem]
    shapes: Callable[[Run], Shapes]
    training_examples: Callable[[Run], int]  # how many there are, without a network
    section: type | None = None  # the fields that it reads beside those of every run
    objective: Callable[[Run], Objective] = lambda config: classification(
        config.optimizer.label_smoothing
    )
    unit: str = "nats per example"  # of the loss
    # config as ``config.json`` has it -> rows of the report beside those of all tasks
    facts: Callable[[Mapping[str, Any]], dict[str, str]] = lambda config: {}
    model: Callable[[Run], Iterator[str]] | None = None  # in place of `missing_model`

    def missing(self, config: Run) -> Iterator[str]:
        """A line for each file or folder that a config names and that is missing."""
        yield from (self.model or missing_model)(config)
        yield from missing_adapter(config)
        yield from data.missing(self.kind, self.request(config))


# Fields of the config that a `data.Request` has, too.
SHARED = (
    "data_dir", "validation", "train_split", "image_key", "label_key", "classes", "per_class",
    "limit", "bad_records", "cache",
)


def request(config: Run, **own: Any) -> data.Request:
    """The data that a config names; ``own`` is what the task itself asks for."""
    c = config.data
    shared = {name: getattr(c, name) for name in SHARED}
    shared |= {"test_splits": {"test": c.test_split}, "threads": c.workers}
    return data.Request(c.name, **shared | own)


def build_model(
    config: Run, kind: Callable[..., nn.Module], architecture: Any, outputs: int, **options: Any
) -> nn.Module:
    """The model of a run, with what its method puts into the layers."""
    return kind(
        methods.architecture(config, architecture),
        outputs,
        dtype=jnp.dtype(config.model.dtype),
        unroll=min(config.model.unroll, architecture.num_hidden_layers),
        remat=config.model.remat,
        **options,
    )


def of_pretrained(pretrained: Pretrained, notes: tuple[str, ...] = (), **own: Any) -> Problem:
    """A problem whose model comes from a checkpoint; ``own`` are the fields that it does not set.

    ``notes`` come after what became of its head, what was left out and what was made new.
    """
    found = []
    if pretrained.dropped:
        found.append(f"not used from {pretrained.source}: {', '.join(pretrained.dropped)}")
    if pretrained.new:
        found.append(f"newly initialised: {', '.join(pretrained.new)}")
    return Problem(
        params=pretrained.params,
        new=pretrained.new,
        reseeded=lambda key: new_head(pretrained, key).params,
        notes=(*pretrained.notes, *found, *notes),
        pretrained=pretrained,
        **own,
    )


def classification(label_smoothing: float = 0.0) -> Objective:
    """Cross-entropy in nats of logits (B, classes) against int labels (B,).

    In training the labels are mixed with the uniform distribution, whose weight is
    ``label_smoothing``. The prediction is the class with the largest logit, int32; -1 where a logit
    is not finite. Of many classes `top5` is measured, too.
    """

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
        chosen = jnp.where(jnp.isfinite(logits).all(-1), logits.argmax(-1), -1)
        rows = {"prediction": chosen.astype(jnp.int32), "loss": losses(logits, labels)}
        return rows | top5(logits, labels) | {"label": labels}

    return Objective(loss, predict)


def regression() -> Objective:
    """The squared difference between outputs (B, 1) and float labels (B,)."""

    def run(call, labels):
        values = call().astype(jnp.float32)[:, 0]
        return values, jnp.square(values - labels)

    def loss(call, labels):
        _, found = run(call, labels)
        return found.sum(), None, {}

    def predict(call, labels):
        values, found = run(call, labels)
        return {"prediction": values, "loss": found, "label": labels}

    return Objective(loss, predict)


class Outputs(NamedTuple):
    """An evaluated split: arrays (n,) on the host, an entry for each row.

    ``weights`` are None where a row is one example with one label. Otherwise a row has several
    targets: ``losses`` and ``sums`` are sums over them, ``weights`` their numbers, and there are no
    predictions and labels. Without weights, the means of ``sums`` are metrics.
    """

    ids: np.ndarray
    predictions: Any  # np.ndarray, or None
    labels: Any  # np.ndarray, or None
    losses: np.ndarray
    weights: np.ndarray | None = None
    sums: Mapping[str, np.ndarray] = {}

    @property
    def finite(self) -> np.ndarray:
        """Which rows have finite outputs, bool (n,)."""
        if self.weights is not None:
            return np.isfinite(self.losses)
        classes = np.issubdtype(self.predictions.dtype, np.integer)
        return self.predictions >= 0 if classes else np.isfinite(self.predictions)


def measured(outputs: Outputs, metrics: tuple[str, ...], positive: int = 1) -> dict[str, float]:
    """The metrics of a whole split, in their order, those of ``sums``, and the mean loss."""
    if outputs.weights is not None:
        return score_sums({"loss": outputs.losses} | dict(outputs.sums), outputs.weights, metrics)
    found = score(outputs.predictions, outputs.labels, metrics, positive)
    rows = dict(outputs.sums) | {"loss": outputs.losses}
    return found | {name: float(own.mean(dtype=np.float64)) for name, own in rows.items()}


def numbered(config: Run, sizes: dict[str, int]) -> tuple[Callable, Callable]:
    """``train`` and ``evaluate`` of a `Feed` whose splits lie on the device in one array.

    A batch holds indices into that array, so the evaluation step compiles once for all splits.
    """
    first = dict(zip(sizes, np.cumsum([0, *sizes.values()]).tolist(), strict=False))

    def train(step):
        ids = data.batch_ids(
            sizes["train"], config.batch_size, seed=config.data_seed, start_step=step, **process()
        )
        return ({"id": i} for i in ids)

    def evaluate(split):
        for batch in data.eval_batches(sizes[split], config.eval_batch_size, **process()):
            yield {"id": batch["id"] + np.int32(first[split]), "mask": batch["mask"]}

    return train, evaluate


def process() -> dict[str, int]:
    """Which process this is and how many there are, as the functions of `data` take it."""
    return {"process_index": jax.process_index(), "process_count": jax.process_count()}


def check_labels(
    labels: np.ndarray, names: Sequence[str] | None, where: str, ids: Any = None
) -> None:
    """Raises a UserError for a label without an output of the head.

    ``names`` are those of the classes, None for regression; ``ids`` are the examples' numbers
    where ``labels`` are a part of a split.
    """
    labels = np.asarray(labels)
    fine = np.isfinite(labels) if names is None else (labels >= 0) & (labels < len(names))
    if fine.all():
        return
    wrong = int(np.flatnonzero(~fine)[0])
    example, label = wrong if ids is None else ids[wrong], labels[wrong]
    if names is None:
        raise UserError(f"{where}: example {example} has label {label}, not a number; correct it")
    raise UserError(
        f"{where}: example {example} has label {label}, but the data set declares "
        f"{len(names)} classes, 0 to {len(names) - 1}; correct the data set's features"
    )


def absent_classes(labels: np.ndarray, names: tuple[str, ...]) -> tuple[str, ...]:
    """The classes without an example among int ``labels`` (n,).

    >>> absent_classes(np.array([0, 2, 0]), ("cat", "dog", "owl"))
    ('dog',)
    """
    return tuple(names[i] for i in np.setdiff1d(np.arange(len(names)), labels))


def data_notes(problem: Problem, feed: Feed, batch_size: int) -> tuple[str, ...]:
    """What a person should know about the data before training."""
    notes, n = [*feed.notes], feed.train_size
    if problem.skipped:
        count = f"{len(problem.skipped)} record{'s' * (len(problem.skipped) > 1)}"
        notes.append(f"left out {count} that cannot be used: {data.listed([*problem.skipped])}")
    if feed.absent:
        notes.append(f"no training example of {len(feed.absent)} of the classes, which cannot be "
                     f"learnt: {', '.join(feed.absent[:10])}{', ...' * (len(feed.absent) > 10)}")
    if n < batch_size:
        notes.append(f"training examples: {n}, fewer than batch_size {batch_size}; a step has each "
                     f"{batch_size / n:.3g} times on average")
    return tuple(notes)


@contextlib.contextmanager
def fields(names: str) -> Iterator[None]:
    """Turns a ValueError or RuntimeError into a UserError that names the fields to correct."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, RuntimeError) as e:
        raise UserError(f"{first_line(e)}\nCorrect --config.{names}") from e
