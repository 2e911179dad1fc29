"""Adapters of language models, there and back again, with PyTorch and PEFT themselves."""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.peft_decoders import cases
from oracle import oracle
from test_peft_decoders import LINEAR, logits_of, with_factors

import rmlora_jax as rm
from rmlora_jax.hub import Info, load_peft, load_pretrained, save_model, save_peft, untied

pytestmark = pytest.mark.slow

# What is adapted and trained: of a tied model, and of one with a head of its own.
KINDS = {
    "rs": lambda ends: rm.LoRA(rank=3, alpha=6, target=LINEAR, rs=True, rank_pattern=(
        (".*/gate", 5),), alpha_pattern=((".*/up", 2.0),)),
    "ends": lambda ends: rm.LoRA(rank=3, alpha=6, target=f"{LINEAR}|{ends}",
                                 rank_pattern=(("embed", 2),)),
    "dora": lambda ends: rm.DoRA(rank=3, alpha=6, target=f"{LINEAR}|{ends}"),
    "adalora": lambda ends: rm.AdaLoRA(rank=3, alpha=6, target=f"{LINEAR}|{ends}"),
    "sora": lambda ends: rm.SoRA(rank=3, alpha=6, target=f"{LINEAR}|{ends}"),
    "pissa": lambda ends: rm.LoRA(rank=3, alpha=6, target=f"{LINEAR}|{ends}", init="pissa"),
    "whole": lambda ends: rm.LoRA(rank=3, alpha=6, target=LINEAR, train=ends),
    "factors_and_whole": lambda ends: rm.LoRA(rank=3, target=f"{LINEAR}|embed", train="embed"),
}  # fmt: skip
CASES = ("llama", "llama_tied", "gemma3")


def apart(ours, theirs) -> float:
    return float(np.abs(ours - theirs).max() / np.sqrt(np.mean(np.square(theirs))))


def run(jobs: dict[str, dict], work: Path) -> dict[str, dict]:
    for name, job in jobs.items():
        job["made"] = str(work / f"{name}.made.npz")
    (work / "jobs.json").write_text(json.dumps(list(jobs.values())))
    oracle.run("decoders.py", work / "jobs.json")
    return {name: dict(np.load(job["made"])) for name, job in jobs.items()}


@pytest.mark.parametrize("case", CASES)
def test_peft_opens_our_adapters(case, tmp_path):
    """PEFT finds every tensor of the folder and no more, and gives our logits."""
    oracle.python()
    base = load_pretrained(cases.write_base(tmp_path / "base", case))
    ids = cases.inputs_of(case)["input_ids"]
    np.savez(tmp_path / "in.npz", input_ids=ids)
    ends = "embed" if base.config.tie_word_embeddings else "embed|head"
    jobs, ours, job = {}, {}, {"base": str(tmp_path / "base"), "inputs": str(tmp_path / "in.npz")}
    for name, made in KINDS.items():
        lora = made(ends)
        params = with_factors(base, lora)
        ours[name] = logits_of(base, params, lora, ids)
        save_peft(tmp_path / name, params, lora, base)
        jobs[name] = job | {"adapter": str(tmp_path / name)}
        again, found = load_peft(tmp_path / name, base)
        assert apart(logits_of(base, again, found, ids), ours[name]) < 2e-5, name
        if name in ("ends", "whole"):
            save_model(tmp_path / f"{name}.m", params, base, info=Info("sft"), lora=lora)
            jobs[f"{name}.m"], ours[f"{name}.m"] = job | {"base": str(tmp_path / f"{name}.m")}, (
                ours[name])
    lora = rm.LoRA(rank=2, target=LINEAR, train="embed")
    params = with_factors(base, lora)
    table = np.array(base.params["embed"]["embedding"])
    table[[5, 9]] += 0.5
    params["embed"]["embedding"] = table
    save_peft(tmp_path / "rows", params, lora, base)
    jobs["rows"], ours["rows"] = job | {"adapter": str(tmp_path / "rows")}, (
        logits_of(base, params, lora, ids))
    for name, theirs in run(jobs, tmp_path).items():
        assert apart(ours[name], theirs["logits"]) < 1e-4, name


def test_new_tokens_are_rows_that_peft_finds(tmp_path):
    """The base in PyTorch is first resized, as the card says."""
    oracle.python()
    case, grown = "llama_tied", cases.VOCABULARY + 2
    published = load_pretrained(cases.write_base(tmp_path / "base", case))
    base = larger(published, 2)
    ids = cases.inputs_of(case)["input_ids"].copy()
    ids[:, 3], ids[:, 7] = cases.VOCABULARY, cases.VOCABULARY + 1
    np.savez(tmp_path / "in.npz", input_ids=ids)
    lora = rm.LoRA(rank=2, target=LINEAR)
    params = with_factors(base, lora)
    save_peft(tmp_path / "a", params, lora, base)
    card = (tmp_path / "a" / "README.md").read_text()
    assert f"base.resize_token_embeddings({grown})" in card
    job = {"base": str(tmp_path / "base"), "inputs": str(tmp_path / "in.npz"), "tokens": grown,
           "adapter": str(tmp_path / "a")}
    theirs = run({"grown": job}, tmp_path)["grown"]["logits"]
    assert apart(logits_of(base, params, lora, ids), theirs) < 1e-4


def larger(base, number: int):
    """The base with more tokens, as far as save_peft looks."""
    table = np.asarray(base.params["embed"]["embedding"])
    new = np.random.default_rng(3).standard_normal((number, table.shape[1])).astype(np.float32)
    config = dataclasses.replace(base.config, vocab_size=len(table) + number)
    params = base.params | {"embed": {"embedding": jnp.asarray(np.concatenate([table, new]))}}
    return base._replace(config=config, params=params, num_labels=config.vocab_size)


def test_a_head_apart_goes_on_a_tied_base(tmp_path):
    """Embedding and head, adapted apart here, on a base where PyTorch has one weight."""
    oracle.python()
    base = untied(load_pretrained(cases.write_base(tmp_path / "base", "llama_tied")))
    ids = cases.inputs_of("llama_tied")["input_ids"]
    np.savez(tmp_path / "in.npz", input_ids=ids)
    job, jobs, ours = {"base": str(tmp_path / "base"), "inputs": str(tmp_path / "in.npz")}, {}, {}
    for name, lora in {
        "embedding": rm.LoRA(rank=2, target=f"{LINEAR}|embed"),
        "head": rm.LoRA(rank=2, target=f"{LINEAR}|head"),
        "both": rm.DoRA(rank=2, target="embed|head"),
        "whole": rm.LoRA(rank=2, target=LINEAR, train="head"),
    }.items():
        params = with_factors(base, lora)
        save_peft(tmp_path / name, params, lora, base)
        jobs[name] = job | {"adapter": str(tmp_path / name)}
        ours[name] = logits_of(base, params, lora, ids)
    for name, theirs in run(jobs, tmp_path).items():
        assert apart(ours[name], theirs["logits"]) < 1e-4, name
