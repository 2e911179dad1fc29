"""``load_texts``: labelled texts, or pairs of texts, of TFDS or of files of one's own."""

import csv
import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rmlora_jax.data.dataset import held_out_count, hold_out
from rmlora_jax.data.glue_prepare import is_glue, prepare_glue
from rmlora_jax.data.progress import progress
from rmlora_jax.data.tfds_images import (
    Name,
    declared_features,
    default_data_dir,
    find_prepared,
    import_tfds,
    not_prepared,
    open_builder,
)
from rmlora_jax.errors import UserError


class TextSplit(NamedTuple):
    """Texts and labels in memory.

    Attributes:
      texts: one list of n strings for each column.
      labels: int32 (n,) classes, or float32 (n,) values; -1 or nan where there is none.
      ids: int64 (n,), the rows' numbers in the published files.
    """

    texts: tuple[list[str], ...]
    labels: np.ndarray
    ids: np.ndarray

    def at(self, rows: Sequence[int]) -> "TextSplit":
        """The given rows, in that order."""
        texts = tuple([column[i] for i in rows] for column in self.texts)
        return TextSplit(texts, self.labels[rows], self.ids[rows])


@dataclasses.dataclass(frozen=True)
class TextDataset:
    """Labelled texts, split for training, choosing and reporting.

    Attributes:
      name: as the user typed it.
      columns: names of the one or two features with text.
      train, validation: no text is in both.
      tests: the splits that are reported; "test" first.
      unlabelled: the splits that are predicted only.
      label_names: of the classes; None for regression.
    """

    name: str
    columns: tuple[str, ...]
    train: TextSplit
    validation: TextSplit
    tests: dict[str, TextSplit]
    unlabelled: dict[str, TextSplit]
    label_names: tuple[str, ...] | None


def load_texts(
    name: str,
    *,
    columns: Sequence[str],
    label_key: str = "label",
    regression: bool = False,
    data_dir: os.PathLike | None = None,
    validation: float = 0.1,
    seed: int = 0,
    train_split: str = "train",
    test_splits: Mapping[str, str | None] | None = None,
    unlabelled_splits: Mapping[str, str] | None = None,
    train_file: os.PathLike | None = None,
    test_file: os.PathLike | None = None,
    predict_file: os.PathLike | None = None,
    limit: int | None = None,
    download: bool = True,
) -> TextDataset:
    """A data set of texts with labels, in memory.

    Args:
      name: of TFDS: "glue/cola", "imdb_reviews:1.0.0". GLUE is fetched and prepared on first use,
        others must lie prepared (as array_record) in ``data_dir``. With ``train_file``, any word.
      columns: names of one feature, or two for pairs.
      label_key: name of the label.
      regression: whether labels are numbers to be predicted rather than classes.
      data_dir: of TFDS; default $TFDS_DATA_DIR, else ~/tensorflow_datasets.
      validation: fraction (below 1) or number of training texts to hold out, with the classes in
        their proportions.
      seed: of the choice of those; the same in all runs that are compared.
      train_split: TFDS split name or slice such as "train[:80%]".
      test_splits: reported split -> TFDS split; None for one stands for "test" where that has
        labels, else "validation".
      unlabelled_splits: split to predict -> TFDS split; those that do not exist are left out.
      train_file, test_file, predict_file: instead of TFDS, files .csv or .tsv with a heading, or
        .jsonl with an object a line, in UTF-8. Without ``test_file`` as many rows as ``validation``
        says are held out once more. Labels of classes may be words or whole numbers.
      limit: use only this many training texts, after the hold-out; None or 0 for all.
      download: False never uses the network.

    Raises:
      UserError: what is wrong with the name, a file and its line, the features or the network.
    """
    if not validation > 0:
        raise UserError(f"validation={validation!r}: must be above 0, to choose the best step on")
    if train_file:
        splits, names = _files(
            {"train": train_file, "test": test_file, "predict": predict_file},
            columns,
            label_key,
            regression,
        )
        tests = {"test": splits["test"]} if "test" in splits else {}
        unlabelled = {"predict": splits["predict"]} if "predict" in splits else {}
        train = splits["train"]
    else:
        data_dir = Path(data_dir).expanduser() if data_dir else default_data_dir()
        folder = _prepared(name, data_dir, download)
        columns, names = _features(folder, columns, label_key, regression)
        info = open_builder(folder).info

        def read(split: str) -> TextSplit:
            return _read(folder, split, columns, label_key, regression)

        train = read(train_split)
        if not len(train.ids) or not _labelled(train):
            raise UserError(f"split {train_split!r} of {name} has no labelled texts")
        tests = {}
        for ours, theirs in (test_splits or {"test": None}).items():
            tests[ours] = read(theirs) if theirs else _default_test(info, read)
            if not len(tests[ours].ids) or not _labelled(tests[ours]):
                raise UserError(f"split {theirs!r} of {name} has no labelled texts")
        present = {k: v for k, v in (unlabelled_splits or {}).items() if v in info.splits}
        unlabelled = {ours: read(theirs) for ours, theirs in present.items()}
    if not tests:
        train, tests["test"] = _held_out(train, validation, seed + 1, regression)
    train, held = _held_out(train, validation, seed, regression)
    if limit and limit < len(train.ids):
        train = train.at(np.arange(limit))
    return TextDataset(name, tuple(columns), train, held, tests, unlabelled, names)


def _held_out(split: TextSplit, amount: float, seed: int, regression: bool):
    count = held_out_count(len(split.ids), amount)
    labels = None if regression else split.labels
    kept, held = hold_out(len(split.ids), count, seed=seed, labels=labels)
    return split.at(kept), split.at(held)


def _labelled(split: TextSplit) -> bool:
    """Some data sets publish a split without labels, as -1."""
    first = split.labels[0]
    return not (math.isnan(first) or (split.labels == -1).all())


# TFDS


def _prepared(name: str, data_dir: Path, download: bool) -> Path:
    parsed = Name.parse(name)
    folder = find_prepared(parsed, data_dir)
    if folder is None and is_glue(parsed):
        if not download:
            raise UserError(
                f"{name} is not prepared in {data_dir}: type\n"
                f"python -m rmlora_jax.data.prepare {name} --data_dir={data_dir}"
            )
        folder = prepare_glue(parsed, data_dir)
    if folder is None:
        raise not_prepared(name, parsed, data_dir)
    return folder


def _features(folder: Path, columns: Sequence[str], label_key: str, regression: bool):
    """The columns, and the names of the classes or None, checked against the declared features."""
    tfds = import_tfds()
    info = open_builder(folder).info
    features = declared_features(info)
    texts = [k for k, f in features.items() if isinstance(f, tfds.features.Text)]
    if not columns and len(texts) == 1:
        columns = tuple(texts)
    if not columns or not set(columns) <= set(texts):
        raise UserError(
            f"{info.full_name} has no text under {', '.join(map(repr, columns)) or 'no name'}; its "
            f"texts are under {', '.join(texts) or 'nothing'}\nName one or two: "
            f"--config.text.columns=\"('{texts[0] if texts else 'text'}',)\""
        )
    label = features.get(label_key)
    if regression:
        fits = label is not None and np.issubdtype(np.dtype(label.np_dtype), np.number)
        kind = "number"
    else:
        fits = isinstance(label, tfds.features.ClassLabel) and label.num_classes
        kind = "class label"
    if not fits:
        others = [k for k in features if k not in texts]
        raise UserError(
            f"{info.full_name} has no {kind} under {label_key!r}; beside texts it has "
            f"{', '.join(others) or 'nothing'}\nName it with --config.data.label_key"
        )
    return tuple(columns), None if regression else tuple(label.names)


def _read(folder: Path, split: str, columns, label_key: str, regression: bool) -> TextSplit:
    builder = open_builder(folder)
    try:
        records = builder.as_data_source(split=split)
    except NotImplementedError as error:
        raise UserError(
            f"{folder} is stored in a format that cannot be read at random; prepare it again in "
            "another folder: python -m rmlora_jax.data.prepare NAME --data_dir=OTHER"
        ) from error
    except ValueError as error:
        raise UserError(
            f"{builder.info.full_name} has no split {split!r}; it has "
            f"{', '.join(sorted(builder.info.splits))}"
        ) from error
    n = len(records)
    texts = tuple([""] * n for _ in columns)
    labels = np.empty(n, np.float32 if regression else np.int32)
    ids = np.arange(n, dtype=np.int64)
    with progress(n, f"reading {split}", " texts", disable=n < 50_000) as bar:
        for i in range(n):
            try:
                record = records[i]
                for column, name in zip(texts, columns, strict=True):
                    column[i] = record[name].decode("utf-8")
                labels[i] = record[label_key]
            except Exception as error:  # array_record and protobuf each have their own kinds
                why = str(error).strip().partition("\n")[0]
                raise UserError(
                    f"{folder} is damaged: text {i} of {split!r} cannot be read: {why}\n"
                    "Delete that folder and prepare it again"
                ) from error
            ids[i] = record.get("idx", i)
            bar.update()
    return TextSplit(texts, labels, ids)


def _default_test(info, read) -> TextSplit:
    for which in ("test", "validation"):
        if which in info.splits:
            split = read(which)
            if len(split.ids) and _labelled(split):
                return split
    raise UserError(
        f"{info.full_name} has no labelled test or validation split, only "
        f"{', '.join(sorted(info.splits))}\nName parts of one, such as "
        "--config.data.train_split='train[:80%]' --config.data.test_split='train[80%:]'"
    )


# Files


def _files(paths: dict, columns, label_key: str, regression: bool):
    """The splits that have a file, and the names of the classes or None."""
    if not columns:
        raise UserError("name the columns with text: --config.text.columns=\"('text',)\"")
    splits, names = {}, None
    for which, path in paths.items():
        if not path:
            continue
        path = Path(path).expanduser()
        labelled = which != "predict"
        texts, raw = tuple([] for _ in columns), []
        for line, row in _rows(path):
            for column, name in zip(texts, columns, strict=True):
                column.append(_cell(path, line, row, name))
            if labelled:
                raw.append((line, _cell(path, line, row, label_key)))
        n = len(texts[0])
        if not n:
            raise UserError(f"{path} has no rows")
        if not labelled:
            blank = np.full(n, np.nan, np.float32) if regression else np.full(n, -1, np.int32)
            splits[which] = TextSplit(texts, blank, np.arange(n))
            continue
        if regression:
            labels = np.array([_value(path, *pair, label_key) for pair in raw], np.float32)
        else:
            if names is None:
                names = _class_names(path, [word for _, word in raw], label_key)
            numbers = {word: i for i, word in enumerate(names)}
            labels = np.array([_class(path, *pair, numbers) for pair in raw], np.int32)
        splits[which] = TextSplit(texts, labels, np.arange(n))
    return splits, names


def _rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """(line number, row) of a file."""
    kind = path.suffix.lower()
    if kind not in (".csv", ".tsv", ".jsonl"):
        raise UserError(f"{path}: files of texts end in .csv, .tsv or .jsonl; convert it to one")
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            if kind == ".jsonl":
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield number, _object(path, number, line)
                return
            reader = csv.DictReader(file, delimiter="," if kind == ".csv" else "\t", strict=True)
            for row in reader:
                if None in row:
                    raise UserError(
                        f"{path}, line {reader.line_num}: more cells than the heading has names; "
                        "put texts with commas or tabs in double quotes"
                    )
                yield reader.line_num, row
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}); convert it") from error
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: {error}; check its quotes") from error


def _object(path: Path, number: int, line: str) -> dict:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{path}, line {number}: not JSON ({error})") from None
    if not isinstance(row, dict):
        raise UserError(f"{path}, line {number}: a {type(row).__name__}, not an object")
    return {k: v if v is None or isinstance(v, str) else json.dumps(v) for k, v in row.items()}


def _cell(path: Path, line: int, row: dict, name: str) -> str:
    if name not in row:
        raise UserError(
            f"{path}, line {line}: no {name!r}; it has {', '.join(map(repr, row))}\n"
            "Name the columns with --config.text.columns and --config.data.label_key"
        )
    value = row[name]
    if value is None or not value.strip():
        raise UserError(f"{path}, line {line}: {name!r} is empty; fill it in or delete the line")
    return value


def _class_names(path: Path, words: list[str], label_key: str) -> tuple[str, ...]:
    """The words that occur, in order; whole numbers in the order of numbers."""
    names = sorted(set(words))
    if all(word.lstrip("-").isdigit() for word in names):
        names.sort(key=int)
    if len(names) < 2:
        raise UserError(f"{path}: every {label_key!r} is {names[0]!r}; two classes are needed")
    if len(names) > 1000 and len(names) > len(words) // 2:
        raise UserError(
            f"{path}: {label_key!r} has {len(names)} different values in {len(words)} rows; for "
            "numbers to be predicted use --config.task=text_regression"
        )
    return tuple(names)


def _class(path: Path, line: int, word: str, numbers: dict[str, int]) -> int:
    if word not in numbers:
        known = ", ".join(list(numbers)[:10])
        raise UserError(f"{path}, line {line}: label {word!r} is not in the training file: {known}")
    return numbers[word]


def _value(path: Path, line: int, word: str, label_key: str) -> float:
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{path}, line {line}: {label_key!r} is {word!r}, not a number")
    return value
