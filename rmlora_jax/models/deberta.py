"""DeBERTa-v2 and v3 as a classifier of texts (Flax Linen, layers scanned)."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rmlora_jax.models.deberta_config import DebertaConfig
from rmlora_jax.models.disentangled import disentangled_scores, drop_rows, relative_rows
from rmlora_jax.models.encoder import MLP, checked_tokens, normal_dense, normal_embed
from rmlora_jax.models.inserts import bottleneck
from rmlora_jax.models.parts import (
    ACTIVATIONS,
    REMAT,
    check_choices,
    check_counts,
    kept_with_attention,
    layer_norm,
    scan_layers,
)


class Embed(nn.Module):
    """Words, positions and token types, normalised, 0 for padding: (B, N) -> (B, N, D)."""

    config: DebertaConfig
    dtype: Any
    param_dtype: Any
    deterministic: bool

    @nn.compact
    def __call__(self, input_ids, token_type_ids, mask):
        c = self.config
        table = normal_embed(c.initializer_range, self.param_dtype, self.dtype)
        width = c.embedding_width
        x = table(c.vocab_size, width, name="word")(input_ids)
        if c.position_biased_input:
            positions = table(c.max_position_embeddings, width, name="position")
            x += positions(jnp.arange(input_ids.shape[1]))
        if c.type_vocab_size:
            x += table(c.type_vocab_size, width, name="token_type")(token_type_ids)
        if width != c.hidden_size:
            dense = normal_dense(c.initializer_range, self.param_dtype, self.dtype)
            x = dense(c.hidden_size, use_bias=False, name="project")(x)
        x = layer_norm(c.layer_norm_eps, self.dtype, self.param_dtype, "norm")(x)
        x = jnp.where(mask[..., None], x, 0)
        return nn.Dropout(c.hidden_dropout_prob, deterministic=self.deterministic)(x)


class Attention(nn.Module):
    """Disentangled self-attention: (B, N, D) -> (B, N, D), every projection a plain Dense."""

    config: DebertaConfig
    dtype: Any
    param_dtype: Any
    deterministic: bool

    @nn.compact
    def __call__(self, x, mask, relative):
        c = self.config
        dense = normal_dense(c.initializer_range, self.param_dtype, self.dtype)
        heads = (c.num_attention_heads, c.hidden_size // c.num_attention_heads)
        content = {name: dense(c.hidden_size, name=name) for name in ("query", "key", "value")}
        query, key, value = (
            kept_with_attention(project(x)).reshape(*x.shape[:-1], *heads)
            for project in content.values()
        )

        def positions(term, name):
            if term not in c.terms:
                return None
            own = content[name] if c.share_att_key else dense(c.hidden_size, name=f"pos_{name}")
            return own(relative).reshape(-1, *heads)

        if c.terms and c.hidden_dropout_prob and not self.deterministic:
            rows = distance_rows(c, x.shape[1])
            relative = drop_rows(self.make_rng("dropout"), relative, rows, c.hidden_dropout_prob)
        scores = disentangled_scores(
            query, key, positions("c2p", "key"), positions("p2c", "query")
        )
        # The original counts the terms even where it does not add them.
        scores /= (heads[1] * (1 + len(c.pos_att_type))) ** 0.5
        # A padded query looks at nothing, hence at everything alike, as in the original.
        pairs = mask[:, None, :, None] & mask[:, None, None, :]
        weights = nn.softmax(jnp.where(pairs, scores, jnp.finfo(scores.dtype).min / 2))
        weights = weights.astype(value.dtype)
        drop = nn.Dropout(c.attention_probs_dropout_prob, deterministic=self.deterministic)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", drop(weights), value)
        return kept_with_attention(dense(c.hidden_size, name="out")(mixed.reshape(x.shape)))


class Layer(nn.Module):
    """One post-norm layer as the body of a scan: x -> (x, x where ``collect``, else None).

    ``first`` tells the layer that the convolution stands beside.
    """

    config: DebertaConfig
    dtype: Any
    param_dtype: Any
    deterministic: bool
    collect: bool

    @nn.compact
    def __call__(self, x, first, mask, relative, beside):
        c = self.config
        norm = functools.partial(layer_norm, c.layer_norm_eps, self.dtype, self.param_dtype)
        drop = nn.Dropout(c.hidden_dropout_prob, deterministic=self.deterministic)
        adapter = functools.partial(bottleneck, c, self.dtype, self.param_dtype)
        attention = Attention(
            c, self.dtype, self.param_dtype, self.deterministic, name="attention"
        )
        mlp = MLP(c, self.dtype, self.param_dtype, name="mlp")
        x = norm("norm1")(x + adapter("bottleneck1")(drop(attention(x, mask, relative))))
        x = norm("norm2")(x + adapter("bottleneck2")(drop(mlp(x))))
        if beside is not None:
            mixed, scale, bias = beside
            mixed = normalised(x + mixed, scale, bias, c.layer_norm_eps)
            x = jnp.where(first, jnp.where(mask[..., None], mixed, 0), x)
        return x, x if self.collect else None


class Convolution(nn.Module):
    """What is added after the first layer, and scale and bias of the norm that follows.

    (B, N, D) -> ((B, N, D), (D,), (D,)). The norm is applied inside the scan, where only the first
    layer has it; hence its parameters are handed over.
    """

    config: DebertaConfig
    dtype: Any
    param_dtype: Any
    deterministic: bool

    @nn.compact
    def __call__(self, x, mask):
        c = self.config
        x = nn.Conv(
            c.hidden_size,
            (c.conv_kernel_size,),
            padding=c.conv_kernel_size // 2,
            feature_group_count=c.conv_groups,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=nn.initializers.normal(c.initializer_range),
            name="conv",
        )(x)
        x = jnp.where(mask[..., None], x, 0)
        x = nn.Dropout(c.hidden_dropout_prob, deterministic=self.deterministic)(x)
        affine = Affine(c.hidden_size, self.param_dtype, name="norm")()
        return ACTIVATIONS[c.conv_act](x), *affine


class Affine(nn.Module):
    """Scale and bias of a layer norm that is computed elsewhere: -> ((D,), (D,))."""

    width: int
    param_dtype: Any

    @nn.compact
    def __call__(self):
        scale = self.param("scale", nn.initializers.ones, (self.width,), self.param_dtype)
        return scale, self.param("bias", nn.initializers.zeros, (self.width,), self.param_dtype)


class Encoder(nn.Module):
    """All layers: (B, N, D) -> (B, N, D), and every hidden state where ``collect``."""

    config: DebertaConfig
    dtype: Any
    param_dtype: Any
    deterministic: bool
    collect: bool
    unroll: int
    remat: str

    @nn.compact
    def __call__(self, x, mask):
        c = self.config
        layers = scan_layers(
            Layer,
            c.num_hidden_layers,
            unroll=self.unroll,
            remat=self.remat,
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
        )(c, self.dtype, self.param_dtype, self.deterministic, self.collect, name="layers")
        first = jnp.arange(c.num_hidden_layers) == 0
        beside = None
        if c.conv_kernel_size:
            beside = Convolution(
                c, self.dtype, self.param_dtype, self.deterministic, name="conv"
            )(x, mask)
        out, after = layers(x, first, mask, self.relative(x.shape[1]), beside)
        return out, jnp.concatenate([x[None], after]) if self.collect else None

    def relative(self, length: int):
        """The embeddings of the distances -N .. N - 1: (2 N, D), or None."""
        c = self.config
        if not c.relative_attention:
            return None
        table = normal_embed(c.initializer_range, self.param_dtype, self.dtype)
        x = table(2 * c.span, c.hidden_size, name="relative")(distance_rows(c, length))
        if c.norm_rel_ebd == "none":
            return x
        return layer_norm(c.layer_norm_eps, self.dtype, self.param_dtype, "relative_norm")(x)


class Deberta(nn.Module):
    """DeBERTa-v2 or v3 with a classification head.

    Equals PyTorch's ``DebertaV2ForSequenceClassification``.

    Parameters live under ``embed`` {word, position, token_type, project, norm}, ``encoder``
    {relative, relative_norm, conv/conv, conv/norm}, ``encoder/layers/attention/`` {query, key,
    value, out, pos_key, pos_query}, ``encoder/layers/mlp/`` {fc1, fc2}, ``encoder/layers/`` {norm1,
    norm2}, ``pooler`` and ``head``, as far as the config has them. Everything under
    ``encoder/layers`` is stacked over the layers on axis 0. Adapters on ``query`` and ``key`` act
    on contents and, where the config shares them, on relative positions alike.

    Attributes:
      config: the architecture.
      num_labels: outputs of the head; 1 for regression.
      dtype: compute dtype of everything but layer-norm statistics, softmax, pooler and head, which
        are float32.
      param_dtype: dtype of new parameters; loaded ones keep their own.
      unroll: layers per iteration of the scan; a larger value compiles longer and runs faster.
      remat: what the backward pass recomputes: ``"none"`` nothing, ``"dots"`` everything but
        the outputs of the linear layers, ``"attention"`` everything but those in attention,
        ``"full"`` each layer from its input.

    Source: He et al. 2021, https://arxiv.org/abs/2006.03654, section 3; He et al. 2023,
    https://arxiv.org/abs/2111.09543.

    >>> config = DebertaConfig(vocab_size=50, hidden_size=12, num_hidden_layers=2,
    ...                        num_attention_heads=3, intermediate_size=16,
    ...                        relative_attention=True, pos_att_type=("c2p", "p2c"))
    >>> model, tokens = Deberta(config, num_labels=2), jnp.ones((4, 7), jnp.int32)
    >>> params = model.init(jax.random.key(0), tokens)["params"]
    >>> params["encoder"]["relative"]["embedding"].shape
    (1024, 12)
    >>> model.apply({"params": params}, tokens).shape
    (4, 2)
    """

    config: DebertaConfig
    num_labels: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    unroll: int = 1
    remat: str = "none"

    @nn.compact
    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        token_type_ids: jax.Array | None = None,
        *,
        train: bool = False,
        hidden_states: bool = False,
    ):
        """Logits of a batch.

        Args:
          input_ids: int (B, N).
          attention_mask: bool or 0 and 1, (B, N): False for padding. None: no padding.
          token_type_ids: int (B, N), which of two texts a token belongs to; used where the config
            has token types. None: 0.
          train: apply the dropout of the config (needs the rng ``dropout`` where it is above 0).
          hidden_states: also return the residual stream before the first and after every layer.

        Returns:
          (B, num_labels) float32 logits, which do not depend on how much padding there is; with
          ``hidden_states`` a pair of the logits and an array (L + 1, B, N, D) in the compute dtype.

        Raises:
          TypeError: the tokens are not integers.
          ValueError: shapes that do not fit, too many tokens, or an attribute out of its range.
        """
        c = self.config
        check_choices("Deberta", remat=(self.remat, REMAT))
        check_counts("Deberta", num_labels=self.num_labels, unroll=self.unroll)
        input_ids, mask, types = checked_tokens(
            "Deberta", c.longest, input_ids, attention_mask, token_type_ids
        )
        mask = jnp.ones(input_ids.shape, bool) if mask is None else mask
        x = Embed(c, self.dtype, self.param_dtype, not train, name="embed")(
            input_ids, types, mask
        )
        x, states = Encoder(
            c,
            self.dtype,
            self.param_dtype,
            not train,
            hidden_states,
            self.unroll,
            self.remat,
            name="encoder",
        )(x, mask)
        dense = normal_dense(c.initializer_range, self.param_dtype)
        first = x[:, 0].astype(jnp.float32)
        first = nn.Dropout(c.pooler_dropout, deterministic=not train)(first)
        pooled = ACTIVATIONS[c.pooler_hidden_act](dense(c.hidden_size, name="pooler")(first))
        pooled = nn.Dropout(c.head_dropout, deterministic=not train)(pooled)
        logits = dense(self.num_labels, name="head")(pooled)
        return (logits, states) if hidden_states else logits


def distance_rows(config: DebertaConfig, length: int):
    """Rows of the relative table for the distances -N .. N - 1."""
    return relative_rows(length, config.span, config.position_buckets, config.longest_distance)


def normalised(x, scale, bias, epsilon: float):
    """Layer norm over the last axis in float32: (..., D) -> (..., D) in the dtype of ``x``."""
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + epsilon)
    return (y * scale + bias).astype(x.dtype)
