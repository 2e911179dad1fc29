"""What ``adapt`` for Linen refuses, and what it says."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.adapted import (
    Encoder,
    Scanned,
    X,
    paths,
    prepared,
    with_random_factors,
)

from rmlora_jax.adapt import adapt
from rmlora_jax.adapt.lora import LoRA
from rmlora_jax.adapt.tree import attach, merge


@pytest.mark.parametrize(
    ("model", "what"),
    [
        (nn.ConvLocal(3, (3,)), "ConvLocal"),
        (nn.Conv(3, (3,), mask=np.ones((3, 8, 3))), "mask"),
        (nn.WeightNorm(nn.Dense(3)), "transformed"),
        (
            nn.map_variables(nn.Dense, "params", lambda v: jax.tree.map(jnp.sin, v), init=True)(3),
            "transformed",
        ),
    ],
)
def test_layers_whose_merge_would_be_wrong_are_refused(model, what):
    base = model.init(jax.random.key(0), X)["params"]
    adapted = adapt(model, LoRA(2))
    with pytest.raises(ValueError, match=f"(?s){what}.*LoRA.exclude"):
        attach(jax.random.key(1), adapted, base, X)
    with pytest.raises(ValueError, match=f"(?s){what}.*LoRA.exclude"):
        adapted.init(jax.random.key(1), X)


def test_refused_layers_may_be_excluded():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.WeightNorm(nn.Dense(8, name="inner"), name="normed")(x)
            return nn.Dense(3, name="fc")(nn.Einsum((8, 8), "btd,de->bte", name="mix")(x))

    lora = LoRA(2, exclude=("inner", "mix"))
    _, _, params = prepared(Net(), X, lora)
    assert {p for p in paths(params) if "lora" in p} == {"['fc']['lora_a']", "['fc']['lora_b']"}


def test_a_subclass_with_its_own_arithmetic_is_refused_one_that_calls_super_is_not():
    class Own(nn.Dense):
        @nn.compact
        def __call__(self, inputs):
            return inputs @ self.param("kernel", self.kernel_init, (8, self.features)) * 2

    class Super(nn.Dense):
        @nn.compact
        def __call__(self, inputs):
            return super().__call__(3 * inputs)

    with pytest.raises(ValueError, match="computes in its own way"):
        prepared(Own(5), X, LoRA(2))
    lora = LoRA(2, 6)
    adapted, _, params = prepared(Super(5), X, lora)
    params = with_random_factors(params, lora)
    expected = Super(5).apply({"params": merge(params, lora)}, X)
    np.testing.assert_allclose(adapted.apply({"params": params}, X), expected, atol=1e-5)


def test_adapting_twice_is_refused():
    adapted = adapt(Encoder(), LoRA(2))
    with pytest.raises(ValueError, match="adapted already"):
        adapt(adapted, LoRA(2))

    class Outer(nn.Module):
        inner: nn.Module

        def __call__(self, x):
            return self.inner(x)

    with pytest.raises(ValueError, match="holds an adapted module at 'inner'"):
        adapt(Outer(adapted), LoRA(2)).init(jax.random.key(0), X)


@pytest.mark.parametrize("axis", [1, -1])
def test_layers_stacked_on_another_axis_are_refused(axis):
    model = Scanned(axis=axis)
    base = model.init(jax.random.key(0), X)["params"]
    with pytest.raises(ValueError, match=r"do not fit.*variable_axes=\{\"params\": 0\}"):
        attach(jax.random.key(1), adapt(model, LoRA(2)), base, X)


def test_wrong_arguments_say_what_to_pass():
    lora = LoRA(2)
    with pytest.raises(TypeError, match="the class Dense: construct it"):
        adapt(nn.Dense, lora)
    with pytest.raises(TypeError, match=r"an nnx\.Module; it was given a dict"):
        adapt({}, lora)
    with pytest.raises(TypeError, match="lora is a int"):
        adapt(nn.Dense(3), 4)
    with pytest.raises(ValueError, match="rngs"):
        adapt(nn.Dense(3), lora, rngs=jax.random.key(0))
    from flax import nnx

    with pytest.raises(ValueError, match=r"rngs=nnx\.Rngs\(0\)"):
        adapt(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), lora)


def test_parameters_that_do_not_belong_to_the_description_are_refused():
    adapted, base, params = prepared(Encoder(), X, LoRA(2))
    with pytest.raises(ValueError, match=r"no factors .* at 'body'.*attach"):
        adapted.apply({"params": base}, X)
    with pytest.raises(ValueError, match=r"rank 3.*ask for"):
        adapt(Encoder(), LoRA(3)).apply({"params": params}, X)
    with pytest.raises(ValueError, match=r"hold factors at 'head'.*does not select"):
        adapt(Encoder(), LoRA(2, target="body")).apply({"params": params}, X)


def test_a_target_that_matches_nothing_is_an_error_at_init_and_attach():
    base = Encoder().init(jax.random.key(0), X)["params"]
    adapted = adapt(Encoder(), LoRA(2, target="bodi"))
    for make in (
        lambda: adapted.init(jax.random.key(0), X),
        lambda: attach(jax.random.key(0), adapted, base, X),
    ):
        with pytest.raises(ValueError, match=r"'bodi' matches no layer.*'body'"):
            make()
