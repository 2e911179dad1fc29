"""rmlora_jax and three other ways to get LoRA onto a model, behind one function: ``fit``.

Every ``fit(case, framework, **options)`` adapts the model of a row as the library's authors intend
it and returns a ``Fitted``. An option that a library has no name for ends as a keyword that its own
constructor does not know: that TypeError is what the table calls "not offered". What a library has
no function for at all raises ``NotOffered``, here and nowhere else.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import qwix
from flax import nnx
from flax.core import meta
from flax.traverse_util import flatten_dict, unflatten_dict

import rmlora_jax as rm

from .hosts import NNX, Host, Linen

RANK, ALPHA = 2, 6.0
WEIGHT = r"(.*/)?(kernel|embedding|w)"


class NotOffered(Exception):
    """The library has nothing that does this."""


class Failed(Exception):
    """The library runs the row, and what the row claims does not hold."""


@dataclasses.dataclass(frozen=True)
class Case:
    """The model of a row: a factory for each framework, and what it is called with.

    ``weights`` are the base's parameters that must have factors. ``stack`` counts the leading axes
    over which layers are stacked. ``delta`` gives, for a weight whose axes are not (*stack, *in,
    *out), the shapes of A and B (-1 for the rank) and the einsum that makes the increment, and
    which of its axes are reversed; ``or_delta`` is another layout that is as good.
    """

    linen: Callable | None
    nnx: Callable | None
    args: tuple
    weights: str = WEIGHT
    stack: int = 0
    delta: tuple | None = None
    or_delta: tuple | None = None
    layers: tuple = ()  # (class, equation, fields) of layers that Flax does not know

    def base(self, framework: str) -> Host:
        if framework == "linen":
            return Linen.create(self.linen(), self.args)
        return NNX(self.nnx())

    def increment(self, weight, a, b):
        """A B in the shape of the weight, by this row's own arithmetic."""
        if self.delta is not None:
            a_shape, b_shape, equation, *reverse = self.delta
            a, b = a.reshape(a_shape), b.reshape(b_shape)
            return jnp.flip(jnp.einsum(equation, a, b, precision="highest"), reverse)
        increment = jnp.matmul(a, b, precision="highest")
        if increment.size != weight.size:
            raise Failed(f"factors {a.shape} and {b.shape} do not cover the weight {weight.shape}")
        return increment.reshape(weight.shape)


@dataclasses.dataclass
class Fitted:
    """An adapted model: ``pairs`` maps each weight's path in the base to the paths of A and B."""

    case: Case
    base: Host
    host: Host
    pairs: dict[str, tuple[str, str]]
    scale: Callable[[str], float] = lambda weight: 1.0
    merge: Callable | None = None  # values -> the base's values, where the library has a merge
    locate: Callable[[str], str] = lambda path: path  # where a leaf of the base lies here

    @property
    def values(self):
        return self.host.values

    @property
    def factors(self):
        return [path for pair in self.pairs.values() for path in pair]

    def expected_values(self, values):
        """The base's parameters with W + s A B, computed here in float32 and cast once."""
        merged = {path: values[self.locate(path)] for path in self.base.values}
        for path, pair in self.pairs.items():
            weight = merged[path]
            a, b = (values[name].astype(jnp.float32) for name in pair)
            delta = self.scale(path) * self.case.increment(weight, a, b)
            merged[path] = (weight.astype(jnp.float32) + delta).astype(weight.dtype)
        return merged


def not_offered(what: str):
    raise NotOffered(what)


class Ours:
    """``adapt``, with ``attach`` for Linen and ``rngs`` for NNX."""

    title = "rmlora_jax"

    def describe(self, case, rank=RANK, alpha=ALPHA, **options):
        if case.layers:
            options["layers"] = tuple(
                rm.Layer(cls, equation, **how) for cls, equation, how in case.layers
            )
        return rm.LoRA(rank, alpha, **options)

    def fit(self, case, framework, base=None, method=None, **options):
        lora = self.describe(case, **options)
        base = base or case.base(framework)
        if framework == "linen":
            model = rm.adapt(base.module, lora)
            how = {} if method is None else {"method": method}
            params = rm.attach(
                jax.random.key(1), model, base.variables["params"], *case.args, **how
            )
            host = Linen(model, {**base.variables, "params": params})
        else:
            host = NNX(rm.adapt(base.module, lora, rngs=nnx.Rngs(1)))
        pairs = _pairs(base.values, host.values, lambda weight: weight.rpartition("/")[0])

        def scale(weight):
            return lora.scale_of(weight.rpartition("/")[0])

        merge = functools.partial(self._merge, case, host, lora)
        return Fitted(case, base, host, pairs, scale, merge)

    def _merge(self, case, host, lora, values):
        if isinstance(host, Linen):
            params = unflatten_dict(values, sep="/")
            if case.delta is not None:  # axes that only the model knows
                params = rm.merge(params, host.module, *case.args)
            else:
                params = rm.merge(params, lora)
            return flatten_dict(meta.unbox(params), sep="/")
        return NNX(rm.merge(host.with_values(values), lora)).values

    def held(self, case, holder):
        """The object that holds a model, holding the adapted one."""
        copy = rm.adapt(holder, self.describe(case))
        copy.params = rm.attach(jax.random.key(1), copy.module, copy.params, *case.args)
        return copy

    def chosen(self, fitted, train):
        """Paths of the leaves that the description trains."""
        lora = self.describe(fitted.case, train=train)
        if isinstance(fitted.host, Linen):
            trainable, _ = rm.split(unflatten_dict(fitted.values, sep="/"), lora)
            return set(flatten_dict(trainable, sep="/"))
        return fitted.host.select(lora.trainable)


class Qwix:
    """``qwix.apply_lora_to_model`` with a LoraProvider; its own rules stand for patterns."""

    title = "Qwix"

    def fit(
        self,
        case,
        framework,
        base=None,
        method=None,
        rank=RANK,
        alpha=ALPHA,
        target=".*",
        exclude=None,
        rank_pattern=(),
        alpha_pattern=(),
        init=None,
        dtype=None,
        **options,
    ):
        if init is not None:
            options["lora_a_initializer"] = _initialiser(init, rank)
        if dtype is not None:  # its factors follow the weight's dtype; an initialiser need not
            options["lora_a_initializer"] = lambda key, shape, _: _initialiser("kaiming", rank)(
                key, shape, dtype
            )
            options["lora_b_initializer"] = lambda key, shape, _: jnp.zeros(shape, dtype)
        settings = [(regex, r, alpha) for regex, r in rank_pattern]
        settings += [(regex, rank, a) for regex, a in alpha_pattern]
        settings += [(target, rank, alpha)]
        rules = [
            qwix.LoraRule(module_path=regex, rank=r, alpha=a, **options) for regex, r, a in settings
        ]
        if exclude is not None:
            rules.insert(0, qwix.QuantizationRule(module_path=exclude))
        # Otherwise it does not see products inside jitted functions of jax.numpy, as `x @ w` is.
        provider = qwix.LoraProvider(rules, disable_jit=True)
        base = base or case.base(framework)
        methods = (method or "__call__",)
        if framework == "linen":
            model = qwix.apply_lora_to_model(base.module, provider, methods=methods)
            how = {} if method is None else {"method": method}
            keys = {"params": jax.random.key(1), "dropout": jax.random.key(2)}
            fresh = jax.jit(lambda: model.init(keys, *case.args, **how))()["params"]
            own = flatten_dict(base.variables["params"], sep="/")
            params = {**flatten_dict(fresh, sep="/"), **own}
            host = Linen(model, {**base.variables, "params": unflatten_dict(params, sep="/")})
        else:
            keys = nnx.Rngs(1, dropout=2)
            model = qwix.apply_lora_to_model(
                base.module, provider, *case.args, rngs=keys, methods=methods
            )
            host = NNX(model, before_training=_qwix_training)
        pairs = {
            path: (f"{path}_lora_a", f"{path}_lora_b")
            for path in base.values
            if f"{path}_lora_a" in host.values
        }

        def scale(weight):
            module = weight.rpartition("/")[0]
            return next(a / r for regex, r, a in settings if re.fullmatch(regex, module))

        return Fitted(case, base, host, pairs, scale)

    def chosen(self, fitted, train):
        if isinstance(fitted.host, Linen):
            not_offered("a choice of what is trained")
        return fitted.host.select(nnx.Any(nnx.LoRAParam, nnx.PathContains(train)))


class FlaxLoRA:
    """The model rewritten with nnx.LoRALinear for Linear, nnx.LoRA around every other layer."""

    title = "flax.nnx.LoRA"

    def fit(
        self,
        case,
        framework,
        base=None,
        method=None,
        rank=RANK,
        target=".*",
        exclude=None,
        rank_pattern=(),
        init=None,
        dtype=None,
        **options,
    ):
        if framework == "linen":
            not_offered("Linen")
        base = base or case.base(framework)
        model = nnx.clone(base.module)
        if init is not None:
            options["a_initializer"] = _initialiser(init, rank)
        sizes = {}
        for path, layer in list(nnx.iter_modules(model)):
            name = "/".join(map(str, path))
            weight = next((w for w in ("kernel", "embedding", "w") if hasattr(layer, w)), None)
            if weight is None or not re.fullmatch(target, name):
                continue
            if exclude is not None and re.fullmatch(exclude, name):
                continue
            sizes[name] = next((r for regex, r in rank_pattern if re.fullmatch(regex, name)), rank)
            new = _rewritten(layer, weight, sizes[name], dtype or jnp.float32, options)
            if not path:
                model = new
                continue
            parent = model
            for key in path[:-1]:
                parent = parent[key] if isinstance(key, int) else getattr(parent, key)
            if isinstance(path[-1], int):
                parent[path[-1]] = new
            else:
                setattr(parent, path[-1], new)
        host = NNX(model)
        found = host.values
        pairs, moved = {}, {}
        for path in base.values:
            module, _, leaf = path.rpartition("/")
            prefix = f"{module}/" if module else ""
            moved[path] = path if path in found else f"{prefix}base_module/{leaf}"
            for names in (
                (f"{prefix}lora/lora_a", f"{prefix}lora/lora_b"),
                (f"{prefix}lora_a", f"{prefix}lora_b"),
            ):
                if names[0] in found and leaf in ("kernel", "embedding", "w"):
                    pairs[path] = names
        return Fitted(case, base, host, pairs, locate=moved.__getitem__)

    def chosen(self, fitted, train):
        return fitted.host.select(nnx.Any(nnx.LoRAParam, nnx.PathContains(train)))


class ByHand:
    """No library: ``base.apply`` on W + s A B for hand-made A and B of every weight's 2-D view."""

    title = "merged by hand"

    def fit(
        self,
        case,
        framework,
        base=None,
        method=None,
        rank=RANK,
        alpha=ALPHA,
        target=".*",
        init="kaiming",
        dtype=jnp.float32,
    ):
        base = base or case.base(framework)
        pairs, factors = {}, {}
        for i, (path, weight) in enumerate(base.values.items()):
            if re.fullmatch(WEIGHT, path) and re.fullmatch(target, path.rpartition("/")[0]):
                key = jax.random.fold_in(jax.random.key(1), i)
                pairs[path] = (f"{path}:a", f"{path}:b")
                a_shape, b_shape = _matrix_shapes(case, weight.shape, rank)
                factors[pairs[path][0]] = _initialiser(init, rank)(key, a_shape, dtype)
                factors[pairs[path][1]] = jnp.zeros(b_shape, dtype)
        host = _Merging(case, base, factors, pairs, alpha / rank)
        return Fitted(case, base, host, pairs, lambda weight: alpha / rank, host.merged)

    def chosen(self, fitted, train):
        not_offered("a choice of what is trained")


@dataclasses.dataclass
class _Merging(Host):
    case: Case
    base: Host
    factors: dict[str, Any]
    pairs: dict[str, tuple[str, str]]
    scale: float

    @property
    def static(self):
        return self.base.static

    @property
    def values(self):
        return {**self.base.values, **self.factors}

    @property
    def names(self):
        return self.base.names

    def merged(self, values):
        out = {path: values[path] for path in self.base.values}
        for path, (a, b) in self.pairs.items():
            delta = self.scale * self.case.increment(out[path], values[a], values[b])
            out[path] = (out[path].astype(jnp.float32) + delta).astype(out[path].dtype)
        return out

    def call(self, static, values, *args, **kwargs):
        return self.base.call(static, self.merged(values), *args, **kwargs)


def _matrix_shapes(case, shape, rank):
    if case.delta is not None:
        return tuple(tuple(rank if n == -1 else n for n in side) for side in case.delta[:2])
    stack, rest = shape[: case.stack], shape[case.stack :]
    size_in = math.prod(rest[:-1])
    return (*stack, size_in, rank), (*stack, rank, rest[-1])


def _rewritten(layer, weight, rank, dtype, options):
    """The layer as its author would write it with flax.nnx.LoRA."""
    array = getattr(layer, weight)
    if isinstance(layer, nnx.Linear):
        use_bias = layer.bias is not None

        def create(rngs):
            return nnx.LoRALinear(
                layer.in_features,
                layer.out_features,
                lora_rank=rank,
                lora_param_dtype=dtype,
                # Otherwise float32 factors make the output of a bfloat16 layer float32.
                lora_dtype=layer.dtype or layer.param_dtype,
                dtype=layer.dtype,
                param_dtype=layer.param_dtype,
                use_bias=use_bias,
                rngs=rngs,
                **options,
            )

        stack = array.shape[:-2]
        new = nnx.vmap(create)(nnx.Rngs(1).fork(split=stack[0])) if stack else create(nnx.Rngs(1))
        new.kernel = layer.kernel
        if use_bias:
            new.bias = layer.bias
        return new
    if isinstance(layer, nnx.Embed):
        sizes = layer.num_embeddings, layer.features
    else:
        sizes = (getattr(layer, name, None) for name in ("in_features", "out_features"))
        sizes = tuple(size for size in sizes if size is not None) or array.shape
    size_in, size_out = math.prod(array.shape[:-1]), array.shape[-1]
    if len(sizes) == 2:
        size_in, size_out = (math.prod(n) if isinstance(n, tuple) else n for n in sizes)
    return nnx.LoRA(
        size_in,
        rank,
        size_out,
        base_module=layer,
        param_dtype=dtype,
        dtype=getattr(layer, "dtype", None) or array.dtype,
        rngs=nnx.Rngs(1),
        **options,
    )


INITIALISERS = {
    "kaiming": lambda rank: jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
    "normal": lambda rank: jax.nn.initializers.normal(0.02),
    "gaussian": lambda rank: jax.nn.initializers.normal(1 / rank),
    "orthogonal": lambda rank: jax.nn.initializers.orthogonal(),
}


def _initialiser(name, rank):
    if name not in INITIALISERS:
        not_offered(f"init {name}")
    return INITIALISERS[name](rank)


def _pairs(base, values, module_of):
    """Weights of the base with ``lora_a`` and ``lora_b`` beside them."""
    pairs = {}
    for path in base:
        prefix = f"{module_of(path)}/".removeprefix("/")
        names = (f"{prefix}lora_a", f"{prefix}lora_b")
        if names[0] in values and path.removeprefix(prefix) in ("kernel", "embedding", "w"):
            pairs[path] = names
    return pairs


def _qwix_training(module, key):
    module.set_attributes(qwix_rngs=nnx.Rngs(dropout=key))


LIBRARIES = {"ours": Ours(), "qwix": Qwix(), "flax": FlaxLoRA(), "hand": ByHand()}
