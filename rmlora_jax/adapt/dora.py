"""DoRA's form, m (W + s A B) / ||W + s A B||, and its description."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from rmlora_jax.adapt import geometry as geo
from rmlora_jax.adapt.forms import FACTORS, INITS, Call, Form
from rmlora_jax.adapt.lora import LoRA

__all__ = ["DoRA", "Magnitudes"]

MAGNITUDES = "lora_m"


@dataclasses.dataclass(frozen=True)
class Magnitudes(Form):
    """m (W + s A B) / ||W + s A B|| with m = ``lora_m`` (*stack, out): the form of ``DoRA``.

    Each output has a norm, over all inputs. Gradients take the norm as a constant.
    """

    leaves: ClassVar = (*FACTORS, MAGNITUDES)
    inits: ClassVar = tuple(init for init in INITS if init != "pissa")
    obstacle: ClassVar = (
        "divides by the norm of W + s A B, which no low-rank update does: merge it, "
        "rm.merge(params, lora)."
    )
    peft: ClassVar = (
        ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector"),
        ("lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"),
    )
    peft_fields: ClassVar = {"use_dora": True}

    def shapes(self, shape, axes, rank):
        a, b = super().shapes(shape, axes, rank)
        return a, b, (*b[:-2], b[-1])

    def axis_names(self, names, axes, stack=0):
        a, b = super().axis_names(names, axes, stack)
        return a, b, (*b[:-2], b[-1])

    def initial(self, key, weight, axes, shapes, scale, init, dtype):
        (a, b), weight = super().initial(key, weight, axes, shapes[:2], scale, init, dtype)
        return (a, b, norms(weight, a, b, scale, axes)), weight

    def pair(self, factors):
        """A and B of the update before the norm: what ``intrinsic_dimension`` looks at."""
        a, b, _ = factors
        return a, b

    def merged(self, weight, factors, scale, axes=None):
        a, b = self.pair(factors)
        shape = (*a.shape[:-1], b.shape[-1])
        finer = weight.astype(jnp.promote_types(weight.dtype, jnp.float32))
        matrix = geo.to_matrix(geo.updated(finer, a, b, scale, axes), shape, axes)
        matrix = matrix * gains(weight, factors, scale, axes)[..., None, :]
        return geo.from_matrix(matrix, weight.shape, axes).astype(weight.dtype)

    def output(self, call, factors):
        """y + (g - 1) p with g = m / ||W + s A B||, where y is the output of plain LoRA and p is
        the part of it that comes from the weight: all but the bias.

        Under dropout all of p, x W included, is computed from the dropped x.
        """
        pair, g = self.pair(factors), gains(call.weight, factors, call.scale, call.axes)
        if call.attends:  # q W'^T = (q g) (W + s A B)^T
            x = (call.x * g).astype(call.x.dtype)
            return super().output(call._replace(x=x), factors)
        if call.affine and call.dropout is None:
            y = super().output(call, factors)
            product = y if call.bias is None else y - _bias(call, y)
        else:
            x = call.x if call.dropout is None else call.dropout(call.x)
            y = call.layer(call.x, None)
            update = geo.low_rank(call.geometry, x, y, *pair, call.scale, call.precision)
            y, product = y + update, _product(call, x, y) + update
        return y + _along(call, g - 1, y) * product

    def idle(self, weight, shapes):
        """A = 0, B = 0 and the norms of ``weight``. The magnitudes do not rest in training."""
        a, b = super().idle(weight, shapes[:2])
        return a, b, np.array(norms(weight, a, b, 1.0))

    def peft_shapes(self, shape, rank):
        """As in ``Form``. A convolution's magnitudes are stored on the axis of its input channels.

        >>> Magnitudes().peft_shapes((3, 3, 8, 16), 2)[2], Magnitudes().peft_shapes((8, 16), 2)[2]
        ((1, 1, 16, 1), (16,))
        """
        *ones, _, size_out = (1,) * (len(shape) - 1) + shape[-1:]
        magnitudes = (*ones, size_out, 1) if ones else (size_out,)
        return (*super().peft_shapes(shape, rank), magnitudes)


def norms(weight, a, b, scale: float, axes: geo.Layout | None = None) -> jax.Array:
    """||W + s A B|| over the inputs, (*stack, out), in float32 at least. No gradient passes.

    The squares are ||w||^2 + s b^T (2 A^T w + s A^T A b) for a column w of W and b of B, so that
    A B (in x out) is never formed.

    >>> found = norms(jnp.eye(2), jnp.ones((2, 1)), jnp.array([[2.0, 3.0]]), 0.5)
    >>> jnp.round(found**2, 4).tolist()  # of the columns (2, 1) and (1.5, 2.5)
    [5.0, 8.5]
    """
    dtype = jnp.promote_types(weight.dtype, jnp.float32)
    constants = (jax.lax.stop_gradient(jnp.asarray(v).astype(dtype)) for v in (weight, a, b))
    weight, a, b = constants
    w, a_t = geo.to_matrix(weight, (*a.shape[:-1], b.shape[-1]), axes), jnp.swapaxes(a, -1, -2)
    mixed = 2 * geo.matmul(a_t, w) + scale * geo.matmul(geo.matmul(a_t, a), b)
    squares = jnp.sum(w * w, -2) + scale * jnp.sum(b * mixed, -2)
    return jnp.sqrt(jnp.maximum(squares, 0))


def gains(weight, factors, scale: float, axes: geo.Layout | None = None) -> jax.Array:
    """m / ||W + s A B||, (*stack, out); 1 where the norm is 0 (PEFT has NaN there)."""
    a, b, m = factors
    norm = norms(weight, a, b, scale, axes)
    return jnp.where(norm > 0, m / jnp.where(norm > 0, norm, 1), 1)


def _product(call: Call, x, y):
    """x W in the dtype of ``y``, without what the layer adds."""
    if call.affine:
        plain = call.layer(x, call.weight)  # a Linen layer runs on ``None`` only once
        return plain if call.bias is None else plain - _bias(call, plain)
    # A class of the user's own may add anything, but its equation is known.
    assert isinstance(call.geometry, geo.Contraction)
    x, weight = x.astype(y.dtype), call.weight.astype(y.dtype)
    return jnp.einsum(call.geometry.equation, x, weight, precision=call.precision)


def _bias(call: Call, y):
    """The bias in the shape and dtype in which the layer adds it to ``y``."""
    return call.bias.reshape(_shape_along(call, y)).astype(y.dtype)


def _along(call: Call, values, y):
    """``values`` (*batch, out), one for each output, along the axes of ``y`` and in its dtype."""
    if isinstance(call.geometry, geo.Contraction):
        _, weight, labels = geo.terms(call.geometry.equation)
        kept = [i for i in call.axes.order if i not in call.axes.inputs]
        values = values.reshape([call.weight.shape[i] for i in kept])
        order = sorted(range(len(kept)), key=lambda place: labels.index(weight[kept[place]]))
        values = values.transpose(order)
    return values.reshape(_shape_along(call, y)).astype(y.dtype)


def _shape_along(call: Call, y) -> tuple[int, ...]:
    """The sizes of the weight's batch and output axes where ``y`` has them, 1 elsewhere."""
    if not isinstance(call.geometry, geo.Contraction):
        return (*(1,) * (y.ndim - 1), -1)
    _, weight, labels = geo.terms(call.geometry.equation)
    sizes: dict[str, Any] = dict(zip(weight, call.weight.shape, strict=True))
    head, _, tail = labels.partition("...")
    between = (1,) * (y.ndim - len(head + tail))
    return (*(sizes.get(c, 1) for c in head), *between, *(sizes.get(c, 1) for c in tail))


@dataclasses.dataclass(frozen=True)
class DoRA(LoRA):
    r"""A ``LoRA`` whose outputs have magnitudes of their own, apart from the direction.

    .. math:: W' = m \frac{W_0 + s A B}{\lVert W_0 + s A B \rVert}, \qquad s = \alpha / r

    with m = ``lora_m`` (*stack, out) in float32. m begins as the norms of W_0 and B as 0, so that
    the output is the base's up to rounding. Each output has a norm, over all inputs: over the rows
    of an embedding, over all but the output channels of a convolution. Gradients take the norm as
    a constant. The bias is not scaled. All this is PEFT's ``use_dora``, and so is dropout: with
    g = m / norm, the output is x W_0 + (g - 1) x' W_0 + g s x' A B for the dropped x', which costs
    a second product with W_0. Where a norm is 0, g is 1 here and NaN in PEFT.

    Factored execution forms neither A B nor W'. Merged execution forms W_0 + s A B and scales its
    output. ``merge`` gives W'. ``Embed.attend`` multiplies by W', too. For a class in ``layers``,
    x W_0 is computed once more.

    Its arguments are those of ``LoRA`` ("pissa" is refused as ``init``). The mask and the penalty
    of ``rm_lora`` act on A and B alone. ``intrinsic_dimension`` describes s A B. ``pad_rank``,
    ``reduce_rank``, ``combine_adapters`` and ``align_adapters`` refuse it.

    Example:
        >>> lora = DoRA(rank=2)
        >>> weight, factors = jnp.array([[3.0], [4.0]]), (jnp.ones((2, 2)), jnp.zeros((2, 1)))
        >>> lora.form.merged(weight, (*factors, jnp.array([10.0])), scale=1.0).tolist()
        [[6.0], [8.0]]

    References:
        Liu et al. 2024, *DoRA: Weight-Decomposed Low-Rank Adaptation* (arXiv:2402.09353), eqs. 5
        and 11; the dropout is PEFT's.
    """

    form: ClassVar[Form] = Magnitudes()
