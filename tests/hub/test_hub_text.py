"""Loading text encoders: the published files, their names, leftovers and heads."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from fixtures.make_deberta_folder import write_bin
from fixtures.text.cases import shapes_of, weights_of
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from rmlora_jax.errors import UserError
from rmlora_jax.hub import load_text

TINY = {"hidden_size": 8, "num_hidden_layers": 12, "num_attention_heads": 2,
        "intermediate_size": 12, "vocab_size": 20, "max_position_embeddings": 16}

# config.json beyond the sizes, prefix, kind of file, dtype, and what is left out and new.
PUBLISHED = {
    "bert-base-uncased": (
        {"model_type": "bert", "type_vocab_size": 2}, "bert.", "safetensors", np.float32,
        ("cls.predictions", "cls.seq_relationship"), {"head/kernel", "head/bias"},
    ),
    "roberta-base": (
        {"model_type": "roberta", "type_vocab_size": 1, "pad_token_id": 1}, "roberta.",
        "safetensors", np.float32, ("lm_head", "roberta.pooler"),
        {"head/kernel", "head/bias", "pooler/kernel", "pooler/bias"},
    ),
    "deberta-v3-base": (
        {"model_type": "deberta-v2", "relative_attention": True, "position_buckets": 4,
         "norm_rel_ebd": "layer_norm", "share_att_key": True, "pos_att_type": "p2c|c2p",
         "position_biased_input": False, "type_vocab_size": 0},
        "deberta.", "bin", np.float16, ("lm_predictions", "mask_predictions"),
        {"head/kernel", "head/bias", "pooler/kernel", "pooler/bias"},
    ),
}


def published(folder, name, change=None, kind=None, dtype=None):
    """The folder, and its tensors after ``change``."""
    fields, _, own_kind, own_dtype, *_ = PUBLISHED[name]
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(TINY | fields))
    tensors = {
        key: value.astype(dtype or own_dtype) for key, value in weights_of(shapes_of(name)).items()
    }
    tensors = change(tensors) if change else tensors
    if (kind or own_kind) == "bin":
        write_bin(folder / "pytorch_model.bin", tensors.items())
    else:
        save_file(tensors, folder / "model.safetensors")
    return folder, tensors


@pytest.mark.parametrize("with_prefix", [True, False])
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_files_load(name, with_prefix, tmp_path):
    _, prefix, _, _, leftovers, new = PUBLISHED[name]

    def change(tensors):
        if with_prefix:
            return tensors
        return {key.removeprefix(prefix): value for key, value in tensors.items()}

    folder, tensors = published(tmp_path / "model", name, change)
    found = load_text(folder, num_labels=3)
    assert set(found.new) == new
    assert found.labels is None and found.num_labels == 3
    parts = tuple(part if with_prefix else part.removeprefix(prefix) for part in leftovers)
    assert found.dropped and all(key.startswith(parts) or "position" in key
                                 for key in found.dropped)
    assert all(any(key.startswith(part) for key in found.dropped) for part in parts)
    # Every value of every layer, in its place.
    head = prefix if with_prefix else ""
    for layer in (0, 7, 11):
        for path, theirs in (("mlp/fc1", "intermediate.dense"), ("mlp/fc2", "output.dense")):
            kernel = tensors[f"{head}encoder.layer.{layer}.{theirs}.weight"]
            ours = flatten_dict(found.params, sep="/")[f"encoder/layers/{path}/kernel"][layer]
            np.testing.assert_array_equal(ours, kernel.T.astype(np.float32))
        norm = f"{head}encoder.layer.{layer}.output.LayerNorm."
        scale = tensors.get(norm + "gamma", tensors.get(norm + "weight"))
        np.testing.assert_array_equal(
            found.params["encoder"]["layers"]["norm2"]["scale"][layer], scale.astype(np.float32)
        )
    used = sum(tensors[key].size for key in tensors if key not in found.dropped)
    new_size = sum(flatten_dict(found.params, sep="/")[path].size for path in found.new)
    assert sum(x.size for x in jax.tree.leaves(found.params)) == used + new_size
    model = found.family.model(found.config, 3)
    assert model.apply({"params": found.params}, np.ones((2, 5), int)).shape == (2, 3)


def test_new_heads_are_drawn_from_the_key(tmp_path):
    folder, _ = published(tmp_path / "model", "roberta-base")
    one, same, other = (load_text(folder, num_labels=40, key=jax.random.key(k)) for k in (1, 1, 2))
    kernel = one.params["head"]["kernel"]
    np.testing.assert_array_equal(kernel, same.params["head"]["kernel"])
    assert (kernel != other.params["head"]["kernel"]).any()
    assert abs(kernel.std() - one.config.initializer_range) < 0.003
    assert not one.params["head"]["bias"].any()
    both = np.concatenate([kernel.ravel(), one.params["pooler"]["kernel"].ravel()])
    assert len(np.unique(both)) == both.size  # drawn apart


def test_a_head_of_the_right_size_is_kept(tmp_path):
    def with_head(tensors):
        rng = np.random.default_rng(0)
        return tensors | {
            "classifier.weight": rng.standard_normal((3, 8)).astype(np.float32),
            "classifier.bias": np.arange(3, dtype=np.float32),
        }

    folder, tensors = published(tmp_path / "model", "bert-base-uncased", with_head)
    config = json.loads((folder / "config.json").read_text())
    names = {"id2label": {"0": "a", "1": "b", "2": "c"}}
    (folder / "config.json").write_text(json.dumps(config | names))
    kept = load_text(folder, dtype=ml_dtypes.bfloat16)
    assert kept.new == () and kept.labels == ("a", "b", "c") and kept.num_labels == 3
    np.testing.assert_array_equal(kept.params["head"]["kernel"], tensors["classifier.weight"].T)
    assert kept.params["head"]["kernel"].dtype == np.float32
    assert kept.params["embed"]["word"]["embedding"].dtype == ml_dtypes.bfloat16
    new = load_text(folder, num_labels=2)
    assert set(new.new) == {"head/kernel", "head/bias"} and new.labels is None
    assert {"classifier.weight", "classifier.bias"} <= set(new.dropped)


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [(np.float64, "safetensors"), (ml_dtypes.bfloat16, "safetensors"), (np.float16, "bin"),
     (ml_dtypes.bfloat16, "bin")],
)
def test_every_float_type(dtype, kind, tmp_path):
    folder, tensors = published(tmp_path / "m", "roberta-base", kind=kind, dtype=dtype)
    found = load_text(folder, num_labels=2).params["embed"]["word"]["embedding"]
    expected = tensors["roberta.embeddings.word_embeddings.weight"].astype(np.float32)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected)


def renamed(old, new):
    return lambda tensors: {key.replace(old, new): value for key, value in tensors.items()}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (renamed("layer.3.output.dense.bias", "layer.3.output.dense.shift"), "shift"),
        (renamed("layer.11.", "layer.12."), r"layer\.11\."),
        (lambda t: t | {"bert.extra": np.ones(2, np.float32)}, r"unexpected 'bert\.extra'"),
        (lambda t: t | {"bert.embeddings.LayerNorm.weight": np.ones(8, np.float32)}, "same"),
        (lambda t: t | {"bert.pooler.dense.bias": np.ones(9, np.float32)}, "shape"),
        (lambda t: {k: v for k, v in t.items() if k != "bert.pooler.dense.bias"}, "pooler"),
        (lambda t: t | {"bert.pooler.dense.bias": np.ones(8, np.int8)}, "int8"),
    ],
)
def test_what_does_not_fit_is_named(change, words, tmp_path):
    folder, _ = published(tmp_path / "model", "bert-base-uncased", change)
    with pytest.raises(UserError, match=words):
        load_text(folder, num_labels=2)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model_type": "t5"}, "t5.*bert, roberta"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"is_decoder": True}, "is_decoder"),
        ({"hidden_size": 9}, "num_attention_heads"),
    ],
)
def test_a_config_that_is_not_supported(fields, words, tmp_path):
    folder, _ = published(tmp_path / "model", "bert-base-uncased")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
    with pytest.raises(UserError, match=words):
        load_text(folder, num_labels=2)


def test_the_number_of_labels_must_be_known(tmp_path):
    folder, _ = published(tmp_path / "model", "bert-base-uncased")
    with pytest.raises(UserError, match="num_labels"):
        load_text(folder)
    with pytest.raises(UserError, match=r"num_classes\) is 0"):
        load_text(folder, num_labels=0)
