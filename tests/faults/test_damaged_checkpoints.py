"""Checkpoints whose files are cut short or gone: the newest whole one is used, or the run stops."""

import shutil

import jax
import numpy as np
import pytest
from faults.small import (
    EVERY,
    STEPS,
    check_same_end,
    config_of,
    leaves,
    on_one_device,
    rows,
    steps_of,
    train,
)

from rmlora_jax.errors import UserError
from rmlora_jax.parallel import mesh
from rmlora_jax.train import checkpoint, setup
from rmlora_jax.train.config import resolve

LAST = 2 * EVERY  # the newest checkpoint of the run that was killed; EVERY is the one before


@pytest.fixture(scope="module", autouse=True)
def one_device():
    with pytest.MonkeyPatch.context() as patch:
        on_one_device(patch)
        yield


@pytest.fixture(scope="module")
def killed(tiny_vit, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("damage") / "killed"
    train(config_of(tiny_vit), workdir, until=LAST)
    assert steps_of(workdir) == [EVERY, LAST]
    return workdir


@pytest.fixture
def run(killed, tmp_path):
    shutil.copytree(killed, tmp_path / "run")
    return tmp_path / "run"


def damage(file, how):
    if how == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2 if how == "half" else 0])


def damage_data(workdir, step):
    for file in (workdir / "checkpoints" / str(step) / "default").rglob("*"):
        if file.is_file() and file.parent.name == "d":
            damage(file, "half")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["half", "empty", "gone"])
def test_any_file_of_the_newest_checkpoint(run, killed, tiny_vit, tmp_path, how):
    """Whatever file it is: the same state, or that of the checkpoint before; never another."""
    like = setup.build(resolve(config_of(tiny_vit)), mesh.all_devices(limit=1)).state
    known = {step: leaves(killed, step) for step in (EVERY, LAST)}
    folder = killed / "checkpoints" / str(LAST)
    files = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    found = []
    for file in files:
        shutil.rmtree(run)
        shutil.copytree(killed, run)
        damage(run / "checkpoints" / str(LAST) / file, how)
        with checkpoint.open_checkpoints(run) as manager:
            state, step = checkpoint.newest(manager, like)
        got = sorted(np.asarray(v).tobytes() for v in jax.tree.leaves(state))
        assert got == sorted(v.tobytes() for v in known[step].values()), file
        assert (step == EVERY) == (run / "damaged" / str(LAST)).is_dir(), file
        found.append(step)
    assert len(files) > 10 and found.count(EVERY) >= 4


def test_a_run_goes_on_from_the_one_before_to_the_same_end(run, undisturbed_run, tiny_vit, capsys):
    damage_data(run, LAST)
    train(config_of(tiny_vit), run)
    said = capsys.readouterr().out
    assert f"checkpoints/{LAST} cannot be read" in said
    assert f"it is now {run}/damaged/{LAST}" in said
    assert f"continuing after step {EVERY}" in said
    assert (run / "damaged" / str(LAST)).is_dir()
    check_same_end(undisturbed_run, run)


@pytest.mark.slow
def test_lost_figures_are_damage_too(run, undisturbed_run, tiny_vit, capsys):
    damage(run / "checkpoints" / str(LAST) / "metrics" / "metrics", "half")
    train(config_of(tiny_vit), run)
    assert f"checkpoints/{LAST} has damaged metrics" in capsys.readouterr().out
    check_same_end(undisturbed_run, run)


def test_where_none_is_whole_nothing_is_moved_or_begun(run, tiny_vit):
    for step in (EVERY, LAST):
        damage_data(run, step)
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    with pytest.raises(UserError, match=rf"{EVERY} cannot be read.*{LAST} cannot be read") as e:
        train(config_of(tiny_vit), run)
    assert "another --workdir" in str(e.value)
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_where_all_figures_are_lost_nothing_is_moved_or_begun(run, tiny_vit):
    for step in (EVERY, LAST):
        damage(run / "checkpoints" / str(step) / "metrics" / "metrics", "gone")
    with pytest.raises(UserError, match=f"{EVERY} has lost its metrics"):
        train(config_of(tiny_vit), run)
    assert steps_of(run) == [EVERY, LAST]


@pytest.mark.parametrize("what", ["checkpoints", "every step"])
def test_where_all_are_gone_a_run_does_not_begin_again(run, tiny_vit, what):
    for path in [run / "checkpoints"] if what == "checkpoints" else (run / "checkpoints").iterdir():
        shutil.rmtree(path)
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="no checkpoint any more"):
        train(config_of(tiny_vit), run)
    assert (run / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_killed_before_its_first_checkpoint_a_run_begins_again(
    killed, undisturbed_run, tiny_vit, tmp_path
):
    shutil.copytree(killed, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    kept = rows(tmp_path / "run")[:EVERY]  # with the evaluation whose checkpoint never was
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(lines[:EVERY]))
    assert "validation/loss" in kept[-1]
    train(config_of(tiny_vit), tmp_path / "run")
    check_same_end(undisturbed_run, tmp_path / "run")


@pytest.mark.slow
def test_the_best_one_is_damaged(tiny_vit, tmp_path, monkeypatch, capsys):
    """The next best of those that are left is taken, and that is said."""
    config, evaluate = config_of(tiny_vit), []
    from rmlora_jax.train import loop

    def falling(*_):  # the first evaluation is the best, the last the worst
        evaluate.append(None)
        return {"accuracy": 1 / len(evaluate), "loss": 1.0}

    monkeypatch.setattr(loop, "measured", falling)
    train(config, tmp_path, until=STEPS)
    assert steps_of(tmp_path) == [EVERY, LAST, STEPS]
    damage_data(tmp_path, EVERY)
    summary = train(config, tmp_path)
    assert f"checkpoints/{EVERY} cannot be read" in capsys.readouterr().out
    assert summary["test_best"]["step"] == LAST
    assert steps_of(tmp_path) == [LAST, STEPS]


@pytest.mark.slow
def test_the_checkpoint_of_a_sweep(tiny_vit, tmp_path, capsys):
    config = config_of(tiny_vit)
    config.sweep.seeds = 2
    train(config, tmp_path / "whole")
    train(config, tmp_path / "run", until=LAST)
    assert steps_of(tmp_path / "run" / "program") == [EVERY, LAST]
    damage_data(tmp_path / "run" / "program", LAST)
    capsys.readouterr()
    train(config, tmp_path / "run")
    said = capsys.readouterr().out
    assert f"program/checkpoints/{LAST} cannot be read" in said
    assert f"continuing after step {EVERY}" in said
    for name in ("seed=0", "seed=1"):
        check_same_end(tmp_path / "whole" / name, tmp_path / "run" / name)
