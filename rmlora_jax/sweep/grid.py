"""The runs of a sweep: the text of ``sweep.grid``, read, and what is wrong with it."""

import ast
import itertools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from rmlora_jax import methods
from rmlora_jax.config import MOST, is_number, with_values
from rmlora_jax.errors import UserError, did_you_mean
from rmlora_jax.fields import Run as Config
from rmlora_jax.fields import Sweep
from rmlora_jax.train.config import SWEEPABLE, flatten, mistakes, resolve

MOST_RUNS = 10_000  # of a sweep
EXAMPLE = "{'penalty': (0, 0.1), 'keep': (0.5, 1)}"


def parse(text: str) -> list[dict[str, float]]:
    """The settings of a grid, in order; ``[{}]`` of an empty text.

    A dict of names and values means every combination, the last name fastest; a list of dicts means
    just these.

    >>> parse("{'penalty': (0, .1), 'keep': .5}")
    [{'penalty': 0.0, 'keep': 0.5}, {'penalty': 0.1, 'keep': 0.5}]
    >>> parse("[{'alpha': 8}, {'alpha': 16, 'penalty': 0}]")
    [{'alpha': 8.0}, {'alpha': 16.0, 'penalty': 0.0}]

    Raises:
      ValueError: it is neither, or a value is not a number.
    """
    if not text.strip():
        return [{}]
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise ValueError(f"not a Python literal; write it like \"{EXAMPLE}\"") from None
    if isinstance(value, dict):
        columns = {k: v if isinstance(v, list | tuple) else (v,) for k, v in value.items()}
        if math.prod(map(len, columns.values())) > MOST_RUNS:
            raise ValueError(f"more than {MOST_RUNS:,} combinations")
        settings = [
            dict(zip(columns, row, strict=True)) for row in itertools.product(*columns.values())
        ]
    elif isinstance(value, list | tuple) and all(isinstance(entry, dict) for entry in value):
        settings = list(value)
    else:
        settings = []
    if not settings or not all(settings):
        raise ValueError(
            f"must be a dict of names and their values, or a list of dicts; like \"{EXAMPLE}\""
        )
    return [{name: _number(name, v) for name, v in setting.items()} for setting in settings]


class Run(NamedTuple):
    """One of the runs of a sweep."""

    name: str  # of its folder: seed=3,penalty=0.1
    setting: dict[str, Any]  # its values of what is swept, by the names of SWEEPABLE
    config: Config  # of the single run that it equals


def runs(c: Config) -> list[Run]:
    """The runs of a sweep: every setting of ``sweep.grid``, each with every seed.

    Raises:
      ValueError: ``sweep.grid`` has a mistake; `check_config` lists them all.
    """
    settings = parse(c.sweep.grid)
    swept = dict.fromkeys(name for setting in settings for name in setting)
    found = []
    for setting in settings:
        values = {name: setting.get(name, flatten(c)[SWEEPABLE[name]]) for name in swept}
        for seed in range(c.seed, c.seed + max(c.sweep.seeds, 1)):
            own = with_values(
                c,
                {SWEEPABLE[name]: value for name, value in values.items()}
                | {"seed": seed, "data.seed": c.data_seed, "sweep": Sweep()},
            )
            found.append(Run(name({"seed": seed} | values), values, own))
    return found


def check_config(given: Any, *, there: bool = False) -> Config:
    """`resolve` of a run or a sweep, with every mistake of its single runs.

    Raises:
      UserError: every mistake, a line each.
    """
    config, known = mistakes(given)
    wrong = _mistakes_of_sweep(config, set(known.values())) if config.is_sweep else []
    if not wrong:
        return resolve(given, there=there)
    raise UserError("\n".join(dict.fromkeys([*known.values(), *wrong])))


def _mistakes_of_sweep(c: Config, known: set[str]) -> list[str]:
    """What is wrong with ``sweep.*``, and with single runs beyond the mistakes ``known``."""
    if c.sweep.seeds > MOST_RUNS:
        return [f"config.sweep.seeds={c.sweep.seeds!r}: must be at most {MOST_RUNS}"]
    where = f"config.sweep.grid={repr(c.sweep.grid)[:200]}"
    try:
        settings = parse(c.sweep.grid)
    except ValueError as e:
        return [f"{where}: {e}"]
    wrong = []
    for name in dict.fromkeys(name for setting in settings for name in setting):
        readers = methods.readers(name)
        if name not in SWEEPABLE:
            hint = did_you_mean(name, SWEEPABLE)
            if name == "seed":
                hint = "; type --config.sweep.seeds=5 for five seeds"
            wrong.append(f"{where}: no {name!r}, there are {', '.join(SWEEPABLE)}{hint}")
        elif c.method not in readers:
            wrong.append(f"{where}: {name!r} changes nothing with method {c.method}, only with "
                         f"{', '.join(readers)}; drop it, or type --config.method={readers[0]}")
        elif name == "keep" and c.own(methods.Rm).draw == "exact":
            wrong.append(f"{where}: 'keep' is swept as a probability; type "
                         "--config.rm.draw=bernoulli")
    if wrong:
        return wrong
    if c.seed + max(c.sweep.seeds, 1) - 1 > MOST:
        return [f"config.sweep.seeds={c.sweep.seeds!r}: seeds from {c.seed} would pass {MOST}; "
                "lower --config.seed"]
    singles = runs(c)
    names = [run.name for run in singles]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        wrong.append(f"{where}: the same run more than once: {', '.join(twice)}")
    for run in singles:
        lines = mistakes(run.config)[1].values()
        wrong += [f"{where}: {line}" for line in lines if line not in known]
    return list(dict.fromkeys(wrong))


def _number(name, value) -> float:
    if not is_number(value):
        raise ValueError(f"{name!r} has the value {value!r}, which is not a finite number")
    return float(value)


def name(values: Mapping[str, Any]) -> str:
    """What a run with these values is called, also on disk.

    >>> name({"seed": 3, "penalty": 0.1, "keep": 1.0})
    'seed=3,penalty=0.1,keep=1'
    """
    return ",".join(f"{key}={number(value)}" for key, value in values.items())


def number(value: float) -> str:
    """The shortest decimal that reads back as the same number."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value)
