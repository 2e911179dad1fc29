"""The methods: what each adapts, what it trains, and by which optimizer.

All methods share one loop. A method is data: a description of what is adapted, and an optax
transformation. A new one is an entry of ``METHODS``.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import rmlora_jax as rm
from rmlora_jax.adapt.lora import is_factor
from rmlora_jax.config import Mistake, leaves, sections
from rmlora_jax.config import flatten as flat_values
from rmlora_jax.errors import UserError
from rmlora_jax.fields import Run, under
from rmlora_jax.methods.fields import UNITS, AdaLora, Bottleneck, Prefix, Rm, Sora
from rmlora_jax.optim.diagonals import find_diagonals
from rmlora_jax.optim.factors import ADAPTED, FactorNames, find_factors, flatten
from rmlora_jax.optim.precision import clip_by_norm
from rmlora_jax.optim.sora import surviving, surviving_parameters

# What a sweep varies, by the names of ``sweep.grid``: numbers in a single run, traced in a sweep.
Values = Mapping[str, Any]

ALWAYS_SWEPT = ("learning_rate", "weight_decay")

ALL_LINEAR = "all-linear"  # in lora.target: every linear layer of the model's layers, as in PEFT
LINEAR = r"(?:.*/)?layers/.*"  # what it stands for; neither embedding nor head


@dataclasses.dataclass(frozen=True)
class Method:
    """What tells one method from another."""

    help: str
    describe: Callable[[Run], rm.LoRA]  # what is adapted and trained
    # (config, values, schedule, steps, and keywords: clip and the options of AdamW)
    optimize: Callable[..., optax.GradientTransformation]
    adapts: bool = False  # whether it adapts weights by factors
    sweeps: tuple[str, ...] = ()  # what ``sweep.grid`` may vary beside ``ALWAYS_SWEPT``
    check: Callable[[Run], Iterator[Mistake]] = lambda config: iter(())
    # (config, config of the model) -> the latter with what the method puts into the layers
    insert: Callable[[Run, Any], Any] | None = None
    # The parameters that ``rm.also`` masks, as ``factors`` of the mask, and by which ``rm.unit``.
    maskable: Callable[[Run], FactorNames] | None = None
    units: tuple[str, ...] = UNITS
    masks: bool = False  # whether the optimizer always masks the factors
    gated: bool = False  # whether a diagonal closes directions
    continues: type[rm.LoRA] | None = None  # the kind of adapter that ``model.adapter`` may hold
    section: type | None = None  # the fields that it reads beside those of every run
    plans: str = ""  # what else, beside the learning rate, depends on the number of steps


def of(config: Run) -> Method:
    """The method of a run."""
    return METHODS[config.method]


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
    own = config.own(Rm)
    if own.also and method.maskable is None:
        able = ", ".join(name for name, other in METHODS.items() if other.maskable)
        yield "rm.also", f"False for {config.method}; it is for {able}"
    elif own.also and own.unit not in method.units:
        units = " or ".join(method.units)
        yield "rm.unit", f"{units} to mask {config.method}: its vectors have no rank directions"
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
    flat, known = flat_values(config), leaves(type(config)).items()
    values = {leaf.spec.sweep: flat[path] for path, leaf in known if leaf.spec.sweep}
    values |= traced or {}
    own, schedule = config.optimizer, learning_rate(config, steps, values["learning_rate"])
    tx = of(config).optimize(
        config,
        values,
        schedule,
        steps,
        clip=own.clip or None,
        b1=own.b1,
        b2=own.b2,
        eps=own.eps,
        weight_decay=values["weight_decay"],
        weight_decay_mask=None if own.decay_all else rm.decayed,
    )
    return tx if own.lora_plus == 1 else optax.chain(tx, scale_lora_b(own.lora_plus))


def figures(config: Run, trainable: Any, state: Any) -> dict[str, jax.Array]:
    """What a step logs beside its loss, float32 scalars.

    * ``penalty``, for methods with factors: R, not weighted.
    * ``kept_fraction``, for methods with factors or a mask: the part of the maskable entries whose
      gradient passed.
    * ``open_directions``, for methods with a diagonal: how many of its entries are not 0.
    """
    found = {}
    adapts = of(config).adapts
    if adapts or masks(config):
        found["kept_fraction"] = rm.kept_fraction(state)
    if adapts:
        found["penalty"] = rm.orthogonality(trainable, kind=config.own(Rm).kind, factors=ADAPTED)
    if of(config).gated:
        found["open_directions"] = surviving(trainable)["surviving_directions"]
    return found


def left(config: Run, trainable: Any) -> dict[str, Any]:
    """The size of a trained tree once closed directions are cut off and diagonals folded in.

    ``{"factors": parameters without the head, "head": those that ``lora.train`` matches, "ranks":
    {module: open directions of each layer}}``. Only methods with a diagonal have ``"ranks"``.
    """
    leaves, _, paths = flatten(trainable)
    trains = head_alone(config).trains if config.lora.train else lambda path: False
    sizes = {path: math.prod(leaf.shape) for path, leaf in zip(paths, leaves, strict=True)}
    head = {p: n for p, n in sizes.items() if trains(p) and not is_factor(p.split("/"))}
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
        for factor in find_factors(updates, ADAPTED):
            if factor.side == "b":
                leaves[factor.index] = ratio * leaves[factor.index]
        return treedef.unflatten(leaves)

    return optax.stateless(scaled)


# What is adapted and trained.


def factors(kind: type[rm.LoRA] = rm.LoRA, own: type | None = None, **fixed: Any) -> Callable:
    """A description with the fields of ``lora.*``; ``own``: the section with its initial rank."""

    def describe(config: Run) -> rm.LoRA:
        given = dataclasses.asdict(config.lora)
        given["target"] = config.lora.target.replace(ALL_LINEAR, f"(?:{LINEAR})")
        given["train"] = config.lora.train or None
        if own is not None:
            given["rank"] = config.own(own).initial_rank
        return kind(**given | fixed)

    return describe


def trains(own: str) -> Callable[[Run], rm.LoRA]:
    """A description that adapts nothing and trains what ``own`` or ``lora.train`` matches."""
    return lambda config: rm.LoRA(rank=1, target=None, train=rf"{own}|(?:{config.lora.train})")


def head_alone(config: Run) -> rm.LoRA:
    return rm.LoRA(rank=1, target=None, train=config.lora.train)


# The optimizers.


def plain(config, values, schedule, steps, *, clip, **adamw):
    """Clip and AdamW; with ``rm.also`` the mask between them."""
    if masks(config):
        return rm_lora(config, values, schedule, steps, penalty=False, clip=clip, **adamw)
    decayed = adamw.pop("weight_decay_mask")
    return optax.chain(clip_by_norm(clip), optax.adamw(schedule, mask=decayed, **adamw))


def rm_lora(config, values, schedule, steps, *, penalty=True, mask=True, **options):
    """The penalty's gradient before the clip, and the mask behind it."""
    own, maskable = config.own(Rm), of(config).maskable
    options |= dataclasses.asdict(own if mask else Rm(kind=own.kind))
    del options["also"]
    keep = values["keep"] if mask else 1.0
    options["keep"] = int(keep) if options["draw"] == "exact" else keep
    options["penalty"] = values["penalty"] if penalty else 0.0
    factors = maskable(config) if maskable else ADAPTED
    return rm.rm_lora(schedule, seed=config.seed, factors=factors, **options)


def adalora(config, values, schedule, steps, **options):
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
        **options,
    )


def sora(config, values, schedule, steps, **options):
    """The proximal step of SoRA's gates."""
    own = config.own(Sora)
    sparsity, shrink = values["sparsity"], values["shrink"]
    if shrink is not None:
        # The lambda_2 with which a gate that nothing else moves loses ``shrink`` over all steps.
        sparsity = shrink / (own.gate_rate * jax.vmap(schedule)(jnp.arange(steps)).sum())
    return rm.sora(
        schedule,
        sparsity=sparsity,
        gate_learning_rate=lambda step: own.gate_rate * schedule(step),
        l1=values["l1"],
        proximal=own.proximal,
        **options,
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
        yield "adalora.initial_rank", f"above adalora.target or lora.rank, {end}, the final rank"


def check_head(config: Run) -> Iterator[Mistake]:
    if not config.lora.train:
        yield "lora.train", "a regex for head, which trains nothing else"


def check_init(config: Run) -> Iterator[Mistake]:
    if config.lora.init == "pissa":
        yield "lora.init", f"another than pissa for {config.method}"


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
    "lora": Method("LoRA", factors(), plain, adapts=True, sweeps=("alpha",), continues=rm.LoRA),
    "reg_only": Method(
        "half of rm_lora: the penalty without the mask", factors(),
        functools.partial(rm_lora, mask=False), adapts=True, sweeps=("penalty", "alpha"),
        continues=rm.LoRA,
    ),
    "mask_only": Method(
        "half of rm_lora: the mask without the penalty", factors(),
        functools.partial(rm_lora, penalty=False), adapts=True, sweeps=("keep", "alpha"),
        masks=True, continues=rm.LoRA,
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
        "every bias", trains(BIAS), plain, units=("element",),
        maskable=lambda config: under(config.lora.train, BIAS),
    ),
    "bottleneck": Method(
        "adapters behind attention and MLP", trains(r".*/bottleneck[12]/.*"), plain,
        check=check_bottleneck, insert=with_bottlenecks, section=Bottleneck,
        maskable=lambda config: (r"down/kernel", r"up/kernel", ADAPTED[2]),
    ),
    "prefix": Method(
        "trained keys and values in front of every layer's own", trains(PREFIXES), plain,
        insert=with_prefixes, section=Prefix, units=("element", "matrix"),
        maskable=lambda config: under(config.lora.train, PREFIXES),
    ),
    "head": Method("what lora.train matches", head_alone, plain, check=check_head),
    "full": Method(
        "all parameters", lambda config: rm.LoRA(rank=1, target=None, train=".*"), plain
    ),
}

SECTIONS = sections(METHODS.values())


def readers(name: str) -> tuple[str, ...]:
    """The methods for which a name of ``sweep.grid`` changes something."""
    return tuple(
        method for method, own in METHODS.items() if name in (*ALWAYS_SWEPT, *own.sweeps)
    )
