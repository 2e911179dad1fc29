"""From a config to a method: what is adapted, what is trained, and by which optimizer.

Every method is the same loop with another pair (description, optax transformation).
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

import rmlora_jax as rm
from rmlora_jax.adapt.lora import is_factor
from rmlora_jax.errors import UserError
from rmlora_jax.optim.factors import FactorNames, find_diagonals, find_factors, flatten
from rmlora_jax.optim.precision import clip_by_norm
from rmlora_jax.optim.sora import surviving, surviving_parameters
from rmlora_jax.train.config import ADAPTED, ALSO, GATED, INSERTED, MASKED, PENALISED

# What bitfit, bottleneck and prefix train beside lora.train: parameters by their paths.
OWN = {
    "bitfit": r"(?:.*/)?bias",
    "bottleneck": r".*/bottleneck[12]/.*",
    "prefix": r".*/prefix/(?:key|value)",
}


def description(config: ml_collections.ConfigDict) -> rm.LoRA:
    """What the method adapts and trains; ``target=None`` adapts nothing.

    Source of bitfit: Ben Zaken et al. 2022, https://arxiv.org/abs/2106.10199.
    """
    c = config.lora
    if config.method == "full":
        return rm.LoRA(rank=1, target=None, train=".*")
    if config.method in OWN:
        return rm.LoRA(rank=1, target=None, train=rf"{OWN[config.method]}|(?:{c.train})")
    if config.method == "head":
        return rm.LoRA(rank=1, target=None, train=c.train)
    fields = {
        "rank": c.rank,
        "alpha": c.alpha,
        "target": c.target,
        "train": c.train,
        "dropout": c.dropout,
        "init": c.init,
        "rs": c.rs,
        "rank_pattern": _pairs(c.rank_pattern),
        "alpha_pattern": _pairs(c.alpha_pattern),
        "execution": c.execution,
    }
    if config.method == "adalora":
        return rm.AdaLoRA(**fields | {"rank": config.adalora.initial_rank, "init": "normal"})
    if config.method == "sora":
        return rm.SoRA(**fields | {"rank": config.sora.initial_rank})
    return rm.LoRA(**fields)


def architecture(config: ml_collections.ConfigDict, base: Any) -> Any:
    """The config of the pretrained model with what the method puts into its layers.

    Raises:
      UserError: the model has no place for it.
    """
    if config.method not in INSERTED:
        return base
    if config.method == "bottleneck":
        return dataclasses.replace(base, bottleneck_width=config.bottleneck.width)
    if not hasattr(base, "prefix_length"):
        raise UserError(
            f"config.method='prefix' does not fit {config.model.source}: DeBERTa's attention goes "
            "by relative positions, which prefix vectors have not; type --config.method=bottleneck"
        )
    return dataclasses.replace(base, prefix_length=config.prefix.length)


def masks(config: ml_collections.ConfigDict) -> bool:
    """Whether the optimizer of the method holds a mask."""
    return config.method in MASKED or (config.rm.also and config.method in ALSO)


def _masked_names(config) -> FactorNames:
    """``factors`` of the mask: the LoRA factors, or what rm.also covers, lora.train left out."""
    if config.method not in ALSO:
        return None
    if config.method == "bottleneck":
        return r"down/kernel", r"up/kernel"
    return rf"(?!(?:{config.lora.train})(?:/|$)){OWN[config.method]}"


def _pairs(pattern) -> tuple:
    return tuple((regex, value) for regex, value in pattern)


def learning_rate(config: ml_collections.ConfigDict, steps: int) -> optax.Schedule:
    """Step -> rate: linear warm-up from 0, then constant or a decay that reaches 0 at ``steps``."""
    c = config.optimizer
    warmup = int(c.warmup * steps)
    decay = {
        "constant": optax.constant_schedule(c.learning_rate),
        "linear": optax.linear_schedule(c.learning_rate, 0.0, steps - warmup),
        "cosine": optax.cosine_decay_schedule(c.learning_rate, steps - warmup),
    }[c.schedule]
    if not warmup:
        return decay
    rise = optax.linear_schedule(0.0, c.learning_rate, warmup)
    return optax.join_schedules([rise, decay], [warmup])


def optimizer(config: ml_collections.ConfigDict, steps: int) -> optax.GradientTransformation:
    """Clip and AdamW for a run of ``steps`` steps, with what the method adds before and after.

    For RM-LoRA and its halves that is the penalty's gradient before the clip and the mask behind
    it (with rm.also the mask alone); for AdaLoRA its penalty and its allocation; for SoRA the
    proximal step of its gates.
    """
    c, schedule = config.optimizer, learning_rate(config, steps)
    adamw = {"b1": c.b1, "b2": c.b2, "eps": c.eps, "weight_decay": c.weight_decay}
    if config.method in PENALISED or masks(config):
        tx = _rm_lora(config, schedule, adamw)
    elif config.method == "adalora":
        tx = rm.adalora(
            schedule,
            total_steps=steps,
            target=config.adalora.target or config.lora.rank,
            initial_steps=int(config.adalora.warmup * steps),
            final_steps=int(config.adalora.final * steps),
            every=config.adalora.every,
            orthogonal=config.adalora.orthogonal,
            clip=c.clip or None,
            **adamw,
        )
    elif config.method == "sora":
        s = config.sora
        tx = rm.sora(
            schedule,
            sparsity=s.sparsity if s.shrink is None else _sparsity(s, schedule, steps),
            gate_learning_rate=lambda step: s.gate_rate * schedule(step),
            l1=s.l1,
            proximal=s.proximal,
            clip=c.clip or None,
            **adamw,
        )
    else:
        tx = optax.chain(clip_by_norm(c.clip or None), optax.adamw(schedule, **adamw))
    return tx if c.lora_plus == 1 else optax.chain(tx, scale_lora_b(c.lora_plus))


def figures(config: ml_collections.ConfigDict, trainable: Any, state: Any) -> dict[str, jax.Array]:
    """What is logged of a step beside its loss, float32 scalars.

    With factors penalty, the unweighted R; with factors or a mask kept_fraction, the part of the
    maskable entries whose gradient passed; for AdaLoRA and SoRA open_directions, how many entries
    of the diagonals are not 0.
    """
    found = {}
    if config.method in ADAPTED or masks(config):
        found["kept_fraction"] = rm.kept_fraction(state)
    if config.method in ADAPTED:
        found["penalty"] = rm.orthogonality(trainable, kind=config.rm.kind)
    if config.method in GATED:
        found["open_directions"] = surviving(trainable)["surviving_directions"]
    return found


def left(config: ml_collections.ConfigDict, trainable: Any) -> dict[str, Any]:
    """What is left of a trained tree once closed directions are cut off and diagonals folded in.

    ``{"factors": parameters without the head, "head": those of ``lora.train``, "ranks": {module:
    open directions of each layer}}``; ranks for AdaLoRA and SoRA alone.
    """
    leaves, _, paths = flatten(trainable)
    trained = rm.LoRA(rank=1, target=None, train=config.lora.train)
    sizes = {path: math.prod(leaf.shape) for path, leaf in zip(paths, leaves, strict=True)}
    head = {p: n for p, n in sizes.items() if trained.trains(p) and not is_factor(p.split("/"))}
    found = {"factors": sum(sizes.values()) - sum(head.values()), "head": sum(head.values())}
    if config.method in GATED:
        ranks = {d.module: np.count_nonzero(leaves[d.e], -1) for d in find_diagonals(trainable)}
        found |= {"factors": surviving_parameters(trainable), "ranks": ranks}
    return found


def _sparsity(sora: ml_collections.ConfigDict, schedule: optax.Schedule, steps: int) -> jax.Array:
    """lambda_2 with which a gate that nothing else moves loses ``sora.shrink`` in all ``steps``."""
    return sora.shrink / (sora.gate_rate * jax.vmap(schedule)(jnp.arange(steps)).sum())


def _rm_lora(config, schedule, adamw):
    m = config.rm
    mask = {
        "keep": int(m.keep) if m.draw == "exact" else m.keep,
        "draw": m.draw,
        "unit": m.unit,
        "coupling": m.coupling,
        "start_step": m.start_step,
        "resample_every": m.resample_every,
        "rescale": m.rescale,
        "placement": m.placement,
    }
    return rm.rm_lora(
        schedule,
        penalty=m.penalty if config.method in PENALISED else 0.0,
        kind=m.kind,
        clip=config.optimizer.clip or None,
        seed=config.seed,
        factors=_masked_names(config),
        **(mask if masks(config) else {"keep": 1.0}),
        **adamw,
    )


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
