"""Whole models written for transformers: tensors, config, companions, refusals, and PyTorch."""

import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from fixtures.text import cases as texts
from fixtures.text import tiny
from fixtures.vit import cases as vits
from flax.traverse_util import flatten_dict, unflatten_dict
from oracle import oracle
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file

import rmlora_jax as rm
from rmlora_jax.data import augment
from rmlora_jax.data.vision import resize_square
from rmlora_jax.errors import UserError
from rmlora_jax.files import new_folder
from rmlora_jax.hub import load_pretrained, load_text, load_tokenizer, load_vit, save_model
from rmlora_jax.hub.info import Info, read_info
from rmlora_jax.models import ViT

KEYS = Path(__file__).parent.parent / "fixtures" / "vit" / "vit-base-patch16-224.keys.json"
IMAGES, TEXTS = Info("image_classification"), Info("text_classification")

# A layer's modules: here, in the files of transformers up to 5.8, and since 5.9.
LAYER = {
    "attention/query": ("attention.attention.query", "attention.q_proj"),
    "attention/key": ("attention.attention.key", "attention.k_proj"),
    "attention/value": ("attention.attention.value", "attention.v_proj"),
    "attention/out": ("attention.output.dense", "attention.o_proj"),
    "mlp/fc1": ("intermediate.dense", "mlp.fc1"),
    "mlp/fc2": ("output.dense", "mlp.fc2"),
}


def vit_folder(folder, name="plain", **config):
    case = vits.CASES[name]
    return vits.write_folder(folder, vits.config_of(case) | config, vits.weights_of(case))


def folder_of(folder, name):
    """A case of either kind as a folder."""
    if name in vits.CASES:
        return vit_folder(folder, name)
    return texts.write_folder(folder, name)


def info_of(base):
    return IMAGES if hasattr(base.config, "image_size") else TEXTS


def trained(params, seed=0):
    """The same tree with every value moved."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: (x * (1 + 0.2 * rng.standard_normal(x.shape))).astype(x.dtype), params
    )


def assert_same(left, right):
    left, right = (flatten_dict(x, sep="/") for x in (left, right))
    assert left.keys() == right.keys()
    for path in left:
        assert left[path].dtype == right[path].dtype, path
        np.testing.assert_array_equal(left[path], right[path], err_msg=path)


def config_in(folder):
    return json.loads((folder / "config.json").read_text())


def everything(root):
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


# Round trips.


@pytest.mark.parametrize(
    ("name", "old_names"),
    [("plain", True), ("plain", False), ("grow", False), ("bert", True), ("roberta", True),
     ("deberta_v3", True), ("deberta_v3", False), ("deberta_v2_conv", True)],
)
def test_what_is_written_is_read_back(name, old_names, tmp_path):
    base = load_pretrained(folder_of(tmp_path / "base", name))
    params = trained(base.params)
    folder = save_model(tmp_path / "out", params, base, info=info_of(base), old_names=old_names)
    assert folder == tmp_path / "out"
    back = load_pretrained(folder)
    assert_same(back.params, params)
    assert (back.config, back.num_labels, back.new, back.dropped) == (
        base.config, base.num_labels, (), ()
    )
    assert read_info(folder) == info_of(base)


def test_jax_arrays_give_the_same_file(tmp_path):
    base = load_vit(vit_folder(tmp_path / "base"))
    one = save_model(tmp_path / "a", base.params, base, info=IMAGES)
    two = save_model(tmp_path / "b", jax.tree.map(jnp.asarray, base.params), base, info=IMAGES)
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()


def test_resized_images_and_a_new_head(tmp_path):
    base = load_vit(vit_folder(tmp_path / "base"), image_size=48, num_classes=4)
    params = trained(base.params)
    folder = save_model(tmp_path / "out", params, base, info=Info("image_classification",
                                                                  image_size=48))
    assert config_in(folder)["image_size"] == 48
    assert load_file(folder / "model.safetensors")["vit.embeddings.position_embeddings"].shape == (
        1, 1 + 9 * 9, 24
    )
    back = load_vit(folder)
    assert (back.config, back.image_size, back.num_classes) == (base.config, 48, 4)
    assert_same(back.params, params)


@pytest.mark.parametrize("name", ["plain", "bert"])
def test_half_precision_stays_as_it_is(name, tmp_path):
    base = load_pretrained(folder_of(tmp_path / "base", name), dtype=jnp.bfloat16)
    folder = save_model(tmp_path / "out", base.params, base, info=info_of(base))
    kinds = {name: x.dtype for name, x in load_file(folder / "model.safetensors").items()}
    assert {x for n, x in kinds.items() if "classifier" not in n and "pooler" not in n} == {
        np.dtype(ml_dtypes.bfloat16)
    }
    assert kinds["classifier.weight"] == np.float32
    assert_same(load_pretrained(folder, dtype=jnp.bfloat16).params, base.params)
    assert config_in(folder)["dtype"] == "float32"  # transformers casts up, and rounds nothing


# Names, shapes and values, from elsewhere.


def test_names_and_shapes_are_those_of_the_published_vit(tmp_path):
    keys = json.loads(KEYS.read_text())
    shrink = {768: 12, 3072: 20, 197: 5, 16: 4, 1000: 9}
    expected = {k: tuple(shrink.get(n, n) for n in shape) for k, (_, shape) in keys.items()}
    config = {"model_type": "vit", "hidden_size": 12, "num_attention_heads": 3, "patch_size": 4,
              "intermediate_size": 20, "image_size": 8, "num_hidden_layers": 12}
    tensors = {k: np.ones(shape, np.float32) for k, shape in expected.items()}
    base = load_vit(vits.write_folder(tmp_path / "base", config, tensors))
    folder = save_model(tmp_path / "out", base.params, base, info=IMAGES)
    with safe_open(folder / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert found == expected


@pytest.mark.parametrize("name", ["bert", "roberta", "deberta_v3", "deberta_v2_conv",
                                  "deberta_unshared", "deberta_biased", "deberta_absolute"])
def test_tensors_of_texts_are_those_of_pytorchs_class(name, tmp_path):
    base = load_text(texts.write_folder(tmp_path / "base", name))
    folder = save_model(tmp_path / "out", base.params, base, info=TEXTS)
    found = load_file(folder / "model.safetensors")
    assert {k: list(x.shape) for k, x in found.items()} == texts.shapes_of(name)
    assert_same(found, texts.weights_of(texts.shapes_of(name)))


@pytest.mark.parametrize("generation", [0, 1])
def test_tensors_of_images_are_the_parameters_transposed(generation, tmp_path):
    base = load_vit(vit_folder(tmp_path / "base"))
    params = trained(base.params)
    folder = save_model(tmp_path / "out", params, base, info=IMAGES, old_names=generation == 0)
    p, expected = flatten_dict(params, sep="/"), {}
    for layer in range(3):
        start = (f"vit.encoder.layer.{layer}.", f"vit.layers.{layer}.")[generation]
        for path, names in LAYER.items():
            module = f"encoder/layers/{path}"
            expected[f"{start}{names[generation]}.weight"] = p[f"{module}/kernel"][layer].T
            expected[f"{start}{names[generation]}.bias"] = p[f"{module}/bias"][layer]
        for path, name in (("norm1", "layernorm_before"), ("norm2", "layernorm_after")):
            expected[f"{start}{name}.weight"] = p[f"encoder/layers/{path}/scale"][layer]
            expected[f"{start}{name}.bias"] = p[f"encoder/layers/{path}/bias"][layer]
    patch = np.einsum("hwco->ochw", p["embed/patch/kernel"])
    expected |= {
        "vit.embeddings.cls_token": p["embed/cls_token"],
        "vit.embeddings.position_embeddings": p["embed/position"],
        "vit.embeddings.patch_embeddings.projection.weight": patch,
        "vit.embeddings.patch_embeddings.projection.bias": p["embed/patch/bias"],
        "vit.layernorm.weight": p["encoder/norm/scale"],
        "vit.layernorm.bias": p["encoder/norm/bias"],
        "classifier.weight": p["head/kernel"].T,
        "classifier.bias": p["head/bias"],
    }
    assert_same(load_file(folder / "model.safetensors"), expected)


# config.json and the files beside it.


def test_config_of_images(tmp_path):
    base = load_vit(vit_folder(tmp_path / "base", torch_dtype="float16", pooler_act="tanh",
                               architectures=["ViTModel"], _name_or_path="/home/someone/model",
                               num_labels=7))
    raw = config_in(base.folder)
    raw |= {"auto_map": {"AutoModel": "evil--code.Model"}, "trust_remote_code": True,
            "quantization_config": {"bits": 4}, "attn_implementation": "evil/kernel"}
    (base.folder / "config.json").write_text(json.dumps(raw))
    labels = tuple("abcdefg")
    folder = save_model(tmp_path / "out", base.params, base,
                        info=Info("image_classification", labels=labels))
    assert config_in(folder) == vits.CASES["plain"]["config"] | {
        "model_type": "vit",
        "pooler_act": "tanh",
        "architectures": ["ViTForImageClassification"],
        "id2label": {str(i): name for i, name in enumerate(labels)},
        "label2id": {name: i for i, name in enumerate(labels)},
        "problem_type": "single_label_classification",
        "dtype": "float32",
    }
    assert load_vit(folder).labels == labels
    assert everything(folder) == [
        "config.json", "model.safetensors", "preprocessor_config.json", "rmlora.json"
    ]


def test_config_of_texts(tmp_path):
    base = load_text(texts.write_folder(tmp_path / "base", "bert"))
    config = config_in(save_model(tmp_path / "out", base.params, base, info=TEXTS))
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert config["id2label"] == {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}
    assert config["label2id"] == {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}
    assert config["problem_type"] == "single_label_classification"
    assert "image_size" not in config and config["vocab_size"] == 40


def test_config_of_regression_and_of_a_single_class(tmp_path):
    base = load_text(texts.write_folder(tmp_path / "base", "bert_variant"))
    config = config_in(save_model(tmp_path / "a", base.params, base, info=Info("text_regression")))
    assert (config["problem_type"], config["id2label"]) == ("regression", {"0": "LABEL_0"})
    config = config_in(save_model(tmp_path / "b", base.params, base, info=TEXTS))
    assert "problem_type" not in config  # which transformers 5 would refuse


@pytest.mark.parametrize(
    ("kind", "architecture"),
    [("roberta", "RobertaForSequenceClassification"),
     ("xlm-roberta", "XLMRobertaForSequenceClassification"),
     ("camembert", "CamembertForSequenceClassification")],
)
def test_relatives_of_roberta_keep_their_own_class(kind, architecture, tmp_path):
    folder = texts.write_folder(tmp_path / "base", "roberta")
    (folder / "config.json").write_text(json.dumps(config_in(folder) | {"model_type": kind}))
    base = load_text(folder)
    config = config_in(save_model(tmp_path / "out", base.params, base, info=TEXTS))
    assert (config["model_type"], config["architectures"]) == (kind, [architecture])


def processor_of(tmp_path, name, info, **changes):
    base = load_vit(vit_folder(tmp_path / f"base {name}"))._replace(**changes)
    folder = save_model(tmp_path / name, base.params, base, info=info)
    back = load_vit(folder)
    assert (back.image_mean, back.image_std) == (base.image_mean, base.image_std)
    return json.loads((folder / "preprocessor_config.json").read_text())


def test_preprocessor(tmp_path):
    config = processor_of(tmp_path, "a", IMAGES, image_mean=(0.1, 0.2, 0.3), image_std=(1., 2., 3.))
    assert config == {
        "image_processor_type": "ViTImageProcessor", "do_convert_rgb": True, "do_resize": True,
        "size": {"height": 30, "width": 30}, "resample": 2, "do_rescale": True,
        "rescale_factor": 1 / 255, "do_normalize": True,
        "image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3],
    }
    middle = Info("image_classification", stored_size=34, center=30 / 34)
    cropped = processor_of(tmp_path, "b", middle)
    assert cropped["image_processor_type"] == "CLIPImageProcessor"
    assert cropped["size"] == {"shortest_edge": 34}
    assert (cropped["do_center_crop"], cropped["crop_size"]) == (True, config["size"])


def test_the_tokenizers_files_and_the_card(tmp_path):
    base = load_text(tiny.write_model(tmp_path / "base"), num_labels=2)
    strange = {"spiece.model": b"\0\1", "code.py": b"print()", "optimizer.pt": b"x"}
    for name, content in strange.items():
        (base.folder / name).write_bytes(content)
    written = json.loads((base.folder / "tokenizer_config.json").read_text())
    source = base.folder / "tokenizer_config.json"
    source.write_text(json.dumps(written | {"model_max_length": 77}))
    info = Info("text_classification", about={"card": "# A card\n", "method": "rm_lora"})
    folder = save_model(tmp_path / "out", base.params, base, info=info)
    assert everything(folder) == ["README.md", "config.json", "model.safetensors", "rmlora.json",
                                  "spiece.model", "tokenizer_config.json", "vocab.txt"]
    for name in ("vocab.txt", "spiece.model", "tokenizer_config.json"):
        assert (folder / name).read_bytes() == (base.folder / name).read_bytes()
    assert (folder / "README.md").read_text() == "# A card\n"
    assert read_info(folder) == info
    (folder / "spiece.model").unlink()
    tokenizer = load_tokenizer(folder)
    assert tokenizer.model_max_length == 77
    assert tokenizer("good w3")["input_ids"] == [2, 5, 10, 3]
    source.write_text(json.dumps(written | {"auto_map": {"AutoTokenizer": ["code.T", None]}}))
    save_model(folder, base.params, base, info=info, overwrite=True)
    assert json.loads((folder / "tokenizer_config.json").read_text()) == written


# Refusals.


def without(path):
    return lambda flat: {k: v for k, v in flat.items() if k != path}


KERNEL = "encoder/layers/mlp/fc1/kernel"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without(KERNEL), f"lacks '{KERNEL}'"),
        (without("head/bias"), "lacks 'head/bias'.*ViTForImageClassification.*unadapted"),
        (lambda p: p | {"head/gate": p["head/bias"]}, "has unexpected 'head/gate'"),
        (lambda p: p | {KERNEL: p[KERNEL][:2]},
         rf"'{KERNEL}' has shape \(2, 24, 40\), but .*base asks for \(3, 24, 40\)"),
        (lambda p: p | {"encoder/layers/mlp/fc1/lora_a": p[KERNEL]},
         r"'encoder/layers/mlp/fc1/lora_a' are low-rank factors.*rm\.merge\(params, lora\)"),
    ],
)
def test_wrong_parameters_are_named_and_nothing_is_left(change, words, tmp_path):
    base = load_vit(vit_folder(tmp_path / "base"))
    params = unflatten_dict(change(flatten_dict(base.params, sep="/")), sep="/")
    before = everything(tmp_path)
    with pytest.raises(UserError, match=words):
        save_model(tmp_path / "out", params, base, info=IMAGES)
    assert everything(tmp_path) == before


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_weights_that_are_not_finite_are_not_written(value, dtype, tmp_path):
    base = load_vit(vit_folder(tmp_path / "base"))
    params = jax.tree.map(lambda x: np.array(x, dtype), base.params)
    params["head"]["kernel"][1, 0] = value
    with pytest.raises(UserError, match="'head/kernel' have values that are not finite"):
        save_model(tmp_path / "new", params, base, info=IMAGES)
    assert not (tmp_path / "new").exists()


def test_what_is_put_into_layers_has_no_place_in_a_file(tmp_path):
    base = load_vit(vit_folder(tmp_path / "base", bottleneck_width=2))
    shapes = jax.eval_shape(ViT(base.config, 7).init, jax.random.key(0), jnp.ones((1, 30, 30, 3)))
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes["params"])
    with pytest.raises(UserError, match=r"has unexpected '.*down/kernel'"):
        save_model(tmp_path / "out", params, base, info=IMAGES)


@pytest.mark.parametrize(
    ("info", "words"),
    [
        (TEXTS, "base does not fit text classification: it is a model of images"),
        (Info("image_classification", labels=("a", "b")), "it has 7 outputs, but 2 are needed"),
        (Info("image_classification", image_size=48), "have 30 pixels, but 48 are needed; load"),
    ],
)
def test_info_of_another_model_is_refused(info, words, tmp_path):
    base = load_vit(vit_folder(tmp_path / "base"))
    with pytest.raises(UserError, match=words):
        save_model(tmp_path / "out", base.params, base, info=info)
    assert not (tmp_path / "out").exists()


def test_a_base_that_has_gone_is_named(tmp_path):
    base = load_vit(vit_folder(tmp_path / "base"))
    shutil.rmtree(base.folder)
    with pytest.raises(UserError, match=r"base has no config\.json"):
        save_model(tmp_path / "out", base.params, base, info=IMAGES)


# Whole or not there.


def save(folder, value, **arguments):
    """A stand-in for a model: one file, one folder with a file."""
    with new_folder(folder, **arguments) as new:
        (new / "value").write_text(value)
        (new / "part").mkdir()
        (new / "part" / "more").write_text(value)


def test_a_folder_is_made_with_its_parents_and_no_other(tmp_path):
    save(tmp_path / "deep" / "out", "a")
    assert everything(tmp_path) == ["deep", "deep/out", "deep/out/part", "deep/out/part/more",
                                    "deep/out/value"]
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / "deep" / "out").stat().st_mode & 0o777 == 0o777 & ~mask


def test_an_existing_folder_is_refused_or_replaced(tmp_path):
    save(tmp_path / "out", "a")
    (tmp_path / "out" / "old").touch()
    before = everything(tmp_path)
    with pytest.raises(UserError, match=r"out is there already; give another folder, or overwrite"):
        save(tmp_path / "out", "b")
    assert everything(tmp_path) == before and (tmp_path / "out/value").read_text() == "a"
    save(tmp_path / "out", "b", overwrite=True)
    assert (tmp_path / "out/value").read_text() == "b"
    assert everything(tmp_path) == [name for name in before if name != "out/old"]


def test_save_model_replaces_only_when_told(tmp_path):
    base = load_vit(vit_folder(tmp_path / "base"))
    folder = save_model(tmp_path / "out", base.params, base, info=IMAGES)
    with pytest.raises(UserError, match="overwrite=True"):
        save_model(folder, trained(base.params), base, info=IMAGES)
    assert_same(load_vit(folder).params, base.params)
    # The base's own folder, too.
    save_model(base.folder, trained(base.params), base, info=IMAGES, overwrite=True)
    assert_same(load_vit(base.folder).params, trained(base.params))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_files_and_the_places_one_is_in_are_never_replaced(overwrite, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "work" / "deeper").mkdir(parents=True)
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work" / "deeper")
    before = everything(tmp_path)
    with pytest.raises(UserError, match="file is a file; give the name of a folder"):
        save(tmp_path / "file", "a", overwrite=overwrite)
    for place in (".", "..", tmp_path / "work", tmp_path / "home", "~", "/"):
        with pytest.raises(UserError, match="holds your home or the folder you are in"):
            save(place, "a", overwrite=overwrite)
    assert everything(tmp_path) == before


def test_a_link_to_a_folder_stays_one(tmp_path):
    save(tmp_path / "real", "a")
    (tmp_path / "link").symlink_to("real")
    save(tmp_path / "link", "b", overwrite=True)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real/value").read_text() == "b"
    assert sorted(os.listdir(tmp_path)) == ["link", "real"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_error_while_writing_leaves_nothing(error, tmp_path):
    with pytest.raises(error), new_folder(tmp_path / "out") as new:
        (new / "half").touch()
        raise error
    assert everything(tmp_path) == []


@pytest.mark.parametrize("fails_at", [1, 2])
def test_a_failed_rename_leaves_the_old_folder_whole(fails_at, tmp_path, monkeypatch):
    base = load_vit(vit_folder(tmp_path / "base"))
    folder = save_model(tmp_path / "out", base.params, base, info=IMAGES)
    before, rename, calls = everything(tmp_path), os.rename, []

    def failing(*paths):
        calls.append(paths)
        if len(calls) == fails_at:
            raise OSError("disk full")
        rename(*paths)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="disk full"):
        save_model(folder, trained(base.params), base, info=IMAGES, overwrite=True)
    assert everything(tmp_path) == before
    assert_same(load_vit(folder).params, base.params)


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    base = load_vit(vit_folder(tmp_path / "base"))
    before = everything(tmp_path)

    def failing(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="disk full"):
        save_model(tmp_path / "out", base.params, base, info=IMAGES)
    assert everything(tmp_path) == before


def test_files_are_on_the_disk_before_the_folder_is_in_place(tmp_path, monkeypatch):
    flushed, sync, rename = [], os.fsync, os.rename

    def recording(handle):
        flushed.append(os.fstat(handle).st_ino)
        sync(handle)

    def renaming(source, target):
        inside = [path.stat().st_ino for path in (source, *source.rglob("*"))]
        assert len(inside) == 4 and set(inside) <= set(flushed)
        rename(source, target)

    monkeypatch.setattr(os, "fsync", recording)
    monkeypatch.setattr(os, "rename", renaming)
    save(tmp_path / "out", "a")
    assert (tmp_path / "out/value").exists()


# PyTorch's own predictions.

PICTURE = np.asarray(Image.fromarray(
    np.random.default_rng(0).integers(0, 256, (9, 9, 3), np.uint8)).resize((64, 64)))


def inputs_of(base, name):
    if hasattr(base.config, "image_size"):
        pixels = vits.images_of(base.config.image_size, base.config.num_channels)
        return {"pixel_values": np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))}
    batch = texts.tokens_of(name)
    if not base.config.type_vocab_size:
        batch.pop("token_type_ids")
    return batch


def ours(base, params, inputs):
    if "pixel_values" in inputs:
        arguments = (inputs["pixel_values"].transpose(0, 2, 3, 1),)
    else:
        names = ("input_ids", "attention_mask", "token_type_ids")
        arguments = [inputs[name] for name in names if name in inputs]
    model = base.family.model(base.config, base.num_labels)
    return np.asarray(jax.jit(model.apply)({"params": params}, *arguments))


# name: case, arguments of the loader, arguments of save_model.
TORCH = {
    "vit": ("plain", {}, {}),
    "vit_newer": ("plain", {}, {"old_names": False}),
    "vit_resized": ("plain", {"image_size": 48, "num_labels": 4}, {}),
    "vit_variant": ("grow", {}, {}),
    "bert": ("bert", {}, {}),
    "roberta": ("roberta", {}, {}),
    "deberta_v3": ("deberta_v3", {}, {}),
    "deberta_v2_conv": ("deberta_v2_conv", {}, {}),
}


@pytest.fixture(scope="module")
def differences(tmp_path_factory):
    """Name in TORCH -> (difference of the logits of the base, of the trained model)."""
    oracle.python()
    root = tmp_path_factory.mktemp("torch")
    runs, inputs = {}, {}
    for name, (case, loading, saving) in TORCH.items():
        folder = folder_of(root / f"{name}_base", case)
        base, used = load_pretrained(folder), load_pretrained(folder, **loading)
        params = trained(used.params)
        out = save_model(root / name, params, used, info=info_of(used), **saving)
        inputs |= {folder: inputs_of(base, case), out: inputs_of(used, case)}
        runs[name] = [(folder, base, base.params), (out, used, params)]
    theirs = oracle.logits(inputs, root)
    return {
        name: [np.abs(theirs[folder]["logits"] - ours(base, params, inputs[folder])).max()
               for folder, base, params in both]
        for name, both in runs.items()
    }


@pytest.mark.parametrize("name", TORCH)
def test_pytorch_predicts_the_same(name, differences):
    before, after = differences[name]
    print(f"{name}: base {before:.1e}, exported {after:.1e}")
    assert after <= 2e-4 and after <= before + 1e-5


@pytest.mark.slow
def test_pytorch_from_an_image_and_from_a_text(tmp_path):
    """Merged factors, the processors' own files, names of the classes, and a half base."""
    oracle.python()
    vit = load_vit(vit_folder(tmp_path / "vit", torch_dtype="float16"))
    lora = rm.LoRA(rank=2, target=("query", "fc1"))
    model = rm.adapt(vit.family.model(vit.config, 7), lora)
    images = jnp.zeros((1, 30, 30, 3))
    params = rm.attach(jax.random.key(0), model, vit.params, images)
    moved = {path: x + 0.1 if path.endswith("lora_b") else x
             for path, x in flatten_dict(params, sep="/").items()}
    params = unflatten_dict(moved, sep="/")
    labels = tuple("abcdefg")
    plain = Info("image_classification", labels=labels)
    middle = Info("image_classification", labels=labels, stored_size=34, center=30 / 34)
    with pytest.raises(UserError, match=r"rm\.merge"):
        save_model(tmp_path / "out", params, vit, info=plain)
    merged = rm.merge(params, lora)
    whole = save_model(tmp_path / "whole", merged, vit, info=plain)
    part = save_model(tmp_path / "part", merged, vit, info=middle)

    text = load_text(tiny.write_model(tmp_path / "bert"), num_labels=2)
    bert = save_model(tmp_path / "text", text.params, text, info=TEXTS)
    words = "good w3 w7 bad unheard"
    tokens = {k: np.asarray(v)[None] for k, v in load_tokenizer(bert)(words).items()}

    found = oracle.logits(
        {whole: {"image": PICTURE}, part: {"image": PICTURE}, bert: {"text": words}}, tmp_path
    )
    # Pillow rounds to bytes twice, after the rows and after the columns; here once, when stored.
    for folder, stored, center, off in (
        (whole, PICTURE, 1.0, 1 / 127.5 + 1e-6),
        (part, resize_square(PICTURE, 34), middle.center, 1e-6),
    ):
        pixels = augment(stored[None], image_size=30, train=False, center=center,
                         mean=vit.image_mean, std=vit.image_std)
        theirs = found[folder]["pixel_values"].transpose(0, 2, 3, 1)
        assert np.abs(theirs - pixels).max() <= off
        assert found[folder]["labels"].tolist() == list(labels)
        logits = jax.jit(model.apply)({"params": params}, theirs)
        assert np.abs(found[folder]["logits"] - logits).max() < 1e-5
        before = ours(vit, vit.params, {"pixel_values": found[folder]["pixel_values"]})
        assert np.abs(logits - before).max() > 0.1  # the factors count
    assert found[whole]["architecture"] == "ViTForImageClassification"
    for name, values in tokens.items():
        np.testing.assert_array_equal(found[bert][name], values)
    logits = ours(text, text.params, tokens)
    assert np.abs(found[bert]["logits"] - logits).max() < 1e-5
    assert found[bert]["labels"].tolist() == ["LABEL_0", "LABEL_1"]
