"""Rows of embedding and head that are parameters of their own: those of tokens that are new.

The tables of a vocabulary stay as they are, without gradients: two rows of 128,000 are trained.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from rmlora_jax.models.blocks import Parts
from rmlora_jax.models.family import flat_params

NAME = "new_tokens"
# The tables that have a row, or a column, for each token: path -> (that of the rows, axis).
TABLES = {"embed/embedding": (f"{NAME}/embed", 0), "head/kernel": (f"{NAME}/head", 1)}


class Rows(NamedTuple):
    """What stands in the place of some rows of embedding and head.

    Attributes:
      tokens: the numbers of n tokens, ascending.
      embed: (n, D), their embeddings.
      head: (n, D), what makes their logits; ``embed`` where the embedding is the head.
    """

    tokens: tuple[int, ...]
    embed: Any = None
    head: Any = None

    def embedded(self, input_ids: jax.Array, x: jax.Array) -> jax.Array:
        """Embeddings ``x`` (B, N, D) of int (B, N), with the rows of these tokens in place."""
        if not self.tokens:
            return x
        own = input_ids[..., None] == jnp.asarray(self.tokens, input_ids.dtype)
        rows = self.embed.astype(x.dtype)[own.argmax(-1)]
        return jnp.where(own.any(-1, keepdims=True), rows, x)

    def scored(self, x: jax.Array, logits: jax.Array) -> jax.Array:
        """``logits`` (B, N, V) of ``x`` (B, N, D), with those of these tokens in place."""
        if not self.tokens:
            return logits
        own = jnp.dot(x, self.head.astype(x.dtype).T).astype(logits.dtype)
        first, last = self.tokens[0], self.tokens[-1]
        if last - first + 1 == len(self.tokens):  # as new ones are; much faster than a scatter
            return jax.lax.dynamic_update_slice_in_dim(logits, own, first, axis=-1)
        return logits.at[..., np.array(self.tokens)].set(own)


class NewTokens(nn.Module):
    """The parameters of `Rows`: ``embed`` and, unless it is the head, ``head``, both (n, D)."""

    parts: Parts
    tokens: tuple[int, ...]

    @nn.compact
    def __call__(self) -> Rows:
        c, shape = self.parts.config, (len(self.tokens), self.parts.config.hidden_size)
        names = ("embed",) if c.tie_word_embeddings else ("embed", "head")
        found = [self.param(name, c.kernel_init, shape, self.parts.param_dtype) for name in names]
        return Rows(self.tokens, found[0], found[-1])


def rows_apart(params: Mapping[str, Any], tokens: Sequence[int]) -> Any:
    """Parameters of a decoder as those of one with ``new_tokens=tokens``: its rows, copied.

    >>> table = {"embed": {"embedding": np.eye(3)}}
    >>> rows_apart(table, (1,))["new_tokens"]["embed"].tolist()
    [[0.0, 1.0, 0.0]]
    """
    if not tokens:
        return params
    flat, index = flat_params(params), np.array(tokens)
    for path, (rows, axis) in TABLES.items():
        if path in flat:
            flat[rows] = np.moveaxis(np.asarray(flat[path]).take(index, axis), axis, 0)
    return unflatten_dict(flat, sep="/")


def rows_together(params: Mapping[str, Any], tokens: Sequence[int]) -> Any:
    """The inverse of `rows_apart`: the rows go back into new tables.

    >>> apart = rows_apart({"embed": {"embedding": np.eye(3)}}, (1,))
    >>> rows_together({**apart, "new_tokens": {"embed": np.full((1, 3), 7)}}, (1,))
    {'embed': {'embedding': array([[1., 0., 0.],
           [7., 7., 7.],
           [0., 0., 1.]])}}
    """
    if not tokens:
        return params
    flat, index = flat_params(params), np.array(tokens)
    for path, (rows, axis) in TABLES.items():
        if rows in flat:
            flat[path] = np.array(flat[path])
            np.moveaxis(flat[path], axis, 0)[index] = flat.pop(rows)
    return unflatten_dict(flat, sep="/")


def with_trained_rows(lora: Any, tokens: Sequence[int]) -> Any:
    """The description ``lora`` of a decoder with ``new_tokens=tokens``, whose rows are trained.

    Raises:
      ValueError: embedding or head has factors, which would change these rows, too.
    """
    if not tokens:
        return lora
    for name in ("embed", "head"):
        if lora.targets(name):
            raise ValueError(
                f"the rows of new tokens are trained in {name}, which LoRA.target "
                f"{lora.target!r} adapts, too; PEFT has no such adapter. Choose a target without "
                f"{name}, or train {name} as a whole."
            )
    train = "|".join(filter(None, [lora.train, f"{NAME}/.*"]))
    return dataclasses.replace(lora, train=train)
