"""Cross-entropy over a large vocabulary, in chunks of tokens with a gradient of its own.

A batch of 8,192 tokens and a vocabulary of 128,000 has 4 GiB of float32 logits, and as much again
for their gradient. Here the logits of one chunk exist at a time: the forward pass of a chunk makes
its part of the gradient, too.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import Scope

LOGITS = 2**25  # of a chunk, unless the caller says how many tokens it has


def chunked_cross_entropy(
    logits: Callable[[nn.Module, jax.Array], jax.Array],
    head: nn.Module,
    x: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    chunk: int | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    r"""The weighted cross-entropy of next tokens; the logits of all tokens never exist at once.

    .. math:: \sum_i w_i \Big(\log \sum_v e^{z_{iv}} - z_{i t_i}\Big), \qquad z_i = f(x_i)

    Call it inside a method of a Linen module. f is ``logits``, which calls ``head`` and may do
    more, such as a soft cap. Factors that ``rm.adapt`` puts beside the head act as in any call.

    A chunk holds some tokens of every row, so that a batch may be split over devices by its rows.
    Under differentiation the forward pass of a chunk also computes its part of the gradients of
    ``x`` and of those parameters that are differentiated; the backward pass only scales them. A
    frozen head hence costs two products with its weight, a trained one three, the loss alone one.
    Sums, softmax and the gradients of parameters added over chunks are float32.

    Args:
      logits: ``(head, x) -> z``, (B, n, D) -> (B, n, V) for any n, each token by itself. What it
        closes over gets its gradients, too.
      head: the submodule with the weight, bound in the caller's scope.
      x: (B, N, D).
      targets: int (B, N).
      weights: (B, N), constants; 0 where there is no target, whatever ``targets`` has there.
      chunk: tokens in a chunk, of all rows together. None: as many as have 2**25 logits, of which
        two float32 arrays take 256 MiB. Fewer save memory. Too few cost time, since each chunk
        reads the head's weight: on a CPU 64 tokens take no longer than all logits at once, and
        16 take 1.4 times as long. Under ``jax.vmap`` each of the runs has such a chunk.

    Returns:
      The sum, a float32 scalar; and "loss" (B, N) float32 and "correct" (B, N) bool, whether the
      first of the largest logits is the target's. The arrays carry no gradient, and are 0 and False
      where the weight is 0. A loss is not finite where logits are not, or where a target lies
      outside of the vocabulary.

    Raises:
      ValueError: shapes that do not fit, or a chunk below 1.
      TypeError: targets that are not integers.

    Example:
        >>> class Model(nn.Module):
        ...     @nn.compact
        ...     def __call__(self, x, targets, weights):
        ...         head = nn.Dense(7, kernel_init=nn.initializers.zeros, name="head")
        ...         return chunked_cross_entropy(lambda f, x: f(x), head, x, targets, weights)
        >>> inputs = jnp.ones((2, 3, 4)), jnp.ones((2, 3), int), jnp.array([[1, 1, 0], [1, 0, 0.]])
        >>> total, of_tokens = Model().init_with_output(jax.random.key(0), *inputs)[0]
        >>> round(float(total), 3)  # 3 log 7
        5.838
        >>> of_tokens["loss"].shape, int(of_tokens["correct"].sum())  # the first of equals is 0
        ((2, 3), 0)

    References:
        Wijmans et al. 2024, *Cut Your Losses in Large-Vocabulary Language Models*
        (arXiv:2411.09009); Hsu et al. 2024, *Liger Kernel* (arXiv:2410.10989), section 3.2, for
        gradients in the forward pass.
    """
    _check(x, targets, weights, chunk)
    if head.is_initializing():
        logits(head, x[:, :1])  # makes the parameters
    assert head.scope is not None
    keys = {name: head.make_rng(name) for name in head.scope.rngs}

    def run(variables, keys, x):
        scope = Scope(variables, keys, head.name, path=head.path)
        return logits(head.copy(parent=scope), x)

    def of_chunk(variables, keys, x, i, targets, weights):
        own = {name: jax.random.fold_in(key, i) for name, key in keys.items()}
        return weighted_sum(run(variables, own, x), targets, weights)

    variables, x = _varying((head.variables, x), x, targets, weights)
    batch, length, _ = x.shape
    vocabulary = jax.eval_shape(run, variables, keys, x[:, :1]).shape[-1]
    tokens = LOGITS // vocabulary if chunk is None else chunk
    count = -(-length // max(tokens // batch, 1))
    x, targets, weights = (_chunks(part, count) for part in (x, targets, weights))
    rows = (jnp.arange(count), targets, weights)
    # JAX may trace the rules of a custom gradient after this call, when the interceptor of
    # rm.adapt is gone: the head is traced here, once.
    first = jax.tree.map(lambda row: row[0], (x, *rows))
    traced, closed = jax.closure_convert(of_chunk, variables, keys, *first)
    total, found = _summed(traced, (variables, closed), x, (keys, rows))
    loss, correct = (jnp.moveaxis(v, 0, 1).reshape(batch, -1)[:, :length] for v in found)
    return total, jax.lax.stop_gradient({"loss": loss, "correct": correct})


def weighted_sum(logits, targets, weights):
    """The sum of ``weights * loss`` of logits (..., V), and (loss, correct), each (...,)."""
    z = logits.astype(_finer(logits.dtype))
    targets, vocabulary = targets.astype(jnp.int32), z.shape[-1]
    index = jax.lax.broadcasted_iota(jnp.int32, z.shape, z.ndim - 1)
    top = jax.lax.stop_gradient(z.max(-1))
    z = z - top[..., None]
    # Comparisons instead of a gather and its scatter, and of argmax: they fuse with the sums.
    own = jnp.sum(jnp.where(index == targets[..., None], z, 0), -1)
    first = jnp.min(jnp.where(z == 0, index, vocabulary), -1)
    counts = weights != 0
    known = ~counts | ((targets >= 0) & (targets < vocabulary))
    loss = (jnp.log(jnp.sum(jnp.exp(z), -1)) - own) * jnp.where(known, 1, jnp.nan)
    loss = jnp.where(counts, loss, 0)
    return jnp.sum(weights * loss), (loss, counts & (first == targets))


def _summed(of_chunk: Callable, shared, x, rest):
    """The sum over chunks of ``of_chunk``, and what else it returns, stacked.

    ``shared`` are the variables and what else every chunk reads, ``x`` and ``rest`` the keys and
    the rows of each chunk. ``shared`` and ``x`` get gradients.
    """
    dtypes = jax.tree.map(jnp.result_type, (shared, x))

    def call(shared, x, keys, rows):
        variables, closed = shared
        return of_chunk(variables, keys, x, *rows, *closed)

    @jax.custom_vjp
    def summed(shared, x, rest):
        keys, rows = rest
        _, (totals, found) = jax.lax.scan(
            lambda _, row: (None, call(shared, row[0], keys, row[1])), None, (x, rows)
        )
        return totals.sum(), found

    def forward(shared, x, rest):
        (keys, rows), _ = _values(rest)
        shared, wanted = _values(shared)
        x, (x_wanted,) = _values(x)
        leaves, tree = jax.tree.flatten(shared)

        def one(sums, row):
            x, rows = row

            def of(changed, x_changed):
                own = map(lambda new, old: old if new is None else new, changed, leaves)
                return call(tree.unflatten(own), x if x_changed is None else x_changed, keys, rows)

            grad = jax.value_and_grad(of, (0, 1), has_aux=True)
            (total, found), (own, of_x) = grad(changed, x if x_wanted else None)
            sums = jax.tree.map(lambda total, new: total + new.astype(total.dtype), sums, own)
            return sums, (total, found, of_x)

        changed = [leaf if want else None for leaf, want in zip(leaves, wanted, strict=True)]
        zeros = jax.tree.map(lambda v: jnp.zeros_like(v, _finer(v.dtype)), changed)
        sums, (totals, found, of_x) = jax.lax.scan(one, zeros, (x, rows))
        return (totals.sum(), found), (tree.unflatten(sums), of_x)

    def backward(kept, cotangents):
        scale, _ = cotangents
        of_shared, of_x = jax.tree.map(
            lambda d, dtype: None if d is None else (d * scale).astype(dtype),
            kept,
            dtypes,
            is_leaf=lambda d: d is None,
        )
        return of_shared, of_x, None

    summed.defvjp(forward, backward, symbolic_zeros=True)
    return summed(shared, x, rest)


def _varying(tree, *others):
    """``tree``, whose floats vary between devices wherever ``others`` do: a checked shard_map wants
    the inputs of a custom gradient to differ between devices as their gradients do."""

    def vary(leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return leaf
        return leaf + sum(jnp.zeros_like(other, leaf.dtype, shape=()) for other in others)

    return jax.tree.map(vary, tree)


def _finer(dtype):
    return jnp.promote_types(dtype, jnp.float32)


def _values(primals):
    """The values of a tree of ``CustomVJPPrimal``, and for each leaf whether it is
    differentiated."""
    values = jax.tree.map(lambda p: p.value, primals)
    return values, [p.perturbed for p in jax.tree.leaves(primals)]


def _chunks(x, count: int):
    """(B, N, ...) in ``count`` chunks, padded with zeros: (count, B, n, ...)."""
    batch, length, *rest = x.shape
    size = -(-length // count)
    x = jnp.pad(x, ((0, 0), (0, count * size - length), *((0, 0) for _ in rest)))
    return jnp.moveaxis(x.reshape(batch, count, size, *rest), 1, 0)


def _check(x, targets, weights, chunk):
    shape = jnp.shape(x)
    if len(shape) != 3 or not shape[:2] == jnp.shape(targets) == jnp.shape(weights):
        raise ValueError(
            f"x {shape}, targets {jnp.shape(targets)} and weights {jnp.shape(weights)} must have "
            "the shapes (B, N, D), (B, N) and (B, N)"
        )
    if not jnp.issubdtype(jnp.result_type(targets), jnp.integer):
        raise TypeError(f"targets are {jnp.result_type(targets)}; pass integers")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk is {chunk}; it must be at least 1 token")
