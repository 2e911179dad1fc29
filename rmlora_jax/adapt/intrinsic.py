"""Intrinsic dimension of low-rank updates, from the factors alone."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from rmlora_jax.adapt.geometry import matmul
from rmlora_jax.adapt.lora import LoRA
from rmlora_jax.adapt.tree import adapted_modules

__all__ = ["intrinsic_dimension", "trajectory_dimension"]


def intrinsic_dimension(
    params: Mapping[str, Any], lora: LoRA, *, rtol: float = 1e-3
) -> dict[str, dict[str, jax.Array]]:
    r"""How many directions each update :math:`\Delta W = s A B` really uses.

    With singular values :math:`\sigma_1 \ge \dots \ge \sigma_r` and
    :math:`p_i = \sigma_i / \sum_k \sigma_k`, every module's entry holds, in float32:

    * ``singular_values``: (*stack, r);
    * ``numerical_rank``: the number of :math:`\sigma_i > \mathrm{rtol}\,\sigma_1`;
    * ``stable_rank``: :math:`\sum \sigma_i^2 / \sigma_1^2`;
    * ``effective_rank``: :math:`\exp(-\sum p_i \log p_i)`;
    * ``participation_ratio``: :math:`(\sum \sigma_i^2)^2 / \sum \sigma_i^4`;

    each of the last four (*stack,), between 1 and r, or 0 where the update is 0 (B = 0). The space
    that updates explore over time may exceed r (``trajectory_dimension``).

    The singular values are those of :math:`R_A R_B^T` (r x r) for the QR decompositions of A and
    :math:`B^T`: no (in x out) matrix is made.

    Args:
        params: adapted parameters, or the factors alone: (*stack, in, r) and (*stack, r, out).
        lora: their description; close over it under ``jax.jit``.
        rtol: the relative tolerance of ``numerical_rank``.

    Errors are those of ``merge``.

    Example:
        >>> a, b = jnp.eye(6, 2), jnp.array([[3.0, 0, 0, 0], [0, 4.0, 0, 0]])
        >>> params = {"fc": {"kernel": jnp.zeros((6, 4)), "lora_a": a, "lora_b": b}}
        >>> found = intrinsic_dimension(params, LoRA(rank=2))["fc"]
        >>> found["singular_values"].tolist(), round(float(found["stable_rank"]), 4)
        ([4.0, 3.0], 1.5625)

    References:
        Roy & Vetterli 2007, *The effective rank: a measure of effective dimensionality*, def. 1;
        Rudelson & Vershynin 2007 for the stable rank.
    """
    found = {}
    for module, factors in adapted_modules(params, lora):
        name = "/".join(module)
        values = _singular_values(*lora.form.pair(factors), lora.scale_of(name))
        found[name] = _figures(values, rtol)
    return found


def trajectory_dimension(
    snapshots: Sequence[Mapping[str, Any]], lora: LoRA, *, side: str = "out", rtol: float = 1e-3
) -> dict[str, dict[str, jax.Array]]:
    r"""The dimension of the space that the updates explore over training.

    The same figures as ``intrinsic_dimension``, of the stacked increments
    :math:`D_k = \Delta W_{t_k} - \Delta W_{t_{k-1}}`, k = 1 ... K: of
    :math:`[D_1; \dots; D_K]` (K in x out) with ``side="out"``, which counts the output directions
    that were ever moved, or of :math:`[D_1, \dots, D_K]` (in x K out) with ``side="in"``, the input
    directions. Each increment stays the product
    :math:`s\,[A_k, A_k - A_{k-1}]\,[B_k - B_{k-1}; B_{k-1}]`.

    ``snapshots`` are adapted parameters, or factors alone, at two or more times, in order.
    ``singular_values`` has min(2 r K, out or in) entries.

    Raises:
        ValueError: fewer than two snapshots, an unknown ``side``, snapshots of different modules,
            or as ``merge``.

    Example:
        >>> def at(a, b):
        ...     return {"kernel": jnp.zeros((4, 4)), "lora_a": a, "lora_b": b}
        >>> eye = jnp.eye(4)
        >>> path = [at(eye[:, :1], 0 * eye[:1]), at(eye[:, :1], eye[:1]), at(eye[:, :1], eye[1:2])]
        >>> lora = LoRA(rank=1)
        >>> float(intrinsic_dimension(path[-1], lora)[""]["numerical_rank"])
        1.0
        >>> float(trajectory_dimension(path, lora)[""]["numerical_rank"])
        2.0
    """
    if len(snapshots) < 2:
        raise ValueError(f"trajectory_dimension needs two or more snapshots, not {len(snapshots)}.")
    if side not in ("out", "in"):
        raise ValueError(f"side is {side!r}; allowed: 'out', 'in'.")
    times = [
        {
            module: tuple(f.astype(jnp.float32) for f in lora.form.pair(factors))
            for module, factors in adapted_modules(params, lora)
        }
        for params in snapshots
    ]
    if any(time.keys() != times[0].keys() for time in times):
        raise ValueError("the snapshots hold factors of different modules: take them from one run.")
    out = {}
    for module in times[0]:
        path = "/".join(module)
        pairs = [time[module] for time in times]
        if side == "in":  # D^T = B^T A^T: the same question about the transposes
            pairs = [(b.mT, a.mT) for a, b in pairs]
        out[path] = _figures(_stacked_singular_values(pairs, lora.scale_of(path)), rtol)
    return out


def _upper(x):
    """R of the QR decomposition of x (..., n, r): (..., min(n, r), r)."""
    return jnp.linalg.qr(x.astype(jnp.float32), mode="r")


def _singular_values(a, b, scale):
    core = matmul(_upper(a), _upper(b.mT).mT)
    return _padded(scale * jnp.linalg.svd(core, compute_uv=False), a.shape[-1])


def _stacked_singular_values(pairs, scale):
    """Of [D_1; ...; D_K] = blockdiag(P_k) [Q_1; ...; Q_K], with D_k = P_k Q_k.

    An orthogonal factor on either side leaves singular values as they are: P_k may be replaced by
    its R, and the transpose of the remaining stack of short rows by the R of its own QR.
    """
    rows = []
    for (a0, b0), (a1, b1) in itertools.pairwise(pairs):
        # A1 B1 - A0 B0 = A1 (B1 - B0) + (A1 - A0) B0: the small differences are taken first,
        # before a product could round them away.
        left = jnp.concatenate([a1, a1 - a0], axis=-1)
        right = jnp.concatenate([b1 - b0, b0], axis=-2)
        rows.append(matmul(_upper(left), right))
    stacked = jnp.concatenate(rows, axis=-2)
    size = min(2 * pairs[0][0].shape[-1] * len(rows), stacked.shape[-1])
    return _padded(scale * jnp.linalg.svd(_upper(stacked), compute_uv=False), size)


def _padded(s, size):
    """A weight narrower than the rank has fewer singular values; the rest are 0."""
    return jnp.pad(s, [(0, 0)] * (s.ndim - 1) + [(0, size - s.shape[-1])])


def _figures(s, rtol):
    top = s[..., :1]
    used = top[..., 0] > 0
    # Ratios are taken of sigma / sigma_1, so that neither a tiny nor a huge update overflows.
    unit = s / jnp.where(top > 0, top, 1)
    total = jnp.where(used, unit.sum(-1), 1)[..., None]
    p = unit / total
    entropy = -jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1)), 0), axis=-1)
    energy = jnp.sum(unit**2, axis=-1)
    quartic = jnp.where(used, jnp.sum(unit**4, axis=-1), 1)
    return {
        "singular_values": s,
        "numerical_rank": jnp.sum(unit > rtol, axis=-1).astype(jnp.float32),
        "stable_rank": energy,
        "effective_rank": jnp.where(used, jnp.exp(entropy), 0),
        "participation_ratio": energy**2 / quartic,
    }
