"""``adapt`` for flax.nnx: each targeted layer gets factors, and a class that adds the product."""

import contextvars
import copy
import copyreg
import functools
import inspect
import zlib
from collections import Counter
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from rmlora_jax.adapt import product
from rmlora_jax.lora import FACTORS, LoRA

__all__ = ["adapt_nnx", "merge_nnx", "pure_params"]


class _Rule(NamedTuple):
    """Which class's own ``methods`` use the ``weight``, and how (None: its fields say so)."""

    kind: type[nnx.Module]
    weight: str
    methods: tuple[str, ...]
    equation: str | None = None


_RULES = (
    _Rule(nnx.Linear, "kernel", ("__call__",)),
    _Rule(nnx.LinearGeneral, "kernel", ("__call__",)),
    _Rule(nnx.Einsum, "kernel", ("__call__",)),
    _Rule(nnx.Conv, "kernel", ("__call__",)),
    _Rule(nnx.ConvTranspose, "kernel", ("__call__",)),
    _Rule(nnx.Embed, "embedding", ("__call__", "attend")),
)
_CONVOLUTIONS = {nnx.Conv: nn.Conv, nnx.ConvTranspose: nn.ConvTranspose}

_SHARDING = ("mesh", "sharding_rules")  # metadata that the names of a sharding are read with


def adapt_nnx(module: nnx.Module, lora: LoRA, rngs: nnx.Rngs | None = None) -> nnx.Module:
    """A copy of ``module`` that shares its arrays, with factors in each layer ``lora`` targets."""
    model = _copied(module)
    modules = _modules(model)
    _check_unadapted(modules)
    lora.check_train("/".join(map(str, path)) for path, _ in _params(model))
    if lora.target is None:
        return model
    if not isinstance(rngs, nnx.Rngs):
        raise ValueError(
            f"adapt(nnx_module, lora, rngs={rngs!r}): the factors need random numbers, such as "
            "rngs=nnx.Rngs(0)."
        )
    rules = {path: _rule_of(node, lora) for path, node in modules.items()}
    stacks = {path: _stack(modules[path], rule) for path, rule in rules.items() if rule}
    unknown = {path for path in modules if not rules[path] and _weights(path, modules, stacks)}
    lora.check_targets({*stacks, *unknown})
    targeted = sorted(filter(lora.targets, {*stacks, *unknown}))
    _check_layers(targeted, modules, rules, stacks)
    streams = ("params", "dropout") if lora.dropout else ("params",)
    keys = [_draw(rngs, stream) for stream in streams]
    for path in targeted:
        own = [jax.random.fold_in(key, zlib.crc32(path.encode())) for key in keys]
        _adapt_layer(modules[path], rules[path], lora, path, stacks[path], *own)
    return model


def merge_nnx(module: nnx.Module, lora: LoRA) -> nnx.Module:
    """A copy of the adapted ``module`` with W_0 + s A B for W_0 and the classes of the base."""
    model = _copied(module)
    layers = {path: node for path, node in _modules(model).items() if _is_adapted(node)}
    if lora.target is not None and not layers:
        raise ValueError(
            f"merge: this {type(module).__name__} has no adapted layers: pass what "
            "adapt(module, lora, rngs=nnx.Rngs(0)) returned."
        )
    for path, layer in layers.items():
        if not lora.targets(path) or lora.scale_of(path) != layer.lora_scale:
            raise ValueError(
                f"merge: the layer {path!r} was adapted with another description: pass the one "
                "that was given to adapt."
            )
        cls, rule = type(layer).lora_origin
        weight = getattr(layer, rule.weight)
        weight.set_value(_merged(layer, rule))
        for name in (*FACTORS, "lora_scale", "lora_execution", "lora_dropout"):
            if hasattr(layer, name):
                delattr(layer, name)
        object.__setattr__(layer, "__class__", cls)
    return model


def pure_params(source: nnx.Module | nnx.State) -> dict:
    """The ``nnx.Param`` values of a module or state, factors included, as nested dicts.

    >>> layer = nnx.Linear(2, 3, use_bias=False, rngs=nnx.Rngs(0))
    >>> jax.tree.map(jnp.shape, pure_params(nnx.List([layer])))
    {'0': {'kernel': (2, 3)}}
    """
    tree: dict = {}
    for path, value in _params(source):
        branch = tree
        for part in path[:-1]:
            branch = branch.setdefault(str(part), {})
        branch[str(path[-1])] = value.get_value() if isinstance(value, nnx.Variable) else value
    return tree


def _params(source):
    if isinstance(source, nnx.Module):
        source = nnx.state(source, nnx.Param, graph=True)
    for path, value in nnx.to_flat_state(source):
        if isinstance(value, nnx.Param) or not isinstance(value, nnx.Variable):
            yield path, value


def _draw(rngs: nnx.Rngs, stream: str):
    try:
        return rngs[stream]()
    except KeyError:
        raise ValueError(
            f"adapt: rngs has neither a stream {stream!r} nor a default one: pass nnx.Rngs(0), or "
            "nnx.Rngs(params=0, dropout=1)."
        ) from None


def _copied(module: nnx.Module) -> nnx.Module:
    """The same arrays in new Variables (``nnx.merge`` would hand back the Variables themselves)."""
    graphdef, state = nnx.split(module, graph=True)
    is_variable = functools.partial(_isinstance, cls=nnx.Variable)
    new = jax.tree.map(lambda v: v.copy() if is_variable(v) else v, state, is_leaf=is_variable)
    return nnx.merge(graphdef, new)


def _isinstance(value, cls):
    return isinstance(value, cls)


def _modules(model: nnx.Module) -> dict[str, nnx.Module]:
    """Every module once, by the path that ``nnx.state`` gives it."""
    nodes = nnx.iter_graph(model, graph=True)
    return {"/".join(map(str, p)): node for p, node in nodes if isinstance(node, nnx.Module)}


def _is_adapted(node) -> bool:
    return hasattr(type(node), "lora_origin")


def _rule_of(node: nnx.Module, lora: LoRA) -> _Rule | None:
    for layer in lora.layers:
        if isinstance(node, layer.cls):
            return _Rule(layer.cls, layer.weight, (layer.method,), layer.equation)
    return next((rule for rule in _RULES if isinstance(node, rule.kind)), None)


def _shape(layer, rule: _Rule) -> tuple[int, ...] | None:
    """The shape of the weight of one layer by its fields; a class of the user's has none."""
    if rule.equation is not None:
        return None
    if rule.kind is nnx.Linear:
        return layer.in_features, layer.out_features
    if rule.kind is nnx.LinearGeneral:
        return *layer.batch_axis.values(), *layer.in_features, *layer.out_features
    if rule.kind is nnx.Embed:
        return layer.num_embeddings, layer.features
    return tuple(layer.kernel_shape)


def _geometry(layer, rule: _Rule, ndim: int = 20, equation: str | None = None):
    """How the layer's weight meets an input of ``ndim`` axes."""
    if rule.equation is not None or rule.kind is nnx.Einsum:
        return product.Contraction(equation or rule.equation or layer.einsum_str)
    if rule.kind is nnx.Linear:
        return product.DENSE
    if rule.kind is nnx.LinearGeneral:
        # Flax sorts the axes: the first of in_features belongs to the foremost.
        axis = sorted(i % ndim for i in layer.axis)
        return product.general(axis, sorted(layer.batch_axis), len(layer.out_features), ndim)
    if rule.kind is nnx.Embed:
        return product.Lookup(layer.num_embeddings)
    return product.convolution(_CONVOLUTIONS[rule.kind], layer)


def _stack(layer, rule: _Rule) -> tuple[int, ...]:
    """The leading axes of the weight, over which ``nnx.vmap`` stacked the layer."""
    shape = tuple(getattr(getattr(layer, rule.weight, None), "shape", ()))
    plain = _shape(layer, rule) or product.terms(rule.equation)[1]
    return shape[: max(0, len(shape) - len(plain))]


# What is refused

_NORMS = (nnx.LayerNorm, nnx.RMSNorm, nnx.BatchNorm, nnx.GroupNorm, nnx.InstanceNorm)


def _check_unadapted(modules):
    for path, node in modules.items():
        if _is_adapted(node):
            raise ValueError(
                f"adapt was given a module that is adapted already (at {path!r}): adapt the base "
                "module instead, with one description, or merge(module, lora) first."
            )
        if any(isinstance(value, nnx.LoRAParam) for value in vars(node).values()):
            raise ValueError(
                f"the module at {path!r}, a {type(node).__name__}, has an nnx.LoRAParam of its "
                "own: adapt takes a model without nnx.LoRA and nnx.LoRALinear modules."
            )


def _weights(path, modules, stacks):
    """Names of the module's own parameters that are matrices, beside the axes of its stack."""
    node = modules[path]
    if isinstance(node, _NORMS):
        return []
    stack = _surrounding_stack(path, stacks)
    return [
        name
        for name, value in vars(node).items()
        if isinstance(value, nnx.Param) and _is_matrix(getattr(value, "shape", ()), stack)
    ]


def _is_matrix(shape, stack):
    if shape[: len(stack)] == stack:
        shape = shape[len(stack) :]
    return sum(size > 1 for size in shape) >= 2


def _is_below(path, module):
    return not module or path.startswith(f"{module}/")


def _surrounding_stack(path, stacks):
    """The stack of the known layers nearest to ``path``: a stacked vector is no matrix."""
    while path:
        path = path.rpartition("/")[0]
        near = [stack for other, stack in stacks.items() if _is_below(other, path)]
        if near:
            return max(near, key=len)
    return ()


def _check_layers(targeted, modules, rules, stacks):
    normalised = [p for p, n in modules.items() if isinstance(n, nnx.WeightNorm | nnx.SpectralNorm)]
    values = [value for node in modules.values() for value in vars(node).values()]
    uses = Counter(id(value) for value in values if isinstance(value, nnx.Variable))
    for path in targeted:
        layer, rule = modules[path], rules[path]
        if rule is None:
            names = _weights(path, modules, stacks)
            raise ValueError(
                f"the targeted module {path!r}, a {type(layer).__name__}, has a weight of its own "
                f"({', '.join(names)}) but is not a layer of flax.nnx: leave it out with "
                "LoRA.exclude, say how it uses its weight with LoRA.layers=(Layer(cls, equation, "
                f"weight={names[0]!r}),), or build it of nnx.Linear."
            )
        weight = getattr(layer, rule.weight, None)
        what = None
        if not isinstance(weight, nnx.Variable) or not hasattr(weight, "shape"):
            what = f"has no nnx.Param {rule.weight!r} that holds one array"
        elif any(_is_below(path, wrapper) for wrapper in normalised):
            what = "has its weight transformed (nnx.WeightNorm or nnx.SpectralNorm)"
        elif uses[id(weight)] > 1:
            what = f"shares its {rule.weight} with another layer, which a merge would change too"
        elif getattr(layer, "mask", None) is not None and rule.kind in _CONVOLUTIONS:
            what = "has a mask on its weight, which a merge would leave out"
        elif rule.kind is nnx.Einsum and layer.einsum_str is None:
            what = "has no equation (einsum_str) of its own, so that nothing says what is summed"
        elif (plain := _shape(layer, rule)) and weight.shape != (*stacks[path], *plain):
            what = (
                f"has a {rule.weight} of shape {weight.shape} where its fields say {plain}; "
                "nnx.vmap must stack it on axis 0"
            )
        if what is not None:
            raise ValueError(f"the layer {path!r} {what}: leave it out with LoRA.exclude.")


# One layer


def _adapt_layer(layer, rule: _Rule, lora: LoRA, path: str, stack, key, dropout_key=None):
    weight, rank, scale = getattr(layer, rule.weight), lora.rank_of(path), lora.scale_of(path)
    plain = weight.shape[len(stack) :]
    try:
        axes = product.layout(_geometry(layer, rule), len(plain))
        shapes = [(*stack, *shape) for shape in product.factor_shapes(plain, axes, rank)]
    except ValueError as error:
        raise ValueError(
            f"the layer {path!r} cannot be adapted: {error} Leave it out with LoRA.exclude."
        ) from None
    if lora.init == "pissa":
        if not jnp.issubdtype(weight.dtype, jnp.inexact):
            raise ValueError(
                f'LoRA.init "pissa" moves directions out of the weight, but that of {path!r} is '
                f"{weight.dtype}: leave the layer out with LoRA.exclude, or choose another init."
            )
        value = weight.get_value()
        *values, rest = product.principal_factors(value, axes, *shapes, scale, lora.dtype)
        weight.set_value(rest)
    else:
        a = product.initial_a(key, shapes[0], lora.init, lora.dtype)
        values = [a, jnp.zeros(shapes[1], lora.dtype)]
    pytree = not jax.tree_util.all_leaves([layer])
    object.__setattr__(layer, "__class__", _adapted_class(type(layer), rule, pytree))
    for side, (name, value) in enumerate(zip(FACTORS, values, strict=True)):
        setattr(layer, name, _factor(value, weight, side, axes, len(stack)))
    layer.lora_scale = scale
    layer.lora_execution = lora.execution
    if lora.dropout:
        layer.lora_dropout = nnx.Dropout(lora.dropout)
        keys = jax.random.split(dropout_key, stack) if stack else dropout_key
        layer.lora_dropout.rngs = nnx.RngStream(keys, tag="dropout")


def _factor(value, weight: nnx.Variable, side: int, axes: product.Layout, stack: int):
    """The Variable of a factor, placed and named as the weight's axes are."""

    def inherited(names):
        names = (*names, *[None] * (weight.ndim - len(names)))
        own = names[stack:]
        last = [own[axes.inputs[0]], None] if side == 0 else [None, own[axes.outputs[0]]]
        mark = [] if axes.in_order else [None]
        return (*names[:stack], *mark, *(own[i] for i in axes.batch), *last)

    placement = getattr(weight.get_value(), "sharding", None)
    concrete = not isinstance(value, jax.core.Tracer)
    if concrete and isinstance(placement, jax.sharding.NamedSharding):
        spec = jax.sharding.PartitionSpec(*inherited(placement.spec))
        value = jax.device_put(value, jax.sharding.NamedSharding(placement.mesh, spec))
    names = weight.get_metadata("out_sharding", None)
    if not names:
        return nnx.LoRAParam(value)
    metadata = {k: weight.get_metadata(k) for k in _SHARDING if weight.has_metadata(k)}
    metadata["out_sharding"] = inherited(names)
    mesh = metadata.get("mesh") or jax.sharding.get_abstract_mesh()
    if not concrete and not mesh.empty:
        return nnx.LoRAParam(value, **metadata)  # placed by the constructor, as the weight was
    # copy() takes the names as they are; the constructor would want a mesh to place them on.
    return nnx.LoRAParam(value).copy(**metadata)


def _merged(layer, rule: _Rule):
    weight = getattr(layer, rule.weight).get_value()
    if not jnp.issubdtype(weight.dtype, jnp.inexact):
        raise ValueError(
            f"a {weight.dtype} weight of a {type(layer).__name__} cannot take the factors in: "
            "leave the layer out of the merge with LoRA.exclude, or dequantise it first."
        )
    a, b = layer.lora_a.get_value(), layer.lora_b.get_value()
    geometry = _geometry(layer, rule)
    ndim = len(_shape(layer, rule) or product.terms(rule.equation)[1])
    return product.merged(weight, a, b, layer.lora_scale, product.layout(geometry, ndim))


# The adapted classes


def _run(plain, rule: _Rule, layer, *args, **kwargs):
    """``plain``, the layer's own method, with the product of the factors added to its result."""
    bound = inspect.signature(plain).bind(layer, *args, **kwargs).arguments
    x = list(bound.values())[1]
    dropout = getattr(layer, "lora_dropout", None)
    drops = dropout is not None and not dropout.deterministic
    drops = drops and plain.__name__ != "attend" and jnp.issubdtype(x.dtype, jnp.inexact)
    if layer.lora_execution == "merged" and not drops:
        weight = getattr(layer, rule.weight)
        twin = copy.copy(layer)  # the same Variables, but for the weight
        vars(twin)[rule.weight] = weight.copy(_merged(layer, rule))
        return plain(twin, *args, **kwargs)
    y = plain(layer, *args, **kwargs)
    a, b, scale = layer.lora_a.get_value(), layer.lora_b.get_value(), layer.lora_scale
    if plain.__name__ == "attend":
        return y + product.low_rank_attend(x, y, a, b, scale)
    geometry = _geometry(layer, rule, jnp.ndim(x), _equation(layer, rule, bound))
    x = dropout(x) if drops else x
    precision = getattr(layer, "precision", None)
    return y + product.low_rank(geometry, x, y, a, b, scale, precision)


def _equation(layer, rule, bound):
    """An equation given at the call, which must use the weight as the layer's own does."""
    equation = bound.get("einsum_str") if rule.kind is nnx.Einsum else None
    if equation is not None:
        found, own = (
            product.layout(product.Contraction(e), len(layer.kernel_shape))
            for e in (equation, layer.einsum_str)
        )
        if found != own:
            raise ValueError(
                f"an adapted nnx.Einsum with the equation {layer.einsum_str!r} was called with "
                f"{equation!r}, which takes the weight's axes otherwise: leave it out with "
                "LoRA.exclude."
            )
    return equation


# The adapted classes whose own arithmetic the running call has reached.
_reached = contextvars.ContextVar("rmlora_jax_reached", default=None)


@functools.cache
def _mixin(rule: _Rule) -> type[nnx.Module]:
    """``rule.kind`` with the product added; it stands right before it in a subclass's MRO."""

    def wrapped(name):
        plain = getattr(rule.kind, name)

        @functools.wraps(plain)
        def method(self, *args, **kwargs):
            if _reached.get() is not None:
                _reached.get().add(type(self))
            return _run(plain, rule, self, *args, **kwargs)

        return method

    return _new_class(rule.kind, (rule.kind,), {name: wrapped(name) for name in rule.methods})


@functools.cache
def _adapted_class(cls: type[nnx.Module], rule: _Rule, pytree: bool = True) -> type[nnx.Module]:
    """``cls`` with the product added where it runs the ``rule.methods`` of ``rule.kind``."""
    mixin = _mixin(rule)
    namespace = {"lora_origin": (cls, rule), "lora_recipe": (cls, rule, pytree)}

    def guarded(name):
        def method(self, *args, **kwargs):
            reached = set()
            token = _reached.set(reached)
            try:
                result = getattr(super(adapted, self), name)(*args, **kwargs)
            finally:
                _reached.reset(token)
            if type(self) not in reached:
                raise ValueError(
                    f"{cls.__name__}.{name} does its own arithmetic and never calls that of "
                    f"{rule.kind.__name__}, so that its factors would be ignored: leave it out "
                    f"with LoRA.exclude, or put Layer({cls.__name__}, equation) into LoRA.layers."
                )
            return result

        return functools.wraps(getattr(cls, name))(method)

    for name in rule.methods:
        if inspect.getattr_static(cls, name) is not inspect.getattr_static(rule.kind, name):
            namespace[name] = guarded(name)
    bases = (mixin,) if cls is rule.kind else (cls, mixin)
    adapted = _new_class(cls, bases, namespace, pytree=pytree)
    return adapted


def _new_class(base, bases, namespace, **kwargs):
    names = {"__module__": __name__, "__doc__": base.__doc__}
    return _metaclass(type(base))(f"Adapted{base.__name__}", bases, names | namespace, **kwargs)


@functools.cache
def _metaclass(base: type) -> type:
    """A metaclass whose classes pickle as the call that makes them: no module holds them."""
    metaclass = type(base.__name__, (base,), {})
    copyreg.pickle(metaclass, lambda cls: (_adapted_class, cls.lora_recipe))
    return metaclass
