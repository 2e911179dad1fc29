"""A study from its plan to its pictures; the same folder again goes on where it stopped."""

import functools
from collections.abc import Callable
from pathlib import Path

from rmlora_jax.config import ConfigDict
from rmlora_jax.files import write_text_atomic
from rmlora_jax.study import plan, program, tables
from rmlora_jax.study.config import check_study
from rmlora_jax.study.cost import cost_table
from rmlora_jax.study.pictures import write_pictures
from rmlora_jax.study.plan import Cell, Study
from rmlora_jax.study.rows import ROWS, append_rows, read_rows
from rmlora_jax.train.workdir import opened


def run_study(
    given: ConfigDict | Study, workdir: Path, *, trainer: Callable | None = None
) -> list[dict]:
    """Runs what of the study has no row yet in ``workdir/rows.jsonl``, writes its table and
    pictures, and returns its rows. With ``study.dry_run`` it prints the plan and its cost only.

    A ``trainer`` takes the place of `rmlora_jax.study.program.trainer`, in this process.

    Raises:
      UserError: what the person who started the study can put right.
    """
    study, bases = check_study(given)
    cells = plan.cells(study, dict.fromkeys(task for task, *_ in bases))
    workdir = Path(workdir).absolute()
    file = workdir / ROWS

    def program_of(cell: Cell) -> program.Program:
        base = bases[plan.place(cell)]
        return program.program(cell, base, workdir, at_once=study.at_once, shared=study.shared)

    if study.dry_run:
        print(cost_table(cells, bases, read_rows(file), program_of), flush=True)
        return read_rows(file)

    train = program.in_own_process if study.processes else program.train
    if trainer is not None:
        train = functools.partial(program.train, trainer=trainer)
    choice, rows = [], []
    with opened(workdir, alone=True):
        there = {row["key"]: row for row in read_rows(file)}
        for number, cell in enumerate(cells, 1):
            if cell.stage == plan.CHOOSE:
                choice = program_of(cell).keys
            one = program_of(plan.decided(cell, choice, there))
            if any(key not in there for key in one.keys):
                runs = f"{cell.runs} run" + "s" * (cell.runs != 1)
                print(f"[{number}/{len(cells)}] {cell}: {runs}", flush=True)
                append_rows(file, train(one, study.study))
                there = {row["key"]: row for row in read_rows(file)}
            rows += [there[key] for key in one.keys]
        write_results(study, workdir, rows)
    return rows


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
