"""Scaled dot-product attention: which kernel runs it, and the padding that cuDNN's kernel needs."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple, cast

import jax
import jax.numpy as jnp

from rmlora_jax.errors import UserError, first_line

IMPLEMENTATIONS = ("auto", "xla", "cudnn")
Kernel = Literal["xla", "cudnn"]

# cuDNN's flash kernel wants sequence lengths and head sizes that are multiples of this.
CUDNN_MULTIPLE = 8
CUDNN_MAX_HEAD_DIM = 128

# Whether what runs is mapped by jax.vmap, whose rule for cuDNN's kernel (up to jax 0.12) wants a
# mask for each head: `with under_vmap(True): jax.vmap(...)(...)`.
under_vmap = jax.make_user_context(default_value=False)


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    implementation: str = "auto",
    mask: jax.Array | None = None,
    keys: int | None = None,
):
    """softmax(Q K^T / sqrt(head_dim)) V for each head, the softmax in float32.

    Args:
      query: (B, N, H, head_dim), any floating dtype; ``key`` and ``value`` have the same shape, or
        both another length N.
      implementation: ``"xla"`` runs everywhere; ``"cudnn"`` is the flash kernel of NVIDIA GPUs
        (bfloat16 or float16); ``"auto"`` takes cuDNN where it can run and XLA elsewhere.
      mask: bool (B, N of the keys), False for those that are padding: their weight is exactly 0.
        Only XLA takes one, since it may have any pattern. A row without a key gets equal weights.
      keys: in place of a mask, how many keys count, from the front; None for all.

    Returns:
      (B, N, H, head_dim) in the dtype of ``query``.

    Source: Vaswani et al. 2017, equation 1.

    >>> attend(*[jnp.ones((2, 5, 3, 8))] * 3).shape
    (2, 5, 3, 8)
    """
    if mask is not None:
        implementation = "xla"
    kernel = chosen(implementation, query.dtype, query.shape[-1])
    if kernel == "cudnn":
        return padded_attention(query, key, value, "cudnn", keys)
    if keys is not None:
        mask = (jnp.arange(key.shape[1]) < keys)[None]
    pairs = None if mask is None else mask[:, None, None, :]
    return jax.nn.dot_product_attention(query, key, value, mask=pairs, implementation=kernel)


def attend_with_dropout(query, key, value, drop: Callable, mask: jax.Array | None = None):
    """``attend`` with ``drop`` applied to the weights, which XLA's and cuDNN's kernels lack.

    ``drop`` is a function of the weights (B, H, N, N), such as ``nn.Dropout(rate)``.
    """
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32)
    scores *= query.shape[-1] ** -0.5
    return weighted(scores, value, drop, None if mask is None else mask[:, None, None, :])


def weighted(scores, value, drop: Callable, pairs: jax.Array | None = None):
    """drop(softmax(scores)) V, the weight exactly 0 where ``pairs`` (B, 1, N or 1, N) is False.

    A row without a key gets equal weights.
    """
    if pairs is not None:
        scores = jnp.where(pairs, scores, jnp.finfo(scores.dtype).min / 2)
    weights = jax.nn.softmax(scores).astype(value.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", drop(weights), value)


class Reach(NamedTuple):
    """Which earlier keys a query attends to, and how their scores become weights.

    Attributes:
      scale: factor of the scores.
      softcap: c: a score s becomes c tanh(s / c); 0: it stays.
      window: how many keys a query sees, its own among them; None: all. An int, or a traced scalar.
      segments: int (B, N): a query attends to keys of its own segment only; None: to all.
      places: order of queries (B, n) and keys (B, N), -1 for a key that is empty; None: both are
        the tokens of one row, in their order.
    """

    scale: float
    softcap: float = 0.0
    window: int | jax.Array | None = None
    segments: jax.Array | None = None
    places: tuple[jax.Array, jax.Array] | None = None

    @property
    def fits_cudnn(self) -> bool:
        """Whether cuDNN's kernel can compute it."""
        static = self.window is None or isinstance(self.window, int)
        return static and self.places is None and not self.softcap

    def pairs(self, length: int) -> jax.Array:
        """Which keys each query attends to, bool (1 or B, n, N)."""
        if self.places is None:
            own = other = jnp.arange(length)[None]
        else:
            own, other = self.places
        own, other = own[:, :, None], other[:, None, :]
        seen = (other <= own) & (other >= 0)
        if self.window is not None:
            seen &= other > own - self.window
        if self.segments is not None:
            seen &= self.segments[:, :, None] == self.segments[:, None, :]
        return seen


def attend_back(query, key, value, reach: Reach, implementation: str = "auto"):
    """Causal attention with groups of query heads: softmax(cap(scale Q K^T)) V, as ``reach`` says.

    Args:
      query: (B, n, H, head_dim), any floating dtype.
      key, value: (B, N, K, head_dim); K divides H, and H / K query heads share a key.
      implementation: as in ``attend``; cuDNN runs where it can compute ``reach``.

    Returns:
      (B, n, H, head_dim) in the dtype of ``query``. A query without a key gets equal weights.

    Source: Ainslie et al. 2023, https://arxiv.org/abs/2305.13245, section 2.2.

    >>> query, key = jnp.ones((2, 5, 4, 8)), jnp.ones((2, 5, 2, 8))
    >>> attend_back(query, key, key, Reach(scale=0.5, window=2)).shape
    (2, 5, 4, 8)
    """
    kernel = chosen(implementation, query.dtype, query.shape[-1]) if reach.fits_cudnn else "xla"
    if kernel == "cudnn":
        return _cudnn_back(query, key, value, reach)
    pairs = reach.pairs(key.shape[1])[:, None]
    if not reach.softcap:
        return jax.nn.dot_product_attention(
            query, key, value, mask=pairs, scale=reach.scale, implementation="xla"
        )
    groups = (*query.shape[:2], key.shape[2], -1, query.shape[-1])
    scores = jnp.einsum(
        "bqkgd,bskd->bkgqs", query.reshape(groups), key, preferred_element_type=jnp.float32
    )
    scores = reach.softcap * jnp.tanh(scores * (reach.scale / reach.softcap))
    scores = jnp.where(pairs[:, None], scores, jnp.finfo(jnp.float32).min / 2)
    weights = jax.nn.softmax(scores).astype(value.dtype)
    return jnp.einsum("bkgqs,bskd->bqkgd", weights, value).reshape(query.shape)


def _cudnn_back(query, key, value, reach: Reach):
    """`attend_back` by cuDNN; the lengths are filled up at the end, where no query looks."""
    query, key, value, zero = batched_alike(query, key, value)
    length = query.shape[1]
    fill = -length % CUDNN_MULTIPLE
    query, key, value = (
        jnp.pad(x, ((0, 0), (0, fill), (0, 0), (0, 0))) for x in (query, key, value)
    )
    mask = None
    if reach.segments is not None:
        filled = jnp.pad(reach.segments, ((0, 0), (0, fill)))
        mask = reach._replace(segments=filled).pairs(length + fill)[:, None]
        if under_vmap.value:
            mask = mask & (zero == 0)[:, None, None, None]
            mask = jnp.broadcast_to(mask, (len(mask), query.shape[2], *mask.shape[2:]))
    out = jax.nn.dot_product_attention(
        query,
        key,
        value,
        mask=mask,
        scale=reach.scale,
        is_causal=True,
        local_window_size=None if reach.window is None else (int(reach.window) - 1, 0),
        implementation="cudnn",
    )
    return out[:, :length]


def padded_attention(query, key, value, implementation: Kernel, keys: int | None = None):
    """Attention with the lengths padded to multiples of 8; padded keys get no weight.

    cuDNN refuses odd lengths such as ViT's 197. Arguments and result as in ``attend``.
    """
    query, key, value, zero = batched_alike(query, key, value)
    lengths = query.shape[1], key.shape[1]
    if keys is None and not any(length % CUDNN_MULTIPLE for length in lengths):
        return jax.nn.dot_product_attention(query, key, value, implementation=implementation)
    query, key, value = (
        jnp.pad(x, ((0, 0), (0, -x.shape[1] % CUDNN_MULTIPLE), (0, 0), (0, 0)))
        for x in (query, key, value)
    )
    out = jax.nn.dot_product_attention(
        query,
        key,
        value,
        query_seq_lengths=zero + query.shape[1],
        key_value_seq_lengths=zero + (lengths[1] if keys is None else keys),
        implementation=implementation,
    )
    return out[:, : lengths[0]]


def batched_alike(*arrays):
    """The arrays and int32 zeros (B,), all batched under a vmap where one of them is.

    Before 0.11 jax's rule for cuDNN's kernel takes no mixture, such as adapters on the queries
    alone give. What it adds are zeros that XLA takes out again.
    """
    zero = jnp.int32(0) * sum(x[:, 0, 0, 0] > 0 for x in arrays)
    return *(x + zero.astype(x.dtype)[:, None, None, None] for x in arrays), zero


@contextlib.contextmanager
def blaming(dtype: str, field: str) -> Iterator[None]:
    """Turns an error of the compiler into a UserError that names ``field``, if it is the fault of
    the dtype: a small attention of it does not compile on the default device either."""
    try:
        yield
    except (ValueError, NotImplementedError) as failed:
        x = jax.ShapeDtypeStruct((1, 8, 1, 8), jnp.dtype(dtype))
        try:
            jax.jit(attend).lower(x, x, x).compile()
        except (ValueError, NotImplementedError) as error:
            raise UserError(
                f"{field}={dtype!r}: a {jax.default_backend()} does not compute it "
                f"({first_line(error)}); give float32 or bfloat16"
            ) from failed
        raise


def chosen(implementation: str, dtype, head_dim: int) -> Kernel:
    """The kernel that ``"auto"`` means on this device; another name means itself."""
    if implementation == "auto":
        return "cudnn" if cudnn_can_run(dtype, head_dim) else "xla"
    return cast(Kernel, implementation)


def filled_length(length: int, implementation: str, dtype, head_dim: int) -> int:
    """The length to fill a sequence up to, so that no layer has to do it for its own attention."""
    cudnn = chosen(implementation, dtype, head_dim) == "cudnn"
    return length + -length % CUDNN_MULTIPLE if cudnn else length


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
