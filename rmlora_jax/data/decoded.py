"""Decoded images on disk, so that the next run of the same data starts at once."""

import contextlib
import hashlib
import io
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL

from rmlora_jax.data.dataset import ImageSource
from rmlora_jax.files import write_bytes_atomic

FORMAT = "1"

Arrays = tuple[np.ndarray, np.ndarray]


def cached(
    source: ImageSource, size: int | None, folder: os.PathLike, make: Callable[[], Arrays]
) -> Arrays:
    """The images and labels that ``make`` returns, from ``folder`` if they are there already.

    They are found by what ``source`` is: the files it reads, their sizes and times, the split, the
    examples chosen from it, and ``size``. A source that cannot say, a file that is damaged and a
    folder that cannot be written cost time alone.
    """
    name = fingerprint(source, size)
    if name is None:
        return make()
    path = Path(folder).expanduser() / f"{name}.npz"
    found = _read(path, len(source))
    if found is None:
        found = make()
        _write(path, *found)
    return found


def fingerprint(source: ImageSource, size: int | None) -> str | None:
    """Hexadecimal SHA-256 of all that decides the decoded images; None where it is not known."""
    identity = source.identity() if hasattr(source, "identity") else None
    if identity is None:
        return None
    return hashlib.sha256(f"{FORMAT} {PIL.__version__} {size} {identity}".encode()).hexdigest()


def _write(path: Path, images: np.ndarray, labels: np.ndarray) -> None:
    file = io.BytesIO()
    np.savez(file, images=images, labels=labels)
    with contextlib.suppress(OSError):
        write_bytes_atomic(path, file.getvalue())


def _read(path: Path, n: int) -> Arrays | None:
    try:
        with np.load(path, allow_pickle=False) as file:  # each array's checksum is verified
            images, labels = file["images"], file["labels"]
    except Exception:  # numpy, zipfile and zlib raise many kinds for a damaged file
        return None
    whole = images.dtype == np.uint8 and images.ndim == 4 and len(images) == len(labels) == n
    return (images, labels) if whole and labels.dtype == np.int32 else None
