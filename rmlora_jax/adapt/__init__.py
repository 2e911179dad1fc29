"""``adapt``: a Flax module in, the same module with low-rank factors out."""

import sys

import flax.linen as nn

from rmlora_jax.adapt.linen import Adapted, adapt_linen
from rmlora_jax.lora import LoRA

__all__ = ["Adapted", "adapt"]


def adapt(module: nn.Module, lora: LoRA, *, rngs=None) -> nn.Module:
    """The module, with ``s (x A) B`` added to each layer that ``lora`` targets.

    The layers themselves run untouched: with B = 0 the output is that of ``module`` bit for bit
    (both jitted), in the same dtype, and parameter paths are those of ``module``. Dense,
    DenseGeneral (hence MultiHeadDotProductAttention), Conv (grouped too) and Embed (``attend`` too)
    are adapted wherever they stand: in a loop, or under nn.scan, nn.remat, nn.vmap and nn.jit.
    Every method of ``module``, ``apply(..., method=...)`` and ``bind`` run adapted.

    A targeted layer whose factors could not be merged is refused by ``attach``, ``init`` or
    ``apply``: ConvTranspose, Einsum, ConvLocal, a masked Conv, a weight under WeightNorm,
    SpectralNorm or a class made by ``nn.map_variables``. What ``nn.map_variables`` does to a
    function cannot be seen here: exclude the layers whose weights it transforms.

    The factors are parameters ``lora_a`` and ``lora_b`` beside the weight: make them with
    ``attach`` for parameters that exist already, or with ``init`` for a new model.

    Args:
        module: a ``flax.linen.Module``.
        lora: the description; with ``target=None`` the result computes what ``module`` does.
        rngs: not used with Linen, whose random numbers go to ``attach`` or ``init``.

    Raises:
        TypeError: ``module`` is not a Linen module, or ``lora`` not a ``LoRA``.
        ValueError: ``module`` is adapted already, or ``rngs`` is given.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> base, x = nn.Dense(3), jnp.ones((1, 5))
        >>> params = base.init(jax.random.key(0), x)["params"]
        >>> model = adapt(base, LoRA(rank=2))
        >>> from rmlora_jax.tree import attach
        >>> params = attach(jax.random.key(1), model, params, x)
        >>> jax.tree.map(jnp.shape, params)
        {'bias': (3,), 'kernel': (5, 3), 'lora_a': (5, 2), 'lora_b': (2, 3)}
        >>> model.apply({"params": params}, x).shape
        (1, 3)

    References:
        Hu et al. 2021, arXiv:2106.09685, eq. 3.
    """
    if not isinstance(lora, LoRA):
        raise TypeError(f"adapt(module, lora): lora is a {type(lora).__name__}, not a LoRA.")
    if isinstance(module, nn.Module):
        if rngs is not None:
            raise ValueError(
                "adapt(..., rngs=...) is for NNX: with Linen, give the key to attach or init."
            )
        return adapt_linen(module, lora)
    if isinstance(module, type) and issubclass(module, nn.Module):
        raise TypeError(f"adapt takes an instance, not the class {module.__name__}: construct it.")
    nnx = sys.modules.get("flax.nnx")  # an NNX module cannot exist before flax.nnx is imported
    if nnx is not None and isinstance(module, nnx.Module):
        raise TypeError(
            f"adapt was given the NNX module {type(module).__name__}: it takes flax.linen modules."
        )
    raise TypeError(f"adapt takes a flax.linen.Module; it was given a {type(module).__name__}.")
