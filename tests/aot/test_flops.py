"""Operations of products, counted in the traced program."""

import functools

import jax
import jax.numpy as jnp
import pytest

from rmlora_jax.aot.flops import flops
from rmlora_jax.models import ViT, ViTConfig


def of(fn, *shapes):
    return flops(jax.jit(fn).trace(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)))


def test_products_and_convolutions():
    assert of(lambda a, b: a @ b, (5, 7), (7, 3)) == 2 * 5 * 7 * 3
    assert of(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (4, 5, 7), (4, 7, 3)) == 8 * 105
    conv = functools.partial(jax.lax.conv_general_dilated, window_strides=(2, 2), padding="VALID",
                             dimension_numbers=("NHWC", "HWIO", "NHWC"))
    assert of(conv, (1, 8, 8, 6), (2, 2, 6, 10)) == 2 * 16 * 10 * (2 * 2 * 6)
    grouped = functools.partial(conv, feature_group_count=2)
    assert of(grouped, (1, 8, 8, 6), (2, 2, 3, 10)) == 2 * 16 * 10 * (2 * 2 * 3)


def test_what_is_inside_counts_as_often_as_it_runs():
    def square(x):
        return x @ x

    def twice(x):
        return jax.lax.scan(lambda c, _: (square(c), None), x, None, length=2)[0]

    one = 2 * 3**3
    assert of(lambda x: jax.lax.fori_loop(0, 3, lambda i, c: twice(c), x), (3, 3)) == 6 * one
    assert of(lambda x: jax.lax.cond(x[0, 0] > 0, twice, square, x), (3, 3)) == 2 * one
    assert of(jax.jit(square), (3, 3)) == one
    ruled = jax.custom_jvp(square)
    ruled.defjvp(lambda x, t: (square(*x), square(*t)))
    assert of(ruled, (3, 3)) == one
    # x @ x has one product forward and two backward; recomputed, one more.
    cost = lambda f: of(jax.grad(lambda x: f(f(x)).sum()), (3, 3))  # noqa: E731
    assert cost(jax.checkpoint(square)) == cost(square) == 6 * one
    assert cost(lambda x: jax.checkpoint(lambda y: square(jnp.sin(square(y))))(x)) > cost(
        lambda x: square(jnp.sin(square(x)))
    )


@pytest.mark.parametrize("unroll", [1, 3])
def test_a_model_against_xla_unrolled(unroll):
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    config = ViTConfig(num_hidden_layers=3, image_size=32, patch_size=8, **sizes)
    image = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)

    def step(params, x, unroll):
        return jax.grad(lambda p: ViT(config, 10, unroll=unroll).apply({"params": p}, x).sum())(
            params
        )

    params = jax.eval_shape(ViT(config, 10).init, jax.random.key(0), image)["params"]
    ours = flops(jax.jit(functools.partial(step, unroll=unroll)).trace(params, image))
    whole = jax.jit(functools.partial(step, unroll=3)).lower(params, image)
    theirs = whole.cost_analysis()["flops"]  # of norms and the like, too
    assert 0.8 * theirs < ours < theirs
