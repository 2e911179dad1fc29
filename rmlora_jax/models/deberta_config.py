"""DebertaConfig: the sizes and constants of DeBERTa-v2 and v3, as Hugging Face writes them."""

import dataclasses
from typing import Any

from rmlora_jax.models.hf_config import check_fields, known_fields, refuse

TERMS = ("c2p", "p2c")

# Beside the book-keeping: the masked-language head (legacy) and the number of the padding token,
# whose embedding is masked out anyway. attention_head_size and pooler_hidden_size are checked
# apart.
IGNORED = (
    *("legacy", "pad_token_id", "padding_idx", "bos_token_id", "eos_token_id"),
    *("attention_head_size", "pooler_hidden_size"),
)


@dataclasses.dataclass(frozen=True)
class DebertaConfig:
    """The architecture of a DeBERTa-v2 or v3 encoder; names and defaults are Hugging Face's.

    Attributes:
      vocab_size: rows of the word embedding.
      hidden_size: width D of the residual stream.
      embedding_size: width of the embeddings, projected to D where it is another; 0: D.
      num_hidden_layers: number of transformer layers L.
      num_attention_heads: heads; must divide ``hidden_size``.
      intermediate_size: width of the MLP.
      hidden_act: activation of the MLP.
      hidden_dropout_prob: dropout on embeddings, relative embeddings and on the output of
        attention, MLP and convolution (training).
      attention_probs_dropout_prob: dropout on attention weights (training).
      max_position_embeddings: rows of the table of absolute positions.
      type_vocab_size: rows of the token-type table; 0: there is none.
      initializer_range: standard deviation of new weights.
      layer_norm_eps: epsilon of every layer norm.
      relative_attention: whether attention looks at relative positions.
      pos_att_type: the terms it adds, any of ``"c2p"`` (content to position) and ``"p2c"``.
      position_buckets: distances beyond half of it share logarithmic buckets; below 1: each
        distance has its own row.
      max_relative_positions: the longest distance told apart; below 1: as
        ``max_position_embeddings``.
      share_att_key: whether relative embeddings go through the projections of the content.
      norm_rel_ebd: ``"layer_norm"`` normalises the relative embeddings, ``"none"`` does not.
      position_biased_input: whether absolute positions are added to the embeddings.
      conv_kernel_size: width of the convolution beside the first layer, odd; 0: there is none.
      conv_groups: its groups; must divide ``hidden_size``.
      conv_act: its activation.
      pooler_hidden_act: activation of the pooler.
      pooler_dropout: dropout before the pooler (training).
      cls_dropout: dropout before the head (training); None: as ``hidden_dropout_prob``.
      bottleneck_width: width of an adapter behind attention and MLP; 0: none (see inserts.py).

    Raises:
      ValueError: naming the field, its value and what is allowed.

    Source: He et al. 2021, https://arxiv.org/abs/2006.03654; https://arxiv.org/abs/2111.09543.

    >>> DebertaConfig(position_buckets=256).span
    256
    """

    vocab_size: int = 128100
    hidden_size: int = 1536
    embedding_size: int = 0
    num_hidden_layers: int = 24
    num_attention_heads: int = 24
    intermediate_size: int = 6144
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 0
    initializer_range: float = 0.02
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
    bottleneck_width: int = 0

    def __post_init__(self):
        least = {"embedding_size": 0, "type_vocab_size": 0, "conv_kernel_size": 0}
        any_number = dict.fromkeys(("position_buckets", "max_relative_positions"), -(2**31))
        check_fields(self, minimum=least | any_number)
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
        drop = self.cls_dropout
        if drop is not None and not (isinstance(drop, (int, float)) and 0 <= drop < 1):
            refuse("cls_dropout", drop, "a probability below 1, or null")

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

    @property
    def terms(self) -> tuple[str, ...]:
        """The terms that attention adds for relative positions."""
        return self.pos_att_type if self.relative_attention else ()

    @property
    def embedding_width(self) -> int:
        """Width of the embeddings."""
        return self.embedding_size or self.hidden_size

    @property
    def head_dropout(self) -> float:
        """The dropout before the head."""
        return self.hidden_dropout_prob if self.cls_dropout is None else self.cls_dropout

    @property
    def longest(self) -> int | None:
        """The number of tokens that have positions; None: any number."""
        return self.max_position_embeddings if self.position_biased_input else None

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "DebertaConfig":
        """Reads the dictionary of a Hugging Face ``config.json``.

        Raises:
          ValueError: an unsupported ``model_type``, field or value.

        >>> DebertaConfig.from_hf({"model_type": "deberta-v2", "pos_att_type": "p2c|c2p"}).terms
        ()
        """
        known = known_fields(
            cls, config, model_types=("deberta-v2",), ignored=IGNORED, model="DeBERTa"
        )
        known = {name: value for name, value in known.items() if value is not None}
        terms = known.get("pos_att_type", ())
        if isinstance(terms, str):
            terms = [term.strip() for term in terms.lower().split("|") if term.strip()]
        known["pos_att_type"] = tuple(sorted(set(terms)))
        if isinstance(known.get("norm_rel_ebd"), str):
            known["norm_rel_ebd"] = known["norm_rel_ebd"].strip().lower()
        built = cls(**known)
        head = built.hidden_size // built.num_attention_heads
        for name, value in (
            ("attention_head_size", head),
            ("pooler_hidden_size", built.hidden_size),
        ):
            if config.get(name) not in (None, value):
                refuse(name, config[name], f"{value}, as hidden_size asks for")
        return built
