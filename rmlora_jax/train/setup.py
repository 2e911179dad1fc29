"""From a config to everything that a program of one run or many needs."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import rmlora_jax as rm
from rmlora_jax import hub, methods
from rmlora_jax.errors import UserError
from rmlora_jax.fields import Run
from rmlora_jax.files import read_object
from rmlora_jax.hub.pretrained import label_names
from rmlora_jax.hub.source import CONFIG
from rmlora_jax.models.blocks import with_inserts
from rmlora_jax.models.family import flat_params
from rmlora_jax.models.new_tokens import rows_apart, with_trained_rows
from rmlora_jax.parallel.mesh import (
    Devices,
    check_divisible,
    check_same,
    in_rows,
    place_base,
    replicate,
    spread,
)
from rmlora_jax.tasks import TASKS
from rmlora_jax.tasks.task import Feed, Objective, Opening, Problem, data_notes, fields
from rmlora_jax.train import nonfinite
from rmlora_jax.train.checkpoint import read_base
from rmlora_jax.train.step import (
    Constants,
    State,
    first_keys,
    make_eval_step,
    make_train_step,
)


class Base(NamedTuple):
    """What a run, or all runs of a sweep, starts from: data, pretrained weights, adapted model."""

    config: Run
    devices: Devices
    problem: Any  # Problem; None where nothing is run
    feed: Feed
    objective: Objective
    lora: rm.LoRA
    adapted: nn.Module  # the model with its factors
    trainable: dict  # before the first step, of the config's own seed
    constants: Constants
    steps: int
    total_parameters: int
    trainable_parameters: int
    token_flops: float = 0.0  # of a training step for each token, see `token_flops`


class Job(NamedTuple):
    """A program before its first step, of one run or of many.

    ``runs`` and ``lora`` have an entry for each run. With ``stacked``, the state, the metrics and
    the outputs have a first axis for the runs.
    """

    base: Base
    runs: tuple[Run, ...]
    lora: tuple[rm.LoRA, ...]
    state: State
    constants: Any  # Constants, or those of a sweep
    train_step: Callable  # (state, constants, batch) -> (state, metrics); donates state
    eval_step: Callable  # (trainable, constants, batch) -> outputs
    look: Callable  # (trainable, constants, batch, step) -> the first non-finite value, in words
    stacked: bool = False

    @property
    def feed(self) -> Feed:
        return self.base.feed

    @property
    def problem(self) -> Problem:
        return self.base.problem

    @property
    def steps(self) -> int:
        return self.base.steps

    @property
    def eval_every(self) -> int:
        run = self.runs[0]
        return run.eval_every or math.ceil(self.feed.train_size / run.batch_size)

    def pick(self, tree: Any, i: int) -> Any:
        """What a tree holds of run ``i``."""
        return pick(tree, i) if self.stacked else tree

    def apart(self, values: dict[str, Any]) -> list[dict[str, Any]]:
        """The metrics of a step as one dict for each run."""
        if not self.stacked:
            return [values]
        return [{name: value[i] for name, value in values.items()} for i in range(len(self.runs))]


@jax.jit
def pick(tree: Any, i: jax.Array | int) -> Any:
    """Run ``i`` of a stacked tree."""
    return jax.tree.map(lambda x: x[i], tree)


def build(config: Run, devices: Devices) -> Job:
    """Reads data and weights, adapts the model and makes the two steps of a single run.

    Raises:
      UserError: whatever of the config cannot be had, with what to type.
    """
    base = open_base(config, devices)
    return Job(
        base=base,
        runs=(config,),
        lora=(base.lora,),
        state=replicate(start(config, base, hub.on_device(base.trainable)), devices),
        constants=base.constants,
        train_step=spread(train_step(base), devices, donate=True),
        eval_step=spread(eval_step(base), devices),
        look=functools.partial(look, base),
    )


def open_base(config: Run, devices: Devices) -> Base:
    """The base of a run or of a sweep.

    Raises:
      UserError: as `build`.
    """
    check_batches(config, devices)
    head_key, factors_key = first_keys(config.seed)
    problem = TASKS[config.task].open(config, Opening(devices, head_key, read_base))
    with fields("lora.*"):
        lora, adapted, params = with_new(config, problem, problem.params, factors_key)
        trainable, frozen = rm.split(params, lora)
    notes = [*problem.notes]
    if config.model.adapter:
        found = f"goes on from {config.model.adapter}: {lora.rank=}, {lora.alpha=}, {lora.target=}"
        notes += [found.replace("lora.", ""), *adapter_head(config, *continued(problem))[1]]
    notes += size_notes(config, trainable, frozen)
    feed = problem.open_feed()
    check_same("the data", (feed.sizes, problem.skipped, *feed.content.values()))
    notes += data_notes(problem, feed, config.batch_size)
    problem = problem._replace(notes=tuple(notes))
    steps = config.steps or max(1, round(config.epochs * feed.train_size / config.batch_size))
    trainable = cast(trainable, jnp.float32)
    check_optimizer(config, steps, trainable)
    return Base(
        config=config,
        devices=devices,
        problem=problem,
        feed=feed,
        objective=TASKS[config.task].objective(config),
        lora=lora,
        adapted=adapted,
        trainable=trainable,
        constants=Constants(
            frozen=place_base(cast(frozen, jnp.dtype(config.model.base_dtype)), devices),
            data=feed.resident,
            data_seed=replicate(np.uint32(config.data_seed), devices),
            seed=replicate(np.uint32(config.seed), devices),
        ),
        steps=steps,
        total_parameters=count(params),
        trainable_parameters=count(trainable),
        token_flops=token_flops(trainable, frozen) + 3 * feed.token_flops,
    )


def token_flops(trainable: Any, frozen: Any) -> float:
    """Operations of the weights' products for one token: 2 a weight forward, 2 for the gradient of
    its input, and 2 more for its own where it is trained; nothing that is computed again.

    An embedding counts where it is the head, too.

    >>> frozen = {name: {"kernel": np.zeros((4, 8))} for name in ("fc", "head")}
    >>> token_flops({"fc": {"lora_a": np.zeros((4, 2))}}, frozen)
    304.0
    """
    trained, held = flat_params(trainable), flat_params(frozen)
    tied = not any(path.startswith("head/kernel") for path in (*trained, *held))

    def weights(flat: dict[str, Any]) -> int:
        ends = ("kernel", "lora_a", "lora_b", *(["embed/embedding"] if tied else []))
        return sum(math.prod(x.shape) for path, x in flat.items() if path.endswith(ends))

    return 6.0 * weights(trained) + 4.0 * weights(held)


def size_notes(config: Run, trainable: Any, frozen: Any) -> Iterator[str]:
    """What a person should know of ranks and sizes before a run with factors starts."""
    if not methods.of(config).adapts:
        return
    flat = flat_params(trainable)
    shapes = {
        path.removesuffix("/lora_a"): (x.shape, flat[path.removesuffix("a") + "b"].shape)
        for path, x in flat.items() if path.endswith("/lora_a")
    }
    small = {path: side for path, (a, b) in shapes.items() if (side := smaller_side(a, b)) < a[-1]}
    for path, side in [*small.items()][:1]:
        yield (f"the rank is above the smaller side of {len(small)} of {len(shapes)} adapted "
               f"weights, whose products cannot have it ({path}: rank {shapes[path][0][-1]}, side "
               f"{side}); lower the rank")
    if count(trainable) > count(frozen):
        yield (f"more is trained ({count(trainable):,} parameters) than frozen "
               f"({count(frozen):,}); lower the rank, or type --config.method=full")


def smaller_side(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """Of the weight whose factors are A (*stack, *in, rank) and B (*stack, rank, *out).

    >>> smaller_side((12, 768, 4), (12, 4, 12, 64)), smaller_side((8, 16), (16, 2))
    (768, 2)
    """
    fit = (d for d in range(len(a) - 1) if (*a[:d], a[-1]) == b[: d + 1])
    depth = max(fit, default=0)
    return min(math.prod(a[depth:-1]), math.prod(b[depth + 1 :]))


def count(tree: Any) -> int:
    """How many numbers a tree of arrays or shapes holds."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def check_batches(config: Run, devices: Devices) -> None:
    """Raises a UserError for batches that the devices cannot share equally."""
    sizes = {"batch_size": config.batch_size, "eval_batch_size": config.eval_batch_size}
    check_divisible(devices, **sizes)
    if config.batch_size % (devices.count * config.accumulate):
        raise UserError(
            f"config.batch_size={config.batch_size} cannot be split into config.accumulate="
            f"{config.accumulate} micro-batches on each of {devices.count} devices; type "
            f"--config.batch_size={devices.count * config.accumulate}, or a multiple of it"
        )


def check_optimizer(config: Run, steps: int, trainable: Any) -> None:
    """Raises a UserError where the method's optimizer refuses what is trained."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), trainable)
    with fields("rm.*, adalora.*, sora.* or lora.rank"):
        jax.eval_shape(methods.optimizer(config, steps).init, shapes)


def with_new(
    config: Run, problem: Problem, params: dict, key: jax.Array
) -> tuple[rm.LoRA, nn.Module, dict]:
    """Description, adapted model, and pretrained parameters with what the method adds to them:
    factors, new or of ``model.adapter``, bottlenecks or prefixes."""
    lora = methods.description(config)
    if config.model.adapter:
        base, info = continued(problem)
        params, lora = from_adapter(config, base._replace(params=params), info)
    rows = problem.pretrained.rows if problem.pretrained else ()
    lora, params = with_trained_rows(lora, rows), rows_apart(params, rows)
    adapted = rm.adapt(problem.model, lora)
    if config.model.adapter:
        return lora, adapted, params
    if methods.of(config).insert is not None:
        params = with_inserts(key, problem.model, params, *problem.example)
    return lora, adapted, rm.attach(key, adapted, params, *problem.example)


def continued(problem: Problem) -> tuple[hub.Pretrained, hub.Info]:
    """The base and the use of a problem that goes on from an adapter."""
    base, info = problem.pretrained, problem.info
    assert base is not None and info is not None  # the task's check refuses model.adapter otherwise
    return base, info


def adapter_head(
    config: Run, base: hub.Pretrained, info: hub.Info
) -> tuple[tuple[int, ...] | None, tuple[str, ...]]:
    """`hub.class_order` of ``model.adapter``, whether it holds a head or factors of the base's."""
    if base.family.outputs is not None:  # a language model's head has no classes
        return None, ()
    folder = Path(config.model.adapter).expanduser()
    stored, own = hub.stored_labels(folder), hub.read_info(folder)
    # PEFT writes no names: as in transformers, the base's then stand for the adapter's.
    names = own.labels if own else label_names(read_object(base.folder / CONFIG), stored or 0)
    number = stored if stored is not None or names is None else len(names)
    if number is None or info.labels is None:
        return (tuple(range(base.num_labels)) if number == base.num_labels else None), ()
    what = f"the head in {config.model.adapter}"
    order, notes = hub.class_order(number, names, info.labels, what)
    return order, () if stored is None else notes


def from_adapter(config: Run, base: hub.Pretrained, info: hub.Info) -> tuple[dict, rm.LoRA]:
    """The parameters of ``base`` with the factors of ``model.adapter``, and with its head where
    that is for the same classes; of a language model with all that the adapter has.

    Raises:
      UserError: the method cannot go on from factors of that kind.
    """
    folder, params = Path(config.model.adapter).expanduser(), base.params
    order, _ = adapter_head(config, base, info)
    whole = base.family.outputs is not None or (
        order is not None and hub.stored_labels(folder) is not None
    )
    if order is not None:  # factors of the head have the adapter's order
        params = hub.with_head_order(params, np.argsort(order).tolist())
    params, lora = hub.load_peft(folder, base._replace(params=params), saved=whole)
    params = params if order is None else hub.with_head_order(params, order)
    if type(lora) is not methods.of(config).continues:
        able = [name for name, one in methods.METHODS.items() if one.continues is type(lora)]
        raise UserError(
            f"config.model.adapter={config.model.adapter!r} holds {type(lora).__name__} factors, "
            f"which method {config.method} does not continue; "
            + (f"type --config.method={' or '.join(able)}" if able else "no method does")
        )
    rules = "|".join(filter(None, [*map(re.escape, lora.train or ()), config.lora.train]))
    return params, dataclasses.replace(lora, train=rules or None, dropout=config.lora.dropout)


def start(config: Run, base: Base, trainable: dict) -> State:
    """The state of a run before its first step."""
    tx = methods.optimizer(config, base.steps)
    return State(jnp.zeros((), jnp.int32), trainable, tx.init(trainable))


def reseeded(config: Run, base: Base) -> dict:
    """What the run of another seed (or alpha) trains before its first step, on the same base."""
    head_key, factors_key = first_keys(config.seed)
    params = base.problem.reseeded(head_key)
    lora, _, params = with_new(config, base.problem, params, factors_key)
    return cast(rm.split(params, lora)[0], jnp.float32)


def train_step(base: Base, traced: methods.Values | None = None, prepare_params=None) -> Callable:
    """The step of one device.

    ``traced`` are the values that a sweep varies. ``prepare_params`` changes the parameters on
    their way into the model.
    """
    config = base.config
    return make_train_step(
        _apply(base, prepare_params, config.fsdp > 1),
        base.objective.loss,
        methods.optimizer(config, base.steps, traced),
        base.feed.prepare_train,
        figures=functools.partial(methods.figures, config),
        accumulate=config.accumulate,
        means=base.objective.means,
    )


def eval_step(base: Base, prepare_params=None) -> Callable:
    """The evaluation step of one device, as `train_step`."""
    apply = _apply(base, prepare_params, base.config.fsdp > 1)
    return make_eval_step(apply, base.objective.predict, base.feed.prepare_eval)


def look(base: Base, *args, prepare_params=None) -> str:
    """`nonfinite.look` of a run, with ``args`` (trainable, constants, batch, step)."""
    apply = _apply(base, prepare_params)
    return nonfinite.look(apply, base.objective.loss, base.feed.prepare_train, *args)


def _apply(base: Base, prepare_params: Callable | None, split: bool = False) -> Callable:
    def apply(params, inputs, rngs=None, **keywords):
        params = prepare_params(params) if prepare_params else params
        rows = jax.tree.leaves(inputs)[0].shape[0]
        with nn.intercept_methods(_in_rows(rows)) if split else nullcontext():
            return base.adapted.apply(
                {"params": params}, *inputs, train=rngs is not None, rngs=rngs, **keywords
            )

    return apply


def _in_rows(rows: int) -> Callable:
    """An interceptor of Flax: what goes into and out of every module stays in rows of the batch.

    Left alone the compiler would follow the parts of the weights and split features instead.
    """

    def hold(x):
        return in_rows(x) if getattr(x, "ndim", 0) > 1 and x.shape[0] == rows else x

    def intercept(call, arguments, keywords, context):
        return jax.tree.map(hold, call(*jax.tree.map(hold, arguments), **keywords))

    return intercept


def cast(tree: Any, dtype) -> Any:
    return jax.tree.map(
        lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )
