"""What a run leaves for others: ``adapter/`` in PEFT's format, ``merged/`` for transformers."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_collections
from flax.traverse_util import flatten_dict, unflatten_dict

import rmlora_jax as rm
from rmlora_jax import hub
from rmlora_jax.errors import UserError
from rmlora_jax.hub.info import Info, model_card, read_info, write_info
from rmlora_jax.tasks.task import Problem
from rmlora_jax.train.base_run import read_config
from rmlora_jax.train.checkpoint import best_trainable
from rmlora_jax.train.config import ADAPTED, INSERTED
from rmlora_jax.train.setup import keys

ADAPTER, MERGED = "adapter", "merged"


def write_adapter(
    workdir: Path,
    config: ml_collections.ConfigDict,
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
        "config": config.to_dict(),
    }
    info = dataclasses.replace(problem.info, about=about)
    write_info(workdir, info)
    if config.method not in ADAPTED:
        return None
    params = joined(problem.pretrained.params, trainable)
    folder = workdir / ADAPTER
    return hub.save_peft(folder, params, lora, problem.pretrained, info=info, overwrite=True)


def joined(base: Mapping[str, Any], trainable: Mapping[str, Any]) -> dict:
    """The parameters of ``base`` with those that were trained in their places."""
    both = flatten_dict(base, sep="/") | flatten_dict(trainable, sep="/")
    return unflatten_dict(both, sep="/")


def read_finished(workdir: Path) -> tuple[ml_collections.ConfigDict, Info | None]:
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
    method = config.method
    if method in INSERTED or info is None:
        what = f"method {method}" if method in INSERTED else f"task {config.task}"
        raise UserError(f"{workdir}: {what} has no model in transformers; it stays a run of ours")
    size = info.image_size if info.is_image else None
    if method in ADAPTED:
        outputs = hub.stored_labels(workdir / ADAPTER)
        base = hub.load_pretrained(config.model.source, num_labels=outputs, image_size=size)
        params = rm.merge(*hub.load_peft(workdir / ADAPTER, base))
    else:
        trainable = best_trainable(workdir)
        head = flatten_dict(trainable, sep="/").get("head/bias")
        outputs = None if head is None else len(head)
        head_key, _ = keys(config)
        base = hub.load_pretrained(
            config.model.source, num_labels=outputs, image_size=size, key=head_key
        )
        params = joined(base.params, trainable)
    info = dataclasses.replace(info, about=info.about | {"card": model_card(base, info)})
    return hub.save_model(workdir / MERGED, params, base, info=info, overwrite=True)
