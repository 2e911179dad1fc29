"""From a config to a method: what is adapted, what is trained, and by which optimizer.

Every method is the same loop with another pair (description, optax transformation).
"""

import ml_collections
import optax

import rmlora_jax as rm


def description(config: ml_collections.ConfigDict) -> rm.LoRA:
    """What the method adapts and trains; ``target=None`` adapts nothing."""
    c = config.lora
    if config.method == "full":
        return rm.LoRA(rank=1, target=None, train=".*")
    if config.method == "head":
        return rm.LoRA(rank=1, target=None, train=c.train)
    return rm.LoRA(
        rank=c.rank,
        alpha=c.alpha,
        target=c.target,
        train=c.train,
        dropout=c.dropout,
        init=c.init,
        rs=c.rs,
        rank_pattern=_pairs(c.rank_pattern),
        alpha_pattern=_pairs(c.alpha_pattern),
    )


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


def optimizer(
    config: ml_collections.ConfigDict, schedule: optax.Schedule
) -> optax.GradientTransformation:
    """Penalty gradient, clip, mask and AdamW for ``rm_lora``; clip and AdamW for the others."""
    c, m = config.optimizer, config.rm
    adamw = {"b1": c.b1, "b2": c.b2, "eps": c.eps, "weight_decay": c.weight_decay}
    if config.method != "rm_lora":
        clip = optax.clip_by_global_norm(c.clip) if c.clip else optax.identity()
        return optax.chain(clip, optax.adamw(schedule, **adamw))
    return rm.rm_lora(
        schedule,
        penalty=m.penalty,
        kind=m.kind,
        keep=int(m.keep) if m.draw == "exact" else m.keep,
        draw=m.draw,
        unit=m.unit,
        coupling=m.coupling,
        start_step=m.start_step,
        resample_every=m.resample_every,
        rescale=m.rescale,
        placement=m.placement,
        clip=c.clip or None,
        seed=config.seed,
        **adamw,
    )
