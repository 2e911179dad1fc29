"""``adapt`` for flax.nnx: each targeted layer gets factors, and a class that adds the product."""

import contextvars
import copy
import copyreg
import functools
import inspect
import zlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import unflatten_dict
from jax.core import Tracer

from rmlora_jax.adapt import geometry as geo
from rmlora_jax.adapt import nnx_layers
from rmlora_jax.adapt.forms import Call, product
from rmlora_jax.adapt.leaves import first_leaves, leaf_shapes
from rmlora_jax.adapt.lora import LoRA
from rmlora_jax.adapt.nnx_layers import WRAPPERS, Rule, axes_of, geometry_of, is_variable

__all__ = ["adapt_nnx", "merge_nnx", "pure_params"]

# What an adapted layer has beside its leaves.
_OWN = ("lora_form", "lora_scale", "lora_execution", "lora_dropout")


def adapt_nnx(module: nnx.Module, lora: LoRA, rngs: nnx.Rngs | None = None) -> nnx.Module:
    """A copy of ``module`` that shares its arrays, with factors in each layer ``lora`` targets."""
    model = _copied(module)
    modules = _modules(model)
    nnx_layers.check_unadapted(modules)
    lora.check_train("/".join(map(str, path)) for path, _ in _params(model))
    if lora.target is None:
        return model
    if not isinstance(rngs, nnx.Rngs):
        raise ValueError(
            f"adapt(nnx_module, lora, rngs={rngs!r}): the factors need random numbers, such as "
            "rngs=nnx.Rngs(0)."
        )
    targeted = nnx_layers.targeted(modules, lora)
    keys = [rngs.params(), rngs.dropout()] if lora.dropout else [rngs.params()]
    for path, (rule, stack) in targeted.items():
        own = [jax.random.fold_in(key, zlib.crc32(path.encode())) for key in keys]
        _adapt_layer(modules[path], rule, lora, path, stack, *own)
    for path, rule in nnx_layers.wrappers(modules).items():
        if any(nnx_layers.is_below(layer, path) for layer in targeted):
            _swap_class(modules[path], rule)
    return model


def merge_nnx(module: nnx.Module, lora: LoRA) -> nnx.Module:
    """A copy of the adapted ``module`` with W_0 + s A B for W_0 and the classes of the base."""
    model = _copied(module)
    layers = {p: n for p, n in _modules(model).items() if hasattr(n, "lora_scale")}
    what = "it has no adapted layers" if lora.target is not None and not layers else None
    for path, layer in layers.items():
        described = (lora.rank_of(path), lora.scale_of(path), lora.form)
        dtype = getattr(layer, type(layer).lora_recipe[1].weight).dtype
        found = (layer.lora_a.shape[-1], layer.lora_scale, layer.lora_form)
        if not lora.targets(path) or described != found:
            what = f"its layer {path!r} was adapted with another description"
        elif not jnp.issubdtype(dtype, jnp.inexact):
            what = f"its layer {path!r} has a {dtype} weight, which cannot hold W_0 + s A B"
    if what is not None:
        raise ValueError(
            f"merge was given a {type(module).__name__} that it cannot merge: {what}. Pass what "
            "adapt(module, lora, rngs=nnx.Rngs(0)) returned, and the same lora."
        )
    return _folded(model)


def pure_params(source: nnx.Module | nnx.State) -> dict:
    """The ``nnx.Param`` values of a module or state, factors included, as nested dicts.

    >>> layer = nnx.Linear(2, 3, use_bias=False, rngs=nnx.Rngs(0))
    >>> jax.tree.map(jnp.shape, pure_params(nnx.List([layer])))
    {'0': {'kernel': (2, 3)}}
    """
    pairs = [(tuple(map(str, path)), value) for path, value in _params(source)]
    return unflatten_dict({p: v.get_value() if is_variable(v) else v for p, v in pairs})


def _params(source):
    if isinstance(source, nnx.Module):
        source = nnx.state(source, nnx.Param, graph=True)
    for path, value in nnx.to_flat_state(source):
        if isinstance(value, nnx.Param) or not is_variable(value):
            yield path, value


def _copied(module: nnx.Module) -> nnx.Module:
    """The same arrays in new Variables (``nnx.merge`` would hand back the Variables themselves)."""
    graphdef, state = nnx.split(module, graph=True)
    new = jax.tree.map(lambda v: v.copy() if is_variable(v) else v, state, is_leaf=is_variable)
    return nnx.merge(graphdef, new)


def _modules(model: nnx.Module) -> dict[str, Any]:
    """Every module once, by the path that ``nnx.state`` gives it."""
    nodes = nnx.iter_graph(model, graph=True)
    return {"/".join(map(str, p)): node for p, node in nodes if isinstance(node, nnx.Module)}


# One layer


def _adapt_layer(layer, rule: Rule, lora: LoRA, path: str, stack, key, *dropout_key):
    weight = getattr(layer, rule.weight)
    axes, shapes = leaf_shapes(lora, path, geometry_of(layer, rule), weight.shape[len(stack) :])
    shapes = [(*stack, *shape) for shape in shapes]
    values, rest = first_leaves(lora, path, key, weight.get_value(), axes, shapes)
    weight.set_value(rest)
    _swap_class(layer, rule)

    def names_of(i, names):
        names = (*names, *[None] * (weight.ndim - len(names)))
        return lora.form.axis_names(names, axes, len(stack))[i]

    for i, (name, value) in enumerate(zip(lora.factors, values, strict=True)):
        setattr(layer, name, _leaf(value, weight, functools.partial(names_of, i)))
    layer.lora_form = lora.form
    layer.lora_scale = lora.scale_of(path)
    layer.lora_execution = lora.execution
    if lora.dropout:
        layer.lora_dropout = nnx.Dropout(lora.dropout)
        (own,) = dropout_key
        keys = jax.random.split(own, stack) if stack else own
        layer.lora_dropout.rngs = nnx.RngStream(keys, tag="dropout")


def _swap_class(node, rule: Rule):
    pytree = not jax.tree_util.all_leaves([node])
    object.__setattr__(node, "__class__", _adapted_class(type(node), rule, pytree))


def _leaf(value, weight: nnx.Variable, inherited):
    """The Variable of a leaf, placed and named as the weight's axes are.

    ``inherited`` takes the names of the weight's axes to those of the leaf's.
    """
    concrete = not isinstance(value, Tracer)
    placement = getattr(weight.get_value(), "sharding", None) if concrete else None
    if isinstance(placement, jax.sharding.NamedSharding):
        spec = jax.sharding.PartitionSpec(*inherited(placement.spec))
        value = jax.device_put(value, jax.sharding.NamedSharding(placement.mesh, spec))
    names = weight.get_metadata("out_sharding", None)
    if not names:
        return nnx.LoRAParam(value)
    metadata = {k: v for k, v in weight.get_metadata().items() if k in ("mesh", "sharding_rules")}
    metadata["out_sharding"] = inherited(names)
    mesh = metadata.get("mesh") or jax.sharding.get_abstract_mesh()
    if not concrete and not mesh.empty:
        return nnx.LoRAParam(value, **metadata)  # placed by the constructor, as the weight was
    # copy() takes the names as they are; the constructor would want a mesh to place them on.
    return nnx.LoRAParam(value).copy(**metadata)


def _folded(model: nnx.Module) -> nnx.Module:
    """``model`` itself with its factors merged into new Variables and the classes of the base."""
    for node in _modules(model).values():
        if not hasattr(node, "lora_recipe"):
            continue
        cls, rule, _ = type(node).lora_recipe
        if rule not in WRAPPERS:
            setattr(node, rule.weight, getattr(node, rule.weight).copy(_merged(node, rule)))
            for name in (*node.lora_form.leaves, *_OWN):
                if hasattr(node, name):
                    delattr(node, name)
        object.__setattr__(node, "__class__", cls)
    return model


def _merged(layer, rule: Rule):
    axes = geo.layout(geometry_of(layer, rule), len(axes_of(layer, rule)))
    weight = getattr(layer, rule.weight).get_value()
    return layer.lora_form.merged(weight, _leaves(layer), layer.lora_scale, axes)


def _leaves(layer):
    return tuple(getattr(layer, name).get_value() for name in layer.lora_form.leaves)


# The adapted classes


def _run(plain, rule: Rule, layer, *args, **kwargs):
    """``plain``, the layer's own method, with the product of the factors added to its result."""
    if rule in WRAPPERS:
        twin = copy.copy(layer)
        inner = nnx.merge(*nnx.split(layer.layer_instance, graph=True))  # with the same Variables
        vars(twin)["layer_instance"] = _folded(inner)
        return plain(twin, *args, **kwargs)
    bound = inspect.signature(plain).bind(layer, *args, **kwargs)
    name_of_self, name_of_x = list(bound.arguments)[:2]
    x = bound.arguments[name_of_x]
    dropout = getattr(layer, "lora_dropout", None)
    equation = _equation(layer, bound.arguments) if rule.kind is nnx.Einsum else None
    weight, bias = getattr(layer, rule.weight), getattr(layer, "bias", None)
    if rule.equation is not None:
        try:
            geo.check_call(rule.equation, x, weight)
        except ValueError as error:
            name = f"{rule.kind.__name__}.{plain.__name__}"
            raise ValueError(
                f"{name} was called otherwise than its entry of LoRA.layers says: {error} Leave "
                "such layers out with LoRA.exclude."
            ) from None
    bias = bias.get_value() if isinstance(bias, nnx.Variable) else None

    def on(x, value):
        twin = layer
        if value is not None:
            twin = copy.copy(layer)  # the same Variables, but for the weight
            vars(twin)[rule.weight] = weight.copy(value)
        bound.arguments |= {name_of_self: twin, name_of_x: x}
        return plain(*bound.args, **bound.kwargs)

    call = Call.of(
        layer,
        x=x,
        weight=weight.get_value(),
        geometry=geometry_of(layer, rule, jnp.ndim(x), equation),
        layer=on,
        scale=layer.lora_scale,
        execution=layer.lora_execution,
        attends=plain.__name__ == "attend",
        drop=None if dropout is None or dropout.deterministic else dropout,
        affine=not rule.equation,
        bias=bias,
    )
    return product(layer.lora_form, _leaves(layer), call)


def _equation(layer, bound):
    """An equation given at the call, which must use the weight as the layer's own does."""
    equation = bound.get("einsum_str") or layer.einsum_str
    found, own = (geo.layout(geo.Contraction(e), None) for e in (equation, layer.einsum_str))
    if found != own:
        raise ValueError(
            f"an adapted nnx.Einsum({layer.einsum_str!r}) was called with {equation!r}, which "
            "takes the weight's axes otherwise: leave it out with LoRA.exclude."
        )
    return equation


# The adapted classes whose own arithmetic the running call has reached.
_reached: contextvars.ContextVar[set[type] | None] = contextvars.ContextVar(
    "rmlora_jax_reached", default=None
)


@functools.cache
def _mixin(rule: Rule) -> type[nnx.Module]:
    """``rule.kind`` with the product added; it stands right before it in a subclass's MRO."""

    def wrapped(name):
        plain = getattr(rule.kind, name)

        @functools.wraps(plain)
        def method(self, *args, **kwargs):
            if (reached := _reached.get()) is not None:
                reached.add(type(self))
            return _run(plain, rule, self, *args, **kwargs)

        return method

    return _new_class(rule.kind, (rule.kind,), {name: wrapped(name) for name in rule.methods})


@functools.cache
def _adapted_class(cls: type[nnx.Module], rule: Rule, pytree: bool = True) -> type[nnx.Module]:
    """``cls`` with the product added where it runs the ``rule.methods`` of ``rule.kind``."""
    mixin = _mixin(rule)
    namespace: dict[str, Any] = {"lora_recipe": (cls, rule, pytree)}

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
    return (adapted := _new_class(cls, bases, namespace, pytree=pytree))


def _new_class(base, bases, namespace, **kwargs):
    names = {"__module__": __name__, "__doc__": base.__doc__}
    return _metaclass(type(base))(f"Adapted{base.__name__}", bases, names | namespace, **kwargs)


@functools.cache
def _metaclass(base: type) -> type:
    """A metaclass whose classes pickle as the call that makes them: no module holds them."""
    metaclass = type(base.__name__, (base,), {})

    def call(cls) -> tuple[Any, ...]:
        return _adapted_class, cls.lora_recipe

    copyreg.pickle(metaclass, call)
    return metaclass
