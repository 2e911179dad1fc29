"""The next token of each row: greedy, or drawn at a temperature from the most probable tokens.

The filters are those of transformers' ``TemperatureLogitsWarper``, ``TopKLogitsWarper`` and
``TopPLogitsWarper``, in this order. All values are arguments of the compiled program, not part of
it: another temperature compiles nothing.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from rmlora_jax.errors import UserError

COLDEST, HOTTEST = 1e-3, 1e3  # temperatures at which float32 logits stay finite, and differ
LARGEST = 2**31 - 1


class Sampling(NamedTuple):
    """How the next token is chosen.

    Attributes:
      temperature: the logits are divided by it; 0 takes the most probable token.
      top_k: tokens below the k-th largest logit are left out (those equal to it stay); 0 keeps all.
      top_p: the least probable tokens whose probabilities sum to 1 - top_p at most are left out,
        but never the most probable one; 1 keeps all.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0


def check_sampling(sampling: Sampling) -> Sampling:
    """``sampling``, if its values are allowed.

    Raises:
      UserError: the name of a value that is not, and what is allowed.

    >>> check_sampling(Sampling(0.7, 50, 0.9))
    Sampling(temperature=0.7, top_k=50, top_p=0.9)
    >>> check_sampling(Sampling(top_p=2))
    Traceback (most recent call last):
    rmlora_jax.errors.UserError: top_p is 2; it must be above 0 and at most 1 (1 keeps all tokens)
    """
    temperature, top_k, top_p = sampling
    if not (_is_number(temperature) and (temperature == 0 or COLDEST <= temperature <= HOTTEST)):
        raise UserError(f"temperature is {temperature!r}; it must be 0 (the most probable token), "
                        f"or from {COLDEST} to {HOTTEST:g}")
    if type(top_k) is not int or not 0 <= top_k <= LARGEST:
        raise UserError(f"top_k is {top_k!r}; it must be a whole number, at least 1, or 0 to keep "
                        "all tokens")
    if not (_is_number(top_p) and 0 < top_p <= 1):
        raise UserError(f"top_p is {top_p!r}; it must be above 0 and at most 1 (1 keeps all "
                        "tokens)")
    return sampling


def _is_number(value) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def filtered(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """The logits of the distribution that a token is drawn from.

    Args:
      logits: (B, V), V tokens.
      sampling: numbers or scalar arrays; ``temperature`` is above 0.

    Returns:
      float32 (B, V): ``logits / temperature``, and -inf for each token that is left out. Of tokens
      with equal logits at the border of ``top_p`` those with the larger numbers stay.

    >>> logits = jnp.log(jnp.array([[0.1, 0.6, 0.3]]))
    >>> jnp.exp(filtered(logits, Sampling(1.0, 0, 0.8))).round(3)
    Array([[0. , 0.6, 0.3]], dtype=float32)
    """
    scaled = logits.astype(jnp.float32) / sampling.temperature
    size = scaled.shape[-1]

    def kept(scaled):
        number = jnp.broadcast_to(jnp.arange(size), scaled.shape)
        ordered, order = lax.sort((scaled, number), dimension=-1, is_stable=True, num_keys=1)
        k = jnp.where(jnp.asarray(sampling.top_k) == 0, size, sampling.top_k)
        least = jnp.take(ordered, size - jnp.minimum(k, size), axis=-1)[..., None]
        ordered = jnp.where(ordered < least, -jnp.inf, ordered)
        below = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1)
        out = (below <= 1 - jnp.asarray(sampling.top_p, jnp.float32)).at[..., -1].set(False)
        ordered = jnp.where(out & (jnp.asarray(sampling.top_p) < 1), -jnp.inf, ordered)
        rows = jnp.arange(len(scaled))[:, None]
        return jnp.zeros_like(scaled).at[rows, order].set(ordered, unique_indices=True)

    some = ((jnp.asarray(sampling.top_k) > 0) & (jnp.asarray(sampling.top_k) < size)) | (
        jnp.asarray(sampling.top_p) < 1
    )
    return lax.cond(some, kept, lambda scaled: scaled, scaled)  # sorting is what takes long


def as_arguments(sampling: Sampling) -> Sampling:
    """The same as scalar arrays, so that a program that takes them is compiled once."""
    kinds = np.float32, np.int32, np.float32
    values: Any = [kind(value) for kind, value in zip(kinds, sampling, strict=True)]
    return Sampling(*values)


def row_keys(seed, rows: ArrayLike) -> jax.Array:
    """A key (B,) for each row, from ``seed`` and the number of the row's prompt (B,) alone."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), rows)


def next_tokens(
    logits: jax.Array, keys: jax.Array, positions: jax.Array, sampling: Sampling
) -> jax.Array:
    """The next token of each row, int32 (B,).

    A draw depends on its row's key and position alone, so neither on the other rows of the batch
    nor on how far these are.

    Args:
      logits: (B, V).
      keys: (B,), of `row_keys`.
      positions: int32 (B,), at which the tokens will stand.
      sampling: numbers or scalar arrays.

    >>> keys, places = row_keys(0, jnp.arange(1)), jnp.array([7])
    >>> next_tokens(jnp.array([[0.0, 2.0, 1.0]]), keys, places, Sampling()).tolist()
    [1]
    """
    temperature = jnp.asarray(sampling.temperature, jnp.float32)

    def drawn(logits):
        own = jax.vmap(jax.random.fold_in)(keys, positions)
        chosen = filtered(logits, sampling._replace(temperature=temperature))
        return jax.vmap(jax.random.categorical)(own, chosen)

    def greedy(logits):
        return jnp.argmax(logits, axis=-1)

    return lax.cond(temperature > 0, drawn, greedy, logits).astype(jnp.int32)
