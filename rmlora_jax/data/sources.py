"""Every data source, and what is done with the data of each of them.

To add a source: write a file with a `Source`, and name it in `SOURCES`.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from rmlora_jax.data import cifar, folder, glue, hf_datasets, packaged, text_files, tfds
from rmlora_jax.data.dataset import (
    Dataset,
    FoundImages,
    FoundTexts,
    ImageSource,
    Kind,
    Known,
    Request,
    Skipped,
    Source,
    TextDataset,
    TextSplit,
)
from rmlora_jax.data.subsets import (
    Subset,
    held_out_count,
    hold_out,
    labels_of,
    usable,
    with_classes,
    with_per_class,
    with_validation,
)
from rmlora_jax.errors import UserError

# The first source that handles a request serves it; the last one handles every name.
SOURCES = (
    text_files.SOURCE,
    packaged.DIGITS,
    packaged.VOWELS,
    folder.SOURCE,
    hf_datasets.SOURCE,
    cifar.SOURCE,
    glue.SOURCE,
    tfds.SOURCE,
)


def find_source(kind: Kind, request: Request) -> Source:
    """The source that serves a request.

    Raises:
      UserError: it has data of another kind alone.
    """
    source = next(source for source in SOURCES if source.handles(request))
    held = [other for other in get_args(Kind) if getattr(source, other) is not None]
    if kind not in held:
        raise UserError(f"{request.name!r} holds {' or '.join(held)}, not {kind}")
    return source


def missing(kind: Kind, request: Request) -> list[str]:
    """What a run would find missing, looked for before anything is opened or fetched.

    Returns:
      One line for each mistake: "config.FIELD=VALUE: what is wrong and what to type".
    """
    try:
        source = find_source(kind, request)
        given = Path(request.data_dir).expanduser() if request.data_dir else None
        if given and given.exists() and not (given.is_dir() or source.takes_file):
            return [f"config.data.data_dir={request.data_dir!r}: it is a file; give a folder"]
        return source.missing(request)
    except UserError as error:
        return [f"config.data.name={request.name!r}: {error}"]


def known(kind: Kind, request: Request) -> Known | None:
    """What is known of a data set without opening it, or None."""
    try:
        return find_source(kind, request).known(request)
    except UserError:
        return None


def open_images(request: Request) -> Dataset:
    """The images of a request; see `load_images`."""
    found: FoundImages = _found("images", request)
    skipped = Skipped(request.bad_records)

    def checked(images: ImageSource, split: str) -> ImageSource:
        desc = f"checking {request.name} {split}"
        images = usable(
            images, skipped, cache=request.cache, threads=request.threads, desc=desc
        )
        if not len(images):
            raise UserError(f"split {split!r} of {request.name} has no image that can be used")
        return images

    def held_out(images: ImageSource, seed: int) -> tuple[ImageSource, ImageSource | None]:
        labels = labels_of(images) if found.by_class else None
        amount = request.validation
        return with_validation(images, amount, seed=seed, labels=labels, of=found.place)

    train = checked(found.train, request.train_split)
    if found.test is not None:
        test = checked(found.test, (request.test_splits or {}).get("test") or "test")
    else:
        train, test = held_out(train, request.seed + 1)
        if test is None:
            raise UserError(
                f"{found.place} has no test split, and validation=0 holds none out; give a test "
                "split, or a validation above 0"
            )
    train, validation = held_out(train, request.seed)
    data = Dataset(
        request.name, train, validation, test, len(found.class_names), found.class_names,
        found.image_shape, found.channels, tuple(skipped.records), found.notes,
    )
    if request.classes:
        data = with_classes(data, request.classes)
    if request.per_class:
        data = with_per_class(data, request.per_class)
    if request.limit and request.limit < len(data.train):
        data = dataclasses.replace(data, train=Subset(data.train, range(request.limit)))
    return data


def open_texts(request: Request) -> TextDataset:
    """The texts of a request; see `load_texts`."""
    if not request.validation > 0:
        raise UserError(
            f"validation={request.validation!r}: must be above 0, to choose the best step on"
        )
    skipped = Skipped(request.bad_records)
    found: FoundTexts = _found("texts", request, skipped)

    def held_out(split: TextSplit, seed: int) -> tuple[TextSplit, TextSplit]:
        n, labels = len(split.ids), None if found.label_names is None else split.labels
        count = held_out_count(n, request.validation, found.place)
        kept, held = hold_out(n, count, seed=seed, labels=labels)
        return split.at(kept), split.at(held)

    train, tests = found.train, found.tests
    if not tests:
        train, test = held_out(train, request.seed + 1)
        tests = {"test": test}
    train, validation = held_out(train, request.seed)
    if request.limit and request.limit < len(train.ids):
        train = train.at(range(request.limit))
    return TextDataset(
        request.name, found.columns, train, validation, tests, found.unlabelled, found.label_names,
        tuple(skipped.records),
    )


def open_utterances(request: Request) -> Any:
    """The speech of a request: a `packaged.SpeechDataset`; see `packaged.load_speech`."""
    return _found("utterances", request)


def _found(kind: Kind, request: Request, *more) -> Any:
    return getattr(find_source(kind, request), kind)(request, *more)


def load_images(
    name: str,
    *,
    data_dir: str | os.PathLike | None = None,
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
    cache: str | os.PathLike | None = None,
    threads: int = 8,
) -> Dataset:
    """A labelled image data set with three fixed splits.

    Args:
      name: "digits"; "folder", image files in a folder for each class; "datasets", files of
        Hugging Face's library; or a TFDS name: "cifar100", "eurosat/rgb", "beans:0.1.0". CIFAR-10
        and CIFAR-100 are fetched and prepared on first use; prepare others first (as array_record).
      data_dir: of the data; for TFDS by default $TFDS_DATA_DIR, else ~/tensorflow_datasets.
      validation: fraction (below 1) or number of training images to hold out; 0 for none.
      seed: chooses them. It is not the training's seed: use the same in all runs that you compare.
      train_split, test_split: TFDS split names or slices such as "train[:80%]". Without
        ``test_split``: "test" where it has labels, else "validation".
      image_key, label_key: names of the features.
      classes: use the images of this many classes only, in all splits; 0 for all. Which ones is
        fixed (:func:`rmlora_jax.data.subsets.with_classes`), and so is what was held out.
      per_class: use at most this many training images of each class, after the hold-out; 0 for all.
      limit: use only this many training images, the last of these choices; None or 0 for all.
      download: False never uses the network.
      base_url: of the CIFAR archives, see :func:`rmlora_jax.data.cifar.prepare_cifar`.
      bad_records: how many examples, of all splits together, may be left out because they are
        damaged, of another shape than declared, or of no declared class. Above 0 every image is
        decoded once to find them; with 0 the first one is an error.
      cache, threads: folder in which the search's result is kept, and how many threads search; see
        :func:`rmlora_jax.data.subsets.usable`.

    Raises:
      UserError: with what is wrong: the name, the folder, the network or the features.

    >>> data = load_images("digits", validation=200)
    >>> len(data.train), len(data.validation), data.train[0]["image"].shape
    (1237, 200, (8, 8, 3))
    """
    return open_images(Request(
        name, data_dir=data_dir, validation=validation, seed=seed, train_split=train_split,
        test_splits={"test": test_split}, image_key=image_key, label_key=label_key,
        classes=classes, per_class=per_class, limit=limit, download=download, base_url=base_url,
        bad_records=bad_records, cache=cache, threads=threads,
    ))


def load_texts(
    name: str,
    *,
    columns: Sequence[str],
    label_key: str = "label",
    regression: bool = False,
    data_dir: str | os.PathLike | None = None,
    validation: float = 0.1,
    seed: int = 0,
    train_split: str = "train",
    test_splits: Mapping[str, str | None] | None = None,
    unlabelled_splits: Mapping[str, str] | None = None,
    train_file: str | os.PathLike | None = None,
    test_file: str | os.PathLike | None = None,
    predict_file: str | os.PathLike | None = None,
    limit: int | None = None,
    download: bool = True,
    bad_records: int = 0,
) -> TextDataset:
    """A data set of texts, or pairs of texts, with labels, in memory.

    Args:
      name: of TFDS: "glue/cola", "imdb_reviews:1.0.0". GLUE is fetched and prepared on first use;
        prepare others first (as array_record). "datasets": files of Hugging Face's library. With
        ``train_file``, any word.
      columns: names of one feature, or two for pairs.
      label_key: name of the label.
      regression: whether labels are numbers rather than classes.
      data_dir: of the data; for TFDS by default $TFDS_DATA_DIR, else ~/tensorflow_datasets.
      validation: fraction (below 1) or number of training texts to hold out, with the classes in
        their proportions.
      seed: chooses them; use the same in all runs that you compare.
      train_split: TFDS split name or slice such as "train[:80%]".
      test_splits: reported split -> TFDS split; None for one stands for "test" where that has
        labels, else "validation".
      unlabelled_splits: split to predict -> TFDS split; those that do not exist are left out.
      train_file, test_file, predict_file: instead of TFDS, files .csv or .tsv with a heading, or
        .jsonl with an object a line, in UTF-8. Without ``test_file``, as many rows as for
        validation are held out once more. Labels of classes may be words or whole numbers.
      limit: use only this many training texts, after the hold-out; None or 0 for all.
      download: False never uses the network.
      bad_records: how many examples with a label, of all splits together, may be left out because
        they or their label cannot be used. Rows to be predicted are never left out.

    Raises:
      UserError: with what is wrong: the name, a file and its line, the features or the network.
    """
    return open_texts(Request(
        name, columns=columns, label_key=label_key, regression=regression, data_dir=data_dir,
        validation=validation, seed=seed, train_split=train_split, test_splits=test_splits,
        unlabelled_splits=unlabelled_splits, train_file=train_file, test_file=test_file,
        predict_file=predict_file, limit=limit, download=download, bad_records=bad_records,
    ))
