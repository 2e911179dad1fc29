"""What ``long_run.py`` measures, in short and in full."""

import json
import subprocess
import sys

import pytest
from faults import long_run


def measured(steps):
    done = subprocess.run(
        [sys.executable, long_run.__file__, f"--steps={steps}"],
        capture_output=True, text=True, check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_nothing_grows():
    found = measured(4_000)
    assert found["memory_growth"] < 0.05, found
    assert found["files"][1] <= found["files"][0], found
    assert found["threads"][1] <= found["threads"][0], found
