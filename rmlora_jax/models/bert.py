"""BERT and RoBERTa as classifiers of texts: their config, model, and names in files."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rmlora_jax.models.attention import attend, attend_with_dropout
from rmlora_jax.models.blocks import (
    MLP,
    REMAT,
    bottleneck,
    check_choices,
    check_counts,
    checked_tokens,
    dense_layer,
    embed_layer,
    kept_with_attention,
    layer_norm,
    prefixed,
    scan_layers,
)
from rmlora_jax.models.config import EncoderConfig, check_fields, refuse
from rmlora_jax.models.family import (
    AS_IS,
    NEW_CLASSIFIER,
    TEXTS,
    Entry,
    Family,
    linear_entries,
    norm_entries,
)

# Families that compute what RoBERTa does, over other vocabularies.
ROBERTAS = ("roberta", "xlm-roberta", "camembert")


@dataclasses.dataclass(frozen=True)
class BertConfig(EncoderConfig):
    """The architecture of a BERT or RoBERTa encoder; names and defaults are Hugging Face's.

    Attributes: those of `EncoderConfig`, and

      model_type: bert, or roberta, xlm-roberta, camembert, which number positions from
        ``pad_token_id + 1`` on and have another classification head.
      vocab_size: rows of the word embedding.
      classifier_dropout: dropout before the head (training); None: as ``hidden_dropout_prob``.
      max_position_embeddings: rows of the position table.
      type_vocab_size: rows of the token-type table.
      pad_token_id: the token that stands for padding.
      prefix_length: trained keys and values in front of every layer's own; 0: none.

    Raises:
      ValueError: naming the field, its value and what is allowed.

    Source: Devlin et al. 2019, https://arxiv.org/abs/1810.04805; Liu et al. 2019,
    https://arxiv.org/abs/1907.11692.

    >>> BertConfig(model_type="roberta", max_position_embeddings=514, pad_token_id=1).longest
    512
    """

    model_type: str = "bert"
    vocab_size: int = 30522
    classifier_dropout: float | None = None
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    pad_token_id: int = 0
    prefix_length: int = 0

    model_types = ("bert", *ROBERTAS)
    # Token numbers that only a tokenizer reads; position_embedding_type is checked apart.
    inert = ("bos_token_id", "eos_token_id", "position_embedding_type")

    def __post_init__(self):
        check_fields(self, minimum={"pad_token_id": 0})
        if self.model_type not in self.model_types:
            refuse("model_type", self.model_type, f"one of {', '.join(self.model_types)}")
        drop = self.classifier_dropout
        if drop is not None and not (isinstance(drop, (int, float)) and 0 <= drop < 1):
            refuse("classifier_dropout", drop, "a probability below 1, or null")

    @property
    def is_roberta(self) -> bool:
        return self.model_type in ROBERTAS

    @property
    def head_dropout(self) -> float:
        """The dropout before the head."""
        drop = self.classifier_dropout
        return self.hidden_dropout_prob if drop is None else drop

    @property
    def longest(self) -> int:
        """The number of tokens that have positions."""
        return self.max_position_embeddings - self.is_roberta * (self.pad_token_id + 1)

    @classmethod
    def from_hf(cls, config):
        """See ``ModelConfig.from_hf``.

        >>> BertConfig.from_hf({"model_type": "bert", "hidden_size": 384}).head_dropout
        0.1
        """
        kind = config.get("position_embedding_type") or "absolute"
        if kind != "absolute":
            refuse("position_embedding_type", kind, "'absolute'")
        known = cls.known_fields(config)
        if known.get("pad_token_id", 0) is None:
            del known["pad_token_id"]
        if known.get("model_type") in ROBERTAS:  # whose defaults differ in these
            known = {"vocab_size": 50265, "pad_token_id": 1, "layer_norm_eps": 1e-12} | known
        return cls(**known)


class Embed(nn.Module):
    """Words, positions and token types, normalised: (B, N) -> (B, N, D)."""

    config: BertConfig
    dtype: Any
    param_dtype: Any
    deterministic: bool

    @nn.compact
    def __call__(self, input_ids, token_type_ids):
        c = self.config
        table = embed_layer(c, self.param_dtype, self.dtype)
        x = table(c.vocab_size, c.hidden_size, name="word")(input_ids)
        x += table(c.type_vocab_size, c.hidden_size, name="token_type")(token_type_ids)
        position = table(c.max_position_embeddings, c.hidden_size, name="position")
        x += position(self.positions(input_ids))
        x = layer_norm(c.layer_norm_eps, self.dtype, self.param_dtype, "norm")(x)
        return nn.Dropout(c.hidden_dropout_prob, deterministic=self.deterministic)(x)

    def positions(self, input_ids):
        if not self.config.is_roberta:
            return jnp.arange(input_ids.shape[1])[None]
        # The padding token has the position of its own number, the others count on from there.
        pad = self.config.pad_token_id
        real = (input_ids != pad).astype(jnp.int32)
        return pad + jnp.cumsum(real, axis=1) * real


class Attention(nn.Module):
    """Multi-head self-attention: (B, N, D) -> (B, N, D), every projection a plain Dense."""

    config: BertConfig
    dtype: Any
    param_dtype: Any
    deterministic: bool

    @nn.compact
    def __call__(self, x, mask):
        c = self.config
        dense = dense_layer(c, self.param_dtype, self.dtype)
        heads = (*x.shape[:-1], c.num_attention_heads, c.hidden_size // c.num_attention_heads)
        query, key, value = (
            kept_with_attention(dense(c.hidden_size, name=name)(x)).reshape(heads)
            for name in ("query", "key", "value")
        )
        key, value, mask = prefixed(c, self.param_dtype, key, value, mask)
        if c.attention_probs_dropout_prob and not self.deterministic:
            drop = nn.Dropout(c.attention_probs_dropout_prob, deterministic=False)
            mixed = attend_with_dropout(query, key, value, drop, mask)
        else:
            mixed = attend(query, key, value, mask=mask)
        return kept_with_attention(dense(c.hidden_size, name="out")(mixed.reshape(x.shape)))


class Layer(nn.Module):
    """One post-norm layer as the body of a scan: x -> (x, x where ``collect``, else None)."""

    config: BertConfig
    dtype: Any
    param_dtype: Any
    deterministic: bool
    collect: bool

    @nn.compact
    def __call__(self, x, mask):
        c = self.config
        norm = functools.partial(layer_norm, c.layer_norm_eps, self.dtype, self.param_dtype)
        drop = nn.Dropout(c.hidden_dropout_prob, deterministic=self.deterministic)
        adapter = functools.partial(bottleneck, c, self.dtype, self.param_dtype)
        attention = Attention(
            c, self.dtype, self.param_dtype, self.deterministic, name="attention"
        )
        mlp = MLP(c, self.dtype, self.param_dtype, name="mlp")
        x = norm("norm1")(x + adapter("bottleneck1")(drop(attention(x, mask))))
        x = norm("norm2")(x + adapter("bottleneck2")(drop(mlp(x))))
        return x, x if self.collect else None


class Encoder(nn.Module):
    """All layers: (B, N, D) -> (B, N, D), and every hidden state where ``collect``."""

    config: Any  # BertConfig, or another with its fields of the layers
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
            in_axes=nn.broadcast,
        )(c, self.dtype, self.param_dtype, self.deterministic, self.collect, name="layers")
        out, after = layers(x, mask)
        return out, jnp.concatenate([x[None], after]) if self.collect else None


class Bert(nn.Module):
    """BERT or RoBERTa with a classification head.

    Equals PyTorch's ``BertForSequenceClassification`` (the head on the pooler: a tanh layer over
    the first token) and ``RobertaForSequenceClassification`` (its head's own tanh layer is the
    ``pooler`` here).

    Parameters live under ``embed`` {word, position, token_type, norm},
    ``encoder/layers/attention/`` {query, key, value, out}, ``encoder/layers/mlp/`` {fc1, fc2},
    ``encoder/layers/`` {norm1, norm2}, ``pooler`` and ``head``; where the config has them also
    ``encoder/layers/`` {bottleneck1, bottleneck2} and ``encoder/layers/attention/prefix``.
    Everything under ``encoder/layers`` is stacked over the layers on axis 0.

    Attributes:
      config: the architecture.
      num_labels: outputs of the head; 1 for regression.
      dtype: compute dtype of everything but layer-norm statistics, softmax, pooler and head, which
        are float32.
      param_dtype: dtype of new parameters; loaded ones keep their own.
      unroll: layers per iteration of the scan; a larger value compiles longer and runs faster.
      remat: what the backward pass recomputes: ``"none"`` nothing, ``"dots"`` everything but
        the outputs of the linear layers, ``"attention"`` everything but those in attention
        and what cuDNN's kernel gives, ``"full"`` each layer from its input.

    Source: Devlin et al. 2019, https://arxiv.org/abs/1810.04805, sections 3 and 4.1; Liu et al.
    2019, https://arxiv.org/abs/1907.11692.

    >>> config = BertConfig(vocab_size=50, hidden_size=12, num_hidden_layers=2,
    ...                     num_attention_heads=3, intermediate_size=16)
    >>> model, tokens = Bert(config, num_labels=2), jnp.ones((4, 7), jnp.int32)
    >>> params = model.init(jax.random.key(0), tokens)["params"]
    >>> params["encoder"]["layers"]["mlp"]["fc1"]["kernel"].shape
    (2, 12, 16)
    >>> model.apply({"params": params}, tokens).shape
    (4, 2)
    """

    config: BertConfig
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
        """Logits of a batch of tokenised texts.

        Args:
          input_ids: int (B, N).
          attention_mask: bool or 0 and 1, (B, N): False for padding. None: no padding.
          token_type_ids: int (B, N), which of two texts a token belongs to. None: 0.
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
        check_choices("Bert", remat=(self.remat, REMAT))
        check_counts("Bert", num_labels=self.num_labels, unroll=self.unroll)
        input_ids, mask, types = checked_tokens(
            "Bert", c.longest, input_ids, attention_mask, token_type_ids
        )
        x = Embed(c, self.dtype, self.param_dtype, not train, name="embed")(input_ids, types)
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
        drop = nn.Dropout(c.head_dropout, deterministic=not train)
        dense = dense_layer(c, self.param_dtype)
        first = x[:, 0].astype(jnp.float32)
        if c.is_roberta:
            first = drop(first)
        pooled = jnp.tanh(dense(c.hidden_size, name="pooler")(first))
        logits = dense(self.num_labels, name="head")(drop(pooled))
        return (logits, states) if hidden_states else logits


# Modules of a layer: path here, name there, whether it is a norm.
_LAYER = (
    ("attention/query", "attention.self.query", False),
    ("attention/key", "attention.self.key", False),
    ("attention/value", "attention.self.value", False),
    ("attention/out", "attention.output.dense", False),
    ("norm1", "attention.output.LayerNorm", True),
    ("mlp/fc1", "intermediate.dense", False),
    ("mlp/fc2", "output.dense", False),
    ("norm2", "output.LayerNorm", True),
)


def _encoder_table(prefix: str) -> tuple[Entry, ...]:
    """Embeddings and layers, whose names families of BERT's lineage share."""
    embeddings = f"{prefix}embeddings"
    return (
        *(
            Entry(f"embed/{path}/embedding", AS_IS, (f"{embeddings}.{path}_embeddings.weight",))
            for path in ("word", "position", "token_type")
        ),
        *norm_entries("embed/norm", f"{embeddings}.LayerNorm"),
        *(
            entry
            for path, name, is_norm in _LAYER
            for entry in (norm_entries if is_norm else linear_entries)(
                f"encoder/layers/{path}", f"{prefix}encoder.layer.{{}}.{name}"
            )
        ),
    )


BERT = Family(
    config=BertConfig,
    model=Bert,
    inputs=TEXTS,
    classifier="BertForSequenceClassification",
    prefix="bert.",
    table=(
        *_encoder_table("bert."),
        *linear_entries("pooler", "bert.pooler.dense"),
        *linear_entries("head", "classifier"),
    ),
    new=NEW_CLASSIFIER,
    leftovers=(r"cls\..*", r"(bert\.)?embeddings\.position_ids"),
)

ROBERTA = Family(
    config=BertConfig,
    model=Bert,
    inputs=TEXTS,
    classifier="RobertaForSequenceClassification",
    prefix="roberta.",
    table=(
        *_encoder_table("roberta."),
        *linear_entries("pooler", "classifier.dense"),
        *linear_entries("head", "classifier.out_proj"),
    ),
    new=NEW_CLASSIFIER,
    # The pooler of the bare encoder is not what the classifier runs.
    leftovers=(
        r"lm_head\..*",
        r"(roberta\.)?pooler\.dense\.(weight|bias)",
        r"(roberta\.)?embeddings\.position_ids",
    ),
)

# They compute what RoBERTa does, over other vocabularies.
XLM_ROBERTA = ROBERTA._replace(classifier="XLMRobertaForSequenceClassification")
CAMEMBERT = ROBERTA._replace(classifier="CamembertForSequenceClassification")
