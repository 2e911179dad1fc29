"""The Vision Transformer as an image classifier: its config, model, and names in files."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rmlora_jax.models import blocks
from rmlora_jax.models.attention import IMPLEMENTATIONS, filled_length
from rmlora_jax.models.blocks import REMAT, Parts, check_fields, with_token
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
      prefix_length: trained keys and values in front of every layer's own; 0: none.

    Raises:
      ValueError: naming the field, its value and what is allowed.

    Source: Dosovitskiy et al. 2021, https://arxiv.org/abs/2010.11929, section 3.1.

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
        return truncated_normal(self.initializer_range)

    @classmethod
    def from_hf(cls, config):
        """See ``ModelConfig.from_hf``.

        >>> ViTConfig.from_hf({"model_type": "vit", "image_size": 384}).image_size
        384
        """
        known = cls.known_fields(config)
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


def truncated_normal(std: float):
    """Initialiser: a normal cut at 2 sigma, scaled so that its standard deviation is ``std``."""
    return nn.initializers.truncated_normal(std / TRUNCATED_STD)


class Embed(nn.Module):
    """Patches, class token and position embeddings: (B, S, S, C) -> (B, 1 + grid^2, D)."""

    parts: Parts

    @nn.compact
    def __call__(self, images):
        parts, c = self.parts, self.parts.config
        patch = (c.patch_size, c.patch_size)
        x = nn.Conv(
            c.hidden_size,
            patch,
            strides=patch,
            padding="VALID",
            dtype=parts.dtype,
            param_dtype=parts.param_dtype,
            kernel_init=c.kernel_init,
            conv_general_dilated=product_of_patches,
            name="patch",
        )(images)
        x = x.reshape(x.shape[0], c.grid**2, c.hidden_size)
        return parts.dropout()(with_token(self, parts, x, c.grid**2))


def product_of_patches(images, kernel, strides, padding, *, precision=None, **_):
    """`jax.lax.conv_general_dilated` for windows side by side: one matrix product.

    The kernels that a GPU has for convolutions are made for windows that overlap.
    """
    height, width, *_ = strides
    b, h, w, c = images.shape
    rows, columns = h // height, w // width
    x = images[:, : rows * height, : columns * width]  # as padding VALID cuts
    x = x.reshape(b, rows, height, columns, width, c).swapaxes(2, 3)
    x = x.reshape(b, rows, columns, height * width * c)
    return jnp.matmul(x, kernel.reshape(x.shape[-1], -1), precision=precision)


class Layer(blocks.Layer):
    """A layer with its norms before attention and MLP."""

    norm_first = True


class Encoder(nn.Module):
    """All layers, then the norm of the class token: (B, N, D) -> (B, D) and the hidden states."""

    parts: Parts

    @nn.compact
    def __call__(self, x):
        parts, c, length, padding = self.parts, self.parts.config, x.shape[1], 0
        if not (parts.train and (c.hidden_dropout_prob or c.attention_probs_dropout_prob)):
            head_dim = c.hidden_size // c.num_attention_heads
            filled = filled_length(length, parts.attention, parts.dtype, head_dim)
            padding = filled - length
            x = jnp.pad(x, ((0, 0), (0, padding), (0, 0)))
        out, states = parts.layers(Layer, x, in_axes=(), padding=padding)
        token = parts.norm("norm")(out[:, 0])
        return token, None if states is None else states[:, :, :length]


class ViT(nn.Module):
    """Vision Transformer classifier; equals PyTorch's ``ViTForImageClassification``.

    Parameters live under ``embed`` (cls_token, position, patch), ``encoder/layers/attention/``
    {query, key, value, out}, ``encoder/layers/mlp/`` {fc1, fc2}, ``encoder/layers/`` {norm1,
    norm2}, ``encoder/norm`` and ``head``; where the config has them also ``encoder/layers/``
    {bottleneck1, bottleneck2} and ``encoder/layers/attention/prefix``. Everything under
    ``encoder/layers`` is stacked over the layers on axis 0.

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
        self.check(images)
        kinds = (self.dtype, self.param_dtype)
        scan = (self.unroll, self.remat)
        parts = Parts(self.config, *kinds, train, hidden_states, *scan, self.attention)
        x = Embed(parts, name="embed")(images)
        token, states = Encoder(parts, name="encoder")(x)
        logits = parts.float32.dense(self.num_classes, name="head")(token)
        return (logits, states) if hidden_states else logits

    def check(self, images):
        check_fields(
            self, "num_classes", "unroll", remat=REMAT, attention=IMPLEMENTATIONS
        )
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise TypeError(
                f"ViT: images are {images.dtype}; divide by 255, normalise and pass floats"
            )
        c = self.config
        expected = (c.image_size, c.image_size, c.num_channels)
        if images.ndim != 4 or images.shape[1:] != expected:
            raise ValueError(
                f"ViT: images have shape {images.shape}; expected (batch, {expected[0]}, "
                f"{expected[1]}, {expected[2]}). Resize them, or load the model with image_size=..."
            )


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

_TABLE = (
    Entry("embed/cls_token", AS_IS, ("vit.embeddings.cls_token",)),
    Entry("embed/position", AS_IS, ("vit.embeddings.position_embeddings",)),
    *linear_entries("embed/patch", "vit.embeddings.patch_embeddings.projection", axes=CONV),
    *layer_entries(["vit.encoder.layer.{}", "vit.layers.{}"], _LAYER),
    *norm_entries("encoder/norm", "vit.layernorm"),
    *linear_entries("head", "classifier"),
)


def _head_kernel(config: ViTConfig, key, number: int, shape) -> np.ndarray:
    """The only new kernel, hence drawn from ``key`` itself."""
    return np.asarray(config.kernel_init(key, shape, jnp.float32))


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
    table=_TABLE,
    new=(r"head/.*",),
    # What other ViT classes leave in a file and a classifier does not use: the pooler of ViTModel,
    # the mask token and the decoder of masked-image modelling.
    leftovers=(
        r"(vit\.)?pooler\.dense\.(weight|bias)",
        r"(vit\.)?embeddings\.mask_token",
        r"decoder\..*",
    ),
    draw=_head_kernel,
    resized=_resized,
)
