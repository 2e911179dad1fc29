"""The tasks of a study, which are configs of runs, and the checks made before anything runs."""

import ast
import copy
from collections.abc import Collection, Iterable
from pathlib import Path

from rmlora_jax import config as fields
from rmlora_jax import config_file
from rmlora_jax.config import ConfigDict, is_names, is_number, leaves
from rmlora_jax.errors import UserError, did_you_mean
from rmlora_jax.fields import Run
from rmlora_jax.methods import METHODS, readers
from rmlora_jax.study import plan
from rmlora_jax.study.pictures import PICTURES
from rmlora_jax.study.plan import Study
from rmlora_jax.study.program import program
from rmlora_jax.sweep.grid import check_config
from rmlora_jax.train.config import SWEEPABLE, RunConfig, flatten, resolve


def default_study() -> ConfigDict:
    """The fields of a study. A file in ``configs/`` starts from these and changes what it needs."""
    return fields.default(Study)


def check_study(given: ConfigDict | Study) -> tuple[Study, dict[tuple, Run]]:
    """The study, and the config that the runs of each place of a `plan.Cell` share, in task order.

    Raises:
      UserError: every mistake, a line each.
    """
    c, wrong = fields.read(Study, given)
    lines = list(wrong.values())

    def known(field: str, names: Iterable[str], allowed: Collection[str], what: str) -> None:
        for name in names:
            if name not in allowed:
                hint = did_you_mean(name, allowed)
                lines.append(
                    f"config.{field}: no {what} {name!r}: there are {', '.join(allowed)}{hint}"
                )

    known("methods", c.methods, METHODS, "method")
    known("method_set", c.method_set, METHODS, "method")
    known("pictures", c.pictures, PICTURES, "picture")
    known("grid", c.grid, SWEEPABLE, "name")
    for name, values in c.grid.items():
        fine = isinstance(values, tuple | list) and all(map(is_number, values))
        if not fine or plan.each_once(values):
            lines.append(f"config.grid.{name}={values!r}: must be a tuple of numbers, each once")
        if name == "learning_rate":
            lines.append("config.grid.learning_rate: give the rates as config.rates")
        idle = [m for m in c.methods if name in SWEEPABLE and m not in readers(name)]
        if idle:
            lines.append(f"config.grid.{name}: it changes nothing with {', '.join(idle)}")
    for method, values in c.method_set.items():
        if not is_names(values):
            lines.append(
                f"config.method_set.{method}={values!r}: must be a tuple of fields, such as "
                "('lora.rank=2',)"
            )
    varied = [text.partition("=")[0] for variant in c.variants for text in variant]
    known("along", (c.along,), dict.fromkeys(("method", "task", *c.grid, *varied)), "axis")
    if lines:
        raise UserError("\n".join(lines))

    opened, bases = open_tasks(c), {}
    files = dict(zip(opened, (config_file.find(parse(text)[0]) for text in c.tasks), strict=True))
    for cell in plan.cells(c, opened):
        try:
            base = resolve(configured(c, opened[cell.task], cell.method, cell.variant))
            bases[cell.place] = base
            trained = program(cell, base, Path(), at_once=c.at_once, shared=c.shared)
            check_config(trained.config)
        except UserError as e:
            where = " ".join([cell.task, cell.method, *cell.variant])
            words = config_file.located(str(e), files[cell.task])
            lines += [f"{where}: {line}" for line in words.splitlines()]
    if lines:
        raise UserError("\n".join(dict.fromkeys(lines)))
    return c, bases


def open_tasks(study: Study) -> dict[str, ConfigDict]:
    """The config of every task by its name, with the fields of the study, of the task, and
    ``study.set`` on top.

    A task is called what stands behind its ``as``, or else as its data: "cola" for "glue/cola".

    Raises:
      UserError: a file cannot be had, a field does not exist, or two tasks have one name.
    """
    opened = {}
    for text in study.tasks:
        file, own, name = parse(text)
        config = load(file)
        if "study" in config:
            raise UserError(f"config.tasks: {file!r} is a study; a task is the config of a run")
        override(config, *study.fields, *own, *study.set)
        name = name or config.data.name.rsplit("/", 1)[-1].partition(":")[0]
        if name in opened:
            raise UserError(
                f"config.tasks: two are called {name!r}; name one of them, such as "
                f"{text + ' as OTHER'!r}"
            )
        opened[name] = config
    return opened


def parse(text: str) -> tuple[str, tuple[str, ...], str]:
    """The file, the fields and the name of a task ("" without one).

    >>> parse("configs/minilm_glue.py:rte epochs=20 as long")
    ('configs/minilm_glue.py:rte', ('epochs=20',), 'long')
    """
    file, *fields = text.split() or [""]
    name = ""
    if len(fields) >= 2 and fields[-2] == "as":
        *fields, _, name = fields
    return file, tuple(fields), name


def load(text: str) -> ConfigDict:
    """The config of ``FILE`` or ``FILE:ARGUMENT``, looked for here and then beside the package."""
    try:
        return config_file.load(text)
    except UserError as e:
        raise UserError(f"config.tasks: {e}") from e


def configured(study: Study, base: ConfigDict, method: str, variant=()):
    """The config of the runs of a method on a task: a copy, with the fields of both and the
    variant's."""
    config = copy.deepcopy(base)
    config.method = method
    override(config, *study.method_set.get(method, ()), *variant)
    return config


def override(config: ConfigDict, *texts: str) -> None:
    """Sets ``"a.b=value"``: a text as it stands, any other value as a Python literal.

    Raises:
      UserError: the field does not exist, or the value is of another type.
    """
    flat, known = flatten(config), leaves(RunConfig)
    for text in texts:
        path, equals, value = text.partition("=")
        if not equals or path not in flat:
            hint = fields.likely(path, flat)
            raise UserError(f"{text!r}: must be a field and its value, such as epochs=4{hint}")
        try:
            is_text = path in known and known[path].kind is str
            config.update_from_flattened_dict(
                {path: value if is_text else ast.literal_eval(value)}
            )
        except (ValueError, SyntaxError, TypeError) as e:
            raise UserError(f"{text!r}: must be like {flat[path]!r}") from e
