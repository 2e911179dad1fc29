"""``adapt``: a Flax module in, the same module with low-rank factors out."""

import copy

import flax.linen as nn

from rmlora_jax.adapt.diagonal import AdaLoRA, SoRA
from rmlora_jax.adapt.dora import DoRA
from rmlora_jax.adapt.linen import Adapted, adapt_linen
from rmlora_jax.adapt.lora import LoRA
from rmlora_jax.adapt.tree import is_nnx, nnx_functions

__all__ = ["DESCRIPTIONS", "Adapted", "adapt"]

# The registry of forms, by their descriptions.
DESCRIPTIONS = (LoRA, AdaLoRA, SoRA, DoRA)


def adapt(module, lora: LoRA, *, rngs=None):
    """The module, with ``s (x A) B`` added to each layer that ``lora`` targets.

    The layers themselves run untouched: with B = 0 the output is that of ``module`` bit for bit
    (both jitted; README.md says where bfloat16 on a CPU differs), in the same dtype, and parameter
    paths are those of ``module``. These layers can be adapted. Linen: Dense, DenseGeneral (hence
    MultiHeadDotProductAttention), Einsum, Conv and ConvTranspose (grouped, strided, dilated, any
    padding), Embed (``attend`` too), in a loop, or under nn.scan, nn.remat, nn.vmap and nn.jit.
    NNX: Linear, LinearGeneral (hence MultiHeadAttention), Einsum, Conv, ConvTranspose and Embed,
    alone, shared or stacked by nnx.vmap for nnx.scan. For your own classes add an entry to
    ``LoRA.layers``.

    **Linen**: the result is a Linen module. The factors are parameters ``lora_a`` and ``lora_b``
    beside the weight: make them with ``attach`` for parameters that exist already, or with ``init``
    for a new model. Every method of ``module``, ``apply(..., method=...)`` and ``bind`` run
    adapted.

    **NNX**: the result is a new module over the same arrays; ``module`` stays as it is.
    ``lora_a`` and ``lora_b`` are ``nnx.LoRAParam`` beside the weight; ``lora.trainable`` is the
    filter of what is trained. Dropout follows ``train()`` and ``eval()`` of the result, like
    ``nnx.Dropout``. A module with a matrix of its own that is not a layer of Flax is refused where
    ``target`` selects it. If ``target`` also selects layers inside it, only they are adapted, and
    ``unadapted`` lists its matrix (a position embedding). A model that reads ``embed.embedding``
    itself ignores the factors.

    Under a mesh with explicit axes (``AxisType.Explicit``) the product lies where the layer's own
    output does, as ``out_sharding`` of the call says.

    Masked convolutions and weights under WeightNorm, SpectralNorm or a class made by
    ``nn.map_variables`` need ``LoRA(execution="merged")`` and are refused otherwise. What
    ``nn.map_variables`` does to a function cannot be seen here: exclude the layers whose weights it
    transforms, or run the base itself on ``merge(params, lora)``.

    An object that holds a Linen module as ``.module`` and parameters as ``.params`` (the Flax
    models of transformers 4) comes back as a copy that holds the adapted module; then give the
    copy parameters with factors: ``copy.params = attach(key, copy.module, copy.params, ...)``.

    Args:
        module: a ``flax.linen.Module`` or an ``nnx.Module``.
        lora: the description; with ``target=None`` the result computes what ``module`` does.
        rngs: for NNX, ``nnx.Rngs`` with the streams "params" and (if there is dropout) "dropout",
            or a default one; with Linen, random numbers go to ``attach`` or ``init``.

    Raises:
        TypeError: ``module`` is not a Flax module, or ``lora`` not a ``LoRA``.
        ValueError: ``module`` is adapted already, ``rngs`` is given with Linen or missing with NNX,
            or (NNX; for Linen in ``attach``, ``init`` or ``apply``) a layer cannot be adapted.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> base, x = nn.Dense(3), jnp.ones((1, 5))
        >>> params = base.init(jax.random.key(0), x)["params"]
        >>> model = adapt(base, LoRA(rank=2))
        >>> from rmlora_jax.adapt.tree import attach
        >>> params = attach(jax.random.key(1), model, params, x)
        >>> jax.tree.map(jnp.shape, params)
        {'bias': (3,), 'kernel': (5, 3), 'lora_a': (5, 2), 'lora_b': (2, 3)}
        >>> model.apply({"params": params}, x).shape
        (1, 3)

        >>> from flax import nnx
        >>> model = adapt(nnx.Linear(5, 3, rngs=nnx.Rngs(0)), LoRA(rank=2), rngs=nnx.Rngs(1))
        >>> model.lora_a.shape, model(x).shape
        ((5, 2), (1, 3))
    """
    if not isinstance(lora, LoRA):
        raise TypeError(f"adapt(module, lora): lora is a {type(lora).__name__}, not a LoRA.")
    if isinstance(module, nn.Module):
        if rngs is not None:
            raise ValueError(
                "adapt(..., rngs=...) is for NNX: with Linen, give the key to attach or init."
            )
        return adapt_linen(module, lora)
    if is_nnx(module, "Module"):
        return nnx_functions().adapt_nnx(module, lora, rngs)
    if isinstance(getattr(module, "module", None), nn.Module) and hasattr(module, "params"):
        return _with_module(module, adapt(module.module, lora, rngs=rngs))
    if isinstance(module, type):
        raise TypeError(f"adapt takes an instance, not the class {module.__name__}: construct it.")
    raise TypeError(
        f"adapt takes a flax.linen.Module or an nnx.Module; it was given a {type(module).__name__}."
    )


def _with_module(holder, module: Adapted):
    """A shallow copy of an object that holds a module and its parameters, with another module."""
    new = copy.copy(holder)
    try:
        object.__setattr__(new, "module", module)  # frozen dataclasses, too
    except AttributeError:  # a property to read, as in the Flax models of transformers 4
        new._module = module
    if new.module is not module:
        raise TypeError(
            f"{type(holder).__name__}.module cannot be replaced: adapt its module and call "
            "adapt(holder.module, lora).apply({'params': params}, ...) yourself."
        )
    return new
