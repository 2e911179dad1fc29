"""What ``adapt`` and ``merge`` refuse of NNX modules, and what the messages say."""

import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.adapted_nnx import Experts, Looped, Stacked, X, arrays, call, randomly_adapted
from flax import nnx

from rmlora_jax.adapt import adapt
from rmlora_jax.adapt.lora import Layer, LoRA
from rmlora_jax.adapt.tree import merge


def linear(**kwargs):
    return nnx.Linear(8, 8, rngs=nnx.Rngs(0), **kwargs)


def adapted(module, lora=None):
    return adapt(module, lora or LoRA(2), rngs=nnx.Rngs(1))


class Scale(nnx.Module):
    """A norm of one's own: its parameter is a vector, or a stack of vectors."""

    def __init__(self, rngs=None):
        self.scale = nnx.Param(jnp.ones(8))

    def __call__(self, x):
        return x * self.scale[...]


class Own(nnx.Linear):
    """Arithmetic of its own: never that of nnx.Linear."""

    def __call__(self, x):
        return x @ self.kernel[...]


class Sometimes(nnx.Linear):
    def __call__(self, x, own=False):
        return x @ self.kernel[...] if own else super().__call__(x)


def test_a_target_that_matches_nothing_lists_near_paths():
    for target in (r".*fc3", ("fc3",)):
        with pytest.raises(ValueError, match=r"fc3.*'blocks/0/fc1'"):
            adapted(Looped(rngs=nnx.Rngs(0)), LoRA(2, target=target))
    with pytest.raises(ValueError, match=r"LoRA.train.*'haed'.*'head'"):
        adapted(nnx.Dict(head=linear()), LoRA(2, train="haed"))
    with pytest.raises(ValueError, match=r"LoRA.rank_pattern.*'nothing'"):
        adapted(linear(), LoRA(2, rank_pattern=(("nothing", 3),)))
    with pytest.raises(ValueError, match=r"LoRA.exclude"):
        adapted(nnx.Dict(a=linear()), LoRA(2, exclude=".*"))


@pytest.mark.parametrize("rngs", [None, 0, {"params": 0}])
def test_random_numbers_are_needed(rngs):
    with pytest.raises(ValueError, match=r"rngs=nnx\.Rngs\(0\)"):
        adapt(linear(), LoRA(2), rngs=rngs)


def test_adapting_twice_is_refused():
    once = nnx.Dict(a=adapted(linear()))
    with pytest.raises(ValueError, match=r"adapted already.*'a'"):
        adapted(once)
    merged = merge(adapted(linear()), LoRA(2))
    assert arrays(adapted(merged), nnx.LoRAParam)  # after a merge it may be


@pytest.mark.parametrize(
    "build",
    [
        lambda: nnx.LoRALinear(8, 8, lora_rank=2, rngs=nnx.Rngs(0)),
        lambda: nnx.LoRA(8, 2, 8, base_module=linear(), rngs=nnx.Rngs(0)),
    ],
)
def test_modules_with_flax_factors_are_refused(build):
    with pytest.raises(ValueError, match=r"LoRA.*nnx\.LoRALinear"):
        adapted(nnx.Dict(a=build(), b=linear()))


def test_unknown_weights_are_refused_with_three_ways_out():
    model = nnx.Dict(own=Experts(rngs=nnx.Rngs(0)), b=linear())
    with pytest.raises(ValueError, match=r"'own', a Experts.*'w'.*LoRA.exclude.*LoRA.layers"):
        adapted(model)
    for lora in (
        LoRA(2, exclude="own"),
        LoRA(2, layers=Layer(Experts, "e...i,eio->e...o", weight="w", method="forward")),
    ):
        assert arrays(adapted(model, lora), nnx.LoRAParam)


def test_vectors_are_never_adapted_nor_refused():
    class Body(nnx.Module):
        def __init__(self, rngs):
            self.norm, self.flax_norm = Scale(), nnx.RMSNorm(8, rngs=rngs)
            self.fc = nnx.Linear(8, 8, rngs=rngs)

    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def build(rngs):
        return Body(rngs)

    model = nnx.Dict(
        blocks=build(nnx.Rngs(0)), norm=Scale(), other=nnx.Param(jnp.ones((1, 1, 8))), fc=linear()
    )
    assert model.blocks.norm.scale.shape == (3, 8)
    found = arrays(adapted(model), nnx.LoRAParam)
    names = ("blocks/fc/lora_a", "blocks/fc/lora_b", "fc/lora_a", "fc/lora_b")
    assert sorted(found) == sorted(names)
    with pytest.raises(ValueError, match="matches no layer"):
        adapted(model, LoRA(2, target="norm"))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: nnx.Conv(8, 8, 3, mask=jnp.ones((3, 8, 8)), rngs=nnx.Rngs(0)), "mask"),
        (lambda: nnx.WeightNorm(linear(), rngs=nnx.Rngs(0)), "WeightNorm"),
        (lambda: nnx.SpectralNorm(linear(), rngs=nnx.Rngs(0)), "SpectralNorm"),
        (lambda: nnx.Einsum("bd,de->b", (8, 8), rngs=nnx.Rngs(0)), "output's alone"),
        (lambda: nnx.Einsum("btd,ndh->btnh", (1, 8, 8), rngs=nnx.Rngs(0)), "axis of size 1"),
    ],
)
def test_layers_that_could_not_be_merged_are_refused(build, message):
    with pytest.raises(ValueError, match=f"the layer '.*a.*{message}.*LoRA.exclude"):
        adapted(nnx.Dict(a=build(), b=linear()))
    lora = LoRA(2, exclude="a.*")
    assert len(arrays(adapted(nnx.Dict(a=build(), b=linear()), lora), nnx.LoRAParam)) == 2


def test_an_einsum_without_an_equation_is_refused():
    layer = nnx.Einsum("bd,de->be", (8, 8), rngs=nnx.Rngs(0))
    layer.einsum_str = None
    with pytest.raises(ValueError, match="no equation"):
        adapted(layer)


def test_a_weight_of_two_layers_is_refused():
    one, two = linear(), linear()
    two.kernel = one.kernel
    model = nnx.Dict(one=one, two=two)
    with pytest.raises(ValueError, match="'one' shares its kernel"):
        adapted(model)
    found = arrays(adapted(model, LoRA(2, target=None, train="one")))
    assert "two/kernel" not in found  # still one Variable


def test_subclasses_that_do_their_own_arithmetic_are_refused_when_called():
    model = adapted(Own(8, 8, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"Own.__call__ does its own.*Layer\(Own, equation\)"):
        model(X)
    with pytest.raises(ValueError, match=r"Own.__call__"):
        call(model, X)
    rule = Layer(Own, "...i,io->...o")
    lora = LoRA(2, 6, layers=(rule,))
    ruled = randomly_adapted(Own(8, 8, rngs=nnx.Rngs(0)), lora)
    p = arrays(ruled)
    expected = X @ (p["kernel"] + 3 * p["lora_a"] @ p["lora_b"])
    np.testing.assert_allclose(ruled(X), expected, atol=1e-5)
    np.testing.assert_allclose(merge(ruled, lora)(X), expected, atol=1e-5)


def test_a_branch_of_its_own_is_refused_though_another_was_not():
    model = randomly_adapted(nnx.Dict(a=Sometimes(8, 8, rngs=nnx.Rngs(0)), b=linear()))
    model.a(X)
    with pytest.raises(ValueError, match=r"Sometimes.__call__"):
        model.a(X, own=True)
    model.b(X)


def test_weights_that_are_no_floats_pass_through_and_are_not_merged():
    layer = linear(use_bias=False)
    layer.kernel = nnx.Param(jnp.arange(64, dtype=jnp.int8).reshape(8, 8))
    lora = LoRA(2, 6)
    model = randomly_adapted(layer, lora)
    p = arrays(model)
    assert p["kernel"].dtype == jnp.int8
    kernel = p["kernel"].astype(jnp.float32)
    expected = X @ kernel + 3 * X @ p["lora_a"] @ p["lora_b"]
    np.testing.assert_allclose(model(X), expected, rtol=1e-5, atol=1e-3)
    with pytest.raises(ValueError, match=r"int8.*cannot hold"):
        merge(model, lora)
    for lora in (LoRA(2, init="pissa"), LoRA(2, execution="merged")):
        with pytest.raises(ValueError, match=r"int8.*LoRA\.exclude"):
            adapted(layer, lora)


def test_merge_wants_an_adapted_model_and_its_description():
    with pytest.raises(ValueError, match="no adapted layers"):
        merge(linear(), LoRA(2))
    model = adapted(Stacked(rngs=nnx.Rngs(0)), LoRA(2, 6))
    for other in (LoRA(2, 5), LoRA(4, 12), LoRA(2, 6, target=".*fc1")):
        with pytest.raises(ValueError, match="another description"):
            merge(model, other)
