"""Task sft from files to adapter: exact means, the same bits after a stop, what is refused."""

import json

import jax
import numpy as np
import pytest
from faults.small import check_same_end, column, on_one_device, train
from fixtures.sft.tiny import config_of, write_chats, write_model
from marks import slow, slow_but

import rmlora_jax as rm
from rmlora_jax import hub
from rmlora_jax.errors import UserError
from rmlora_jax.parallel.mesh import all_devices, shard
from rmlora_jax.sweep import many
from rmlora_jax.sweep.grid import runs
from rmlora_jax.tasks import sft
from rmlora_jax.train import loop, setup
from rmlora_jax.train.config import resolve

STEPS = 30


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft")
    write_model(folder / "model")
    write_model(folder / "tied", tied=True)
    write_chats(folder / "train.jsonl", 200, seed=0)
    write_chats(folder / "other.jsonl", 30, seed=5)
    return folder


@pytest.fixture(scope="module")
def finished(root, tmp_path_factory):
    """A run on one device, and what it printed."""
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    with pytest.MonkeyPatch.context() as patch:
        on_one_device(patch)
        summary = loop.train(e2e(root), workdir)
    return workdir, summary


def e2e(root):
    return config_of(root, STEPS, **{"sft.evaluate": (("other", str(root / "other.jsonl")),)})


def test_what_a_run_leaves(finished, root):
    workdir, summary = finished
    assert summary["task"] == "sft" and summary["metric"] == "loss"
    loss = column(workdir, "train/loss")
    assert len(loss) == STEPS and loss[-5:].mean() < 0.4 * loss[0]
    assert list(summary["eval"]) == ["loss", "token_accuracy", "perplexity", "loss_other"]
    assert summary["eval"]["perplexity"] == pytest.approx(np.exp(summary["eval"]["loss"]))
    assert len(column(workdir, "eval/loss_other")) == 3
    tokens, padding = column(workdir, "train/tokens"), column(workdir, "train/padding")
    np.testing.assert_allclose(padding, 1 - tokens / (8 * 64), atol=1e-6)
    assert 0 < padding.mean() < 0.15 and summary["tokens_per_second"] > 0
    assert json.loads((workdir / "rmlora.json").read_text())["task"] == "sft"
    best = min(column(workdir, "eval/loss"))
    steps = [row for row in column(workdir, "step") if not row % 10]
    at = column(workdir, "eval/loss").tolist().index(best)
    assert summary["best_eval"]["step"] == steps[at]


def test_its_adapter_opens_again(finished, root):
    workdir, _ = finished
    found = json.loads((workdir / "adapter" / "adapter_config.json").read_text())
    assert found["task_type"] == "CAUSAL_LM" and found["modules_to_save"] is None
    assert set(found["target_modules"]) == {
        *(f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down"))
    }
    base = hub.load_pretrained(root / "model")
    params, lora = hub.load_peft(workdir / "adapter", base)
    model = base.family.model(base.config, base.config.vocab_size)
    tokens = np.random.default_rng(0).integers(0, 50, (2, 9)).astype(np.int32)
    factored = jax.jit(rm.adapt(model, lora).apply)({"params": params}, tokens)
    merged = jax.jit(model.apply)({"params": rm.merge(params, lora)}, tokens)
    np.testing.assert_allclose(factored, merged, atol=2e-4)
    plain = jax.jit(model.apply)({"params": base.params}, tokens)
    assert np.abs(np.asarray(plain) - np.asarray(merged)).max() > 0.1


def test_a_run_that_was_killed_ends_with_the_same_bits(finished, root, tmp_path, monkeypatch):
    on_one_device(monkeypatch)
    train(e2e(root), tmp_path, until=20)
    train(e2e(root), tmp_path)
    check_same_end(finished[0], tmp_path, STEPS)


def one_step(root, devices=1, **fields):
    """Metrics and trainable parameters after a step from factors that are not 0."""
    config = resolve(config_of(root, 5, **fields))
    where = all_devices(limit=devices)
    job = setup.build(config, where)
    noise = iter(jax.random.split(jax.random.key(3), 100))
    noisy = jax.tree.map(
        lambda x: x + 0.02 * jax.random.normal(next(noise), x.shape), job.state.trainable
    )
    state = job.state._replace(trainable=noisy)
    batch = shard(next(iter(job.feed.train(0))), where)
    state, metrics = job.train_step(state, job.constants, batch)
    return jax.device_get(metrics), jax.device_get(state.trainable)


@pytest.fixture(scope="module")
def plain(root):
    return one_step(root)


@pytest.mark.parametrize("devices, accumulate", [
    (1, 8), slow(1, 2), slow(2, 1), slow(4, 1), (4, 2), slow(8, 1),
])  # fmt: skip
def test_the_mean_is_over_the_targets_of_the_global_batch(plain, root, devices, accumulate):
    metrics, trainable = one_step(root, devices, accumulate=accumulate)
    for name in ("loss", "grad_norm", "token_accuracy", "tokens", "padding"):
        np.testing.assert_allclose(metrics[name], plain[0][name], rtol=2e-6, err_msg=name)
    assert metrics["tokens"] == plain[0]["tokens"]
    for a, b in zip(*map(jax.tree.leaves, (trainable, plain[1])), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
