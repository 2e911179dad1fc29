"""The tasks of a study: config files of runs, with fields that are set on top."""

import ast
import copy
import importlib.util
import sys
from pathlib import Path

import ml_collections

from rmlora_jax.errors import UserError, did_you_mean
from rmlora_jax.train.config import flatten

ROOT = Path(__file__).parent.parent.parent  # where configs/ lies in a checkout


def open_tasks(study: ml_collections.ConfigDict) -> dict[str, ml_collections.ConfigDict]:
    """The config of every task by its name, with the fields of the study, of the task, and
    ``study.set`` on top.

    A task is called what stands behind its ``as``, or else as its data: "cola" for "glue/cola".

    Raises:
      UserError: a file cannot be had, a field does not exist, or two tasks have one name.
    """
    opened = {}
    for text in study.tasks:
        file, fields, name = parse(text)
        config = load(file)
        for field in (*study.fields, *fields, *study.set):
            override(config, field)
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


def load(text: str) -> ml_collections.ConfigDict:
    """The config of ``FILE`` or ``FILE:ARGUMENT``, looked for here and then beside the package."""
    name, _, argument = text.partition(":")
    file = next((p for p in (Path(name), ROOT / name) if p.is_file()), None)
    if file is None:
        raise UserError(f"config.tasks: there is no config file {name!r}")
    spec = importlib.util.spec_from_file_location(f"task_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))  # a config may build on another: from configs import ...
    try:
        spec.loader.exec_module(module)
        config = module.get_config(argument) if argument else module.get_config()
    except UserError:
        raise
    except Exception as error:  # whatever is wrong in a file that someone wrote
        why = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise UserError(f"config.tasks: {file} cannot be read as a config ({why})") from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(f"config.tasks: get_config of {file} gives no ConfigDict of a run")
    return config


def configured(study, base: ml_collections.ConfigDict, method: str, variant=()):
    """The config of the runs of a method on a task: a copy, with the fields of both and the
    variant's."""
    config = copy.deepcopy(base)
    config.method = method
    for field in (*study.method_set.get(method, ()), *variant):
        override(config, field)
    return config


def override(config: ml_collections.ConfigDict, text: str) -> None:
    """Sets ``"a.b=value"``; a value is a Python literal, where the field is no text.

    Raises:
      UserError: there is no such field, or the value is of another type.
    """
    path, equals, value = text.partition("=")
    flat = flatten(config)
    if not equals or path not in flat:
        hint = did_you_mean(path, flat)
        raise UserError(f"{text!r}: must be a field and its value, such as epochs=4{hint}")
    *parents, name = path.split(".")
    node = config
    for parent in parents:
        node = node[parent]
    try:
        node[name] = value if node.get_type(name) is str else ast.literal_eval(value)
    except (ValueError, SyntaxError, TypeError) as e:
        raise UserError(f"{text!r}: must be like {flat[path]!r}") from e
