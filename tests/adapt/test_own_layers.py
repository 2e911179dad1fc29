"""Modules of the user's own: rules that do not hold, stacks, parameters of a container."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from marks import slow

import rmlora_jax as rm

X = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, 8)), jnp.float32)
DENSE = "...i,io->...o"


class Own(nnx.Module):
    def __init__(self, rngs, shape=(8, 8)):
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), shape) / 3)

    def __call__(self, x, *, shift=0.0):
        return x @ self.kernel[...] + shift


class Einsum(nnx.Module):
    """Tunix: an equation an instance."""

    def __init__(self, equation, shape, rngs):
        self.equation, self.w = equation, nnx.Param(jax.random.normal(rngs.params(), shape))

    def __call__(self, x):
        return jnp.einsum(self.equation, x, self.w[...])


class CallTime(nn.Module):
    """gemma, big_vision: the equation is the first argument."""

    @nn.compact
    def __call__(self, equation, x):
        return jnp.einsum(equation, x, self.param("w", nn.initializers.normal(), (8, 2, 4)))


class Named(nn.Module):
    """gemma: the weight has the name that a field says."""

    shape: tuple
    weight_name: str = "w"

    @nn.compact
    def __call__(self, x):
        return x @ self.param(self.weight_name, nn.initializers.normal(), self.shape)


class Holder(nn.Module):
    width: int = 16

    @nn.compact
    def __call__(self, x):
        gating, linear = Named((8, self.width), "gating"), Named((self.width, 8), "linear")
        nn.share_scope(self, gating)
        h = nn.gelu(gating(x))
        nn.share_scope(self, linear)
        return linear(h)


class Twice(nn.Module):
    @nn.compact
    def __call__(self, x):
        return CallTime(name="q")("BTD,DNH->BTNH", x)


class Whole(nn.Module):
    build: type
    width: int = 16

    @nn.compact
    def __call__(self, x):
        return self.build(self.width, name="mlp")(x)


def linen(model, *layers):
    lora = rm.LoRA(2, layers=layers)
    params = model.init(jax.random.key(0), X)["params"]
    return rm.attach(jax.random.key(1), rm.adapt(model, lora), params, X)


def test_an_equation_that_is_not_the_instances_is_refused():
    rule = rm.Layer(Einsum, "BTD,DNH->BTNH", weight="w")
    lora = rm.LoRA(2, layers=rule)
    for equation, shape, x in (
        ("BTNH,NHD->BTD", (2, 4, 8), jnp.ones((1, 3, 2, 4))),
        ("BTD,NDH->BTNH", (2, 8, 4), X),
    ):
        layer = rm.adapt(Einsum(equation, shape, nnx.Rngs(0)), lora, rngs=nnx.Rngs(1))
        with pytest.raises(ValueError, match=r"Einsum\.__call__.*do not have the axes.*exclude"):
            layer(x)
    with pytest.raises(ValueError, match=r"nothing says which axes are a stack"):
        rm.adapt(Einsum("BTD,CNDH->CBTNH", (2, 2, 8, 4), nnx.Rngs(0)), lora, rngs=nnx.Rngs(1))
    right = rm.adapt(Einsum("BTD,DNH->BTNH", (8, 2, 4), nnx.Rngs(0)), lora, rngs=nnx.Rngs(1))
    right.lora_b[...] = jnp.ones((2, 8))
    delta = np.einsum("dr,rnh->dnh", right.lora_a[...], np.ones((2, 2, 4)))
    wanted = np.einsum("BTD,DNH->BTNH", X, np.asarray(right.w[...]) + delta)
    np.testing.assert_allclose(right(X), wanted, rtol=1e-4, atol=1e-5)


def test_an_equation_as_the_first_argument_is_refused():
    with pytest.raises(ValueError, match=r"'q', a CallTime.*first argument is 'BTD,DNH->BTNH'"):
        linen(Twice(), rm.Layer(CallTime, "BTD,DNH->BTNH", weight="w"))


@pytest.mark.parametrize("width", [16, 8])  # 8: shapes alone would not tell the weights apart
def test_two_layers_of_one_scope_are_refused(width):
    one, two = (rm.Layer(Named, DENSE, weight=name) for name in ("gating", "linear"))
    with pytest.raises(ValueError, match=r"'mlp', a Named.*share_scope"):
        linen(Whole(Holder, width), one)
    with pytest.raises(ValueError, match=r"'mlp', a Named.*no parameter 'linear'"):
        linen(Whole(Holder, width), two)
    with pytest.raises(ValueError, match=r"two entries for Named\.__call__"):
        rm.LoRA(2, layers=(one, two))
    assert rm.LoRA(2, layers=(one, one)).layers


def stacked(axis, cls=Own, shape=(8, 8)):
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=0, out_axes=axis)
    def build(rngs):
        return cls(rngs, shape)

    return build(nnx.Rngs(0))


def test_a_stack_of_own_layers_is_stated_or_told_by_a_flax_layer_or_refused():
    words = r"'layers' has a kernel of shape \(8, 3, 8\).*which axes are a stack.*stack=1"
    rule, stated = rm.Layer(Own, DENSE), rm.Layer(Own, DENSE, stack=1)
    for model in (nnx.Dict(layers=stacked(1)),):
        with pytest.raises(ValueError, match=words):
            rm.adapt(model, rm.LoRA(2, layers=rule), rngs=nnx.Rngs(1))
    with pytest.raises(ValueError, match="which axes are a stack"):
        rm.adapt(stacked(0), rm.LoRA(2, layers=rule), rngs=nnx.Rngs(1))
    model = rm.adapt(stacked(0, shape=(8, 5)), rm.LoRA(2, layers=stated), rngs=nnx.Rngs(1))
    assert model.lora_a.shape == (3, 8, 2) and model.lora_b.shape == (3, 2, 5)
    model.lora_b[...] = jnp.ones((3, 2, 5))
    found = nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))(model, X)
    weights = np.asarray(model.kernel[...]) + np.asarray(model.lora_a[...]) @ np.ones((3, 2, 5))
    np.testing.assert_allclose(found, np.einsum("btd,ldf->lbtf", X, weights), rtol=1e-4, atol=1e-5)

    class Both(nnx.Module):
        def __init__(self, rngs, shape):
            self.own, self.flax = Own(rngs, shape), nnx.Linear(8, 8, rngs=rngs)

    told = rm.adapt(stacked(0, Both), rm.LoRA(2, layers=rule), rngs=nnx.Rngs(1))
    assert told.own.lora_a.shape == (3, 8, 2)
    for stack in (-1, True, "1"):
        with pytest.raises(TypeError, match=r"Layer\.stack"):
            rm.Layer(Own, DENSE, stack=stack)


class Encoder(nnx.Module):
    """A root with a position embedding and a class token of its own."""

    def __init__(self, rngs):
        self.pos, self.cls = nnx.Param(jnp.ones((3, 8))), nnx.Param(jnp.ones((1, 1, 8)))
        self.own, self.fc = Own(rngs), nnx.Linear(8, 8, rngs=rngs)
        self.norm, self.head = nnx.LayerNorm(8, rngs=rngs), nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, x):
        return self.head(self.norm(self.fc(self.own(x + self.pos[...], shift=1.0))))


@pytest.mark.parametrize("target", [".*", slow(".+"), slow("fc|own|.*")])
def test_a_container_with_a_parameter_is_no_error_and_is_listed(target):
    base, rule = Encoder(nnx.Rngs(0)), rm.Layer(Own, DENSE)
    lora = rm.LoRA(2, target=target, train="head", exclude="head", layers=rule)
    model = rm.adapt(base, lora, rngs=nnx.Rngs(1))
    np.testing.assert_array_equal(model(X), base(X))  # keywords reach the layer, too
    assert rm.unadapted(model, lora) == ["pos"]
    wider = rm.LoRA(2, target="fc", layers=rule)
    model = rm.adapt(base, wider, rngs=nnx.Rngs(1))
    assert rm.unadapted(model, wider) == ["head/kernel", "own/kernel", "pos"]
    with pytest.raises(ValueError, match=r"'own', a Own, has a weight 'kernel'.*LoRA\.layers"):
        rm.adapt(base, rm.LoRA(2), rngs=nnx.Rngs(1))  # a layer, not a container
    with pytest.raises(ValueError, match=r"'a', a Encoder, has a weight 'pos'"):
        rm.adapt(nnx.Dict(a=base), rm.LoRA(2, target="a"), rngs=nnx.Rngs(1))  # it alone is meant


def test_unadapted_of_linen_parameters_leaves_stacked_vectors_out():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.Dense(8, name="b")(nn.Dense(8, name="a")(nn.LayerNorm()(x))), None

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = x + self.param("pos", nn.initializers.normal(), (3, 8))
            scan = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True})
            return scan(name="layers")(x, jnp.zeros(4))[0]

    lora = rm.LoRA(2, target=".*/a")
    model = rm.adapt(Net(), lora)
    params = model.init(jax.random.key(0), X)["params"]
    assert rm.unadapted(params, lora) == ["layers/b/kernel", "pos"]
    with pytest.raises(ValueError, match="no factors"):
        rm.unadapted(Net().init(jax.random.key(0), X)["params"], lora)


def test_factors_alone_have_an_intrinsic_dimension():
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=s).astype(np.float32) for s in ((3, 6, 2), (3, 2, 5)))
    lora, tree = rm.LoRA(2, alpha=6), {"fc": {"lora_a": a, "lora_b": b}}
    found = rm.intrinsic_dimension(tree, lora)["fc"]["singular_values"]
    wanted = np.linalg.svd(3 * a @ b, compute_uv=False)[:, :2]
    np.testing.assert_allclose(found, wanted, rtol=1e-4)
    later = {"fc": {"lora_a": a, "lora_b": 2 * b}}
    moved = rm.trajectory_dimension([tree, later], lora)["fc"]["singular_values"][:, :2]
    np.testing.assert_allclose(moved, wanted, rtol=1e-4)
    for other in ((6, 2), (6, 3, 2)), ((2, 6), (5, 2)), ((6, 3, 2), (2, 3, 5)):
        leaves = dict(zip(("lora_a", "lora_b"), map(np.ones, other), strict=True))
        with pytest.raises(ValueError, match="do not fit"):
            rm.intrinsic_dimension({"fc": leaves}, lora)
        with pytest.raises(ValueError, match="do not fit"):
            rm.merge({"fc": leaves | {"kernel": np.ones((6, 3, 5))}}, lora)
    with pytest.raises(ValueError, match="do not fit the weight"):
        rm.intrinsic_dimension({"fc": tree["fc"] | {"kernel": np.ones((3, 5, 6))}}, lora)
