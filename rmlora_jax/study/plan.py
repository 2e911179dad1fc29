"""From a study to its runs: which there are, in which program, at which learning rate."""

import hashlib
import itertools
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from rmlora_jax.tasks.scores import higher_is_better
from rmlora_jax.train.config import FREE_ON_RESUME, SWEEPABLE, default_config, flatten

CHOOSE, FINAL = "choose", "final"
FIRST_CHOOSE_SEED = 100

Setting = dict[str, float]  # name of rmlora_jax.train.config.SWEEPABLE -> value
# ml_collections.ConfigDict, whose attributes have the union of all types that a field may have.
ConfigDict = Any

# rm_lora at special values of its own fields: bit for bit these methods.
AS_RM_LORA = {
    "rm_lora": {},
    "reg_only": {"keep": 1.0},
    "mask_only": {"penalty": 0.0},
    "lora": {"penalty": 0.0, "keep": 1.0},
}


class Cell(NamedTuple):
    """Runs that differ in their setting and their seed only.

    Of stage "choose" the settings are the rates, and validation picks one; of stage "final" they
    are the study's grid, and test is reported. A final setting without ``learning_rate`` waits for
    that choice.
    """

    task: str
    method: str
    stage: str
    settings: tuple[Setting, ...]
    seeds: tuple[int, ...]
    variant: tuple[str, ...] = ()

    @property
    def runs(self) -> int:
        return len(self.settings) * len(self.seeds)

    def __str__(self) -> str:
        return " ".join([self.task, self.method, *self.variant, self.stage])


def cells(study: ConfigDict, tasks: Iterable[str]) -> tuple[Cell, ...]:
    """Everything that the study runs, in order: for each task and method first the choice of its
    rate, at the task's own fields, then every variant."""
    choose = tuple(range(FIRST_CHOOSE_SEED, FIRST_CHOOSE_SEED + study.choose_seeds))
    final = tuple(range(study.seeds))
    found = []
    for task, method in itertools.product(tasks, study.methods):
        rates = rates_of(study, method)
        grid = grid_settings(study)
        if len(rates) == 1:
            grid = tuple({"learning_rate": rates[0], **setting} for setting in grid)
        else:
            candidates = tuple({"learning_rate": rate} for rate in rates)
            found.append(Cell(task, method, CHOOSE, candidates, choose))
        found += [Cell(task, method, FINAL, grid, final, tuple(v)) for v in study.variants]
    return tuple(found)


def rates_of(study: ConfigDict, method: str) -> tuple[float, ...]:
    """The learning rates that a method chooses from."""
    grids = {"full": study.full_rates, "head": study.head_rates}
    return tuple(float(rate) for rate in grids.get(method, study.rates))


def grid_settings(study: ConfigDict) -> tuple[Setting, ...]:
    """The product of ``study.grid``: one empty setting where it is empty."""
    names = sorted(study.grid)
    products = itertools.product(*(study.grid[name] for name in names))
    return tuple(dict(zip(names, map(float, values), strict=True)) for values in products)


def varied_fields(variants: Iterable[Sequence[str]]) -> tuple[str, ...]:
    """The fields that occur in any of the variants.

    >>> varied_fields((("lora.rank=2", "epochs=4"), ("lora.rank=8",), ()))
    ('lora.rank', 'epochs')
    """
    return tuple(dict.fromkeys(text.partition("=")[0] for v in variants for text in v))


def choose_rate(rows: Sequence[Mapping[str, Any]]) -> float:
    """The learning rate with the best mean of ``validation``, at the last step, over seeds.

    A rate of which a run has no finite value comes last; of equals the smaller rate is taken.
    """
    sign = 1 if higher_is_better(rows[0]["metric"]) else -1
    by_rate = {}
    for row in rows:
        by_rate.setdefault(row["settings"]["learning_rate"], []).append(row["validation"])

    def worth(rate: float) -> float:
        values = by_rate[rate]
        finite = all(v is not None and math.isfinite(v) for v in values)
        return sign * statistics.mean(values) if finite else -math.inf

    return max(sorted(by_rate), key=worth)


def waits(cell: Cell) -> bool:
    """Whether the cell's learning rate is still to be chosen."""
    return "learning_rate" not in cell.settings[0]


def decided(cell: Cell, choice: Sequence[str], rows: Mapping[str, Mapping[str, Any]]) -> Cell:
    """The cell with the rate that the runs of the keys ``choice`` decide on, if it waits for one
    and all of them are among ``rows``."""
    if not waits(cell) or any(key not in rows for key in choice):
        return cell
    rate = choose_rate([rows[key] for key in choice])
    return cell._replace(settings=tuple({"learning_rate": rate, **s} for s in cell.settings))


def place(cell: Cell) -> tuple:
    """What decides the config that a cell's runs share."""
    return cell.task, cell.method, cell.variant


def setting_of(config: Mapping[str, Any], names: Iterable[str]) -> dict[str, float]:
    """The values that a run's config has of these settings."""
    flat = flatten(config)
    return {name: flat[SWEEPABLE[name][0]] for name in names}


def identity(config: Mapping[str, Any], stage: str) -> str:
    """Twelve characters that tell a run from every other of its study.

    They stand for the fields that differ from the defaults, those left out that change no number:
    a new field of the trainer leaves the identity of runs that do not use it as it is.
    """
    default = flatten(default_config())
    own = {
        name: _canonical(value)
        for name, value in flatten(config).items()
        if name not in FREE_ON_RESUME
        and not name.startswith("sweep.")
        and (name not in default or _canonical(default[name]) != _canonical(value))
    }
    text = json.dumps([stage, own], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _canonical(value):
    """JSON knows neither tuples nor that 16 and 16.0 are one number."""
    if isinstance(value, list | tuple):
        return [_canonical(v) for v in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value
