"""``adapt`` for Linen: dropout, traces, methods and JAX transformations."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.adapted import (
    IDS,
    Block,
    Encoder,
    Looped,
    Scanned,
    X,
    paths,
    prepared,
    random_layer,
    with_random_factors,
)
from jax.sharding import PartitionSpec as P

from rmlora_jax.adapt import adapt
from rmlora_jax.adapt.lora import LoRA
from rmlora_jax.adapt.tree import attach, join, merge, split

# The random stream "dropout"


def dropout_layer(rate):
    lora = LoRA(rank=8, dropout=rate)
    model = nn.Dense(8, use_bias=False)
    adapted = adapt(model, lora)
    eye = jnp.eye(8)
    return adapted, {"kernel": jnp.zeros((8, 8)), "lora_a": eye, "lora_b": eye}


def test_dropout_scales_what_it_keeps_and_needs_its_stream():
    adapted, params = dropout_layer(0.25)
    x = jnp.ones((200, 100, 8))
    np.testing.assert_array_equal(adapted.apply({"params": params}, x), x)  # no stream

    def run(seed):
        return adapted.apply({"params": params}, x, rngs={"dropout": jax.random.key(seed)})

    y = np.asarray(run(0))
    assert set(np.unique(y)) == {np.float32(0), np.float32(1 / 0.75)}
    assert abs((y == 0).mean() - 0.25) < 0.005  # 160,000 draws: 4.6 standard deviations
    np.testing.assert_array_equal(run(0), y)
    assert (np.asarray(run(1)) != y).any()


def test_dropout_never_touches_the_base_or_integers():
    adapted, params = dropout_layer(0.5)
    params = params | {"kernel": jnp.eye(8), "lora_b": jnp.zeros((8, 8))}
    rngs = {"dropout": jax.random.key(0)}
    np.testing.assert_array_equal(adapted.apply({"params": params}, X, rngs=rngs), X)
    embed, table = random_layer(nn.Embed(13, 8), IDS, dropout=0.5)
    expected = embed.apply({"params": table}, IDS)
    np.testing.assert_array_equal(embed.apply({"params": table}, IDS, rngs=rngs), expected)


def test_dropout_acts_in_merged_execution_too():
    adapted, params = dropout_layer(0.25)
    merging = adapt(adapted.base, LoRA(rank=8, dropout=0.25, execution="merged"))
    x, rngs = jnp.ones((40, 8)), {"dropout": jax.random.key(0)}
    y = adapted.apply({"params": params}, x, rngs=rngs)
    np.testing.assert_array_equal(merging.apply({"params": params}, x, rngs=rngs), y)
    assert (np.asarray(y) == 0).any()
    np.testing.assert_array_equal(merging.apply({"params": params}, x), x)


def test_dropout_differs_between_scanned_layers():
    class Step(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x, nn.Dense(8, use_bias=False, name="fc")(x)

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            split_rngs = {"params": True, "dropout": True}
            scan = nn.scan(Step, variable_axes={"params": 0}, split_rngs=split_rngs, length=3)
            return scan(name="layers")(x, None)[1]

    adapted = adapt(Net(), LoRA(rank=8, dropout=0.5))
    eye = jnp.stack([jnp.eye(8)] * 3)
    params = {"layers": {"fc": {"kernel": 0 * eye, "lora_a": eye, "lora_b": eye}}}
    x = jnp.ones((64, 8))
    y = np.asarray(adapted.apply({"params": params}, x, rngs={"dropout": jax.random.key(0)}))
    assert set(np.unique(y)) == {0.0, 2.0}
    assert (y[0] != y[1]).any() and (y[1] != y[2]).any() and (y[0] != y[2]).any()


# Traces


def test_models_with_jit_inside_do_not_share_traces_of_other_descriptions():
    model = Looped(nn.jit(Block))
    lora = LoRA(rank=2, alpha=6)
    _, _, params = prepared(model, X, lora)
    params = with_random_factors(params, lora)
    outputs = []
    for alpha in (6, 600, 6):
        lora = LoRA(rank=2, alpha=alpha)
        found = adapt(model, lora).apply({"params": params}, X)
        expected = model.apply({"params": merge(params, lora)}, X)
        np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())
        outputs.append(found)
    assert np.abs(outputs[0] - outputs[1]).max() > 0.1
    np.testing.assert_array_equal(outputs[0], outputs[2])


@pytest.mark.slow
@pytest.mark.parametrize("block", [Block, nn.jit(Block), nn.remat(Block)])
def test_alpha_pattern_holds_where_layers_share_a_trace(block):
    model = Looped(block)
    lora = LoRA(2, 6, rs=True, alpha_pattern=((".*_1/fc1", 90), ("layers_0/.*", 0.5)))
    adapted, _, params = prepared(model, X, lora)
    params = with_random_factors(params, lora)
    expected = model.apply({"params": merge(params, lora)}, X)
    found = adapted.apply({"params": params}, X)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    uniform = adapt(model, LoRA(2, 6, rs=True)).apply({"params": params}, X)
    assert np.abs(found - uniform).max() > 0.1


def test_rank_pattern_and_exclude_choose_per_layer():
    lora = LoRA(2, 6, exclude=("out",), rank_pattern=((".*/fc1", 5), (".*/fc.*", 3)))
    model = Scanned()
    adapted, _, params = prepared(model, X, lora)
    layers = params["layers"]
    assert layers["fc1"]["lora_a"].shape == (3, 8, 5)
    assert layers["fc2"]["lora_b"].shape == (3, 3, 8)
    assert layers["attention"]["query"]["lora_a"].shape == (3, 8, 2)
    assert "lora_a" not in layers["attention"]["out"]
    params = with_random_factors(params, lora)
    expected = model.apply({"params": merge(params, lora)}, X)
    found = adapted.apply({"params": params}, X)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_equal_descriptions_trace_once_and_values_never_retrace():
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def forward(model, params, x):
        traces.append(model)
        return model.apply({"params": params}, x)

    _, _, params = prepared(nn.Dense(5), X, LoRA(2))
    for scale in (1.0, 2.0):
        model = adapt(nn.Dense(5), LoRA(2))
        forward(model, jax.tree.map(lambda v, scale=scale: scale * v, params), X)
    assert len(traces) == 1
    forward(adapt(nn.Dense(5), LoRA(2, alpha=7)), params, X)
    assert len(traces) == 2


# Methods, binding and nesting


def encoder():
    lora = LoRA(rank=2, alpha=6)
    adapted, _, params = prepared(Encoder(), X, lora)
    params = with_random_factors(params, lora)
    plain = Encoder().apply({"params": merge(params, lora)}, X, scale=2.0, method="encode")
    return adapted, params, plain


@pytest.mark.parametrize(
    "method",
    [
        "encode",
        Encoder.encode,
        Encoder().encode,
        lambda module, x, scale: module.encode(x, scale=scale),
        lambda module, x, scale: scale * nn.tanh(module.body(x)),
        "adapted.encode",
    ],
)
def test_every_way_to_name_a_method_runs_adapted(method):
    adapted, params, expected = encoder()
    method = adapted.encode if method == "adapted.encode" else method
    found = adapted.apply({"params": params}, X, scale=2.0, method=method)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert sorted(adapted.init(jax.random.key(0), X, scale=2.0, method=method)["params"]) == [
        "body"
    ]


def test_bound_modules_run_adapted_and_submodules_do_not_run_bare():
    adapted, params, expected = encoder()
    bound = adapted.bind({"params": params})
    np.testing.assert_allclose(bound.encode(X, scale=2.0), expected, atol=1e-5)
    np.testing.assert_allclose(bound(X), adapted.apply({"params": params}, X), atol=1e-5)
    for name in ("body", "both"):
        with pytest.raises(AttributeError, match=f"'{name}' holds submodules.*method=lambda"):
            getattr(bound, name)
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = adapted.nothing_of_the_kind
    assert adapt(nn.Dense(7), LoRA(1)).features == 7


def test_an_adapted_module_inside_another_keeps_its_own_paths():
    lora = LoRA(2, 6, target="body", alpha_pattern=(("body", 9),))

    class Outer(nn.Module):
        backbone: nn.Module

        @nn.compact
        def __call__(self, x):
            return nn.Dense(2, name="top")(self.backbone.encode(x))

    outer = Outer(adapt(Encoder(), lora))
    params = outer.init(jax.random.key(0), X)["params"]
    assert sorted(params["backbone"]["body"]) == ["bias", "kernel", "lora_a", "lora_b"]
    assert sorted(params["top"]) == ["bias", "kernel"]
    params["backbone"] = with_random_factors(params["backbone"], lora)
    merged = params | {"backbone": merge(params["backbone"], lora)}
    expected = Outer(Encoder()).apply({"params": merged}, X)
    np.testing.assert_allclose(outer.apply({"params": params}, X), expected, atol=1e-5)


def test_other_collections_are_returned_as_usual():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
            x = nn.Dropout(0.5, deterministic=not train)(nn.Dense(8, name="fc")(x))
            return nn.Dense(3, name="head")(x)

    for pattern in ((), (("fc", 9),)):
        lora = LoRA(2, 6, target="fc", train="head", alpha_pattern=pattern)
        base = Net().init(jax.random.key(0), X, train=False)
        adapted = adapt(Net(), lora)
        params = attach(jax.random.key(1), adapted, base["params"], X, train=False)
        variables = base | {"params": params}
        rngs = {"dropout": jax.random.key(2)}
        y, state = adapted.apply(variables, X, train=True, rngs=rngs, mutable=["batch_stats"])
        run = functools.partial(Net().apply, train=True, rngs=rngs, mutable=["batch_stats"])
        expected, expected_state = run(base, X)
        np.testing.assert_allclose(y, expected, atol=1e-6)
        jax.tree.map(np.testing.assert_array_equal, state, expected_state)


def test_submodules_in_fields_keep_their_paths_and_random_streams():
    class Outer(nn.Module):
        layers: tuple[nn.Module, ...]
        base: nn.Module

        def __call__(self, x):
            for layer in self.layers:
                x = nn.tanh(layer(x))
            return self.base(x)

    model = Outer((nn.Dense(8), nn.Dropout(0.5, deterministic=False)), nn.Dense(3))
    lora = LoRA(2, 6, target="layers_0|base")
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(5)}
    base = model.init(rngs, X)["params"]
    adapted = adapt(model, lora)
    params = attach(jax.random.key(1), adapted, base, X)
    run = {"rngs": {"dropout": jax.random.key(2)}}
    expected = model.apply({"params": base}, X, **run)
    np.testing.assert_array_equal(adapted.apply({"params": params}, X, **run), expected)
    same = adapted.init(rngs, X)["params"]
    jax.tree.map(np.testing.assert_array_equal, same["base"]["kernel"], base["base"]["kernel"])


def test_a_bound_module_may_be_called_again():
    adapted, params, expected = encoder()
    bound = adapted.bind({"params": params})
    for _ in range(2):
        np.testing.assert_allclose(bound.encode(X, scale=2.0), expected, atol=1e-5)
    variables = {"params": params}
    twice = adapted.apply(variables, X, method=lambda m, x: (m.encode(x, 2.0), m.encode(x, 2.0)))
    np.testing.assert_allclose(twice[1], expected, atol=1e-5)


def test_intermediates_are_captured():
    adapted, params, _ = encoder()
    _, state = adapted.apply({"params": params}, X, capture_intermediates=True)
    lora = adapted.lora
    _, expected = Encoder().apply({"params": merge(params, lora)}, X, capture_intermediates=True)
    found = state["intermediates"]["body"]["__call__"][0]
    np.testing.assert_allclose(found, expected["intermediates"]["body"]["__call__"][0], atol=1e-5)


def test_target_none_is_the_module_itself():
    adapted = adapt(Encoder(), LoRA(1, target=None, train="head"))
    base = Encoder().init(jax.random.key(0), X)["params"]
    assert attach(jax.random.key(1), adapted, base, X) is base
    expected = Encoder().apply({"params": base}, X)
    np.testing.assert_array_equal(adapted.apply({"params": base}, X), expected)
    assert paths(adapted.init(jax.random.key(0), X)["params"]) == paths(base)
    trainable, frozen = split(base, adapted.lora)
    assert (sorted(trainable), sorted(frozen)) == (["head"], ["body"])
    jax.tree.map(np.testing.assert_array_equal, merge(base, adapted.lora), base)


def test_init_makes_factors_of_its_own():
    adapted = adapt(Scanned(), LoRA(rank=2))
    params = adapted.init(jax.random.key(0), X)["params"]
    a = np.asarray(params["layers"]["fc1"]["lora_a"])
    assert a.shape == (3, 8, 2) and not np.asarray(params["layers"]["fc1"]["lora_b"]).any()
    assert np.abs(a).max() <= 8**-0.5 and np.abs(a).max() > 0.7 * 8**-0.5
    assert (a[0] != a[1]).all()


# Transformations of JAX


def test_vmap_over_adapters():
    lora = LoRA(2, 6)
    adapted, _, params = prepared(Scanned(), X, lora)
    several = [with_random_factors(params, lora, seed) for seed in (3, 4)]
    expected = [adapted.apply({"params": p}, X) for p in several]
    trainable = jax.tree.map(lambda *v: jnp.stack(v), *(split(p, lora)[0] for p in several))
    frozen = split(params, lora)[1]
    run = jax.vmap(lambda t: adapted.apply({"params": join(t, frozen)}, X))
    np.testing.assert_allclose(run(trainable), jnp.stack(expected), atol=1e-5)


def test_shard_map_and_pmap_give_the_same_gradients():
    lora = LoRA(2, 6)
    adapted, params = random_layer(nn.Dense(5), X)
    trainable, frozen = split(params, lora)
    x = jnp.arange(64.0).reshape(8, 8) / 64

    def grads(trainable, x):
        def loss(trainable):
            return jnp.sum(adapted.apply({"params": join(trainable, frozen)}, x) ** 2)

        return jax.grad(loss)(trainable)

    def step(trainable, x):
        return jax.lax.psum(grads(trainable, x), "data")

    expected = grads(trainable, x)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = {"in_specs": (P(), P("data")), "out_specs": P(), "check_vma": False}
    sharded = jax.jit(jax.shard_map(step, mesh=mesh, **specs))(trainable, x)
    stepped = jax.pmap(step, "data", in_axes=(None, 0))(trainable, x.reshape(4, 2, 8))
    for name in expected:
        np.testing.assert_allclose(sharded[name], expected[name], rtol=1e-5)
        np.testing.assert_allclose(stepped[name][0], expected[name], rtol=1e-5)
