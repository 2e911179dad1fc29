"""Keys and values of the tokens that a decoder has read, so that it reads each of them once.

Layers without a window keep a slot for every token. Layers with one keep a ring of as many slots
as the window has. All rows of a batch write the same slots.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rmlora_jax.models.attention import Reach, attend_back


class Slots(NamedTuple):
    """The cache of the layers of one kind.

    Attributes:
      key, value: (layers of this kind, B, slots, K, head_dim).
      position: int32 (B, slots), of the token in each slot; -1: empty.
    """

    key: jax.Array
    value: jax.Array
    position: jax.Array


class Cache(NamedTuple):
    """What a decoder remembers of a batch.

    Attributes:
      full: of layers that see every token; None where there are none.
      ring: of layers with a window; None where there are none.
      written: int32 scalar, how many tokens each row has written, padding too.
    """

    full: Slots | None
    ring: Slots | None
    written: jax.Array


def new_cache(config, batch: int, length: int, dtype: Any = jnp.float32) -> Cache:
    """An empty cache.

    Args:
      config: a `DecoderConfig`.
      batch: rows B.
      length: most tokens that a row will have, padding and new ones among them.
      dtype: of keys and values.

    >>> from rmlora_jax.models.decoder_config import DecoderConfig
    >>> config = DecoderConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=3,
    ...                        sliding_window=4, layer_types=("sliding_attention",
    ...                        "sliding_attention", "full_attention"))
    >>> cache = new_cache(config, batch=5, length=10)
    >>> cache.full.key.shape, cache.ring.key.shape
    ((1, 5, 10, 2, 4), (2, 5, 4, 2, 4))
    """
    rings = ring_layers(config, length)

    def slots(layers: int, size: int) -> Slots | None:
        shape = (layers, batch, size, config.num_key_value_heads, config.head_dim)
        empty = jnp.full((batch, size), -1, jnp.int32)
        return Slots(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), empty) if layers else None

    return Cache(
        full=slots(len(rings) - sum(rings), length),
        ring=slots(sum(rings), config.sliding_window),
        written=jnp.int32(0),
    )


def batch_axes(cache: Cache) -> Any:
    """The axis of the rows in each array of a cache, as ``in_axes`` of vmap; None: they share it.

    >>> from rmlora_jax.models.decoder_config import DecoderConfig
    >>> batch_axes(new_cache(DecoderConfig(), batch=2, length=4))
    Cache(full=Slots(key=1, value=1, position=0), ring=None, written=None)
    """
    axes: Any = (1, 1, 0)
    axes = Slots(*axes)
    shared: Any = None
    return Cache(cache.full and axes, cache.ring and axes, shared)


def ring_layers(config, length: int) -> tuple[bool, ...]:
    """Which layers keep a ring, in a cache for ``length`` tokens."""
    return tuple(slides and config.sliding_window < length for slides in config.sliding)


def attend_cached(query, key, value, cache: Cache, positions, rings, index, reach: Reach):
    """Attention of new tokens to all that a layer remembers, and the cache with them.

    Args:
      query: (B, n, H, head_dim); ``key`` and ``value`` (B, n, K, head_dim) are of the same tokens.
      cache: as it was before these tokens, but for the layers before this one.
      positions: int32 (B, n), of the tokens; -1 for padding.
      rings: bool scalar, whether this layer keeps a ring.
      index: int32 scalar, its number among the layers of its kind.
      reach: the scale and the soft cap.

    Returns:
      (B, n, H, head_dim), and the cache with the new keys and values. `advanced` then adds their
      positions, which are the same for all layers.
    """

    def attention(keys, values, places, window=None):
        own = reach._replace(window=window, places=(positions, places))
        return attend_back(query, keys.astype(query.dtype), values.astype(query.dtype), own)

    full, ring, ways = cache.full, cache.ring, []
    both = full is not None and ring is not None
    if full is not None:
        full = own = _stored(_put, full, key, value, cache.written, index, ~rings if both else None)
        places = _written(full.position, positions, cache.written)
        ways.append(lambda: attention(_layer(own.key, index), _layer(own.value, index), places))
    if ring is not None:
        old, ring = ring, _stored(_turn, ring, key, value, cache.written, index, rings)
        ways.append(functools.partial(_from_ring, attention, old, ring, key, value, positions,
                                      cache.written, index))  # fmt: skip
    out = ways[0]() if len(ways) == 1 else jax.lax.cond(rings, ways[1], ways[0])
    return out, cache._replace(full=full, ring=ring)


def _from_ring(attention, old: Slots, new: Slots, key, value, positions, written, index):
    """Attention to the tokens of a window, of which writing may already have dropped some."""
    window = old.position.shape[1]
    if positions.shape[1] == 1:  # its slot held the one token that has just left the window
        places = _turned(old.position, positions, written)
        return attention(_layer(new.key, index), _layer(new.value, index), places, window)
    keys, values = (
        jnp.concatenate([_layer(stack, index).astype(own.dtype), own], axis=1)
        for stack, own in ((old.key, key), (old.value, value))
    )
    return attention(keys, values, jnp.concatenate([old.position, positions], axis=1), window)


def advanced(cache: Cache, positions: jax.Array) -> Cache:
    """The cache after all layers have written the keys and values of tokens at ``positions``."""

    def moved(slots: Slots | None, change) -> Slots | None:
        if slots is None:
            return None
        return slots._replace(position=change(slots.position, positions, cache.written))

    written = cache.written + positions.shape[1]
    return Cache(moved(cache.full, _written), moved(cache.ring, _turned), written)


def _stored(put, slots: Slots, key, value, *where) -> Slots:
    return slots._replace(key=put(slots.key, key, *where), value=put(slots.value, value, *where))


def _put(stack, new, start, index, mine):
    """``stack`` with ``new`` (B, n, ...) in layer ``index`` from slot ``start`` on, if ``mine``."""
    new, corner = new.astype(stack.dtype)[None], (index, 0, start, 0, 0)
    if mine is not None:  # never the whole layer: it may be gigabytes
        new = jnp.where(mine, new, jax.lax.dynamic_slice(stack, corner, new.shape))
    return jax.lax.dynamic_update_slice(stack, new, corner)


def _turn(stack, new, start, index, mine):
    """The same for a ring."""
    old = _layer(stack, index)
    layer = jnp.where(mine, _turned(old, new, start), old)
    return jax.lax.dynamic_update_index_in_dim(stack, layer, index, 0)


def _layer(stack, index):
    return jax.lax.dynamic_index_in_dim(stack, index, keepdims=False)


def _written(slots, new, start):
    """``slots`` (B, S, ...) with ``new`` (B, n, ...) from slot ``start`` on."""
    return jax.lax.dynamic_update_slice_in_dim(slots, new.astype(slots.dtype), start, axis=1)


def _turned(slots, new, start):
    """A ring of slots (B, W, ...) with the last W of ``new`` (B, n, ...), token i in slot i % W."""
    size, count = slots.shape[1], new.shape[1]
    kept = min(size, count)
    places = (start + count - kept + jnp.arange(kept)) % size
    return slots.at[:, places].set(new[:, count - kept :].astype(slots.dtype))
