"""Many runs at once: from a config with ``sweep.*`` to a folder for each run.

    runs of the config -> chunks that fit in memory -> one program each -> folders -> sweep.md

Each folder ends as that of the single run of the same settings. While a chunk trains, one
checkpoint in ``program/`` holds all its runs; it is removed when their own checkpoints are written.
"""

import itertools
import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from rmlora_jax.config import ConfigDict
from rmlora_jax.errors import UserError
from rmlora_jax.fields import Run as Config
from rmlora_jax.files import placed, read_json, write_json
from rmlora_jax.parallel import memory
from rmlora_jax.parallel.mesh import all_devices, shard, use_compilation_cache
from rmlora_jax.report.records import amount
from rmlora_jax.report.sweep import write_sweep_report
from rmlora_jax.sweep import many
from rmlora_jax.sweep.grid import Run, check_config, runs
from rmlora_jax.train import checkpoint, finished, loop, record, setup, shortage, terminal
from rmlora_jax.train.evaluate import Steps, compile_steps
from rmlora_jax.train.step import State
from rmlora_jax.train.workdir import as_begun, check_workdir, opened, saved_steps

SAMPLED = 64  # batches among which the longest is looked for


class Together(NamedTuple):
    """What the checkpoint of a program holds, beside the figures of each run."""

    state: State  # of all runs
    best: State | None  # of each run at its best evaluation so far; step is (K,)


def train(
    config: ConfigDict | Config, workdir: Path, callbacks: Sequence[loop.Callback] = ()
) -> dict:
    """Trains every run of the sweep and returns the ``summary.json`` of the whole.

    ``callbacks`` are those of `loop.train`; a line that they get names its run as ``"run"``.

    Raises:
      UserError: as `loop.train`.
    """
    checked = check_config(config, there=True)
    workdir = placed(workdir)
    with opened(workdir):
        return _train(checked, workdir, callbacks)


def _train(config: Config, workdir: Path, callbacks: Sequence[loop.Callback]) -> dict:
    began, leader = time.monotonic(), jax.process_index() == 0
    config = as_begun(config, workdir)
    check_workdir(config, workdir)
    if (workdir / "summary.json").exists():
        summary = read_json(workdir / "summary.json")
        print("this sweep is finished; another --workdir starts a new one")
        print(ending(summary, workdir), flush=True)
        return summary
    use_compilation_cache(config.compilation_cache)
    every = runs(config)
    devices = all_devices(config.parallel, fsdp=config.fsdp)
    with shortage.in_two_lines(config, devices, workdir):
        base = setup.open_base(config, devices)
    many.check_frozen(base)
    read = record.record_of(base)
    record.check_record(workdir, read)
    for run in every:
        check_workdir(run.config, workdir / run.name)
    if leader:
        loop.write_beginning(workdir, config, read)
        for run in every:
            loop.write_beginning(workdir / run.name, run.config, read, base.problem.info)
        first, last = every[0].name, every[-1].name
        words = f"{len(every)}: {first} to {last}" if every[1:] else first
        print(loop.header(base, workdir, runs=words), flush=True)

    programs = Programs(base)
    chunks = plan(every, workdir, programs)
    since = began
    for number, chunk in enumerate(chunks, 1):
        if leader and len(chunks) > 1:
            names = ", ".join(run.name for run in chunk)
            print(f"program {number} of {len(chunks)}: {names}", flush=True)
        train_chunk(chunk, programs, workdir, since, callbacks)
        since = time.monotonic()
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"chunk {number}")
    summary = {
        "sweep": len(every),
        "metric": base.problem.metrics[0],
        "wall_seconds": time.monotonic() - began,
        "compile_seconds": programs.seconds,
        "peak_memory_bytes": finished.peak_memory(),
        "runs": {run.name: run.setting | {"seed": run.config.seed} for run in every},
    }
    if leader:
        write_sweep_report(workdir, summary)
        write_json(workdir / "summary.json", summary)
        print(ending(summary, workdir), flush=True)
    return summary


def ending(summary: dict, workdir: Path) -> str:
    return terminal.format_table("done", [
        ("runs", f"{summary['sweep']}, a folder each in {workdir}"),
        ("time", terminal.times(summary)),
        ("table", workdir / "sweep.md"),
        ("picture", workdir / "sweep.png"),
    ])


class Programs:
    """The compiled steps for each number of runs at once; ``seconds`` is the time they took."""

    def __init__(self, base: setup.Base):
        self.base, self.by_size = base, {}

    @property
    def seconds(self) -> float:
        return sum(steps.seconds for steps in self.by_size.values())

    def of(self, job: setup.Job, start: int = 0) -> Steps:
        """The steps of a job, compiled for the batch of step ``start``."""
        count = len(job.runs)
        if count not in self.by_size:
            self.by_size[count] = compile_steps(job, job.state, start)
        return self.by_size[count]

    def need(self, chunk: Sequence[Run]) -> int | None:
        """Bytes that the runs need at once; None where the compiler already runs out of them."""
        job = many.build(chunk, self.base)
        try:
            steps = self.of(job)
            if self.base.feed.varies:  # the first batch may be a short one
                batches = itertools.islice(self.base.feed.train(0), SAMPLED)
                longest = max(batches, key=size_of)
                steps.train.program(job.state, job.constants, shard(longest, self.base.devices))
        except jax.errors.JaxRuntimeError as e:
            if memory.is_short(e):
                return None
            raise
        # The best state of each run is kept as well, in two copies while it is chosen.
        return steps.need + 2 * size_of(job.state)


def size_of(tree) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def plan(every: Sequence[Run], workdir: Path, programs: Programs) -> list[list[Run]]:
    """The runs that are not finished, in chunks: first the one that was interrupted, if any."""
    by_name = {run.name: run for run in every}
    left = [run for run in every if not (workdir / run.name / "summary.json").exists()]
    names = [run.name for run in left]
    chunks = []
    interrupted = recorded(workdir)
    if any(name in names for name in interrupted):
        chunks.append([by_name[name] for name in interrupted])
        left = [run for run in left if run.name not in interrupted]
    if not left:
        return chunks
    at_once = programs.base.config.sweep.at_once
    most = min(at_once or len(left), len(left))
    if not at_once:
        limit = memory.available()
        constant = size_of(programs.base.constants)
        most, whole = memory.largest(
            len(left), lambda count: programs.need(left[:count]), limit, constant
        )
        if jax.process_count() > 1:
            most = int(multihost_utils.broadcast_one_to_all(np.int32(most)))
        if most < len(left) and jax.process_index() == 0:
            much = "more than the compiler has" if whole is None else amount(whole)
            print(
                f"{len(left)} runs at once need {much} of {amount(limit)}: at most "
                f"{most} at once, in {math.ceil(len(left) / most)} programs one after another",
                flush=True,
            )
    size = math.ceil(len(left) / math.ceil(len(left) / most))  # of equal sizes: compiled once
    return chunks + [left[i : i + size] for i in range(0, len(left), size)]


def recorded(workdir: Path) -> list[str]:
    """The names of the runs in the checkpoint in ``program/``; [] without one."""
    folder = workdir / "program"
    there = saved_steps(folder) and (folder / "runs.json").exists()
    return read_json(folder / "runs.json") if there else []


def train_chunk(
    chunk: Sequence[Run],
    programs: Programs,
    workdir: Path,
    began: float,
    callbacks: Sequence[loop.Callback] = (),
) -> None:
    """Trains the runs of a chunk in one program and finishes their folders."""
    base, leader = programs.base, jax.process_index() == 0
    folder, names = workdir / "program", [run.name for run in chunk]
    if leader and recorded(workdir) != names:
        shutil.rmtree(folder, ignore_errors=True)
        write_json(folder / "runs.json", names)
    job = many.build(chunk, base)
    with checkpoint.open_checkpoints(folder, keep_best=False) as manager:
        keeper = AtOnce(manager, base.problem.metrics[0], len(chunk))
        state, start = keeper.newest(job.state)
        if state is None:
            state = many.first_state(chunk, base)
        steps = programs.of(job, min(start, base.steps - 1))
        if leader:
            print(f"{len(chunk)} runs in one program, compiled in "
                  f"{terminal.duration(steps.seconds)}"
                  + (f"; continuing after step {start:,}" if start else ""), flush=True)
        folders = [workdir / name for name in names]
        try:
            loop.train_program(job, state, steps, keeper, folders, began, callbacks)
        except jax.errors.JaxRuntimeError as e:
            if memory.is_short(e) and len(chunk) == 1:
                raise UserError(shortage.Plan(base.config, base.devices).words()) from e
            if memory.is_short(e):
                raise UserError(
                    f"{len(chunk)} runs at once are out of memory after all; type "
                    f"--config.sweep.at_once={max(1, len(chunk) // 2)}"
                    + (f", and delete {folder}" if recorded(workdir) else "")
                ) from e
            raise
    if leader:
        shutil.rmtree(folder)


class AtOnce(checkpoint.Keeper):
    """The keeper of many runs: one checkpoint of all, with the best state of each."""

    def __init__(self, manager: Any, metric: str, count: int):
        super().__init__(manager, metric)
        self.count = count
        self.best_state: State | None = None
        self.figures: Any = {"last": [None] * count, "best": [None] * count}

    def newest(self, like: State) -> tuple[State | None, int]:
        """The newest state of all runs that can be read, and its step; None, 0 without any."""
        own = jax.ShapeDtypeStruct((self.count,), like.step.dtype, sharding=like.step.sharding)
        together = Together(like, like._replace(step=own))
        found, start = checkpoint.newest(self.manager, together)
        if found is None:
            return None, 0
        self.figures, self.best_state = self.manager.metrics(start), found.best
        return found.state, start

    def evaluated(self, state: State, figures: Sequence[dict[str, float]]) -> None:
        step = int(state.step)
        last = [checkpoint.scored(own, self.metric) | {"step": step} for own in figures]
        pairs = list(zip(last, self.figures["best"], strict=True))
        improved = [  # of equals the latest
            old is None or checkpoint.score(new) >= checkpoint.score(old) for new, old in pairs
        ]
        best = [new if is_it else old for (new, old), is_it in zip(pairs, improved, strict=True)]
        before = state if self.best_state is None else self.best_state
        self.best_state = many.better(state, before, np.array(improved))
        self.figures = {"last": last, "best": best}
        self._write(state)

    def interrupted(self, state: State) -> None:
        if self.best_state is None:  # nothing was evaluated yet; no figure says that this is best
            self.best_state = many.better(state, state, np.ones(self.count, bool))
        self._write(state)

    def _write(self, state: State) -> None:
        together = Together(state, self.best_state)
        checkpoint.write(self.manager, int(state.step), together, self.figures)

    def best(self, state: State) -> tuple[State, list[int]]:
        assert self.best_state is not None  # the last step is evaluated
        return self.best_state, [found["step"] for found in self.figures["best"]]

    def settle(self, i: int, folder: Path, state: State, best: State) -> None:
        if jax.process_index() == 0:
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # of a finish that was killed
        end = int(state.step)
        last = state._replace(step=np.full(self.count, end, np.int32))
        with checkpoint.open_checkpoints(folder) as manager:
            for name, states in (("best", best), ("last", last)):
                found = {k: v for k, v in self.figures[name][i].items() if k != "step"}
                step = self.figures[name][i]["step"]
                if name == "last" or step != end:
                    checkpoint.write(manager, step, jax.device_get(many.pick(states, i)), found)
