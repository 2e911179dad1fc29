"""SoRA's training: AdamW, and a proximal step that closes the gates of directions not needed."""

import numbers
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rmlora_jax.optim.factors import find_diagonals, flatten, is_absent
from rmlora_jax.optim.precision import check_params, clip_by_norm, in_float32, next_count

# SparseAdamW is built without an eps, which leaves it that of Transformers' AdamW.
GATE_EPS = 1e-6


class ProximalState(NamedTuple):
    """State of the proximal step of :func:`sora`.

    Attributes:
      count: updates made so far, int32 scalar; what schedules are called with.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]


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
    proximal: str = "paper",
) -> optax.GradientTransformationExtraArgs:
    r"""SoRA: low-rank adaptation whose gates close, and so choose the rank of each module.

    The gates g of a module are its leaf ``lora_e``. AdamW trains them without weight decay and with
    epsilon :math:`10^{-6}`, and all other leaves as given. Then, for the gates alone,

    .. math::
        g \leftarrow \mathrm{sign}(g) \max(|g| - \xi_t, 0), \qquad \xi_t = \eta_t \lambda_2,

    the proximal step of :math:`\lambda_2 \|g\|_1` at :math:`\eta_t`, the gates' learning rate. A
    gate within :math:`\xi_t` of 0 becomes exactly 0; it opens again if Adam moves it further.

    ``proximal="authors_exact"`` is the released ``SparseAdamW`` instead. It differs in that

    * :math:`\xi = \lambda_2`, not scaled by the learning rate;
    * a gate that is within :math:`\xi` of 0 after it moved by :math:`\xi` is zeroed: all with
      :math:`|g| < 2 \xi` close, except :math:`|g| = \xi` exactly, which is left as it is;
    * Adam adds epsilon before the bias correction: :math:`\hat m / (\sqrt{\hat v} + \epsilon /
      \sqrt{1 - \beta_2^t})`, as Transformers' AdamW did.

    Their clipping divides by the norm + 1e-6, optax's by the norm.

    Args:
      learning_rate: a float or a schedule.
      sparsity: :math:`\lambda_2`, at least 0; a float or a schedule ("sparsifying scheduler").
      gate_learning_rate: :math:`\eta_t`, a float or a schedule; None for ``learning_rate``.
      l1: :math:`\lambda_1`: the gradient of :math:`\lambda_1` times the mean :math:`|g|` over all
        gates is added before clipping. Do not also add it to the loss. The authors use 10.
      clip: the global norm that gradients, gates included, are clipped to, or None. The authors
        use 0.1.
      b1: decay rate of the first moments.
      b2: decay rate of the second moments.
      eps: epsilon of AdamW, except for the gates.
      weight_decay: decoupled weight decay, times the learning rate; a float or a schedule; not on
        gates.
      proximal: ``"paper"`` or ``"authors_exact"``.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`; ``update`` needs ``params``. The step is
      computed and its state kept in float32; updates come back in the dtype of the parameters.

    Raises:
      ValueError: ``proximal`` is neither, ``sparsity`` is negative, or, at ``init``, a module is
        incomplete.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> params = {"lora_a": jnp.ones((3, 2)), "lora_b": jnp.zeros((2, 4))}
      >>> params["lora_e"] = jnp.array([0.15, -1.0])
      >>> tx = sora(0.1, sparsity=1.0)
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> print(optax.apply_updates(params, updates)["lora_e"].round(3))
      [ 0.  -0.8]

    References:
      Ding et al., 2023, `SoRA <https://arxiv.org/abs/2311.11696>`_; code: TsinghuaC3I/SoRA.
    """
    if proximal not in ("paper", "authors_exact"):
        raise ValueError(f"proximal={proximal!r} must be 'paper' or 'authors_exact'")
    if isinstance(sparsity, numbers.Real) and not float(sparsity) >= 0:
        raise ValueError(f"sparsity={sparsity} must be at least 0 (0 closes no gate)")
    rate = learning_rate if gate_learning_rate is None else gate_learning_rate
    if proximal == "paper":
        adam, step = optax.scale_by_adam(b1, b2, GATE_EPS), _shrink(sparsity, rate)
    else:
        adam, step = _transformers_adam(b1, b2), _shrink_as_released(sparsity)
    groups: dict[Hashable, optax.GradientTransformation] = {
        "gate": optax.chain(adam, optax.scale_by_learning_rate(rate), step),
        "rest": optax.adamw(learning_rate, b1, b2, eps, weight_decay=weight_decay),
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

    Args:
      params: a tree with A, B and the diagonal of each module.

    Returns:
      ``{"gate_sparsity": the fraction of all gates that are 0, "surviving_directions": the number
      of gates that are not}``, float32 scalars. Works under ``jax.jit`` and ``jax.vmap``.

    Raises:
      ValueError: as :func:`rmlora_jax.optim.factors.find_diagonals`.

    Example:
      >>> import jax.numpy as jnp
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
    ``jax.jit``. Raises ValueError as :func:`rmlora_jax.optim.factors.find_diagonals`.

    >>> import jax.numpy as jnp
    >>> params = {"lora_a": jnp.ones((3, 4)), "lora_b": jnp.ones((4, 2))}
    >>> surviving_parameters({**params, "lora_e": jnp.array([0.0, 0.5, 0.0, 2.0])})
    10
    """
    leaves, _, _ = flatten(params)
    return sum(int(np.count_nonzero(leaves[d.e])) * d.cost for d in find_diagonals(params))


def _mark_gates(tree: Any, gate: Any, other: Any) -> Any:
    """``tree`` with ``gate`` in place of each gate and ``other`` in place of all else."""
    gates = {module.e for module in find_diagonals(tree)}
    leaves, treedef, _ = flatten(tree)
    return treedef.unflatten(
        leaf if is_absent(leaf) else gate if i in gates else other for i, leaf in enumerate(leaves)
    )


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


def _shrink(sparsity: Any, learning_rate: Any) -> optax.GradientTransformation:
    """Moves what the updates lead to towards 0, by the sparsity times the learning rate."""

    def soft(value, count):
        xi = _at(sparsity, count) * _at(learning_rate, count)
        return jnp.sign(value) * jnp.maximum(jnp.abs(value) - xi, 0)

    return _then(soft)


def _shrink_as_released(sparsity: Any) -> optax.GradientTransformation:
    """The last three lines of the released SparseAdamW."""

    def released(value, count):
        xi = _at(sparsity, count)
        moved = jnp.where(jnp.abs(value) > xi, value - jnp.sign(value) * xi, value)
        return jnp.where(jnp.abs(moved) < xi, 0, moved)

    return _then(released)


def _then(function: Callable[[jax.Array, jax.Array], jax.Array]) -> optax.GradientTransformation:
    """Applies ``function(value, count)`` to the parameters that the updates lead to."""

    def init_fn(params):
        del params
        return ProximalState(count=jnp.zeros([], jnp.int32))

    def update_fn(updates, state, params=None):
        check_params(params)
        updates = jax.tree.map(lambda u, p: function(p + u, state.count) - p, updates, params)
        return updates, ProximalState(count=next_count(state.count))

    return optax.GradientTransformation(init_fn, update_fn)


def _at(value: Any, count: jax.Array) -> Any:
    return value(count) if callable(value) else value
