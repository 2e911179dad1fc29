"""Many runs at once: from a config with ``sweep.*`` to a folder for each run.

    runs of the config -> chunks that fit in memory -> one program each -> folders -> sweep.md

Each folder ends as that of the single run of the same settings. While a chunk trains, one
checkpoint in ``program/`` holds all its runs; it is removed when their own checkpoints are written.
"""

import contextlib
import itertools
import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import ml_collections
import numpy as np
from jax.experimental import multihost_utils

from rmlora_jax.errors import UserError
from rmlora_jax.files import read_json, write_json
from rmlora_jax.parallel import memory
from rmlora_jax.parallel.mesh import Devices, all_devices, shard
from rmlora_jax.report.sweep import write_sweep_report
from rmlora_jax.sweep import many
from rmlora_jax.train import checkpoint, finished, loop, nonfinite, setup, terminal
from rmlora_jax.train.check import check_run
from rmlora_jax.train.config import TEXTS, Run, runs
from rmlora_jax.train.metrics import MetricWriter
from rmlora_jax.train.step import State
from rmlora_jax.train.workdir import check_workdir, opened

SAMPLED = 64  # batches among which the longest is looked for


class Together(NamedTuple):
    """What the checkpoint of a program holds, beside the figures of each run."""

    state: State  # of all runs
    best: State  # of each run at its best evaluation so far; step is (K,)


class Times(NamedTuple):
    """Seconds of this start that a program took."""

    training: float  # of training steps alone
    compiling: float
    wall: float


def train(config: ml_collections.ConfigDict, workdir: Path) -> dict:
    """Trains every run of the sweep and returns the ``summary.json`` of the whole.

    Raises:
      UserError: as `loop.train`.
    """
    check_run(config)
    workdir = Path(workdir).absolute()
    with opened(workdir):
        return _train(config, workdir)


def _train(config: ml_collections.ConfigDict, workdir: Path) -> dict:
    began, leader = time.monotonic(), jax.process_index() == 0
    check_workdir(config, workdir)
    if (workdir / "summary.json").exists():
        summary = read_json(workdir / "summary.json")
        print("this sweep is finished; another --workdir starts a new one")
        print(ending(summary, workdir), flush=True)
        return summary
    loop.use_compilation_cache(config.compilation_cache)
    devices = all_devices(config.parallel, fsdp=config.fsdp)
    every = runs(config)
    base = setup.open_base(config, devices)
    many.check_frozen(config, base)
    for run in every:
        check_workdir(run.config, workdir / run.name)
    if leader:
        write_json(workdir / "config.json", config.to_dict())
        for run in every:
            write_json(workdir / run.name / "config.json", run.config.to_dict())
        first, last = every[0].name, every[-1].name
        words = f"{len(every)}: {first} to {last}" if every[1:] else first
        print(loop.header(config, base, devices, workdir, runs=words), flush=True)
        for note in base.problem.notes:
            print(note, flush=True)

    programs = Programs(config, base, devices)
    chunks = plan(config, every, workdir, programs)
    since = began
    for number, chunk in enumerate(chunks, 1):
        if leader and len(chunks) > 1:
            names = ", ".join(run.name for run in chunk)
            print(f"program {number} of {len(chunks)}: {names}", flush=True)
        train_chunk(config, base, chunk, programs, workdir, devices, since)
        since = time.monotonic()
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"chunk {number}")
    summary = {
        "sweep": len(every),
        "metric": base.problem.metrics[0],
        "wall_seconds": time.monotonic() - began,
        "compile_seconds": programs.seconds,
        "peak_memory_bytes": loop.peak_memory(),
        "runs": {run.name: run.setting | {"seed": run.config.seed} for run in every},
    }
    if leader:
        write_sweep_report(workdir, summary)
        write_json(workdir / "summary.json", summary)
        print(ending(summary, workdir), flush=True)
    return summary


def ending(summary: dict, workdir: Path) -> str:
    took, compiling = (terminal.duration(summary[f"{k}_seconds"]) for k in ("wall", "compile"))
    rows = [
        ("runs", f"{summary['sweep']}, a folder each in {workdir}"),
        ("time", f"{took}, of which {compiling} compilation"),
        ("table", workdir / "sweep.md"),
        ("picture", workdir / "sweep.png"),
    ]
    return terminal.format_table("done", rows)


class Programs:
    """The compiled steps for each number of runs at once; ``seconds`` is the time they took."""

    def __init__(self, config: ml_collections.ConfigDict, base: setup.Base, devices: Devices):
        self.config, self.base, self.devices = config, base, devices
        self.by_size = {}

    @property
    def seconds(self) -> float:
        return sum(steps.seconds for steps in self.by_size.values())

    def of(self, job: setup.Job, count: int, start: int = 0) -> loop.Steps:
        """The steps for ``count`` runs, compiled for the batch of step ``start``."""
        if count not in self.by_size:
            self.by_size[count] = loop.compile_steps(job, job.state, start, self.devices)
        return self.by_size[count]

    def need(self, chunk: Sequence[Run]) -> int | None:
        """Bytes that the runs need at once; None where the compiler already runs out of them."""
        job = many.build(self.config, chunk, self.base, self.devices)
        try:
            steps = self.of(job, len(chunk))
            if self.config.task in TEXTS:  # the first batch of texts may be a short one
                batches = itertools.islice(self.base.feed.train(0), SAMPLED)
                longest = max(batches, key=lambda batch: batch["input_ids"].size)
                steps.train.program(job.state, job.constants, shard(longest, self.devices))
        except jax.errors.JaxRuntimeError as e:
            if memory.is_short(e):
                return None
            raise
        found = [p for step in steps for p in step.programs.values()]
        # The best state of each run is kept as well, and is there twice while it is chosen.
        return max(map(memory.needed, found)) + 2 * size_of(job.state)


def size_of(tree) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def plan(
    config: ml_collections.ConfigDict, every: Sequence[Run], workdir: Path, programs: Programs
) -> list[list[Run]]:
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
    most = min(config.sweep.at_once or len(left), len(left))
    if not config.sweep.at_once:
        limit = memory.available()
        constant = size_of(programs.base.constants)
        most, whole = memory.largest(
            len(left), lambda count: programs.need(left[:count]), limit, constant
        )
        if jax.process_count() > 1:
            most = int(multihost_utils.broadcast_one_to_all(np.int32(most)))
        if most < len(left) and jax.process_index() == 0:
            much = "more than the compiler has" if whole is None else memory.gibibytes(whole)
            print(
                f"{len(left)} runs at once need {much} of {memory.gibibytes(limit)}: at most "
                f"{most} at once, in {math.ceil(len(left) / most)} programs one after another",
                flush=True,
            )
    size = math.ceil(len(left) / math.ceil(len(left) / most))  # of equal sizes: compiled once
    return chunks + [left[i : i + size] for i in range(0, len(left), size)]


def recorded(workdir: Path) -> list[str]:
    """The names of the runs that the checkpoint in ``program/`` is of; [] if there is none."""
    folder = workdir / "program"
    steps = [p for p in (folder / "checkpoints").glob("*") if p.name.isdigit()]
    return read_json(folder / "runs.json") if steps and (folder / "runs.json").exists() else []


def train_chunk(
    config: ml_collections.ConfigDict,
    base: setup.Base,
    chunk: Sequence[Run],
    programs: Programs,
    workdir: Path,
    devices: Devices,
    began: float,
) -> None:
    """Trains the runs of a chunk in one program and finishes their folders."""
    leader = jax.process_index() == 0
    folder, names = workdir / "program", [run.name for run in chunk]
    if leader and recorded(workdir) != names:
        shutil.rmtree(folder, ignore_errors=True)
        write_json(folder / "runs.json", names)
    job = many.build(config, chunk, base, devices)
    with (
        checkpoint.open_checkpoints(folder, keep_best=False) as manager,
        contextlib.ExitStack() as stack,
    ):
        like = Together(job.state, many.best_shapes(job.state))
        together, start = checkpoint.newest(manager, like)
        figures = {"last": [None] * len(chunk), "best": [None] * len(chunk)}
        if start:
            figures = manager.metrics(start)
        else:
            together = Together(many.first_state(chunk, base, devices), None)
        steps = programs.of(job, len(chunk), min(start, base.steps - 1))
        if leader:
            print(f"{len(chunk)} runs in one program, compiled in "
                  f"{terminal.duration(steps.seconds)}"
                  + (f"; continuing after step {start:,}" if start else ""), flush=True)
        writers = [
            stack.enter_context(MetricWriter(
                workdir / run.name,
                total_steps=base.steps,
                start_step=start,
                enabled=leader,
                progress=False,
                tensorboard=False,  # of many runs its events cost as much as some steps
            ))
            for run in chunk
        ]
        try:
            together, figures, seconds = fit(
                config, job, together, figures, steps, manager, writers, devices
            )
        except jax.errors.JaxRuntimeError as e:
            if memory.is_short(e):
                raise UserError(
                    f"{len(chunk)} runs at once are out of memory after all; type "
                    f"--config.sweep.at_once={max(1, len(chunk) // 2)}"
                    + (f", and delete {folder}" if recorded(workdir) else "")
                ) from e
            raise
        manager.wait_until_finished()
    times = Times(seconds, steps.seconds, time.monotonic() - began)
    finish(config, job, chunk, together, figures, steps, workdir, devices, times,
           base.steps - start)
    if leader:
        shutil.rmtree(folder)


def fit(config, job, together, figures, steps, manager, writers, devices):
    """Trains to the last step; returns the states, their figures and the seconds of the steps."""
    count, seconds, best = len(writers), 0.0, together.best
    state, last, shown = together.state, figures["last"], {}
    progress = terminal.Progress(job.steps)
    watched = [nonfinite.Watched(config.nonfinite_limit) for _ in writers]
    for done in loop.stretches(config, job, state, steps, devices):
        state, seconds = done.state, seconds + done.seconds
        own = [[{k: v[i] for k, v in m.items()} for m in done.metrics] for i in range(count)]
        rows = [loop.row_of(done, own[i], job.schedule[i], config, i) for i in range(count)]
        for i, one in enumerate(watched):
            for note in one.add(done.first, own[i]):
                if jax.process_index() == 0:
                    progress.print(f"{writers[i].workdir.name}: {note}")
        if done.evaluating:
            last = [
                checkpoint.scored(found, job.problem.metrics[0]) | {"step": done.step}
                for found in measured(steps, state.trainable, job, "validation", devices)
            ]
            for row, found in zip(rows, last, strict=True):
                row |= {f"eval/{k}": v for k, v in found.items() if k not in ("score", "step")}
            figures, best = kept(state, last, figures, best)
            manager.wait_until_finished()  # as in loop.fit
        for i, (writer, row) in enumerate(zip(writers, rows, strict=True)):
            writer.write(done.step, row)
            if done.evaluating:
                own, frozen = many.pick(state.trainable, i), job.constants.shared.frozen
                loop.keep_factors(config, writer, done.step, own, frozen, job.lora[i])
        over = all(one.over for one in watched)  # one alone stays as it is; the others go on
        if done.evaluating or done.stopping or over:
            if best is None:  # nothing was evaluated yet; no figure says that this is the best
                best = many.better(state, state, np.ones(count, bool))
            checkpoint.write(manager, done.step, Together(state, best), figures)
        if done.stopping or over:
            manager.wait_until_finished()
            if over:
                raise loop.ended(job, state.trainable, watched[0], done.step)
            raise loop.saved_after(done.step, job.steps)
        shown |= summed_up(rows)
        if jax.process_index() == 0:
            progress.update(done.step, shown)
    progress.close()
    return Together(state, best), figures, seconds


def kept(state: State, last: list[dict], figures: dict, best: State | None):
    """The figures and states of each run's best evaluation, of equals the latest."""
    improved = [
        old is None or checkpoint.score(new) >= checkpoint.score(old)
        for new, old in zip(last, figures["best"], strict=True)
    ]
    chosen = [
        new if better else old
        for new, old, better in zip(last, figures["best"], improved, strict=True)
    ]
    best = many.better(state, state if best is None else best, np.array(improved))
    return {"last": last, "best": chosen}, best


def summed_up(rows: list[dict]) -> dict[str, float]:
    """What the terminal shows of many runs: means, the range of the loss, examples of all runs."""
    shown = {k: float(np.mean([row[k] for row in rows])) for k in rows[0]}
    losses = [row["train/loss"] for row in rows]
    return shown | {
        "train/loss/low": float(np.min(losses)),
        "train/loss/high": float(np.max(losses)),
        "examples_per_second": sum(row["examples_per_second"] for row in rows),
    }


def measured(steps, trainable, job, split: str, devices) -> list[dict[str, float]]:
    """The figures of every run over a whole split."""
    outputs = loop.evaluate(steps, trainable, job, split, devices)
    return [
        loop.measured(outputs._replace(predictions=p, losses=losses), job.problem.metrics)
        for p, losses in zip(outputs.predictions, outputs.losses, strict=True)
    ]


def reported(steps, trainable, job, devices) -> list[dict[str, float]]:
    """`loop.reported` of every run."""
    figures = [{} for _ in job.lora]
    for split in job.feed.tests:
        for own, found in zip(
            figures, measured(steps, trainable, job, split, devices), strict=True
        ):
            own |= loop.named(found, split)
    return figures


def finish(
    config, job, chunk, together: Together, figures, steps, workdir, devices, times: Times, trained
) -> None:
    """Evaluates the runs on test, and writes what is left to write of a single run's folder."""
    # Asked before the evaluations, which all processes wait for: no summary is written until then.
    left = [i for i, run in enumerate(chunk) if not (workdir / run.name / "summary.json").exists()]
    last = reported(steps, together.state.trainable, job, devices)
    best = last
    if any(found["step"] != job.steps for found in figures["best"]):
        best = reported(steps, together.best.trainable, job, devices)
    predicted = {
        split: loop.evaluate(steps, together.best.trainable, job, split, devices)
        for split in job.feed.unlabelled
    }
    for i in left:
        run, folder = chunk[i], workdir / chunk[i].name
        write_checkpoints(folder, together, figures, i, job.steps)
        # Programs over all devices, which therefore all processes run.
        own, best_own = (many.pick(s.trainable, i) for s in (together.state, together.best))
        intrinsic = loop.spectrum(own, job.constants.shared.frozen, job.lora[i])
        if jax.process_index() != 0:
            continue
        for split, out in predicted.items():
            job.problem.write_predictions(folder, split, out.ids, out.predictions[i])
        step = figures["best"][i]["step"]
        rate = trained * config.batch_size / times.training if times.training else None
        summary = loop.summary_of(
            run.config,
            job,
            last=last[i],
            best={"step": step} | (last[i] if step == job.steps else best[i]),
            rate=rate,
            compile_seconds=times.compiling,
            wall_seconds=times.wall,
            trainable=jax.device_get(own),
            intrinsic=intrinsic,
        )
        factors = jax.device_get(best_own)
        finished.write_adapter(folder, run.config, job.lora[i], factors, job.problem, summary)
        write_json(folder / "summary.json", summary | {
            "sweep": len(chunk),
            "train_seconds": times.training / len(chunk),
            "program_train_seconds": times.training,
        })


def write_checkpoints(folder: Path, together: Together, figures: dict, i: int, last: int) -> None:
    """The checkpoints that the single run would have left: the best and the last."""
    if jax.process_index() == 0:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # of a finish that was killed
    state = together.state._replace(step=np.full(len(figures["last"]), last, np.int32))
    with checkpoint.open_checkpoints(folder) as manager:
        for name, states in (("best", together.best), ("last", state)):
            found = {k: v for k, v in figures[name][i].items() if k != "step"}
            step = figures[name][i]["step"]
            if name == "last" or step != last:
                checkpoint.write(manager, step, jax.device_get(many.pick(states, i)), found)
