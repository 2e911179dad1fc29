"""Every field of a study, with its meaning, and the checks made before anything runs."""

import re
from pathlib import Path

import ml_collections

from rmlora_jax.errors import UserError, did_you_mean
from rmlora_jax.study import plan, tasks
from rmlora_jax.study.pictures import PICTURES
from rmlora_jax.study.program import program
from rmlora_jax.train.check import check_config
from rmlora_jax.train.config import METHODS, SWEEPABLE
from rmlora_jax.train.kinds import is_names, is_number, mistakes_of_kind, with_defaults


def default_study() -> ml_collections.ConfigDict:
    """The fields of a study. A file in ``configs/`` starts from these and changes what it needs."""
    c = ml_collections.ConfigDict()
    c.study = ""  # its name; its folder and its rows bear it
    # Config files of runs, each with fields of its own and, where two would be called the same, a
    # name: "configs/minilm_glue.py:rte epochs=20 as rte_long"
    c.tasks = ()
    c.methods = ()  # of --config.method
    c.fields = ()  # fields of every run that make the study what it is, such as ("steps=2000",)
    c.set = ()  # the same, set on top by who starts it, such as ("data.data_dir=/data",)
    c.method_set = ml_collections.ConfigDict()  # method -> fields of its runs
    c.variants = ((),)  # fields of runs that are compared, such as (("lora.rank=2",), ())
    c.grid = ml_collections.ConfigDict()  # values that are compared: penalty, keep, alpha, ...
    # Learning rates to choose from, by validation at the last step; with one there is no choice
    c.rates = (3e-4, 1e-3, 3e-3, 1e-2)
    c.full_rates = (2e-5, 5e-5, 1e-4, 2e-4)  # of method full
    c.head_rates = (1e-3, 3e-3, 1e-2, 3e-2)  # of method head
    c.choose_seeds = 2  # runs for each of them: seeds 100, 101, ...
    c.seeds = 5  # runs that are reported, on test at the last step: seeds 0, 1, ...
    c.at_once = 0  # runs that are trained at once; 0: as many of a program as fit in memory
    # Train lora and the halves of rm_lora as rm_lora with penalty 0 or keep 1, which they equal bit
    # for bit: the four then compile alike, and three find their program in the compilation cache.
    c.shared = False
    c.processes = True  # each program in a process of its own, so that its peak memory is its own
    c.along = "method"  # what pictures compare: method, task, or a name of grid or variants
    c.pictures = ("table",)  # table, heat, frequency, gap, layers, dimension
    c.dry_run = False  # print the plan and what it costs, and stop
    return c


def check_study(c: ml_collections.ConfigDict) -> dict[tuple, ml_collections.ConfigDict]:
    """The config that the runs of every place share (`plan.place`), tasks in their order.

    Raises one UserError that lists every mistake.
    """
    default = default_study()
    kinds = mistakes_of_kind(c, default)
    wrong, given, c = [*kinds.values()], c, with_defaults(c, kinds, default)

    def need(ok: bool, field: str, allowed: str):
        if not ok:
            value = repr(plan.field(given, field))[:200]
            wrong.append(f"config.{field}={value}: must be {allowed}")

    def known(field: str, names, allowed, what: str):
        for name in names:
            if name not in allowed:
                hint = did_you_mean(name, allowed)
                wrong.append(
                    f"config.{field}: no {what} {name!r}: there are {', '.join(allowed)}{hint}"
                )

    name = re.fullmatch(r"\w[\w.-]{0,99}", c.study)
    need("study" in kinds or name, "study", "the study's name, of letters, digits, -, _ and .")
    need("tasks" in kinds or len(c.tasks) > 0, "tasks", "one config file or more")
    need("methods" in kinds or len(c.methods) > 0, "methods", "one method or more")
    need(len(set(c.methods)) == len(c.methods), "methods", "methods, each of them once")
    known("methods", c.methods, METHODS, "method")
    known("method_set", c.method_set, METHODS, "method")
    known("pictures", c.pictures, tuple(PICTURES), "picture")
    need(len(set(c.pictures)) == len(c.pictures), "pictures", "pictures, each of them once")
    for field in ("rates", "full_rates", "head_rates"):
        values = plan.field(c, field)
        fine = len(values) > 0 and all(v > 0 for v in values)
        need(fine and len(set(values)) == len(values), field, "numbers above 0, each once")
    for field in ("choose_seeds", "seeds"):
        need(plan.field(c, field) >= 1, field, "at least 1")
    need(c.at_once >= 0, "at_once", "0 or more")
    need(c.seeds <= plan.FIRST_CHOOSE_SEED, "seeds",
         f"at most {plan.FIRST_CHOOSE_SEED}: seeds from there on choose the rate")
    need(len(c.variants) > 0, "variants", "one tuple of fields or more; ((),) for none")
    known("grid", c.grid, tuple(SWEEPABLE), "name")
    for name, values in c.grid.items():
        fine = isinstance(values, tuple | list) and values and all(map(is_number, values))
        fine = fine and len(set(values)) == len(values)
        need(fine, f"grid.{name}", "a tuple of numbers, each once")
        if name == "learning_rate":
            wrong.append("config.grid.learning_rate: give the rates as config.rates")
        readers = SWEEPABLE.get(name, ("", c.methods))[1]
        idle = [method for method in c.methods if method not in readers]
        if idle:
            wrong.append(f"config.grid.{name}: it changes nothing with {', '.join(idle)}")
    for method, fields in c.method_set.items():
        allowed = "a tuple of fields, such as ('lora.rank=2',)"
        need(is_names(fields), f"method_set.{method}", allowed)
    axes = ("method", "task", *c.grid, *plan.varied_fields(c.variants))
    known("along", (c.along,), axes, "axis")
    if wrong:
        raise UserError("\n".join(wrong))

    opened, bases = tasks.open_tasks(c), {}
    for cell in plan.cells(c, opened):
        try:
            base = tasks.configured(c, opened[cell.task], cell.method, cell.variant)
            bases[plan.place(cell)] = base
            whole = program(cell, base, Path(), at_once=c.at_once, shared=c.shared)
            check_config(ml_collections.ConfigDict(whole.config))
        except UserError as e:
            where = " ".join([cell.task, cell.method, *cell.variant])
            wrong += [f"{where}: {line}" for line in str(e).splitlines()]
    if wrong:
        raise UserError("\n".join(dict.fromkeys(wrong)))
    return bases
