"""The verdict on curves of real and drawn runs whose right word stands beside them."""

import json
import math
from pathlib import Path

import pytest

from rmlora_jax.report import run as report
from rmlora_jax.report.verdict import first_broken, verdict

FILE = Path(__file__).parents[1] / "fixtures" / "curves.json"
CURVES = json.loads(FILE.read_text())
RECORDED = [name for name in CURVES if not name.startswith("drawn_")]


def lines_of(curve):
    """The lines of metrics.jsonl as `read_metrics` gives them."""
    keys = curve.keys() - {"says", "steps"}
    return [{"step": step} | {key: float(curve[key][i]) for key in keys
                              if curve[key][i] is not None}
            for i, step in enumerate(curve["steps"])]


@pytest.mark.parametrize("name", CURVES)
def test_the_word_is_that_of_a_person_who_looks_at_the_curve(name):
    found = verdict(lines_of(CURVES[name]))
    assert found.startswith(CURVES[name]["says"])
    assert found.partition(":")[0] in report.TONE or found.startswith(
        ("Overfitting", "Oscillation", "Diverged"))


def test_there_are_thirty_curves_of_every_word():
    assert len(RECORDED) >= 30
    words = [verdict(lines_of(curve)).partition(":")[0] for curve in CURVES.values()]
    for word in (*report.TONE, "Overfitting", "Oscillation", "Diverged"):
        assert words.count(word) >= 2, word


def test_skipped_steps_are_counted_and_are_no_divergence():
    lines = lines_of(CURVES["drawn_one_skipped"])
    assert first_broken(lines) is None
    assert verdict(lines).endswith(" 1 of 100 steps were skipped as not finite.")
    for row in lines:  # one that changed its parameters has diverged
        row.pop("skipped", None)
    assert verdict(lines).startswith("Diverged: the loss is not finite from step 47 on")


def test_a_validation_loss_that_is_not_finite_is_never_a_skipped_step():
    lines = lines_of(CURVES["fine_every_step"])
    lines[19] |= {"validation/loss": math.nan, "skipped": 1}
    assert verdict(lines).startswith("Diverged: the loss is not finite from step 20 on")


def test_it_says_what_cannot_be_seen():
    found = verdict(lines_of(CURVES["drawn_no_validation"]))
    assert found.endswith("; without validation, overfitting cannot be seen.")
