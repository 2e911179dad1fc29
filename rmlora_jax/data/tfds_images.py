"""Prepared TFDS image data sets as random-access sources, without TensorFlow.

Folders are found by looking (``data_dir/name[/config]/version``), not through the builders' code:
faster, works for data sets TFDS has never heard of, and never imports TensorFlow.
"""

import contextlib
import dataclasses
import difflib
import logging
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from rmlora_jax.data.bad import LEAVE_OUT, BadRecord
from rmlora_jax.data.decode import open_image, pixels
from rmlora_jax.errors import UserError, first_line

_NAME = re.compile(r"(?P<name>\w+)(/(?P<config>[\w.-]+))?(:(?P<version>[\d.*]+))?")
_VERSION = re.compile(r"\d+\.\d+\.\d+")

CHECKED_SIZE = 32  # to which `check` decodes, which is quick for JPEGs and reads all of a file


def import_tfds():
    """tensorflow_datasets, when first needed (0.3 s), without its advice to install OpenCV."""
    import tensorflow_datasets

    logging.getLogger("absl").addFilter(_is_no_advice)
    return tensorflow_datasets


def _is_no_advice(record: logging.LogRecord) -> bool:
    return "OpenCV is not installed" not in str(record.msg)


def default_data_dir() -> Path:
    """$TFDS_DATA_DIR, or ~/tensorflow_datasets as in TFDS."""
    return Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


@dataclasses.dataclass(frozen=True)
class Name:
    """``name[/config][:version]`` taken apart; the version may hold ``*``."""

    name: str
    config: str | None = None
    version: str | None = None

    @classmethod
    def parse(cls, text: str) -> "Name":
        """
        >>> Name.parse("eurosat/rgb:2.0.0")
        Name(name='eurosat', config='rgb', version='2.0.0')
        """
        match = _NAME.fullmatch(text)
        if not match:
            raise UserError(
                f"{text!r} is not the name of a data set: type name, name/config or name:1.0.0"
            )
        return cls(**match.groupdict())


def find_prepared(name: Name, data_dir: Path) -> Path | None:
    """The folder of the newest fitting version, or None.

    Raises:
      UserError: if ``name`` has several configs there and none was asked for.
    """
    root = data_dir / name.name
    if name.config:
        return _newest(root / name.config, name.version)
    if found := _newest(root, name.version):
        return found
    configs = {p.name: v for p in _folders(root) if (v := _newest(p, name.version))}
    if len(configs) > 1:
        raise UserError(
            f"{data_dir} has several configs of {name.name}: {', '.join(sorted(configs))}\n"
            f"Choose one, such as --config.data.name={name.name}/{min(configs)}"
        )
    return next(iter(configs.values()), None)


def _newest(folder: Path, wanted: str | None) -> Path | None:
    pattern = re.escape(wanted or "*").replace(r"\*", r".*")
    versions = [
        p
        for p in _folders(folder)
        if _VERSION.fullmatch(p.name)
        and re.fullmatch(pattern, p.name)
        and (p / "features.json").exists()
    ]
    return max(versions, key=lambda p: tuple(map(int, p.name.split("."))), default=None)


def _folders(path: Path) -> list[Path]:
    return sorted(p for p in path.iterdir() if p.is_dir()) if path.is_dir() else []


def not_prepared(text: str, name: Name, data_dir: Path) -> UserError:
    """What to say, and to type, where :func:`find_prepared` found nothing."""
    tfds = import_tfds()

    here = sorted(p.name for p in _folders(data_dir / name.name))
    if here:
        return UserError(
            f"{text} is not prepared in {data_dir}, which has of {name.name}: {', '.join(here)}\n"
            "Ask for one of those with --config.data.name, or for another folder with "
            "--config.data.data_dir"
        )
    known = set(tfds.list_builders(with_community_datasets=False))
    if name.name in known:
        return UserError(
            f"{text} is not prepared in {data_dir}; preparing it needs TensorFlow, once: type\n"
            f"pip install 'rmlora-jax[prepare]' && "
            f"python -m rmlora_jax.data.prepare {text} --data_dir={data_dir}"
        )
    choices = known | {"digits"} | {p.name for p in _folders(data_dir)}
    near = difflib.get_close_matches(name.name, choices, 3)
    hint = f"did you mean {' or '.join(near)}?" if near else "see tensorflow.org/datasets/catalog"
    return UserError(
        f"no data set {name.name!r} is known, nor in {data_dir}: {hint}\n"
        "A data set of your own is found there by its folder name; "
        "--config.data.data_dir names another folder"
    )


class TfdsImages:
    """One split of a prepared data set; :class:`rmlora_jax.data.dataset.ImageSource`.

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

    def __getitem__(self, index: int) -> dict:
        image, label = self.load(index)
        return {"image": image, "label": label}

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
            raise self._bad(index, f"it cannot be decoded: {_reason(error)}") from error
        declared = " x ".join(map(str, self._shape[:2]))
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
            raise self._bad(index, f"it cannot be read: {_reason(error)}") from error
        # A file that was cut short is read as empty records.
        if record[self._image_key] is None or record[self._label_key] is None:
            raise self._bad(index, "it is empty")
        return record

    def _bad(self, index: int, why: str) -> BadRecord:
        folder, split, *_ = self._arguments
        return BadRecord(
            f"{folder} is damaged: image {index} of {split!r}: {why}\n"
            f"Delete that folder and prepare it again, or type {LEAVE_OUT}"
        )


def _reason(error: Exception) -> str:
    return first_line(error)[:300]


def shown(names: Iterable[str]) -> str:
    """Names out of a data set's files, which may be of any number and length."""
    return ", ".join(names)[:300]


def default_test(folder: Path, info, opened: Callable[[str], Any], labelled: Callable[[Any], bool]):
    """The test split as ``opened`` gives it. Some data sets publish it without labels, as -1;
    "validation" then stands in.

    Raises:
      UserError: neither has labels.
    """
    for which in ("test", "validation"):
        if which in info.splits and labelled(split := opened(which)):
            return split
    raise UserError(
        f"{folder} has no labelled test or validation split, only "
        f"{shown(sorted(info.splits))}\nName parts of one, such as "
        "--config.data.train_split='train[:80%]' --config.data.test_split='train[80%:]'"
    )


def open_builder(folder: Path):
    """TFDS's read-only builder of a prepared folder."""
    tfds = import_tfds()

    try:
        return tfds.builder_from_directory(str(folder))
    except Exception as error:  # TFDS raises many kinds on a damaged or foreign folder
        first = _reason(error)
        raise UserError(
            f"{folder} cannot be read as a TFDS data set: {type(error).__name__}: {first}\n"
            "Delete it and prepare it again, or name another folder with --config.data.data_dir"
        ) from error


def open_split(folder: Path, split: str, *how):
    """:class:`TfdsImages`, or a UserError that says what is wrong with the split or its files."""
    with open_errors(folder, open_builder(folder).info, split):
        return TfdsImages(str(folder), split, *how)


def check_length(folder: Path, split: str, records) -> None:
    """Raises a UserError where a split is said to have more examples than its files have bytes."""
    size = sum(path.stat().st_size for path in folder.iterdir())
    if len(records) > size:
        raise UserError(
            f"{folder} is damaged: split {split!r} is said to have {len(records)} examples, in "
            f"{size} bytes\nDelete that folder and prepare it again"
        )


@contextlib.contextmanager
def open_errors(folder: Path, info, split: str):
    """UserErrors for what TFDS raises where a split is opened."""
    try:
        yield
    except UserError:
        raise
    except NotImplementedError as error:
        name = info.full_name[:200]
        kind = info.file_format
        raise UserError(
            f"{folder} is stored as {kind.value if kind else 'an unknown format'}, which cannot be "
            "read at random; prepare it again in another folder: type\n"
            f"python -m rmlora_jax.data.prepare {name.replace('/' + str(info.version), '')} "
            "--data_dir=OTHER, then use --config.data.data_dir=OTHER"
        ) from error
    except Exception as error:  # of many kinds, where the folder is damaged
        if isinstance(error, ValueError) and split not in info.splits:
            known = shown(sorted(info.splits))
            raise UserError(f"{folder} has no split {split!r}; it has {known}") from error
        raise UserError(
            f"{folder} is damaged: split {split!r} cannot be opened: {_reason(error)}\n"
            "Delete that folder and prepare it again"
        ) from error


def declared_features(info) -> dict:
    """The features at the top of a data set, by name: they come out of a protobuf map unordered."""
    if not isinstance(info.features, import_tfds().features.FeaturesDict):
        return {}
    return dict(sorted(info.features.items()))


def image_features(folder: Path, image_key: str, label_key: str):
    """(shape or None, channels, class names) from the declared features.

    Raises:
      UserError: if this is no single-label classification of 8-bit images.
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
