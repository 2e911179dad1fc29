"""What the bundled transformers share: activations, initialisers, norms, the scan over layers."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name


def gelu(x):
    """x Phi(x) = x (1 + erf(x / sqrt 2)) / 2, in float32 at least and rounded once.

    Only x is kept for the backward pass. erfc, by which `jax.nn.gelu` gets the tail below -4 to
    full relative precision, costs a GPU more time than reading and writing x does.
    """

    def exact(x):
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return (0.5 * wide * (1 + jax.lax.erf(wide * 0.5**0.5))).astype(x.dtype)

    return jax.checkpoint(exact, prevent_cse=False)(x)


ACTIVATIONS = {
    "gelu": gelu,
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "tanh": jax.numpy.tanh,
}

ATTENTION = "attention"


def _fused_attention(primitive, *avals, **params) -> bool:
    """A policy: keeps all that cuDNN's attention gives for its backward pass.

    On what it computes beside its output, the sums of its softmax, no name can be put.
    """
    return primitive.name.startswith("dot_product_attention_fwd")


REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "attention": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.save_only_these_names(ATTENTION), _fused_attention
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}

# Standard deviation of a unit normal cut at two standard deviations.
TRUNCATED_STD = 0.87962566103423978


def truncated_normal(std: float):
    """Initialiser: a normal cut at 2 sigma, scaled so that its standard deviation is ``std``."""
    return nn.initializers.truncated_normal(std / TRUNCATED_STD)


def layer_norm(epsilon: float, dtype, param_dtype, name: str) -> nn.LayerNorm:
    """Layer norm over the last axis; its statistics are float32 whatever ``dtype``."""
    # The two-pass variance: E[x^2] - E[x]^2 loses digits where the mean is large.
    return nn.LayerNorm(
        epsilon=epsilon,
        dtype=dtype,
        param_dtype=param_dtype,
        use_fast_variance=False,
        name=name,
    )


def kept_with_attention(x):
    """``x``, which ``remat="attention"`` keeps: a projection of attention, narrower than the MLP's.
    """
    return checkpoint_name(x, ATTENTION)


def scan_layers(layer: type[nn.Module], length: int, *, unroll: int, remat: str, in_axes=()):
    """``layer`` scanned ``length`` times, its parameters stacked on axis 0.

    Args:
      layer: a module whose call is ``(carry, *inputs) -> (carry, output)``.
      unroll: layers per iteration of the loop.
      remat: a key of ``REMAT``.
      in_axes: for ``inputs``: 0 where they have a layer axis, ``nn.broadcast`` where they have not.

    Returns:
      A module class, with the fields of ``layer``.
    """
    if remat != "none":
        # Inside a loop nothing can undo the rematerialisation; unrolled code needs barriers.
        layer = nn.remat(layer, policy=REMAT[remat], prevent_cse=unroll >= length)
    return nn.scan(
        layer,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=in_axes,
        length=length,
        unroll=unroll,
    )


def check_choices(model: str, **choices) -> None:
    """Raises a ValueError for a ``name=(value, allowed)`` whose value is not among the allowed."""
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise ValueError(f"{model}: {name} is {value!r}; it must be one of {tuple(allowed)}")


def check_counts(model: str, **counts) -> None:
    """Raises a ValueError for a value that is not a whole number of at least 1."""
    for name, value in counts.items():
        if type(value) is not int or value < 1:
            raise ValueError(
                f"{model}: {name} is {value!r}; it must be a whole number of at least 1"
            )
