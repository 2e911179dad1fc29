"""One program of a study: the runs of a cell, trained together, and their rows.

    python -m rmlora_jax.study.program FILE    # what `in_own_process` starts
"""

import hashlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import logging

from rmlora_jax import config as fields
from rmlora_jax import methods
from rmlora_jax.errors import UserError
from rmlora_jax.fields import Run
from rmlora_jax.files import read_json, write_json
from rmlora_jax.study import plan
from rmlora_jax.study.plan import Cell
from rmlora_jax.study.rows import finished, row_of
from rmlora_jax.sweep import train as sweep
from rmlora_jax.sweep.grid import check_config
from rmlora_jax.train import loop
from rmlora_jax.train.config import SWEEPABLE, flatten, with_values
from rmlora_jax.train.finished import peak_memory

ROOT = Path(__file__).parent.parent.parent  # where configs/ lies in a checkout
ROWS = ".rows.json"  # beside the program's folder


class Program(NamedTuple):
    """What is trained at once. ``runs`` has the identity, the setting and the seed of each."""

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

    A single run has no sweep. All runs of a sweep have the same batches, in the order of the first
    seed. With ``shared`` the relatives of rm_lora run as rm_lora, with penalty and keep among what
    is swept whatever they are, so that their programs differ in their inputs only.
    """
    own, also = base.own(methods.Rm), {}
    if shared and cell.method in plan.AS_RM_LORA and own.draw == "bernoulli":
        base = with_values(base, {"method": "rm_lora"})
        also = {"penalty": own.penalty, "keep": own.keep} | plan.AS_RM_LORA[cell.method]
    config = run_config(base, also | cell.settings[0], cell.seeds[0])
    if cell.runs > 1:
        grid = swept([also | setting for setting in cell.settings], always=bool(also))
        config = with_values(config, {
            "sweep.seeds": len(cell.seeds), "sweep.grid": grid, "sweep.at_once": at_once
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


def swept(settings: Sequence[Mapping[str, float]], always: bool = False) -> str:
    """``config.sweep.grid`` for these settings: "" for one, which the config itself holds, unless
    it is ``always`` to be stated.

    >>> swept(({"learning_rate": 0.1}, {"learning_rate": 0.2}))
    "[{'learning_rate': 0.1}, {'learning_rate': 0.2}]"
    """
    return repr([dict(s) for s in settings]) if always or len(settings) > 1 else ""


def trainer(config: Run, workdir: Path) -> None:
    (sweep.train if config.is_sweep else loop.train)(config, workdir)


def train(program: Program, study: str, *, trainer: Callable = trainer) -> list[dict]:
    """Trains the program, or what is missing of it, and returns a row for each of its runs.

    The peak of the memory is the process's: a row has it only if this program raised it.
    """
    before = peak_memory() or 0
    trainer(check_config(program.config), Path(program.folder))
    device = jax.devices()[0].device_kind
    found = {}
    for folder in finished(program.folder):
        run = run_of(read_json(folder / "config.json"), program.runs)
        if run is None:
            continue
        key, setting, _ = run
        row = row_of(
            folder,
            key=key,
            study=study,
            task=program.cell.task,
            method=program.cell.method,
            stage=program.cell.stage,
            variant=dict(text.split("=", 1) for text in program.cell.variant),
            settings=setting,
            device=device,
            jax=jax.__version__,
        )
        if (row["peak_memory_bytes"] or 0) <= before:
            row["peak_memory_bytes"] = None
        found[key] = row
    missing = set(program.keys) - found.keys()
    if missing:
        raise UserError(
            f"{program.folder}: {len(missing)} of {len(program.runs)} runs left no summary; "
            "delete the folder and start again"
        )
    return [found[key] for key in program.keys]


def run_of(config: Mapping[str, Any], runs) -> tuple[str, dict, int] | None:
    """Which of a program's runs a folder holds, by its seed and its settings."""
    for key, setting, seed in runs:
        found = plan.setting_of(config, setting)
        same = all(math.isclose(found[n], v, rel_tol=1e-6) for n, v in setting.items())
        if config["seed"] == seed and same:
            return key, setting, seed
    return None


def in_own_process(program: Program, study: str) -> list[dict]:
    """`train` in a process of its own, whose memory is all its own and whose end ends nothing else.

    Raises:
      UserError: it failed; what it said stands above on the terminal.
    """
    rows = Path(program.folder + ROWS)
    if not rows.exists():
        whole = {"study": study} | program._asdict() | {"cell": program.cell._asdict()}
        file = write_json(program.folder + ".json", whole)
        command = [sys.executable, "-m", "rmlora_jax.study.program", str(file)]
        here = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = os.environ | {"PYTHONPATH": here}  # also where the package is not installed
        code = subprocess.run(command, env=environment, check=False).returncode
        if code:
            raise UserError(
                f"{program.cell} failed with code {code}; its words stand above\n"
                "The same command goes on from here"
            )
    return read_json(rows)


def main(file: str) -> None:
    logging.set_verbosity(logging.WARNING)  # as in run.py
    stored = read_json(file)
    cell = Cell(**_tuples(stored["cell"]))
    whole = Program(cell, _tuples(stored["config"]), _tuples(stored["runs"]), stored["folder"])
    write_json(whole.folder + ROWS, train(whole, stored["study"]))


def _tuples(value: Any) -> Any:
    """JSON has no tuples, a config no lists."""
    if isinstance(value, dict):
        return {name: _tuples(v) for name, v in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except (UserError, json.JSONDecodeError) as e:
        sys.exit("\n".join(f"error: {line}" for line in str(e).splitlines()))
