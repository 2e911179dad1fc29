"""A run from its first step to its report; the same folder again continues where it stopped."""

import functools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import ml_collections
import numpy as np

import rmlora_jax as rm
from rmlora_jax.errors import UserError
from rmlora_jax.train import checkpoint, setup, terminal
from rmlora_jax.train.config import check_config, differences
from rmlora_jax.train.files import plain, read_json, write_json
from rmlora_jax.train.mesh import Devices, all_devices, shard
from rmlora_jax.train.metrics import MetricWriter, read_metrics
from rmlora_jax.train.report import verdict, write_report
from rmlora_jax.train.step import State


def train(config: ml_collections.ConfigDict, workdir: Path) -> dict:
    """Trains, evaluates, writes everything into ``workdir`` and returns its ``summary.json``.

    Raises:
      UserError: what the person who started the run can put right; nothing is left half written.
    """
    began = time.monotonic()
    check_config(config)
    workdir = Path(workdir).absolute()
    check_workdir(config, workdir)
    leader = jax.process_index() == 0
    if (workdir / "summary.json").exists():
        summary = read_json(workdir / "summary.json")
        if leader and not (workdir / "report.png").exists():  # killed between the two
            write_report(workdir)
        print("this run is finished; another --workdir starts a new one")
        print(ending(summary, workdir), flush=True)
        return summary
    use_compilation_cache(config.compilation_cache)
    devices = all_devices(config.parallel)
    try:
        job = setup.build(config, devices)
    except UserError:
        if not any(workdir.iterdir()):
            workdir.rmdir()
        raise
    if leader:
        write_json(workdir / "config.json", config.to_dict())

    with checkpoint.open_checkpoints(workdir) as checkpoints:
        state, start = job.state, checkpoints.latest_step() or 0
        if start:
            state = checkpoint.restore(checkpoints, state, start)
        with MetricWriter(
            workdir, total_steps=job.steps, start_step=start, enabled=leader
        ) as writer:
            writer.print(
                terminal.header(
                    devices=jax.devices(),
                    mesh=dict(devices.mesh.shape),
                    model=config.model.source,
                    method=config.method,
                    trainable=job.trainable_parameters,
                    total=job.total_parameters,
                    data=job.feed.sizes,
                    dataset=config.data.name,
                    workdir=workdir,
                    start_step=start,
                    total_steps=job.steps,
                )
            )
            for note in job.notes:
                writer.print(note)
            compiled = compile_steps(job, state, devices)
            writer.print(f"compiled in {terminal.duration(compiled.seconds)}")
            state, rate = fit(config, job, state, compiled, checkpoints, writer, devices)
        checkpoints.wait_until_finished()
        last = evaluate(compiled, state.trainable, job, "test", devices)
        best = checkpoint.best_step(checkpoints)
        summary = {
            "method": config.method,
            "model": config.model.source,
            "dataset": config.data.name,
            "steps": job.steps,
            "eval": last,
            "best_eval": {"step": best}
            | (
                last
                if best == job.steps
                else earlier_evaluation(best, checkpoints, compiled, state, job, devices)
            ),
            "trainable_parameters": job.trainable_parameters,
            "total_parameters": job.total_parameters,
            "examples_per_second": rate,
            "compile_seconds": compiled.seconds,
            "wall_seconds": time.monotonic() - began,
            "intrinsic_dimension": plain(spectrum(state, job)),
        }
    if leader:
        write_json(workdir / "summary.json", summary)
        write_report(workdir)
        print(ending(summary, workdir), flush=True)
    return summary


def ending(summary: dict, workdir: Path) -> str:
    return terminal.closing(summary, workdir, verdict=verdict(read_metrics(workdir)))


class Compiled(NamedTuple):
    """Both steps, compiled ahead, so that their time is known and the first step is like any."""

    train_step: Callable
    eval_step: Callable
    seconds: float


def compile_steps(job: setup.Job, state: State, devices: Devices) -> Compiled:
    began = time.monotonic()
    batch = shard(next(iter(job.feed.train(0))), devices)
    train_step = job.train_step.lower(state, job.constants, batch).compile()
    batch = shard(next(iter(job.feed.evaluate("validation"))), devices)
    eval_step = job.eval_step.lower(state.trainable, job.constants, batch).compile()
    return Compiled(train_step, eval_step, time.monotonic() - began)


def fit(config, job: setup.Job, state: State, compiled: Compiled, checkpoints, writer, devices):
    """Trains to the last step; returns the state and the rate in examples per second.

    The rate counts the time of training steps alone, evaluation and checkpoints excluded.
    """
    pending, seconds, trained = [], 0.0, 0
    since = time.monotonic()
    start = int(state.step)
    for done, batch in zip(range(start + 1, job.steps + 1), job.feed.train(start), strict=False):
        state, metrics = compiled.train_step(state, job.constants, shard(batch, devices))
        pending.append(metrics)
        evaluating = done % job.eval_every == 0 or done == job.steps
        if done % config.log_every and not evaluating:
            continue
        row = mean_of(jax.device_get(pending))  # waits for the steps
        elapsed = time.monotonic() - since
        seconds, trained = seconds + elapsed, trained + len(pending)
        row["learning_rate"] = float(job.schedule(done - 1))
        row["examples_per_second"] = len(pending) * config.batch_size / elapsed
        pending = []
        if evaluating:
            validation = evaluate(compiled, state.trainable, job, "validation", devices)
            row |= {f"eval/{name}": value for name, value in validation.items()}
            writer.write(done, row)
            writer.intrinsic(done, spectrum(state, job))
            checkpoint.save(checkpoints, state, validation)
        else:
            writer.write(done, row)
        since = time.monotonic()
    return state, trained * config.batch_size / seconds if seconds else None


def mean_of(metrics: list[dict]) -> dict[str, float]:
    """Means of the steps' metrics, under the names of metrics.jsonl."""
    return {f"train/{k}": np.mean([m[k] for m in metrics], dtype=np.float32) for k in metrics[0]}


def evaluate(compiled: Compiled, trainable, job: setup.Job, split: str, devices: Devices) -> dict:
    """Accuracy and mean loss over the whole split, by exact counts."""
    sums = [
        compiled.eval_step(trainable, job.constants, shard(batch, devices))
        for batch in job.feed.evaluate(split)
    ]
    total = {k: sum(float(s[k]) for s in jax.device_get(sums)) for k in sums[0]}
    return {
        "accuracy": total["correct"] / total["count"],
        "loss": total["loss"] / total["count"],
    }


def earlier_evaluation(step: int, checkpoints, compiled, state: State, job, devices) -> dict:
    """Test figures of an earlier step."""
    earlier = checkpoint.restore(checkpoints, state, step)
    return evaluate(compiled, earlier.trainable, job, "test", devices)


def spectrum(state: State, job: setup.Job) -> dict:
    """`rmlora_jax.intrinsic_dimension` of the adapted weights; {} for methods without."""
    if job.lora.target is None:
        return {}
    return jax.device_get(_spectrum(state.trainable, job.constants.frozen, job.lora))


@functools.partial(jax.jit, static_argnums=2)
def _spectrum(trainable, frozen, lora):
    return rm.intrinsic_dimension(rm.join(trainable, frozen), lora)


def check_workdir(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Refuses a folder that cannot be written or that holds a run of another config."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=workdir).close()
    except OSError as e:
        raise UserError(
            f"cannot write to the workdir {workdir}: {e.strerror}; give another --workdir"
        ) from e
    file = workdir / "config.json"
    if not file.exists():
        if (workdir / "checkpoints").is_dir() and any((workdir / "checkpoints").iterdir()):
            raise UserError(
                f"{workdir} has checkpoints but no config.json, so what they belong to is not "
                "known; give another --workdir"
            )
        return
    try:
        changed = differences(read_json(file), config.to_dict())
    except (ValueError, AttributeError) as e:
        raise UserError(f"{file} is not a config ({e}); give another --workdir") from e
    if changed:
        raise UserError(
            f"{workdir} holds a run with another config: {'; '.join(changed)}\n"
            "Give the same config to continue that run, or another --workdir to start a new one"
        )


def use_compilation_cache(folder: str) -> None:
    """Keeps compiled programs on disk, so that the next start of the same run is quick."""
    if folder:
        jax.config.update("jax_compilation_cache_dir", str(Path(folder).expanduser()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
