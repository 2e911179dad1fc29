"""``rmlora predict --workdir=DIR ...``: answers on the terminal and in a file."""

import csv
import io
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from rmlora_jax import called
from rmlora_jax.data.folder import is_image
from rmlora_jax.errors import UserError
from rmlora_jax.files import is_writable, write_bytes_atomic
from rmlora_jax.inference import written
from rmlora_jax.inference.classifier import Classifier, NotFinite, Prediction
from rmlora_jax.inference.generator import Generator
from rmlora_jax.inference.loading import load
from rmlora_jax.parallel import memory
from rmlora_jax.parallel.mesh import use_compilation_cache

FILE = "predictions.csv"
CACHE = "~/.cache/rmlora_jax/xla"  # of compiled programs; the trainer's, unless it was told another
SHOWN = 100  # rows on the terminal
WIDTH = 60  # letters of an input on the terminal


def predict(
    workdir: str | None,
    values: Sequence[str],
    *,
    at_once: int | None = None,
    out: str | None = None,
    find: Callable[[str], Any] = load,
    **options: Any,
) -> int:
    """Predicts, prints and writes; returns the exit status, 1 if an input has no prediction.

    Args:
      workdir: what `load` accepts.
      values: as given to ``--predict``, see `inputs.images_of`, `inputs.texts_of` and
        `prompts.prompts_of`.
      at_once: inputs in one batch; None: 64, or 16 prompts of a language model.
      out: file to write: by default ``predictions.csv`` in ``workdir``, with the columns input,
        label and probability, or input and value (a pair of texts is joined by a tab); of a
        language model ``answers.jsonl``, see `written.to_lines`.
      find: workdir -> the model.
      options: ``top``, classes of each input; of a language model those of
        `generator.Options`.

    Raises:
      UserError: nothing can be predicted, in words for the terminal.
    """
    values = [value for value in values if value.strip()]
    if not workdir:
        predict = called.command("predict", "--workdir=DIR", "...")
        raise UserError(f"whose predictions? Type {predict}")
    if not values:
        predict = called.command("predict", f"--workdir={workdir}", "...")
        raise UserError(f"nothing to predict: type {predict}")
    if jax.config.jax_compilation_cache_dir is None:
        use_compilation_cache(CACHE)
    fewer = (at_once or 64) // 8
    advice = [f"--at_once={fewer}"] if fewer else []
    with memory.told(lambda: memory.of_a_model(f"the model in {workdir}", advice)):
        return _predict(workdir, values, at_once, out, find, options)


def _predict(workdir: str, values, at_once: int | None, out: str | None, find, options) -> int:
    model = find(workdir)
    name, known, rows_of = WAYS[type(model)]
    if unknown := [option for option in options if option not in known]:
        raise UserError(f"--{unknown[0]} does not go with the model in {workdir}; it takes "
                        f"{', '.join(f'--{option}' for option in known)}")
    file = _writable(Path(out).expanduser() if out else _inside(workdir) / name)
    failures = []

    def failed(error: UserError) -> None:
        failures.append(error)
        tqdm.write(f"error: {error}", file=sys.stderr)  # print would tear the progress bar

    if at_once:
        options = {"batch_size": at_once} | options
    content, shown, number = rows_of(model, values, failed, options)
    if content:
        # A file's name need not be text.
        write_bytes_atomic(file, content.encode("utf-8", "surrogateescape"))
        print(shown)
        print(f"predictions: {file}", flush=True)
    unread = sum(not isinstance(error, NotFinite) for error in failures)
    if unread:
        print(f"error: {unread} of {number} images cannot be read", file=sys.stderr)
    return 1 if failures else 0


def _inside(workdir: str) -> Path:
    """The folder for a file beside a model, which may be a file itself."""
    place = Path(workdir).expanduser()
    return place.parent if place.is_file() else place


def _classified(
    model: Classifier, values: Sequence[str], failed: Callable, options: Mapping[str, Any]
) -> tuple[str, str, int]:
    """The predictions as CSV and as a table, and how many inputs there are."""
    inputs = model.read.from_arguments(values)
    with warnings.catch_warnings():
        # On palettes with alpha, and on large images that it reads all the same.
        warnings.filterwarnings("ignore", module="PIL")
        rows = model(inputs, failed=failed, **options)
    return (to_csv(rows), table(rows), len(inputs)) if rows else ("", "", len(inputs))


# Of each kind of model: its file, its options, and what reads, answers and formats:
# (model, values, failed, options) -> (content of the file, text for the terminal, inputs).
WAYS: dict[type, tuple[str, tuple[str, ...], Callable[..., tuple[str, str, int]]]] = {
    Classifier: (FILE, ("top",), _classified),
    Generator: (written.FILE, written.OPTIONS, written.answered),
}


def to_csv(rows: Sequence[Prediction]) -> str:
    """The predictions with a heading.

    >>> to_csv([Prediction("a, b", "cat", 0.75)])
    'input,label,probability\\n"a, b",cat,0.75\\n'
    """
    heading, lines = _cells(rows, "{:.6g}")
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([heading, *lines])
    return file.getvalue()


def table(rows: Sequence[Prediction]) -> str:
    """The predictions in aligned columns, long inputs and many rows cut short.

    >>> print(table([Prediction("a.png", "cat", 0.75), Prediction("photo.png", "tiger", 0.5)]))
    input      label  probability
    a.png      cat         0.7500
    photo.png  tiger       0.5000
    """
    heading, lines = _cells(rows[:SHOWN], "{:.4f}")
    lines = [
        [_short(first), *(written.printable(part, "") for part in others)]
        for first, *others in lines
    ]
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
    return heading, [[name, str(row.label), number.format(row.probability)] for name, row in pairs]


def _short(text: str) -> str:
    """A text's beginning, or a path's end, which tells it from others."""
    text = written.printable(text, "")
    if len(text) <= WIDTH:
        return text
    return f"...{text[3 - WIDTH :]}" if is_image(Path(text)) else f"{text[: WIDTH - 3]}..."


def _writable(file: Path) -> Path:
    """``file``, if it can be written: said before the work is done."""
    if file.is_dir():
        raise UserError(f"--out={file} is a folder; name a file in it, such as {file / FILE}")
    if not is_writable(file.parent):
        raise UserError(f"--out={file} cannot be written; name another file with --out=FILE")
    return file
