"""What the bundled encoders are built from.

Activations and norms, linear layers and tables, the MLP, the scan over layers, what adapters insert
(bottlenecks, prefix vectors), and the checks of a model's arguments.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.ad_checkpoint import checkpoint_name

from rmlora_jax.models.config import EncoderConfig


def gelu(x):
    """x Phi(x) = x (1 + erf(x / sqrt 2)) / 2, in float32 at least and rounded once.

    Only x is kept for the backward pass. erfc, by which `jax.nn.gelu` gets the tail below -4 to
    full relative precision, costs a GPU more time than reading and writing x does.
    """

    def exact(x):
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return (0.5 * wide * (1 + jax.lax.erf(wide * 0.5**0.5))).astype(x.dtype)

    return jax.checkpoint(exact, prevent_cse=False)(x)


ACTIVATIONS = {
    "gelu": gelu,
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "tanh": jax.numpy.tanh,
}

ATTENTION = "attention"


def _fused_attention(primitive, *avals, **params) -> bool:
    """A policy: keeps all that cuDNN's attention gives for its backward pass.

    On what it computes beside its output, the sums of its softmax, no name can be put.
    """
    return primitive.name.startswith("dot_product_attention_fwd")


REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "attention": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.save_only_these_names(ATTENTION), _fused_attention
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}


def layer_norm(epsilon: float, dtype, param_dtype, name: str) -> nn.LayerNorm:
    """Layer norm over the last axis; its statistics are float32 whatever ``dtype``."""
    # The two-pass variance: E[x^2] - E[x]^2 loses digits where the mean is large.
    return nn.LayerNorm(
        epsilon=epsilon,
        dtype=dtype,
        param_dtype=param_dtype,
        use_fast_variance=False,
        name=name,
    )


def dense_layer(config: EncoderConfig, param_dtype, dtype=jnp.float32):
    """``nn.Dense`` with kernels from ``config.kernel_init`` and biases 0."""
    return functools.partial(
        nn.Dense, dtype=dtype, param_dtype=param_dtype, kernel_init=config.kernel_init
    )


def embed_layer(config: EncoderConfig, param_dtype, dtype=jnp.float32):
    """``nn.Embed`` with rows from ``config.kernel_init``."""
    return functools.partial(
        nn.Embed, dtype=dtype, param_dtype=param_dtype, embedding_init=config.kernel_init
    )


class MLP(nn.Module):
    """fc2(act(fc1(x))): (B, N, D) -> (B, N, D)."""

    config: EncoderConfig
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x):
        c = self.config
        dense = dense_layer(c, self.param_dtype, self.dtype)
        x = ACTIVATIONS[c.hidden_act](dense(c.intermediate_size, name="fc1")(x))
        return dense(c.hidden_size, name="fc2")(x)


def kept_with_attention(x):
    """``x``, which ``remat="attention"`` keeps: a projection of attention, narrower than the MLP's.
    """
    return checkpoint_name(x, ATTENTION)


def scan_layers(layer: type[nn.Module], length: int, *, unroll: int, remat: str, in_axes=()):
    """``layer`` scanned ``length`` times, its parameters stacked on axis 0.

    Args:
      layer: a module whose call is ``(carry, *inputs) -> (carry, output)``.
      unroll: layers per iteration of the loop.
      remat: a key of ``REMAT``.
      in_axes: for ``inputs``: 0 where they have a layer axis, ``nn.broadcast`` where they have not.

    Returns:
      A module class, with the fields of ``layer``.
    """
    if remat != "none":
        # Inside a loop nothing can undo the rematerialisation; unrolled code needs barriers.
        layer = nn.remat(layer, policy=REMAT[remat], prevent_cse=unroll >= length)
    return nn.scan(
        layer,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=in_axes,
        length=length,
        unroll=unroll,
    )


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


def check_choices(model: str, **choices) -> None:
    """Raises a ValueError for a ``name=(value, allowed)`` whose value is not among the allowed."""
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise ValueError(f"{model}: {name} is {value!r}; it must be one of {tuple(allowed)}")


def check_counts(model: str, **counts) -> None:
    """Raises a ValueError for a value that is not a whole number of at least 1."""
    for name, value in counts.items():
        if type(value) is not int or value < 1:
            raise ValueError(
                f"{model}: {name} is {value!r}; it must be a whole number of at least 1"
            )


def checked_tokens(model: str, longest: int | None, input_ids, attention_mask, token_type_ids):
    """The three inputs as arrays: ids (B, N), mask bool (B, N), types (B, N).

    Without a mask it stays None: one of ones would keep attention from kernels that take none.

    Raises:
      TypeError: ``input_ids`` are not integers.
      ValueError: they are no matrix, or longer than ``longest``; another shape of the others.
    """
    if not jnp.issubdtype(jnp.result_type(input_ids), jnp.integer):
        raise TypeError(f"{model}: input_ids are {jnp.result_type(input_ids)}; pass integers")
    shape = jnp.shape(input_ids)
    if len(shape) != 2:
        raise ValueError(f"{model}: input_ids have shape {shape}; expected (batch, tokens)")
    if longest is not None and shape[1] > longest:
        raise ValueError(
            f"{model}: {shape[1]} tokens, but the checkpoint has positions for {longest}; "
            "cut the texts to that length"
        )
    mask = None if attention_mask is None else jnp.asarray(attention_mask) != 0
    types = jnp.zeros(shape, jnp.int32) if token_type_ids is None else token_type_ids
    for name, value in (("attention_mask", mask), ("token_type_ids", types)):
        if value is not None and jnp.shape(value) != shape:
            raise ValueError(
                f"{model}: {name} has shape {jnp.shape(value)}; input_ids have {shape}"
            )
    return input_ids, mask, types
