"""A program from its first step to the folders of its runs; a single run is a program of one.

    config -> setup.build -> fit: steps, evaluations, checkpoints -> finish: what a run leaves

The same folder again continues where it stopped.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import rmlora_jax as rm
from rmlora_jax import config as fields
from rmlora_jax import methods
from rmlora_jax.config import ConfigDict
from rmlora_jax.errors import UserError
from rmlora_jax.fields import Run
from rmlora_jax.files import plain, read_json, write_json
from rmlora_jax.parallel.mesh import Devices, all_devices, shard
from rmlora_jax.report.run import verdict, write_report
from rmlora_jax.tasks.task import Outputs, measured
from rmlora_jax.train import checkpoint, finished, nonfinite, setup, snapshots, terminal
from rmlora_jax.train.config import flatten, resolve
from rmlora_jax.train.metrics import MetricWriter, read_metrics
from rmlora_jax.train.step import State, updates_done
from rmlora_jax.train.stopping import Stopped, watch
from rmlora_jax.train.workdir import check_nothing_lost, check_workdir, opened


def train(config: ConfigDict | Run, workdir: Path) -> dict:
    """Trains, evaluates, writes everything into ``workdir`` and returns its ``summary.json``.

    Raises:
      UserError: what the person who started the run can put right; nothing is left half written.
    """
    run = resolve(config, there=True)
    if run.is_sweep:
        raise ValueError("loop.train is for a single run: call sweep.train")
    workdir = Path(workdir).absolute()
    with opened(workdir):
        return _train(run, workdir)


def _train(config: Run, workdir: Path) -> dict:
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

    with checkpoint.open_checkpoints(workdir) as manager:
        found, start = checkpoint.newest(manager, job.state)
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
            write_config(workdir, config)
            print(header(config, job.base, devices, workdir, start_step=start), flush=True)
            for note in job.problem.notes:
                print(note, flush=True)
        compiled = compile_steps(job, state, start, devices)
        if leader:
            print(f"compiled in {terminal.duration(compiled.seconds)}", flush=True)
        keeper = checkpoint.Each(manager, job.problem.metrics[0])
        (summary,) = train_program(
            config, job, state, compiled, keeper, [workdir], devices, began
        )
    if leader:
        write_report(workdir)
        print(ending(summary, workdir), flush=True)
    return summary


def write_config(workdir: Path, config: Run) -> None:
    write_json(workdir / "config.json", fields.nested(flatten(config)))


def train_program(
    config: Run,
    job: setup.Job,
    state: State,
    compiled: "Steps",
    keeper: checkpoint.Keeper,
    folders: Sequence[Path],
    devices: Devices,
    began: float,
    *,
    alone: bool = True,
) -> list[dict]:
    """Trains the runs of a job from ``state`` to the last step and writes what each one leaves.

    Args:
      config: that the runs share.
      job: the program.
      state: the job's, or a later one.
      compiled: its steps.
      keeper: of the checkpoints.
      folders: of the runs.
      devices: that it is on.
      began: when this start of it began, by ``time.monotonic``.
      alone: whether this is a single run: it has TensorBoard's events, which of many runs cost as
        much as some steps.

    Returns:
      The ``summary.json`` of each run.
    """
    leader, start = jax.process_index() == 0, int(state.step)
    with contextlib.ExitStack() as stack:
        writers = [
            stack.enter_context(MetricWriter(
                folder, start_step=start, enabled=leader, tensorboard=alone
            ))
            for folder in folders
        ]
        progress = stack.enter_context(contextlib.closing(terminal.Progress(job.steps)))
        state, seconds = fit(config, job, state, compiled, keeper, writers, progress, devices)
    keeper.wait()
    return finish(
        job, state, keeper, compiled, folders, devices, began, seconds, job.steps - start, alone
    )


def finish(
    job, state: State, keeper, compiled, folders, devices, began, seconds, trained, alone
) -> list[dict]:
    """Evaluates the runs on test, and writes what is left to write into their folders.

    ``seconds`` are those of the ``trained`` training steps of this start.
    """
    # Asked before the evaluations, which all processes wait for: no summary is written until then.
    left = [i for i, folder in enumerate(folders) if not (folder / "summary.json").exists()]
    last = best = reported(compiled, state.trainable, job, devices)
    chosen, steps = keeper.best(state)
    if any(step != job.steps for step in steps):
        best = reported(compiled, chosen.trainable, job, devices)
    predicted = {
        split: apart(evaluate(compiled, chosen.trainable, job, split, devices), job)
        for split in job.feed.unlabelled
    }
    summaries = []
    for i in left:
        run, folder, step = job.runs[i], folders[i], steps[i]
        keeper.settle(i, folder, state, chosen, job)
        # Programs over all devices, which therefore all processes run.
        own, best_own = (job.axis.pick(s.trainable, i) for s in (state, chosen))
        intrinsic = spectrum(own, job.frozen, job.lora[i])
        summary = summary_of(
            run,
            job,
            last=last[i],
            best={"step": step} | (last[i] if step == job.steps else best[i]),
            rate=trained * run.batch_size / seconds if seconds else None,
            compile_seconds=compiled.seconds,
            wall_seconds=time.monotonic() - began,
            trainable=jax.device_get(own),
            intrinsic=intrinsic,
        )
        factors = jax.device_get(best_own)
        if jax.process_index() == 0:
            for split, outputs in predicted.items():
                out = outputs[i]
                file = job.problem.write_predictions(folder, split, out.ids, out.predictions)
                if alone:
                    print(f"predictions of step {step:,} for {split}: {file}", flush=True)
            finished.write_adapter(folder, run, job.lora[i], factors, job.problem, summary)
            if not alone:
                summary |= {
                    "sweep": len(job.runs),
                    "train_seconds": seconds / len(job.runs),
                    "program_train_seconds": seconds,
                }
            write_json(folder / "summary.json", summary)
        summaries.append(summary)
    return summaries


def header(config: Run, base: setup.Base, devices: Devices, workdir: Path, **more) -> str:
    """What is about to be trained, for the terminal."""
    return terminal.header(
        devices=jax.devices(),
        mesh=dict(devices.mesh.shape),
        model=config.model.source,
        method=config.method,
        trainable=base.trainable_parameters,
        total=base.total_parameters,
        data=base.feed.sizes,
        dataset=config.data.name,
        workdir=workdir,
        total_steps=base.steps,
        **more,
    )


def summary_of(
    config: Run,
    job: setup.Job,
    *,
    last,
    best,
    rate,
    compile_seconds,
    wall_seconds,
    trainable,
    intrinsic,
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
        "trainable_parameters": job.base.trainable_parameters,
        "final_parameters": plain(methods.left(config, trainable)),
        "total_parameters": job.base.total_parameters,
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

    def __init__(self, step: Any):
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


def fit(
    config: Run,
    job: setup.Job,
    state: State,
    compiled: Steps,
    keeper: checkpoint.Keeper,
    writers: Sequence[MetricWriter],
    progress: terminal.Progress,
    devices: Devices,
) -> tuple[State, float]:
    """Trains to the last step; returns the state and the seconds of the training steps alone:
    without compilation, evaluation, checkpoints."""
    seconds, shown, leader = 0.0, {}, jax.process_index() == 0
    watched = [nonfinite.Watched(config.nonfinite_limit) for _ in job.runs]
    for done in stretches(config, job, state, compiled, devices):
        state, seconds = done.state, seconds + done.seconds
        metrics = [list(of_run) for of_run in zip(*map(job.axis.apart, done.metrics), strict=True)]
        rows = [
            row_of(done, own, schedule, config, skipped)
            for own, schedule, skipped in zip(
                metrics, job.schedule, np.ravel(done.skipped), strict=True
            )
        ]
        for writer, one, own in zip(writers, watched, metrics, strict=True):
            for note in one.add(done.first, own):
                if leader:
                    progress.print(f"{writer.workdir.name}: {note}" if writers[1:] else note)
        validation = []
        if done.evaluating:
            outputs = evaluate(compiled, state.trainable, job, "validation", devices)
            validation = [measured(own, job.problem.metrics) for own in apart(outputs, job)]
            for row, found in zip(rows, validation, strict=True):
                row |= {f"eval/{name}": value for name, value in found.items()}
            keeper.wait()  # see check_nothing_lost
        for i, (writer, row) in enumerate(zip(writers, rows, strict=True)):
            writer.write(done.step, row)
            if done.evaluating:
                own = job.axis.pick(state.trainable, i)
                keep_factors(config, writer, done.step, own, job.frozen, job.lora[i])
        shown |= summed_up(rows)
        if leader:
            progress.update(done.step, shown)
        # One run alone stays as it is; the others of its program go on.
        over = all(one.over for one in watched)
        if done.evaluating or done.stopping or over:
            for writer in writers:
                writer.flush()
        if done.evaluating:
            keeper.evaluated(state, validation)
        elif done.stopping or over:
            keeper.interrupted(state)
        if done.stopping or over:
            keeper.wait()
            if over:
                raise ended(job, state.trainable, watched[0], done.step)
            raise saved_after(done.step, job.steps)
    return state, seconds


def summed_up(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """What the terminal shows: of many runs means, the range of the loss, examples of all runs."""
    if len(rows) == 1:
        return dict(rows[0])
    losses = [row["train/loss"] for row in rows]
    return {k: float(np.mean([row[k] for row in rows])) for k in rows[0]} | {
        "train/loss/low": float(np.min(losses)),
        "train/loss/high": float(np.max(losses)),
        "examples_per_second": sum(row["examples_per_second"] for row in rows),
    }


def saved_after(step: int, steps: int) -> Stopped:
    return Stopped(f"saved after step {step:,} of {steps:,}; the same command goes on from there")


def ended(job: setup.Job, trainable, watched: nonfinite.Watched, step: int):
    """The error of a run that has had too many steps in a row that are not finite."""
    batch = next(iter(job.feed.train(watched.first - 1)))
    where = job.look(trainable, job.constants, batch, watched.first - 1)
    return nonfinite.ended(watched, step, batch["id"], where)


def keep_factors(config: Run, writer, step: int, trainable, frozen, lora: rm.LoRA) -> None:
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


def stretches(
    config: Run, job: setup.Job, state: State, compiled: Steps, devices: Devices
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


def row_of(
    done: Stretch, metrics: list[dict], schedule: optax.Schedule, config: Run, skipped_so_far: int
) -> dict[str, float]:
    """A line of metrics.jsonl from the metrics of each step of one run."""
    skipped = [int(m["skipped"]) for m in metrics]
    updates = done.step - 1 - int(skipped_so_far) + skipped[-1]  # before the last step
    return mean_of(metrics) | {
        "learning_rate": float(np.asarray(schedule(updates))),
        "skipped": sum(skipped),
        "examples_per_second": len(metrics) * config.batch_size / done.seconds,
    }


def mean_of(metrics: list[dict]) -> dict[str, Any]:
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


def apart(outputs: Outputs, job: setup.Job) -> list[Outputs]:
    """The outputs of each run."""
    predictions, losses = (
        x.reshape(len(job.runs), -1) for x in (outputs.predictions, outputs.losses)
    )
    return [
        outputs._replace(predictions=p, losses=x) for p, x in zip(predictions, losses, strict=True)
    ]


def reported(
    compiled: Steps, trainable, job: setup.Job, devices: Devices
) -> list[dict[str, float]]:
    """The figures of every reported split of each run; names of the first are bare, "test_x" gives
    "_x"."""
    figures: list[dict[str, float]] = [{} for _ in job.runs]
    for split in job.feed.tests:
        suffix = split.removeprefix("test")
        outputs = apart(evaluate(compiled, trainable, job, split, devices), job)
        for own, found in zip(figures, outputs, strict=True):
            values = measured(found, job.problem.metrics)
            own |= {name + suffix: value for name, value in values.items()}
    return figures


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
