"""Ctrl-C at any moment is heard once, ends with the right code, and never with a traceback."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from marks import slow

ROOT = Path(__file__).parents[2]
# What a command does first; it does not import jax, which takes seconds.
PLAIN = """import gc, os, sys, time
sys.path.insert(0, sys.argv[1])
from rmlora_jax import stopping
stopping.heed()
def ready():
    print("ready", flush=True)
def work():  # that lasts until the first Ctrl-C, or the second
    while not stopping._asked or sys.argv[2] == "2": time.sleep(0.01)
"""
BLOCKS = {
    # As JAX's: Python prints what a callback of the garbage collector raises, and goes on.
    "callback": "gc.callbacks.append(lambda *_: time.sleep(0.02)); ready()\n"
                "while True: gc.collect()",
    "sleep": "ready(); time.sleep(60)",
    "input": "ready(); sys.stdin.readline(); time.sleep(60)",  # `communicate` closes it
    "unblocked": "import signal\nsignal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])\n"
                 "ready(); time.sleep(60)",
    "file": "with stopping.later('finishing a file'):\n    ready(); work()\n"
            "    print('whole', flush=True)\nprint('went on')",
    "nested": "with stopping.later('finishing a folder'):\n    with stopping.later('a file'):\n"
              "        ready(); work()\n    print('whole', flush=True)\nprint('went on')",
    # The error is told; what follows does not go on as if nothing had been asked.
    "failing": "try:\n    with stopping.later('finishing a file'):\n        ready()\n"
               "        work(); raise OSError\nexcept OSError:\n"
               "    with stopping.later('another'): print('whole', flush=True)\nprint('went on')",
    "run": "with stopping.watch('saving', alone=True) as asked:\n    ready()\n"
           "    while not asked(0): time.sleep(0.01)\n    print('whole', flush=True)\n"
           "    raise stopping.Stopped\n",
    "last step": "try:\n    with stopping.watch('saving', alone=True):\n        ready()\n"
                 "        work(); print('whole', flush=True)\n"
                 "except stopping.Stopped: sys.exit(75)\nprint('went on')",
}
AT_ONCE = ("callback", "sleep", "input", "unblocked")


@pytest.mark.parametrize(("block", "times", "code", "whole"), [
    ("callback", 1, 130, False), slow("sleep", 1, 130, False),
    slow("input", 1, 130, False), slow("unblocked", 1, 130, False),
    ("file", 1, 130, True), ("file", 2, 130, False), slow("nested", 1, 130, True),
    slow("failing", 1, 130, True), slow("run", 1, 1, True), ("last step", 1, 75, True),
    slow("last step", 2, 130, False),
])
def test_once_at_the_next_safe_point_twice_at_once(block, times, code, whole):
    process = subprocess.Popen(
        [sys.executable, "-c", PLAIN + BLOCKS[block], str(ROOT), str(times)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    told = process.stderr.readline() + process.stderr.readline()
    if times == 2:
        process.send_signal(signal.SIGINT)
    seen, more = process.communicate(timeout=60)
    told += more
    assert process.returncode == code, told
    assert ("whole" in seen) == whole and "went on" not in seen
    assert "KeyboardInterrupt" not in told and "ignored" not in told
    assert ("once more ends at once" in told) == (block not in AT_ONCE)


def test_a_download_leaves_no_part_behind(tmp_path):
    block = ("import pathlib\npart = pathlib.Path(sys.argv[2])\npart.mkdir()\n"
             "(part / 'archive.tar.gz').touch()\n"
             "with stopping.passing(part):\n    ready(); time.sleep(60)")
    process = subprocess.Popen([sys.executable, "-c", PLAIN + block, str(ROOT), tmp_path / ".c100"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130, told
    assert not [*tmp_path.iterdir()]


def command(*flags):
    return subprocess.Popen(
        [sys.executable, str(ROOT / "run.py"), *map(str, flags)], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env=os.environ | {"XLA_FLAGS": "", "HF_HUB_OFFLINE": "1"},
    )


needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")


def hears(process):
    """Whether the first line of run.py is behind it: the main thread leaves SIGINT to another."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    (mask,) = [line.split()[1] for line in status.splitlines() if line.startswith("SigBlk")]
    return bool(int(mask, 16) >> (signal.SIGINT - 1) & 1)


def ended(process, when, *, group=False, wait=0.0):
    """SIGINT when ``when`` is true, and what follows: the exit code and the output."""
    until = time.monotonic() + 300
    while not (hears(process) and when()) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.005)
    time.sleep(wait)
    if process.poll() is None:
        (os.killpg if group else os.kill)(process.pid, signal.SIGINT)
    told, _ = process.communicate(timeout=300)
    assert "Traceback" not in told and "ignored" not in told, told
    return process.returncode, told


@needs_proc
@pytest.mark.parametrize("wait", [0, slow(0.3), slow(1.0)])
def test_in_the_start(tmp_path, wait):
    process = command(f"--workdir={tmp_path / 'run'}")
    code, told = ended(process, lambda: True, wait=wait)
    assert code == 130 and told.startswith("\nstopped: nothing "), told
    if wait == 0:  # a fast machine has a folder after a second
        assert "has begun" in told and not (tmp_path / "run").exists()


def none_left(process):
    """Whether all processes that it started end soon after it."""
    until = time.monotonic() + 30
    while time.monotonic() < until:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


def flags_of(tiny_vit, workdir, **more):
    fields = {"model.source": tiny_vit, "model.image_size": 16, "steps": 60, "eval_every": 20,
              "log_every": 1, "batch_size": 16, "compilation_cache": ""} | more
    return [f"--workdir={workdir}", *(f"--config.{k}={v}" for k, v in fields.items())]


def leftovers(folder):
    return [*folder.rglob(".*.tmp")]


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_at_any_moment_of_a_run(tiny_vit, tmp_path, seed):
    """One folder, ended in each phase and at random moments; in the end the run is whole."""
    workdir, rng = tmp_path / "run", random.Random(seed)
    metrics = workdir / "metrics.jsonl"
    size = {"steps": 600, "eval_every": 200}  # more than any machine does within the waits

    def lines():
        return metrics.read_bytes().count(b"\n") if metrics.exists() else 0

    def saved():
        return {p.name for p in (workdir / "checkpoints").glob("*") if p.name.isdigit()}

    phases = {
        "loading": lambda: (workdir / ".lock").exists(),
        "compiling": lambda: (workdir / "config.json").exists(),
        "training": lambda: lines() > before[0] + 3,
        "evaluating": lambda: saved() - before[1],
        "exporting": lambda: "600" in saved(),
    }
    codes = {}
    for phase, when in phases.items():
        before = lines(), saved()  # a phase that was ended late has trained already
        process = command(*flags_of(tiny_vit, workdir, **size))
        code, told = ended(process, when, wait=rng.uniform(0, 0.2))
        codes[phase] = code
        assert code in (75, 130) or (phase == "exporting" and code in (0, -2)), (phase, told)
        assert code != 75 or "the same command goes on" in told
        assert not leftovers(tmp_path), phase
    assert codes["training"] == 75, codes
    process = command(*flags_of(tiny_vit, workdir, **size))
    told, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and (workdir / "summary.json").exists(), told
    steps = [line.split(",")[0] for line in metrics.read_text().splitlines()]
    assert steps == [f'{{"step": {step}' for step in range(1, 601)]
    process = command(f"--workdir={workdir}", "--export=merged")
    code, told = ended(process, lambda: bool(leftovers(workdir)))  # while it is written
    assert code == 130 and (workdir / "merged" / "config.json").exists(), told
    assert not leftovers(workdir)


@needs_proc
@pytest.mark.slow
def test_workers_do_not_hear_it(tiny_vit, tmp_path):
    """Ctrl-C goes to every process of the terminal; workers that end would end the last step."""
    workdir = tmp_path / "run"
    metrics = workdir / "metrics.jsonl"
    process = command(*flags_of(tiny_vit, workdir, steps=2000, **{
        "data.mode": "stream", "data.processes": 2}))
    code, told = ended(process, lambda: metrics.exists() and metrics.stat().st_size, group=True)
    assert code == 75 and "saved after step" in told, told
    assert none_left(process)


@needs_proc
@pytest.mark.slow
def test_a_study_stops_its_run(tiny_vit, tmp_path):
    study = tmp_path / "study.py"
    study.write_text(f"""from rmlora_jax.study.config import default_study

def get_config():
    c = default_study()
    c.study, c.tasks, c.methods, c.rates = "a", ("configs/quickstart.py",), ("lora",), (1e-3,)
    c.seeds, c.fields = 1, ("steps=3000", "eval_every=1000", "model.image_size=16",
                            "model.source={tiny_vit}", "compilation_cache=")
    return c
""")
    process = command(f"--config={study}", f"--workdir={tmp_path / 'out'}")

    def training():
        return any(f.stat().st_size for f in (tmp_path / "out").rglob("metrics.jsonl"))

    code, told = ended(process, training, group=True)
    assert code == 75 and "saved after step" in told, told
    (checkpoint,) = [p for p in (tmp_path / "out").rglob("checkpoints/*") if p.name.isdigit()]
    assert 0 < int(checkpoint.name) < 3000
    assert none_left(process)
