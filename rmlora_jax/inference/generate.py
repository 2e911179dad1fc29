"""Answers of a decoder as two compiled programs: one reads the prompts, one writes tokens.

Prompts of different lengths share a batch: they are padded on the left, so that all rows write the
same slots of the key-value cache. Sizes are rounded up to buckets, and there is one program for
each bucket of (rows, tokens of a prompt, slots of the cache):

* rows: a power of two;
* tokens of a prompt: a power of two, at least 16;
* slots of the cache: those of the prompt, and a power of two, at least 16, for the answer.

Weights, temperature, stop tokens and the number of tokens to write are arguments.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from rmlora_jax import join
from rmlora_jax.inference.sampling import Sampling, next_tokens
from rmlora_jax.models.cache import Cache, batch_axes

LEAST = 16  # tokens of the smallest bucket
STEPS = 32  # the most tokens that one call of the program writes
NOTHING = -1  # in place of a token


Decode = Callable[..., tuple[jax.Array, Cache]]


def decoder(model: nn.Module) -> Decode:
    """``decode(params, tokens, positions, cache)`` of a model, plain or adapted.

    It takes int32 (B, n) tokens and positions, -1 for padding, and gives the float32 logits (B, V)
    of the token after the last of them, and the cache with all of them.
    """

    def decode(params, tokens, positions, cache):
        found: Any = model.apply(
            {"params": params}, tokens, positions, cache, last=True, method="decode"
        )
        logits, cache = found
        return logits[:, -1], cache

    return decode


def with_adapters(decode: Decode) -> Decode:
    """The same, with an adapter of its own for each row.

    Its ``params`` are a pair: what all rows share, and what `rmlora_jax.join` adds to it, whose
    leaves have the rows on axis 0.
    """

    def decode_rows(params, tokens, positions, cache):
        shared, own = params
        axes = batch_axes(cache)

        def each(change: Callable, cache: Cache) -> Cache:
            def one(axis, x):
                return x if axis is None else change(x, axis)

            return jax.tree.map(one, axes, cache, is_leaf=lambda x: x is None)

        def row(adapter, tokens, positions, cache):
            params, cache = join(adapter, shared), each(jnp.expand_dims, cache)
            logits, cache = decode(params, tokens[None], positions[None], cache)
            return logits[0], each(jnp.squeeze, cache)

        rows = jax.vmap(row, in_axes=(0, 0, 0, axes), out_axes=(0, axes))
        return rows(own, tokens, positions, cache)

    return decode_rows


class State(NamedTuple):
    """A batch whose answers are being written.

    Attributes:
      cache: what the decoder keeps of the tokens so far.
      logits: float32 (B, V), of the next token.
      position: int32 (B,), of the next token.
      left: int32 (B,), how many tokens a row may still write; 0 where it has ended.
      damaged: bool (B,), rows that ended because their logits were not finite.
    """

    cache: Cache
    logits: jax.Array
    position: jax.Array
    left: jax.Array
    damaged: jax.Array


class Programs(NamedTuple):
    """The compiled functions of `compiled`."""

    start: Callable[..., State]
    write: Callable[..., tuple[State, jax.Array]]


def bucket(n: int, least: int = LEAST) -> int:
    """``n`` rounded up to a power of two that is not below ``least``.

    >>> [bucket(n) for n in (1, 16, 17, 300)]
    [16, 16, 32, 512]
    """
    return max(least, 1 << (n - 1).bit_length())


def padded(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Prompts as one batch: tokens and positions, int32 (rows, length), both in buckets.

    Padding has the position -1 and stands on the left; rows beyond the prompts are padding alone.

    >>> tokens, positions = padded([[5, 6, 7], [8]])
    >>> tokens[:, -4:].tolist(), positions[:, -4:].tolist()
    ([[0, 5, 6, 7], [0, 0, 0, 8]], [[-1, 0, 1, 2], [-1, -1, -1, 0]])
    """
    shape = bucket(len(prompts), 1), bucket(max(map(len, prompts)))
    tokens, positions = np.zeros(shape, np.int32), np.full(shape, NOTHING, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, shape[1] - len(prompt) :] = prompt
        positions[row, shape[1] - len(prompt) :] = np.arange(len(prompt))
    return tokens, positions


def compiled(decode: Decode, cache: Callable[[int, int], Cache]) -> Programs:
    """The two programs of a decoder; ``cache(rows, slots)`` makes an empty cache for it.

    ``start(params, tokens, positions, left, slots)`` reads prompts, as `padded` gives them, in one
    call; ``left`` int32 (B,) is how many tokens each row may write, and ``slots`` (an int, part of
    the program) is the size of the cache.

    ``write(params, state, keys, stops, sampling, count)`` writes up to ``count`` (at most `STEPS`)
    tokens in a loop that ends when all rows have ended. ``keys`` (B,) are those of
    `sampling.row_keys`, and ``stops`` int32 (S,) are tokens that end a row. It returns the state
    and the tokens int32 (B, STEPS); a row has -1 after its end, whose stop token it has. The
    old state's arrays are given to the new one.
    """

    @functools.partial(jax.jit, static_argnames="slots")
    def start(params, tokens, positions, left, slots: int) -> State:
        rows = len(tokens)
        logits, filled = decode(params, tokens, positions, cache(rows, slots))
        return State(filled, logits, positions[:, -1] + 1, left, jnp.zeros(rows, bool))

    @functools.partial(jax.jit, donate_argnames="state")
    def write(params, state: State, keys, stops, sampling: Sampling, count):
        def goes_on(carry):
            number, state, _ = carry
            return (number < count) & (state.left > 0).any()

        def one(carry):
            number, state, written = carry
            alive, finite = state.left > 0, jnp.isfinite(state.logits).all(-1)
            token = next_tokens(state.logits, keys, state.position, sampling)
            token = jnp.where(alive & finite, token, NOTHING)
            written = lax.dynamic_update_index_in_dim(written, token, number, axis=1)
            ended = ~finite | (token[:, None] == stops).any(-1)
            left = jnp.where(ended, 0, jnp.maximum(state.left - 1, 0))
            place = jnp.where(left > 0, state.position, NOTHING)  # what follows nobody reads
            logits, filled = decode(
                params, jnp.maximum(token, 0)[:, None], place[:, None], state.cache
            )
            damaged = state.damaged | (alive & ~finite)
            state = State(filled, logits, state.position + 1, left, damaged)
            return number + 1, state, written

        written = jnp.full((len(state.left), STEPS), NOTHING, jnp.int32)
        _, state, written = lax.while_loop(goes_on, one, (0, state, written))
        return state, written

    return Programs(start, write)
