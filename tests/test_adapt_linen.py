"""``adapt`` for Linen: every kind of layer, under every lifting, against the base and numpy."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from rmlora_jax.adapt import adapt
from rmlora_jax.lora import LoRA
from rmlora_jax.tree import attach, join, merge, split

X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 8)), jnp.float32)
IDS = jnp.arange(12).reshape(2, 6)


class Block(nn.Module):
    dtype: jnp.dtype = None

    @nn.compact
    def __call__(self, x, _=None):
        layer = functools.partial(nn.Dense, dtype=self.dtype)
        y = nn.LayerNorm(dtype=self.dtype, name="norm1")(x)
        y = nn.MultiHeadDotProductAttention(2, dtype=self.dtype, name="attention")(y)
        y = layer(8, name="fc2")(nn.gelu(layer(16, name="fc1")(x + y)))
        return x + y, None


class Looped(nn.Module):
    block: type[nn.Module] = Block
    dtype: jnp.dtype = None

    @nn.compact
    def __call__(self, x):
        for i in range(2):
            x, _ = self.block(dtype=self.dtype, name=f"layers_{i}")(x, None)
        return x


class Scanned(nn.Module):
    block: type[nn.Module] = Block
    dtype: jnp.dtype = None
    axis: int = 0

    @nn.compact
    def __call__(self, x):
        layers = nn.scan(
            self.block,
            variable_axes={"params": self.axis},
            split_rngs={"params": True, "dropout": True},
            length=3,
        )
        return layers(dtype=self.dtype, name="layers")(x, None)[0]


class Tied(nn.Module):
    dtype: jnp.dtype = None

    @nn.compact
    def __call__(self, ids):
        table = nn.Embed(13, 8, dtype=self.dtype, name="table")
        return table.attend(nn.tanh(table(ids)))


VmapDense = nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True})

MODELS = {
    "dense": (lambda d: nn.Dense(5, dtype=d), X),
    "dense without bias": (lambda d: nn.Dense(5, dtype=d, use_bias=False), X),
    "dense general": (lambda d: nn.DenseGeneral((3, 4), axis=(-2, -1), dtype=d), X),
    "dense general, middle axis": (lambda d: nn.DenseGeneral((2, 3), axis=1, dtype=d), X),
    "dense general, batched": (lambda d: nn.DenseGeneral((4,), batch_dims=(0,), dtype=d), X),
    "conv": (lambda d: nn.Conv(6, (3,), strides=2, kernel_dilation=2, dtype=d), X),
    "conv, grouped": (lambda d: nn.Conv(12, (3,), feature_group_count=4, dtype=d), X),
    "conv, circular": (lambda d: nn.Conv(6, (3,), padding="CIRCULAR", dtype=d), X),
    "conv, causal, one example": (lambda d: nn.Conv(6, 3, padding="CAUSAL", dtype=d), X[0]),
    "conv, patches": (lambda d: nn.Conv(6, (2, 2), strides=(2, 2), dtype=d), X.reshape(2, 4, 4, 3)),
    "embed": (lambda d: nn.Embed(13, 8, dtype=d), IDS),
    "embed, tied": (lambda d: Tied(d), IDS),
    "vmap": (lambda d: VmapDense(5, dtype=d), X),
    "jit": (lambda d: nn.jit(nn.Dense)(5, dtype=d), X),
    "attention": (lambda d: nn.MultiHeadDotProductAttention(2, dtype=d), X),
    "loop": (lambda d: Looped(dtype=d), X),
    "loop, remat": (lambda d: Looped(nn.remat(Block), d), X),
    "loop, jit": (lambda d: Looped(nn.jit(Block), d), X),
    "scan": (lambda d: Scanned(dtype=d), X),
    "scan, remat": (lambda d: Scanned(nn.remat(Block), d), X),
}
DTYPES = {
    "float32": (None, jnp.float32),
    "bfloat16 compute": (jnp.bfloat16, jnp.float32),
    "bfloat16 base": (jnp.bfloat16, jnp.bfloat16),
    "bfloat16 by promotion": (None, jnp.bfloat16),
}


def paths(tree):
    return {jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(tree)}


def prepared(model, x, lora, dtype=jnp.float32):
    base = jax.tree.map(lambda v: v.astype(dtype), model.init(jax.random.key(0), x)["params"])
    adapted = adapt(model, lora)
    return adapted, base, attach(jax.random.key(1), adapted, base, x)


def with_random_factors(params, lora, seed=2):
    """B = 0 hides everything: random factors instead."""
    trainable, frozen = split(params, lora)
    leaves, treedef = jax.tree.flatten(trainable)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    pairs = zip(keys, leaves, strict=True)
    drawn = [0.2 * jax.random.normal(k, v.shape, v.dtype) for k, v in pairs]
    return join(jax.tree.unflatten(treedef, drawn), frozen)


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("name", MODELS)
def test_output_at_initialisation_is_the_base_output_bit_for_bit(name, dtypes):
    build, x = MODELS[name]
    compute, param_dtype = DTYPES[dtypes]
    if dtypes == "bfloat16 by promotion" and x.dtype == jnp.float32:
        x = x.astype(jnp.bfloat16)
    model = build(compute)
    adapted, base, params = prepared(model, x, LoRA(rank=2, alpha=6), param_dtype)
    expected = jax.jit(model.apply)({"params": base}, x)
    found = jax.jit(adapted.apply)({"params": params}, x)
    assert found.dtype == expected.dtype
    assert np.asarray(found).tobytes() == np.asarray(expected).tobytes()
    assert paths(base) < paths(params)
    extra = {p.rpartition("['")[2] for p in paths(params) - paths(base)}
    assert extra == {"lora_a']", "lora_b']"}


@pytest.mark.parametrize("name", MODELS)
def test_merged_and_factored_outputs_agree(name):
    build, x = MODELS[name]
    model, lora = build(None), LoRA(rank=2, alpha=6)
    adapted, base, params = prepared(model, x, lora)
    params = with_random_factors(params, lora)
    factored = jax.jit(adapted.apply)({"params": params}, x)
    plain = merge(params, lora)
    assert paths(plain) == paths(base)
    expected = jax.jit(model.apply)({"params": plain}, x)
    tolerance = 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(factored, expected, atol=tolerance, rtol=0)
    untouched = model.apply({"params": base}, x)
    assert np.abs(factored - untouched).max() > 0.01  # the factors do something

    merging = adapt(model, LoRA(rank=2, alpha=6, execution="merged"))
    found = jax.jit(merging.apply)({"params": params}, x)
    np.testing.assert_allclose(found, expected, atol=tolerance, rtol=0)


def random_layer(model, x, **fields):
    lora = LoRA(rank=2, alpha=6, **fields)
    adapted, _, params = prepared(model, x, lora)
    return adapted, with_random_factors(params, lora)


def test_dense_is_the_formula():
    adapted, params = random_layer(nn.Dense(5), X)
    p = jax.tree.map(lambda v: np.asarray(v, np.float64), params)
    x = np.asarray(X, np.float64)
    expected = x @ p["kernel"] + p["bias"] + 3.0 * (x @ p["lora_a"]) @ p["lora_b"]
    np.testing.assert_allclose(adapted.apply({"params": params}, X), expected, atol=1e-5)
    stabilised = adapt(nn.Dense(5), LoRA(rank=2, alpha=6, rs=True))
    expected += (6 / np.sqrt(2) - 3) * (x @ p["lora_a"]) @ p["lora_b"]
    np.testing.assert_allclose(stabilised.apply({"params": params}, X), expected, atol=1e-5)


def test_attention_out_flattens_heads_first():
    model = nn.DenseGeneral(7, axis=(-2, -1))
    adapted, params = random_layer(model, X)
    p = jax.tree.map(np.asarray, params)
    assert p["lora_a"].shape == (48, 2) and p["lora_b"].shape == (2, 7)
    kernel = p["kernel"].reshape(48, 7) + 3.0 * p["lora_a"] @ p["lora_b"]
    expected = np.asarray(X).reshape(2, 48) @ kernel + p["bias"]
    np.testing.assert_allclose(adapted.apply({"params": params}, X), expected, atol=1e-5)


def test_embedding_and_its_attend_are_the_formula():
    adapted, params = random_layer(nn.Embed(13, 8), IDS)
    p = jax.tree.map(np.asarray, params)
    table = p["embedding"] + 3.0 * p["lora_a"] @ p["lora_b"]
    np.testing.assert_allclose(adapted.apply({"params": params}, IDS), table[IDS], atol=1e-5)
    logits = adapted.apply({"params": params}, X, method="attend")
    np.testing.assert_allclose(logits, np.asarray(X) @ table.T, atol=1e-5)


def test_grouped_convolution_keeps_groups_apart():
    adapted, params = random_layer(nn.Conv(12, (3,), feature_group_count=4, padding="VALID"), X)
    p = jax.tree.map(np.asarray, params)
    kernel = p["kernel"] + 3.0 * (p["lora_a"] @ p["lora_b"]).reshape(3, 2, 12)
    x, expected = np.asarray(X), np.zeros((2, 4, 12)) + p["bias"]
    for out in range(12):
        own = 2 * (out // 3)  # 12 outputs in 4 groups, of 2 input channels each
        for tap in range(3):
            expected[..., out] += x[:, tap : tap + 4, own : own + 2] @ kernel[tap, :, out]
    np.testing.assert_allclose(adapted.apply({"params": params}, X), expected, atol=1e-5)


def test_gradients_are_the_formula_and_of_the_trainable_part_only():
    lora = LoRA(rank=2, alpha=6)
    adapted, params = random_layer(nn.Dense(5), X)
    trainable, frozen = split(params, lora)
    weight = jnp.asarray(np.random.default_rng(3).normal(size=(2, 6, 5)), jnp.float32)

    def loss(trainable):
        return jnp.sum(weight * adapted.apply({"params": join(trainable, frozen)}, X))

    grads = jax.jit(jax.grad(loss))(trainable)
    assert sorted(grads) == ["lora_a", "lora_b"]
    x, g = np.asarray(X).reshape(-1, 8), np.asarray(weight).reshape(-1, 5)
    a, b = (np.asarray(trainable[name]) for name in ("lora_a", "lora_b"))
    np.testing.assert_allclose(grads["lora_b"], 3.0 * (x @ a).T @ g, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(grads["lora_a"], 3.0 * x.T @ (g @ b.T), rtol=1e-4, atol=1e-4)


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


def weight_sized_products(model, x, execution, width):
    """Matrix products of the whole gradient whose result is as large as a weight."""
    lora = LoRA(rank=2, target=r".*fc\d", execution=execution)
    _, _, params = prepared(model, x, lora)
    trainable, frozen = split(params, lora)
    adapted = adapt(model, lora)

    def loss(trainable, frozen):
        return jnp.sum(adapted.apply({"params": join(trainable, frozen)}, x) ** 2)

    jaxpr = jax.make_jaxpr(jax.grad(loss))(trainable, frozen).jaxpr
    dots = [eqn for eqn in equations(jaxpr) if eqn.primitive.name == "dot_general"]
    assert len(dots) > 10
    shapes = [set(eqn.outvars[0].aval.shape[-2:]) for eqn in dots]
    return sum(shape == width for shape in shapes)


@pytest.mark.parametrize("model", [Looped(), Scanned(), Scanned(nn.remat(Block))])
def test_no_product_makes_a_full_increment(model):
    assert weight_sized_products(model, X, "factored", {8, 16}) == 0
    assert weight_sized_products(model, X, "merged", {8, 16}) > 0  # the search does find them


# The random stream "dropout"


def dropout_layer(rate):
    lora = LoRA(rank=8, dropout=rate)
    model = nn.Dense(8, use_bias=False)
    adapted, _, params = prepared(model, X, lora)
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
    _, base, params = prepared(model, X, lora)
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


class Encoder(nn.Module):
    def setup(self):
        self.body = nn.Dense(8)
        self.head = nn.Dense(3)
        self.both = [self.body, self.head]

    def __call__(self, x):
        return self.head(self.encode(x))

    def encode(self, x, scale=1.0):
        return scale * nn.tanh(self.body(x))


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
    ] + ["head"] * (method is None)


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


# Refusals


@pytest.mark.parametrize(
    ("model", "what"),
    [
        (nn.ConvTranspose(3, (3,)), "not a Dense, DenseGeneral, Conv or Embed"),
        (nn.Einsum((8, 3), "btd,df->btf"), "not a Dense, DenseGeneral, Conv or Embed"),
        (nn.ConvLocal(3, (3,)), "ConvLocal"),
        (nn.Conv(3, (3,), mask=np.ones((3, 8, 3))), "mask"),
        (nn.WeightNorm(nn.Dense(3)), "transformed"),
        (
            nn.map_variables(nn.Dense, "params", lambda v: jax.tree.map(jnp.sin, v), init=True)(3),
            "transformed",
        ),
    ],
)
def test_layers_whose_merge_would_be_wrong_are_refused(model, what):
    base = model.init(jax.random.key(0), X)["params"]
    adapted = adapt(model, LoRA(2))
    with pytest.raises(ValueError, match=f"(?s){what}.*LoRA.exclude"):
        attach(jax.random.key(1), adapted, base, X)
    with pytest.raises(ValueError, match=f"(?s){what}.*LoRA.exclude"):
        adapted.init(jax.random.key(1), X)


def test_refused_layers_may_be_excluded():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.WeightNorm(nn.Dense(8, name="inner"), name="normed")(x)
            return nn.Dense(3, name="fc")(nn.Einsum((8, 8), "btd,de->bte", name="mix")(x))

    lora = LoRA(2, exclude=("inner", "mix"))
    _, _, params = prepared(Net(), X, lora)
    assert {p for p in paths(params) if "lora" in p} == {"['fc']['lora_a']", "['fc']['lora_b']"}


def test_a_subclass_with_its_own_arithmetic_is_refused_one_that_calls_super_is_not():
    class Own(nn.Dense):
        @nn.compact
        def __call__(self, inputs):
            return inputs @ self.param("kernel", self.kernel_init, (8, self.features)) * 2

    class Super(nn.Dense):
        @nn.compact
        def __call__(self, inputs):
            return super().__call__(3 * inputs)

    with pytest.raises(ValueError, match="computes in its own way"):
        prepared(Own(5), X, LoRA(2))
    lora = LoRA(2, 6)
    adapted, _, params = prepared(Super(5), X, lora)
    params = with_random_factors(params, lora)
    expected = Super(5).apply({"params": merge(params, lora)}, X)
    np.testing.assert_allclose(adapted.apply({"params": params}, X), expected, atol=1e-5)


def test_adapting_twice_is_refused():
    adapted = adapt(Encoder(), LoRA(2))
    with pytest.raises(ValueError, match="adapted already"):
        adapt(adapted, LoRA(2))

    class Outer(nn.Module):
        inner: nn.Module

        def __call__(self, x):
            return self.inner(x)

    with pytest.raises(ValueError, match="holds an adapted module at 'inner'"):
        adapt(Outer(adapted), LoRA(2)).init(jax.random.key(0), X)


@pytest.mark.parametrize("axis", [1, -1])
def test_layers_stacked_on_another_axis_are_refused(axis):
    model = Scanned(axis=axis)
    base = model.init(jax.random.key(0), X)["params"]
    with pytest.raises(ValueError, match=r"do not fit.*variable_axes=\{\"params\": 0\}"):
        attach(jax.random.key(1), adapt(model, LoRA(2)), base, X)


def test_wrong_arguments_say_what_to_pass():
    lora = LoRA(2)
    with pytest.raises(TypeError, match="the class Dense: construct it"):
        adapt(nn.Dense, lora)
    with pytest.raises(TypeError, match=r"flax\.linen\.Module; it was given a dict"):
        adapt({}, lora)
    with pytest.raises(TypeError, match="lora is a int"):
        adapt(nn.Dense(3), 4)
    with pytest.raises(ValueError, match="rngs"):
        adapt(nn.Dense(3), lora, rngs=jax.random.key(0))
    from flax import nnx

    with pytest.raises(TypeError, match="NNX module Linear"):
        adapt(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), lora)


def test_parameters_that_do_not_belong_to_the_description_are_refused():
    adapted, base, params = prepared(Encoder(), X, LoRA(2))
    with pytest.raises(ValueError, match="no factors at 'body'.*attach"):
        adapted.apply({"params": base}, X)
    with pytest.raises(ValueError, match="rank 3.*ask for"):
        adapt(Encoder(), LoRA(3)).apply({"params": params}, X)
    with pytest.raises(ValueError, match="hold factors at 'head'.*does not select"):
        adapt(Encoder(), LoRA(2, target="body")).apply({"params": params}, X)


def test_a_target_that_matches_nothing_is_an_error_at_init_and_attach():
    base = Encoder().init(jax.random.key(0), X)["params"]
    adapted = adapt(Encoder(), LoRA(2, target="bodi"))
    for make in (
        lambda: adapted.init(jax.random.key(0), X),
        lambda: attach(jax.random.key(0), adapted, base, X),
    ):
        with pytest.raises(ValueError, match="'bodi' matches no layer.*'body'"):
            make()


# Partition names


def boxed(init, *names):
    return nn.with_partitioning(init, names)


class Boxed(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        init = nn.initializers.lecun_normal()
        heads = nn.DenseGeneral((2, 4), kernel_init=boxed(init, "embed", "heads"), name="heads")(x)
        out = nn.DenseGeneral(
            8, axis=(-2, -1), kernel_init=boxed(init, "heads", "embed"), name="out"
        )
        x = x + out(heads)
        return nn.Conv(8, (3,), kernel_init=boxed(init, "tap", None, "embed"), name="conv")(x), None


def test_factors_inherit_partition_names_and_merge_keeps_the_box():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            layers = nn.scan(
                Boxed,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=3,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            return layers(name="layers")(x, None)[0]

    lora = LoRA(2, 6)
    base = Net().init(jax.random.key(0), X)["params"]
    adapted = adapt(Net(), lora)
    params = attach(jax.random.key(1), adapted, base, X)
    names = {
        path: (params["layers"][path]["lora_a"].names, params["layers"][path]["lora_b"].names)
        for path in ("heads", "out", "conv")
    }
    assert names == {
        "heads": (("layers", "embed", None), ("layers", None, "heads")),
        "out": (("layers", "heads", None), ("layers", None, "embed")),
        "conv": (("layers", "tap", None), ("layers", None, "embed")),
    }
    initial = adapted.init(jax.random.key(0), X)["params"]["layers"]["out"]
    assert initial["lora_a"].names == names["out"][0]

    params = with_random_factors(params, lora)
    plain = merge(params, lora)
    assert plain["layers"]["out"]["kernel"].names == base["layers"]["out"]["kernel"].names
    expected = Net().apply({"params": plain}, X)
    np.testing.assert_allclose(adapted.apply({"params": params}, X), expected, atol=1e-5)

    bare = attach(jax.random.key(1), adapted, nn.unbox(base), X)
    assert isinstance(bare["layers"]["out"]["lora_a"], jax.Array)  # boxes only where the base has


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
