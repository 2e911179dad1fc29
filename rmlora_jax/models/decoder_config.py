"""The architecture of a decoder, which says what differs between its families."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn

from rmlora_jax.models.config import ModelConfig, refuse
from rmlora_jax.models.decoder_files import FULL, READERS, SLIDING, read_fields
from rmlora_jax.models.rope import Rope

PLAIN = Rope()


@dataclasses.dataclass(frozen=True)
class DecoderConfig(ModelConfig):
    """The architecture of a causal language model.

    Names are Hugging Face's where the meaning is the same in every family. The defaults are those
    of Llama.

    Attributes:
      model_type: the family, see ``model_types``.
      vocab_size: rows of the embedding.
      hidden_size: width D of the residual stream.
      intermediate_size: width of the MLP.
      num_hidden_layers: number of layers L.
      num_attention_heads: query heads H.
      num_key_value_heads: key and value heads K, a divisor of H; 0: as many as query heads.
      head_dim: size of a head; 0: ``hidden_size / num_attention_heads``.
      hidden_act: activation of the MLP.
      rms_norm_eps: epsilon of every norm.
      initializer_range: standard deviation of new weights.
      max_position_embeddings: longest text of pre-training, in tokens. Longer texts are computed,
        too.
      tie_word_embeddings: whether the embedding is the head.
      qkv_bias, out_bias, mlp_bias: which linear layers have biases.
      qk_norm: whether queries and keys are normalised, each head by itself.
      post_norm: whether the outputs of attention and MLP are normalised, too.
      norm_plus_one: whether a norm multiplies by 1 + scale, not by scale.
      embed_scale: factor of the embeddings.
      query_pre_attn_scalar: scores are divided by its square root; 0: by that of ``head_dim``.
      attn_logit_softcapping, final_logit_softcapping: c: scores and logits x become c tanh(x / c);
        0: they stay.
      sliding_window: keys that a query of a sliding layer sees; 0: no layer slides.
      layer_types: "sliding_attention" or "full_attention" for each layer; empty: all slide.
      rope: rotary positions.
      local_rope: those of sliding layers; None: ``rope``.
      rope_layers: which layers have rotary positions; empty: all.

    Raises:
      ValueError: naming the field, its value and what is allowed.

    >>> config = DecoderConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2)
    >>> config.head_dim, config.num_key_value_heads, config.query_scale
    (16, 2, 0.25)
    """

    model_type: str = "llama"
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 0
    head_dim: int = 0
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    post_norm: bool = False
    norm_plus_one: bool = False
    embed_scale: float = 1.0
    query_pre_attn_scalar: float = 0.0
    attn_logit_softcapping: float = 0.0
    final_logit_softcapping: float = 0.0
    sliding_window: int = 0
    layer_types: tuple[str, ...] = ()
    rope: Rope = PLAIN
    local_rope: Rope | None = None
    rope_layers: tuple[bool, ...] = ()

    model_types = tuple(READERS)
    no_prefix = "a decoder has no prefix vectors"
    least: ClassVar[dict[str, int]] = {"num_key_value_heads": 0, "head_dim": 0, "sliding_window": 0}

    def __post_init__(self):
        super().__post_init__()
        heads, width = self.num_attention_heads, self.hidden_size
        if not self.head_dim and width % heads:
            refuse("num_attention_heads", heads, f"a divisor of hidden_size = {width}")
        # A frozen dataclass sets its own derived values so.
        object.__setattr__(self, "head_dim", self.head_dim or width // heads)
        object.__setattr__(self, "num_key_value_heads", self.num_key_value_heads or heads)
        if heads % self.num_key_value_heads:
            refuse("num_key_value_heads", self.num_key_value_heads, f"a divisor of {heads}")
        if self.head_dim % 2:
            refuse("head_dim", self.head_dim, "even")
        if set(self.layer_types) - {SLIDING, FULL}:
            refuse("layer_types", self.layer_types, f"made of {SLIDING!r} and {FULL!r}")
        for name in ("layer_types", "rope_layers"):
            value = getattr(self, name)
            if len(value) not in (0, self.num_hidden_layers):
                refuse(name, value, f"of {self.num_hidden_layers} layers")
        if SLIDING in self.layer_types and not self.sliding_window:
            refuse("sliding_window", self.sliding_window, f"given, since a layer is {SLIDING!r}")

    @property
    def kernel_init(self) -> nn.initializers.Initializer:
        """The initialiser of new kernels: N(0, ``initializer_range``^2)."""
        return nn.initializers.normal(self.initializer_range)

    @property
    def query_scale(self) -> float:
        """The factor of the scores of attention."""
        return (self.query_pre_attn_scalar or self.head_dim) ** -0.5

    @property
    def sliding(self) -> tuple[bool, ...]:
        """Whether each layer has a window."""
        if not self.layer_types:
            return (bool(self.sliding_window),) * self.num_hidden_layers
        return tuple(kind == SLIDING for kind in self.layer_types)

    @property
    def ropes(self) -> tuple[Rope | None, ...]:
        """The rope of each layer; None: no positions."""
        rotates = self.rope_layers or (True,) * self.num_hidden_layers
        own = (self.local_rope or self.rope if slides else self.rope for slides in self.sliding)
        return tuple(rope if turns else None for rope, turns in zip(own, rotates, strict=True))

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "DecoderConfig":
        """See ``ModelConfig.from_hf``.

        >>> DecoderConfig.from_hf({"model_type": "qwen2", "hidden_size": 64, "vocab_size": 100,
        ...                        "num_attention_heads": 4, "num_key_value_heads": 2}).qkv_bias
        True
        """
        return cls(**read_fields(config))
