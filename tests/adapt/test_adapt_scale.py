"""What large models need: placements, cost, quantised leaves, and many adapters on one base."""

import copy
import dataclasses
import functools
import pickle

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.adapted import Encoder, Scanned, X, prepared, with_random_factors
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from marks import slow

import rmlora_jax as rm
from rmlora_jax import LoRA, adapt, attach, join, merge, split

RULES = (("embed", "data"), ("mlp", "model"), ("heads", "model"), ("layers", None))


class Body(nn.Module):
    """Kernels with names on their axes: of the mesh, or logical."""

    logical: bool

    @nn.compact
    def __call__(self, x, _=None):
        init = nn.initializers.lecun_normal()
        if self.logical:
            named, embed, mlp, heads = nn.with_logical_partitioning, "embed", "mlp", "heads"
        else:
            named, embed, mlp, heads = nn.with_partitioning, "data", "model", "model"
        y = nn.DenseGeneral((2, 4), kernel_init=named(init, (embed, heads, None)), name="into")(x)
        y = nn.Einsum(
            (2, 4, 8), "...nh,nhd->...d", kernel_init=named(init, (heads, None, embed)), name="out"
        )(y)
        y = nn.Einsum(
            (4, 8, 2), "btd,ndh->btnh", kernel_init=named(init, (heads, embed, None)), name="wide"
        )(nn.tanh(x + y))
        y = nn.Dense(16, kernel_init=named(init, (embed, mlp)), name="up")(y.reshape(x.shape))
        y = nn.Dense(8, kernel_init=named(init, (mlp, embed)), name="down")(nn.tanh(y))
        return x + y, None


class Model(nn.Module):
    logical: bool = False

    @nn.compact
    def __call__(self, x):
        body = nn.scan(
            Body,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
            metadata_params={nn.PARTITION_NAME: "layers" if self.logical else None},
        )
        return body(self.logical, name="layers")(x, None)[0]


@pytest.mark.parametrize("logical", [slow(False), True], ids=["mesh names", "logical names"])
def test_a_mesh_of_two_by_two_keeps_every_placement(logical):
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    lora, model = LoRA(2, 6), Model(logical)
    adapted = adapt(model, lora)
    base = model.init(jax.random.key(0), X)["params"]
    boxed = attach(jax.random.key(1), adapted, base, X)
    specs = nn.get_partition_spec(boxed)
    if logical:
        specs = nn.logical_to_mesh(specs, RULES)
    assert {name: (s["lora_a"], s["lora_b"]) for name, s in specs["layers"].items()} == {
        "into": (P(None, "data", None), P(None, None, "model")),
        "out": (P(None, "model", None), P(None, None, "data")),
        "wide": (P(None, None, "data", None), P(None, None, None, "model")),
        "up": (P(None, "data", None), P(None, None, "model")),
        "down": (P(None, "model", None), P(None, None, "data")),
    }
    params = with_random_factors(nn.unbox(boxed), lora)
    shardings = jax.tree.map(lambda s: NamedSharding(mesh, s), specs)
    x = jax.device_put(X, NamedSharding(mesh, P("data")))
    placed = jax.device_put(params, shardings)
    trainable, frozen = split(placed, lora)

    @jax.jit
    def step(trainable, frozen, x):
        def loss(trainable):
            return jnp.mean(adapted.apply({"params": join(trainable, frozen)}, x) ** 2)

        value, grads = jax.value_and_grad(loss)(trainable)
        return value, jax.tree.map(lambda p, g: p - 0.1 * g, trainable, grads)

    value, new = step(trainable, frozen, x)
    ours, _ = split(shardings, lora)  # trees of shardings split like parameters
    for path, leaf in jax.tree_util.tree_leaves_with_path(new):
        wanted = functools.reduce(lambda tree, key: tree[key.key], path, ours)
        assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim), (path, leaf.sharding)
    plain = jax.jit(merge, static_argnums=1)(placed, adapted, x)
    for name, leaf in plain["layers"].items():
        wanted = shardings["layers"][name]["kernel"]
        assert leaf["kernel"].sharding.is_equivalent_to(wanted, leaf["kernel"].ndim)

    alone, frozen = split(params, lora)
    expected, updated = step(alone, frozen, X)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), new, updated)


class Deep(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i, width in enumerate((384, 256)):
            x = nn.Dense(width, use_bias=False, name=f"layers_{i}")(x)
        return x


class DeepNNX(nnx.Module):
    def __init__(self):
        sizes = ((256, 384), (384, 256))
        linear = functools.partial(nnx.Linear, use_bias=False, rngs=nnx.Rngs(0))
        self.layers = nnx.List([linear(*size) for size in sizes])

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("framework", ["Linen", "NNX"])
def test_flops_of_a_step_are_those_of_the_factored_products(framework):
    tokens, rank, lora = 512, 4, LoRA(4)
    x = jnp.ones((tokens, 256))
    if framework == "Linen":
        adapted, _, params = prepared(Deep(), x, lora)
        trainable, frozen = split(params, lora)

        def run(trainable, frozen, x):
            return adapted.apply({"params": join(trainable, frozen)}, x)
    else:
        model = adapt(DeepNNX(), lora, rngs=nnx.Rngs(0))
        graph, trainable, frozen = nnx.split(model, lora.trainable, ...)

        def run(trainable, frozen, x):
            return nnx.merge(graph, trainable, frozen)(x)

    gradient = jax.grad(lambda *args: run(*args).sum())
    compiled = jax.jit(gradient).lower(trainable, frozen, x).compile()
    sizes = ((256, 384), (384, 256))
    # Forward: the weight, A, B. Backward: dz and dB of both layers, dA; the gradient of its input
    # through W and through A of the second layer alone.
    forward = sum(2 * tokens * (i * o + rank * (i + o)) for i, o in sizes)
    factors = sum(2 * tokens * rank * (2 * o + i) for i, o in sizes)
    inputs = 2 * tokens * (384 * 256 + 384 * rank)
    # The sum of the output makes the forward product of the last layer unnecessary.
    unused = 2 * tokens * 256 * (384 + rank)
    expected = forward + factors + inputs - unused
    assert abs(compiled.cost_analysis()["flops"] / expected - 1) < 0.03


class Quantised(nn.Module):
    """A frozen int8 layer between two that are adapted."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8, name="first")(x)
        kernel = self.param("kernel_int8", lambda k: jnp.ones((8, 8), jnp.int8))
        scale = self.param("scale", nn.initializers.constant(0.01), (8,))
        return nn.Dense(3, name="last")(x @ kernel.astype(x.dtype) * scale)


@flax.struct.dataclass
class Packed:
    """A quantised array as a pytree node, as quantisation libraries have it."""

    value: jax.Array
    scale: jax.Array

    @property
    def shape(self):
        return self.value.shape


def test_quantised_leaves_pass_through_untouched():
    lora = LoRA(2, 6, target="first|last")
    adapted, base, params = prepared_with_int8(lora)
    trainable, frozen = split(params, lora)
    assert frozen["kernel_int8"] is base["kernel_int8"]
    assert join(trainable, frozen)["kernel_int8"] is base["kernel_int8"]
    assert merge(params, lora)["kernel_int8"] is base["kernel_int8"]
    expected = jax.jit(Quantised().apply)({"params": base}, X)
    assert np.array_equal(jax.jit(adapted.apply)({"params": params}, X), expected)
    grads = jax.grad(lambda t: adapted.apply({"params": join(t, frozen)}, X).sum())(trainable)
    assert sorted(grads) == ["first", "last"]

    packed = Packed(base["kernel_int8"], base["scale"])
    attached = attach(jax.random.key(1), adapted, base | {"kernel_int8": packed}, X)
    assert attached["kernel_int8"] is packed
    trainable, frozen = split(attached, lora)
    assert join(trainable, frozen)["kernel_int8"] is packed

    whole = params | {"first": params["first"] | {"kernel": jnp.ones((8, 8), jnp.int8)}}
    with pytest.raises(ValueError, match=r"'first' is int8.*quantised"):
        merge(whole, lora)


def prepared_with_int8(lora):
    base = Quantised().init(jax.random.key(0), X)["params"]
    adapted = adapt(Quantised(), lora)
    return adapted, base, attach(jax.random.key(1), adapted, base, X)


def test_named_adapters_on_one_base_switch_without_a_retrace_and_can_be_disabled():
    lora = LoRA(2, 6, train="head")
    adapted, base, params = prepared(Encoder(), X, lora)
    _, frozen = split(params, lora)
    adapters = {
        name: split(with_random_factors(params, lora, seed), lora)[0]
        for seed, name in enumerate(("en", "de"))
    }
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def run(model, trainable, frozen, x):
        traces.append(model)
        return model.apply({"params": join(trainable, frozen)}, x)

    found = {name: run(adapted, adapters[name], frozen, X) for name in adapters}
    assert len(traces) == 1
    for name, trainable in adapters.items():
        plain = merge(join(trainable, frozen), lora)
        expected = Encoder().apply({"params": plain}, X)
        np.testing.assert_allclose(found[name], expected, atol=1e-5)
    # Disabled: the base runs on the same parameters and takes no notice of factors.
    disabled = jax.jit(adapted.base.apply)({"params": params}, X)
    assert np.array_equal(disabled, jax.jit(Encoder().apply)({"params": base}, X))


def test_a_batch_whose_examples_use_different_adapters():
    lora = LoRA(2, 6)
    adapted, _, params = prepared(Scanned(), X, lora)
    _, frozen = split(params, lora)
    adapters = [split(with_random_factors(params, lora, seed), lora)[0] for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *adapters)
    ids, x = jnp.array([2, 0, 2, 1]), jnp.concatenate([X, X + 1])

    @jax.jit
    def run(stacked, frozen, ids, x):
        chosen = jax.tree.map(lambda v: v[ids], stacked)
        one = lambda t, x: adapted.apply({"params": join(t, frozen)}, x[None])[0]  # noqa: E731
        return jax.vmap(one)(chosen, x)

    found = run(stacked, frozen, ids, x)
    for i, adapter in enumerate(ids.tolist()):
        plain = merge(join(adapters[adapter], frozen), lora)
        expected = Scanned().apply({"params": plain}, x[i : i + 1])[0]
        np.testing.assert_allclose(found[i], expected, atol=1e-5)
    # The base stays one: its products are over the whole batch, none over weights of each example.
    dots = str(jax.make_jaxpr(run)(stacked, frozen, ids, x))
    assert "f32[4,8,16]" not in dots


def test_adapted_modules_pickle_and_deepcopy():
    lora = LoRA(2, 6, rank_pattern={".*fc1": 3}, target=r".*(fc\d|query)")
    adapted, _, params = prepared(Scanned(), X, lora)
    params = with_random_factors(params, lora)
    expected = jax.jit(adapted.apply)({"params": params}, X)
    for other in (pickle.loads(pickle.dumps(adapted)), copy.deepcopy(adapted)):
        assert other == adapted and hash(other) == hash(adapted)
        assert np.array_equal(jax.jit(other.apply)({"params": params}, X), expected)
    assert pickle.loads(pickle.dumps(lora)) == copy.deepcopy(lora) == lora


class Holder:
    """As the Flax models of transformers 4: a module behind a property, and its parameters."""

    def __init__(self, module, params):
        self._module, self.params = module, params

    @property
    def module(self):
        return self._module

    def __call__(self, x, params=None):
        return self.module.apply({"params": self.params if params is None else params}, x)


class OpenHolder(Holder):
    module = None

    def __init__(self, module, params):
        self.module, self.params = module, params


@dataclasses.dataclass(frozen=True)
class Frozen:
    module: nn.Module
    params: dict

    __call__ = Holder.__call__


class Sealed:
    params = None

    @property
    def module(self):
        return Encoder()


@pytest.mark.parametrize("kind", [Holder, OpenHolder, Frozen])
def test_objects_that_hold_a_module_and_parameters(kind):
    lora = LoRA(2, 6)
    base = Encoder().init(jax.random.key(0), X)["params"]
    holder = kind(Encoder(), base)
    held = adapt(holder, lora)
    assert type(held) is kind and held.params is base and isinstance(holder.module, Encoder)
    params = attach(jax.random.key(1), held.module, held.params, X)
    if kind is Frozen:
        held = dataclasses.replace(held, params=params)
    else:
        held.params = params
    assert holder.params is base
    assert np.array_equal(jax.jit(held.__call__)(X), jax.jit(holder.__call__)(X))
    params = with_random_factors(params, lora)
    expected = kind(Encoder(), merge(params, lora))(X)
    np.testing.assert_allclose(held(X, params=params), expected, atol=1e-5)


def test_an_object_whose_module_cannot_be_replaced_is_refused():
    with pytest.raises(TypeError, match=r"Sealed\.module cannot be replaced"):
        adapt(Sealed(), LoRA(2))


def test_the_parts_work_on_any_adapted_tree():
    """Mask and penalty find the factors of interleaved and stacked layers alike."""
    lora = LoRA(2, 6)
    _, _, params = prepared(Model(), X, lora)
    trainable, _ = split(nn.unbox(params), lora)
    grads = jax.tree.map(jnp.ones_like, trainable)
    tx = rm.mask_gradients(1, draw="exact", start_step=0)
    updates, _ = tx.update(grads, tx.init(trainable))
    kept = jax.tree.map(lambda v: float(v.mean()), updates)
    assert set(jax.tree.leaves(kept)) == {0.5}
    wide = updates["layers"]["wide"]
    chosen = np.asarray(wide["lora_a"])[:, 0, 0]  # (layers, r)
    assert np.array_equal(np.asarray(wide["lora_b"])[:, 0, :, 0], chosen)
    assert not np.array_equal(chosen[0], chosen[1]) or not np.array_equal(chosen[1], chosen[2])
    terms = [
        np.linalg.norm(np.swapaxes(f, -1, -2) @ f - np.eye(2), axis=(-2, -1)).ravel()
        for m in trainable["layers"].values()
        for f in (np.asarray(m["lora_a"]), np.swapaxes(np.asarray(m["lora_b"]), -1, -2))
    ]
    expected = np.concatenate(terms).mean()
    np.testing.assert_allclose(rm.orthogonality(trainable), expected, rtol=1e-5)
