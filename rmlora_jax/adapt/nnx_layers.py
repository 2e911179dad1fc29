"""The layers of flax.nnx: how each class uses its weight, and which layers cannot be adapted."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx

from rmlora_jax.adapt import geometry as geo
from rmlora_jax.adapt.leaves import is_matrix
from rmlora_jax.adapt.lora import LoRA


class Rule(NamedTuple):
    """Which class's own ``methods`` use the ``weight``, and how (None: its fields say so)."""

    kind: type[nnx.Module]
    weight: str
    methods: tuple[str, ...]
    equation: str | None = None
    stack: int = 0


_KERNELS = (nnx.Linear, nnx.LinearGeneral, nnx.Einsum, nnx.Conv, nnx.ConvTranspose)
_RULES = (
    *(Rule(kind, "kernel", ("__call__",)) for kind in _KERNELS),
    Rule(nnx.Embed, "embedding", ("__call__", "attend")),
)
# They rewrite the weights of the layer that they hold before each call.
WRAPPERS = tuple(
    Rule(kind, "layer_instance", ("__call__",)) for kind in (nnx.WeightNorm, nnx.SpectralNorm)
)


def is_variable(value) -> bool:
    return isinstance(value, nnx.Variable)


def _rule_of(node: nnx.Module, lora: LoRA) -> Rule | None:
    for layer in lora.layers:
        if isinstance(node, layer.cls):
            return Rule(layer.cls, layer.weight, (layer.method,), layer.equation, layer.stack)
    return next((rule for rule in _RULES if isinstance(node, rule.kind)), None)


def axes_of(layer, rule: Rule) -> Sequence:
    """The axes of one layer's weight: their sizes by its fields, or the letters of an equation."""
    if rule.equation is not None:
        return geo.terms(rule.equation)[1]
    if rule.kind is nnx.Linear:
        return layer.in_features, layer.out_features
    if rule.kind is nnx.LinearGeneral:
        return *layer.batch_axis.values(), *layer.in_features, *layer.out_features
    if rule.kind is nnx.Embed:
        return layer.num_embeddings, layer.features
    return tuple(layer.kernel_shape)


def geometry_of(layer, rule: Rule, ndim: int = 20, equation: str | None = None):
    """How the layer's weight meets an input of ``ndim`` axes."""
    if rule.equation is not None or rule.kind is nnx.Einsum:
        return geo.Contraction(equation or rule.equation or layer.einsum_str)
    if rule.kind is nnx.Linear:
        return geo.DENSE
    if rule.kind is nnx.LinearGeneral:
        # Flax sorts the axes: the first of in_features belongs to the foremost.
        axis = sorted(i % ndim for i in layer.axis)
        return geo.general(axis, sorted(layer.batch_axis), layer.out_features, ndim)
    if rule.kind is nnx.Embed:
        return geo.Lookup(layer.num_embeddings)
    return geo.convolution(layer)


def _stack_of(layer, rule: Rule) -> tuple[int, ...]:
    """The leading axes of the weight, over which ``nnx.vmap`` stacked the layer."""
    shape = tuple(getattr(getattr(layer, rule.weight, None), "shape", ()))
    return shape[: max(0, len(shape) - len(axes_of(layer, rule)))]


# What is refused

_NORMS = (nnx.LayerNorm, nnx.RMSNorm, nnx.BatchNorm, nnx.GroupNorm, nnx.InstanceNorm)


def check_unadapted(modules):
    for path, node in modules.items():
        if any(isinstance(value, nnx.LoRAParam) for value in vars(node).values()):
            raise ValueError(
                f"adapt was given a module that is adapted already: {path!r}, a "
                f"{type(node).__name__}, has an nnx.LoRAParam. Adapt the base module, without "
                "nnx.LoRA and nnx.LoRALinear; or merge(module, lora) first."
            )


def _matrices(node, stacks):
    """Names of the module's own parameters that are matrices, stacks of vectors left out."""
    if isinstance(node, _NORMS):
        return []
    params = [(name, v) for name, v in vars(node).items() if isinstance(v, nnx.Param)]
    return [name for name, v in params if is_matrix(jnp.shape(v), stacks.values())]


def is_below(path, module):
    return not module or path.startswith(f"{module}/")


def wrappers(modules) -> dict[str, Rule]:
    pairs = [(path, rule) for path in modules for rule in WRAPPERS]
    return {path: rule for path, rule in pairs if isinstance(modules[path], rule.kind)}


def targeted(modules, lora: LoRA) -> dict[str, tuple[Rule, tuple[int, ...]]]:
    """The rule and the stack axes, by path, of each layer that ``lora`` targets.

    Raises:
        ValueError: a rule of ``lora`` matches nothing, or one of the layers cannot be adapted.
    """
    rules = {path: _rule_of(node, lora) for path, node in modules.items()}
    stacks = {path: _stack_of(modules[path], rule) for path, rule in rules.items() if rule}
    unknown = {p for p, node in modules.items() if not rules[p] and _matrices(node, stacks)}
    lora.check_targets({*stacks, *unknown})
    told = {s for path, s in stacks.items() if (rule := rules[path]) and not rule.equation and s}
    found = {}
    beside = lora.execution != "merged" or lora.dropout > 0  # the product runs beside the layer
    rewritten = lora.execution == "merged" or lora.init == "pissa"
    instead = ' (or use execution="merged" without dropout)'
    values = [value for node in modules.values() for value in vars(node).values()]
    uses = Counter(id(value) for value in values if is_variable(value))
    chosen, held = set(filter(lora.targets, stacks)), wrappers(modules)
    for path in sorted(filter(lora.targets, {*stacks, *unknown})):
        layer, rule = modules[path], rules[path]
        if rule is None:
            if any(is_below(other, path) for other in chosen):
                continue  # it holds the layers that are meant; ``unadapted`` lists its own weights
            name = _matrices(layer, stacks)[0]
            raise ValueError(
                f"the targeted module {path!r}, a {type(layer).__name__}, has a weight {name!r} of "
                "its own but is not a layer of flax.nnx: leave it out with LoRA.exclude (the root "
                "with target='.+'), say how it uses the weight with LoRA.layers="
                f"(Layer(cls, equation, weight={name!r}),), or build it of nnx.Linear."
            )
        weight: Any = getattr(layer, rule.weight, None)
        what = None
        if not is_variable(weight) or not hasattr(weight, "shape"):
            what = f"has no nnx.Param {rule.weight!r} that holds one array"
        elif beside and any(is_below(path, wrapper) for wrapper in held):
            what = f"has its weight transformed by nnx.WeightNorm or nnx.SpectralNorm{instead}"
        elif rewritten and not jnp.issubdtype(weight.dtype, jnp.inexact):
            what = f'has a weight of dtype {weight.dtype}, which "pissa" and "merged" would rewrite'
        elif rule.equation and len(stacks[path]) != rule.stack and stacks[path] not in told:
            what = (
                f"has a {rule.weight} of shape {weight.shape} for the equation {rule.equation!r}, "
                "and nothing says which axes are a stack. If nnx.vmap stacked it on axis 0, say "
                f"Layer({rule.kind.__name__}, ..., stack={len(stacks[path])}). Another axis cannot "
                "be adapted"
            )
        elif uses[id(weight)] > 1:
            what = f"shares its {rule.weight} with another layer, which a merge would change too"
        elif beside and rule.kind in (nnx.Conv, nnx.ConvTranspose) and layer.mask is not None:
            what = f"has a mask on its weight, which the factors would go around{instead}"
        elif rule.kind is nnx.Einsum and layer.einsum_str is None:
            what = "has no equation (einsum_str) of its own, so that nothing says what is summed"
        elif not rule.equation and weight.shape != (*stacks[path], *axes_of(layer, rule)):
            what = (
                f"has a {rule.weight} of shape {weight.shape} where its fields say "
                f"{axes_of(layer, rule)}; nnx.vmap must stack it on axis 0"
            )
        if what is not None:
            raise ValueError(f"the layer {path!r} {what}: leave it out with LoRA.exclude.")
        found[path] = rule, stacks[path]
    return found
