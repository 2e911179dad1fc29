"""Several adapters of one base: against dense float64 sums, PEFT, and the model's own output."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.adapted import Scanned, X, prepared, with_random_factors
from flax.traverse_util import flatten_dict, unflatten_dict
from oracle import oracle

import rmlora_jax as rm

SIZES = {"q": ((), 7, 6), "blocks/v": ((3,), 6, 5), "wide": ((2,), 3, 9)}
ODD = [(1.0, 1.0), (0.3, -1.5), (0.0, 2.25), (-0.7, 0.0)]


def adapter(seed, ranks, sizes=SIZES, dtype=np.float32):
    """Random factors of the given rank for each module."""
    rng, flat = np.random.default_rng(seed), {}
    for path, rank in ranks.items():
        stack, size_in, size_out = sizes[path]
        module = tuple(path.split("/"))
        flat[*module, "lora_a"] = jnp.asarray(rng.normal(size=(*stack, size_in, rank)), dtype)
        flat[*module, "lora_b"] = jnp.asarray(rng.normal(size=(*stack, rank, size_out)), dtype)
    return unflatten_dict(flat)


def product(params, path):
    node = params
    for name in path.split("/"):
        node = node[name]
    return np.asarray(node["lora_a"], np.float64) @ np.asarray(node["lora_b"], np.float64)


def delta(result, path):
    params, lora = result
    return lora.scale_of(path) * product(params, path)


def best(matrix, rank):
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ vt[..., :rank, :]


def close(found, expected, tol=5e-6):
    np.testing.assert_allclose(found, expected, rtol=tol, atol=tol * max(1, np.abs(expected).max()))


# Two adapters that share one module only, with ranks, patterns and scales of their own. The scales
# are written out: alpha / r, alpha / sqrt(r) with rs, alpha_pattern before alpha.
ONE = adapter(0, {"q": 2, "blocks/v": 3})
ONE_LORA = rm.LoRA(2, 6, r"q|blocks/v", rank_pattern=((".*/v", 3),), alpha_pattern=(("q", 1.0),))
ONE_SCALES = {"q": 0.5, "blocks/v": 2.0}
TWO = adapter(1, {"blocks/v": 4, "wide": 4})
TWO_LORA = rm.LoRA(4, 3, ("v", "wide"), rs=True)
TWO_SCALES = {"blocks/v": 1.5, "wide": 1.5}
BOTH = [(ONE, ONE_LORA), (TWO, TWO_LORA)]


def dense(w1, w2):
    """The weighted sums, by module, in float64."""
    out = {}
    for weight, params, scales in ((w1, ONE, ONE_SCALES), (w2, TWO, TWO_SCALES)):
        for path, scale in scales.items():
            out[path] = out.get(path, 0) + weight * scale * product(params, path)
    return out


# pad_rank


def test_padding_leaves_the_output_as_it_is():
    model = Scanned()
    lora = rm.LoRA(3, 6, rank_pattern=((".*fc1", 2),), train=".*norm1")
    adapted, base, params = prepared(model, X, lora)
    params = with_random_factors(params, lora)
    wide, wide_lora = rm.pad_rank(params, lora, 8)
    found = rm.adapt(model, wide_lora).apply({"params": wide}, X)
    expected = adapted.apply({"params": params}, X)
    assert np.abs(expected - model.apply({"params": base}, X)).max() > 1e-2
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    before, after = flatten_dict(params), flatten_dict(wide)
    assert before.keys() == after.keys()
    for path, leaf in after.items():
        if path[-1] == "lora_a":
            assert leaf.shape[-1] == 8
        elif path[-1] != "lora_b":
            assert leaf is before[path]
    assert (wide_lora.rank, wide_lora.rank_pattern, wide_lora.train) == (8, (), ".*norm1")
    rm.split(wide, wide_lora)  # every factor as described


def test_padding_appends_zeros_keeps_dtypes_and_scales():
    params = jax.tree.map(lambda v: v.astype(jnp.bfloat16), ONE)
    wide, lora = rm.pad_rank(params, ONE_LORA, 4)
    for path, rank in (("q", 2), ("blocks/v", 3)):
        old, new = params, wide
        for name in path.split("/"):
            old, new = old[name], new[name]
        assert new["lora_a"].dtype == new["lora_b"].dtype == jnp.bfloat16
        np.testing.assert_array_equal(new["lora_a"][..., :rank], old["lora_a"])
        np.testing.assert_array_equal(new["lora_b"][..., :rank, :], old["lora_b"])
        assert not np.any(new["lora_a"][..., rank:]) and not np.any(new["lora_b"][..., rank:, :])
        assert lora.scale_of(path) == ONE_SCALES[path] and lora.rank_of(path) == 4
    wide, lora = rm.pad_rank(TWO, TWO_LORA, 8)
    assert {path: lora.scale_of(path) for path in TWO_SCALES} == TWO_SCALES
    assert lora.rs is False and lora.target == ("v", "wide")


def test_scales_are_exact_or_off_by_one_rounding():
    exact = 0
    for rank in (3, 5, 6, 7, 12, 100):
        for alpha in (1.0, 7.0, 16.0, 0.1):
            for rs in (False, True):
                old = rm.LoRA(3, alpha, rs=rs)
                params = adapter(0, {"q": 3})
                scale = rm.pad_rank(params, old, rank)[1].scale_of("q")
                exact += scale == old.scale_of("q")
                assert abs(scale - old.scale_of("q")) <= np.spacing(scale)
    assert exact >= 40  # of 48


def test_padded_directions_have_no_gradient():
    lora = rm.LoRA(2, 4)
    _, _, params = prepared(nn.Dense(5), X, lora)
    wide, lora = rm.pad_rank(with_random_factors(params, lora), lora, 4)
    adapted = rm.adapt(nn.Dense(5), lora)
    grads = jax.grad(lambda p: jnp.sum(jnp.sin(adapted.apply({"params": p}, X))))(wide)
    assert np.any(grads["lora_a"][:, :2]) and not np.any(grads["lora_a"][:, 2:])
    assert np.any(grads["lora_b"][:2]) and not np.any(grads["lora_b"][2:])


# reduce_rank


@pytest.mark.parametrize("rank", [1, 2, 3, 5])
def test_reduction_is_the_best_approximation(rank):
    params = adapter(2, {"q": 4, "blocks/v": 5, "wide": 5})
    lora = rm.LoRA(5, 10, rank_pattern=(("q", 4),))
    low = rm.reduce_rank(params, lora, rank)
    for path, size in (("q", 4), ("blocks/v", 5), ("wide", 3)):  # "wide" has 3 inputs
        scale = {"q": 2.5}.get(path, 2.0)
        assert low[1].scale_of(path) == scale
        close(delta(low, path), best(scale * product(params, path), rank))
        node = low[0]
        for name in path.split("/"):
            node = node[name]
        a, b = np.asarray(node["lora_a"]), np.asarray(node["lora_b"])
        assert a.shape[-1] == b.shape[-2] == low[1].rank_of(path) == min(rank, size)
        values = np.linalg.svd(product(params, path), compute_uv=False)[..., : a.shape[-1]]
        diagonal = values[..., None] * np.eye(a.shape[-1])
        close(a.swapaxes(-1, -2) @ a, diagonal)
        close(b @ b.swapaxes(-1, -2), diagonal)
        assert a.dtype == b.dtype == np.float32


def test_reduction_of_low_precision_and_of_nothing():
    params = adapter(3, {"q": 4}, dtype=jnp.bfloat16)
    low = rm.reduce_rank(params, rm.LoRA(4, dtype=jnp.bfloat16), 2)
    assert low[0]["q"]["lora_a"].dtype == jnp.float32 == low[1].dtype
    close(delta(low, "q"), best(product(params, "q"), 2))
    params["q"]["lora_b"] *= 0
    low = rm.reduce_rank(params, rm.LoRA(4), 2)[0]["q"]
    assert not np.any(low["lora_a"]) and not np.any(low["lora_b"])


def test_all_run_under_jit_with_base_weights_and_eval_shape():
    base = {"norm": {"scale": jnp.ones(3)}}  # traced values cannot be compared
    results = {
        "pad": lambda one, two: rm.pad_rank(one, ONE_LORA, 5)[0],
        "reduce": lambda one, two: rm.reduce_rank(one, ONE_LORA, 2)[0],
        "svd": lambda one, two: rm.combine_adapters([(one, ONE_LORA), (two, TWO_LORA)])[0],
        "align": lambda one, two: rm.align_adapters(
            {"one": (one, ONE_LORA), "two": (two, TWO_LORA)}
        )[0],
    }  # fmt: skip
    for name, function in results.items():
        one, two = ONE | base, TWO | base
        eager, jitted = function(one, two), jax.jit(function)(one, two)
        shapes = jax.eval_shape(function, one, two)
        assert jax.tree.structure(eager) == jax.tree.structure(shapes)
        for x, y, z in zip(*map(jax.tree.leaves, (eager, jitted, shapes)), strict=True):
            assert (x.shape, x.dtype) == (z.shape, z.dtype)
            if name in ("pad", "align"):  # singular vectors may differ in sign
                np.testing.assert_allclose(x, y, rtol=1e-6)


# combine_adapters


@pytest.mark.parametrize("weights", ODD)
def test_cat_is_the_sum_and_svd_its_best_approximation(weights):
    expected = dense(*weights)
    cat = rm.combine_adapters(BOTH, weights, "cat")
    svd = rm.combine_adapters(BOTH, weights)
    low = rm.combine_adapters(BOTH, weights, "svd", rank=2)
    assert set(flatten_dict(cat[0], sep="/")) == {f"{p}/lora_{f}" for p in SIZES for f in "ab"}
    for path, ranks in (("q", (2, 2)), ("blocks/v", (7, 4)), ("wide", (4, 3))):
        assert (cat[1].rank_of(path), svd[1].rank_of(path)) == ranks
        assert cat[1].scale_of(path) == svd[1].scale_of(path) == (ONE_SCALES | {"wide": 1.5})[path]
        close(delta(cat, path), expected[path])
        close(delta(svd, path), best(expected[path], ranks[1]))
        close(delta(low, path), best(expected[path], 2))


@pytest.mark.parametrize("weights", ODD)
def test_linear_adds_the_factors(weights):
    three = adapter(4, {"blocks/v": 3, "wide": 3})
    lora = rm.LoRA(3, 12, ".*(v|wide)")
    found = rm.combine_adapters([(ONE, ONE_LORA), (three, lora)], weights, "linear")
    v = ONE["blocks"]["v"], three["blocks"]["v"]
    parts = [np.float64(w) * s for w, s in zip(weights, (2.0, 4.0), strict=True)]
    roots = [np.sqrt(abs(p)) for p in parts]
    signed = [np.sign(p) * root for p, root in zip(parts, roots, strict=True)]
    a = sum(w * np.float64(f["lora_a"]) for w, f in zip(signed, v, strict=True))
    b = sum(w * np.float64(f["lora_b"]) for w, f in zip(roots, v, strict=True))
    close(delta(found, "blocks/v"), a @ b)
    close(delta(found, "q"), weights[0] * 0.5 * product(ONE, "q"))  # what one of them has
    close(delta(found, "wide"), weights[1] * 4.0 * product(three, "wide"))
    total = sum(p * product(f, "blocks/v") for p, f in zip(parts, (ONE, three), strict=True))
    apart = np.abs(delta(found, "blocks/v") - total).max()
    assert apart > 1 if all(weights) else apart < 1e-4  # the cross terms


def test_default_weights_are_the_mean_and_one_adapter_is_itself():
    for how in ("cat", "svd"):
        found = rm.combine_adapters(BOTH, how=how)
        close(delta(found, "q"), 0.5 * dense(1, 1)["q"])
    for how in ("cat", "svd", "linear"):
        params, lora = rm.combine_adapters([(ONE, ONE_LORA)], how=how)
        close(delta((params, lora), "blocks/v"), 2.0 * product(ONE, "blocks/v"))
        if how != "svd":
            jax.tree.map(np.testing.assert_array_equal, params, ONE)
        assert [lora.scale_of(p) for p in ONE_SCALES] == list(ONE_SCALES.values())
        assert [lora.rank_of(p) for p in ONE_SCALES] == [2, 3]


def test_the_model_of_the_sum_computes_with_the_sum_of_the_updates():
    model = Scanned()
    loras = rm.LoRA(2, 6, r".*(query|out|fc1)"), rm.LoRA(3, 3, r".*(fc1|fc2|value)")
    base, adapters = None, []
    for seed, lora in enumerate(loras):
        _, base, params = prepared(model, X, lora)
        adapters.append((with_random_factors(params, lora, seed), lora))
    expected = flatten_dict(base)
    for (params, _), scale in zip(adapters, (3.0, 1.0), strict=True):
        for path in {path[:-1] for path in flatten_dict(params) if path[-1] == "lora_a"}:
            kernel = expected[*path, "kernel"]
            expected[*path, "kernel"] = kernel + (
                scale * product(params, "/".join(path))
            ).reshape(kernel.shape).astype(np.float32)
    expected = model.apply({"params": unflatten_dict(expected)}, X)
    params, lora = rm.combine_adapters(adapters, (1, 1), "cat")
    found = rm.adapt(model, lora).apply({"params": params}, X)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert np.abs(expected - model.apply({"params": base}, X)).max() > 0.1
    for path, leaf in flatten_dict(params).items():  # the base, not a copy of it
        if path[-1] not in ("lora_a", "lora_b"):
            assert leaf is flatten_dict(adapters[0][0])[path]
    # Trainable parts alone give the same, and one with its base brings the base in.
    parts = [(rm.split(params, lora)[0], lora) for params, lora in adapters]
    alone, same = rm.combine_adapters(parts, (1, 1), "cat")
    assert same == lora
    jax.tree.map(np.testing.assert_array_equal, alone, rm.split(params, lora)[0])
    mixed, _ = rm.combine_adapters([parts[0], adapters[1]], (1, 1), "cat")
    jax.tree.map(np.testing.assert_array_equal, mixed, params)


def test_factors_of_axes_in_another_order_and_of_a_root_layer():
    for model, x in ((nn.Einsum((2, 8, 4), "bti,nih->btnh"), X), (nn.Dense(5), X)):
        adapters = []
        for seed, rank in ((0, 2), (1, 3)):
            # The rules differ: the result's target must name the root, whose path is "".
            lora = rm.LoRA(rank, 6, target=".*" if seed else "()")
            params = prepared(model, x, lora)[2]
            adapters.append((with_random_factors(params, lora, seed), lora))
        params, lora = rm.combine_adapters(adapters, (1, 1), "cat")
        assert lora.targets("") and not lora.targets("a")
        base = model.apply({"params": {n: params[n] for n in ("kernel", "bias")}}, x)
        parts = [rm.adapt(model, d).apply({"params": p}, x) - base for p, d in adapters]
        found = rm.adapt(model, lora).apply({"params": params}, x)
        np.testing.assert_allclose(found, base + sum(parts), rtol=1e-4, atol=1e-5)


def test_descriptions_keep_rules_that_agree_and_list_paths_otherwise():
    same = dataclasses.replace(ONE_LORA, dropout=0.1)
    lora = rm.combine_adapters([(ONE, same), (ONE, ONE_LORA)], how="cat")[1]
    assert (lora.target, lora.dropout, lora.exclude) == (ONE_LORA.target, 0.1, None)
    lora = rm.combine_adapters(BOTH)[1]
    assert [p for p in (*SIZES, "x/q", "v", "blocks") if lora.targets(p)] == list(SIZES)
    layers = tuple(rm.Layer(type(n, (nn.Module,), {}), "...i,io->...o") for n in "abc")
    pair = [dataclasses.replace(ONE_LORA, layers=some) for some in (layers[:2], layers[1:])]
    assert rm.combine_adapters([(ONE, lora) for lora in pair])[1].layers == layers


def test_partition_names_stay():
    init = nn.with_partitioning(nn.initializers.normal(), ("embed", "mlp"))
    lora = rm.LoRA(2, train="bias")
    params = rm.adapt(nn.Dense(6, kernel_init=init), lora).init(jax.random.key(0), X)["params"]
    for found in (
        rm.pad_rank(params, lora, 4)[0],
        rm.combine_adapters([(params, lora), (params, lora)], how="cat")[0],
        rm.align_adapters({"one": (params, lora), "wide": rm.pad_rank(params, lora, 4)})[0]["one"],
    ):
        assert found["lora_a"].names == ("embed", None) and found["lora_b"].names == (None, "mlp")
        assert found["lora_a"].value.shape == (8, 4)


# What is trained in full


def headed(seed, out=3, dtype=np.float32, train="head"):
    rng = np.random.default_rng(seed)
    head = {"kernel": jnp.asarray(rng.normal(size=(6, out)), dtype)}
    return adapter(seed, {"q": 2}) | {"head": head}, rm.LoRA(2, target="q", train=train)


def test_heads_become_their_weighted_mean():
    adapters = [headed(seed) for seed in range(3)]
    for how in ("svd", "cat", "linear"):
        params, lora = rm.combine_adapters(adapters, (3, 0, -1), how)
        kernels = [np.asarray(p["head"]["kernel"], np.float64) for p, _ in adapters]
        close(params["head"]["kernel"], 1.5 * kernels[0] - 0.5 * kernels[2])
        assert lora.train == "head"
        found = rm.combine_adapters(adapters, (3, 0, -1), how, head=1)[0]["head"]["kernel"]
        assert found is adapters[1][0]["head"]["kernel"]
    mean = rm.combine_adapters(adapters)[0]["head"]["kernel"]
    close(mean, sum(kernels) / 3)
    half = [headed(seed, dtype=jnp.bfloat16) for seed in range(2)]
    mean = rm.combine_adapters(half)[0]["head"]["kernel"]
    exact = sum(np.asarray(p["head"]["kernel"], np.float64) for p, _ in half) / 2
    assert mean.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(mean, np.float64), exact, rtol=2**-8)


def test_what_only_some_train_comes_from_those():
    (one, trains), (two, _) = headed(0), headed(1)
    kept = dataclasses.replace(trains, train=None)
    for pair in ([(one, trains), (two, kept)], [(two, kept), (one, trains)]):
        params, lora = rm.combine_adapters(pair, (0.5, 2.0))
        assert params["head"]["kernel"] is one["head"]["kernel"]
        assert lora.train == "head/kernel" and lora.trains("head/kernel")
        # The other's is its base's then, and its description trains none.
        i = [lora.train for _, lora in pair].index(None)
        params, lora = rm.combine_adapters(pair, (0.5, 2.0), head=i)
        assert params["head"]["kernel"] is two["head"]["kernel"] and lora.train is None
    # Heads of different labels, dropped.
    pair = [({"q": p["q"]}, d) for p, d in (headed(0), headed(1, out=5))]
    params, lora = rm.combine_adapters(pair)
    assert set(params) == {"q"} and lora.train is None


def test_heads_alone():
    heads = [({"head": headed(seed)[0]["head"]}, rm.LoRA(1, target=None, train="head"))
             for seed in range(2)]  # fmt: skip
    params, lora = rm.combine_adapters(heads)
    close(params["head"]["kernel"], sum(np.float64(p["head"]["kernel"]) for p, _ in heads) / 2)
    assert (lora.target, lora.train) == (None, "head")
    assert rm.pad_rank(*heads[0], 4)[0]["head"]["kernel"] is heads[0][0]["head"]["kernel"]


# align_adapters


def test_one_program_serves_adapters_of_any_rank_target_and_scale():
    model = Scanned()
    loras = {
        "small": rm.LoRA(2, 6, r".*(query|fc1)", train=".*norm1"),
        "large": rm.LoRA(5, 5, r".*(fc1|fc2|out)", rank_pattern=((".*out", 1),), rs=True),
    }
    adapters, expected = {}, {}
    for seed, (name, lora) in enumerate(loras.items()):
        adapted, _, params = prepared(model, X, lora)
        adapters[name] = (with_random_factors(params, lora, seed), lora)
        expected[name] = adapted.apply({"params": adapters[name][0]}, X)
    trees, lora = rm.align_adapters(adapters)
    described = [
        jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree) for tree in trees.values()
    ]
    assert described[0] == described[1]
    assert trees["small"]["layers"]["fc1"]["lora_a"].shape == (3, 8, 5)
    assert trees["small"]["layers"]["attention"]["out"]["lora_b"].shape == (3, 1, 8)
    wide = rm.attach(jax.random.key(0), rm.adapt(model, lora), base_of(adapters["large"][0]), X)
    trainable, frozen = rm.split(wide, lora)
    assert jax.tree.structure(trainable) == jax.tree.structure(trees["small"])
    adapted, traces = rm.adapt(model, lora), []

    @jax.jit
    def apply(tree, x):
        traces.append(1)
        return adapted.apply({"params": rm.join(tree, frozen)}, x)

    for name in ("small", "large", "small"):
        np.testing.assert_allclose(apply(trees[name], X), expected[name], rtol=1e-4, atol=1e-5)
    assert len(traces) == 1
    assert np.abs(expected["small"] - expected["large"]).max() > 0.1

    # One adapter for each example, as README.md of adapt has it.
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees.values())

    def one(index, x):
        return apply(jax.tree.map(lambda leaf: leaf[index], stacked), x[None])[0]

    for indices in ([0, 1], [1, 1]):
        found = jax.vmap(one)(jnp.array(indices), X)
        rows = [expected[list(trees)[i]][row] for row, i in enumerate(indices)]
        np.testing.assert_allclose(found, rows, rtol=1e-4, atol=1e-5)


def base_of(params):
    flat = flatten_dict(params)
    return unflatten_dict({p: v for p, v in flat.items() if p[-1] not in ("lora_a", "lora_b")})


def test_aligned_factors_are_the_same_updates():
    trees, lora = rm.align_adapters({"one": (ONE, ONE_LORA), "two": (TWO, TWO_LORA)})
    for name, params, scales in (("one", ONE, ONE_SCALES), ("two", TWO, TWO_SCALES)):
        for path, (stack, size_in, size_out) in SIZES.items():
            update = np.zeros((*stack, size_in, size_out))
            if path in scales:
                update = scales[path] * product(params, path)
            close(delta((trees[name], lora), path), update)
    assert [lora.scale_of(path) for path in SIZES] == [0.5, 2.0, 1.5]
    assert [lora.rank_of(path) for path in SIZES] == [2, 4, 4]
    # Scale and rank agree: nothing is changed.
    trees, lora = rm.align_adapters({"one": (ONE, ONE_LORA), "again": (ONE, ONE_LORA)})
    for tree in trees.values():
        jax.tree.map(np.testing.assert_array_equal, tree, ONE)
    assert [lora.scale_of(path) for path in ONE_SCALES] == [0.5, 2.0]


def test_aligned_heads():
    (one, trains), (two, _) = headed(0), headed(1, dtype=jnp.bfloat16)
    kept = dataclasses.replace(trains, train=None)
    trees, lora = rm.align_adapters({"one": (one, trains), "two": (two, kept)})
    assert {tree["head"]["kernel"].dtype for tree in trees.values()} == {jnp.dtype("float32")}
    np.testing.assert_array_equal(trees["two"]["head"]["kernel"], two["head"]["kernel"])
    assert lora.train == "head/kernel"
    with pytest.raises(ValueError, match=r"'two' holds no 'head/kernel'.*base weights, join"):
        rm.align_adapters({"one": (one, trains), "two": ({"q": two["q"]}, kept)})
    with pytest.raises(ValueError, match=r"'head/kernel'.*\(6, 3\), \(6, 5\).*outside the program"):
        rm.align_adapters({"one": (one, trains), "two": headed(1, out=5)})


# Refusals


def test_refusals():
    one, lora = headed(0)
    pair, wide = (one, lora), (headed(1, out=5)[0], lora)
    diagonal = {"q": one["q"] | {"lora_e": jnp.ones(2)}}
    bent = {"q": one["q"] | {"lora_b": jnp.ones((3, 6))}}
    other = {"q": {"lora_a": jnp.ones((9, 2)), "lora_b": jnp.ones((2, 6))}}
    based = one | {"norm": {"scale": jnp.ones(3)}}
    moved = one | {"norm": {"scale": jnp.ones(3) + 1e-3}}
    longer = one | {"norm": {"scale": jnp.ones(4)}}
    combine = rm.combine_adapters
    for call, error, words in (
        (lambda: rm.pad_rank(diagonal, rm.SoRA(2), 3), ValueError, "SoRA has a.*rm.to_lora"),
        (lambda: rm.reduce_rank(diagonal, rm.AdaLoRA(2), 1), ValueError, "AdaLoRA.*rm.to_lora"),
        (lambda: combine([pair, (diagonal, rm.SoRA(2))]), ValueError, "rm.to_lora"),
        (lambda: rm.align_adapters({"a": (diagonal, rm.SoRA(2))}), ValueError, "rm.to_lora"),
        (lambda: rm.pad_rank(diagonal, lora, 3), ValueError, "'q' holds lora_a, lora_b, lora_e"),
        (lambda: rm.pad_rank(one, lora, 1), ValueError, "'q' has rank 2 already.*reduce_rank"),
        (lambda: rm.pad_rank(one, lora, 0), ValueError, "LoRA.rank is 0"),
        (lambda: rm.reduce_rank(one, lora, 1.5), ValueError, "LoRA.rank is 1.5"),
        (lambda: rm.reduce_rank(bent, lora, 1), ValueError, r"'q', .*lora_b \(3, 6\).*, in, 2\)"),
        (lambda: rm.reduce_rank(one, rm.LoRA(3), 1), ValueError, r"description.*, in, 3\)"),
        (lambda: rm.reduce_rank(one, rm.LoRA(2, target="k"), 1), ValueError, "does not select"),
        (lambda: rm.reduce_rank({"head": one["head"]}, lora, 1), ValueError, "hold no factors"),
        (lambda: rm.reduce_rank([one], lora, 1), TypeError, r"not \(list, LoRA\)"),
        (lambda: combine([(lora, one)]), TypeError, r"not \(LoRA, dict\)"),
        (lambda: combine([one]), TypeError, r"a pair \(params, lora\), not a dict"),
        (lambda: combine([]), ValueError, "no adapters"),
        (lambda: rm.align_adapters({}), ValueError, "no adapters"),
        (lambda: combine([pair], (1, 2)), ValueError, r"weights is \[1.0, 2.0\]; allowed: 1"),
        (lambda: combine([pair], (np.nan,)), ValueError, "finite"),
        (lambda: combine([pair], how="mean"), ValueError, "how is 'mean'; allowed: 'svd', 'cat'"),
        (lambda: combine([pair], how="cat", rank=2), ValueError, "rank=2 goes.*not with 'cat'"),
        (lambda: combine([pair], rank=0), ValueError, "LoRA.rank is 0"),
        (lambda: combine([pair, pair], head=2), ValueError, "head is 2; allowed: an index below 2"),
        (lambda: combine([pair, headed(1)], (1, -1)), ValueError, "sum to 0.*head=INDEX"),
        (lambda: combine([pair, headed(1)], (1, -3)), ValueError, "sum to -2.*head=INDEX"),
        (lambda: combine([pair, wide]), ValueError, r"\(6, 3\), \(6, 5\): drop.*head=INDEX"),
        (lambda: combine([pair, (other, rm.LoRA(2))]), ValueError, "'q'.*one base model"),
        (lambda: combine([pair, (adapter(1, {"q": 3}), rm.LoRA(3))], how="linear"), ValueError,
         r"'q' have the ranks \[2, 3\].*pad_rank first"),
        (lambda: combine([(based, lora), (moved, lora)]), ValueError, "weights at 'norm/scale'"),
        (lambda: combine([(based, lora), (longer, lora)]), ValueError, "base weights at"),
        (lambda: rm.align_adapters({"a": (based, lora), "b": (moved, lora)}), ValueError,
         "base weights at 'norm/scale'"),
    ):  # fmt: skip
        with pytest.raises(error, match=words):
            call()
    assert combine([pair, wide], head=1)[0]["head"] == wide[0]["head"]
    assert combine([pair, headed(1)], (1, -1), head=0)[0]["head"] == one["head"]
    again = jax.tree.map(lambda v: v + 0, based)  # equal base weights, not the same arrays
    assert combine([(based, lora), (again, lora)])[0]["norm"]["scale"] is based["norm"]["scale"]


def test_nothing_is_changed_in_place():
    before = jax.tree.map(lambda v: v, ONE), jax.tree.map(lambda v: v, TWO)
    rm.combine_adapters(BOTH)
    rm.align_adapters(dict(zip("ab", BOTH, strict=True)))
    rm.pad_rank(ONE, ONE_LORA, 5)
    for old, new in zip(before, (ONE, TWO), strict=True):
        assert jax.tree.structure(old) == jax.tree.structure(new)
        assert all(x is y for x, y in zip(*map(jax.tree.leaves, (old, new)), strict=True))


# PEFT


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [(3, 3), (2, 3)])
def test_the_updates_are_those_of_peft(tmp_path, ranks):
    oracle.python()  # or the test is skipped
    sizes, alphas = {"first": ((), 6, 5), "second": ((), 5, 4)}, (6.0, 1.5)
    targets = ("first", "second"), ("second",)
    adapters, data = [], {"ranks": ranks, "alphas": alphas, "weights": ODD, "svd_rank": 2}
    for i, layers in enumerate(targets):
        params = adapter(i, dict.fromkeys(layers, ranks[i]), sizes)
        adapters.append((params, rm.LoRA(ranks[i], alphas[i], layers)))
        for layer in layers:
            for name in "ab":
                data[f"{i}/{layer}/{name}"] = np.asarray(params[layer][f"lora_{name}"])
    np.savez(tmp_path / "in.npz", **data)
    oracle.run("weighted_adapters.py", tmp_path / "in.npz", tmp_path / "out.npz")
    expected = np.load(tmp_path / "out.npz")
    hows = {name.split("/")[0] for name in expected}
    assert hows == ({"svd", "cat", "linear"} if ranks == (3, 3) else {"svd", "cat"})
    for how in hows:
        for case, weights in enumerate(ODD):
            found = rm.combine_adapters(adapters, weights, how, rank=2 if how == "svd" else None)
            for layer in sizes:
                close(delta(found, layer), expected[f"{how}/{case}/{layer}"])
