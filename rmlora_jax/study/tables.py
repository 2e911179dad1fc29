"""From rows to ``table.md`` and ``table.csv``: means and deviations over seeds."""

import csv
import io
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from rmlora_jax.report.style import markdown_table
from rmlora_jax.study.plan import CHOOSE, FINAL
from rmlora_jax.tasks.scores import describe, higher_is_better

TOLERANCE = 0.02  # by which methods with factors may differ in the parameters they end with
PARAMETERS = ("factor_parameters", "head_parameters")
NEVER = 10**8  # steps between draws, or before the first, that no run reaches

Row = Mapping[str, Any]


class Group(NamedTuple):
    """Runs that differ in their seed only."""

    task: str
    method: str
    varied: tuple[tuple[str, Any], ...]  # name -> value of what the study compares beside these
    rows: tuple[Row, ...]

    @property
    def rate(self) -> float | None:
        return self.rows[0]["settings"].get("learning_rate")

    def scaled(self, name: str) -> list[float]:
        """The numbers under ``name``, in the unit of the metric."""
        return [scale(self.rows[0]["metric"]) * v for v in values(self.rows, name)]

    @property
    def label(self) -> str:
        """The method and what else the study varies: ``rm_lora keep 0.5``."""
        return " ".join([self.method, *(f"{short(n)} {shown(v)}" for n, v in self.varied)])


def groups(rows: Iterable[Row], stage: str = FINAL) -> list[Group]:
    """The rows of a stage, gathered, in the order in which each group first occurs.

    For the choice of the rate every rate is a group; of the reported runs a method has one rate.
    """
    found = {}
    for row in rows:
        if row["stage"] == stage:
            found.setdefault((row["task"], row["method"], varied(row)), []).append(row)
    return [Group(*key, rows=tuple(members)) for key, members in found.items()]


def varied(row: Row) -> tuple[tuple[str, Any], ...]:
    """The values of a row that the study compares, its task and method left out."""
    settings = {k: v for k, v in row["settings"].items()
                if row["stage"] == CHOOSE or k != "learning_rate"}
    return tuple({**row["variant"], **settings}.items())


def by_task(rows: Iterable[Row]) -> dict[str, list[Group]]:
    """The groups of the reported runs of each task."""
    found = {}
    for group in groups(rows):
        found.setdefault(group.task, []).append(group)
    return found


def varied_names(rows: Iterable[Row]) -> list[str]:
    """The names of what the study compares, each once."""
    return list(dict.fromkeys(name for group in groups(rows) for name, _ in group.varied))


def distinct(rows: Iterable[Row], name: str) -> list:
    """The values under ``name``, each once."""
    return list(dict.fromkeys(row[name] for row in rows))


def values(rows: Iterable[Row], name: str) -> list[float]:
    """The finite numbers under ``name``."""
    found = (row.get(name) for row in rows)
    return [v for v in found if v is not None and math.isfinite(v)]


def mean(numbers: Sequence[float]) -> float | None:
    return statistics.mean(numbers) if numbers else None


def deviation(numbers: Sequence[float]) -> float | None:
    """The sample standard deviation; None of fewer than two."""
    return statistics.stdev(numbers) if len(numbers) > 1 else None


def scale(metric: str) -> float:
    """What a metric is multiplied by to be read: 100, but for errors."""
    return 100.0 if higher_is_better(metric) else 1.0


def unit(metric: str, name: str = "long") -> str:
    """The metric with its unit, by one of its names in `rmlora_jax.tasks.scores.Metric`.

    >>> unit("accuracy"), unit("matthews"), unit("matthews", "short")
    ('accuracy, %', 'Matthews correlation x 100', 'Matthews x 100')
    """
    named = getattr(describe(metric)[0], name)
    if scale(metric) == 1:
        return named
    return f"{named}, %" if metric.startswith("accuracy") else f"{named} x 100"


def parameters(rows: Sequence[Row]) -> tuple[int, int]:
    """What the runs ended with, a mean: without the head, and with it."""
    factors, head = (round(statistics.mean(row[name] for row in rows)) for name in PARAMETERS)
    return factors, factors + head


def unequal(found: Sequence[Group]) -> list[str]:
    """A sentence if methods with factors end with more than 2 % more parameters than the smallest
    of them, without the head."""
    counts = {}
    for group in found:
        count, _ = parameters(group.rows)
        if count and values(group.rows, "effective_rank"):
            counts.setdefault(group.method, count)
    least = min(counts.values(), default=0)
    over = [m for m, count in counts.items() if count > (1 + TOLERANCE) * least]
    if not over:
        return []
    return [f"{found[0].task}: {', '.join(over)} trained more than 2 % more parameters than the "
            f"method with the fewest, {least:,}."]


def markdown(rows: Sequence[Row]) -> str:
    """A table for each task: a line a method, and for every value that the study compares."""
    parts, names = [], varied_names(rows)
    for task, found in by_task(rows).items():
        first = found[0].rows[0]
        test = f"test {unit(first['metric'], 'short')}"
        heads = ["method", *map(short, names), "rate", "seeds", test, "test loss", "train loss",
                 "effective rank", "parameters", "with head", "seconds", "GiB"]
        lines, edges = [heads], False
        for group in found:
            rate = _value(group.rate)
            if at_edge(group, rows):
                rate, edges = rate + " *", True
            lines.append([group.method, *(_value(dict(group.varied).get(n)) for n in names),
                          rate, *_figures(group)])
        known = [i for i in range(len(heads)) if any(line[i] != "-" for line in lines[1:])]
        table = markdown_table([[line[i] for i in known] for line in lines], len(known))
        notes = [together(found, [heads[i] for i in known])]
        notes += ["\\* at the edge of the rates it was chosen from."] if edges else []
        notes += unequal(found)
        title = f"**{task}**: {first['dataset']}, {first['model']}, {first['steps']:,} steps"
        parts += [title, table, *notes]
    return "\n\n".join(parts)


def together(found: Sequence[Group], columns: Sequence[str]) -> str:
    """The devices of a table, and what its times and its memory mean, where it has them."""
    counts = sorted({row["together"] for group in found for row in group.rows})
    devices = ", ".join(dict.fromkeys(row["device"] for group in found for row in group.rows))
    if counts == [1]:
        words = {"seconds": "a run's training steps", "GiB": "the peak of its process"}
    else:
        words = {"seconds": "a run's share of the training steps of its program, which trains "
                            f"{' or '.join(map(str, counts))} runs together",
                 "GiB": "the peak of a program"}
    shown = "; ".join(f"{name}: {text}" for name, text in words.items() if name in columns)
    return f"{devices}. {shown}." if shown else f"{devices}."


def _figures(group: Group) -> list[str]:
    test = group.scaled("test")
    without, whole = parameters(group.rows)
    # A row says so (alone: false) where other programs had a share of the device meanwhile.
    alone = [row for row in group.rows if row.get("alone", True)]
    memory = values(alone, "peak_memory_bytes")
    return [
        str(len(test)),
        spread(test),
        spread(values(group.rows, "test_loss"), 3),
        spread(values(group.rows, "train_loss"), 3),
        spread(values(group.rows, "effective_rank")),
        f"{without:,}",
        f"{whole:,}",
        spread(values(alone, "seconds"), 1, alone=True),
        f"{max(memory) / 2**30:.2f}" if memory else "-",
    ]


def spread(numbers: Sequence[float], digits: int = 2, *, alone: bool = False) -> str:
    """Mean and sample standard deviation; ``alone`` leaves the latter out.

    >>> spread([1.0, 3.0]), spread([1.0]), spread([])
    ('2.00 ± 1.41', '1.00', '-')
    """
    if not numbers:
        return "-"
    text = f"{statistics.mean(numbers):.{digits}f}"
    wide = deviation(numbers)
    return text if wide is None or alone else f"{text} ± {wide:.{digits}f}"


def rates_table(rows: Sequence[Row]) -> str:
    """For each method the mean on validation at each of its rates."""
    chosen = {(group.task, group.method, group.rate) for group in groups(rows)}
    cells = {}
    for group in groups(rows, CHOOSE):
        text = f"{_value(group.rate)}: {spread(group.scaled('validation'), alone=True)}"
        if (group.task, group.method, group.rate) in chosen:
            text = f"**{text}**"
        cells.setdefault((group.task, group.method), []).append(text)
    if not cells:
        return ""
    head = ("task", "method", "rate: validation, mean of the runs that choose")
    return markdown_table([head, *((*k, ", ".join(v)) for k, v in cells.items())], len(head))


def at_edge(group: Group, rows: Iterable[Row]) -> bool:
    """Whether the rate is the smallest or the largest of three or more it was chosen from."""
    tried = sorted({row["settings"]["learning_rate"] for row in rows
                    if (row["task"], row["method"], row["stage"])
                    == (group.task, group.method, CHOOSE)})
    return len(tried) > 2 and group.rate in (tried[0], tried[-1])


def csv_text(rows: Sequence[Row]) -> str:
    """The figures of every group with all their digits, by names without spaces."""
    names = varied_names(rows)
    spreads = ("test", "test_best", "validation", "test_loss", "train_loss", "effective_rank")
    heads = ["study", "task", "dataset", "model", "method", *names, "learning_rate", "metric",
             "seeds", *(f"{n}_{what}" for n in spreads for what in ("mean", "std")), "steps",
             "batch_size", "parameters_without_head", "parameters_with_head", "seconds_per_run",
             "runs_together", "peak_memory_bytes", "device", "jax"]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(heads)
    for group in groups(rows):
        first, varied_values = group.rows[0], dict(group.varied)
        figures = [f(values(group.rows, n)) for n in spreads for f in (mean, deviation)]
        memory = values(group.rows, "peak_memory_bytes")
        writer.writerow([
            first["study"], group.task, first["dataset"], first["model"], group.method,
            *(varied_values.get(n) for n in names), group.rate, first["metric"], len(group.rows),
            *figures, first["steps"], first["batch_size"], *parameters(group.rows),
            mean(values(group.rows, "seconds")), first["together"], max(memory, default=None),
            first["device"], first["jax"],
        ])
    return file.getvalue()


def _value(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def short(field: str) -> str:
    """The last word of a field, such as "resample every"."""
    return field.rpartition(".")[2].replace("_", " ")


def shown(value) -> str:
    """A value of a setting or of a field, as a label.

    >>> shown(0.5), shown("1000000000"), shown("10"), shown("cola")
    ('0.5', 'never', '10', 'cola')
    """
    try:
        number = float(value)
    except ValueError:
        return str(value)
    return "never" if number >= NEVER else f"{number:g}"


def thousands(count: int) -> str:
    """
    >>> thousands(165888), thousands(22713986), thousands(900), thousands(0)
    ('166 k', '22.7 M', '900', '')
    """
    for size, letter in ((10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.3g} {letter}"
    return str(count or "")
