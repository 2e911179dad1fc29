"""``python run.py`` on texts: what it leaves, on any number of devices, and how it refuses."""

import contextlib
import importlib
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fake_devices import with_devices
from fixtures.text.tiny import config_of, write_model, write_texts
from marks import slow

from configs import text_classification
from rmlora_jax.errors import UserError
from rmlora_jax.parallel import mesh
from rmlora_jax.parallel.mesh import all_devices
from rmlora_jax.sweep.grid import check_config
from rmlora_jax.train import evaluate, loop, setup
from rmlora_jax.train.config import default_config, resolve, use_glue

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("text_run")
    write_model(root / "model")
    for name, n in (("train", 240), ("test", 60), ("blind", 7)):
        write_texts(root / f"{name}.jsonl", n, seed=len(name) + n)
    return root


def fields(files):
    return {
        "model.source": str(files / "model"),
        "model.dtype": "float32",
        "optimizer.learning_rate": 1e-2,
        "steps": 40,
        "batch_size": 16,
        "eval_batch_size": 32,
        "eval_every": 20,
        "log_every": 1,
        "text.max_length": 48,
        "text.train_file": str(files / "train.jsonl"),
        "text.test_file": str(files / "test.jsonl"),
        "text.predict_file": str(files / "blind.jsonl"),
        "text.cache": str(files / "cache"),
        "compilation_cache": "",
    }


def run(files, workdir, *overrides, devices=1, check=True, config="configs/text_classification.py"):
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "run.py"),
            f"--config={ROOT}/{config}",
            f"--workdir={workdir}",
            *(f"--config.{name}={value}" for name, value in fields(files).items()),
            *overrides,
        ],
        env=with_devices(devices),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 or not check, done.stderr
    return done


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(files, tmp_path_factory):
    """A run in this process, which has imported everything already; and what it printed."""
    workdir, said = tmp_path_factory.mktemp("runs") / "finished", io.StringIO()
    config = text_classification.get_config()
    config.update_from_flattened_dict(fields(files))
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setattr(loop, "all_devices", lambda name, **_: mesh.all_devices(name, limit=1))
        loop.train(config, workdir)
    return workdir, said.getvalue()


def test_what_a_run_leaves(finished, files):
    workdir, said = finished
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["task"] == "text_classification" and summary["metric"] == "accuracy"
    correct = 60 * summary["test"]["accuracy"]
    assert abs(correct - round(correct)) < 1e-9
    assert summary["test"]["accuracy"] > 0.8  # one word tells; chance is a half
    width, wide, layers, rank = 32, 64, 2, 4
    factors = layers * rank * (4 * 2 * width + 2 * (width + wide))
    assert summary["trainable_parameters"] == factors + width * width + width + 2 * width + 2
    assert len(summary["intrinsic_dimension"]) == 6
    lines = (workdir / "predictions" / "predict.tsv").read_text().splitlines()
    assert lines[0] == "index\tprediction" and len(lines) == 8
    blind = (files / "blind.jsonl").read_text().splitlines()
    truth = [json.loads(line)["label"] for line in blind]
    hits = sum(line.split("\t") == [str(i), str(truth[i])] for i, line in enumerate(lines[1:]))
    assert hits >= 5
    found = rows(workdir)
    assert [row["step"] for row in found] == list(range(1, 41))
    assert {"validation/accuracy", "validation/loss"} <= found[19].keys()
    for words in ("newly initialised", "predictions of step", "test, last step"):
        assert words in said
    assert (workdir / "report.png").stat().st_size > 10_000
    assert list((files / "cache").iterdir())


@pytest.mark.slow
def test_eight_devices_give_the_numbers_of_one(finished, files, tmp_path):
    run(files, tmp_path, devices=8)
    one, eight = rows(finished[0]), rows(tmp_path)
    for name in ("train/loss", "train/penalty"):
        np.testing.assert_allclose(
            [row[name] for row in one[:20]], [row[name] for row in eight[:20]], rtol=1e-4
        )
    assert [r["train/accuracy"] for r in one[:20]] == [r["train/accuracy"] for r in eight[:20]]
    assert one[0]["train/kept_fraction"] == eight[0]["train/kept_fraction"]


@pytest.mark.slow
def test_regression(files, tmp_path):
    run(files, tmp_path, "--config.task=text_regression", "--config.data.label_key=score")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["metric"] == "pearson" and list(summary["test"]) == ["pearson", "spearman",
                                                                          "loss"]
    assert summary["test"]["pearson"] > 0.3
    found = rows(tmp_path)
    assert "train/accuracy" not in found[0] and "validation/pearson" in found[19]
    value = (tmp_path / "predictions" / "predict.tsv").read_text().splitlines()[1].split("\t")[1]
    assert abs(float(value)) < 3


@pytest.fixture
def config(files):
    return config_of(files, steps=4)


def test_every_reported_split_has_its_figures(config):
    devices = all_devices()
    job = setup.build(resolve(config), devices)
    job = job._replace(base=job.base._replace(feed=job.feed._replace(
        tests=("test", "test_mismatched"),
        evaluate=lambda split, plain=job.feed.evaluate: plain(
            {"test_mismatched": "validation"}.get(split, split)),
    )))
    steps = evaluate.Steps(evaluate.Compiled(job.train_step), evaluate.Compiled(job.eval_step))
    (figures,) = evaluate.reported(steps, job.state.trainable, job)
    assert list(figures) == ["accuracy", "loss", "accuracy_mismatched", "loss_mismatched"]
    (outputs,) = evaluate.evaluate(steps, job.state.trainable, job, "validation")
    assert figures["accuracy_mismatched"] == np.mean(outputs.predictions == outputs.labels)


def test_each_length_is_compiled_once_and_timed_apart(config):
    config.eval_batch_size = 8
    devices = all_devices()
    job = setup.build(resolve(config), devices)
    steps = evaluate.Steps(evaluate.Compiled(job.train_step), evaluate.Compiled(job.eval_step))
    evaluate.evaluate(steps, job.state.trainable, job, "validation")
    programs, seconds = len(steps.evaluate.programs), steps.seconds
    assert programs == len({b["input_ids"].shape for b in job.feed.evaluate("validation")}) > 1
    assert seconds > 0 and not steps.train.programs
    evaluate.evaluate(steps, job.state.trainable, job, "validation")
    assert len(steps.evaluate.programs) == programs and steps.seconds == seconds


@pytest.mark.parametrize("name", ["cola", "stsb", "mnli"])
@pytest.mark.parametrize("file", ["deberta", "roberta", "minilm"])
def test_glue_configs(name, file):
    c = importlib.import_module(f"configs.{file}_glue").get_config(name)
    check_config(c)
    assert c.data.name == f"glue/{name}"
    assert c.task == ("text_regression" if name == "stsb" else "text_classification")
    if file != "minilm":  # the paper's settings
        assert (c.lora.rank, c.lora.alpha, c.rm.keep, c.rm.penalty) == (4, 16.0, 2.0, 0.1)
        assert (c.epochs, c.batch_size, c.optimizer.clip) == (5.0, 32, 1.0)
        assert (c.rm.draw, c.rm.coupling, c.text.max_length) == ("exact", "paired", 128)
        assert (c.optimizer.learning_rate, c.optimizer.warmup) == (1e-3, 0.0)


@pytest.mark.parametrize(
    ("overrides", "config", "words"),
    [
        slow(["--config.text.columns=('body',)"], None, ["train.jsonl", "'body'", "'text'"]),
        slow(["--config.text.max_length=100"], None, ["64", "text.max_length"]),
        slow(["--config.model.attention=cudnn"], None, ["model.attention"]),
        slow(["--config.text.metrics=('auc',)"], None, ["text.metrics", "matthews"]),
        slow(["--config.task=text_clasification"], None, ["did you mean text_classification"]),
        ([], "configs/minilm_glue.py:colla", ["colla", "did you mean cola"]),
    ],
)
def test_mistakes_end_in_plain_words(overrides, config, words, files, tmp_path):
    done = run(files, tmp_path / "new", *overrides, check=False,
               config=config or "configs/text_classification.py")
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) <= 3, done.stderr
    for word in words:
        assert word in done.stderr, done.stderr
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("fields", "words"),
    [({"text.columns": ("body",)}, r"train\.jsonl.*'body'.*'text'"),
     ({"text.max_length": 100}, r"text\.max_length.*64|64.*text\.max_length")],
)
def test_texts_that_do_not_fit_are_refused_before_anything_is_written(
    config, fields, words, tmp_path
):
    config.update_from_flattened_dict(fields)
    with pytest.raises(UserError, match=f"(?s){words}"):
        loop.train(config, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_use_glue_refuses_what_is_no_task():
    with pytest.raises(ValueError, match="did you mean rte"):
        use_glue(default_config(), "rtee")
