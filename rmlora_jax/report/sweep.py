"""The table and the picture of a sweep, ``sweep.md`` and ``sweep.png``, from its runs' folders."""

import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from rmlora_jax.files import write_bytes_atomic, write_text_atomic
from rmlora_jax.report import style
from rmlora_jax.report.records import (
    bin_means,
    duration,
    effective_ranks,
    finite,
    read_metrics,
    read_summary,
    series,
    smooth,
)
from rmlora_jax.tasks.scores import describe, higher_is_better, shown

WIDTH = 16.0  # inches at 100 dots each
NAMED = 24  # settings whose names are written large
MOST = 40  # characters of such a name
BOLD = "; bold: mean of the seeds"


class Finished(NamedTuple):
    """A run of the sweep, read from its folder."""

    seed: str
    setting: dict[str, str]  # what else is swept, in the words of the folder's name
    history: list[dict[str, float]]
    summary: dict[str, Any]

    @property
    def label(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.setting.items())


def write_sweep_report(workdir: pathlib.Path, summary: dict[str, Any]) -> None:
    """Writes ``sweep.md`` and ``sweep.png`` of the runs that ``summary`` names."""
    runs = []
    for name in summary["runs"]:  # such as seed=3,penalty=0.1
        setting = dict(part.split("=", 1) for part in name.split(","))
        own = read_summary(workdir / name)
        runs.append(Finished(setting.pop("seed"), setting, read_metrics(workdir / name), own))
    write_text_atomic(workdir / "sweep.md", table(runs, summary))
    write_bytes_atomic(workdir / "sweep.png", style.png(draw(runs, summary["metric"])))


def table(runs: Sequence[Finished], summary: dict[str, Any]) -> str:
    """Markdown: a row for each run, and of several seeds one for each setting."""
    metric, first = summary["metric"], runs[0].summary
    named, swept = describe(metric)[0], list(runs[0].setting)
    name = named.long
    head = ["seed", *swept, f"{name}, last", f"{name}, best", "best step", "loss", "train loss",
            "effective rank"]
    rows = [
        [
            run.seed,
            *run.setting.values(),
            shown(metric, figure(run, "test", metric)),
            shown(metric, figure(run, "test_best", metric)),
            f"{run.summary['test_best']['step']:,}",
            f"{figure(run, 'test', 'loss'):.3f}",
            f"{train_loss(run):.3f}",
            f"{np.nanmean(ranks):.2f}" if (ranks := effective_ranks(run.summary)).size else "-",
        ]
        for run in runs
    ]
    text = [
        f"# {len(runs)} runs of {first['method']} on {first['dataset']}, {first['steps']:,} steps",
        "",
        f"{named.title} and loss are those of the test split at the last step; best "
        "is its value at the step that is best on validation. Train loss is the mean of the "
        "last twentieth of the steps, effective rank that of \u0394W over all layers.",
        "",
        style.markdown_table([head, *rows], 0, aligned=True),
    ]
    groups = by_setting(runs)
    if len(groups) < len(runs):
        head = [*swept, "seeds", f"{name}, last", f"{name}, best", "loss"]
        rows = [
            [
                *group[0].setting.values(),
                str(len(group)),
                *(spread([figure(run, when, metric) for run in group], metric)
                  for when in ("test", "test_best")),
                spread([figure(run, "test", "loss") for run in group], "loss"),
            ]
            for group in groups
        ]
        text += ["", "Mean and standard deviation over seeds:", "",
                 style.markdown_table([head, *rows], 0, aligned=True)]
    took = duration(summary["wall_seconds"])
    return "\n".join([*text, "", f"Time: {took}, of which "
                      f"{duration(summary['compile_seconds'])} compilation.", ""])


def figure(run: Finished, when: str, metric: str) -> float:
    """A figure on test; nan where it is not finite."""
    value = run.summary[when][metric]
    return np.nan if value is None else value


def train_loss(run: Finished) -> float:
    """The last level of the training loss, as in the verdict of a run."""
    steps, loss = series(run.history, "train/loss")
    return bin_means(steps, loss, 20)[1][-1] if loss.size else np.nan


def spread(values: Sequence[float], metric: str) -> str:
    """``74.6 % +- 0.3``: mean and standard deviation (of the sample)."""
    deviation = np.std(values, ddof=1) if len(values) > 1 else 0.0
    text = shown(metric, float(np.mean(values)))
    return f"{text} \u00b1 " + (f"{100 * deviation:.1f}" if "%" in text else f"{deviation:.3f}")


def by_setting(runs: Sequence[Finished]) -> list[list[Finished]]:
    """The runs in groups that differ by their seeds alone."""
    groups = {}
    for run in runs:
        groups.setdefault(run.label, []).append(run)
    return list(groups.values())


def draw(runs: Sequence[Finished], metric: str):
    """The matplotlib Figure: losses, the metric on validation, and each setting's test results."""
    groups = by_setting(runs)
    labels = [group[0].label for group in groups]
    if len(groups) == 1:  # seeds alone: each has its colour
        groups = [[run] for run in runs]
        labels = [f"seed {run.seed}" for run in runs]
    colours = palette(len(groups))
    height = 6.4 if len(groups) <= 16 else min(6.4 + 0.2 * (len(groups) - 16), 14.0)
    figure = style.new_figure(WIDTH, height)
    first = runs[0].summary
    figure.text(0.05, 1 - 0.30 / height, f"{len(runs)} runs of {first['method']} on "
                f"{first['dataset']}", fontsize=20, fontweight="bold", color=style.INK, va="top")
    figure.text(0.05, 1 - 0.78 / height, best_in_words(groups, labels, metric), fontsize=12.5,
                color=style.INK, va="top")
    bottom, tall = 0.62 / height, 1 - 2.37 / height
    names = 0.0058 * min(max(map(len, labels)), MOST)  # as wide as the names of the settings
    wide = (0.98 - 0.05 - 0.045 - 0.035 - names) / 2.75
    left, middle = 0.05, 0.05 + wide + 0.045
    right = middle + wide + 0.035 + names
    loss_panel(figure.add_axes((left, bottom, wide, tall)), groups, colours)
    metric_panel(figure.add_axes((middle, bottom, wide, tall)), groups, colours, metric)
    results_panel(figure.add_axes((right, bottom, 0.98 - right, tall)), groups, colours, labels,
                  metric)
    return figure


def palette(count: int) -> list:
    """Colours that tell few settings apart, or a scale for many."""
    if count <= len(style.PALETTE):
        first, second, third, *rest = style.PALETTE
        return [style.TRAIN, style.VALIDATION, third, second, first, *rest][:count]
    from matplotlib import colormaps

    return [colormaps["turbo"](x) for x in np.linspace(0.05, 0.95, count)]


def best_in_words(groups, labels, metric: str) -> str:
    means = [np.mean([figure(run, "test_best", metric) for run in g]) for g in groups]
    signed = np.array(means) * (1 if higher_is_better(metric) else -1)
    if not np.isfinite(signed).any():
        return "No run has a finite result."
    at = int(np.nanargmax(signed))
    over = f", mean of {len(groups[at])} seeds" if len(groups[at]) > 1 else ""
    return (f"Best test {describe(metric)[0].long} at the best validation step: "
            f"{shown(metric, float(means[at]))} with {labels[at]}{over}")


def loss_panel(ax, groups, colours) -> None:
    """Validation loss of every run, bold for the mean of several; training loss faint."""
    tops, last = [1e-3], groups[0][0].history[-1]["step"]
    for group, colour in zip(groups, colours, strict=True):
        for run in group:
            steps, train = finite(*series(run.history, "train/loss"))
            ax.plot(steps, smooth(train), color=colour, lw=1.0, alpha=0.25)
            _, validation = finite(*series(run.history, "validation/loss"))
            start = max(train[:1].max(initial=0), validation[:1].max(initial=0))
            reached = max(smooth(train).max(initial=0), validation.max(initial=0))
            tops.append(min(reached, 2 * start))  # a run that diverges must not flatten the others
        curves(ax, group, colour, "validation/loss")
    ax.set_ylim(0, 1.06 * max(tops))
    several = max(map(len, groups)) > 1
    style.finish_panel(ax, "Loss", "step", "loss", last=last,
                       caption="strong: validation, faint: train" + BOLD * several)


def metric_panel(ax, groups, colours, metric: str) -> None:
    """The metric that picks the best step, on validation, of every run."""
    for group, colour in zip(groups, colours, strict=True):
        curves(ax, group, colour, f"validation/{metric}")
    named, last = describe(metric)[0], groups[0][0].history[-1]["step"]
    several = max(map(len, groups)) > 1
    style.finish_panel(ax, f"{named.title} on validation", "step", named.axis, last=last,
                       caption="coloured as on the right" + BOLD * several)


def curves(ax, group, colour, key: str) -> None:
    """One line a run; where there are several, thin ones and their mean."""
    found = [series(run.history, key) for run in group]
    alone = len(group) == 1
    for steps, values in found:
        ax.plot(*finite(steps, values), color=colour, lw=2.0 if alone else 0.9,
                alpha=0.9 if alone else 0.55)
    if not alone:
        mean = np.mean([values for _, values in found], axis=0)
        ax.plot(*finite(found[0][0], mean), color=colour, lw=2.6)


def results_panel(ax, groups, colours, labels, metric: str) -> None:
    """Test results of each setting: a dot a run at its best step, a bar for the mean of several."""
    for y, (group, colour) in enumerate(zip(groups, colours, strict=True)):
        found = np.array([figure(run, "test_best", metric) for run in group])
        if len(group) > 1:
            ax.plot([found.min(), found.max()], [y, y], color=colour, lw=7, alpha=0.18,
                    solid_capstyle="round")
            ax.plot([found.mean()] * 2, [y - 0.3, y + 0.3], color=colour, lw=2.4)
        ax.plot(found, [y] * len(found), "o", color=colour, ms=7, mec="white", mew=1.0, zorder=3)
    named, several = describe(metric)[0], max(map(len, groups)) > 1
    style.finish_panel(ax, f"Test {named.long}", named.axis, "", grid="x",
                       caption="at the best step" + "; bar: mean" * several)
    style.rows(ax, [style.shorten(label, MOST) for label in labels], colours,
               10.5 if len(labels) <= NAMED else 8)
    ax.set_ylim(len(groups) - 0.4, -0.6)
