"""What a finished run is for: its adapter, its merged model, the base that another run adapts."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict

import rmlora_jax as rm
from rmlora_jax import config as fields
from rmlora_jax import hub, methods
from rmlora_jax.errors import UserError
from rmlora_jax.fields import Run
from rmlora_jax.files import read_object
from rmlora_jax.hub.info import Info, model_card, read_info, write_info
from rmlora_jax.tasks.task import Problem
from rmlora_jax.train.checkpoint import best_trainable
from rmlora_jax.train.config import default_config, flatten, resolve
from rmlora_jax.train.step import first_keys

ADAPTER, MERGED = "adapter", "merged"


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
    if not methods.has_factors(config):
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
    if methods.has_factors(config):
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


def read_config(workdir: Path) -> Run:
    """The config of a run, from its folder; fields that are younger than the run have their
    defaults, and those that are no more are left out.

    Raises:
      UserError: there is none, or it is damaged.
    """
    file = workdir / "config.json"
    try:
        config, own = default_config(), flatten(read_object(file))
        for name in flatten(config).keys() & own.keys():
            config.update_from_flattened_dict({name: own[name]})
        return resolve(config)
    except FileNotFoundError:
        raise UserError(f"{workdir} has no config.json; is it the folder of a run?") from None
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError, OverflowError) as e:
        why = str(e).replace(str(file), "it").splitlines()[0][:300] if str(e) else type(e).__name__
        raise UserError(f"{file} is not the config of a run ({why}); copy the folder again") from e


def read_base(workdir: Path, task: str, advice: str) -> tuple[Run, dict]:
    """The config of the run in ``workdir`` and the parameters of its best step, on the host.

    Args:
      workdir: of the run.
      task: that it must have had.
      advice: how to make such a run, in words.

    Raises:
      UserError: there is no such run, it is not finished, or it trained a part of its model.
    """
    workdir = workdir.absolute()  # orbax takes no other
    if not (workdir / "summary.json").is_file():
        raise UserError(f"config.model.source={str(workdir)!r} holds no finished run; {advice}")
    config = read_config(workdir)
    for field, wanted in (("task", task), ("method", "full")):
        found = getattr(config, field)
        if found != wanted:
            raise UserError(
                f"{workdir} holds a run with {field} {found!r}, not {wanted!r}; {advice}"
            )
    return config, best_trainable(workdir)
