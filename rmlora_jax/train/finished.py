"""What a run leaves when it is finished: figures, adapter, merged model, a base for another run."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

import rmlora_jax as rm
from rmlora_jax import called, hub, methods
from rmlora_jax import config as fields
from rmlora_jax.adapt.tree import adapted_weights
from rmlora_jax.errors import UserError
from rmlora_jax.fields import Run
from rmlora_jax.files import placed, plain, write_json
from rmlora_jax.hub.info import FILE, TASKS, model_card, read_info, write_info
from rmlora_jax.hub.rounding import stored_dtype
from rmlora_jax.inference.loading import ADAPTER, MERGED, Model, load, use
from rmlora_jax.models.family import TOKENS
from rmlora_jax.models.new_tokens import rows_together
from rmlora_jax.parallel import memory
from rmlora_jax.parallel.peak import peak
from rmlora_jax.tasks.task import Outputs, Problem
from rmlora_jax.train import answers, nonfinite
from rmlora_jax.train.checkpoint import best_step, best_trainable
from rmlora_jax.train.config import flatten, read_config
from rmlora_jax.train.evaluate import figures_of, final, reported, spectrum, tested
from rmlora_jax.train.setup import Job, from_adapter
from rmlora_jax.train.step import State, first_keys
from rmlora_jax.train.workdir import has_checkpoints

MATRIX = PAIRS = 20  # classes of which the whole matrix is kept; pairs of classes that are kept


class Speed(NamedTuple):
    """What training steps took; of a sweep those of one run."""

    seconds: float = 0.0
    steps: int = 0
    tokens: float | None = None  # None where they are not counted

    def after(self, seconds: float, metrics: Sequence[Mapping[str, Any]]) -> "Speed":
        """With more steps, of which these are the metrics."""
        tokens = self.tokens
        if metrics and "tokens" in metrics[0]:
            tokens = (tokens or 0.0) + float(sum(m["tokens"] for m in metrics))
        return Speed(self.seconds + seconds, self.steps + len(metrics), tokens)

    def rates(self, batch_size: int, used: float | None = None) -> dict[str, float]:
        """``examples_per_second`` and, where they are counted, ``tokens_per_second`` and ``mfu``.

        ``mfu`` is the part of what the devices can do that the model needs, `used_by_a_token`.

        >>> Speed(2.0, 10, 5000.0).rates(8)
        {'examples_per_second': 40.0, 'tokens_per_second': 2500.0}
        """
        found = {"examples_per_second": self.steps * batch_size / self.seconds}
        if self.tokens is not None:
            found["tokens_per_second"] = self.tokens / self.seconds
            if used is not None:
                found["mfu"] = found["tokens_per_second"] * used
        return found


def used_by_a_token(job: Job) -> float | None:
    """The part of a second of all devices that the products for one token need at their peak; None
    where the peak of the devices is not known."""
    most = peak(job.base.devices.mesh.devices.flat, job.base.config.model.dtype)
    flops = job.base.token_flops
    return flops / most if most and flops else None


def finish(
    job: Job, state: State, keeper, compiled, folders, began, speed: Speed
) -> list[dict]:
    """Evaluates the runs on test, and writes what is left to write into their folders.

    ``speed`` is that of the training steps of this start. Returns the summaries of the runs that
    had none.
    """
    # Asked before the evaluations, which all processes wait for: no summary is written until then.
    left = [i for i, folder in enumerate(folders) if not (folder / "summary.json").exists()]
    outputs = tested(compiled, state.trainable, job)
    last = best = figures_of(outputs, job)
    chosen, steps = keeper.best(state)
    end = int(state.step)
    if any(step != end for step in steps):
        best = reported(compiled, chosen.trainable, job)
    predicted = {
        split: final(compiled, chosen.trainable, job, split) for split in job.feed.unlabelled
    }
    summaries = []
    for i in left:
        run, folder, step = job.runs[i], folders[i], steps[i]
        keeper.settle(i, folder, state, chosen)
        # Programs over all devices, which therefore all processes run.
        own, best_own = (job.pick(s.trainable, i) for s in (state, chosen))
        intrinsic = spectrum(job, i, own)
        summary = {
            "task": run.task,
            "method": run.method,
            "model": run.model.source,
            "dataset": run.data.name,
            "steps": end,
            "metric": job.problem.metrics[0],
            "test": last[i],
            "test_best": {"step": step} | (last[i] if step == end else best[i]),
            "trainable_parameters": job.base.trainable_parameters,
            "final_parameters": plain(methods.left(run, jax.device_get(own))),
            "total_parameters": job.base.total_parameters,
            "skipped_records": list(job.problem.skipped),
            **(
                speed.rates(run.batch_size, used_by_a_token(job))
                if speed.seconds
                else {"examples_per_second": None}
            ),
            "compile_seconds": compiled.seconds,
            "wall_seconds": time.monotonic() - began,
            "peak_memory_bytes": peak_memory(),
            "intrinsic_dimension": plain(intrinsic),
        }
        if end < job.steps:
            summary |= {"planned_steps": job.steps, "stopped": (
                f"no better validation {summary['metric']} in {keeper.waited} evaluations in a "
                f"row (patience={run.patience})"
            )}
        if label := job.problem.positive_label:
            summary["positive_label"] = label
        if confused := confusion(outputs[job.feed.tests[0]][i], job.problem.labels):
            summary["confusion"] = confused
        factors = jax.device_get(best_own)
        if jax.process_index() == 0:
            write_predictions: Any = job.problem.write_predictions
            for split, unlabelled in predicted.items():
                out = unlabelled[i]
                if nonfinite.unanswered(out, split):
                    continue
                file = write_predictions(folder, split, out.ids, out.predictions)
                if not job.stacked:
                    print(f"predictions of step {step:,} for {split}: {file}", flush=True)
            write_adapter(folder, run, job.lora[i], factors, job.problem, summary["test_best"])
            if job.stacked:
                summary |= {
                    "sweep": len(job.runs),
                    "train_seconds": speed.seconds / len(job.runs),
                    "program_train_seconds": speed.seconds,
                }
            write_json(folder / "summary.json", summary)
            lora = job.lora[i] if methods.of(run).adapts else None

            def params(lora=lora, factors=factors):
                base = job.problem.pretrained
                both = joined(job.problem.params, factors, base.rows if base else ())
                return in_training(both, lora)

            if found := answers.asked(folder, run, job.problem, lora, params):
                summary["test_best"] |= found
                write_json(folder / "summary.json", summary)
        summaries.append(summary)
    return summaries


def confusion(outputs: Outputs, names: Sequence[str] | None) -> dict[str, Any]:
    """Which classes were taken for which: ``{"pairs": [[true, taken for, examples, of], ...]}``.

    The most examples first, `PAIRS` at most; ``of`` counts the examples of the true class. Up to
    `MATRIX` classes there are also their ``"names"`` and ``"matrix"``, a row for each true class.
    Classes without a name have their number. {} where values are predicted.

    >>> labels = np.array([0, 0, 0, 1])
    >>> found = confusion(Outputs(labels, np.array([0, 1, 1, 1]), labels, labels), ("cat", "dog"))
    >>> found["pairs"], found["matrix"]
    ([['cat', 'dog', 2, 3]], [[1, 2], [0, 1]])
    """
    labels, taken = outputs.labels, outputs.predictions
    if labels is None or not all(np.issubdtype(x.dtype, np.integer) for x in (labels, taken)):
        return {}
    labels, taken = labels[taken >= 0], taken[taken >= 0]  # -1: no answer, its logits not finite
    count = max(len(names or ()), labels.max(initial=-1) + 1, taken.max(initial=-1) + 1)
    names = [*(names or ()), *map(str, range(len(names or ()), count))]
    of = np.bincount(labels, minlength=count)
    cells, examples = np.unique(labels.astype(np.int64) * count + taken, return_counts=True)
    wrong = [(-n, *divmod(cell, count)) for cell, n in
             zip(cells.tolist(), examples.tolist(), strict=True) if cell // count != cell % count]
    found: dict[str, Any] = {
        "pairs": [[names[true], names[took], -n, int(of[true])]
                  for n, true, took in sorted(wrong)[:PAIRS]]}
    if count <= MATRIX:
        whole = np.bincount(labels * count + taken, minlength=count**2).reshape(count, count)
        found |= {"names": names, "matrix": whole.tolist()}
    return found


def peak_memory() -> int | None:
    """The most that this process's first device has held; None where it does not count."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def write_adapter(
    folder: Path,
    config: Run,
    lora: rm.LoRA,
    trainable: Mapping[str, Any],
    problem: Problem,
    best: Mapping[str, Any],
) -> None:
    """Writes what the model of a run is for into its folder, and its adapter if it has factors.

    ``trainable`` is that of the best step, on the host, and ``best`` are its figures.
    """
    if problem.pretrained is None:
        return
    about = _about(config, best["step"], metrics={k: v for k, v in best.items() if k != "step"})
    assert problem.info is not None  # as every problem with a pretrained model has
    info = dataclasses.replace(problem.info, about=about)
    write_info(folder, info)
    if methods.of(config).adapts:
        base, adapter = problem.pretrained, folder / ADAPTER
        params = joined(base.params, trainable, base.rows)
        hub.save_peft(adapter, params, lora, base, info=info, overwrite=True)
        if found := hub.vllm_obstacles(adapter, base.family):
            merge = called.command("export", f"--workdir={folder}")
            print(f"note: vLLM cannot use {adapter} as it is: {'; '.join(found)}; merge it with\n"
                  f"{merge}", flush=True)


def joined(
    base: Mapping[str, Any], trainable: Mapping[str, Any], rows: Sequence[int] = ()
) -> dict:
    """The parameters of ``base`` with those that were trained in their places, also those ``rows``
    of embedding and head that were trained by themselves."""
    both = flatten_dict(base, sep="/") | flatten_dict(trainable, sep="/")
    return rows_together(unflatten_dict(both, sep="/"), rows)


def in_training(params: dict, lora: rm.LoRA | None) -> dict:
    """``params`` with the base's own weights, as training has them beside its factors: those from
    which ``lora.init="pissa"`` has moved s A_0 B_0 out."""
    if lora is None or lora.init != "pissa":
        return params
    flat: dict[str, Any] = flatten_dict(params, sep="/")
    no_key = jax.random.key(0)  # nothing is drawn
    for (*module, leaf), weight, factors in adapted_weights(params, lora):
        name, shapes = "/".join(module), [x.shape for x in factors]
        if lora.trains(f"{name}/{leaf}"):  # what was trained is what is left of it
            continue
        start = (lora.scale_of(name), lora.init, lora.dtype)
        _, rest = lora.form.initial(no_key, np.asarray(weight), None, shapes, *start)
        flat[f"{name}/{leaf}"] = np.asarray(rest)
    return unflatten_dict(flat, sep="/")


def export_merged(workdir: Path, dtype: str | None = None) -> Path:
    """Writes ``merged/`` of a run: the whole model of its best step for transformers.

    Factors are added to the base's weights in float32, whatever ``model.base_dtype`` was. Those of
    a language model are then rounded to ``dtype``, by default that of its base's files, or float32
    where weights themselves were trained: rounding would undo small changes. Of a run
    that is not finished, it is the best step so far, which is printed.

    Raises:
      UserError: there is no run, transformers has no model of its kind, a weight is not finite, or
        memory is short.
    """
    with memory.told(lambda: memory.of_a_model(f"the model in {workdir}")):
        return _export_merged(placed(workdir), dtype)


def _export_merged(workdir: Path, dtype: str | None) -> Path:
    done = (workdir / "summary.json").is_file()
    found = None if done else unfinished(workdir)
    if not (done or found):
        train = called.command("train", f"--config=... --workdir={workdir}")
        raise UserError(f"{workdir} holds no finished run; type {train}")
    config = read_config(workdir)
    if found:
        base, params, lora, info = found
    else:
        info = _info(workdir, config)
        if methods.of(config).adapts:
            outputs, size = hub.stored_labels(workdir / ADAPTER), info.image_size
            base = hub.load_pretrained(
                config.model.source, num_labels=outputs, image_size=size, on_disk=True
            )
            base = hub.adapter_base(workdir / ADAPTER, base)
            params, lora = hub.load_peft(workdir / ADAPTER, base)
        else:
            params, lora, base = _of_checkpoint(config, info, best_trainable(workdir))
    info = dataclasses.replace(info, about=info.about | {"card": model_card(base, info)})
    if dtype is None and base.family.inputs is TOKENS:
        whole = config.lora.train or not methods.of(config).adapts
        dtype = "float32" if whole else stored_dtype(base)
    return hub.save_model(
        workdir / MERGED, params, base, info=info, lora=lora, dtype=dtype, overwrite=True
    )


def model_of(folder: str | Path) -> Model:
    """The model of a run, finished or not, or of what else `hub.load` takes."""
    found = unfinished(Path(folder))
    return use(*found) if found else load(folder)


def unfinished(workdir: Path) -> tuple[hub.Pretrained, dict, rm.LoRA | None, hub.Info] | None:
    """Base, parameters, description and use of the model of a run that is not finished, at its
    best step so far, which is printed; None where the folder holds no such run.

    Raises:
      UserError: the run has no checkpoint yet, or its method has no model of its own.
    """
    workdir = placed(workdir)
    saved = has_checkpoints(workdir)
    if not saved or (workdir / "summary.json").exists() or not (workdir / "config.json").exists():
        return None
    config = read_config(workdir)
    if config.is_sweep:
        raise UserError(f"{workdir} holds a sweep that is not finished; the same command goes on")
    info, step = _info(workdir, config), best_step(workdir)
    params, lora, base = _of_checkpoint(config, info, best_trainable(workdir, step))
    print(f"note: this run is not finished; its model is that of step {step:,}, the best so far",
          flush=True)
    return base, params, lora, dataclasses.replace(info, about=_about(config, step))


def _about(config: Run, step: int, **more: Any) -> dict[str, Any]:
    """What a card says of the model of a run at a step."""
    own = {"data": config.data.name, "method": config.method, "step": step}
    return own | more | {"config": fields.nested(flatten(config))}


def _info(workdir: Path, config: Run) -> hub.Info:
    """What the model of a run is for.

    Raises:
      UserError: it is not one that transformers has.
    """
    info = read_info(workdir)
    inserted = methods.of(config).insert is not None
    done = (workdir / "summary.json").exists()
    if info is None and not inserted and not done and config.task in TASKS:
        raise UserError(f"{workdir} has no {FILE}: a run of an earlier version can be used when it "
                        "is finished; the same command goes on")
    if inserted or info is None:
        what = f"method {config.method}" if inserted else f"task {config.task}"
        raise UserError(f"{workdir}: {what} has no model in transformers; it stays a run of ours")
    return info


def _of_checkpoint(
    config: Run, info: hub.Info, trainable: Mapping[str, Any]
) -> tuple[dict, rm.LoRA | None, hub.Pretrained]:
    """Parameters, description and base of a run's model, from what a checkpoint holds."""
    head: Any = flatten_dict(trainable, sep="/").get("head/bias")
    head_key, _ = first_keys(config.seed)
    base = hub.load_pretrained(
        config.model.source,
        num_labels=info.outputs if head is None else len(head),
        labels=info.labels,
        image_size=info.image_size,
        key=head_key,
        on_disk=True,
    )
    if config.model.adapter:
        base = hub.adapter_base(Path(config.model.adapter).expanduser(), base, rows=True)
    base = hub.with_tokens(base, info.tokens)
    params, lora = base.params, None
    if methods.of(config).adapts:
        lora = methods.description(config)
    if config.model.adapter:
        params, lora = from_adapter(config, base, info)
    return in_training(joined(params, trainable, base.rows), lora), lora, base
