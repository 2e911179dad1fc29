"""Meshes whose axes are explicit: the product lies where the layer's own output does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from marks import slow

import rmlora_jax as rm

P = jax.P
RNG = np.random.default_rng(0)


@pytest.fixture
def mesh():
    mesh = jax.make_mesh((4, 2), ("fsdp", "tp"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        yield mesh


def placed(mesh, value, *spec):
    return jax.device_put(jnp.asarray(value, jnp.float32), NamedSharding(mesh, P(*spec)))


def split_kernel(*spec):
    return {"kernel_metadata": {"out_sharding": P(*spec)}, "use_bias": False}


class Calls(nnx.Module):
    """A layer, and where its output is to lie."""

    def __init__(self, layer, *spec, method="__call__"):
        self.layer, self.spec, self.method = layer, spec, method

    def __call__(self, x):
        return getattr(self.layer, self.method)(x, out_sharding=P(*self.spec))


def check(model, x, weight, equation, execution):
    """Value, sharding and gradients against numpy, with factors that are not 0."""
    lora = rm.LoRA(rank=4, alpha=8, execution=execution)
    adapted = rm.adapt(model, lora, rngs=nnx.Rngs(1))
    expected = nnx.jit(lambda m, x: m(x))(model, x)
    np.testing.assert_array_equal(nnx.jit(lambda m, x: m(x))(adapted, x), expected)
    layer = adapted.layer
    layer.lora_b[...] = jax.device_put(
        jnp.asarray(RNG.normal(size=layer.lora_b.shape), jnp.float32), layer.lora_b[...].sharding
    )
    a, b = np.asarray(layer.lora_a[...]), np.asarray(layer.lora_b[...])
    y = adapted(x)
    assert jax.typeof(y).sharding == jax.typeof(expected).sharding
    wanted = np.einsum(equation, x, weight + 2 * (a @ b).reshape(weight.shape))
    np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-4)

    def loss(m, x):
        return jnp.sum(jnp.tanh(m(x) / 10))

    grads = nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(adapted, x)["layer"]

    def of(a, b):
        full = jnp.asarray(weight) + 2 * (a @ b).reshape(weight.shape)
        return jnp.sum(jnp.tanh(jnp.einsum(equation, jnp.asarray(np.asarray(x)), full) / 10))

    for name, other in zip(("lora_a", "lora_b"), jax.grad(of, (0, 1))(a, b), strict=True):
        np.testing.assert_allclose(grads[name][...], other, rtol=1e-3, atol=1e-4)
        spec = jax.typeof(getattr(layer, name)[...]).sharding
        assert jax.typeof(grads[name][...]).sharding == spec
    return layer


@pytest.mark.parametrize("execution", ["factored", "merged"])
@pytest.mark.parametrize("rows", [slow((8,)), (8, 6)])
def test_a_dense_layer_split_on_both_axes(mesh, execution, rows):
    linear = nnx.Linear(16, 12, **split_kernel("tp", "fsdp"), rngs=nnx.Rngs(0))
    between = (None,) * (len(rows) - 1)
    x = placed(mesh, RNG.normal(size=(*rows, 16)), "fsdp", *between, "tp")
    weight = np.asarray(linear.kernel[...])
    model = Calls(linear, "fsdp", *between, "tp")
    layer = check(model, x, weight, "...i,io->...o", execution)
    assert layer.lora_a[...].sharding.spec == P("tp", None)
    assert layer.lora_b[...].sharding.spec == P(None, "fsdp")


@pytest.mark.parametrize("execution", [slow("factored"), slow("merged")])
def test_an_einsum_with_a_batch_axis(mesh, execution):
    layer = nnx.Einsum("bti,bio->bto", (4, 16, 12), **{
        "kernel_metadata": {"out_sharding": P(None, "tp", None)}, "rngs": nnx.Rngs(0),
    })  # fmt: skip
    x = placed(mesh, RNG.normal(size=(4, 6, 16)), "fsdp", None, "tp")
    weight = np.asarray(layer.kernel[...])
    check(Calls(layer, "fsdp", None, None), x, weight, "bti,bio->bto", execution)


def test_an_embedding_and_its_attend(mesh):
    embed = nnx.Embed(16, 8, embedding_metadata={"out_sharding": P("tp", None)}, rngs=nnx.Rngs(0))
    ids = np.arange(16) % 7
    x = jax.device_put(jnp.asarray(ids), NamedSharding(mesh, P("fsdp")))
    table = np.asarray(embed.embedding[...])
    adapted = rm.adapt(Calls(embed, "fsdp", None), rm.LoRA(4), rngs=nnx.Rngs(1))
    a, b = adapted.layer.lora_a, adapted.layer.lora_b
    b[...] = jax.device_put(jnp.ones(b.shape), b[...].sharding)
    full = table + np.asarray(a[...]) @ np.ones(b.shape)
    np.testing.assert_allclose(adapted(x), full[ids], rtol=1e-4, atol=1e-5)
    assert jax.typeof(adapted(x)).sharding.spec == P("fsdp", None)
    adapted.spec, adapted.method = ("fsdp", "tp"), "attend"
    query = placed(mesh, RNG.normal(size=(8, 8)), "fsdp", None)
    np.testing.assert_allclose(adapted(query), np.asarray(query) @ full.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("execution", ["factored", slow("merged")])
def test_linen_under_an_explicit_mesh(mesh, execution):
    model, x = nn.Dense(12), placed(mesh, RNG.normal(size=(8, 6, 16)), "fsdp", None, None)
    base = model.init(jax.random.key(0), x)["params"]
    lora = rm.LoRA(4, execution=execution)
    adapted = rm.adapt(model, lora)
    params = rm.attach(jax.random.key(1), adapted, base, x)
    params["lora_b"] = jnp.ones((4, 12))
    y = jax.jit(adapted.apply)({"params": params}, x)
    full = np.asarray(params["kernel"]) + np.asarray(params["lora_a"]) @ np.ones((4, 12))
    np.testing.assert_allclose(y, np.asarray(x) @ full, rtol=1e-4, atol=1e-4)
    assert jax.typeof(y).sharding.spec == P("fsdp", None, None)
