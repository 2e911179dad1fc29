"""``adapt`` for NNX: layers stacked by nnx.vmap, and sharded bases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.adapted_nnx import Block, Looped, Stacked, X, arrays, call, randomly_adapted
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from rmlora_jax.adapt import adapt
from rmlora_jax.adapt.lora import LoRA
from rmlora_jax.adapt.tree import merge


def test_stacked_factors_have_the_stack_first_and_a_draw_for_each_layer():
    adapted = adapt(Stacked(rngs=nnx.Rngs(0)), LoRA(2), rngs=nnx.Rngs(1))
    shapes = {path: value.shape for path, value in arrays(adapted, nnx.LoRAParam).items()}
    layers = ("attention/query", "attention/key", "attention/value", "attention/out")
    assert shapes == {
        **{f"blocks/{layer}/lora_a": (3, 8, 2) for layer in (*layers, "fc1")},
        **{f"blocks/{layer}/lora_b": (3, 2, 8) for layer in (*layers, "fc2")},
        "blocks/fc1/lora_b": (3, 2, 16),
        "blocks/fc2/lora_a": (3, 16, 2),
    }
    a = np.asarray(adapted.blocks.fc1.lora_a[...])
    assert (a[0] != a[1]).any() and (a[1] != a[2]).any()
    np.testing.assert_allclose(a.std(), (1 / 3 / 8) ** 0.5, rtol=0.3)


def test_scan_computes_what_a_loop_over_its_layers_computes():
    adapted = randomly_adapted(Stacked(rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(adapted.blocks)
    x = X
    for i in range(3):
        x = nnx.merge(graphdef, jax.tree.map(lambda v, i=i: v[i], state))(x)
    np.testing.assert_allclose(call(adapted, X), x, atol=1e-4)


def test_vmapped_models_are_adapted_side_by_side():
    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def build(rngs):
        return nnx.Linear(8, 5, rngs=rngs)

    lora = LoRA(2, 6)
    adapted = randomly_adapted(build(nnx.Rngs(0)), lora)
    found = nnx.vmap(lambda model, x: model(x), in_axes=(0, None))(adapted, X)
    p = arrays(adapted)
    kernel = p["kernel"] + 3 * p["lora_a"] @ p["lora_b"]
    expected = jnp.einsum("bti,lio->lbto", X, kernel) + p["bias"][:, None, None]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(arrays(merge(adapted, lora))["kernel"], kernel, atol=1e-6)


def test_interleaved_weights_are_stacked_in_front_of_their_mark():
    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def build(rngs):
        return nnx.Einsum("BTD,NDH->BTNH", (2, 8, 3), rngs=rngs)

    lora = LoRA(2, 6)
    adapted = randomly_adapted(build(nnx.Rngs(0)), lora)
    assert adapted.lora_a.shape == (3, 1, 8, 2) and adapted.lora_b.shape == (3, 1, 2, 6)
    run = nnx.vmap(lambda model, x: model(x), in_axes=(0, None))
    expected = run(merge(adapted, lora), X)
    np.testing.assert_allclose(run(adapted, X), expected, atol=1e-5 * np.abs(expected).max())


def test_a_stack_on_another_axis_is_refused():
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=0, out_axes=1)
    def build(rngs):
        return nnx.Linear(8, 5, use_bias=False, rngs=rngs)

    with pytest.raises(ValueError, match=r"\(8, 3, 5\) where its fields say \(8, 5\).*axis 0"):
        adapt(build(nnx.Rngs(0)), LoRA(2), rngs=nnx.Rngs(1))


def test_dropout_differs_between_scanned_layers_and_steps():
    class Layers(nnx.Module):
        def __init__(self, rngs):
            @nnx.split_rngs(splits=3)
            @nnx.vmap
            def build(rngs):
                return nnx.Linear(8, 8, use_bias=False, rngs=rngs)

            self.fc = build(rngs)

        def __call__(self, x):
            return nnx.scan(lambda x, fc: (x, fc(x)), in_axes=(nnx.Carry, 0))(x, self.fc)[1]

    adapted = adapt(Layers(nnx.Rngs(0)), LoRA(8, dropout=0.5), rngs=nnx.Rngs(1))
    eye = jnp.stack([jnp.eye(8)] * 3)
    adapted.fc.kernel[...] = 0 * eye
    adapted.fc.lora_a[...] = adapted.fc.lora_b[...] = eye
    x = jnp.ones((64, 8))
    y, again = np.asarray(call(adapted, x)), np.asarray(call(adapted, x))
    assert set(np.unique(y)) == {0.0, 2.0}
    assert (y[0] != y[1]).any() and (y[1] != y[2]).any() and (y[0] != y[2]).any()
    assert (y != again).any()
    adapted.eval()
    np.testing.assert_array_equal(call(adapted, x), np.ones((3, 64, 8)))


# Sharding

PLACES = {"kernel_metadata": {"out_sharding": ("data", "model")}}


@pytest.fixture
def mesh():
    return jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


class Net(nnx.Module):
    """Two stacked linear layers, an attention output, a convolution and a transposed kernel."""

    def __init__(self, rngs):
        @nnx.split_rngs(splits=2)
        @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: None})
        def build(rngs):
            return nnx.Linear(8, 8, rngs=rngs, **PLACES)

        names = {"out_sharding": ("model", None, "data")}
        self.layers = build(rngs)
        self.heads = nnx.LinearGeneral(8, (2, 4), rngs=rngs, **PLACES)
        self.out = nnx.LinearGeneral((2, 4), 8, axis=(-2, -1), rngs=rngs, kernel_metadata=names)
        self.einsum = nnx.Einsum("BTD,NDH->BTNH", (2, 8, 4), rngs=rngs, **PLACES)
        self.conv = nnx.Conv(8, 8, 3, rngs=rngs, kernel_metadata={"out_sharding": (None, "data")})
        self.head = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        scan = nnx.scan(
            lambda x, fc: jnp.tanh(fc(x)),
            in_axes=(nnx.Carry, 0),
            out_axes=nnx.Carry,
            transform_metadata={nnx.PARTITION_NAME: None},
        )
        x = scan(x, self.layers)
        x = self.out(self.heads(x) + self.einsum(x))
        return self.head(self.conv(x))


EXPECTED = {  # (names of A, names of B)
    "layers": ((None, "data", None), (None, None, "model")),
    "heads": (("data", None), (None, "model")),
    "out": (("model", None), (None, "data")),
    "einsum": ((None, "model", None), (None, None, "data")),
    "conv": ((None, None), (None, None)),
}


@pytest.mark.slow
def test_factors_inherit_names_and_placement(mesh):
    lora = LoRA(2, 6)
    plain = nnx.use_eager_sharding(False)
    with plain:
        alone = randomly_adapted(Net(nnx.Rngs(0)), lora)
    with jax.set_mesh(mesh):
        base = Net(nnx.Rngs(0))
        assert base.out.kernel[...].sharding == NamedSharding(mesh, P("model", None, "data"))
    adapted = adapt(base, lora, rngs=nnx.Rngs(1))  # outside the mesh
    specs = nnx.get_partition_spec(nnx.state(adapted, nnx.Param))
    shardings = nnx.get_named_sharding(nnx.state(adapted, nnx.Param), mesh)
    for path, names in EXPECTED.items():
        layer = getattr(adapted, path)
        for factor, own in zip(("lora_a", "lora_b"), names, strict=True):
            assert layer.__dict__[factor].get_metadata("out_sharding") == own
            assert specs[path][factor].get_raw_value() == P(*own)
            placed = layer.__dict__[factor][...].sharding
            wanted = shardings[path][factor].get_raw_value()
            assert placed.is_equivalent_to(wanted, layer.__dict__[factor].ndim), (path, factor)
    assert not adapted.head.lora_a.has_metadata("out_sharding")

    values = {path: np.asarray(value) for path, value in arrays(alone).items()}
    flat = nnx.to_flat_state(nnx.state(adapted, nnx.LoRAParam))
    new = [(p, v.replace(jax.device_put(values["/".join(p)], v[...].sharding))) for p, v in flat]
    nnx.update(adapted, nnx.from_flat_state(new))
    with jax.set_mesh(mesh):
        found = call(adapted, X)
        again = call(merge(adapted, lora), X)
    expected = call(alone, X)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(again, expected, atol=1e-5)
    merged = merge(adapted, lora)
    for name in ("layers", "out", "einsum"):
        kernel, own = getattr(base, name).kernel, getattr(merged, name).kernel
        assert own.get_metadata("out_sharding") == kernel.get_metadata("out_sharding")
        assert own[...].sharding.is_equivalent_to(kernel[...].sharding, kernel.ndim)


def test_factors_follow_the_placement_of_arrays_without_names(mesh):
    base = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    base.kernel[...] = jax.device_put(base.kernel[...], NamedSharding(mesh, P("model", "data")))
    adapted = adapt(base, LoRA(2), rngs=nnx.Rngs(1))
    assert adapted.lora_a[...].sharding == NamedSharding(mesh, P("model", None))
    assert adapted.lora_b[...].sharding == NamedSharding(mesh, P(None, "data"))
    assert adapted.kernel[...] is base.kernel[...]


def test_logical_names_are_kept_with_their_rules(mesh):
    metadata = {"out_sharding": ("embed", "mlp"), "sharding_rules": (("embed", "data"),)}
    rules = metadata["sharding_rules"] + (("mlp", "model"),)
    with jax.set_mesh(mesh):
        layer = nnx.Linear(
            8, 4, rngs=nnx.Rngs(0), kernel_metadata=metadata | {"sharding_rules": rules}
        )
    adapted = adapt(layer, LoRA(2), rngs=nnx.Rngs(1))
    assert adapted.lora_a.get_metadata("out_sharding") == ("embed", None)
    specs = nnx.get_partition_spec(nnx.state(adapted))
    assert specs["lora_a"].get_raw_value() == P("data", None)
    assert specs["lora_b"].get_raw_value() == P(None, "model")
    assert adapted.lora_b[...].sharding == NamedSharding(mesh, P(None, "model"))


def test_placement_holds_for_a_model_made_under_jit(mesh):
    with jax.set_mesh(mesh):
        make = nnx.jit(lambda: adapt(Net(nnx.Rngs(0)), LoRA(2), rngs=nnx.Rngs(1)))
        adapted = make()
    for path, names in EXPECTED.items():
        for factor, own in zip(("lora_a", "lora_b"), names, strict=True):
            value = vars(getattr(adapted, path))[factor]
            assert value.get_metadata("out_sharding") == own
            assert value[...].sharding.is_equivalent_to(NamedSharding(mesh, P(*own)), value.ndim)


def test_blocks_of_a_list_and_of_a_stack_have_the_same_numbers():
    looped = Looped(rngs=nnx.Rngs(0))
    stack = Stacked(rngs=nnx.Rngs(0), length=2)
    states = [nnx.state(block) for block in looped.blocks]
    nnx.update(stack.blocks, jax.tree.map(lambda *v: jnp.stack(v), *states))
    lora = LoRA(2, 6)
    one, two = randomly_adapted(looped, lora), randomly_adapted(stack, lora)
    states = [nnx.state(block) for block in one.blocks]
    nnx.update(two.blocks, jax.tree.map(lambda *v: jnp.stack(v), *states))
    assert type(two.blocks) is Block
    np.testing.assert_allclose(call(two, X), call(one, X), atol=1e-5)
