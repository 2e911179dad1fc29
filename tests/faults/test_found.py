"""What damaged files once did, each refused by name now."""

import json
import zipfile

import numpy as np
import pytest
from fixtures.text import cases
from fixtures.text.tiny import write_model
from PIL import Image

from rmlora_jax.data import tokens
from rmlora_jax.data.vision import MOST_PIXELS_A_BYTE, open_image, pixels
from rmlora_jax.errors import UserError
from rmlora_jax.files import read_arrays, read_json_lines, read_object
from rmlora_jax.hub import load_text, load_tokenizer, load_vit
from rmlora_jax.hub.peft_config import read_config as read_peft_config
from rmlora_jax.hub.pretrained import label_names
from rmlora_jax.hub.source import shards
from rmlora_jax.models import BertConfig, ViTConfig
from rmlora_jax.train.config import default_config, flatten, read_config
from rmlora_jax.train.finished import export_merged

DEEP = "[" * 100_000


def test_brackets_without_end(tmp_path):
    (tmp_path / "a.json").write_text(DEEP)
    with pytest.raises(UserError, match=r"a\.json cannot be read as JSON"):
        read_object(tmp_path / "a.json")
    (tmp_path / "a.jsonl").write_text(f"{DEEP}\n{{}}\n")
    with pytest.raises(UserError, match=r"a\.jsonl: line 1 is wrong"):
        read_json_lines(tmp_path / "a.jsonl", "key", int, "is wrong")


@pytest.mark.parametrize(
    "name", ["a" * 300, "../a.safetensors", "a/b", "\0", "\ud800", "", ".", 5, ["a"], "x" * 100_000]
)
def test_names_of_shards(name, tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(UserError, match=r"index\.json lists .* not a file beside it") as error:
        shards(index)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("names", [5, 2.5, [1], {"a": "x", "1": "y"}, {"0": "x"},
                                   {"0": ["x"], "1": "y"}, {"-1": "x", "0": "y"}])
def test_labels_that_are_none(names):
    assert label_names({"id2label": names}, 2) is None


@pytest.mark.parametrize(
    "field", ["hidden_size", "num_hidden_layers", "intermediate_size", "image_size", "num_channels"]
)
def test_sizes_have_an_end(field):
    """A model of 2**31 layers was looked for layer by layer."""
    with pytest.raises(ValueError, match=f"'{field}' is 2147483648; .* at most"):
        ViTConfig.from_hf({field: 2**31})
    with pytest.raises(ValueError, match="'pad_token_id' is 2147483648"):
        BertConfig.from_hf({"pad_token_id": 2**31})
    with pytest.raises(ValueError) as error:
        ViTConfig.from_hf({"hidden_act": "x" * 100_000, "image_size": 64})
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    "wrong",
    [{"image_mean": 5}, {"image_std": 0.5}, {"image_std": [0, 1, 1]}, {"image_mean": ["a"] * 3},
     {"image_std": [1e-300] * 3}, {"rescale_factor": 0}, {"rescale_factor": [1]},
     {"image_mean": [float("nan")] * 3}, {"rescale_factor": 1e400}],
)
def test_numbers_of_a_preprocessor(wrong, tiny_vit, tmp_path):
    for path in tiny_vit.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(wrong))
    with pytest.raises(UserError, match=r"preprocessor_config\.json: (image_mean|rescale)"):
        load_vit(tmp_path, num_classes=5)


def test_a_model_type_that_is_no_word(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": {}}')
    with pytest.raises(UserError, match=r"config\.json: model_type is \{\}"):
        load_text(tmp_path)


@pytest.mark.parametrize("field", ["lora_alpha", "lora_dropout", "r"])
def test_numbers_that_are_no_floats(field, tmp_path):
    config = {"peft_type": "LORA", field: 10**400}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=rf"adapter_config\.json: {field} is 1000") as error:
        read_peft_config(tmp_path)
    assert len(str(error.value)) < 400
    with pytest.raises(ValueError, match="'layer_norm_eps' is 1000"):
        ViTConfig.from_hf({"layer_norm_eps": 10**400})


def test_a_vocabulary_without_the_unknown_word(tmp_path):
    """The tokenizer was made, and failed at the first strange word of a data set."""
    folder = write_model(tmp_path / "model")
    words = (folder / "vocab.txt").read_text().splitlines()
    (folder / "vocab.txt").write_text("\n".join(w for w in words if w != "[UNK]"))
    with pytest.raises(UserError, match=r"model has no tokenizer that can be read .*UNK"):
        load_tokenizer(folder)


def test_a_token_of_a_number_that_no_table_has(tmp_path):
    """It was read, and failed, or took another row, where a text had that word."""
    load_tokenizer(write_model(tmp_path)).backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    whole = json.loads((tmp_path / "tokenizer.json").read_text())
    whole["model"]["vocab"]["w7"] = 2**31
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    with pytest.raises(UserError, match="a token of the number 2147483648"):
        load_tokenizer(tmp_path)


def test_fewer_positions_than_a_text_has(tmp_path):
    cases.write_folder(tmp_path, "bert")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1}))
    with pytest.raises(UserError, match=r"config\.json: .*positions for 1"):
        load_text(tmp_path)


def test_an_image_of_more_pixels_than_bytes_can_hold(tmp_path):
    blank = tmp_path / "blank.png"
    Image.new("1", (4096, 4096)).save(blank)
    assert blank.stat().st_size * MOST_PIXELS_A_BYTE > 4096**2  # an empty page is read
    assert pixels(open_image(blank.read_bytes()), 1).shape == (4096, 4096, 1)
    with pytest.raises(ValueError, match="claims 9000 x 9000 pixels in 17 bytes"):
        open_image(b"P5 9000 9000 255\n")


def test_a_cache_that_claims_more_than_memory(tmp_path):
    """Its header asked for 8 EiB."""
    path = tmp_path / "a.npz"
    header = "{'descr': '<i8', 'fortran_order': False, 'shape': (1152921504606846975,), }"
    data = b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + header.ljust(117).encode() + b"\n"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("ids", "types", "offsets"):
            archive.writestr(f"{name}.npy", data)
    with pytest.raises(MemoryError), np.load(path, allow_pickle=False) as file:
        file["ids"]
    assert read_arrays(path, tokens.Tokens._fields) is None


@pytest.mark.parametrize(
    ("content", "words"),
    [("[]", "a list"), ("{", "JSON"), ('{"batch_size": "x"}', "batch_size"), (DEEP, "JSON"),
     ('{"optimizer": {"eps": 1%s}}' % ("0" * 400), "optimizer.eps"),
     ('{"method": "lroa"}', "method"), (None, "has no"),
     ('{"lora": {"rank": true}}', "lora.rank")],
)
def test_the_config_of_a_run(content, words, tmp_path):
    (tmp_path / "summary.json").write_text("{}")
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json") as error:
        export_merged(tmp_path)
    assert words in str(error.value)


def test_the_config_of_an_older_run(tmp_path):
    old = default_config().to_dict()
    del old["rm"]["also"], old["data"]["bad_records"]
    old["gone"], old["rm"]["keep"] = 1, 0.25
    (tmp_path / "config.json").write_text(json.dumps(old))
    config = read_config(tmp_path)
    assert config.rm.also is False and config.data.bad_records == 0 and config.rm.keep == 0.25
    assert "gone" not in flatten(config)
