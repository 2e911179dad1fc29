"""What a run learns to do: its loss, its predictions, and the data and model it does it with."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from rmlora_jax import data
from rmlora_jax.hub import Info, Pretrained, PretrainedText
from rmlora_jax.train.config import data_seed


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

    @property
    def train_size(self) -> int:
        return self.sizes["train"]


def numbered(config: ml_collections.ConfigDict, sizes: dict[str, int]) -> tuple[Callable, Callable]:
    """``train`` and ``evaluate`` of a `Feed` whose splits, of these sizes, lie on the device one
    behind the other: a batch is numbers into them, so that the evaluation step compiles once."""
    first = dict(zip(sizes, np.cumsum([0, *sizes.values()]).tolist(), strict=False))
    process = {"process_index": jax.process_index(), "process_count": jax.process_count()}

    def train(step):
        ids = data.batch_ids(
            sizes["train"], config.batch_size, seed=data_seed(config), start_step=step, **process
        )
        return ({"id": i} for i in ids)

    def evaluate(split):
        for batch in data.eval_batches(sizes[split], config.eval_batch_size, **process):
            yield {"id": batch["id"] + np.int32(first[split]), "mask": batch["mask"]}

    return train, evaluate


class Problem(NamedTuple):
    """Data, model and measure, before anything is adapted."""

    model: nn.Module
    params: dict
    new: tuple[str, ...]  # paths of the parameters that the checkpoint does not have
    reseeded: Callable[[jax.Array], dict]  # key -> params with the new ones drawn from it
    example: tuple[jax.ShapeDtypeStruct, ...]  # the model's arguments for one example
    open_feed: Callable[[], Feed]  # what takes long (decoding, tokenising) happens here
    metrics: tuple[str, ...]  # names of train/scores.py; the first picks the best step
    notes: tuple[str, ...]  # what a person should know of the checkpoint that was read
    write_predictions: Callable[..., Any] | None = None  # (folder, split, ids, predictions)
    pretrained: Pretrained | PretrainedText | None = None  # None: a model that is only ours
    info: Info | None = None  # what else a user of the trained model must know
    skipped: tuple[str, ...] = ()  # records of the data that cannot be used, and why


def example_losses(logits, labels, *, regression: bool, label_smoothing: float = 0.0):
    """The loss of each example, float32 (B,).

    Classification: cross-entropy in nats of logits (B, classes) against int labels, which are
    mixed with the uniform distribution by ``label_smoothing``. Regression: the square of the
    difference between logits (B, 1) and float labels.
    """
    logits = logits.astype(jnp.float32)
    if regression:
        return jnp.square(logits[:, 0] - labels)
    targets = jax.nn.one_hot(labels, logits.shape[-1])
    return optax.softmax_cross_entropy(logits, optax.smooth_labels(targets, label_smoothing))


def predictions(logits, *, regression: bool):
    """The class of the largest logit, int32 (B,), or the value, float32 (B,)."""
    if regression:
        return logits[:, 0].astype(jnp.float32)
    return logits.argmax(-1).astype(jnp.int32)


class Outputs(NamedTuple):
    """A whole split, evaluated: arrays (n,) on the host."""

    ids: np.ndarray
    predictions: np.ndarray
    labels: np.ndarray
    losses: np.ndarray


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
