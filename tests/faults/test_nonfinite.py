"""Losses and gradients that are not finite: skipped, counted, and traced to where they arise."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from faults.small import config_of, leaves, on_one_device, rows, steps_of, train
from marks import slow

from rmlora_jax.errors import UserError
from rmlora_jax.parallel import mesh
from rmlora_jax.sweep import many
from rmlora_jax.sweep import train as sweep
from rmlora_jax.sweep.grid import runs
from rmlora_jax.train import setup
from rmlora_jax.train.config import resolve
from rmlora_jax.train.nonfinite import Spikes
from rmlora_jax.train.step import updates_done

BAD = 3  # the step, from 1, whose batch is poisoned


@pytest.fixture
def one_device(monkeypatch):
    on_one_device(monkeypatch)


@pytest.fixture
def config(tiny_vit):
    c = config_of(tiny_vit)
    c.optimizer.learning_rate = 1e-2
    return c


def poison(monkeypatch, config, step=BAD):
    """Makes one example of that step's batch not finite; returns its id."""
    found = {}
    open_base = setup.open_base

    def poisoned(config, devices):
        base = open_base(config, devices)
        batches = base.feed.train(step - 1)
        found.setdefault("id", int(next(iter(batches))["id"][5]))
        prepare = base.feed.prepare_train

        def with_nan(key, positions, resident, batch):
            (images,), labels = prepare(key, positions, resident, batch)
            bad = (batch["id"] == found["id"])[:, None, None, None]
            return (jnp.where(bad, jnp.nan, images),), labels

        return base._replace(feed=base.feed._replace(prepare_train=with_nan))

    monkeypatch.setattr(setup, "open_base", poisoned)
    return found


def follow(job, devices, state=None, steps=5):
    """The states before the first step and after each, on the host, and each step's metrics."""
    state = job.state if state is None else state
    states, metrics = [jax.device_get(state)], []
    for _, batch in zip(range(steps), job.feed.train(0), strict=False):
        state, found = job.train_step(state, job.constants, mesh.shard(batch, devices))
        states.append(jax.device_get(state))
        metrics.append(jax.device_get(found))
    return states, metrics


def same(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y) for x, y in pairs)


def check_skipped(states, metrics, skipped=BAD):
    assert [float(m["skipped"]) for m in metrics] == [float(i == BAD) for i in range(1, 6)]
    before, after = states[skipped - 1], states[skipped]
    assert same(before[1:], after[1:])  # parameters, moments, counts, masks, scores
    for i in range(1, 6):
        assert int(states[i].step) == i
        assert same(states[i - 1].trainable, states[i].trainable) == (i == skipped)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(states[i].trainable))
    assert int(updates_done(states[5].opt_state)) == 4
    assert np.isnan(metrics[skipped - 1]["loss"])


@pytest.mark.parametrize(
    "method", ["rm_lora", *map(slow, ("adalora", "sora", "lora", "full", "bottleneck"))]
)
def test_one_bad_example_skips_its_step_alone(config, monkeypatch, method):
    config.method = method
    config.adalora.warmup, config.adalora.final, config.adalora.every = 0.0, 0.1, 1
    poison(monkeypatch, config)
    devices = mesh.all_devices(limit=1)
    check_skipped(*follow(setup.build(resolve(config), devices), devices))


@pytest.mark.slow
def test_lazy_masks_and_micro_batches(config, monkeypatch):
    config.rm.placement, config.accumulate = "lazy", 4
    poison(monkeypatch, config)
    devices = mesh.all_devices(limit=1)
    check_skipped(*follow(setup.build(resolve(config), devices), devices))


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["mesh", "pmap"])
def test_eight_devices_skip_the_step_of_one(config, monkeypatch, parallel):
    """The bad example lies on one of them."""
    poison(monkeypatch, config)
    devices = mesh.all_devices(parallel)
    assert devices.count == 8
    states, metrics = follow(setup.build(resolve(config), devices), devices)
    check_skipped(states, metrics)
    one = mesh.all_devices(limit=1)
    alone, _ = follow(setup.build(resolve(config), one), one)
    for a, b in zip(jax.tree.leaves(states[-1]), jax.tree.leaves(alone[-1]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.slow
def test_each_run_of_a_sweep_skips_alone(config, monkeypatch):
    """One rate is so large that nothing is finite after its first update; the other run does not
    notice."""
    config.sweep.grid = "{'learning_rate': (1e-2, 1e35)}"
    devices = mesh.all_devices(limit=1)
    every, base = runs(resolve(config)), setup.open_base(resolve(config), devices)
    job = many.build(every, base)
    states, metrics = follow(job, devices, many.first_state(every, base))
    skipped = np.array([m["skipped"] for m in metrics])
    assert skipped[:, 0].tolist() == [0.0] * 5 and skipped[:, 1].tolist() == [0.0] + [1.0] * 4
    assert same(many.pick(states[1][1:], 1), many.pick(states[5][1:], 1))
    assert updates_done(states[5].opt_state).tolist() == [5, 1]
    alone, _ = follow(setup.build(every[0].config, devices), devices)
    for a, b in zip(jax.tree.leaves(many.pick(states[5].trainable, 0)),
                    jax.tree.leaves(alone[5].trainable), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_a_run_counts_it_and_goes_on(one_device, config, monkeypatch, tmp_path, capsys):
    poison(monkeypatch, config)
    train(config, tmp_path)
    said = capsys.readouterr().out
    assert f"step {BAD}: skipped, as its loss or gradient is not finite" in said
    found = {row["step"]: row for row in rows(tmp_path)}
    assert [row["skipped"] for row in found.values()] == [int(s == BAD) for s in found]
    assert found[BAD]["nonfinite"]["train/loss"] == "nan"
    # The schedule goes by updates: linear over 12 steps, of which the third was none.
    rates = [row["learning_rate"] for row in found.values()]
    updates = [0, 1, 2, 2, *range(3, 11)]
    np.testing.assert_allclose(rates, [1e-2 * (1 - u / 12) for u in updates], rtol=1e-5)


@pytest.mark.slow
def test_of_a_line_of_several_steps_the_finite_ones_are_the_mean(
    one_device, config, monkeypatch, tmp_path
):
    poison(monkeypatch, config)
    train(config, tmp_path / "each")
    config.log_every = 4
    train(config, tmp_path / "four")
    each, (first, *_) = rows(tmp_path / "each"), rows(tmp_path / "four")
    assert first["step"] == 4 and first["skipped"] == 1
    losses = [row["train/loss"] for row in each[:4] if not row["skipped"]]
    assert first["train/loss"] == pytest.approx(np.mean(losses), rel=1e-6)


def test_after_so_many_in_a_row_a_run_ends(one_device, config, tmp_path):
    config.optimizer.learning_rate, config.nonfinite_limit = 1e35, 5
    config.optimizer.schedule = "constant"
    base = setup.open_base(resolve(config), mesh.all_devices(limit=1))
    ids = next(iter(base.feed.train(1)))["id"]
    with pytest.raises(UserError) as raised:
        train(config, tmp_path)
    said = str(raised.value)
    assert "5 steps in a row" in said and "the first step 2 with the training examples" in said
    assert f"examples {', '.join(map(str, ids.tolist()))}: " in said
    assert "saved as step 6" in said and "--config.optimizer.learning_rate" in said
    assert steps_of(tmp_path) == [4, 6]
    kept, first = leaves(tmp_path, 6), leaves(tmp_path, 4)
    for path in kept:
        if path != "['step']":
            np.testing.assert_array_equal(kept[path], first[path], err_msg=path)
    assert all(np.isfinite(x).all() for x in kept.values())


@pytest.mark.slow
def test_a_sweep_ends_only_when_all_its_runs_do(one_device, config, tmp_path, capsys):
    config.nonfinite_limit = 3
    config.sweep.grid = "{'learning_rate': (1e-2, 1e35)}"
    sweep.train(config, tmp_path / "one")
    assert "learning_rate=1e+35: step 2: skipped" in capsys.readouterr().out
    found = rows(tmp_path / "one" / "seed=0,learning_rate=1e+35")
    assert [row["skipped"] for row in found] == [0] + [1] * 11
    summary = json.loads((tmp_path / "one" / "seed=0,learning_rate=0.01" / "summary.json")
                         .read_text())
    assert summary["steps"] == 12
    config.sweep.grid = "{'learning_rate': (1e34, 1e35)}"
    with pytest.raises(UserError, match="3 steps in a row"):
        sweep.train(config, tmp_path / "all")


def weights_with(tiny_vit, folder, name, value):
    """That ViT with one weight of the second layer replaced."""
    folder.mkdir()
    (folder / "config.json").write_bytes((tiny_vit / "config.json").read_bytes())
    weights = safetensors.numpy.load_file(tiny_vit / "model.safetensors")
    (key,) = [k for k in weights if name in k]
    weights[key] = weights[key].copy()
    weights[key].flat[0] = value
    safetensors.numpy.save_file(weights, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("layer.1.intermediate.dense.weight", np.inf, "first not finite is the output of encoder/"
         "layers/"),
        slow("embeddings.patch_embeddings.projection.weight", np.nan, "the output of embed"),
    ],
)
def test_the_layer_is_named(config, tiny_vit, tmp_path, name, value, words):
    config.model.source = str(weights_with(tiny_vit, tmp_path / "model", name, value))
    devices = mesh.all_devices(limit=1)
    job = setup.build(resolve(config), devices)
    batch = next(iter(job.feed.train(0)))
    said = job.look(job.state.trainable, job.constants, batch, 0)
    assert words in said
    if "layer.1" in name:
        assert said.endswith("call 2)"), said


def test_what_else_may_not_be_finite(config, monkeypatch):
    poison(monkeypatch, config, step=1)
    devices = mesh.all_devices(limit=1)
    job = setup.build(resolve(config), devices)
    batch = next(iter(job.feed.train(0)))
    assert job.look(job.state.trainable, job.constants, batch, 0) == "the inputs are not finite"
    other = next(iter(job.feed.train(1)))
    said = job.look(job.state.trainable, job.constants, other, 1)
    assert said == "every layer's output and the loss are finite; the gradient is not"
    broken = jax.tree.map(lambda x: x * jnp.inf, job.state.trainable)
    said = job.look(broken, job.constants, other, 1)
    assert said.startswith("the parameter encoder/layers/") and "before the step" in said


def test_spikes_against_a_direct_count():
    rng = np.random.default_rng(0)
    losses = 2 + 0.1 * rng.standard_normal(400)
    losses[[50, 150, 151, 300]] = 5.0
    losses[200] = np.nan
    expected = []
    for i in range(100, 400):
        before = losses[i - 100 : i]
        middle = np.nanmedian(before)
        if losses[i] > middle + 10 * np.nanmedian(np.abs(before - middle)):
            expected.append(i + 1)
    assert expected == [151, 152, 301]
    for size in (1, 7, 20, 400):  # however many steps a line has
        spikes = Spikes()
        said = [spikes.add(i + 1, losses[i : i + size]) for i in range(0, 400, size)]
        first = [int(words.split(":")[0].removeprefix("step ")) for words in said if words]
        assert set(first) <= set(expected) and first[0] == 151
        if size == 1:
            assert first == expected
