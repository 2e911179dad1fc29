"""``python run.py`` from the outside: what it leaves, how it resumes, how it refuses."""

import asyncio
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from fake_devices import with_devices
from marks import slow

from rmlora_jax.errors import UserError
from rmlora_jax.train import checkpoint
from rmlora_jax.train.step import State

ROOT = Path(__file__).parent.parent.parent
STEPS = 12


def command(tiny_vit, workdir, *overrides):
    config = next((o for o in overrides if o.startswith("--config=")), None)
    return [
        sys.executable,
        str(ROOT / "run.py"),
        *([config] if config else []),  # before its fields
        f"--workdir={workdir}",
        f"--config.model.source={tiny_vit}",
        "--config.model.image_size=16",
        f"--config.steps={STEPS}",
        "--config.eval_every=4",
        "--config.log_every=1",
        "--config.batch_size=16",
        "--config.compilation_cache=",  # the tests' own cache comes from the environment
        *(o for o in overrides if o != config),
    ]


def run(tiny_vit, workdir, *overrides, devices=1, check=True):
    done = subprocess.run(
        command(tiny_vit, workdir, *overrides),
        env=with_devices(devices),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 or not check, done.stderr
    return done


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def column(workdir, name):
    return np.array([row[name] for row in rows(workdir)])


def leaves(workdir, step=STEPS):
    """Every array of a checkpoint by its path."""
    path = workdir / "checkpoints" / str(step) / "default"
    tree = ocp.StandardCheckpointer().restore(path)
    import jax

    return {jax.tree_util.keystr(k): np.asarray(v) for k, v in jax.tree.leaves_with_path(tree)}


@pytest.fixture(scope="module")
def finished(tiny_vit, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    return workdir, run(tiny_vit, workdir)


def test_what_a_run_leaves(finished, tiny_vit):
    workdir, done = finished
    metrics = rows(workdir)
    assert [row["step"] for row in metrics] == list(range(1, STEPS + 1))
    assert {"train/loss", "train/penalty", "train/accuracy", "train/kept_fraction",
            "learning_rate", "examples_per_second"} <= metrics[0].keys()
    assert [row["step"] for row in metrics if "validation/accuracy" in row] == [4, 8, 12]
    # Linear decay without warm-up: the rate of the update that leads to step s is lr (1 - (s-1)/T).
    expected = 2e-3 * (1 - np.arange(STEPS) / STEPS)
    np.testing.assert_allclose(column(workdir, "learning_rate"), expected, rtol=1e-5)
    assert metrics[0]["train/kept_fraction"] == 1.0  # the first update is not masked
    # B = 0 at first: every B B^T - I has norm sqrt(r) = 2, and A is far from orthonormal.
    assert metrics[0]["train/penalty"] > 1.0
    summary = json.loads((workdir / "summary.json").read_text())
    width, wide, layers, rank, classes = 32, 64, 2, 4, 10
    factors = layers * rank * (4 * 2 * width + 2 * (width + wide))
    head = width * classes + classes
    assert summary["trainable_parameters"] == factors + head
    assert summary["steps"] == STEPS and summary["method"] == "rm_lora"
    correct = summary["test"]["accuracy"] * 360  # an exact count of the 360 test digits
    assert abs(correct - round(correct)) < 1e-9
    validation = {row["step"]: row["validation/accuracy"] for row in metrics
                  if "validation/accuracy" in row}
    assert validation[summary["test_best"]["step"]] == max(validation.values())
    assert len(summary["intrinsic_dimension"]) == 6
    for values in summary["intrinsic_dimension"].values():
        assert np.shape(values["singular_values"]) == (layers, rank)
    for name in ("config.json", "report.png", "intrinsic.jsonl", "checkpoints"):
        assert (workdir / name).exists()
    assert list((workdir / "tensorboard").iterdir())
    splits = {key.partition("/")[0] for row in metrics for key in row if "/" in key}
    assert splits == {"train", "validation"}
    assert {"test", "test_best"} <= summary.keys() and not {"eval", "best_eval"} & summary.keys()
    for words in ("devices", "parameters", "newly initialised: head/kernel", "test, last step"):
        assert words in done.stdout


def test_a_finished_run_says_so(finished, tiny_vit):
    workdir, _ = finished
    summary = (workdir / "summary.json").read_bytes()
    done = run(tiny_vit, workdir)
    assert "this run is finished" in done.stdout and "test, last step" in done.stdout
    assert (workdir / "summary.json").read_bytes() == summary


@pytest.mark.slow
def test_killed_before_the_summary_only_evaluates(finished, tiny_vit, tmp_path):
    workdir = tmp_path / "copy"
    shutil.copytree(finished[0], workdir)
    summary = json.loads((workdir / "summary.json").read_text())
    (workdir / "summary.json").unlink()
    before = leaves(workdir)
    run(tiny_vit, workdir)
    after = leaves(workdir)
    assert all(np.array_equal(before[k], after[k]) for k in before)
    again = json.loads((workdir / "summary.json").read_text())
    assert again["test"] == summary["test"] and again["test_best"] == summary["test_best"]
    assert [row["step"] for row in rows(workdir)] == list(range(1, STEPS + 1))


@pytest.mark.slow  # in the normal run: tests/faults/test_soak.py
def test_killed_run_ends_bit_identical(finished, tiny_vit, tmp_path):
    workdir = tmp_path / "killed"
    process = subprocess.Popen(
        command(tiny_vit, workdir, "--config.steps=12"),
        env=with_devices(1),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not (workdir / "checkpoints" / "4" / "commit_success.txt").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    steps = [int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()]
    assert max(steps) < STEPS, "killed too late to show anything"
    run(tiny_vit, workdir)
    whole, resumed = leaves(finished[0]), leaves(workdir)
    assert whole.keys() == resumed.keys() and len(whole) > 20
    for path in whole:
        np.testing.assert_array_equal(whole[path], resumed[path], err_msg=path)
    assert [row["step"] for row in rows(workdir)] == list(range(1, STEPS + 1))
    for name in ("train/loss", "train/accuracy", "train/kept_fraction"):
        np.testing.assert_array_equal(column(workdir, name), column(finished[0], name))


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["mesh", "pmap"])
def test_eight_devices_give_the_numbers_of_one(finished, tiny_vit, tmp_path, parallel):
    run(tiny_vit, tmp_path, f"--config.parallel={parallel}", devices=8)
    one, eight = finished[0], tmp_path
    # Counts and masks are equal to the bit; sums of floats are only added in another order.
    for name in ("train/accuracy", "train/kept_fraction"):
        np.testing.assert_array_equal(column(one, name), column(eight, name))
    np.testing.assert_allclose(column(one, "train/loss"), column(eight, "train/loss"), rtol=1e-5)
    np.testing.assert_allclose(
        column(one, "train/penalty"), column(eight, "train/penalty"), rtol=1e-5
    )


@pytest.mark.slow
def test_accumulation_gives_the_numbers_of_the_whole_batch(finished, tiny_vit, tmp_path):
    run(tiny_vit, tmp_path, "--config.accumulate=4")
    for name in ("train/loss", "train/penalty", "train/kept_fraction"):
        np.testing.assert_allclose(
            column(finished[0], name), column(tmp_path, name), rtol=1e-5, err_msg=name
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "trained"),
    [("lora", None), ("mask_only", None), ("head", 330), ("bitfit", 970), ("full", None)],
)
def test_other_methods(tiny_vit, tmp_path, method, trained):
    run(tiny_vit, tmp_path, f"--config.method={method}")
    summary = json.loads((tmp_path / "summary.json").read_text())
    adapted = method in ("lora", "mask_only")
    if adapted:
        trained = 4 * 2 * (4 * 2 * 32 + 2 * 96) + 330
    elif method == "full":
        trained = summary["total_parameters"]
    assert summary["trainable_parameters"] == trained
    losses = column(tmp_path, "train/loss")
    assert losses[-3:].mean() < losses[:3].mean()
    assert ("train/penalty" in rows(tmp_path)[0]) == adapted


@pytest.mark.parametrize(
    ("overrides", "devices", "words"),
    [
        (["--config.method=rmlora"], 1, ["config.method='rmlora'", "did you mean rm_lora"]),
        (["--config.lrr=1"], 1, ["no field", "lrr"]),
        slow(["--config.lora.target=encoder/block.*"], 1, ["encoder/layers", "--config.lora."]),
        slow(["--config.rm.draw=exact", "--config.rm.keep=9"], 1, ["--config.rm."]),
        slow(["--config.model.attention=cudnn"], 1, ["--config.model.attention"]),
        (["--config=configs/nothing.py"], 1, ["no config file", "quickstart.py"]),
        slow(["--config.batch_size=12"], 8, ["batch_size=12", "8 devices", "--config.batch_size="]),
        slow(["--config.model.source=some/where"], 1, ["some/where"]),
        slow(["--config.data.name=cifar100", "--config.data.data_dir=/nonexistent"], 1,
             ["cifar100"]),
        slow(["--config.data.name=cifar1000"], 1, ["cifar1000", "cifar100"]),
        slow(["--config.optimizer.learning_rate=-1", "--config.rm.keep=2"], 1,
             ["config.optimizer.learning_rate=-1", "config.rm.keep=2"]),
    ],
)
def test_mistakes_end_in_plain_words(tiny_vit, tmp_path, overrides, devices, words):
    done = run(tiny_vit, tmp_path / "new", *overrides, devices=devices, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 3, done.stderr
    for word in words:
        assert word in done.stderr
    assert not (tmp_path / "new").exists()


@pytest.mark.slow  # in the normal run: tests/faults/test_other_config.py
def test_another_config_in_the_same_folder_is_refused(finished, tiny_vit):
    done = run(tiny_vit, finished[0], "--config.optimizer.learning_rate=0.5", check=False)
    assert done.returncode == 1
    assert "optimizer.learning_rate: 0.002 -> 0.5" in done.stderr


@pytest.mark.slow  # in the normal run: tests/faults/test_damaged_checkpoints.py
def test_damaged_checkpoint_is_reported(finished, tiny_vit, tmp_path):
    workdir = tmp_path / "damaged"
    shutil.copytree(finished[0], workdir)
    (workdir / "summary.json").unlink()  # as if killed before the end
    for file in (workdir / "checkpoints" / str(STEPS) / "default").rglob("*"):
        if file.is_file() and file.parent.name == "d":
            file.write_bytes(b"")
    done = run(tiny_vit, workdir, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"checkpoints/{STEPS}" in done.stderr and "cannot be read" in done.stderr


def test_reads_left_over_by_a_failed_restore_stay_quiet(tmp_path, monkeypatch):
    spec = {"driver": "zarr3", "kvstore": f"file://{tmp_path}/array"}
    array = ts.open(spec, create=True, dtype="float32", shape=[100, 100_000]).result()
    array.write(np.random.default_rng(0).random((100, 100_000), np.float32)).result()

    async def read():
        await (await ts.open(spec)).read()

    async def damaged():
        raise ValueError("damaged")

    async def both():
        await asyncio.gather(damaged(), read())

    def restore(*args, **kwargs):  # as orbax does: the first error ends the loop, reads go on
        loop = asyncio.new_event_loop()
        try:
            loop.run_until_complete(both())
        finally:
            loop.close()

    seen = []
    monkeypatch.setattr(sys, "unraisablehook", lambda args: seen.append(args.exc_value))
    manager = SimpleNamespace(restore=restore, directory=tmp_path)
    like = State(np.zeros((), np.int32), {"x": np.zeros(2)}, ())
    with pytest.raises(UserError, match="damaged"):
        checkpoint.restore(manager, like, 3)
    ts.open(spec).result().read().result()  # by now the other read has come back, too
    time.sleep(0.5)
    assert seen == []
    sys.unraisablehook(SimpleNamespace(exc_value=RuntimeError("another")))
    assert [str(error) for error in seen] == ["another"]


LAST = 120
LONG = (f"--config.steps={LAST}", "--config.eval_every=50")


def stopped_after(tiny_vit, workdir, step, *signals):
    """A run that gets these signals after this step; its end and its output."""
    process = subprocess.Popen(
        command(tiny_vit, workdir, *LONG),
        env=with_devices(1),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )
    file = workdir / "metrics.jsonl"
    while process.poll() is None:
        if file.exists() and file.read_bytes().count(b"\n") >= step:
            break
        time.sleep(0.002)
    for number in signals:
        process.send_signal(number)
        time.sleep(0.001)
    return process.wait(timeout=120), process.stdout.read()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_a_run_saves_and_goes_on_to_the_same_end(tiny_vit, tmp_path, number):
    code, seen = stopped_after(tiny_vit, tmp_path / "stopped", 7, number)
    assert code == 75, seen
    assert f"{number.name}: saving after this step" in seen and "Traceback" not in seen
    step = int(seen.split("stopped: saved after step ")[1].split()[0])
    assert 7 <= step < LAST
    assert rows(tmp_path / "stopped")[-1]["step"] == step
    steps = [int(p.name) for p in (tmp_path / "stopped" / "checkpoints").iterdir()
             if p.name.isdigit()]
    assert max(steps) == step
    run(tiny_vit, tmp_path / "stopped", *LONG)
    run(tiny_vit, tmp_path / "whole", *LONG)
    one, other = (leaves(tmp_path / name, LAST) for name in ("whole", "stopped"))
    assert one.keys() == other.keys()
    for path, value in one.items():
        np.testing.assert_array_equal(value, other[path], err_msg=path)
    for name in ("train/loss", "validation/loss"):
        assert [r.get(name) for r in rows(tmp_path / "whole")] == [
            r.get(name) for r in rows(tmp_path / "stopped")]
    one, other = (json.loads((tmp_path / name / "summary.json").read_text())
                  for name in ("whole", "stopped"))
    assert one["test_best"] == other["test_best"]


@pytest.mark.slow
def test_asked_twice_a_run_ends_at_once(tiny_vit, tmp_path):
    code, seen = stopped_after(tiny_vit, tmp_path, 3, signal.SIGTERM, signal.SIGTERM)
    if code != 75:  # the first was not over before the second came
        assert code == 128 + signal.SIGTERM, seen
