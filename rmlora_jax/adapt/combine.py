"""Several adapters of one base model: their sums, and one program for all of them.

An *adapter* is a pair ``(params, lora)``, as in ``ranks``. Factors made with ``init="pissa"`` hold
a part of W_0, and a sum of such adapters adds that part for each: use weights that sum to 1.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict
from jax.core import Tracer

from rmlora_jax.adapt.forms import is_factor
from rmlora_jax.adapt.leaves import reboxed, unboxed
from rmlora_jax.adapt.lora import LoRA
from rmlora_jax.adapt.ranks import (
    Adapter,
    described,
    exactly,
    padded,
    put_factors,
    read_adapter,
    reduced,
)

__all__ = ["align_adapters", "combine_adapters"]

Pair = tuple[Mapping[str, Any], LoRA]

HOWS = ("svd", "cat", "linear")


def combine_adapters(
    adapters: Sequence[Pair],
    weights: Sequence[float] | None = None,
    how: str = "svd",
    *,
    rank: int | None = None,
    head: int | None = None,
) -> tuple[dict, LoRA]:
    r"""One adapter out of several of the same base.

    * ``"cat"``: :math:`\Delta W = \sum_i w_i s_i A_i B_i` exactly, by concatenation along the rank
      axis; the ranks add up.
    * ``"svd"``: the best approximation of that sum by rank ``rank`` (``reduce_rank``).
    * ``"linear"``: :math:`A = \sum_i \pm\sqrt{|w_i| s_i}\,A_i`, :math:`B = \sum_i
      \sqrt{|w_i| s_i}\,B_i`, with the sign of :math:`w_i`. This is NOT the sum of the updates:
      the product has the cross terms :math:`A_i B_j` as well, which mean little unless all
      adapters set out from the same A and stayed near it. Ranks must agree.

    They give the Delta W of PEFT's ``add_weighted_adapter``. Targets, scales and (but for "linear")
    ranks may differ; a module that only some have gets what those have.

    What is trained in full (heads, norms under ``lora.train``) becomes the mean over the adapters
    that train it, with their weights normalised to sum to 1, in float32: right for heads of one set
    of labels. For heads of different labels, ``head`` names the adapter to take them from.

    Args:
        adapters: pairs ``(params, lora)``, with base weights, without, or mixed.
        weights: a finite number, of either sign, for each adapter; None means 1 / n each, the mean.
        how: one of the above.
        rank: of "svd": None is the largest rank that a module has in any adapter.
        head: index of the adapter from which all that is trained in full is taken; what only others
            train stays the base's.

    Returns:
        ``(params, lora)``: factors in float32; the base leaves, the same arrays, if any adapter
        holds them. A module keeps the scale of the first adapter that has it (B takes up the
        difference). The other fields of ``lora`` are the first adapter's; where the rules differ,
        ``target`` and ``train`` list paths.

    Raises:
        ValueError: no adapters; an argument is not allowed; the adapters differ in base weights
            (values are compared outside ``jax.jit`` only, shapes always), in shapes, or, for
            "linear", in ranks; what is trained in full differs in shape, or the weights of those
            that train it sum to 0 or less, and ``head`` is None.
        ValueError, TypeError: as ``pad_rank``.

    Example:
        >>> one = {"fc": {"lora_a": jnp.ones((5, 2)), "lora_b": jnp.ones((2, 3))}}
        >>> two = {"fc": {"lora_a": jnp.ones((5, 1)), "lora_b": jnp.ones((1, 3))}}
        >>> adapters = [(one, LoRA(rank=2, alpha=4)), (two, LoRA(rank=1))]
        >>> params, lora = combine_adapters(adapters, weights=[1, -1], how="cat")
        >>> float(lora.scale_of("fc") * (params["fc"]["lora_a"] @ params["fc"]["lora_b"])[0, 0])
        3.0
        >>> lora.rank, combine_adapters(adapters, how="svd")[1].rank
        (3, 2)

    References:
        ``add_weighted_adapter`` of Hugging Face PEFT 0.21; Ilharco et al. 2023 (arXiv:2212.04089)
        for sums and differences of updates.
    """
    read = _read(adapters)
    weights = [1 / len(read)] * len(read) if weights is None else [float(w) for w in weights]
    if len(weights) != len(read) or not all(map(math.isfinite, weights)):
        raise ValueError(f"weights is {weights}; allowed: {len(read)} finite numbers.")
    if how not in HOWS:
        raise ValueError(f"how is {how!r}; allowed: {', '.join(map(repr, HOWS))}.")
    if rank is not None and how != "svd":
        raise ValueError(f'rank={rank!r} goes with how="svd" only, not with {how!r}.')
    if head is not None and head not in range(len(read)):
        raise ValueError(f"head is {head!r}; allowed: an index below {len(read)}, or None.")
    rank = rank if rank is None else LoRA(rank).rank
    heads = range(len(read)) if head is None else [head]
    trained = {
        path: _mean(path, [(weights[i], read[i].flat[path]) for i in heads
                           if path in read[i].trained])
        for path in _trained([read[i] for i in heads])
    }
    flat, kept = _base(read, trained) | trained, {}
    for module, found in _modules(read).items():
        path, scale = "/".join(module), next(iter(found.values()))[2]
        pairs = [(weights[i] * s / scale, a, b) for i, (a, b, s) in found.items()]
        ranks = [a.shape[-1] for _, a, _ in pairs]
        if how == "linear":
            if len(set(ranks)) > 1:
                raise ValueError(
                    f'how="linear" adds factors of one rank, but those at {path!r} have the ranks '
                    f'{ranks}: use "svd" or "cat", or pad_rank first.'
                )
            a = _sum(math.copysign(math.sqrt(abs(w)), w) * a for w, a, _ in pairs)
            b = _sum(math.sqrt(abs(w)) * b for w, _, b in pairs)
        else:
            a = jnp.concatenate([a for _, a, _ in pairs], axis=-1)
            b = jnp.concatenate([w * b for w, _, b in pairs], axis=-2)
            if how == "svd":
                a, b = reduced(a, b, rank or max(ranks))
        put_factors(flat, module, read[next(iter(found))].flat, (a, b))
        kept[path] = (a.shape[-1], scale)
    return unflatten_dict(flat), _common(read, [read[i] for i in heads], trained, kept)


def align_adapters(adapters: Mapping[str, Pair]) -> tuple[dict[str, dict], LoRA]:
    """Adapters by name, brought to one structure: one compiled program serves all of them.

    Ranks are padded to the largest that a module has, modules that an adapter lacks get factors of
    0, and scales are made those of the first adapter that has the module (B takes up the
    difference), so that one description fits all. Every adapter computes what it did.

    Args:
        adapters: pairs ``(params, lora)`` of one base, by name. Parameters with the base weights
            are needed only where an adapter does not train something that another does.

    Returns:
        ``(trees, lora)``: for each name the trainable part alone, all of the same treedef, shapes
        and dtypes (factors in float32), and their common description.

    Raises:
        ValueError: what is trained in full differs in shape; an adapter lacks what another trains.
        ValueError, TypeError: as ``combine_adapters``.

    Example:
        >>> a, b = jnp.ones((5, 2)), jnp.ones((2, 3))
        >>> trees, lora = align_adapters({
        ...     "old": ({"query": {"lora_a": a, "lora_b": b}}, LoRA(rank=2)),
        ...     "new": ({"value": {"lora_a": a[:, :1], "lora_b": b[:1]}}, LoRA(rank=1)),
        ... })
        >>> jax.tree.map(jnp.shape, trees["old"]) == jax.tree.map(jnp.shape, trees["new"])
        True

        ::

            model = rm.adapt(base_model, lora)
            apply = jax.jit(lambda tree, x: model.apply({"params": rm.join(tree, frozen)}, x))
            apply(trees["old"], x), apply(trees["new"], x)  # compiled once

        README.md of this folder has an adapter for each example of a batch.
    """
    read = _read(adapters.values())
    paths, kept = _trained(read), {}
    _base(read, paths)
    trees: list[dict] = [{} for _ in read]
    for path in paths:
        for name, one in zip(adapters, read, strict=True):
            if path not in one.flat:
                raise ValueError(
                    f"the adapter {name!r} holds no {'/'.join(path)!r}, which another trains: give "
                    "it with its base weights, join(trainable, frozen)."
                )
        leaves = [one.flat[path] for one in read]
        if len({jnp.shape(unboxed(leaf)) for leaf in leaves}) > 1:
            raise _other_shapes(path, leaves, "and apply each adapter's own outside the program")
        dtype = jnp.result_type(*map(unboxed, leaves))
        for tree, leaf in zip(trees, leaves, strict=True):
            tree[path] = reboxed(leaf, jnp.asarray(unboxed(leaf), dtype))
    for module, found in _modules(read).items():
        first, (a0, b0, scale) = next(iter(found.items()))
        rank = max(a.shape[-1] for a, _, _ in found.values())
        none = (jnp.zeros_like(a0), jnp.zeros_like(b0), scale)
        for i, tree in enumerate(trees):
            a, b, own = found.get(i, none)
            b = b if own == scale else own / scale * b
            put_factors(tree, module, read[first].flat, padded(a, b, rank))
        kept["/".join(module)] = (rank, scale)
    named = {name: unflatten_dict(tree) for name, tree in zip(adapters, trees, strict=True)}
    return named, _common(read, read, paths, kept)


def _read(adapters: Iterable[Pair]) -> list[Adapter]:
    read = []
    for adapter in adapters:
        if not isinstance(adapter, tuple | list) or len(adapter) != 2:
            raise TypeError(f"an adapter is a pair (params, lora), not a {type(adapter).__name__}.")
        read.append(read_adapter(*adapter))
    if not read:
        raise ValueError("no adapters were given.")
    return read


def _sum(arrays: Iterable[jax.Array]) -> jax.Array:
    return cast(jax.Array, sum(arrays))  # of at least one


def _modules(read: list[Adapter]) -> dict[tuple[str, ...], dict[int, tuple]]:
    """For each module with factors, by adapter: A and B in float32, and the scale."""
    out = {}
    for i, one in enumerate(read):
        for module, (a, b) in one.pairs.items():
            path, found = "/".join(module), out.setdefault(module, {})
            found[i] = (a.astype(jnp.float32), b.astype(jnp.float32), one.lora.scale_of(path))
            sizes = {(*a.shape[:-1], b.shape[-1]) for a, b, _ in found.values()}
            if len(sizes) > 1:
                raise ValueError(
                    f"the factors at {path!r} are those of weights (*stack, in, out) of different "
                    f"shapes, {sorted(sizes)}: give adapters of one base model."
                )
    return dict(sorted(out.items()))


def _trained(read: list[Adapter]) -> list[tuple[str, ...]]:
    return sorted(set().union(*(one.trained for one in read)))


def _base(read: list[Adapter], trained) -> dict:
    """What nobody trains, from whoever holds it; all must hold the same."""
    base = {}
    for one in read:
        for path, leaf in one.flat.items():
            if is_factor(path) or path in one.trained or path in trained:
                continue
            if not _same(unboxed(base.setdefault(path, leaf)), unboxed(leaf)):
                raise ValueError(
                    f"the adapters hold different base weights at {'/'.join(path)!r}: give adapters"
                    " of one base model, or their trainable parts alone (rm.split)."
                )
    return base


def _same(x, y) -> bool:
    if x is y:
        return True
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    traced = any(isinstance(v, Tracer) for v in (x, y))
    return traced or bool(jnp.array_equal(x, y))


def _mean(path, found: list[tuple[float, Any]]):
    """The mean of leaves by weights of any positive sum."""
    (_, first), *rest = found
    if all(leaf is first for _, leaf in rest):
        return first
    leaves = [leaf for _, leaf in found]
    if len({unboxed(leaf).shape for leaf in leaves}) > 1:
        raise _other_shapes(path, leaves, "or take those of one adapter with head=INDEX")
    total = math.fsum(w for w, _ in found)
    if total <= 1e-9 * sum(abs(w) for w, _ in found):
        raise ValueError(
            f"the weights of the adapters that train {'/'.join(path)!r} sum to {total:g}, which "
            "gives no mean: take what is trained in full from one of them with head=INDEX."
        )
    mean = _sum(w / total * unboxed(leaf).astype(jnp.float32) for w, leaf in found)
    return reboxed(first, mean.astype(unboxed(first).dtype))


def _other_shapes(path, leaves, advice: str) -> ValueError:
    shapes = ", ".join(str(jnp.shape(unboxed(leaf))) for leaf in leaves)
    return ValueError(
        f"the adapters train {'/'.join(path)!r} in full, in different shapes {shapes}: drop such "
        f"leaves from the params {advice}."
    )


def _common(read: list[Adapter], heads: list[Adapter], trained, kept) -> LoRA:
    """The description of the combination of what was read."""
    first = read[0].lora
    fields: dict[str, Any] = {"dtype": jnp.float32}
    if len({(one.lora.target, one.lora.exclude) for one in read}) > 1:
        fields |= {"target": "|".join(map(exactly, kept)) or None, "exclude": None}
    rules = {one.lora.train for one in heads}
    if not trained:
        rules = {None}  # such as heads that were dropped
    elif len(rules) > 1:
        rules = {"|".join(exactly("/".join(path)) for path in trained)}
    fields["train"] = rules.pop()
    fields["layers"] = tuple(dict.fromkeys(layer for one in read for layer in one.lora.layers))
    return described(first, kept, **fields)
