"""Runs with `sft.tokens`: what is trained, resumed, exported, continued and asked."""

import json
import shutil
from typing import Any

import jax
import numpy as np
import pytest
from faults.small import check_same_end, on_one_device, train
from fixtures.sft.tiny import VOCABULARY, config_of, write_chats, write_model
from marks import slow

from rmlora_jax import hub
from rmlora_jax.aot import compile_only
from rmlora_jax.errors import UserError
from rmlora_jax.models.family import flat_params
from rmlora_jax.parallel.mesh import all_devices, shard
from rmlora_jax.train import loop, setup
from rmlora_jax.train.checkpoint import best_trainable
from rmlora_jax.train.config import resolve
from rmlora_jax.train.finished import export_merged, model_of

N, STEPS = len(VOCABULARY), 40
TOKENS = ("<think>", "</think>")
PROMPT = [[{"role": "user", "content": "q5"}]]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    write_model(folder / "model")
    write_model(folder / "tied", tied=True)
    write_model(folder / "spare", tied=True, vocab_size=N + 7)
    file = write_chats(folder / "train.jsonl", 100, seed=0)
    file.write_text(file.read_text().replace('"is ', '"<think> </think> is '))
    return folder


def config(root, steps: int = STEPS, **fields):
    return config_of(root, steps, **{"sft.tokens": TOKENS} | fields)


@pytest.fixture(scope="module")
def run(root, tmp_path_factory):
    """A run of a tied model on one device."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        on_one_device(patch)
        train(tied(root), workdir)
    return workdir


def tied(root):
    return config(root, STEPS, **{"model.source": str(root / "tied"), "method": "rm_lora"})


def job_of(root, **fields):
    return setup.build(resolve(config(root, 5, **fields)), all_devices(limit=1))


@pytest.mark.parametrize("model, method, shapes", [
    ("model", "rm_lora", {"embed": (2, 32), "head": (2, 32)}),
    slow("spare", "lora", {"embed": (2, 32)}),
    slow("tied", "dora", {"embed": (2, 32)}), slow("model", "adalora", {"head": (2, 32)}),
    slow("tied", "sora", {"embed": (2, 32)}), slow("model", "full", {"embed": (2, 32)}),
])  # fmt: skip
def test_a_step_moves_the_new_rows_and_not_the_tables(root, model, method, shapes):
    """By Adam's first step, which is the rate times the sign: no mask and no penalty is on them."""
    job = job_of(root, method=method, **{
        "model.source": str(root / model), "rm.keep": 0.01, "rm.start_step": 0, "rm.penalty": 10.0,
        "optimizer.clip": 0.0, "optimizer.weight_decay": 0.0, "optimizer.warmup": 0.0,
        "optimizer.schedule": "constant", "adalora.every": 1})  # fmt: skip
    before = jax.device_get(flat_params(job.state.trainable))
    whole = flat_params(jax.device_get(job.problem.params))
    states = [x.shape for x in jax.tree.leaves(job.state.opt_state)]
    size = len(whole["embed/embedding"])
    assert size == (N + 7 if model == "spare" else N + 2)
    tables = {"embed/embedding", "head/kernel"} & before.keys()
    assert bool(tables) == (method == "full") == any(size in shape for shape in states)
    for name, shape in shapes.items():
        assert before[f"new_tokens/{name}"].shape == shape
    batch = shard(next(iter(job.feed.train(0))), all_devices(limit=1))
    assert {N, N + 1} <= set(np.asarray(batch["tokens"]).ravel().tolist())
    state, metrics = job.train_step(job.state, job.constants, batch)
    after = jax.device_get(flat_params(state.trainable))
    for name in shapes:
        path = f"new_tokens/{name}"
        moved = np.abs(after[path] - before[path])
        np.testing.assert_allclose(moved, 1e-2, rtol=2e-2)
    if method == "rm_lora":
        assert metrics["kept_fraction"] < 0.1


def test_factors_of_the_embedding_are_refused(root):
    with pytest.raises(UserError, match=r"new tokens are trained in embed(.|\n)*lora\."):
        job_of(root, **{"lora.target": "all-linear|embed"})


@pytest.mark.parametrize("tokens", [("<a>", "<a>"), (" ",)])
def test_tokens_are_different_texts(root, tokens):
    with pytest.raises(UserError, match=r"config.sft.tokens=.*different texts"):
        resolve(config(root, **{"sft.tokens": tokens}))


@pytest.mark.slow
def test_a_run_that_was_killed_ends_with_the_same_bits(run, root, tmp_path, monkeypatch):
    on_one_device(monkeypatch)
    train(tied(root), tmp_path, until=20)
    train(tied(root), tmp_path)
    check_same_end(run, tmp_path, STEPS)


def test_its_adapter_and_its_merged_model_answer_alike(run, root, tmp_path):
    """The adapter on the published base; the whole model alone; a run without a summary."""
    trained = flat_params(best_trainable(run))
    assert trained["new_tokens/embed"].shape == (2, 32) and "embed/embedding" not in trained
    model = hub.load(run)
    table = np.asarray(model.params["embed"]["embedding"])
    np.testing.assert_array_equal(table[N:], trained["new_tokens/embed"])
    base = hub.load_pretrained(root / "tied")
    np.testing.assert_array_equal(table[:N], base.params["embed"]["embedding"])
    (answer,) = model.generate(PROMPT, max_new_tokens=8)
    assert answer.text.startswith("is a") and answer.tokens == 4  # with <think> and </think>
    (first,) = model.generate(PROMPT, max_new_tokens=8, stop=["</think>"])
    assert first.tokens == 1
    merged = hub.load(export_merged(run))
    assert merged.base.folder == run / "merged" and merged.generate(PROMPT)[0] == answer
    stopped = shutil.copytree(run, tmp_path / "stopped")
    for name in ("summary.json", "adapter"):
        (shutil.rmtree if name == "adapter" else type(run).unlink)(stopped / name)
    again: Any = model_of(stopped)
    np.testing.assert_array_equal(again.params["embed"]["embedding"], table)
    assert again.generate(PROMPT)[0] == answer


def test_an_adapter_with_new_tokens_continues(run, root, tmp_path):
    """Its rows are where the run begins; a token more gets the next number."""
    fields = {"model.source": str(root / "tied"), "model.adapter": str(run / "adapter"),
              "method": "rm_lora", "sft.tokens": (*TOKENS, "<more>")}  # fmt: skip
    job = job_of(root, **fields)
    trained = flat_params(best_trainable(run))
    found = flat_params(jax.device_get(job.state.trainable))
    assert "embed/embedding" not in found and found["new_tokens/embed"].shape == (3, 32)
    for path, value in trained.items():
        value = value if path != "new_tokens/embed" else [*value, found[path][2]]
        np.testing.assert_array_equal(found[path], value, err_msg=path)
    notes = " ".join(job.problem.notes)
    assert "already, which get no new row: <think>, </think>" in notes
    assert "grow from 54 to 55 rows: <more> (54)" in notes


@pytest.mark.slow
def test_several_adapters_answer_in_one_batch(run, root, tmp_path, monkeypatch):
    """Where they were trained with the same new tokens; else they're refused by name."""
    on_one_device(monkeypatch)
    for name in "ab":
        shutil.copytree(run / "adapter", tmp_path / name)
    both = hub.load(tmp_path)
    alone = hub.load(run).generate(PROMPT)[0].text
    assert [a.text for a in both.generate(PROMPT * 2, adapters=["a", "b"])] == [alone] * 2
    fields = {"model.source": str(root / "tied"), "sft.tokens": ("<other>",)}
    loop.train(config(root, 2, **fields), tmp_path / "c")
    shutil.move(tmp_path / "c" / "adapter", tmp_path / "d")
    shutil.rmtree(tmp_path / "c")
    with pytest.raises(UserError, match="a and d were trained with different new tokens"):
        hub.load(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora"])
def test_other_ends_of_a_run(root, tmp_path, method, monkeypatch):
    """All parameters, and a sweep of two rates: each run's model has the tokens."""
    on_one_device(monkeypatch)
    fields = {"method": method, "sft.samples": 1}
    if method == "lora":
        fields |= {"sweep.grid": "{'learning_rate': (1e-2, 2e-2)}", "sweep.seeds": 1}
    train(config(root, 10, **fields), tmp_path / "run")
    folders = [path.parent for path in tmp_path.glob("run/seed*/summary.json")]
    assert len(folders) == 2 * (method == "lora")
    for folder in folders or [tmp_path / "run"]:
        merged = hub.load(export_merged(folder))
        assert merged.tokenizer.convert_tokens_to_ids("</think>") == N + 1
        assert merged.base.config.vocab_size == N + 2
        assert json.loads((folder / "rmlora.json").read_text())["tokens"] == [*TOKENS]


def test_shapes_alone_have_the_rows(root):
    """``--compile_only`` reads no tokenizer: tables grow."""
    c = resolve(config(root))
    shapes = compile_only.open_shapes(c, all_devices(limit=1))
    found = {k: v.shape for k, v in flat_params(shapes.base.trainable).items()}
    assert found["new_tokens/embed"] == found["new_tokens/head"] == (2, 32)
    frozen = flat_params(shapes.base.constants.frozen)
    assert frozen["embed/embedding"].shape == (N + 2, 32)
