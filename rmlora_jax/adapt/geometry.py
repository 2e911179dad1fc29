"""How an input meets a weight: the axes of the weight, and the product ``(x A) B`` beside it.

A *geometry* is a ``Contraction`` by an einsum equation, a ``Convolution`` or a ``Lookup``. From it
follow the roles of the weight's axes (``Layout``), the shapes of two factors A and B, the product
beside the layer and the increment of the weight. Nothing here knows which leaves a form has.
"""

import functools
import math
import string
from typing import NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

# The fields that say how a convolution lines up its input with its weight, the same in Linen and
# NNX. Quantised or otherwise replaced products stay with the base: factors use plain arithmetic.
_CONV = ("kernel_size", "strides", "padding", "kernel_dilation")
_FIELDS = {
    nn.Conv: (*_CONV, "input_dilation", "feature_group_count"),
    nn.ConvTranspose: (*_CONV, "transpose_kernel"),
}


class Contraction(NamedTuple):
    """``y = einsum(equation, x, weight)``; ``"...i,io->...o"`` is a dense layer."""

    equation: str


class Convolution(NamedTuple):
    """A convolution: the Linen class that computes it and the fields that shape it."""

    cls: type[nn.Module]
    fields: dict


class Lookup(NamedTuple):
    """Rows of a table (num, features), chosen by integers."""

    num: int


Geometry = Contraction | Convolution | Lookup

DENSE = Contraction("...i,io->...o")


class Layout(NamedTuple):
    """The axes of a weight by their role, without those over which layers are stacked."""

    batch: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @property
    def order(self) -> tuple[int, ...]:
        return self.batch + self.inputs + self.outputs

    @property
    def in_order(self) -> bool:
        """Whether the weight is laid out (*batch, *in, *out) as it stands."""
        return self.order == tuple(range(len(self.order)))


def general(axis, batch_dims, features, ndim: int = 20) -> Contraction:
    """The equation of a dense layer over several axes, for an input of ``ndim`` axes.

    >>> general(axis=(-2, -1), batch_dims=(), features=8, ndim=4)
    Contraction(equation='abcd,cde->abe')
    """
    letters = string.ascii_letters
    x = letters[:ndim]
    batch = "".join(x[i] for i in _tuple(batch_dims))
    summed = "".join(x[i] for i in _tuple(axis))
    new = letters[ndim : ndim + len(_tuple(features))]
    free = "".join(c for c in x if c not in batch + summed)
    return Contraction(f"{x},{batch}{summed}{new}->{batch}{free}{new}")


def convolution(layer) -> Convolution:
    """The fields of ``layer``, a Linen or an NNX convolution, and the Linen class they are for."""
    cls = nn.ConvTranspose if hasattr(layer, "transpose_kernel") else nn.Conv
    return Convolution(cls, {name: getattr(layer, name) for name in _FIELDS[cls]})


def layout(geometry: Geometry, ndim: int | None) -> Layout:
    """The roles of the ``ndim`` axes of one layer's weight (None: as many as an equation has).

    Raises ValueError for an equation that gives no matrix, or has other axes for the weight.

    >>> layout(Contraction("btd,ndh->btnh"), 3)
    Layout(batch=(), inputs=(1,), outputs=(0, 2))
    """
    if isinstance(geometry, Lookup):
        return Layout((), (0,), (1,))
    if isinstance(geometry, Convolution):
        assert ndim is not None
        spatial, (before, last) = tuple(range(ndim - 2)), (ndim - 2, ndim - 1)
        if geometry.fields.get("transpose_kernel"):
            return Layout((), (*spatial, last), (before,))
        return Layout((), (*spatial, before), (last,))
    x, weight, y = terms(geometry.equation)
    roles = [(c in x, c in y) for c in weight]
    axes = {r: tuple(i for i, role in enumerate(roles) if role == r) for r in set(roles)}
    found = Layout(*(axes.get(r, ()) for r in ((True, True), (True, False), (False, True))))
    if (False, False) in axes or not found.inputs or not found.outputs:
        raise ValueError(
            f"in the equation {geometry.equation!r} the weight needs an axis that is summed with "
            "the input and an axis that is the output's alone; others may be in both."
        )
    if ndim not in (None, len(weight)):
        raise ValueError(
            f"the equation {geometry.equation!r} has {len(weight)} axes for a weight of {ndim}."
        )
    return found


def terms(equation: str) -> tuple[str, str, str]:
    """The labels of input, weight and output; ValueError if it is not "input,weight->output".

    >>> terms("BTD, NDH -> BTNH")
    ('BTD', 'NDH', 'BTNH')
    """
    try:
        operands, y = equation.replace(" ", "").split("->")
        x, weight = operands.split(",")
    except ValueError:
        x = weight = y = ""
    if not weight.isalpha() or len(set(weight)) < len(weight):
        raise ValueError(
            f"the equation {equation!r} must read 'input,weight->output', with a letter of its own "
            "for each axis of the weight, such as '...i,io->...o'."
        )
    return x, weight, y


def check_call(equation: str, x, weight) -> None:
    """Raises ValueError unless ``x`` and the weight of one layer have the axes of ``equation``."""
    layout(Contraction(equation), weight.ndim)
    labels, own, _ = terms(equation)
    head, dots, tail = labels.partition("...")
    if not hasattr(x, "shape"):
        raise ValueError(f"its first argument is {x!r}, not the input of {equation!r}.")
    sizes, least = dict(zip(own, weight.shape, strict=True)), len(head + tail)
    pairs = (*zip(head, x.shape, strict=False), *zip(tail[::-1], x.shape[::-1], strict=False))
    fits = least <= x.ndim if dots else least == x.ndim
    if not fits or any(n not in (1, sizes.get(c, n)) for c, n in pairs):
        raise ValueError(
            f"its input {x.shape} and its weight {weight.shape} do not have the axes of its "
            f"equation {equation!r}."
        )


def factor_shapes(shape: tuple[int, ...], axes: Layout, rank: int):
    """Shapes of A (*batch, in, r) and B (*batch, r, out) for a weight of ``shape``.

    A weight whose axes stand in another order than (*batch, *in, *out) is marked by a leading axis
    of size 1, which its own shape contradicts: whoever sees the arrays alone cannot merge them in
    the wrong order. A weight that begins with an axis of 1 would not contradict it: ValueError.

    >>> factor_shapes((3, 3, 8, 16), Layout((), (0, 1, 2), (3,)), rank=2)
    ((72, 2), (2, 16))
    >>> factor_shapes((4, 8, 16), Layout((), (1,), (0, 2)), rank=2)
    ((1, 8, 2), (1, 2, 64))
    """
    if not axes.in_order and shape[0] == 1:
        raise ValueError(
            f"its weight {shape} has axes in another order than (*batch, *in, *out) and begins "
            "with an axis of size 1."
        )
    batch = (*(() if axes.in_order else (1,)), *(shape[i] for i in axes.batch))
    size_in, size_out = (math.prod(shape[i] for i in part) for part in (axes.inputs, axes.outputs))
    return (*batch, size_in, rank), (*batch, rank, size_out)


def check_layout(path: str, weight, a, b, axes: Layout | None = None) -> None:
    """Raises ValueError unless A, B are (*stack, *batch, in, r), (*stack, *batch, r, out) of the
    weight: by its ``axes``, or else one whose axes stand in the order of the factors."""
    if axes is None:
        fits = in_order(weight, a, b) or _is_marked(weight, a, b)
    else:
        stack = weight.ndim - len(axes.order)
        one = factor_shapes(weight.shape[stack:], axes, a.shape[-1])
        fits = (a.shape, b.shape) == tuple((*weight.shape[:stack], *shape) for shape in one)
    if not fits:
        raise ValueError(
            f"the factors at {path!r}, lora_a {a.shape} and lora_b {b.shape}, do not fit the "
            f"weight {weight.shape}: they must be (*stack, in, r) and (*stack, r, out) with the "
            "stack axes first. nn.scan and nn.vmap must stack parameters on axis 0 "
            '(variable_axes={"params": 0}); elsewhere leave the layer out with LoRA.exclude.'
        )


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


def _is_marked(weight, a, b) -> bool:
    """Whether the factors carry the mark of ``factor_shapes`` and fit in size."""
    stack = a.shape[:-2]
    first = next((i for i, n in enumerate(stack) if n != weight.shape[i]), None)
    return (
        first is not None
        and stack[first] == 1
        and (*stack, a.shape[-1]) == b.shape[:-1]
        and weight.size == a.size // a.shape[-1] * b.shape[-1]
    )


def sharding_of(value) -> jax.sharding.NamedSharding | None:
    """Where ``value`` lies on mesh axes that are ``AxisType.Explicit``; None without such axes."""
    found = jax.typeof(value).sharding
    return found if found.mesh.explicit_axes else None


def sharding_along(y, labels: str, wanted: str) -> jax.sharding.NamedSharding | None:
    """``sharding_of`` an array with the axes ``wanted`` that lies as ``y``, with axes ``labels``.

    Axes that ``y`` lacks are not split.
    """
    if (found := sharding_of(y)) is None:
        return None
    between = "." * (y.ndim - len(labels.replace("...", "")))
    parts: dict[str, list] = {".": []}
    for label, part in zip(labels.replace("...", between), found.spec, strict=True):
        parts.setdefault(label, []).append(part)
    spec = [part for label in wanted.replace("...", ".") for part in parts.get(label, [None])]
    return found.update(spec=jax.P(*spec))


def low_rank(geometry: Geometry, x, y, a, b, scale: float, precision=None) -> jax.Array:
    """``scale * (x A) B`` in the dtype of ``y``, the layer's own output, and sharded as ``y``.

    The way down to r channels is the layer itself with r features and no bias, which brings its
    axes, padding and dilation along. A and B are never multiplied together: no pass holds an
    (in x out) increment. They are flat, as they are stored; ``y`` has the axes to unfold to.
    """
    a, b = a.astype(y.dtype), b.astype(y.dtype)
    if isinstance(geometry, Lookup):
        if (found := sharding_of(y)) is not None:
            rows = a.at[x].get(out_sharding=sharding_along(y, "...o", "...r"))
            return jnp.matmul(rows * scale, b, out_sharding=found)
        table = nn.Embed(geometry.num, a.shape[-1], dtype=y.dtype, parent=None)
        rows = cast(jax.Array, table.apply({"params": {"embedding": a}}, x))
        return rows * scale @ b
    product = _convolved if isinstance(geometry, Convolution) else _contracted
    return product(geometry, x.astype(y.dtype), y, a, b, scale, precision)


def low_rank_attend(query, y, a, b, scale: float) -> jax.Array:
    """``scale * (q B^T) A^T``, the increment of ``Embed.attend`` with logits ``y`` (..., num)."""
    a, b, query = (v.astype(y.dtype) for v in (a, b, query))
    z = jnp.matmul(query, b.T, out_sharding=sharding_along(y, "...o", "...r"))
    return jnp.matmul(z * scale, a.T, out_sharding=sharding_of(y))


def matmul(x, y) -> jax.Array:
    """``x @ y`` at the highest precision, whatever the default of the device."""
    return jnp.matmul(x, y, precision="highest")


def updated(weight, a, b, scale: float, axes: Layout | None = None) -> jax.Array:
    """``W + scale * A B``, summed in float32 at least and cast once to the weight's dtype.

    Without ``axes`` the weight is taken to be laid out (*stack, *batch, *in, *out).

    >>> updated(jnp.ones((2, 3), jnp.bfloat16), jnp.ones((2, 1)), jnp.ones((1, 3)), 0.5)[0, 0]
    Array(1.5, dtype=bfloat16)
    """
    dtype = jnp.promote_types(weight.dtype, jnp.float32)
    delta = from_matrix(matmul(a.astype(dtype), b.astype(dtype)), weight.shape, axes)
    return (weight.astype(dtype) + scale * delta).astype(weight.dtype)


def to_matrix(weight, shape: tuple[int, ...], axes: Layout | None = None) -> jax.Array:
    """The weight as matrices of ``shape`` (*stack, in, out), its axes flattened as A and B are."""
    return weight.transpose(_order(axes, weight.ndim)).reshape(shape)


def from_matrix(matrix, shape: tuple[int, ...], axes: Layout | None = None) -> jax.Array:
    """The weight of ``shape`` from its matrices: the inverse of ``to_matrix``."""
    order = _order(axes, len(shape))
    unfolded = matrix.reshape([shape[i] for i in order])
    return unfolded.transpose([order.index(i) for i in range(len(shape))])


def _order(axes: Layout | None, ndim: int) -> list[int]:
    """The axes of a weight of ``ndim`` axes in the order (*stack, *batch, *in, *out)."""
    own = () if axes is None else axes.order
    stack = ndim - len(own)
    return [*range(stack), *(stack + i for i in own)]


def _contracted(geometry, x, y, a, b, scale, precision):
    down, up, a, b = unfolded(geometry, x, y, a, b)
    z_axes, b_axes, y_axes = terms(up)
    between, explicit = sharding_along(y, y_axes, z_axes), sharding_of(y)
    z = jnp.einsum(down, x, a, precision=precision, out_sharding=between) * scale
    product = functools.partial(jnp.einsum, up, precision=precision, out_sharding=explicit)
    if z.ndim < 3 or explicit or y_axes != z_axes[:-1] + b_axes[1:]:
        return product(z, b)

    # For the gradient of B over several axes of rows XLA's CPU compiler copies all of y's gradient,
    # transposed: a step takes 1.7 times as long with its layers rolled, 3 times unrolled. Elsewhere
    # merging the axes could cost a copy, and would gather a sequence that is split over devices.
    @functools.partial(jax.checkpoint, prevent_cse=False)  # keeps z and B, as the other does
    def of_matrices(z, b):
        z, b = z.reshape(-1, b.shape[0]), b.reshape(b.shape[0], -1)
        return jnp.matmul(z, b, precision=precision).reshape(y.shape)

    return jax.lax.platform_dependent(z, b, cpu=of_matrices, default=product)


def unfolded(geometry: Contraction, x, y, a, b):
    """The equations down to r channels and up again, and A and B with the axes these name."""
    in_labels, weight, out_labels = terms(geometry.equation)
    axes = layout(geometry, len(weight))
    batch, inputs, outputs = ("".join(weight[i] for i in part) for part in axes)
    # Sizes by label, counted from the end behind an ellipsis.
    sizes = {}
    for labels, shape in ((in_labels, x.shape), (out_labels, y.shape)):
        head, _, tail = labels.partition("...")
        sizes |= dict(zip(head, shape, strict=False))
        sizes |= dict(zip(reversed(tail), reversed(shape), strict=False))
    r = next(c for c in string.ascii_letters if c not in geometry.equation)
    through = "".join(c for c in out_labels if c not in outputs)  # ellipsis and batch included
    a = a.reshape(*(sizes[c] for c in batch + inputs), a.shape[-1])
    b = b.reshape(*(sizes[c] for c in batch), b.shape[-2], *(sizes[c] for c in outputs))
    down, up = f"{in_labels},{batch}{inputs}{r}->{through}{r}", f"{through}{r},{batch}{r}{outputs}"
    return down, f"{up}->{out_labels}", a, b


def _convolved(geometry, x, y, a, b, scale, precision):
    fields, rank = geometry.fields, a.shape[-1]
    groups = fields.get("feature_group_count", 1)
    kernel = jnp.tile(a.reshape(*_tuple(fields["kernel_size"]), -1, rank), groups)
    if fields.get("transpose_kernel"):
        kernel = jnp.swapaxes(kernel, -1, -2)
    fields = fields | {"features": rank * groups, "dtype": y.dtype, "precision": precision}
    down = geometry.cls(**fields, use_bias=False, parent=None)
    z = down.apply({"params": {"kernel": kernel}}, x) * scale
    if groups == 1:
        return jnp.matmul(z, b.reshape(rank, -1), precision=precision)
    # Every group has r channels of its own, and its own share of B's columns.
    z, b = z.reshape(*z.shape[:-1], groups, rank), b.reshape(rank, groups, -1)
    return jnp.einsum("...gr,rgo->...go", z, b, precision=precision).reshape(y.shape)


def _tuple(value) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)
