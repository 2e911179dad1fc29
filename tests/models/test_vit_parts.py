"""The parts of the ViT: its configuration, position interpolation, padded attention."""

import dataclasses
import math
from pathlib import Path

import jax
import jax.extend as jex
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.vit.cases import GRIDS, table_of

from rmlora_jax.models import ViTConfig
from rmlora_jax.models.attention import attend, padded_attention
from rmlora_jax.models.blocks import REMAT
from rmlora_jax.models.config import gelu
from rmlora_jax.models.positions import bicubic_matrix, resize_positions
from rmlora_jax.models.vit import product_of_patches

FIXTURES = Path(__file__).parent.parent / "fixtures" / "vit"
CONFIG = ViTConfig(hidden_size=24, num_attention_heads=3, image_size=20, patch_size=4)


@pytest.mark.parametrize(("old", "new"), GRIDS)
def test_positions_interpolate_like_pytorch(old, new):
    expected = np.load(FIXTURES / "positions.npz")[f"{old}_{new}"]
    resized = resize_positions(table_of(old), new)
    assert resized.dtype == np.float32
    np.testing.assert_allclose(resized, expected, atol=1e-5, rtol=0)


def test_bicubic_matrix_at_scale_two_has_keys_weights():
    # a = -0.75 at distances 1.25, 0.25, 0.75, 1.75 from the sample, by hand.
    row = bicubic_matrix(8, 16)[7]
    np.testing.assert_allclose(row[2:6], [-0.10546875, 0.87890625, 0.26171875, -0.03515625])
    np.testing.assert_allclose(bicubic_matrix(5, 13).sum(axis=1), 1)


def test_positions_that_form_no_square_are_refused():
    with pytest.raises(ValueError, match="12 patches"):
        resize_positions(np.zeros((1, 13, 4), np.float32), 5)


@pytest.mark.slow
def test_padded_attention_gives_padding_no_weight():
    # 26 tokens pad to 32. Keys and values come with large numbers, so that a leak would show.
    random = np.random.RandomState(0)
    query, key, value = (random.normal(3, 4, (2, 26, 3, 8)).astype(np.float32) for _ in "qkv")

    def loss(attention, *args):
        return (attention(*args, "xla") ** 2).sum()

    scores = np.einsum("bqhd,bkhd->bhqk", query, key, dtype=np.float64) / np.sqrt(8)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum("bhqk,bkhd->bqhd", weights, value)
    actual = padded_attention(query, key, value, "xla")
    assert actual.shape == query.shape
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)
    for padded, plain in zip(
        jax.grad(loss, (1, 2, 3))(padded_attention, query, key, value),
        jax.grad(loss, (1, 2, 3))(attend, query, key, value),
        strict=True,
    ):
        np.testing.assert_allclose(padded, plain, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("mapped", [(0, None, None), (None, 0, None), (None, None, 0), (0, 0, 0)])
@pytest.mark.parametrize("length", [24, 26])
def test_under_a_vmap_all_that_the_kernel_takes_is_batched(monkeypatch, mapped, length):
    # jax 0.10's rule for cuDNN's kernel reshapes each of them to the batch of the query.
    seen = []

    @jax.custom_batching.custom_vmap
    def kernel(query, *others):
        return query

    @kernel.def_vmap
    def rule(size, batched, *args):
        seen.extend(args)
        assert all(batched)
        return args[0], True

    def attention(query, key, value, query_seq_lengths=None, key_value_seq_lengths=None, **_):
        counts = (query_seq_lengths, key_value_seq_lengths)
        return kernel(query, key, value, *(c for c in counts if c is not None))

    monkeypatch.setattr(jax.nn, "dot_product_attention", attention)
    args = [jnp.ones((5, 2, length, 3, 8)[axis is None :]) for axis in mapped]
    jax.vmap(lambda *args: padded_attention(*args, "cudnn"), mapped)(*args)
    for array in seen[:3]:
        np.testing.assert_array_equal(array[:, :, :length], np.ones((5, 2, length, 3, 8)))
    counts = [np.full((5, 2), n) for n in (32, 26)] if length == 26 else []
    np.testing.assert_array_equal(seen[3:], counts)


def test_padding_pads_to_a_multiple_of_eight():
    def lengths(length):
        x = jnp.ones((1, length, 1, 8))
        text = str(jax.make_jaxpr(lambda x: padded_attention(x, x, x, "xla"))(x))
        return f"1,1,{length},{length}]" in text, f"1,1,{-(-length // 8) * 8}," in text

    assert lengths(197) == (False, True)
    assert lengths(200) == (True, True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_gelu_and_its_derivative(dtype):
    x = jnp.linspace(-6, 6, 2001).astype(dtype)
    value, backward = jax.vjp(jax.jit(gelu), x)
    (slope,) = backward(jnp.ones_like(x))
    assert value.dtype == slope.dtype == x.dtype
    exact = np.asarray(x, np.float64)
    phi = np.exp(-(exact**2) / 2) / math.sqrt(2 * math.pi)
    below = np.array([math.erfc(-v / math.sqrt(2)) / 2 for v in exact])
    rounding = float(jnp.finfo(dtype).eps) / 2
    for actual, expected in ((value, exact * below), (slope, below + exact * phi)):
        # One rounding; below -4, where 1 + erf cancels, what float32 leaves of it.
        np.testing.assert_allclose(
            np.asarray(actual, np.float64), expected, rtol=1.01 * rounding + 2e-6, atol=1e-6
        )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gelu_keeps_its_input_and_no_more(dtype):
    _, backward = jax.vjp(gelu, jnp.linspace(-6, 6, 100).astype(dtype))
    kept = [leaf for leaf in jax.tree.leaves(backward) if leaf.size > 1]
    assert [(leaf.size, leaf.dtype) for leaf in kept] == [(100, dtype)]


@pytest.mark.parametrize("size", [(12, 10), (14, 13)])
def test_patches_are_a_convolution(size):
    random = np.random.RandomState(3)
    images = random.normal(size=(2, *size, 3)).astype(np.float32)
    kernel = random.normal(size=(4, 5, 3, 7)).astype(np.float32)
    axes = ("NHWC", "HWIO", "NHWC")
    expected = jax.lax.conv_general_dilated(
        images, kernel, (4, 5), "VALID", dimension_numbers=axes
    )
    actual = product_of_patches(images, kernel, (4, 5), "VALID", dimension_numbers=axes)
    assert actual.shape == (2, 3, 2, 7)
    np.testing.assert_allclose(actual, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", 25),
        ("hidden_act", "swish"),
        ("num_hidden_layers", 0),
        ("num_hidden_layers", 2.0),
        ("hidden_dropout_prob", 1.0),
        ("layer_norm_eps", -1e-6),
        ("layer_norm_eps", "1e-6"),
        ("qkv_bias", 1),
        ("patch_size", 32),
    ],
)
def test_config_names_the_wrong_field(field, value):
    with pytest.raises(ValueError, match=r"hidden_size|" + field) as caught:
        dataclasses.replace(CONFIG, **{field: value})
    assert str(value) in str(caught.value)


def test_config_from_hf():
    config = ViTConfig.from_hf(
        {
            "architectures": ["ViTModel"],
            "model_type": "vit",
            "hidden_act": "gelu_new",
            "layer_norm_eps": 1e-6,
            "image_size": [96, 96],
            "patch_size": 8,
            "qkv_bias": False,
            "encoder_stride": 16,
            "pooler_act": "tanh",
            "torch_dtype": "float32",
            "_name_or_path": "somewhere",
            "use_mean_pooling": False,
        }
    )
    assert config == ViTConfig(
        hidden_act="gelu_new", layer_norm_eps=1e-6, image_size=96, patch_size=8, qkv_bias=False
    )
    assert config.grid == 12


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"layerscale_value": 0.1}, "layerscale_value"),
        ({"use_swiglu_ffn": True}, "use_swiglu_ffn"),
        ({"model_type": "deit"}, "deit"),
        ({"image_size": [224, 192]}, "image_size"),
        ({"hidden_act": "swiglu"}, "swiglu"),
    ],
)
def test_config_refuses_what_it_cannot_honour(extra, words):
    with pytest.raises(ValueError, match=words):
        ViTConfig.from_hf(extra)


def stand_in_for_a_fused_kernel():
    """sin, by a primitive that bears the name of cuDNN's attention, which no CPU can trace."""
    kernel = jex.core.Primitive("dot_product_attention_fwd_wrapper")
    kernel.def_abstract_eval(lambda x: jax.core.ShapedArray(x.shape, x.dtype))

    @jax.custom_vjp
    def attention(x):
        return kernel.bind(x)

    attention.defvjp(lambda x: (kernel.bind(x), x), lambda x, g: (g * jnp.cos(x),))
    return kernel.name, attention


@pytest.mark.parametrize(("remat", "times"), [("attention", 1), ("dots", 2), ("full", 2)])
def test_attention_is_not_computed_again_where_it_is_kept(remat, times):
    name, attention = stand_in_for_a_fused_kernel()

    def loss(x):
        layer = jax.checkpoint(lambda x: jnp.exp(attention(jnp.exp(x))), policy=REMAT[remat])
        return layer(x).sum()

    assert str(jax.make_jaxpr(jax.grad(loss))(jnp.ones(3))).count(name) == times
