"""Images and texts of Hugging Face's library ``datasets``: what ``save_to_disk`` wrote, or parquet
files.

Only files on this machine are read, and nothing in them is run: no script, no pickle, no name on
the hub. Every label is matched by its name, so that splits may number their classes in any order.
"""

import contextlib
import importlib.util
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

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
from rmlora_jax.data.folder import CHANNELS, why_unreadable
from rmlora_jax.data.subsets import usable_texts
from rmlora_jax.data.text_files import class_names
from rmlora_jax.data.vision import open_image, pixels
from rmlora_jax.errors import UserError, first_line
from rmlora_jax.files import is_writable, near

NAME = "datasets"
INSTALL = "pip install 'rmlora-jax[datasets]'"
DICT, STATE = "dataset_dict.json", "state.json"  # what save_to_disk leaves beside Arrow files
SUFFIX = ".parquet"
# The split in the name of a file, such as train-00000-of-00002.parquet.
SPLIT = re.compile(r"([A-Za-z]\w*?)([-_.]?\d+(-of-\d+)?)?")
WANTED = "a folder that save_to_disk wrote, a .parquet file, or a folder of them"

Splits = Mapping[str, Any]  # of datasets.Dataset


def import_datasets() -> Any:
    """The library, when it is first needed: importing it takes more than a second.

    Raises:
      UserError: it is not installed, with what to type.
    """
    if not _is_installed():
        raise UserError(f"data.name={NAME!r} needs a library that is not here: {INSTALL}")
    import datasets

    return datasets


def _is_installed() -> bool:
    spec = importlib.util.find_spec("datasets")
    return spec is not None and spec.origin is not None  # some folder "datasets" has no origin


# Splits


def open_splits(path: Path) -> Splits:
    """Every split of a data set by its name. A set without splits is "train".

    Parquet files are converted once, to files that need no memory, in the library's own cache.

    Raises:
      UserError: the files are not there, or are damaged.
    """
    datasets = import_datasets()
    with _errors(path):
        if (path / DICT).is_file():
            return dict(datasets.load_from_disk(str(path.resolve())))
        if (path / STATE).is_file():
            return {"train": datasets.load_from_disk(str(path.resolve()))}
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


@contextlib.contextmanager
def _errors(path: Path) -> Iterator[None]:
    try:
        yield
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
    folders = {p.name: files for p in _folders(path) if (files := _parquet_in(p))}
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
    files = folder.iterdir() if folder.is_dir() else ()
    return sorted(p for p in files if p.suffix == SUFFIX and not p.name.startswith("."))


def _folders(path: Path) -> list[Path]:
    folders = path.iterdir() if path.is_dir() else ()
    return sorted(p for p in folders if p.is_dir() and not p.name.startswith("."))


def part_of(path: Path, splits: Splits, split: str) -> Any:
    """A split, or a part such as ``train[:80%]``, as a datasets.Dataset.

    Raises:
      UserError: there is no such split, or it is empty.
    """
    datasets = import_datasets()
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
    return data


# Labels


def label_words(data: Any, key: str) -> list[str | None]:
    """Each label as the name of its class; None for a row without one."""
    values = _column(data, key)
    names = getattr(data.features[key], "names", None)
    if names is None:
        words = [None if value is None else str(value).strip() for value in values]
        return [word or None for word in words]
    return [names[i] if i is not None and 0 <= i < len(names) else None for i in values]


def label_names(path: Path, data: Any, key: str) -> tuple[str, ...]:
    """The names of the classes: those that are declared, or else the values that occur.

    Raises:
      UserError: the training split has no labels of classes under ``key``.
    """
    datasets, features = import_datasets(), data.features
    feature = features.get(key)
    if isinstance(feature, datasets.ClassLabel):
        return tuple(feature.names)
    kind = getattr(feature, "dtype", None) if isinstance(feature, datasets.Value) else None
    if kind is None or not re.fullmatch(r"u?int\d+|bool|(large_)?string(_view)?", kind):
        others = [name for name, one in features.items() if isinstance(one, datasets.ClassLabel)]
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
    numbers = {name: number for number, name in enumerate(names)}
    return np.array([-1 if word is None else numbers.get(word, -1) for word in words], np.int32)


def _column(data: Any, key: str) -> list:
    return data.select_columns([key]).with_format("arrow")[:][key].to_pylist()


def _all(data: Any) -> str:
    """The features, with their types."""
    return shown(f"{name} ({_kind(one)})" for name, one in data.features.items())


def _kind(feature: Any) -> str:
    return getattr(feature, "dtype", None) or type(feature).__name__


# Images


class HfImages(ImageSource):
    """One split; an `ImageSource`. It pickles as its arguments, so that worker processes open the
    files themselves.
    """

    def __init__(
        self, path: str, split: str, image_key: str, label_key: str, names: tuple[str, ...],
        splits: Splits | None = None,
    ):
        self._arguments = path, split, image_key, label_key, names
        where = Path(path)
        data = part_of(where, splits or open_splits(where), split)
        for key, hint in ((image_key, "image_key"), (label_key, "label_key")):
            if key not in data.features:
                raise UserError(
                    f"{path}: split {split!r} has no {key!r}; it has {_all(data)}\n"
                    f"Name it with --config.data.{hint}"
                )
        self._words = label_words(data, label_key)
        self.labels = numbers_of(self._words, names)
        self._rows = data.select_columns([image_key]).with_format("arrow")  # not decoded

    def __reduce__(self):
        return type(self), self._arguments

    def __len__(self) -> int:
        return len(self.labels)

    def identity(self) -> str:
        """What is read: the files with their sizes and times, the split, the features."""
        path, *rest = self._arguments
        root = Path(path).resolve()
        files = sorted(p for p in (root.rglob("*") if root.is_dir() else [root]) if p.is_file())
        found = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
        return repr((rest, found))

    def load(self, index: int, size: int | None = None) -> tuple[np.ndarray, int]:
        label = self.label(index)
        if label < 0:
            raise self._bad(index, _why_no_class(self._words[index], self._arguments[-1]))
        try:
            return pixels(open_image(self._encoded(index)), CHANNELS, size), label
        except BadRecord:
            raise
        except Exception as error:  # pillow and pyarrow raise many kinds for damaged files
            raise self._bad(index, f"it cannot be read: {why_unreadable(error)}") from error

    def label(self, index: int) -> int:
        return int(self.labels[index])

    def check(self, index: int) -> None:
        """Raises a `BadRecord` for an example that cannot be used."""
        self.load(index, CHECKED_SIZE)

    def labelled(self) -> bool:
        return bool((self.labels >= 0).any())

    def _encoded(self, index: int) -> bytes:
        """The bytes of an image's file: {"bytes": ..., "path": ...}, of which one may be missing,
        or the bytes alone."""
        path, _, image_key, *_ = self._arguments
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
        path, split, *_ = self._arguments
        return BadRecord(
            f"{path}: image {index} of {split!r}: {why}\nCorrect it, or type {LEAVE_OUT}"
        )


def _why_no_class(word: str | None, names: Sequence[str]) -> str:
    if word is None:
        return "it has no label"
    return f"its label is {word[:80]!r}, which is no class of the training split: {shown(names)}"


def _images(request: Request) -> FoundImages:
    path = _path(request)
    splits = open_splits(path)
    train = part_of(path, splits, request.train_split)
    _check_images(path, train, request.image_key)
    names = label_names(path, train, request.label_key)

    def opened(split: str) -> HfImages:
        features = (request.image_key, request.label_key, names)
        return HfImages(str(path), split, *features, splits=splits)

    def labelled(split: str) -> HfImages:
        images = opened(split)
        if not images.labelled():
            raise UserError(f"{path}: split {split!r} has no labelled images")
        return images

    asked = (request.test_splits or {}).get("test")
    if asked:
        test = labelled(asked)
    elif {"test", "validation"} & set(splits):
        test = default_test(path, splits, opened, HfImages.labelled)
    else:
        test = None
    return FoundImages(
        labelled(request.train_split), test, names, None, CHANNELS, place=path, by_class=True
    )


def _check_images(path: Path, data: Any, key: str) -> None:
    """Raises a UserError where ``key`` names no images."""
    features = data.features
    if key in features and _holds_images(features[key]):
        return
    images = [name for name, feature in features.items() if _holds_images(feature)]
    hint = f"its images are under {shown(images)}" if images else f"it has {_all(data)}"
    raise UserError(
        f"{path} has no image under {key!r}; {hint}\nName it with --config.data.image_key"
    )


def _holds_images(feature: Any) -> bool:
    """Whether a feature is an image, the struct of bytes and path that stores one, or bytes."""
    if isinstance(feature, dict):
        return "bytes" in feature
    return isinstance(feature, import_datasets().Image) or "binary" in str(_kind(feature))


# Texts


def _texts(request: Request, skipped: Skipped) -> FoundTexts:
    path = _path(request)
    splits = open_splits(path)
    train = part_of(path, splits, request.train_split)
    columns = _text_columns(path, train, request)
    if request.regression:
        _check_values(path, train, request.label_key)
        names = None
    else:
        names = label_names(path, train, request.label_key)

    def read(split: str) -> TextSplit:
        data = part_of(path, splits, split)
        return _read_texts(path, split, data, columns, request.label_key, names, skipped)

    def labelled(split: str) -> TextSplit:
        texts = read(split)
        if not texts.is_labelled():
            raise UserError(f"{path}: split {split!r} has no labelled texts")
        return texts

    tests = {}
    for ours, theirs in (request.test_splits or {"test": None}).items():
        if theirs:
            tests[ours] = labelled(theirs)
        elif {"test", "validation"} & set(splits):
            tests[ours] = default_test(path, splits, read, TextSplit.is_labelled)
    wanted = request.unlabelled_splits or {}
    unlabelled = {ours: read(theirs) for ours, theirs in wanted.items()}
    return FoundTexts(columns, names, labelled(request.train_split), tests, unlabelled, place=path)


def _text_columns(path: Path, data: Any, request: Request) -> tuple[str, ...]:
    texts = [name for name, feature in data.features.items() if "string" in str(_kind(feature))]
    columns = tuple(request.columns)
    others = [name for name in texts if name != request.label_key]
    if not columns and len(others) == 1:
        columns = tuple(others)
    if columns and set(columns) <= set(texts):
        return columns
    raise UserError(
        f"{path} has no text under {', '.join(map(repr, columns)) or 'no name'}; it has "
        f"{_all(data)}\nName one or two: "
        f"--config.text.columns=\"('{others[0][:80] if others else 'text'}',)\""
    )


def _check_values(path: Path, data: Any, key: str) -> None:
    """Raises a UserError where ``key`` names no numbers."""
    kind = str(_kind(data.features[key])) if key in data.features else ""
    if not re.match(r"u?int|float|double|decimal", kind):
        raise UserError(
            f"{path} has no numbers under {key!r}; it has {_all(data)}\n"
            "Name them with --config.data.label_key"
        )


def _read_texts(
    path: Path, split: str, data: Any, columns: Sequence[str], label_key: str,
    names: Sequence[str] | None, skipped: Skipped,
) -> TextSplit:
    """A split, without the texts that cannot be used; see `usable_texts`."""
    for name in columns:
        if name not in data.features:
            raise UserError(f"{path}: split {split!r} has no {name!r}; it has {_all(data)}")
    unread: dict[int, str] = {}
    texts = tuple(_strings(data, name, unread) for name in columns)
    has_labels = label_key in data.features
    if names is None:
        values = _column(data, label_key) if has_labels else [None] * len(data)
        labels = np.array([np.nan if value is None else value for value in values], np.float32)
    else:
        words = label_words(data, label_key) if has_labels else [None] * len(data)
        labels = numbers_of(words, names)
        if (labels >= 0).any():
            unread |= {int(i): _why_no_class(words[i], names) for i in np.flatnonzero(labels < 0)}

    def bad(i: int, why: str) -> BadRecord:
        where = f"{path}: text {i} of {split!r}"
        return BadRecord(f"{where}: {why}\nCorrect it, or type {LEAVE_OUT}")

    found = TextSplit(texts, labels, np.arange(len(data), dtype=np.int64))
    return usable_texts(found, names, skipped, unread, bad)


def _strings(data: Any, key: str, unread: dict[int, str]) -> list[str]:
    """A column of texts; "" where one is missing, and where it cannot be read, which it notes."""
    texts = []
    for i, cell in enumerate(data.select_columns([key]).with_format("arrow")[:][key]):
        try:
            texts.append(cell.as_py() or "")
        except UnicodeDecodeError:
            texts.append("")
            unread[i] = f"{key!r} is not UTF-8"
    return texts


# The source


def _path(request: Request) -> Path:
    if mistakes := _missing(request):
        raise UserError(mistakes[0])
    return Path(request.data_dir or "").expanduser()


def _missing(request: Request) -> list[str]:
    wrong = []
    if not _is_installed():
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
