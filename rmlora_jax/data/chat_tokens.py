"""Chats as tokens: encoded once and cached, and what becomes of those that are too long."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rmlora_jax.data.chat import Chats
from rmlora_jax.data.dataset import BadRecord, Skipped
from rmlora_jax.data.tokens import Tokens
from rmlora_jax.errors import UserError, progress
from rmlora_jax.files import read_arrays, write_arrays

FORMAT = 1  # of the cached tokens
TOO_LONG = ("cut", "skip", "refuse")

Encoded = tuple[np.ndarray, np.ndarray]  # tokens int32 (n,), wanted bool (n,)
Read = Callable[[int], tuple[np.ndarray, np.ndarray, str]]


class Counts(NamedTuple):
    """What became of the examples: kept whole or cut, their targets too, or skipped as too long."""

    examples: int
    cut: int
    cut_targets: int
    skipped: int


class EncodedChats(NamedTuple):
    """Chats as tokens.

    Attributes:
      tokens: of each different row, once; ``tokens.types`` is 1 for a target of the loss.
      order: int64 (m,), the examples of a pass as numbers in ``tokens``.
      counts: of the different rows.
    """

    tokens: Tokens
    order: np.ndarray
    counts: Counts


def fit(
    tokens: np.ndarray, wanted: np.ndarray, length: int, bos: int | None = None
) -> Encoded:
    """The last ``length`` tokens up to the last target, after the ``bos`` that they begin with.

    The model sees no token after the last target, so that one goes first.

    >>> fit(np.arange(6), np.array([0, 0, 1, 1, 1, 0], bool), 3, bos=0)
    (array([0, 3, 4]), array([False,  True,  True]))
    """
    if len(tokens) <= length:
        return tokens, wanted
    end = int(np.flatnonzero(wanted)[-1]) + 1 if wanted.any() else len(tokens)
    kept = np.arange(max(0, end - length), end)
    if bos is not None and tokens[0] == bos and kept[0] > 0:
        kept[0] = 0
    return tokens[kept], wanted[kept]


def reader(
    chats: Chats,
    encode: Callable[[Mapping[str, Any]], Encoded],
    length: int,
    *,
    too_long: str = "cut",
    bos: int | None = None,
) -> Read:
    """A function from the number of an example to its tokens, targets and what became of it.

    That is "whole", "cut", "cut_targets" (targets were cut, too) or "skipped" (too long).

    Args:
      encode: ``hub.encode`` with all arguments but the example.
      length: the most tokens of an example, at least 2.
      too_long: "cut" from the left, see `fit`; "skip"; or "refuse".
      bos: the tokenizer's first token, which stays.

    The function raises `BadRecord`: the row is no example, its template refuses it, it has no
    target, or it is too long and refused.
    """

    def read(index: int) -> tuple[np.ndarray, np.ndarray, str]:
        example = chats[index]
        try:
            tokens, wanted = encode(example)
        except UserError as error:
            raise BadRecord(f"{chats.where(index)}: {error}") from None
        if not wanted[1:].any():
            messages = example.get("messages")
            said = messages is None or any(one["role"] == "assistant" for one in messages)
            why = "" if said else ": it has no message of the assistant"
            raise BadRecord(f"{chats.where(index)}: no target tokens{why}; delete the row")
        if len(tokens) <= length:
            return tokens, wanted, "whole"
        if too_long == "refuse":
            raise BadRecord(
                f"{chats.where(index)}: {len(tokens):,} tokens, where config.sft.length={length}\n"
                "Type a larger one, or --config.sft.too_long=cut or --config.sft.too_long=skip"
            )
        if too_long == "skip":
            return tokens[:0], wanted[:0], "skipped"
        short, left = fit(tokens, wanted, length, bos)
        return short, left, "cut" if left.sum() == wanted.sum() else "cut_targets"

    return read


def encode_chats(
    chats: Chats,
    read: Read,
    skipped: Skipped,
    *,
    cache: Path | None = None,
    desc: str = "encoding",
) -> EncodedChats:
    """All chats as tokens in memory.

    Args:
      read: of `reader`, for these chats.
      skipped: takes the records that cannot be used.
      cache: file of the tokens, see `cache_file`, or None. A damaged one is made again.

    Raises:
      UserError: too many records cannot be used, or no example is left.
    """
    first = np.unique(chats.ids, return_index=True)[1]
    fields = (*Tokens._fields, "kept", "counts")
    if cache and (found := read_arrays(cache, fields)):
        tokens, kept, counts = Tokens(*found[:3]), found[3], Counts(*found[4].tolist())
        if len(tokens.offsets) != len(kept) + 1:
            found = None
    else:
        found = None
    if not found:
        ids, types, kept, fates = [], [], [], []
        before = len(skipped.records)
        with progress(len(first), desc, " chats", disable=len(first) < 5000) as bar:
            for number, index in enumerate(first.tolist()):
                bar.update()
                try:
                    own, wanted, fate = read(index)
                except BadRecord as error:
                    skipped.add(error)
                    continue
                fates.append(fate)
                if len(own):
                    ids.append(own)
                    types.append(wanted)
                    kept.append(number)
        if not kept:
            raise UserError(f"{desc}: no example is left of {len(chats)}; the rest is too long or "
                            "cannot be used")
        offsets = np.cumsum([0, *map(len, ids)], dtype=np.int64)
        tokens = Tokens(np.concatenate(ids).astype(np.int32),
                        np.concatenate(types).astype(np.uint8), offsets)
        cut, both = fates.count("cut"), fates.count("cut_targets")
        counts = Counts(len(kept), cut + both, both, fates.count("skipped"))
        kept = np.array(kept, np.int64)
        if cache and len(skipped.records) == before:
            write_arrays(cache, {**tokens._asdict(), "kept": kept, "counts": np.array(counts)})
    # Rows that were left out are in no pass.
    numbers = np.full(len(first), -1, np.int64)
    numbers[kept] = np.arange(len(kept))
    order = numbers[np.unique(chats.ids, return_inverse=True)[1]]
    return EncodedChats(tokens, order[order >= 0], counts)


def cache_file(folder: Path, chats: Chats, key: str, **options: Any) -> Path:
    """Where the tokens of these chats are kept: a name made of all that decides them.

    Args:
      key: of what encodes them, ``hub.chat_template.fingerprint``.
      **options: of `reader`, beside ``encode``.
    """
    digest = hashlib.sha256(json.dumps([FORMAT, key, options], sort_keys=True).encode())
    for i in np.unique(chats.ids, return_index=True)[1].tolist():
        try:
            content = chats.content(i)
        except BadRecord as error:
            content = str(error).encode("utf-8", "surrogatepass")
        digest.update(len(content).to_bytes(8, "little") + content)
    return folder / f"{digest.hexdigest()}.npz"
