"""Many runs at once against the single runs of the same settings: bits, folders, refusals."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from conftest import tiny_config
from fake_devices import with_devices
from fixtures.text.tiny import config_of, write_model, write_texts
from marks import slow

import rmlora_jax as rm
from rmlora_jax.data import augment, load_images
from rmlora_jax.errors import UserError
from rmlora_jax.hub import load_vit
from rmlora_jax.models import ViT
from rmlora_jax.parallel import memory, mesh
from rmlora_jax.parallel.mesh import all_devices, shard
from rmlora_jax.sweep import grid, many
from rmlora_jax.sweep import train as sweep
from rmlora_jax.sweep.grid import check_config, runs
from rmlora_jax.train import checkpoint, loop, setup
from rmlora_jax.train.config import changes, resolve

ROOT = Path(__file__).parent.parent.parent
STEPS, EVERY, SEEDS = 20, 5, 3


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """Runs of whole folders on one device: eight fake ones on two cores take their time."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (loop, sweep):
            patch.setattr(module, "all_devices", lambda name, **_: mesh.all_devices(name, limit=1))
        yield


def follow(job, state, devices, runs, steps=STEPS):
    """What each run saw in its first steps; ``runs`` are configs, one for a single run."""
    pick = job.pick
    masks_of = [masks_by(resolve(c)) for c in runs if c.method == "rm_lora"]
    seen = [{"ids": [], "masks": [], "loss": [], "correct": [], "kept": []} for _ in runs]
    for _, batch in zip(range(steps), job.feed.train(0), strict=False):
        before = [(pick(state.opt_state, i), pick(state.trainable, i)) for i in range(len(runs))]
        masks = [of(*pair) for of, pair in zip(masks_of, before, strict=False)]
        state, metrics = job.train_step(state, job.constants, shard(batch, devices))
        for i, own in enumerate(seen):
            found = {k: float(v) for k, v in job.apart(metrics)[i].items()}
            own["ids"].append(batch["id"])
            own["loss"].append(found["loss"])
            own["correct"].append(found["accuracy"])
            own["kept"].append(found["kept_fraction"])
            if masks:
                own["masks"].append([np.asarray(m) for m in jax.tree.leaves(masks[i])])
    return seen, state


def masks_by(config):
    """`step_masks` of a run as one program."""
    options = {"keep": config.rm.keep, "start_step": config.rm.start_step}
    return jax.jit(lambda state, trainable: rm.step_masks(state, trainable, **options))


def follow_together(config, devices, steps=STEPS):
    check_config(config)
    every, base = runs(resolve(config)), setup.open_base(resolve(config), devices)
    job = many.build(every, base)
    state = many.first_state(every, base)
    return every, *follow(job, state, devices, [run.config for run in every], steps)


def check_equal(config, devices, steps=STEPS, singles=None):
    """Runs of the sweep (``singles``: which) against single runs; what the sweep's runs saw."""
    every, seen, state = follow_together(config, devices, steps)
    for i in range(len(every)) if singles is None else singles:
        run = every[i]
        check_config(run.config)
        job = setup.build(run.config, devices)
        (alone,), end = follow(job, job.state, devices, [run.config], steps)
        for name in ("ids", "correct"):
            np.testing.assert_array_equal(seen[i][name], alone[name], err_msg=f"{run.name} {name}")
        # The masks are compared below; the fraction is a float32 mean of them.
        np.testing.assert_allclose(seen[i]["kept"], alone["kept"], rtol=1e-6, err_msg=run.name)
        for ours, theirs in zip(seen[i]["masks"], alone["masks"], strict=True):
            for a, b in zip(ours, theirs, strict=True):
                np.testing.assert_array_equal(a, b)
        np.testing.assert_allclose(seen[i]["loss"], alone["loss"], rtol=1e-5, err_msg=run.name)
        for a, b in zip(jax.tree.leaves(many.pick(state.trainable, i)),
                        jax.tree.leaves(end.trainable), strict=True):
            # Adam divides gradients by their size: rounding of small ones grows with the rate.
            atol = max(2e-5, 1e-3 * run.config.optimizer.learning_rate)
            np.testing.assert_allclose(a, b, atol=atol, err_msg=run.name)
    return every, seen


def differ(seen, name):
    """Whether all runs saw something else."""
    return len({str(np.concatenate([np.ravel(x) for x in own[name]]).tolist()) for own in seen})


@pytest.mark.parametrize("singles", [(0, 3), slow((1, 2))])  # each seed and each setting
def test_seeds_and_grid_equal_their_single_runs(config, singles):
    config.optimizer.learning_rate = 1e-2
    config.sweep.seeds = 2
    config.sweep.grid = "[{'penalty': 0, 'keep': .5}, {'penalty': .1, 'keep': 1}]"
    every, seen = check_equal(config, all_devices(limit=1), singles=singles)
    assert [run.name for run in every] == [
        "seed=0,penalty=0,keep=0.5", "seed=1,penalty=0,keep=0.5",
        "seed=0,penalty=0.1,keep=1", "seed=1,penalty=0.1,keep=1"]
    assert differ(seen, "loss") == 4
    hidden = [sum((~m).sum() for step in own["masks"] for m in step) for own in seen]
    assert all((n > 100) == (run.config.rm.keep < 1) for n, run in zip(hidden, every, strict=True))
    assert not all(np.array_equal(a, b) for step in zip(seen[0]["masks"], seen[1]["masks"],
                                                        strict=True)
                   for a, b in zip(*step, strict=True))  # of two seeds


@pytest.mark.slow
def test_dora_with_alphas(config):
    config.method = "dora"
    config.sweep.grid = "{'alpha': (5, 48), 'learning_rate': (1e-2,)}"
    _, seen = check_equal(config, all_devices(limit=1))
    assert differ(seen, "loss") == 2


@pytest.mark.slow
def test_lora_with_rates_decays_and_alphas(config):
    config.method, config.accumulate = "lora", 2
    config.optimizer.warmup = 0.2
    config.lora.alpha_pattern = ((".*/query", 4.0),)
    config.lora.init = "orthogonal"
    config.sweep.grid = str([
        {"learning_rate": 3e-2, "weight_decay": 1.0},
        {"learning_rate": 1e-2, "alpha": 5},
        {"alpha": 48, "weight_decay": 0.1},
    ])
    every, seen = check_equal(config, all_devices(limit=1))
    assert [run.config.lora.alpha for run in every] == [16.0, 5.0, 48.0]
    assert [run.config.optimizer.learning_rate for run in every] == [3e-2, 1e-2, 1e-3]
    assert differ(seen, "loss") == 3


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    root = tmp_path_factory.mktemp("texts")
    write_model(root / "model", dropout=0.1)
    write_texts(root / "train.jsonl", 240, seed=1)
    return root


@pytest.fixture
def text_config(texts):
    c = config_of(texts, steps=STEPS)
    c.optimizer.learning_rate = 5e-3
    return c


@pytest.mark.slow
def test_texts_with_dropout(text_config):
    text_config.lora.dropout = 0.3
    text_config.text.max_length = 32
    text_config.text.group_by_length = True  # two lengths, hence two programs
    text_config.sweep.seeds = 2
    _, seen = check_equal(text_config, all_devices(limit=1))
    assert differ(seen, "loss") == 2


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["mesh", "pmap"])
def test_eight_devices(config, parallel):
    config.sweep.seeds = 2
    config.sweep.grid = "{'alpha': (8, 16), 'keep': .5}"
    _, one, _ = follow_together(config, all_devices(limit=1))
    devices = all_devices(parallel)
    assert devices.count == 8
    _, eight, _ = follow_together(config, devices)
    for ours, theirs in zip(one, eight, strict=True):
        for name in ("ids", "correct"):
            np.testing.assert_array_equal(ours[name], theirs[name])
        np.testing.assert_allclose(ours["kept"], theirs["kept"], rtol=1e-6)
        np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=1e-5)
    assert differ(eight, "loss") == 4


@pytest.mark.slow
def test_the_data_have_a_seed_of_their_own(config):
    """The first loss by hand: head of one seed, order and augmentation of the other."""
    config.seed, config.data.seed = 3, 5
    devices = all_devices(limit=1)
    job = setup.build(resolve(config), devices)
    params = jax.device_get(rm.join(job.state.trainable, job.constants.frozen))
    (seen,), _ = follow(job, job.state, devices, [config], steps=1)
    key, _ = jax.random.split(jax.random.fold_in(jax.random.key(5), 0))
    digits = load_images("digits")
    pixels = np.stack([digits.train[int(i)]["image"] for i in seen["ids"][0]])
    labels = np.array([digits.train[int(i)]["label"] for i in seen["ids"][0]])
    inputs = augment(jnp.asarray(pixels), key, jnp.arange(16), image_size=16, train=True)
    model = rm.adapt(ViT(load_vit(config.model.source, num_classes=10).config, 10), job.lora[0])
    log_p = jax.nn.log_softmax(model.apply({"params": params}, inputs))
    np.testing.assert_allclose(seen["loss"][0], -log_p[jnp.arange(16), labels].mean(), rtol=1e-5)

    config.seed, config.data.seed = 5, None
    plain = setup.build(resolve(config), devices)
    np.testing.assert_array_equal(seen["ids"][0], next(plain.feed.train(0))["id"])
    head = load_vit(config.model.source, num_classes=10,
                    key=jax.random.split(jax.random.key(3))[0]).params["head"]["kernel"]
    np.testing.assert_array_equal(params["head"]["kernel"], head)


# Whole folders.


def seeds_config(tiny_vit):
    c = tiny_config(tiny_vit)
    c.compilation_cache = ""
    c.sweep.seeds = SEEDS
    c.optimizer.learning_rate = 1e-2  # so high that the best step is not always the last
    c.log_every, c.eval_every = 1, EVERY
    return c


@pytest.fixture(scope="module")
def whole(tiny_vit, tmp_path_factory):
    """Five seeds in one program."""
    workdir = tmp_path_factory.mktemp("sweeps") / "whole"
    return workdir, sweep.train(seeds_config(tiny_vit), workdir)


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def column(folder, name):
    return np.array([row[name] for row in rows(folder) if name in row])


def leaves(folder, step):
    tree = ocp.StandardCheckpointer().restore(folder / "checkpoints" / str(step) / "default")
    return {jax.tree_util.keystr(k): np.asarray(v) for k, v in jax.tree.leaves_with_path(tree)}


def steps_of(folder):
    return sorted(int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdigit())


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


def names(workdir):
    return [f"seed={seed}" for seed in range(SEEDS)]


def check_same_folders(one, other, exact):
    """The folders of two sweeps; ``exact``: to the bit."""
    for name in names(one):
        a, b = one / name, other / name
        for key in ("step", "train/accuracy", "validation/accuracy"):
            np.testing.assert_array_equal(column(a, key), column(b, key), err_msg=f"{name} {key}")
        rtol = 0 if exact else 1e-5
        for key in ("train/kept_fraction", "train/loss", "train/penalty", "validation/loss"):
            np.testing.assert_allclose(column(a, key), column(b, key), rtol=rtol, err_msg=name)
        assert steps_of(a) == steps_of(b)
        for step in steps_of(a):
            ours, theirs = leaves(a, step), leaves(b, step)
            assert ours.keys() == theirs.keys() and len(ours) > 20
            for path in ours:
                if exact:
                    np.testing.assert_array_equal(ours[path], theirs[path], err_msg=path)
                else:
                    np.testing.assert_allclose(ours[path], theirs[path], atol=1e-4, err_msg=path)
        ours, theirs = summary_of(a), summary_of(b)
        for key in ("test", "test_best", "intrinsic_dimension") if exact else ():
            assert ours[key] == theirs[key]


def test_what_a_sweep_leaves(whole):
    workdir, summary = whole
    assert summary["sweep"] == SEEDS and list(summary["runs"]) == names(workdir)
    assert {p.name for p in workdir.iterdir()} == {
        *names(workdir), "config.json", "data.json", "summary.json", "sweep.md",
        "sweep.png"}
    table = (workdir / "sweep.md").read_text()
    lines = table.splitlines()[6:]
    assert all(line.startswith(f"|    {i} |") for i, line in enumerate(lines[:SEEDS]))
    assert lines[SEEDS] == "" and "effective rank" in table
    assert (workdir / "sweep.png").stat().st_size > 20_000
    bests = []
    for i, name in enumerate(names(workdir)):
        own = summary_of(workdir / name)
        assert own["sweep"] == SEEDS
        assert own["program_train_seconds"] == pytest.approx(SEEDS * own["train_seconds"])
        validation = {r["step"]: (r["validation/accuracy"], -r["validation/loss"], r["step"])
                      for r in rows(workdir / name) if "validation/loss" in r}
        assert list(validation) == [5, 10, 15, 20]
        best = max(validation, key=validation.get)
        assert own["test_best"]["step"] == best
        assert steps_of(workdir / name) == sorted({best, STEPS})
        accuracy = f"{100 * own['test']['accuracy']:.1f} %"
        assert lines[i].split("|")[2].strip() == accuracy
        bests.append(best)
    assert min(bests) < STEPS, "no run has its best step before the last; the tests show too little"


@pytest.mark.slow
def test_a_folder_is_that_of_the_single_run(whole, tiny_vit, tmp_path, capsys):
    run = next(r for r in runs(resolve(seeds_config(tiny_vit)))
               if summary_of(whole[0] / r.name)["test_best"]["step"] < STEPS)
    ours, alone = whole[0] / run.name, tmp_path / "alone"
    expected = loop.train(run.config, alone)
    found = summary_of(ours)
    assert found.keys() - expected.keys() == {"sweep", "train_seconds", "program_train_seconds"}
    assert not expected.keys() - found.keys()
    for name in ("test", "test_best"):
        for key in expected[name]:
            np.testing.assert_allclose(found[name][key], expected[name][key], rtol=1e-4)
    assert rows(ours)[0].keys() == rows(alone)[0].keys()
    assert rows(ours)[-1].keys() == rows(alone)[-1].keys()
    np.testing.assert_allclose(column(ours, "train/loss"), column(alone, "train/loss"), rtol=1e-5)
    assert steps_of(ours) == steps_of(alone)
    for step in steps_of(alone):
        one, other = leaves(ours, step), leaves(alone, step)
        assert one.keys() == other.keys()
        for path in one:
            assert one[path].dtype == other[path].dtype and one[path].shape == other[path].shape
            np.testing.assert_allclose(one[path], other[path], atol=1e-4, err_msg=path)
    for name, values in expected["intrinsic_dimension"].items():
        ranks = found["intrinsic_dimension"][name]["effective_rank"]
        np.testing.assert_allclose(ranks, values["effective_rank"], rtol=1e-3)

    # The command of the single run finds it finished, and draws its report.
    copy = tmp_path / "copy"
    shutil.copytree(ours, copy)
    capsys.readouterr()
    assert loop.train(run.config, copy) == found
    assert "this run is finished" in capsys.readouterr().out
    assert (copy / "report.png").exists()
    # Without its summary it is evaluated again, from its checkpoints.
    (copy / "summary.json").unlink()
    again = loop.train(run.config, copy)
    for name in ("test", "test_best"):
        for key in again[name]:
            np.testing.assert_allclose(again[name][key], found[name][key], rtol=1e-5)
    assert len(rows(copy)) == STEPS


@pytest.mark.slow
def test_chunks_equal_one_program(whole, tiny_vit, tmp_path, capsys):
    config = seeds_config(tiny_vit)
    config.sweep.at_once = 2
    sweep.train(config, tmp_path)
    assert "program 2 of 2: seed=2" in capsys.readouterr().out
    check_same_folders(whole[0], tmp_path, exact=False)
    assert [summary_of(tmp_path / n)["sweep"] for n in names(tmp_path)] == [2, 2, 1]
    assert not (tmp_path / "program").exists()


class Killed(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("kill_at", [EVERY, 2 * EVERY])
def test_killed_and_resumed_ends_bit_identical(
    whole, tiny_vit, tmp_path, monkeypatch, capsys, kill_at
):
    config = seeds_config(tiny_vit)
    write = checkpoint.write

    def then_die(manager, step, *rest):
        write(manager, step, *rest)
        manager.wait_until_finished()
        if step == kill_at:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write", then_die)
        with pytest.raises(Killed):
            sweep.train(config, tmp_path)
    assert len(rows(tmp_path / "seed=0")) == kill_at
    config.sweep.at_once = 2  # the program that was interrupted goes on as it was
    sweep.train(config, tmp_path)
    assert f"; continuing after step {kill_at}" in capsys.readouterr().out
    check_same_folders(whole[0], tmp_path, exact=True)


@pytest.mark.slow
def test_killed_between_folders(whole, tiny_vit, tmp_path, monkeypatch):
    config = seeds_config(tiny_vit)
    settle = sweep.AtOnce.settle

    def then_die(self, i, folder, *rest):
        settle(self, i, folder, *rest)
        if folder.name == "seed=1":
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(sweep.AtOnce, "settle", then_die)
        with pytest.raises(Killed):
            sweep.train(config, tmp_path)
    before = (tmp_path / "seed=0" / "summary.json").read_bytes()
    assert not (tmp_path / "seed=1" / "summary.json").exists()
    sweep.train(config, tmp_path)
    assert (tmp_path / "seed=0" / "summary.json").read_bytes() == before
    check_same_folders(whole[0], tmp_path, exact=True)


def test_a_finished_sweep_says_so_and_another_config_is_refused(whole, tiny_vit, capsys):
    config = seeds_config(tiny_vit)
    before = (whole[0] / "summary.json").read_bytes()
    capsys.readouterr()
    assert sweep.train(config, whole[0])["runs"] == whole[1]["runs"]
    assert "this sweep is finished" in capsys.readouterr().out
    assert (whole[0] / "summary.json").read_bytes() == before
    config.sweep.seeds = 4
    with pytest.raises(UserError, match=r"sweep\.seeds: 3 -> 4"):
        sweep.train(config, whole[0])


@pytest.mark.slow
def test_run_py_trains_a_sweep(tiny_vit, tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "run.py"), f"--workdir={tmp_path}",
         f"--config.model.source={tiny_vit}", "--config.model.image_size=16", "--config.steps=4",
         "--config.batch_size=16", "--config.compilation_cache=", "--config.seed=7",
         "--config.sweep.seeds=2", "--config.sweep.grid={'penalty': (0, .1)}"],
        env=with_devices(1),
        capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for words in ("4: seed=7,penalty=0 to seed=8,penalty=0.1", "4 runs in one program",
                  "newly initialised: head/kernel", "sweep.md"):
        assert words in done.stdout
    assert (tmp_path / "seed=8,penalty=0.1" / "summary.json").exists()
    own = json.loads((tmp_path / "seed=8,penalty=0.1" / "config.json").read_text())
    assert (own["seed"], own["data"]["seed"], own["rm"]["penalty"]) == (8, 7, 0.1)
    assert own["sweep"] == {"seeds": 0, "grid": "", "at_once": 0}


# What fits.


@pytest.mark.slow
def test_what_does_not_fit_runs_in_chunks_and_says_so(config, monkeypatch, tmp_path, capsys):
    config.method, config.sweep.seeds = "lora", 4
    devices = all_devices(limit=1)
    config = resolve(config)
    programs = sweep.Programs(setup.open_base(config, devices))
    every = runs(config)
    one, two = programs.need(every[:1]), programs.need(every[:2])
    assert two - one > 5 * sweep.size_of(programs.base.trainable)  # and moments, and activations
    monkeypatch.setattr(memory, "available", lambda: two + 1000)
    chunks = sweep.plan(every, tmp_path, programs)
    assert [[run.config.seed for run in chunk] for chunk in chunks] == [[0, 1], [2, 3]]
    out = capsys.readouterr().out
    assert "4 runs at once need" in out and "at most 2 at once, in 2 programs" in out
    monkeypatch.setattr(memory, "available", lambda: 1)
    assert [len(chunk) for chunk in sweep.plan(every, tmp_path, programs)] == [1] * 4


@pytest.mark.parametrize("limit", range(10, 60))
def test_largest(limit):
    def need(runs):
        return 10 + 4 * runs

    expected = max((k for k in range(1, 9) if need(k) <= limit), default=1)
    assert memory.largest(8, need, limit, constant=10) == (expected, 42)
    assert memory.largest(8, lambda k: None if k > 2 else need(k), 60, 10) == (2, None)


# Refusals.


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"sweep.grid": "{'penalty': (0, .1"}, ["sweep.grid=", "not a Python literal"]),
        ({"sweep.grid": "3"}, ["a dict of names", "'keep'"]),
        ({"sweep.grid": "{}"}, ["a dict of names"]),
        ({"sweep.grid": "{'penalty': ()}"}, ["a dict of names"]),
        ({"sweep.grid": "{'penalty': ('a',)}"}, ["'penalty' has the value 'a'"]),
        ({"sweep.grid": "{'penalty': (True,)}"}, ["not a finite number"]),
        ({"sweep.grid": "{'learningrate': (1,)}"}, ["did you mean learning_rate"]),
        ({"sweep.grid": "{'seed': (1, 2)}"}, ["--config.sweep.seeds=5"]),
        ({"sweep.grid": "{'penalty': (0, 1)}", "method": "lora"},
         ["changes nothing with method lora", "--config.method=rm_lora"]),
        ({"sweep.grid": "{'keep': (.5, 1)}", "method": "reg_only"}, ["'keep' changes nothing"]),
        ({"sweep.grid": "{'penalty': (0, 1)}", "method": "mask_only"}, ["'penalty' changes"]),
        ({"sweep.grid": "{'alpha': (1, 2)}", "method": "bitfit"}, ["'alpha' changes nothing"]),
        ({"sweep.grid": "{'keep': (1, 2)}", "rm.draw": "exact", "rm.keep": 2.0},
         ["rm.draw=bernoulli"]),
        ({"sweep.grid": "{'keep': (.5, 2)}"}, ["config.rm.keep=2.0", "(0, 1]"]),
        ({"sweep.grid": "{'learning_rate': (0,)}"}, ["learning_rate=0.0: must be above 0"]),
        ({"sweep.grid": "{'alpha': (8, 8.0)}"}, ["more than once: seed=0,alpha=8"]),
        ({"sweep.seeds": -1}, ["sweep.seeds=-1"]),
        ({"sweep.at_once": -1}, ["sweep.at_once=-1"]),
        ({"sweep.seeds": 5, "seed": 2**31 - 3}, ["sweep.seeds=5", "lower --config.seed"]),
        ({"data.seed": -1}, ["config.data.seed=-1"]),
        ({"sweep.grid": "{'penalty': (-1, 0)}", "batch_size": 0},
         ["config.batch_size=0", "config.rm.penalty=-1.0"]),
    ],
)
def test_mistakes_are_said(config, fields, words):
    config.update_from_flattened_dict(fields)
    with pytest.raises(UserError) as raised:
        check_config(config)
    for word in words:
        assert word in str(raised.value)
    lines = str(raised.value).splitlines()
    assert len(lines) == len(set(lines)) <= 2


def test_a_frozen_head_that_differs_by_seed_is_refused(text_config, tmp_path):
    text_config.lora.train = "pooler"  # the head is new, and drawn from the seed
    text_config.sweep.seeds = 2
    with pytest.raises(UserError, match=r"head/.* --config\.lora\.train='pooler\|head'"):
        sweep.train(text_config, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_loop_train_refuses_a_sweep(config, tmp_path):
    config.sweep.seeds = 2
    with pytest.raises(ValueError, match=r"sweep\.train"):
        loop.train(config, tmp_path)


def test_out_of_memory_after_all_says_what_to_type(tiny_vit, tmp_path, monkeypatch):
    def full(*args):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 80 GiB")

    monkeypatch.setattr(loop, "fit", full)
    with pytest.raises(UserError, match=r"3 runs at once .* --config\.sweep\.at_once=1$"):
        sweep.train(seeds_config(tiny_vit), tmp_path)


def test_a_field_younger_than_a_run_has_its_default_there(config):
    old = config.to_dict()
    del old["sweep"], old["data"]["seed"]
    assert changes(old, config.to_dict())[0] == []
    config.data.seed = 3
    assert changes(old, config.to_dict())[0] == ["data.seed: None -> 3"]


def test_names_tell_numbers_apart():
    close = (0.1, 0.123456789, 1e-5, 100.0, 1234567.0)
    found = [grid.number(value) for value in close]
    assert found == ["0.1", "0.123456789", "1e-05", "100", "1234567.0"]
    assert [float(text) for text in found] == list(close)
