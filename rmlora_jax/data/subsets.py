"""Parts of data sets: usable records, held-out examples, some classes, some images of each class.

All draws are numpy's RandomState, whose stream never changes between versions: a seed chooses the
same examples for ever.
"""

import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import PIL

from rmlora_jax.data.content import stored
from rmlora_jax.data.dataset import (
    ArraySource,
    BadRecord,
    Dataset,
    ImageSource,
    Request,
    Skipped,
    TextSplit,
)
from rmlora_jax.data.vision import DECODER
from rmlora_jax.errors import UserError, progress
from rmlora_jax.files import read_json, write_json
from rmlora_jax.models.processor import Resize

SEED = 0  # of the classes and of each class's images: never a run's seed
CHUNK = 256  # images that a thread takes at a time
FORMAT = "1"  # of what is cached

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, eq=False)
class Subset(ImageSource):
    """The elements of ``source`` at ``ids``, in that order.

    With ``labels`` the label ``l`` is read as ``labels[l]``.

    >>> source = ArraySource(np.zeros((3, 8, 8, 3), np.uint8), np.array([3, 1, 4]))
    >>> Subset(source, (2, 0))[0]["label"], Subset(source, (1,), np.array([0, 7]))[0]["label"]
    (4, 7)
    """

    source: ImageSource
    ids: Sequence[int] | np.ndarray
    labels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def load(self, index: int, size: int | Resize | None = None) -> tuple[np.ndarray, int]:
        image, label = self.source.load(int(self.ids[index]), size)
        return image, label if self.labels is None else int(self.labels[label])

    def content(self, index: int) -> bytes:
        return stored(self.source, int(self.ids[index]))

    def identity(self) -> str | None:
        if (own := identity_of(self.source)) is None:
            return None
        own = f"{own} {_digest(self.ids)}"
        return own if self.labels is None else f"relabelled {own} {_digest(self.labels)}"


def _digest(numbers: Sequence[int] | np.ndarray) -> str:
    return hashlib.sha256(np.asarray(numbers, np.int64).tobytes()).hexdigest()


def identity_of(source: ImageSource) -> str | None:
    """``source.identity()``, or None where it has no such method."""
    return getattr(source, "identity", lambda: None)()


def fingerprint(source: ImageSource, size: int | Resize | None) -> str | None:
    """Hexadecimal SHA-256 of all that decides the decoded images; None where it is not known."""
    if (identity := identity_of(source)) is None:
        return None
    decoder = f"{DECODER} {PIL.__version__}"
    return hashlib.sha256(f"{FORMAT} {decoder} {size} {identity}".encode()).hexdigest()


def labels_of(source: ImageSource) -> np.ndarray:
    """Every label of a source, int (n,), without decoding an image where that can be helped."""
    if isinstance(source, ArraySource):
        return np.asarray(source.labels)
    if isinstance(source, Subset):
        ids = np.asarray(source.ids, np.int64)
        label = getattr(source.source, "label", None)
        if label and len(ids) < len(source.source):
            found = np.array([label(int(i)) for i in ids])
        else:
            found = labels_of(source.source)[ids]
        return found if source.labels is None else source.labels[found]
    label = getattr(source, "label", None) or (lambda i: source[i]["label"])
    return np.array([label(i) for i in range(len(source))])


def in_chunks(
    n: int, work: Callable[[range], T], threads: int, desc: str
) -> Generator[T, None, None]:
    """What ``work`` returns for each chunk of the numbers below ``n``, in order.

    Threads work ahead, and a progress bar counts the images of a larger set.
    """
    pool = ThreadPoolExecutor(threads)
    chunks = [range(start, min(start + CHUNK, n)) for start in range(0, n, CHUNK)]
    try:
        with progress(n, desc, " images", disable=n < 2000) as bar:
            for chunk, done in zip(chunks, pool.map(work, chunks), strict=True):
                yield done
                bar.update(len(chunk))
    finally:
        pool.shutdown(cancel_futures=True)


# Usable records


def usable(source: ImageSource, split: str, request: Request, skipped: Skipped) -> ImageSource:
    """The records of ``source`` that can be used; ``source`` itself where all can, or all must.

    A stream meets a damaged image at some step of a run, too late to agree on how many there are.
    So where records may be left out, each is read, decoded and compared with the declared features
    before the run. ``request.cache`` keeps what was found for the next run of the same files.

    Args:
      source: with ``check(index)``, which raises `BadRecord`; all records of another can be used.
      split: its name, for messages.
      request: names the cache and how many threads read and decode.
      skipped: takes the records that cannot be used.

    Raises:
      UserError: more records cannot be used than may be left out, or all.
    """
    check = getattr(source, "check", None)
    if skipped.limit and check:
        # Of most models' processors every image becomes a square.
        resize = request.resize if request.resize and not request.resize.takes_any else None
        check = functools.partial(check, size=resize) if resize else check
        name = fingerprint(source, resize) if request.cache else None
        path = Path(request.cache or "", f"{name}.bad.json").expanduser() if name else None
        found = _remembered(path, len(source)) if path else None
        if found is None:
            found, desc = [], f"checking {request.name} {split}"
            search = functools.partial(_bad_records, check)
            parts = in_chunks(len(source), search, request.threads, desc)
            with contextlib.closing(parts):  # it ends soon after too many of them
                for bad in parts:
                    found += bad
                    if len(found) > skipped.limit:
                        break
            if path and len(found) <= skipped.limit:
                with contextlib.suppress(OSError):
                    write_json(path, found)
        skipped.add(*(BadRecord(why) for _, why in found))
        if found:
            ids = np.setdiff1d(np.arange(len(source)), [index for index, _ in found])
            source = Subset(source, ids)
    if not len(source):
        raise UserError(f"split {split!r} of {request.name} has no image that can be used")
    return source


def _bad_records(check: Callable[[int], Any], chunk: range) -> list[tuple[int, str]]:
    """(index, why) of the records that cannot be used."""
    bad = []
    for index in chunk:
        try:
            check(index)
        except BadRecord as error:
            bad.append((index, str(error).partition("\n")[0]))
    return bad


def usable_texts(
    split: TextSplit,
    names: Sequence[str] | None,
    skipped: Skipped,
    unread: Mapping[int, str],
    error: Callable[[int, str], BadRecord],
) -> TextSplit:
    """The rows of ``split`` that can be used. No row is left out of a split without labels.

    Args:
      split: as it was read; of two texts in a row, one may be empty.
      names: of the classes; None for regression.
      skipped: takes the other rows.
      unread: rows that could not be read, and why.
      error: makes the error of a row from its number and why it cannot be used.

    Raises:
      UserError: more rows cannot be used than may be left out.
    """
    bad, labelled = dict(unread), split.is_labelled()
    few = len(bad) <= skipped.limit
    if labelled and few:
        rows = (i for i in range(len(split.ids)) if i not in bad)
        bad |= {i: why for i in rows if (why := _unusable(split, i, names))}
    for i in sorted(bad):
        if not labelled and few:
            raise error(i, bad[i])
        skipped.add(error(i, bad[i]))
    return split.at([i for i in range(len(split.ids)) if i not in bad]) if bad else split


def _unusable(split: TextSplit, i: int, names: Sequence[str] | None) -> str | None:
    """Why a row that was read cannot be used, or None."""
    label = split.labels[i]
    if not any(column[i].strip() for column in split.texts):
        return "its text is empty"
    if names is None:
        return None if np.isfinite(label) else f"its label is {label}, not a number"
    if 0 <= label < len(names):
        return None
    return f"its label is {label}, the declared classes are 0 to {len(names) - 1}"


def _remembered(path: Path, n: int) -> list[tuple[int, str]] | None:
    try:
        found = read_json(path)
        whole = all(type(i) is int and 0 <= i < n and isinstance(why, str) for i, why in found)
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    return [(index, why) for index, why in found] if whole else None


# Held-out examples


def held_out_count(n: int, amount: float, of: object = "the data set") -> int:
    """How many of ``n`` examples ``amount`` stands for: a fraction if below 1, else a number.

    ``of`` names the data set in errors.

    >>> held_out_count(1437, 0.1), held_out_count(1437, 200)
    (144, 200)

    Raises:
      UserError: if nothing would be left to train on, or ``amount`` is neither.
    """
    if amount < 0 or (amount >= 1 and amount != int(amount)):
        raise UserError(
            f"validation={amount!r}: must be a fraction of the training examples below 1, "
            "or a whole number of them"
        )
    if n < 2 and amount > 0:
        raise UserError(
            f"{of} has {n} training example{'s' * (n != 1)}; two are needed, one of them to "
            "choose the best step on"
        )
    count = round(n * amount) if amount < 1 else int(amount)
    if amount > 0:
        count = max(count, 1)
    if count >= n:
        raise UserError(
            f"validation={amount!r} would hold out {count} of the {n} training examples of "
            f"{of}; give a smaller one, such as 0.1"
        )
    return count


def hold_out(
    n: int,
    count: int,
    *,
    seed: int,
    labels: np.ndarray | None = None,
    groups: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Indices kept and held out, both ascending: ``count`` of ``n`` are held out at random.

    With ``labels`` (n,) each class gives its share, rounded by largest remainder so that the total
    is exact. With ``groups`` (n,), numbers from 0 on, equal ones stay together: a group that does
    not fit into what is left of a share is passed over, so fewer than ``count`` may be held out,
    but at least one group. Where no two rows are equal, or all are, ``groups`` changes nothing.

    >>> kept, held = hold_out(6, 2, seed=0, labels=np.array([0, 0, 0, 1, 1, 1]))
    >>> len(kept), sorted(np.array([0, 0, 0, 1, 1, 1])[held])
    (4, [np.int64(0), np.int64(1)])
    """
    order = np.random.RandomState(seed).permutation(n)
    parts = [(order, count)]
    if labels is not None:
        shuffled = np.asarray(labels)[order]
        classes, sizes = np.unique(shuffled, return_counts=True)
        # Integers only: a float share could round differently on another machine.
        share, remainder = np.divmod(sizes * count, sizes.sum())
        share[np.argsort(-remainder, kind="stable")[: count - share.sum()]] += 1
        parts = [(order[shuffled == c], q) for c, q in zip(classes, share, strict=True)]
    if groups is None or not groups.any():
        held = np.concatenate([rows[:share] for rows, share in parts])
    else:
        held = _whole_groups(parts, groups)
    return np.setdiff1d(np.arange(n), held), np.sort(held)


def _whole_groups(parts: Sequence[tuple[np.ndarray, int]], groups: np.ndarray) -> np.ndarray:
    """The rows of the first groups of each part that fit into its share."""
    sizes = np.bincount(groups)
    taken = np.zeros(len(sizes), bool)
    for rows, left in parts:
        for group in dict.fromkeys(groups[rows].tolist()):
            if not taken[group] and sizes[group] <= left:
                taken[group] = True
                left -= sizes[group]
    if not taken.any():
        taken[sizes.argmin()] = True
    return np.flatnonzero(taken[groups])


def equal_rows(split: TextSplit) -> np.ndarray:
    """A number for each row, int (n,): the same for rows whose texts are equal.

    >>> equal_rows(TextSplit((["a", "b", "a"],), np.zeros(3), np.arange(3))).tolist()
    [0, 1, 0]
    """
    seen: dict[tuple[str, ...], int] = {}
    return np.array([seen.setdefault(row, len(seen)) for row in zip(*split.texts, strict=True)])


# Some of the training examples


def with_classes(data: Dataset, count: int, *, seed: int = SEED) -> Dataset:
    """The images of ``count`` classes, in every split, labelled 0 to ``count - 1``.

    They are the first in an order of all classes that depends on ``seed`` alone: the 10 classes of
    one run are among the 50 of another, under the same labels. Held-out images stay held out.

    Raises:
      UserError: there are fewer classes, or a split has no image of those.

    >>> images = ArraySource(np.zeros((6, 8, 8, 3), np.uint8), np.arange(6) % 3)
    >>> data = Dataset("a", images, None, images, 3, ("cat", "dog", "owl"), (8, 8, 3))
    >>> small = with_classes(data, 2)
    >>> small.class_names, len(small.train), small.train[0]["label"]
    (('owl', 'dog'), 4, 1)
    """
    if count > data.num_classes:
        raise UserError(
            f"config.data.classes={count}: {data.name} has {data.num_classes} classes"
        )
    chosen = np.random.RandomState(seed).permutation(data.num_classes)[:count]
    labels = np.full(data.num_classes, -1)
    labels[chosen] = np.arange(count)

    parts = {}
    for name in ("train", "validation", "test"):
        if (source := getattr(data, name)) is None:
            continue
        ids = np.flatnonzero(np.isin(labels_of(source), chosen))
        if not len(ids):
            raise UserError(
                f"config.data.classes={count}: the {name} split of {data.name} has no image of "
                "these classes; give more classes, or a larger config.data.validation"
            )
        parts[name] = Subset(source, ids, labels)
    return dataclasses.replace(
        data,
        **parts,
        num_classes=count,
        class_names=tuple(data.class_names[c] for c in chosen),
    )


def with_per_class(data: Dataset, count: int, *, seed: int = SEED) -> Dataset:
    """At most ``count`` training images of each class; validation and test stay whole.

    They are the first in an order that depends on ``seed`` and on how many there are: the 10 of one
    run are among the 50 of another.

    >>> images = ArraySource(np.zeros((6, 8, 8, 3), np.uint8), np.array([0, 0, 0, 0, 0, 1]))
    >>> data = Dataset("a", images, None, images, 2, ("cat", "dog"), (8, 8, 3))
    >>> small = with_per_class(data, 2)
    >>> [small.train[i]["label"] for i in range(len(small.train))], len(small.test)
    ([0, 0, 1], 6)
    """
    labels, kept = labels_of(data.train), []
    for label in np.unique(labels):
        ids = np.flatnonzero(labels == label)
        # A seed for each class: what one class has does not shift the draw of another.
        order = np.random.RandomState([seed, int(label)]).permutation(len(ids))
        kept.append(ids[order[:count]])
    return dataclasses.replace(data, train=Subset(data.train, np.sort(np.concatenate(kept))))
