"""K runs as one job: the step of a run, mapped over runs by `jax.vmap`.

Mapped are the trainable tree, the optimizer state, the seed and what is swept. The base, the data,
the batch and the number of the step are not, so that there is one of each, and examples are
augmented once for all runs.
"""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec

import rmlora_jax as rm
from rmlora_jax import methods
from rmlora_jax.adapt.forms import FACTORS
from rmlora_jax.errors import UserError
from rmlora_jax.models.attention import under_vmap
from rmlora_jax.parallel.mesh import replicate, spread
from rmlora_jax.sweep.grid import Run
from rmlora_jax.train import setup
from rmlora_jax.train.setup import pick
from rmlora_jax.train.step import Constants, State

MAPPED = State(step=None, trainable=0, opt_state=0)  # the axis of the runs in a state of many
SHARED = ("id", "mask", "label")  # outputs of an evaluation that all runs have in common


class ManyConstants(NamedTuple):
    """What a step of many runs reads and does not change."""

    shared: Constants  # its seed is not read
    values: dict  # "seed" uint32 (K,), and what is swept, float32 (K,), by the names of SWEEPABLE


def build(runs: Sequence[Run], base: setup.Base) -> setup.Job:
    """The job of ``runs``: its state is that of each run alone, stacked on a first axis.

    ``state`` holds shapes only, `first_state` makes it.
    """
    return setup.Job(
        base=base,
        runs=tuple(run.config for run in runs),
        lora=tuple(methods.description(run.config) for run in runs),
        state=shapes(runs[0], len(runs), base),
        constants=ManyConstants(base.constants, replicate(values_of(runs), base.devices)),
        train_step=spread(train_step(base), base.devices, donate=True),
        eval_step=spread(eval_step(base), base.devices),
        look=functools.partial(look, base),
        stacked=True,
    )


def values_of(runs: Sequence[Run]) -> dict[str, np.ndarray]:
    """What differs between runs, for `ManyConstants`."""
    seeds = np.array([run.config.seed for run in runs], np.uint32)
    return {"seed": seeds} | {
        name: np.array([run.setting[name] for run in runs], np.float32) for name in runs[0].setting
    }


def look(base: setup.Base, trainable, constants: ManyConstants, batch, step: int) -> str:
    """`setup.look` of the first run."""
    values, trainable = pick((constants.values, trainable), 0)
    shared = constants.shared._replace(seed=values["seed"])
    prepare = _with_alpha(base, values)
    return setup.look(base, trainable, shared, batch, step, prepare_params=prepare)


def train_step(base: setup.Base) -> Callable:
    """``step(state, constants, batch) -> (state, metrics)`` of many runs, on one device."""

    def one(state, values, shared, batch):
        traced = {name: value for name, value in values.items() if name not in ("seed", "alpha")}
        step = setup.train_step(base, traced, _with_alpha(base, values))
        return step(state, shared._replace(seed=values["seed"]), batch)

    mapped = jax.vmap(one, in_axes=(MAPPED, 0, None, None), out_axes=(MAPPED, 0))

    def step(state, constants, batch):
        with under_vmap(True):
            return mapped(state, constants.values, constants.shared, batch)

    return step


def eval_step(base: setup.Base) -> Callable:
    """``step(trainable, constants, batch) -> outputs`` of many runs, on one device.

    Run after run: a batch of an evaluation is large by itself, and memory is that of one run.
    """

    def step(trainable, constants, batch):
        def one(run):
            trainable, values = run
            prepare = _with_alpha(base, values)
            return setup.eval_step(base, prepare)(trainable, constants.shared, batch)

        rows = jax.lax.map(one, (trainable, constants.values))
        return {name: row[0] if name in SHARED else row for name, row in rows.items()}

    return step


def _with_alpha(base: setup.Base, values: dict) -> Callable | None:
    """What a run's own alpha does to the parameters, where alpha is swept."""
    if "alpha" not in values:
        return None
    ratio = values["alpha"] / base.config.lora.alpha
    return functools.partial(scale_a, ratio=ratio, lora=base.lora)


def scale_a(params: dict, ratio: jax.Array, lora: rm.LoRA) -> dict:
    """Parameters with every A times ``ratio``, save where ``alpha_pattern`` sets the alpha.

    With the scale of ``lora`` this is the product for ``ratio * lora.alpha``.
    """
    flat = dict[tuple, Any](flatten_dict(params))
    for path, value in flat.items():
        module = "/".join(path[:-1])
        own = any(re.fullmatch(regex, module) for regex, _ in lora.alpha_pattern)
        if path[-1] == FACTORS[0] and not own:
            flat[path] = ratio * value
    return unflatten_dict(flat)


def check_frozen(base: setup.Base) -> None:
    """Raises a UserError where something that is drawn from the seed would be frozen."""
    config = base.config
    frozen = [path for path in base.problem.new if not base.lora.trains(path)]
    if config.sweep.seeds > 1 and frozen:
        roots = "|".join(sorted({path.split("/")[0] for path in frozen}))
        raise UserError(
            f"{', '.join(frozen)} is newly initialised from the seed and frozen, so that runs of "
            f"{config.sweep.seeds} seeds have no common base; train it with "
            f"--config.lora.train='{config.lora.train}|{roots}', or type --config.sweep.seeds=1"
        )


def shapes(run: Run, count: int, base: setup.Base) -> State:
    """The state of ``count`` runs such as ``run``, as shapes on the devices."""
    sharding = NamedSharding(base.devices.mesh, PartitionSpec())
    one = jax.eval_shape(lambda tree: setup.start(run.config, base, tree), base.trainable)
    struct = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
    many = jax.tree.map(lambda x: struct((count, *x.shape), x.dtype), one)
    return many._replace(step=struct((), one.step.dtype))


def first_state(runs: Sequence[Run], base: setup.Base) -> State:
    """The states of the runs before their first step, each as a single run would have it."""
    # What is trained depends on the seed and the description alone, and is made once for each.
    kinds = [(run.config.seed, methods.description(run.config)) for run in runs]
    first = dict(zip(reversed(kinds), reversed(runs), strict=True))
    trainable = {
        kind: jax.device_get(setup.reseeded(run.config, base)) for kind, run in first.items()
    }
    states = [
        jax.device_get(setup.start(run.config, base, trainable[kind]))
        for kind, run in zip(kinds, runs, strict=True)
    ]
    many = jax.tree.map(lambda *leaves: np.stack(leaves), *states)
    return replicate(many._replace(step=states[0].step), base.devices)


@jax.jit
def better(state: State, best: State, improved: jax.Array) -> State:
    """``state`` for the runs that ``improved``, bool (K,), ``best`` for the others.

    The step of the result is (K,), that of ``best`` may be () in the first call.
    """

    def choose(new, old):
        mask = improved.reshape(improved.shape + (1,) * (max(new.ndim, 1) - 1))
        return jax.numpy.where(mask, new, old)

    return jax.tree.map(choose, state, best)
