"""BERT and RoBERTa as classifiers of texts: their config, model, and names in files."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from rmlora_jax.models.blocks import Parts, TextClassifier
from rmlora_jax.models.config import EncoderConfig, refuse
from rmlora_jax.models.family import (
    TEXTS,
    Family,
    layer_entries,
    linear_entries,
    text_entries,
    text_layer,
)

# Families that compute the same as RoBERTa, over other vocabularies.
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
    # position_embedding_type is checked apart. The others are of the first BERT's TensorFlow code,
    # and no BERT of transformers reads them: its pooler is one tanh layer over the first token.
    inert = (
        *("position_embedding_type", "directionality", "pooler_type", "pooler_fc_size"),
        *("pooler_num_attention_heads", "pooler_num_fc_layers", "pooler_size_per_head"),
    )
    least = EncoderConfig.least | {"pad_token_id": 0}

    @property
    def is_roberta(self) -> bool:
        return self.model_type in ROBERTAS

    @property
    def longest(self) -> int:
        """The number of tokens that have positions."""
        return self.max_position_embeddings - self.is_roberta * (self.pad_token_id + 1)

    @classmethod
    def from_hf(cls, config):
        """See ``ModelConfig.from_hf``."""
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

    parts: Parts

    @nn.compact
    def __call__(self, input_ids, token_type_ids, mask=None):
        parts, c = self.parts, self.parts.config
        x = parts.table(c.vocab_size, c.hidden_size, "word")(input_ids)
        x += parts.table(c.type_vocab_size, c.hidden_size, "token_type")(token_type_ids)
        table = parts.table(c.max_position_embeddings, c.hidden_size, "position")
        x += table(positions(c, input_ids))
        return parts.dropout()(parts.norm("norm")(x))


def positions(config: BertConfig, input_ids):
    """Rows of the position table, (1 or B, N)."""
    if not config.is_roberta:
        return jnp.arange(input_ids.shape[1])[None]
    # The padding token has the position of its own number, the others count on from there.
    real = (input_ids != config.pad_token_id).astype(jnp.int32)
    return config.pad_token_id + jnp.cumsum(real, axis=1) * real


def pooled(parts: Parts, first: jax.Array) -> jax.Array:
    """See `TextClassifier`."""
    c = parts.config
    drop = parts.dropout(c.classifier_dropout)
    first = drop(first) if c.is_roberta else first
    return drop(jnp.tanh(parts.dense(c.hidden_size, name="pooler")(first)))


class Bert(TextClassifier):
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
        and of cuDNN's kernel, ``"full"`` each layer from its input.

    Source: Devlin et al. 2019, https://arxiv.org/abs/1810.04805, sections 3 and 4.1; Liu et al.
    2019, https://arxiv.org/abs/1907.11692.

    >>> import jax
    >>> config = BertConfig(vocab_size=50, hidden_size=12, num_hidden_layers=2,
    ...                     num_attention_heads=3, intermediate_size=16)
    >>> model, tokens = Bert(config, num_labels=2), jnp.ones((4, 7), jnp.int32)
    >>> params = model.init(jax.random.key(0), tokens)["params"]
    >>> params["encoder"]["layers"]["mlp"]["fc1"]["kernel"].shape
    (2, 12, 16)
    >>> model.apply({"params": params}, tokens).shape
    (4, 2)
    """

    embed_type = Embed
    pooled = staticmethod(pooled)


def _family(name: str, classifier: str, pooler: str, head: str, *leftovers: str) -> Family:
    """The family of these names in transformers, Bert's among them."""
    return Family(
        config=BertConfig,
        model=Bert,
        inputs=TEXTS,
        classifier=f"{classifier}ForSequenceClassification",
        prefix=f"{name}.",
        table=(
            *text_entries(f"{name}.embeddings"),
            *layer_entries(
                [f"{name}.encoder.layer.{{}}"], text_layer("{}", "query", "key", "value")
            ),
            *linear_entries("pooler", pooler),
            *linear_entries("head", head),
        ),
        leftovers=(*leftovers, rf"({name}\.)?embeddings\.position_ids"),
    )


BERT = _family("bert", "Bert", "bert.pooler.dense", "classifier", r"cls\..*")
# The pooler of RoBERTa's bare encoder is not the one that its classifier runs.
ROBERTA = _family(
    "roberta",
    "Roberta",
    "classifier.dense",
    "classifier.out_proj",
    r"lm_head\..*",
    r"(roberta\.)?pooler\.dense\.(weight|bias)",
)
XLM_ROBERTA = ROBERTA._replace(classifier="XLMRobertaForSequenceClassification")
CAMEMBERT = ROBERTA._replace(classifier="CamembertForSequenceClassification")
