"""Which units of the LoRA factors a step draws: the rule, the random bits and the masks."""

import dataclasses
import math
import numbers
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rmlora_jax.optim.factors import Factor, FactorNames, find_factors
from rmlora_jax.optim.precision import check_integer, check_one_of, value_at

Keep = float | jax.Array | Callable[[jax.Array], Any]


@dataclasses.dataclass(frozen=True)
class MaskRule:
    """The validated arguments of a mask, without the seed."""

    keep: Keep
    unit: str = "rank"
    draw: str = "bernoulli"
    coupling: str = "paired"
    start_step: int = 1
    resample_every: int | None = 1
    rescale: bool = False
    factors: FactorNames = None

    def __post_init__(self):
        check_one_of("unit", self.unit, ("rank", "element", "matrix"))
        check_one_of("draw", self.draw, ("bernoulli", "exact"))
        check_one_of("coupling", self.coupling, ("paired", "independent"))
        # optax.inject_hyperparams passes arrays, which are not checked.
        if not isinstance(self.start_step, jax.Array):
            check_integer("start_step", self.start_step, 0)
        if self.resample_every is not None and not isinstance(self.resample_every, jax.Array):
            check_integer("resample_every", self.resample_every, 1, " (None never draws again)")
        if self.draw == "exact" and self.unit != "rank":
            raise ValueError(
                f"draw='exact' with unit={self.unit!r}: an exact count is of rank directions; "
                "use unit='rank', or draw='bernoulli'"
            )
        if isinstance(self.factors, str) and self.unit == "rank":
            raise ValueError(
                f"factors={self.factors!r} with unit='rank': one regular expression names leaves "
                "that stand alone, whose rank axis is not known; pass a pair (a, b), or "
                "unit='element' or 'matrix'"
            )
        if not callable(self.keep) and not isinstance(self.keep, jax.Array):
            _check_keep(self.keep, self.draw)

    @property
    def keeps_all(self) -> bool:
        """Whether the mask is known to be 1 without drawing it."""
        return self.draw == "bernoulli" and isinstance(self.keep, numbers.Real) and self.keep == 1


def _check_keep(keep: Any, draw: str) -> None:
    if isinstance(keep, bool) or not isinstance(keep, numbers.Real):
        raise TypeError(f"keep={keep!r} must be a number or a schedule (step -> number)")
    if draw == "exact" and not (isinstance(keep, numbers.Integral) and int(keep) >= 0):
        raise ValueError(
            f"keep={keep!r} with draw='exact' must be a count of rank directions, an integer of "
            "at least 0; for a probability use draw='bernoulli'"
        )
    if draw == "bernoulli" and not 0 <= float(keep) <= 1:
        raise ValueError(
            f"keep={keep!r} with draw='bernoulli' must be a probability in [0, 1]; for a count "
            "of rank directions use draw='exact'"
        )


def check_count(rule: MaskRule, found: list[Factor]) -> None:
    """Raises ValueError where an exact count exceeds the rank of every module."""
    if rule.draw != "exact" or not isinstance(rule.keep, numbers.Integral) or not found:
        return
    largest = max(factor.rank for factor in found)
    if int(rule.keep) > largest:
        raise ValueError(
            f"keep={rule.keep} with draw='exact' exceeds the rank of every module (the largest "
            f"is {largest}): keep at most {largest}"
        )


def draw_masks(
    rule: MaskRule, key_data: jax.Array, count: jax.Array, tree: Any
) -> tuple[dict[int, jax.Array], dict[int, jax.Array]]:
    """The masks of step ``count`` for the factors of ``tree``, from ``key_data``, uint32 (2,).

    Returns ``{leaf index: boolean mask}`` and, with rescale, ``{leaf index: float32 divisor}``,
    indexed as by :func:`rmlora_jax.optim.factors.flatten`. Both are empty where all is kept.
    """
    found = find_factors(tree, rule.factors)
    check_count(rule, found)
    if rule.keeps_all:
        return {}, {}
    keep = value_at(rule.keep, count)
    whole = count < rule.start_step
    step = 0 if rule.resample_every is None else count // rule.resample_every
    key = jax.random.fold_in(jax.random.wrap_key_data(key_data, impl="threefry2x32"), step)
    labels = [f.path if _draws_alone(rule, f) else f.module for f in found]
    shapes = {label: _draw_shape(rule, f) for label, f in zip(labels, found, strict=True)}
    bits = _random_bits(key, shapes)

    masks, divisors = {}, {}
    for label, factor in zip(labels, found, strict=True):
        if rule.draw == "exact":
            chosen = _smallest(bits[label], keep)
        else:
            chosen = _unit_interval(bits[label]) < keep
        masks[factor.index] = whole | _broadcastable(rule, factor, chosen)
        if rule.rescale:
            fraction = jnp.minimum(keep / factor.rank, 1) if rule.draw == "exact" else keep
            divisors[factor.index] = jnp.where(whole, 1.0, fraction)
    return masks, divisors


def _draws_alone(rule: MaskRule, factor: Factor) -> bool:
    return rule.unit == "element" or rule.coupling == "independent" or factor.side is None


def _draw_shape(rule: MaskRule, factor: Factor) -> tuple[int, ...]:
    if rule.unit == "rank":
        return (*factor.stack, factor.rank)
    return factor.shape if rule.unit == "element" else factor.stack


def _broadcastable(rule: MaskRule, factor: Factor, chosen: jax.Array) -> jax.Array:
    """``chosen`` with the axes of the leaf; those that it does not cover have size 1."""
    missing = (1,) * (len(factor.shape) - chosen.ndim)
    if rule.unit == "rank" and factor.side == "a":
        return factor.as_leaf(chosen.reshape(*factor.stack, *missing, factor.rank))
    return factor.as_leaf(chosen.reshape(chosen.shape + missing))


def _random_bits(key: jax.Array, shapes: dict[str, tuple[int, ...]]) -> dict[str, jax.Array]:
    """uint32 bits of the given shapes, each a function of ``key``, its label and its shape.

    Entry i of a label is threefry at counter i under the key of the label. fold_in is that
    block cipher; jax.random.bits would be too, but its numbers change with
    jax_threefry_partitionable. Draws of one shape share one vectorised call, so a model of 72
    modules does not compile 72 generators.
    """
    by_shape: dict[tuple[int, ...], list[str]] = {}
    for label, shape in shapes.items():
        by_shape.setdefault(shape, []).append(label)
    bits = {}
    for shape, labels in by_shape.items():
        hashes = np.array([zlib.crc32(label.encode()) for label in labels], np.uint32)
        block = jax.vmap(_counter_bits, in_axes=(None, 0, None))(key, hashes, math.prod(shape))
        bits.update(zip(labels, block.reshape(-1, *shape), strict=True))
    return bits


def _counter_bits(key: jax.Array, name_hash: jax.typing.ArrayLike, size: int) -> jax.Array:
    key = jax.random.fold_in(key, name_hash)
    counters = jnp.arange(size, dtype=jnp.uint32)
    words = jax.random.key_data(jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, counters))
    return words[..., 0] ^ words[..., 1]


def _unit_interval(bits: jax.Array) -> jax.Array:
    """Uniform float32 in [0, 1), exact to 24 bits."""
    return (bits >> 8).astype(jnp.float32) * jnp.float32(2.0**-24)


def _smallest(bits: jax.Array, count: Any) -> jax.Array:
    """Where ``bits`` is among the ``count`` smallest of its last axis: a random subset."""
    return jnp.argsort(jnp.argsort(bits, axis=-1), axis=-1) < count
