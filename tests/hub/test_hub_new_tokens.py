"""New special tokens: numbers and rows that they get, and how adapters with them are stored."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.sft.tiny import VOCABULARY, write_model
from marks import slow
from safetensors.numpy import load_file, save_file
from test_peft_decoders import LINEAR, logits_of, with_factors

import rmlora_jax as rm
from rmlora_jax.errors import UserError
from rmlora_jax.hub import (
    Info,
    adapter_base,
    load_peft,
    load_pretrained,
    load_tokenizer,
    save_model,
    save_peft,
    tokenizer_of,
    with_tokens,
)
from rmlora_jax.models.family import flat_params

N = len(VOCABULARY)
TOKENS = ("<think>", "</think>")
PREFIX = "base_model.model."
ROWS = "token_adapter.trainable_tokens_delta"


def base_of(folder, *, tied=False, spare=0):
    return load_pretrained(write_model(folder, tied=tied, vocab_size=N + spare))


@pytest.mark.parametrize("spare, size, said", [
    (0, N + 2, "head grow from 52 to 54 rows: <think> (52), </think> (53)"),
    (1, N + 2, "head grow from 53 to 54 rows: </think> (53)"),
    (5, N + 5, "use spare rows of embedding and head: <think> (52), </think> (53)"),
])  # fmt: skip
def test_rows_begin_as_the_mean_of_the_tokens_that_were_there(spare, size, said, tmp_path):
    base = base_of(tmp_path / "base", spare=spare)
    found = with_tokens(base, TOKENS)
    assert found.rows == (N, N + 1) and found.tokens == TOKENS
    assert found.config.vocab_size == found.num_labels == size
    assert said in " ".join(found.notes)
    for name, axis in (("embed/embedding", 0), ("head/kernel", 1)):
        old, new = (np.moveaxis(flat_params(b.params)[name], axis, 0) for b in (base, found))
        assert new.shape == (size, 32)
        mean = sum(old[:N].astype(np.float64)) / N
        np.testing.assert_allclose(new[N : N + 2], [mean, mean], atol=1e-7)
        rest = np.r_[:N, N + 2 : N + spare] if spare > 2 else np.r_[:N]
        np.testing.assert_array_equal(new[rest], old[rest])


def test_the_tokenizer_gains_special_tokens(tmp_path):
    base = with_tokens(base_of(tmp_path / "base"), TOKENS)
    tokenizer, old = tokenizer_of(base), load_tokenizer(base.folder)
    ids = tokenizer("q1 <think>a2</think>")["input_ids"]
    words = tokenizer.convert_ids_to_tokens(ids)
    assert words == ["q1", "<think>", "a2", "</think>"] and ids[1] == N
    assert tokenizer.decode(ids, skip_special_tokens=True).split() == ["q1", "a2"]
    assert len(old) == N and old("<think>")["input_ids"] == [old.unk_token_id]


def test_a_token_that_is_there_gets_no_row(tmp_path):
    base = base_of(tmp_path / "base")
    found = with_tokens(base, ("<eos>", "q1"))
    assert found.params is base.params and found.rows == found.tokens == ()
    (note,) = found.notes
    assert note.endswith("already, which get no new row: <eos>, q1")
    assert with_tokens(base, ()) is base
    mixed = with_tokens(base, ("<eos>", "<think>"))
    assert mixed.tokens == ("<think>",) and mixed.rows == (N,) and len(mixed.notes) == 2


def moved(base, seed=0):
    """Parameters with factors, and new tokens whose rows have been trained."""
    lora = rm.LoRA(rank=2, target=LINEAR)
    params = with_factors(base, lora, seed)
    rng, flat = np.random.default_rng(seed), flat_params(params)
    for name in ("embed/embedding", "head/kernel"):
        if name in flat:
            table = np.array(flat[name])
            (table if name[0] == "e" else table.T)[list(base.rows)] += rng.normal(
                0, 0.3, (len(base.rows), 32))
            first, leaf = name.split("/")
            params[first] = params[first] | {leaf: table}
    return params, lora


@pytest.mark.parametrize("tied, spare", [
    (True, 0), (False, 1), slow(True, 5), slow(False, 0),
])  # fmt: skip
def test_an_adapter_has_the_rows_and_the_tokenizer(tied, spare, tmp_path):
    """And comes back with them: the same logits on the published base, to the bit."""
    published = base_of(tmp_path / "base", tied=tied, spare=spare)
    base = with_tokens(published, TOKENS)
    params, lora = moved(base)
    save_peft(tmp_path / "a", params, lora, base, info=Info("sft"))
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    rows = {k: v.shape for k, v in tensors.items() if ".lora_" not in k}
    modules = ("model.embed_tokens",) if tied else ("model.embed_tokens", "lm_head")
    assert rows == {f"{PREFIX}{name}.{ROWS}": (2, 32) for name in modules}
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["trainable_token_indices"] == {
        name.rpartition(".")[2]: [N, N + 1] for name in modules}
    assert config["modules_to_save"] is None
    card = (tmp_path / "a" / "README.md").read_text()
    assert ("base.resize_token_embeddings" in card) == (spare < 2)
    again = adapter_base(tmp_path / "a", published)
    assert again.config == base.config and again.rows == ()
    assert tokenizer_of(again).get_vocab() == tokenizer_of(base).get_vocab()
    found, description = load_peft(tmp_path / "a", again)
    ids = np.array([[1, N, 3, N + 1, 4]])
    np.testing.assert_array_equal(logits_of(again, found, description, ids),
                                  logits_of(base, params, lora, ids))
    apart = adapter_base(tmp_path / "a", published, rows=True)
    assert apart.rows == (N, N + 1) and load_peft(tmp_path / "a", apart)[1].train is None
    more = with_tokens(apart, ("<more>", "<think>"))
    assert more.rows == (N, N + 1, N + 2) and more.tokens == ("<more>",)
    save_peft(tmp_path / "b", *moved(more), more)
    vocabulary = load_tokenizer(tmp_path / "b", padding=False).get_vocab()
    assert [vocabulary[name] for name in (*TOKENS, "<more>")] == [N, N + 1, N + 2]


def test_rows_that_were_not_moved_are_stored_too(tmp_path):
    """The mean in place of a spare row is not what the published base has."""
    base = with_tokens(base_of(tmp_path / "base", spare=9), TOKENS)
    lora = rm.LoRA(rank=2, target=LINEAR)
    save_peft(tmp_path / "a", with_factors(base, lora), lora, base)
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    mean = base.params["embed"]["embedding"][:N].mean(0)
    np.testing.assert_allclose(tensors[f"{PREFIX}model.embed_tokens.{ROWS}"], [mean, mean],
                               atol=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_as_peft_saves_it_after_resizing(tied, tmp_path):
    """PEFT 0.21 then writes the resized tables whole, beside the rows (seen with a list of
    tokens): they are read, and their rows alone are trained on."""
    published = base_of(tmp_path / "base", tied=tied)
    base = with_tokens(published, TOKENS)
    params, lora = moved(base)
    save_peft(tmp_path / "a", params, lora, base)
    file, config = (tmp_path / "a" / n for n in ("adapter_model.safetensors",
                                                 "adapter_config.json"))
    tensors = load_file(file)
    table = np.asarray(base.params["embed"]["embedding"])
    embed, head = f"{PREFIX}model.embed_tokens", f"{PREFIX}lm_head"
    tensors[f"{embed}.token_adapter.base_layer.weight"] = table + 0
    if tied:
        tensors[f"{head}.token_adapter.base_layer.weight"] = table + 0
        tensors[f"{head}.{ROWS}"] = tensors[f"{embed}.{ROWS}"]
    else:
        del tensors[f"{head}.{ROWS}"]
        tensors[f"{head}.weight"] = np.ascontiguousarray(params["head"]["kernel"].T)
    save_file(tensors, file)
    fields = json.loads(config.read_text())
    config.write_text(json.dumps(fields | {"trainable_token_indices": [N, N + 1]}))
    again = adapter_base(tmp_path / "a", published, rows=True)
    assert again.config == base.config and again.rows == (N, N + 1)
    found, description = load_peft(tmp_path / "a", again)
    assert description.train is None
    ids = np.array([[1, N, 3, N + 1, 4]])
    np.testing.assert_allclose(logits_of(again, found, description, ids),
                               logits_of(base, params, lora, ids), atol=1e-6)


def test_rows_far_from_the_table_are_refused(tmp_path):
    published = base_of(tmp_path / "base", tied=True)
    base = with_tokens(published, TOKENS)
    save_peft(tmp_path / "a", *moved(base), base)
    config = tmp_path / "a" / "adapter_config.json"
    fields = json.loads(config.read_text())
    fields["trainable_token_indices"] = {"embed_tokens": [N, 2**23]}
    config.write_text(json.dumps(fields))
    with pytest.raises(UserError, match=f"has token {2**23}, but the base has {N} tokens"):
        load_peft(tmp_path / "a", adapter_base(tmp_path / "a", published))


@pytest.mark.parametrize("tied", [slow(True), False])
def test_a_whole_model_has_longer_tables_and_the_tokens(tied, tmp_path):
    base = with_tokens(base_of(tmp_path / "base", tied=tied), TOKENS)
    params, lora = moved(base)
    save_model(tmp_path / "m", params, base, info=Info("sft"), lora=lora)
    again = load_pretrained(tmp_path / "m")
    assert again.config == base.config
    assert json.loads((tmp_path / "m" / "config.json").read_text())["vocab_size"] == N + 2
    ids = np.array([[1, N, 3, N + 1, 4]])
    merged = {"params": rm.merge(params, lora)}
    model = base.family.model(base.config, base.num_labels)
    np.testing.assert_allclose(logits_of(again, again.params, ids=ids),
                               np.asarray(model.apply(merged, jnp.asarray(ids))), atol=1e-5)
    theirs = load_tokenizer(tmp_path / "m")
    assert theirs.get_vocab() == tokenizer_of(base).get_vocab()
    assert theirs.pad_token == "<pad>" and theirs.chat_template == tokenizer_of(base).chat_template


def test_a_base_from_gguf_gets_them_too(tmp_path):
    pytest.importorskip("gguf", reason="needs the package gguf: pip install gguf")
    from fixtures.gguf_models import VOCABULARY as ROWS_THERE
    from fixtures.gguf_models import write

    tokens = ["<s>", "</s>", *(chr(ord("!") + i) for i in range(ROWS_THERE - 3)), "!!"]
    published = load_pretrained(write(tmp_path / "tiny.gguf", "qwen3", tokenizer={
        "model": "gpt2", "pre": "qwen2", "tokens": tokens, "merges": ["! !"],
        "token_type": [3, 3, *[1] * (ROWS_THERE - 2)], "bos_token_id": 0, "eos_token_id": 1,
        "tokenizer.chat_template": "{{ messages[0].content }}"}))  # fmt: skip
    base = with_tokens(published, TOKENS)
    assert base.rows == (ROWS_THERE, ROWS_THERE + 1)
    lora = rm.LoRA(rank=2, target=LINEAR)
    params = with_factors(base, lora)
    save_model(tmp_path / "m", params, base, info=Info("sft"), lora=lora)
    save_peft(tmp_path / "a", params, lora, base)
    wanted = tokenizer_of(base)("%<think>#</think>")["input_ids"]
    assert set(base.rows) < set(wanted)
    for name in "am":
        assert load_tokenizer(tmp_path / name, padding=False)("%<think>#</think>")[
            "input_ids"] == wanted
        ends = json.loads((tmp_path / name / "generation_config.json").read_text())
        assert ends == {"bos_token_id": 0, "eos_token_id": 1}
    assert load_pretrained(tmp_path / "m").config == base.config
    assert adapter_base(tmp_path / "a", published).config == base.config
