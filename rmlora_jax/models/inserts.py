"""What can be put into the layers of a pretrained encoder: bottleneck adapters, prefix vectors."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from rmlora_jax.models.parts import ACTIVATIONS


class Bottleneck(nn.Module):
    """y + up(gelu(down(y))) on the last axis, ``up`` beginning at 0.

    Without biases, so that direction i is column i of ``down`` and row i of ``up`` and no more.

    Source: Houlsby et al. 2019, https://arxiv.org/abs/1902.00751, section 2.1; the formula without
    biases is that of He et al. 2022, https://arxiv.org/abs/2110.04366, equation 4.
    """

    width: int
    std: float
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, y):
        def dense(features, init, name):
            return nn.Dense(
                features,
                use_bias=False,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                kernel_init=init,
                name=name,
            )

        narrow = dense(self.width, nn.initializers.normal(self.std), "down")(y)
        up = dense(y.shape[-1], nn.initializers.zeros, "up")
        return y + up(ACTIVATIONS["gelu"](narrow))


class Prefix(nn.Module):
    """Trained keys and values in front of a layer's own: (B, N, H, d) -> (B, P + N, H, d), twice.

    Every query attends to them: a mask over the keys, (B, N), comes back as (B, P + N).

    Source: Li and Liang 2021, https://arxiv.org/abs/2101.00190, section 4.
    """

    length: int
    std: float
    param_dtype: Any

    @nn.compact
    def __call__(self, key, value, mask):
        def longer(name, x):
            batch, _, *heads = x.shape
            shape = (self.length, math.prod(heads))
            own = self.param(name, nn.initializers.normal(self.std), shape, self.param_dtype)
            own = own.astype(x.dtype).reshape(1, self.length, *heads)
            return jnp.concatenate([jnp.tile(own, (batch, 1, 1, 1)), x], axis=1)

        if mask is not None:
            mask = jnp.pad(mask, ((0, 0), (self.length, 0)), constant_values=True)
        return longer("key", key), longer("value", value), mask


def bottleneck(config, dtype, param_dtype, name: str):
    """The adapter of a layer whose config asks for one, else the identity."""
    width = config.bottleneck_width
    if not width:
        return lambda y: y
    return Bottleneck(width, config.initializer_range, dtype, param_dtype, name=name)


def prefixed(config, param_dtype, key, value, mask=None):
    """Keys, values and mask behind the prefix, where the config asks for one; else as they are."""
    if not config.prefix_length:
        return key, value, mask
    prefix = Prefix(config.prefix_length, config.initializer_range, param_dtype, name="prefix")
    return prefix(key, value, mask)


def with_inserts(key, model: nn.Module, params: dict, *example) -> dict:
    """``params`` of a pretrained model, and fresh ones of what ``model`` has beyond them.

    Args:
      key: a ``jax.random`` key.
      model: the model with a config that has ``bottleneck_width`` or ``prefix_length`` set.
      params: its parameters without those.
      *example: arguments of the model's call, arrays or ``jax.ShapeDtypeStruct``.

    Returns:
      Nested dicts; the leaves of ``params`` are the same arrays.

    >>> import dataclasses
    >>> from rmlora_jax.models import ViT, ViTConfig
    >>> config = ViTConfig(hidden_size=12, num_hidden_layers=2, num_attention_heads=3,
    ...                    intermediate_size=16, image_size=8, patch_size=4)
    >>> images = jnp.zeros((1, 8, 8, 3))
    >>> params = ViT(config, 5).init(jax.random.key(0), images)["params"]
    >>> model = ViT(dataclasses.replace(config, bottleneck_width=2), 5)
    >>> params = with_inserts(jax.random.key(1), model, params, images)
    >>> params["encoder"]["layers"]["bottleneck1"]["down"]["kernel"].shape
    (2, 12, 2)
    """
    have = flatten_dict(params)

    @jax.jit  # compiled, nothing of the pretrained part is drawn
    def fresh(key):
        inputs = [jnp.zeros(x.shape, x.dtype) for x in example]
        made = flatten_dict(model.init(key, *inputs)["params"])
        return {path: leaf for path, leaf in made.items() if path not in have}

    return unflatten_dict({**have, **fresh(key)})
