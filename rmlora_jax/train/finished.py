"""What a run leaves when it is finished: figures, adapter, merged model, a base for another run."""

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict

import rmlora_jax as rm
from rmlora_jax import config as fields
from rmlora_jax import hub, methods
from rmlora_jax.errors import UserError
from rmlora_jax.fields import Run
from rmlora_jax.files import plain, write_json
from rmlora_jax.hub.info import Info, model_card, read_info, write_info
from rmlora_jax.tasks.task import Problem
from rmlora_jax.train.checkpoint import best_trainable
from rmlora_jax.train.config import flatten, read_config
from rmlora_jax.train.evaluate import apart, evaluate, reported, spectrum
from rmlora_jax.train.setup import Job
from rmlora_jax.train.step import State, first_keys

ADAPTER, MERGED = "adapter", "merged"


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
            write_adapter(folder, run, job.lora[i], factors, job.problem, summary)
            if not alone:
                summary |= {
                    "sweep": len(job.runs),
                    "train_seconds": seconds / len(job.runs),
                    "program_train_seconds": seconds,
                }
            write_json(folder / "summary.json", summary)
        summaries.append(summary)
    return summaries


def summary_of(
    config: Run,
    job: Job,
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


def peak_memory() -> int | None:
    """The most that this process's first device has held; None where it does not count."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def write_adapter(
    workdir: Path,
    config: Run,
    lora: rm.LoRA,
    trainable: Mapping[str, Any],
    problem: Problem,
    summary: Mapping[str, Any],
) -> Path | None:
    """Writes what a run is for into its folder, and its adapter, where its method has factors.

    Args:
      workdir: of the run.
      config: of the run.
      lora: what the method adapts and trains.
      trainable: of the best step, on the host.
      problem: what was learnt, and on which base.
      summary: the figures of the run.

    Returns:
      The adapter's folder, or None.
    """
    if problem.pretrained is None:
        return None
    best = summary["best_eval"]
    about = {
        "data": config.data.name,
        "method": config.method,
        "step": best["step"],
        "metrics": {k: v for k, v in best.items() if k != "step"},
        "config": fields.nested(flatten(config)),
    }
    assert problem.info is not None  # as every problem with a pretrained model has
    info = dataclasses.replace(problem.info, about=about)
    write_info(workdir, info)
    if not methods.of(config).adapts:
        return None
    params = joined(problem.pretrained.params, trainable)
    folder = workdir / ADAPTER
    return hub.save_peft(folder, params, lora, problem.pretrained, info=info, overwrite=True)


def joined(base: Mapping[str, Any], trainable: Mapping[str, Any]) -> dict:
    """The parameters of ``base`` with those that were trained in their places."""
    both = flatten_dict(base, sep="/") | flatten_dict(trainable, sep="/")
    return unflatten_dict(both, sep="/")


def read_finished(workdir: Path) -> tuple[Run, Info | None]:
    """The config of a finished run, and what its model is for.

    Raises:
      UserError: there is no finished run, or its files are damaged.
    """
    if not (workdir / "summary.json").is_file():
        raise UserError(
            f"{workdir} holds no finished run; type python run.py --config=... --workdir={workdir}"
        )
    return read_config(workdir), read_info(workdir)


def export_merged(workdir: Path) -> Path:
    """Writes ``merged/`` of a finished run: the whole model of its best step for transformers.

    Factors are added to the base's weights in float32, whatever ``model.base_dtype`` was.

    Raises:
      UserError: there is no finished run, or transformers has no model of its kind.
    """
    workdir = workdir.absolute()
    config, info = read_finished(workdir)
    inserted = methods.of(config).insert is not None
    if inserted or info is None:
        what = f"method {config.method}" if inserted else f"task {config.task}"
        raise UserError(f"{workdir}: {what} has no model in transformers; it stays a run of ours")
    size = info.image_size
    if methods.of(config).adapts:
        outputs = hub.stored_labels(workdir / ADAPTER)
        base = hub.load_pretrained(config.model.source, num_labels=outputs, image_size=size)
        params = rm.merge(*hub.load_peft(workdir / ADAPTER, base))
    else:
        trainable = best_trainable(workdir)
        head: Any = flatten_dict(trainable, sep="/").get("head/bias")
        outputs = None if head is None else len(head)
        head_key, _ = first_keys(config.seed)
        base = hub.load_pretrained(
            config.model.source, num_labels=outputs, image_size=size, key=head_key
        )
        params = joined(base.params, trainable)
    info = dataclasses.replace(info, about=info.about | {"card": model_card(base, info)})
    return hub.save_model(workdir / MERGED, params, base, info=info, overwrite=True)
