"""Loading ViT checkpoints: published layouts, formats and every error by its words."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from fixtures.vit.cases import (
    CASES,
    TINY,
    config_of,
    split_into_shards,
    table_of,
    weights_of,
    write_folder,
)
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file

from rmlora_jax.errors import UserError
from rmlora_jax.hub import bundled, find_folder, load_vit
from rmlora_jax.hub.weights import Tensors
from rmlora_jax.models import ViT, ViTConfig
from rmlora_jax.models.positions import resize_positions
from rmlora_jax.models.vit import VIT

FIXTURES = Path(__file__).parent.parent / "fixtures" / "vit"
IN21K, IN1K = "vit-base-patch16-224-in21k", "vit-base-patch16-224"

# Sizes of the published ViT-B/16 -> tiny ones; the 12 layers stay.
SHRINK = {768: 12, 3072: 20, 197: 5, 16: 4, 1000: 9}
DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}

# What the two published folders say in config.json and preprocessor_config.json, at tiny sizes.
PUBLISHED_CONFIG = {
    "architectures": ["ViTModel"],
    "attention_probs_dropout_prob": 0.0,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0,
    "hidden_size": 12,
    "image_size": 8,
    "initializer_range": 0.02,
    "intermediate_size": 20,
    "layer_norm_eps": 1e-12,
    "model_type": "vit",
    "num_attention_heads": 3,
    "num_channels": 3,
    "num_hidden_layers": 12,
    "patch_size": 4,
    "qkv_bias": True,
    "transformers_version": "4.13.0.dev0",
}
PUBLISHED_PREPROCESSOR = {
    "do_normalize": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "resample": 2,
    "size": 8,
}


def published(name, folder):
    """A folder with the exact names and dtypes of a published checkpoint, at tiny width."""
    keys = json.loads((FIXTURES / f"{name}.keys.json").read_text())
    random = np.random.RandomState(0)
    tensors = {
        key: random.standard_normal([SHRINK.get(n, n) for n in shape]).astype(DTYPES[dtype])
        for key, (dtype, shape) in keys.items()
    }
    config = dict(PUBLISHED_CONFIG)
    if name == IN1K:
        config["architectures"] = ["ViTForImageClassification"]
        config["id2label"] = {str(i): f"label {i}" for i in range(9)}
    return write_folder(folder, config, tensors, PUBLISHED_PREPROCESSOR), tensors


def case(folder, name="plain", change=None, **config):
    tensors = weights_of(CASES[name])
    if change:
        tensors = change(tensors)
    return write_folder(folder, {**config_of(CASES[name]), **config}, tensors)


def assert_same(left, right):
    left, right = (flatten_dict(x.params, sep="/") for x in (left, right))
    assert left.keys() == right.keys()
    for path in left:
        assert left[path].dtype == right[path].dtype, path
        np.testing.assert_array_equal(left[path], right[path], err_msg=path)


def assert_holds(params, tensors, prefix):
    """Every parameter equals its tensors, transposed and stacked here by hand."""
    p, t = params, lambda name: tensors[prefix + name].astype(np.float32)
    np.testing.assert_array_equal(p["embed"]["cls_token"], t("embeddings.cls_token"))
    np.testing.assert_array_equal(p["embed"]["position"], t("embeddings.position_embeddings"))
    conv = t("embeddings.patch_embeddings.projection.weight")
    np.testing.assert_array_equal(p["embed"]["patch"]["kernel"], np.einsum("ochw->hwco", conv))
    bias = t("embeddings.patch_embeddings.projection.bias")
    np.testing.assert_array_equal(p["embed"]["patch"]["bias"], bias)
    np.testing.assert_array_equal(p["encoder"]["norm"]["scale"], t("layernorm.weight"))
    np.testing.assert_array_equal(p["encoder"]["norm"]["bias"], t("layernorm.bias"))
    layers = p["encoder"]["layers"]
    for ours, theirs in (
        (layers["attention"]["query"], "attention.attention.query"),
        (layers["attention"]["key"], "attention.attention.key"),
        (layers["attention"]["value"], "attention.attention.value"),
        (layers["attention"]["out"], "attention.output.dense"),
        (layers["mlp"]["fc1"], "intermediate.dense"),
        (layers["mlp"]["fc2"], "output.dense"),
        (layers["norm1"], "layernorm_before"),
        (layers["norm2"], "layernorm_after"),
    ):
        for n in range(12):
            weight = t(f"encoder.layer.{n}.{theirs}.weight")
            if "kernel" in ours:
                np.testing.assert_array_equal(ours["kernel"][n], weight.T)
            else:
                np.testing.assert_array_equal(ours["scale"][n], weight)
            np.testing.assert_array_equal(ours["bias"][n], t(f"encoder.layer.{n}.{theirs}.bias"))


def test_published_in21k_bare_model_with_unused_pooler(tmp_path):
    folder, tensors = published(IN21K, tmp_path)
    assert len(tensors) == 200
    vit = load_vit(folder, num_classes=100)
    assert vit.dropped == ("pooler.dense.bias", "pooler.dense.weight")
    assert vit.new == ("head/kernel", "head/bias")
    assert (vit.num_classes, vit.labels, vit.source) == (100, None, str(folder))
    assert (vit.image_mean, vit.image_std, vit.image_size) == ((0.5,) * 3, (0.5,) * 3, 8)
    assert vit.config == ViTConfig(
        hidden_size=12, num_attention_heads=3, intermediate_size=20, image_size=8, patch_size=4
    )
    assert_holds(vit.params, tensors, "")
    kernel, bias = vit.params["head"]["kernel"], vit.params["head"]["bias"]
    assert kernel.shape == (12, 100)
    assert abs(kernel.std() - 0.02) < 0.001
    assert not bias.any()
    other = load_vit(folder, num_classes=100, key=jax.random.key(1)).params["head"]["kernel"]
    assert (other != kernel).any()
    np.testing.assert_array_equal(
        load_vit(folder, num_classes=100, key=jax.random.key(0)).params["head"]["kernel"], kernel
    )


def test_labels_of_a_new_head_are_unknown(tmp_path):
    folder, _ = published(IN21K, tmp_path)
    config = {**PUBLISHED_CONFIG, "id2label": {"0": "LABEL_0", "1": "LABEL_1"}}
    (folder / "config.json").write_text(json.dumps(config))
    assert load_vit(folder, num_classes=2).labels is None


def test_published_in21k_needs_num_classes(tmp_path):
    folder, _ = published(IN21K, tmp_path)
    with pytest.raises(UserError, match="num_classes="):
        load_vit(folder)


def test_published_classifier_is_kept(tmp_path):
    folder, tensors = published(IN1K, tmp_path)
    assert len(tensors) == 200
    vit = load_vit(folder)
    assert (vit.num_classes, vit.dropped, vit.new) == (9, (), ())
    assert vit.labels == tuple(f"label {i}" for i in range(9))
    assert_holds(vit.params, tensors, "vit.")
    np.testing.assert_array_equal(vit.params["head"]["kernel"], tensors["classifier.weight"].T)
    np.testing.assert_array_equal(vit.params["head"]["bias"], tensors["classifier.bias"])
    assert_same(load_vit(folder, num_classes=9), vit)


def test_classifier_of_another_size_is_replaced(tmp_path):
    folder, _ = published(IN1K, tmp_path)
    vit = load_vit(folder, num_classes=4)
    assert vit.dropped == ("classifier.bias", "classifier.weight")
    assert vit.new == ("head/kernel", "head/bias")
    assert vit.labels is None
    assert vit.params["head"]["kernel"].shape == (12, 4)


def test_params_are_those_of_the_model(tmp_path):
    vit = load_vit(case(tmp_path))
    model = ViT(vit.config, vit.num_classes)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 30, 30, 3)))["params"]
    assert jax.tree.map(lambda x: (x.shape, x.dtype), vit.params) == jax.tree.map(
        lambda x: (x.shape, x.dtype), shapes
    )


NEWER = (
    ("encoder.layer.", "layers."),
    ("attention.attention.query", "attention.q_proj"),
    ("attention.attention.key", "attention.k_proj"),
    ("attention.attention.value", "attention.v_proj"),
    ("attention.output.dense", "attention.o_proj"),
    ("intermediate.dense", "mlp.fc1"),
    ("output.dense", "mlp.fc2"),
)


def newer(name):
    for old, new in NEWER:
        name = name.replace(old, new)
    return name


@pytest.mark.parametrize("generation", [str, newer])
@pytest.mark.parametrize("prefix", ["vit.", ""])
def test_every_spelling_loads_the_same(generation, prefix, tmp_path):
    def change(tensors):
        return {generation(k).replace("vit.", prefix): v for k, v in tensors.items()}

    assert_same(load_vit(case(tmp_path / "a", change=change)), load_vit(case(tmp_path / "b")))


def test_leftovers_of_other_classes_are_listed(tmp_path):
    extra = {
        "vit.pooler.dense.weight": np.zeros((24, 24), np.float32),
        "vit.embeddings.mask_token": np.zeros((1, 1, 24), np.float32),
        "decoder.0.weight": np.zeros((75, 24, 1, 1), np.float32),
    }
    assert load_vit(case(tmp_path, change=lambda t: {**t, **extra})).dropped == (
        "decoder.0.weight",
        "vit.embeddings.mask_token",
        "vit.pooler.dense.weight",
    )


def test_table_leads_back_to_the_file(tmp_path):
    folder = case(tmp_path)
    params = flatten_dict(load_vit(folder).params, sep="/")
    back = {}
    for path, axes, names in VIT.table:
        inverse = None if axes is None else np.argsort(axes)
        name, stacked = names[0], "{}" in names[0]
        for layer, value in enumerate(params[path] if stacked else [params[path]]):
            back[name.format(layer)] = value if axes is None else value.transpose(inverse)
    expected = load_file(folder / "model.safetensors")
    assert back.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(back[name], expected[name], err_msg=name)


@pytest.mark.parametrize("stored", DTYPES.values())
@pytest.mark.parametrize("wanted", [jnp.float32, jnp.bfloat16])
def test_dtypes(stored, wanted, tmp_path):
    tensors = weights_of(CASES["plain"])
    folder = case(tmp_path, change=lambda t: {k: v.astype(stored) for k, v in t.items()})
    params = load_vit(folder, dtype=wanted).params
    kernel = params["encoder"]["layers"]["mlp"]["fc1"]["kernel"]
    assert kernel.dtype == wanted
    weight = tensors["vit.encoder.layer.1.intermediate.dense.weight"]
    np.testing.assert_array_equal(kernel[1], weight.astype(stored).astype(wanted).T)
    assert params["head"]["kernel"].dtype == jnp.float32
    others = [x.dtype for path, x in flatten_dict(params, sep="/").items() if "head" not in path]
    assert set(others) == {jnp.dtype(wanted)}


def test_image_size_resizes_positions(tmp_path):
    def change(tensors):
        return {**tensors, "vit.embeddings.position_embeddings": np.tile(table_of(6), 8)}

    folder = case(tmp_path, change=change)
    vit = load_vit(folder, image_size=48)
    assert (vit.image_size, vit.config.image_size, vit.config.grid) == (48, 48, 9)
    expected = resize_positions(np.tile(table_of(6), 8), 9)
    assert expected.shape == (1, 82, 24)
    np.testing.assert_array_equal(vit.params["embed"]["position"], expected)
    np.testing.assert_array_equal(
        load_vit(folder).params["embed"]["position"], np.tile(table_of(6), 8)
    )


def test_shards(tmp_path):
    whole, folder = case(tmp_path / "whole"), case(tmp_path / "shards")
    files = split_into_shards(weights_of(CASES["plain"]), folder)
    assert_same(load_vit(folder), load_vit(whole))
    (folder / files[1]).unlink()
    with pytest.raises(UserError, match=re.escape(files[1])):
        load_vit(folder)
    (folder / "model.safetensors.index.json").write_text("{")
    with pytest.raises(UserError, match=r"index\.json cannot be read"):
        load_vit(folder)


def test_bundled_model():
    assert bundled() == (TINY,)
    folder = find_folder(TINY)
    vit = load_vit(TINY)
    assert (vit.num_classes, vit.image_size, vit.dropped, vit.new) == (200, 64, (), ())
    assert sum(x.size for x in jax.tree.leaves(vit.params)) == 5_427_080
    assert vit.params["head"]["kernel"].dtype == np.float32
    assert {tensor.dtype for tensor in Tensors(folder).values()} == {np.dtype(np.float16)}
    assert "Tiny-ImageNet" in (folder / "LICENSE").read_text()


def test_a_local_folder_comes_before_a_bundled_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    case(tmp_path / TINY)
    assert load_vit(TINY).config.hidden_size == 24


@pytest.mark.parametrize(
    ("preprocessor", "mean", "std"),
    [
        ({"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3]}, (0.1, 0.2, 0.3), (1, 2, 3)),
        ({"do_normalize": False, "image_mean": [0.1, 0.2, 0.3]}, (0, 0, 0), (1, 1, 1)),
        ({"rescale_factor": 0.00392156862745098}, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        # (255 u * 2/255 - 0.5) / 0.5 = (u - 0.25) / 0.25 for u in [0, 1]
        ({"rescale_factor": 2 / 255}, (0.25,) * 3, (0.25,) * 3),
        ({"do_rescale": False}, (0.5 / 255,) * 3, (0.5 / 255,) * 3),
    ],
)
def test_normalisation_is_for_pixels_between_0_and_1(preprocessor, mean, std, tmp_path):
    tensors = weights_of(CASES["plain"])
    vit = load_vit(write_folder(tmp_path, config_of(CASES["plain"]), tensors, preprocessor))
    np.testing.assert_allclose(vit.image_mean, mean)
    np.testing.assert_allclose(vit.image_std, std)


def without(*names):
    return lambda tensors: {k: v for k, v in tensors.items() if k not in names}


QUERY = "vit.encoder.layer.1.attention.attention.query.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without(QUERY), f"lacks {QUERY!r}"),
        (without("classifier.bias"), "lacks 'classifier.bias'"),
        (lambda t: {**t, "vit.gate": t["classifier.bias"]}, "unexpected 'vit.gate'"),
        (lambda t: {**t, QUERY: t[QUERY][:-1]}, rf"{QUERY!r} has shape \(23, 24\).*\(24, 24\)"),
        (lambda t: {**t, QUERY: t[QUERY].astype(np.int8)}, f"{QUERY!r} is int8"),
        (lambda t: {**t, QUERY[4:]: t[QUERY]}, "the same parameter"),
    ],
)
def test_wrong_tensors_are_named(change, words, tmp_path):
    with pytest.raises(UserError, match=words):
        load_vit(case(tmp_path, change=change))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"num_hidden_layers": 2}, r"unexpected 'vit\.encoder\.layer\.2"),
        ({"num_hidden_layers": 4}, r"lacks 'vit\.encoder\.layer\.3.*and 13 more"),
        ({"qkv_bias": False}, r"unexpected .*key\.bias"),
        ({"hidden_act": "swiglu"}, "config.json.*swiglu"),
        ({"layerscale_value": 0.1}, "config.json.*layerscale_value"),
        ({"model_type": "swin"}, "config.json.*swin"),
    ],
)
def test_config_that_does_not_fit_is_named(config, words, tmp_path):
    with pytest.raises(UserError, match=words):
        load_vit(case(tmp_path, **config))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_classes": 0}, r"num_classes\) is 0"),
        ({"num_classes": 2.0}, r"num_classes\) is 2.0"),
        ({"image_size": 0}, "image_size is 0"),
        ({"image_size": 4}, "patch size 5"),
    ],
)
def test_wrong_arguments_are_named(arguments, words, tmp_path):
    with pytest.raises(UserError, match=words):
        load_vit(case(tmp_path), **arguments)


def test_damaged_folders(tmp_path):
    folder = case(tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors is damaged or cut short"):
        load_vit(folder)
    weights.rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin is damaged or cut short"):
        load_vit(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match=r"no weights \(model\.safetensors"):
        load_vit(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"no config\.json"):
        load_vit(folder)
