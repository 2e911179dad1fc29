"""DoRA: against PEFT's own numbers, its formula, its merge, and plain LoRA's habits."""

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import adapted_nnx
from fixtures.adapted import Encoder, Scanned, Tied, X, prepared, with_random_factors
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from marks import slow_but
from test_adapt_layers import MODELS, weight_sized_products
from test_adapt_merged import assert_close, gradients

import rmlora_jax as rm
from rmlora_jax.adapt import linen
from rmlora_jax.adapt.dora import norms
from rmlora_jax.adapt.geometry import Layout

STORED = np.load(Path(__file__).parents[1] / "fixtures" / "peft" / "dora_layers.npz")
RANK, ALPHA = 3, 5
LINEN = {
    "linear": nn.Dense(5),
    "linear_dropout": nn.Dense(5),
    "embedding": nn.Embed(11, 6),
    "conv1d": nn.Conv(6, (3,), padding=1, use_bias=False),
    "conv2d": nn.Conv(5, (3, 2), strides=2, padding=1),
    "conv2d_dropout": nn.Conv(5, (3, 3), padding=1),
}
NNX = {
    "linear": lambda rngs: nnx.Linear(7, 5, rngs=rngs),
    "linear_dropout": lambda rngs: nnx.Linear(7, 5, rngs=rngs),
    "embedding": lambda rngs: nnx.Embed(11, 6, rngs=rngs),
    "conv1d": lambda rngs: nnx.Conv(4, 6, (3,), padding=1, use_bias=False, rngs=rngs),
    "conv2d": lambda rngs: nnx.Conv(3, 5, (3, 2), strides=2, padding=1, rngs=rngs),
    "conv2d_dropout": lambda rngs: nnx.Conv(3, 5, (3, 3), padding=1, rngs=rngs),
}


# What PEFT computes


def channels_last(x):
    return np.moveaxis(x, 1, -1) if x.ndim > 2 else x


def peft(case):
    """What PEFT computed, in our order of axes: our names of parameters -> values, and the rest."""
    found = {k.partition("/")[2]: v for k, v in STORED.items() if k.startswith(f"{case}/")}

    def ours(weight, a, b, m):
        if case.startswith("conv"):
            weight, a = (np.moveaxis(v, (0, 1), (-1, -2)) for v in (weight, a))
            a, b, m = a.reshape(-1, RANK), b.reshape(-1, RANK).T, m.reshape(-1)
            return weight, a, b, m
        return weight if case == "embedding" else weight.T, a.T, b.T, m

    names = ("embedding" if case == "embedding" else "kernel", "lora_a", "lora_b", "lora_m")
    params = dict(zip(names, ours(*(found[k] for k in ("weight", "a", "b", "m"))), strict=True))
    grads = [found[f"d_{k}"] for k in ("a", "b", "m")]
    grads = dict(zip(names[1:], ours(found["weight"], *grads)[1:], strict=True))
    rest = {"begun": found["begun"].reshape(-1)}
    rest["merged"] = ours(*(found[k] for k in ("merged", "a", "b", "m")))[0]
    for name in ("x", "y", "cotangent", "mask", "d_x"):
        if name in found:
            rest[name] = channels_last(found[name]) if "conv" in case else found[name]
    if "bias" in found:
        params["bias"], grads["bias"] = found["bias"], found["d_bias"]
    return jax.tree.map(jnp.asarray, (params, grads, rest))


def close(found, expected):
    """1e-5 of the largest entry."""
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def dora(case, **fields):
    return rm.DoRA(RANK, ALPHA, dropout=0.5 if case.endswith("dropout") else 0.0, **fields)


@pytest.mark.parametrize("execution", ["factored", "merged"])
@pytest.mark.parametrize("case", LINEN)
def test_outputs_and_gradients_are_pefts(case, execution, monkeypatch):
    params, grads, rest = peft(case)
    model = rm.adapt(LINEN[case], dora(case, execution=execution))
    rngs = {}
    if "mask" in rest:  # the draw of PyTorch for the one of the layer
        monkeypatch.setattr(linen, "_dropped", lambda module, rate, x: x * rest["mask"])
        rngs = {"dropout": jax.random.key(0)}

    def f(params, x):
        return model.apply({"params": params}, x, rngs=rngs)

    close(jax.jit(f)(params, rest["x"]), rest["y"])

    def loss(params, x):
        return jnp.sum(f(params, x) * rest["cotangent"])

    found = jax.jit(jax.grad(loss))(params, rest["x"])
    for name, expected in grads.items():
        close(found[name], expected)
    if "d_x" in rest:
        close(jax.jit(jax.grad(loss, 1))(params, rest["x"]), rest["d_x"])


@pytest.mark.parametrize("case", LINEN)
def test_what_magnitudes_begin_as_and_the_merge_are_pefts(case):
    params, _, rest = peft(case)
    base = {name: v for name, v in params.items() if not name.startswith("lora_")}
    adapted = rm.adapt(LINEN[case], dora(case))
    begun = rm.attach(jax.random.key(0), adapted, base, rest["x"])
    close(begun["lora_m"], rest["begun"])
    assert begun["lora_m"].dtype == jnp.float32 and not np.any(begun["lora_b"])
    merged = rm.merge(params, dora(case))
    close(merged[adapted.lora.weights[case == "embedding"]], rest["merged"])


class Masked(nnx.Dropout):
    """Dropout whose draw is known."""

    def __call__(self, x):
        return x * peft("linear_dropout" if x.ndim == 3 else "conv2d_dropout")[2]["mask"]


@pytest.mark.parametrize("case", NNX)
def test_nnx_computes_what_peft_does(case):
    params, grads, rest = peft(case)
    model = rm.adapt(NNX[case](nnx.Rngs(0)), dora(case), rngs=nnx.Rngs(1))
    for name, value in params.items():
        getattr(model, name).set_value(value)
    if "mask" in rest:
        model.lora_dropout = Masked(0.5)
        model.train()
    close(adapted_nnx.call(model, rest["x"]), rest["y"])
    lora = dora(case, train="bias" if "bias" in params else None)
    loss = nnx.grad(lambda model: jnp.sum(model(rest["x"]) * rest["cotangent"]),
                    argnums=nnx.DiffState(0, lora.trainable))
    found = loss(model)
    found = {path[-1]: value.get_value() for path, value in nnx.to_flat_state(found)}
    assert found.keys() == grads.keys()
    for name, expected in grads.items():
        close(found[name], expected)


# Every layer and every structure


def unsettled(params, seed=4):
    """Biases that are not 0, as they begin."""
    flat, rng = flatten_dict(params), np.random.default_rng(seed)
    for path, value in flat.items():
        if path[-1] == "bias":
            flat[path] = jnp.asarray(rng.normal(size=value.shape), value.dtype)
    return unflatten_dict(flat)


@pytest.mark.parametrize("name", slow_but(
    MODELS, "dense general, middle axis", "dense general, batched", "conv", "embed, tied", "scan"))
def test_layers_begin_as_the_base_and_agree_with_their_merge(name):
    build, x = MODELS[name]
    model, lora = build(None), rm.DoRA(2, 6)
    adapted, base, params = prepared(model, x, lora)
    expected = jax.jit(model.apply)({"params": base}, x)
    found = jax.jit(adapted.apply)({"params": params}, x)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(expected).max())

    params = unsettled(with_random_factors(params, lora))
    plain = rm.merge(params, adapted, x)
    assert jax.tree.map(jnp.shape, plain) == jax.tree.map(jnp.shape, base)
    expected = jax.jit(model.apply)({"params": plain}, x)
    assert np.abs(expected - jax.jit(model.apply)({"params": unsettled(base)}, x)).max() > 0.01
    merging = rm.adapt(model, rm.DoRA(2, 6, execution="merged"))
    for whole in (adapted, merging):
        close(jax.jit(whole.apply)({"params": params}, x), expected)
    if x.dtype == jnp.float32:
        assert_close(gradients(merging, params, lora, x), gradients(adapted, params, lora, x), 5e-6)


@pytest.mark.parametrize("name", slow_but(
    adapted_nnx.LAYERS, "einsum, interleaved", "conv, transposed kernel", "embed, tied",
    "own layer"))
def test_nnx_layers_agree_with_their_merge(name):
    base, x = adapted_nnx.built(name)
    lora = rm.DoRA(2, 6, layers=adapted_nnx.EXPERTS)
    model = rm.adapt(base, lora, rngs=nnx.Rngs(1))
    close(adapted_nnx.call(model, x), adapted_nnx.call(base, x))
    rng = np.random.default_rng(2)

    def draw(path, value):
        return jnp.asarray(rng.normal(size=value.shape, scale=0.25), value.dtype)

    drawn = lambda path, value: path[-1] == "bias" or isinstance(value, nnx.LoRAParam)  # noqa: E731
    nnx.update(model, jax.tree_util.tree_map_with_path(draw, nnx.state(model, drawn)))
    expected = adapted_nnx.call(rm.merge(model, lora), x)
    assert np.abs(expected - adapted_nnx.call(base, x)).max() > 0.01
    close(adapted_nnx.call(model, x), expected)
    other = rm.DoRA(2, 6, layers=adapted_nnx.EXPERTS, execution="merged")
    merging = rm.adapt(rm.merge(model, lora), other, rngs=nnx.Rngs(1))
    nnx.update(merging, nnx.state(model))
    close(adapted_nnx.call(merging, x), expected)


def test_linen_and_nnx_compute_the_same():
    params = peft("linear")[0]
    layer = rm.adapt(nnx.Linear(7, 5, rngs=nnx.Rngs(0)), rm.DoRA(3, 5), rngs=nnx.Rngs(0))
    for name, value in params.items():
        getattr(layer, name).set_value(value)
    x = peft("linear")[2]["x"]
    linen_y = jax.jit(rm.adapt(nn.Dense(5), rm.DoRA(3, 5)).apply)({"params": params}, x)
    np.testing.assert_array_equal(adapted_nnx.call(layer, x), linen_y)


def test_stacked_layers_are_the_formula_and_no_product_is_as_large_as_a_weight():
    lora = rm.DoRA(2, 6, alpha_pattern=((".*fc2", 3.0),))
    _, _, params = prepared(Scanned(), X, lora)
    params = with_random_factors(params, lora)
    merged = rm.merge(params, lora)["layers"]
    for name, scale in (("fc1", 3.0), ("fc2", 1.5)):
        p = {k: np.asarray(v, np.float64) for k, v in params["layers"][name].items()}
        assert p["lora_m"].shape == (3, p["kernel"].shape[-1])
        whole = p["kernel"] + scale * p["lora_a"] @ p["lora_b"]
        expected = p["lora_m"][:, None] * whole / np.linalg.norm(whole, axis=1, keepdims=True)
        close(merged[name]["kernel"], expected)
    assert weight_sized_products(Scanned(), X, "factored", {8, 16}, rm.DoRA) == 0


def test_norms_of_gram_matrices_are_those_of_the_sum():
    rng = np.random.default_rng(0)
    for size in (1e-3, 1.0, 100.0):
        w = rng.normal(size=(3, 200, 30))
        a, b = rng.normal(size=(3, 200, 4)), size * rng.normal(size=(3, 4, 30))
        found = norms(*(jnp.asarray(v, jnp.float32) for v in (w, a, b)), 0.5)
        np.testing.assert_allclose(found, np.linalg.norm(w + 0.5 * a @ b, axis=1), rtol=2e-6)
    w = jnp.asarray(w.swapaxes(1, 2), jnp.bfloat16)
    found = norms(w, jnp.asarray(a), 0 * jnp.asarray(b), 0.5, Layout((), (1,), (0,)))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, np.linalg.norm(np.asarray(w, np.float64), axis=2), rtol=1e-6)


@pytest.mark.parametrize("execution", ["factored", "merged"])
def test_a_weight_of_zeros_trains(execution):
    model = rm.adapt(nn.Dense(5), rm.DoRA(2, execution=execution))
    base = {"kernel": jnp.zeros((8, 5)), "bias": jnp.ones(5)}
    params = rm.attach(jax.random.key(0), model, base, X)
    y, grads = jax.value_and_grad(lambda p: model.apply({"params": p}, X).sum())(params)
    assert y == X[..., 0].size * 5 and np.any(grads["lora_b"])
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("name", slow_but(
    ["dense", "conv, grouped", "embed, tied"], "dense", "embed, tied"))
def test_the_dtype_is_the_bases(name):
    build, x = MODELS[name]
    for compute, held in ((jnp.bfloat16, jnp.float32), (None, jnp.bfloat16)):
        model = build(compute)
        x = x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x
        adapted, base, params = prepared(model, x, rm.DoRA(2, dtype=jnp.bfloat16), held)
        assert {v.dtype for p, v in flatten_dict(params).items() if p[-1] == "lora_m"} == {
            jnp.dtype("float32")}
        expected, found = model.apply({"params": base}, x), adapted.apply({"params": params}, x)
        assert found.dtype == expected.dtype == jnp.bfloat16
        expected, found = (np.asarray(v, np.float32) for v in (expected, found))
        np.testing.assert_allclose(found, expected, atol=0.02 * np.abs(expected).max())


def test_dropout_acts_in_training_alone_and_at_m_of_the_norm_spares_the_base():
    lora = rm.DoRA(2, 6, dropout=0.5)
    adapted, base, params = prepared(Encoder(), X, lora)
    dropped = adapted.apply({"params": params}, X, rngs={"dropout": jax.random.key(0)})
    expected = Encoder().apply({"params": base}, X)
    np.testing.assert_allclose(dropped, expected, rtol=0, atol=1e-5)  # g = 1 and B = 0
    params = with_random_factors(params, lora)
    one, other = (adapted.apply({"params": params}, X, rngs={"dropout": jax.random.key(i)})
                  for i in range(2))
    assert np.abs(one - other).max() > 0.01
    close(adapted.apply({"params": params}, X), Encoder().apply(
        {"params": rm.merge(params, lora)}, X))


class Scores(nn.Module):
    """A class of the user's own that adds something to its product."""

    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.lecun_normal(), (8, 3))
        return jnp.einsum("bti,io->bto", x, w) + self.param("shift", nn.initializers.ones, (3,))


@pytest.mark.parametrize("execution", ["factored", "merged"])
def test_a_class_of_ones_own(execution):
    rule = rm.Layer(Scores, "...i,io->...o", weight="w")
    lora = rm.DoRA(2, 6, layers=(rule,), execution=execution)
    adapted, _, params = prepared(Scores(), X, lora)
    params = with_random_factors(params, lora)
    close(jax.jit(adapted.apply)({"params": params}, X),
          Scores().apply({"params": rm.merge(params, lora)}, X))


def test_adapters_of_examples_map_over_both():
    lora = rm.DoRA(2, 6)
    adapted, _, params = prepared(Encoder(), X, lora)
    trees = [rm.split(with_random_factors(params, lora, seed), lora)[0] for seed in (0, 1)]
    frozen = rm.split(params, lora)[1]
    assert {path[-1] for path in flatten_dict(frozen)} == {"kernel", "bias"}

    def one(tree, x):
        return adapted.apply({"params": rm.join(tree, frozen)}, x)

    stacked = jax.tree.map(lambda *v: jnp.stack(v), *trees)
    expected = jnp.stack([one(*pair) for pair in zip(trees, X, strict=True)])
    close(jax.jit(jax.vmap(one))(stacked, X), expected)


# What DoRA shares with plain LoRA, and what it refuses


def test_the_mask_and_the_penalty_leave_magnitudes_alone():
    lora = rm.DoRA(2, 6)
    _, _, params = prepared(Encoder(), X, lora)
    trainable, _ = rm.split(with_random_factors(params, lora), lora)
    tx = rm.mask_gradients(1, draw="exact", start_step=0)
    grads = jax.tree.map(jnp.ones_like, trainable)
    updates, _ = tx.update(grads, tx.init(trainable), trainable)
    for path, update in flatten_dict(updates).items():
        assert np.all(update == 1) == (path[-1] == "lora_m"), path
    penalised, _ = (tx := rm.add_orthogonality(0.5)).update(grads, tx.init(trainable), trainable)
    for path, update in flatten_dict(penalised).items():
        assert np.all(update == 1) == (path[-1] == "lora_m"), path


def test_the_intrinsic_dimension_is_that_of_the_low_rank_part():
    lora, plain = rm.DoRA(2, 6), rm.LoRA(2, 6)
    _, _, params = prepared(Encoder(), X, lora)
    flat = flatten_dict(with_random_factors(params, lora))
    rest = unflatten_dict({path: v for path, v in flat.items() if path[-1] != "lora_m"})
    found = rm.intrinsic_dimension(unflatten_dict(flat), lora)
    jax.tree.map(np.testing.assert_array_equal, found, rm.intrinsic_dimension(rest, plain))


def test_what_has_no_meaning_is_refused():
    lora = rm.DoRA(2)
    _, _, params = prepared(nn.Dense(5), X, lora)
    refused = "DoRA divides by the norm of W \\+ s A B"
    with pytest.raises(ValueError, match=refused):
        rm.pad_rank(params, lora, 4)
    with pytest.raises(ValueError, match=refused):
        rm.reduce_rank(params, lora, 1)
    with pytest.raises(ValueError, match=refused):
        rm.combine_adapters([(params, lora)] * 2)
    with pytest.raises(ValueError, match="DoRA has no diagonal to fold; merge takes it"):
        rm.to_lora(params, lora)
    with pytest.raises(ValueError, match=r'DoRA\.init is "pissa"'):
        rm.DoRA(2, init="pissa")
    with pytest.raises(ValueError, match="holds lora_a, lora_b, lora_m, but LoRA has lora_a"):
        rm.merge(params, rm.LoRA(2))
    del params["lora_m"]
    with pytest.raises(ValueError, match="holds lora_a, lora_b, but DoRA has"):
        rm.merge(params, lora)


def test_names_of_axes_and_axes_in_another_order():
    init = nn.with_partitioning(nn.initializers.normal(), ("embed", "mlp"))
    model = rm.adapt(nn.Dense(6, kernel_init=init), rm.DoRA(3))
    made = model.init(jax.random.key(0), X)["params"]
    assert [made[n].names for n in model.lora.factors] == [
        ("embed", None), (None, "mlp"), ("mlp",)]
    assert np.any(made["lora_m"].unbox())
    einsum = nn.Einsum((2, 8, 4), "bti,nih->btnh")
    lora = rm.DoRA(3, 6)
    adapted, _, params = prepared(einsum, X, lora)
    assert params["lora_m"].shape == (1, 8)  # the mark of geometry.factor_shapes
    params = unsettled(with_random_factors(params, lora))
    close(adapted.apply({"params": params}, X),
          einsum.apply({"params": rm.merge(params, adapted, X)}, X))


def test_a_tied_table_is_the_merged_one_both_ways():
    lora = rm.DoRA(2, 6)
    adapted, _, params = prepared(Tied(), adapted_nnx.IDS, lora)
    table = rm.merge(with_random_factors(params, lora), lora)["table"]["embedding"]
    found = adapted.apply({"params": with_random_factors(params, lora)}, adapted_nnx.IDS)
    close(found, jnp.tanh(table[adapted_nnx.IDS]) @ table.T)
