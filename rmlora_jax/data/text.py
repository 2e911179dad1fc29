"""``load_texts``: labelled texts, or pairs of texts, of TFDS or of files of one's own."""

import dataclasses
import functools
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rmlora_jax.data.bad import LEAVE_OUT, BadRecord, Skipped
from rmlora_jax.data.dataset import held_out_count, hold_out
from rmlora_jax.data.prepare.glue import is_glue, prepare_glue
from rmlora_jax.data.progress import progress
from rmlora_jax.data.text_files import Rows, class_names, class_of, read_rows, value_of
from rmlora_jax.data.tfds_images import (
    Name,
    check_length,
    declared_features,
    default_data_dir,
    default_test,
    find_prepared,
    import_tfds,
    not_prepared,
    open_builder,
    open_errors,
    shown,
)
from rmlora_jax.errors import UserError, first_line


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
      skipped: the records that were left out because they cannot be used, and why.
    """

    name: str
    columns: tuple[str, ...]
    train: TextSplit
    validation: TextSplit
    tests: dict[str, TextSplit]
    unlabelled: dict[str, TextSplit]
    label_names: tuple[str, ...] | None
    skipped: tuple[str, ...] = ()


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
    bad_records: int = 0,
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
      bad_records: how many examples with a label, of all splits together, may be left out because
        they are damaged or empty, or their label is none. Nothing is left out of what is predicted.

    Raises:
      UserError: what is wrong with the name, a file and its line, the features or the network.
    """
    if not validation > 0:
        raise UserError(f"validation={validation!r}: must be above 0, to choose the best step on")
    skipped = Skipped(bad_records)
    if train_file:
        paths = {"train": train_file, "test": test_file, "predict": predict_file}
        splits, names = _files(paths, columns, label_key, regression, skipped)
        tests = {"test": splits["test"]} if "test" in splits else {}
        unlabelled = {"predict": splits["predict"]} if "predict" in splits else {}
        train = splits["train"]
    else:
        data_dir = Path(data_dir).expanduser() if data_dir else default_data_dir()
        folder = _prepared(name, data_dir, download)
        columns, names = _features(folder, columns, label_key, regression)
        info = open_builder(folder).info

        def read(split: str) -> TextSplit:
            return _read(folder, split, columns, label_key, names, skipped)

        train = read(train_split)
        if not len(train.ids) or not _labelled(train):
            raise UserError(f"split {train_split!r} of {name} has no labelled texts")
        tests = {}
        for ours, theirs in (test_splits or {"test": None}).items():
            tests[ours] = read(theirs) if theirs else default_test(folder, info, read, _labelled)
            if not len(tests[ours].ids) or not _labelled(tests[ours]):
                raise UserError(f"split {theirs!r} of {name} has no labelled texts")
        present = {k: v for k, v in (unlabelled_splits or {}).items() if v in info.splits}
        unlabelled = {ours: read(theirs) for ours, theirs in present.items()}
    if not tests:
        train, tests["test"] = _held_out(train, validation, seed + 1, regression, train_file)
    train, held = _held_out(train, validation, seed, regression, train_file or folder)
    if limit and limit < len(train.ids):
        train = train.at(np.arange(limit))
    return TextDataset(
        name, tuple(columns), train, held, tests, unlabelled, names, tuple(skipped.records)
    )


def _held_out(split: TextSplit, amount: float, seed: int, regression: bool, of):
    count = held_out_count(len(split.ids), amount, of)
    labels = None if regression else split.labels
    kept, held = hold_out(len(split.ids), count, seed=seed, labels=labels)
    return split.at(kept), split.at(held)


def _labelled(split: TextSplit) -> bool:
    """Some data sets publish a split without labels, as -1."""
    return not (np.isnan(split.labels) | (split.labels == -1)).all()


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
            f"{folder} has no text under {', '.join(map(repr, columns)) or 'no name'}; its "
            f"texts are under {shown(texts) or 'nothing'}\nName one or two: "
            f"--config.text.columns=\"('{texts[0][:80] if texts else 'text'}',)\""
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
            f"{folder} has no {kind} under {label_key!r}; beside texts it has "
            f"{shown(others) or 'nothing'}\nName it with --config.data.label_key"
        )
    return tuple(columns), None if regression else tuple(label.names)


def _read(
    folder: Path, split: str, columns, label_key: str, names: tuple[str, ...] | None, skipped
) -> TextSplit:
    """A split, without the examples that cannot be used where it has labels."""
    builder = open_builder(folder)
    with open_errors(folder, builder.info, split):
        records = builder.as_data_source(split=split)
        check_length(folder, split, records)
    n = len(records)
    texts = tuple([""] * n for _ in columns)
    labels = np.full(n, *((math.nan, np.float32) if names is None else (-1, np.int32)))
    ids = np.arange(n, dtype=np.int64)
    bad = {}
    with progress(n, f"reading {split}", " texts", disable=n < 50_000) as bar:
        for i in range(n):
            try:
                record = records[i]
                for column, name in zip(texts, columns, strict=True):
                    column[i] = record[name].decode("utf-8")
                labels[i] = record[label_key]
                ids[i] = record.get("idx", i)
            except Exception as error:  # array_record and protobuf each have their own kinds
                bad[i] = f"it cannot be read: {first_line(error)}"
                if len(bad) > skipped.limit:
                    break
            bar.update()
    whole = TextSplit(texts, labels, ids)
    labelled = _labelled(whole)
    if labelled and len(bad) <= skipped.limit:
        bad |= {i: why for i in range(n) if i not in bad and (why := _unusable(whole, i, names))}
    for i in sorted(bad):
        error = BadRecord(
            f"{folder} is damaged: text {i} of {split!r}: {bad[i]}\n"
            f"Delete that folder and prepare it again, or type {LEAVE_OUT}"
        )
        if not labelled and len(bad) <= skipped.limit:
            raise error
        skipped.add(error)
    return whole.at([i for i in range(n) if i not in bad]) if bad else whole


def _unusable(split: TextSplit, i: int, names: tuple[str, ...] | None) -> str | None:
    """What is wrong with an example that was read; of a pair one text may be empty."""
    label = split.labels[i]
    if not any(column[i].strip() for column in split.texts):
        return "its text is empty"
    if names is None:
        return None if np.isfinite(label) else f"its label is {label}, not a number"
    if 0 <= label < len(names):
        return None
    return f"its label is {label}, the declared classes are 0 to {len(names) - 1}"


# Files


def _files(paths: dict, columns, label_key: str, regression: bool, skipped: Skipped):
    """The splits that have a file, and the names of the classes or None."""
    if not columns:
        raise UserError("name the columns with text: --config.text.columns=\"('text',)\"")
    splits, names = {}, None
    for which, path in paths.items():
        if not path:
            continue
        path = Path(path).expanduser()
        labelled = which != "predict"
        rows = read_rows(path, columns, label_key if labelled else None, skipped)
        if not labelled:
            n = len(rows.lines)
            labels = np.full(n, np.nan, np.float32) if regression else np.full(n, -1, np.int32)
            splits[which] = TextSplit(rows.texts, labels, np.array(rows.numbers))
            continue
        if regression:
            number_of, dtype = functools.partial(value_of, label_key=label_key), np.float32
        else:
            names = names or class_names(path, rows.labels, label_key)
            numbers = {word: i for i, word in enumerate(names)}
            number_of, dtype = functools.partial(class_of, numbers=numbers), np.int32
        splits[which] = _with_labels(path, rows, number_of, dtype, skipped)
    return splits, names


def _with_labels(path: Path, rows: Rows, number_of, dtype, skipped: Skipped) -> TextSplit:
    """The rows whose label ``number_of`` finds a number for."""
    kept, labels = [], []
    for i, (line, word) in enumerate(zip(rows.lines, rows.labels, strict=True)):
        try:
            labels.append(number_of(word))
            kept.append(i)
        except BadRecord as error:
            skipped.add(BadRecord(f"{path}, line {line}: {error}"))
    if not kept:
        raise UserError(f"{path} has no row that can be used")
    texts = tuple([column[i] for i in kept] for column in rows.texts)
    return TextSplit(texts, np.array(labels, dtype), np.array(rows.numbers)[kept])
