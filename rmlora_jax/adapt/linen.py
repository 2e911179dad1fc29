"""``adapt`` for Linen: the module, with the low-rank product beside each targeted layer."""

import contextlib
import contextvars
import copy
import dataclasses
import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from flax.core import meta

from rmlora_jax.adapt import geometry as geo
from rmlora_jax.adapt import leaves
from rmlora_jax.adapt.forms import FACTORS, Call, product
from rmlora_jax.adapt.lora import Layer, LoRA

# What is running is part of the key of every jit inside it. Otherwise a model with nn.jit inside
# would run a trace made for another description.
_running = jax.make_user_context(default_value=None)

# The layouts of the layers that have run, by path, while somebody wants to know them.
_seen: contextvars.ContextVar[dict[str, geo.Layout] | None] = contextvars.ContextVar(
    "_seen", default=None
)


class _Kind(NamedTuple):
    """How a layer's method uses its weight: (module, arguments by name) -> geometry."""

    weight: str
    geometry: Callable[[nn.Module, dict], geo.Geometry]
    attends: bool = False


def _general(m, arguments):
    return geo.general(m.axis, m.batch_dims, m.features, jnp.ndim(arguments["inputs"]))


def _einsum(m, arguments):
    return geo.Contraction(arguments.get("einsum_str") or m.einsum_str)


# Layers are known by the method about to run, not by their class: nn.vmap(nn.Dense) reaches an
# interceptor twice and a subclass may replace __call__, but Dense's own arithmetic runs just once.
_FLAX = {
    inspect.unwrap(method): kind
    for method, kind in (
        (nn.Dense.__call__, _Kind("kernel", lambda *_: geo.DENSE)),
        (nn.DenseGeneral.__call__, _Kind("kernel", _general)),
        (nn.Einsum.__call__, _Kind("kernel", _einsum)),
        (nn.Conv.__call__, _Kind("kernel", lambda m, _: geo.convolution(m))),
        (nn.ConvTranspose.__call__, _Kind("kernel", lambda m, _: geo.convolution(m))),
        (nn.Embed.__call__, _Kind("embedding", lambda m, _: geo.Lookup(m.num_embeddings))),
        (nn.Embed.attend, _Kind("embedding", lambda m, _: geo.Lookup(m.num_embeddings), True)),
    )
}


@functools.lru_cache
def _kinds(layers: tuple[Layer, ...]) -> dict[Callable, _Kind]:
    def kind(layer):
        return _Kind(layer.weight, lambda *_: geo.Contraction(layer.equation))

    return _FLAX | {inspect.unwrap(getattr(own.cls, own.method)): kind(own) for own in layers}


@contextlib.contextmanager
def layouts() -> Iterator[dict[str, geo.Layout]]:
    """Collects the layout of the weight, by path, of each adapted layer that runs inside."""
    seen: dict[str, geo.Layout] = {}
    token = _seen.set(seen)
    try:
        yield seen
    finally:
        _seen.reset(token)


@dataclasses.dataclass(frozen=True)
class _Held:
    """Hides a module from Flax, which would make it a submodule with a path of its own."""

    module: nn.Module


class Adapted(nn.Module):
    """``base`` with the low-rank factors of ``lora``; made by ``adapt``.

    The base runs in the scope of this module, so that parameter paths and random streams are those
    of the base alone. (``nn.share_scope`` would keep the parameter paths, but submodules given as
    fields keep another path and random stream.) Methods of the base are there under their own names
    and run adapted, as does ``apply(..., method=...)``.
    """

    held: _Held
    lora: LoRA

    @property
    def base(self) -> nn.Module:
        """The module that was adapted."""
        return self.held.module

    def __call__(self, *args, **kwargs):
        return self._run("__call__", *args, **kwargs)

    def _run(self, method, *args, **kwargs):
        if self.lora.target is None:
            return _call(self, method, *args, **kwargs)
        # Dropout on the way into A alone has no merged form.
        drops = self.lora.dropout > 0 and self.has_rng("dropout")
        how = "factored" if drops else self.lora.execution
        if how != "merged":
            return self._run_as(how, method, *args, **kwargs)
        assert self.scope is not None
        counts = copy.deepcopy(self.scope.rng_counters)
        try:
            return self._run_as(how, method, *args, **kwargs)
        except Transformed:  # what that run wrote is lost with its scope, but not its draws
            self.scope.rng_counters.clear()
            self.scope.rng_counters.update(counts)
            return self._run_as("whole", method, *args, **kwargs)

    def _run_as(self, how, method, *args, **kwargs):
        run = functools.partial(_intercepted, how=how)
        if not self.is_initializing() and (how in ("merged", "whole") or self.lora.alpha_pattern):
            # Layers of one nn.jit share a trace, which therefore may not depend on their paths:
            # what alpha_pattern changes goes into the values of A.
            ready = functools.partial(_prepared, lora=self.lora, merges=how == "whole")
            run = nn.map_variables(run, "params", trans_in_fn=ready)
        # Who wants to see the layouts cannot use a trace made before.
        with _running((self.lora, how, None if _seen.get() is None else object())):
            return run(self, method, *args, **kwargs)

    @nn.nowrap
    def apply(self, variables, *args, method=None, **kwargs):
        return super().apply(variables, *args, method=_forward(method), **kwargs)

    @nn.nowrap
    def init_with_output(self, rngs, *args, method=None, **kwargs):
        if self.lora.target is not None and self.lora.init == "pissa":
            raise ValueError(
                'LoRA.init "pissa" splits weights that are already loaded: make the parameters '
                "with the base module (init or a checkpoint), then call attach."
            )
        out, variables = super().init_with_output(rngs, *args, method=_forward(method), **kwargs)
        leaves.check_adapted(traverse_util.flatten_dict(variables.get("params", {})), self.lora)
        return out, variables

    @nn.nowrap
    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "held" not in vars(self):
                raise
        value = getattr(_bound_base(self), name)
        parts = jax.tree.leaves(value, is_leaf=lambda part: isinstance(part, nn.Module))
        if self.lora.target is not None and any(isinstance(part, nn.Module) for part in parts):
            raise AttributeError(
                f"{name!r} holds submodules of the adapted module, which would run without their "
                f"factors when reached this way. Call them inside: "
                f"apply(variables, ..., method=lambda m, *args: m.{name}(*args))."
            )
        if not inspect.ismethod(value):
            return value
        return types.MethodType(lambda self, *args, **kw: self._run(name, *args, **kw), self)


def adapt_linen(module: nn.Module, lora: LoRA) -> Adapted:
    if isinstance(module, Adapted):
        raise ValueError(
            "adapt was given a module that is adapted already. Adapt the base module instead, "
            "with one description: adapt(module.base, lora)."
        )
    return Adapted(_Held(module), lora)


class Transformed(Exception):
    """Something transforms a weight before its layer has it: it must have been merged before."""


def _prepared(variables, lora: LoRA, merges: bool):
    """The parameters that a Linen base runs on: merged, or with alpha_pattern's part in A."""
    flat = traverse_util.flatten_dict(variables["params"])
    modules = [path[:-1] for path in flat if path[-1] == FACTORS[0]]
    if not modules:
        raise leaves.missing_factors()
    for module in modules:
        name = "/".join(module)
        factors = [meta.unbox(flat[(*module, leaf)]) for leaf in lora.factors]
        path = leaves.weight_path(lora, module, flat)
        weight, scale = meta.unbox(flat[path]), lora.scale_of(name)
        if merges and geo.in_order(weight, *factors[:2]):
            value = lora.form.merged(weight, factors, scale)
            for leaf in lora.factors:
                del flat[(*module, leaf)]
        else:
            a, path = factors[0], (*module, FACTORS[0])
            value = a * (scale / lora.common_scale(a.shape[-1]))
        flat[path] = jax.tree.map(lambda _, value=value: value, flat[path])  # in its box
    return {"params": traverse_util.unflatten_dict(flat)}


def _bound_base(adapted: Adapted) -> nn.Module:
    if adapted.scope is None:
        return adapted.base
    # Rewound, so that a second call finds the names of the first free.
    return adapted.base.copy(parent=adapted.scope.rewound())


def _call(adapted: Adapted, method, *args, **kwargs):
    base = _bound_base(adapted)
    if isinstance(method, str):
        return getattr(base, method)(*args, **kwargs)
    return method(base, *args, **kwargs)


def _intercepted(adapted: Adapted, method, *args, how, **kwargs):
    with nn.intercept_methods(_Interceptor(adapted.lora, adapted.path, how)):
        return _call(adapted, method, *args, **kwargs)


def _forward(method):
    """The function of a bound ``Adapted`` that runs ``method`` of its base."""
    method = method or "__call__"
    function = getattr(method, "__func__", method)
    if isinstance(getattr(method, "__self__", None), Adapted):
        return function
    if not isinstance(method, str):
        method = function
    return lambda self, *args, **kwargs: self._run(method, *args, **kwargs)


class _Interceptor:
    """Adds the low-rank product to each targeted layer that runs; one for each run."""

    def __init__(self, lora: LoRA, root: tuple[str, ...], how: str):
        self.lora, self.root, self.how = lora, root, how
        self.kinds = _kinds(lora.layers)
        self.paused = False
        self.wrapped = 0
        self.mapped: set[tuple[str, ...]] = set()
        self.fields: dict[str, dict] = {}  # of the layers of the user's own classes, by path

    def __call__(self, next_fun, args, kwargs, context):
        module = context.module
        if self.paused or module.scope is None:
            return next_fun(*args, **kwargs)
        if isinstance(module, Adapted):
            raise ValueError(
                f"the module to adapt holds an adapted module at {'/'.join(module.path)!r}: adapt "
                "the outermost module only, with one description for all layers."
            )
        if isinstance(module, (nn.WeightNorm, nn.SpectralNorm)):
            self.wrapped += 1
            try:
                return next_fun(*args, **kwargs)
            finally:
                self.wrapped -= 1
        path = module.path[len(self.root) :]
        if type(module).__name__.startswith("Map_variables"):  # the class nn.map_variables makes
            self.mapped.add(path)
        function = getattr(context.orig_method, "func", None)
        kind = self.kinds.get(function) if function is not None else None
        if kind is None:
            return next_fun(*args, **kwargs)
        if self.lora.targets("/".join(path)):
            return self.call_layer(kind, function, path, next_fun, args, kwargs, module)
        if module.has_variable("params", FACTORS[0]):
            raise leaves.unselected_factors(self.lora, "/".join(path))
        return next_fun(*args, **kwargs)

    def call_layer(self, kind, function, path, next_fun, args, kwargs, module):
        lora, name = self.lora, "/".join(path)
        initialising = module.is_initializing()
        if self.how == "whole" and not (initialising or module.has_variable("params", FACTORS[0])):
            return next_fun(*args, **kwargs)  # its factors are in the weight already
        self.check_layer(module, path, initialising)
        bound = inspect.signature(function).bind(module, *args, **kwargs)
        name_of_x, x = list(bound.arguments.items())[1]
        geometry = kind.geometry(module, bound.arguments)
        # At init the layer makes its weight first: the factors follow its shape and its box.
        made = next_fun(*args, **kwargs) if initialising else None
        weight = module.get_variable("params", kind.weight)
        if function not in _FLAX:
            self.check_own(kind, name, module, x, geometry, weight)
        factors, axes = _factors(module, lora, name, geometry, weight)
        if (seen := _seen.get()) is not None:
            seen[name] = axes
        old = leaves.unboxed(weight)

        def plain(m, *args, **kwargs):
            return function(m, *args, **kwargs)

        def layer(x, new):
            if made is not None:
                return made
            bound.arguments[name_of_x] = x
            with self.pausing(False):
                if new is None:
                    return next_fun(*bound.args[1:], **bound.kwargs)
                swap = functools.partial(jax.tree.map, lambda leaf: new if leaf is old else leaf)
                return nn.map_variables(plain, "params", swap)(*bound.args, **bound.kwargs)

        drops = lora.dropout > 0 and module.has_rng("dropout")
        call = Call.of(
            module,
            x=x,
            weight=old,
            geometry=geometry,
            layer=layer,
            scale=lora.common_scale(factors[0].shape[-1]),
            execution="factored" if initialising else self.how,
            attends=kind.attends,
            drop=functools.partial(_dropped, module, lora.dropout) if drops else None,
            affine=function in _FLAX,
            bias=leaves.unboxed(module.get_variable("params", "bias")),
        )
        with self.pausing(True):  # the product runs Flax layers of its own
            return product(lora.form, factors, call)

    @contextlib.contextmanager
    def pausing(self, paused: bool):
        """Leaves the Flax layers that run inside alone, or adapts them again."""
        before, self.paused = self.paused, paused
        try:
            yield
        finally:
            self.paused = before

    def check_own(self, kind, path, module, x, geometry, weight):
        """Raises ValueError unless a layer of the user's own class is what its rule says."""
        what = None
        names = [f.name for f in dataclasses.fields(module) if f.name not in ("parent", "name")]
        fields = {name: getattr(module, name) for name in names}
        if weight is None:
            what = f"it has no parameter {kind.weight!r}."
        elif self.fields.setdefault(path, fields) != fields:
            what = "another layer of the class has the same path (nn.share_scope)."
        else:
            try:
                geo.check_call(geometry.equation, x, leaves.unboxed(weight))
            except ValueError as error:
                what = str(error)
        if what is not None:
            raise ValueError(
                f"the layer {path!r}, a {type(module).__name__}, is not what its entry of "
                f"LoRA.layers says: {what} Leave it out with LoRA.exclude."
            )

    def check_layer(self, module, path, initialising):
        what = None
        if self.wrapped or any(path[: len(prefix)] == prefix for prefix in self.mapped):
            what = "has its weight transformed (WeightNorm, SpectralNorm or nn.map_variables)"
        elif self.how != "merged" and getattr(module, "mask", None) is not None:
            what = "has a mask on its weight"
        elif isinstance(module, nn.ConvLocal):
            raise ValueError(
                f"the layer {'/'.join(path)!r} has a weight of its own for every position "
                "(ConvLocal), which no pair of factors describes: leave it out with LoRA.exclude."
            )
        if what is None or (initialising and self.how == "merged"):
            return
        if self.how == "merged":
            raise Transformed
        raise ValueError(
            f"the layer {'/'.join(path)!r} {what}, so that nothing computed beside it could be "
            'merged into it: use LoRA(execution="merged", dropout=0), or leave the layer out '
            "with LoRA.exclude."
        )


def _dropped(module, rate: float, x):
    kept = jax.random.bernoulli(module.make_rng("dropout"), 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)


def _factors(module, lora: LoRA, path: str, geometry: geo.Geometry, weight):
    """The leaves beside the layer's weight, which are made at init, and the weight's layout."""
    form, value = lora.form, meta.unbox(weight)
    axes, shapes = leaves.leaf_shapes(lora, path, geometry, value.shape)
    if not module.has_variable("params", FACTORS[0]):
        if not module.is_mutable_collection("params"):
            raise leaves.missing_factors(f" at {path!r}")
        key = module.make_rng("params")
        values, _ = leaves.first_leaves(lora, path, key, value, axes, shapes)
        names = _names(weight, lora, axes)
        for i, name in enumerate(form.leaves):
            leaf = values[i] if names is None else weight.replace(value=values[i], names=names[i])
            module.put_variable("params", name, leaf)
    leaves.check_leaves(lora, path, functools.partial(module.has_variable, "params"))
    factors = tuple(meta.unbox(module.get_variable("params", name)) for name in form.leaves)
    a, b = (factor.shape for factor in factors[:2])
    if (a, b) != shapes[:2]:
        raise ValueError(
            f"the factors at {path!r} have shapes {a} and {b}, but the description (rank "
            f"{lora.rank_of(path)}) and the weight {value.shape} ask for {shapes[0]} and "
            f"{shapes[1]}: use the description that the factors were made with."
        )
    return factors, axes


def _names(weight, lora: LoRA, axes: geo.Layout):
    """The axes' names of the leaves, None where the weight has no box."""
    if not isinstance(weight, nn.Partitioned):
        return None
    names, ndim = weight.names, jnp.ndim(weight.unbox())
    if len(names) != ndim:
        # DenseGeneral hands its initialiser a flat matrix, so a box around a weight of more axes
        # may have two names only.
        first = {axes.inputs[0]: names[-2], axes.outputs[0]: names[-1]}
        names = tuple(first.get(i) for i in range(ndim))
    return lora.form.axis_names(names, axes)
