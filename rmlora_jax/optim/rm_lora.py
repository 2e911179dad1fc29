"""RM-LoRA as one optax transformation: penalty gradient, clipping, mask, AdamW."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from rmlora_jax.optim.factors import FactorNames, find_factors, map_leaves
from rmlora_jax.optim.masking import Keep, lazily_masked, mask_gradients
from rmlora_jax.optim.orthogonality import add_orthogonality
from rmlora_jax.optim.precision import (
    CountState,
    check_one_of,
    clip_by_norm,
    in_float32,
    next_count,
)


def rm_lora(
    learning_rate: optax.ScalarOrSchedule,
    *,
    penalty: optax.ScalarOrSchedule = 0.1,
    keep: Keep = 0.5,
    clip: float | None = 1.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    weight_decay_mask: Any = None,
    kind: str = "norm",
    reduction: str = "mean",
    unit: str = "rank",
    draw: str = "bernoulli",
    coupling: str = "paired",
    start_step: int = 1,
    resample_every: int | None = 1,
    rescale: bool = False,
    seed: int | jax.Array = 0,
    factors: FactorNames = None,
    placement: str = "before",
) -> optax.GradientTransformationExtraArgs:
    r"""RM-LoRA: regularised and masked low-rank adaptation.

    One step on the gradient g of the task loss is

    .. math::
        g \leftarrow g + \lambda \nabla R(\theta), \quad
        g \leftarrow g \cdot \min(1, c / \|g\|), \quad
        g \leftarrow \mathrm{mask}_t(g), \quad
        \theta \leftarrow \mathrm{AdamW}(\theta, g),

    with R of :func:`rmlora_jax.orthogonality` and the mask of :func:`rmlora_jax.mask_gradients`.
    Only LoRA factors are regularised and masked; all other leaves, such as a classifier's, are
    clipped and trained as usual. ``penalty=0, keep=1`` is plain LoRA, bit for bit.

    Args:
      learning_rate, b1, b2, eps: AdamW's. The learning rate is a float or a schedule.
      penalty: :math:`\lambda`, the weight of the orthogonality penalty; a float or a schedule.
        Do not also add the penalty to the loss.
      clip: the global norm that gradients are clipped to, or None.
      weight_decay: decoupled weight decay, times the learning rate; on every leaf.
      weight_decay_mask: a tree of bools, or a function from the parameters to one, that says which
        leaves decay: the ``mask`` of :func:`optax.adamw`. None: all. :func:`rmlora_jax.decayed`
        leaves out biases and norms.
      kind, reduction: of the penalty, see :func:`rmlora_jax.orthogonality`.
      keep, unit, draw, coupling, start_step, resample_every, rescale, seed: of the mask, see
        :func:`rmlora_jax.mask_gradients`.
      factors: see there; here None or a pair of regular expressions, with ``penalty=0`` one too.
      placement: where the mask stands. ``"before"`` AdamW, as the authors do: the moments still
        move what the mask hides. ``"after"``: hidden directions do not move, their moments see
        every gradient. ``"lazy"``: neither their parameters nor their moments change.

    Returns:
      A transformation whose ``update`` needs ``params``. The step is computed and its state kept in
      float32; updates come back in the dtype of the parameters.

    Raises:
      ValueError: an argument is not one of those above.

    Example:
      >>> params = {"q": {"lora_a": jnp.ones((3, 2)), "lora_b": jnp.zeros((2, 3))}}
      >>> tx = rm_lora(optax.linear_schedule(1e-3, 0.0, 100), penalty=0.1, keep=0.5)
      >>> state = tx.init(params)
      >>> gradients = {"q": {"lora_a": jnp.zeros((3, 2)), "lora_b": jnp.ones((2, 3))}}
      >>> updates, state = tx.update(gradients, state, params)
      >>> print(round(float(updates["q"]["lora_b"][0, 0]), 6))
      -0.001

    References:
      Mao et al., 2024, `RM-LoRA <https://arxiv.org/abs/2407.12074>`_
    """
    check_one_of("placement", placement, ("before", "after", "lazy"))
    options = {
        "unit": unit,
        "draw": draw,
        "coupling": coupling,
        "start_step": start_step,
        "resample_every": resample_every,
        "rescale": rescale,
        "seed": seed,
        "factors": factors,
    }
    adamw = optax.adamw(
        learning_rate, b1, b2, eps, weight_decay=weight_decay, mask=weight_decay_mask
    )
    if placement == "before":
        steps = [mask_gradients(keep, **options), adamw]
    elif placement == "after":
        steps = [adamw, mask_gradients(keep, **options)]
    else:
        steps = [lazily_masked(adamw, keep, **options)]
    penalise = add_orthogonality(penalty, kind=kind, reduction=reduction, factors=factors)
    return in_float32(optax.chain(penalise, clip_by_norm(clip), *steps))


def authors_exact(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: int,
    k: int,
    version: str = "v1",
    penalty: float = 0.1,
    clip: float | None = 1.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    weight_decay_mask: Any = None,
    seed: int | jax.Array = 0,
    factors: FactorNames = None,
) -> optax.GradientTransformationExtraArgs:
    """The step of the authors' released code (yz-mao/RM-LoRA), for reproducing their runs.

    It differs from :func:`rm_lora` with its defaults in two ways. Exactly ``k`` of the ``rank``
    directions of a module move. From the second update on the gradients of all other leaves
    (classifier, pooler) are 0: their mask covers every trainable parameter, which leaves the head
    almost untrained. Only the random subsets, from Python's generator, and the clipping by the
    norm + 1e-6 are not theirs.

    Released settings: rank 4, k 2, v1 and rank 8, k 4, v2, both with alpha = 4 rank, penalty 0.1,
    learning rate 1e-3 with linear decay and no warm-up.

    Args:
      rank: rank of every LoRA module.
      k: number of rank directions that move in a step ("random_rank" in their code).
      version: ``"v1"``: A and B of a module share their subset; ``"v2"``: each draws its own.
      learning_rate, penalty, clip, b1, b2, eps, weight_decay, weight_decay_mask, seed, factors: see
        :func:`rm_lora`.

    Raises:
      ValueError: ``version`` is neither, ``k`` is not in 1..rank, or, at ``init``, a module has
        another rank.

    Example:
      >>> params = {"q": {"lora_a": jnp.ones((5, 4)), "lora_b": jnp.zeros((4, 3))}}
      >>> tx = authors_exact(1e-3, rank=4, k=2)
      >>> updates, state = tx.update(params, tx.init(params), params)
    """
    couplings = {"v1": "paired", "v2": "independent"}
    check_one_of("version", version, couplings)
    if not 1 <= k <= rank:
        raise ValueError(f"k={k!r} with rank={rank!r}: k must be at least 1 and at most the rank")
    mask = mask_gradients(
        k, draw="exact", coupling=couplings[version], start_step=1, seed=seed, factors=factors
    )
    return in_float32(
        optax.chain(
            add_orthogonality(penalty, factors=factors),
            clip_by_norm(clip),
            mask,
            _factors_only(rank, factors),
            optax.adamw(
                learning_rate, b1, b2, eps, weight_decay=weight_decay, mask=weight_decay_mask
            ),
        )
    )


def _factors_only(rank: int, factors: FactorNames) -> optax.GradientTransformation:
    """Zeroes all but the factors after the first update; checks the rank of every module."""

    def init_fn(params):
        for factor in find_factors(params, factors):
            if factor.rank != rank:
                raise ValueError(
                    f"authors_exact(rank={rank}): {factor.path!r} of shape {factor.shape} has "
                    f"rank {factor.rank}"
                )
        return CountState(jnp.zeros([], jnp.int32))

    def update_fn(updates, state, params=None):
        del params
        kept = {factor.index for factor in find_factors(updates, factors)}

        def stopped(i, update):
            if i in kept:
                return update
            return jnp.where(state.count == 0, update, jnp.zeros_like(update))

        return map_leaves(stopped, updates), CountState(next_count(state.count))

    return optax.GradientTransformation(init_fn, update_fn)
