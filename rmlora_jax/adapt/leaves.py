"""The leaves of a form in a tree of parameters: found, and held against their description."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import flax.linen as nn
from flax.core import meta

from rmlora_jax.adapt import geometry as geo
from rmlora_jax.adapt.forms import LEAVES, is_factor
from rmlora_jax.adapt.lora import LoRA

Path = tuple[str, ...]


def unboxed(leaf):
    """What is in the box of a leaf, an array or a mere shape: as it is, constrained to no mesh."""
    boxed = isinstance(leaf, nn.Partitioned)
    return leaf.unbox(apply_constraint=False) if boxed else meta.unbox(leaf)


def reboxed(box, value):
    """``value`` in a box like ``box`` if that is one; ``meta.replace_boxed`` would constrain."""
    return box.replace_boxed(value) if isinstance(box, meta.AxisMetadata) else value


def is_matrix(shape: tuple[int, ...], stacks: Iterable[tuple[int, ...]]) -> bool:
    """Whether two axes or more are left of a parameter's shape without the axes of any stack."""
    rests = [shape[len(s) :] for s in {(), *stacks} if shape[: len(s)] == s]
    return all(sum(size > 1 for size in rest) >= 2 for rest in rests)


def weight_path(lora: LoRA, module: Path, paths: Collection[Path]) -> Path:
    """The path of the weight beside the factors at ``module``; ValueError if it is missing."""
    for name in lora.weights:
        if (*module, name) in paths:
            return (*module, name)
    raise ValueError(
        f"{'/'.join(module)!r} holds factors but lacks {lora.weights[0]}: pass the whole "
        "parameters, join(trainable, frozen)."
    )


def described_leaves(flat: Mapping[Path, Any], lora: LoRA) -> Iterator[tuple[Path, tuple]]:
    """(module, leaves) of every module with factors, in the order of paths and of ``lora.factors``.

    Raises:
        ValueError: ``flat`` has no factors although ``lora`` targets layers, or has others than
            ``lora`` describes.
    """
    modules = sorted({path[:-1] for path in flat if is_factor(path)})
    if lora.target is not None and not modules:
        raise missing_factors()
    for module in modules:
        path = "/".join(module)
        if not lora.targets(path):
            raise unselected_factors(lora, path)
        check_leaves(lora, path, lambda name, module=module: (*module, name) in flat)
        leaves = tuple(flat[(*module, name)] for name in lora.factors)
        a, b, rank = leaves[0].shape, leaves[1].shape, lora.rank_of(path)
        if (*a[:-2], rank, rank) != (*b[:-1], a[-1]):
            raise ValueError(
                f"the factors at {path!r}, lora_a {a} and lora_b {b}, do not fit the description, "
                f"(*stack, in, {rank}) and (*stack, {rank}, out) with the stack axes first: use "
                "the description that the factors were made with."
            )
        yield module, leaves


def leaf_shapes(
    lora: LoRA, path: str, geometry: geo.Geometry, shape: tuple[int, ...]
) -> tuple[geo.Layout, tuple[tuple[int, ...], ...]]:
    """The layout of a layer's weight of ``shape``, and the shapes of the leaves beside it."""
    try:
        axes = geo.layout(geometry, len(shape))
        return axes, lora.form.shapes(shape, axes, lora.rank_of(path))
    except ValueError as error:
        raise ValueError(
            f"the layer {path!r} cannot be adapted: {error} Leave it out with LoRA.exclude."
        ) from None


def first_leaves(lora: LoRA, path: str, key, weight, axes: geo.Layout | None, shapes):
    """Where the leaves of a layer begin, and what is left of its weight, as ``Form.initial``."""
    scale = lora.scale_of(path)
    return lora.form.initial(key, weight, axes, shapes, scale, lora.init, lora.dtype)


def check_adapted(paths: Iterable[Path], lora: LoRA) -> None:
    """Raises ValueError unless every layer that ``lora`` targets has factors among ``paths``."""
    if lora.target is None:
        return
    names: dict[str, set[str]] = {}
    for path in paths:
        names.setdefault("/".join(path[:-1]), set()).add(path[-1])
    weighted = {path for path, leaves in names.items() if leaves & set(lora.weights)}
    lora.check_targets(weighted)
    for path in sorted(weighted):
        if lora.targets(path) and not names[path] >= set(lora.factors):
            raise ValueError(
                f"LoRA.target {lora.target!r} matches {path!r}, which has a weight but is not a "
                "layer of flax.linen that can be adapted (or computes in its own way): describe "
                "its class in LoRA.layers, or leave it out with LoRA.exclude."
            )


def check_leaves(lora: LoRA, path: str, has: Callable[[str], bool]) -> None:
    """Raises ValueError unless ``has`` holds for the leaves of the form of ``lora`` alone."""
    found = tuple(filter(has, LEAVES))
    if found != lora.factors:
        raise ValueError(
            f"{path!r} holds {', '.join(found)}, but {type(lora).__name__} has "
            f"{', '.join(lora.factors)}: pass the whole parameters, and use the description that "
            "the factors were made with."
        )


def unselected_factors(lora: LoRA, path: str) -> ValueError:
    """The error for factors that ``lora`` does not select."""
    return ValueError(
        f"the parameters hold factors at {path!r}, which LoRA.target {lora.target!r} does not "
        "select: use the description that the factors were made with."
    )


def missing_factors(where: str = "") -> ValueError:
    """The error for parameters without factors."""
    return ValueError(
        f"the parameters hold no factors (lora_a, lora_b){where}: make them with "
        "params = attach(key, adapted, base_params, *example_args)."
    )
