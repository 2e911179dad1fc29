"""ViTConfig: the sizes and constants of a Vision Transformer, as Hugging Face writes them."""

import dataclasses
from typing import Any

from rmlora_jax.models.hf_config import check_fields, known_fields, refuse

# Beside the book-keeping: the pooler and the decoder, which the classifier does not run.
IGNORED = ("pooler_act", "pooler_output_size", "encoder_stride")


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """The architecture of a ViT; field names, meanings and defaults are Hugging Face's.

    Attributes:
      hidden_size: width D of the residual stream.
      num_hidden_layers: number of transformer layers L.
      num_attention_heads: heads; must divide ``hidden_size``.
      intermediate_size: width of the MLP.
      hidden_act: activation of the MLP, one of gelu (the exact erf form), gelu_new,
        gelu_pytorch_tanh, quick_gelu, relu, silu.
      hidden_dropout_prob: dropout probability on embeddings and residual branches (training).
      attention_probs_dropout_prob: dropout probability on attention weights (training).
      initializer_range: standard deviation of new weights.
      layer_norm_eps: epsilon of every layer norm.
      image_size: side of the square image, in pixels.
      patch_size: side of a square patch, in pixels.
      num_channels: image channels C.
      qkv_bias: whether query, key and value have biases.
      bottleneck_width: width of an adapter behind attention and MLP; 0: none (see inserts.py).
      prefix_length: trained keys and values in front of every layer's own; 0: none.

    Raises:
      ValueError: naming the field, its value and what is allowed.

    Source: Dosovitskiy et al. 2021, https://arxiv.org/abs/2010.11929, section 3.1.

    >>> ViTConfig(image_size=64, patch_size=8).grid
    8
    """

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    image_size: int = 224
    patch_size: int = 16
    num_channels: int = 3
    qkv_bias: bool = True
    bottleneck_width: int = 0
    prefix_length: int = 0

    def __post_init__(self):
        check_fields(self)
        if self.patch_size > self.image_size:
            refuse("patch_size", self.patch_size, f"at most image_size = {self.image_size}")

    @property
    def grid(self) -> int:
        """Patches along one side of the image; a remainder of pixels is left out, as in PyTorch."""
        return self.image_size // self.patch_size

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "ViTConfig":
        """Reads the dictionary of a Hugging Face ``config.json``.

        A field that could change the model's numbers and is not known here is refused by name
        rather than ignored.

        Raises:
          ValueError: an unsupported ``model_type``, field or value.

        >>> ViTConfig.from_hf({"model_type": "vit", "image_size": 384}).image_size
        384
        """
        known = known_fields(cls, config, model_types=("vit",), ignored=IGNORED, model="ViT")
        for name in ("image_size", "patch_size"):
            if name in known:
                known[name] = _side(name, known[name])
        return cls(**known)


def _side(name: str, value) -> int:
    if not isinstance(value, (list, tuple)):
        return value
    if len(set(value)) != 1:
        refuse(name, value, "one number, or two that are equal (square)")
    return value[0]
