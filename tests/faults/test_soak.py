"""The soak of ``soak.py`` in short: a kill, two, and ten; the command's fifty take ten minutes."""

import importlib.util
import subprocess
import sys

import pytest
from conftest import CACHE
from faults import soak


def check(tiny_vit, folder, aims):
    one = soak.Soak(tiny_vit, folder, CACHE, seed=1)
    assert one.run("killed", aims) == []
    assert one.figures["kills"] == len(aims), "the run was over before it was killed"
    if importlib.util.find_spec("tensorboard"):
        expected = soak.shown(one.whole, sys.executable)
        assert len(expected["train/loss"]) == soak.STEPS
        assert soak.shown(folder / "killed", sys.executable) == expected
    return one.figures


@pytest.mark.slow
@pytest.mark.parametrize("aims", [["checkpoint"], ["checkpoint", "export"]])
def test_a_run_killed_and_resumed_is_the_run_that_was_not(tiny_vit, tmp_path, aims):
    figures = check(tiny_vit, tmp_path, aims)
    if "export" in aims:
        assert figures["in export"] + figures["in between"] >= 1


@pytest.mark.slow
def test_ten_kills():
    done = subprocess.run(
        [sys.executable, soak.__file__, "--kills=10"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
