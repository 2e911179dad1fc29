"""The orthogonality penalty: its value, its gradient, and its gradient as a transformation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from marks import every_other

from rmlora_jax.optim.orthogonality import add_orthogonality, orthogonality

KINDS = ("norm", "squared", "cosine")


def factors(stack=(), rank=3, seed=0, scale=1.0):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(scale * rng.normal(size=(*stack, *shape)), jnp.float32)

    return {
        "q": {"lora_a": normal(6, rank), "lora_b": normal(rank, 5), "kernel": normal(6, 5)},
        "v": {"lora_a": normal(4, rank), "lora_b": normal(rank, 7)},
        "head": {"kernel": jnp.ones((3, 3)), "steps": jnp.int32(3)},
    }


def directions(tree):
    """Every matrix of the tree as rows of rank directions, in float64."""
    for module in ("q", "v"):
        a, b = (np.asarray(tree[module][name], np.float64) for name in ("lora_a", "lora_b"))
        yield from np.swapaxes(a, -1, -2).reshape(-1, a.shape[-1], a.shape[-2])
        yield from b.reshape(-1, *b.shape[-2:])


def reference(tree, kind, reduction):
    values = []
    for p in directions(tree):
        r = len(p)
        if kind == "cosine":
            unit = p / np.linalg.norm(p, axis=1, keepdims=True)
            cosines = [abs(unit[i] @ unit[k]) for i in range(r) for k in range(r) if i != k]
            values.append(np.mean(cosines) if cosines else 0.0)
        else:
            norm = np.linalg.norm(p @ p.T - np.eye(r), "fro")
            values.append(norm**2 if kind == "squared" else norm)
    return np.mean(values) if reduction == "mean" else np.sum(values)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("stack", [(), (2,), (2, 3)])
def test_value_against_numpy(kind, reduction, stack):
    tree = factors(stack)
    found = jax.jit(lambda t: orthogonality(t, kind=kind, reduction=reduction))(tree)
    assert found.dtype == jnp.float32 and found.shape == ()
    np.testing.assert_allclose(found, reference(tree, kind, reduction), rtol=1e-6)


def test_hand_computed_values():
    """A = I (norm 0), B = 0: (1/2)(0 + sqrt 2); the r x r Gram, not the d x d one."""
    tree = {"lora_a": jnp.eye(5, 2), "lora_b": jnp.zeros((2, 3))}
    np.testing.assert_allclose(orthogonality(tree), np.sqrt(2) / 2, rtol=1e-7)
    np.testing.assert_allclose(orthogonality(tree, kind="squared"), 1.0, rtol=1e-7)
    assert orthogonality(tree, kind="cosine") == 0
    aligned = {"lora_a": jnp.array([[1.0, 3.0]]), "lora_b": jnp.eye(2)}
    np.testing.assert_allclose(orthogonality(aligned, kind="cosine"), 0.5, rtol=1e-6)
    np.testing.assert_allclose(  # |[[0, 3], [3, 8]]|_F / 2
        orthogonality(aligned), np.sqrt(82) / 2, rtol=1e-6
    )


def test_layers_count_one_by_one():
    stacked = factors((4,), seed=3)
    layers = {str(i): jax.tree.map(lambda x, i=i: x[i], {k: stacked[k] for k in "qv"})
              for i in range(4)}  # fmt: skip
    for kind in KINDS:
        np.testing.assert_allclose(
            orthogonality(stacked, kind=kind), orthogonality(layers, kind=kind), rtol=1e-6
        )


SEVERAL_AXES = {  # shapes of A and B, and the number of stack axes
    "qwix convolution": ((3, 6, 4), (4, 5), 0),
    "qwix einsum": ((6, 4), (4, 2, 5), 0),
    "qwix scanned einsum": ((3, 6, 4), (3, 4, 2, 5), 1),
    "gemma attention output": ((2, 5, 4), (4, 6), 0),
    "gemma keys and values": ((6, 4), (4, 2, 3, 5), 0),
    "several to several, stacked twice": ((3, 2, 5, 7, 4), (3, 2, 4, 6, 7), 2),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", every_other(SEVERAL_AXES))
def test_several_in_or_out_axes_count_as_one(name, kind):
    shape_a, shape_b, k = SEVERAL_AXES[name]
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=shape_a), rng.normal(size=shape_b)
    layers, rank = int(np.prod(shape_a[:k])), shape_a[-1]
    values, g_a, g_b = [], np.zeros((layers, a.size // layers // rank, rank)), []
    for layer in range(layers):
        rows_a = a.reshape(layers, -1, rank)[layer].T
        rows_b = b.reshape(layers, rank, -1)[layer]
        flat = {"lora_a": rows_a.T, "lora_b": rows_b}
        values.append(reference({"q": flat, "v": flat}, kind, "mean"))
        one = jax.grad(lambda t: orthogonality(t, kind=kind))(
            jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), flat)
        )  # of plain matrices, which finite differences have checked
        g_a[layer] = one["lora_a"] / layers
        g_b.append(one["lora_b"] / layers)
    params = {"m": {"lora": {"a": jnp.asarray(a, jnp.float32), "b": jnp.asarray(b, jnp.float32)}}}
    found, gradient = jax.value_and_grad(lambda t: orthogonality(t, kind=kind))(params)
    np.testing.assert_allclose(found, np.mean(values), rtol=1e-5)
    close = {"rtol": 1e-4, "atol": 1e-6}
    np.testing.assert_allclose(gradient["m"]["lora"]["a"], g_a.reshape(shape_a), **close)
    np.testing.assert_allclose(gradient["m"]["lora"]["b"], np.reshape(g_b, shape_b), **close)
    tx = add_orthogonality(0.25, kind=kind)
    updates, _ = tx.update(params, tx.init(params), params)
    wanted = jax.tree.map(lambda p, g: p + 0.25 * g, params, gradient)
    jax.tree.map(
        lambda u, w: np.testing.assert_allclose(u, w, rtol=1e-5, atol=1e-6), updates, wanted
    )


def test_cosine_ignores_the_scale_of_directions_and_rank_one():
    tree = factors()
    longer = {**tree, "q": {**tree["q"], "lora_a": tree["q"]["lora_a"] * jnp.array([1, 20, 0.05])}}
    np.testing.assert_allclose(
        orthogonality(tree, kind="cosine"), orthogonality(longer, kind="cosine"), rtol=1e-5
    )
    assert orthogonality(factors(rank=1), kind="cosine") == 0


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_against_finite_differences(kind):
    tree = {k: v for k, v in factors((2,)).items() if k != "head"}
    gradient = jax.grad(lambda t: orthogonality(t, kind=kind))(tree)
    rng = np.random.default_rng(5)
    for _ in range(6):
        direction = jax.tree.map(lambda x: rng.normal(size=x.shape), tree)
        moved = [
            reference(jax.tree.map(lambda x, d, h=h: np.asarray(x, np.float64) + h * d,
                                   tree, direction), kind, "mean")
            for h in (1e-6, -1e-6)
        ]  # fmt: skip
        slope = sum(jax.tree.leaves(jax.tree.map(lambda g, d: np.sum(g * d), gradient, direction)))
        np.testing.assert_allclose(slope, (moved[0] - moved[1]) / 2e-6, rtol=2e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_is_zero_and_never_nan_where_the_norm_has_none(kind):
    orthonormal = {"lora_a": jnp.eye(5, 3), "lora_b": jnp.eye(3, 4)}
    at_start = {"lora_a": jnp.eye(5, 3), "lora_b": jnp.zeros((3, 4))}
    for tree in (orthonormal, at_start):
        gradient = jax.jit(jax.grad(lambda t: orthogonality(t, kind=kind)))(tree)
        for leaf in jax.tree.leaves(gradient):
            np.testing.assert_array_equal(leaf, 0.0)
    half = {"lora_a": factors()["q"]["lora_a"], "lora_b": jnp.zeros((3, 4))}
    gradient = jax.grad(lambda t: orthogonality(t, kind=kind))(half)
    np.testing.assert_array_equal(gradient["lora_b"], 0.0)
    assert jnp.isfinite(gradient["lora_a"]).all() and jnp.any(gradient["lora_a"])


def test_bfloat16_factors_are_computed_in_float32():
    tree = jax.tree.map(lambda x: x.astype(jnp.bfloat16), factors((2,), scale=0.1))
    rounded = jax.tree.map(lambda x: x.astype(jnp.float32), tree)
    for kind in KINDS:
        found = orthogonality(tree, kind=kind)
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, reference(rounded, kind, "mean"), rtol=1e-5)
    gradient = jax.grad(lambda t: orthogonality({"q": t}))(tree["q"])
    assert gradient["lora_a"].dtype == jnp.bfloat16


def test_gram_asks_for_full_precision():
    """On accelerators the default would be bfloat16 or TF32 passes."""
    tree = {"lora_a": jnp.ones((4, 2)), "lora_b": jnp.ones((2, 4))}
    text = str(jax.make_jaxpr(orthogonality)(tree))
    assert text.count("dot_general") == 2 and text.count("Precision.HIGHEST") == 4


def test_lone_factors_and_other_names():
    lone = {"m": {"lora_b": jnp.zeros((4, 3))}, "frozen": {"lora_a": None}}
    np.testing.assert_allclose(orthogonality(lone), 2.0, rtol=1e-7)
    named = {"down": jnp.eye(3, 2), "up": 2 * jnp.eye(2, 3)}
    np.testing.assert_allclose(
        orthogonality(named, factors=("down", "up")), 3 * np.sqrt(2) / 2, rtol=1e-6
    )
    state = nnx.State({"m": {"lora_a": nnx.Param(jnp.eye(5, 2)),
                             "lora_b": nnx.Param(jnp.zeros((2, 3)))}})  # fmt: skip
    np.testing.assert_allclose(orthogonality(state), np.sqrt(2) / 2, rtol=1e-7)


def trainable():
    tree = factors((2,))
    return {"q": {k: v for k, v in tree["q"].items() if k != "kernel"}, "v": tree["v"],
            "head": {"kernel": tree["head"]["kernel"]}}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_add_orthogonality_equals_the_loss_term(kind, reduction):
    params = trainable()

    def task(p):
        return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(p))

    def penalised(p):
        return task(p) + 0.3 * orthogonality(p, kind=kind, reduction=reduction)

    tx = add_orthogonality(0.3, kind=kind, reduction=reduction)
    state = tx.init(params)
    found, state = jax.jit(tx.update)(jax.grad(task)(params), state, params)
    wanted = jax.grad(penalised)(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, wanted)
    assert float(jnp.abs(found["q"]["lora_a"] - jax.grad(task)(params)["q"]["lora_a"]).max()) > 1e-3
    assert int(state.count) == 1 and state.count.dtype == jnp.int32


def test_a_trajectory_with_the_transformation_equals_one_with_the_loss_term():
    target = trainable()

    def task(p):
        return optax.tree.norm(optax.tree.sub(p, target), squared=True) / 100

    def run(loss, tx):
        params = jax.tree.map(lambda x: 0.5 * x, target)
        state = tx.init(params)
        for _ in range(20):
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            params = optax.apply_updates(params, updates)
        return params

    found = run(task, optax.chain(add_orthogonality(0.1), optax.adam(1e-2)))
    wanted = run(lambda p: task(p) + 0.1 * orthogonality(p), optax.adam(1e-2))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, wanted)


def test_weight_zero_is_the_identity_bit_for_bit_and_needs_no_params():
    gradients = trainable()
    gradients["head"]["kernel"] = jnp.array([-0.0, jnp.nan])
    for weight in (0, 0.0):
        tx = add_orthogonality(weight)
        updates, _ = tx.update(gradients, tx.init(gradients))
        assert updates is gradients


def test_weight_may_be_a_schedule():
    params = trainable()
    zeros = optax.tree.zeros_like(params)
    tx = add_orthogonality(lambda step: 0.5 * step)
    once, _ = add_orthogonality(1.0).update(zeros, tx.init(params), params)
    state = tx.init(params)
    for step in range(3):
        updates, state = tx.update(zeros, state, params)
        np.testing.assert_allclose(
            updates["v"]["lora_b"], 0.5 * step * once["v"]["lora_b"], rtol=1e-6, atol=0
        )


def test_dtypes_and_other_leaves():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), trainable())
    tx = add_orthogonality(0.1)
    updates, _ = tx.update(params, tx.init(params), params)
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}
    assert updates["head"]["kernel"] is params["head"]["kernel"]
    mixed = {"lora_a": jnp.ones((3, 2)), "lora_b": jnp.ones((2, 3)), "steps": jnp.int32(1)}
    updates, _ = tx.update(mixed, tx.init(mixed), mixed)
    assert updates["steps"] is mixed["steps"]


@pytest.mark.parametrize("make", [orthogonality, lambda tree, **kw: add_orthogonality(1.0, **kw)])
def test_bad_arguments_are_named(make):
    tree = trainable()
    with pytest.raises(ValueError, match=r"kind='l1' must be one of 'norm', 'squared', 'cosine'"):
        make(tree, kind="l1")
    with pytest.raises(ValueError, match=r"reduction='max' must be one of 'mean', 'sum'"):
        make(tree, reduction="max")
    with pytest.raises(ValueError, match=r"factors='.\*': orthogonality must know"):
        make(tree, factors=".*")


def test_errors_of_the_tree():
    with pytest.raises(ValueError, match=r"no LoRA factors.*'head/kernel'"):
        orthogonality({"head": {"kernel": jnp.ones((2, 2))}})
    with pytest.raises(ValueError, match="no LoRA factors: the tree is empty"):
        orthogonality({})
    with pytest.raises(ValueError, match="no LoRA factors"):
        add_orthogonality(0.1).init({"kernel": jnp.ones((2, 2))})
    with pytest.raises(ValueError, match="do not fit"):
        orthogonality({"lora_a": jnp.ones((3, 2)), "lora_b": jnp.ones((3, 2))})
    params = trainable()
    tx = add_orthogonality(0.1)
    with pytest.raises(ValueError, match=r"needs the parameters: call tx.update\(updates, state,"):
        tx.update(params, tx.init(params))
