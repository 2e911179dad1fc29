"""Images in folders, with one folder for each class.

    photos/train/cat/1.jpg    photos/train/dog/2.png    photos/test/cat/3.jpg

Without ``test/`` a part of ``train/`` is held out. Without the folders of the splits, with
``photos/cat`` and ``photos/dog``, a part of all images is. A class's name is its folder's name, and
its images are those at any depth below that folder. Linked folders are followed.
"""

import collections
import dataclasses
import functools
import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import UnidentifiedImageError

from rmlora_jax.data.dataset import (
    LEAVE_OUT,
    BadRecord,
    FoundImages,
    ImageSource,
    Request,
    Source,
    shown,
)
from rmlora_jax.data.splits import CHECKED_SIZE
from rmlora_jax.data.vision import FORMATS, SUFFIXES, open_image, pixels
from rmlora_jax.errors import UserError, first_line
from rmlora_jax.files import given_path, near
from rmlora_jax.models.processor import Resize

CHANNELS = 3
# Names of folders that hold a test split. The first that has class folders is used.
TESTS = ("test", "validation", "valid", "val")
SPLIT_NAME = re.compile(r"(train|test|val)(ing|id|idation)?(?![a-z])", re.IGNORECASE)
TREE = "DATA_DIR/train/CLASS/NAME.jpg or DATA_DIR/CLASS/NAME.jpg"


@dataclasses.dataclass(frozen=True, eq=False)
class ImageFiles(ImageSource):
    """Image files and their labels (N,). A file is opened when its image is asked for."""

    files: Sequence[str]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.files)

    def load(self, index: int, size: int | Resize | None = None) -> tuple[np.ndarray, int]:
        path = self.files[index]
        try:
            image = pixels(open_image(Path(path).read_bytes()), CHANNELS, size)
        except Exception as error:  # pillow raises many kinds for a damaged file
            raise BadRecord(
                f"{path!r} cannot be read as an image: {why_unreadable(error)}\n"
                f"Replace or delete it, or type {LEAVE_OUT}"
            ) from error
        return image, self.label(index)

    def label(self, index: int) -> int:
        return int(self.labels[index])

    def content(self, index: int) -> bytes:
        return b"%d " % self.labels[index] + Path(self.files[index]).read_bytes()

    def check(self, index: int, size: int | Resize = CHECKED_SIZE) -> None:
        """Raises a `BadRecord` for a file that cannot be used."""
        self.load(index, size)

    def identity(self) -> str:
        return self._identity

    @functools.cached_property
    def _identity(self) -> str:
        """A hash of the files' names, sizes, times and labels."""
        digest = hashlib.sha256()
        for path, label in zip(self.files, self.labels, strict=True):
            try:
                stat = os.stat(path)
                times = stat.st_mtime_ns, stat.st_ctime_ns  # no program sets the second one back
                found = (os.path.abspath(path), stat.st_size, *times, int(label))
            except OSError:  # a link that leads nowhere: a bad record
                found = (os.path.abspath(path), int(label))
            digest.update(repr(found).encode())
        return f"files {digest.hexdigest()}"


def why_unreadable(error: Exception) -> str:
    """Why a file cannot be read as an image, in words."""
    if isinstance(error, UnidentifiedImageError):  # its message has an object's address
        return f"its content is none of {', '.join(FORMATS)}, or a kind of one that is not read"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return first_line(error)


def is_image(path: str | os.PathLike) -> bool:
    """Whether a file has the suffix of an image."""
    return os.path.splitext(path)[1].rstrip().lower() in SUFFIXES


def files_below(folder: str | os.PathLike) -> list[str]:
    """Every file below a folder, sorted, without hidden files and folders.

    Linked folders are followed, but no folder is entered twice, and no link to a folder that the
    link itself lies in. A link that leads nowhere counts as a file.

    Raises:
      UserError: a folder cannot be read.
    """
    found, entered = [], set()
    # Each with the real paths of the folders that lead to it.
    waiting: list[tuple[str, tuple[str, ...]]] = [(os.fspath(folder), ())]
    while waiting:
        path, above = waiting.pop()
        real = os.path.realpath(path)
        if real in entered or any(_is_within(one, real) for one in above):
            continue
        entered.add(real)
        for entry in _entries(path):
            if _is_folder(entry):
                waiting.append((entry.path, (*above, real)))
            elif entry.is_file() if not entry.is_symlink() else _leads_to_file(entry.path):
                found.append(entry.path)
    return sorted(found)


def class_folders(folder: str | os.PathLike) -> dict[str, str]:
    """The folders in a folder by their names, sorted, without hidden ones and links upwards.

    Raises:
      UserError: the folder cannot be read.
    """
    real = os.path.realpath(folder)
    found = {entry.name: entry.path for entry in _entries(folder) if _is_folder(entry)}
    return {n: p for n, p in sorted(found.items()) if not _is_within(real, os.path.realpath(p))}


def _entries(folder: str | os.PathLike) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise UserError(f"the folder {str(folder)!r} cannot be read: {error.strerror}") from error


def _is_folder(entry: os.DirEntry) -> bool:
    # Of a link that leads to itself, entry.is_dir() raises.
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def _leads_to_file(link: str) -> bool:
    return os.path.isfile(link) or not os.path.exists(link)


def _is_within(path: str, folder: str) -> bool:
    """Whether one real path is another one, or lies below it."""
    return path == folder or path.startswith(os.path.join(folder, ""))


# Splits


class Split(NamedTuple):
    """The images of one split, and the files in it that are ignored.

    Attributes:
      images: sorted by class, then by path.
      classes: names of the class folders, sorted.
      others: files without the suffix of an image.
      loose: images that lie beside the class folders.
    """

    images: ImageFiles
    classes: tuple[str, ...]
    others: list[str]
    loose: int


def read_split(folder: Path, names: Sequence[str] | None = None) -> Split:
    """The images in the class folders of a folder.

    Args:
      folder: with the class folders.
      names: of the training split's classes; labels are places in it. None: this is that split.

    Raises:
      UserError: there are too few classes or no images, or a class is not in ``names``.
    """
    folders = class_folders(folder)
    loose = sum(is_image(entry.name) for entry in _entries(folder) if not _is_folder(entry))
    if not folders:
        has = f"{loose} images, but no" if loose else "no images and no"
        raise UserError(
            f"{folder} has {has} folders of classes; give each class a folder, {TREE}, or another "
            "folder with --config.data.data_dir"
        )
    _check_names(folder, folders, names)
    numbers = {name: number for number, name in enumerate(names or folders)}
    files, labels, others, empty = [], [], [], []
    for name, path in folders.items():
        below = files_below(path)
        images = [file for file in below if is_image(file)]
        others += [file for file in below if not is_image(file)]
        files += images
        labels += [numbers[name]] * len(images)
        if not images:
            empty.append(name)
    ignored = f" (other files there: {_kinds(others)})" if others else ""
    if not files:
        raise UserError(
            f"{folder} has no image in its folders {shown(folders)}{ignored}; images end in "
            f"{', '.join(SUFFIXES)}"
        )
    if empty and names is None:
        raise UserError(
            f"{folder} has folders without an image: {shown(empty)}{ignored}\n"
            f"Delete them, or put images in; images end in {', '.join(SUFFIXES)}"
        )
    return Split(ImageFiles(files, np.array(labels, np.int32)), tuple(folders), others, loose)


def _check_names(folder: Path, found: Iterable[str], names: Sequence[str] | None) -> None:
    for name in found:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise UserError(
                f"{folder} has a folder whose name is not UTF-8: {name!a}; rename it, since "
                "its name is the class's"
            ) from None
    found = list(found)
    if names is None:
        if len(found) < 2:
            raise UserError(
                f"{folder} has one folder, {found[0]!r}, and a classifier needs two classes; give "
                f"each class a folder, {TREE}"
            )
    elif unknown := [name for name in found if name not in names]:
        raise UserError(
            f"{folder} has class folders that the training images lack: "
            f"{shown(map(repr, unknown))}; these have {shown(map(repr, names))}\n"
            "Rename or remove them, or add training images of those classes"
        )


def _kinds(files: Iterable[str]) -> str:
    """How many files there are of each suffix, such as ".txt (2), .heic (1)"."""
    suffixes = (os.path.splitext(file)[1].lower() or "no suffix" for file in files)
    counted = collections.Counter(sorted(suffixes)).most_common(5)
    return ", ".join(f"{suffix[:20]} ({count})" for suffix, count in counted)


# The source


def _images(request: Request) -> FoundImages:
    if mistakes := _missing(request):
        raise UserError(mistakes[0])
    root = given_path(request.data_dir or "")
    folders, asked = class_folders(root), request.test_split
    test, notes = None, []
    if _has_splits(root, request.train_split, folders, asked):
        train = read_split(_split(root, request.train_split, "train"))
        # Some data sets have a test split without labels: a folder without class folders.
        tests = (n for n in TESTS if n in folders and n != request.train_split)
        name = asked or next((n for n in tests if class_folders(folders[n])), None)
        test = read_split(_split(root, name, "test"), train.classes) if name else None
        unused = [folder for folder in folders if folder not in (request.train_split, name)]
        notes += [f"not used of {root}: {shown(unused)}"] if unused else []
    else:
        train = read_split(root)
        if any(map(class_folders, folders.values())):
            notes.append(f"classes are the folders of {root} with all below: {shown(folders)}")
    notes += _ignored(root, [train, test] if test else [train])
    return FoundImages(
        train.images, test and test.images, train.classes, None, CHANNELS, place=root,
        by_class=True, notes=tuple(notes),
    )


def _has_splits(root: Path, train: str, folders: dict[str, str], test: str | None) -> bool:
    """Whether the folder has a folder for each split, or else one for each class.

    Raises:
      UserError: a test split was asked for, and the folders are those of classes.
    """
    # A class may be called "train": it then has no folders and stands beside other classes.
    alike = [name for name in folders if SPLIT_NAME.match(name)]
    nested = any(class_folders(folders[name]) for name in alike)
    if train != "train" or nested or (alike and len(alike) == len(folders)):
        return True
    if test:
        raise UserError(
            f"config.data.test_split={test!r}: {root} has no folder {train!r} of training images "
            "beside it; without one leave out --config.data.test_split, and a part is held out"
        )
    return False


def _split(root: Path, name: str, kind: str) -> Path:
    """The folder of a split.

    Raises:
      UserError: it is not there.
    """
    folder = root / name
    if folder.is_dir():
        return folder
    slices = "; folders have no slices, and data.validation holds a part out" if "[" in name else ""
    raise UserError(
        f"config.data.{kind}_split={name!r}: there is no folder {folder}{near(folder)}; {root} has "
        f"{shown(class_folders(root)) or 'no folders'}{slices}\n"
        f"Name one of them with --config.data.{kind}_split"
    )


def _ignored(root: Path, splits: list[Split]) -> list[str]:
    """Notes about files that are ignored."""
    notes = []
    if others := [file for split in splits for file in split.others]:
        files = "1 file" if len(others) == 1 else f"{len(others)} files"
        notes.append(f"ignored in {root}: {files} without the suffix of an image: {_kinds(others)}")
    if loose := sum(split.loose for split in splits):
        images = "1 image" if loose == 1 else f"{loose} images"
        notes.append(f"ignored in {root}: {images} beside the folders of classes")
    return notes


def _missing(request: Request) -> list[str]:
    if not request.data_dir:
        return [
            "config.data.data_dir=None: name the folder with the images, such as "
            "--config.data.data_dir=photos"
        ]
    root = given_path(request.data_dir)
    if root.is_dir():
        return []
    return [f"config.data.data_dir={request.data_dir!r}: there is no folder {root}{near(root)}"]


SOURCE = Source(
    handles=lambda request: request.name == "folder", missing=_missing, images=_images
)
