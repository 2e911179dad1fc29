"""``adapt`` for Linen: the module, with the low-rank product beside each targeted layer."""

import dataclasses
import functools
import inspect
import types
from collections.abc import Iterable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from flax.core import meta

from rmlora_jax.adapt import product
from rmlora_jax.lora import FACTORS, LoRA, missing_factors, unselected_factors

WEIGHTS = ("kernel", "embedding")

# What is running is part of the key of every jit inside it. Otherwise a model with nn.jit inside
# would run a trace made for another description.
_running = jax.make_user_context(default_value=None)


class _Layer(NamedTuple):
    kind: type[nn.Module]
    weight: str
    attends: bool = False


# Layers are known by the method about to run, not by their class: nn.vmap(nn.Dense) reaches an
# interceptor twice and a subclass may replace __call__, but Dense's own arithmetic runs just once.
_LAYERS = {
    inspect.unwrap(method): layer
    for method, layer in (
        (nn.Dense.__call__, _Layer(nn.Dense, "kernel")),
        (nn.DenseGeneral.__call__, _Layer(nn.DenseGeneral, "kernel")),
        (nn.Conv.__call__, _Layer(nn.Conv, "kernel")),
        (nn.Embed.__call__, _Layer(nn.Embed, "embedding")),
        (nn.Embed.attend, _Layer(nn.Embed, "embedding", attends=True)),
    )
}


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
        if self.lora.alpha_pattern and not self.is_initializing():
            # Layers of one nn.jit share a trace, which therefore may not depend on their paths:
            # what alpha_pattern changes goes into the values of A.
            rescale = functools.partial(_rescale, lora=self.lora)
            run = nn.map_variables(_intercepted, "params", trans_in_fn=rescale)
        else:
            run = _intercepted
        with _running(self.lora):
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
    weighted = {path for path, leaves in names.items() if leaves & set(WEIGHTS)}
    lora.check_targets(weighted)
    for path in sorted(weighted):
        if lora.targets(path) and not names[path] >= set(FACTORS):
            raise ValueError(
                f"LoRA.target {lora.target!r} matches {path!r}, which has a weight but is not a "
                "Dense, DenseGeneral, Conv or Embed layer of flax.linen (or computes in its own "
                "way), so it cannot be adapted: leave it out with LoRA.exclude."
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


def _intercepted(adapted: Adapted, method, *args, **kwargs):
    with nn.intercept_methods(_Interceptor(adapted.lora, adapted.path)):
        return _call(adapted, method, *args, **kwargs)


def _rescale(variables, lora: LoRA):
    flat = traverse_util.flatten_dict(variables["params"])
    for path in [path for path in flat if path[-1] == FACTORS[0]]:
        name, a = "/".join(path[:-1]), meta.unbox(flat[path])
        ratio = lora.scale_of(name) / lora.common_scale(a.shape[-1])
        flat[path] = meta.replace_boxed(flat[path], a * ratio)
    return {"params": traverse_util.unflatten_dict(flat)}


def _forward(method):
    """The function of a bound ``Adapted`` that runs ``method`` of its base."""
    if method is None:
        method = "__call__"
    if isinstance(getattr(method, "__self__", None), Adapted):
        return method.__func__
    if not isinstance(method, str):
        method = getattr(method, "__func__", method)
    return lambda self, *args, **kwargs: self._run(method, *args, **kwargs)


class _Interceptor:
    """Adds the low-rank product to each targeted layer that runs; one for each run."""

    def __init__(self, lora: LoRA, root: tuple[str, ...]):
        self.lora, self.root = lora, root
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
        layer = _LAYERS.get(getattr(context.orig_method, "func", None))
        if layer is None:
            return next_fun(*args, **kwargs)
        if self.lora.targets("/".join(path)):
            self.check_layer(module, path)
            return self.call_layer(layer, "/".join(path), next_fun, args, kwargs, context)
        if module.has_variable("params", FACTORS[0]):
            raise unselected_factors(self.lora, "/".join(path))
        return next_fun(*args, **kwargs)

    def check_layer(self, module, path):
        what = None
        if self.wrapped or any(path[: len(prefix)] == prefix for prefix in self.mapped):
            what = "has its weight transformed (WeightNorm, SpectralNorm or nn.map_variables)"
        elif isinstance(module, nn.Conv | nn.ConvLocal) and module.mask is not None:
            what = "has a mask on its weight"
        elif isinstance(module, nn.ConvLocal):
            what = "has a weight of its own for every position (ConvLocal)"
        if what is not None:
            raise ValueError(
                f"the layer {'/'.join(path)!r} {what}, so that factors beside the stored weight "
                "could not be merged into it: leave it out with LoRA.exclude."
            )

    def call_layer(self, layer, path, next_fun, args, kwargs, context):
        module, lora = context.module, self.lora
        initialising = not module.has_variable("params", FACTORS[0])
        drops = bool(lora.dropout) and module.has_rng("dropout")
        # Dropout on the way into A alone has no merged form. At init the layer makes its weight
        # first: the factors follow its shape and its box.
        merged = lora.execution == "merged" and not (initialising or drops)
        y = None if merged else next_fun(*args, **kwargs)
        weight = module.get_variable("params", layer.weight)
        a, b = _factors(module, lora, path, layer.kind, weight)
        weight, scale = meta.unbox(weight), lora.common_scale(a.shape[-1])
        self.paused = True  # the product runs Flax layers of its own
        try:
            if merged:
                weight = product.merged(weight, a, b, scale)
                return _plain_call(layer, weight, context, args, kwargs)
            (x,) = (*args, *kwargs.values())
            if layer.attends:
                return y + product.low_rank_attend(x, y, a, b, scale)
            if drops and jnp.issubdtype(x.dtype, jnp.inexact):
                x = _dropout(module.make_rng("dropout"), x, lora.dropout)
            return y + product.low_rank(layer.kind, module, weight.shape, x, y, a, b, scale)
        finally:
            self.paused = False


def _plain_call(layer, weight, context, args, kwargs):
    """The layer's own method with ``weight`` for its weight."""
    module = context.module
    params = {layer.weight: weight}
    if module.has_variable("params", "bias"):
        params["bias"] = meta.unbox(module.get_variable("params", "bias"))
    fields = {f.name: getattr(module, f.name) for f in dataclasses.fields(layer.kind)}
    plain = layer.kind(**(fields | {"parent": None, "name": None}))
    return plain.apply({"params": params}, *args, method=context.method_name, **kwargs)


def _dropout(key, x, rate):
    kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)


def _factors(module, lora, path, kind, weight):
    """A and B of the layer from its parameters; at init they are made there."""
    shape = jnp.shape(meta.unbox(weight))
    axes = product.layout(kind, module, len(shape))
    shapes = product.factor_shapes(shape, axes, lora.rank_of(path))
    if not module.has_variable("params", FACTORS[0]):
        if not module.is_mutable_collection("params"):
            raise missing_factors(f" at {path!r}")
        key = module.make_rng("params")
        values = (
            product.initial_a(key, shapes[0], lora.init, lora.dtype),
            jnp.zeros(shapes[1], lora.dtype),
        )
        for name, value, names in zip(FACTORS, values, _names(weight, axes), strict=True):
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
    return a, b


def _names(weight, axes: product.Layout):
    """Partition names of A and B: a flattened axis has its first axis's name, the rank axis None.

    DenseGeneral hands its initialiser a flat matrix, so a box around a weight of more axes may
    have two names only.
    """
    if not isinstance(weight, nn.Partitioned):
        return None, None
    names, ndim = weight.names, jnp.ndim(weight.unbox())
    if len(names) == ndim:
        batch = names[: axes.batch]
        name_in, name_out = names[axes.batch], names[axes.batch + axes.inputs]
    else:
        batch, (name_in, name_out) = (None,) * axes.batch, names[-2:]
    return (*batch, name_in, None), (*batch, None, name_out)
