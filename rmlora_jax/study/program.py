"""One program of a study: the runs of a cell, trained together, and their rows."""

import hashlib
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import logging

from rmlora_jax import config as fields
from rmlora_jax import methods
from rmlora_jax.config import with_values
from rmlora_jax.errors import UserError
from rmlora_jax.fields import Run
from rmlora_jax.files import read_json, write_json
from rmlora_jax.stopping import Stopped, deaf, watch
from rmlora_jax.study import plan
from rmlora_jax.study.plan import Cell
from rmlora_jax.study.rows import row_of
from rmlora_jax.sweep import train as sweep
from rmlora_jax.sweep.grid import check_config
from rmlora_jax.sweep.grid import runs as runs_of_sweep
from rmlora_jax.train import loop
from rmlora_jax.train.config import SWEEPABLE, flatten
from rmlora_jax.train.finished import peak_memory

ROWS = ".rows.json"  # beside the program's folder


class Program(NamedTuple):
    """Runs that are trained together; ``runs`` has the identity, setting and seed of each."""

    cell: Cell
    config: Any  # what the trainer takes, as a dict of plain values
    runs: tuple[tuple[str, dict, int], ...]
    folder: str

    @property
    def keys(self) -> list[str]:
        return [key for key, *_ in self.runs]


def program(
    cell: Cell,
    base: Run,
    workdir: Path,
    *,
    at_once: int = 0,
    shared: bool = False,
) -> Program:
    """The program of a cell; ``base``: the config that its runs share.

    All runs of a sweep have the same batches, in the order of the first seed. With ``shared`` the
    relatives of rm_lora run as rm_lora and always sweep penalty and keep, so that their programs
    differ in their inputs only.
    """
    own, also = base.own(methods.Rm), {}
    if shared and cell.method in plan.AS_RM_LORA and own.draw == "bernoulli":
        base = with_values(base, {"method": "rm_lora"})
        also = {"penalty": own.penalty, "keep": own.keep} | plan.AS_RM_LORA[cell.method]
    config = run_config(base, also | cell.settings[0], cell.seeds[0])
    if cell.runs > 1:
        settings = [also | setting for setting in cell.settings]
        stated = also or len(settings) > 1  # a setting alone stands in the config itself
        config = with_values(config, {
            "sweep.seeds": len(cell.seeds),
            "sweep.grid": repr(settings) if stated else "",
            "sweep.at_once": at_once,
        })
    runs = []
    for setting in cell.settings:
        for seed in cell.seeds:
            one = run_config(base, also | setting, seed)
            runs.append((plan.identity(one, cell.stage), dict(setting), seed))
    words = [cell.task, cell.method, cell.stage, *(v.rpartition(".")[2] for v in cell.variant)]
    words = ["".join(c if c.isalnum() else "-" for c in word) for word in words]
    both = hashlib.sha256("".join(key for key, *_ in runs).encode()).hexdigest()[:8]
    folder = Path(workdir) / "runs" / "_".join([*words, both])
    return Program(cell, fields.nested(flatten(config)), tuple(runs), str(folder))


def run_config(base: Run, setting: Mapping[str, float], seed: int) -> Run:
    """The config of a run with these values, by the names of ``sweep.grid``."""
    return with_values(base, {SWEEPABLE[k]: v for k, v in setting.items()} | {"seed": seed})


def trainer(config: Run, workdir: Path) -> None:
    (sweep.train if config.is_sweep else loop.train)(config, workdir)


def train(program: Program, study: str, *, trainer: Callable = trainer) -> list[dict]:
    """Trains the program, or what is missing of it, and returns a row for each of its runs.

    The peak of the memory is the process's: a row has it only if this program raised it.
    """
    before = peak_memory() or 0
    config, folder = check_config(program.config), Path(program.folder)
    trainer(config, folder)
    names = [run.name for run in runs_of_sweep(config)] if config.is_sweep else [""]
    missing = sum(not (folder / name / "summary.json").exists() for name in names)
    if missing:
        raise UserError(
            f"{folder}: {missing} of {len(names)} runs left no summary; "
            "delete the folder and start again"
        )
    found = []
    for name, (key, setting, _) in zip(names, program.runs, strict=True):
        row = row_of(
            folder / name,
            key=key,
            study=study,
            task=program.cell.task,
            method=program.cell.method,
            stage=program.cell.stage,
            variant=dict(text.split("=", 1) for text in program.cell.variant),
            settings=setting,
            device=jax.devices()[0].device_kind,
            jax=jax.__version__,
        )
        if (row["peak_memory_bytes"] or 0) <= before:
            row["peak_memory_bytes"] = None
        found.append(row)
    return found


def in_own_process(program: Program, study: str) -> list[dict]:
    """`train` in a process of its own: it shares no memory, and a crash stops nothing else.

    Raises:
      UserError: it failed; its messages are on the terminal.
      Stopped: a signal came; it saved what it had.
    """
    rows = Path(program.folder + ROWS)
    if not rows.exists():
        child = multiprocessing.get_context("spawn").Process(target=_train, args=(program, study))
        try:
            with watch("the run under way saves and ends", alone=True) as asked:
                with deaf():
                    child.start()
                while child.is_alive() and not asked(0):
                    child.join(0.1)
                if asked(0):
                    child.terminate()  # once: at a second signal it would not save
                    child.join()
        finally:
            child.kill()  # where this process is interrupted
        if child.exitcode:
            raise UserError(
                f"{program.cell} failed with code {child.exitcode}; its messages are above\n"
                "The same command goes on from here"
            )
    return read_json(rows)


def _train(program: Program, study: str) -> None:
    logging.set_verbosity(logging.WARNING)  # as in a command
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    try:
        write_json(program.folder + ROWS, train(program, study))
    except Stopped as e:
        sys.exit(f"stopped: {e}")
    except UserError as e:
        sys.exit("\n".join(f"error: {line}" for line in str(e).splitlines()))
