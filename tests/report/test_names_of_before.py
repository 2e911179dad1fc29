"""Files of earlier versions said eval for validation and for test: read by the names of today."""

import json
import shutil
from pathlib import Path

import pytest

from rmlora_jax.report.records import read_metrics, read_summary
from rmlora_jax.report.run import write_report
from rmlora_jax.train import loop

RUN = Path(__file__).parents[1] / "fixtures" / "runs" / "image_finished" / "run"


def test_a_recorded_run_has_todays_names():
    raw = json.loads((RUN / "summary.json").read_text())
    found = read_summary(RUN)
    assert found["test"] == raw["eval"] and found["test_best"] == raw["best_eval"]
    assert found.keys() - {"test", "test_best"} == raw.keys() - {"eval", "best_eval"}
    lines = [json.loads(line) for line in (RUN / "metrics.jsonl").read_text().splitlines()]
    rows = read_metrics(RUN)
    evaluated = [line["step"] for line in lines if "eval/loss" in line]
    assert len(evaluated) >= 2
    assert [row["step"] for row in rows if "validation/loss" in row] == evaluated
    for row, line in zip(rows, lines, strict=True):
        assert list(row.values()) == list(line.values())
        assert not any(key.startswith("eval") for key in row)


def test_a_run_that_went_on_has_both_names(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "eval/loss": null, "nonfinite": {"eval/loss": "nan"}, "train/eval/x": 2.0}\n'
        '{"step": 2, "validation/loss": 0.5}\n')
    first, second = read_metrics(tmp_path)
    assert first == {"step": 1, "validation/loss": pytest.approx(float("nan"), nan_ok=True),
                     "train/eval/x": 2.0}
    assert second == {"step": 2, "validation/loss": 0.5}


def test_report_and_closing_table_show_a_recorded_run(tmp_path):
    folder = shutil.copytree(RUN, tmp_path / "run")
    (folder / "report.png").unlink(missing_ok=True)
    assert write_report(folder).stat().st_size > 10_000
    text = loop.ending(read_summary(folder), folder)
    accuracy = json.loads((RUN / "summary.json").read_text())["eval"]["accuracy"]
    assert f"test, last step        accuracy {accuracy:.4f}" in text
