"""What every image source gives the trainer: random access, and three fixed splits."""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from rmlora_jax.errors import UserError


class ImageSource(Protocol):
    """Random access to labelled images.

    ``source[i]`` is ``{"image": uint8 (H, W, C), "label": int}``. ``source.load(i, size)`` is the
    pair ``(image, label)``; with a ``size`` the image is the centred square whose side is the
    shorter side, resized to (size, size, C).
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict: ...

    def load(self, index: int, size: int | None = None) -> tuple[np.ndarray, int]: ...


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A labelled image data set, split three ways.

    Attributes:
      name: as the user typed it.
      train, validation, test: :class:`ImageSource`; no image is in two of them.
        ``validation`` is None where no image was held out.
      num_classes: labels are 0 to ``num_classes - 1``.
      class_names: ``num_classes`` strings.
      image_shape: ``(H, W, C)``, or None where images differ in size.
      channels: 3, or 1 for grayscale (repeated to 3 on the device).
      skipped: the records that were left out because they cannot be used, and why.
    """

    name: str
    train: ImageSource
    validation: ImageSource | None
    test: ImageSource
    num_classes: int
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int] | None
    channels: int = 3
    skipped: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class ArraySource:
    """Images (N, H, W, C) uint8 and labels (N,) held in memory.

    >>> source = ArraySource(np.zeros((2, 8, 8, 3), np.uint8), np.array([3, 1]))
    >>> len(source), source[1]["image"].shape, source[1]["label"]
    (2, (8, 8, 3), 1)
    """

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        image, label = self.load(index)
        return {"image": image, "label": label}

    def load(self, index: int, size: int | None = None) -> tuple[np.ndarray, int]:
        image = self.images[index]
        if size is not None and image.shape[:2] != (size, size):
            from rmlora_jax.data.decode import resize_square

            image = resize_square(image, size)
        return image, int(self.labels[index])


@dataclasses.dataclass(frozen=True, eq=False)
class Subset:
    """The elements of ``source`` at ``ids``, in that order.

    >>> source = ArraySource(np.zeros((3, 8, 8, 3), np.uint8), np.array([3, 1, 4]))
    >>> Subset(source, (2, 0))[0]["label"]
    4
    """

    source: ImageSource
    ids: Sequence[int]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict:
        return self.source[int(self.ids[index])]

    def load(self, index: int, size: int | None = None) -> tuple[np.ndarray, int]:
        return self.source.load(int(self.ids[index]), size)

    def identity(self) -> str | None:
        return identity_of(self.source, self.ids)


def identity_of(source: ImageSource, chosen: Sequence[int]) -> str | None:
    """What is read of ``source`` through these numbers, in words that tell it from all else; None
    where ``source`` has no ``identity()`` or does not know."""
    own = source.identity() if hasattr(source, "identity") else None
    return own and f"{own} {hashlib.sha256(np.asarray(chosen, np.int64).tobytes()).hexdigest()}"


def held_out_count(n: int, amount: float, of: object = "the data set") -> int:
    """How many of the ``n`` examples ``of`` a data set ``amount`` stands for: a fraction below 1, a
    number from 1 on.

    >>> held_out_count(1437, 0.1), held_out_count(1437, 200)
    (144, 200)

    Raises:
      UserError: if nothing would be left to train on, or ``amount`` is no such number.
    """
    if amount < 0 or (amount >= 1 and amount != int(amount)):
        raise UserError(
            f"validation={amount!r}: must be a fraction of the training examples below 1, "
            "or a whole number of them"
        )
    if n < 2 and amount > 0:
        raise UserError(
            f"{of} has {n} training example{'s' * (n != 1)}; two are needed, one of them to "
            "choose the best step on"
        )
    count = round(n * amount) if amount < 1 else int(amount)
    if amount > 0:
        count = max(count, 1)
    if count >= n:
        raise UserError(
            f"validation={amount!r} would hold out {count} of the {n} training examples of "
            f"{of}; give a smaller one, such as 0.1"
        )
    return count


def hold_out(
    n: int, count: int, *, seed: int, labels: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Indices kept and held out, both ascending: ``count`` of ``n`` are held out at random.

    With ``labels`` (n,) each class gives its share, rounded by largest remainder so that the total
    is exact. The draw is numpy's RandomState, whose stream never changes between versions: the
    same seed holds out the same images for ever.

    >>> kept, held = hold_out(6, 2, seed=0, labels=np.array([0, 0, 0, 1, 1, 1]))
    >>> len(kept), sorted(np.array([0, 0, 0, 1, 1, 1])[held])
    (4, [np.int64(0), np.int64(1)])
    """
    order = np.random.RandomState(seed).permutation(n)
    if labels is None:
        held = order[:count]
    else:
        labels = np.asarray(labels)
        classes, sizes = np.unique(labels, return_counts=True)
        quota = _largest_remainder(sizes, count)
        shuffled = labels[order]
        held = np.concatenate(
            [order[shuffled == c][:q] for c, q in zip(classes, quota, strict=True)]
        )
    return np.setdiff1d(np.arange(n), held), np.sort(held)


def _largest_remainder(sizes: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers that sum to ``total``, in proportion to ``sizes``."""
    # Integers only: a float share could round differently on another machine.
    whole, remainder = np.divmod(sizes * total, sizes.sum())
    whole[np.argsort(-remainder, kind="stable")[: total - whole.sum()]] += 1
    return whole


def with_validation(
    train: ImageSource,
    amount: float,
    *,
    seed: int,
    labels: np.ndarray | None = None,
    of: object = "the data set",
) -> tuple[ImageSource, ImageSource | None]:
    """``train`` without the held out images, and those (None where ``amount`` is 0)."""
    count = held_out_count(len(train), amount, of)
    if count == 0:
        return train, None
    kept, held = hold_out(len(train), count, seed=seed, labels=labels)
    return Subset(train, kept), Subset(train, held)
