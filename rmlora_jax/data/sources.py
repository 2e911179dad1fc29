"""``load_images``: any data set the trainer knows, by name."""

import dataclasses
import os
from pathlib import Path

from rmlora_jax.data.bad import Skipped
from rmlora_jax.data.checked import usable
from rmlora_jax.data.dataset import Dataset, Subset, with_validation
from rmlora_jax.data.digits import load_digits
from rmlora_jax.data.prepare.cifar import archive_of, prepare_cifar
from rmlora_jax.data.subsets import with_classes, with_per_class
from rmlora_jax.data.tfds_images import (
    Name,
    TfdsImages,
    default_data_dir,
    default_test,
    find_prepared,
    image_features,
    not_prepared,
    open_builder,
    open_split,
)
from rmlora_jax.errors import UserError


def load_images(
    name: str,
    *,
    data_dir: os.PathLike | None = None,
    validation: float = 0.1,
    seed: int = 0,
    train_split: str = "train",
    test_split: str | None = None,
    image_key: str = "image",
    label_key: str = "label",
    classes: int = 0,
    per_class: int = 0,
    limit: int | None = None,
    download: bool = True,
    base_url: str | None = None,
    bad_records: int = 0,
    cache: os.PathLike | None = None,
    threads: int = 8,
) -> Dataset:
    """A labelled image data set with three fixed splits.

    Args:
      name: "digits"; or a TFDS name: "cifar100", "eurosat/rgb", "beans:0.1.0". CIFAR-10 and
        CIFAR-100 are fetched and prepared on first use, others must lie prepared (as array_record)
        in ``data_dir``.
      data_dir: of TFDS; default $TFDS_DATA_DIR, else ~/tensorflow_datasets.
      validation: fraction (below 1) or number of training images to hold out; 0 for none.
      seed: of the choice of those. Not the training's: it should be the same in all runs that are
        compared.
      train_split, test_split: TFDS split names or slices such as "train[:80%]". Without
        ``test_split``: "test" where it has labels, else "validation".
      image_key, label_key: names of the features.
      classes: use the images of this many classes only, in all splits; 0 for all. Which ones is
        fixed (:func:`rmlora_jax.data.subsets.with_classes`), and so is what was held out.
      per_class: use at most this many training images of each class, after the hold-out; 0 for all.
      limit: use only this many training images, after all of that; None or 0 for all.
      download: False never uses the network.
      base_url: of the CIFAR archives, see :func:`rmlora_jax.data.prepare.cifar.prepare_cifar`.
      bad_records: how many examples, of all splits together, may be left out because they are
        damaged, of another shape than declared, or of no declared class. Above 0 every image is
        decoded once to find them; with 0 the first that is met is an error.
      cache, threads: where what was found is kept, and how many read; see
        :func:`rmlora_jax.data.checked.usable`.

    Raises:
      UserError: what is wrong with the name, the folder, the network or the features.

    >>> data = load_images("digits", validation=200)
    >>> len(data.train), len(data.validation), data.train[0]["image"].shape
    (1237, 200, (8, 8, 3))
    """
    if name == "digits":
        data = load_digits(validation=validation, seed=seed)
        return _smaller(data, classes, per_class, limit)
    data_dir = Path(data_dir).expanduser() if data_dir else default_data_dir()
    parsed = Name.parse(name)
    folder = find_prepared(parsed, data_dir)
    archive = archive_of(parsed)
    if folder is None and archive is not None:
        if not download:
            raise UserError(
                f"{name} is not prepared in {data_dir}: type\n"
                f"python -m rmlora_jax.data.prepare {name} --data_dir={data_dir}"
            )
        folder = prepare_cifar(archive, data_dir, base_url=base_url)
    if folder is None:
        raise not_prepared(name, parsed, data_dir)

    shape, channels, class_names = image_features(folder, image_key, label_key)

    how = (image_key, label_key, channels, shape, len(class_names))

    def split(which: str):
        return open_split(folder, which, *how)

    train = split(train_split)
    test = split(test_split) if test_split else default_test(
        folder, open_builder(folder).info, split, TfdsImages.labelled
    )
    skipped, parts = Skipped(bad_records), []
    for which, source in ((train_split, train), (test_split or "test", test)):
        if not source.labelled():
            raise UserError(f"split {which!r} of {name} has no labelled images")
        desc = f"checking {name} {which}"
        parts.append(usable(source, skipped, cache=cache, threads=threads, desc=desc))
        if not len(parts[-1]):
            raise UserError(f"split {which!r} of {name} has no image that can be used")
    train, held = with_validation(parts[0], validation, seed=seed, of=folder)
    data = Dataset(
        name, train, held, parts[1], len(class_names), class_names, shape, channels,
        tuple(skipped.records),
    )
    return _smaller(data, classes, per_class, limit)


def _smaller(data: Dataset, classes: int, per_class: int, limit: int | None) -> Dataset:
    if classes:
        data = with_classes(data, classes)
    if per_class:
        data = with_per_class(data, per_class)
    if limit and limit < len(data.train):
        data = dataclasses.replace(data, train=Subset(data.train, range(limit)))
    return data
