"""Other ranks for an adapter: the same update, or the best approximation of it.

An *adapter* is a pair ``(params, lora)``: nested dicts of adapted parameters, or of the trainable
part of them alone, and the ``LoRA`` that describes them. These functions may be traced by
``jax.jit`` and ``jax.eval_shape``; close over the descriptions.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.core import FrozenDict
from flax.traverse_util import flatten_dict, unflatten_dict

from rmlora_jax.adapt.forms import FACTORS, is_factor
from rmlora_jax.adapt.geometry import matmul
from rmlora_jax.adapt.leaves import described_leaves, reboxed, unboxed
from rmlora_jax.adapt.lora import LoRA
from rmlora_jax.adapt.tree import adapted_weights

__all__ = ["pad_rank", "reduce_rank", "to_lora"]


class Adapter(NamedTuple):
    """An adapter: leaves by path, (A, B) unboxed by module, paths of what is trained in full."""

    flat: dict[tuple[str, ...], Any]
    pairs: dict[tuple[str, ...], tuple[jax.Array, jax.Array]]
    trained: set[tuple[str, ...]]
    lora: LoRA


def pad_rank(params: Mapping[str, Any], lora: LoRA, rank: int) -> tuple[dict, LoRA]:
    """The same adapter with every rank raised to ``rank``: A = [A, 0], B = [B; 0].

    Every Delta W = s A B stays what it is, and so does the model's output. Scales are kept through
    alpha (``rs`` becomes False): ``scale_of`` is the same float where alpha can express it, as it
    always can for ranks that are powers of two, and its neighbour otherwise.

    The new directions never move in training: with A = 0 and B = 0 the gradients of both are 0.

    Returns:
        ``(params, lora)``; ``lora_a`` (*stack, in, rank) and ``lora_b`` (*stack, rank, out) in the
        dtypes they had, every other leaf the same array.

    Raises:
        ValueError: a module's rank exceeds ``rank``; ``lora`` is not plain LoRA (``to_lora`` folds
            a diagonal); the factors are not those that ``lora`` describes.
        TypeError: the arguments are not nested dicts and a ``LoRA``.

    Example:
        >>> adapter = {"fc": {"lora_a": jnp.ones((5, 2)), "lora_b": jnp.ones((2, 3))}}
        >>> params, lora = pad_rank(adapter, LoRA(rank=2, alpha=6), rank=4)
        >>> params["fc"]["lora_a"].shape, lora.alpha, lora.scale_of("fc")
        ((5, 4), 12.0, 3.0)
    """
    rank, one = LoRA(rank).rank, read_adapter(params, lora)
    for module, (a, _) in one.pairs.items():
        if a.shape[-1] > rank:
            raise ValueError(
                f"pad_rank: {'/'.join(module)!r} has rank {a.shape[-1]} already, above {rank}: "
                "reduce_rank lowers ranks."
            )
    return _replaced(one.flat, lora, {m: padded(*pair, rank) for m, pair in one.pairs.items()})


def reduce_rank(params: Mapping[str, Any], lora: LoRA, rank: int) -> tuple[dict, LoRA]:
    r"""The best approximation of every :math:`\Delta W = s A B` by one of rank ``rank``.

    With :math:`A = Q_A R_A`, :math:`B^T = Q_B R_B` and :math:`R_A R_B^T = U S V^T` (r x r), cut
    after ``rank`` singular values,

    .. math:: A' = Q_A U \sqrt S, \qquad B' = \sqrt S\, V^T Q_B^T,

    which no matrix of that rank improves on in the Frobenius norm (Eckart & Young); the (in x out)
    increment is never made. Every A' and B' are balanced, :math:`A'^T A' = B' B'^T = S`, also where
    the rank was low already. A direction that Delta W lacks comes out as A = 0, B = 0, and never
    moves in training.

    A module keeps a lower rank if it had one, or if its weight is narrower.

    Returns:
        ``(params, lora)``, the factors in float32, the scales kept as by ``pad_rank``.

    Raises:
        ValueError, TypeError: as ``pad_rank``.

    Example:
        >>> a, b = jnp.eye(6, 2), jnp.array([[9.0, 0, 0], [0, 4.0, 0]])
        >>> params, lora = reduce_rank({"lora_a": a, "lora_b": b}, LoRA(rank=2, alpha=6), rank=1)
        >>> (jnp.abs(params["lora_a"] @ params["lora_b"])[:2] + 0.5).astype(int).tolist()
        [[9, 0, 0], [0, 0, 0]]
        >>> lora.rank, lora.scale_of("")
        (1, 3.0)

    References:
        Eckart & Young 1936, *The approximation of one matrix by another of lower rank*.
    """
    rank, one = LoRA(rank).rank, read_adapter(params, lora)
    pairs = {module: reduced(*pair, rank) for module, pair in one.pairs.items()}
    return _replaced(one.flat, lora, pairs, dtype=jnp.float32)


def to_lora(params: Mapping[str, Any], lora: LoRA) -> tuple[dict, LoRA]:
    """What AdaLoRA or SoRA trained as plain LoRA factors, of the rank that is left.

    e is multiplied into A, as the adapted model does, and the directions whose e is 0 are dropped.
    A stack of layers keeps the rank of its fullest layer, the others with zeros for what they
    dropped; a layer that dropped all keeps one direction of zeros. Scales stay as they are, through
    ``alpha_pattern`` where ranks came to differ. So the model adapted by the result computes what
    it did, up to the rounding of sums of fewer terms. ``params`` hold the base weights, too, and
    are concrete arrays, since shapes follow from values.

    Raises:
        ValueError: ``lora`` has no diagonal, or as ``merge``.

    Example:
        >>> from rmlora_jax import SoRA
        >>> layer = {"kernel": jnp.zeros((5, 4)), "lora_a": jnp.ones((5, 3))}
        >>> layer |= {"lora_b": jnp.ones((3, 4)), "lora_e": jnp.array([0.0, 2.0, 0.0])}
        >>> params, plain = to_lora({"fc": layer}, SoRA(rank=3, alpha=6))
        >>> params["fc"]["lora_a"].shape, plain.rank, plain.scale_of("fc")
        ((5, 1), 1, 2.0)

    References:
        Ding et al. 2023, arXiv:2311.11696, section 3.2 (pruning after training).
    """
    if not lora.form.folds:
        raise ValueError(f"to_lora: {type(lora).__name__} has no diagonal to fold; merge takes it.")
    pairs = {
        path[:-1]: lora.form.folded(leaves) for path, _, leaves in adapted_weights(params, lora)
    }
    own = {path: leaf for path, leaf in flatten_dict(params).items()
           if not is_factor(path) or path[-1] in FACTORS}  # fmt: skip
    return _replaced(own, lora, pairs)


def _replaced(flat: dict, lora: LoRA, pairs: Mapping, **fields) -> tuple[dict, LoRA]:
    """An adapter with other (A, B) of the same scales, and what describes it."""
    kept = {}
    for module, (a, b) in pairs.items():
        put_factors(flat, module, flat, (a, b))
        kept["/".join(module)] = (a.shape[-1], lora.scale_of("/".join(module)))
    return unflatten_dict(flat), described(lora, kept, **fields)


def described(lora: LoRA, kept: Mapping[str, tuple[int, float]], **fields) -> LoRA:
    """A plain description of modules with the given (rank, scale), the most frequent as default.

    ``fields`` replace those of ``lora``. ``scale_of`` is exact where alpha / rank can be.

    >>> described(LoRA(rank=4, alpha=8, rs=True), {"fc": (2, 0.5), "out": (2, 3.0), "q": (2, 0.5)})
    LoRA(rank=2, alpha=1.0, target='.*', exclude=None, train=None, dropout=0.0, init='kaiming',
        dtype=dtype('float32'), rank_pattern=(), alpha_pattern=(('out', 6.0),), rs=False,
        execution='auto', layers=())
    """
    fields = {f.name: getattr(lora, f.name) for f in dataclasses.fields(LoRA)} | fields
    if kept:
        pairs = {path: (rank, alpha_for(scale, rank)) for path, (rank, scale) in kept.items()}
        (rank, alpha), _ = Counter(pairs.values()).most_common(1)[0]
        fields |= {"rank": rank, "alpha": alpha, "rs": False}
        for i, name in enumerate(("rank", "alpha")):
            others = [(exactly(p), pair[i]) for p, pair in pairs.items() if pair[i] != fields[name]]
            fields[f"{name}_pattern"] = tuple(others)
    return LoRA(**fields)


def read_adapter(params, lora) -> Adapter:
    """The parts of an adapter, checked against each other; errors as ``pad_rank``'s."""
    if not isinstance(params, dict | FrozenDict) or not isinstance(lora, LoRA):
        raise TypeError(
            "an adapter is a pair (nested dicts of parameters, LoRA), not "
            f"({type(params).__name__}, {type(lora).__name__})."
        )
    if lora.form.obstacle is not None:
        raise ValueError(f"{type(lora).__name__} {lora.form.obstacle}")
    flat = dict(flatten_dict(params))
    pairs = dict(described_leaves({path: unboxed(leaf) for path, leaf in flat.items()}, lora))
    trained = {path for path in flat if not is_factor(path) and lora.trains("/".join(path))}
    return Adapter(flat, pairs, trained, lora)


def exactly(path: str) -> str:
    """A rule for one path; the root's is empty, which no rule may be."""
    return re.escape(path) or "()"


def alpha_for(scale: float, root: float) -> float:
    """The alpha for which alpha / root is closest to ``scale``; of equals a whole one.

    >>> alpha_for(7 / 3, 3)
    7.0
    """
    alpha = scale * root
    near = float(round(alpha)), alpha, math.nextafter(alpha, 0), math.nextafter(alpha, math.inf)
    return min(near, key=lambda alpha: abs(alpha / root - scale))


def put_factors(flat, module, boxes, factors):
    """Sets the factors of a module, in boxes like those that ``boxes`` has."""
    for name, value in zip(FACTORS, factors, strict=True):
        flat[*module, name] = reboxed(boxes[*module, name], value)


def padded(a, b, rank: int):
    """A and B with directions of 0 up to this rank."""
    more, none = (0, rank - a.shape[-1]), [(0, 0)] * (a.ndim - 2)
    return jnp.pad(a, [*none, (0, 0), more]), jnp.pad(b, [*none, more, (0, 0)])


def reduced(a, b, rank: int):
    """Balanced factors of the best approximation of A B by one of this rank, in float32."""
    qa, ra = jnp.linalg.qr(a.astype(jnp.float32))
    qb, rb = jnp.linalg.qr(b.astype(jnp.float32).mT)
    u, s, vt = jnp.linalg.svd(matmul(ra, rb.mT), full_matrices=False)
    root = jnp.sqrt(s[..., :rank])
    left, right = u[..., :rank] * root[..., None, :], root[..., :, None] * vt[..., :rank, :]
    return matmul(qa, left), matmul(right, qb.mT)
