"""The python with PyTorch, transformers and peft that some tests compare with, if there is one."""

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent
VARIABLE = "RMLORA_PEFT_PYTHON"
MAKE = "python3 tests/oracle/make_environment.py .venv-peft"


def python() -> str:
    """That python: $RMLORA_PEFT_PYTHON, or the checkout's .venv-peft; else the test is skipped."""
    own = HERE.parents[1] / ".venv-peft" / "bin" / "python"
    found = os.environ.get(VARIABLE) or (str(own) if own.exists() else None)
    if found is None:
        pytest.skip(f"no python with PyTorch: type `{MAKE}` in the checkout, or set {VARIABLE}")
    return found


def run(script: str, *arguments, timeout: float = 300) -> str:
    """Runs a script of this folder with that python, without the network; what it prints.

    $RMLORA_PEFT_PYTHONPATH may name a folder with another release of transformers.
    """
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    if extra := environment.get("RMLORA_PEFT_PYTHONPATH"):
        environment["PYTHONPATH"] = extra
    done = subprocess.run(
        [python(), str(HERE / script), *map(str, arguments)],
        env=environment | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def logits(cases: Mapping[Path, dict], work: Path) -> dict[Path, dict[str, np.ndarray]]:
    """What ``logits.py`` says of each model's folder and its inputs, in one process."""
    python()  # skips before anything is written
    arguments = []
    for number, (folder, inputs) in enumerate(cases.items()):
        given, made = work / f"{number}.in.npz", work / f"{number}.out.npz"
        np.savez(given, **inputs)
        arguments += [folder, given, made]
    run("logits.py", *arguments)
    return {folder: dict(np.load(arguments[3 * i + 2])) for i, folder in enumerate(cases)}
