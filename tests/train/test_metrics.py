"""What a run writes to its folder and shows on the terminal, read back by other means."""

import contextlib
import dataclasses
import doctest
import fcntl
import io
import json
import math
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import textwrap
import types

import jax.numpy as jnp
import numpy as np
import pytest

from rmlora_jax import files
from rmlora_jax.errors import UserError
from rmlora_jax.report.records import read_intrinsic, read_metrics
from rmlora_jax.train import loop, metrics, terminal
from rmlora_jax.train.config import default_config, resolve
from rmlora_jax.train.metrics import MetricWriter, append_intrinsic, drop_after


def strict(text):
    """JSON as a strict parser reads it: NaN and Infinity are errors."""
    def refuse(name):
        raise ValueError(name)

    return json.loads(text, parse_constant=refuse)


def lines(folder, name="metrics.jsonl"):
    return [strict(line) for line in (folder / name).read_text().splitlines()]


def writer(folder, **options):
    options = {"logger": "none"} | options
    return MetricWriter(folder, **options)


def events(folder):
    """(step, tag, value) of every scalar, and the (step, status) of every session mark."""
    from tensorboardX.proto.event_pb2 import Event

    scalars, marks = [], []
    for path in sorted(folder.glob("events.*"), key=lambda p: p.stat().st_mtime_ns):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12: at + 12 + length])
            at += length + 16
            scalars += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
            if event.HasField("session_log"):
                marks.append((event.step, event.session_log.status))
    return scalars, marks


@pytest.mark.parametrize("module", [files, terminal, metrics], ids=lambda m: m.__name__)
def test_examples_in_docstrings(module):
    result = doctest.testmod(module)
    assert result.attempted > 0 and result.failed == 0


# Files


def test_atomic_write_replaces_whole_files_and_leaves_nothing_behind(tmp_path, monkeypatch):
    path = tmp_path / "new" / "a.json"
    files.write_json(path, {"a": 1})
    files.write_json(path, {"a": 2})
    assert strict(path.read_text()) == {"a": 2}

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        files.write_json(path, {"a": 3})
    assert strict(path.read_text()) == {"a": 2}
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


def test_atomic_write_is_flushed_before_it_takes_the_name(tmp_path, monkeypatch):
    calls = []
    real_sync, real_replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("sync"), real_sync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("rename"), real_replace(a, b)))
    files.write_text_atomic(tmp_path / "a", "text")
    assert calls[:2] == ["sync", "rename"]


def test_new_files_have_the_usual_rights(tmp_path):
    files.write_text_atomic(tmp_path / "ours", "a")
    (tmp_path / "usual").write_text("a")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_plain_knows_numpy_jax_and_bfloat16():
    value = {
        "f32": np.float32(0.1), "bf16": jnp.asarray(1 / 3, jnp.bfloat16), "int": np.int64(7),
        "bool": np.bool_(True), "array": jnp.arange(4.0).reshape(2, 2), "inf": math.inf,
        "f64": np.float64(1 / 3),
    }
    text = json.dumps(files.plain(value), allow_nan=False)
    assert strict(text) == {"f32": 0.1, "bf16": 0.33398438, "int": 7, "bool": True,
                            "array": [[0, 1], [2, 3]], "inf": None, "f64": 1 / 3}


def test_float32_survives_bit_for_bit():
    values = np.random.default_rng(0).standard_normal(500).astype(np.float32) * np.float32(1e-3)
    assert np.array_equal(np.float32(files.plain(values)), values)


def test_write_json_names_what_it_cannot_write(tmp_path):
    with pytest.raises(TypeError, match="object"):
        files.write_json(tmp_path / "a.json", {"a": object()})


# metrics.jsonl


def test_one_strict_object_a_line_with_step_first(tmp_path):
    with writer(tmp_path) as w:
        w.write(20, {"train/loss": np.float32(0.1), "learning_rate": jnp.float32(1e-3)})
        w.write(np.int64(40), {"train/loss": math.nan, "train/penalty": -math.inf, "n": 3})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text.endswith("\n") and all(s.startswith('{"step": ') for s in text.splitlines())
    assert lines(tmp_path) == [
        {"step": 20, "train/loss": 0.1, "learning_rate": 0.001},
        {"step": 40, "train/loss": None, "train/penalty": None, "n": 3,
         "nonfinite": {"train/loss": "nan", "train/penalty": "-inf"}},
    ]
    second = read_metrics(tmp_path)[1]
    assert math.isnan(second["train/loss"]) and second["train/penalty"] == -math.inf
    assert "nonfinite" not in second


def test_a_line_is_readable_before_the_run_ends(tmp_path):
    w = writer(tmp_path)
    w.write(1, {"train/loss": 2.0})
    assert read_metrics(tmp_path) == [{"step": 1, "train/loss": 2.0}]
    w.close()
    w.close()


def test_steps_must_increase_and_metrics_be_scalars(tmp_path):
    with writer(tmp_path, start_step=0) as w:
        w.write(0, {"validation/loss": 1.0})
        w.write(5, {"train/loss": 1.0})
        with pytest.raises(ValueError, match=r"step 5 after those of step 5.*one call"):
            w.write(5, {"validation/loss": 1.0})
        with pytest.raises(ValueError, match=r"'grad' has shape \(3,\)"):
            w.write(6, {"grad": np.ones(3)})
    with writer(tmp_path, start_step=5) as w, pytest.raises(ValueError, match="after those of"):
        w.write(5, {"train/loss": 1.0})
    assert [row["step"] for row in lines(tmp_path)] == [0, 5]


@pytest.mark.parametrize(
    "torn", ["", '{"step": 50, "train/lo', '{"step"', "\0\0\0", '{"step": 50}'])
def test_continuing_drops_later_steps_and_a_torn_line(tmp_path, torn):
    with writer(tmp_path) as w:
        for step in (10, 20, 30, 40):
            w.write(step, {"train/loss": 1 / step})
            w.intrinsic(step, {"m": {"effective_rank": np.float32(step)}})
    for name in ("metrics.jsonl", "intrinsic.jsonl"):
        with open(tmp_path / name, "a") as file:
            file.write(torn)
    with writer(tmp_path, start_step=20) as w:
        for step in (30, 40, 50):
            w.write(step, {"train/loss": 2 / step})
            w.intrinsic(step, {"m": {"effective_rank": np.float32(-step)}})
    expected = [(10, 1 / 10), (20, 1 / 20), (30, 2 / 30), (40, 2 / 40), (50, 2 / 50)]
    assert [(r["step"], r["train/loss"]) for r in lines(tmp_path)] == expected
    ranks = [r["modules"]["m"]["effective_rank"] for r in lines(tmp_path, "intrinsic.jsonl")]
    assert ranks == [10, 20, -30, -40, -50]
    assert not list(tmp_path.glob(".*"))


def test_starting_at_step_0_begins_anew(tmp_path):
    for value in (1.0, 2.0):
        with writer(tmp_path) as w:
            w.write(0, {"validation/loss": value})
    assert lines(tmp_path) == [{"step": 0, "validation/loss": 2.0}]


def test_last_line_without_newline_is_whole_if_it_parses(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    drop_after(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_file_in_order_is_not_rewritten(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": 0.1}\n{"step": 2, "a": null}\n')
    before = path.stat().st_ino
    drop_after(path, 2)
    assert path.stat().st_ino == before
    drop_after(path, 1)
    assert path.stat().st_ino != before and path.read_text() == '{"step": 1, "a": 0.1}\n'


@pytest.mark.parametrize("bad", ["not json", '{"loss": 1}', "[1]", '"text"', '{"step": null}'])
def test_a_foreign_line_is_named(tmp_path, bad):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{bad}\n{{"step": 3}}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2 .*\n.*--workdir"):
        read_metrics(tmp_path)


def test_missing_files_are_empty(tmp_path):
    assert read_metrics(tmp_path) == [] and read_intrinsic(tmp_path) == []
    drop_after(tmp_path / "metrics.jsonl", 3)
    assert not list(tmp_path.iterdir())


def test_killed_process_leaves_every_written_line(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent("""
        import os, sys
        from rmlora_jax.train.metrics import MetricWriter
        w = MetricWriter(sys.argv[1])
        for step in range(1, 8):
            w.write(step, {"train/loss": 1 / step})
        open(sys.argv[1] + "/metrics.jsonl", "a").write('{"step": 8, "trai')
        print("written", flush=True)
        sys.stdin.read()
    """), str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with child:
        assert child.stdout.readline() == "written\n"
        os.kill(child.pid, signal.SIGKILL)
    assert [row["step"] for row in read_metrics(tmp_path)] == list(range(1, 8))
    with writer(tmp_path, start_step=7) as w:
        w.write(8, {"train/loss": 0.0})
    assert [row["step"] for row in lines(tmp_path)] == list(range(1, 9))


def test_other_processes_write_nothing(tmp_path):
    folder = tmp_path / "run"
    with writer(folder, enabled=False, logger="tensorboard") as w:
        w.write(1, {"train/loss": 1.0})
        w.intrinsic(1, {})
    assert not folder.exists()


# intrinsic.jsonl


def test_intrinsic_round_trip(tmp_path):
    values = np.random.default_rng(0).random((12, 4)).astype(np.float32)
    ranks = np.array([1.5, np.nan, *[2.0] * 10], np.float32)
    append_intrinsic(tmp_path, 7, {"layers/query": {"singular_values": values,
                                                    "effective_rank": jnp.asarray(ranks)}})
    assert lines(tmp_path, "intrinsic.jsonl")[0]["step"] == 7
    (record,) = read_intrinsic(tmp_path)
    back = record["modules"]["layers/query"]
    assert record["step"] == 7
    assert np.array_equal(np.float32(back["singular_values"]), values)
    assert np.array_equal(np.float32(back["effective_rank"]), ranks, equal_nan=True)
    assert back["singular_values"].shape == (12, 4) and back["effective_rank"].dtype == np.float64


# TensorBoard


def test_events_hold_the_metrics_and_a_continuation_purges_later_ones(tmp_path):
    nan = {"train/loss": math.nan, "learning_rate": 0.25}
    with writer(tmp_path, logger="tensorboard") as w:
        w.write(10, {"train/loss": 0.5})
        w.write(20, nan)
        w.intrinsic(20, {"q": {"effective_rank": np.array([1.0, 2.0, np.nan])}})
    scalars, marks = events(tmp_path / "tensorboard")
    assert scalars == [(10, "train/loss", 0.5), (20, "learning_rate", 0.25),
                       (20, "effective_rank/q", 1.5)]
    assert marks == []
    with writer(tmp_path, logger="tensorboard", start_step=10) as w:
        w.write(20, {"train/loss": 0.125})
    scalars, marks = events(tmp_path / "tensorboard")
    assert scalars[-1] == (20, "train/loss", 0.125)
    assert marks == [(11, 1)]  # SessionLog.START: what lies at step 11 or later is hidden


# Terminal


def test_plain_lines_every_few_seconds_and_at_both_ends():
    now, stream = [100.0], io.StringIO()
    progress = terminal.Progress(100, stream=stream, interval=5, clock=lambda: now[0])
    shown = {"train/loss": 0.5, "train/accuracy": 0.25, "examples_per_second": 1234.5}
    for step in range(1, 101):
        progress.update(step, shown if step > 1 else {})
        progress.update(step, shown)
        now[0] += 0.5
    progress.close()
    printed = stream.getvalue().splitlines()
    assert [line.split()[1] for line in printed] == [f"{s}/100" for s in [*range(1, 100, 10), 100]]
    assert printed[0] == "step 1/100"
    assert printed[1] == (
        "step 11/100  train loss 0.5000  train accuracy 0.2500  1,234 examples/s  ETA 0:44")
    assert printed[-1].endswith("ETA 0.0 s")


def test_eta_of_a_continued_run_counts_its_own_steps_only():
    now, stream = [0.0], io.StringIO()
    progress = terminal.Progress(1000, stream=stream, interval=0, clock=lambda: now[0])
    progress.update(900, {})
    now[0] = 20.0
    progress.update(910, {})
    assert stream.getvalue().splitlines()[-1] == "step 910/1000  ETA 3:00"


@pytest.mark.parametrize("rows", [40, 0], ids=["terminal", "terminal without a size"])
def test_bar_on_a_terminal(rows):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, rows * 3, 0, 0))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TQDM_")}
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent("""
        from rmlora_jax.train.terminal import Progress
        progress = Progress(50)
        progress.update(10, {"train/loss": 0.5})
        progress.print("step 10: validation accuracy 0.9")
        progress.update(20, {"train/loss": 0.5})
        progress.update(50, {"train/loss": 0.125, "examples_per_second": 99.0})
        progress.close()
    """)], stdout=theirs, env=environment)
    os.close(theirs)
    text = b""
    with child, contextlib.suppress(OSError):  # a terminal whose other end is closed: EIO
        while piece := os.read(ours, 4096):
            text += piece
    os.close(ours)
    shown = [piece for piece in re.split(r"[\r\n]+", text.decode()) if piece.strip()]
    assert "step 10: validation accuracy 0.9" in shown
    if rows:
        assert shown[-1].startswith("train loss 0.1250  99 examples/s |")
        assert "| step 50/50  ETA" in shown[-1]
        assert len(shown[-1]) <= 3 * rows
    else:
        assert shown[-1] == "step 50/50  train loss 0.1250  99 examples/s  ETA 0.0 s"


def test_header_counts_devices_and_names_what_is_trained(tmp_path, monkeypatch):
    kinds = [types.SimpleNamespace(device_kind="TPU v5e", process_index=i // 4) for i in range(8)]
    monkeypatch.setattr(loop.jax, "devices", lambda: kinds)
    config = dataclasses.replace(resolve(default_config()), method="lora")
    base = types.SimpleNamespace(
        feed=types.SimpleNamespace(sizes={"train": 45_000, "test": 10_000}), steps=5000,
        trainable_parameters=740_452, total_parameters=86_612_836, config=config,
        problem=types.SimpleNamespace(notes=("newly initialised: head",)),
        devices=types.SimpleNamespace(mesh=types.SimpleNamespace(shape={"data": 4, "model": 2})))
    text = loop.header(base, tmp_path, start=500)
    assert text.splitlines() == [
        "rmlora_jax",
        "  devices     8 x TPU v5e of 2 processes",
        "  mesh        data 4, model 2",
        "  model       google/vit-base-patch16-224-in21k",
        "  method      lora",
        "  parameters  740,452 trained of 86,612,836 (0.85 %)",
        "  data        cifar100: train 45,000, test 10,000",
        "  steps       5,000, continuing after step 500",
        f"  workdir     {tmp_path}",
        "newly initialised: head",
    ]


def test_closing_table_of_a_summary(tmp_path):
    summary = {
        "test": {"matthews": 0.4123, "accuracy": 0.98611, "loss": 0.05},
        "test_best": {"step": 1200, "accuracy": 0.99, "loss": 0.04},
        "trainable_parameters": 10, "total_parameters": 1000, "examples_per_second": 812.3,
        "compile_seconds": 8.04, "wall_seconds": 3671.2,
    }
    text = terminal.closing(summary, tmp_path, "Healthy: all is well.")
    for part in ("Matthews 0.4123, accuracy 0.9861, loss 0.0500",
                 "accuracy 0.9900, loss 0.0400 (step 1,200)",
                 "10 trained of 1,000 (1.00 %)", "812 examples/s",
                 "1:01:11, of which 8.0 s compilation", "Healthy: all is well."):
        assert part in text
    assert "report" not in text
    (tmp_path / "report.png").touch()
    assert str(tmp_path / "report.png") in terminal.closing({}, tmp_path, "")
    summary["test_best"] = {"accuracy": 0.99, "step": 1200}
    assert "accuracy 0.9900, loss - (step 1,200)" in terminal.closing(summary, tmp_path, "")
    text = terminal.closing(summary | {"examples_per_second": None}, tmp_path, "")
    assert "examples/s" not in text


@pytest.mark.parametrize(("seconds", "text"), [
    (0, "0.0 s"), (9.96, "0:10"), (59.7, "1:00"), (3599.6, "1:00:00"), (math.inf, "?")])
def test_duration_at_the_edges(seconds, text):
    assert terminal.duration(seconds) == text


def test_import_brings_neither_tensorboard_nor_matplotlib():
    code = ("import sys, rmlora_jax.train.metrics, rmlora_jax.report.run; "
            "print([m for m in ('tensorboardX', 'matplotlib', 'tqdm') if m in sys.modules])")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
