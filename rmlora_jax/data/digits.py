"""Handwritten digits that scikit-learn ships: no network, no preparation."""

import numpy as np

from rmlora_jax.data.dataset import ArraySource, Dataset, hold_out, with_validation

TEST_IMAGES = 360
_TEST_SEED = 0


def load_digits(*, validation: float = 0.1, seed: int = 0) -> Dataset:
    """The 1,797 images of 8x8 pixels of ``sklearn.datasets.load_digits``.

    Gray levels 0..16 become uint8 0..255, repeated to three channels. The test split is always the
    same 360 images; both it and the validation split have every digit in its share.

    Source: Alpaydin & Kaynak 1998, "Optical Recognition of Handwritten Digits", UCI.

    >>> data = load_digits()
    >>> len(data.train), len(data.validation), len(data.test), data.image_shape
    (1293, 144, 360, (8, 8, 3))
    """
    from sklearn import datasets

    raw = datasets.load_digits()
    images = np.rint(raw.images * (255 / 16)).astype(np.uint8)
    images = np.repeat(images[..., None], 3, axis=-1)
    labels = raw.target.astype(np.int32)
    rest, test = hold_out(len(labels), TEST_IMAGES, seed=_TEST_SEED, labels=labels)
    train, held = with_validation(
        ArraySource(images[rest], labels[rest]), validation, seed=seed, labels=labels[rest]
    )
    return Dataset(
        name="digits",
        train=train,
        validation=held,
        test=ArraySource(images[test], labels[test]),
        num_classes=10,
        class_names=tuple(str(i) for i in range(10)),
        image_shape=(8, 8, 3),
    )
