"""The images and texts of prepared TFDS folders."""

import math
from pathlib import Path

import numpy as np

from rmlora_jax.data.dataset import (
    CHECKED_SIZE,
    LEAVE_OUT,
    BadRecord,
    FoundImages,
    FoundTexts,
    ImageSource,
    Request,
    Skipped,
    Source,
    TextSplit,
    default_test,
    shown,
)
from rmlora_jax.data.subsets import usable_texts
from rmlora_jax.data.tfds_folder import (
    Prepare,
    check_length,
    declared_features,
    import_tfds,
    open_builder,
    open_errors,
    prepared,
    reason,
    tfds_missing,
)
from rmlora_jax.data.vision import open_image, pixels
from rmlora_jax.errors import UserError, first_line, progress

ClassNames = tuple[str, ...] | None  # None for regression

# Images


def tfds_images(request: Request, prepare: Prepare | None = None) -> FoundImages:
    """``Source.images`` of a data set that ``prepare`` makes on first use, where it is given."""
    folder = prepared(request, prepare)
    shape, channels, class_names = image_features(folder, request.image_key, request.label_key)
    features = (request.image_key, request.label_key, channels, shape, len(class_names))
    info = open_builder(folder).info

    def opened(split: str) -> TfdsImages:
        with open_errors(folder, info, split):
            return TfdsImages(str(folder), split, *features)

    def labelled(split: str) -> TfdsImages:
        images = opened(split)
        if not images.labelled():
            raise UserError(f"split {split!r} of {request.name} has no labelled images")
        return images

    asked = (request.test_splits or {}).get("test")
    train = labelled(request.train_split)
    test = labelled(asked) if asked else default_test(
        folder, info.splits, opened, TfdsImages.labelled
    )
    return FoundImages(train, test, class_names, shape, channels, place=folder)


class TfdsImages(ImageSource):
    """One split of a prepared data set; an `ImageSource`.

    It pickles as its arguments, so that worker processes open the files themselves. Images must
    have the ``shape``, where one is declared, and labels be below ``num_classes``.
    """

    def __init__(
        self,
        folder: str,
        split: str,
        image_key: str,
        label_key: str,
        channels: int,
        shape: tuple[int, ...] | None,
        num_classes: int,
    ):
        tfds = import_tfds()

        self._arguments = (folder, split, image_key, label_key, channels, shape, num_classes)
        builder = open_builder(Path(folder))
        # Left encoded, the image is decoded here: at a reduced size where it can be.
        decoders = {image_key: tfds.decode.SkipDecoding()}
        self._records = builder.as_data_source(split=split, decoders=decoders)
        check_length(Path(folder), split, self._records)
        self._image_key, self._label_key, self._channels = image_key, label_key, channels
        self._shape, self._num_classes = shape, num_classes

    def __reduce__(self):
        return type(self), self._arguments

    def __len__(self) -> int:
        return len(self._records)

    def identity(self) -> str:
        """What is read: the files with their sizes and times, the split, the features."""
        folder, *rest = self._arguments
        files = [(p.name, p.stat()) for p in sorted(Path(folder).resolve().iterdir())]
        found = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in files]
        return repr((str(Path(folder).resolve()), *rest, found))

    def load(self, index: int, size: int | None = None) -> tuple[np.ndarray, int]:
        record = self._record(index)
        label = int(record[self._label_key])
        if not 0 <= label < self._num_classes:
            last = self._num_classes - 1
            raise self._bad(index, f"its label is {label}, the declared classes are 0 to {last}")
        try:
            image = open_image(record[self._image_key])
            width, height = image.size
            if self._shape is None or (height, width) == self._shape[:2]:
                return pixels(image, self._channels, size), label
        except Exception as error:  # pillow raises many kinds for a damaged file
            raise self._bad(index, f"it cannot be decoded: {reason(error)}") from error
        declared = f"{self._shape[0]} x {self._shape[1]}"
        raise self._bad(index, f"it is {height} x {width}, where {declared} is declared")

    def check(self, index: int) -> None:
        """Raises a `BadRecord` for an example that cannot be used."""
        self.load(index, size=CHECKED_SIZE)

    def label(self, index: int) -> int:
        return int(self._record(index)[self._label_key])

    def labelled(self) -> bool:
        """Whether the split has labels; some data sets publish one without, as -1."""
        errors = []
        for index in range(min(len(self), 16)):
            try:
                if self.label(index) >= 0:
                    return True
            except BadRecord as error:
                errors.append(error)
        if errors:
            raise errors[0]
        return False

    def _record(self, index: int) -> dict:
        try:
            record = self._records[index]
        except IndexError:
            raise
        except Exception as error:  # array_record and protobuf each have their own kinds
            raise self._bad(index, f"it cannot be read: {reason(error)}") from error
        # A file that was cut short is read as empty records.
        if record[self._image_key] is None or record[self._label_key] is None:
            raise self._bad(index, "it is empty")
        return record

    def _bad(self, index: int, why: str) -> BadRecord:
        folder, split, *_ = self._arguments
        return _damaged(f"{folder} is damaged: image {index} of {split!r}: {why}")


def _damaged(what: str) -> BadRecord:
    return BadRecord(f"{what}\nDelete that folder and prepare it again, or type {LEAVE_OUT}")


def image_features(folder: Path, image_key: str, label_key: str):
    """(shape or None, channels, class names) from the declared features.

    Raises:
      UserError: the data set is not a classification of 8-bit images by one label.
    """
    tfds = import_tfds()

    info = open_builder(folder).info
    features = declared_features(info)
    images = [k for k, f in features.items() if isinstance(f, tfds.features.Image)]
    labels = [k for k, f in features.items() if isinstance(f, tfds.features.ClassLabel)]
    if image_key not in images:
        hint = f"; its images are under {shown(images)}" if images else ""
        raise UserError(f"{folder} has no image under {image_key!r}{hint}")
    if label_key not in labels or not features[label_key].num_classes:
        hint = f"its labels are under {shown(labels)}" if labels else "it has no class labels"
        raise UserError(
            f"{folder} cannot be used to train a classifier by {label_key!r}: {hint}"
        )
    image = features[image_key]
    shape = tuple(image.shape)
    channels = 1 if shape[-1] == 1 else 3
    if np.dtype(image.np_dtype) != np.uint8:
        raise UserError(f"{folder} has images of {image.np_dtype}; only uint8 can be used")
    whole = (*shape[:2], channels) if None not in shape[:2] else None
    return whole, channels, tuple(features[label_key].names)


# Texts


def tfds_texts(request: Request, skipped: Skipped, prepare: Prepare | None = None) -> FoundTexts:
    """``Source.texts`` of a data set that ``prepare`` makes on first use, where it is given."""
    folder = prepared(request, prepare)
    columns, names = _text_features(folder, request)
    info = open_builder(folder).info

    def read(split: str) -> TextSplit:
        return _read_texts(folder, split, columns, request.label_key, names, skipped)

    def labelled(name: str) -> TextSplit:
        split = read(name)
        if not split.is_labelled():
            raise UserError(f"split {name!r} of {request.name} has no labelled texts")
        return split

    train = labelled(request.train_split)
    tests = {
        ours: labelled(theirs)
        if theirs
        else default_test(folder, info.splits, read, TextSplit.is_labelled)
        for ours, theirs in (request.test_splits or {"test": None}).items()
    }
    wanted = request.unlabelled_splits or {}
    unlabelled = {ours: read(theirs) for ours, theirs in wanted.items() if theirs in info.splits}
    return FoundTexts(columns, names, train, tests, unlabelled, place=folder)


def _text_features(folder: Path, request: Request) -> tuple[tuple[str, ...], ClassNames]:
    """The columns, and the names of the classes or None, checked against the declared features."""
    tfds = import_tfds()
    columns, label_key = request.columns, request.label_key
    info = open_builder(folder).info
    features = declared_features(info)
    texts = [k for k, f in features.items() if isinstance(f, tfds.features.Text)]
    if not columns and len(texts) == 1:
        columns = tuple(texts)
    if not columns or not set(columns) <= set(texts):
        raise UserError(
            f"{folder} has no text under {', '.join(map(repr, columns)) or 'no name'}; its "
            f"texts are under {shown(texts) or 'nothing'}\nName one or two: "
            f"--config.text.columns=\"('{texts[0][:80] if texts else 'text'}',)\""
        )
    label = features.get(label_key)
    if request.regression:
        fits = label is not None and np.issubdtype(np.dtype(label.np_dtype), np.number)
        kind = "number"
    else:
        fits = isinstance(label, tfds.features.ClassLabel) and label.num_classes
        kind = "class label"
    if label is None or not fits:
        others = [k for k in features if k not in texts]
        raise UserError(
            f"{folder} has no {kind} under {label_key!r}; beside texts it has "
            f"{shown(others) or 'nothing'}\nName it with --config.data.label_key"
        )
    return tuple(columns), None if request.regression else tuple(label.names)


def _read_texts(
    folder: Path, split: str, columns: tuple[str, ...], label_key: str, names: ClassNames,
    skipped: Skipped,
) -> TextSplit:
    """A split, without the texts that cannot be used; see `usable_texts`."""
    builder = open_builder(folder)
    with open_errors(folder, builder.info, split):
        records = builder.as_data_source(split=split)
        check_length(folder, split, records)
    n = len(records)
    texts = tuple([""] * n for _ in columns)
    labels = np.full(n, *((math.nan, np.float32) if names is None else (-1, np.int32)))
    ids = np.arange(n, dtype=np.int64)
    unread = {}
    with progress(n, f"reading {split}", " texts", disable=n < 50_000) as bar:
        for i in range(n):
            try:
                record = records[i]
                for column, name in zip(texts, columns, strict=True):
                    column[i] = record[name].decode("utf-8")
                labels[i] = record[label_key]
                ids[i] = record.get("idx", i)
            except Exception as error:  # array_record and protobuf each have their own kinds
                unread[i] = f"it cannot be read: {first_line(error)}"
                if len(unread) > skipped.limit:
                    break
            bar.update()

    def damaged(i: int, why: str) -> BadRecord:
        return _damaged(f"{folder} is damaged: text {i} of {split!r}: {why}")

    return usable_texts(TextSplit(texts, labels, ids), names, skipped, unread, damaged)


# Any name that no other source handles is a data set of TFDS.
SOURCE = Source(
    handles=lambda request: True, missing=tfds_missing, images=tfds_images, texts=tfds_texts
)
