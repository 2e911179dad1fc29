"""The Vision Transformer as an image classifier: its config, model, and names in files."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rmlora_jax.models.attention import filled_length
from rmlora_jax.models.blocks import Layer, Parts, parts_of, with_token
from rmlora_jax.models.config import EncoderConfig, refuse
from rmlora_jax.models.family import (
    AS_IS,
    CONV,
    IMAGES,
    Entry,
    Family,
    layer_entries,
    linear_entries,
    norm_entries,
)
from rmlora_jax.models.positions import resize_positions

# Standard deviation of a unit normal cut at two standard deviations.
TRUNCATED_STD = 0.87962566103423978


@dataclasses.dataclass(frozen=True)
class ViTConfig(EncoderConfig):
    """The architecture of a ViT; field names, meanings and defaults are Hugging Face's.

    Attributes: those of `EncoderConfig`, and

      image_size: side of the square image, in pixels.
      patch_size: side of a square patch, in pixels.
      num_channels: image channels C.
      qkv_bias: whether query, key and value have biases.

    >>> ViTConfig(image_size=64, patch_size=8).grid
    8
    """

    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    image_size: int = 224
    patch_size: int = 16
    num_channels: int = 3
    qkv_bias: bool = True
    prefix_length: int = 0

    model_types = ("vit",)
    norm_first = True
    # The pooler and the decoder, which the classifier does not run.
    inert = ("pooler_act", "pooler_output_size", "encoder_stride")

    def __post_init__(self):
        super().__post_init__()
        if self.patch_size > self.image_size:
            refuse("patch_size", self.patch_size, f"at most image_size = {self.image_size}")

    @property
    def grid(self) -> int:
        """Patches along one side of the image; a remainder of pixels is left out, as in PyTorch."""
        return self.image_size // self.patch_size

    @property
    def kernel_init(self):
        """A normal cut at 2 sigma whose standard deviation is ``initializer_range``."""
        return nn.initializers.truncated_normal(self.initializer_range / TRUNCATED_STD)

    @classmethod
    def from_hf(cls, config):
        """See ``ModelConfig.from_hf``."""
        known = cls.known_fields(config)
        for name in ("image_size", "patch_size"):
            side = known.get(name)
            if isinstance(side, (list, tuple)):
                if len(set(side)) != 1:
                    refuse(name, side, "one number, or two that are equal (square)")
                known[name] = side[0]
        return cls(**known)


class Embed(nn.Module):
    """Patches, class token and position embeddings: (B, S, S, C) -> (B, 1 + grid^2, D)."""

    parts: Parts

    @nn.compact
    def __call__(self, images):
        parts, c = self.parts, self.parts.config
        patch = (c.patch_size, c.patch_size)
        x = parts.conv(
            patch,
            strides=patch,
            padding="VALID",
            conv_general_dilated=product_of_patches,
            name="patch",
        )(images)
        x = x.reshape(x.shape[0], c.grid**2, c.hidden_size)
        return parts.dropout()(with_token(self, parts, x, c.grid**2))


def product_of_patches(images, kernel, strides, padding, *, precision=None, **_):
    """`jax.lax.conv_general_dilated` of windows side by side, as one matrix product.

    It is faster on GPUs, whose convolutions are made for windows that overlap.
    """
    height, width, *_ = strides
    b, h, w, c = images.shape
    rows, columns = h // height, w // width
    x = images[:, : rows * height, : columns * width]  # as padding VALID cuts
    x = x.reshape(b, rows, height, columns, width, c).swapaxes(2, 3)
    x = x.reshape(b, rows, columns, height * width * c)
    return jnp.matmul(x, kernel.reshape(x.shape[-1], -1), precision=precision)


class Encoder(nn.Module):
    """All layers, then the norm of the class token: (B, N, D) -> (B, D) and the hidden states."""

    parts: Parts

    @nn.compact
    def __call__(self, x):
        parts, c, length = self.parts, self.parts.config, x.shape[1]
        if not (parts.train and (c.hidden_dropout_prob or c.attention_probs_dropout_prob)):
            head_dim = c.hidden_size // c.num_attention_heads
            filled = filled_length(length, parts.attention, parts.dtype, head_dim)
            parts = dataclasses.replace(parts, padding=filled - length)
            x = jnp.pad(x, ((0, 0), (0, parts.padding), (0, 0)))
        out, states = parts.layers(Layer, x, in_axes=())
        token = parts.norm("norm")(out[:, 0])
        return token, None if states is None else states[:, :, :length]


class ViT(nn.Module):
    """Vision Transformer classifier; equals PyTorch's ``ViTForImageClassification``.

    Parameters live under ``embed`` {cls_token, position, patch}, ``encoder/layers`` as in `Bert`,
    ``encoder/norm`` and ``head``.

    Attributes:
      config: the architecture.
      num_classes: outputs of the head.
      dtype, param_dtype, unroll, remat: as in `Bert`.
      attention: ``"xla"``, ``"cudnn"`` or ``"auto"``, see ``rmlora_jax.models.attention``.

    Source: Dosovitskiy et al. 2021, https://arxiv.org/abs/2010.11929, equations 1 to 4.

    >>> config = ViTConfig(hidden_size=12, num_hidden_layers=2, num_attention_heads=3,
    ...                    intermediate_size=16, image_size=8, patch_size=4)
    >>> model = ViT(config, num_classes=5)
    >>> images = jnp.zeros((2, 8, 8, 3))
    >>> params = model.init(jax.random.key(0), images)["params"]
    >>> params["encoder"]["layers"]["mlp"]["fc1"]["kernel"].shape
    (2, 12, 16)
    >>> model.apply({"params": params}, images).shape
    (2, 5)
    """

    config: ViTConfig
    num_classes: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    unroll: int = 1
    remat: str = "none"
    attention: str = "auto"

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False, hidden_states: bool = False):
        """Logits of a batch.

        Args:
          images: (B, S, S, C) floating, already normalised, S = ``config.image_size``.
          train: apply the dropout of the config (needs the rng ``dropout`` where it is above 0).
          hidden_states: also return the residual stream before the first and after every layer.

        Returns:
          (B, num_classes) float32 logits; with ``hidden_states`` a pair of the logits and an
          array (L + 1, B, 1 + grid^2, D) in the compute dtype.

        Raises:
          TypeError: the images are not floating.
          ValueError: a wrong image shape, or an attribute out of its range.
        """
        parts, c = parts_of(self, train, hidden_states), self.config
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise TypeError(
                f"ViT: images are {images.dtype}; divide by 255, normalise and pass floats"
            )
        if images.ndim != 4 or images.shape[1:] != (c.image_size, c.image_size, c.num_channels):
            raise ValueError(
                f"ViT: images have shape {images.shape}; expected (batch, {c.image_size}, "
                f"{c.image_size}, {c.num_channels}). Resize them, or load the model with "
                "image_size=..."
            )
        x = Embed(parts, name="embed")(images)
        token, states = Encoder(parts, name="encoder")(x)
        logits = parts.float32.dense(self.num_classes, name="head")(token)
        return (logits, states) if hidden_states else logits


# Modules of a layer: path here, name up to transformers 5.8, name since 5.9.
_LAYER = (
    ("attention/query", "attention.attention.query", "attention.q_proj"),
    ("attention/key", "attention.attention.key", "attention.k_proj"),
    ("attention/value", "attention.attention.value", "attention.v_proj"),
    ("attention/out", "attention.output.dense", "attention.o_proj"),
    ("mlp/fc1", "intermediate.dense", "mlp.fc1"),
    ("mlp/fc2", "output.dense", "mlp.fc2"),
    ("norm1", "layernorm_before", "layernorm_before"),
    ("norm2", "layernorm_after", "layernorm_after"),
)


def _resized(params: dict, config: ViTConfig) -> dict:
    """The parameters with the position embeddings for another image size."""
    position = resize_positions(params["embed"]["position"], config.grid)
    return params | {"embed": params["embed"] | {"position": position}}


VIT = Family(
    config=ViTConfig,
    model=ViT,
    inputs=IMAGES,
    classifier="ViTForImageClassification",
    prefix="vit.",
    table=(
        Entry("embed/cls_token", AS_IS, ("vit.embeddings.cls_token",)),
        Entry("embed/position", AS_IS, ("vit.embeddings.position_embeddings",)),
        *linear_entries("embed/patch", "vit.embeddings.patch_embeddings.projection", axes=CONV),
        *layer_entries(["vit.encoder.layer.{}", "vit.layers.{}"], _LAYER),
        *norm_entries("encoder/norm", "vit.layernorm"),
        *linear_entries("head", "classifier"),
    ),
    # The pooler of ViTModel, and the mask token and the decoder of masked-image modelling.
    leftovers=(
        r"(vit\.)?pooler\.dense\.(weight|bias)",
        r"(vit\.)?embeddings\.mask_token",
        r"decoder\..*",
    ),
    # The head is the only new kernel, and drawn from the key itself.
    draw=lambda config, key, _, shape: np.asarray(config.kernel_init(key, shape, jnp.float32)),
    resized=_resized,
)
