"""Texts as numbers: tokenised once, and kept on disk under a hash of all that they depend on."""

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rmlora_jax.data.progress import progress

FORMAT = 1  # of the cached files
CHUNK = 2048  # texts between two steps of the progress bar


class Tokens(NamedTuple):
    """The tokens of n examples, one after another.

    Attributes:
      ids: int32 (total,).
      types: uint8 (total,): which of two texts a token belongs to.
      offsets: int64 (n + 1,): example i has the tokens from ``offsets[i]`` to ``offsets[i + 1]``.
    """

    ids: np.ndarray
    types: np.ndarray
    offsets: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)


def tokenise(
    texts: Sequence[Sequence[str]],
    tokenizer,
    max_length: int,
    *,
    cache_dir: Path | None = None,
    desc: str = "tokenising",
) -> Tokens:
    """The tokens of texts, or of pairs of texts, with the tokenizer's special tokens.

    Args:
      texts: one list of strings, or two of equal length.
      tokenizer: a fast tokenizer of transformers.
      max_length: tokens of an example; a longer one is cut, of a pair the longer text first.
      cache_dir: folder of tokenised splits, made if missing; None for none. A damaged file in it
        is made anew, and two processes at once each leave a whole one.
      desc: of the progress bar.
    """
    path = cache_dir and cache_dir / f"{fingerprint(texts, tokenizer, max_length)}.npz"
    if path and (found := _cached(path, len(texts[0]))):
        return found
    n = len(texts[0])
    ids, types, lengths = [], [], np.empty(n, np.int64)
    with progress(n, desc, " texts", disable=n < 20_000) as bar:
        for start in range(0, n, CHUNK):
            part = [column[start : start + CHUNK] for column in texts]
            encoded = tokenizer(
                *part, truncation=True, max_length=max_length, return_token_type_ids=True
            )
            for i, row in enumerate(encoded["input_ids"], start):
                lengths[i] = len(row)
            ids += [np.array(row, np.int32) for row in encoded["input_ids"]]
            types += [np.array(row, np.uint8) for row in encoded["token_type_ids"]]
            bar.update(len(part[0]))
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = Tokens(np.concatenate(ids), np.concatenate(types), offsets)
    if path:
        _keep(path, tokens)
    return tokens


def fingerprint(texts: Sequence[Sequence[str]], tokenizer, max_length: int) -> str:
    """Hexadecimal SHA-256 of the texts, the tokenizer, its release and the length."""
    import tokenizers

    digest = hashlib.sha256()
    facts = [FORMAT, tokenizers.__version__, max_length, len(texts), len(texts[0])]
    digest.update(json.dumps(facts).encode())
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    # The state of earlier calls, which each call sets anew.
    backend |= {"truncation": None, "padding": None}
    digest.update(json.dumps(backend, sort_keys=True).encode())
    digest.update(f"{type(tokenizer).__name__} {tokenizer.truncation_side}".encode())
    for column in texts:
        for text in column:
            data = text.encode("utf-8", "surrogatepass")
            digest.update(len(data).to_bytes(8, "little"))
            digest.update(data)
    return digest.hexdigest()


def _cached(path: Path, n: int) -> Tokens | None:
    try:
        with np.load(path, allow_pickle=False) as file:
            found = Tokens(*(file[name] for name in Tokens._fields))
    except Exception:  # numpy, zipfile and zlib raise many kinds for a damaged file
        return None
    whole = len(found.offsets) == n + 1 and found.offsets[-1] == len(found.ids) == len(found.types)
    return found if whole else None


def _keep(path: Path, tokens: Tokens) -> None:
    """Writes the cache; a folder that cannot be written only costs the next start its time."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                np.savez(file, **tokens._asdict())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
