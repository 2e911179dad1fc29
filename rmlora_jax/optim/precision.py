"""What optimizers share: float32 whatever the dtype, clipping, counters, checks of arguments."""

import numbers
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax


class CountState(NamedTuple):
    """State of a transformation that only counts its updates, for schedules: an int32 scalar."""

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]


def in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """``inner`` at float32 or better, its norms and state included.

    Updates come back in the dtype of the parameters, in which ``-p`` added to ``p`` is exactly 0.

    Example:
      >>> params = {"lora_e": jnp.full(2, 0.1, jnp.bfloat16)}
      >>> tx = in_float32(optax.adam(1e-3))
      >>> state = tx.init(params)
      >>> updates, state = tx.update(params, state, params)
      >>> print(state[0].mu["lora_e"].dtype, updates["lora_e"].dtype)
      float32 bfloat16
    """
    inner = optax.with_extra_args_support(inner)

    def init_fn(params):
        return inner.init(_widen(params))

    def update_fn(updates, state, params=None, **extra_args):
        check_params(params)
        updates, state = inner.update(_widen(updates), state, _widen(params), **extra_args)
        return jax.tree.map(lambda u, p: u.astype(p.dtype), updates, params), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def clip_by_norm(max_norm: float | None) -> optax.GradientTransformation:
    """:func:`optax.clip_by_global_norm`, or nothing for None.

    It divides by the norm. PyTorch's, in the code of RM-LoRA, AdaLoRA and SoRA, by norm + 1e-6.
    """
    return optax.identity() if max_norm is None else optax.clip_by_global_norm(max_norm)


def check_params(params: Any) -> Any:
    """``params``; raises ValueError where an update was called without them."""
    if params is None:
        raise ValueError("an update needs the parameters: call tx.update(updates, state, params)")
    return params


def next_count(count: jax.Array) -> jax.Array:
    """The counter of a state one step later; it stays at the largest int32 (optax.safe_increment).

    >>> int(next_count(jnp.array(2**31 - 1, jnp.int32)))
    2147483647
    """
    return cast(jax.Array, optax.safe_increment(count))  # optax says ArrayLike


def value_at(value: Any, count: jax.Array) -> Any:
    """A number, or the value of a schedule at ``count``."""
    return value(count) if callable(value) else value


def check_one_of(name: str, value: Any, allowed: Any) -> None:
    """Raises ValueError where an argument has a value that is not allowed."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, allowed))}")


def check_integer(name: str, value: Any, least: int, note: str = "") -> None:
    """Raises TypeError or ValueError where an argument is not an integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}={value!r} must be an integer{note}")
    if int(value) < least:
        raise ValueError(f"{name}={value!r} must be at least {least}{note}")


def _widen(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)
