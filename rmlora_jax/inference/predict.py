"""``python run.py --workdir=DIR --predict ...``: a table on the terminal, and a CSV file."""

import csv
import glob
import io
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import jax
from tqdm import tqdm

from rmlora_jax.errors import UserError
from rmlora_jax.files import write_bytes_atomic
from rmlora_jax.inference.classifier import Prediction, load
from rmlora_jax.inference.inputs import find_images, images_below, is_image

FILE = "predictions.csv"
CACHE = "~/.cache/rmlora_jax/xla"  # of compiled programs; the trainer's, unless it was told another
SHOWN = 100  # rows on the terminal
WIDTH = 60  # letters of an input on the terminal


def predict(
    workdir: str | None, values: Sequence[str], *, top: int = 1, out: str | None = None
) -> int:
    """Predicts, prints and writes; returns the exit status, 1 if an input could not be read.

    Args:
      workdir: what `load` accepts.
      values: as given to ``--predict``, see `images_of` and `texts_of`.
      top: classes of each input.
      out: CSV file with the columns input, label and probability, or input and value; a pair of
        texts is joined by a tab. Default: ``predictions.csv`` in ``workdir``.

    Raises:
      UserError: nothing can be predicted, in words for the terminal.
    """
    values = [value for value in values if value.strip()]
    if not workdir:
        raise UserError("whose predictions? Type python run.py --workdir=DIR --predict ...")
    if not values:
        raise UserError(f"nothing to predict: type python run.py --workdir={workdir} --predict ...")
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(Path(CACHE).expanduser()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    model = load(workdir)
    file = _writable(Path(out).expanduser() if out else Path(workdir).expanduser() / FILE)
    inputs = images_of(values) if model.info.is_image else texts_of(values, model.info.columns)

    failures = []

    def failed(error: UserError) -> None:
        failures.append(error)
        tqdm.write(f"error: {error}", file=sys.stderr)  # print would tear the progress bar

    with warnings.catch_warnings():
        # On palettes with alpha, and on large images that it reads all the same.
        warnings.filterwarnings("ignore", module="PIL")
        rows = model(inputs, top=top, failed=failed)
    if rows:
        # A file's name need not be text.
        write_bytes_atomic(file, to_csv(rows).encode("utf-8", "surrogateescape"))
        print(table(rows))
        print(f"predictions: {file}", flush=True)
    if failures:
        print(f"error: {len(failures)} of {len(inputs)} images cannot be read", file=sys.stderr)
    return 1 if failures else 0


def images_of(values: Sequence[str]) -> list[str]:
    """Paths of the images that files, folders and patterns name, with commas between several.

    Raises:
      UserError: one of them names no image.
    """
    found = []
    for value in values:
        # A comma, or a bracket of a pattern, may be part of a file's name.
        parts = [value] if os.path.exists(value) else value.split(",")
        for part in filter(None, map(str.strip, parts)):
            found += _matching(part) if glob.has_magic(part) else find_images(part)
    if not found:
        raise UserError(f"{', '.join(values)!r} names no image; give files, folders or patterns")
    return found


def _matching(pattern: str) -> list[str]:
    if os.path.exists(pattern):
        return find_images(pattern)
    paths = sorted(glob.glob(os.path.expanduser(pattern), recursive=True))
    found = [path for path in paths if is_image(Path(path)) and os.path.isfile(path)]
    for folder in filter(os.path.isdir, paths):
        found += images_below(Path(folder))
    if not found:
        raise UserError(f"no image is called {pattern!r}; put the pattern between quotes")
    return list(dict.fromkeys(found))  # "**" names what is in a folder, and the folder


def texts_of(values: Sequence[str], columns: Sequence[str]) -> list[str | tuple[str, ...]]:
    """Texts, or pairs with a tab between them: given as they are, or a line each of a file.

    ``@FILE``, the name of a file and ``-`` (standard input) stand for the lines in them; empty ones
    are left out. A text that begins with @ must therefore be put into a file.

    Raises:
      UserError: a file cannot be read, or a line is no pair where the model takes pairs.
    """
    texts = []
    for value in values:
        if value == "-":
            lines, where = _lines("standard input", sys.stdin.buffer.read()), "standard input"
        elif value.startswith("@") or os.path.isfile(value):
            where = os.path.expanduser(value.removeprefix("@"))
            lines = _lines(where, _contents(where))
        else:
            lines, where = [(1, value)], "--predict"
        for number, line in lines:
            parts = tuple(line.split("\t")) if len(columns) > 1 else (line,)
            if len(parts) != len(columns):
                raise UserError(
                    f"{where}, line {number}: this model takes {len(columns)} texts "
                    f"({', '.join(columns)}) with a tab between them, not {len(parts)}"
                )
            texts.append(parts if len(columns) > 1 else line)
    if not texts:
        raise UserError(f"there is no text in {', '.join(values)}")
    return texts


def _contents(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); a text that begins with @ must be in a file"
        ) from None


def _lines(where: str, data: bytes) -> list[tuple[int, str]]:
    """The lines with something in them, and their numbers."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{where}, line {line}: is no UTF-8; save it as UTF-8") from None
    # Not splitlines, which ends a line at many a control character too.
    lines = enumerate(text.replace("\r\n", "\n").split("\n"), 1)
    return [(number, line) for number, line in lines if line.strip()]


def to_csv(rows: Sequence[Prediction]) -> str:
    """The predictions with a heading.

    >>> to_csv([Prediction("a, b", "cat", 0.75)])
    'input,label,probability\\n"a, b",cat,0.75\\n'
    """
    heading, lines = _cells(rows, "{:.6g}")
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(heading)
    writer.writerows(lines)
    return file.getvalue()


def table(rows: Sequence[Prediction]) -> str:
    """The predictions in aligned columns, long inputs and many rows cut short.

    >>> print(table([Prediction("a.png", "cat", 0.75), Prediction("photo.png", "tiger", 0.5)]))
    input      label  probability
    a.png      cat         0.7500
    photo.png  tiger       0.5000
    """
    heading, lines = _cells(rows[:SHOWN], "{:.4f}")
    lines = [[_short(line[0]), *map(_visible, line[1:])] for line in lines]
    widths = [max(map(len, column)) for column in zip(heading, *lines, strict=True)]

    def aligned(line):
        cells = [f"{cell:<{width}}" for cell, width in zip(line[:-1], widths, strict=False)]
        return "  ".join([*cells, f"{line[-1]:>{widths[-1]}}"])

    more = [f"... and {len(rows) - SHOWN:,} more"] if len(rows) > SHOWN else []
    return "\n".join([*map(aligned, [heading, *lines]), *more])


def _cells(rows: Sequence[Prediction], number: str) -> tuple[list[str], list[list[str]]]:
    """The heading and the lines of ``rows``, which are all classes or all values."""
    names = [row.input if isinstance(row.input, str) else "\t".join(row.input) for row in rows]
    pairs = zip(names, rows, strict=True)
    if rows[0].label is None:
        return ["input", "value"], [[name, number.format(row.value)] for name, row in pairs]
    heading = ["input", "label", "probability"]
    return heading, [[name, row.label, number.format(row.probability)] for name, row in pairs]


def _short(text: str) -> str:
    """A text's beginning, or a path's end, which tells it from others."""
    text = _visible(text)
    if len(text) <= WIDTH:
        return text
    return f"...{text[3 - WIDTH :]}" if is_image(Path(text)) else f"{text[: WIDTH - 3]}..."


def _visible(text: str) -> str:
    """Without what would move the cursor, or could not be printed."""
    return "".join(c if c.isprintable() else " " for c in text)


def _writable(file: Path) -> Path:
    """``file``, if it can be written: said before the work is done."""
    if file.is_dir():
        raise UserError(f"--out={file} is a folder; name a file in it, such as {file / FILE}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out={file} cannot be written ({error.strerror})") from None
    if not os.access(file.parent, os.W_OK):
        raise UserError(f"{file.parent} cannot be written to; name another file with --out=FILE")
    return file
