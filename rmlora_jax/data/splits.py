"""Code shared by data sets with named splits and features: those of TFDS and Hugging Face."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from rmlora_jax.data.dataset import ImageSource, Request, shown
from rmlora_jax.errors import UserError
from rmlora_jax.models.processor import Resize

CHECKED_SIZE = 32  # an image is checked by decoding it to this size: quick, but reads all of it


class Split(Protocol):
    """The images or the texts of a split."""

    def is_labelled(self) -> bool: ...


AnySplit = TypeVar("AnySplit", bound=Split)


def labelled_splits(
    request: Request,
    place: object,
    splits: Iterable[str],
    opened: Callable[[str], AnySplit],
    *,
    may_lack: bool = False,
) -> tuple[AnySplit, dict[str, AnySplit]]:
    """The training split and the reported ones, all with labels.

    Where the request names no split to report, "test" is, or "validation" where "test" has no
    labels (some data sets publish it with -1).

    Args:
      place: what error messages call the data, such as its folder.
      splits: that the data has; ``opened`` opens one of them, or a part of one.
      may_lack: data with neither "test" nor "validation" has no reported split, and no error.

    Raises:
      UserError: a split has no labels, or there is none to report.
    """

    def labelled(split: str) -> AnySplit:
        if (found := opened(split)).is_labelled():
            return found
        raise UserError(f"{place}: split {split!r} has no labels")

    def default() -> AnySplit:
        for which in known:
            if (found := opened(which)).is_labelled():
                return found
        raise UserError(
            f"{place} has no labelled test or validation split, only {shown(sorted(splits))}\n"
            "Name parts of one, such as "
            "--config.data.train_split='train[:80%]' --config.data.test_split='train[80%:]'"
        )

    known = [which for which in ("test", "validation") if which in splits]
    train = labelled(request.train_split)
    tests = {
        ours: labelled(theirs) if theirs else default()
        for ours, theirs in (request.test_splits or {"test": None}).items()
        if theirs or known or not may_lack
    }
    return train, tests


def check_image_key(place: object, key: str, images: Sequence[str], features: str) -> None:
    """Raises a UserError where ``key`` is not one of the features with ``images``."""
    if key not in images:
        hint = f"its images are under {shown(images)}" if images else f"it has {features}"
        raise UserError(
            f"{place} has no image under {key!r}; {hint}\nName it with --config.data.image_key"
        )


def text_columns(
    request: Request, place: object, texts: Sequence[str], features: str
) -> tuple[str, ...]:
    """The columns of a request, which are among ``texts``; the only one where it names none.

    Raises:
      UserError: there are no such columns; ``features`` tells what the data has.
    """
    columns = tuple(request.columns)
    if not columns and len(texts) == 1:
        columns = tuple(texts)
    if columns and set(columns) <= set(texts):
        return columns
    raise UserError(
        f"{place} has no text under {', '.join(map(repr, columns)) or 'no name'}; {features}\n"
        "Name one or two: "
        f"--config.text.columns=\"('{texts[0][:80] if texts else 'text'}',)\""
    )


class FileImages(ImageSource):
    """One split of a data set in files, of which some may be damaged.

    It pickles as its arguments, so that worker processes open the files themselves.

    Attributes:
      arguments: of the class: the path of the files, the split, and what else it needs.
    """

    arguments: tuple

    def __reduce__(self):
        return type(self), self.arguments

    def check(self, index: int, size: int | Resize = CHECKED_SIZE) -> None:
        """Raises a `dataset.BadRecord` for an example that cannot be used."""
        self.load(index, size)

    def identity(self) -> str:
        """What is read: the files with their sizes and times, the split, the features."""
        path, *rest = self.arguments
        root, found = files_in(path)
        return repr((root, *rest, found))


def files_in(path: str | Path) -> tuple[str, list[tuple[str, int, int, int]]]:
    """A file or a folder, and the name, size and times of each file in it."""
    root = Path(path).resolve()
    files = sorted(p for p in (root.rglob("*") if root.is_dir() else [root]) if p.is_file())
    stats = [(str(p.relative_to(root)), p.stat()) for p in files]
    return str(root), [(name, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in stats]
