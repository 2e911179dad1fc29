"""Scaled dot-product attention: which kernel runs it, and the padding that cuDNN's kernel needs."""

import jax
import jax.numpy as jnp

IMPLEMENTATIONS = ("auto", "xla", "cudnn")

# cuDNN's flash kernel wants sequence lengths and head sizes that are multiples of this.
CUDNN_MULTIPLE = 8
CUDNN_MAX_HEAD_DIM = 128


def attend(query: jax.Array, key: jax.Array, value: jax.Array, implementation: str = "auto"):
    """softmax(Q K^T / sqrt(head_dim)) V for each head, the softmax in float32.

    Args:
      query: (B, N, H, head_dim), any floating dtype; ``key`` and ``value`` have the same shape.
      implementation: ``"xla"`` runs everywhere; ``"cudnn"`` is the flash kernel of NVIDIA GPUs
        (bfloat16 or float16); ``"auto"`` takes cuDNN where it can run and XLA elsewhere.

    Returns:
      (B, N, H, head_dim) in the dtype of ``query``.

    Source: Vaswani et al. 2017, equation 1.

    >>> import jax.numpy as jnp
    >>> attend(*[jnp.ones((2, 5, 3, 8))] * 3).shape
    (2, 5, 3, 8)
    """
    if implementation == "auto":
        implementation = "cudnn" if cudnn_can_run(query.dtype, query.shape[-1]) else "xla"
    if implementation == "cudnn":
        return padded_attention(query, key, value, implementation)
    return jax.nn.dot_product_attention(query, key, value, implementation=implementation)


def padded_attention(query: jax.Array, key: jax.Array, value: jax.Array, implementation: str):
    """Attention with the length padded to a multiple of 8; padded keys get no weight.

    cuDNN refuses odd lengths such as ViT's 197. Arguments and result as in ``attend``.
    """
    batch, length = query.shape[:2]
    extra = -length % CUDNN_MULTIPLE
    if not extra:
        return jax.nn.dot_product_attention(query, key, value, implementation=implementation)
    padded = (jnp.pad(x, ((0, 0), (0, extra), (0, 0), (0, 0))) for x in (query, key, value))
    lengths = jnp.full((batch,), length, jnp.int32)
    out = jax.nn.dot_product_attention(
        *padded, key_value_seq_lengths=lengths, implementation=implementation
    )
    return out[:, :length]


def cudnn_can_run(dtype, head_dim: int) -> bool:
    """Whether the default device has cuDNN's flash kernel for this dtype and head size."""
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return False
    if head_dim > CUDNN_MAX_HEAD_DIM or head_dim % CUDNN_MULTIPLE:
        return False
    if jax.default_backend() != "gpu":
        return False
    device = jax.devices()[0]
    # AMD GPUs are "gpu" too; flash attention starts with compute capability 8.0 (Ampere).
    return "NVIDIA" in device.device_kind and float(device.compute_capability) >= 8.0
