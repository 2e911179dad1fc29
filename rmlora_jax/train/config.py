"""The config of a run: the fields of every run, with the sections of all tasks and methods."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rmlora_jax import config as fields
from rmlora_jax import methods, tasks
from rmlora_jax.config import FREE, GROWS, ConfigDict, field, flatten, leaves, with_values
from rmlora_jax.errors import UserError, did_you_mean
from rmlora_jax.fields import Run
from rmlora_jax.files import read_object
from rmlora_jax.tasks import places

__all__ = [
    "FREE_ON_RESUME", "SWEEPABLE", "RunConfig", "changes", "default_config",
    "flatten", "mistakes", "read_config", "resolve", "swept", "use_glue", "with_values",
]



def _one_of(registry: Mapping[str, tasks.Task] | Mapping[str, methods.Method]) -> Any:
    """The field that names an entry of a registry; its meaning is that of all entries."""
    meaning = "; ".join(f"{name}: {entry.help}" for name, entry in registry.items())
    return field(next(iter(registry)), meaning, choices=tuple(registry))


RunConfig: type[Run] = dataclasses.make_dataclass(
    "RunConfig",
    [
        ("task", str, _one_of(tasks.TASKS)),
        ("method", str, _one_of(methods.METHODS)),
        *(
            (name, own, dataclasses.field(default_factory=own))
            for name, own in (tasks.SECTIONS | methods.SECTIONS).items()
        ),
    ],
    bases=(Run,),
    frozen=True,
)

# What a sweep can vary: its name in sweep.grid -> the path of its field.
SWEEPABLE = {
    leaf.spec.sweep: path for path, leaf in leaves(RunConfig).items() if leaf.spec.sweep
}

# Fields that may differ between a run and its continuation.
FREE_ON_RESUME = frozenset(
    path for path, leaf in leaves(RunConfig).items() if leaf.spec.resume == FREE
)


def default_config() -> ConfigDict:
    """The fields of a run. A file in ``configs/`` starts from these and changes what it needs."""
    return fields.default(RunConfig)


def use_glue(c: ConfigDict, task: str) -> None:
    """Sets the fields that make a run one of the nine GLUE tasks, such as ``"cola"``.

    Raises:
      UserError: no such task.
    """
    from rmlora_jax.data.glue import TASKS

    if task not in TASKS:
        hint = did_you_mean(task, TASKS)
        raise UserError(f"no GLUE task {task!r}: there are {', '.join(TASKS)}{hint}")
    regression = TASKS[task].regression
    c.task = tasks.text.VALUES if regression else tasks.text.CLASSES
    c.data.name = f"glue/{task}"
    c.lora.train = r"head|pooler"


def resolve(given: Any, *, there: bool = False) -> Run:
    """The config that the code reads, of one that a person edits.

    Args:
      given: a ConfigDict, or its content as nested dicts; a config that is resolved already comes
        back as it is.
      there: whether the files and folders that it names are looked for too.

    Raises:
      UserError: every mistake, a line each.
    """
    if isinstance(given, Run) and not there:
        return given
    config, wrong = mistakes(given)
    if there and config.task in tasks.TASKS:
        for line in (*tasks.TASKS[config.task].missing(config), *places.caches(config)):
            name = line.partition("=")[0].removeprefix("config.")
            wrong.setdefault(name, line)
    if wrong:
        raise UserError("\n".join(wrong.values()))
    return config


def mistakes(given: Any) -> tuple[Run, dict[str, str]]:
    """The config and what is wrong with the values of its fields, by field."""
    config, wrong = fields.read(RunConfig, given)
    found = [*config.check()]
    if config.method in methods.METHODS:
        found += methods.check(config)
    if config.task in tasks.TASKS:
        found += tasks.TASKS[config.task].check(config)
    return config, fields.not_allowed(config, found) | wrong


def read_config(workdir: Path) -> Run:
    """The config of a run, from its folder; fields that are younger than the run have their
    defaults, and those that are no more are left out.

    Raises:
      UserError: there is none, or it is damaged.
    """
    file = workdir / "config.json"
    if not file.exists():
        raise UserError(f"{workdir} has no config.json; is it the folder of a run?")
    try:
        config, own = default_config(), flatten(read_object(file))
        for name in flatten(config).keys() & own.keys():
            config.update_from_flattened_dict({name: own[name]})
        return resolve(config)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError, OverflowError) as e:
        why = str(e).replace(str(file), "it").splitlines()[0][:300] if str(e) else type(e).__name__
        raise UserError(f"{file} is not the config of a run ({why}); copy the folder again") from e


def swept(config: Run, traced: methods.Values | None = None) -> methods.Values:
    """The values of all that a sweep can vary; ``traced`` ones take the place of the config's."""
    return methods.swept(config, SWEEPABLE, traced)


def changes(old: dict, new: Any) -> tuple[list[str], list[str]]:
    """The fields that a continuation must share and does not, as ``field: old -> new``, and those
    that differ and may.

    A field that is younger than the run has its default there.
    """
    was = {path: leaf.default for path, leaf in leaves(RunConfig).items()} | flatten(old)
    now = flatten(new)
    refused, free = [], []
    for path in sorted(was.keys() | now.keys()):
        if _plain(was.get(path)) == _plain(now.get(path)):
            continue
        words = f"{path}: {was.get(path)!r} -> {now.get(path)!r}"
        leaf = leaves(RunConfig).get(path)
        grows = leaf is not None and leaf.spec.resume == GROWS
        why = needs_length(now) if grows else None
        if path in FREE_ON_RESUME or (grows and why is None):
            free.append(words)
        else:
            refused.append(words + (f" ({why})" if why else ""))
    return refused, free


def needs_length(flat: dict) -> str | None:
    """Why a run of this flat config with more steps is another from its first step on, if it is."""
    if flat["optimizer.schedule"] != "constant":
        return f"the rates of optimizer.schedule={flat['optimizer.schedule']} depend on it"
    if flat["optimizer.warmup"]:
        return "optimizer.warmup is a fraction of it"
    if methods.METHODS[flat["method"]].plans:
        return f"{methods.METHODS[flat['method']].plans} depends on it"
    if flat["sweep.seeds"] or flat["sweep.grid"]:
        return "a sweep is of one length"
    return None


def _plain(value):
    """JSON has no tuples."""
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value
