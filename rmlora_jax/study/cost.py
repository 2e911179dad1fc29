"""What a study will cost: its plan as a table, with times from what has been measured."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rmlora_jax.errors import UserError
from rmlora_jax.fields import Run
from rmlora_jax.report.records import duration
from rmlora_jax.report.style import text_table
from rmlora_jax.study import plan
from rmlora_jax.study.plan import Cell
from rmlora_jax.tasks import SECTIONS, TASKS
from rmlora_jax.train.config import flatten

HEADS = ("program", "runs", "left", "steps a run", "examples left", "time left")


def cost_table(
    cells: Sequence[Cell],
    bases: Mapping[tuple, Run],
    rows: Sequence[Mapping[str, Any]],
    program_of: Callable,
) -> str:
    """A line a program: its runs, those that have no row yet, and what they cost.

    Steps are unknown ("?") where the data would have to be fetched first, times ("?") where no run
    of the task has been measured yet.
    """
    there = {row["key"]: row for row in rows}
    lines, sizes, choice = [], {}, []
    totals, unknown = [0, 0, 0, 0.0], 0
    for cell in cells:
        base = bases[plan.place(cell)]
        if cell.stage == plan.CHOOSE:
            choice = program_of(cell).keys
        cell = plan.decided(cell, choice, there)
        # Runs whose rate is not chosen yet are all left.
        done = 0 if plan.waits(cell) else sum(k in there for k in program_of(cell).keys)
        left = cell.runs - done
        steps = steps_of(base, sizes)
        examples = None if steps is None else left * steps * base.batch_size
        pace = seconds_per_example(rows, cell)
        seconds = 0.0 if not left else None
        if left and examples is not None and pace is not None:
            seconds = examples * pace
        unknown += seconds is None
        found = (cell.runs, left, examples or 0, seconds or 0.0)
        totals = [a + b for a, b in zip(totals, found, strict=True)]
        lines.append((str(cell), cell.runs, left, steps, examples,
                      "?" if seconds is None else duration(seconds)))
    end = duration(totals[3]) if not unknown else "?"
    if unknown and totals[3]:
        end = f"{duration(totals[3])} and {unknown} unknown"
    lines.append((f"all {len(cells)}", *totals[:2], "", totals[2], end))
    return text_table([HEADS, *([_text(v) for v in line] for line in lines)])


def steps_of(config: Run, sizes: dict) -> int | None:
    """The steps of a run; None where they depend on data that are not here. ``sizes`` is kept."""
    if config.steps:
        return config.steps
    read = ("task", "data", *SECTIONS)
    what = str({k: v for k, v in flatten(config).items() if k.partition(".")[0] in read})
    if what not in sizes:
        try:
            sizes[what] = TASKS[config.task].training_examples(config)
        except UserError:
            return None
    return max(1, round(config.epochs * sizes[what] / config.batch_size))


def seconds_per_example(rows: Sequence[Mapping[str, Any]], cell: Cell) -> float | None:
    """The mean over the measured runs of the method on the task, or else of any on the task."""
    here = [row for row in rows if row["task"] == cell.task and row["seconds"] is not None]
    same = [row for row in here if row["method"] == cell.method]
    paces = [row["seconds"] / (row["steps"] * row["batch_size"]) for row in same or here]
    return sum(paces) / len(paces) if paces else None


def _text(value) -> str:
    if value is None:
        return "?"
    return f"{value:,}" if isinstance(value, int) else str(value)
