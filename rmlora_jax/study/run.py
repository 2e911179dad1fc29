"""A study from its plan to its pictures, and its cost beforehand. The same folder continues it."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rmlora_jax.config import ConfigDict
from rmlora_jax.errors import UserError
from rmlora_jax.fields import Run
from rmlora_jax.files import placed, write_text_atomic
from rmlora_jax.report.records import duration
from rmlora_jax.report.style import text_table
from rmlora_jax.study import plan, program, tables
from rmlora_jax.study.config import check_study
from rmlora_jax.study.pictures import write_pictures
from rmlora_jax.study.plan import Cell, Study
from rmlora_jax.study.rows import ROWS, append_rows, read_rows
from rmlora_jax.tasks import SECTIONS, TASKS
from rmlora_jax.train.config import flatten
from rmlora_jax.train.workdir import opened

HEADS = ("program", "runs", "left", "steps a run", "examples left", "time left")

Row = Mapping[str, Any]


def run_study(
    given: ConfigDict | Study, workdir: Path, *, trainer: Callable | None = None
) -> list[dict]:
    """Trains the runs that have no row yet in ``workdir/rows.jsonl``, writes the study's table and
    pictures, and returns its rows. With ``study.dry_run`` it only prints the plan and its cost.

    A ``trainer`` replaces `rmlora_jax.study.program.trainer` and runs in this process.

    Raises:
      UserError: the config is wrong, or a program failed.
    """
    study, bases = check_study(given)
    cells = plan.cells(study, dict.fromkeys(task for task, *_ in bases))
    workdir = placed(workdir)
    file = workdir / ROWS

    def program_of(cell: Cell) -> program.Program:
        base = bases[cell.place]
        return program.program(cell, base, workdir, at_once=study.at_once, shared=study.shared)

    if study.dry_run:
        print(cost_table(cells, bases, read_rows(file), program_of), flush=True)
        return read_rows(file)

    train = program.in_own_process if study.processes else program.train
    if trainer is not None:
        train = functools.partial(program.train, trainer=trainer)
    rows = []
    with opened(workdir, alone=True):
        there = {row["key"]: row for row in read_rows(file)}
        for number, (cell, one) in enumerate(programs(cells, program_of, there), 1):
            if any(key not in there for key in one.keys):
                runs = f"{cell.runs} run" + "s" * (cell.runs != 1)
                print(f"[{number}/{len(cells)}] {cell}: {runs}", flush=True)
                append_rows(file, train(one, study.study))
                there |= {row["key"]: row for row in read_rows(file)}
            rows += [there[key] for key in one.keys]
        write_results(study, workdir, rows)
    return rows


def programs(
    cells: Sequence[Cell], program_of: Callable[[Cell], program.Program], there: Mapping[str, Row]
) -> Iterator[tuple[Cell, program.Program]]:
    """Each cell with its program, at the chosen rate where the rows ``there`` decide it by then."""
    choice = []
    for cell in cells:
        one = program_of(plan.decided(cell, choice, there))
        if cell.stage == plan.CHOOSE:
            choice = one.keys
        yield one.cell, one


def write_results(study: Study, workdir: Path, rows: list[dict]) -> None:
    """``table.md``, ``table.csv`` and the pictures that the study asks for."""
    markdown = tables.markdown(rows)
    written = [
        write_text_atomic(workdir / "table.md", f"{markdown}\n\n{tables.rates_table(rows)}\n"),
        write_text_atomic(workdir / "table.csv", tables.csv_text(rows)),
        *write_pictures(rows, workdir, study.pictures, study.along),
    ]
    print(markdown)
    print("\n".join(map(str, written)), flush=True)


def cost_table(
    cells: Sequence[Cell],
    bases: Mapping[tuple, Run],
    rows: Sequence[Row],
    program_of: Callable,
) -> str:
    """A line a program: its runs, those that have no row yet, and what they cost.

    Steps are unknown ("?") where the data would have to be fetched first, times ("?") where no run
    of the task has been measured yet.
    """
    there = {row["key"]: row for row in rows}
    lines, sizes = [], {}
    for cell, one in programs(cells, program_of, there):
        base = bases[cell.place]
        # Runs whose rate is not chosen yet are all left.
        done = 0 if cell.waits else sum(key in there for key in one.keys)
        left, steps = cell.runs - done, steps_of(base, sizes)
        examples = None if steps is None else left * steps * base.batch_size
        pace, seconds = seconds_per_example(rows, cell), None if left else 0.0
        if examples and pace is not None:
            seconds = examples * pace
        lines.append((str(cell), cell.runs, left, steps, examples, seconds))
    runs, left, examples, seconds = (
        sum(line[i] or 0 for line in lines) for i in (1, 2, 4, 5)
    )
    unknown = sum(line[5] is None for line in lines)
    end = "?" if unknown and not seconds else duration(seconds)
    if unknown and seconds:
        end += f" and {unknown} unknown"
    lines.append((f"all {len(cells)}", runs, left, "", examples, end))
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


def seconds_per_example(rows: Sequence[Row], cell: Cell) -> float | None:
    """The mean over the measured runs of the method on the task, or else of any on the task."""
    here = [row for row in rows if row["task"] == cell.task and row["seconds"] is not None]
    same = [row for row in here if row["method"] == cell.method]
    paces = [row["seconds"] / (row["steps"] * row["batch_size"]) for row in same or here]
    return sum(paces) / len(paces) if paces else None


def _text(value) -> str:
    if value is None:
        return "?"
    if isinstance(value, float):
        return duration(value)
    return f"{value:,}" if isinstance(value, int) else value
