"""The data sources, and the steps that they share: hold-out, limits, bad records.

To add a source: write a file with a `Source`, and name it in `SOURCES`.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from rmlora_jax.data import chat, cifar, folder, glue, hf_datasets, packaged, text_files, tfds
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
    equal_rows,
    held_out_count,
    hold_out,
    labels_of,
    usable,
    with_classes,
    with_per_class,
)
from rmlora_jax.errors import UserError

# The first source that handles a request serves it; the last one handles every name.
SOURCES = (
    text_files.SOURCE,
    chat.SOURCE,
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
    """Looks for what a run needs and does not have, before anything is opened or fetched.

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
    """Facts about a data set that has not been opened, or None."""
    try:
        return find_source(kind, request).known(request)
    except UserError:
        return None


def open_images(request: Request) -> Dataset:
    """The images of a request; see `load_images`."""
    found: FoundImages = _found("images", request)
    skipped = Skipped(request.bad_records)

    def held_out(images: ImageSource, seed: int) -> tuple[ImageSource, ImageSource | None]:
        count = held_out_count(len(images), request.validation, found.place)
        if not count:
            return images, None
        labels = labels_of(images) if found.by_class else None
        kept, held = hold_out(len(images), count, seed=seed, labels=labels)
        return Subset(images, kept), Subset(images, held)

    train = usable(found.train, request.train_split, request, skipped)
    if found.test is not None:
        test = usable(found.test, request.test_split or "test", request, skipped)
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

    # The hold-outs of GLUE stay those of earlier results.
    apart = request.apart and (bool(request.train_file) or glue.glue_task(request.name) is None)

    def held_out(split: TextSplit, seed: int) -> tuple[TextSplit, TextSplit]:
        n, labels = len(split.ids), None if found.label_names is None else split.labels
        count = held_out_count(n, request.validation, found.place)
        groups = equal_rows(split) if apart else None
        kept, held = hold_out(n, count, seed=seed, labels=labels, groups=groups)
        return split.at(kept), split.at(held)

    train, tests = found.train, found.tests
    seen, notes = set(zip(*train.texts, strict=True)) if apart and tests else (), []
    for name, test in tests.items():
        if same := sum(row in seen for row in zip(*test.texts, strict=True)):
            notes.append(f"{same:,} of {len(test.ids):,} rows of {name!r} are training texts, too")
    if not tests:
        train, test = held_out(train, request.seed + 1)
        tests = {"test": test}
    train, validation = held_out(train, request.seed)
    if request.limit and request.limit < len(train.ids):
        train = train.at(range(request.limit))
    return TextDataset(
        request.name, found.columns, train, validation, tests, found.unlabelled, found.label_names,
        tuple(skipped.records), tuple(notes),
    )


def open_utterances(request: Request) -> Any:
    """The speech of a request: a `packaged.SpeechDataset`; see `packaged.load_speech`."""
    return _found("utterances", request)


def open_chats(request: Request) -> chat.ChatDataset:
    """The chats of a request; see `load_chats`."""
    found: chat.FoundChats = _found("chats", request)
    return chat.split_chats(found, chat.names_of(request), request)


def _found(kind: Kind, request: Request, *more) -> Any:
    return getattr(find_source(kind, request), kind)(request, *more)


def load_images(name: str, *, test_split: str | None = None, **fields) -> Dataset:
    """A labelled image data set with three fixed splits.

    Args:
      name: of the data set.
      test_split: to report. None: "test" where it has labels, else "validation".
      **fields: of a :class:`Request`, such as ``data_dir`` and ``validation``.

    Raises:
      UserError: with what is wrong: the name, the folder, the network or the features.

    >>> data = load_images("digits", validation=200)
    >>> len(data.train), len(data.validation), data.train[0]["image"].shape
    (1237, 200, (8, 8, 3))
    """
    return open_images(Request(name, test_splits={"test": test_split}, **fields))


def load_texts(name: str, *, columns: Sequence[str], **fields) -> TextDataset:
    """A data set of texts, or pairs of texts, with labels, in memory.

    Args:
      name: of the data set.
      columns: names of one feature, or two for pairs.
      **fields: of a :class:`Request`, such as ``train_file`` and ``regression``.

    Raises:
      UserError: with what is wrong: the name, a file and its line, the features or the network.
    """
    return open_texts(Request(name, columns=columns, **fields))


def load_chats(*files: str, **fields) -> chat.ChatDataset:
    """Conversations, prompts with completions, or texts, from files.

    Args:
      files: ``.jsonl``, ``.json`` or ``.parquet``, the first two also with ``.gz``.
      **fields: of a :class:`Request`, such as ``names`` and ``validation``.

    Raises:
      UserError: with what is wrong: the file, its line and the column.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
    ...     _ = file.writelines(f'{{"q": "{n} + 1?", "a": "{n + 1}"}}\\n' for n in range(9))
    ...     _ = file.seek(0)
    ...     data = load_chats(file.name, names={"prompt": "q", "completion": "a"})
    ...     len(data.train), len(data.validation), data.train[0]
    (8, 1, {'prompt': '0 + 1?', 'completion': '1'})
    """
    return open_chats(Request("files", files=files, **fields))
