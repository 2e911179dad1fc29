"""Accuracy among the five most probable classes, where there are many."""

import jax
import jax.numpy as jnp

MANY = 10  # classes above which it is measured


def top5(logits: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
    """``{"accuracy_top5": (B,) float32}`` of logits (B, classes) and labels (B,).

    1 where fewer than five logits are larger than that of the label, else 0; nan where a logit is
    not finite. {} of at most `MANY` classes.

    >>> top5(jnp.arange(12.0)[None], jnp.array([7]))
    {'accuracy_top5': Array([1.], dtype=float32)}
    """
    if logits.shape[-1] <= MANY:
        return {}
    own = jnp.take_along_axis(logits, labels[:, None], axis=-1)
    among = ((logits > own).sum(-1) < 5).astype(jnp.float32)
    return {"accuracy_top5": jnp.where(jnp.isfinite(logits).all(-1), among, jnp.nan)}
