"""The picture of a run, ``report.png``, from the files in its folder."""

import os
import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rmlora_jax.config import flatten
from rmlora_jax.errors import UserError
from rmlora_jax.files import read_object, write_bytes_atomic
from rmlora_jax.methods import METHODS, readers
from rmlora_jax.report import style
from rmlora_jax.report.confusion import confusion_panels
from rmlora_jax.report.records import (
    METRICS,
    bin_means,
    by_kind,
    duration,
    finite,
    number,
    read_intrinsic,
    read_metrics,
    series,
    smooth,
    speed,
)
from rmlora_jax.report.verdict import first_broken, verdict
from rmlora_jax.tasks import TASKS
from rmlora_jax.tasks.scores import describe, shown
from rmlora_jax.tasks.task import Task

__all__ = ["verdict", "write_report"]

TONE = {"Healthy": "#1a7f4b", "Underfitting": "#b7791f", "Too early to tell": "#6b7280",
        "Cannot tell": "#6b7280"}
ALARM = "#c0322b"  # Overfitting, Oscillation, Diverged
MOST_NAMES = 12  # names of module kinds that fit under the map
LEGEND_ROOM = 54  # characters above the effective ranks; a key takes about five beside its name
WIDTH, HEIGHT, SHORT = 16.0, 10.0, 5.9  # inches at 100 dots each; SHORT without the row on Delta W
ROW, GAP, TALL = 2.98, 1.37, 4.4  # inches: a row, what is between rows, the row of confusions


def write_report(workdir: str | os.PathLike) -> pathlib.Path:
    """Draws ``report.png`` from what the run left in ``workdir``, and returns its path.

    Reads ``metrics.jsonl`` and, where present, ``config.json``, ``intrinsic.jsonl`` and
    ``summary.json``; so it can be called while a run goes on. Without intrinsic.jsonl (methods
    ``full`` and ``head``) the row on Delta W is left out: 1600 x 590 pixels, not 1600 x 1000.
    Where the summary has confusions of classes, these are another row of 577 pixels.

    Raises:
      UserError: ``workdir`` has no metrics yet, or one of the files cannot be read.
    """
    workdir = pathlib.Path(workdir)
    history = read_metrics(workdir)
    if not history:
        raise UserError(
            f"{workdir} has no {METRICS} with a measurement: nothing to draw.\n"
            "Give the folder of a run, which is its --workdir.")
    config, summary = (
        read_object(path) if path.exists() else {}
        for path in (workdir / "config.json", workdir / "summary.json")
    )
    figure = draw(history, config, summary, read_intrinsic(workdir))
    return write_bytes_atomic(workdir / "report.png", style.png(figure))


def draw(history, config: Mapping[str, Any], summary: Mapping[str, Any], intrinsic):
    """The matplotlib Figure of `write_report`; draws on the Agg canvas, without pyplot."""
    grouped = [(record["step"], by_kind(record["modules"])) for record in intrinsic]
    steps = [step for step, kinds in grouped if kinds]
    kinds = [kinds for _, kinds in grouped if kinds]
    confused = summary.get("confusion")
    height = (HEIGHT if kinds else SHORT) + (TALL + GAP if confused else 0)
    figure = style.new_figure(WIDTH, height)
    method = summary.get("method") or config.get("method") or "run"
    dataset = summary.get("dataset") or flatten(config).get("data.name")
    title = f"{method} on {dataset}" if dataset else method
    _masthead(figure, height, title, verdict(history))
    rows = [ROW] + [ROW] * bool(kinds) + [TALL] * bool(confused)
    grid = figure.add_gridspec(
        len(rows), 3, left=0.05, right=0.975, top=1 - 2.05 / height, bottom=0.62 / height,
        hspace=GAP * len(rows) / sum(rows), wspace=0.2, width_ratios=(1, 1, 0.9),
        height_ratios=rows)
    loss_panel(figure.add_subplot(grid[0, 0]), history, summary, task(config, summary).unit)
    metric_panel(figure.add_subplot(grid[0, 1]), history, summary, beside_loss(history, summary))
    facts_panel(figure.add_subplot(grid[0, 2]), headline(history, summary),
                facts(history, config, summary))
    if kinds:
        singular_value_panel(figure.add_subplot(grid[1, :2]), steps[-1], kinds[-1])
        effective_rank_panel(figure.add_subplot(grid[1, 2]), steps, kinds)
    if confused:
        confusion_panels(figure, grid[-1, :], confused)
    return figure


def task(config: Mapping[str, Any], summary: Mapping[str, Any]) -> Task:
    """The task of a run; runs from before there were several classified images."""
    return TASKS[summary.get("task") or config.get("task") or next(iter(TASKS))]


def chosen(history, summary: Mapping[str, Any]) -> str:
    """The metric that picks the best step: the summary's, else the first that was evaluated."""
    return summary.get("metric") or beside_loss(history)


def beside_loss(history, summary: Mapping[str, Any] | None = None) -> str:
    """The metric of the panel beside the loss: `chosen`, or the first evaluated one that is not
    the loss."""
    metric = (summary or {}).get("metric")
    if metric and metric != "loss":
        return metric
    evaluated = (key.removeprefix("eval/") for row in history for key in row
                 if key.startswith("eval/") and key != "eval/loss")
    return next(evaluated, "accuracy")


def headline(history, summary: Mapping[str, Any]) -> tuple[str, str] | None:
    """The figure that counts most, and what it is: `chosen` on test, else on validation."""
    key = chosen(history, summary)
    name, value = describe(key)[0].long, (summary.get("eval") or {}).get(key)
    if value is not None:
        return shown(key, value), f"test {name} at the last step"
    steps, measured = finite(*series(history, f"eval/{key}"))
    if measured.size:
        return shown(key, measured[-1]), f"validation {name} at step {int(steps[-1]):,}"
    return None


def other_figures(last: Mapping[str, float], key: str) -> list[tuple[str, str]]:
    """The metrics of the last step beside ``key`` and the loss, and those of other parts.

    >>> other_figures({"accuracy": 0.84, "loss": 0.4, "accuracy_mismatched": 0.85}, "accuracy")
    [('mismatched', '85.0 % accuracy')]
    """
    rows = []
    for other, value in last.items():
        metric, part = describe(other)
        loss = other.startswith("loss") and (key != "loss" or not part)
        if other == key or loss or value is None:
            continue
        text = shown(other, value)
        rows.append((part, f"{text} {metric.short}") if part else (f"test {metric.short}", text))
    return rows


def facts(history, config: Mapping[str, Any], summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and values for the panel of facts; what is not known is left out."""
    fields = flatten(config)
    method = summary.get("method") or fields.get("method")
    model = summary.get("model") or fields.get("model.source")
    if model and (os.path.isabs(model) or str(model).startswith((".", "~"))):
        model = pathlib.PurePath(model).name
    adapted = method in METHODS and METHODS[method].adapts
    adapters = (_say("rank {}", fields.get("lora.rank")),
                _say("alpha {:g}", fields.get("lora.alpha")))
    parts = [_say(f"{name} {{:g}}", fields.get(f"rm.{name}")) for name in ("penalty", "keep")
             if method in readers(name)]
    trained, total = summary.get("trainable_parameters"), summary.get("total_parameters")
    best, last = summary.get("best_eval") or {}, summary.get("eval") or {}
    key = chosen(history, summary)
    wall = summary.get("wall_seconds")
    rows = [
        ("best step", best.get(key) is not None and
         f"{shown(key, best[key])} test" + _say(" at step {:,}", best.get("step"))),
        *other_figures(last, key),
        ("F1 is of", _say("class {}", summary.get("positive_label"))),
        ("test loss", key != "loss" and last.get("loss") is not None and number(last["loss"])),
        ("method", method),
        ("adapters", adapted and ", ".join(filter(None, adapters))),
        ("RM-LoRA", ", ".join(filter(None, parts))),
        ("model", model),
        *task(config, summary).facts(config).items(),
        ("trained", _say("{:,}", trained)
         + _say(" ({:.2f} %)", 100 * trained / total if trained and total else None)),
        ("steps", f"{summary.get('steps') or history[-1]['step']:,}"),
        ("speed", speed(summary)),
        ("time", wall is not None and duration(wall)),
    ]
    return [(name, str(value)) for name, value in rows if value]


def _say(words: str, value: Any) -> str:
    """``words`` with the value in place of the braces; nothing for None."""
    return "" if value is None else words.format(value)


def loss_panel(ax, history: Sequence[Mapping[str, float]], summary: Mapping[str, Any],
               unit: str = "nats per example") -> None:
    """Training loss (each line faint, smoothed in bold), validation loss, test loss."""
    train, eval_steps, validation = _curves(ax, history, "loss")
    broken = first_broken(history)
    title = "Loss"
    if broken is not None:
        title += f": not finite from step {broken:,} on"
        ax.axvspan(broken, history[-1]["step"], color=ALARM, alpha=0.08, lw=0)
    elif validation.size:
        title += f": validation ended at {validation[-1]:.2f}, lowest {validation.min():.2f}"
    elif train.size:
        title += f": training ended at {bin_means(train, train, 20)[1][-1]:.2f}"
    if validation.size:
        lowest = int(np.argmin(validation))
        ax.plot(eval_steps[lowest], validation[lowest], "o", ms=9, mfc="white", mew=2,
                color=style.VALIDATION, zorder=5, label="lowest")
    test = _test_points(ax, summary, "loss", ("test",))
    top = np.concatenate([smooth(train), validation, test, [1e-3]])
    start = train[0] if train.size else top.max()
    # A spike must not flatten everything else: show up to twice the loss at the start.
    ax.set_ylim(0, 1.06 * min(top.max(), 2 * max(start, *test, 1e-3)))
    style.finish_panel(ax, title, "step", unit, last=history[-1]["step"])


def metric_panel(ax, history: Sequence[Mapping[str, float]], summary: Mapping[str, Any],
                 key: str = "accuracy") -> None:
    """A metric in training where it is measured there, on validation, and twice on test."""
    metric, _ = describe(key)
    train, _, validation = _curves(ax, history, key)
    parts = [f"train {bin_means(train, train, 20)[1][-1]:.3f}"] if train.size else []
    parts += [f"validation {validation[-1]:.3f}"] if validation.size else []
    test = _test_points(ax, summary, key, ("test, last step", "test, best step"))
    values = np.concatenate([train, validation, test, [0.05]])
    top, bottom = values.max(), min(values.min(), 0)
    if bottom < 0:
        ax.axhline(0, color=style.MUTED, lw=1.2)
    ax.set_ylim(1.2 * bottom, 1.02 if 0.7 < top <= 1 else 1.2 * top)
    title = metric.title + (f": {', '.join(parts)}" if parts else "")
    style.finish_panel(ax, title, "step", metric.axis, last=history[-1]["step"])


def singular_value_panel(ax, step: int, kinds: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """Heat map: a row a layer, a block of columns a module kind, within it the singular values.

    Of more than 16 values those are shown that reach 1 % of the largest anywhere.
    """
    blocks = [kind["singular_values"] for kind in kinds.values()]
    top = max(float(np.nanmax(block, initial=0)) for block in blocks)
    deepest, most = max(map(len, blocks)), max(block.shape[1] for block in blocks)
    reach = max(int((block >= 0.01 * top).any(0).sum()) for block in blocks)
    shown, mesh = min(most, max(reach, 16)), None
    for i, block in enumerate(blocks):
        block = block[:, :shown]
        layers, rank = block.shape
        mesh = ax.pcolormesh(i + np.linspace(0.03, 0.97, rank + 1), np.arange(layers + 1) + 0.5,
                             block, cmap="YlGnBu", vmin=0, vmax=max(top, 1e-12), rasterized=True)
    ax.set_xlim(0, len(kinds))
    ax.set_ylim(deepest + 0.5, 0.5)
    names = list(kinds)
    fits = 80 // len(names) if len(names) <= MOST_NAMES else 0  # characters a block is wide
    ax.set_xticks(np.arange(len(names)) + 0.5, [style.shorten(name, fits) for name in names])
    ax.yaxis.get_major_locator().set_params(integer=True)
    if deepest <= 16:
        ax.set_yticks(np.arange(1, deepest + 1))
    bar = ax.figure.colorbar(mesh, ax=ax, pad=0.015, fraction=0.03)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=style.MUTED, labelsize=9.5, length=0)
    title = f"What moved: singular values of \u0394W, layer by layer, at step {step:,}"
    caption = "a block is one kind of module: its only singular value"
    if most > 1:
        count = f"{most}" if shown == most else f"largest {shown} of {most}"
        caption = f"a block is one kind of module: its {count} singular values from left to right"
    style.finish_panel(ax, title, "", "layer", caption=caption)
    for i, label in enumerate(ax.get_xticklabels()):
        label.set(color=style.PALETTE[i % len(style.PALETTE)], fontweight="bold",
                  fontsize=11 if len(names) <= 8 else 9.5)
    ax.spines[["left", "bottom"]].set_visible(False)


def effective_rank_panel(ax, steps: Sequence[int],
                         records: Sequence[Mapping[str, Mapping[str, np.ndarray]]]) -> None:
    """Effective rank of every module kind over time: mean over the layers, and their spread."""
    names = list(records[-1])
    rank = max(k["singular_values"].shape[1] for k in records[-1].values())
    last = []
    for i, name in enumerate(names):
        found = []
        for record in records:
            values = record[name]["effective_rank"] if name in record else np.array([])
            values = values[values >= 1 - 1e-3]  # a Delta W that is exactly 0 has no rank to show
            found.append((values.mean(), values.std()) if values.size else (np.nan, np.nan))
        centre, spread = np.array(found).T
        colour = style.PALETTE[i % len(style.PALETTE)]
        ax.fill_between(steps, centre - spread, np.minimum(centre + spread, rank), color=colour,
                        alpha=0.10, lw=0)
        ax.plot(steps, centre, "-o" if len(steps) <= 25 else "-", color=colour, lw=2, ms=4,
                label=name)
        last.append(centre[-1])
    ax.axhline(rank, color=style.MUTED, lw=1.2, ls=(0, (4, 3)))
    ax.set_ylim(1 - 0.03 * rank, rank + 0.1 * rank)
    ax.annotate(f"rank {rank}: no more is possible", (0.985, rank), xytext=(0, 3),
                xycoords=ax.get_yaxis_transform(), textcoords="offset points", fontsize=9.5,
                color=style.MUTED, ha="right", va="bottom")
    last = np.array(last)[np.isfinite(last)]
    keyed = sum(len(name) + 5 for name in names) <= LEGEND_ROOM
    title = "Effective rank of \u0394W"
    if last.size:
        title += f": mean {last.mean():.1f} of {rank}"
    style.finish_panel(ax, title, "step", "mean over layers; band \u00b1 1 s.d.",
                       legend=keyed, columns=max(len(names), 1), last=steps[-1],
                       caption="" if keyed or len(names) > MOST_NAMES
                       else "colours as of the names on the left")


def facts_panel(ax, headline: tuple[str, str] | None, facts: Sequence[tuple[str, str]]) -> None:
    """A large figure with its caption, then names and values in two columns."""
    ax.set_axis_off()
    y = 1.19  # level with the other panels' titles
    if headline:
        ax.text(0, y, headline[0], fontsize=36, fontweight="bold", color=style.INK, va="top")
        ax.text(0, y - 0.18, headline[1], fontsize=11, color=style.MUTED, va="top")
        y -= 0.315
    gap = min(0.092, y / max(len(facts), 1))
    for name, value in facts:
        ax.text(0, y, name, fontsize=11, color=style.MUTED, va="top")
        ax.text(0.31, y, style.shorten(value, 36), fontsize=11, color=style.INK, va="top")
        y -= gap


def _curves(ax, history, key: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draws both curves; returns training, the steps of validation, validation."""
    steps, train = finite(*series(history, f"train/{key}"))
    eval_steps, validation = finite(*series(history, f"eval/{key}"))
    if not train.size and not validation.size:
        ax.text(0.5, 0.5, "not measured", transform=ax.transAxes, ha="center", color=style.MUTED,
                fontsize=11)
    if train.size:
        ax.plot(steps, train, color=style.TRAIN, lw=0.9, alpha=0.3)
        ax.plot(steps, smooth(train), color=style.TRAIN, lw=2.2, label="train")
    if validation.size:
        ax.plot(eval_steps, validation, "-o" if len(eval_steps) <= 40 else "-", ms=4.5, lw=2.2,
                color=style.VALIDATION, label="validation")
    return train, eval_steps, validation


def _test_points(ax, summary, key, labels):
    last, best = summary.get("eval") or {}, summary.get("best_eval") or {}
    points = [(summary.get("steps"), last.get(key), style.TEST)]
    if best.get("step") != summary.get("steps"):
        points.append((best.get("step"), best.get(key), "white"))
    drawn = []
    for (step, value, fill), label in zip(points, labels, strict=False):
        if step is not None and value is not None:
            ax.plot(step, value, "D", ms=8, color=style.TEST, mfc=fill, mew=1.6, zorder=6,
                    clip_on=False, label=label)
            drawn.append(value)
    return drawn


def _masthead(figure, height, title, judgement):
    label, _, rest = judgement.partition(":")
    colour = TONE.get(label, ALARM)
    figure.text(0.05, 1 - 0.30 / height, title, fontsize=20, fontweight="bold", color=style.INK,
                va="top")
    badge = figure.text(0.05 + 0.006, 1 - 0.98 / height, label, fontsize=12.5, color="white",
                        fontweight="bold", va="center",
                        bbox={"boxstyle": "round,pad=0.4", "fc": colour, "ec": "none"})
    right = badge.get_window_extent(figure.canvas.get_renderer()).x1 / figure.bbox.width
    figure.text(right + 0.014, 1 - 0.98 / height, textwrap.fill(rest.strip(), 135), fontsize=12.5,
                color=style.INK, va="center", linespacing=1.35)
