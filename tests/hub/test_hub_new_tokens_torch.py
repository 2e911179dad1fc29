"""Adapters with new special tokens, there and back again, with PyTorch and PEFT themselves."""

import numpy as np
import pytest
from fixtures.sft.tiny import VOCABULARY
from oracle import oracle
from test_hub_new_tokens import TOKENS, base_of, moved
from test_peft_decoders import logits_of
from test_peft_decoders_torch import apart, run

from rmlora_jax.hub import (
    Info,
    adapter_base,
    load_peft,
    load_pretrained,
    save_model,
    save_peft,
    tokenizer_of,
    with_tokens,
)

pytestmark = pytest.mark.slow
N, TEXT = len(VOCABULARY), "<|im_start|> q1<think> a2 </think>a3 <|im_end|>"
KINDS = [(tied, spare) for tied in (True, False) for spare in (0, 1, 5)]


def jobs_of(tmp_path, tied, spare):
    oracle.python()
    published = base_of(tmp_path / "base", tied=tied, spare=spare)
    ids = np.array([tokenizer_of(with_tokens(published, TOKENS))(TEXT)["input_ids"]])
    assert {N, N + 1} < set(ids[0].tolist())
    np.savez(tmp_path / "in.npz", input_ids=ids)
    job = {"base": str(tmp_path / "base"), "inputs": str(tmp_path / "in.npz"), "text": TEXT}
    return published, ids, job


@pytest.mark.parametrize("tied, spare", KINDS)
def test_peft_and_transformers_open_what_is_written(tied, spare, tmp_path):
    """The adapter on the published base, resized to the tokenizer of its folder, and the whole
    model, which needs nothing else: every tensor is found, and logits and tokens are ours."""
    published, ids, job = jobs_of(tmp_path, tied, spare)
    base = with_tokens(published, TOKENS)
    params, lora = moved(base)
    ours = logits_of(base, params, lora, ids)
    save_peft(tmp_path / "a", params, lora, base, info=Info("sft"))
    save_model(tmp_path / "m", params, base, info=Info("sft"), lora=lora)
    jobs = {
        "adapter": job | {"adapter": str(tmp_path / "a"), "tokenizer": str(tmp_path / "a")},
        "merged": job | {"base": str(tmp_path / "m"), "tokenizer": str(tmp_path / "m")},
    }
    for name, theirs in run(jobs, tmp_path).items():
        assert apart(ours, theirs["logits"]) < 1e-4, name
        assert theirs["ids"].tolist() == ids[0].tolist(), name


@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_that_peft_saved_comes_in(tied, tmp_path):
    """Its tables were resized there, so PEFT writes them whole, beside the rows."""
    published, ids, job = jobs_of(tmp_path, tied, 0)
    fields = {"r": 2, "target_modules": ["q_proj", "down_proj"]}
    both = {"embed_tokens": [N, N + 1], "lm_head": [N, N + 1]}
    jobs = {name: job | {"tokens": N + 2, "out": str(tmp_path / name), "config": fields | own}
            for name, own in (
                ("list", {"trainable_token_indices": [N, N + 1]}),
                ("names", {"trainable_token_indices": both if not tied else {
                    "embed_tokens": [N, N + 1]}}),
                ("whole", {"modules_to_save": ["embed_tokens", "lm_head"]}),
            )}
    for name, theirs in run(jobs, tmp_path).items():
        base = adapter_base(tmp_path / name, published)
        assert base.config.vocab_size == N + 2
        params, lora = load_peft(tmp_path / name, base)
        assert apart(logits_of(base, params, lora, ids), theirs["logits"]) < 1e-4, name
        assert theirs["logits"].shape[-1] == N + 2
        own = adapter_base(tmp_path / name, published, rows=True)
        assert own.rows == (() if name == "whole" else (N, N + 1))
        assert (load_peft(tmp_path / name, own)[1].train is None) == (name != "whole")


def test_the_published_base_alone_lacks_them(tmp_path):
    """What the tests above compare differs from the model without its new rows."""
    published, ids, _ = jobs_of(tmp_path, False, 5)
    base = with_tokens(published, TOKENS)
    params, lora = moved(base)
    old = params | {"embed": published.params["embed"]}
    assert apart(logits_of(base, old, lora, ids), logits_of(base, params, lora, ids)) > 0.1
    assert load_pretrained(published.folder).rows == ()
