"""DeBERTa-v2 and v3 as classifiers of texts: their config, model, and names in files."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rmlora_jax.models import blocks
from rmlora_jax.models.attention import weighted
from rmlora_jax.models.blocks import Parts, TextClassifier
from rmlora_jax.models.config import ACTIVATIONS, EncoderConfig, refuse
from rmlora_jax.models.family import (
    AS_IS,
    CONV1D,
    LINEAR,
    TEXTS,
    Entry,
    Family,
    layer_entries,
    linear_entries,
    norm_entries,
    text_entries,
    text_layer,
)
from rmlora_jax.models.positions import bucket, disentangled_scores, drop_rows

TERMS = ("c2p", "p2c")


@dataclasses.dataclass(frozen=True)
class DebertaConfig(EncoderConfig):
    """The architecture of a DeBERTa-v2 or v3 encoder; names and defaults are Hugging Face's.

    Attributes: those of `EncoderConfig`, whose dropout is here that of relative embeddings and of
    the convolution too, and

      vocab_size: rows of the word embedding.
      embedding_size: width of the embeddings, which are then projected to D; 0: D.
      max_position_embeddings: rows of the table of absolute positions.
      type_vocab_size: rows of the token-type table; 0: no table.
      relative_attention: whether attention looks at relative positions.
      pos_att_type: the terms it adds, any of ``"c2p"`` (content to position) and ``"p2c"``.
      position_buckets: distances beyond half of it share logarithmic buckets; below 1: each
        distance has its own row.
      max_relative_positions: the longest distance with a row of its own or of its bucket; below
        1: as ``max_position_embeddings``.
      share_att_key: whether relative embeddings go through the projections of the content.
      norm_rel_ebd: ``"layer_norm"`` normalises the relative embeddings, ``"none"`` does not.
      position_biased_input: whether absolute positions are added to the embeddings.
      conv_kernel_size: width of the convolution beside the first layer, odd; 0: no convolution.
      conv_groups: its groups; must divide ``hidden_size``.
      conv_act: its activation.
      pooler_hidden_act: activation of the pooler.
      pooler_dropout: dropout before the pooler (training).
      cls_dropout: dropout before the head (training); None: as ``hidden_dropout_prob``.

    >>> DebertaConfig(position_buckets=256).span
    256
    """

    vocab_size: int = 128100
    hidden_size: int = 1536
    embedding_size: int = 0
    num_hidden_layers: int = 24
    num_attention_heads: int = 24
    intermediate_size: int = 6144
    max_position_embeddings: int = 512
    type_vocab_size: int = 0
    layer_norm_eps: float = 1e-7
    relative_attention: bool = False
    pos_att_type: tuple[str, ...] = ()
    position_buckets: int = -1
    max_relative_positions: int = -1
    share_att_key: bool = False
    norm_rel_ebd: str = "none"
    position_biased_input: bool = True
    conv_kernel_size: int = 0
    conv_groups: int = 1
    conv_act: str = "tanh"
    pooler_hidden_act: str = "gelu"
    pooler_dropout: float = 0.0
    cls_dropout: float | None = None

    model_types = ("deberta-v2",)  # v3 has the same
    # The masked-language head (legacy), the number of the padding token, whose embedding is masked
    # out anyway, the head of another class (summary), and the names and sizes of the other heads of
    # models of many tasks. attention_head_size and pooler_hidden_size are checked apart.
    inert = (
        *("legacy", "padding_idx", "attention_head_size", "pooler_hidden_size"),
        *("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels"),
        *("summary_first_dropout", "summary_last_dropout", "tasks", "classifiers_size"),
    )
    least = (
        EncoderConfig.least
        | {"embedding_size": 0, "type_vocab_size": 0, "conv_kernel_size": 0}
        | dict.fromkeys(("position_buckets", "max_relative_positions"), -(2**31))
    )
    no_prefix = "DeBERTa's attention goes by relative positions, which prefix vectors do not have"

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.pos_att_type, tuple) or set(self.pos_att_type) - set(TERMS):
            refuse("pos_att_type", self.pos_att_type, "any of c2p and p2c, as 'p2c|c2p'")
        if self.norm_rel_ebd not in ("none", "layer_norm"):
            refuse("norm_rel_ebd", self.norm_rel_ebd, "'none' or 'layer_norm'")
        if self.conv_kernel_size and not self.conv_kernel_size % 2:
            refuse("conv_kernel_size", self.conv_kernel_size, "odd, or 0 for no convolution")
        if self.hidden_size % self.conv_groups:
            refuse(
                "conv_groups", self.conv_groups, f"a divisor of hidden_size = {self.hidden_size}"
            )
        if self.relative_attention and self.position_buckets > 0:
            # The logarithm runs from half the buckets to the longest distance.
            most = self.longest_distance - 2
            if self.position_buckets < 2 or self.position_buckets // 2 > most:
                refuse(
                    "position_buckets",
                    self.position_buckets,
                    f"below 1 for none, or from 2 to {2 * most + 1}, so that half of it is below "
                    f"max_relative_positions - 1 = {most + 1}",
                )

    @property
    def longest_distance(self) -> int:
        """The longest distance that is told apart."""
        if self.max_relative_positions < 1:
            return self.max_position_embeddings
        return self.max_relative_positions

    @property
    def span(self) -> int:
        """Half the rows of the table of relative positions."""
        return self.position_buckets if self.position_buckets > 0 else self.longest_distance

    def rows(self, length: int) -> np.ndarray:
        """Rows of the table of relative positions for the distances -N .. N - 1: int (2 N,)."""
        found = bucket(np.arange(-length, length), self.position_buckets, self.longest_distance)
        return np.clip(found + self.span, 0, 2 * self.span - 1)

    @property
    def terms(self) -> tuple[str, ...]:
        """The terms that attention adds for relative positions."""
        return self.pos_att_type if self.relative_attention else ()

    @property
    def longest(self) -> int | None:
        """The number of tokens that have positions; None: any number."""
        return self.max_position_embeddings if self.position_biased_input else None

    @classmethod
    def from_hf(cls, config):
        """See ``ModelConfig.from_hf``.

        >>> DebertaConfig.from_hf({"model_type": "deberta-v2", "pos_att_type": "p2c|c2p"}).terms
        ()
        """
        known = {n: value for n, value in cls.known_fields(config).items() if value is not None}
        terms = known.get("pos_att_type", ())
        if isinstance(terms, str):
            terms = [term.strip() for term in terms.lower().split("|") if term.strip()]
        known["pos_att_type"] = tuple(sorted(set(terms)))
        if isinstance(known.get("norm_rel_ebd"), str):
            known["norm_rel_ebd"] = known["norm_rel_ebd"].strip().lower()
        built = cls(**known)
        derived = {
            "attention_head_size": built.hidden_size // built.num_attention_heads,
            "pooler_hidden_size": built.hidden_size,
        }
        for name, value in derived.items():
            if config.get(name) not in (None, value):
                refuse(name, config[name], f"{value}, as hidden_size asks for")
        return built


class Embed(nn.Module):
    """Words, positions and token types, normalised, 0 for padding: (B, N) -> (B, N, D)."""

    parts: Parts

    @nn.compact
    def __call__(self, input_ids, token_type_ids, mask):
        parts, c = self.parts, self.parts.config
        width = c.embedding_size or c.hidden_size
        x = parts.table(c.vocab_size, width, "word")(input_ids)
        if c.position_biased_input:
            positions = parts.table(c.max_position_embeddings, width, "position")
            x += positions(jnp.arange(input_ids.shape[1]))
        if c.type_vocab_size:
            x += parts.table(c.type_vocab_size, width, "token_type")(token_type_ids)
        if width != c.hidden_size:
            x = parts.dense(c.hidden_size, use_bias=False, name="project")(x)
        return parts.dropout()(jnp.where(mask[..., None], parts.norm("norm")(x), 0))


class Attention(blocks.Attention):
    """Disentangled self-attention: (B, N, D) -> (B, N, D), every projection a plain Dense."""

    @nn.nowrap
    def mixed(self, linear, query, key, value, mask, relative):
        parts, c = self.parts, self.parts.config

        def positions(term, name):
            if term not in c.terms:
                return None
            shared = c.share_att_key
            own = linear[name] if shared else parts.dense(c.hidden_size, name=f"pos_{name}")
            return own(relative).reshape(-1, *query.shape[2:])

        if c.terms and c.hidden_dropout_prob and parts.train:
            rows = c.rows(query.shape[1])
            relative = drop_rows(self.make_rng("dropout"), relative, rows, c.hidden_dropout_prob)
        scores = disentangled_scores(
            query, key, positions("c2p", "key"), positions("p2c", "query")
        )
        # The original counts the terms even where it does not add them.
        scores /= (query.shape[3] * (1 + len(c.pos_att_type))) ** 0.5
        # A padded query attends to all keys alike, as in the original.
        pairs = mask[:, None, :, None] & mask[:, None, None, :]
        return weighted(scores, value, parts.dropout(c.attention_probs_dropout_prob), pairs)


class Layer(blocks.Layer):
    """A layer; ``first`` is true for the one beside the convolution."""

    attention_type = Attention

    @nn.nowrap
    def changed(self, x, first, mask, relative, beside):
        x = super().changed(x, mask, relative)
        if beside is None:
            return x
        mixed, scale, bias = beside
        mixed = normalised(x + mixed, scale, bias, self.parts.config.layer_norm_eps)
        return jnp.where(first, jnp.where(mask[..., None], mixed, 0), x)


class Convolution(nn.Module):
    """What is added after the first layer, and scale and bias of the norm that follows.

    (B, N, D) -> ((B, N, D), (D,), (D,)). The first layer applies the norm, inside the scan.
    """

    parts: Parts

    @nn.compact
    def __call__(self, x, mask):
        parts, c = self.parts, self.parts.config
        x = parts.conv(
            (c.conv_kernel_size,),
            padding=c.conv_kernel_size // 2,
            feature_group_count=c.conv_groups,
            name="conv",
        )(x)
        x = parts.dropout()(jnp.where(mask[..., None], x, 0))
        affine = Affine(c.hidden_size, parts.param_dtype, name="norm")()
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
    """All layers: (B, N, D) -> (B, N, D), and every hidden state where ``parts.collect``."""

    parts: Parts

    @nn.compact
    def __call__(self, x, mask):
        parts, c = self.parts, self.parts.config
        first = jnp.arange(c.num_hidden_layers) == 0
        beside = Convolution(parts, name="conv")(x, mask) if c.conv_kernel_size else None
        relative = None  # the embeddings of the distances -N .. N - 1: (2 N, D)
        if c.relative_attention:
            table = parts.table(2 * c.span, c.hidden_size, "relative")
            relative = table(c.rows(x.shape[1]))
            if c.norm_rel_ebd != "none":
                relative = parts.norm("relative_norm")(relative)
        same = (nn.broadcast,) * 3
        return parts.layers(Layer, x, first, mask, relative, beside, in_axes=(0, *same))


def pooled(parts: Parts, first: jax.Array) -> jax.Array:
    """See `TextClassifier`."""
    c = parts.config
    first = parts.dropout(c.pooler_dropout)(first)
    first = ACTIVATIONS[c.pooler_hidden_act](parts.dense(c.hidden_size, name="pooler")(first))
    return parts.dropout(c.cls_dropout)(first)


class Deberta(TextClassifier):
    """DeBERTa-v2 or v3 with a classification head.

    Equals PyTorch's ``DebertaV2ForSequenceClassification``.

    Parameters live under ``embed`` {word, position, token_type, project, norm}, ``encoder``
    {relative, relative_norm, conv/conv, conv/norm}, ``encoder/layers`` as in `Bert` and
    ``encoder/layers/attention/`` {pos_key, pos_query}, ``pooler`` and ``head``, as far as the
    config has them. Adapters on ``query`` and ``key`` act on contents and, where the config shares
    the projections, on relative positions.

    Attributes:
      config: the architecture.
      num_labels: outputs of the head; 1 for regression.
      dtype, param_dtype, unroll, remat: as in `Bert`.

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

    embed_type = Embed
    encoder_type = Encoder
    pooled = staticmethod(pooled)
    needs_mask = True


def normalised(x, scale, bias, epsilon: float):
    """Layer norm over the last axis in float32: (..., D) -> (..., D) in the dtype of ``x``."""
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + epsilon)
    return (y * scale + bias).astype(x.dtype)


_ENCODER = "deberta.encoder"
_LAYER = text_layer("{}_proj", "query", "key", "value", "pos_key", "pos_query")

DEBERTA = Family(
    config=DebertaConfig,
    model=Deberta,
    inputs=TEXTS,
    classifier="DebertaV2ForSequenceClassification",
    prefix="deberta.",
    table=(
        *text_entries("deberta.embeddings"),
        Entry("embed/project/kernel", LINEAR, ("deberta.embeddings.embed_proj.weight",)),
        Entry("encoder/relative/embedding", AS_IS, (f"{_ENCODER}.rel_embeddings.weight",)),
        *norm_entries("encoder/relative_norm", f"{_ENCODER}.LayerNorm"),
        *linear_entries("encoder/conv/conv", f"{_ENCODER}.conv.conv", axes=CONV1D),
        *norm_entries("encoder/conv/norm", f"{_ENCODER}.conv.LayerNorm"),
        *layer_entries([f"{_ENCODER}.layer.{{}}"], _LAYER),
        *linear_entries("pooler", "pooler.dense"),
        *linear_entries("head", "classifier"),
    ),
    # Masked-language and replaced-token heads, the absolute positions that only the former's
    # decoder saw, and what mDeBERTa added to the words while it was pre-trained.
    leftovers=(
        r"(lm_predictions|mask_predictions|cls)\..*",
        r"(deberta\.)?embeddings\.(position_ids|position_embeddings\.weight)",
        r"(deberta\.)?embeddings\.word_embeddings\._weight",
    ),
)
