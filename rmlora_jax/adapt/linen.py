"""``adapt`` for Linen: the module, with the low-rank product beside each targeted layer."""

import contextlib
import contextvars
import copy
import dataclasses
import functools
import inspect
import types
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from flax.core import meta

from rmlora_jax.adapt import merging, product
from rmlora_jax.adapt.lora import (
    DIAGONAL,
    FACTORS,
    Layer,
    LoRA,
    missing_factors,
    other_factors,
    unselected_factors,
)

# What is running is part of the key of every jit inside it. Otherwise a model with nn.jit inside
# would run a trace made for another description.
_running = jax.make_user_context(default_value=None)

# The layouts of the layers that have run, by path, while somebody wants to know them.
_seen: contextvars.ContextVar[dict[str, product.Layout] | None] = contextvars.ContextVar(
    "_seen", default=None
)


class _Kind(NamedTuple):
    """How a layer's method uses its weight: (module, arguments by name) -> geometry."""

    weight: str
    geometry: Callable[[nn.Module, dict], product.Geometry]
    attends: bool = False


def _general(m, arguments):
    return product.general(m.axis, m.batch_dims, m.features, jnp.ndim(arguments["inputs"]))


def _einsum(m, arguments):
    return product.Contraction(arguments.get("einsum_str") or m.einsum_str)


def _own(equation, m, arguments):
    return product.Contraction(equation)


def _lookup(m, arguments):
    return product.Lookup(m.num_embeddings)


# Layers are known by the method about to run, not by their class: nn.vmap(nn.Dense) reaches an
# interceptor twice and a subclass may replace __call__, but Dense's own arithmetic runs just once.
_FLAX = {
    inspect.unwrap(method): kind
    for method, kind in (
        (nn.Dense.__call__, _Kind("kernel", lambda m, arguments: product.DENSE)),
        (nn.DenseGeneral.__call__, _Kind("kernel", _general)),
        (nn.Einsum.__call__, _Kind("kernel", _einsum)),
        (nn.Conv.__call__, _Kind("kernel", lambda m, _: product.convolution(m))),
        (nn.ConvTranspose.__call__, _Kind("kernel", lambda m, _: product.convolution(m))),
        (nn.Embed.__call__, _Kind("embedding", _lookup)),
        (nn.Embed.attend, _Kind("embedding", _lookup, attends=True)),
    )
}


@functools.lru_cache
def _kinds(layers: tuple[Layer, ...]) -> dict[Callable, _Kind]:
    methods = [inspect.unwrap(getattr(layer.cls, layer.method)) for layer in layers]
    kinds = [_Kind(layer.weight, functools.partial(_own, layer.equation)) for layer in layers]
    return _FLAX | dict(zip(methods, kinds, strict=True))


@contextlib.contextmanager
def layouts() -> Iterator[dict[str, product.Layout]]:
    """Collects the layout of the weight, by path, of each adapted layer that runs inside."""
    token = _seen.set({})
    try:
        yield _seen.get()
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
        counts = copy.deepcopy(self.scope.rng_counters)
        try:
            return self._run_as(how, method, *args, **kwargs)
        except merging.Transformed:  # what that run wrote is lost with its scope, but not its draws
            self.scope.rng_counters.clear()
            self.scope.rng_counters.update(counts)
            return self._run_as("whole", method, *args, **kwargs)

    def _run_as(self, how, method, *args, **kwargs):
        run = functools.partial(_intercepted, how=how)
        if not self.is_initializing() and (how in ("merged", "whole") or self.lora.alpha_pattern):
            # Layers of one nn.jit share a trace, which therefore may not depend on their paths:
            # what alpha_pattern changes goes into the values of A.
            prepare = functools.partial(merging.prepare, lora=self.lora, merges=how == "whole")
            run = nn.map_variables(run, "params", trans_in_fn=prepare)
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
        check_adapted(traverse_util.flatten_dict(variables.get("params", {})), self.lora)
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


def check_adapted(paths: Iterable[tuple[str, ...]], lora: LoRA) -> None:
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
                f"LoRA.target {lora.target!r} matches {path!r}, which has a weight but is no layer "
                "of flax.linen that can be adapted (or computes in its own way): describe its "
                "class in LoRA.layers, or leave it out with LoRA.exclude."
            )


def check_layout(path: str, weight, a, b, axes: product.Layout | None = None) -> None:
    """Raises ValueError unless A, B are (*stack, *batch, in, r), (*stack, *batch, r, out) of the
    weight: by its ``axes``, or else one whose axes stand in the order of the factors."""
    if axes is None:
        fits = merging.in_order(weight, a, b) or _is_marked(weight, a, b)
    else:
        stack = weight.ndim - len(axes.order)
        one = product.factor_shapes(weight.shape[stack:], axes, a.shape[-1])
        fits = (a.shape, b.shape) == tuple((*weight.shape[:stack], *shape) for shape in one)
    if not fits:
        raise ValueError(
            f"the factors at {path!r}, lora_a {a.shape} and lora_b {b.shape}, do not fit the "
            f"weight {weight.shape}: they must be (*stack, in, r) and (*stack, r, out) with the "
            "stack axes first. nn.scan and nn.vmap must stack parameters on axis 0 "
            '(variable_axes={"params": 0}); elsewhere leave the layer out with LoRA.exclude.'
        )


def unboxed(leaf):
    """What is in the box of a leaf, an array or a mere shape: as it is, constrained to no mesh."""
    boxed = isinstance(leaf, nn.Partitioned)
    return leaf.unbox(apply_constraint=False) if boxed else meta.unbox(leaf)


def reboxed(box, value):
    """``value`` in a box like ``box`` if that is one; ``meta.replace_boxed`` would constrain."""
    return box.replace_boxed(value) if isinstance(box, meta.AxisMetadata) else value


def _is_marked(weight, a, b) -> bool:
    """Whether the factors carry the mark of ``product.factor_shapes`` and fit in size."""
    stack = a.shape[:-2]
    first = next((i for i, n in enumerate(stack) if n != weight.shape[i]), None)
    return (
        first is not None
        and stack[first] == 1
        and (*stack, a.shape[-1]) == b.shape[:-1]
        and weight.size == a.size // a.shape[-1] * b.shape[-1]
    )


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
    if isinstance(getattr(method, "__self__", None), Adapted):
        return method.__func__
    if not isinstance(method, str):
        method = getattr(method, "__func__", method)
    return lambda self, *args, **kwargs: self._run(method, *args, **kwargs)


class _Interceptor:
    """Adds the low-rank product to each targeted layer that runs; one for each run."""

    def __init__(self, lora: LoRA, root: tuple[str, ...], how: str):
        self.lora, self.root, self.how = lora, root, how
        self.kinds = _kinds(lora.layers)
        self.paused = False
        self.wrapped = 0
        self.mapped: set[tuple[str, ...]] = set()

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
        kind = self.kinds.get(function)
        if kind is None:
            return next_fun(*args, **kwargs)
        if self.lora.targets("/".join(path)):
            return self.call_layer(kind, function, path, next_fun, args, kwargs, module)
        if module.has_variable("params", FACTORS[0]):
            raise unselected_factors(self.lora, "/".join(path))
        return next_fun(*args, **kwargs)

    def call_layer(self, kind, function, path, next_fun, args, kwargs, module):
        lora, name = self.lora, "/".join(path)
        initialising = module.is_initializing()
        if self.how == "whole" and not (initialising or module.has_variable("params", FACTORS[0])):
            return next_fun(*args, **kwargs)  # its factors are in the weight already
        self.check_layer(module, path, initialising)
        arguments = inspect.signature(function).bind(module, *args, **kwargs).arguments
        x, geometry = list(arguments.values())[1], kind.geometry(module, arguments)
        # What else a class of one's own does with its weight is not known, nor what is masked.
        thin = function in _FLAX and getattr(module, "mask", None) is None
        merges = self.how == "merged" and not initialising
        merges &= not thin or isinstance(geometry, product.Contraction)
        y = None if merges else next_fun(*args, **kwargs)
        # At init the layer makes its weight first: the factors follow its shape and its box.
        weight = module.get_variable("params", kind.weight)
        a, b, axes = _factors(module, lora, name, geometry, weight)
        if _seen.get() is not None:
            _seen.get()[name] = axes
        scale, precision = lora.common_scale(a.shape[-1]), getattr(module, "precision", None)
        if merges:
            old, dtype = unboxed(weight), getattr(module, "dtype", None)
            new = merging.merged_weight(old, a, b, scale, axes, dtype, frozen=thin)
            swap = functools.partial(jax.tree.map, lambda leaf: new if leaf is old else leaf)
            run = nn.map_variables(lambda m, *args, **kw: function(m, *args, **kw), "params", swap)
            y = run(module, *args, **kwargs)
            return merging.linked(y, geometry, x, a, b, scale, precision) if thin else y
        self.paused = True  # the product runs Flax layers of its own
        try:
            if kind.attends:
                return y + product.low_rank_attend(x, y, a, b, scale)
            drops = lora.dropout and module.has_rng("dropout")
            if drops and jnp.issubdtype(x.dtype, jnp.inexact):
                x = _dropout(module.make_rng("dropout"), x, lora.dropout)
            return y + product.low_rank(geometry, x, y, a, b, scale, precision)
        finally:
            self.paused = False

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
            raise merging.Transformed
        raise ValueError(
            f"the layer {'/'.join(path)!r} {what}, so that nothing computed beside it could be "
            'merged into it: use LoRA(execution="merged", dropout=0), or leave the layer out '
            "with LoRA.exclude."
        )


def _dropout(key, x, rate):
    kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)


def _factors(module, lora, path, geometry, weight):
    """A and B of the layer from its parameters, where at init they are made, and their layout."""
    shape = jnp.shape(meta.unbox(weight))
    try:
        axes = product.layout(geometry, len(shape))
        shapes = product.factor_shapes(shape, axes, lora.rank_of(path))
    except ValueError as e:
        raise ValueError(
            f"the layer {path!r} cannot be adapted, since {e} Leave it out with LoRA.exclude."
        ) from None
    if not module.has_variable("params", FACTORS[0]):
        if not module.is_mutable_collection("params"):
            raise missing_factors(f" at {path!r}")
        key = module.make_rng("params")
        values, _ = product.initial_factors(key, None, axes, shapes, 1.0, lora)
        for name, value, names in zip(lora.factors, values, _names(weight, axes), strict=False):
            if names is not None:
                value = weight.replace(value=value, names=names)
            module.put_variable("params", name, value)
    a, b = (meta.unbox(module.get_variable("params", name)) for name in FACTORS)
    if (a.shape, b.shape) != shapes:
        raise ValueError(
            f"the factors at {path!r} have shapes {a.shape} and {b.shape}, but the description "
            f"(rank {lora.rank_of(path)}) and the weight {shape} ask for {shapes[0]} and "
            f"{shapes[1]}: use the description that the factors were made with."
        )
    found = tuple(n for n in (*FACTORS, DIAGONAL) if module.has_variable("params", n))
    if found != lora.factors:
        raise other_factors(lora, path, found)
    e = meta.unbox(module.get_variable("params", DIAGONAL))
    return product.effective_a(a, e), b, axes


def _names(weight, axes: product.Layout):
    """Partition names of A, B and e, None where the weight has no box."""
    if not isinstance(weight, nn.Partitioned):
        return None, None, None
    names, ndim = weight.names, jnp.ndim(weight.unbox())
    if len(names) != ndim:
        # DenseGeneral hands its initialiser a flat matrix, so a box around a weight of more axes
        # may have two names only.
        first = {axes.inputs[0]: names[-2], axes.outputs[0]: names[-1]}
        names = tuple(first.get(i) for i in range(ndim))
    return product.factor_names(names, axes)
