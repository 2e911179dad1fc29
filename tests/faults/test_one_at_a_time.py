"""Two processes at once: on one workdir the second says who is there; a data cache stays whole."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from faults.small import config_of
from marks import slow

from rmlora_jax.errors import UserError
from rmlora_jax.study.plan import Study
from rmlora_jax.study.run import run_study
from rmlora_jax.sweep import train as sweep
from rmlora_jax.train import loop
from rmlora_jax.train.workdir import FILE, held

ROOT = Path(__file__).parents[2]
HOLD = """
import sys, time
from pathlib import Path
from rmlora_jax.train.workdir import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def start(code, *words, **how):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)],
        env=environment, stdout=subprocess.PIPE, text=True, **how,
    )


@pytest.fixture
def holder(tmp_path):
    """A process that holds ``tmp_path / "run"``."""
    (tmp_path / "run").mkdir()
    with start(HOLD, tmp_path / "run") as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_run_sweep_or_study_says_who_is_there(holder, tiny_vit, tmp_path):
    words = (
        rf"{tmp_path}/run is in use by process {holder.pid} on {re.escape(socket.gethostname())} "
        r"since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d\n.*another --workdir"
    )
    config = config_of(tiny_vit)
    with pytest.raises(UserError, match=words):
        loop.train(config, tmp_path / "run")
    config.sweep.seeds = 2
    with pytest.raises(UserError, match=words):
        sweep.train(config, tmp_path / "run")
    study = Study(study="a")
    with pytest.MonkeyPatch.context() as patch:  # what a study is does not matter here
        patch.setattr("rmlora_jax.study.run.check_study", lambda study: (study, {}))
        patch.setattr("rmlora_jax.study.run.plan.cells", lambda *_: [])
        with pytest.raises(UserError, match=words):
            run_study(study, tmp_path / "run")
    assert [p.name for p in (tmp_path / "run").iterdir()] == [FILE]  # nothing was written


@pytest.mark.parametrize("number", [signal.SIGKILL, slow(signal.SIGTERM)])
def test_the_lock_of_a_killed_process_is_free(holder, tmp_path, number):
    holder.send_signal(number)
    holder.wait()
    assert json.loads((tmp_path / "run" / FILE).read_text())["pid"] == holder.pid
    with held(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / FILE).read_text())["pid"] == os.getpid()
        with pytest.raises(UserError, match=f"process {os.getpid()} on"), held(tmp_path / "run"):
            pass
    assert not (tmp_path / "run" / FILE).exists()


def test_run_py_ends_with_an_error(holder, tiny_vit, tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "run.py", f"--workdir={tmp_path / 'run'}",
         f"--config.model.source={tiny_vit}"],
        capture_output=True, text=True, timeout=120, check=False,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith(f"error: {tmp_path}/run is in use by process {holder.pid} on ")


CONTEND = """
import os, sys, time
from pathlib import Path
from rmlora_jax.errors import UserError
from rmlora_jax.train.workdir import held
folder, others = Path(sys.argv[1]), Path(sys.argv[2])
Path(others, str(os.getpid())).touch()
while len(list(others.iterdir())) < 3:
    time.sleep(0.001)
won, until = 0, time.monotonic() + 1
while time.monotonic() < until:
    try:
        with held(folder):
            file = os.open(folder / "inside", os.O_CREAT | os.O_EXCL)  # raises if another is in
            won += 1
            os.unlink(folder / "inside")
            os.close(file)
    except UserError:
        pass
print(won)
"""


def test_there_is_never_more_than_one(tmp_path):
    """Three processes take and free the lock, whose file comes and goes, for a second."""
    (tmp_path / "run").mkdir()
    (tmp_path / "ready").mkdir()
    many = [start(CONTEND, tmp_path / "run", tmp_path / "ready") for _ in range(3)]
    won = [int(process.communicate(timeout=120)[0] or -1) for process in many]
    assert [process.returncode for process in many] == [0] * 3
    assert sum(won) > 100, won


CACHES = """
import sys, time, numpy as np
from pathlib import Path
from types import SimpleNamespace
from transformers import AutoTokenizer
from rmlora_jax.data.pipeline import cached
from rmlora_jax.data.tokens import tokenise
from fixtures.text.tiny import write_model
root, name = Path(sys.argv[1]), sys.argv[2]
class Source:
    identity = lambda self: "the same"
    __len__ = lambda self: 5000
def make():
    (root / f"ready{name}").touch()
    while len(list(root.glob("ready*"))) < 2:  # both have found no cache
        time.sleep(0.001)
    return (np.arange(5000 * 48).astype(np.uint8).reshape(5000, 4, 4, 3),
            np.arange(5000, dtype=np.int32))
images, labels = cached(Source(), None, root / "images", make)
tokenizer = AutoTokenizer.from_pretrained(root / "model")
texts = [f"w{i % 7} w{i % 5}" for i in range(4000)]
tokens = tokenise([texts], tokenizer, 16, cache_dir=root / "tokens")
np.savez(root / f"{name}.npz", images=images, labels=labels, **tokens._asdict())
"""


def test_two_processes_make_one_data_cache(tmp_path):
    from fixtures.text.tiny import write_model

    write_model(tmp_path / "model")
    both = [start(CACHES, tmp_path, name) for name in "ab"]
    for process in both:
        process.communicate(timeout=120)
    assert [process.returncode for process in both] == [0, 0]
    a, b = (np.load(tmp_path / f"{name}.npz") for name in "ab")
    assert a["images"].shape == (5000, 4, 4, 3) and len(a["offsets"]) == 4001
    for name in a.files:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    for folder, names in (("images", ("images", "labels")), ("tokens", ("ids", "offsets"))):
        (file,) = (tmp_path / folder).iterdir()  # no temporary file, no second one
        with np.load(file) as kept:
            for name in names:
                np.testing.assert_array_equal(kept[name], a[name])


@pytest.mark.slow
def test_of_several_processes_the_first_holds_it_for_all(holder, tiny_vit, tmp_path):
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    both = [
        subprocess.Popen(
            [sys.executable, ROOT / "run.py", f"--workdir={tmp_path / 'run'}",
             f"--config.model.source={tiny_vit}", f"--coordinator=localhost:{port}",
             "--num_processes=2", f"--process_id={i}"],
            stderr=subprocess.PIPE, text=True,
        )
        for i in range(2)
    ]
    said = [process.communicate(timeout=300)[1] for process in both]
    assert [process.returncode for process in both] == [1, 1]
    assert f"in use by process {holder.pid} on" in said[0]
    assert f"{tmp_path}/run is in use by another run" in said[1]
    assert [p.name for p in (tmp_path / "run").iterdir()] == [FILE]
