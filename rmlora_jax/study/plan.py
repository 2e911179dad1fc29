"""From a study to its runs: which there are, in which program, at which learning rate."""

import dataclasses
import hashlib
import itertools
import json
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from rmlora_jax.config import FREE, Elements, field, is_names, is_number, leaves
from rmlora_jax.tasks.scores import higher_is_better
from rmlora_jax.train.config import RunConfig, flatten

CHOOSE, FINAL = "choose", "final"
FIRST_CHOOSE_SEED = 100

Setting = dict[str, float]  # name of rmlora_jax.train.config.SWEEPABLE -> value


def each_once(values: Sequence, what: str = "values, each once") -> str | None:
    """The problem with values that repeat or are missing, if any."""
    return None if values and len(set(values)) == len(values) else f"must be {what}"


def rate_field(default: tuple[float, ...], help: str) -> Any:
    """A field of learning rates."""
    words = "numbers above 0, each once"
    above = Elements(words, lambda value: is_number(value) and value > 0)
    return field(default, help, elements=above, problem=lambda values: each_once(values, words))


def _unnamed(study: str) -> str | None:
    fine = re.fullmatch(r"\w[\w.-]{0,99}", study)
    return None if fine else "must be the study's name, of letters, digits, -, _ and ."


@dataclasses.dataclass(frozen=True)
class Study:
    """Every field of a study."""

    study: str = field("", "its name, for its folder and its rows", problem=_unnamed)
    tasks: tuple = field(
        (),
        "config files of runs, each with fields of its own and, where two would have the same "
        "name, another: 'configs/minilm_glue.py:rte epochs=20 as rte_long'",
        problem=lambda files: None if files else "must be one config file or more",
    )
    methods: tuple = field(
        (), "of --config.method",
        problem=lambda names: each_once(names, "one method or more, each of them once"),
    )
    fields: tuple = field(
        (), "fields of every run that belong to the study, such as ('steps=2000',)"
    )
    set: tuple = field(
        (), "fields of every run that belong to the machine, such as ('data.data_dir=/data',)"
    )
    method_set: dict = field({}, "method -> fields of its runs")
    variants: tuple = field(
        ((),), "fields of runs that are compared, such as (('lora.rank=2',), ())",
        elements=Elements("tuples of fields, such as (('lora.rank=2',), ())", is_names),
        problem=lambda sets: None if sets else "must be one tuple or more; ((),) for no fields",
    )
    grid: dict = field({}, "values that are compared: penalty, keep, alpha, ...")
    rates: tuple = rate_field(
        (3e-4, 1e-3, 3e-3, 1e-2),
        "learning rates to choose from, by validation at the last step; one rate is taken as it is",
    )
    full_rates: tuple = rate_field((2e-5, 5e-5, 1e-4, 2e-4), "of method full")
    head_rates: tuple = rate_field((1e-3, 3e-3, 1e-2, 3e-2), "of method head")
    choose_seeds: int = field(2, "runs for each rate: seeds 100, 101, ...", least=1)
    seeds: int = field(
        5, "runs that are reported, on test at the last step: seeds 0, 1, ...",
        least=1, most=FIRST_CHOOSE_SEED,
    )
    at_once: int = field(
        0, "runs that are trained at once; 0: as many of a program as fit in memory", least=0
    )
    shared: bool = field(
        False,
        "train lora and the halves of rm_lora as rm_lora with penalty 0 or keep 1, which they "
        "equal bit for bit: the four then compile alike, and three find their program in the "
        "compilation cache",
    )
    processes: bool = field(
        True, "each program in a process of its own, so that its peak memory is its own"
    )
    along: str = field(
        "method", "what pictures compare: method, task, or a name of grid or variants"
    )
    pictures: tuple = field(
        ("table",), "table, heat, frequency, gap, layers, dimension",
        problem=lambda names: each_once(names, "pictures, each of them once") if names else None,
    )
    dry_run: bool = field(False, "print the plan and what it costs, and stop")

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
    are the study's grid, without ``learning_rate`` where it waits for that choice.
    """

    task: str
    method: str
    stage: str
    settings: tuple[Setting, ...]
    seeds: tuple[int, ...]
    variant: tuple[str, ...] = ()

    @property
    def place(self) -> tuple:
        """What decides the config that the runs share."""
        return self.task, self.method, self.variant

    @property
    def waits(self) -> bool:
        """Whether the learning rate is still to be chosen."""
        return "learning_rate" not in self.settings[0]

    @property
    def runs(self) -> int:
        return len(self.settings) * len(self.seeds)

    def __str__(self) -> str:
        return " ".join([self.task, self.method, *self.variant, self.stage])


def cells(study: Study, tasks: Iterable[str]) -> tuple[Cell, ...]:
    """Everything that the study runs, in order: for each task and method first the choice of its
    rate, at the task's own fields, then every variant with the product of ``study.grid``."""
    choose = tuple(range(FIRST_CHOOSE_SEED, FIRST_CHOOSE_SEED + study.choose_seeds))
    final = tuple(range(study.seeds))
    names, found = sorted(study.grid), []
    products = itertools.product(*(study.grid[name] for name in names))
    settings = [dict(zip(names, map(float, values), strict=True)) for values in products]
    for task, method in itertools.product(tasks, study.methods):
        own = {"full": study.full_rates, "head": study.head_rates}
        rates = [float(rate) for rate in own.get(method, study.rates)]
        rate = {"learning_rate": rates[0]} if len(rates) == 1 else {}
        grid = tuple(rate | setting for setting in settings)
        if not rate:
            candidates = tuple({"learning_rate": rate} for rate in rates)
            found.append(Cell(task, method, CHOOSE, candidates, choose))
        found += [Cell(task, method, FINAL, grid, final, tuple(v)) for v in study.variants]
    return tuple(found)


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


def decided(cell: Cell, choice: Sequence[str], rows: Mapping[str, Mapping[str, Any]]) -> Cell:
    """The cell with the rate that the runs of the keys ``choice`` decide on, if it waits for one
    and all of them are among ``rows``."""
    if not cell.waits or any(key not in rows for key in choice):
        return cell
    rate = choose_rate([rows[key] for key in choice])
    return cell._replace(settings=tuple({"learning_rate": rate, **s} for s in cell.settings))


def identity(config: Any, stage: str) -> str:
    """Twelve characters that tell a run from every other of its study.

    They stand for the fields that differ from the defaults, those left out that change no number:
    a new field of the trainer leaves the identity of runs that do not use it as it is.
    """
    known = leaves(RunConfig)
    own = {
        name: _canonical(value)
        for name, value in flatten(config).items()
        if known[name].spec.resume != FREE
        and not name.startswith("sweep.")
        and _canonical(known[name].default) != _canonical(value)
    }
    text = json.dumps([stage, own], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _canonical(value):
    """JSON knows neither tuples nor that 16 and 16.0 are one number."""
    if isinstance(value, list | tuple):
        return [_canonical(v) for v in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value
