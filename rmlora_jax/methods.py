"""The methods: what is adapted, what is trained, by which optimizer. A method is data.

Every method is the same loop with another description and another optax transformation. A new one
is an entry of ``METHODS``.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import rmlora_jax as rm
from rmlora_jax import config as c
from rmlora_jax.adapt.lora import is_factor
from rmlora_jax.config import LARGE, MOST, Mistake, field
from rmlora_jax.errors import UserError
from rmlora_jax.fields import Run, under
from rmlora_jax.optim.factors import FactorNames, find_diagonals, find_factors, flatten
from rmlora_jax.optim.precision import clip_by_norm
from rmlora_jax.optim.sora import surviving, surviving_parameters

# What a sweep varies, by the names of ``sweep.grid``: numbers in a single run, traced in a sweep.
Values = Mapping[str, Any]

ALWAYS_SWEPT = ("learning_rate", "weight_decay")


@dataclasses.dataclass(frozen=True)
class Rm:
    """The two parts of RM-LoRA."""

    penalty: float = field(0.1, "weight of the orthogonality penalty", least=0, sweep="penalty")
    kind: str = field("norm", "of the penalty", choices=("norm", "squared", "cosine"))
    keep: float = field(
        0.5, "probability that a rank direction moves (draw exact: how many)", sweep="keep"
    )
    draw: str = field("bernoulli", "of the mask", choices=("bernoulli", "exact"))
    unit: str = field("rank", "what is drawn", choices=("rank", "element", "matrix"))
    coupling: str = field(
        "paired", "paired: A and B share a draw", choices=("paired", "independent")
    )
    start_step: int = field(1, "first step that is masked", least=0, most=MOST)
    resample_every: int = field(1, "steps between draws", least=1, most=MOST)
    rescale: bool = field(False, "divide what is kept by keep")
    placement: str = field(
        "before", "mask before the optimizer, after it, or lazy",
        choices=("before", "after", "lazy"),
    )
    also: bool = field(
        False,
        "mask bitfit, bottleneck or prefix too, but never what lora.train matches. rm.unit says "
        "what is drawn. bitfit: element (an entry of a bias); prefix: element, or matrix (all keys "
        "of a layer, all its values); bottleneck: rank (a column of down and its row of up), "
        "element, matrix",
    )

    def check(self) -> Iterator[Mistake]:
        if self.draw == "bernoulli":
            if not 0 < self.keep <= 1:
                yield "keep", "a probability in (0, 1]"
            return
        if not (self.keep >= 1 and self.keep == int(self.keep)):
            yield "keep", "a whole number with draw exact"
        if self.unit != "rank":
            yield "unit", "rank with draw exact"


@dataclasses.dataclass(frozen=True)
class AdaLora:
    """Read by method adalora alone; its A and B begin as N(0, 0.02^2)."""

    initial_rank: int = field(6, "rank that a layer begins with", least=1, most=LARGE)
    target: float = field(
        0.0, "directions that a layer has left on average; 0: lora.rank", least=0
    )
    warmup: float = field(0.15, "fraction of the steps before the budget falls", least=0)
    final: float = field(0.5, "fraction of the steps, at the end, with what is left")
    every: int = field(10, "steps between two allocations", least=1)
    orthogonal: float = field(
        0.1, "weight of its penalty on P and Q", least=0, sweep="orthogonal"
    )

    def check(self) -> Iterator[Mistake]:
        if not 0 < self.final < 1 - self.warmup:
            yield "final", "above 0 and, with adalora.warmup, below 1"


@dataclasses.dataclass(frozen=True)
class Sora:
    """Read by method sora alone."""

    initial_rank: int = field(8, "rank that a layer begins with", least=1, most=LARGE)
    sparsity: float = field(
        0.5, "lambda_2: each step moves a gate towards 0 by this times the rate",
        least=0, sweep="sparsity",
    )
    shrink: float | None = field(
        None,
        "in place of sparsity: what a gate loses over the whole run, so that a value fits any rate "
        "and length; gates begin as N(0, 1). None: sparsity",
        least=0, sweep="shrink",
    )
    l1: float = field(0.0, "lambda_1: weight of the mean |gate| in the loss", least=0, sweep="l1")
    gate_rate: float = field(1.0, "learning rate of the gates over that of all else", above=0)
    proximal: str = field("paper", "the proximal step", choices=("paper", "authors_exact"))

    def check(self) -> Iterator[Mistake]:
        if self.shrink is not None and self.proximal != "paper":
            yield "shrink", "None where sora.proximal is not paper"


@dataclasses.dataclass(frozen=True)
class Bottleneck:
    """Read by method bottleneck alone."""

    width: int = field(
        8, "of the adapters: y + up(gelu(down(y))), up begins at 0", least=1, most=LARGE
    )


@dataclasses.dataclass(frozen=True)
class Prefix:
    """Read by method prefix alone; not for DeBERTa."""

    length: int = field(
        8, "trained keys and values in front of every layer's own", least=1, most=LARGE
    )


@dataclasses.dataclass(frozen=True)
class Method:
    """What tells one method from another.

    Attributes:
      help: what it is.
      describe: config -> what is adapted and trained.
      optimize: (config, values, schedule, steps, options of AdamW) -> optimizer.
      adapts: whether it adapts weights by factors.
      sweeps: what ``sweep.grid`` may vary beside ``ALWAYS_SWEPT``.
      figures: (trainable, optimizer state) -> scalars that are logged beside those of all methods.
      check: config -> what is wrong with it for this method.
      insert: (config, config of the model) -> the latter with what the method puts into the layers.
      maskable: the parameters that ``rm.also`` masks, as ``factors`` of the mask, from a config.
      masks: whether the optimizer always masks the factors.
      gated: whether a diagonal closes directions.
      continues: the kind of adapter that ``model.adapter`` may hold, if any.
      section: the fields that it reads beside those of every run.
      plans: what of it depends on the number of steps beside the learning rate, in words.
    """

    help: str
    describe: Callable[[Run], rm.LoRA]
    optimize: Callable[..., optax.GradientTransformation]
    adapts: bool = False
    sweeps: tuple[str, ...] = ()
    check: Callable[[Run], Iterator[Mistake]] = lambda config: iter(())
    insert: Callable[[Run, Any], Any] | None = None
    maskable: Callable[[Run], FactorNames] | None = None
    masks: bool = False
    gated: bool = False
    continues: type[rm.LoRA] | None = None
    section: type | None = None
    plans: str = ""


def of(config: Run) -> Method:
    """The method of a run."""
    return METHODS[config.method]


def has_factors(config: Run) -> bool:
    """Whether the method adapts weights by factors."""
    return of(config).adapts


def masks(config: Run) -> bool:
    """Whether the optimizer of the method holds a mask."""
    method = of(config)
    return method.masks or (method.maskable is not None and config.own(Rm).also)


def description(config: Run) -> rm.LoRA:
    """What the method adapts and trains; ``target=None`` adapts nothing."""
    return of(config).describe(config)


def architecture(config: Run, base: Any) -> Any:
    """The config of the pretrained model with what the method puts into its layers.

    Raises:
      UserError: the model has no place for it.
    """
    insert = of(config).insert
    return base if insert is None else insert(config, base)


def check(config: Run) -> Iterator[Mistake]:
    """What is wrong with a config for its method, as (field, what it must be)."""
    method = of(config)
    if config.optimizer.lora_plus != 1 and not method.adapts:
        yield "optimizer.lora_plus", f"1: {config.method} has no lora_b"
    if config.model.adapter and not method.continues:
        able = ", ".join(name for name, other in METHODS.items() if other.continues)
        yield "model.adapter", f"empty for {config.method}; it is for {able}"
    if config.own(Rm).also and method.maskable is None:
        able = ", ".join(name for name, other in METHODS.items() if other.maskable)
        yield "rm.also", f"False for {config.method}; it is for {able}"
    yield from method.check(config)


def learning_rate(config: Run, steps: int, peak: Any = None) -> optax.Schedule:
    """Step -> rate: linear warm-up from 0, then constant or a decay that reaches 0 at ``steps``."""
    own = config.optimizer
    peak = own.learning_rate if peak is None else peak
    warmup = int(own.warmup * steps)
    decay = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, 0.0, steps - warmup),
        "cosine": optax.cosine_decay_schedule(peak, steps - warmup),
    }[own.schedule]
    if not warmup:
        return decay
    rise = optax.linear_schedule(0.0, peak, warmup)
    return optax.join_schedules([rise, decay], [warmup])


def optimizer(
    config: Run, steps: int, traced: Values | None = None
) -> optax.GradientTransformation:
    """Clip and AdamW for a run of ``steps`` steps, with what the method adds before and after.

    ``traced`` are the values that a sweep varies, in place of the config's.
    """
    flat, known = c.flatten(config), c.leaves(type(config)).items()
    values = {leaf.spec.sweep: flat[path] for path, leaf in known if leaf.spec.sweep}
    values |= traced or {}
    own, schedule = config.optimizer, learning_rate(config, steps, values["learning_rate"])
    adamw = {"b1": own.b1, "b2": own.b2, "eps": own.eps, "weight_decay": values["weight_decay"]}
    tx = of(config).optimize(config, values, schedule, steps, adamw)
    return tx if own.lora_plus == 1 else optax.chain(tx, scale_lora_b(own.lora_plus))


def figures(config: Run, trainable: Any, state: Any) -> dict[str, jax.Array]:
    """What is logged of a step beside its loss, float32 scalars.

    With factors penalty, the unweighted R; with factors or a mask kept_fraction, the part of the
    maskable entries whose gradient passed; with a diagonal open_directions, how many of its entries
    are not 0.
    """
    found = {}
    adapted = has_factors(config)
    if adapted or masks(config):
        found["kept_fraction"] = rm.kept_fraction(state)
    if adapted:
        found["penalty"] = rm.orthogonality(trainable, kind=config.own(Rm).kind)
    if of(config).gated:
        found["open_directions"] = surviving(trainable)["surviving_directions"]
    return found


def left(config: Run, trainable: Any) -> dict[str, Any]:
    """What is left of a trained tree once closed directions are cut off and diagonals folded in.

    ``{"factors": parameters without the head, "head": those of ``lora.train``, "ranks": {module:
    open directions of each layer}}``; ranks for methods with a diagonal alone.
    """
    leaves, _, paths = flatten(trainable)
    trained = rm.LoRA(rank=1, target=None, train=config.lora.train)
    sizes = {path: math.prod(leaf.shape) for path, leaf in zip(paths, leaves, strict=True)}
    head = {p: n for p, n in sizes.items() if trained.trains(p) and not is_factor(p.split("/"))}
    found: dict[str, Any] = {
        "factors": sum(sizes.values()) - sum(head.values()), "head": sum(head.values())
    }
    if of(config).gated:
        ranks = {d.module: np.count_nonzero(leaves[d.e], -1) for d in find_diagonals(trainable)}
        found |= {"factors": surviving_parameters(trainable), "ranks": ranks}
    return found


def scale_lora_b(ratio: float) -> optax.GradientTransformation:
    """LoRA+: multiplies the updates of every ``lora_b`` by ``ratio``.

    At the end of a chain this is the learning rate of B as a multiple of that of A, decoupled
    weight decay included, as with two groups of parameters.

    Source: Hayou et al. 2024, https://arxiv.org/abs/2402.12354, section 4.
    """

    def scaled(updates, _):
        leaves, treedef, _ = flatten(updates)
        for factor in find_factors(updates):
            if factor.side == "b":
                leaves[factor.index] = ratio * leaves[factor.index]
        return treedef.unflatten(leaves)

    return optax.stateless(scaled)


# What is adapted and trained.


def factors(kind: type[rm.LoRA] = rm.LoRA, own: type | None = None, **fixed: Any) -> Callable:
    """A description with the fields of ``lora.*``; ``own``: the section with its initial rank."""

    def describe(config: Run) -> rm.LoRA:
        given = dataclasses.asdict(config.lora)
        if own is not None:
            given["rank"] = config.own(own).initial_rank
        return kind(**given | fixed)

    return describe


def trains(own: str) -> Callable[[Run], rm.LoRA]:
    """Nothing is adapted; trained is what ``own`` matches, beside ``lora.train``."""
    return lambda config: rm.LoRA(rank=1, target=None, train=rf"{own}|(?:{config.lora.train})")


def everything(config: Run) -> rm.LoRA:
    return rm.LoRA(rank=1, target=None, train=".*")


def head(config: Run) -> rm.LoRA:
    return rm.LoRA(rank=1, target=None, train=config.lora.train)


# The optimizers.


def plain(config, values, schedule, steps, adamw):
    """Clip and AdamW; with ``rm.also`` the mask between them."""
    if masks(config):
        return rm_lora(config, values, schedule, steps, adamw, penalty=False)
    clip = clip_by_norm(config.optimizer.clip or None)
    return optax.chain(clip, optax.adamw(schedule, **adamw))


def rm_lora(config, values, schedule, steps, adamw, *, penalty: bool = True, mask: bool = True):
    """The penalty's gradient before the clip and the mask behind it."""
    own, method = config.own(Rm), of(config)
    keep = values["keep"]
    masked = {
        "keep": int(keep) if own.draw == "exact" else keep,
        "draw": own.draw,
        "unit": own.unit,
        "coupling": own.coupling,
        "start_step": own.start_step,
        "resample_every": own.resample_every,
        "rescale": own.rescale,
        "placement": own.placement,
    }
    return rm.rm_lora(
        schedule,
        penalty=values["penalty"] if penalty else 0.0,
        kind=own.kind,
        clip=config.optimizer.clip or None,
        seed=config.seed,
        factors=method.maskable(config) if method.maskable else None,
        **(masked if mask else {"keep": 1.0}),
        **adamw,
    )


def penalty_alone(*args):
    return rm_lora(*args, mask=False)


def mask_alone(*args):
    return rm_lora(*args, penalty=False)


def adalora(config, values, schedule, steps, adamw):
    """AdaLoRA's penalty and its allocation."""
    own = config.own(AdaLora)
    return rm.adalora(
        schedule,
        total_steps=steps,
        target=own.target or config.lora.rank,
        initial_steps=int(own.warmup * steps),
        final_steps=int(own.final * steps),
        every=own.every,
        orthogonal=values["orthogonal"],
        clip=config.optimizer.clip or None,
        **adamw,
    )


def sora(config, values, schedule, steps, adamw):
    """The proximal step of SoRA's gates."""
    own = config.own(Sora)
    sparsity, shrink = values["sparsity"], values["shrink"]
    if shrink is not None:
        # lambda_2 with which a gate that nothing else moves loses ``shrink`` in all steps.
        sparsity = shrink / (own.gate_rate * jax.vmap(schedule)(jnp.arange(steps)).sum())
    return rm.sora(
        schedule,
        sparsity=sparsity,
        gate_learning_rate=lambda step: own.gate_rate * schedule(step),
        l1=values["l1"],
        proximal=own.proximal,
        clip=config.optimizer.clip or None,
        **adamw,
    )


# What a method puts into the layers.


def with_bottlenecks(config: Run, base: Any) -> Any:
    return dataclasses.replace(base, bottleneck_width=config.own(Bottleneck).width)


def with_prefixes(config: Run, base: Any) -> Any:
    if base.no_prefix:
        raise UserError(
            f"config.method='prefix' does not fit {config.model.source}: {base.no_prefix}; type "
            "--config.method=bottleneck"
        )
    return dataclasses.replace(base, prefix_length=config.own(Prefix).length)


# The checks.


def check_adalora(config: Run) -> Iterator[Mistake]:
    own = config.own(AdaLora)
    end = own.target or config.lora.rank
    if not own.initial_rank > end:
        yield "adalora.initial_rank", (
            f"above adalora.target or lora.rank, {end}, which is what is left"
        )


def check_init(config: Run) -> Iterator[Mistake]:
    if config.lora.init == "pissa":
        yield "lora.init", f"another than pissa for {config.method}"


def check_bitfit(config: Run) -> Iterator[Mistake]:
    if config.own(Rm).also and config.own(Rm).unit != "element":
        yield "rm.unit", "element to mask bitfit: a bias has no rank"


def check_prefix(config: Run) -> Iterator[Mistake]:
    if config.own(Rm).also and config.own(Rm).unit not in ("element", "matrix"):
        yield "rm.unit", (
            "element or matrix to mask prefix: its vectors have no rank directions"
        )


def check_bottleneck(config: Run) -> Iterator[Mistake]:
    own, width = config.own(Rm), config.own(Bottleneck).width
    if own.also and own.draw == "exact" and own.keep > width:
        yield "rm.keep", f"at most bottleneck.width {width} with draw exact"


BIAS = r"(?:.*/)?bias"
PREFIXES = r".*/prefix/(?:key|value)"

METHODS: dict[str, Method] = {
    "rm_lora": Method(
        "LoRA with the orthogonality penalty and the random mask", factors(), rm_lora,
        adapts=True, sweeps=("penalty", "keep", "alpha"), masks=True, continues=rm.LoRA,
        section=Rm,
    ),
    "lora": Method(
        "LoRA", factors(), plain, adapts=True, sweeps=("alpha",), continues=rm.LoRA
    ),
    "reg_only": Method(
        "half of rm_lora: the penalty without the mask", factors(), penalty_alone,
        adapts=True, sweeps=("penalty", "alpha"), continues=rm.LoRA,
    ),
    "mask_only": Method(
        "half of rm_lora: the mask without the penalty", factors(), mask_alone,
        adapts=True, sweeps=("keep", "alpha"), masks=True, continues=rm.LoRA,
    ),
    "adalora": Method(
        "AdaLoRA: moves its rank directions between layers while it trains",
        factors(rm.AdaLoRA, AdaLora, init="normal"), adalora,
        adapts=True, sweeps=("alpha", "orthogonal"), check=check_adalora, gated=True,
        section=AdaLora, plans="the budget of adalora",
    ),
    "sora": Method(
        "SoRA: closes rank directions by gates while it trains", factors(rm.SoRA, Sora), sora,
        adapts=True, sweeps=("alpha", "sparsity", "shrink", "l1"), check=check_init, gated=True,
        section=Sora,
    ),
    "dora": Method(
        "DoRA: LoRA with a trained magnitude for each output", factors(rm.DoRA), plain,
        adapts=True, sweeps=("alpha",), check=check_init, continues=rm.DoRA,
    ),
    # Ben Zaken et al. 2022, https://arxiv.org/abs/2106.10199.
    "bitfit": Method(
        "every bias", trains(BIAS), plain, check=check_bitfit,
        maskable=lambda config: under(config.lora.train, BIAS),
    ),
    "bottleneck": Method(
        "adapters behind attention and MLP", trains(r".*/bottleneck[12]/.*"), plain,
        check=check_bottleneck, insert=with_bottlenecks, section=Bottleneck,
        maskable=lambda config: (r"down/kernel", r"up/kernel"),
    ),
    "prefix": Method(
        "trained keys and values in front of every layer's own", trains(PREFIXES), plain,
        check=check_prefix, insert=with_prefixes, section=Prefix,
        maskable=lambda config: under(config.lora.train, PREFIXES),
    ),
    "head": Method("what lora.train matches", head, plain),
    "full": Method("all parameters", everything, plain),
}

SECTIONS = c.sections(METHODS.values())


def readers(name: str) -> tuple[str, ...]:
    """The methods for which a name of ``sweep.grid`` changes something."""
    return tuple(
        method for method, own in METHODS.items() if name in (*ALWAYS_SWEPT, *own.sweeps)
    )
