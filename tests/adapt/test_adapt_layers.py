"""Every kind of Linen layer under every lifting: against the base, the merge and numpy."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.adapted import (
    IDS,
    Block,
    Looped,
    Scanned,
    Tied,
    X,
    paths,
    prepared,
    random_layer,
    with_random_factors,
)
from marks import every_other, slow

from rmlora_jax.adapt import adapt
from rmlora_jax.adapt.lora import LoRA
from rmlora_jax.adapt.tree import attach, join, merge, split

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
    "fields": (lambda d: nn.Sequential([nn.Dense(7, dtype=d), nn.Dense(5, dtype=d)]), X),
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


LIFTED = ("loop", "loop, remat", "loop, jit", "scan", "scan, remat")
CASES = [
    (name, dtypes)
    for name in MODELS
    for dtypes in DTYPES
    if name not in LIFTED or dtypes in ("float32", "bfloat16 base")
]


@pytest.mark.parametrize(
    ("name", "dtypes"),  # the quick half are the layers that the next test leaves to the slow run
    [c if c[1] == "bfloat16 base" and c[0] in list(MODELS)[1::2] else slow(*c) for c in CASES],
)
def test_output_at_initialisation_is_the_base_output_bit_for_bit(name, dtypes):
    build, x = MODELS[name]
    compute, param_dtype = DTYPES[dtypes]
    model = build(compute)
    adapted, base, params = prepared(model, x, LoRA(rank=2, alpha=6), param_dtype)
    if dtypes == "bfloat16 by promotion" and x.dtype == jnp.float32:
        x = x.astype(jnp.bfloat16)
    expected = jax.jit(model.apply)({"params": base}, x)
    found = jax.jit(adapted.apply)({"params": params}, x)
    assert found.dtype == expected.dtype
    assert np.asarray(found).tobytes() == np.asarray(expected).tobytes()
    assert paths(base) < paths(params)
    extra = {p.rpartition("['")[2] for p in paths(params) - paths(base)}
    assert extra == {"lora_a']", "lora_b']"}


@pytest.mark.parametrize("name", every_other(MODELS))
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


def weight_sized_products(model, x, execution, width, kind=LoRA):
    """Matrix products of the whole gradient whose result is as large as a weight."""
    lora = kind(rank=2, target=r".*fc\d", execution=execution)
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


# Partition names


def boxed(init, *names):
    return nn.with_partitioning(init, names)


class Boxed(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        init = nn.initializers.lecun_normal()
        heads = nn.DenseGeneral(
            (2, 4), kernel_init=boxed(init, "embed", "heads", "kv"), name="heads"
        )(x)
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
