"""The orthogonality penalty on LoRA factors, as a loss term and as an optax transformation."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from rmlora_jax.optim.factors import Factor, FactorNames, find_factors, flatten, map_leaves
from rmlora_jax.optim.precision import (
    CountState,
    check_one_of,
    check_params,
    next_count,
    value_at,
)

_COSINE_EPS = 1e-8


def orthogonality(
    tree: Any, *, kind: str = "norm", reduction: str = "mean", factors: FactorNames = None
) -> jax.Array:
    r"""How far the LoRA factors are from having orthonormal rank directions.

    For M modules with :math:`A_j` (in x r) and :math:`B_j` (r x out), kind ``"norm"`` is

    .. math::
        R = \frac{1}{2M} \sum_j \left( \|A_j^T A_j - I_r\|_F + \|B_j B_j^T - I_r\|_F \right),

    the norm not squared. ``"squared"`` squares each norm. ``"cosine"`` replaces it by the mean
    absolute cosine between different rank directions p (columns of A, rows of B),

    .. math::
        \frac{1}{r^2 - r} \sum_{i \ne k} \frac{|\langle p_i, p_k \rangle|}{|p_i| |p_k| + 10^{-8}},

    which does not depend on the scale of the factors and is 0 for r = 1.

    The Gram matrices are r x r and computed in float32 at the highest matmul precision. A factor
    stacked over L layers counts as L matrices. The gradient is finite everywhere: 0 at exactly
    orthonormal factors, where the norm has no derivative, and with respect to a factor that is 0.

    Args:
      tree: any pytree that holds factors (*stack, *in, r) and (*stack, r, *out); several in or out
        axes are flattened. Other leaves are ignored.
      kind: ``"norm"``, ``"squared"`` or ``"cosine"``.
      reduction: ``"mean"`` over the 2M matrices, or ``"sum"``.
      factors: how factors are named and laid out, see
        :func:`rmlora_jax.optim.factors.find_factors`; here None or a pair of regular expressions
        (and a stack depth, or the axes).

    Returns:
      A float32 scalar.

    Raises:
      ValueError: the tree has no factors, their shapes do not fit, or an argument is not allowed.

    Example:
      >>> q = {"lora_a": jnp.eye(3, 2), "lora_b": jnp.zeros((2, 4))}
      >>> print(round(float(orthogonality({"q": q})), 6))  # (0 + sqrt(2)) / 2
      0.707107

    References:
      Mao et al., 2024, `RM-LoRA <https://arxiv.org/abs/2407.12074>`_;
      Zhang et al., 2023, `AdaLoRA <https://arxiv.org/abs/2303.10512>`_, equation 4 (squared).
    """
    _check_arguments(kind, reduction, factors)
    leaves, _, _ = flatten(tree)
    found = find_factors(tree, factors)
    if not found:
        raise ValueError("no LoRA factors: the tree is empty; pass the parameters that hold them")
    return _penalty([leaves[f.index] for f in found], found, kind, reduction)


def add_orthogonality(
    weight: optax.ScalarOrSchedule,
    *,
    kind: str = "norm",
    reduction: str = "mean",
    factors: FactorNames = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adds the gradient of ``weight * orthogonality(params)`` to the updates.

    .. math::
        u_t \leftarrow u_t + \lambda_t \nabla R(\theta_t)

    As the first element of a chain this equals adding the penalty to the loss. Under data
    parallelism it is added once, after the reduction of the gradients. The sum is computed in
    float32 and cast to the dtype of the update.

    Args:
      weight: :math:`\lambda`, a float or a schedule of the step. A Python number 0 makes this the
        identity: no gradient is computed, and ``update`` needs no ``params``.
      kind, reduction, factors: see :func:`orthogonality`.

    Raises:
      ValueError: as :func:`orthogonality`.

    Example:
      >>> params = {"lora_a": jnp.array([[2.0]]), "lora_b": jnp.zeros((1, 2))}
      >>> tx = optax.chain(add_orthogonality(0.1), optax.sgd(1.0))
      >>> gradients = optax.tree.zeros_like(params)
      >>> updates, _ = tx.update(gradients, tx.init(params), params)
      >>> print(updates["lora_a"])  # -0.1 * 1/2 * d|a^2 - 1|/da = -0.1 a
      [[-0.2]]
    """
    is_identity = isinstance(weight, int | float) and weight == 0
    _check_arguments(kind, reduction, None if is_identity else factors)

    def init_fn(params):
        find_factors(params, factors)
        return CountState(jnp.zeros([], jnp.int32))

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        new_state = CountState(next_count(state.count))
        if is_identity:
            return updates, new_state
        leaves, _, _ = flatten(check_params(params))
        found = find_factors(params, factors)
        if not found:
            return updates, new_state
        values = [jnp.asarray(leaves[f.index], jnp.float32) for f in found]
        own = jax.grad(_penalty)(values, found, kind, reduction)
        gradients = {factor.index: gradient for factor, gradient in zip(found, own, strict=True)}
        scale = value_at(weight, state.count)

        def penalised(i, u):
            return (u + scale * gradients[i]).astype(u.dtype) if i in gradients else u

        return map_leaves(penalised, updates), new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _check_arguments(kind: str, reduction: str, factors: FactorNames) -> None:
    check_one_of("kind", kind, _KINDS)
    check_one_of("reduction", reduction, ("mean", "sum"))
    if isinstance(factors, str):
        raise ValueError(
            f"factors={factors!r}: orthogonality must know which axis of a factor is the rank: "
            "pass a pair of regular expressions (a, b)"
        )


def _penalty(values: list[jax.Array], found: list[Factor], kind: str, reduction: str) -> jax.Array:
    """The penalty of the factor leaves ``values``, aligned with ``found``."""
    per_leaf = [_KINDS[kind](_gram(v, f)) for v, f in zip(values, found, strict=True)]
    total = cast(jax.Array, sum(jnp.sum(value) for value in per_leaf))  # of at least one leaf
    return total / sum(value.size for value in per_leaf) if reduction == "mean" else total


def _gram(value: jax.Array, factor: Factor) -> jax.Array:
    """(*stack, r, r) inner products of the rank directions."""
    subscripts = "...ir,...is->...rs" if factor.side == "a" else "...ri,...si->...rs"
    matrix = factor.matrices(jnp.asarray(value, jnp.float32))
    return jnp.einsum(subscripts, matrix, matrix, precision=jax.lax.Precision.HIGHEST)


def _squared(gram: jax.Array) -> jax.Array:
    return jnp.sum((gram - jnp.eye(gram.shape[-1], dtype=gram.dtype)) ** 2, axis=(-2, -1))


def _norm(gram: jax.Array) -> jax.Array:
    return _safe_sqrt(_squared(gram))


def _cosine(gram: jax.Array) -> jax.Array:
    rank = gram.shape[-1]
    if rank == 1:
        return jnp.zeros(gram.shape[:-2], gram.dtype)
    lengths = _safe_sqrt(jnp.diagonal(gram, axis1=-2, axis2=-1))
    scale = lengths[..., :, None] * lengths[..., None, :] + _COSINE_EPS
    # jnp.abs has derivative 1 at 0, which would push orthogonal directions out of place.
    cosines = jnp.where(jnp.eye(rank, dtype=bool), 0.0, gram * jnp.sign(gram) / scale)
    return jnp.sum(cosines, axis=(-2, -1)) / (rank * rank - rank)


def _safe_sqrt(x: jax.Array) -> jax.Array:
    """Square root with gradient 0 at 0, where the derivative is infinite."""
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1.0)), 0.0)


_KINDS = {"norm": _norm, "squared": _squared, "cosine": _cosine}
