"""``execution="merged"``: a layer on W + s A B, with the gradients of A and B by thin products.

The layer itself runs, on a merged weight in the place of its own: forward, and for the gradient of
its input, there is one product with one matrix. The gradients of A and B are not taken through that
weight, where they would begin with x^T g, as large as the weight, but are those of s (x A) B beside
it. Only x is kept for them; x A is computed again.
"""

import math

import jax
import jax.numpy as jnp
from flax import traverse_util
from flax.core import meta

from rmlora_jax.adapt import product
from rmlora_jax.adapt.lora import DIAGONAL, FACTORS, LoRA, missing_factors

__all__ = ["linked", "merged_weight"]


def merged_weight(weight, a, b, scale, axes: product.Layout | None, dtype, frozen: bool):
    """``W + s A B``, summed in float32 and rounded once: to the dtype of the weight or, where that
    is finer, to ``dtype``, in which the layer computes (None: in the weight's).

    ``frozen`` factors get no gradient through it.
    """
    if dtype is not None:
        weight = weight.astype(jnp.promote_types(weight.dtype, dtype))
    if frozen:
        a, b = jax.lax.stop_gradient((a, b))
    return product.merged(weight, a, b, scale, axes)


def linked(y, geometry: product.Contraction, x, a, b, scale: float, precision=None):
    """``y``, the output of a layer on x; A and B get the gradients they have in ``s (x A) B``.

    These are summed in float32 and come in the dtype of A and B, whatever the dtype of ``y``. ``x``
    gets none: it has its own through ``y``. Reverse mode only, as with every ``jax.custom_vjp``.

    >>> x, a, b, y = jnp.ones((4, 3)), jnp.ones((3, 1)), jnp.ones((1, 2)), jnp.zeros((4, 2))
    >>> def f(a, b):
    ...     return linked(y, product.DENSE, x, a, b, 0.5).sum()
    >>> f(a, b).item(), jax.grad(f, 0)(a, b).tolist(), jax.grad(f, 1)(a, b).tolist()
    (0.0, [[4.0], [4.0], [4.0]], [[6.0, 6.0]])
    """
    down, up, *_ = product.unfolded(geometry, x, y, a, b)
    (x_axes, a_axes, z_axes), (_, b_axes, y_axes) = product.terms(down), product.terms(up)
    exact = {"precision": precision, "preferred_element_type": jnp.float32}

    @jax.custom_vjp
    def passed(y, x, a, b):
        return y

    def backward(kept, g):
        x, *factors = kept
        *_, a, b = product.unfolded(geometry, x, g, *(f.astype(g.dtype) for f in factors))
        z = jnp.einsum(down, x, a, precision=precision) * scale
        dz = jnp.einsum(f"{y_axes},{b_axes}->{z_axes}", g, b, precision=precision) * scale
        da = jnp.einsum(f"{x_axes},{z_axes}->{a_axes}", x, dz, **exact)
        db = jnp.einsum(f"{z_axes},{y_axes}->{b_axes}", z, g, **exact)
        pairs = zip((da, db), factors, strict=True)
        return g, None, *(d.reshape(f.shape).astype(f.dtype) for d, f in pairs)

    passed.defvjp(lambda y, x, a, b: (y, (x, a, b)), backward)
    # A checked shard_map wants factors that differ between devices as their gradients do.
    a, b = (f + jnp.zeros_like(y, f.dtype, shape=()) for f in (a, b))
    return passed(y, x.astype(y.dtype), a, b)


class Transformed(Exception):
    """Something transforms a weight before its layer has it: it must have been merged before."""


def prepare(variables, lora: LoRA, merges: bool):
    """The parameters that a Linen base runs on: merged, or with alpha_pattern's part in A."""
    flat = traverse_util.flatten_dict(variables["params"])
    modules = [path[:-1] for path in flat if path[-1] == FACTORS[0]]
    if not modules:
        raise missing_factors()
    for module in modules:
        name, (a, b) = "/".join(module), (meta.unbox(flat[(*module, f)]) for f in FACTORS)
        e = meta.unbox(flat.get((*module, DIAGONAL)))
        path = next((*module, n) for n in lora.weights if (*module, n) in flat)
        weight, scale = meta.unbox(flat[path]), lora.scale_of(name)
        if merges and in_order(weight, a, b):
            value = product.merged(weight, product.effective_a(a, e), b, scale)
            for factor in lora.factors:
                del flat[(*module, factor)]
        else:
            path, value = (*module, FACTORS[0]), a * (scale / lora.common_scale(a.shape[-1]))
        flat[path] = jax.tree.map(lambda _, value=value: value, flat[path])  # in its box
    return {"params": traverse_util.unflatten_dict(flat)}


def in_order(weight, a, b) -> bool:
    """Whether the factors are those of a weight laid out (*stack, *batch, *in, *out)."""
    stack, inner = a.shape[:-2], weight.shape[max(a.ndim - 2, 0) :]
    halves = [(math.prod(inner[:i]), math.prod(inner[i:])) for i in range(1, len(inner))]
    return (
        min(a.ndim, b.ndim) >= 2
        and weight.shape[: len(stack)] == stack
        and b.shape[:-1] == (*stack, a.shape[-1])
        and (a.shape[-2], b.shape[-1]) in halves
    )
