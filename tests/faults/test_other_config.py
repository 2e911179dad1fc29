"""The same workdir with another config: what differs is said, and whether the run goes on."""

import json

import pytest
from faults.small import STEPS, check_same_end, config_of, on_one_device, rows, train

from rmlora_jax.errors import UserError
from rmlora_jax.train.config import changes


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    on_one_device(monkeypatch)


@pytest.fixture
def constant(tiny_vit):
    """A config whose steps do not depend on how many there are."""
    c = config_of(tiny_vit)
    c.optimizer.schedule = "constant"
    return c


def with_steps(config, steps):
    longer = config.copy_and_resolve_references()
    longer.steps = steps
    return longer


@pytest.mark.slow
def test_a_longer_run_is_the_one_that_was_longer_from_the_start(constant, tmp_path, capsys):
    train(constant, tmp_path / "whole")
    train(with_steps(constant, 8), tmp_path / "run")
    capsys.readouterr()
    summary = train(constant, tmp_path / "run")  # which was finished after 8
    said = capsys.readouterr().out
    assert f"continues with steps: 8 -> {STEPS}" in said and "continuing after step 8" in said
    assert summary["steps"] == STEPS
    assert json.loads((tmp_path / "run" / "config.json").read_text())["steps"] == STEPS
    check_same_end(tmp_path / "whole", tmp_path / "run")
    train(constant, tmp_path / "run")
    assert "this run is finished" in capsys.readouterr().out
    with pytest.raises(UserError, match=f"is at step {STEPS} already, .* --config.steps={STEPS}"):
        train(with_steps(constant, 8), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["steps"] == STEPS
    assert (tmp_path / "run" / "summary.json").exists()


@pytest.mark.slow
def test_logging_may_change_on_the_way(constant, tmp_path, capsys):
    train(constant, tmp_path, until=8)
    constant.log_every = 2
    capsys.readouterr()
    train(constant, tmp_path)
    assert "continues with log_every: 1 -> 2" in capsys.readouterr().out
    assert [row["step"] for row in rows(tmp_path)] == [*range(1, 9), 10, 12]


@pytest.mark.parametrize(
    ("fields", "changed", "words"),
    [
        ({}, {"steps": 20, "seed": 3}, ["seed: 0 -> 3", "steps: 12 -> 20 (the rates of "
                                        "optimizer.schedule=linear depend on it)"]),
        ({"optimizer.schedule": "constant", "optimizer.warmup": 0.1}, {"epochs": 9.0},
         ["epochs: 8.0 -> 9.0 (optimizer.warmup is a fraction of it)"]),
        ({"optimizer.schedule": "constant", "method": "adalora"}, {"steps": 20},
         ["steps: 12 -> 20 (the budget of adalora depends on it)"]),
        ({"optimizer.schedule": "constant", "sweep.seeds": 2}, {"steps": 20},
         ["steps: 12 -> 20 (a sweep is of one length)"]),
        ({"optimizer.schedule": "constant"}, {"optimizer.schedule": "linear", "steps": 20},
         ["optimizer.schedule: 'constant' -> 'linear'", "steps: 12 -> 20 (the rates of"]),
        ({}, {"batch_size": 8, "log_every": 3}, ["batch_size: 16 -> 8"]),
    ],
)
def test_what_would_be_another_run_is_refused(tiny_vit, tmp_path, fields, changed, words):
    config = config_of(tiny_vit)
    config.update_from_flattened_dict(fields)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    config.update_from_flattened_dict(changed)
    with pytest.raises(UserError) as raised:
        train(config, tmp_path)
    for word in words:
        assert word in str(raised.value)
    assert "another --workdir" in str(raised.value) and "log_every" not in str(raised.value)
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_what_differs_is_sorted_into_two(constant):
    old, new = constant.to_dict(), with_steps(constant, 20)
    new.log_every, new.nonfinite_limit, new.lora.rank = 7, 3, 2
    refused, free = changes(old, new.to_dict())
    assert refused == ["lora.rank: 4 -> 2"]
    assert free == ["log_every: 1 -> 7", "nonfinite_limit: 10 -> 3", "steps: 12 -> 20"]
