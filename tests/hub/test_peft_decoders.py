"""Adapters of language models in PEFT's format: what PEFT wrote, and what we write."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.peft_decoders import cases
from flax.traverse_util import flatten_dict, unflatten_dict
from marks import slow_but
from safetensors.numpy import load_file, save_file

import rmlora_jax as rm
from rmlora_jax.errors import UserError
from rmlora_jax.hub import adapter_base, load_peft, load_pretrained, save_peft, untied
from rmlora_jax.hub.vllm import vllm_obstacles

LINEAR = r"layers/(attention|mlp)/.*"
APART = {"embedding", "head", "both", "whole_embedding", "whole_head", "tokens_apart", "dora_both",
         "gemma2"}
TIED = {"both_tied", "whole_tied", "tokens"}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")

    @functools.cache
    def base(name):
        return load_pretrained(cases.write_base(root / name, name))

    return base


def logits_of(base, params, lora=None, ids=None):
    model = base.family.model(base.config, base.num_labels)
    model = model if lora is None else rm.adapt(model, lora)
    return np.asarray(jax.jit(lambda p: model.apply({"params": p}, jnp.asarray(ids)))(params))


@pytest.mark.parametrize("name", [
    *slow_but(cases.ADAPTERS, "embedding", "both_tied", "gemma2")
])
def test_an_adapter_of_peft_gives_its_logits(bases, name):
    """float32 on both sides: the bases' own logits differ by 5e-6 of their root mean square."""
    case, _ = cases.ADAPTERS[name]
    base = adapter_base(cases.HERE / name, bases(case))
    assert (base is not bases(case)) == (name in APART)
    params, lora = load_peft(cases.HERE / name, base)
    ids = cases.inputs_of(case)["input_ids"][:1]
    expected = np.load(cases.HERE / name / "logits.npy")
    size = np.sqrt((expected**2).mean())
    np.testing.assert_allclose(logits_of(base, params, lora, ids)[0], expected, atol=3e-5 * size)
    assert np.abs(expected - logits_of(base, base.params, ids=ids)[0]).max() > 0.1


@pytest.mark.parametrize("name", sorted(TIED))
def test_a_tied_adapter_on_a_base_with_a_head_of_its_own(bases, name):
    """It changes both, or is refused: a folder with several adapters may need such a base."""
    base = untied(bases("llama_tied"))
    if name == "both_tied":
        with pytest.raises(UserError, match="give load_peft the base as it was loaded"):
            load_peft(cases.HERE / name, base)
        return
    params, lora = load_peft(cases.HERE / name, base)
    expected = np.load(cases.HERE / name / "logits.npy")
    found = logits_of(base, params, lora, cases.inputs_of("llama_tied")["input_ids"][:1])[0]
    np.testing.assert_allclose(found, expected, atol=3e-5 * np.sqrt((expected**2).mean()))


@pytest.mark.parametrize("name", sorted(APART | TIED | {"llama_rows"}))
def test_an_adapter_of_peft_goes_out_as_it_came(bases, name, tmp_path):
    """The same changes of embedding and head, whether PEFT keeps them as factors, whole, or as
    rows; and a description that reads back."""
    base = adapter_base(cases.HERE / name, bases(cases.ADAPTERS[name][0]))
    params, lora = load_peft(cases.HERE / name, base)
    save_peft(tmp_path / "again", params, lora, base)
    theirs, ours = (load_file(f / "adapter_model.safetensors") for f in (
        cases.HERE / name, tmp_path / "again"))
    for key, value in theirs.items():
        if "base_layer" in key:
            continue
        if name == "tokens_apart" and "token_adapter" in key:  # PEFT would tie equal rows again
            key, rows = key.partition("token_adapter")[0] + "weight", cases.ADAPTERS[name][1]
            rows = rows["trainable_token_indices"][key.split(".")[-2]]
            np.testing.assert_array_equal(ours.pop(key)[rows], value)
        elif name == "llama_rows" and "token_adapter" in key:  # in the order of tokens
            np.testing.assert_array_equal(ours.pop(key), value[::-1])
        else:
            np.testing.assert_array_equal(ours.pop(key), value)
    assert not ours
    apart = adapter_base(tmp_path / "again", bases(cases.ADAPTERS[name][0]))
    assert apart.config == base.config
    _, again = load_peft(tmp_path / "again", base)
    assert again == lora


def test_a_tied_delta_is_two_modules(bases, tmp_path):
    base = bases("llama_tied")
    lora = rm.LoRA(rank=2, alpha=3, target="embed|layers/mlp/.*", rank_pattern=(("embed", 3),))
    params = with_factors(base, lora)
    save_peft(tmp_path / "a", params, lora, base)
    found = load_file(tmp_path / "a" / "adapter_model.safetensors")
    a, b = params["embed"]["lora_a"], params["embed"]["lora_b"]
    prefix = "base_model.model."
    np.testing.assert_array_equal(found[f"{prefix}model.embed_tokens.lora_embedding_A"], a.T)
    np.testing.assert_array_equal(found[f"{prefix}model.embed_tokens.lora_embedding_B"], b.T)
    np.testing.assert_array_equal(found[f"{prefix}lm_head.lora_A.weight"], b)
    np.testing.assert_array_equal(found[f"{prefix}lm_head.lora_B.weight"], a)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["task_type"] == "CAUSAL_LM" and config["ensure_weight_tying"] is True
    names = config["target_modules"]
    assert names == ["down_proj", "embed_tokens", "gate_proj", "lm_head", "up_proj"]
    assert config["rank_pattern"] == {"embed_tokens": 3, "lm_head": 3}
    assert adapter_base(tmp_path / "a", base) is base
    again, _ = load_peft(tmp_path / "a", base)
    np.testing.assert_array_equal(again["embed"]["lora_a"], a)


def with_factors(base, lora, seed=0):
    """Parameters with random factors, and what is trained moved."""
    whole = rm.adapt(base.family.model(base.config, base.num_labels), lora)
    ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    params = flatten_dict(rm.attach(jax.random.key(seed), whole, base.params, ids), sep="/")
    rng = np.random.default_rng(seed)
    for path, x in params.items():
        if path.endswith(("lora_a", "lora_b")) or lora.trains(path):
            params[path] = (np.asarray(x) + 0.2 * rng.standard_normal(x.shape)).astype(np.float32)
    return unflatten_dict(params, sep="/")


@pytest.mark.parametrize("case", ["llama", "llama_tied"])
def test_few_trained_tokens_go_out_as_rows(bases, case, tmp_path):
    base, lora = bases(case), rm.LoRA(rank=2, target="layers/mlp/up", train="embed")
    params = with_factors(base, lora)
    table = np.array(base.params["embed"]["embedding"])
    table[[9, 4]] += 1
    params["embed"]["embedding"] = table
    save_peft(tmp_path / "a", params, lora, base)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["trainable_token_indices"] == {"embed_tokens": [4, 9]}
    assert config["modules_to_save"] is None
    found = load_file(tmp_path / "a" / "adapter_model.safetensors")
    name = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    np.testing.assert_array_equal(found[name], table[[4, 9]])
    again, _ = load_peft(tmp_path / "a", base)
    np.testing.assert_array_equal(again["embed"]["embedding"], table)


def test_an_untied_head_is_the_embedding(bases):
    base, ids = bases("llama_tied"), cases.inputs_of("llama_tied")["input_ids"]
    own = untied(base)
    assert not own.config.tie_word_embeddings and untied(own) is own
    assert np.shares_memory(own.params["head"]["kernel"], base.params["embed"]["embedding"])
    np.testing.assert_allclose(logits_of(own, own.params, ids=ids),
                               logits_of(base, base.params, ids=ids), atol=2e-6)


def changed(folder, name, change=None, **config):
    """A copy of an adapter of PEFT with other tensors and fields."""
    folder.mkdir()
    source = cases.HERE / name
    fields = json.loads((source / "adapter_config.json").read_text()) | config
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    tensors = load_file(source / "adapter_model.safetensors")
    if change:
        change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def _other_base(tensors):
    for key in tensors:
        if key.endswith("base_layer.weight"):
            tensors[key] = tensors[key] + 1


def test_another_weight_under_the_factors_is_taken(bases, tmp_path):
    base = untied(bases("llama_tied"))
    params, lora = load_peft(changed(tmp_path / "a", "embedding", _other_base), base)
    np.testing.assert_array_equal(params["embed"]["embedding"],
                                  base.params["embed"]["embedding"] + 1)
    assert "embed" in lora.train
    params, lora = load_peft(cases.HERE / "embedding", base)
    assert params["embed"]["embedding"] is base.params["embed"]["embedding"] and not lora.train


def _longer(tensors):
    key = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    tensors[key] = np.tile(tensors[key], (2, 1))


def _scaled(tensors):
    tensors["base_model.model.lm_head.lora_A.weight"] *= 2


@pytest.mark.parametrize(("name", "change", "config", "words"), [
    ("head", None, {}, "changes the embedding or the head of .* alone, but .*adapter_base"),
    ("both_tied", _scaled, {}, "ensure_weight_tying, but what it has of the head is not what"),
    ("tokens", _longer, {}, r"trainable_tokens_delta' has shape \(4, 32\); .* ask for \(2, 32\)"),
    ("tokens", None, {"trainable_token_indices": [3, 61]}, "has token 61, but the base has 61 tok"),
    ("tokens", None, {"trainable_token_indices": [3, 3]}, "it must be a list of different tokens"),
    ("smollm3", lambda t: t.pop(next(iter(t))), {}, "lacks 'base_model.model.model.layers.0.mlp.d"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_by_name(bases, name, change, config, words, tmp_path):
    base = bases(cases.ADAPTERS[name][0])
    with pytest.raises(UserError, match=words):
        load_peft(changed(tmp_path / "a", name, change, **config), base)


@pytest.mark.parametrize(("case", "lora", "words"), [
    ("llama", rm.LoRA(rank=20, target=LINEAR), []),
    ("llama", rm.LoRA(rank=2, target="embed|head"), []),
    ("qwen3", rm.LoRA(rank=2, target="embed"), ["factors of embed_tokens and lm_head"]),
    ("qwen3", rm.DoRA(rank=2, target=LINEAR), ["of DoRA"]),
    ("llama", rm.LoRA(rank=2, target=LINEAR, train="head"), ["whole weights (lm_head.weight)"]),
    ("llama", rm.LoRA(rank=2, target=LINEAR, rs=True, rank_pattern=((".*/up", 4),)),
     ["alpha / r is not the same everywhere (model.layers.0.mlp.up_proj)"]),
    ("llama", rm.LoRA(rank=600, target="layers/mlp/up"), ["rank 600, above 512"]),
])  # fmt: skip
def test_the_card_says_what_vllm_cannot_take(bases, case, lora, words, tmp_path):
    base = bases(case)
    save_peft(tmp_path / "a", with_factors(base, lora), lora, base)
    found = vllm_obstacles(tmp_path / "a", base.family)
    card = (tmp_path / "a" / "README.md").read_text()
    assert len(found) == len(words) and all(w in f for w, f in zip(words, found, strict=True))
    assert all(text in card for text in found)
    assert ("vllm serve" in card) is not bool(found)
    assert "num_labels" not in card
    if lora.rank == 20:
        assert "--max-lora-rank 32" in card
