"""The registry of families, and a family that a test adds: one entry, one line."""

import dataclasses
import json
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.text import tiny
from safetensors.numpy import save_file

import rmlora_jax as rm
from rmlora_jax import hub
from rmlora_jax.errors import UserError
from rmlora_jax.hub.pretrained import find_architecture
from rmlora_jax.inference.classifier import info_of
from rmlora_jax.models import FAMILIES, Family
from rmlora_jax.models.blocks import Parts
from rmlora_jax.models.config import EncoderConfig
from rmlora_jax.models.family import AS_IS, TEXTS, Entry, linear_entries, param_shapes


@dataclasses.dataclass(frozen=True)
class BagConfig(EncoderConfig):
    vocab_size: int = 50
    longest: int = 64
    prefix_length: int = 0

    model_types = ("bag",)
    inert = ("max_position_embeddings",)


class Bag(nn.Module):
    """The mean of the words' embeddings, then the head."""

    config: BagConfig
    num_labels: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, input_ids, attention_mask=None, token_type_ids=None, *, train=False):
        c = self.config
        parts = Parts(c, self.dtype)
        x = parts.table(c.vocab_size, c.hidden_size, "word")(input_ids)
        mask = jnp.ones_like(input_ids) if attention_mask is None else attention_mask
        mean = (x * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
        return parts.float32.dense(self.num_labels, name="head")(mean)


BAG = Family(
    config=BagConfig,
    model=Bag,
    inputs=TEXTS,
    classifier="BagForSequenceClassification",
    prefix="bag.",
    table=(
        Entry("word/embedding", AS_IS, ("bag.words.weight",)),
        *linear_entries("head", "classifier"),
    ),
    new=(r"head/.*",),
    leftovers=(r"decoder\..*",),
)


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """A pretrained bag of words without a head, and the line of the registry."""
    monkeypatch.setitem(FAMILIES, "bag", BAG)
    folder = tiny.write_model(tmp_path / "bag")  # for the tokenizer
    raw = {"model_type": "bag", "hidden_size": 12, "num_attention_heads": 3, "vocab_size": 50,
           "max_position_embeddings": 64}
    (folder / "config.json").write_text(json.dumps(raw))
    words = np.random.default_rng(0).standard_normal((50, 12)).astype(np.float32)
    save_file({"words.weight": words, "decoder.bias": words[0]}, folder / "model.safetensors")
    return folder


def test_every_family_fits_its_config_and_table():
    for kind, family in FAMILIES.items():
        assert kind in family.config.model_types
        config = family.config.from_hf({"model_type": kind})
        shapes = param_shapes(family, config, 2)
        assert shapes.keys() <= {entry.path for entry in family.table}
        assert bool(family.config.no_prefix) != hasattr(config, "prefix_length")
    assert FAMILIES["xlm-roberta"].purpose == "SequenceClassification"


def test_a_new_family_is_loaded_adapted_exported_and_used(folder, tmp_path):
    assert find_architecture(str(folder))[0] is BAG
    base = hub.load_pretrained(folder, num_labels=3)
    assert base.new == ("head/kernel", "head/bias") and base.dropped == ("decoder.bias",)
    assert base.image_size is None and base.params["word"]["embedding"].shape == (50, 12)
    with pytest.raises(UserError, match="model of texts; leave out image_size"):
        hub.load_pretrained(folder, num_labels=3, image_size=32)
    with pytest.raises(UserError, match=r"model_type is 'bag'; known are vit$"):
        hub.load_vit(folder)

    lora = rm.LoRA(rank=2, alpha=4, target="word", train="head")
    model = rm.adapt(BAG.model(base.config, 3), lora)
    params = rm.attach(jax.random.key(0), model, base.params, jnp.ones((1, 2), jnp.int32))
    params["word"]["lora_b"] += 0.1
    info = info_of(base)
    used = hub.load(hub.save_peft(tmp_path / "adapter", params, lora, base, info=info))
    merged = hub.save_model(tmp_path / "merged", rm.merge(params, lora), base, info=info)
    texts = ["w1 good w2", "bad"]
    logits = used.logits(texts)
    assert logits.shape == (2, 3)
    np.testing.assert_allclose(hub.load(merged).logits(texts), logits, atol=1e-5)
    found = json.loads((merged / "config.json").read_text())
    assert found["architectures"] == ["BagForSequenceClassification"]
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "AutoModelForSequenceClassification" in card and "5.9" not in card
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())[
        "task_type"
    ] == "SEQ_CLS"
