"""Adapters and base as plain parameter trees: ``attach``, ``split``, ``join``, ``merge``, and what
has no factors: ``unadapted``."""

import dataclasses
import importlib
import sys
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax.core import FrozenDict, meta
from flax.traverse_util import flatten_dict, unflatten_dict

from rmlora_jax.adapt.forms import FACTORS, is_factor
from rmlora_jax.adapt.geometry import check_layout, in_order
from rmlora_jax.adapt.leaves import (
    check_adapted,
    described_leaves,
    first_leaves,
    is_matrix,
    reboxed,
    unboxed,
    weight_path,
)
from rmlora_jax.adapt.linen import Adapted, layouts
from rmlora_jax.adapt.lora import LoRA

__all__ = ["attach", "join", "merge", "split", "unadapted"]

Params = Mapping[str, Any]


def attach(key, adapted: Adapted, base_params: Params, *example_args, **kwargs) -> dict:
    """``base_params`` with fresh factors beside every weight that ``adapted`` targets.

    The base leaves come back as the same arrays (for ``init="pissa"``, which takes W_0 apart, only
    those of layers without factors). Nothing of the base is drawn or allocated: shapes come from
    ``jax.eval_shape``. Each A is drawn from ``key`` folded with the crc32 of its module path, each
    layer of a stack by itself. B is 0.

    Args:
        key: a ``jax.random`` key.
        adapted: what ``adapt`` returned.
        base_params: the "params" collection of the base module, of any dtype, boxed or not.
        *example_args: arguments of the module's call, arrays or ``jax.ShapeDtypeStruct``; anything
            else (flags such as ``train=False``) is passed as it is.
        **kwargs: likewise; ``method=`` selects a method other than ``__call__``.

    Returns:
        Nested dicts: the base leaves and, beside the weights, ``lora_a`` (*stack, in, r) and
        ``lora_b`` (*stack, r, out) in ``lora.dtype``; for ``AdaLoRA`` and ``SoRA`` also ``lora_e``
        (*stack, r), for ``DoRA`` ``lora_m`` (*stack, out). With ``target=None``, ``base_params``
        itself. Works under ``jax.jit`` and ``jax.eval_shape``.

    Raises:
        TypeError: ``adapted`` does not come from ``adapt``.
        ValueError: a rule matches nothing; a targeted layer cannot be adapted; ``base_params``
            already has factors, lacks parameters of the model, or has them in other shapes.

    Example:
        >>> import flax.linen as nn
        >>> from rmlora_jax.adapt import adapt
        >>> base, x = nn.Dense(3), jnp.ones((1, 5))
        >>> base_params = base.init(jax.random.key(0), x)["params"]
        >>> params = attach(jax.random.key(1), adapt(base, LoRA(rank=2)), base_params, x)
        >>> params["kernel"] is base_params["kernel"]
        True
    """
    if not isinstance(adapted, Adapted):
        raise TypeError(
            f"attach was given a {type(adapted).__name__}: pass what adapt(module, lora) returned."
        )
    lora = adapted.lora
    base = _flatten(base_params)
    if any(map(is_factor, base)):
        raise ValueError("base_params has factors already: pass the parameters of the base module.")
    if {path[0] for path in base} == {"params"}:
        raise ValueError("base_params is a dict of collections: pass variables['params'].")
    lora.check_train(map("/".join, base))
    if lora.target is None:
        return cast(dict, base_params)  # as it is, a FrozenDict too
    shapes, axes = _trace(adapted, key, example_args, kwargs)
    check_adapted(shapes, lora)
    _check_base(base, shapes)

    params = dict(base)
    for module in sorted({path[:-1] for path in shapes if path[-1] in FACTORS}):
        path, weight_at = "/".join(module), weight_path(lora, module, shapes)
        weight, found = params[weight_at], axes.get(path)
        boxes = [shapes[(*module, name)] for name in lora.factors]
        leaves, value = [unboxed(box) for box in boxes], unboxed(weight)
        check_layout(path, value, leaves[0], leaves[1], found)
        own, shape = jax.random.fold_in(key, zlib.crc32(path.encode())), [x.shape for x in leaves]
        values, rest = first_leaves(lora, path, own, value, found, shape)
        if lora.init == "pissa":
            params[weight_at] = reboxed(weight, rest)
        boxed = isinstance(weight, meta.AxisMetadata)  # boxes only where the base has them
        for name, box, value in zip(lora.factors, boxes, values, strict=True):
            params[(*module, name)] = reboxed(box, value) if boxed else value
    return unflatten_dict(params)


def split(params: Params, lora: LoRA) -> tuple[dict, dict]:
    """``(trainable, frozen)``: the factors and what ``lora.train`` matches, and all the rest.

    Both are nested dicts with the leaves of ``params`` themselves, without empty branches. Take
    gradients and optimizer state of ``trainable``; keep ``frozen`` as it is. A tree of something
    else than arrays at the same paths (shardings, partition specs) is split alike, unchecked.

    Raises:
        ValueError: ``params`` has no factors although ``lora`` targets layers; ``train`` matches
            nothing; or a pair of factors does not fit its weight.

    Example:
        >>> params = {"body": {"kernel": 1.0}, "head": {"kernel": 2.0}}
        >>> split(params, LoRA(rank=1, target=None, train="head"))
        ({'head': {'kernel': 2.0}}, {'body': {'kernel': 1.0}})
    """
    flat = _flatten(params)
    lora.check_train(map("/".join, flat))
    if all(hasattr(unboxed(leaf), "shape") for leaf in flat.values()):
        for _ in adapted_weights(params, lora):
            pass  # checks every pair of factors
    trainable = {path: leaf for path, leaf in flat.items() if lora.trains("/".join(path))}
    frozen = {path: leaf for path, leaf in flat.items() if path not in trainable}
    return unflatten_dict(trainable), unflatten_dict(frozen)


def join(trainable: Params, frozen: Params) -> dict:
    """The parameters whose ``split`` is ``(trainable, frozen)``.

    Raises:
        ValueError: both hold a leaf at one path, or one holds a leaf where the other has a branch.

    Example:
        >>> join({"head": {"kernel": 2.0}}, {"head": {"bias": 0.0}})
        {'head': {'bias': 0.0, 'kernel': 2.0}}
    """
    ours, theirs = _flatten(trainable), _flatten(frozen)
    branches = {path[:i] for path in (*ours, *theirs) for i in range(len(path))}
    overlap = (ours.keys() & theirs.keys()) | ((ours.keys() | theirs.keys()) & branches)
    if overlap:
        raise ValueError(
            f"join: both trees hold {'/'.join(min(overlap))!r}: pass the two parts that split "
            "returned, each leaf in one of them only."
        )
    return unflatten_dict(dict(sorted({**theirs, **ours}.items())))


def merge(params, lora, *example_args, **kwargs):
    """Parameters of the unadapted model: ``W = W_0 + s A B``, without the factors.

    Computed in float32 whatever the dtype of the weight, cast once. Leaves without factors are
    the same arrays. Keep the base if the factors are still needed: subtracting ``s A B`` again
    does not give W_0 back.

    Args:
        params: adapted parameters; or an adapted NNX module, for which the unadapted module comes
            back and the argument stays as it is.
        lora: the description; or what ``adapt`` returned, if arguments follow.
        *example_args, **kwargs: arguments of a Linen module's call, as in ``attach``: needed only
            where the axes of a weight do not stand in the order (*stack, *batch, *in, *out) and are
            learnt from the adapted model: ``nn.Einsum`` with "BTD,NDH->BTNH", a transposed
            convolution.

    Raises:
        ValueError: ``params`` has no factors although ``lora`` targets layers, has factors that
            ``lora`` does not describe, they do not fit their weight, or the model is needed.

    Example:
        >>> layer = {"kernel": jnp.zeros((2, 2)), "lora_a": jnp.ones((2, 1))}
        >>> layer["lora_b"] = jnp.ones((1, 2))
        >>> merge({"fc": layer}, LoRA(rank=1, alpha=3))["fc"]["kernel"].tolist()
        [[3.0, 3.0], [3.0, 3.0]]
    """
    if is_nnx(params, "Module"):
        return nnx_functions().merge_nnx(params, lora)
    axes = {}
    if isinstance(lora, Adapted):
        if example_args or kwargs:
            _, axes = _trace(lora, jax.random.key(0), example_args, kwargs)
        lora = lora.lora
    flat = {path: leaf for path, leaf in _flatten(params).items() if not is_factor(path)}
    for path, weight, factors in adapted_weights(params, lora):
        box, name, (a, b) = flat[path], "/".join(path[:-1]), factors[:2]
        if name in axes:
            check_layout(name, weight, a, b, axes[name])
        elif not in_order(weight, a, b):
            raise ValueError(
                f"the weight at {name!r} has its axes in another order than its factors: give the "
                "adapted model and arguments of its call, merge(params, adapted, *example_args)."
            )
        if not jnp.issubdtype(weight.dtype, jnp.inexact):
            raise ValueError(
                f"the weight at {name!r} is {weight.dtype}: factors cannot be merged into a "
                "quantised weight; dequantise it first, or keep the factors beside it."
            )
        value = lora.form.merged(weight, factors, lora.scale_of(name), axes.get(name))
        flat[path] = reboxed(box, value)
    return unflatten_dict(flat)


def unadapted(params, lora: LoRA) -> list[str]:
    """Paths of the matrices that stay as they are: without factors, and not trained in full.

    These are layers that ``target`` or ``exclude`` leaves out, and parameters of no layer, such as
    position embeddings. Vectors (biases, norms, a class token) are not listed, nor stacks of them.

    Args:
        params: adapted parameters, base weights included; or an adapted NNX module.
        lora: the description.

    Errors are those of ``merge``.

    Example:
        >>> params = {"pos": jnp.ones((4, 8)), "fc": {"kernel": jnp.ones((8, 3))}}
        >>> params["fc"] |= {"lora_a": jnp.ones((8, 2)), "lora_b": jnp.ones((2, 3))}
        >>> unadapted(params, LoRA(rank=2))
        ['pos']
    """
    weights = {path: leaves for path, _, leaves in adapted_weights(params, lora)}
    stacks = {a.shape[:i] for a, *_ in weights.values() for i in range(a.ndim - 1)}
    rest = {p: leaf for p, leaf in _flatten(params).items() if p not in weights}
    found = ["/".join(p) for p, leaf in rest.items() if is_matrix(unboxed(leaf).shape, stacks)]
    return sorted(path for path in found if not lora.trains(path))


def adapted_weights(params: Params, lora: LoRA) -> Iterator[tuple]:
    """(path of the weight, weight, leaves), unboxed, of every weight that has factors, in the order
    of paths, checked against each other and ``lora``; the leaves in the order of ``lora.factors``.
    """
    flat = {path: unboxed(leaf) for path, leaf in _flatten(params).items()}
    for module, leaves in _checked(flat, lora):
        path = weight_path(lora, module, flat)
        yield path, flat[path], leaves


def adapted_modules(params: Params, lora: LoRA) -> Iterator[tuple]:
    """(module, leaves), as ``adapted_weights``, of a tree that may hold the factors alone."""
    return _checked({path: unboxed(leaf) for path, leaf in _flatten(params).items()}, lora)


def _checked(flat, lora: LoRA) -> Iterator[tuple]:
    """``described_leaves``, held against those weights that are there."""
    for module, leaves in described_leaves(flat, lora):
        for name in lora.weights:
            if (*module, name) in flat:
                check_layout("/".join(module), flat[*module, name], *leaves[:2])
                break
        yield module, leaves


def _trace(adapted, key, args, kwargs):
    """Shapes (and boxes) of the adapted parameters, and the layouts of weights whose axes are not
    in the order of their factors: init, traced only."""
    shaped = adapted.clone(lora=dataclasses.replace(adapted.lora, init="kaiming"))
    leaves, treedef = jax.tree.flatten((args, kwargs))
    arrays = [leaf for leaf in leaves if _is_array(leaf)]

    def init(key, arrays):
        rest = iter(arrays)
        filled = [next(rest) if _is_array(leaf) else leaf for leaf in leaves]
        args, kwargs = jax.tree.unflatten(treedef, filled)
        return shaped.init(key, *args, **kwargs)["params"]

    with layouts() as seen:
        shapes = _flatten(jax.eval_shape(init, key, arrays))
    axes = {path: found for path, found in seen.items() if not found.in_order}
    modules = {path[:-1] for path in shapes if path[-1] in FACTORS}
    weights = {"/".join(m): unboxed(shapes[weight_path(adapted.lora, m, shapes)]) for m in modules}
    by_shape = {}
    for path, found in axes.items():
        by_shape.setdefault(weights[path].shape, set()).add(found)
    for path in weights.keys() - seen.keys():
        # A layer that ran in the trace that nn.jit made for its twin.
        found = by_shape.get(weights[path].shape, ())
        if len(found) == 1:
            (axes[path],) = found
    return shapes, axes


def _is_array(leaf) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def _check_base(base, shapes):
    """``base`` must be parameters of the model whose adapted shapes are ``shapes``."""
    wanted = {path: unboxed(s).shape for path, s in shapes.items() if not is_factor(path)}
    missing = sorted("/".join(path) for path in wanted if path not in base)
    if missing:
        raise ValueError(
            f"base_params lacks {len(missing)} parameters of the model, the first {missing[0]!r} "
            f"(it has {sorted({path[0] for path in base})} at its top): pass the 'params' "
            "collection of the whole base module."
        )
    for path, shape in wanted.items():
        found = jnp.shape(unboxed(base[path]))
        if found != shape:
            raise ValueError(
                f"base_params has {'/'.join(path)!r} of shape {found}, the model wants {shape}: "
                "use the module and the example arguments that the parameters belong to."
            )


def _flatten(params: Params) -> dict[tuple[str, ...], Any]:
    if is_nnx(params, "Module", "State"):
        params = nnx_functions().pure_params(params)
    if not isinstance(params, dict | FrozenDict):
        raise TypeError(f"expected nested dicts of parameters, not a {type(params).__name__}.")
    return flatten_dict(params)


def is_nnx(value, *kinds: str) -> bool:
    """Whether ``value`` is one of the NNX classes ``kinds`` ("Module", "State")."""
    nnx = sys.modules.get("flax.nnx")  # none of them can exist before flax.nnx is imported
    return nnx is not None and isinstance(value, tuple(getattr(nnx, kind) for kind in kinds))


def nnx_functions():
    """The functions for NNX, imported when first needed: flax.nnx costs most of a second."""
    return importlib.import_module("rmlora_jax.adapt.nnx")
