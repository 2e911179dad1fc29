"""The images, texts and chats of prepared TFDS folders."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from rmlora_jax.data.chat import FoundChats
from rmlora_jax.data.chat_files import RowSource
from rmlora_jax.data.dataset import (
    LEAVE_OUT,
    BadRecord,
    FoundImages,
    FoundTexts,
    Request,
    Skipped,
    Source,
    TextSplit,
    shown,
)
from rmlora_jax.data.folder import why_unreadable
from rmlora_jax.data.splits import (
    FileImages,
    check_image_key,
    files_in,
    labelled_splits,
    text_columns,
)
from rmlora_jax.data.subsets import usable_texts
from rmlora_jax.data.tfds_folder import (
    Prepare,
    declared_features,
    import_tfds,
    open_builder,
    open_records,
    prepared,
    tfds_missing,
)
from rmlora_jax.data.vision import open_image, pixels
from rmlora_jax.errors import UserError, first_line, progress
from rmlora_jax.models.processor import Resize

ClassNames = tuple[str, ...] | None  # None for regression

# Images


def tfds_images(request: Request, prepare: Prepare | None = None) -> FoundImages:
    """``Source.images`` of a data set that ``prepare`` makes on first use, where it is given."""
    folder = prepared(request, prepare)
    info = open_builder(folder).info
    image_key, label_key = request.image_key, request.label_key
    shape, channels, class_names = image_features(folder, info, image_key, label_key)

    def opened(split: str) -> TfdsImages:
        return TfdsImages(
            str(folder), split, image_key, label_key, channels, shape, len(class_names)
        )

    train, tests = labelled_splits(request, folder, info.splits, opened)
    return FoundImages(train, tests["test"], class_names, shape, channels, place=folder)


class TfdsImages(FileImages):
    """One split of a prepared data set. Images must have the ``shape``, where one is declared, and
    labels be below ``num_classes``."""

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
        self.arguments = (folder, split, image_key, label_key, channels, shape, num_classes)
        # Left encoded, the image is decoded here: at a reduced size where it can be.
        decoders = {image_key: import_tfds().decode.SkipDecoding()}
        self._records = open_records(open_builder(Path(folder)), split, decoders=decoders)

    def __len__(self) -> int:
        return len(self._records)

    def load(self, index: int, size: int | Resize | None = None) -> tuple[np.ndarray, int]:
        *_, image_key, label_key, channels, shape, num_classes = self.arguments
        record = self._record(index)
        label = int(record[label_key])
        if not 0 <= label < num_classes:
            last = num_classes - 1
            raise self._bad(index, f"its label is {label}, the declared classes are 0 to {last}")
        try:
            image = open_image(record[image_key])
            width, height = image.size
            if shape is None or (height, width) == shape[:2]:
                return pixels(image, channels, size), label
        except Exception as error:  # pillow raises many kinds for a damaged file
            why = why_unreadable(error)[:300]
            raise self._bad(index, f"it cannot be decoded: {why}") from error
        declared = f"{shape[0]} x {shape[1]}"
        raise self._bad(index, f"it is {height} x {width}, where {declared} is declared")

    def label(self, index: int) -> int:
        return int(self._record(index)[self.arguments[3]])

    def content(self, index: int) -> bytes:
        *_, image_key, label_key, _, _, _ = self.arguments
        record = self._record(index)
        return b"%d " % record[label_key] + record[image_key]

    def is_labelled(self) -> bool:
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
            raise self._bad(index, f"it cannot be read: {first_line(error)[:300]}") from error
        # A file that was cut short is read as empty records.
        if any(record[key] is None for key in self.arguments[2:4]):
            raise self._bad(index, "it is empty")
        return record

    def _bad(self, index: int, why: str) -> BadRecord:
        folder, split, *_ = self.arguments
        return _damaged(f"{folder} is damaged: image {index} of {split!r}: {why}")


def _damaged(what: str) -> BadRecord:
    return BadRecord(f"{what}\nDelete that folder and prepare it again, or type {LEAVE_OUT}")


def image_features(folder: Path, info: Any, image_key: str, label_key: str):
    """(shape or None, channels, class names) from the declared features.

    Raises:
      UserError: the data set is not a classification of 8-bit images by one label.
    """
    kinds, features = import_tfds().features, declared_features(info)
    images = [k for k, f in features.items() if isinstance(f, kinds.Image)]
    labels = [k for k, f in features.items() if isinstance(f, kinds.ClassLabel)]
    check_image_key(folder, image_key, images, shown(features) or "nothing")
    if label_key not in labels or not features[label_key].num_classes:
        hint = f"its labels are under {shown(labels)}" if labels else "it has no class labels"
        raise UserError(
            f"{folder} cannot be used to train a classifier by {label_key!r}: {hint}"
        )
    image = features[image_key]
    if np.dtype(image.np_dtype) != np.uint8:
        raise UserError(f"{folder} has images of {image.np_dtype}; only uint8 can be used")
    height, width, depth = image.shape
    channels = 1 if depth == 1 else 3
    shape = None if height is None or width is None else (height, width, channels)
    return shape, channels, tuple(features[label_key].names)


# Texts


def tfds_texts(request: Request, skipped: Skipped, prepare: Prepare | None = None) -> FoundTexts:
    """``Source.texts`` of a data set that ``prepare`` makes on first use, where it is given."""
    folder = prepared(request, prepare)
    builder = open_builder(folder)
    splits, wanted = builder.info.splits, request.unlabelled_splits or {}
    columns, names = _text_features(folder, builder.info, request)

    def read(split: str) -> TextSplit:
        return _read_texts(builder, split, columns, request.label_key, names, skipped)

    train, tests = labelled_splits(request, folder, splits, read)
    unlabelled = {ours: read(theirs) for ours, theirs in wanted.items() if theirs in splits}
    return FoundTexts(columns, names, train, tests, unlabelled, place=folder)


def _text_features(
    folder: Path, info: Any, request: Request
) -> tuple[tuple[str, ...], ClassNames]:
    """The columns, and the names of the classes or None, checked against the declared features."""
    kinds, features = import_tfds().features, declared_features(info)
    texts = [k for k, f in features.items() if isinstance(f, kinds.Text)]
    has = f"its texts are under {shown(texts) or 'nothing'}"
    columns = text_columns(request, folder, texts, has)
    label = features.get(request.label_key)
    fits = label is not None and (
        np.issubdtype(np.dtype(label.np_dtype), np.number)
        if request.regression
        else isinstance(label, kinds.ClassLabel) and label.num_classes
    )
    if label is None or not fits:
        kind = "number" if request.regression else "class label"
        others = [k for k in features if k not in texts]
        raise UserError(
            f"{folder} has no {kind} under {request.label_key!r}; beside texts it has "
            f"{shown(others) or 'nothing'}\nName it with --config.data.label_key"
        )
    return columns, None if request.regression else tuple(label.names)


def _read_texts(
    builder: Any, split: str, columns: tuple[str, ...], label_key: str, names: ClassNames,
    skipped: Skipped,
) -> TextSplit:
    """A split, without the texts that cannot be used; see `usable_texts`."""
    records = open_records(builder, split)
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
        return _damaged(f"{builder.data_dir} is damaged: text {i} of {split!r}: {why}")

    return usable_texts(TextSplit(texts, labels, ids), names, skipped, unread, damaged)


# Chats


def tfds_chats(request: Request) -> FoundChats:
    """``Source.chats``: the records of a data set of texts; its columns are named by the config."""
    builder = open_builder(prepared(request))
    train = TfdsRows(builder, request.train_split)
    named = (request.test_splits or {}).items()
    tests: dict[str, Any] = {ours: TfdsRows(builder, split) for ours, split in named if split}
    return FoundChats(((train, 1.0),), None, tests, place=builder.data_dir)


class TfdsRows(RowSource):
    """The records of a split of a prepared data set, with texts as strings."""

    def __init__(self, builder: Any, split: str):
        self._records, self._split = open_records(builder, split), split
        self._folder = builder.data_dir

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            return {key: _plain(value) for key, value in self._records[index].items()}
        except IndexError:
            raise
        except Exception as error:  # array_record and protobuf each have their own kinds
            why = f"{self.where(index)}: it cannot be read: {first_line(error)}"
            raise _damaged(why) from None

    def where(self, index: int) -> str:
        return f"{self._folder}, record {index} of {self._split!r}"

    def identity(self) -> str:
        return repr((*files_in(self._folder), self._split))


def _plain(value: Any) -> Any:
    """A feature in the types of JSON. TFDS stores a list of objects as an object of lists."""
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, np.ndarray):
        return [_plain(one) for one in value.tolist()]
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, dict):
        columns = {key: _plain(one) for key, one in value.items()}
        sizes = {len(one) if isinstance(one, list) else None for one in columns.values()}
        if len(sizes) == 1 and None not in sizes:
            rows = zip(*columns.values(), strict=True)
            return [dict(zip(columns, row, strict=True)) for row in rows]
        return columns
    return value


# Any name that no other source handles is a data set of TFDS.
SOURCE = Source(
    handles=lambda request: True, missing=tfds_missing, images=tfds_images, texts=tfds_texts,
    chats=tfds_chats,
)
