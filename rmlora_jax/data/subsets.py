"""Smaller versions of an image data set: some of its classes, some images of each class.

Both draws are numpy's RandomState, whose stream never changes between versions: the same classes
and images for ever, whatever the seed of a run.
"""

import dataclasses

import numpy as np

from rmlora_jax.data.dataset import ArraySource, Dataset, ImageSource, Subset, identity_of
from rmlora_jax.errors import UserError

SEED = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Relabelled:
    """``source`` with the label ``l`` read as ``labels[l]``.

    >>> source = ArraySource(np.zeros((1, 8, 8, 3), np.uint8), np.array([2]))
    >>> Relabelled(source, np.array([0, 0, 1]))[0]["label"]
    1
    """

    source: ImageSource
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict:
        image, label = self.load(index)
        return {"image": image, "label": label}

    def load(self, index: int, size: int | None = None) -> tuple[np.ndarray, int]:
        image, label = self.source.load(index, size)
        return image, int(self.labels[label])

    def identity(self) -> str | None:
        own = identity_of(self.source, self.labels)
        return own and f"relabelled {own}"


def labels_of(source: ImageSource) -> np.ndarray:
    """Every label of a source, int (n,), without decoding an image where that can be helped."""
    if isinstance(source, ArraySource):
        return np.asarray(source.labels)
    if isinstance(source, Subset):
        ids = np.asarray(source.ids, np.int64)
        if len(ids) < len(source.source) and hasattr(source.source, "label"):
            return np.array([source.source.label(int(i)) for i in ids])
        return labels_of(source.source)[ids]
    if isinstance(source, Relabelled):
        return source.labels[labels_of(source.source)]
    if hasattr(source, "label"):
        return np.array([source.label(i) for i in range(len(source))])
    return np.array([source[i]["label"] for i in range(len(source))])


def with_classes(data: Dataset, count: int, *, seed: int = SEED) -> Dataset:
    """The images of ``count`` classes, in every split, labelled 0 to ``count - 1``.

    They are the first of an order of all classes that depends on ``seed`` alone: the 10 classes of
    one run are among the 50 of another, under the same labels, and what was held out for
    validation stays held out.

    Raises:
      UserError: there are fewer classes, or a split has no image of those.

    >>> images = ArraySource(np.zeros((6, 8, 8, 3), np.uint8), np.arange(6) % 3)
    >>> data = Dataset("a", images, None, images, 3, ("cat", "dog", "owl"), (8, 8, 3))
    >>> small = with_classes(data, 2)
    >>> small.class_names, len(small.train), small.train[0]["label"]
    (('owl', 'dog'), 4, 1)
    """
    if count > data.num_classes:
        raise UserError(
            f"config.data.classes={count}: {data.name} has {data.num_classes} classes"
        )
    chosen = np.random.RandomState(seed).permutation(data.num_classes)[:count]
    labels = np.full(data.num_classes, -1)
    labels[chosen] = np.arange(count)

    def part(name: str):
        source = getattr(data, name)
        if source is None:
            return None
        ids = np.flatnonzero(np.isin(labels_of(source), chosen))
        if not len(ids):
            raise UserError(
                f"config.data.classes={count}: the {name} split of {data.name} has no image of "
                "these classes; give more classes, or a larger config.data.validation"
            )
        return Relabelled(Subset(source, ids), labels)

    return dataclasses.replace(
        data,
        **{name: part(name) for name in ("train", "validation", "test")},
        num_classes=count,
        class_names=tuple(data.class_names[c] for c in chosen),
    )


def with_per_class(data: Dataset, count: int, *, seed: int = SEED) -> Dataset:
    """At most ``count`` training images of each class; validation and test stay whole.

    Each class's images have an order that depends on ``seed`` and on how many there are: the 10 of
    one run are among the 50 of another.

    >>> images = ArraySource(np.zeros((6, 8, 8, 3), np.uint8), np.array([0, 0, 0, 0, 0, 1]))
    >>> data = Dataset("a", images, None, images, 2, ("cat", "dog"), (8, 8, 3))
    >>> small = with_per_class(data, 2)
    >>> [small.train[i]["label"] for i in range(len(small.train))], len(small.test)
    ([0, 0, 1], 6)
    """
    labels = labels_of(data.train)
    kept = []
    for label in np.unique(labels):
        ids = np.flatnonzero(labels == label)
        # A seed for each class: what one class has does not shift the draw of another.
        order = np.random.RandomState([seed, int(label)]).permutation(len(ids))
        kept.append(ids[order[:count]])
    return dataclasses.replace(data, train=Subset(data.train, np.sort(np.concatenate(kept))))
