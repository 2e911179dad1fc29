"""Bottleneck adapters and prefix vectors in the bundled encoders, against numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax.traverse_util import flatten_dict
from marks import slow

from rmlora_jax.models import Bert, BertConfig, Deberta, DebertaConfig, ViT, ViTConfig
from rmlora_jax.models.attention import padded_attention
from rmlora_jax.models.blocks import Attention, Bottleneck, Parts, Prefix, with_inserts

SIZES = {
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 16,
    "initializer_range": 0.5,
}
TEXT = SIZES | {"vocab_size": 20, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
TOKENS = jnp.arange(14, dtype=jnp.int32).reshape(2, 7) % 20
MASK = jnp.arange(7) < jnp.array([[7], [4]])
IMAGES = jax.random.normal(jax.random.key(5), (2, 8, 8, 3))
RELATIVE = {"relative_attention": True, "position_buckets": 4, "pos_att_type": ("c2p", "p2c"),
            "share_att_key": True}
CASES = {
    "vit": (ViT, ViTConfig(**SIZES, image_size=8, patch_size=4), (IMAGES,)),
    "bert": (Bert, BertConfig(**TEXT), (TOKENS, MASK)),
    "deberta": (Deberta, DebertaConfig(**TEXT, **RELATIVE), (TOKENS, MASK)),
}


def models(name, **inserts):
    """(plain model, its parameters, model with inserts, its parameters, example)."""
    cls, config, example = CASES[name]
    plain, model = cls(config, 5), cls(dataclasses.replace(config, **inserts), 5)
    params = jax.jit(plain.init)(jax.random.key(0), *example)["params"]
    return plain, params, model, with_inserts(jax.random.key(1), model, params, *example), example


def new(params, more):
    plain = flatten_dict(params, sep="/")
    return {k: v for k, v in flatten_dict(more, sep="/").items() if k not in plain}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_bottlenecks_begin_at_the_base_bit_for_bit(name):
    """Operation by operation; compiled, XLA fuses the two models in different ways."""
    plain, params, model, more, example = models(name, bottleneck_width=4)
    shapes = {path: leaf.shape for path, leaf in new(params, more).items()}
    assert shapes == {
        f"encoder/layers/bottleneck{i}/{side}/kernel": (2, *shape)
        for i in (1, 2) for side, shape in (("down", (12, 4)), ("up", (4, 12)))
    }
    for path, leaf in flatten_dict(params, sep="/").items():
        assert flatten_dict(more, sep="/")[path] is leaf
    down = more["encoder"]["layers"]["bottleneck1"]["down"]["kernel"]
    assert not np.array_equal(down[0], down[1])  # each layer draws its own
    with jax.disable_jit():
        expected = plain.apply({"params": params}, *example)
        np.testing.assert_array_equal(model.apply({"params": more}, *example), expected)
    compiled = jax.jit(model.apply)({"params": more}, *example)
    np.testing.assert_allclose(compiled, expected, rtol=1e-4, atol=1e-5)
    up = more["encoder"]["layers"]["bottleneck2"]["up"]
    up["kernel"] = jax.random.normal(jax.random.key(2), up["kernel"].shape)
    moved = jax.jit(model.apply)({"params": more}, *example)
    assert np.abs(moved - expected).max() > 1e-3


def test_a_bottleneck_is_its_formula():
    y, down, up = (
        np.random.default_rng(i).normal(size=shape).astype(np.float32)
        for i, shape in enumerate(((2, 5, 12), (12, 4), (4, 12)))
    )
    params = {"down": {"kernel": down}, "up": {"kernel": up}}
    found = Bottleneck(Parts(BertConfig(bottleneck_width=4))).apply({"params": params}, y)
    hidden = y @ down
    expected = y + hidden * scipy.special.ndtr(hidden) @ up
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [slow("vit"), "bert"])
def test_a_prefix_is_keys_and_values_in_front(name):
    """A layer's attention, in float64 and with a loop over the heads."""
    _, params, model, more, example = models(name, prefix_length=5)
    found = new(params, more)
    assert {path: leaf.shape for path, leaf in found.items()} == {
        f"encoder/layers/attention/prefix/{side}": (2, 5, 12) for side in ("key", "value")
    }
    assert all(0.3 < leaf.std() < 0.7 for leaf in found.values())  # initializer_range
    layer = jax.tree.map(lambda p: np.asarray(p[1], np.float64), more["encoder"]["layers"])
    p = layer["attention"]
    x = np.random.default_rng(0).normal(size=(2, 5 if name == "vit" else 7, 12))
    mask = np.ones(x.shape[:2], bool) if name == "vit" else np.asarray(MASK)
    query, key, value = (x @ p[n]["kernel"] + p[n]["bias"] for n in ("query", "key", "value"))
    key, value = (
        np.concatenate([np.broadcast_to(p["prefix"][n], (2, 5, 12)), own], 1)
        for n, own in (("key", key), ("value", value))
    )
    seen = np.concatenate([np.ones((2, 5), bool), mask], 1)
    mixed = np.zeros_like(x)
    for head in range(3):
        part = slice(4 * head, 4 * head + 4)
        scores = np.einsum("bqd,bkd->bqk", query[..., part], key[..., part]) / 2
        weights = scipy.special.softmax(np.where(seen[:, None], scores, -np.inf), -1)
        mixed[..., part] = weights @ value[..., part]
    expected = mixed @ p["out"]["kernel"] + p["out"]["bias"]

    module = Attention(Parts(model.config))
    inputs = (x,) if name == "vit" else (x, mask)
    inputs = [jnp.asarray(i, bool if i.dtype == bool else jnp.float32) for i in inputs]
    one = jax.tree.map(lambda leaf: leaf[1], more["encoder"]["layers"]["attention"])
    np.testing.assert_allclose(module.apply({"params": one}, *inputs), expected, rtol=2e-4,
                               atol=2e-5)
    assert model.apply({"params": more}, *example).shape == (2, 5)


@pytest.mark.parametrize("name", ["vit", slow("bert")])
def test_a_prefix_without_weight_is_the_base(name):
    """Keys that no query looks at: biases of the queries point away from them."""
    plain, params, model, more, example = models(name, prefix_length=3)
    attention = more["encoder"]["layers"]["attention"]
    attention["query"]["bias"] = jnp.full_like(attention["query"]["bias"], 1000.0)
    attention["key"] = jax.tree.map(jnp.zeros_like, attention["key"])
    attention["prefix"]["key"] = jnp.full((2, 3, 12), -1e3)
    base = params | {"encoder": params["encoder"] | {"layers": more["encoder"]["layers"]}}
    np.testing.assert_allclose(
        jax.jit(model.apply)({"params": more}, *example),
        jax.jit(plain.apply)({"params": base}, *example), rtol=1e-5, atol=1e-6)


def test_padding_does_not_reach_what_a_prefix_adds():
    _, _, model, more, _ = models("bert", prefix_length=3)
    short = model.apply({"params": more}, TOKENS[1:, :4], MASK[1:, :4])
    np.testing.assert_allclose(
        model.apply({"params": more}, TOKENS[1:], MASK[1:]), short, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("keys", [9, 16])
def test_the_padding_for_the_fused_kernel_allows_more_keys_than_queries(keys):
    rng = np.random.default_rng(0)
    query, key, value = (
        jnp.asarray(rng.normal(size=(2, n, 3, 8)), jnp.float32) for n in (6, keys, keys))
    np.testing.assert_allclose(
        padded_attention(query, key, value, "xla"),
        jax.nn.dot_product_attention(query, key, value), rtol=1e-5, atol=1e-6)


def test_prefix_keeps_the_dtype_of_the_computation():
    key = jnp.ones((2, 4, 3, 8), jnp.bfloat16)
    prefix = Prefix(Parts(BertConfig(prefix_length=2)))
    (keys, values, mask), _ = prefix.init_with_output(jax.random.key(0), key, key, None)
    assert keys.dtype == values.dtype == jnp.bfloat16 and mask is None and keys.shape[1] == 6
