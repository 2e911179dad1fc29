"""``to_lora``: what AdaLoRA or SoRA trained, as plain LoRA factors of the rank that is left."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from rmlora_jax.adapt.linen import reboxed, unboxed
from rmlora_jax.adapt.lora import DIAGONAL, FACTORS, LoRA
from rmlora_jax.adapt.ranks import described
from rmlora_jax.adapt.tree import adapted_weights

__all__ = ["to_lora"]


def to_lora(params: Mapping[str, Any], lora: LoRA) -> tuple[dict, LoRA]:
    """``params`` without diagonals, and the plain ``LoRA`` that describes them.

    e is multiplied into A, which is what the adapted model does with it anyway, and the directions
    whose e is 0 are dropped. A stack of layers keeps the rank of its fullest layer, the others
    with zeros for what they dropped; a layer that dropped all keeps one direction of zeros. Scales
    stay as they are, through ``alpha_pattern`` where ranks came to differ. So the model adapted by
    the result computes what it did, up to the rounding of sums of fewer terms.

    Args:
        params: adapted parameters, base weights included; concrete arrays, since shapes follow
            from values.
        lora: their description, ``AdaLoRA`` or ``SoRA``.

    Raises:
        ValueError: ``lora`` has no diagonal, or as ``merge``.

    Example:
        >>> from rmlora_jax import SoRA
        >>> layer = {"kernel": jnp.zeros((5, 4)), "lora_a": jnp.ones((5, 3))}
        >>> layer |= {"lora_b": jnp.ones((3, 4)), "lora_e": jnp.array([0.0, 2.0, 0.0])}
        >>> params, plain = to_lora({"fc": layer}, SoRA(rank=3, alpha=6))
        >>> params["fc"]["lora_a"].shape, plain.rank, plain.scale_of("fc")
        ((5, 1), 1, 2.0)

    References:
        Ding et al. 2023, arXiv:2311.11696, section 3.2 (pruning after training).
    """
    if lora.diagonal is None:
        raise ValueError(f"to_lora: {type(lora).__name__} has no diagonal to fold; merge takes it.")
    flat = flatten_dict(params)
    kept = {}
    for (*module, _), _, a, b in adapted_weights(params, lora):
        e = flat.pop((*module, DIAGONAL))
        closed = np.asarray(unboxed(e)) == 0
        rank = max(1, int((~closed).sum(-1).max()))
        first = np.argsort(closed, axis=-1, kind="stable")[..., :rank]  # the open ones, in order
        a = jnp.take_along_axis(a, first[..., None, :], -1)
        open_ = ~np.take_along_axis(closed, first, -1)
        b = jnp.take_along_axis(b, first[..., None], -2) * open_[..., None]
        for name, value in zip(FACTORS, (a, b), strict=True):
            flat[(*module, name)] = reboxed(flat[(*module, name)], value)
        kept["/".join(module)] = (rank, lora.scale_of("/".join(module)))
    return unflatten_dict(flat), described(lora, kept)
