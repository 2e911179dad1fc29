"""The embedding and the head of language models: one or two in the model, two in PyTorch."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict

from rmlora_jax.hub.pretrained import Pretrained
from rmlora_jax.hub.source import raw_config
from rmlora_jax.models.family import Entry, flat_params

EMBEDDING, HEAD = "embed/embedding", "head/kernel"


def tied_head(base: Pretrained) -> Entry | None:
    """The head's line in the family's table where the embedding is the head, else None."""
    if not getattr(base.config, "tie_word_embeddings", False):
        return None
    return next(entry for entry in base.family.table if entry.path == HEAD)


def untied(base: Pretrained) -> Pretrained:
    """The same model with a head of its own, equal to its embedding, which it returns as it is.

    Embedding and head can then be adapted or trained apart. The logits stay the same.
    """
    if tied_head(base) is None:
        return base
    flat = flat_params(base.params)
    return base._replace(
        config=dataclasses.replace(base.config, tie_word_embeddings=False),
        params=unflatten_dict(flat | {HEAD: flat[EMBEDDING].T}, sep="/"),
    )


def published(base: Pretrained) -> Any:
    """The config that the files of ``base`` have: without new tokens, tied or not as they are."""
    return base.family.config.from_hf(raw_config(base.folder)[1])


def was_tied(base: Pretrained) -> bool:
    """Whether the head, a parameter of its own in ``base``, is the embedding in its files."""
    if base.family.outputs is None or base.config.tie_word_embeddings:
        return False
    return published(base).tie_word_embeddings


def grown_from(base: Pretrained) -> int | None:
    """How many tokens the files of a language model have, where the model has more; else None."""
    own = published(base).vocab_size if base.family.outputs is not None else None
    return None if own is None or own >= base.config.vocab_size else own


def exchanged(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """PEFT's A (r, D) and B (V, r) of a head from A (r, V) and B (D, r) of the embedding it is.

    The embedding's update is (B A)^T (V, D), and a linear head's is B A (V, D).
    """
    return np.ascontiguousarray(b.T), np.ascontiguousarray(a.T)


def are_tied(embedding: Sequence[np.ndarray], head: Sequence[np.ndarray]) -> bool:
    """Whether the factors of a head, as PEFT keeps them, are the update of its embedding.

    >>> a, b = np.ones((2, 5)), np.ones((3, 2))
    >>> are_tied((a, b), exchanged(a, b)), are_tied((a, b), exchanged(a, 2 * b))
    (True, False)
    """
    if len(embedding) != 2 or len(head) != 2:  # DoRA's norms of the two go along different axes
        return False
    return all(map(np.array_equal, exchanged(*embedding), head))
