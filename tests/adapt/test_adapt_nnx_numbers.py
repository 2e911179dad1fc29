"""Every kind of NNX layer and structure with factors: against its merge, numpy and by hand."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.adapted_nnx import (
    EXPERTS,
    IDS,
    LAYERS,
    X,
    arrays,
    built,
    call,
    randomly_adapted,
)
from flax import nnx
from marks import every_other

from rmlora_jax.adapt.lora import LoRA
from rmlora_jax.adapt.tree import merge


@pytest.mark.parametrize("name", every_other(LAYERS))
def test_factored_and_merged_outputs_agree(name):
    base, x = built(name)
    lora = LoRA(2, 6, layers=EXPERTS)
    untouched = call(base, x)
    adapted = randomly_adapted(base, lora)
    factored = call(adapted, x)
    plain = merge(adapted, lora)
    assert nnx.graphdef(plain) == nnx.graphdef(base)
    expected = call(plain, x)
    tolerance = 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(factored, expected, atol=tolerance, rtol=0)
    assert np.abs(factored - untouched).max() > 0.01  # the factors do something

    merging = randomly_adapted(base, LoRA(2, 6, layers=EXPERTS, execution="merged"))
    np.testing.assert_allclose(call(merging, x), expected, atol=tolerance, rtol=0)
    np.testing.assert_array_equal(call(base, x), untouched)
    np.testing.assert_array_equal(call(adapted, x), factored)  # merge left it alone


@pytest.mark.parametrize("name", ["linear", "conv", "embed, tied", "loop"])
def test_bfloat16_bases_agree_with_their_merge_within_rounding(name):
    base, x = built(name, "bfloat16 base")
    lora = LoRA(2, 6)
    adapted = randomly_adapted(base, lora)
    expected = np.asarray(call(merge(adapted, lora), x), np.float32)
    found = np.asarray(call(adapted, x), np.float32)
    np.testing.assert_allclose(found, expected, atol=0.03 * np.abs(expected).max())


# The formulas


def values(layer):
    return {path: np.asarray(value, np.float64) for path, value in arrays(layer).items()}


def test_linear_is_the_formula():
    base, x = built("linear")
    adapted = randomly_adapted(base)
    p, x64 = values(adapted), np.asarray(x, np.float64)
    low = (x64 @ p["lora_a"]) @ p["lora_b"]
    plain = x64 @ p["kernel"] + p["bias"]
    np.testing.assert_allclose(adapted(x), plain + 3 * low, atol=1e-5)
    stabilised = randomly_adapted(base, rs=True)
    np.testing.assert_allclose(stabilised(x), plain + 6 / np.sqrt(2) * low, atol=1e-5)
    patterned = LoRA(2, 6, rank_pattern=(("0", 3),), alpha_pattern=(("0", 12),))
    layers = randomly_adapted(nnx.List([base, built("linear")[0]]), patterned)
    p = values(layers)
    assert p["0/lora_a"].shape == (8, 3) and p["1/lora_a"].shape == (8, 2)
    expected = plain + 12 / 3 * x64 @ p["0/lora_a"] @ p["0/lora_b"]
    np.testing.assert_allclose(layers[0](x), expected, atol=1e-5)


def test_interleaved_einsum_is_the_formula_and_marked():
    adapted = randomly_adapted(built("einsum, interleaved")[0])
    p = values(adapted)
    assert p["lora_a"].shape == (1, 8, 2) and p["lora_b"].shape == (1, 2, 6)
    delta = 3 * (p["lora_a"][0] @ p["lora_b"][0]).reshape(8, 2, 3)
    kernel = p["kernel"] + delta.transpose(1, 0, 2)
    expected = np.einsum("btd,ndh->btnh", np.asarray(X, np.float64), kernel) + p["bias"]
    np.testing.assert_allclose(adapted(X), expected, atol=1e-5)


def test_transposed_kernel_is_the_formula():
    lora = LoRA(2, 6)
    adapted = randomly_adapted(built("conv, transposed kernel")[0], lora)
    p = values(adapted)
    delta = 3 * (p["lora_a"][0] @ p["lora_b"][0]).reshape(3, 8, 6).swapaxes(1, 2)
    found = values(merge(adapted, lora))["kernel"]
    np.testing.assert_allclose(found, p["kernel"] + delta, atol=1e-6)


def test_embedding_and_its_attend_are_the_formula():
    adapted = randomly_adapted(built("embed")[0])
    p = values(adapted)
    table = p["embedding"] + 3 * p["lora_a"] @ p["lora_b"]
    np.testing.assert_allclose(adapted(IDS), table[IDS], atol=1e-5)
    np.testing.assert_allclose(adapted.attend(X), np.asarray(X) @ table.T, atol=1e-5)


def test_own_layer_is_the_formula():
    adapted = randomly_adapted(built("own layer")[0], LoRA(2, 6, layers=EXPERTS))
    p = values(adapted)
    assert p["lora_a"].shape == (2, 8, 2) and p["lora_b"].shape == (2, 2, 5)
    kernel = p["w"] + 3 * p["lora_a"] @ p["lora_b"]
    expected = np.einsum("eti,eio->eto", np.asarray(X), kernel) + p["b"]
    np.testing.assert_allclose(adapted(X), expected, atol=1e-5)


def test_an_equation_given_at_the_call():
    adapted = randomly_adapted(built("einsum, contracted")[0])
    expected = adapted(X)[:, 0]
    np.testing.assert_allclose(adapted(X[:, 0], "bd,dnh->bnh"), expected, atol=1e-5)
    square = randomly_adapted(nnx.Einsum("bd,de->be", (8, 8), rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="'bd,ed->be'"):
        square(X[:, 0], "bd,ed->be")


def test_attention_decodes_with_its_factors():
    base = nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0))
    adapted = randomly_adapted(base)
    mask = nn.make_causal_mask(jnp.ones((2, 6)))
    expected = adapted(X, mask=mask)
    adapted.init_cache((2, 6, 8))
    steps = [adapted(X[:, i : i + 1], decode=True) for i in range(6)]
    np.testing.assert_allclose(jnp.concatenate(steps, 1), expected, atol=1e-5)


def test_gradients_are_the_formula_and_of_the_trainable_part_only():
    base, x = built("linear")
    lora = LoRA(2, 6)
    adapted = randomly_adapted(base, lora)
    weight = jnp.asarray(np.random.default_rng(3).normal(size=(2, 6, 5)), jnp.float32)

    def loss(model):
        return jnp.sum(weight * model(x))

    for wrt in (lora.trainable, nnx.LoRAParam):
        grads = nnx.grad(loss, argnums=nnx.DiffState(0, wrt))(adapted)
        assert sorted(grads) == ["lora_a", "lora_b"]
        p = values(adapted)
        rows, g = np.asarray(x).reshape(-1, 8), np.asarray(weight).reshape(-1, 5)
        expected_b, expected_a = (rows @ p["lora_a"]).T @ g, rows.T @ (g @ p["lora_b"].T)
        np.testing.assert_allclose(grads["lora_b"][...], 3 * expected_b, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(grads["lora_a"][...], 3 * expected_a, rtol=1e-4, atol=1e-4)


def test_a_module_called_twice_has_one_adapter_whose_gradients_add():
    base, x = built("twice")
    lora = LoRA(2, 6)
    adapted = randomly_adapted(base, lora)
    assert adapted.second is adapted.first
    assert sorted(arrays(adapted, nnx.LoRAParam)) == ["first/lora_a", "first/lora_b"]

    def loss(model):
        return jnp.sum(model(x) ** 2)

    wrt = nnx.DiffState(0, lora.trainable)
    found = nnx.grad(loss, argnums=wrt)(adapted)["first"]["lora_b"][...]

    def by_hand(b1, b2):
        first = adapted.first
        delta = 3 * first.lora_a[...] @ jnp.stack([b1, b2])
        kernel, bias = first.kernel[...], first.bias[...]
        y = jnp.tanh(x @ (kernel + delta[0]) + bias)
        return jnp.sum((y @ (kernel + delta[1]) + bias) ** 2)

    b = adapted.first.lora_b[...]
    expected = sum(jax.grad(by_hand, (0, 1))(b, b))
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


WRAPPED = {
    "mask": lambda: nnx.Conv(8, 8, 3, mask=jnp.tril(jnp.ones((3, 8, 8))), rngs=nnx.Rngs(0)),
    "weight norm": lambda: nnx.WeightNorm(nnx.Linear(8, 8, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0)),
    "spectral norm": lambda: nnx.SpectralNorm(nnx.Linear(8, 8, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0)),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_merged_execution_serves_weights_that_are_transformed(name):
    lora = LoRA(2, 6, execution="merged")
    base = nnx.Sequential(nnx.Linear(8, 8, rngs=nnx.Rngs(0)), WRAPPED[name]())
    adapted = randomly_adapted(base, lora)
    assert len(arrays(adapted, nnx.LoRAParam)) == 4
    before, plain = arrays(adapted), merge(adapted, lora)
    assert nnx.graphdef(plain) == nnx.graphdef(base)
    expected, found = plain(X), adapted(X)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    after = arrays(adapted)
    kernels = [path for path in after if path.endswith("kernel")]
    assert len(kernels) == 2 and all(after[path] is before[path] for path in kernels)

    def loss(model):
        return jnp.sum(jnp.sin(model(X)))

    grads = nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(adapted)
    assert all(np.abs(v).max() > 0 for v in jax.tree.leaves(grads))
