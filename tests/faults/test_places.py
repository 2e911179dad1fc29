"""Devices and places: a dtype, a home, a cache, a disk's clock or a memory that is not as hoped."""

import errno
import pwd
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_devices import with_devices
from faults.small import config_of, on_one_device
from fixtures.text import tiny

from rmlora_jax.config import PLACE, leaves
from rmlora_jax.errors import UserError
from rmlora_jax.models.attention import blaming
from rmlora_jax.parallel import memory
from rmlora_jax.parallel.mesh import all_devices, use_compilation_cache
from rmlora_jax.study import run as study
from rmlora_jax.sweep import train as sweep
from rmlora_jax.tasks.places import without_closed
from rmlora_jax.train import checkpoint, finished, loop, setup, shortage
from rmlora_jax.train.config import RunConfig, resolve
from rmlora_jax.train.metrics import MetricWriter

ROOT = Path(__file__).parents[2]
CACHES = ("compilation_cache", "data.cache", "text.cache")


@pytest.fixture
def config(tiny_vit):
    return config_of(tiny_vit)


# Dtypes


def test_float16_on_a_cpu_is_one_line_and_leaves_no_folder(config, tmp_path, monkeypatch):
    on_one_device(monkeypatch)
    config.model.dtype = "float16"
    with pytest.raises(UserError, match=r"config\.model\.dtype='float16': a cpu does not compute"):
        loop.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()  # so that float32 may begin there


def test_only_a_dtype_is_blamed_on_the_dtype():
    with pytest.raises(ValueError, match="of another kind"), blaming("float32", "x"):
        raise ValueError("of another kind")
    words = r"^x='float16'.*; give float32 or bfloat16$"
    with pytest.raises(UserError, match=words), blaming("float16", "x"):
        raise ValueError("of another kind")


# Homes and caches


def without_home(monkeypatch):
    def nobody(_):
        raise KeyError("no entry")

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", nobody)


def set_caches(config, folder):
    config.compilation_cache = config.data.cache = config.text.cache = config.sft.cache = folder


@pytest.mark.parametrize("where", ["no home", "a home that is a file"])
def test_caches_that_cannot_be_written_are_left_out(config, tmp_path, monkeypatch, capsys, where):
    (tmp_path / "file").touch()
    if where == "no home":
        without_home(monkeypatch)
    else:
        monkeypatch.setenv("HOME", str(tmp_path / "file"))
    default = {path: leaves(RunConfig)[path].default for path in CACHES}
    config.update_from_flattened_dict(default)
    run = resolve(config, there=True)
    assert [run.compilation_cache, run.data.cache, run.text.cache] == [""] * 3  # pyright: ignore
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and all(folder in said for folder in default.values())
    assert without_closed(run) == run and not capsys.readouterr().out
    before = jax.config.jax_compilation_cache_dir
    use_compilation_cache(default["compilation_cache"])
    assert jax.config.jax_compilation_cache_dir == before
    set_caches(config, str(tmp_path / "file" / "cache"))  # a person's own wish is not dropped
    with pytest.raises(UserError, match=r"config\.data\.cache=.*cannot be written"):
        resolve(config, there=True)
    assert not list(tmp_path.glob("*~*"))


PLACES = [path for path, leaf in leaves(RunConfig).items() if leaf.spec.resume == PLACE]


def test_every_path_of_a_config_may_begin_with_the_home(config, tmp_path, monkeypatch):
    assert {*PLACES} == {
        "model.source", "model.adapter", "text.train_file", "text.test_file", "text.predict_file",
        "sft.validation_file", "sft.test_file"}
    monkeypatch.setenv("HOME", str(tmp_path))
    tiny.write_model(tmp_path / "model")
    for name in ("train", "test", "predict"):
        tiny.write_texts(tmp_path / f"{name}.jsonl", 20, 0)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    c = tiny.config_of(Path("~"), 2)
    c.text.test_file, c.text.predict_file = "~/test.jsonl", "~/predict.jsonl"
    c.model.adapter = "~/adapter"
    set_caches(c, "~/cache")
    resolve(c, there=True)
    for path in [*PLACES, "data.data_dir"]:
        other = c.copy_and_resolve_references()
        other.update_from_flattened_dict({path: "~nobody-of-this-name/x"})
        with pytest.raises(UserError, match=rf"config\.{path}='~nobody.*no such home folder"):
            resolve(other, there=True)


def test_workdirs_may_begin_with_the_home(config, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    seen = []

    def opened(workdir, **_):
        seen.append(workdir)
        raise UserError("seen")

    for module in (loop, sweep, study):
        monkeypatch.setattr(module, "opened", opened)
    checked = SimpleNamespace(dry_run=False, at_once=0, shared=False, processes=False)
    monkeypatch.setattr(study, "check_study", lambda _: (checked, {}))
    monkeypatch.setattr(study.plan, "cells", lambda *_: [])
    other = config.copy_and_resolve_references()
    other.sweep.seeds = 2
    for call in (lambda: loop.train(config, Path("~/runs/a")),
                 lambda: sweep.train(other, Path("~/runs/a")),
                 lambda: study.run_study(config, Path("~/runs/a"))):
        with pytest.raises(UserError, match="seen"):
            call()
    assert seen == [tmp_path / "runs" / "a"] * 3
    for call in (finished.export_merged, finished.model_of,
                 lambda path: checkpoint.read_base(path, "", "")):
        with pytest.raises(UserError, match=f"{tmp_path}/runs/a"):
            call(Path("~/runs/a"))
    assert not (tmp_path / "~").exists()
    without_home(monkeypatch)
    with pytest.raises(UserError, match="write the whole path"):
        loop.train(config, Path("~/runs/a"))


@pytest.mark.slow
def test_flags_may_begin_with_the_home(tmp_path):
    (tmp_path / "c.py").write_text(
        "from configs import quickstart\n\n\ndef get_config(width):\n"
        "    c = quickstart.get_config()\n    c.batch_size = int(width)\n    return c\n")
    done = subprocess.run(
        [sys.executable, str(ROOT / "run.py"), "--config=~/c.py:24", "--print_config"],
        env=with_devices(1) | {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert "--config.batch_size=24\n" in done.stdout, done.stderr


# Memory


def exhausted(words):
    return jax.errors.JaxRuntimeError(words)


@pytest.mark.parametrize("error", [
    exhausted("RESOURCE_EXHAUSTED: Out of memory allocating 17179869184 bytes."),
    exhausted("RESOURCE_EXHAUSTED: Error loading program: Ran out of HBM"),
    exhausted("INTERNAL: Failed to launch: CUDA_ERROR_OUT_OF_MEMORY: out of memory"),
    MemoryError(),
    np._core._exceptions._ArrayMemoryError((2**40,), np.dtype("f4")),  # pyright: ignore
    OSError(errno.ENOMEM, "Cannot allocate memory"),
], ids=lambda e: type(e).__name__)  # fmt: skip
def test_out_of_memory_is_two_lines_with_what_to_lower(config, tmp_path, monkeypatch, error):
    on_one_device(monkeypatch)

    def build(*_):
        raise error

    monkeypatch.setattr(setup, "build", build)
    with pytest.raises(UserError) as raised:
        loop.train(config, tmp_path / "run")
    first, advice = str(raised.value).splitlines()
    assert "needs more on each of 1 devices of this machine" in first
    assert "--config.accumulate=2" in advice and "--config.batch_size=8" in advice
    assert not (tmp_path / "run").exists()


def test_the_plan_is_compared_before_anything_is_written(config, monkeypatch):
    monkeypatch.setattr(memory, "available", lambda: 2**30)
    plan = shortage.Plan(resolve(config), all_devices(limit=1))
    plan.check(SimpleNamespace(need=2**30))
    with pytest.raises(UserError, match=r"needs 3\.0 GiB on each .* have 1\.0 GiB\nType --config"):
        plan.check(SimpleNamespace(need=3 * 2**30))


def test_a_workdir_without_a_checkpoint_is_free_again(config, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "data.json").write_text("{}")
    (tmp_path / "checkpoints" / "4").mkdir(parents=True)
    run, devices = resolve(config), all_devices(limit=1)
    with pytest.raises(UserError), shortage.in_two_lines(run, devices, tmp_path):
        raise MemoryError
    assert (tmp_path / "config.json").exists()
    (tmp_path / "checkpoints" / "4").rmdir()
    with pytest.raises(UserError), shortage.in_two_lines(run, devices, tmp_path):
        raise MemoryError
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoints"]
    for error in (OSError(errno.ENOSPC, "full"), exhausted("INTERNAL: bug"), ValueError("x")):
        with pytest.raises(type(error)), shortage.in_two_lines(run, devices, tmp_path):
            raise error


# Ranks and sizes


def test_a_rank_above_the_smaller_side_is_said_before_the_start(config):
    def tree(rank):
        def of(*shape):
            return jnp.zeros(shape)

        layers = {"query": {"lora_a": of(2, 32, rank), "lora_b": of(2, rank, 4, 8)},
                  "fc1": {"lora_a": of(2, 32, rank), "lora_b": of(2, rank, 64)}}
        return {"encoder": layers, "head": {"lora_a": of(32, rank), "lora_b": of(rank, 5)}}

    def notes(rank, frozen):
        return [*setup.size_notes(resolve(config), tree(rank), {"w": jnp.zeros(frozen)})]

    assert notes(4, 10_000) == []
    (one,) = notes(8, 100_000)  # all but the head's five outputs hold 8
    assert "smaller side of 1 of 3 adapted weights" in one
    assert "(head: rank 8, side 5)" in one
    large = notes(40, 10_000)
    assert "smaller side of 3 of 3 adapted weights" in large[0]
    trained = 40 * (2 * (32 + 32) + 2 * (32 + 64) + 32 + 5)
    assert f"({trained:,} parameters) than frozen (10,000)" in large[1]
    config.method = "full"
    assert notes(40, 1) == []


# TensorBoard


def test_event_files_are_in_the_order_of_steps_whatever_the_clock_says(tmp_path, monkeypatch):
    from tensorboardX.proto.event_pb2 import Event

    folder = tmp_path / "tensorboard"
    folder.mkdir()
    # As earlier versions named their files.
    (folder / "events.out.tfevents.1800000000.host.000000001").touch()
    clock = iter([1_800_000_100, 1_700_000_000, 1_700_000_000, 1_800_000_200])
    for start, now in enumerate(clock):
        monkeypatch.setattr(time, "time", lambda now=now: float(now))
        with MetricWriter(tmp_path, start_step=start) as writer:
            writer.write(start + 1, {"train/loss": 1.0})
    steps = []
    for path in sorted(folder.iterdir()):  # as TensorBoard reads them
        data, at = path.read_bytes(), 0
        while at < len(data):
            length = int.from_bytes(data[at : at + 8], "little")
            event = Event.FromString(data[at + 12 : at + 12 + length])
            steps += [event.step] * bool(event.summary.value)
            at += length + 16
    assert steps == [1, 2, 3, 4] and len(list(folder.iterdir())) == 5
