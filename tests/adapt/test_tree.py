"""``attach``, ``split``, ``join`` and ``merge`` on parameter trees."""

import zlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from fixtures.adapted import Encoder, Scanned, X, prepared, with_random_factors
from flax.core import freeze

from rmlora_jax.adapt import adapt
from rmlora_jax.adapt.lora import LoRA
from rmlora_jax.adapt.tree import attach, join, merge, split

KEY = jax.random.key(1)


def leaves(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def encoder(lora):
    base = Encoder().init(jax.random.key(0), X)["params"]
    adapted = adapt(Encoder(), lora)
    return adapted, base, attach(KEY, adapted, base, X)


# attach


def test_base_leaves_are_the_same_arrays():
    adapted, base, params = prepared(Scanned(), X, LoRA(2))
    found = leaves(params)
    for path, leaf in leaves(base).items():
        assert found[path] is leaf
    frozen = leaves(attach(KEY, adapted, freeze(base), X))
    assert all(frozen[path] is leaf for path, leaf in leaves(base).items())


def test_attach_draws_nothing_of_the_base():
    def loud(key, shape, dtype):
        assert isinstance(key, jax.core.Tracer), "the base was initialised for real"
        return jnp.zeros(shape, dtype)

    model = nn.Dense(5, kernel_init=loud)
    base = {"kernel": jnp.ones((8, 5)), "bias": jnp.zeros(5)}
    params = attach(KEY, adapt(model, LoRA(2)), base, X)
    assert sorted(params) == ["bias", "kernel", "lora_a", "lora_b"]
    with pytest.raises(AssertionError):
        model.init(KEY, X)


def test_attach_under_jit_and_eval_shape_and_with_shapes_only():
    adapted, base, params = encoder(LoRA(2))
    under_jit = jax.jit(lambda key, base, x: attach(key, adapted, base, x))(KEY, base, X)
    jax.tree.map(np.testing.assert_array_equal, under_jit, params)
    shapes = jax.eval_shape(lambda key, base: attach(key, adapted, base, X), KEY, base)
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, params)
    by_shape = attach(KEY, adapted, base, jax.ShapeDtypeStruct(X.shape, X.dtype))
    jax.tree.map(np.testing.assert_array_equal, by_shape, params)
    raw = attach(jax.random.PRNGKey(1), adapted, base, X)
    assert jax.tree.map(jnp.shape, raw) == jax.tree.map(jnp.shape, params)


def test_attach_takes_flags_and_methods():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train, *, deep):
            x = nn.Dropout(0.5, deterministic=not train)(x)
            return nn.Dense(3, name="deep" if deep else "flat")(x)

        def apart(self, x):
            return self(x, False, deep=True)

    base = Net().init(jax.random.key(0), X, False, deep=True)["params"]
    adapted = adapt(Net(), LoRA(2))
    for arguments in ({"train": True, "deep": True}, {"method": "apart"}):
        assert "lora_a" in attach(KEY, adapted, base, X, **arguments)["deep"]


def test_factors_have_the_asked_dtype_and_b_is_zero():
    _, _, params = prepared(Scanned(), X, LoRA(2), jnp.bfloat16)
    fc1 = params["layers"]["fc1"]
    assert fc1["kernel"].dtype == jnp.bfloat16
    assert fc1["lora_a"].dtype == fc1["lora_b"].dtype == jnp.float32
    assert not np.asarray(fc1["lora_b"]).any()
    _, _, params = prepared(Scanned(), X, LoRA(2, dtype=jnp.bfloat16))
    assert params["layers"]["fc1"]["lora_a"].dtype == jnp.bfloat16


class Stack(nn.Module):
    """Three scanned layers, wide enough for the statistics of one factor."""

    @nn.compact
    def __call__(self, x):
        class Step(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return nn.Dense(256, name="fc")(x), None

        scan = nn.scan(Step, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return scan(name="layers")(x, None)[0]


def factors(init):
    x = jax.ShapeDtypeStruct((1, 256), jnp.float32)
    adapted = adapt(Stack(), LoRA(16, init=init))
    fc = {"kernel": jnp.zeros((3, 256, 256)), "bias": jnp.zeros((3, 256))}
    return np.asarray(attach(KEY, adapted, {"layers": {"fc": fc}}, x)["layers"]["fc"]["lora_a"])


@pytest.mark.parametrize(
    ("init", "std", "bound"),
    [
        ("kaiming", 1 / np.sqrt(3 * 256), 1 / np.sqrt(256)),
        ("normal", 0.02, np.inf),
        ("gaussian", 1 / 16, np.inf),
    ],
)
def test_every_layer_of_a_stack_has_the_standard_deviation_of_its_own_fan_in(init, std, bound):
    a = factors(init)
    assert a.shape == (3, 256, 16)
    for layer in a:  # 4,096 draws: the estimate of the deviation is good to about 1.1 %
        assert abs(layer.std() / std - 1) < 0.05
        assert abs(layer.mean()) < 4 * std / 64
        assert np.abs(layer).max() <= bound
        assert np.abs(layer).max() > min(0.99 * bound, 2.5 * std)
    assert (a[0] != a[1]).all() and (a[1] != a[2]).all()


def test_orthogonal_is_orthonormal_in_every_layer():
    a = factors("orthogonal")
    for layer in a:
        np.testing.assert_allclose(layer.T @ layer, np.eye(16), atol=1e-5)
    assert np.abs(a[0] - a[1]).max() > 0.01


def test_factors_depend_on_the_key_and_their_own_path_only():
    _, _, one = encoder(LoRA(2, target="head"))
    _, _, both = encoder(LoRA(2, target="head|body"))
    np.testing.assert_array_equal(one["head"]["lora_a"], both["head"]["lora_a"])
    assert np.abs(both["head"]["lora_a"] - both["body"]["lora_a"]).min() > 0
    key = jax.random.split(jax.random.fold_in(KEY, zlib.crc32(b"head")), 1)[0]
    bound = 8**-0.5
    expected = jax.random.uniform(key, (8, 2), minval=-bound, maxval=bound)
    np.testing.assert_allclose(one["head"]["lora_a"], expected, rtol=1e-6)


def test_pissa_moves_the_principal_part_of_the_weight_into_the_factors():
    lora = LoRA(2, 6, init="pissa", target=".*(fc1|out)", rank_pattern=((".*out", 3),))
    base = Scanned().init(jax.random.key(0), X)["params"]
    # Singular values well apart: the principal part is sharply defined in float32.
    u, _, vt = np.linalg.svd(np.asarray(base["layers"]["fc1"]["kernel"]), full_matrices=False)
    spread = np.array([3, 2, 1, 0.7, 0.5, 0.4, 0.3, 0.2])
    base["layers"]["fc1"]["kernel"] = jnp.asarray((u * spread) @ vt, jnp.float32)
    adapted = adapt(Scanned(), lora)
    params = attach(KEY, adapted, base, X)
    fc1, out = params["layers"]["fc1"], params["layers"]["attention"]["out"]
    for i in range(3):
        weight = np.asarray(base["layers"]["fc1"]["kernel"][i], np.float64)
        u, s, vt = np.linalg.svd(weight)
        principal = (u[:, :2] * s[:2]) @ vt[:2]
        product = 3.0 * np.asarray(fc1["lora_a"][i]) @ np.asarray(fc1["lora_b"][i])
        np.testing.assert_allclose(product, principal, atol=1e-5)
        np.testing.assert_allclose(fc1["kernel"][i], weight - principal, atol=1e-5)
        norms = np.linalg.norm(fc1["lora_a"][i], axis=0), np.linalg.norm(fc1["lora_b"][i], axis=1)
        np.testing.assert_allclose(norms[0], norms[1], rtol=1e-4)  # the root of S on either side
    assert out["lora_a"].shape == (3, 8, 3)
    restored, original = leaves(merge(params, lora)), leaves(base)
    for path, leaf in original.items():
        np.testing.assert_allclose(restored[path], leaf, atol=1e-6, err_msg=path)
    assert params["layers"]["fc2"]["kernel"] is base["layers"]["fc2"]["kernel"]
    expected = Scanned().apply({"params": base}, X)
    np.testing.assert_allclose(adapted.apply({"params": params}, X), expected, atol=1e-5)
    with pytest.raises(ValueError, match=r"already loaded.*call attach"):
        adapted.init(jax.random.key(0), X)
    with pytest.raises(ValueError, match="rank 9 exceeds"):
        prepared(Scanned(), X, LoRA(9, init="pissa", target=".*fc1"))


def test_attach_says_what_is_wrong_with_its_arguments():
    lora = LoRA(2, train="head")
    adapted, base, params = encoder(lora)
    with pytest.raises(TypeError, match="a Encoder: pass what adapt"):
        attach(KEY, Encoder(), base, X)
    with pytest.raises(ValueError, match="factors already"):
        attach(KEY, adapted, params, X)
    with pytest.raises(ValueError, match=r"LoRA\.train.*'head' matches no"):
        attach(KEY, adapted, {"body": base["body"]}, X)
    with pytest.raises(ValueError, match="lacks 2 parameters of the model, the first 'body/bias'"):
        attach(KEY, adapted, {"head": base["head"]}, X)
    with pytest.raises(ValueError, match=r"'body/kernel' of shape \(8, 8\), the model wants \(4,"):
        attach(KEY, adapted, base, X[..., :4])
    with pytest.raises(ValueError, match=r"pass variables\['params'\]"):
        attach(KEY, adapted, {"params": base}, X)
    extra = base | {"pooler": {"kernel": jnp.ones((2, 2))}}  # not run by this call: kept
    assert attach(KEY, adapted, extra, X)["pooler"] == extra["pooler"]


# split and join


def test_split_and_join_are_inverse_and_leave_no_empty_branches():
    lora = LoRA(2, target=".*attention.*", train=r".*/fc1|.*/fc2/bias")
    _, _, params = prepared(Scanned(), X, lora)
    trainable, frozen = split(params, lora)
    expected = {
        f"layers/attention/{n}/lora_{f}" for n in ("query", "key", "value", "out") for f in "ab"
    }
    expected |= {"layers/fc1/kernel", "layers/fc1/bias", "layers/fc2/bias"}
    assert set(leaves(trainable)) == expected
    assert set(leaves(frozen)) == set(leaves(params)) - expected
    assert "fc1" not in frozen["layers"] and "norm1" not in trainable["layers"]
    joined = join(trainable, frozen)
    assert jax.tree.structure(joined) == jax.tree.structure(params)
    assert all(leaves(joined)[path] is leaf for path, leaf in leaves(params).items())
    jax.tree.map(np.testing.assert_array_equal, jax.jit(join)(trainable, frozen), params)


def test_train_everything_head_only_and_biases():
    base = Encoder().init(jax.random.key(0), X)["params"]
    assert split(base, LoRA(1, target=None, train=".*")) == (base, {})
    trainable, _ = split(base, LoRA(1, target=None, train=r".*/bias"))
    assert sorted(leaves(trainable)) == ["body/bias", "head/bias"]
    with pytest.raises(ValueError, match=r"LoRA\.train.*'heads'.*'head'"):
        split(base, LoRA(1, target=None, train="heads"))


def test_join_refuses_overlap():
    with pytest.raises(ValueError, match="both trees hold 'a/b'"):
        join({"a": {"b": 1}}, {"a": {"b": 2, "c": 3}})
    with pytest.raises(ValueError, match="both trees hold 'a'"):
        join({"a": 1}, {"a": {"b": 2}})
    with pytest.raises(ValueError, match="both trees hold 'a/b'"):
        join({"a": {"b": {"c": 1}}}, {"a": {"b": 2}})
    assert join({}, {"a": 1}) == {"a": 1}
    with pytest.raises(TypeError, match="not a list"):
        join([], {})


# merge


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_merge_computes_in_float32_and_casts_once(dtype):
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.normal(size=(3, 8, 2, 5)), dtype)
    a = jnp.asarray(rng.normal(size=(3, 8, 4)), jnp.float32)
    b = jnp.asarray(rng.normal(size=(3, 4, 10)), jnp.float32)
    params = {"fc": {"kernel": kernel, "bias": jnp.ones(3), "lora_a": a, "lora_b": b}}
    merged = jax.jit(merge, static_argnums=1)(params, LoRA(4, 6))
    assert sorted(merged["fc"]) == ["bias", "kernel"]
    exact = np.asarray(kernel, np.float64)
    exact = exact + 1.5 * (np.asarray(a, np.float64) @ np.asarray(b)).reshape(kernel.shape)
    found = np.asarray(merged["fc"]["kernel"])
    assert found.dtype == dtype
    if dtype == jnp.float32:
        np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-5)
    else:  # one rounding of the exact sum: equal but where float32 crosses a midpoint
        kind = ml_dtypes.bfloat16 if dtype == jnp.bfloat16 else np.float16
        assert (found == exact.astype(np.float32).astype(kind)).mean() > 0.99


def test_merge_leaves_everything_else_alone():
    _, base, params = encoder(LoRA(2, target="body"))
    merged = merge(params, LoRA(2, target="body"))
    assert merged["head"]["kernel"] is base["head"]["kernel"]
    np.testing.assert_array_equal(merged["body"]["kernel"], base["body"]["kernel"])  # B = 0
    assert (
        merge(base, LoRA(1, target=None, train="head"))["body"]["kernel"] is base["body"]["kernel"]
    )


def test_factors_that_do_not_fit_are_refused_by_split_and_merge():
    lora = LoRA(2)
    _, base, params = encoder(lora)
    body = params["body"]

    def broken(**changes):
        changed = {name: value for name, value in (body | changes).items() if value is not None}
        return params | {"body": changed}

    cases = [
        (base, lora, "hold no factors.*attach"),
        (broken(lora_b=None), lora, "'body' holds lora_a, but LoRA has lora_a, lora_b"),
        (broken(kernel=None), lora, "'body' holds factors but lacks kernel.*join"),
        (params, LoRA(3), r"'body'.*do not fit the description, \(\*stack, in, 3\)"),
        (params, LoRA(2, target="head"), "hold factors at 'body'.*does not select"),
        (broken(lora_a=jnp.ones((8, 3))), lora, r"lora_a \(8, 3\) and lora_b \(2, 8\), do not fit"),
        (broken(lora_b=jnp.ones((2, 7))), lora, "do not fit"),
        (broken(lora_a=jnp.ones((8, 1, 2))), lora, r"stack axes first"),
        (broken(lora_a=jnp.ones(8)), lora, "do not fit"),
    ]
    for tree, description, message in cases:
        for function in (split, merge):
            with pytest.raises(ValueError, match=message):
                function(tree, description)


def test_gradients_flow_through_merge():
    lora = LoRA(2, 6)
    _, _, params = encoder(lora)
    trainable, frozen = split(with_random_factors(params, lora), lora)

    def loss(trainable, run):
        return jnp.sum(jnp.sin(run(join(trainable, frozen))))

    adapted = adapt(Encoder(), lora)
    by_factors = jax.grad(loss)(trainable, lambda p: adapted.apply({"params": p}, X))
    by_merge = jax.grad(loss)(trainable, lambda p: Encoder().apply({"params": merge(p, lora)}, X))
    close = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4)  # noqa: E731
    jax.tree.map(close, by_factors, by_merge)
