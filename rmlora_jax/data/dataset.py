"""What a data source is asked for, and what it gives.

A data source is one file with a `Source` in it and one line in ``sources.SOURCES``. It finds whole
splits. ``sources.py`` then does the same for all of them: it leaves out records that cannot be
used, holds out validation examples, and keeps some classes or the first few examples.
"""

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from rmlora_jax.data.vision import resize_square
from rmlora_jax.errors import UserError
from rmlora_jax.models.processor import Resize

# The kinds of data; each is the name of the function of a `Source` that opens it.
Kind = Literal["images", "texts", "utterances"]


@dataclasses.dataclass(frozen=True)
class Request:
    """The data set that a run wants.

    Attributes:
      name: "digits"; "japanese_vowels"; "folder", image files in a folder for each class;
        "datasets", files of Hugging Face's library; or a TFDS name: "cifar100", "glue/cola",
        "beans:0.1.0". CIFAR and GLUE are fetched and prepared on first use; prepare others first
        (as array_record). With ``train_file``, any word.
      data_dir: of the data; for TFDS by default $TFDS_DATA_DIR, else ~/tensorflow_datasets.
      validation: fraction (below 1) or number of training examples to hold out; 0, which
        texts do not allow, for none. Texts and utterances keep the classes in their proportions.
      seed: chooses them. It is not the training's seed: use the same in all runs that you compare.
      train_split: the name of a split, or a slice such as "train[:80%]".
      test_splits: reported split -> split of the data; None stands for "test" where that has
        labels, else "validation". Images have one: ``{"test": split}``.
      unlabelled_splits: split to predict -> split of the data; TFDS may lack it.
      image_key, label_key: names of the features.
      columns: names of one feature with text, or two for pairs.
      regression: whether the labels of texts are numbers rather than classes.
      apart: whether equal texts stay together when a part is held out; never those of GLUE.
      classes: use the images of this many classes only, in all splits; 0 for all. Which ones is
        fixed (:func:`rmlora_jax.data.subsets.with_classes`), and so is what was held out.
      per_class: use at most this many training images of each class, after the hold-out; 0 for all.
      limit: use only this many training examples, the last of these choices; None or 0 for all.
      train_file, test_file, predict_file: texts in files .csv or .tsv with a heading, or .jsonl
        with an object a line, in UTF-8. Without ``test_file``, as many rows as for validation are
        held out once more. Labels of classes may be words or whole numbers.
      speakers: of the Japanese vowels, numbers from 1 to 9; () for all.
      clusters: 0: the labels of utterances are the speakers. Above 0: an example is an utterance
        with one frame hidden, and its label is the cluster of that frame.
      download: False never uses the network.
      base_url: of the CIFAR archives, see :func:`rmlora_jax.data.cifar.prepare_cifar`.
      bad_records: how many labelled examples, of all splits together, may be left out because they
        or their label cannot be used. Above 0 every image is decoded once to find them; with 0 the
        first one is an error. Rows to be predicted are never left out.
      resize: what becomes of images; those of which it makes no square cannot be used.
      cache, threads: folder that keeps the result of this search, and how many threads search; see
        :func:`rmlora_jax.data.subsets.usable`.
    """

    name: str
    data_dir: str | os.PathLike | None = None
    validation: float = 0.1
    seed: int = 0
    train_split: str = "train"
    test_splits: Mapping[str, str | None] | None = None
    unlabelled_splits: Mapping[str, str] | None = None
    image_key: str = "image"
    label_key: str = "label"
    columns: Sequence[str] = ()
    regression: bool = False
    apart: bool = True
    classes: int = 0
    per_class: int = 0
    limit: int | None = None
    train_file: str | os.PathLike | None = None
    test_file: str | os.PathLike | None = None
    predict_file: str | os.PathLike | None = None
    speakers: Sequence[int] = ()
    clusters: int = 0
    download: bool = True
    base_url: str | None = None
    bad_records: int = 0
    resize: Resize | None = None
    cache: str | os.PathLike | None = None
    threads: int = 8

    @property
    def test_split(self) -> str | None:
        """The reported split of images, where one is named."""
        return (self.test_splits or {}).get("test")


class Source(NamedTuple):
    """One place that data comes from.

    Attributes:
      handles: whether a request is for this source. The first in ``sources.SOURCES`` serves it.
      missing: what the request needs and is neither here nor fetched on first use, one line for
        each mistake: "config.FIELD=VALUE: what is wrong and what to type". It opens nothing. It
        raises a `UserError` about a wrong name.
      images: opens the images of a request. None: the source has no images.
      texts: opens the texts of a request. It gives the records that cannot be used to `Skipped`.
      utterances: opens the speech of a request, a `packaged.SpeechDataset`.
      known: what is known without the data, for ``--compile_only``.
      prepare: fetches the data and prepares its folder; ``python -m rmlora_jax.data.prepare``.
      takes_file: whether ``data.data_dir`` may be a file.

    Raises:
      UserError: ``images``, ``texts``, ``utterances`` and ``prepare``, with what to type.
    """

    handles: Callable[[Request], bool]
    missing: Callable[[Request], list[str]]
    images: Callable[[Request], "FoundImages"] | None = None
    texts: Callable[[Request, "Skipped"], "FoundTexts"] | None = None
    utterances: Callable[[Request], Any] | None = None
    known: Callable[[Request], "Known | None"] = lambda request: None
    prepare: Callable[[Request], Path] | None = None
    takes_file: bool = False


class Known(NamedTuple):
    """Facts about a data set that has not been opened.

    Attributes:
      classes: how many there are.
      train, test: examples of each split, before any is held out; 0 where not known.
      image_shape: (H, W, C), or None where not known.
    """

    classes: int
    train: int = 0
    test: int = 0
    image_shape: tuple[int, int, int] | None = None


def shown(names: Iterable[str]) -> str:
    """The names that a data set's files have, cut to 300 characters."""
    return ", ".join(names)[:300]


# Images


class ImageSource(Protocol):
    """Random access to labelled images.

    ``source[i]`` is ``{"image": uint8 (H, W, C), "label": int}``. ``source.load(i, size)`` is the
    pair ``(image, label)``; with a ``size`` the image is the centred square whose side is the
    shorter side, resized to (size, size, C), or what a `Resize` makes of the image.

    A source may also have ``label(i)``, the label without decoding the image; ``check(i)``, also
    with a ``size``, which raises `BadRecord` for an example that cannot be used; and
    ``identity()``, words that name the data and change when it changes, or None. Decoded images are
    cached under ``identity()``. And ``content(i)``, the bytes of an example as they are stored and
    its label, for `content.content_of`.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict:
        image, label = self.load(index)
        return {"image": image, "label": label}

    def load(self, index: int, size: int | Resize | None = None) -> tuple[np.ndarray, int]: ...


@dataclasses.dataclass(frozen=True, eq=False)
class ArraySource(ImageSource):
    """Images (N, H, W, C) uint8 and labels (N,) held in memory.

    >>> source = ArraySource(np.zeros((2, 8, 8, 3), np.uint8), np.array([3, 1]))
    >>> len(source), source[1]["image"].shape, source[1]["label"]
    (2, (8, 8, 3), 1)
    """

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, index: int, size: int | Resize | None = None) -> tuple[np.ndarray, int]:
        image = self.images[index]
        if size is not None and image.shape[:2] != (size, size):
            image = resize_square(image, size)
        return image, int(self.labels[index])


class FoundImages(NamedTuple):
    """All images of a source.

    Attributes:
      train: every training image.
      test: None where the source has no test split; a part of ``train`` is then held out.
      class_names: labels are places in it.
      image_shape: (H, W, C), or None where images differ in size.
      channels: 3, or 1 for grayscale (repeated to 3 on the device).
      place: what error messages call the data, such as its folder.
      by_class: whether each class gives its share of what is held out.
      notes: what a person should know, such as files that were ignored.
    """

    train: ImageSource
    test: ImageSource | None
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int] | None
    channels: int = 3
    place: object = "the data set"
    by_class: bool = False
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A labelled image data set, split three ways.

    Attributes:
      name: as the user typed it.
      train, validation, test: no image is in two of them. ``validation`` is None where no image was
        held out.
      num_classes: labels are 0 to ``num_classes - 1``.
      class_names, image_shape, channels, notes: see `FoundImages`.
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
    notes: tuple[str, ...] = ()


# Texts


class TextSplit(NamedTuple):
    """Texts and labels in memory.

    Attributes:
      texts: one list of n strings for each column.
      labels: int32 (n,) classes, or float32 (n,) values; -1 or nan where a row has no label.
      ids: int64 (n,), the rows' numbers in the published files.
    """

    texts: tuple[list[str], ...]
    labels: np.ndarray
    ids: np.ndarray

    def at(self, rows: Sequence[int] | np.ndarray) -> "TextSplit":
        """The given rows, in that order."""
        texts = tuple([column[i] for i in rows] for column in self.texts)
        return TextSplit(texts, self.labels[rows], self.ids[rows])

    def is_labelled(self) -> bool:
        """False for a split that is published without labels."""
        return bool(len(self.ids)) and not (np.isnan(self.labels) | (self.labels == -1)).all()


class FoundTexts(NamedTuple):
    """The texts of a source, without the records that cannot be used.

    Attributes:
      columns: names of the one or two features with text.
      label_names: of the classes; None for regression.
      train: every training text.
      tests: the splits that are reported; {}: a part of ``train`` is held out as "test".
      unlabelled: the splits that are predicted only.
      place: what error messages call the data, such as its folder.
    """

    columns: tuple[str, ...]
    label_names: tuple[str, ...] | None
    train: TextSplit
    tests: dict[str, TextSplit]
    unlabelled: dict[str, TextSplit]
    place: object = "the data set"


@dataclasses.dataclass(frozen=True)
class TextDataset:
    """Labelled texts, split for training, choosing and reporting.

    Attributes:
      name: as the user typed it.
      columns, unlabelled, label_names: see `FoundTexts`.
      train, validation: no text is in both, unless the data is GLUE's or ``Request.apart`` False.
      tests: the splits that are reported; "test" first.
      skipped: the records that were left out because they cannot be used, and why.
      notes: what a person should know, such as test texts that are training texts, too.
    """

    name: str
    columns: tuple[str, ...]
    train: TextSplit
    validation: TextSplit
    tests: dict[str, TextSplit]
    unlabelled: dict[str, TextSplit]
    label_names: tuple[str, ...] | None
    skipped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


# Records that cannot be used

SHOWN = 5  # records that an error or a note names
FIELD = "config.data.bad_records"
# What to type when a record cannot be used.
LEAVE_OUT = f"--{FIELD}=10 to leave out up to 10 such records (0, the default: none)"


class BadRecord(UserError):
    """One record cannot be used; the first line names it and says why."""


class Skipped:
    """The records that are left out of a data set, at most ``limit`` over all its splits.

    They are left out first, as if the data set had been made without them. Hold-out, limits and the
    order of examples follow from what is left, so every process that reads the same files agrees.

    >>> skipped = Skipped(1)
    >>> skipped.add(BadRecord("a.csv, line 3: 'text' is empty"))
    >>> skipped.records
    ["a.csv, line 3: 'text' is empty"]
    """

    def __init__(self, limit: int = 0):
        self.limit = limit
        self.records: list[str] = []

    def add(self, *errors: BadRecord) -> None:
        """Leaves out these records.

        Raises:
          UserError: there are now more of them than may be left out.
        """
        self.records += [str(error).partition("\n")[0] for error in errors]
        if len(self.records) <= self.limit:
            return
        if self.limit == 0:
            first = str(errors[0])
            end = "" if LEAVE_OUT in first else f"\nCorrect it, or type {LEAVE_OUT}"
            raise UserError(f"{first}{end}") from errors[0]
        raise UserError(
            f"{len(self.records)} records cannot be used, where {FIELD}={self.limit}: "
            f"{listed(self.records)}\nCorrect them, or type a larger --{FIELD}"
        ) from errors[-1]


def listed(records: list[str] | tuple[str, ...]) -> str:
    """The first few records.

    >>> listed([f"record {i}" for i in range(7)])
    'record 0; record 1; record 2; record 3; record 4; and 2 more'
    """
    more = [f"and {len(records) - SHOWN} more"] if len(records) > SHOWN else []
    return "; ".join([*records[:SHOWN], *more])
