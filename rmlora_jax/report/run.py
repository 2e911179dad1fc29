"""The picture of a run, ``report.png``, from the files in its folder."""

import io
import json
import os
import pathlib
import textwrap
from collections.abc import Mapping
from typing import Any

from rmlora_jax.errors import UserError
from rmlora_jax.files import read_json, write_bytes_atomic
from rmlora_jax.methods import METHODS, readers
from rmlora_jax.report import panels
from rmlora_jax.report.records import METRICS, duration, number, read_intrinsic, read_metrics
from rmlora_jax.report.verdict import series, verdict
from rmlora_jax.tasks.scores import describe, shown

__all__ = ["verdict", "write_report"]

REPORT = "report.png"
TONE = {"Healthy": "#1a7f4b", "Underfitting": "#b7791f", "Too early to tell": "#6b7280"}
ALARM = "#c0322b"  # Overfitting, Oscillation, Diverged
WIDTH, HEIGHT, SHORT = 16.0, 10.0, 5.9  # inches at 100 dots each; SHORT without the lower row


def write_report(workdir: str | os.PathLike) -> pathlib.Path:
    """Draws ``report.png`` from what the run left in ``workdir``, and returns its path.

    Reads ``metrics.jsonl`` and, where present, ``config.json``, ``intrinsic.jsonl`` and
    ``summary.json``; so it can be called while a run goes on. Without intrinsic.jsonl (methods
    ``full`` and ``head``) the lower row, on Delta W, is left out: 1600 x 590 pixels, not
    1600 x 1000.

    Raises:
      UserError: ``workdir`` has no metrics yet, or one of the files cannot be read.
    """
    workdir = pathlib.Path(workdir)
    history = read_metrics(workdir)
    if not history:
        raise UserError(
            f"{workdir} has no {METRICS} with a measurement: nothing to draw.\n"
            "Give the folder of a run, the one that run.py named as its workdir.")
    config, summary = _optional(workdir / "config.json"), _optional(workdir / "summary.json")
    figure = draw(history, config, summary, read_intrinsic(workdir))
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=100, facecolor="white", metadata={"Software": None})
    return write_bytes_atomic(workdir / REPORT, picture.getvalue())


def draw(history, config: Mapping[str, Any], summary: Mapping[str, Any], intrinsic):
    """The matplotlib Figure of `write_report`; draws on the Agg canvas, without pyplot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    grouped = [(record["step"], panels.by_kind(record["modules"])) for record in intrinsic]
    steps = [step for step, kinds in grouped if kinds]
    kinds = [kinds for _, kinds in grouped if kinds]
    height = HEIGHT if kinds else SHORT
    figure = Figure(figsize=(WIDTH, height))
    FigureCanvasAgg(figure)
    _masthead(figure, height, facts_title(config, summary), verdict(history))
    grid = figure.add_gridspec(
        2 if kinds else 1, 3, left=0.05, right=0.975, top=1 - 2.05 / height, bottom=0.62 / height,
        hspace=0.46, wspace=0.2, width_ratios=(1, 1, 0.9))
    values = task(config, summary) == "text_regression"
    panels.loss_panel(figure.add_subplot(grid[0, 0]), history, summary,
                      "squared error" if values else "nats per example")
    panels.metric_panel(figure.add_subplot(grid[0, 1]), history, summary,
                        chosen(history, summary))
    panels.facts_panel(figure.add_subplot(grid[0, 2]), headline(history, summary),
                       facts(history, config, summary))
    if kinds:
        panels.singular_value_panel(figure.add_subplot(grid[1, :2]), steps[-1], kinds[-1])
        panels.effective_rank_panel(figure.add_subplot(grid[1, 2]), steps, kinds)
    return figure


def facts_title(config: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    """``rm_lora on cifar100``."""
    method = summary.get("method") or lookup(config, "method") or "run"
    dataset = summary.get("dataset") or lookup(config, "data.name")
    return f"{method} on {dataset}" if dataset else str(method)


def task(config: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    """The kind of task; runs from before there were several classified images."""
    return summary.get("task") or lookup(config, "task") or "image_classification"


def chosen(history, summary: Mapping[str, Any]) -> str:
    """The metric that picks the best step: the summary's, else the first that was evaluated."""
    evaluated = (key.removeprefix("eval/") for row in history for key in row
                 if key.startswith("eval/") and key != "eval/loss")
    return summary.get("metric") or next(evaluated, "accuracy")


def headline(history, summary: Mapping[str, Any]) -> tuple[str, str] | None:
    """The figure that counts most, and what it is: `chosen` on test, else on validation."""
    key = chosen(history, summary)
    name, value = describe(key)[0].long, (summary.get("eval") or {}).get(key)
    if value is not None:
        return shown(key, value), f"test {name} at the last step"
    measured = panels.finite(*series(history, f"eval/{key}"))
    if measured[0].size:
        step, value = (int(measured[0][-1]), measured[1][-1])
        return shown(key, value), f"validation {name} at step {step:,}"
    return None


def other_figures(last: Mapping[str, float], key: str) -> list[tuple[str, str]]:
    """The metrics of the last step beside ``key`` and the loss, and those of other parts.

    >>> other_figures({"accuracy": 0.84, "loss": 0.4, "accuracy_mismatched": 0.85}, "accuracy")
    [('mismatched', '85.0 % accuracy')]
    """
    rows = []
    for other, value in last.items():
        metric, part = describe(other)
        if other == key or other.startswith("loss") or value is None:
            continue
        text = shown(other, value)
        rows.append((part, f"{text} {metric.short}") if part else (f"test {metric.short}", text))
    return rows


def facts(history, config: Mapping[str, Any], summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and values for the panel of facts; what is not known is left out."""
    method = summary.get("method") or lookup(config, "method")
    model = summary.get("model") or lookup(config, "model.source")
    if model and (os.path.isabs(model) or str(model).startswith((".", "~"))):
        model = pathlib.PurePath(model).name
    rank, alpha = lookup(config, "lora.rank"), lookup(config, "lora.alpha")
    penalty, keep = lookup(config, "rm.penalty"), lookup(config, "rm.keep")
    adapted = method in METHODS and METHODS[method].adapts
    parts = (method in readers("penalty") and penalty is not None and f"penalty {penalty:g}",
             method in readers("keep") and keep is not None and f"keep {keep:g}")
    trained, total = summary.get("trainable_parameters"), summary.get("total_parameters")
    best, last = summary.get("best_eval") or {}, summary.get("eval") or {}
    key, length = chosen(history, summary), lookup(config, "text.max_length")
    of_text = task(config, summary).startswith("text")
    rate, wall = summary.get("examples_per_second"), summary.get("wall_seconds")
    rows = [
        ("best step", best.get(key) is not None and f"{shown(key, best[key])} test" + (
            f" at step {best['step']:,}" if best.get("step") is not None else "")),
        *other_figures(last, key),
        ("test loss", last.get("loss") is not None and number(last["loss"])),
        ("method", method),
        ("adapters", adapted and rank is not None and f"rank {rank}, alpha {alpha:g}"
         if alpha is not None else adapted and rank is not None and f"rank {rank}"),
        ("RM-LoRA", ", ".join(part for part in parts if part)),
        ("model", model),
        ("text", of_text and length is not None and f"at most {length} tokens"),
        ("trained", trained is not None and (
            f"{trained:,}" + (f" ({100 * trained / total:.2f} %)" if total else ""))),
        ("steps", f"{summary.get('steps') or history[-1]['step']:,}"),
        ("speed", rate is not None and f"{rate:,.0f} examples/s"),
        ("time", wall is not None and duration(wall)),
    ]
    return [(name, str(value)) for name, value in rows if value]


def lookup(config: Any, path: str) -> Any:
    """``config["a"]["b"]`` for ``"a.b"``; None where a part is absent."""
    for name in path.split("."):
        if not isinstance(config, Mapping) or name not in config:
            return None
        config = config[name]
    return config


def _masthead(figure, height, title, judgement):
    label, _, rest = judgement.partition(":")
    colour = TONE.get(label, ALARM)
    figure.text(0.05, 1 - 0.30 / height, title, fontsize=20, fontweight="bold", color=panels.INK,
                va="top")
    badge = figure.text(0.05 + 0.006, 1 - 0.98 / height, label, fontsize=12.5, color="white",
                        fontweight="bold", va="center",
                        bbox={"boxstyle": "round,pad=0.4", "fc": colour, "ec": "none"})
    right = badge.get_window_extent(figure.canvas.get_renderer()).x1 / figure.bbox.width
    figure.text(right + 0.014, 1 - 0.98 / height, textwrap.fill(rest.strip(), 135), fontsize=12.5,
                color=panels.INK, va="center", linespacing=1.35)


def _optional(path: pathlib.Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        value = read_json(path)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path} is not JSON: {error}.\nDelete it and start the run again.") from error
    return value if isinstance(value, dict) else {}
