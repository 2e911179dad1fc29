"""What data hold, as hashes: the same wherever their files lie."""

import hashlib
import itertools
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from rmlora_jax.data.dataset import ImageSource, TextSplit
from rmlora_jax.errors import UserError

READ = 64 << 20  # bytes of a split of images that its content is known by
SEED = 0  # of the order in which they are read


class Stored(Protocol):
    """A split that gives the bytes of an example, such as a `chat.Chats`."""

    def __len__(self) -> int: ...

    def content(self, index: int) -> bytes: ...


def content_of(split: ImageSource | TextSplit | Stored) -> str:
    """Hexadecimal SHA-256 of a split's examples and labels, wherever its files lie.

    Texts are read whole. Images and chats are read as they are stored, in a fixed random order,
    until they make `READ` bytes: of a larger split this is a sample.
    """
    if isinstance(split, TextSplit):
        digest = hashlib.sha256(split.labels.tobytes())
        add_texts(digest, split.texts)
        return digest.hexdigest()
    digest, left = hashlib.sha256(), READ
    for index in np.random.RandomState(SEED).permutation(len(split)).tolist():
        try:
            data = stored(split, index)
        except (OSError, UserError):  # a bad record, which is reported where it is needed
            data = b""
        _add(digest, data)
        left -= len(data)
        if left <= 0:
            break
    return digest.hexdigest()


def hash_of(*arrays: np.ndarray) -> str:
    """Hexadecimal SHA-256 of the bytes of arrays."""
    digest = hashlib.sha256()
    for array in arrays:
        _add(digest, np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def add_texts(digest: Any, columns: Iterable[Sequence[str]]) -> None:
    """Adds every text of the columns to a digest, each with its length."""
    for text in itertools.chain.from_iterable(columns):
        _add(digest, text.encode("utf-8", "surrogatepass"))


def _add(digest: Any, data: bytes) -> None:
    digest.update(len(data).to_bytes(8, "little") + data)


def stored(source: Any, index: int) -> bytes:
    """The bytes of an example as they are stored, with its label; or else those of its pixels."""
    own = getattr(source, "content", None)
    if own is not None:
        return own(index)
    image, label = source.load(index)
    return b"%d " % label + np.asarray(image).tobytes()
