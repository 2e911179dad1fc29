"""The inputs of a trained model, in batches that equal those of the trainer's evaluation.

A reader is called as ``read(inputs, batch_size, failed) -> (names, batches)``. ``names`` are the
names of all inputs, in order. ``batches`` iterates over pairs ``(ids, arguments)``: the places of n
inputs in ``names``, and the model's arguments with b >= n rows, of which those from n on are
padding.
"""

import functools
import glob
import os
import sys
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from rmlora_jax.data import text_files
from rmlora_jax.data.dataset import Skipped
from rmlora_jax.data.folder import files_below, is_image, why_unreadable
from rmlora_jax.data.pipeline import stored_as
from rmlora_jax.data.text_files import CONVERT, has_columns, read_rows
from rmlora_jax.data.tokens import eval_text_batches, tokenise
from rmlora_jax.data.vision import SUFFIXES, augment, in_8_bits, open_image, pixels
from rmlora_jax.errors import UserError
from rmlora_jax.files import given_path
from rmlora_jax.hub.info import Info
from rmlora_jax.hub.pretrained import Pretrained
from rmlora_jax.hub.source import PREPROCESSOR
from rmlora_jax.hub.tokenizer import load_tokenizer
from rmlora_jax.models.family import IMAGES, TEXTS
from rmlora_jax.models.processor import Resize

THREADS = 8  # that read and decode images
KINDS = ", ".join(SUFFIXES)
NAME_COLUMNS = (
    "The model reads the columns of these names: rename those of the file, or put a text on each "
    "line of a .txt file"
)
ARGUMENTS = ("input_ids", "attention_mask", "token_type_ids")  # of a model of texts


class ImageReader:
    """Reads files, folders, images of pillow and arrays for a model of images.

    Images of one shape make a batch, which is resized and normalised by a small program of its own:
    the model's, which takes long to compile, is the same for all shapes.
    """

    def __init__(self, base: Pretrained, info: Info):
        assert base.image_size and base.image_mean and base.image_std
        channels = base.config.num_channels
        if channels != 3:
            raise UserError(f"{base.source} takes images of {channels} channels; they must have 3")
        self.info, self.image_size = info, base.image_size
        self.resize = base.image_resize if info.resize == "processor" else None
        if self.resize is None and info.resize == "processor":
            raise UserError(f"{base.source} has no {PREPROCESSOR}, which says how the images of "
                            "this model are resized; copy it there again")
        size, mean, std = base.image_size, base.image_mean, base.image_std
        options = {"train": False, "mean": mean, "std": std, "dtype": jnp.dtype(info.dtype)}
        prepare = functools.partial(augment, image_size=size, **options)
        self.prepare = jax.jit(prepare, static_argnames="center")
        self.from_arguments = images_of  # the inputs that the arguments of ``--predict`` name

    def __call__(self, inputs: Any, batch_size: int, failed: Callable) -> tuple[list, Iterable]:
        named = name_images(inputs)
        batches = _image_batches(named, self.read_image, batch_size, failed)
        prepared = (
            (ids, (self.prepare(images, center=center),)) for ids, images, center in batches
        )
        return [name for name, _ in named], prepared


    def read_image(self, image: Any) -> tuple[np.ndarray, float]:
        return read_image(image, self.info, self.image_size, self.resize)


class TextReader:
    """Reads strings, or pairs of them, for a model of texts."""

    def __init__(self, base: Pretrained, info: Info):
        longest = base.config.longest
        if longest and info.max_length > longest:
            raise UserError(f"{base.source} takes {longest} tokens, not {info.max_length}")
        self.info, self.tokenizer, self.config = info, load_tokenizer(base.folder), base.config

    def from_arguments(self, values: Sequence[str]) -> list[str | tuple[str, ...]]:
        """The inputs that the arguments of ``--predict`` name."""
        return texts_of(values, self.info.columns)

    def __call__(self, inputs: Any, batch_size: int, failed: Callable) -> tuple[list, Iterable]:
        rows = text_rows(inputs, self.info.columns)
        names = [row[0] for row in rows] if len(self.info.columns) == 1 else rows
        return names, self.batches(rows, batch_size) if rows else ()

    def batches(self, rows: list[tuple[str, ...]], batch_size: int) -> Iterator[tuple]:
        """The batches of the trainer's evaluation."""
        columns = [list(column) for column in zip(*rows, strict=True)]
        tokens = tokenise(columns, self.tokenizer, self.info.max_length, model=self.config)
        for batch in eval_text_batches(
            tokens,
            np.zeros(len(rows)),
            batch_rows(len(rows), batch_size),
            pad_id=self.tokenizer.pad_token_id,
            max_length=self.info.max_length,
        ):
            yield batch["id"][batch["mask"]], tuple(batch[name] for name in ARGUMENTS)


READERS = {IMAGES: ImageReader, TEXTS: TextReader}


def find_images(path: str | Path) -> list[str]:
    """The image at ``path``, or all below the folder ``path``, sorted, hidden ones left out."""
    path = given_path(path)
    if os.path.isdir(path):  # unlike path.is_dir() it takes names of any length
        if found := _images_below(path):
            return found
        raise UserError(f"there is no image in {path}, nor in a folder of it; known: {KINDS}")
    if not os.path.exists(path):
        raise UserError(f"there is no file or folder {str(path)[:200]!r}; check the name")
    if not is_image(path):
        raise UserError(f"{path} does not have the suffix of an image; give one of {KINDS}, or a "
                        "folder")
    return [str(path)]


def _images_below(folder: str | Path) -> list[str]:
    return [str(Path(file)) for file in files_below(folder) if is_image(file)]


def images_of(values: Sequence[str]) -> list[str]:
    """Paths of the images that files, folders and patterns name, with commas between several."""
    found = []
    for value in values:
        # A comma, or a bracket of a pattern, may be part of a file's name.
        parts = [value] if os.path.exists(value) else value.split(",")
        for part in filter(str.strip, parts):
            part = part if os.path.exists(part) else part.strip()
            plain = os.path.exists(part) or not glob.has_magic(part)
            found += find_images(part) if plain else _matching(part)
    if not found:
        raise UserError(f"{', '.join(values)!r} names no image; give files, folders or patterns")
    return found


def _matching(pattern: str) -> list[str]:
    paths = glob.glob(pattern, recursive=True)  # a name may begin with ~
    paths = sorted(paths or glob.glob(os.path.expanduser(pattern), recursive=True))
    found = [path for path in paths if is_image(path) and os.path.isfile(path)]
    for folder in filter(os.path.isdir, paths):
        found += _images_below(folder)
    if not found:
        raise UserError(f"no image is called {pattern!r}; put the pattern between quotes")
    return list(dict.fromkeys(found))  # "**" names what is in a folder, and the folder


def name_images(inputs: Any) -> list[tuple[str, Any]]:
    """Pairs (name, image) of the inputs of a model of images; a path is its own name."""
    if isinstance(inputs, str | Path | Image.Image):
        inputs = [inputs]
    elif hasattr(inputs, "ndim") and inputs.ndim != 4:
        raise UserError(f"images must be uint8 (n, H, W, C) or a list, got an array {inputs.shape}")
    named = []
    for number, image in enumerate(inputs):
        if isinstance(image, str | Path):
            named += [(path, path) for path in find_images(image)]
        else:
            named.append((str(getattr(image, "filename", "") or f"image {number}"), image))
    return named


def read_image(
    image: Any, info: Info, image_size: int, resize: Resize | None = None
) -> tuple[np.ndarray, float]:
    """One image as the trainer holds it, uint8 (H, W, C), and the part of its side that is used.

    ``resize`` makes the model's square of it. Otherwise, with ``info.stored_size`` the middle
    square is resized to that side, as in training. Without both, the training images were small
    squares of one size: small squares stay as they are, and any other image is treated as
    `data.plan_storage` treats a data set of such images, which makes it a square and cuts its
    margin. Photos are turned as their EXIF orientation says, as in training.

    ``image`` is a path, an image of pillow, or a uint8 array (H, W, C) with C 1, 3 or 4. A file
    that is damaged, or larger than pillow thinks wise, raises an Exception of any kind.
    """
    if isinstance(image, str | Path):
        image = open_image(Path(image).read_bytes())
    elif isinstance(image, Image.Image):
        # A copy, since what follows may change how its file is read. It no longer knows its format.
        image = in_8_bits(image).copy()
    else:
        array = np.asarray(image)
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] not in (1, 3, 4):
            raise ValueError(f"must be uint8 (H, W, 1, 3 or 4), got {array.dtype} {array.shape}")
        image = Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)
    if resize is not None:
        return pixels(image, info.channels, resize), 1.0
    width, height = image.size
    size, center = info.stored_size, info.center
    if size is None:
        size, new = stored_as((height, width), image_size)
        center = center if size is None else new
    return pixels(image, info.channels, size), center


def _image_batches(named, read_one, batch_size, failed) -> Iterator[tuple]:
    """(ids, uint8 (b, H, W, C), center) of all of ``named``; threads read files ahead."""

    def read(item):
        name, image = item
        try:
            return read_one(image)
        except Exception as error:  # pillow raises many kinds
            return UserError(f"{name} cannot be read as an image: {why_unreadable(error)}")

    rows = batch_rows(len(named), batch_size)
    waiting = defaultdict(list)
    for number, found in enumerate(_ahead(read, named, 2 * batch_size)):
        if isinstance(found, UserError):
            if failed is None:
                raise found
            failed(found)
            continue
        array, center = found
        key = array.shape, center
        waiting[key].append((number, array))
        if len(waiting[key]) == rows:
            yield _stacked(waiting.pop(key), center, rows)
    for (_, center), images in waiting.items():
        yield _stacked(images, center, rows)


def _stacked(images: list[tuple[int, np.ndarray]], center: float, rows: int) -> tuple:
    ids, arrays = zip(*images, strict=True)
    padding = [arrays[0]] * (rows - len(arrays))
    return list(ids), np.stack([*arrays, *padding]), center


def _ahead(function: Callable, items: Iterable, most: int) -> Iterator:
    """``map`` in threads, in order, with at most ``most`` results waiting."""
    pool, waiting = ThreadPoolExecutor(THREADS), deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > most:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def batch_rows(n: int, batch_size: int) -> int:
    """Rows of the batches of ``n`` inputs: a power of two for a few, so that few programs compile.

    >>> [batch_rows(n, 48) for n in (1, 3, 40, 1000)]
    [1, 4, 48, 48]
    """
    return min(1 << (n - 1).bit_length(), batch_size)


def text_rows(inputs: Any, columns: Sequence[str]) -> list[tuple[str, ...]]:
    """Each text, or pair of texts, as a tuple with a string for each of ``columns``."""
    inputs = [inputs] if isinstance(inputs, str) else inputs
    wanted = "a string" if len(columns) == 1 else f"a pair of strings ({', '.join(columns)})"
    rows = []
    for number, text in enumerate(inputs):
        row = (text,) if isinstance(text, str) else text
        fits = isinstance(row, tuple | list) and len(row) == len(columns)
        if not fits or not all(isinstance(part, str) for part in row):
            raise UserError(f"input {number} is {repr(text)[:80]}; this model takes {wanted} each")
        rows.append(tuple(row))
    return rows


def texts_of(values: Sequence[str], columns: Sequence[str]) -> list[str | tuple[str, ...]]:
    """The texts, or pairs of texts, that the arguments of ``--predict`` name, in order.

    ``@FILE`` or the name of a file stands for its texts, ``-`` for the lines of standard input; any
    other argument is a text. Of a file .csv, .tsv or .jsonl the ``columns`` are read, and nothing
    else of it. Any other file has a text on each line, and empty lines are left out. The two texts
    of a pair have a tab between them, also in a .tsv file without a heading. A text that begins
    with @ must be put into a file.
    """
    texts = []
    for value in values:
        file = file_of(value)
        if file is not None and _is_table(file, columns):
            rows, _ = read_rows(file, columns, None, Skipped(), NAME_COLUMNS)
            texts += zip(*rows.texts, strict=True) if len(columns) > 1 else rows.texts[0]
        else:
            texts += _texts_on_lines(value, file, columns)
    if not texts:
        raise UserError(f"there is no text in {', '.join(values)}")
    return texts


def file_of(value: str) -> Path | None:
    if value.startswith("@"):
        return given_path(value.removeprefix("@"))
    return Path(value) if os.path.isfile(value) else None


def _is_table(file: Path, columns: Sequence[str]) -> bool:
    """Whether a file has its texts in columns, by its suffix.

    Raises:
      UserError: it is of a kind that is not read.
    """
    kind = file.suffix.lower()
    if kind == ".json":
        raise UserError(f"{file}: {CONVERT}, or to a .txt file with a text on each line")
    if kind != ".tsv" or len(columns) == 1 or not file.is_file() or has_columns(file, columns):
        return kind in text_files.SUFFIXES and file.is_file()
    names = ", ".join(map(repr, columns))
    print(f"{file}: no heading with {names}; each line is read as a pair", file=sys.stderr)
    return False


def _texts_on_lines(
    value: str, file: Path | None, columns: Sequence[str]
) -> Iterator[str | tuple[str, ...]]:
    where, lines = lines_of(value, file)
    for number, line in lines:
        parts = tuple(line.split("\t")) if len(columns) > 1 else (line,)
        if len(parts) != len(columns):
            raise UserError(
                f"{where}, line {number}: this model takes {len(columns)} texts "
                f"({', '.join(columns)}) with a tab between them, not {len(parts)}"
            )
        yield parts if len(columns) > 1 else line


def lines_of(value: str, file: Path | None) -> tuple[str, list[tuple[int, str]]]:
    """Where the texts of an argument are, and its lines that are not empty, with their numbers."""
    if value == "-":
        where, data = "standard input", sys.stdin.buffer.read()
    elif file is not None:
        where = str(file)
        try:
            data = file.read_bytes()
        except OSError as error:
            raise UserError(f"{where} cannot be read ({error.strerror}); a text that begins with @ "
                            "must be in a file") from None
    else:
        return "--predict", [(1, value)]
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{where}, line {line}: not UTF-8; save it as UTF-8") from None
    # Not splitlines, which ends a line at many a control character too.
    lines = enumerate(text.replace("\r\n", "\n").split("\n"), 1)
    return where, [(number, line) for number, line in lines if line.strip()]
