"""``execution="merged"``: layers on W + s A B, with thin gradients for A and B."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fixtures.adapted import Block, Looped, Scanned, X, prepared, with_random_factors
from flax import nnx
from jax.sharding import PartitionSpec as P
from marks import slow, slow_but

from rmlora_jax import AdaLoRA, LoRA, adapt, attach, join, merge, split
from rmlora_jax.errors import UserError
from rmlora_jax.methods import description
from rmlora_jax.sweep.grid import check_config

VmapDense = nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True})
HEADED = {"alpha": 6, "train": "head"}


class Headed(nn.Module):
    """Layers of every kind of structure, and a head that is trained in full."""

    block: type[nn.Module] = Block
    scanned: bool = True
    dtype: jnp.dtype = None

    @nn.compact
    def __call__(self, x):
        body = Scanned if self.scanned else Looped
        x = body(self.block, self.dtype, name="body")(x)
        x = nn.DenseGeneral((2, 4), batch_dims=(0,), dtype=self.dtype, name="general")(x)
        x = nn.Einsum((4, 2, 5), "btnh,hnd->btd", dtype=self.dtype, name="einsum")(x)
        return nn.Dense(3, dtype=self.dtype, name="head")(x)


def both(model, x=X, dtype=jnp.float32, kind=LoRA, **fields):
    """The factored and the merging model and their parameters, with factors that are not 0."""
    fields = HEADED | fields
    lora = kind(2, **fields)
    factored, _, params = prepared(model, x, lora, dtype)
    merging = adapt(model, kind(2, execution="merged", **fields))
    return factored, merging, with_random_factors(params, lora), lora


def gradients(model, params, lora, x=X):
    """Of what is trained, and of the input."""
    trainable, frozen = split(params, lora)

    def loss(trainable, frozen, x):
        y = model.apply({"params": join(trainable, frozen)}, x)
        return jnp.sum(jnp.sin(3 * y.astype(jnp.float32)))

    return jax.jit(jax.grad(loss, (0, 2)))(trainable, frozen, x)


def assert_close(found, expected, tolerance):
    """Each leaf within ``tolerance`` of the largest entry of the whole tree."""
    top = max(np.abs(v).max() for v in jax.tree.leaves(expected))
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for f, e in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert f.dtype == e.dtype
        np.testing.assert_allclose(
            np.asarray(f, np.float32), np.asarray(e, np.float32), rtol=0, atol=tolerance * top
        )


MODELS = {
    "scan of remat": Headed(nn.remat(Block)),
    "loop": Headed(scanned=False),
    "loop of jit": Headed(nn.jit(Block), scanned=False),
    "vmap": nn.Sequential([VmapDense(8), nn.Dense(3, name="head")]),
    "middle axis": nn.DenseGeneral((2, 3), axis=1, name="head"),
}


@pytest.mark.parametrize("name", slow_but(list(MODELS), "scan of remat"))
def test_gradients_are_those_of_the_factored_products(name):
    factored, merging, params, lora = both(MODELS[name], train=None)
    expected = gradients(factored, params, lora)
    assert_close(gradients(merging, params, lora), expected, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", [(), ((".*fc1", 30.0), ("einsum", 1.0))])
def test_gradients_of_diagonals_patterns_and_of_the_head(pattern):
    factored, merging, params, lora = both(Headed(), kind=AdaLoRA, alpha_pattern=pattern)
    expected = gradients(factored, params, lora)
    assert "kernel" in expected[0]["head"] and "lora_e" in expected[0]["body"]["layers"]["fc1"]
    assert_close(gradients(merging, params, lora), expected, 1e-5)


def test_gradients_with_respect_to_the_weights_too():
    factored, merging, params, _ = both(Headed())
    found, expected = (
        jax.jit(jax.grad(lambda p, m=m: jnp.sum(m.apply({"params": p}, X) ** 2)))(params)
        for m in (merging, factored)
    )
    assert_close(found, expected, 1e-5)


class Stack(nn.Module):
    dtype: jnp.dtype = None

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(16, dtype=self.dtype, name="first")(x))
        x = nn.tanh(nn.Dense(12, dtype=self.dtype, name="second")(x))
        return nn.Dense(5, dtype=self.dtype, name="head")(x)


def by_hand(params, x):
    """Loss sum(y^2 / 2) of ``Stack`` and its gradients, in float64."""
    p = jax.tree.map(lambda v: np.asarray(v, np.float64), params)
    inputs = [np.asarray(x, np.float64)]
    for name in ("first", "second", "head"):
        w, a, b = (p[name][k] for k in ("kernel", "lora_a", "lora_b"))
        y = inputs[-1] @ w + 3 * (inputs[-1] @ a) @ b + p[name]["bias"]
        inputs.append(y if name == "head" else np.tanh(y))
    g, grads = inputs[-1], {}
    for name, x in zip(("head", "second", "first"), inputs[-2::-1], strict=True):
        w, a, b = (p[name][k] for k in ("kernel", "lora_a", "lora_b"))
        grads[name] = {"lora_a": 3 * x.T @ (g @ b.T), "lora_b": 3 * (x @ a).T @ g}
        if name == "head":
            grads[name] |= {"kernel": x.T @ g, "bias": g.sum(0)}
        g = g @ (w + 3 * a @ b).T
        g = g * (1 - x**2) if name != "first" else g
    return inputs[-1], grads, g


def stack_gradients(model, params, lora, x):
    trainable, frozen = split(params, lora)

    def loss(trainable, x):
        y = model.apply({"params": join(trainable, frozen)}, x).astype(jnp.float32)
        return jnp.sum(y**2) / 2, y

    (_, y), (grads, dx) = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(trainable, x)
    return y, grads, dx


def test_gradients_are_the_formula_in_float64():
    x = X.reshape(-1, 8)
    _, merging, params, lora = both(Stack(), x)
    found, expected = stack_gradients(merging, params, lora, x), by_hand(params, x)
    expected = jax.tree.map(lambda v: v.astype(np.float32), expected)
    for f, e in zip(found, expected, strict=True):
        assert_close(f, e, 1e-6)


@pytest.mark.parametrize("base", [slow(jnp.float32), jnp.bfloat16])
def test_bfloat16_gradients_are_within_rounding(base):
    """The same parameters in float64 are the truth: both ways miss it by a few roundings of
    2^-9 relative to the largest entry, and merged no more than twice as much as factored."""
    x = jnp.asarray(np.random.default_rng(1).normal(size=(256, 8)), jnp.float32)
    lora = LoRA(2, **HEADED)
    factored, _, params = prepared(Stack(jnp.bfloat16), x, lora, base)
    params = with_random_factors(params, lora)
    merging = adapt(Stack(jnp.bfloat16), LoRA(2, execution="merged", **HEADED))
    truth = by_hand(params, x)

    def error(model):
        found = stack_gradients(model, params, lora, x)
        pairs = zip(jax.tree.leaves(found), jax.tree.leaves(truth), strict=True)
        assert found[1]["first"]["lora_a"].dtype == jnp.float32
        return max(np.abs(np.asarray(f, np.float64) - t).max() / np.abs(t).max() for f, t in pairs)

    assert error(merging) < 8 * 2**-9
    assert error(merging) < 2 * error(factored)


def test_factor_gradients_are_summed_and_kept_in_float32():
    """1 + 3 / 512, of which bfloat16 makes 1 + 4 / 512."""
    model = adapt(nn.Dense(1, use_bias=False, dtype=jnp.bfloat16), LoRA(1, execution="merged"))
    x = jnp.array([[1.0]] + [[2.0**-9]] * 3)
    params = {"kernel": jnp.ones((1, 1)), "lora_a": jnp.ones((1, 1)), "lora_b": jnp.ones((1, 1))}
    grads = jax.grad(lambda p: model.apply({"params": p}, x).astype(jnp.float32).sum())(params)
    assert grads["lora_a"].item() == grads["lora_b"].item() == 1 + 3 * 2**-9
    beside = adapt(nn.Dense(1, use_bias=False, dtype=jnp.bfloat16), LoRA(1))
    grads = jax.grad(lambda p: beside.apply({"params": p}, x).astype(jnp.float32).sum())(params)
    assert grads["lora_a"].item() == 1 + 2**-7  # the test can tell


# What is computed


def dots(jaxpr, times=1):
    """(shape of the result, flops, times it runs) of each matrix product that is needed."""
    for eqn in jaxpr.eqns:
        inner = times * eqn.params["length"] if eqn.primitive.name == "scan" else times
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            out, left = eqn.outvars[0].aval.shape, eqn.invars[0].aval.shape
            yield out, 2 * math.prod(out) * math.prod(left[i] for i in contracted), times
        for value in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")
        ):
            value = getattr(value, "jaxpr", value)
            if hasattr(value, "eqns"):
                yield from dots(value, inner)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return x + nn.Dense(64, name="down")(nn.gelu(nn.Dense(256, name="up")(x))), None


class Deep(nn.Module):
    scanned: bool
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        layer = nn.remat(Layer) if self.remat else Layer
        if self.scanned:
            scan = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": 3}
            return nn.scan(layer, **scan)(name="layers")(x, None)[0]
        for i in range(3):
            x, _ = layer(name=f"layers_{i}")(x)
        return x


class DeepNNX(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.List([nnx.Linear(64, 256, rngs=rngs) for _ in range(3)])
        self.down = nnx.List([nnx.Linear(256, 64, rngs=rngs) for _ in range(3)])

    def __call__(self, x):
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(nnx.gelu(up(x)))
        return x


def program(kind, execution, tokens):
    """A function (trainable, frozen, x) -> y, and its arguments."""
    lora, x = LoRA(4, execution=execution), jnp.ones((tokens, 64))
    if kind == "NNX":
        model = adapt(DeepNNX(nnx.Rngs(0)), lora, rngs=nnx.Rngs(1))
        graph, trainable, frozen = nnx.split(model, lora.trainable, ...)
        return lambda t, f, x: nnx.merge(graph, t, f)(x), (trainable, frozen, x)
    model, _, params = prepared(Deep(kind != "unrolled", kind == "remat"), x, lora)
    return lambda t, f, x: model.apply({"params": join(t, f)}, x), (*split(params, lora), x)


@pytest.mark.parametrize("kind", [slow("scanned"), slow("unrolled"), "remat", "NNX"])
def test_only_the_merge_is_as_large_as_a_weight(kind):
    run, arguments = program(kind, "merged", 512)
    gradient = jax.make_jaxpr(jax.grad(lambda *a: run(*a).sum()))(*arguments).jaxpr
    weights = {(64, 256), (256, 64)}
    large = [(flops, times) for shape, flops, times in dots(gradient) if shape in weights]
    assert {flops for flops, _ in large} == {2 * 64 * 256 * 4}  # A B, summed over the rank alone
    # Under remat the backward pass merges once more.
    assert sum(times for _, times in large) == (12 if kind == "remat" else 6)

    run, arguments = program(kind, "factored", 512)
    gradient = jax.make_jaxpr(jax.grad(lambda *a: run(*a).sum()))(*arguments).jaxpr
    assert not any(shape in weights for shape, *_ in dots(gradient))


@pytest.mark.parametrize("kind", ["unrolled", "NNX"])
def test_flops_are_those_of_a_frozen_model_and_thin_products(kind):
    tokens, rank, weight = 4096, 4, 64 * 256
    run, arguments = program(kind, "merged", tokens)
    gradient = jax.jit(jax.grad(lambda *a: (run(*a) ** 2).sum()))
    flops = gradient.lower(*arguments).compile().cost_analysis()["flops"]
    layers = 6
    forward, backward = 2 * tokens * weight * layers, 2 * tokens * weight * (layers - 1)
    thin = 4 * 2 * tokens * rank * (64 + 256) / 2 * layers  # x A, x^T dz; g B^T, z^T g
    merging = 2 * weight * rank * layers
    # Not products: gelu and its derivative, sums, squares.
    other = elementwise(tokens)
    assert abs((flops - other) / (forward + backward + thin + merging) - 1) < 0.03


def elementwise(tokens):
    """Flops of the activations of ``Deep``, measured: forward and backward without layers."""

    def run(x, wide):
        for _ in range(3):
            x = x + wide[:, :64] * nn.gelu(wide)[:, :64]
        return (x**2).sum()

    wide = jax.jit(lambda v: jax.vjp(nn.gelu, v)[1](v))
    return 3 * wide.lower(jnp.ones((tokens, 256))).compile().cost_analysis()["flops"]


# Where it runs


@pytest.mark.slow
def test_vmap_over_adapters_and_over_examples():
    factored, merging, params, lora = both(Headed())
    frozen = split(params, lora)[1]
    several = [split(with_random_factors(params, lora, seed), lora)[0] for seed in range(3)]
    stacked = jax.tree.map(lambda *v: jnp.stack(v), *several)
    x = jnp.stack([X, X + 1, X - 1])

    def one(trainable, x):
        return gradients_of(merging, trainable, frozen, x)

    found = jax.jit(jax.vmap(one))(stacked, x)
    expected = [gradients_of(factored, t, frozen, x) for t, x in zip(several, x, strict=True)]
    assert_close(found, jax.tree.map(lambda *v: jnp.stack(v), *expected), 1e-5)
    found = jax.jit(jax.vmap(one, in_axes=(None, 0)))(several[0], x)
    expected = [gradients_of(factored, several[0], frozen, x) for x in x]
    assert_close(found, jax.tree.map(lambda *v: jnp.stack(v), *expected), 1e-5)


def gradients_of(model, trainable, frozen, x):
    run = lambda t: jnp.sum(model.apply({"params": join(t, frozen)}, x) ** 2)  # noqa: E731
    return jax.grad(run)(trainable)


@pytest.mark.parametrize(
    "how", ["checked shard_map", slow("sharded weights"), slow("shard_map"), slow("pmap")]
)
def test_eight_devices_give_the_gradients_of_one(how):
    x = jnp.asarray(np.random.default_rng(1).normal(size=(16, 6, 8)), jnp.float32)
    factored, merging, params, lora = both(Scanned(), train=None)
    trainable, frozen = split(params, lora)
    expected = gradients_of(factored, trainable, frozen, x)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def step(trainable, frozen, x):
        grads = gradients_of(merging, trainable, frozen, x)
        return grads if how == "checked shard_map" else jax.lax.psum(grads, "data")

    if how == "pmap":
        run = jax.pmap(step, "data", in_axes=(None, None, 0))
        found = jax.tree.map(lambda v: v[3], run(trainable, frozen, x.reshape(8, 2, 6, 8)))
    elif how == "sharded weights":
        place = lambda v, spec: jax.device_put(v, jax.sharding.NamedSharding(mesh, spec))  # noqa: E731
        wide = lambda v: v.ndim == 3 and v.shape[1] % 8 == 0  # noqa: E731
        frozen = jax.tree.map(lambda v: place(v, P(None, "data") if wide(v) else P()), frozen)
        run = jax.jit(functools.partial(gradients_of, merging))
        found = run(place(trainable, P()), frozen, place(x, P("data")))
    else:
        specs = {"in_specs": (P(), P(), P("data")), "out_specs": P()}
        specs["check_vma"] = how == "checked shard_map"
        found = jax.jit(jax.shard_map(step, mesh=mesh, **specs))(trainable, frozen, x)
    assert_close(found, expected, 1e-5)


@pytest.mark.parametrize("dtype", [slow(None), jnp.bfloat16])
def test_the_output_at_initialisation_is_the_base_bit_for_bit(dtype):
    model = Headed(nn.remat(Block), dtype=dtype)
    _, base, params = prepared(model, X, LoRA(2, **HEADED))
    merging = adapt(model, LoRA(2, execution="merged", **HEADED))
    expected = jax.jit(model.apply)({"params": base}, X)
    found = jax.jit(merging.apply)({"params": params}, X)
    assert found.dtype == expected.dtype
    assert np.array_equal(np.asarray(found, np.float32), np.asarray(expected, np.float32))


def test_the_weight_is_rounded_once_to_the_dtype_of_the_computation():
    """A bfloat16 base that computes in float32 keeps updates that bfloat16 could not hold."""
    model = adapt(nn.Dense(1, use_bias=False, dtype=jnp.float32), LoRA(1, execution="merged"))
    params = {"kernel": jnp.ones((1, 1), jnp.bfloat16), "lora_a": jnp.full((1, 1), 2.0**-12)}
    params["lora_b"] = jnp.ones((1, 1))
    assert model.apply({"params": params}, jnp.ones((1, 1))).item() == 1 + 2**-12
    layer = nnx.Linear(1, 1, use_bias=False, dtype=jnp.float32, param_dtype=jnp.bfloat16,
                       rngs=nnx.Rngs(0))  # fmt: skip
    layer.kernel[...] = jnp.ones((1, 1), jnp.bfloat16)
    layer = adapt(layer, LoRA(1, execution="merged"), rngs=nnx.Rngs(0))
    layer.lora_a[...], layer.lora_b[...] = params["lora_a"], params["lora_b"]
    assert layer(jnp.ones((1, 1))).item() == 1 + 2**-12


def test_active_dropout_runs_factored():
    factored, merging, params, _ = both(Headed(), dropout=0.5)
    rngs = {"dropout": jax.random.key(0)}

    def text(model, **kwargs):
        return str(jax.make_jaxpr(lambda p: model.apply({"params": p}, X, **kwargs))(params))

    assert text(merging, rngs=rngs) == text(factored, rngs=rngs)
    assert text(merging) != text(factored)


def test_active_dropout_runs_factored_in_nnx():
    def output(execution, train):
        lora = LoRA(2, dropout=0.5, execution=execution)
        model = adapt(nnx.Linear(8, 5, rngs=nnx.Rngs(0)), lora, rngs=nnx.Rngs(1))
        model.lora_b[...] = jnp.ones((2, 5)) / 3
        model.train() if train else model.eval()
        return np.asarray(model(X))

    assert np.array_equal(output("merged", True), output("factored", True))
    assert not np.array_equal(output("merged", False), output("factored", False))  # not bitwise
    np.testing.assert_allclose(output("merged", False), output("factored", False), atol=1e-5)


class Mixed(nn.Module):
    """State, random numbers and collected values before a layer that can only be merged before."""

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=False)(x)
        x = nn.Dropout(0.5, deterministic=False)(nn.Dense(8, name="first")(x))
        self.sow("intermediates", "x", x)
        return nn.Dropout(0.5, deterministic=False)(nn.WeightNorm(nn.Dense(8))(x))


@pytest.mark.parametrize("pattern", [(), (("first", 9.0),)])
def test_falling_back_to_merged_parameters_leaves_no_trace(pattern):
    lora = LoRA(2, 6, execution="merged", alpha_pattern=pattern)
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    merging = adapt(Mixed(), lora)
    variables = merging.init(rngs, X)
    params, stats = variables["params"], {"batch_stats": variables["batch_stats"]}
    params = with_random_factors(params, lora)
    run = {"rngs": {"dropout": jax.random.key(2)}, "mutable": ["batch_stats", "intermediates"]}
    for _ in range(2):
        found = merging.apply({"params": params} | stats, X, **run)
        expected = Mixed().apply({"params": merge(params, lora)} | stats, X, **run)
        assert_close(found, expected, 1e-5)


# Training


def trained(execution, dtype, steps=200):
    """Accuracy on held-out digits of three dense layers whose base was trained on the first five
    classes alone."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, labels = jnp.asarray(digits.data / 16, jnp.float32), jnp.asarray(digits.target)

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.gelu(nn.Dense(64, dtype=dtype, name="first")(x))
            x = nn.gelu(nn.Dense(64, dtype=dtype, name="second")(x))
            return nn.Dense(10, dtype=dtype, name="head")(x).astype(jnp.float32)

    lora = LoRA(4, 16, target="first|second", train="head", execution=execution)
    model, tx = adapt(Net(), lora), optax.adamw(3e-3)
    base = Net().init(jax.random.key(0), x[:1])["params"]
    params = attach(jax.random.key(1), model, base, x[:1])
    trainable, frozen = split(params, lora)

    def loss(trainable, x, labels):
        logits = model.apply({"params": join(trainable, frozen)}, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def step(state, i):
        trainable, opt = state
        at = jax.random.randint(jax.random.fold_in(jax.random.key(2), i), (64,), 0, 1400)
        value, grads = jax.value_and_grad(loss)(trainable, x[at], labels[at])
        updates, opt = tx.update(grads, opt, trainable)
        return (optax.apply_updates(trainable, updates), opt), value

    start = trainable, tx.init(trainable)
    (trainable, _), losses = jax.jit(lambda s: jax.lax.scan(step, s, jnp.arange(steps)))(start)
    logits = model.apply({"params": join(trainable, frozen)}, x[1400:])
    return (logits.argmax(-1) == labels[1400:]).mean().item(), np.asarray(losses)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_two_hundred_steps_end_where_the_factored_ones_do(dtype):
    (factored, losses), (merged, others) = (trained(e, dtype) for e in ("factored", "merged"))
    assert factored > 0.8 and abs(merged - factored) < (0.002 if dtype is None else 0.015)
    tolerance = 1e-3 if dtype is None else 0.05
    np.testing.assert_allclose(others[-20:].mean(), losses[-20:].mean(), rtol=tolerance)


def test_the_trainer_takes_it_from_its_config(config):
    for execution in ("auto", "merged"):
        config.lora.execution = execution
        assert description(check_config(config)).execution == execution
    config.lora.execution = "merge"
    with pytest.raises(UserError, match=r"config\.lora\.execution='merge'.*mean merged"):
        check_config(config)
