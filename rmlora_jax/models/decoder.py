"""Decoders of text: Llama, Mistral, Qwen, Gemma and SmolLM as one model."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from rmlora_jax.models.attention import Reach, attend_back
from rmlora_jax.models.blocks import ATTENTION, Parts, parts_of
from rmlora_jax.models.cache import Cache, advanced, attend_cached, new_cache
from rmlora_jax.models.config import ACTIVATIONS
from rmlora_jax.models.decoder_config import DecoderConfig
from rmlora_jax.models.losses import chunked_cross_entropy
from rmlora_jax.models.new_tokens import NAME, NewTokens, Rows
from rmlora_jax.models.rope import rope_table, rotate

__all__ = ["Decoder", "DecoderConfig", "new_cache"]


class Own(NamedTuple):
    """What differs between layers, one value a layer.

    Attributes:
      rope: which table of `Shared` turns its queries and keys.
      slides: whether it has a window.
      rings: whether it keeps a ring of slots in the cache.
      index: its number among the layers with, or without, a ring.
    """

    rope: Any
    slides: Any
    rings: Any
    index: Any


class Shared(NamedTuple):
    """What all layers read.

    Attributes:
      tables: (ropes, 2, B, N, head_dim / 2), see `rope_table`.
      positions, segments: int (B, N), see `Decoder.__call__` and `Decoder.decode`.
    """

    tables: jax.Array
    positions: jax.Array
    segments: jax.Array | None = None


def _all_logits(logits, head, x):
    return logits(head, x)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) times scale, or 1 + scale, over the last axis, in float32.

    Source: Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467, equation 4.
    """

    parts: Parts

    @nn.compact
    def __call__(self, x):
        parts, c = self.parts, self.parts.config
        init = nn.initializers.zeros if c.norm_plus_one else nn.initializers.ones
        scale = self.param("scale", init, (x.shape[-1],), parts.param_dtype).astype(jnp.float32)
        wide = x.astype(jnp.float32)
        wide *= jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + c.rms_norm_eps)
        return (wide * (1 + scale if c.norm_plus_one else scale)).astype(parts.dtype)


class Attention(nn.Module):
    """Causal attention with grouped queries: (B, N, D) -> (B, N, D)."""

    parts: Parts

    @nn.compact
    def __call__(self, x, own: Own, shared: Shared, cache: Cache | None):
        parts, c = self.parts, self.parts.config

        def heads(name: str, number: int):
            made = parts.dense(number * c.head_dim, use_bias=c.qkv_bias, name=name)
            return checkpoint_name(made(x), ATTENTION).reshape(*x.shape[:-1], number, c.head_dim)

        query = heads("query", c.num_attention_heads)
        key, value = (heads(name, c.num_key_value_heads) for name in ("key", "value"))
        if c.qk_norm:
            query = RMSNorm(parts, name="query_norm")(query)
            key = RMSNorm(parts, name="key_norm")(key)
        table = shared.tables[0 if len(shared.tables) == 1 else own.rope]
        query, key = rotate(query, table), rotate(key, table)
        reach = Reach(c.query_scale, c.attn_logit_softcapping)
        if cache is None:
            reach = reach._replace(window=self.window(own, x.shape[1]), segments=shared.segments)
            mixed = attend_back(query, key, value, reach, parts.attention)
        else:
            mixed, cache = attend_cached(
                query, key, value, cache, shared.positions, own.rings, own.index, reach
            )
        out = parts.dense(c.hidden_size, use_bias=c.out_bias, name="out")
        return checkpoint_name(out(mixed.reshape(*x.shape[:-1], -1)), ATTENTION), cache

    @nn.nowrap
    def window(self, own: Own, length: int):
        """The window of this layer among ``length`` tokens: a number where all layers have one."""
        c = self.parts.config
        if not any(c.sliding) or c.sliding_window >= length:
            return None
        return c.sliding_window if all(c.sliding) else jnp.where(
            own.slides, c.sliding_window, length
        )  # fmt: skip


class MLP(nn.Module):
    """down(act(gate(x)) up(x)): (B, N, D) -> (B, N, D).

    Source: Shazeer 2020, https://arxiv.org/abs/2002.05202, equation 6.
    """

    parts: Parts

    @nn.compact
    def __call__(self, x):
        parts, c = self.parts, self.parts.config
        gate, up = (
            parts.dense(c.intermediate_size, use_bias=c.mlp_bias, name=name)(x)
            for name in ("gate", "up")
        )
        down = parts.dense(c.hidden_size, use_bias=c.mlp_bias, name="down")
        return down(ACTIVATIONS[c.hidden_act](gate) * up)


class Layer(nn.Module):
    """One layer as the body of a scan: (x, cache) -> (x, cache), x where ``parts.collect``."""

    parts: Parts

    @nn.compact
    def __call__(self, carry, own: Own, shared: Shared):
        parts, (x, cache) = self.parts, carry

        def after(i: int, y):
            return RMSNorm(parts, name=f"post_norm{i}")(y) if parts.config.post_norm else y

        y = RMSNorm(parts, name="norm1")(x)
        y, cache = Attention(parts, name="attention")(y, own, shared, cache)
        x += after(1, y)
        x += after(2, MLP(parts, name="mlp")(RMSNorm(parts, name="norm2")(x)))
        return (x, cache), x if parts.collect else None


class Decoder(nn.Module):
    """A causal language model.

    Equals PyTorch's ``LlamaForCausalLM``, ``MistralForCausalLM``, ``Qwen2ForCausalLM``,
    ``Qwen3ForCausalLM``, ``Gemma2ForCausalLM``, ``Gemma3ForCausalLM`` and ``SmolLM3ForCausalLM``.

    Parameters live under ``embed``, ``layers/attention/`` {query, key, value, out},
    ``layers/mlp/`` {gate, up, down}, ``layers/`` {norm1, norm2}, ``norm`` and ``head``, which is
    absent where the embedding is the head. Where the config has them also ``layers/`` {post_norm1,
    post_norm2} and ``layers/attention/`` {query_norm, key_norm}. Everything under ``layers`` is
    stacked over the layers on axis 0.

    Attributes:
      config: the architecture.
      outputs: tokens that the head tells apart, V. A tied head has
        ``config.vocab_size``, whatever is given here.
      dtype: compute dtype; sums of norms, softmax and rotations are float32.
      param_dtype, unroll, remat: as in `Bert`.
      attention: as in `ViT`.
      new_tokens: tokens, ascending, whose rows of embedding and head are parameters of their own,
        under ``new_tokens``; what the tables have of them is not read.

    >>> config = DecoderConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2,
    ...                        num_attention_heads=4, num_key_value_heads=2, intermediate_size=24)
    >>> model, tokens = Decoder(config, outputs=50), jnp.ones((3, 7), jnp.int32)
    >>> params = model.init(jax.random.key(0), tokens)["params"]
    >>> params["layers"]["attention"]["key"]["kernel"].shape
    (2, 16, 8)
    >>> model.apply({"params": params}, tokens).shape
    (3, 7, 50)
    """

    config: DecoderConfig
    outputs: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    unroll: int = 1
    remat: str = "none"
    attention: str = "auto"
    new_tokens: tuple[int, ...] = ()

    def __call__(
        self,
        input_ids: jax.Array,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        *,
        train: bool = False,
        hidden_states: bool = False,
    ):
        """Logits of the token after each token.

        Args:
          input_ids: int (B, N).
          positions: int (B, N), counted inside each segment. None: 0, 1, ... in each segment.
          segments: int (B, N): 0 for padding, 1, 2, ... for the texts that share a row. A token
            attends to earlier tokens of its own segment. None: each row is one text.
          train: unused, since decoders have no dropout; there as in other models.
          hidden_states: also return the residual stream before the first and after every layer.

        Returns:
          (B, N, V) float32 logits; with ``hidden_states`` a pair of the logits and an array
          (L + 1, B, N, D) in the compute dtype.

        Raises:
          TypeError: the tokens are not integers.
          ValueError: shapes that do not fit, or an attribute out of its range.
        """
        parts = parts_of(self, train, hidden_states)
        shared = self.shared(input_ids, positions, segments)
        logits, states, _ = self.run(parts, input_ids, shared, None, _all_logits)
        return (logits, states) if hidden_states else logits

    def losses(
        self,
        input_ids: jax.Array,
        targets: jax.Array,
        weights: jax.Array,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        *,
        train: bool = False,
    ):
        """Cross-entropy of the tokens that are to follow.

        Args:
          input_ids, positions, segments: as in ``__call__``.
          targets: int (B, N), the token that each place is to predict.
          weights: float (B, N), the weight of each target; 0 where there is none.
          train: as in ``__call__``.

        Returns:
          (sum of weights * -log p(target), {"loss": float32 (B, N), -log p(target), "correct": bool
          (B, N), whether the target is the likeliest token}). Only the sum carries a gradient. The
          arrays are 0 and False where the weight is 0. Logits of all tokens never exist.
        """
        parts = parts_of(self, train)
        shared = self.shared(input_ids, positions, segments)

        def use(logits, head, x):
            return chunked_cross_entropy(logits, head, x, targets, weights)

        return self.run(parts, input_ids, shared, None, use)[0]

    def decode(
        self, input_ids: jax.Array, positions: jax.Array, cache: Cache, *, last: bool = False
    ):
        """Logits of the token after each of some new tokens, and the cache with them.

        Under a dynamic rope new tokens turn by the length of their text so far, and keys in the
        cache stay as they were turned, as in transformers: beyond the original length that is not a
        pass over the whole text.

        Args:
          input_ids: int (B, n).
          positions: int (B, n), counted in each text; -1 for padding, which is on the left.
          cache: of the tokens before, see `new_cache`.
          last: logits of the last token alone, (B, 1, V).

        Returns:
          ((B, n, V) float32 logits, cache).
        """
        parts = parts_of(self, False)
        tables = self.tables(positions, segment_lengths(positions, None))
        shared = Shared(tables, positions)

        def use(logits, head, x):
            return logits(head, x[:, -1:] if last else x)

        logits, _, after = self.run(parts, input_ids, shared, cache, use)
        assert after is not None
        return logits, advanced(after, positions)

    @nn.compact
    def run(self, parts: Parts, input_ids, shared: Shared, cache: Cache | None, use):
        """(``use(logits, head, x)``, hidden states or None, cache).

        ``x`` (B, N, D) is the normalised last state, and ``logits(head, x)`` are float32.
        """
        c = self.config
        embed = parts.table(c.vocab_size, c.hidden_size, "embed")
        rows = NewTokens(parts, self.new_tokens, name=NAME)() if self.new_tokens else Rows(())
        x = rows.embedded(input_ids, embed(input_ids))
        x *= jnp.asarray(c.embed_scale, x.dtype)
        rings = cache is not None and cache.ring is not None
        (last, cache), after = parts.scan(
            Layer, (x, cache), self.own(rings), shared, in_axes=(0, nn.broadcast)
        )
        states = None if after is None else jnp.concatenate([x[None], after])
        x = RMSNorm(parts, name="norm")(last)
        head = embed
        if not c.tie_word_embeddings:
            head = parts.dense(self.outputs, use_bias=False, name="head")

        def logits(head, x):
            made = head.attend(x) if c.tie_word_embeddings else head(x)
            made, cap = rows.scored(x, made).astype(jnp.float32), c.final_logit_softcapping
            return cap * jnp.tanh(made / cap) if cap else made

        return use(logits, head, x), states, cache

    @nn.nowrap
    def own(self, rings: bool) -> Own:
        """What differs between the layers; ``rings``: whether sliding ones keep a ring."""
        c = self.config
        ropes, kinds = list(dict.fromkeys(c.ropes)), np.array(c.sliding) & rings
        counts = np.where(kinds, np.cumsum(kinds), np.cumsum(~kinds)) - 1
        return Own(
            rope=jnp.array([ropes.index(rope) for rope in c.ropes]),
            slides=jnp.array(c.sliding),
            rings=jnp.array(kinds),
            index=jnp.array(counts),
        )

    @nn.nowrap
    def shared(self, input_ids, positions, segments) -> Shared:
        """What all layers read, after a check of all three inputs."""
        kind, shape = jnp.result_type(input_ids), jnp.shape(input_ids)
        if not jnp.issubdtype(kind, jnp.integer):
            raise TypeError(f"Decoder: input_ids are {kind}; pass integers")
        if len(shape) != 2:
            raise ValueError(f"Decoder: input_ids have shape {shape}; expected (batch, tokens)")
        for name, value in (("positions", positions), ("segments", segments)):
            if value is not None and jnp.shape(value) != shape:
                raise ValueError(
                    f"Decoder: {name} have shape {jnp.shape(value)}; input_ids have {shape}"
                )
        own = segment_positions(shape, segments) if positions is None else positions
        return Shared(self.tables(own, segment_lengths(own, segments)), own, segments)

    @nn.nowrap
    def tables(self, positions, lengths) -> jax.Array:
        """The rope tables of all kinds of layers."""
        c = self.config
        kinds = dict.fromkeys(c.ropes)
        return jnp.stack([rope_table(rope, c.head_dim, positions, lengths) for rope in kinds])


def segment_positions(shape: tuple[int, int], segments: jax.Array | None) -> jax.Array:
    """0, 1, ... in each run of equal ``segments``, int32 (B, N).

    >>> segment_positions((1, 6), jnp.array([[1, 1, 1, 2, 2, 0]])).tolist()
    [[0, 1, 2, 0, 1, 0]]
    """
    places = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
    if segments is None:
        return places
    starts = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)))
    return places - jax.lax.cummax(jnp.where(starts, places, 0), axis=1)


def segment_lengths(positions: jax.Array, segments: jax.Array | None) -> jax.Array:
    """1 + the last position in the segment of each token, int (B, N)."""
    if segments is None:
        return jnp.broadcast_to(1 + positions.max(1, keepdims=True), positions.shape)
    number = positions.shape[1] + 1

    def row(places, segments):
        return 1 + jax.ops.segment_max(places, segments, number)[segments]

    return jax.vmap(row)(positions, segments)
