"""A small transformer over frames, such as cepstral coefficients, as a classifier of sequences."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from rmlora_jax.models.blocks import Classifier, Encoder, Parts, parts_of, with_token
from rmlora_jax.models.config import EncoderConfig


@dataclasses.dataclass(frozen=True)
class FramesConfig(EncoderConfig):
    """The architecture.

    Attributes: those of `EncoderConfig`, and

      num_channels: values C of a frame.
      longest: frames that have positions.
    """

    num_channels: int = 12
    longest: int = 32
    hidden_size: int = 64
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    intermediate_size: int = 256
    attention_probs_dropout_prob: float = 0.0
    initializer_range: float = 0.1
    layer_norm_eps: float = 1e-6
    prefix_length: int = 0


class Embed(nn.Module):
    """Frames projected, a class token in front, positions: (B, N, C) -> (B, 1 + N, D)."""

    parts: Parts

    @nn.compact
    def __call__(self, frames):
        parts, c = self.parts, self.parts.config
        x = parts.dense(c.hidden_size, name="frame")(frames)
        return parts.dropout()(parts.norm("norm")(with_token(self, parts, x, c.longest)))


class Frames(Classifier):
    """BERT's encoder over frames, the head on a class token in front of them.

    Parameters live under ``embed`` {frame, cls_token, position, norm}, ``encoder/layers`` as in
    ``Bert``, and ``head``.

    Attributes:
      config: the architecture.
      num_labels: outputs of the head.
      dtype, param_dtype, unroll, remat: as in ``Bert``.

    >>> model = Frames(FramesConfig(hidden_size=8, num_attention_heads=2), num_labels=3)
    >>> frames, mask = jnp.zeros((2, 5, 12)), jnp.arange(5) < jnp.array([[5], [3]])
    >>> params = model.init(jax.random.key(0), frames, mask)["params"]
    >>> model.apply({"params": params}, frames, mask).shape
    (2, 3)
    """

    @nn.compact
    def __call__(self, frames: jax.Array, mask: jax.Array, *, train: bool = False):
        """Logits (B, num_labels), float32, of frames (B, N, C); ``mask`` (B, N): False for padding.

        Raises:
          ValueError: shapes that do not fit, too many frames, or an attribute out of its range.
        """
        c = self.config
        parts = parts_of(self, train)
        if frames.ndim != 3 or frames.shape[2] != c.num_channels or frames.shape[1] > c.longest:
            raise ValueError(
                f"Frames: frames have shape {frames.shape}; expected (batch, at most {c.longest}, "
                f"{c.num_channels})"
            )
        if mask.shape != frames.shape[:2]:
            raise ValueError(f"Frames: mask has shape {mask.shape}; frames have {frames.shape}")
        x = Embed(parts, name="embed")(frames)
        mask = jnp.pad(mask, ((0, 0), (1, 0)), constant_values=True)  # the class token
        x, _ = Encoder(parts, name="encoder")(x, mask)
        first = parts.dropout()(x[:, 0].astype(jnp.float32))
        return parts.float32.dense(self.num_labels, name="head")(first)
