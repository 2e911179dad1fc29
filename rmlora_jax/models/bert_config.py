"""BertConfig: the sizes and constants of BERT and RoBERTa, as Hugging Face writes them."""

import dataclasses
from typing import Any

from rmlora_jax.models.hf_config import check_fields, known_fields, refuse

# Families that compute what RoBERTa does, over other vocabularies.
ROBERTAS = ("roberta", "xlm-roberta", "camembert")

# Beside the book-keeping: token numbers that only a tokenizer reads. position_embedding_type is
# checked apart.
IGNORED = ("bos_token_id", "eos_token_id", "position_embedding_type")


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """The architecture of a BERT or RoBERTa encoder; names and defaults are Hugging Face's.

    Attributes:
      model_type: bert, or roberta, xlm-roberta, camembert, which number positions from
        ``pad_token_id + 1`` on and have another classification head.
      vocab_size: rows of the word embedding.
      hidden_size: width D of the residual stream.
      num_hidden_layers: number of transformer layers L.
      num_attention_heads: heads; must divide ``hidden_size``.
      intermediate_size: width of the MLP.
      hidden_act: activation of the MLP.
      hidden_dropout_prob: dropout on embeddings and on the output of attention and MLP (training).
      attention_probs_dropout_prob: dropout on attention weights (training).
      classifier_dropout: dropout before the head (training); None: as ``hidden_dropout_prob``.
      max_position_embeddings: rows of the position table.
      type_vocab_size: rows of the token-type table.
      initializer_range: standard deviation of new weights.
      layer_norm_eps: epsilon of every layer norm.
      pad_token_id: the token that stands for padding.
      bottleneck_width: width of an adapter behind attention and MLP; 0: none (see inserts.py).
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
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float | None = None
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 0
    bottleneck_width: int = 0
    prefix_length: int = 0

    def __post_init__(self):
        check_fields(self, minimum={"pad_token_id": 0})
        if self.model_type not in ("bert", *ROBERTAS):
            refuse("model_type", self.model_type, f"one of bert, {', '.join(ROBERTAS)}")
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
    def from_hf(cls, config: dict[str, Any]) -> "BertConfig":
        """Reads the dictionary of a Hugging Face ``config.json``.

        Raises:
          ValueError: an unsupported ``model_type``, field or value.

        >>> BertConfig.from_hf({"model_type": "bert", "hidden_size": 384}).head_dropout
        0.1
        """
        kind = config.get("position_embedding_type") or "absolute"
        if kind != "absolute":
            refuse("position_embedding_type", kind, "'absolute'")
        known = known_fields(
            cls, config, model_types=("bert", *ROBERTAS), ignored=IGNORED, model="BERT"
        )
        if known.get("pad_token_id", 0) is None:
            del known["pad_token_id"]
        if known.get("model_type") in ROBERTAS:  # whose defaults differ in these
            known = {"vocab_size": 50265, "pad_token_id": 1, "layer_norm_eps": 1e-12} | known
        return cls(**known)
