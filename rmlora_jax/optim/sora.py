"""SoRA's training: AdamW, and a proximal step that closes gates."""

import numbers
from collections.abc import Callable, Hashable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rmlora_jax.optim.diagonals import find_diagonals
from rmlora_jax.optim.factors import flatten, map_leaves
from rmlora_jax.optim.precision import (
    CountState,
    check_one_of,
    check_params,
    clip_by_norm,
    in_float32,
    next_count,
    value_at,
)

# SparseAdamW is built without an eps, which leaves it that of Transformers' AdamW.
GATE_EPS = 1e-6


def sora(
    learning_rate: optax.ScalarOrSchedule,
    *,
    sparsity: optax.ScalarOrSchedule,
    gate_learning_rate: optax.ScalarOrSchedule | None = None,
    l1: float | jax.Array = 0.0,
    clip: float | None = 1.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: Any = None,
    proximal: str = "paper",
) -> optax.GradientTransformationExtraArgs:
    r"""SoRA: low-rank adaptation whose gates close, and so choose the rank of each module.

    The gates g of a module are its leaf ``lora_e``. AdamW trains them without weight decay and with
    epsilon :math:`10^{-6}`, and all other leaves as given. Then the gates alone move by

    .. math::
        g \leftarrow \mathrm{sign}(g) \max(|g| - \xi_t, 0), \qquad \xi_t = \eta_t \lambda_2,

    the proximal step of :math:`\lambda_2 \|g\|_1` at :math:`\eta_t`, the gates' learning rate. A
    gate within :math:`\xi_t` of 0 becomes exactly 0; it opens again if Adam moves it further.

    ``proximal="authors_exact"`` is the released ``SparseAdamW`` instead. It differs in that

    * :math:`\xi = \lambda_2`, not scaled by the learning rate;
    * a gate that is within :math:`\xi` of 0 after it moved by :math:`\xi` is zeroed: all with
      :math:`|g| < 2 \xi` close, except :math:`|g| = \xi` exactly, which stays as it is;
    * Adam adds epsilon before the bias correction: :math:`\hat m / (\sqrt{\hat v} + \epsilon /
      \sqrt{1 - \beta_2^t})`, as Transformers' AdamW did.

    Args:
      learning_rate: a float or a schedule.
      sparsity: :math:`\lambda_2`, at least 0; a float or a schedule ("sparsifying scheduler").
      gate_learning_rate: :math:`\eta_t`, a float or a schedule; None for ``learning_rate``.
      l1: :math:`\lambda_1`: the gradient of :math:`\lambda_1` times the mean :math:`|g|` over all
        gates is added before clipping. Do not also add it to the loss. The authors use 10.
      clip: the global norm that gradients, gates included, are clipped to, or None. The authors
        use 0.1.
      b1, b2, eps, weight_decay: of AdamW; the weight decay may be a schedule.
      weight_decay_mask: which leaves beside the gates decay, see :func:`rmlora_jax.rm_lora`.
      proximal: ``"paper"`` or ``"authors_exact"``.

    ``update`` needs ``params``.

    Raises:
      ValueError: ``proximal`` is neither, ``sparsity`` is negative, or, at ``init``, a module is
        incomplete.

    Example:
      >>> params = {"lora_a": jnp.ones((3, 2)), "lora_b": jnp.zeros((2, 4))}
      >>> params["lora_e"] = jnp.array([0.15, -1.0])
      >>> tx = sora(0.1, sparsity=1.0)
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> print(optax.apply_updates(params, updates)["lora_e"].round(3))
      [ 0.  -0.8]

    References:
      Ding et al., 2023, `SoRA <https://arxiv.org/abs/2311.11696>`_; code: TsinghuaC3I/SoRA.
    """
    check_one_of("proximal", proximal, ("paper", "authors_exact"))
    if isinstance(sparsity, numbers.Real) and not float(sparsity) >= 0:
        raise ValueError(f"sparsity={sparsity} must be at least 0 (0 closes no gate)")
    rate = learning_rate if gate_learning_rate is None else gate_learning_rate
    if proximal == "paper":
        adam = optax.scale_by_adam(b1, b2, GATE_EPS)
        step = _then(_shrunk, lambda count: value_at(sparsity, count) * value_at(rate, count))
    else:
        adam = _transformers_adam(b1, b2)
        step = _then(_shrunk_as_released, lambda count: value_at(sparsity, count))
    groups: dict[Hashable, optax.GradientTransformation] = {
        "gate": optax.chain(adam, optax.scale_by_learning_rate(rate), step),
        "rest": optax.adamw(
            learning_rate, b1, b2, eps, weight_decay=weight_decay, mask=weight_decay_mask
        ),
    }
    return in_float32(
        optax.chain(
            optax.masked(_add_l1(l1), lambda tree: _mark_gates(tree, True, False)),
            clip_by_norm(clip),
            optax.partition(groups, lambda tree: _mark_gates(tree, "gate", "rest")),
        )
    )


def surviving(params: Any) -> dict[str, jax.Array]:
    """How much of the diagonals ``lora_e`` (SoRA's gates) is left, for logging.

    ``{"gate_sparsity": the fraction of all gates that are 0, "surviving_directions": the number of
    gates that are not}``, float32 scalars. Works under ``jax.jit`` and ``jax.vmap``. Raises
    ValueError as :func:`rmlora_jax.optim.diagonals.find_diagonals`.

    Example:
      >>> params = {"lora_a": jnp.ones((3, 4)), "lora_b": jnp.ones((4, 2))}
      >>> figures = surviving({**params, "lora_e": jnp.array([0.0, 0.5, 0.0, 0.0])})
      >>> {name: float(value) for name, value in figures.items()}
      {'gate_sparsity': 0.75, 'surviving_directions': 1.0}
    """
    leaves, _, _ = flatten(params)
    gates = [leaves[module.e] for module in find_diagonals(params)]
    left = cast(jax.Array, sum(jnp.sum(gate != 0, dtype=jnp.float32) for gate in gates))
    return {
        "gate_sparsity": 1 - left / sum(gate.size for gate in gates),
        "surviving_directions": left,
    }


def surviving_parameters(params: Any) -> int:
    """How many parameters the factors have once directions with a zero gate are cut off.

    A direction costs in + out; its gate is folded into B and costs nothing. For the host, not for
    ``jax.jit``. Raises ValueError as :func:`rmlora_jax.optim.diagonals.find_diagonals`.

    >>> params = {"lora_a": jnp.ones((3, 4)), "lora_b": jnp.ones((4, 2))}
    >>> surviving_parameters({**params, "lora_e": jnp.array([0.0, 0.5, 0.0, 2.0])})
    10
    """
    leaves, _, _ = flatten(params)
    return sum(int(np.count_nonzero(leaves[d.e])) * d.cost for d in find_diagonals(params))


def _mark_gates(tree: Any, gate: Any, other: Any) -> Any:
    """``tree`` with ``gate`` in place of each gate and ``other`` in place of all else."""
    gates = {module.e for module in find_diagonals(tree)}
    return map_leaves(lambda i, _: gate if i in gates else other, tree)


def _add_l1(weight: float | jax.Array) -> optax.GradientTransformation:
    """Adds the gradient of ``weight`` times the mean absolute value of all leaves."""

    def update_fn(updates, params):
        total = sum(leaf.size for leaf in jax.tree.leaves(params))
        return jax.tree.map(lambda u, p: u + weight * jnp.sign(p) / total, updates, params)

    is_identity = isinstance(weight, numbers.Real) and weight == 0
    return optax.identity() if is_identity else optax.stateless(update_fn)


def _transformers_adam(b1: float, b2: float) -> optax.GradientTransformation:
    """Adam with epsilon added before the bias correction."""

    def eps(count):
        return GATE_EPS / jnp.sqrt(1 - b2 ** (count + 1))

    return optax.inject_hyperparams(optax.scale_by_adam)(b1=b1, b2=b2, eps=eps)


def _shrunk(value, xi):
    return jnp.sign(value) * jnp.maximum(jnp.abs(value) - xi, 0)


def _shrunk_as_released(value, xi):
    """The last three lines of the released SparseAdamW."""
    moved = jnp.where(jnp.abs(value) > xi, value - jnp.sign(value) * xi, value)
    return jnp.where(jnp.abs(moved) < xi, 0, moved)


def _then(shrunk: Callable, threshold: Callable) -> optax.GradientTransformation:
    """Applies ``shrunk(value, threshold(count))`` to the parameters that the updates lead to."""

    def init_fn(params):
        del params
        return CountState(jnp.zeros([], jnp.int32))

    def update_fn(updates, state, params=None):
        check_params(params)
        xi = threshold(state.count)
        updates = jax.tree.map(lambda u, p: shrunk(p + u, xi) - p, updates, params)
        return updates, CountState(next_count(state.count))

    return optax.GradientTransformation(init_fn, update_fn)
