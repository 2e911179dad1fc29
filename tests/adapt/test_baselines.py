"""AdaLoRA's and SoRA's descriptions: the diagonal between A and B, in Linen, NNX and numpy."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import adapted_nnx
from fixtures.adapted import Encoder, Looped, Scanned, Tied, X, prepared, with_random_factors
from flax import nnx
from flax.traverse_util import flatten_dict
from marks import every_other
from test_adapt_layers import MODELS

import rmlora_jax as rm
from rmlora_jax.adapt.diagonal import AdaLoRA, SoRA
from rmlora_jax.adapt.ranks import to_lora

KINDS = (AdaLoRA, SoRA)
NAMES = ("dense", "dense general, batched", "conv, grouped", "embed, tied", "vmap", "scan")


def opened(params, lora, seed=3):
    """Random factors, with about half of the diagonal's entries 0 and one layer's wholly."""
    params = with_random_factors(params, lora, seed)
    flat, rng = flatten_dict(params), np.random.default_rng(seed)
    for path in [path for path in flat if path[-1] == "lora_e"]:
        flat[path] = flat[path] * rng.integers(0, 2, flat[path].shape)
    return jax.tree.map(jnp.asarray, rm.join({}, unflatten(flat)))


def unflatten(flat):
    tree = {}
    for path, leaf in flat.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = leaf
    return tree


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", every_other(NAMES))
def test_output_at_initialisation_is_the_bases_bit_for_bit(name, kind):
    build, x = MODELS[name]
    model = build(None)
    adapted, base, params = prepared(model, x, kind(rank=3, alpha=6))
    expected = jax.jit(model.apply)({"params": base}, x)
    found = jax.jit(adapted.apply)({"params": params}, x)
    assert np.asarray(found).tobytes() == np.asarray(expected).tobytes()
    for path, leaf in flatten_dict(params).items():
        if path[-1] == "lora_e":
            a = flatten_dict(params)[(*path[:-1], "lora_a")]
            assert leaf.shape == (*a.shape[:-2], a.shape[-1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", every_other(NAMES))
def test_adapted_equals_merged_and_folded(name, kind):
    build, x = MODELS[name]
    model, lora = build(None), kind(rank=5, alpha=6)
    adapted, base, params = prepared(model, x, lora)
    params = opened(params, lora)
    found = jax.jit(adapted.apply)({"params": params}, x)
    assert np.abs(found - jax.jit(model.apply)({"params": base}, x)).max() > 1e-3
    merged = jax.jit(model.apply)({"params": rm.merge(params, lora)}, x)
    np.testing.assert_allclose(found, merged, rtol=1e-4, atol=1e-5)
    plain_params, plain = to_lora(params, lora)
    assert type(plain) is rm.LoRA and not any("lora_e" in p for p in flatten_dict(plain_params))
    folded = jax.jit(rm.adapt(model, plain).apply)({"params": plain_params}, x)
    np.testing.assert_allclose(found, folded, rtol=1e-4, atol=1e-5)


def test_a_dense_layer_is_the_formula_of_the_papers():
    x = np.asarray(X, np.float64)
    for kind, scale in ((AdaLoRA, 16 / (4 + 1e-5)), (SoRA, 4.0)):
        lora = kind(rank=4, alpha=16)
        adapted, _, params = prepared(nn.Dense(5), X, lora)
        params = with_random_factors(params, lora)
        w, a, b, e = (
            np.asarray(params[n], np.float64) for n in ("kernel", "lora_a", "lora_b", "lora_e")
        )

        def loss(p, adapted=adapted):
            return jnp.sum(adapted.apply({"params": p}, X) ** 2)

        y = x @ w + np.asarray(params["bias"]) + scale * ((x @ a) * e) @ b
        np.testing.assert_allclose(adapted.apply({"params": params}, X), y, rtol=1e-5, atol=1e-5)
        grads = jax.grad(loss)(params)
        to_e = scale * np.einsum("btr,bto,ro->r", x @ a, 2 * y, b)
        np.testing.assert_allclose(grads["lora_e"], to_e, rtol=1e-4)
        to_a = scale * np.einsum("bti,bto,ro,r->ir", x, 2 * y, b, e)
        np.testing.assert_allclose(grads["lora_a"], to_a, rtol=1e-4, atol=1e-4)


def test_what_they_start_from():
    wide = jnp.ones((1, 400))
    _, _, ada = prepared(nn.Dense(300), wide, AdaLoRA(rank=50))
    assert not np.any(ada["lora_e"])
    for name in ("lora_a", "lora_b"):
        assert abs(np.std(ada[name]) / 0.02 - 1) < 0.03 and abs(np.mean(ada[name])) < 1e-3
    assert abs(np.corrcoef(ada["lora_a"][:300].ravel(), ada["lora_b"].T.ravel())[0, 1]) < 0.05
    _, _, sora = prepared(nn.Dense(300), wide, SoRA(rank=2000))
    assert not np.any(sora["lora_b"]) and np.abs(sora["lora_a"]).max() <= 400**-0.5
    assert abs(np.std(sora["lora_e"]) - 1) < 0.05 and abs(np.mean(sora["lora_e"])) < 0.08
    # attach and init draw alike; every layer of a stack and every seed draws its own.
    _, _, stack = prepared(Scanned(), X, SoRA(rank=4))
    gates = stack["layers"]["fc1"]["lora_e"]
    assert gates.shape == (3, 4) and len(np.unique(gates)) == 12
    made = rm.adapt(nn.Dense(300), AdaLoRA(rank=50)).init(jax.random.key(0), wide)["params"]
    assert not np.any(made["lora_e"]) and abs(np.std(made["lora_b"]) / 0.02 - 1) < 0.03


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_folding_drops_directions_and_keeps_scales(kind):
    lora = kind(rank=4, alpha=8, alpha_pattern=((".*fc2", 2.0),), train="layers_0/norm1")
    adapted, _, params = prepared(Looped(), X, lora)
    flat = flatten_dict(with_random_factors(params, lora))
    open_ = {"layers_0/fc1": [1, 0, 0, 1], "layers_1/fc2": [0, 0, 0, 0]}
    for path in [path for path in flat if path[-1] == "lora_e"]:
        flat[path] *= jnp.array(open_.get("/".join(path[:-1]), [0, 1, 1, 1]))
    params = unflatten(flat)
    folded, plain = to_lora(params, lora)
    ranks = {"layers_0/fc1": 2, "layers_1/fc2": 1, "layers_0/fc2": 3, "layers_1/attention/key": 3}
    for path, rank in ranks.items():
        assert plain.rank_of(path) == rank
        assert plain.scale_of(path) == pytest.approx(lora.scale_of(path), rel=1e-12)
    a = folded["layers_0"]["fc1"]["lora_a"]
    expected = flat["layers_0", "fc1", "lora_a"] * flat["layers_0", "fc1", "lora_e"]
    assert np.array_equal(a, expected[:, [0, 3]])  # exactly, in their order
    assert not np.any(folded["layers_1"]["fc2"]["lora_a"])
    assert plain.train == "layers_0/norm1"
    apply = rm.adapt(Looped(), plain).apply
    found, expected = apply({"params": folded}, X), adapted.apply({"params": params}, X)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    for one, other in zip(*(rm.intrinsic_dimension(p, d).values() for p, d in
                            ((params, lora), (folded, plain))), strict=True):
        values = one["singular_values"][: other["singular_values"].size]
        np.testing.assert_allclose(values, other["singular_values"], rtol=1e-4, atol=1e-5)


def test_a_stack_keeps_the_rank_of_its_fullest_layer():
    lora = SoRA(rank=4, alpha=8)
    _, _, params = prepared(Scanned(), X, lora)
    params = with_random_factors(params, lora)
    flat = flatten_dict(params)
    gate = jnp.array([[0, 0, 1, 0], [1, 0, 0, 2], [0, 0, 0, 0.0]])
    for path in [path for path in flat if path[-1] == "lora_e"]:
        flat[path] = gate
    folded, plain = to_lora(unflatten(flat), lora)
    a, b = (folded["layers"]["fc1"][name] for name in ("lora_a", "lora_b"))
    assert plain.rank == 2 and plain.rank_pattern == () and a.shape == (3, 8, 2)
    whole = flat["layers", "fc1", "lora_a"]
    assert np.array_equal(a[1], whole[1][:, [0, 3]] * jnp.array([1.0, 2.0]))
    assert np.array_equal(a[0][:, 0], whole[0][:, 2]) and not np.any(b[0][1]) and not np.any(b[2])


@pytest.mark.parametrize("kind", KINDS)
def test_merged_execution_patterns_and_partitions(kind):
    lora = kind(rank=3, alpha=6, alpha_pattern=((".*head", 12.0),))
    _, _, params = prepared(Encoder(), X, lora)
    params = with_random_factors(params, lora)
    expected = Encoder().apply({"params": rm.merge(params, lora)}, X)
    for execution in ("factored", "merged"):
        other = kind(rank=3, alpha=6, alpha_pattern=((".*head", 12.0),), execution=execution)
        found = rm.adapt(Encoder(), other).apply({"params": params}, X)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    init = nn.with_partitioning(nn.initializers.normal(), ("embed", "mlp"))
    boxed = rm.adapt(nn.Dense(6, kernel_init=init), lora.__class__(rank=3))
    made = boxed.init(jax.random.key(0), X)["params"]
    assert [made[n].names for n in lora.factors] == [("embed", None), (None, "mlp"), (None,)]


@pytest.mark.parametrize("kind", KINDS)
def test_axes_in_another_order(kind):
    model = nn.Einsum((2, 8, 4), "bti,nih->btnh")
    lora = kind(rank=3, alpha=6)
    adapted, _, params = prepared(model, X, lora)
    assert params["lora_e"].shape == (1, 3)  # the mark of geometry.factor_shapes
    params = with_random_factors(params, lora)
    merged = model.apply({"params": rm.merge(params, adapted, X)}, X)
    np.testing.assert_allclose(adapted.apply({"params": params}, X), merged, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_nnx(kind):
    for build, x in ((adapted_nnx.Looped, adapted_nnx.X), (adapted_nnx.Stacked, adapted_nnx.X),
                     (adapted_nnx.Tied, adapted_nnx.IDS)):
        base, lora = build(rngs=nnx.Rngs(0)), kind(rank=3, alpha=6)
        model = rm.adapt(base, lora, rngs=nnx.Rngs(1))
        assert np.array_equal(adapted_nnx.call(model, x), adapted_nnx.call(base, x))
        state = nnx.state(model, nnx.LoRAParam)
        rng = np.random.default_rng(2)
        nnx.update(model, jax.tree.map(lambda v, rng=rng: jnp.asarray(
            rng.normal(size=v.shape, scale=0.25), jnp.float32), state))
        names = {path[-1] for path, _ in nnx.to_flat_state(state)}
        assert names == {"lora_a", "lora_b", "lora_e"}
        found, merged = adapted_nnx.call(model, x), adapted_nnx.call(rm.merge(model, lora), x)
        assert np.abs(found - adapted_nnx.call(base, x)).max() > 1e-2
        np.testing.assert_allclose(found, merged, rtol=1e-4, atol=1e-5)
        plain = nnx.to_flat_state(nnx.state(rm.merge(model, lora)))
        assert not any("lora_e" in path for path, _ in plain)


def test_refusals():
    with pytest.raises(ValueError, match=r'AdaLoRA.init is "pissa".*use LoRA'):
        AdaLoRA(rank=2, init="pissa")
    with pytest.raises(ValueError, match=r"LoRA has no diagonal"):
        to_lora({}, rm.LoRA(rank=2))
    adapted, _, params = prepared(nn.Dense(5), X, SoRA(rank=2))
    for lora in (rm.LoRA(rank=2), AdaLoRA(rank=2)):
        plain = {name: leaf for name, leaf in params.items() if name != "lora_e"}
        wrong = params if type(lora) is rm.LoRA else plain
        with pytest.raises(ValueError, match="use the description that the factors were made with"):
            rm.adapt(nn.Dense(5), lora).apply({"params": wrong}, X)
        with pytest.raises(ValueError, match="use the description that the factors were made with"):
            rm.merge(wrong, lora)
    with pytest.raises(ValueError, match="has factors already"):
        rm.attach(jax.random.key(0), adapted, {**params}, X)
    _, _, tied = prepared(Tied(), jnp.arange(12).reshape(2, 6), SoRA(rank=2))
    trainable, frozen = rm.split(tied, SoRA(rank=2))
    assert set(trainable["table"]) == {"lora_a", "lora_b", "lora_e"}
    assert set(frozen["table"]) == {"embedding"}
