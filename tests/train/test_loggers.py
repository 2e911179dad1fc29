"""Loggers: each gets the numbers of metrics.jsonl, which is always written."""

import json
import math
import os
import struct
import subprocess
import sys
import types
from pathlib import Path

import pytest
from conftest import tiny_config
from faults.small import config_of, on_one_device, train

from rmlora_jax.errors import UserError
from rmlora_jax.train.config import resolve
from rmlora_jax.train.loggers import LOGGERS, weights_and_biases
from rmlora_jax.train.metrics import MetricWriter

ROOT = Path(__file__).parents[2]
WRITES = """
import math, sys
from rmlora_jax.train.metrics import MetricWriter
start = int(sys.argv[2])
config = {"seed": 3, "lora.rank": 4, "data.test_split": None}
with MetricWriter(sys.argv[1], start_step=start, logger="wandb", config=config) as w:
    w.write(start + 1, {"train/loss": 0.5 / (start + 1), "train/grad_norm": math.nan})
    w.write(start + 2, {"train/loss": 0.25 / (start + 1), "validation/loss": 1.5})
"""


class Fake:
    """What of wandb a run uses; keeps what it was called with."""

    def __init__(self, error=None):
        self.error, self.inits, self.logged, self.finished = error, [], [], 0
        self.errors = types.SimpleNamespace(Error=KeyError)

    def init(self, **given):
        if self.error:
            raise self.error
        self.inits.append(given)
        return self

    def Settings(self, **given):
        return given

    def define_metric(self, name, step_metric=None):
        assert (name, step_metric) in [("step", None), ("*", "step")]

    def log(self, row):
        self.logged.append(row)

    def finish(self):
        self.finished += 1


@pytest.fixture
def fake(monkeypatch):
    fake = Fake()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return fake


def write(folder, start, **options):
    with MetricWriter(folder, start_step=start, logger="wandb", **options) as w:
        w.write(start + 1, {"train/loss": 0.5, "train/grad_norm": math.nan})


def test_a_continued_run_goes_on_under_its_id(fake, tmp_path):
    write(tmp_path / "run", 0, config={"seed": 3})
    write(tmp_path / "run", 1)
    write(tmp_path / "run", 0)  # begins anew
    first, second, third = (given["id"] for given in fake.inits)
    assert first == second != third
    assert json.loads((tmp_path / "run" / "wandb.json").read_text()) == {"id": third}
    given = fake.inits[0]
    assert (given["resume"], given["project"]) == ("allow", "rmlora_jax")
    assert given["config"] == {"seed": 3} and given["dir"] == str(tmp_path / "run")
    # Numbers that are not finite stay in metrics.jsonl.
    assert fake.logged == [{"step": s, "train/loss": 0.5} for s in (1, 2, 1)]
    assert fake.finished == 3


def test_other_processes_open_nothing(fake, tmp_path):
    write(tmp_path / "run", 0, enabled=False)
    assert fake.inits == [] and not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"id": "../other"}'])
def test_a_damaged_id_is_reported(fake, tmp_path, text):
    (tmp_path / "wandb.json").write_text(text)
    with pytest.raises(UserError, match=r"wandb.json has no id .* delete it"):
        write(tmp_path, 1)


def test_what_wandb_refuses_is_said(fake, tmp_path):
    fake.error = KeyError("no API key\nmore")
    with pytest.raises(UserError, match=r"no API key.*\nType wandb login, or set WANDB_MODE"):
        write(tmp_path, 0)


def test_a_missing_package_names_its_extra(tiny_vit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "no_such_logger").mkdir()  # a folder of that name is no package
    missing = LOGGERS["wandb"]._replace(package="no_such_logger")
    monkeypatch.setitem(LOGGERS, "wandb", missing)
    c = tiny_config(tiny_vit)
    c.logger = "wandb"
    words = (r"config.logger='wandb' needs the package no_such_logger; type: "
             r"pip install 'rmlora-jax\[no_such_logger\]'")
    with pytest.raises(UserError, match=words):
        resolve(c, there=True)
    assert resolve(c).logger == "wandb"  # a config can be read anywhere


def test_logger_is_a_choice_and_many_runs_refuse_wandb(tiny_vit):
    c = tiny_config(tiny_vit)
    c.logger = "wandbb"
    with pytest.raises(UserError, match=r"config.logger='wandbb': .*did you mean wandb\?"):
        resolve(c)
    c.logger, c.sweep.seeds = "wandb", 2
    with pytest.raises(UserError, match=r"config.logger='wandb': must be tensorboard or none"):
        resolve(c)


def test_without_a_logger_there_is_metrics_jsonl_alone(tiny_vit, tmp_path, monkeypatch):
    on_one_device(monkeypatch)
    c = config_of(tiny_vit)
    c.steps, c.logger = 2, "none"
    train(c, tmp_path)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    assert not (tmp_path / "tensorboard").exists() and not (tmp_path / "wandb").exists()


# The real package, which the extra `wandb` brings, without a network


def run(folder, start, **env):
    clean = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    return subprocess.run(
        [sys.executable, "-c", WRITES, str(folder), str(start)], cwd=ROOT, capture_output=True,
        env=clean | {"HOME": str(folder.parent)} | env, text=True, timeout=120,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip


def records(file: Path) -> list:
    """The records of an offline run: a log of LevelDB with protocol buffers in it."""
    from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore

    data, at, found, part = file.read_bytes(), 7, [], b""
    while at + 7 <= len(data):
        if 2**15 - at % 2**15 < 7:
            at += 2**15 - at % 2**15
        _, length, kind = struct.unpack_from("<IHB", data, at)
        part += data[at + 7: at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            found.append(Record.FromString(part))
            part = b""
    return found


@pytest.mark.slow
def test_an_offline_run_holds_the_numbers_and_is_resumed(tmp_path):
    pytest.importorskip("wandb")
    folder = tmp_path / "run"
    for start in (0, 2):
        done = run(folder, start, WANDB_MODE="offline")
        assert done.returncode == 0, done.stderr
    files = sorted((folder / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2
    ids, rows = set(), []
    for file in files:
        for record in records(file):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                ids.add(record.run.run_id)
                own = {u.key: json.loads(u.value_json) for u in record.run.config.update}
                assert own["lora.rank"] == 4 and own["data.test_split"] is None
            if kind == "history":
                rows.append({i.key or "/".join(i.nested_key): json.loads(i.value_json)
                             for i in record.history.item})
    assert ids == {weights_and_biases.run_id(folder, 1)}
    shown = [{k: v for k, v in row.items() if not k.startswith("_")} for row in rows]
    assert shown == [
        {"step": 1, "train/loss": 0.5}, {"step": 2, "train/loss": 0.25, "validation/loss": 1.5},
        {"step": 3, "train/loss": 0.5 / 3},
        {"step": 4, "train/loss": 0.25 / 3, "validation/loss": 1.5},
    ]  # fmt: skip


@pytest.mark.slow
def test_without_a_login_the_real_package_is_refused(tmp_path):
    pytest.importorskip("wandb")
    done = run(tmp_path / "run", 0)
    assert done.returncode != 0
    assert "UserError: config.logger='wandb': " in done.stderr
    assert "Type wandb login, or set WANDB_MODE=offline" in done.stderr
