"""The low-rank product of each kind of layer, and where its factors begin.

A layer is any object with the fields of the Flax class ``kind`` (Dense, DenseGeneral, Conv, Embed).
Its weight is laid out (*batch, *in, *out); the factors flatten the input and the output axes, so
that ``(lora_a @ lora_b).reshape(weight.shape)`` is the increment whatever the layer.
"""

import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

# The fields that say how a layer lines up its input with its weight. Quantised or otherwise
# replaced products (`dot_general`, ...) stay with the base: the factors use plain arithmetic.
_GEOMETRY = {
    nn.Dense: (),
    nn.DenseGeneral: ("axis", "batch_dims"),
    nn.Conv: (
        "kernel_size",
        "strides",
        "padding",
        "input_dilation",
        "kernel_dilation",
        "feature_group_count",
    ),
    nn.Embed: ("num_embeddings",),
}


class Layout(NamedTuple):
    """The axes of a weight: how many are batch axes, then how many are input axes."""

    batch: int
    inputs: int


def layout(kind: type[nn.Module], layer, ndim: int) -> Layout:
    """The layout of the ``ndim``-dimensional weight of ``layer``.

    >>> layout(nn.DenseGeneral, nn.DenseGeneral((3, 4), axis=(-2, -1)), 4)
    Layout(batch=0, inputs=2)
    """
    if kind is nn.DenseGeneral:
        return Layout(_count(layer.batch_dims), _count(layer.axis))
    return Layout(0, ndim - 1 if kind is nn.Conv else 1)


def factor_shapes(shape: tuple[int, ...], axes: Layout, rank: int):
    """Shapes of A (*batch, in, r) and B (*batch, r, out) for a weight of ``shape``.

    >>> factor_shapes((3, 3, 8, 16), Layout(0, 3), rank=2)
    ((72, 2), (2, 16))
    """
    split = axes.batch + axes.inputs
    batch = shape[: axes.batch]
    size_in, size_out = math.prod(shape[axes.batch : split]), math.prod(shape[split:])
    return (*batch, size_in, rank), (*batch, rank, size_out)


def initial_a(key, shape: tuple[int, ...], init: str, dtype) -> jax.Array:
    """A (*stack, in, r) drawn by ``init`` from ``key``, each layer of the stack by itself.

    "kaiming" is PyTorch's kaiming_uniform(a = sqrt 5): uniform within +-1/sqrt(in) (He et al. 2015,
    eq. 10 with the negative slope sqrt 5).

    >>> initial_a(jax.random.key(0), (12, 64, 4), "kaiming", jnp.float32).shape
    (12, 64, 4)
    """
    *stack, size_in, rank = shape
    bound = size_in**-0.5
    draw = {
        "kaiming": lambda k: jax.random.uniform(k, (size_in, rank), minval=-bound, maxval=bound),
        "normal": lambda k: 0.02 * jax.random.normal(k, (size_in, rank)),
        "gaussian": lambda k: jax.random.normal(k, (size_in, rank)) / rank,
        "orthogonal": lambda k: jax.nn.initializers.orthogonal()(k, (size_in, rank)),
    }[init]
    keys = jax.random.split(key, math.prod(stack))
    return jax.vmap(draw)(keys).reshape(shape).astype(dtype)


def low_rank(kind: type[nn.Module], layer, shape, x, y, a, b, scale: float) -> jax.Array:
    """``scale * (x A) B`` in the dtype of ``y``, the layer's own output; ``shape`` is the weight's.

    The way down to r channels is the layer itself with r features and no bias, which brings its
    axes, padding, dilation and promotion along. The two factors are never multiplied together, so
    that neither the forward nor the backward pass holds an (in x out) increment.
    """
    grouped = kind is nn.Conv and layer.feature_group_count > 1
    groups = layer.feature_group_count if grouped else 1
    wide = jnp.tile(a, groups) if grouped else a
    split = sum(layout(kind, layer, len(shape)))
    z = _down(kind, layer, x, wide.reshape(*shape[:split], -1), y.dtype) * scale
    b = b.astype(y.dtype)
    precision = getattr(layer, "precision", None)
    if grouped:  # every group has r channels of its own, and its own share of B's columns
        z = z.reshape(*z.shape[:-1], groups, b.shape[0])
        b = b.reshape(b.shape[0], groups, -1)
        return jnp.einsum("...gr,rgo->...go", z, b, precision=precision).reshape(y.shape)
    batch = tuple(range(b.ndim - 2))
    contract = (z.ndim - 1,), (b.ndim - 2,)
    delta = jax.lax.dot_general(z, b, (contract, (batch, batch)), precision=precision)
    return delta.reshape(y.shape)


def low_rank_attend(query, y, a, b, scale: float) -> jax.Array:
    """``scale * (q B^T) A^T``, the increment of ``Embed.attend`` with logits ``y`` (..., num)."""
    a, b, query = (v.astype(y.dtype) for v in (a, b, query))
    return (query @ b.T * scale) @ a.T


def merged(weight, a, b, scale: float) -> jax.Array:
    """``W + scale * A B``, summed in float32 at least and cast once to the weight's dtype.

    >>> merged(jnp.ones((2, 3), jnp.bfloat16), jnp.ones((2, 1)), jnp.ones((1, 3)), 0.5)[0, 0]
    Array(1.5, dtype=bfloat16)
    """
    dtype = jnp.promote_types(weight.dtype, jnp.float32)
    delta = jnp.matmul(a.astype(dtype), b.astype(dtype), precision="highest")
    return (weight.astype(dtype) + scale * delta.reshape(weight.shape)).astype(weight.dtype)


def _down(kind, layer, x, kernel, dtype):
    fields = {name: getattr(layer, name) for name in _GEOMETRY[kind]}
    fields |= {"features": kernel.shape[-1], "dtype": dtype, "parent": None}
    if kind is nn.Embed:
        return nn.Embed(**fields).apply({"params": {"embedding": kernel}}, x)
    down = kind(use_bias=False, precision=layer.precision, **fields)
    return down.apply({"params": {"kernel": kernel}}, x)


def _count(axes) -> int:
    return 1 if isinstance(axes, int) else len(axes)
