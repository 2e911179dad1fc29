"""What text encoders share: embedding norms, post-norm layers, the classifier's call."""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from rmlora_jax.models.parts import ACTIVATIONS


def normal_dense(std: float, param_dtype, dtype=jnp.float32):
    """``nn.Dense`` with kernels N(0, std^2) and biases 0, as PyTorch's BERT starts."""
    return functools.partial(
        nn.Dense,
        dtype=dtype,
        param_dtype=param_dtype,
        kernel_init=nn.initializers.normal(std),
    )


def normal_embed(std: float, param_dtype, dtype=jnp.float32):
    """``nn.Embed`` with rows N(0, std^2)."""
    return functools.partial(
        nn.Embed,
        dtype=dtype,
        param_dtype=param_dtype,
        embedding_init=nn.initializers.normal(std),
    )


class MLP(nn.Module):
    """fc2(act(fc1(x))): (B, N, D) -> (B, N, D)."""

    config: Any
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x):
        c = self.config
        dense = normal_dense(c.initializer_range, self.param_dtype, self.dtype)
        x = ACTIVATIONS[c.hidden_act](dense(c.intermediate_size, name="fc1")(x))
        return dense(c.hidden_size, name="fc2")(x)


def checked_tokens(model: str, longest: int | None, input_ids, attention_mask, token_type_ids):
    """The three inputs as arrays: ids (B, N), mask bool (B, N), types (B, N).

    Without a mask it stays None: one of ones would keep attention from kernels that take none.

    Raises:
      TypeError: ``input_ids`` are not integers.
      ValueError: they are no matrix, or longer than ``longest``; another shape of the others.
    """
    if not jnp.issubdtype(jnp.result_type(input_ids), jnp.integer):
        raise TypeError(f"{model}: input_ids are {jnp.result_type(input_ids)}; pass integers")
    shape = jnp.shape(input_ids)
    if len(shape) != 2:
        raise ValueError(f"{model}: input_ids have shape {shape}; expected (batch, tokens)")
    if longest is not None and shape[1] > longest:
        raise ValueError(
            f"{model}: {shape[1]} tokens, but the checkpoint has positions for {longest}; "
            "cut the texts to that length"
        )
    mask = None if attention_mask is None else jnp.asarray(attention_mask) != 0
    types = jnp.zeros(shape, jnp.int32) if token_type_ids is None else token_type_ids
    for name, value in (("attention_mask", mask), ("token_type_ids", types)):
        if value is not None and jnp.shape(value) != shape:
            raise ValueError(
                f"{model}: {name} has shape {jnp.shape(value)}; input_ids have {shape}"
            )
    return input_ids, mask, types
