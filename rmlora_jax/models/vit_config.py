"""ViTConfig: the sizes and constants of a Vision Transformer, as Hugging Face writes them."""

import dataclasses
from typing import Any

ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu")

# Fields of config.json that say nothing about the numbers of an image classifier: book-keeping,
# labels (read by the loader), and the pooler and decoder, which the classifier does not run.
IGNORED = (
    *("architectures", "model_type", "problem_type", "finetuning_task", "transformers_version"),
    *("dtype", "torch_dtype", "torchscript", "use_bfloat16", "tie_word_embeddings", "use_cache"),
    *("return_dict", "output_attentions", "output_hidden_states", "gradient_checkpointing"),
    *("id2label", "label2id", "num_labels", "chunk_size_feed_forward"),
    *("pooler_act", "pooler_output_size", "encoder_stride"),
)


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

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and (type(value) is not int or value < 1):
                _refuse(field.name, value, "a whole number of at least 1")
            if field.type is bool and not isinstance(value, bool):
                _refuse(field.name, value, "true or false")
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if field.type is float and not (number and 0 <= value < float("inf")):
                _refuse(field.name, value, "a number of at least 0")
            if field.name.endswith("_prob") and value >= 1:
                _refuse(field.name, value, "a probability below 1")
        if self.hidden_act not in ACTIVATIONS:
            _refuse("hidden_act", self.hidden_act, f"one of {', '.join(ACTIVATIONS)}")
        if self.hidden_size % self.num_attention_heads:
            _refuse(
                "num_attention_heads",
                self.num_attention_heads,
                f"a divisor of hidden_size = {self.hidden_size}",
            )
        if self.patch_size > self.image_size:
            _refuse("patch_size", self.patch_size, f"at most image_size = {self.image_size}")

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
        kind = config.get("model_type", "vit")
        if kind != "vit":
            _refuse("model_type", kind, "'vit'")
        ours = {field.name for field in dataclasses.fields(cls)}
        for name, value in config.items():
            # A value that is null, false, 0 or empty asks for nothing.
            if name not in ours | set(IGNORED) and not name.startswith("_") and value:
                raise ValueError(
                    f"config field {name!r} = {value!r} is not supported by this ViT; "
                    "remove it if it does not change what the model computes"
                )
        known = {name: config[name] for name in ours & config.keys()}
        for name in ("image_size", "patch_size"):
            if name in known:
                known[name] = _side(name, known[name])
        return cls(**known)


def _side(name: str, value) -> int:
    if not isinstance(value, (list, tuple)):
        return value
    if len(set(value)) != 1:
        _refuse(name, value, "one number, or two that are equal (square)")
    return value[0]


def _refuse(name: str, value, allowed: str):
    raise ValueError(f"config field {name!r} is {value!r}; it must be {allowed}")
