"""Images and texts of Hugging Face's library ``datasets``: what ``save_to_disk`` wrote, or parquet
files.

Only files on this machine are read, and nothing in them is run: no script, no pickle, no name on
the hub. Every label is matched by its name, so that splits may number their classes in any order.
"""

import importlib.util
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rmlora_jax import extras
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
from rmlora_jax.data.folder import CHANNELS, why_unreadable
from rmlora_jax.data.splits import FileImages, check_image_key, labelled_splits, text_columns
from rmlora_jax.data.subsets import usable_texts
from rmlora_jax.data.text_files import class_key, class_names
from rmlora_jax.data.vision import open_image, pixels
from rmlora_jax.errors import UserError, first_line
from rmlora_jax.files import is_writable, near
from rmlora_jax.models.processor import Resize

NAME = "datasets"
INSTALL = extras.install("datasets")
DICT, STATE = "dataset_dict.json", "state.json"  # what save_to_disk leaves beside Arrow files
SUFFIX = ".parquet"
# The split in the name of a file, such as train-00000-of-00002.parquet.
SPLIT = re.compile(r"([A-Za-z]\w*?)([-_.]?\d+(-of-\d+)?)?")
WANTED = "a folder that save_to_disk wrote, a .parquet file, or a folder of them"

Splits = Mapping[str, Any]  # of datasets.Dataset

# Splits


def open_splits(path: Path) -> Splits:
    """Every split of a data set by its name. A set without splits is "train".

    Parquet files are converted once, to files that need no memory, in the library's own cache.

    Raises:
      UserError: the files are not there, or are damaged.
    """
    datasets: Any = importlib.import_module("datasets")
    try:
        if (path / DICT).is_file() or (path / STATE).is_file():
            found = datasets.load_from_disk(str(path.resolve()))
            return dict(found) if isinstance(found, dict) else {"train": found}
        cache = Path(datasets.config.HF_DATASETS_CACHE)
        if not is_writable(cache):
            raise UserError(
                f"parquet files are converted in {cache}, which cannot be written; name another "
                "folder: export HF_DATASETS_CACHE=FOLDER"
            )
        return {
            split: datasets.Dataset.from_parquet([_as_pattern(file) for file in files], split=split)
            for split, files in parquet_files(path).items()
        }
    except UserError:
        raise
    except Exception as error:  # of many kinds, and some with a cause that says more
        why = first_line(error.__cause__ or error)[:300]
        raise UserError(
            f"{path} cannot be read by the library datasets: {why}\n"
            "Save it again, or name another one with --config.data.data_dir"
        ) from error


def _as_pattern(file: Path) -> str:
    """The pattern that matches this file alone: the library takes patterns."""
    return re.sub(r"[*?[]", r"[\g<0>]", str(file.absolute()))


def parquet_files(path: Path) -> dict[str, list[Path]]:
    """The parquet files of each split: of a file, of ``train-*.parquet`` and so on in a folder or
    its folder ``data``, or of the folders ``train`` and so on.

    Raises:
      UserError: there are none, or they belong to several data sets.
    """
    if path.is_file():
        if path.suffix != SUFFIX:
            raise UserError(f"{path} is not {WANTED}; scripts and pickles are not read")
        return {"train": [path]}
    found = _parquet_in(path) or _parquet_in(path / "data")
    if found:
        splits = defaultdict(list)
        for file in found:
            name = SPLIT.fullmatch(file.stem)
            splits[name[1] if name else "train"].append(file)
        # One group of files whose name says nothing, such as part-0.parquet, is the training split.
        known = any(name.startswith(("train", "test", "val")) for name in splits)
        return dict(splits) if known or len(splits) > 1 else {"train": found}
    folders = {p.name: files for p in _visible(path) if (files := _parquet_in(p))}
    if "train" in folders:
        return folders
    if folders:
        raise UserError(
            f"{path} has several data sets: {shown(folders)}; name one of them, such as "
            f"--config.data.data_dir={path / min(folders)}"
        )
    raise UserError(
        f"{path} has neither {DICT} or {STATE} nor {SUFFIX} files; data_dir must be {WANTED}. "
        "Scripts and pickles are not read"
    )


def _parquet_in(folder: Path) -> list[Path]:
    return [p for p in _visible(folder) if p.suffix == SUFFIX]


def _visible(folder: Path) -> list[Path]:
    """The visible entries of a folder, sorted; [] if it is not a folder."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(p for p in found if not p.name.startswith("."))


def part_of(path: Path, splits: Splits, split: str, columns: Iterable[str] = ()) -> Any:
    """A split, or a part such as ``train[:80%]``, as a datasets.Dataset with these ``columns``.

    Raises:
      UserError: the split does not exist, is empty, or lacks a column.
    """
    import datasets

    sizes = {name: len(data) for name, data in splits.items()}
    try:
        parts = datasets.ReadInstruction.from_spec(split).to_absolute(sizes)
    except (ValueError, AssertionError) as error:
        has = f"has no split {split!r}; it has {shown(sizes)}"
        raise UserError(f"{path} {has}\nA slice is written train[:80%]") from error
    rows = [splits[part.splitname].select(range(part.from_, part.to)) for part in parts]
    data = datasets.concatenate_datasets(rows)
    if not len(data):
        raise UserError(f"{path}: split {split!r} has no rows")
    for name in columns:
        if name not in data.features:
            raise UserError(f"{path}: split {split!r} has no {name!r}; it has {_all(data)}")
    return data


# Labels


def label_words(data: Any, key: str) -> list[str | None]:
    """Each label as the name of its class; None for a row without one."""
    values, names = _values(data, key), getattr(data.features.get(key), "names", None)
    if names is None:
        words = [None if value is None else str(value).strip() for value in values]
        return [word or None for word in words]
    return [names[i] if i is not None and 0 <= i < len(names) else None for i in values]


def label_names(path: Path, data: Any, key: str) -> tuple[str, ...]:
    """The names of the classes: those that are declared, or else the values that occur.

    Raises:
      UserError: the training split has no labels of classes under ``key``.
    """
    import datasets

    feature = data.features.get(key)
    if isinstance(feature, datasets.ClassLabel):
        return tuple(feature.names)
    kind = getattr(feature, "dtype", None) if isinstance(feature, datasets.Value) else None
    if kind is None or not re.fullmatch(r"u?int\d+|bool|(large_)?string(_view)?", kind):
        others = [n for n, one in data.features.items() if isinstance(one, datasets.ClassLabel)]
        hint = f"its class labels are under {shown(others)}" if others else f"it has {_all(data)}"
        raise UserError(
            f"{path} has no labels of classes under {key!r}; {hint}\n"
            "Name them with --config.data.label_key"
        )
    words = [word for word in label_words(data, key) if word]
    if not words:
        raise UserError(f"{path}: no row of the training split has a label under {key!r}")
    return class_names(path, words, key)


def numbers_of(words: Iterable[str | None], names: Sequence[str]) -> np.ndarray:
    """Places in ``names``, int32 (n,); -1 for a label that is not there.

    >>> numbers_of(["cat", None, "dog", "cow"], ("dog", "cat")).tolist()
    [1, -1, 0, -1]
    """
    numbers = {class_key(name): number for number, name in enumerate(names)}
    found = (-1 if word is None else numbers.get(class_key(word), -1) for word in words)
    return np.array(list(found), np.int32)


def _column(data: Any, key: str) -> Any:
    """A feature as it is stored, a pyarrow.ChunkedArray."""
    return data.select_columns([key]).with_format("arrow")[:][key]


def _values(data: Any, key: str) -> list:
    return _column(data, key).to_pylist() if key in data.features else [None] * len(data)


def _all(data: Any) -> str:
    """The features, with their types."""
    return shown(f"{name} ({_kind(one)})" for name, one in data.features.items())


def _kind(feature: Any) -> str:
    return getattr(feature, "dtype", None) or type(feature).__name__


# Images


class HfImages(FileImages):
    """One split of a data set."""

    def __init__(
        self, path: str, split: str, image_key: str, label_key: str, names: tuple[str, ...],
        splits: Splits | None = None,
    ):
        self.arguments = path, split, image_key, label_key, names
        where = Path(path)
        data = part_of(where, splits or open_splits(where), split, (image_key, label_key))
        self._words = label_words(data, label_key)
        self.labels = numbers_of(self._words, names)
        self._rows = data.select_columns([image_key]).with_format("arrow")  # not decoded

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, index: int, size: int | Resize | None = None) -> tuple[np.ndarray, int]:
        label = self.label(index)
        if label < 0:
            raise self._bad(index, _why_no_class(self._words[index], self.arguments[-1]))
        try:
            return pixels(open_image(self._encoded(index)), CHANNELS, size), label
        except BadRecord:
            raise
        except Exception as error:  # pillow and pyarrow raise many kinds for damaged files
            raise self._bad(index, f"it cannot be read: {why_unreadable(error)}") from error

    def label(self, index: int) -> int:
        return int(self.labels[index])

    def content(self, index: int) -> bytes:
        return b"%d " % self.labels[index] + self._encoded(index)

    def is_labelled(self) -> bool:
        return bool((self.labels >= 0).any())

    def _encoded(self, index: int) -> bytes:
        """The bytes of an image's file. A cell is {"bytes": ..., "path": ...}, with one or
        both of them, or the bytes alone."""
        path, _, image_key, *_ = self.arguments
        value = self._rows[index][image_key][0].as_py()
        encoded = value.get("bytes") if isinstance(value, dict) else value
        if encoded is not None:
            return encoded
        file = value.get("path") if isinstance(value, dict) else None
        if not file:
            raise self._bad(index, "it is missing")
        if "://" in file:
            raise self._bad(index, f"it lies at {file[:100]}, and nothing is fetched")
        return Path(path if Path(path).is_dir() else Path(path).parent, file).read_bytes()

    def _bad(self, index: int, why: str) -> BadRecord:
        path, split, *_ = self.arguments
        return _bad(path, f"image {index} of {split!r}", why)


def _bad(path: object, record: str, why: str) -> BadRecord:
    return BadRecord(f"{path}: {record}: {why}\nCorrect it, or type {LEAVE_OUT}")


def _why_no_class(word: str | None, names: Sequence[str]) -> str:
    if word is None:
        return "it has no label"
    return f"its label is {word[:80]!r}, which the training split does not have: {shown(names)}"


def _images(request: Request) -> FoundImages:
    path, splits, train = _opened(request)
    images = [name for name, feature in train.features.items() if _holds_images(feature)]
    check_image_key(path, request.image_key, images, _all(train))
    names = label_names(path, train, request.label_key)

    def opened(split: str) -> HfImages:
        return HfImages(str(path), split, request.image_key, request.label_key, names, splits)

    found, tests = labelled_splits(request, path, splits, opened, may_lack=True)
    return FoundImages(found, tests.get("test"), names, None, CHANNELS, place=path, by_class=True)


def _holds_images(feature: Any) -> bool:
    """Whether a feature is an image, the struct of bytes and path that stores one, or bytes."""
    import datasets

    if isinstance(feature, dict):
        return "bytes" in feature
    return isinstance(feature, datasets.Image) or "binary" in str(_kind(feature))


# Texts


def _texts(request: Request, skipped: Skipped) -> FoundTexts:
    path, splits, train = _opened(request)
    kinds = {name: str(_kind(feature)) for name, feature in train.features.items()}
    label_key, names = request.label_key, None
    if not request.regression:
        names = label_names(path, train, label_key)
    elif not re.match(r"u?int|float|double|decimal", kinds.get(label_key, "")):
        raise UserError(
            f"{path} has no numbers under {label_key!r}; it has {_all(train)}\n"
            "Name them with --config.data.label_key"
        )
    texts = [name for name, kind in kinds.items() if "string" in kind and name != label_key]
    columns = text_columns(request, path, texts, f"it has {_all(train)}")

    def read(split: str) -> TextSplit:
        data = part_of(path, splits, split, columns)
        found, unread = _read_texts(data, columns, label_key, names)
        return usable_texts(
            found, names, skipped, unread, lambda i, why: _bad(path, f"text {i} of {split!r}", why)
        )

    found, tests = labelled_splits(request, path, splits, read, may_lack=True)
    wanted = request.unlabelled_splits or {}
    unlabelled = {ours: read(theirs) for ours, theirs in wanted.items()}
    return FoundTexts(columns, names, found, tests, unlabelled, place=path)


def _read_texts(
    data: Any, columns: Sequence[str], label_key: str, names: Sequence[str] | None
) -> tuple[TextSplit, dict[int, str]]:
    """A split, and why some of its rows cannot be used."""
    unread: dict[int, str] = {}
    texts = tuple(_strings(data, name, unread) for name in columns)
    if names is None:
        values = _values(data, label_key)
        labels = np.array([np.nan if value is None else value for value in values], np.float32)
    else:
        words = label_words(data, label_key)
        labels = numbers_of(words, names)
        if (labels >= 0).any():
            unread |= {int(i): _why_no_class(words[i], names) for i in np.flatnonzero(labels < 0)}
    return TextSplit(texts, labels, np.arange(len(data), dtype=np.int64)), unread


def _strings(data: Any, key: str, unread: dict[int, str]) -> list[str]:
    """A column of texts; "" where one is missing, and where it cannot be read, which it notes."""
    texts = []
    for i, cell in enumerate(_column(data, key)):
        try:
            texts.append(cell.as_py() or "")
        except UnicodeDecodeError:
            texts.append("")
            unread[i] = f"{key!r} is not UTF-8"
    return texts


# The source


def _opened(request: Request) -> tuple[Path, Splits, Any]:
    """The path, every split, and the training split of a request."""
    if mistakes := _missing(request):
        raise UserError(mistakes[0])
    path = Path(request.data_dir or "").expanduser()
    splits = open_splits(path)
    return path, splits, part_of(path, splits, request.train_split)


def _missing(request: Request) -> list[str]:
    wrong, spec = [], importlib.util.find_spec("datasets")
    if spec is None or spec.origin is None:  # a folder "datasets" beside the script has no origin
        wrong.append(f"config.data.name={NAME!r}: it needs a library that is not here: {INSTALL}")
    path = Path(request.data_dir or "").expanduser()
    if not request.data_dir:
        wrong.append(f"config.data.data_dir=None: name {WANTED}")
    elif not os.path.exists(path):
        given = f"config.data.data_dir={request.data_dir!r}"
        wrong.append(f"{given}: there is no {path}{near(path)}; nothing is fetched from a hub")
    return wrong


SOURCE = Source(
    handles=lambda request: request.name == NAME, missing=_missing, images=_images, texts=_texts,
    takes_file=True,
)
