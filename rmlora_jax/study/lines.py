"""Values over steps: curves of train and test beside each other, and how soon a run gains."""

import statistics
from collections.abc import Sequence

import numpy as np

from rmlora_jax.report import style
from rmlora_jax.study.tables import Group, by_task, distinct, scale, shown, unit, values

CAPTION = "small: one seed.  large: mean; bar: sample standard deviation over seeds."
SHARE = 0.9  # of the final gain
FIELDS = {
    "rm.resample_every": "steps between draws of the mask",
    "rm.start_step": "first masked step",
}
CLASSES = {"cifar10": 10, "cifar100": 100, "digits": 10, "glue/mnli": 3}  # elsewhere 2


def gap_picture(rows: Sequence[dict], along: str = "method"):
    """A row a task: training curves, held-out curves on the same scale, and the gap at the end.

    The metric is that of the task where training measures it too, or else the loss. Held out is
    test where the run followed it, or else the validation split.
    """
    tasks = by_task(rows)
    figure, tested = style.new_figure(15, 3.9 * len(tasks)), False
    axes = figure.subplots(len(tasks), 3, squeeze=False,
                           gridspec_kw={"width_ratios": (1, 1, 0.85)})
    for (left, middle, right), (task, found) in zip(axes, tasks.items(), strict=True):
        names = [group.label for group in found]
        by_loss = any(v is None for g in found for r in g.rows for v in r["curve"]["train"])
        metric = "loss" if by_loss else found[0].rows[0]["metric"]
        factor = 1.0 if by_loss else scale(metric)
        tested = all(v is not None for g in found for r in g.rows for v in r["curve"]["test"])
        split = "test" if tested else "validation"
        keys = ("train_loss", f"{split}_loss") if by_loss else ("train", split)
        tints = [style.colour(name, names) for name in names]
        for i, (group, name, tint) in enumerate(zip(found, names, tints, strict=True)):
            ends = []
            for ax, key in zip((left, middle), keys, strict=True):
                steps, curves = curves_of(group, key, factor)
                mean = np.nanmean(curves, axis=0)
                ax.plot(steps, mean, color=tint, lw=2, label=name)
                if len(curves) > 1:
                    reach = np.nanstd(curves, axis=0, ddof=1)
                    ax.fill_between(steps, mean - reach, mean + reach, color=tint, alpha=0.13, lw=0)
                ends.append(curves[:, -1])
            gaps = (ends[1] - ends[0]) * (1 if by_loss else -1)
            style.strip(right, i, [float(v) for v in gaps if np.isfinite(v)], tint, along="x")
        what = "loss, nats" if by_loss else unit(metric)
        low, high = zip(left.get_ylim(), middle.get_ylim(), strict=True)
        for ax in (left, middle):
            ax.set_ylim(min(low), max(high))
            ax.xaxis.set_major_formatter("{x:,.0f}")
        held = "test" if tested else "held out"
        style.finish(left, f"{task}: train", "step", what)
        style.finish(middle, held, "step")
        words = f"loss, {held} less train, nats" if by_loss else (
            f"{unit(metric).partition(',')[0]}, train less {held}, points")
        style.finish(right, "gap at the end", words, grid="x")
        right.axvline(0, color=style.MUTED, lw=1)
        style.rows(right, names, tints)
    figure.tight_layout(w_pad=2.5, h_pad=2.5)
    followed = "" if tested else "  held out: the part of train that validates."
    style.caption(figure, "line: mean over seeds; band: sample standard deviation.  train: as it "
                  "is optimised, with augmentation and dropout." + followed + "  " + CAPTION)
    return figure


def curves_of(group: Group, key: str, factor: float = 1.0) -> tuple[list[int], np.ndarray]:
    """Steps (T,) and one curve a seed (seeds, T)."""
    steps = group.rows[0]["curve"]["step"]
    curves = [row["curve"][key] for row in group.rows if row["curve"]["step"] == steps]
    return steps, factor * np.array(curves, np.float64)


def frequency_picture(rows: Sequence[dict], along: str = "rm.resample_every"):
    """How often the mask is drawn, and when it starts, against the metric and against the steps to
    90 % of the final gain: a row a task. A field that only some tasks vary is left out."""
    tasks = distinct(rows, "task")
    varied = [{f for row in rows if row["task"] == task for f in row["variant"]} for task in tasks]
    axes_of = [f for f in FIELDS if all(f in fields for fields in varied)]
    if not axes_of:
        return None
    figure = style.new_figure(7.2 * len(axes_of), 3.3 * len(tasks))
    axes = figure.subplots(len(tasks), 2 * len(axes_of), squeeze=False)
    methods = distinct(rows, "method")
    for line, task in zip(axes, tasks, strict=True):
        here = [row for row in rows if row["task"] == task]
        metric = here[0]["metric"]
        whose = f"{task}, {methods[0]}" if len(methods) == 1 else task
        for i, field in enumerate(axes_of):
            left, right = line[2 * i], line[2 * i + 1]
            # The other field at its default: one thing at a time.
            kept = [row for row in here if set(row["variant"]) <= {field}]
            marks = sorted({row["variant"].get(field, "1") for row in kept}, key=float)
            for method in methods:
                tint = style.colour(method, methods)
                runs = [[r for r in kept if r["method"] == method
                         and r["variant"].get(field, "1") == m] for m in marks]
                _series(left, [[scale(metric) * v for v in values(r, "test")] for r in runs], tint)
                soon = [[steps_to_gain(row) for row in r] for r in runs]
                _series(right, [[s for s in steps if s is not None] for steps in soon], tint)
            for ax in (left, right):
                ax.set_xticks(range(len(marks)), [shown(m) for m in marks])
                ax.set_xlim(-0.4, len(marks) - 0.6)
            right.set_ylim(0, 1.08 * right.get_ylim()[1])
            style.finish(left, f"{whose}: at the end", FIELDS[field], f"test {unit(metric)}")
            style.finish(right, "how soon", FIELDS[field],
                         f"steps to {SHARE:.0%} of the final gain")
    if len(methods) > 1:
        style.key(axes[0][-1], methods, "o-", loc="best")
    figure.tight_layout(w_pad=2, h_pad=2.2)
    style.caption(figure, f"gain: validation metric above guessing; reached at the first "
                  f"evaluation with {SHARE:.0%} of the last.  never: one draw for the whole run; "
                  "or no mask at all.  " + CAPTION)
    return figure


def steps_to_gain(row: dict, share: float = SHARE) -> int | None:
    """The first evaluated step whose validation metric has ``share`` of the final gain.

    The gain counts from what guessing gives: 0 for correlations, 1 / classes for accuracy. None
    where a run ends no better than that.

    >>> curve = {"step": [10, 20, 30], "validation": [0.5, 0.88, 0.9]}
    >>> steps_to_gain({"metric": "matthews", "dataset": "glue/cola", "classes": 0, "curve": curve})
    20
    """
    curve, start = row["curve"], guessing(row)
    last = curve["validation"][-1] if curve["validation"] else None
    if last is None or last <= start:
        return None
    for step, value in zip(curve["step"], curve["validation"], strict=True):
        if value is not None and value - start >= share * (last - start):
            return step
    return None


def guessing(row: dict) -> float:
    """The metric of an answer that ignores its input, where all classes are of one size."""
    if row["metric"] != "accuracy":
        return 0.0
    return 1 / (row["classes"] or CLASSES.get(row["dataset"].partition(":")[0], 2))


def _series(ax, columns, tint):
    """A strip of dots for each column, their means joined by a line."""
    means = [(x, statistics.mean(numbers)) for x, numbers in enumerate(columns) if numbers]
    if means:
        ax.plot(*zip(*means, strict=True), "-", color=tint, lw=1.4, alpha=0.6, zorder=2)
    for x, numbers in enumerate(columns):
        style.strip(ax, x, numbers, tint, along="y")
