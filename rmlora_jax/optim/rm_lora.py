"""RM-LoRA as one optax transformation: penalty gradient, clipping, mask, AdamW."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from rmlora_jax.optim.factors import FactorNames, find_factors, flatten, is_absent
from rmlora_jax.optim.masking import Keep, lazily_masked, mask_gradients
from rmlora_jax.optim.orthogonality import add_orthogonality
from rmlora_jax.optim.precision import clip_by_norm, in_float32, next_count


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
    It is a chain of those two, :func:`optax.clip_by_global_norm` and :func:`optax.adamw`. Only
    LoRA factors are regularised and masked; all other leaves, such as a classifier's, are
    clipped and trained as usual. ``penalty=0, keep=1`` is plain LoRA, bit for bit.

    Args:
      learning_rate: a float or a schedule.
      penalty: :math:`\lambda`, the weight of the orthogonality penalty; a float or a schedule.
        Do not also add the penalty to the loss.
      keep: probability or count of the rank directions that move in a step.
      clip: the global norm that gradients are clipped to, or None.
      b1: decay rate of AdamW's first moment.
      b2: decay rate of AdamW's second moment.
      eps: AdamW's epsilon.
      weight_decay: decoupled weight decay, times the learning rate; on every leaf.
      kind: of the penalty, see :func:`rmlora_jax.orthogonality`.
      reduction: of the penalty, see :func:`rmlora_jax.orthogonality`.
      unit: this and the arguments down to ``factors``: see :func:`rmlora_jax.mask_gradients`.
      draw: see there.
      coupling: see there.
      start_step: see there.
      resample_every: see there.
      rescale: see there.
      seed: see there.
      factors: see there; here None or a pair of regular expressions, with ``penalty=0`` one too.
      placement: where the mask stands. ``"before"`` AdamW, as the authors do: the moments still
        move what the mask hides. ``"after"``: hidden directions do not move, their moments see
        every gradient. ``"lazy"``: neither their parameters nor their moments change.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`; ``update`` needs ``params``. The step is
      computed and its state kept in float32, whatever the dtype of the parameters; updates come
      back in the dtype of the parameters.

    Raises:
      ValueError: an argument is not one of those above.

    Example:
      >>> import jax.numpy as jnp, optax
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
    if placement not in ("before", "after", "lazy"):
        raise ValueError(f"placement={placement!r} must be 'before', 'after' or 'lazy'")
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
    adamw = optax.adamw(learning_rate, b1, b2, eps, weight_decay=weight_decay)
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
    seed: int | jax.Array = 0,
    factors: FactorNames = None,
) -> optax.GradientTransformationExtraArgs:
    """The step of the authors' released code (yz-mao/RM-LoRA), for reproducing their runs.

    It differs from :func:`rm_lora` with its defaults in that exactly ``k`` of the ``rank``
    directions of a module move, and that from the second update on the gradients of all leaves
    that are no factors (classifier, pooler) are 0 as well: their mask covers every trainable
    parameter, which leaves the head almost untrained. The random subsets are not theirs, which
    came from Python's generator. PyTorch's clipping divides by the norm + 1e-6, optax's by the
    norm.

    Released settings: rank 4, k 2, v1 and rank 8, k 4, v2, both with alpha = 4 rank, penalty 0.1,
    learning rate 1e-3 with linear decay and no warm-up.

    Args:
      learning_rate: a float or a schedule.
      rank: rank of every LoRA module.
      k: how many rank directions move in a step ("random_rank" in their code).
      version: ``"v1"``: A and B of a module share their subset; ``"v2"``: each draws its own.
      penalty: see :func:`rm_lora`.
      clip: see :func:`rm_lora`.
      b1: see :func:`rm_lora`.
      b2: see :func:`rm_lora`.
      eps: see :func:`rm_lora`.
      weight_decay: see :func:`rm_lora`.
      seed: see :func:`rm_lora`.
      factors: see :func:`rm_lora`.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`; ``update`` needs ``params``.

    Raises:
      ValueError: ``version`` is neither, ``k`` is not in 1..rank, or, at ``init``, a module has
        another rank.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"q": {"lora_a": jnp.ones((3, 4)), "lora_b": jnp.zeros((4, 3))}}
      >>> tx = authors_exact(1e-3, rank=4, k=2)
      >>> updates, state = tx.update(params, tx.init(params), params)
    """
    couplings = {"v1": "paired", "v2": "independent"}
    if version not in couplings:
        raise ValueError(f"version={version!r} must be 'v1' or 'v2'")
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
            optax.adamw(learning_rate, b1, b2, eps, weight_decay=weight_decay),
        )
    )


class FactorsOnlyState(NamedTuple):
    """State of the part of :func:`authors_exact` that stops the head.

    Attributes:
      count: updates made so far, int32 scalar.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]


def _factors_only(rank: int, factors: FactorNames) -> optax.GradientTransformation:
    """Zeroes all but the factors after the first update; checks the rank of every module."""

    def init_fn(params):
        for factor in find_factors(params, factors):
            if factor.rank != rank:
                raise ValueError(
                    f"authors_exact(rank={rank}): {factor.path!r} of shape {factor.shape} has "
                    f"rank {factor.rank}"
                )
        return FactorsOnlyState(count=jnp.zeros([], jnp.int32))

    def update_fn(updates, state, params=None):
        del params
        kept = {factor.index for factor in find_factors(updates, factors)}
        leaves, treedef, _ = flatten(updates)
        leaves = [
            leaf
            if i in kept or is_absent(leaf)
            else jnp.where(state.count == 0, leaf, jnp.zeros_like(leaf))
            for i, leaf in enumerate(leaves)
        ]
        return treedef.unflatten(leaves), FactorsOnlyState(next_count(state.count))

    return optax.GradientTransformation(init_fn, update_fn)
