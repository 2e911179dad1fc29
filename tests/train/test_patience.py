"""Early stopping: validation accuracies are given, and the run ends where they say."""

import contextlib

import numpy as np
import pytest
from conftest import tiny_config
from faults.small import STEPS, column, config_of, leaves, on_one_device, rows, steps_of, train
from marks import slow

from rmlora_jax.errors import UserError
from rmlora_jax.stopping import Stopped
from rmlora_jax.train import loop, terminal
from rmlora_jax.train.config import resolve

# At steps 2, 4, ...: the best is at 4; what equals it is no better. With patience 2 the end is 8.
ACCURACIES = (0.5, 0.7, 0.7, 0.6, 0.9, 0.8)
BEST, END = 4, 8


@pytest.fixture
def config(tiny_vit, monkeypatch):
    on_one_device(monkeypatch)
    c = config_of(tiny_vit)
    c.eval_every, c.patience = 2, 2
    scripted(monkeypatch, ACCURACIES)
    return c


def scripted(monkeypatch, accuracies):
    """The evaluations of validation give these, one after another; the loss rises."""
    left = iter(enumerate(accuracies))

    def measured(*_):
        i, accuracy = next(left)
        return {"accuracy": accuracy, "loss": 1.0 + i}

    monkeypatch.setattr(loop, "measured", measured)


def with_patience(config, patience):
    other = config.copy_and_resolve_references()
    other.patience = patience
    return other


def check_end(workdir, summary, undisturbed):
    """It ended at END with the best kept; up to there it is the run without patience."""
    assert summary["steps"] == END and summary["planned_steps"] == STEPS
    assert summary["stopped"] == (
        "no better validation accuracy in 2 evaluations in a row (patience=2)")
    assert summary["test_best"]["step"] == BEST
    assert steps_of(workdir) == [BEST, END]
    assert column(workdir, "step").tolist() == list(range(1, END + 1))
    for name in ("train/loss", "learning_rate", "train/grad_norm"):  # the schedule is the same
        expected = column(undisturbed, name)[:END]
        np.testing.assert_array_equal(column(workdir, name), expected, err_msg=name)


def test_a_run_ends_where_its_patience_does(config, undisturbed_run, tmp_path):
    summary = train(config, tmp_path)
    check_end(tmp_path, summary, undisturbed_run)
    words = terminal.closing(summary, tmp_path, "Healthy")
    assert "stopped early" in words and "after step 8 of 12: no better" in words


@pytest.mark.parametrize("until", [slow(2), 6, slow(END)])
def test_a_killed_run_keeps_its_count(config, undisturbed_run, tmp_path, until):
    train(config, tmp_path, until=until)
    check_end(tmp_path, train(config, tmp_path), undisturbed_run)


@pytest.mark.slow
def test_a_run_stopped_between_evaluations_keeps_its_count(
    config, undisturbed_run, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(loop, "watch", lambda _: contextlib.nullcontext(lambda step: step == 7))
        with pytest.raises(Stopped):
            train(config, tmp_path)
    assert steps_of(tmp_path)[-1] == 7
    check_end(tmp_path, train(config, tmp_path), undisturbed_run)


@pytest.mark.slow
def test_with_more_patience_a_stopped_run_goes_on(config, undisturbed_run, tmp_path, capsys):
    train(config, tmp_path)
    train(config, tmp_path)
    assert "finished; a larger --config.patience, or 0, trains it on" in capsys.readouterr().out
    summary = train(with_patience(config, 3), tmp_path)  # the next evaluation is the best
    said = capsys.readouterr().out
    assert "continues with patience: 2 -> 3" in said and "continuing after step 8" in said
    assert summary["steps"] == STEPS and "stopped" not in summary
    assert summary["test_best"]["step"] == 10
    whole = leaves(undisturbed_run)
    for path, value in leaves(tmp_path).items():
        np.testing.assert_array_equal(value, whole[path], err_msg=path)
    train(with_patience(config, 0), tmp_path)  # a run of all its steps has nothing left to train
    assert "this run is finished" in capsys.readouterr().out


@pytest.mark.slow
def test_values_that_are_not_finite_are_no_better(config, tmp_path, monkeypatch):
    scripted(monkeypatch, (0.5, float("nan"), float("nan"), 0.9))
    assert train(config, tmp_path)["steps"] == 6
    assert len(rows(tmp_path)) == 6


def test_many_runs_at_once_refuse_patience(tiny_vit):
    c = tiny_config(tiny_vit)
    c.patience, c.sweep.seeds = 3, 2
    with pytest.raises(UserError, match=r"config.patience=3: must be 0 for sweep"):
        resolve(c)
    c.sweep.seeds = 0
    c.patience = -1
    with pytest.raises(UserError, match=r"config.patience=-1: must be 0 or more"):
        resolve(c)
