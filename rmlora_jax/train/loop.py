"""A program from its first step to the folders of its runs; a single run is a program of one.

    config -> setup.build -> fit: steps, evaluations, checkpoints -> finish: what a run leaves

The same folder again continues where it stopped.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from rmlora_jax import config as fields
from rmlora_jax import methods
from rmlora_jax.config import ConfigDict
from rmlora_jax.errors import UserError
from rmlora_jax.fields import Run
from rmlora_jax.files import placed, write_json
from rmlora_jax.hub.info import Info, write_info
from rmlora_jax.parallel.mesh import all_devices, shard, use_compilation_cache
from rmlora_jax.report.records import read_metrics, read_summary
from rmlora_jax.report.run import verdict, write_report
from rmlora_jax.stopping import Stopped, watch
from rmlora_jax.tasks.task import measured
from rmlora_jax.train import checkpoint, finished, nonfinite, record, setup, shortage, terminal
from rmlora_jax.train.config import flatten, resolve, ways_on
from rmlora_jax.train.evaluate import (
    Steps,
    compile_steps,
    evaluate,
    figures_of,
    spectrum,
    unanswered,
)
from rmlora_jax.train.metrics import MetricWriter, line_of
from rmlora_jax.train.step import State, updates_done
from rmlora_jax.train.workdir import RECORD, as_begun, check_nothing_lost, check_workdir, opened

Callback = Callable[[dict[str, Any]], object]  # is told a line of metrics.jsonl


def train(config: ConfigDict | Run, workdir: Path, callbacks: Sequence[Callback] = ()) -> dict:
    """Trains, evaluates, writes everything into ``workdir`` and returns its ``summary.json``.

    Each of ``callbacks`` is called with every line of metrics.jsonl once it is written. What it
    raises ends the run when the step is saved. Of several processes each calls them.

    Raises:
      UserError: what the person who started the run can put right; nothing is left half written.
    """
    run = resolve(config, there=True)
    if run.is_sweep:
        raise ValueError("loop.train is for a single run: call sweep.train")
    workdir = placed(workdir)
    with opened(workdir):
        return _train(run, workdir, callbacks)


def _train(config: Run, workdir: Path, callbacks: Sequence[Callback]) -> dict:
    began = time.monotonic()
    config = as_begun(config, workdir)
    longer = check_workdir(config, workdir)
    leader = jax.process_index() == 0
    if (workdir / "summary.json").exists() and not longer:
        summary = read_summary(workdir)
        if leader and not (workdir / "report.png").exists():  # killed between the two
            write_report(workdir)
        more = "a larger --config.patience, or 0, trains it on; " if "stopped" in summary else ""
        print(f"this run is finished; {more}{ways_on(config, workdir)}")
        print(ending(summary, workdir), flush=True)
        return summary
    use_compilation_cache(config.compilation_cache)
    devices = all_devices(config.parallel, fsdp=config.fsdp)
    with shortage.in_two_lines(config, devices, workdir) as plan:
        job = setup.build(config, devices)
        read = record.record_of(job.base)
        record.check_record(workdir, read)

        with checkpoint.open_checkpoints(workdir) as manager:
            found, start = checkpoint.newest(manager, job.state)
            state = job.state if found is None else found
            if not start:
                check_nothing_lost(workdir)
            if start > job.steps:
                raise UserError(
                    f"{workdir} is at step {start:,} already, and this config ends at "
                    f"{job.steps:,}; type --config.steps={start} or more, or give another --workdir"
                )
            if leader:
                print(header(job.base, workdir, start=start), flush=True)
            compiled = compile_steps(job, state, start)
            plan.check(compiled)
            if leader:  # no earlier: what does not compile or fit leaves nothing behind
                (workdir / "summary.json").unlink(missing_ok=True)  # of a run that goes on
                write_beginning(workdir, config, read, job.problem.info)
                print(f"compiled in {terminal.duration(compiled.seconds)}", flush=True)
            waited = checkpoint.waited(manager)
            keeper = checkpoint.Keeper(manager, job.problem.metrics[0], waited)
            (summary,) = train_program(
                job, state, compiled, keeper, [workdir], began, callbacks
            )
    if leader:
        write_report(workdir)
        print(ending(summary, workdir), flush=True)
    return summary


def write_beginning(workdir: Path, config: Run, read: dict, info: Info | None = None) -> None:
    """Writes what a run is, before its first step: what it read, its config, and what its model is
    for, so that the model of a checkpoint can be used."""
    write_json(workdir / RECORD, read)
    write_json(workdir / "config.json", fields.nested(flatten(config)))
    if info is not None:
        write_info(workdir, info)


def train_program(
    job: setup.Job,
    state: State,
    compiled: Steps,
    keeper: checkpoint.Keeper,
    folders: Sequence[Path],
    began: float,
    callbacks: Sequence[Callback] = (),
) -> list[dict]:
    """Trains the runs of a job from ``state`` to the last step and writes what each one leaves.

    ``began`` is the ``time.monotonic`` of this start. Returns the ``summary.json`` of each run that
    had none.
    """
    leader, start = jax.process_index() == 0, int(state.step)
    with contextlib.ExitStack() as stack:
        asked = stack.enter_context(watch("saving after this step"))
        config = job.base.config
        # TensorBoard's events of many runs cost as much as some steps.
        logger = "none" if job.stacked else config.logger
        writers = [
            stack.enter_context(MetricWriter(
                folder, start_step=start, enabled=leader, logger=logger, config=flatten(config)
            ))
            for folder in folders
        ]
        progress = stack.enter_context(contextlib.closing(terminal.Progress(job.steps)))
        state, speed = fit(job, state, compiled, keeper, writers, progress, asked, callbacks)
        keeper.wait()
    return finished.finish(job, state, keeper, compiled, folders, began, speed)


def header(base: setup.Base, workdir: Path, *, start=0, runs: str | None = None) -> str:
    """What a run begins with: a table, and notes on data and model.

    ``runs`` says in words which runs a sweep has.
    """
    sizes = ", ".join(f"{split} {n:,}" for split, n in base.feed.sizes.items())
    steps = f"{base.steps:,}" + (f", continuing after step {start:,}" if start else "")
    table = terminal.format_table("rmlora_jax", [
        ("devices", terminal.count_devices(jax.devices())),
        ("mesh", ", ".join(f"{axis} {n}" for axis, n in base.devices.mesh.shape.items())),
        ("model", base.config.model.source),
        ("method", base.config.method),
        ("runs", runs),
        ("parameters", terminal.parameters(base.trainable_parameters, base.total_parameters)),
        ("data", f"{base.config.data.name}: {sizes}"),
        ("steps", steps),
        ("workdir", workdir),
    ])
    return "\n".join([table, *base.problem.notes])


def ending(summary: dict, workdir: Path) -> str:
    return terminal.closing(summary, workdir, verdict(read_metrics(workdir)))


def fit(
    job: setup.Job,
    state: State,
    compiled: Steps,
    keeper: checkpoint.Keeper,
    writers: Sequence[MetricWriter],
    progress: terminal.Progress,
    asked: Callable[[int], bool],
    callbacks: Sequence[Callback] = (),
) -> tuple[State, finished.Speed]:
    """Trains to the last step, or until ``patience`` is used up; returns the state and what the
    training steps alone took.

    Raises:
      Stopped: ``asked(step)`` said that the run should save and stop.
      Exception: whatever a callback raised, once the step is saved.
    """
    speed, shown, leader = finished.Speed(), {}, jax.process_index() == 0
    config = job.base.config
    watched = [nonfinite.Watched(config.nonfinite_limit) for _ in job.runs]
    schedules = [methods.learning_rate(run, job.steps) for run in job.runs]
    used = finished.used_by_a_token(job)

    def is_patient() -> bool:
        return not 0 < config.patience <= keeper.waited

    # A run that was killed after its last evaluation has nothing left to train.
    for done in stretches(job, state, compiled, asked) if is_patient() else ():
        state = done.state
        metrics = [list(of_run) for of_run in zip(*map(job.apart, done.metrics), strict=True)]
        speed = speed.after(done.seconds, metrics[0])
        rows = [
            row_of(done, own, schedule, config, skipped, used)
            for own, schedule, skipped in zip(
                metrics, schedules, np.ravel(done.skipped), strict=True
            )
        ]
        for writer, one, own in zip(writers, watched, metrics, strict=True):
            for note in one.add(done.first, own):
                if leader:
                    progress.print(f"{writer.workdir.name}: {note}" if writers[1:] else note)
        validation = []
        if done.evaluating:
            outputs = evaluate(compiled, state.trainable, job, "validation")
            unanswered(job, "validation", outputs, progress.print)
            problem = job.problem
            validation = [measured(own, problem.metrics, problem.positive) for own in outputs]
            beside = {split: evaluate(compiled, state.trainable, job, split)
                      for split in job.feed.watched}
            others = figures_of(beside, job)
            validation = [own | other for own, other in zip(validation, others, strict=True)]
            for row, found in zip(rows, validation, strict=True):
                row |= {f"validation/{name}": value for name, value in found.items()}
            keeper.wait()  # see check_nothing_lost
        for i, (writer, row) in enumerate(zip(writers, rows, strict=True)):
            writer.write(done.step, row)
            if done.evaluating:
                keep_factors(job, i, writer, done.step, job.pick(state.trainable, i))
        shown |= summed_up(rows)
        if leader:
            progress.update(done.step, shown)
        failed = failure(callbacks, done.step, writers, rows)
        # One run alone stays as it is; the others of its program go on.
        over = all(one.over for one in watched)
        early = done.stopping or over or failed is not None
        if done.evaluating or early:
            for writer in writers:
                writer.flush()
        if done.evaluating:
            keeper.evaluated(state, validation)
        elif early:
            keeper.interrupted(state)
        if early:
            keeper.wait()
            if failed is not None:
                raise failed
            if over:
                raise nonfinite.ended(job, state.trainable, watched[0], done.step)
            raise Stopped(
                f"saved after step {done.step:,} of {job.steps:,}; the same command goes on from "
                "there"
            )
        if not is_patient():
            break
    return state, speed


def failure(
    callbacks: Sequence[Callback],
    step: int,
    writers: Sequence[MetricWriter],
    rows: Sequence[Mapping[str, float]],
) -> BaseException | None:
    """Calls ``callbacks`` with the lines of a step; returns what one of them raised.

    A line of one of many runs also has its name, as ``"run"``.
    """
    try:
        for callback in callbacks:
            for writer, row in zip(writers, rows, strict=True):
                line = line_of(step, row)
                callback(line | {"run": writer.workdir.name} if writers[1:] else line)
    except BaseException as error:  # KeyboardInterrupt, too: the step is saved first
        return error
    return None


def summed_up(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """What the terminal shows: of many runs means, the range of the loss, examples of all runs."""
    if len(rows) == 1:
        return dict(rows[0])
    losses = [row["train/loss"] for row in rows]
    return {k: float(np.mean([row[k] for row in rows])) for k in rows[0]} | {
        "train/loss/low": float(np.min(losses)),
        "train/loss/high": float(np.max(losses)),
    } | {k: sum(row[k] for row in rows) for k in rows[0] if k.endswith("_per_second")}


def keep_factors(job: setup.Job, i: int, writer: MetricWriter, step: int, trainable) -> None:
    """Writes what an evaluation keeps of a run's factors: spectrum and, if asked, a snapshot."""
    intrinsic = spectrum(job, i, trainable)
    writer.intrinsic(step, intrinsic)
    if job.runs[i].snapshots and writer.enabled and intrinsic:
        checkpoint.save_snapshot(writer.workdir, step, jax.device_get(trainable))


class Stretch(NamedTuple):
    """The steps up to a line of metrics.jsonl."""

    step: int  # optimizer steps done
    state: State  # valid until the next stretch, which reuses its memory
    metrics: list[dict]  # of each step, on the host
    skipped: np.ndarray  # steps up to here that changed nothing, () or of each run (K,)
    seconds: float  # that the steps took, without compilation
    evaluating: bool  # whether an evaluation and a checkpoint are due
    stopping: bool  # whether the run was asked to stop: then only a checkpoint is

    @property
    def first(self) -> int:
        return self.step - len(self.metrics) + 1


def stretches(
    job: setup.Job, state: State, compiled: Steps, asked: Callable[[int], bool]
) -> Iterator[Stretch]:
    """Trains from ``state`` to the last step. Time the caller spends between stretches is not
    counted."""
    pending = []

    def clock():
        return time.monotonic() - compiled.seconds

    since = clock()
    start = int(state.step)
    skipped = start - np.asarray(jax.device_get(updates_done(state.opt_state)))
    batches = zip(range(start + 1, job.steps + 1), job.feed.train(start), strict=False)
    for done, batch in batches:
        state, metrics = compiled.train(state, job.constants, shard(batch, job.base.devices))
        pending.append(metrics)
        stopping = asked(done) and done < job.steps
        evaluating = done % job.eval_every == 0 or done == job.steps
        if done % job.base.config.log_every and not evaluating and not stopping:
            continue
        metrics = jax.device_get(pending)  # waits for the steps
        skipped = skipped + np.sum([m["skipped"] for m in metrics], axis=0, dtype=np.int64)
        yield Stretch(done, state, metrics, skipped, clock() - since, evaluating, stopping)
        pending, since = [], clock()


def row_of(
    done: Stretch,
    metrics: list[dict],
    schedule: optax.Schedule,
    config: Run,
    skipped_so_far: int,
    used: float | None = None,
) -> dict[str, float]:
    """A line of metrics.jsonl from the metrics of each step of one run; for ``used`` see
    `finished.used_by_a_token`."""
    skipped = [int(m["skipped"]) for m in metrics]
    updates = done.step - 1 - int(skipped_so_far) + skipped[-1]  # before the last step
    speed = finished.Speed().after(done.seconds, metrics)
    return mean_of(metrics) | {
        "learning_rate": float(np.asarray(schedule(updates))),
        "skipped": sum(skipped),
    } | speed.rates(config.batch_size, used)


def mean_of(metrics: list[dict]) -> dict[str, Any]:
    """Means over the steps that were not skipped, or else over all, by names of metrics.jsonl."""
    kept = [m for m in metrics if not m.get("skipped")] or metrics
    names = [k for k in metrics[0] if k != "skipped"]
    return {f"train/{k}": np.mean([m[k] for m in kept], dtype=np.float32) for k in names}
