"""Random masks on the rank directions of LoRA gradients, as optax transformations."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rmlora_jax.optim.draws import Keep, MaskRule, check_count, draw_masks
from rmlora_jax.optim.factors import FactorNames, find_factors, flatten, is_absent, map_leaves
from rmlora_jax.optim.precision import next_count


class MaskState(NamedTuple):
    """State of :func:`mask_gradients`.

    Attributes:
      count: updates made so far, int32 scalar.
      key: threefry key data, uint32 of shape (2,); the seed, constant over the run.
      kept: float32 of shape (2,): the factor entries that the last update kept, and all factor
        entries. Zeros before the first update. :func:`kept_fraction` reads it.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    key: jax.Array
    kept: jax.Array


class LazilyMaskedState(NamedTuple):
    """State of :func:`lazily_masked`: of the mask, and of the wrapped transformation."""

    mask: MaskState
    inner_state: optax.OptState


def mask_gradients(
    keep: Keep,
    *,
    unit: str = "rank",
    draw: str = "bernoulli",
    coupling: str = "paired",
    start_step: int = 1,
    resample_every: int | None = 1,
    rescale: bool = False,
    seed: int | jax.Array = 0,
    factors: FactorNames = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Lets a random part of the rank directions of each LoRA module move in a step.

    With factors A (in x r) and B (r x out) of a module and a random :math:`m_t \in \{0, 1\}^r`,

    .. math::
        G_A \leftarrow G_A \, \mathrm{diag}(m_t), \qquad
        G_B \leftarrow \mathrm{diag}(m_t) \, G_B, \qquad t \ge \text{start\_step}.

    Updates of other leaves pass through. Factors stacked over layers, (L, in, r) and (L, r, out),
    draw for each layer. Factors with several in or out axes, such as Gemma's (heads, dim, r) and
    (r, out), are masked along their rank axis.

    A mask depends only on ``seed``, the step and the path of the module: it is the same on every
    device, after a restart, whatever the order of the tree or the siblings of the module, and
    whatever ``jax_default_prng_impl`` and ``jax_threefry_partitionable`` say. Renaming a module
    changes its masks; so a scanned model and the same model with a loop over layers, whose paths
    differ, draw different masks.

    .. warning::
      In front of a stateful optimizer the mask does not freeze what it hides: the moments keep
      moving the hidden directions. Under Adam 45 % of all movement is in hidden directions at
      ``keep=0.5``, 79 % at ``keep=1/8``. Placed behind the optimizer the mask makes a true
      partial update, though the moments still see every gradient. :func:`lazily_masked` leaves
      the moments of hidden directions alone too.

      Under gradient accumulation wrap the whole chain in :class:`optax.MultiSteps`, so that the
      mask follows optimizer steps and not micro-steps.

      Inside :func:`optax.multi_transform` or :func:`optax.masked` a group that holds A without B
      (LoRA+) cannot compare their shapes: a factor with several in or out axes is then read as
      stacked. Put the mask outside, or state the stack with ``factors=(a, b, k)``.

    Args:
      keep: for ``draw="bernoulli"`` the probability in [0, 1] that a unit moves; for
        ``draw="exact"`` the number of rank directions that move, at least 0; or a schedule
        (step -> keep), whose values are not checked. A Python 1 as probability returns the updates
        bit for bit. After an empty draw the module rests for a step.
      unit: ``"rank"`` draws each rank direction, ``"element"`` each entry, ``"matrix"`` each factor
        as a whole.
      draw: ``"bernoulli"``: units are independent; ``"exact"``: a uniformly random subset of
        ``keep`` of the r directions, or all r in a module with r < ``keep`` (unit "rank" only).
      coupling: ``"paired"``: A and B of a module share their draw; ``"independent"``: each draws
        its own, as entries (unit "element") always do.
      start_step: updates before this one, counted from 0, are not masked. With 1 the first
        update, in which A has no gradient because B is 0, is whole.
      resample_every: the number of steps, counted from step 0, that share a draw; None keeps the
        first draw for the whole run.
      rescale: divide what is kept by the fraction expected to be kept, so that the expected
        update is the unmasked one. (Adam undoes most of a constant scale.)
      seed: integer; may be traced, so that seeds can be vmapped over ``init``.
      factors: how factors are named and laid out, see
        :func:`rmlora_jax.optim.factors.find_factors`. One regular expression instead of a pair
        masks leaves that stand alone, by "element" or "matrix".

    Returns:
      A transformation with state :class:`MaskState`. ``update`` needs no ``params`` and keeps the
      dtype of every leaf.

    Raises:
      ValueError: an argument or a combination of arguments is not allowed; at ``init`` and
        ``update``, the tree has no factors, their shapes do not fit, or an exact count exceeds the
        rank of every module.
      TypeError: ``keep``, ``start_step`` or ``resample_every`` is not a number of the right kind.

    Example:
      >>> gradients = {"q": {"lora_a": jnp.ones((2, 4)), "lora_b": jnp.ones((4, 1))}}
      >>> tx = mask_gradients(keep=2, draw="exact", start_step=0, seed=1)
      >>> updates, _ = tx.update(gradients, tx.init(gradients))
      >>> print(updates["q"]["lora_a"].sum(1), updates["q"]["lora_b"].sum())
      [2. 2.] 2.0

    References:
      Mao et al., 2024, `RM-LoRA <https://arxiv.org/abs/2407.12074>`_
    """
    rule = MaskRule(keep, unit, draw, coupling, start_step, resample_every, rescale, factors)

    def init_fn(params):
        return _init(rule, seed, params)

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        masks, divisors = draw_masks(rule, state.key, state.count, updates)
        return _apply(masks, divisors, updates), _advance(state, masks, updates)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def lazily_masked(
    inner: optax.GradientTransformation, keep: Keep, *, seed: int | jax.Array = 0, **options: Any
) -> optax.GradientTransformationExtraArgs:
    """Runs ``inner`` on the drawn rank directions and leaves all others as they are.

    In a step the directions that were not drawn keep their parameters and their state in ``inner``
    (the moments of Adam), without weight decay. ``inner`` sees their gradients as 0. State that is
    not shaped like the parameters advances in every step: Adam's bias correction uses one count
    for all directions, as if each had moved in every step before.

    Args:
      inner: any optax transformation whose state for a factor has the factor's shape (or is a
        scalar); its ``init`` must allow :func:`optax.tree_map_params`.
      keep, seed: see :func:`mask_gradients`. Equal seeds give equal masks.
      **options: ``unit``, ``draw``, ``coupling``, ``start_step``, ``resample_every``,
        ``rescale`` and ``factors``, as in :func:`mask_gradients`. rescale divides the gradients
        that ``inner`` receives.

    Raises:
      ValueError, TypeError: as :func:`mask_gradients`; ValueError also where ``inner`` keeps state
        of another shape for a factor (such as Adafactor's row and column sums).

    Example:
      >>> params = {"lora_a": jnp.ones((2, 4)), "lora_b": jnp.ones((4, 1))}
      >>> tx = lazily_masked(optax.adamw(0.1), keep=1, draw="exact", start_step=0)
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> print((updates["lora_a"] != 0).sum(1), (state.inner_state[0].mu["lora_a"] != 0).sum(1))
      [1 1] [1 1]
    """
    rule = MaskRule(keep, **options)
    inner = optax.with_extra_args_support(inner)

    def init_fn(params):
        return LazilyMaskedState(_init(rule, seed, params), inner.init(params))

    def update_fn(updates, state, params=None, **extra_args):
        masks, divisors = draw_masks(rule, state.mask.key, state.mask.count, updates)
        new_updates, new_inner = inner.update(
            _apply(masks, divisors, updates), state.inner_state, params, **extra_args
        )
        if masks:
            new_updates = _apply(masks, {}, new_updates)
            new_inner = _freeze(inner, masks, updates, new_inner, state.inner_state)
        return new_updates, LazilyMaskedState(_advance(state.mask, masks, updates), new_inner)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def step_masks(state: Any, tree: Any, keep: Keep, **options: Any) -> Any:
    """The masks of the update that ``state`` goes into.

    Args:
      state: an optimizer state that holds one :class:`MaskState`.
      tree: parameters, or anything with their structure and shapes.
      keep, **options: as given to :func:`mask_gradients`, without ``seed``, which the state knows.

    Returns:
      A tree of boolean arrays, True where the update moves, which broadcast against the leaves:
      (*stack, 1, r) for A and (*stack, r, 1) for B where rank directions are drawn, with a 1 for
      each in or out axis, in the order of the leaf; scalars for leaves that are not masked.

    Raises:
      ValueError: ``state`` holds no mask state or several; otherwise as :func:`mask_gradients`.

    Example:
      >>> params = {"lora_a": jnp.ones((2, 4)), "lora_b": jnp.ones((4, 1))}
      >>> tx = mask_gradients(keep=2, draw="exact", start_step=0)
      >>> masks = step_masks(tx.init(params), params, keep=2, draw="exact", start_step=0)
      >>> print(masks["lora_a"].shape, int(masks["lora_a"].sum()))
      (1, 4) 2
    """
    states = _mask_states(state)
    if len(states) != 1:
        raise ValueError(
            f"the optimizer state holds {len(states)} mask states, not one: pass the state of "
            "the mask_gradients or lazily_masked that you mean"
        )
    masks, _ = draw_masks(MaskRule(keep, **options), states[0].key, states[0].count, tree)
    return map_leaves(lambda i, _: masks.get(i, jnp.array(True)), tree)


def kept_fraction(opt_state: Any) -> jax.Array:
    """Fraction of all factor entries that the last update kept, a float32 scalar in [0, 1].

    Every :class:`MaskState` inside ``opt_state`` counts, however deep optax's wrappers nest it.
    1.0 where nothing is masked: no mask state, or no update yet.

    Example:
      >>> params = {"lora_a": jnp.ones((2, 4)), "lora_b": jnp.ones((4, 1))}
      >>> tx = optax.chain(mask_gradients(1, draw="exact", start_step=0), optax.adamw(1e-3))
      >>> _, state = tx.update(params, tx.init(params), params)
      >>> print(kept_fraction(state))
      0.25
    """
    counts = [state.kept.reshape(-1, 2).sum(0) for state in _mask_states(opt_state)]
    kept, entries = sum(counts, jnp.zeros(2, jnp.float32))
    return jnp.where(entries > 0, kept / jnp.maximum(entries, 1.0), 1.0)


def _init(rule: MaskRule, seed: int | jax.Array, params: Any) -> MaskState:
    check_count(rule, find_factors(params, rule.factors))
    if isinstance(seed, int) and not -(2**31) <= seed < 2**32:
        raise ValueError(f"seed={seed!r} must fit in 32 bits")
    # Named, so that the masks do not hang on the user's default generator; raw, so that any
    # checkpoint library stores it.
    key = jax.random.key_data(jax.random.key(seed, impl="threefry2x32"))
    return MaskState(jnp.zeros([], jnp.int32), key, jnp.zeros(2, jnp.float32))


def _apply(masks: dict[int, jax.Array], divisors: dict[int, jax.Array], updates: Any) -> Any:
    """Masked updates; a select, not a product, so that a hidden NaN stays hidden."""
    leaves, treedef, _ = flatten(updates)
    for i, mask in masks.items():
        update = leaves[i]
        if i in divisors:
            update = (update / divisors[i]).astype(update.dtype)
        leaves[i] = jnp.where(mask, update, jnp.zeros_like(update))
    return treedef.unflatten(leaves)


def _advance(state: MaskState, masks: dict[int, jax.Array], updates: Any) -> MaskState:
    leaves, _, _ = flatten(updates)
    kept, entries = jnp.float32(0), 0
    for i, mask in masks.items():
        kept += jnp.mean(mask, dtype=jnp.float32) * leaves[i].size
        entries += leaves[i].size
    return MaskState(
        count=next_count(state.count),
        key=state.key,
        kept=jnp.stack([kept, jnp.float32(entries)]),
    )


def _freeze(inner: Any, masks: dict[int, jax.Array], updates: Any, new: Any, old: Any) -> Any:
    """``new`` state on the drawn directions, ``old`` on the others."""
    leaves, treedef, paths = flatten(updates)
    targets = treedef.unflatten((paths[i], leaf, masks.get(i)) for i, leaf in enumerate(leaves))

    def pick(state, target):
        if is_absent(state):
            return state
        path, update, mask = target
        if mask is None or state.size == 1:
            return True
        if state.shape != update.shape:
            raise ValueError(
                f"lazily_masked: the inner optimizer keeps state of shape {state.shape} for "
                f"{path!r} of shape {update.shape}, so the state of one direction cannot be left "
                "alone; use mask_gradients behind this optimizer"
            )
        return mask

    # tree_map_params lines its extra trees up with the parameters, not with the state, so the
    # masks are first laid out like the state.
    state_masks = optax.tree_map_params(
        inner, pick, new, targets, transform_non_params=lambda _: True, is_leaf=is_absent
    )
    return jax.tree.map(
        lambda mask, a, b: a if mask is True else jnp.where(mask, a, b), state_masks, new, old
    )


def _mask_states(opt_state: Any) -> list[MaskState]:
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, MaskState))
    return [leaf for leaf in leaves if isinstance(leaf, MaskState)]
