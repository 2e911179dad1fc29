"""New special tokens of a language model: in its tokenizer, its embedding and its head."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict

from rmlora_jax.errors import UserError
from rmlora_jax.hub.pretrained import Pretrained
from rmlora_jax.hub.tokenizer import load_tokenizer
from rmlora_jax.models.family import flat_params
from rmlora_jax.models.new_tokens import TABLES


def tokenizer_of(base: Pretrained) -> Any:
    """The tokenizer of a language model, with the tokens that were added to it.

    Raises:
      UserError: as `load_tokenizer`.
    """
    tokenizer = load_tokenizer(base.tokenizer or base.folder, padding=False)
    _add(tokenizer, base.tokens)
    return tokenizer


def _add(tokenizer: Any, tokens: Sequence[str]) -> None:
    from tokenizers import AddedToken

    new = [AddedToken(text, normalized=False, special=True) for text in tokens]
    tokenizer.add_tokens(new, special_tokens=True)


def with_tokens(base: Pretrained, tokens: Sequence[str]) -> Pretrained:
    """A language model with new special tokens, whose rows are trained.

    A token that the tokenizer has already stays as it is, without a new row. The others get the
    next numbers. Embedding and head grow where a number has no row; a table that is longer than the
    vocabulary, as Qwen's, has some to spare. A new row begins as the mean of the rows of all tokens
    that the tokenizer had, in the embedding and in the head.

    Args:
      base: as loaded, or as `adapter_base` gives it.
      tokens: their texts.

    Returns:
      ``base`` with longer tables, ``tokens`` and ``rows``, and a note on each kind of token in
      ``notes``.

    Raises:
      UserError: as `load_tokenizer`; the tokenizer cannot add them.

    ::

        base = with_tokens(load_pretrained("smollm2-135m-instruct"), ("<think>", "</think>"))
        base.rows, base.config.vocab_size   # (49152, 49153), 49154
        tokenizer_of(base)("<think>").input_ids
    """
    if not tokens:
        return base
    tokenizer = tokenizer_of(base)
    known = tokenizer.get_vocab()
    there, new = ([t for t in tokens if (t in known) is has] for has in (True, False))
    notes = [f"tokens of {base.source} already, which get no new row: {', '.join(there)}"]
    if not new:
        return base._replace(notes=(*base.notes, *notes))
    _add(tokenizer, new)
    ids = [tokenizer.convert_tokens_to_ids(text) for text in new]
    if len(set(ids)) < len(new) or min(ids) <= max(known.values()):
        raise UserError(f"{base.source}: its tokenizer cannot add the tokens {', '.join(new)}; "
                        "choose others")
    old, size = base.config.vocab_size, max(base.config.vocab_size, max(ids) + 1)
    spare = [f"{t} ({i:,})" for t, i in zip(new, ids, strict=True) if i < old]
    grown = [f"{t} ({i:,})" for t, i in zip(new, ids, strict=True) if i >= old]
    if spare:
        notes.append(f"new tokens that use spare rows of embedding and head: {', '.join(spare)}")
    if grown:
        notes.append(f"new tokens, for which embedding and head grow from {old:,} to {size:,} "
                     f"rows: {', '.join(grown)}")
    return with_mean_rows(base, size, ids, 1 + max(known.values()))._replace(
        tokens=(*base.tokens, *new),
        rows=tuple(sorted({*base.rows, *ids})),
        notes=(*base.notes, *notes[not there :]),
    )


def with_mean_rows(
    base: Pretrained, size: int, rows: Sequence[int], known: int
) -> Pretrained:
    """A language model of ``size`` tokens, with the mean of its first ``known`` rows as the
    ``rows`` of embedding and head."""
    flat = flat_params(base.params)
    for path, (_, axis) in TABLES.items():
        if path in flat:
            old = np.moveaxis(np.asarray(flat[path]), axis, 0)
            table = np.pad(old, ((0, size - len(old)), (0, 0)))
            table[list(rows)] = old[:known].mean(0, dtype=np.float64)
            flat[path] = np.moveaxis(table, 0, axis)
    return base._replace(
        config=dataclasses.replace(base.config, vocab_size=size),
        params=unflatten_dict(flat, sep="/"),
        num_labels=size,
    )
