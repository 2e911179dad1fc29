"""Layers whose weight meets the input by an equation, and those that only merging can adapt."""

import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.adapted import X, paths, prepared, with_random_factors
from marks import every_other, slow, slow_but

from rmlora_jax import Layer, LoRA, adapt, attach, merge, split
from rmlora_jax.adapt import geometry as geometry_of

H = jnp.asarray(np.random.default_rng(1).normal(size=(2, 6, 4, 3)), jnp.float32)  # b t heads dim


class CallTime(nn.Module):
    dtype: jnp.dtype = None

    @nn.compact
    def __call__(self, x):
        return nn.Einsum((4, 8, 3), use_bias=False, dtype=self.dtype)(x, "btd,ndh->btnh")


class Twice(nn.Module):
    """Interleaved projections into heads and back, in a scan."""

    dtype: jnp.dtype = None

    @nn.compact
    def __call__(self, x, _=None):
        y = nn.Einsum((4, 8, 3), "btd,ndh->btnh", dtype=self.dtype, name="into")(x)
        y = nn.Einsum((4, 3, 8), "...nh,nhd->...d", dtype=self.dtype, name="out")(nn.tanh(y))
        return x + y, None


class ScannedTwice(nn.Module):
    dtype: jnp.dtype = None
    block: type[nn.Module] = Twice

    @nn.compact
    def __call__(self, x):
        scan = nn.scan(
            self.block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        return scan(self.dtype, name="layers")(x, None)[0]


class LoopedTwice(nn.Module):
    dtype: jnp.dtype = None
    block: type[nn.Module] = nn.jit(Twice)

    @nn.compact
    def __call__(self, x):
        for i in range(2):
            x, _ = self.block(self.dtype, name=f"layers_{i}")(x, None)
        return x


def einsum(shape, equation, **fields):
    return lambda d: nn.Einsum(shape, equation, dtype=d, **fields)


MODELS = {
    "contracted": (einsum((8, 5), "btd,df->btf"), X),
    "ellipsis": (einsum((8, 4, 3), "...d,dnh->...nh"), X),
    "two input axes": (einsum((4, 3, 8), "btnh,nhd->btd"), H),
    "batched": (einsum((4, 3, 5), "btnh,nhd->btnd"), H),
    "batch axis in the middle": (einsum((3, 4, 5), "btnh,hnd->btnd"), H),
    "interleaved": (einsum((4, 8, 3), "BTD,NDH->BTNH"), X),
    "interleaved, three for attention": (einsum((3, 4, 8, 2), "btd,sndh->sbtnh"), X),
    "output in another order": (einsum((8, 4, 3), "btd,dnh->bhtn"), X),
    "summed over the input": (einsum((8, 5), "btd,df->bf", use_bias=False), X),
    "call-time equation": (CallTime, X),
    "interleaved in a scan": (ScannedTwice, X),
    "interleaved in a loop with jit": (LoopedTwice, X),
    "scan of remat": (lambda d: ScannedTwice(d, nn.remat(Twice)), X),
    "transposed convolution": (lambda d: nn.ConvTranspose(5, (3,), strides=(2,), dtype=d), X),
    "transposed, circular": (lambda d: nn.ConvTranspose(5, (4,), padding="CIRCULAR", dtype=d), X),
    "transposed kernel": (
        lambda d: nn.ConvTranspose(5, (3, 2), (2, 1), transpose_kernel=True, dtype=d),
        X.reshape(2, 3, 2, 8),
    ),
}


@pytest.mark.parametrize("dtypes", [slow("float32"), slow("bfloat16 compute"), "bfloat16 base"])
@pytest.mark.parametrize("name", slow_but(list(MODELS), *list(MODELS)[1::2]))
def test_output_at_initialisation_is_the_base_output_bit_for_bit(name, dtypes):
    build, x = MODELS[name]
    model = build(None if dtypes == "float32" else jnp.bfloat16)
    param_dtype = jnp.bfloat16 if dtypes == "bfloat16 base" else jnp.float32
    adapted, base, params = prepared(model, x, LoRA(rank=2, alpha=6), param_dtype)
    expected = jax.jit(model.apply)({"params": base}, x)
    found = jax.jit(adapted.apply)({"params": params}, x)
    assert found.dtype == expected.dtype
    assert np.asarray(found).tobytes() == np.asarray(expected).tobytes()
    assert paths(base) < paths(params)


@pytest.mark.parametrize("execution", ["factored", slow("merged")])
@pytest.mark.parametrize("name", every_other(MODELS))
def test_factored_output_is_that_of_the_base_on_merged_parameters(name, execution):
    build, x = MODELS[name]
    model, lora = build(None), LoRA(rank=2, alpha=6, execution=execution)
    adapted, base, params = prepared(model, x, lora)
    params = with_random_factors(params, lora)
    plain = merge(params, adapted, x)
    assert jax.tree.map(jnp.shape, plain) == jax.tree.map(jnp.shape, base)
    expected = jax.jit(model.apply)({"params": plain}, x)
    found = jax.jit(adapted.apply)({"params": params}, x)
    assert np.abs(found - jax.jit(model.apply)({"params": base}, x)).max() > 0.1
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_the_increments_are_those_of_the_equations():
    lora = LoRA(rank=2, alpha=6)
    adapted, base, params = prepared(ScannedTwice(), X, lora)
    params = with_random_factors(params, lora)
    plain = merge(params, adapted, X)["layers"]
    into, out = (jax.tree.map(np.asarray, params["layers"][name]) for name in ("into", "out"))
    assert into["lora_a"].shape == (3, 1, 8, 2) and into["lora_b"].shape == (3, 1, 2, 12)
    assert out["lora_a"].shape == (3, 12, 2) and out["lora_b"].shape == (3, 2, 8)
    b = into["lora_b"].reshape(3, 2, 4, 3)
    delta = 3 * np.einsum("ldr,lrnh->lndh", into["lora_a"][:, 0], b)
    np.testing.assert_allclose(plain["into"]["kernel"] - into["kernel"], delta, atol=1e-5)
    delta = 3 * np.einsum("lnhr,lrd->lnhd", out["lora_a"].reshape(3, 4, 3, 2), out["lora_b"])
    np.testing.assert_allclose(plain["out"]["kernel"] - out["kernel"], delta, atol=1e-5)
    flipped = nn.ConvTranspose(5, (3,), transpose_kernel=True)
    adapted, base, params = prepared(flipped, X, lora)
    params = with_random_factors(params, lora)
    a, b = params["lora_a"].reshape(3, 8, 2), params["lora_b"][0]
    delta = 3 * np.einsum("kir,ro->koi", a, b)
    np.testing.assert_allclose(
        merge(params, adapted, X)["kernel"] - base["kernel"], delta, atol=1e-5
    )


def test_weights_with_axes_in_another_order_are_not_merged_without_the_model():
    square = nn.Einsum((8, 8, 3), "btd,ndh->btnh")  # N = D: sizes alone would not give it away
    lora = LoRA(rank=2)
    adapted, _, params = prepared(square, X, lora)
    split(params, lora)
    for description in (lora, adapted):
        with pytest.raises(ValueError, match=r"another order.*merge\(params, adapted, \*example"):
            merge(params, description)
    merge(params, adapted, X)
    with pytest.raises(ValueError, match=r"begins with an axis of size 1.*LoRA\.exclude"):
        prepared(nn.Einsum((1, 8, 3), "btd,ndh->btnh"), X, lora)
    for equation, what in (
        ("btd,td->btd", "the weight needs an axis"),
        ("btd,tdx->bt", "the weight needs an axis"),
    ):
        shape = (6, 8, 3)[: len(equation.split(",")[1].split("->")[0])]
        with pytest.raises(ValueError, match=what):
            prepared(nn.Einsum(shape, equation, use_bias=False), X, lora)


@pytest.mark.parametrize("name", ["interleaved in a scan", "transposed kernel"])
def test_pissa_takes_the_weight_apart_in_the_order_of_its_equation(name):
    build, x = MODELS[name]
    model, lora = build(None), LoRA(rank=2, alpha=6, init="pissa")
    adapted, base, params = prepared(model, x, lora)
    restored = merge(params, adapted, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), restored, base)
    expected = jax.jit(model.apply)({"params": base}, x)
    np.testing.assert_allclose(jax.jit(adapted.apply)({"params": params}, x), expected, atol=1e-5)
    a = next(v for p, v in jax.tree_util.tree_leaves_with_path(params) if "lora_a" in str(p))
    gram = jnp.swapaxes(a, -1, -2) @ a  # U^T U = I, scaled by the singular values
    assert np.abs(gram * (1 - np.eye(2))).max() < 1e-4 * np.abs(gram).max()


class Experts(nn.Module):
    """A weight of its own for each expert, under a name of its own."""

    @nn.compact
    def __call__(self, x, scale=1.0):
        w = self.param("w", nn.initializers.lecun_normal(), (4, 3, 5))
        return 0 * scale + jnp.einsum("btni,nio->btno", x, w) + self.param("v", nn.zeros, (5,))


class Gated(nn.Module):
    """Not linear in its weight."""

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (8, 6))
        y = nn.tanh(x @ kernel)
        self.sow("intermediates", "y", y)
        self.variable("stats", "mean", jnp.zeros, (6,))
        return y


class Mapped(nn.Module):
    @nn.compact
    def __call__(self, x):
        mapped = nn.map_variables(
            nn.Dense, "params", lambda v: jax.tree.map(jnp.sin, v), init=self.is_initializing()
        )
        return mapped(3, name="mapped")(x)


class Holder(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name="last")(Gated(name="gated")(x))


def test_a_rule_adapts_a_layer_of_ones_own():
    lora = LoRA(2, 6, layers=(Layer(Experts, "b t n i, n i o -> b t n o", weight="w"),))
    adapted, base, params = prepared(Experts(), H, lora)
    assert params["lora_a"].shape == (4, 3, 2) and params["lora_b"].shape == (4, 2, 5)
    same = jax.jit(adapted.apply)({"params": params}, H)
    assert np.array_equal(same, jax.jit(Experts().apply)({"params": base}, H))
    params = with_random_factors(params, lora)
    found = jax.jit(lambda p, h: adapted.apply({"params": p}, x=h, scale=2.0))(params, H)
    delta = 3 * np.einsum("nir,nro->nio", params["lora_a"], params["lora_b"])
    expected = np.einsum("btni,nio->btno", H, params["w"] + delta)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(merge(params, lora)["w"], params["w"] + delta, atol=1e-6)
    with pytest.raises(ValueError, match=r"entry in LoRA\.layers"):
        prepared(Experts(), H, LoRA(2))
    with pytest.raises(ValueError, match=r"describe its class in LoRA\.layers"):
        prepared(Holder(), X, LoRA(2))


@pytest.mark.parametrize(
    ("model", "layers"),
    [
        (nn.WeightNorm(nn.Dense(5)), ()),
        (nn.Conv(5, (3,), mask=np.tril(np.ones((24, 5))).reshape(3, 8, 5)), ()),
        (nn.ConvTranspose(5, (3,), mask=np.tril(np.ones((24, 5))).reshape(3, 8, 5)), ()),
        (Mapped(), ()),
        (Holder(), (Layer(Gated, "...i,io->...o"),)),
    ],
    ids=["WeightNorm", "masked", "masked, transposed", "mapped", "own"],
)
def test_merged_execution_is_the_base_on_merged_parameters(model, layers):
    lora = LoRA(rank=2, alpha=6, execution="merged", layers=layers)
    variables = model.init(jax.random.key(0), X)
    base, others = variables["params"], {k: v for k, v in variables.items() if k == "stats"}
    adapted = adapt(model, lora)
    params = attach(jax.random.key(1), adapted, base, X)
    expected = jax.jit(model.apply)({"params": base} | others, X)
    found = jax.jit(adapted.apply)({"params": params} | others, X)
    assert np.array_equal(found, expected)
    params = with_random_factors(params, lora)
    expected = jax.jit(model.apply)({"params": merge(params, lora)} | others, X)
    found = jax.jit(adapted.apply)({"params": params} | others, X)
    assert np.abs(found - jax.jit(model.apply)({"params": base} | others, X)).max() > 0.01
    np.testing.assert_allclose(found, expected, atol=1e-5)
    grads = jax.grad(lambda p: adapted.apply({"params": p} | others, X).sum())(params)
    factors = [g for p, g in jax.tree_util.tree_leaves_with_path(grads) if "lora_" in str(p)]
    assert factors and all(np.abs(g).max() > 0 for g in factors)
    _, collected = adapted.apply({"params": params} | others, X, mutable=["intermediates"])
    assert bool(collected) == bool(layers)


def test_rules_say_what_is_wrong_with_them():
    for arguments, error, what in (
        ((Experts(), "...i,io->...o"), TypeError, "Layer.cls"),
        ((Experts, 3), TypeError, "Layer.equation"),
        ((Experts, "i,io"), ValueError, "must read 'input,weight->output'"),
        ((Experts, "...i,...io->...o"), ValueError, "must read 'input,weight->output'"),
        ((Experts, "...i,i->...i"), ValueError, "the weight needs an axis"),
        ((Experts, "...i,io->...o", "w", "encode"), ValueError, "has no method 'encode'"),
    ):
        with pytest.raises(error, match=what):
            Layer(*arguments)
    with pytest.raises(ValueError, match=r"LoRA\.layers.*Layer\(cls, equation"):
        LoRA(2, layers=(Experts,))
    with pytest.raises(ValueError, match=r"has 2 axes for a weight of 3.*LoRA\.exclude"):
        prepared(Experts(), H, LoRA(2, layers=Layer(Experts, "...i,io->...o", weight="w")))
    rule = Layer(Experts, "btni,nio->btno", weight="w")
    assert hash(LoRA(2, layers=rule)) == hash(LoRA(2, layers=(rule,)))


@pytest.mark.parametrize(
    ("equation", "outputs"), [("...i,io->...o", (64,)), ("bti,inh->btnh", (4, 16))]
)
def test_rows_on_several_axes_meet_b_as_a_matrix_on_a_cpu_alone(equation, outputs):
    geometry, (batch, length) = geometry_of.Contraction(equation), (8, 16)
    random = np.random.RandomState(0)
    x, a, b = (
        jnp.asarray(random.normal(size=shape), jnp.float32)
        for shape in ((batch, length, 32), (32, 4), (4, 64))
    )
    y = jnp.zeros((batch, length, *outputs))

    def beside(b):
        return geometry_of.low_rank(geometry, x, y, a, b, 0.5)

    step = jax.jit(jax.grad(lambda b: jnp.tanh(beside(b)).sum()))
    x64, a64, b64 = (np.asarray(v, np.float64) for v in (x, a, b))
    z64 = 0.5 * x64 @ a64
    expected = np.einsum("btr,bto->ro", z64, 1 - np.tanh(z64 @ b64) ** 2)
    np.testing.assert_allclose(step(b), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(*jax.jvp(beside, (b,), (b,)), rtol=1e-6)  # linear in B
    # The gradient of y in another order would be a copy as large as y.
    text = step.lower(b).compile().as_text()
    copies = re.findall(r"f32\[([\d,]+)\]\S* (?:transpose|copy)\(", text)
    assert y.size not in [math.prod(map(int, shape.split(","))) for shape in copies]
    rows = f"tensor<{batch * length}x"
    assert rows in step.lower(b).as_text()
    assert rows not in step.trace(b).lower(lowering_platforms=("tpu",)).as_text()
