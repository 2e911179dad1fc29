"""A run from its first step to its report; the same folder again continues where it stopped."""

import functools
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import ml_collections
import numpy as np

import rmlora_jax as rm
from rmlora_jax import methods as method
from rmlora_jax.errors import UserError
from rmlora_jax.files import plain, read_json, write_json
from rmlora_jax.parallel.mesh import Devices, all_devices, shard
from rmlora_jax.report.run import verdict, write_report
from rmlora_jax.tasks.scores import score
from rmlora_jax.tasks.task import Outputs
from rmlora_jax.train import checkpoint, finished, nonfinite, setup, snapshots, terminal
from rmlora_jax.train.check import check_run
from rmlora_jax.train.config import is_sweep
from rmlora_jax.train.metrics import MetricWriter, read_metrics
from rmlora_jax.train.step import State, updates_done
from rmlora_jax.train.stopping import Stopped, watch
from rmlora_jax.train.workdir import check_nothing_lost, check_workdir, opened


def train(config: ml_collections.ConfigDict, workdir: Path) -> dict:
    """Trains, evaluates, writes everything into ``workdir`` and returns its ``summary.json``.

    Raises:
      UserError: what the person who started the run can put right; nothing is left half written.
    """
    check_run(config)
    if is_sweep(config):
        raise ValueError("loop.train is for a single run: call sweep.train")
    workdir = Path(workdir).absolute()
    with opened(workdir):
        return _train(config, workdir)


def _train(config: ml_collections.ConfigDict, workdir: Path) -> dict:
    began = time.monotonic()
    longer = check_workdir(config, workdir)
    leader = jax.process_index() == 0
    if (workdir / "summary.json").exists() and not longer:
        summary = read_json(workdir / "summary.json")
        if leader and not (workdir / "report.png").exists():  # killed between the two
            write_report(workdir)
        print("this run is finished; another --workdir starts a new one")
        print(ending(summary, workdir), flush=True)
        return summary
    use_compilation_cache(config.compilation_cache)
    devices = all_devices(config.parallel, fsdp=config.fsdp)
    job = setup.build(config, devices)

    with checkpoint.open_checkpoints(workdir) as checkpoints:
        found, start = checkpoint.newest(checkpoints, job.state)
        state = job.state if found is None else found
        if not start:
            check_nothing_lost(workdir)
        if start > job.steps:
            raise UserError(
                f"{workdir} is at step {start:,} already, and this config ends at {job.steps:,}; "
                f"type --config.steps={start} or more, or give another --workdir"
            )
        if leader:
            (workdir / "summary.json").unlink(missing_ok=True)  # of a run that goes on
            write_json(workdir / "config.json", config.to_dict())
        with MetricWriter(
            workdir, total_steps=job.steps, start_step=start, enabled=leader
        ) as writer:
            writer.print(header(config, job, devices, workdir, start_step=start))
            for note in job.problem.notes:
                writer.print(note)
            compiled = compile_steps(job, state, start, devices)
            writer.print(f"compiled in {terminal.duration(compiled.seconds)}")
            state, rate = fit(config, job, state, compiled, checkpoints, writer, devices)
        checkpoints.wait_until_finished()
        last = reported(compiled, state.trainable, job, devices)
        best, best_eval = state, last
        step = checkpoint.best_step(checkpoints)
        if step != job.steps:
            best, step = checkpoint.best(checkpoints, state)
            best_eval = reported(compiled, best.trainable, job, devices)
        checkpoint.keep_only(checkpoints, {step, job.steps})
        for split in job.feed.unlabelled:
            out = evaluate(compiled, best.trainable, job, split, devices)
            if leader:
                file = job.problem.write_predictions(workdir, split, out.ids, out.predictions)
                print(f"predictions of step {step:,} for {split}: {file}")
        summary = summary_of(
            config,
            job,
            last=last,
            best={"step": step} | best_eval,
            rate=rate,
            compile_seconds=compiled.seconds,
            wall_seconds=time.monotonic() - began,
            trainable=jax.device_get(state.trainable),
            intrinsic=spectrum(state.trainable, job.constants.frozen, job.lora),
        )
    if leader:
        trained = jax.device_get(best.trainable)
        finished.write_adapter(workdir, config, job.lora, trained, job.problem, summary)
        write_json(workdir / "summary.json", summary)
        write_report(workdir)
        print(ending(summary, workdir), flush=True)
    return summary


def header(config, of: setup.Job | setup.Base, devices: Devices, workdir: Path, **more) -> str:
    """What is about to be trained, for the terminal."""
    return terminal.header(
        devices=jax.devices(),
        mesh=dict(devices.mesh.shape),
        model=config.model.source,
        method=config.method,
        trainable=of.trainable_parameters,
        total=of.total_parameters,
        data=of.feed.sizes,
        dataset=config.data.name,
        workdir=workdir,
        total_steps=of.steps,
        **more,
    )


def summary_of(
    config, job: setup.Job, *, last, best, rate, compile_seconds, wall_seconds, trainable, intrinsic
) -> dict:
    """What ``summary.json`` says of a run."""
    return {
        "task": config.task,
        "method": config.method,
        "model": config.model.source,
        "dataset": config.data.name,
        "steps": job.steps,
        "metric": job.problem.metrics[0],
        "eval": last,
        "best_eval": best,
        "trainable_parameters": job.trainable_parameters,
        "final_parameters": plain(method.left(config, trainable)),
        "total_parameters": job.total_parameters,
        "skipped_records": list(job.problem.skipped),
        "examples_per_second": rate,
        "compile_seconds": compile_seconds,
        "wall_seconds": wall_seconds,
        "peak_memory_bytes": peak_memory(),
        "intrinsic_dimension": plain(intrinsic),
    }


def ending(summary: dict, workdir: Path) -> str:
    return terminal.closing(summary, workdir, verdict=verdict(read_metrics(workdir)))


class Compiled:
    """A mapped step, compiled once for each shape of its batch; ``seconds`` is the time it took.

    Compilation is thus apart from training in every figure, also where the batches of a long text
    come late in a run.
    """

    def __init__(self, step: Callable):
        self.step, self.programs, self.seconds = step, {}, 0.0

    def program(self, changed, constants, batch) -> Callable:
        shapes = tuple((name, x.shape) for name, x in sorted(batch.items()))
        if shapes not in self.programs:
            began = time.monotonic()
            self.programs[shapes] = self.step.lower(changed, constants, batch).compile()
            self.seconds += time.monotonic() - began
        return self.programs[shapes]

    def __call__(self, changed, constants, batch):
        return self.program(changed, constants, batch)(changed, constants, batch)


class Steps(NamedTuple):
    train: Compiled
    evaluate: Compiled

    @property
    def seconds(self) -> float:
        return self.train.seconds + self.evaluate.seconds


def compile_steps(job: setup.Job, state: State, start: int, devices: Devices) -> Steps:
    """Both steps, compiled for the shapes of their first batches from step ``start`` on."""
    steps = Steps(Compiled(job.train_step), Compiled(job.eval_step))
    batch = shard(next(iter(job.feed.train(start))), devices)
    steps.train.program(state, job.constants, batch)
    batch = shard(next(iter(job.feed.evaluate("validation"))), devices)
    steps.evaluate.program(state.trainable, job.constants, batch)
    return steps


def fit(config, job: setup.Job, state: State, compiled: Steps, checkpoints, writer, devices):
    """Trains to the last step; returns the state and the rate in examples per second.

    The rate counts the time of training steps alone: without compilation, evaluation, checkpoints.
    """
    seconds, trained = 0.0, 0
    watched = nonfinite.Watched(config.nonfinite_limit)
    for done in stretches(config, job, state, compiled, devices):
        state = done.state
        seconds, trained = seconds + done.seconds, trained + len(done.metrics)
        row = row_of(done, done.metrics, job.schedule, config)
        for note in watched.add(done.first, done.metrics):
            writer.print(note)
        if done.evaluating:
            outputs = evaluate(compiled, state.trainable, job, "validation", devices)
            validation = measured(outputs, job.problem.metrics)
            row |= {f"eval/{name}": value for name, value in validation.items()}
            checkpoints.wait_until_finished()  # see check_nothing_lost
            writer.write(done.step, row)
            keep_factors(
                config, writer, done.step, state.trainable, job.constants.frozen, job.lora
            )
            writer.flush()
            checkpoint.save(checkpoints, state, validation, job.problem.metrics[0])
        else:
            writer.write(done.step, row)
        if done.stopping or watched.over:
            if not done.evaluating:
                writer.flush()
                checkpoint.save(checkpoints, state, UNKNOWN, "loss")
            checkpoints.wait_until_finished()
            if watched.over:
                raise ended(job, state.trainable, watched, done.step)
            raise saved_after(done.step, job.steps)
    return state, trained * config.batch_size / seconds if seconds else None


def saved_after(step: int, steps: int) -> Stopped:
    return Stopped(f"saved after step {step:,} of {steps:,}; the same command goes on from there")


def ended(job: setup.Job, trainable, watched: nonfinite.Watched, step: int):
    """The error of a run that has had too many steps in a row that are not finite."""
    batch = next(iter(job.feed.train(watched.first - 1)))
    where = job.look(trainable, job.constants, batch, watched.first - 1)
    return nonfinite.ended(watched, step, batch["id"], where)


# The figures of a checkpoint that was saved without an evaluation: never the best.
UNKNOWN = {"loss": math.inf}


def keep_factors(config, writer, step: int, trainable, frozen, lora: rm.LoRA) -> None:
    """Writes what an evaluation keeps of a run's factors: spectrum and, if asked, a snapshot."""
    intrinsic = spectrum(trainable, frozen, lora)
    writer.intrinsic(step, intrinsic)
    if config.snapshots and writer.enabled and intrinsic:
        snapshots.save(writer.workdir, step, jax.device_get(trainable))


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


def stretches(config, job: setup.Job, state: State, compiled: Steps, devices) -> Iterator[Stretch]:
    """Trains from ``state`` to the last step; what is done with a stretch is not in its time."""
    pending = []

    def clock():
        return time.monotonic() - compiled.seconds

    since = clock()
    start = int(state.step)
    skipped = start - np.asarray(jax.device_get(updates_done(state.opt_state)))
    batches = zip(range(start + 1, job.steps + 1), job.feed.train(start), strict=False)
    with watch("saving after this step") as asked:
        for done, batch in batches:
            state, metrics = compiled.train(state, job.constants, shard(batch, devices))
            pending.append(metrics)
            stopping = asked(done) and done < job.steps
            evaluating = done % job.eval_every == 0 or done == job.steps
            if done % config.log_every and not evaluating and not stopping:
                continue
            metrics = jax.device_get(pending)  # waits for the steps
            skipped = skipped + np.sum([m["skipped"] for m in metrics], axis=0, dtype=np.int64)
            yield Stretch(done, state, metrics, skipped, clock() - since, evaluating, stopping)
            pending, since = [], clock()


def row_of(done: Stretch, metrics: list[dict], schedule, config, run=()) -> dict[str, float]:
    """A line of metrics.jsonl from the metrics of each step of one run."""
    skipped = [int(m["skipped"]) for m in metrics]
    updates = done.step - 1 - int(done.skipped[run]) + skipped[-1]  # before the last step
    return mean_of(metrics) | {
        "learning_rate": float(schedule(updates)),
        "skipped": sum(skipped),
        "examples_per_second": len(metrics) * config.batch_size / done.seconds,
    }


def mean_of(metrics: list[dict]) -> dict[str, float]:
    """Means of the steps' metrics, under the names of metrics.jsonl; of those that were not
    skipped, if there are any."""
    kept = [m for m in metrics if not m.get("skipped")] or metrics
    names = [k for k in metrics[0] if k != "skipped"]
    return {f"train/{k}": np.mean([m[k] for m in kept], dtype=np.float32) for k in names}


def evaluate(compiled: Steps, trainable, job: setup.Job, split: str, devices: Devices) -> Outputs:
    """The outputs for every example of a split, each once, in the order of their ids."""
    batches = jax.device_get(
        [
            compiled.evaluate(trainable, job.constants, shard(batch, devices))
            for batch in job.feed.evaluate(split)
        ]
    )
    rows = {k: np.concatenate([b[k] for b in batches], axis=-1) for k in batches[0]}
    order = np.argsort(rows["id"], kind="stable")
    order = order[rows["mask"][order]]
    return Outputs(*(rows[k][..., order] for k in ("id", "prediction", "label", "loss")))


def measured(outputs: Outputs, metrics: tuple[str, ...]) -> dict[str, float]:
    """The task's metrics over a whole split, the first of them first, and the mean loss."""
    found = score(outputs.predictions, outputs.labels, metrics)
    return found | {"loss": float(outputs.losses.mean(dtype=np.float64))}


def reported(compiled: Steps, trainable, job: setup.Job, devices: Devices) -> dict[str, float]:
    """The figures of every reported split; names of the first are bare, "test_x" gives "_x"."""
    figures = {}
    for split in job.feed.tests:
        outputs = evaluate(compiled, trainable, job, split, devices)
        figures |= named(measured(outputs, job.problem.metrics), split)
    return figures


def named(figures: dict[str, float], split: str) -> dict[str, float]:
    """Figures under the names of a reported split."""
    suffix = split.removeprefix("test")
    return {name + suffix: value for name, value in figures.items()}


def peak_memory() -> int | None:
    """The most that this process's first device has held; None where it does not count."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def spectrum(trainable, frozen, lora: rm.LoRA) -> dict:
    """`rmlora_jax.intrinsic_dimension` of the adapted weights; {} for methods without."""
    if lora.target is None:
        return {}
    return jax.device_get(_spectrum(trainable, frozen, lora))


@functools.partial(jax.jit, static_argnums=2)
def _spectrum(trainable, frozen, lora):
    return rm.intrinsic_dimension(rm.join(trainable, frozen), lora)


def use_compilation_cache(folder: str) -> None:
    """Keeps compiled programs on disk, so that the next start of the same run is quick."""
    if folder:
        jax.config.update("jax_compilation_cache_dir", str(Path(folder).expanduser()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
