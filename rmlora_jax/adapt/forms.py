"""A form: how a weight and the small leaves beside it make the adapted weight.

``Form`` is plain LoRA's, W + s A B. Another form is a subclass in a file of its own, beside its
description (a ``LoRA`` whose ``form`` it is). The rest of the package asks the form: which leaves
there are, where they begin, what the adapted layer computes, what merging gives, what PEFT calls
them. Forms and executions, factored or merged, meet in ``product`` and nowhere else.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rmlora_jax.adapt import geometry as geo

# The registry: every leaf that some form has beside a weight. A new form adds its own.
LEAVES = ("lora_a", "lora_b", "lora_e", "lora_m")
FACTORS = LEAVES[:2]
INITS = ("kaiming", "normal", "gaussian", "orthogonal", "pissa")


def is_factor(path) -> bool:
    """Whether a parameter, given by the names on its path, is a leaf of some form."""
    return path[-1] in LEAVES


class Call(NamedTuple):
    """One call of an adapted layer, in Linen or in NNX.

    Attributes:
        x: the input of the layer.
        weight: the layer's own weight, an array. (A quantised weight has its place here: the layer
            on ``None`` is its own product with x, and ``Form.merged`` needs it as an array.)
        geometry: how x meets the weight.
        layer: ``layer(x, weight)`` is the layer's own output, bias included, on any input and on
            any weight of that shape; on its own weight for ``weight=None``.
        scale: s.
        execution: "factored" adds the product of the factors to the layer's output; "merged" runs
            the layer on the adapted weight, where the geometry is a ``Contraction`` and dropout
            does not act.
        attends: the layer multiplies by the transposed table (``Embed.attend``).
        drop: dropout of x on its way to the factors, None where it is inactive.
        affine: the layer only adds ``bias`` to its product. Otherwise (a class of the user's own, a
            masked weight) "merged" takes the gradient through the merged weight.
        bias: the layer's bias as it is stored, None without one; known where ``affine``.
        precision: of the layer's products.
        dtype: in which the layer computes; None means that of its arguments.
    """

    x: Any
    weight: Any
    geometry: geo.Geometry
    layer: Callable
    scale: float
    execution: str = "factored"
    attends: bool = False
    drop: Callable | None = None
    affine: bool = True
    bias: Any = None
    precision: Any = None
    dtype: Any = None

    @classmethod
    def of(cls, module, affine: bool, **fields) -> "Call":
        """A call of the Flax layer ``module``, in its precision and dtype.

        A mask makes it other than affine.
        """
        own = {name: getattr(module, name, None) for name in ("precision", "dtype")}
        affine = affine and getattr(module, "mask", None) is None
        return cls(affine=affine, **own, **fields)

    @property
    def axes(self) -> geo.Layout:
        return geo.layout(self.geometry, self.weight.ndim)

    @property
    def merges(self) -> bool:
        """Whether the layer runs on the adapted weight, if its geometry allows that."""
        return self.execution == "merged" and self.dropout is None

    @property
    def dropout(self) -> Callable | None:
        """``drop`` where it acts: not on integers, nor in ``attend``."""
        acts = not self.attends and jnp.issubdtype(self.x.dtype, jnp.inexact)
        return self.drop if acts else None


def product(form: "Form", factors, call: Call) -> jax.Array:
    """The output of an adapted layer, in the shape and dtype of the layer's own.

    Every layer, in Linen and in NNX, is computed here. ``factors`` are the leaves in the order of
    ``form.leaves``.
    """
    if call.merges and not call.affine:
        weight = _finer(call.weight, call.dtype)
        return call.layer(call.x, form.merged(weight, factors, call.scale, call.axes))
    return form.output(call, factors)


@dataclasses.dataclass(frozen=True)
class Form:
    """Plain LoRA's form, W + s A B with A (*stack, in, r) and B (*stack, r, out).

    The first two leaves of every form are A and B, and the update is linear in A: an alpha of a
    layer's own may be multiplied into A.

    Attributes:
        leaves: names of the leaves, in the order of ``LEAVES``.
        inits: the values of ``LoRA.init`` that fit.
        obstacle: why functions of plain adapters (``pad_rank``, ``combine_adapters``) refuse the
            form, and what to do; None where they take it.
        folds: whether ``folded`` makes plain factors of the leaves.
        peft: what PEFT calls the leaves beside a layer, and beside an embedding; None where PEFT
            has no such form, and the leaves have to be folded.
        peft_fields: what ``adapter_config.json`` says of the form, beside what plain LoRA says.
    """

    leaves: ClassVar[tuple[str, ...]] = FACTORS
    inits: ClassVar[tuple[str, ...]] = INITS
    obstacle: ClassVar[str | None] = None
    folds: ClassVar[bool] = False
    peft: ClassVar[tuple[tuple[str, ...], tuple[str, ...]] | None] = (
        ("lora_A.weight", "lora_B.weight"),
        ("lora_embedding_A", "lora_embedding_B"),
    )
    peft_fields: ClassVar[Mapping[str, Any]] = {}

    def shapes(self, shape, axes: geo.Layout, rank: int) -> tuple[tuple[int, ...], ...]:
        """The shapes of the leaves beside one layer's weight of ``shape``."""
        return geo.factor_shapes(shape, axes, rank)

    def axis_names(self, names, axes: geo.Layout, stack: int = 0) -> tuple[tuple, ...]:
        """The names of the leaves' axes, from those of a weight with ``stack`` stacked axes.

        A flattened axis has the name of its first axis, the rank axis None.
        """
        own = names[stack:]
        mark = () if axes.in_order else (None,)
        lead = (*names[:stack], *mark, *(own[i] for i in axes.batch))
        return (*lead, own[axes.inputs[0]], None), (*lead, None, own[axes.outputs[0]])

    def initial(
        self, key, weight, axes: geo.Layout | None, shapes, scale: float, init: str, dtype
    ) -> tuple[tuple[jax.Array, ...], Any]:
        """``(leaves, weight)``: where the leaves begin, and what is left of the weight.

        With A drawn by ``init`` and B = 0 the adapted weight is the weight. "pissa" moves the
        principal directions out of it.
        """
        if init == "pissa":
            a_shape, b_shape = shapes
            return _principal_factors(jnp.asarray(weight), axes, a_shape, b_shape, scale, dtype)
        return (initial_a(key, shapes[0], init, dtype), jnp.zeros(shapes[1], dtype)), weight

    def pair(self, factors) -> tuple[jax.Array, jax.Array]:
        """A and B of the update s A B that the leaves stand for."""
        a, b = factors
        return a, b

    def merged(self, weight, factors, scale: float, axes: geo.Layout | None = None) -> jax.Array:
        """The adapted weight, summed in float32 at least, cast once to the weight's dtype."""
        return geo.updated(weight, *self.pair(factors), scale, axes)

    def output(self, call: Call, factors) -> jax.Array:
        """What the adapted layer computes in ``call``."""
        if call.merges and isinstance(call.geometry, geo.Contraction):
            a, b = self.pair(factors)
            frozen = jax.lax.stop_gradient((a, b))
            weight = _finer(call.weight, call.dtype)
            y = call.layer(call.x, geo.updated(weight, *frozen, call.scale, call.axes))
            return linked(y, call.geometry, call.x, a, b, call.scale, call.precision)
        y = call.layer(call.x, None)
        a, b = self.pair(factors)
        if call.attends:
            return y + geo.low_rank_attend(call.x, y, a, b, call.scale)
        x = call.x if call.dropout is None else call.dropout(call.x)
        return y + geo.low_rank(call.geometry, x, y, a, b, call.scale, call.precision)

    def folded(self, factors) -> tuple[jax.Array, jax.Array]:
        """A and B of the same update, of the rank that is left; where ``folds``."""
        return self.pair(factors)

    def idle(self, weight, shapes) -> tuple[np.ndarray, ...]:
        """Leaves of ``shapes`` that leave ``weight`` as it is and rest in training."""
        del weight
        return tuple(np.zeros(shape, np.float32) for shape in shapes)

    def peft_shapes(self, shape: tuple[int, ...], rank: int) -> tuple[tuple[int, ...], ...]:
        """The shapes of PEFT's leaves of one weight of ``shape`` (*in, out), in our order of axes.

        PEFT keeps the axes of the weight: A of a convolution is a convolution to r channels, B one
        of size 1. A leaf with as many axes as the weight is stored in the weight's order of axes.

        >>> Form().peft_shapes((3, 3, 8, 16), 2)
        ((3, 3, 8, 2), (1, 1, 2, 16))
        """
        return (*shape[:-1], rank), (*(1,) * (len(shape) - 2), rank, shape[-1])


PLAIN = Form()


# Where A and B begin


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


def _principal_factors(weight, axes: geo.Layout | None, a_shape, b_shape, scale: float, dtype):
    """(A, B) and what is left of the weight: W_0's r principal directions, moved out of it (PiSSA).

    A = U sqrt(S / s), B = sqrt(S / s) V^T for the largest singular values S of W_0 (Meng et al.
    2024, eqs. 2-4), so that W_0 = residual + s A B.
    """
    full = jnp.promote_types(weight.dtype, jnp.float32)
    rank = a_shape[-1]
    matrix = geo.to_matrix(weight.astype(full), (*a_shape[:-1], b_shape[-1]), axes)
    if rank > min(matrix.shape[-2:]):
        raise ValueError(
            f'LoRA.init "pissa": rank {rank} exceeds a weight of shape {weight.shape}, which has '
            f"{min(matrix.shape[-2:])} singular directions: lower rank, or exclude the layer."
        )
    u, s, vt = jnp.linalg.svd(matrix, full_matrices=False)
    root = jnp.sqrt(s[..., :rank] / scale)
    a = (u[..., :rank] * root[..., None, :]).astype(dtype)
    b = (root[..., :, None] * vt[..., :rank, :]).astype(dtype)
    return (a, b), geo.updated(weight, a, b, -scale, axes)


# Merged execution


def _finer(weight, dtype):
    """The weight in its dtype or, where that is finer, in ``dtype``, in which the layer computes:
    a merged weight is rounded to that once."""
    return weight if dtype is None else weight.astype(jnp.promote_types(weight.dtype, dtype))


def linked(y, geometry: geo.Contraction, x, a, b, scale: float, precision=None):
    """``y``, the output of a layer on W + s A B; A and B get the gradients they have in s (x A) B.

    A gradient through the merged weight would begin with x^T g, as large as the weight. Here only x
    is kept, and x A is computed again. The gradients are summed in float32 and have the dtype of A
    and B. ``x`` gets its gradient through ``y`` alone. Reverse mode only.

    >>> x, a, b, y = jnp.ones((4, 3)), jnp.ones((3, 1)), jnp.ones((1, 2)), jnp.zeros((4, 2))
    >>> def f(a, b):
    ...     return linked(y, geo.DENSE, x, a, b, 0.5).sum()
    >>> f(a, b).item(), jax.grad(f, 0)(a, b).tolist(), jax.grad(f, 1)(a, b).tolist()
    (0.0, [[4.0], [4.0], [4.0]], [[6.0, 6.0]])
    """
    down, up, *_ = geo.unfolded(geometry, x, y, a, b)
    (x_axes, a_axes, z_axes), (_, b_axes, y_axes) = geo.terms(down), geo.terms(up)
    exact = {"precision": precision, "preferred_element_type": jnp.float32}

    @jax.custom_vjp
    def passed(y, x, a, b):
        return y

    def backward(kept, g):
        x, *factors = kept
        *_, a, b = geo.unfolded(geometry, x, g, *(f.astype(g.dtype) for f in factors))
        thin = {"precision": precision, "out_sharding": geo.sharding_along(g, y_axes, z_axes)}
        z = jnp.einsum(down, x, a, **thin) * scale
        dz = jnp.einsum(f"{y_axes},{b_axes}->{z_axes}", g, b, **thin) * scale
        of_a, of_b = geo.sharding_of(a), geo.sharding_of(b)
        da = jnp.einsum(f"{x_axes},{z_axes}->{a_axes}", x, dz, **exact, out_sharding=of_a)
        db = jnp.einsum(f"{z_axes},{y_axes}->{b_axes}", z, g, **exact, out_sharding=of_b)
        pairs = zip((da, db), factors, strict=True)
        return g, None, *(d.reshape(f.shape).astype(f.dtype) for d, f in pairs)

    passed.defvjp(lambda y, x, a, b: (y, (x, a, b)), backward)
    # A checked shard_map wants factors that differ between devices as their gradients do.
    a, b = (f + jnp.zeros_like(y, f.dtype, shape=()) for f in (a, b))
    return passed(y, x.astype(y.dtype), a, b)
