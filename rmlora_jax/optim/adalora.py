"""AdaLoRA's training: penalty gradient, clipping, AdamW, then the allocation of ranks."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rmlora_jax.optim.diagonals import Diagonal, find_diagonals
from rmlora_jax.optim.factors import ADAPTED, flatten, is_absent, map_leaves
from rmlora_jax.optim.orthogonality import add_orthogonality
from rmlora_jax.optim.precision import (
    check_integer,
    check_params,
    clip_by_norm,
    in_float32,
    next_count,
)


class AllocationState(NamedTuple):
    """State of :func:`allocate_rank`. Its trees are those of the parameters, adapted leaves alone.

    Attributes:
      count: updates made so far, int32 scalar.
      sensitivity: float32 in the shapes of A, B and e: the mean of :math:`|w g|`.
      uncertainty: float32 in the same shapes: the mean distance of :math:`|w g|` from it.
      budget: int32 scalar: how many triplets the schedule allowed at the last update.
      kept: boolean in the shape of e, (*stack, r): the triplets that the last allocation kept; all
        True before the first.
      inner_state: state of the wrapped transformation.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    sensitivity: Any
    uncertainty: Any
    budget: jax.Array
    kept: Any
    inner_state: optax.OptState


def adalora(
    learning_rate: optax.ScalarOrSchedule,
    *,
    total_steps: int,
    target: float,
    initial_steps: int,
    final_steps: int,
    every: int,
    orthogonal: optax.ScalarOrSchedule = 0.1,
    clip: float | None = 1.0,
    beta1: float = 0.85,
    beta2: float = 0.85,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""AdaLoRA: low-rank adaptation that moves its rank to the modules that need it.

    One step on the gradient g of the task loss is

    .. math::
        g \leftarrow g + \gamma \nabla R(\theta), \quad
        g \leftarrow g \cdot \min(1, c / \|g\|), \quad
        \theta \leftarrow \mathrm{AdamW}(\theta, g), \quad
        \theta \leftarrow \mathrm{allocate}_t(\theta),

    with R of :func:`rmlora_jax.orthogonality` on A and B, and :func:`allocate_rank` around AdamW.

    It differs from the authors' code in clipping, and in AdamW, where theirs (of an old
    Transformers) adds epsilon before the bias correction and decays what it has already moved.

    Args:
      learning_rate, clip, b1, b2, eps, weight_decay, weight_decay_mask: see
        :func:`rmlora_jax.rm_lora`; the weight decay may be a schedule.
      total_steps, target, initial_steps, final_steps, every, beta1, beta2: see
        :func:`allocate_rank`.
      orthogonal: :math:`\gamma`, the weight of the orthogonality penalty; a float or a schedule. Do
        not also add the penalty to the loss. The authors use 0.1, and 0.3 for RTE and STS-B.

    ``update`` needs ``params``. Errors are those of :func:`allocate_rank`.

    Example:
      >>> q = {"lora_a": jnp.eye(3, 2), "lora_b": jnp.eye(2, 4), "lora_e": jnp.zeros(2)}
      >>> params = {"q": q}
      >>> tx = adalora(0.1, total_steps=4, target=1, initial_steps=0, final_steps=2, every=1)
      >>> state = tx.init(params)
      >>> gradients = {"q": {**q, "lora_e": jnp.array([1.0, 2.0])}}
      >>> for _ in range(4):
      ...     updates, state = tx.update(gradients, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(optax.tree.get(state, "budget"), (params["q"]["lora_e"] != 0).tolist())
      1 [False, True]

    References:
      Zhang et al., 2023, `AdaLoRA <https://arxiv.org/abs/2303.10512>`_; code: QingruZhang/AdaLoRA.
    """
    adamw = optax.adamw(
        learning_rate, b1, b2, eps, weight_decay=weight_decay, mask=weight_decay_mask
    )
    allocated = allocate_rank(
        adamw,
        total_steps=total_steps,
        target=target,
        initial_steps=initial_steps,
        final_steps=final_steps,
        every=every,
        beta1=beta1,
        beta2=beta2,
    )
    penalty = add_orthogonality(orthogonal, factors=ADAPTED)
    return in_float32(optax.chain(penalty, clip_by_norm(clip), allocated))


def allocate_rank(
    inner: optax.GradientTransformation,
    *,
    total_steps: int,
    target: float,
    initial_steps: int,
    final_steps: int,
    every: int,
    beta1: float = 0.85,
    beta2: float = 0.85,
) -> optax.GradientTransformationExtraArgs:
    r"""Runs ``inner``, then zeroes the least important entries of the diagonals ``lora_e``.

    Triplet i of a module is column i of A, row i of B and the entry :math:`e_i` between them. With
    parameters w after the step and the gradient g that ``inner`` received, entry by entry,

    .. math::
        I_t &= |w g|, \quad
        \bar I_t = \beta_1 \bar I_{t-1} + (1 - \beta_1) I_t, \quad
        \bar U_t = \beta_2 \bar U_{t-1} + (1 - \beta_2) |I_t - \bar I_t|, \\
        S_i &= s(e_i) + \mathrm{mean}_k \, s(A_{ki}) + \mathrm{mean}_k \, s(B_{ik}),
        \quad s(w) = \bar I \, \bar U,

    while :math:`t < T - t_f`, t from 0; later S is frozen. An allocation makes :math:`e_i` exactly
    0 where :math:`S_i` is among the :math:`b_0 - b_t` smallest of all modules (or ties with the
    largest of these), with :math:`b_t` of :func:`budget`. It follows every update t with
    :math:`t_i < t \le T - t_f` that is a multiple of ``every``, and every update
    :math:`t > T - t_f`. A zeroed triplet keeps its A, its B and the state of ``inner``, and comes
    back if a later allocation spares it. Each layer of a stack is a module.

    It follows ``RankAllocator`` of the authors' code. PEFT's also allocates at :math:`t = T - t_f`
    where this is not a multiple of ``every``, and freezes the mask of that step.

    .. warning::
      Under gradient accumulation wrap all of this in :class:`optax.MultiSteps`. Transformations
      behind it move zeroed entries away from 0.

    Args:
      inner: any optax transformation; clipping belongs in front of ``allocate_rank``, where the
        gradient that the scores use is clipped too.
      total_steps: T, the number of updates of the run.
      target: final rank of a module, averaged over modules; of M modules
        ``int(target * M)`` triplets are kept in the end. Need not be an integer.
      initial_steps: :math:`t_i`: up to this step all triplets train.
      final_steps: :math:`t_f`: the last updates, which train what was kept; at least 2 unless the
        very last update is an allocation.
      every: :math:`\Delta_T`, steps between two allocations.
      beta1, beta2: decay rates of the sensitivity and the uncertainty, in (0, 1).

    Returns:
      A transformation with state :class:`AllocationState`; ``update`` needs ``params``.

    Raises:
      ValueError: an argument is out of range, the schedule has no allocation, or, at ``init``, it
        ends above the target, the target is not below the initial rank, or a module is incomplete.
      TypeError: a number of steps is not an integer.

    Example:
      >>> params = {"lora_a": jnp.ones((3, 2)), "lora_b": jnp.ones((2, 4))}
      >>> params["lora_e"] = jnp.array([1.0, -2.0])
      >>> tx = allocate_rank(
      ...     optax.sgd(0.1), total_steps=2, target=1, initial_steps=0, final_steps=0, every=1
      ... )
      >>> state = tx.init(params)
      >>> for _ in range(2):
      ...     updates, state = tx.update(params, state, params)
      >>> print(updates["lora_e"], state.kept["lora_e"])
      [-1.   0.2] [False  True]

    Source: Zhang et al., 2023, `AdaLoRA <https://arxiv.org/abs/2303.10512>`_, algorithm 1.
    """
    _check_schedule(total_steps, target, initial_steps, final_steps, every, beta1, beta2)
    inner = optax.with_extra_args_support(inner)
    phases = {
        "total_steps": total_steps,
        "initial_steps": initial_steps,
        "final_steps": final_steps,
    }

    def init_fn(params):
        found = find_diagonals(params)
        initial, goal = _totals(found, target)
        last = total_steps - 1
        ends = budget(last, initial=initial, target=goal, **phases)
        if found and final_steps < 2 and (last % every or ends > goal):
            raise ValueError(
                f"final_steps={final_steps} with total_steps={total_steps} and every={every}: "
                f"the last update does not cut the triplets to the target of {goal}; set "
                "final_steps to at least 2"
            )
        diagonals = {d.e for d in found}
        factors = diagonals | {f.index for d in found for f in (d.a, d.b)}

        def only(indices, make, dtype):
            return map_leaves(
                lambda i, x: make(x.shape, dtype) if i in indices else optax.MaskedNode(), params
            )

        zeros = only(factors, jnp.zeros, jnp.float32)
        return AllocationState(
            count=jnp.zeros([], jnp.int32),
            sensitivity=zeros,
            uncertainty=zeros,
            budget=jnp.full([], initial, jnp.int32),
            kept=only(diagonals, jnp.ones, bool),
            inner_state=inner.init(params),
        )

    def update_fn(updates, state, params=None, **extra_args):
        params = check_params(params)
        gradients, found, step = updates, find_diagonals(params), state.count
        updates, inner_state = inner.update(gradients, state.inner_state, params, **extra_args)
        sensitivity, uncertainty = _smoothed(
            state, gradients, optax.apply_updates(params, updates), beta1, beta2
        )
        learns = step < total_steps - final_steps
        sensitivity, uncertainty = jax.tree.map(
            lambda new, old: jnp.where(learns, new, old),
            (sensitivity, uncertainty),
            (state.sensitivity, state.uncertainty),
        )
        initial, goal = _totals(found, target)
        allowed = budget(step, initial=initial, target=goal, **phases)
        chosen = _most_important(_scores(found, sensitivity, uncertainty), initial - allowed)
        is_final = step > total_steps - final_steps
        # In the initial steps too, where the budget is whole and nothing is masked.
        allocates = is_final | (step % every == 0)

        keep = {module.e: mask for module, mask in zip(found, chosen, strict=True)}
        values, _, _ = flatten(params)

        def cut(i, update):
            return jnp.where(allocates & ~keep[i], -values[i], update) if i in keep else update

        return map_leaves(cut, updates), AllocationState(
            count=next_count(step),
            sensitivity=sensitivity,
            uncertainty=uncertainty,
            budget=allowed,
            kept=map_leaves(lambda i, old: jnp.where(allocates, keep[i], old), state.kept),
            inner_state=inner_state,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def budget(
    step: Any,
    *,
    initial: int,
    target: int,
    total_steps: int,
    initial_steps: int,
    final_steps: int,
) -> Any:
    r"""How many triplets, over all modules, AdaLoRA keeps at a step.

    .. math::
        b_t = \left\lfloor b_T + (b_0 - b_T)
        \left(1 - \frac{t - t_i}{T - t_i - t_f}\right)^3 \right\rfloor,

    with the fraction clipped to [0, 1]: :math:`b_0` up to step :math:`t_i` and :math:`b_T` from
    step :math:`T - t_f` on. Float32 would truncate some of these wrongly, so a traced step looks
    them up in a table of :math:`T - t_i - t_f + 1` integers that the host computes.

    ``step`` is t, counted from 0: an integer or an array of integers, of numpy or jax, also traced.
    ``initial`` is :math:`b_0`, all triplets, and ``target`` :math:`b_T`, those kept in the end. The
    result is int32 in the shape of ``step``, of jax if ``step`` is of jax.

    Example:
      >>> import numpy as np
      >>> phases = {"total_steps": 8, "initial_steps": 1, "final_steps": 3}
      >>> print(budget(np.arange(8), initial=20, target=10, **phases))
      [20 20 14 11 10 10 10 10]
    """
    span = total_steps - initial_steps - final_steps
    table = [int(target + (initial - target) * (1 - n / span) ** 3) for n in range(span + 1)]
    xp = jnp if isinstance(step, jax.Array) else np
    return xp.asarray(table, np.int32)[xp.clip(step - initial_steps, 0, span)]


def _check_schedule(total_steps, target, initial_steps, final_steps, every, beta1, beta2):
    check_integer("total_steps", total_steps, 1)
    check_integer("initial_steps", initial_steps, 0)
    check_integer("final_steps", final_steps, 0)
    check_integer("every", every, 1)
    for name, beta in {"beta1": beta1, "beta2": beta2}.items():
        if not 0 < beta < 1:
            raise ValueError(f"{name}={beta} must be above 0 and below 1")
    if not target > 0:
        raise ValueError(f"target={target} must be above 0: it is the final rank of a module")
    if total_steps <= initial_steps + final_steps:
        raise ValueError(
            f"total_steps={total_steps} must exceed initial_steps + final_steps = "
            f"{initial_steps} + {final_steps}: train longer or shorten these"
        )
    first = (initial_steps // every + 1) * every
    last = min(total_steps - final_steps, total_steps - 1)
    if first > last:
        raise ValueError(
            f"every={every}: no multiple of it is among the steps {initial_steps + 1} to {last} "
            "at which ranks may shrink; lower every, or shorten initial_steps or final_steps"
        )


def _totals(found: list[Diagonal], target: float) -> tuple[int, int]:
    """How many triplets there are, and how many to keep in the end."""
    modules = sum(module.layers for module in found)
    initial, goal = sum(module.layers * module.rank for module in found), int(target * modules)
    if found and not 1 <= goal < initial:
        raise ValueError(
            f"target={target} keeps {goal} of the {initial} triplets of {modules} modules: it must "
            f"keep at least 1 and stay below the mean initial rank {initial / modules:g}; change "
            "target or the rank of the modules"
        )
    return initial, goal


def _smoothed(state, gradients, params, beta1, beta2) -> tuple[Any, Any]:
    """The sensitivity and the uncertainty after one more step."""

    def importance(old, g, w):
        return old if is_absent(old) else jnp.abs(w * g).astype(jnp.float32)

    now = jax.tree.map(importance, state.sensitivity, gradients, params, is_leaf=is_absent)
    sensitivity = jax.tree.map(
        lambda old, new: beta1 * old + (1 - beta1) * new, state.sensitivity, now
    )
    uncertainty = jax.tree.map(
        lambda old, new, mean: beta2 * old + (1 - beta2) * jnp.abs(new - mean),
        state.uncertainty, now, sensitivity,
    )  # fmt: skip
    return sensitivity, uncertainty


def _scores(found: list[Diagonal], sensitivity: Any, uncertainty: Any) -> list[jax.Array]:
    """The score of each triplet, (*stack, r) a module."""
    leaves, _, _ = flatten(jax.tree.map(jnp.multiply, sensitivity, uncertainty))
    return [
        leaves[d.e]
        + jnp.mean(d.a.matrices(leaves[d.a.index]), -2)
        + jnp.mean(d.b.matrices(leaves[d.b.index]), -1)
        for d in found
    ]


def _most_important(scores: list[jax.Array], drop: jax.Array) -> list[jax.Array]:
    """Where a score is above the ``drop``-th smallest of all; everywhere if ``drop`` is 0."""
    ascending = jnp.sort(jnp.concatenate([score.ravel() for score in scores]))
    threshold = jnp.where(drop > 0, ascending[jnp.maximum(drop - 1, 0)], -jnp.inf)
    return [~(score <= threshold) for score in scores]
