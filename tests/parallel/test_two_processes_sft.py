"""Task sft in two processes of two devices each, against one process."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fake_devices import with_devices
from fixtures.sft.tiny import config_of, write_chats, write_model
from parallel.test_two_processes import LATE, column, ended, free_port

from rmlora_jax.config import flatten

ROOT = Path(__file__).parent.parent.parent
STEPS = 10

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft")
    write_model(folder / "model")
    write_chats(folder / "train.jsonl", 200, seed=0)
    return folder


def start(root, workdir, devices, *words):
    """A process with this many devices."""
    changed = {
        name: value
        for name, value in flatten(config_of(root, STEPS, **{"eval_every": 5})).items()
        if (name.startswith(("sft.", "model.", "optimizer.", "lora.")) and value is not None)
        or name in ("batch_size", "eval_batch_size", "steps", "eval_every", "log_every",
                    "compilation_cache")
    }  # fmt: skip
    flags = [f"--config.{name}={value}" for name, value in changed.items()]
    return subprocess.Popen(
        [sys.executable, str(ROOT / "run.py"), f"--config={ROOT}/configs/smollm2_sft.py",
         f"--workdir={workdir}", *flags, *words],
        env=with_devices(devices), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_two_processes_give_the_numbers_of_one(root, tmp_path):
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    ended(start(root, alone, 1))
    for _ in range(3):
        cluster = [f"--coordinator=localhost:{free_port()}", "--num_processes=2"]
        both = [start(root, shared, 2, *cluster, f"--process_id={i}") for i in range(2)]
        said = ended(*both)
        if said:
            break
        shutil.rmtree(shared)
    else:
        pytest.skip(f"this machine is too busy for two processes at once: {LATE}")
    for name in ("train/tokens", "train/padding", "train/token_accuracy",
                 "validation/token_accuracy"):
        found = column(shared, name)
        assert len(found) >= 2
        np.testing.assert_allclose(column(alone, name), found, rtol=1e-6, err_msg=name)
    for name in ("train/loss", "validation/loss", "train/grad_norm"):
        np.testing.assert_allclose(column(alone, name), column(shared, name), rtol=2e-5)
    ours, theirs = (json.loads((w / "summary.json").read_text()) for w in (alone, shared))
    np.testing.assert_allclose(ours["test"]["loss"], theirs["test"]["loss"], rtol=2e-5)
    assert ours["test"]["token_accuracy"] == theirs["test"]["token_accuracy"]
