"""The config of a run: the fields of every run, with the sections of all tasks and methods."""

import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rmlora_jax import called, methods, tasks
from rmlora_jax import config as fields
from rmlora_jax.config import (
    FIXED,
    FREE,
    GROWS,
    PLACE,
    Mistake,
    field,
    flatten,
    leaves,
    nested,
    section,
)
from rmlora_jax.errors import UserError, did_you_mean, first_line
from rmlora_jax.fields import Run
from rmlora_jax.files import placed, plain, read_object
from rmlora_jax.methods.fields import AdaLora, Bottleneck, Prefix, Rm, Sora
from rmlora_jax.tasks.places import closed_caches, without_closed
from rmlora_jax.tasks.sft_fields import Sft
from rmlora_jax.tasks.speech import Speech
from rmlora_jax.tasks.text import Text
from rmlora_jax.train.loggers import LOGGERS


def _one_of(registry: Mapping[str, Any], **spec: Any) -> Any:
    """The field that names an entry of a registry; its meaning is that of all entries."""
    meaning = "; ".join(f"{name}: {entry.help}" for name, entry in registry.items())
    return field(next(iter(registry)), meaning, choices=tuple(registry), **spec)


@section
class RunConfig(Run):
    """The fields of every run, and the sections of all tasks and methods."""

    task: str = _one_of(tasks.TASKS)
    method: str = _one_of(methods.METHODS)
    logger: str = _one_of(LOGGERS, resume=FREE)
    text: Text = dataclasses.field(default_factory=Text)
    speech: Speech = dataclasses.field(default_factory=Speech)
    sft: Sft = dataclasses.field(default_factory=Sft)
    rm: Rm = dataclasses.field(default_factory=Rm)
    adalora: AdaLora = dataclasses.field(default_factory=AdaLora)
    sora: Sora = dataclasses.field(default_factory=Sora)
    bottleneck: Bottleneck = dataclasses.field(default_factory=Bottleneck)
    prefix: Prefix = dataclasses.field(default_factory=Prefix)


# What a sweep can vary: its name in sweep.grid -> the path of its field.
SWEEPABLE = {leaf.spec.sweep: path for path, leaf in leaves(RunConfig).items() if leaf.spec.sweep}


def default_config() -> RunConfig:
    """The fields of a run. A file in ``configs/`` starts from these and changes what it needs.

    It is a ConfigDict, whose fields can be set. Its type has the same names, for editors.
    """
    return fields.default(RunConfig)


def use_glue(c: RunConfig, task: str) -> None:
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
    """The config that the code reads, from a ConfigDict or nested dicts; a `Run` comes back as is.

    With ``there``, the files and folders that it names must exist.

    Raises:
      UserError: every mistake, a line each.
    """
    if isinstance(given, Run) and not there:
        return given
    config, wrong = mistakes(given)
    homeless = dict(_without_home(config)) if there else {}
    wrong = homeless | wrong
    if there and not homeless and config.task in tasks.TASKS:
        logger = LOGGERS.get(config.logger, LOGGERS["none"])
        lines = *tasks.TASKS[config.task].missing(config), *logger.missing(config)
        for line in (*lines, *closed_caches(config)):
            name = line.partition("=")[0].removeprefix("config.")
            wrong.setdefault(name, line)
    if wrong:
        raise UserError("\n".join(wrong.values()))
    return without_closed(config) if there else config


def _without_home(config: Run) -> Iterator[Mistake]:
    """The paths that begin with ``~`` where there is no such home folder, a line each."""
    known = leaves(RunConfig)
    for path, value in flatten(config).items():
        unknown = isinstance(value, str) and os.path.expanduser(value).startswith("~")
        if unknown and not known[path].spec.cache:  # a cache is done without
            yield path, f"config.{path}={value!r}: no such home folder; write the whole path"


def mistakes(given: Any) -> tuple[Run, dict[str, str]]:
    """The config and what is wrong with the values of its fields, by field."""
    config, wrong = fields.read(RunConfig, given)
    found = [*config.check()]
    if config.method in methods.METHODS:
        found += methods.check(config)
    if config.logger in LOGGERS:
        found += LOGGERS[config.logger].check(config)
    if config.task in tasks.TASKS:
        found += tasks.TASKS[config.task].check(config)
    return config, fields.not_allowed(config, found) | wrong


def read_config(workdir: Path) -> Run:
    """The config of a run, from its folder.

    A field that is younger than the run has its default, or what runs had before it; a field that
    no longer exists is ignored.

    Raises:
      UserError: the file is missing or damaged.
    """
    file = workdir / "config.json"
    if not file.exists():
        raise UserError(f"{workdir} has no config.json; is it the folder of a run?")
    try:
        own = flatten(read_object(file))
        flat = {path: own.get(path, leaf.before) for path, leaf in leaves(RunConfig).items()}
        return resolve(nested(flat))
    except (ValueError, RecursionError) as e:
        why = first_line(e).replace(str(file), "it")[:300]
        raise UserError(f"{file} is not the config of a run ({why}); copy the folder again") from e


def changes(old: dict, new: Any, *, recorded: bool = False) -> tuple[list[str], list[str]]:
    """The fields in which a continuation differs from its run, as ``field: old -> new``.

    First those that must not differ, then those that may. A field that is younger than the run has
    its default there, or what runs had before it. A path written in another way does not differ.
    Another path may be given where the run has ``recorded`` what it read, since the record is
    compared.
    """
    known = leaves(RunConfig)
    was = plain({path: leaf.before for path, leaf in known.items()} | flatten(old))
    now = plain(flatten(new))
    refused, free = [], []
    for path in sorted(was.keys() | now.keys()):
        if was.get(path) == now.get(path):
            continue
        words = f"{path}: {was.get(path)!r} -> {now.get(path)!r}"
        rule = known[path].spec.resume if path in known else FIXED
        if rule == PLACE:
            both = bool(was.get(path) and now.get(path))
            if both and same_place(was[path], now[path]):
                continue
            rule = FREE if both and recorded else FIXED
        why = needs_length(now) if rule == GROWS else None
        if rule == FIXED or why:
            refused.append(words + (f" ({why})" if why else ""))
        else:
            free.append(words)
    return refused, free


def same_place(one: str, other: str) -> bool:
    """Whether two paths lead to one place.

    >>> same_place("a.csv", "./b/../a.csv"), same_place("a.csv", "b.csv")
    (True, False)
    """
    return os.path.realpath(placed(one)) == os.path.realpath(placed(other))


def ways_on(config: Run, workdir: Path) -> str:
    """What a person can type to train further than the finished run in ``workdir``."""
    why = needs_length(flatten(config))
    longer = f"its steps cannot grow: {why}" if why else "a larger --config.steps trains it longer"
    method, adapter = methods.of(config), workdir / "adapter"
    if method.continues and adapter.is_dir():
        begin = f"--config.model.adapter={adapter}"
    elif config.method == "full" and config.task != tasks.speech.NAME:
        merge = called.command("export", f"--workdir={workdir}")
        begin = f"after {merge}, --config.model.source={workdir / 'merged'}"
    else:
        return f"{longer}; another --workdir begins a new run"
    return f"{longer}; {begin} and another --workdir begin a new run with what it learnt"


def needs_length(flat: dict) -> str | None:
    """Why more steps would change the run of this flat config from its first step on, or None."""
    if flat["optimizer.schedule"] != "constant":
        return f"the rates of optimizer.schedule={flat['optimizer.schedule']} depend on it"
    if flat["optimizer.warmup"]:
        return "optimizer.warmup is a fraction of it"
    if methods.METHODS[flat["method"]].plans:
        return f"{methods.METHODS[flat['method']].plans} depends on it"
    if flat["sweep.seeds"] or flat["sweep.grid"]:
        return "a sweep is of one length"
    return None
