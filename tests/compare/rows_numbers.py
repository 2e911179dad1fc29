"""Rows of the table: numbers, and sharding."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from . import models as m
from .checks import (
    all_adapted,
    difference,
    equations,
    gradients,
    randomised,
    require,
    same_as_merged,
    same_at_initialisation,
)
from .libraries import RANK, Case
from .rows import Row

HALF = jnp.bfloat16
NET = Case(m.LinenNet, m.NNXNet, (m.X,))
EMBED = Case(lambda: nn.Embed(13, 8), lambda: nnx.Embed(13, 8, rngs=m.rngs()), (m.IDS,))
WIDE = Case(m.LinenWide, m.NNXWide, (jnp.ones((128, 128)),))
RATE = 0.5


def rows():
    def row(name, case, check):
        return Row("Numbers", name, case, check)

    conv = Case(
        lambda: nn.Conv(5, (3,), dtype=HALF),
        lambda: nnx.Conv(8, 5, (3,), dtype=HALF, rngs=m.rngs()),
        (m.X,),
    )

    def net(x=m.X, **fields):
        return Case(lambda: m.LinenNet(**fields), lambda: m.NNXNet(**fields), (x,))

    blocks = Case(m.LinenLooped, m.NNXLooped, (m.X,))
    half_base = net(m.X.astype(HALF), param_dtype=HALF)
    half_compute = net(dtype=HALF)
    return [
        row("initialisation: the base's output bit for bit", blocks, _at_initialisation),
        row("random factors: the merged model within 1e-5", blocks, _as_merged),
        row("bfloat16 base, float32 factors: output dtype and values", half_base, _half),
        row("bfloat16 base, bfloat16 factors: output dtype and values", half_base, _all_half),
        row("float32 base, bfloat16 compute: output dtype and values", half_compute, _half),
        row("float32 convolution, bfloat16 compute: output dtype and values", conv, _half),
        row("int8 leaves of the base pass through untouched", NET, _int8),
        row("dropout acts in training", NET, _dropout_in_training),
        row("dropout does not act at evaluation", NET, _dropout_at_evaluation),
        row("dropout spares integer inputs", EMBED, _dropout_on_integers),
        row("gradients reach the factors and chosen leaves", NET, _gradients),
        row("the backward pass forms no full weight gradient", WIDE, _no_full_gradient),
        row("flops within 3 % of the analytic count", WIDE, _flops),
        *_sharding(),
    ]


def _at_initialisation(case, library, framework):
    fitted = library.fit(case, framework)
    all_adapted(fitted)
    same_at_initialisation(fitted)


def _as_merged(case, library, framework):
    fitted = library.fit(case, framework)
    all_adapted(fitted)
    same_as_merged(fitted)


def _half(case, library, framework, dtype=jnp.float32):
    fitted = library.fit(case, framework, dtype=dtype)
    all_adapted(fitted)
    for path in fitted.factors:
        require(fitted.values[path].dtype == dtype, f"{fitted.values[path].dtype} factors")
    same_at_initialisation(fitted)
    # A few roundings to 8 bits of mantissa.
    same_as_merged(fitted, tolerance=4 * 2.0**-8)


def _all_half(case, library, framework):
    _half(case, library, framework, HALF)


def _int8(case, library, framework):
    """A quantised copy of a weight, which the model carries but does not multiply with."""
    base = case.base(framework)
    packed = jnp.arange(12, dtype=jnp.int8)
    if framework == "linen":
        params = base.variables["params"]
        base = type(base)(base.module, {"params": {**params, "packed": packed}})
    else:
        module = base.module
        module.packed = nnx.Param(packed)
        base = type(base)(module)
    fitted = library.fit(case, framework, base=base)
    all_adapted(fitted)
    found = fitted.values[fitted.locate("packed")]
    require(found.dtype == jnp.int8, f"the int8 leaf became {found.dtype}")
    require((found == packed).all(), "the int8 leaf changed")
    same_at_initialisation(fitted)
    if fitted.merge is not None:
        require(fitted.merge(fitted.values)["packed"].dtype == jnp.int8, "merge changed it")
    gradients(fitted, fitted.values, fitted.factors)


def _with_dropout(case, library, framework):
    fitted = library.fit(case, framework, dropout=RATE)
    return fitted, randomised(fitted)


def _dropout_in_training(case, library, framework):
    fitted, values = _with_dropout(case, library, framework)
    run = jax.jit(lambda key: fitted.host.run(values, *case.args, key=key))
    first, again, other = (run(jax.random.key(seed)) for seed in (0, 0, 1))
    require((first == again).all(), "the same key gives another output")
    require((first != other).any(), "another key gives the same output")
    # With B = 0 dropout must not be seen: it is on the way into A alone.
    quiet = fitted.host.run(fitted.values, *case.args, key=jax.random.key(0))
    base = fitted.base.run(fitted.base.values, *case.args)
    require(difference(quiet, base) < 1e-6, "dropout reaches the base's own input")


def _dropout_at_evaluation(case, library, framework):
    fitted, values = _with_dropout(case, library, framework)
    found = fitted.host.run(values, *case.args)
    expected = fitted.base.run(fitted.expected_values(values), *case.args)
    require(difference(found, expected) < 1e-5, "dropout acts without training")


def _dropout_on_integers(case, library, framework):
    fitted, values = _with_dropout(case, library, framework)
    all_adapted(fitted)
    found = fitted.host.run(values, *case.args, key=jax.random.key(0))
    expected = fitted.base.run(fitted.expected_values(values), *case.args)
    require(difference(found, expected) < 1e-5, "integers are dropped")


def _gradients(case, library, framework):
    fitted = library.fit(case, framework)
    all_adapted(fitted)
    chosen = [*fitted.factors, fitted.locate("head/bias")]
    grads = gradients(fitted, randomised(fitted), chosen)
    zero = [path for path, grad in grads.items() if not jnp.abs(grad).max() > 0]
    require(not zero, f"no gradient for {', '.join(zero)}")


def _no_full_gradient(case, library, framework):
    fitted = library.fit(case, framework)
    all_adapted(fitted)
    values, x = randomised(fitted), jnp.ones((4, 128))  # 4 rows: no activation is (128, 128)
    jaxpr = jax.make_jaxpr(lambda v: gradients(fitted, v, fitted.factors, x))(values).jaxpr
    dots = [e for e in equations(jaxpr) if e.primitive.name == "dot_general"]
    full = sum(e.outvars[0].aval.shape == (128, 128) for e in dots)
    require(len(dots) > m.LAYERS, "no products found")
    require(not full, f"{full} products of the size of a weight")


def _flops(case, library, framework):
    fitted = library.fit(case, framework)
    all_adapted(fitted)
    values = randomised(fitted)
    run = jax.jit(lambda v: gradients(fitted, v, fitted.factors))
    cost = run.lower(values).compile().cost_analysis()
    cost = cost[0] if isinstance(cost, list) else cost
    tokens, width = case.args[0].shape
    base = 2 * tokens * width * width
    low = 2 * tokens * width * RANK  # one of the two thin products
    # Forward: the base's product and two thin ones. Backward: the gradients of A and B and of x A;
    # and, save for the first layer, of x through both ways.
    analytic = m.LAYERS * (base + 2 * low) + m.LAYERS * 3 * low + (m.LAYERS - 1) * (base + low)
    ratio = cost["flops"] / analytic
    require(abs(ratio - 1) <= 0.03, f"{ratio:.2f} times the analytic count")


# Sharding


def _sharding():
    def row(name, case, check=_names):
        return Row("Sharding", name, case, check)

    def boxed(box):
        init = box(nn.initializers.lecun_normal(), ("rows", "columns"))
        return lambda: nn.Dense(6, kernel_init=init)

    def named():
        init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("rows", "columns"))
        return nnx.Linear(8, 6, kernel_init=init, rngs=m.rngs())

    partitioned = Case(boxed(nn.with_partitioning), _on_mesh(named), (m.X,))
    logical = Case(boxed(nn.with_logical_partitioning), None, (m.X,))
    return [
        row("nn.with_partitioning / NNX metadata: factors inherit the names", partitioned),
        row("logical names: factors inherit them", logical),
        row("a 2 x 2 mesh keeps every placement", partitioned, _placements),
    ]


@functools.cache
def mesh():
    return jax.make_mesh((2, 2), ("rows", "columns"), (AxisType.Auto,) * 2)


def _on_mesh(create):
    """NNX wants to know the mesh of the names where parameters are made."""

    def on_mesh():
        with jax.set_mesh(mesh()):
            return create()

    return on_mesh


def _specs(names, values):
    return {
        path: tuple(names.get(path, ())) + (None,) * (value.ndim - len(names.get(path, ())))
        for path, value in values.items()
    }


def _fitted_on_mesh(case, library, framework):
    with jax.set_mesh(mesh()):
        fitted = library.fit(case, framework)
    all_adapted(fitted)
    return fitted


def _names(case, library, framework):
    fitted = _fitted_on_mesh(case, library, framework)
    specs = _specs(fitted.host.names, fitted.values)
    found = [specs[path] for path in fitted.factors]
    require(found == [("rows", None), (None, "columns")], f"names {found[0]} and {found[1]}")
    kernel = specs[fitted.locate("kernel")]
    require(kernel == ("rows", "columns"), f"the kernel's names became {kernel}")


def _placements(case, library, framework):
    """Placed as the names say, by hand where the library gives the factors none."""
    fitted = _fitted_on_mesh(case, library, framework)
    values = randomised(fitted)
    specs = dict(zip(fitted.factors, [("rows", None), (None, "columns")], strict=True))
    specs[fitted.locate("kernel")] = ("rows", "columns")
    where = {path: NamedSharding(mesh(), PartitionSpec(*specs.get(path, ()))) for path in values}
    placed = {path: jax.device_put(value, where[path]) for path, value in values.items()}

    @jax.jit
    def step(values):
        chosen = {path: values[path] for path in fitted.factors}

        def loss(chosen):
            return jnp.sum(jnp.square(fitted.host.run({**values, **chosen}, *case.args)))

        grads = jax.grad(loss)(chosen)
        return {**values, **{path: chosen[path] - 0.01 * grads[path] for path in chosen}}

    stepped, plain = step(placed), step(values)
    for path, value in stepped.items():
        require(value.sharding.is_equivalent_to(where[path], value.ndim), f"{path} moved")
        close = np.allclose(value, plain[path], atol=1e-5)
        require(close, f"{path} differs from one device's")
    if fitted.merge is not None:
        merged = fitted.merge(stepped)["kernel"]
        expected = fitted.expected_values(plain)["kernel"]
        require(difference(merged, expected) < 1e-5, "the merge differs from one device's")
