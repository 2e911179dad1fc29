"""From a config to a method: what is adapted, what is trained, and by which optimizer.

Every method is the same loop with another pair (description, optax transformation).
"""

import math
from typing import Any

import jax
import ml_collections
import numpy as np
import optax

import rmlora_jax as rm
from rmlora_jax.baselines import find_diagonals, surviving, surviving_parameters
from rmlora_jax.factors import find_factors, flatten
from rmlora_jax.lora import is_factor
from rmlora_jax.train.config import GATED, MASKED, PENALISED


def description(config: ml_collections.ConfigDict) -> rm.LoRA:
    """What the method adapts and trains; ``target=None`` adapts nothing.

    Source of bitfit: Ben Zaken et al. 2022, https://arxiv.org/abs/2106.10199.
    """
    c = config.lora
    if config.method == "full":
        return rm.LoRA(rank=1, target=None, train=".*")
    if config.method == "bitfit":
        return rm.LoRA(rank=1, target=None, train=rf"(?:.*/)?bias|(?:{c.train})")
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
    }
    if config.method == "adalora":
        return rm.AdaLoRA(**fields | {"rank": config.adalora.initial_rank, "init": "normal"})
    if config.method == "sora":
        return rm.SoRA(**fields | {"rank": config.sora.initial_rank})
    return rm.LoRA(**fields)


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
    it; for AdaLoRA its penalty and its allocation; for SoRA the proximal step of its gates.
    """
    c, schedule = config.optimizer, learning_rate(config, steps)
    adamw = {"b1": c.b1, "b2": c.b2, "eps": c.eps, "weight_decay": c.weight_decay}
    if config.method in (*PENALISED, *MASKED):
        tx = _rm_lora(config, schedule, adamw)
    elif config.method == "adalora":
        tx = rm.adalora(
            schedule,
            total_steps=steps,
            target=config.lora.rank,
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
            sparsity=s.sparsity,
            gate_learning_rate=lambda step: s.gate_rate * schedule(step),
            l1=s.l1,
            proximal=s.proximal,
            clip=c.clip or None,
            **adamw,
        )
    else:
        clip = optax.clip_by_global_norm(c.clip) if c.clip else optax.identity()
        tx = optax.chain(clip, optax.adamw(schedule, **adamw))
    return tx if c.lora_plus == 1 else optax.chain(tx, scale_lora_b(c.lora_plus))


def figures(config: ml_collections.ConfigDict, trainable: Any) -> dict[str, jax.Array]:
    """What is logged of factors, float32 scalars: penalty, the unweighted R, whatever the method;
    for AdaLoRA and SoRA open_directions, how many entries of the diagonals are not 0."""
    found = {"penalty": rm.orthogonality(trainable, kind=config.rm.kind)}
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
        **(mask if config.method in MASKED else {"keep": 1.0}),
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
