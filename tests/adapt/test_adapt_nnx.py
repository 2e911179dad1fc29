"""``adapt`` for NNX: copies, initial values, dropout, adapters, traces and pickles."""

import copy
import pickle
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fixtures.adapted_nnx import Looped, Stacked, Tied, X, arrays, call, randomly_adapted
from flax import nnx

from rmlora_jax.adapt import adapt
from rmlora_jax.adapt.forms import initial_a
from rmlora_jax.adapt.lora import LoRA
from rmlora_jax.adapt.nnx import pure_params
from rmlora_jax.adapt.tree import merge


class Net(nnx.Module):
    """BatchNorm and Dropout of its own, layers in a dict and in a list, one of them shared."""

    def __init__(self, rngs):
        first = nnx.Linear(8, 8, rngs=rngs)
        self.parts = nnx.Dict(first=first, second=nnx.Linear(8, 8, rngs=rngs))
        self.again = nnx.List([first])
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        for layer in (self.parts.first, self.parts.second, *self.again):
            x = jnp.tanh(layer(x))
        return self.head(self.dropout(self.norm(x)))


def linear(rngs=0):
    return nnx.Linear(8, 8, rngs=nnx.Rngs(rngs))


# The copy


def test_editing_the_result_never_edits_the_argument():
    base, lora = Net(nnx.Rngs(0)), LoRA(2)
    before = arrays(base)
    adapted = adapt(base, lora, rngs=nnx.Rngs(1))
    assert type(adapted) is Net and type(base.head) is nnx.Linear
    assert isinstance(adapted.head, nnx.Linear) and adapted.head is not base.head
    assert adapted.again[0] is adapted.parts.first  # what was shared stays shared
    state = nnx.state(adapted)
    nnx.update(adapted, jax.tree.map(lambda v: v, state))
    for variable in jax.tree.leaves(state, is_leaf=lambda v: isinstance(v, nnx.Variable)):
        if jnp.issubdtype(variable.dtype, jnp.floating):
            variable[...] = variable[...] + 1
    nnx.update(adapted, state)
    for path, value in arrays(base).items():
        assert value is before[path], path
    adapted.head.kernel[...] = 0 * adapted.head.kernel[...]
    assert base.head.kernel[...] is before["head/kernel"]


def test_random_streams_and_statistics_advance_apart():
    base = Net(nnx.Rngs(0))
    adapted = adapt(base, LoRA(2), rngs=nnx.Rngs(1))
    kept = copy.deepcopy(base)
    outputs = [adapted(X), adapted(X)]
    assert np.any(outputs[0] != outputs[1])
    assert base.dropout.rngs.count[...] == 0 and np.all(base.norm.mean[...] == 0)
    assert np.any(adapted.norm.mean[...] != 0)
    np.testing.assert_array_equal(call(kept, X), call(base, X))
    np.testing.assert_array_equal(kept.norm.mean[...], base.norm.mean[...])


def test_without_target_nothing_is_adapted_and_no_random_numbers_are_needed():
    lora = LoRA(2, target=None, train="head")
    adapted = adapt(Net(nnx.Rngs(0)), lora)
    assert not arrays(adapted, nnx.LoRAParam)
    assert type(adapted.head) is nnx.Linear
    merged = merge(adapted, lora)
    assert arrays(merged).keys() == arrays(adapted).keys()


def test_methods_and_fields_of_the_model_stay():
    adapted = randomly_adapted(Tied(rngs=nnx.Rngs(0)))
    assert adapted.table.num_embeddings == 13
    table = pure_params(adapted)["table"]
    full = table["embedding"] + 3 * table["lora_a"] @ table["lora_b"]
    np.testing.assert_allclose(adapted.table.attend(X), X @ full.T, atol=1e-4)


def test_pure_params_reads_modules_and_states():
    adapted = adapt(Net(nnx.Rngs(0)), LoRA(2, target="head"), rngs=nnx.Rngs(1))
    tree = pure_params(adapted)
    assert set(tree) == {"again", "norm", "head", "parts"}  # no streams
    assert set(tree["norm"]) == {"scale", "bias"}  # no statistics
    assert set(tree["parts"]) == {"second"}  # the shared layer once, by its first path
    assert set(tree["head"]) == {"kernel", "bias", "lora_a", "lora_b"}
    assert tree["head"]["kernel"] is adapted.head.kernel[...]
    state = nnx.state(adapted)
    assert jax.tree.structure(pure_params(state)) == jax.tree.structure(tree)
    assert jax.tree.structure(pure_params(nnx.as_pure(nnx.state(adapted, nnx.Param)))) == (
        jax.tree.structure(tree)
    )
    layers = pure_params(adapt(Looped(rngs=nnx.Rngs(0)), LoRA(2), rngs=nnx.Rngs(1)))
    assert set(layers["blocks"]) == {"0", "1"}


# Initial values


@pytest.mark.parametrize("init", ["kaiming", "normal", "gaussian", "orthogonal"])
def test_a_is_drawn_from_the_path_alone(init):
    lora = LoRA(2, init=init)
    rngs = nnx.Rngs(1)
    adapted = adapt(Net(nnx.Rngs(0)), lora, rngs=rngs)
    alone = adapt(Net(nnx.Rngs(0)), LoRA(2, target="head", init=init), rngs=nnx.Rngs(1))
    found = adapted.head.lora_a[...]
    np.testing.assert_array_equal(found, alone.head.lora_a[...])
    key = jax.random.fold_in(nnx.Rngs(1).params(), zlib.crc32(b"head"))
    expected = initial_a(key, (8, 2), init, jnp.float32)
    np.testing.assert_array_equal(found, expected)
    assert np.all(adapted.head.lora_b[...] == 0)
    assert np.any(adapted.parts.first.lora_a[...] != adapted.parts.second.lora_a[...])
    assert rngs.default.count[...] == 1  # one draw, whatever the number of layers


def test_factors_have_the_dtype_of_the_description():
    adapted = adapt(linear(), LoRA(2, dtype=jnp.bfloat16), rngs=nnx.Rngs(1))
    assert adapted.lora_a.dtype == adapted.lora_b.dtype == jnp.bfloat16
    assert adapted(X).dtype == jnp.float32


@pytest.mark.parametrize("build", [lambda: Net(nnx.Rngs(0)), lambda: Stacked(rngs=nnx.Rngs(0))])
def test_pissa_corrects_the_base_of_the_result_only(build):
    base = build()
    base.eval()
    before, lora = arrays(base), LoRA(2, 6, init="pissa", exclude=("head",))
    lora = lora if hasattr(base, "head") else LoRA(2, 6, init="pissa")
    adapted = adapt(base, lora, rngs=nnx.Rngs(1))
    expected = call(base, X)
    np.testing.assert_allclose(call(adapted, X), expected, atol=1e-5)
    path = "parts/second/kernel" if hasattr(base, "head") else "blocks/fc1/kernel"
    after = arrays(adapted)
    assert np.abs(after[path] - before[path]).max() > 0.01
    spectrum = np.linalg.svd(np.asarray(before[path]), compute_uv=False)
    left = np.linalg.svd(np.asarray(after[path]), compute_uv=False)
    np.testing.assert_allclose(left[..., :-2], spectrum[..., 2:], atol=1e-5)
    module = path.rpartition("/")[0]
    for name in ("lora_a", "lora_b"):  # each holds the root of the singular values
        found = np.linalg.svd(np.asarray(after[f"{module}/{name}"]), compute_uv=False)
        np.testing.assert_allclose(3 * found**2, spectrum[..., :2], rtol=1e-4)
    np.testing.assert_allclose(call(merge(adapted, lora), X), expected, atol=1e-5)


# Dropout


def identity(rate, **fields):
    """A layer whose whole output is the adapter's: x after dropout."""
    lora = LoRA(8, dropout=rate, **fields)
    adapted = adapt(nnx.Linear(8, 8, use_bias=False, rngs=nnx.Rngs(0)), lora, rngs=nnx.Rngs(1))
    adapted.kernel[...] = jnp.zeros((8, 8))
    adapted.lora_a[...] = adapted.lora_b[...] = jnp.eye(8)
    return adapted


@pytest.mark.parametrize("execution", ["factored", "merged"])
def test_dropout_scales_what_it_keeps_and_follows_train_and_eval(execution):
    adapted = identity(0.25, execution=execution)
    x = jnp.ones((200, 100, 8))
    adapted.train()
    y, again = np.asarray(call(adapted, x)), np.asarray(call(adapted, x))
    assert set(np.unique(y)) == {np.float32(0), np.float32(1 / 0.75)}
    assert abs((y == 0).mean() - 0.25) < 0.005  # 160,000 draws: 4.6 standard deviations
    assert np.any(y != again)
    view = nnx.view(adapted, deterministic=True)
    np.testing.assert_array_equal(view(x), x)
    adapted.eval()
    np.testing.assert_array_equal(call(adapted, x), x)


def test_dropout_never_touches_the_base_or_integers():
    adapted = adapt(linear(), LoRA(2, dropout=0.5), rngs=nnx.Rngs(1))
    np.testing.assert_array_equal(adapted(X), linear()(X))  # B is 0
    embed = randomly_adapted(Tied(rngs=nnx.Rngs(0)), dropout=0.5)
    ids = jnp.arange(13)
    outputs = [embed.table(ids), embed.table(ids), embed.table.attend(X), embed.table.attend(X)]
    np.testing.assert_array_equal(outputs[0], outputs[1])
    np.testing.assert_array_equal(outputs[2], outputs[3])


def test_dropout_has_a_stream_of_its_own_for_each_layer():
    lora = LoRA(2, dropout=0.5)
    adapted = adapt(Net(nnx.Rngs(0)), lora, rngs=nnx.Rngs(params=1, dropout=2))
    other = adapt(Net(nnx.Rngs(0)), lora, rngs=nnx.Rngs(params=1, dropout=3))
    np.testing.assert_array_equal(adapted.head.lora_a[...], other.head.lora_a[...])
    keys = [
        jax.random.key_data(model.parts[name].lora_dropout.rngs.key[...]).tolist()
        for model in (adapted, other)
        for name in ("first", "second")
    ]
    assert len({tuple(key) for key in keys}) == 4
    adapted(X)
    assert adapted.parts.first.lora_dropout.rngs.count[...] == 2  # it was called twice
    with pytest.raises(AttributeError, match="'dropout'"):
        adapt(Net(nnx.Rngs(0)), lora, rngs=nnx.Rngs(params=1))


# Several adapters on one base


def test_adapters_switch_without_a_retrace_and_the_base_stays():
    base = Net(nnx.Rngs(0))
    base.eval()
    lora, traces = LoRA(2, 6), []
    model = adapt(base, lora, rngs=nnx.Rngs(1))

    @nnx.jit
    def run(model, x):
        traces.append(1)
        return model(x)

    adapters = {n: nnx.state(randomly_adapted(base, lora), lora.trainable) for n in ("en", "de")}
    adapters["de"] = jax.tree.map(lambda v: 2 * v, adapters["de"])
    expected = call(base, X)
    np.testing.assert_array_equal(run(model, X), expected)
    outputs = {}
    for name in ("en", "de", "en"):
        nnx.update(model, adapters[name])
        outputs.setdefault(name, []).append(run(model, X))
    assert len(traces) == 1
    np.testing.assert_array_equal(*outputs["en"])
    assert np.abs(outputs["en"][0] - outputs["de"][0]).max() > 0.01
    np.testing.assert_array_equal(call(base, X), expected)


def test_a_batch_whose_examples_use_different_adapters():
    base, lora = linear(), LoRA(2, 6)
    model = adapt(base, lora, rngs=nnx.Rngs(1))
    adapters = [
        nnx.state(
            randomly_adapted(
                base,
                lora,
            ),
            lora.trainable,
        )
        for _ in range(3)
    ]
    adapters = [jax.tree.map(lambda v, n=n: n * v, a) for n, a in enumerate(adapters)]
    stacked = jax.tree.map(lambda *v: jnp.stack(v), *adapters)
    graphdef, _, frozen = nnx.split(model, lora.trainable, ...)
    ids = jnp.array([2, 0, 1, 2])
    gathered = jax.tree.map(lambda v: v[ids], stacked)
    x = jnp.concatenate([X, 2 * X])
    found = jax.vmap(lambda own, x: nnx.merge(graphdef, own, frozen)(x))(gathered, x)
    for i, index in enumerate(ids):
        nnx.update(model, adapters[index])
        np.testing.assert_allclose(found[i], model(x[i]), atol=1e-5)
    assert np.abs(found[0] - linear()(x[0])).max() > 0.01


# Transforms, traces and pickles


def test_under_jit_and_eval_shape():
    lora = LoRA(2, dropout=0.1, init="pissa")
    shapes = nnx.eval_shape(lambda: adapt(Net(nnx.Rngs(0)), lora, rngs=nnx.Rngs(1)))
    assert isinstance(shapes.head.lora_a.get_value(), jax.ShapeDtypeStruct)
    eager = adapt(Net(nnx.Rngs(0)), lora, rngs=nnx.Rngs(1))
    jitted = nnx.jit(lambda base: adapt(base, lora, rngs=nnx.Rngs(1)))(Net(nnx.Rngs(0)))
    assert nnx.graphdef(jitted) == nnx.graphdef(eager) == nnx.graphdef(shapes)
    for path, value in arrays(eager).items():
        np.testing.assert_allclose(arrays(jitted)[path], value, atol=1e-5)
    plain = nnx.jit(lambda model: merge(model, lora))(eager)
    for path, value in arrays(merge(eager, lora)).items():
        np.testing.assert_allclose(arrays(plain)[path], value, atol=1e-5)


def test_equal_descriptions_trace_once_and_others_again():
    traces = []

    @nnx.jit
    def run(model, x):
        traces.append(1)
        return model(x)

    outputs = [run(randomly_adapted(linear(), LoRA(2, alpha)), X) for alpha in (6, 6, 600)]
    assert len(traces) == 2
    np.testing.assert_array_equal(outputs[0], outputs[1])
    assert np.abs(outputs[0] - outputs[2]).max() > 0.1


class Mine(nnx.Linear):
    def __call__(self, x):
        return super().__call__(jnp.tanh(x))


def test_adapted_modules_pickle_and_deepcopy():
    base = nnx.Dict(net=Net(nnx.Rngs(0)), mine=Mine(8, 8, rngs=nnx.Rngs(0)))
    adapted = randomly_adapted(base, dropout=0.1)
    adapted.eval()
    graphdef = nnx.graphdef(adapted)
    for twin in (pickle.loads(pickle.dumps(adapted)), copy.deepcopy(adapted), nnx.clone(adapted)):
        assert nnx.graphdef(twin) == graphdef
        assert type(twin.mine) is type(adapted.mine) and isinstance(twin.mine, Mine)
        np.testing.assert_array_equal(twin.mine(X), adapted.mine(X))
        np.testing.assert_array_equal(twin.net(X), adapted.net(X))
        twin.mine.lora_b[...] = 0 * twin.mine.lora_b[...]
        assert np.any(adapted.mine.lora_b[...] != 0)
    assert pickle.loads(pickle.dumps(graphdef)) == graphdef
    assert hash(pickle.loads(pickle.dumps(graphdef))) == hash(graphdef)


def test_the_optimizer_moves_the_factors_and_what_train_matches_only():
    base = Net(nnx.Rngs(0))
    base.eval()
    lora = LoRA(2, 6, train="head", exclude=("head",))
    model = randomly_adapted(base, lora)
    optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=lora.trainable)
    before = arrays(model)

    @nnx.jit
    def step(model, optimizer, x):
        wrt = nnx.DiffState(0, lora.trainable)
        loss, grads = nnx.value_and_grad(lambda m: jnp.mean((m(x) - 1) ** 2), argnums=wrt)(model)
        optimizer.update(model, grads)
        return loss

    losses = [step(model, optimizer, X) for _ in range(5)]
    assert losses[-1] < losses[0]
    moved = {path for path, value in arrays(model).items() if np.any(value != before[path])}
    factors = set(arrays(model, nnx.LoRAParam))
    assert len(factors) == 4
    assert moved == factors | {"head/kernel", "head/bias"}
    np.testing.assert_array_equal(arrays(base)["head/kernel"], before["head/kernel"])


def equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")
        ):
            if hasattr(inner, "eqns"):
                yield from equations(inner)
            elif hasattr(inner, "jaxpr"):
                yield from equations(inner.jaxpr)


@pytest.mark.parametrize("model", [Looped, Stacked])
def test_no_product_makes_a_full_increment(model):
    def weight_sized_products(execution):
        lora = LoRA(2, target=r".*fc\d", execution=execution)
        adapted = adapt(model(rngs=nnx.Rngs(0)), lora, rngs=nnx.Rngs(1))
        graphdef, own, frozen = nnx.split(adapted, lora.trainable, ...)

        def loss(own, frozen):
            return jnp.sum(nnx.merge(graphdef, own, frozen, copy=True)(X) ** 2)

        jaxpr = jax.make_jaxpr(jax.grad(loss))(own, frozen).jaxpr
        dots = [eqn for eqn in equations(jaxpr) if eqn.primitive.name == "dot_general"]
        assert len(dots) > 10
        return sum(set(eqn.outvars[0].aval.shape[-2:]) == {8, 16} for eqn in dots)

    assert weight_sized_products("factored") == 0
    assert weight_sized_products("merged") > 0  # the search does find them


def test_statistics_and_random_keys_are_never_trained():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.body = nnx.Linear(8, 8, rngs=rngs)
            self.head = nnx.Sequential(nnx.Dropout(0.1, rngs=rngs), nnx.BatchNorm(8, rngs=rngs))

    lora = LoRA(2, target="body", train="head")
    state = nnx.state(adapt(Model(nnx.Rngs(0)), lora, rngs=nnx.Rngs(1)), lora.trainable)
    found = {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(state)}
    head = {"head/layers/1/bias", "head/layers/1/scale"}
    assert found == {"body/lora_a", "body/lora_b"} | head
