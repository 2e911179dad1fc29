"""``python run.py`` in two processes of four devices each, against one process."""

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from fake_devices import with_devices

SCRIPT = Path(__file__).parent.parent / "fixtures" / "recorded_run.py"
STEPS = 20
RECORDS = ("record0", "record1")

pytestmark = pytest.mark.slow


def command(tiny_vit, workdir, record, *overrides):
    return [
        sys.executable,
        str(SCRIPT),
        str(record),
        f"--workdir={workdir}",
        f"--config.model.source={tiny_vit}",
        "--config.model.image_size=16",
        f"--config.steps={STEPS}",
        "--config.eval_every=10",
        "--config.log_every=1",
        "--config.batch_size=16",
        "--config.data.limit=200",
        "--config.compilation_cache=",
        *overrides,
    ]


def start(devices, *words):
    """A process with so many devices; no cache, whose entries both would write."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command(*words), env=with_devices(devices), **pipes)


# gloo, which CPUs talk through, gives up where one process is 30 s behind: on a busy machine only.
LATE = "Gloo context initialization failed: DEADLINE_EXCEEDED"


def ended(*processes):
    """What they printed, once all have ended well; None where one of them was late."""
    try:
        said = [process.communicate(timeout=400) for process in processes]
    finally:
        for process in processes:
            process.kill()
    if any(LATE in errors for _, errors in said):
        return None
    for process, (_, errors) in zip(processes, said, strict=True):
        assert process.returncode == 0, errors
    return [out for out, _ in said]


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def both(tiny_vit, folder, *overrides):
    """One process with one device, then two with four: their workdirs and what was printed."""
    alone, shared = folder / "alone", folder / "shared"
    (said,) = ended(start(1, tiny_vit, alone, folder / "alone_record", *overrides))
    for _ in range(3):
        cluster = [f"--coordinator=localhost:{free_port()}", "--num_processes=2"]
        two = ended(*(
            start(4, tiny_vit, shared, folder / record, *overrides, *cluster, f"--process_id={i}")
            for i, record in enumerate(RECORDS)
        ))
        if two:
            return alone, shared, [said, *two]
        shutil.rmtree(shared)
    pytest.skip("this machine is too busy for two processes at once")


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def column(workdir, name):
    return np.array([row[name] for row in rows(workdir) if name in row])


def check_same_numbers(alone, shared):
    """Counts to the bit, losses up to the order of their sums; each step once."""
    assert [row["step"] for row in rows(shared)] == list(range(1, STEPS + 1))
    for name in ("train/accuracy", "train/kept_fraction", "validation/accuracy"):
        assert len(column(alone, name)) >= 2
        np.testing.assert_array_equal(column(alone, name), column(shared, name), err_msg=name)
    for name in ("train/loss", "train/penalty", "validation/loss"):
        np.testing.assert_allclose(
            column(alone, name), column(shared, name), rtol=1e-5, err_msg=name
        )
    ours, theirs = (json.loads((w / "summary.json").read_text()) for w in (alone, shared))
    for part in ("test", "test_best"):
        assert ours[part]["accuracy"] == theirs[part]["accuracy"]
        correct = theirs[part]["accuracy"] * 360  # the test digits, each counted once
        assert abs(correct - round(correct)) < 1e-9
    assert ours["steps"] == theirs["steps"] == STEPS


def files(folder):
    """All files of a run but what orbax and TensorBoard name by time and process."""
    found = (p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    return {str(p) for p in found if not {"checkpoints", "tensorboard"} & set(p.parts)}


def check_only_the_first_wrote(folder, workdir):
    """Checkpoints apart, which orbax shares out."""

    def inside(record):
        paths = [Path(p) for p in json.loads((folder / f"{record}.json").read_text())]
        paths = [p for p in paths if p.is_relative_to(workdir) and not p.is_dir()]
        return [p for p in paths if "checkpoints" not in p.parts]

    first, second = map(inside, RECORDS)
    assert len(first) > 5
    assert second == []


@pytest.fixture(scope="module")
def runs(tiny_vit, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    return folder, *both(tiny_vit, folder)


def test_batches_are_shared_out_and_masks_are_the_same(runs):
    folder, *_ = runs
    alone, *two = (np.load(folder / f"{name}.npz") for name in ("alone_record", *RECORDS))
    assert alone["ids"].shape == (STEPS, 16)
    assert [one["ids"].shape for one in two] == 2 * [(STEPS, 8)]
    np.testing.assert_array_equal(
        alone["ids"], np.concatenate([one["ids"] for one in two], axis=1)
    )
    masks = [name for name in alone.files if name.startswith("mask")]
    assert len(masks) >= 12
    for name in masks:
        for one in two:
            np.testing.assert_array_equal(alone[name], one[name], err_msg=name)
    assert sum(int((~alone[name]).sum()) for name in masks) > 100


def test_numbers_are_those_of_one_process(runs):
    _, alone, shared, _ = runs
    check_same_numbers(alone, shared)


def test_only_the_first_process_writes_and_speaks(runs):
    folder, alone, shared, said = runs
    check_only_the_first_wrote(folder, shared)
    assert files(shared) == files(alone)
    assert "adapter/adapter_model.safetensors" in files(shared)
    for words in ("of 2 processes", "test, last step"):
        assert words in said[1] and words not in said[2]
    assert len(list((shared / "tensorboard").rglob("events*"))) == 1


def test_the_adapter_is_that_of_one_process(runs):
    from safetensors.numpy import load_file

    _, alone, shared, _ = runs
    ours, theirs = (load_file(w / "adapter" / "adapter_model.safetensors") for w in (alone, shared))
    assert ours.keys() == theirs.keys() and len(ours) > 20
    for name, value in ours.items():
        np.testing.assert_allclose(value, theirs[name], atol=2e-5, err_msg=name)


def test_patience_ends_both_processes(tiny_vit, tmp_path):
    """With a rate that moves nothing no evaluation is better than the first."""
    still = ("--config.optimizer.learning_rate=1e-30", "--config.eval_every=4")
    alone, shared, _ = both(tiny_vit, tmp_path, *still, "--config.patience=2")
    for workdir in (alone, shared):
        summary = json.loads((workdir / "summary.json").read_text())
        assert (summary["steps"], summary["planned_steps"]) == (12, STEPS)
        assert "no better validation accuracy in 2 evaluations" in summary["stopped"]
        assert column(workdir, "step").tolist() == list(range(1, 13))


def test_a_sweep_in_two_processes(tiny_vit, tmp_path):
    alone, shared, said = both(tiny_vit, tmp_path, "--config.sweep.seeds=2")
    for name in ("seed=0", "seed=1"):
        check_same_numbers(alone / name, shared / name)
    check_only_the_first_wrote(tmp_path, shared)
    assert files(shared) == files(alone)
    wanted = {"sweep.md", "sweep.png", "seed=0/adapter/adapter_config.json", "seed=1/summary.json"}
    assert wanted <= files(shared)
    assert "2 runs in one program" in said[1] and "runs" not in said[2]


def test_one_process_is_asked_to_stop_and_both_save_the_same_step(tiny_vit, tmp_path):
    cluster = [f"--coordinator=localhost:{free_port()}", "--num_processes=2"]
    many = ("--config.steps=5000", "--config.eval_every=2000")
    processes = [
        start(2, tiny_vit, tmp_path / "run", tmp_path / f"record{i}", *many, *cluster,
              f"--process_id={i}")
        for i in range(2)
    ]
    file = tmp_path / "run" / "metrics.jsonl"
    while all(process.poll() is None for process in processes):
        if file.exists() and file.read_bytes().count(b"\n") > 5:
            break
        time.sleep(0.02)
    processes[1].send_signal(signal.SIGTERM)  # the other one is not told
    try:
        said = [process.communicate(timeout=200)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [75, 75], said
    steps = {words.split("stopped: saved after step ")[1].split()[0] for words in said}
    assert len(steps) == 1
    step = int(steps.pop())
    assert rows(tmp_path / "run")[-1]["step"] == step < 5000
    assert (tmp_path / "run" / "checkpoints" / str(step)).is_dir()
