"""lazily_masked against AdamW in numpy, and what the three places of a mask leave untouched."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from marks import slow

from rmlora_jax.optim.masking import LazilyMaskedState, lazily_masked, mask_gradients, step_masks


def tree(stack=(), dtype=jnp.float32):
    def module(out):
        shapes = {"lora_a": (*stack, 6, 4), "lora_b": (*stack, 4, out)}
        return {name: jnp.ones(shape, dtype) for name, shape in shapes.items()}

    return {
        "encoder": {"query": {**module(5), "bias": jnp.ones(5, dtype)}, "fc1": module(7)},
        "head": {"kernel": jnp.ones((5, 3), dtype)},
    }


def random_like(params, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), params)


def adamw_in_numpy(p, m, v, g, t, lr, decay, b1=0.9, b2=0.999, eps=1e-8):
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
    step = m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps) + decay * p
    return p - lr * step, m, v


def test_lazily_masked_adamw_against_numpy():
    params = random_like(tree(stack=(2,)), 99)
    tx = lazily_masked(optax.adamw(1e-2, weight_decay=0.1), 0.5, seed=4)
    state = tx.init(params)
    update = jax.jit(tx.update)
    leaves, treedef = jax.tree.flatten(params)
    reference = [(np.float64(p), np.zeros(p.shape), np.zeros(p.shape)) for p in leaves]
    for t in range(1, 13):
        gradients = random_like(params, t)
        masks = jax.tree.leaves(step_masks(state, params, 0.5))
        updates, state = update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        for i, (mask, g) in enumerate(zip(masks, jax.tree.leaves(gradients), strict=True)):
            moved = adamw_in_numpy(*reference[i], np.float64(g), t, 1e-2, 0.1)
            reference[i] = tuple(
                np.where(mask, new, old) for new, old in zip(moved, reference[i], strict=True)
            )
    adam = state.inner_state[0]
    assert int(adam.count) == 12
    for i, tree_ in enumerate((params, adam.mu, adam.nu)):
        for found, wanted in zip(treedef.flatten_up_to(tree_), reference, strict=True):
            np.testing.assert_allclose(found, wanted[i], rtol=2e-5, atol=2e-6)


@pytest.mark.slow
def test_lazily_masked_leaves_hidden_directions_bit_for_bit():
    params = random_like(tree(dtype=jnp.bfloat16))
    inner = optax.chain(
        optax.clip_by_global_norm(1.0), optax.masked(optax.adamw(0.1, weight_decay=0.1), {
            "encoder": True, "head": False}))  # fmt: skip
    tx = lazily_masked(inner, 2, draw="exact", seed=1)
    state = tx.init(params)
    assert isinstance(state, LazilyMaskedState)
    for step in range(4):
        masks = step_masks(state, params, 2, draw="exact")["encoder"]
        updates, new_state = tx.update(random_like(params, step), state, params)
        new_params = optax.apply_updates(params, updates)
        old_adam = state.inner_state[1].inner_state[0]
        new_adam = new_state.inner_state[1].inner_state[0]
        for module in ("query", "fc1"):
            for name in ("lora_a", "lora_b"):
                mask = np.broadcast_to(masks[module][name], params["encoder"][module][name].shape)
                assert mask.all() == (step == 0)
                for old, new in ((params, new_params), (old_adam.mu, new_adam.mu),
                                 (old_adam.nu, new_adam.nu)):  # fmt: skip
                    old, new = (np.asarray(x["encoder"][module][name]) for x in (old, new))
                    np.testing.assert_array_equal(old[~mask], new[~mask])
                    assert (old[mask] != new[mask]).mean() > 0.5
        params, state = new_params, new_state


def test_lazily_masked_keep_one_is_the_inner_optimizer_bit_for_bit():
    params = random_like(tree())
    inner = optax.adamw(1e-2, weight_decay=0.1)
    tx = lazily_masked(inner, 1.0)
    state, inner_state = tx.init(params), inner.init(params)
    for step in range(3):
        gradients = random_like(params, step)
        found, state = jax.jit(tx.update)(gradients, state, params)
        wanted, inner_state = jax.jit(inner.update)(gradients, inner_state, params)
        jax.tree.map(np.testing.assert_array_equal, (found, state.inner_state),
                     (wanted, inner_state))  # fmt: skip


@pytest.mark.parametrize(
    "a, b",
    [((3, 6, 4), (4, 5)), ((6, 4), (4, 2, 5)), ((3, 6, 4), (3, 4, 2, 5)), ((2, 5, 4), (4, 3, 6))],
)
def test_lazily_masked_on_factors_with_several_axes(a, b):
    """The layouts of other libraries: A (*stack, *in, r) and B (*stack, r, *out)."""
    params = random_like({"kernel_lora_a": jnp.ones(a), "kernel_lora_b": jnp.ones(b)})
    tx = lazily_masked(optax.adamw(0.1, weight_decay=0.1), 2, draw="exact", start_step=0)
    gradients, state = random_like(params, 1), tx.init(params)
    updates, new_state = tx.update(gradients, state, params)
    depth = 1 if len(a) == 3 and len(b) == 4 else 0
    layers = 3 if depth else 1
    moved = {
        "a": np.asarray(updates["kernel_lora_a"] != 0).reshape(layers, -1, 4),
        "b": np.asarray(updates["kernel_lora_b"] != 0).reshape(layers, 4, -1).swapaxes(1, 2),
    }
    for side in "ab":  # whole directions, two in each layer, the same two for A and B
        np.testing.assert_array_equal(moved[side], moved["a"][:, :1] & np.ones_like(moved[side]))
        np.testing.assert_array_equal(moved[side][:, 0].sum(-1), 2)
    for name in params:
        p, g = (np.float64(tree_[name]) for tree_ in (params, gradients))
        wanted, m, v = adamw_in_numpy(p, 0 * p, 0 * p, g, 1, 0.1, 0.1)
        hidden = np.asarray(updates[name]) == 0
        adam = new_state.inner_state[0]
        for found, value, rest in (
            (params[name] + updates[name], wanted, p), (adam.mu[name], m, 0), (adam.nu[name], v, 0)
        ):  # fmt: skip
            np.testing.assert_allclose(found, np.where(hidden, rest, value), rtol=1e-4, atol=1e-6)


def test_lazily_masked_refuses_factored_state():
    params = {"lora_a": jnp.ones((8, 4)), "lora_b": jnp.ones((4, 8))}
    inner = optax.scale_by_factored_rms(min_dim_size_to_factor=2)
    tx = lazily_masked(inner, 0.5)
    with pytest.raises(ValueError, match=r"state of shape \(4,\) for 'lora_a'"):
        tx.update(params, tx.init(params), params)


def movement_in_hidden_directions(make, keep):
    """Share of the sum of |update| that falls on entries that the mask hides."""
    params = {"lora_a": jnp.zeros((1, 256)), "lora_b": jnp.zeros((256, 2))}
    tx = make(keep)

    def body(state, key):
        gradients = {"lora_a": jax.random.normal(key, (1, 256)), "lora_b": jnp.ones((256, 2))}
        mask = step_masks(state, params, keep)["lora_a"]
        updates, state = tx.update(gradients, state, params)
        size = jnp.abs(updates["lora_a"])
        return state, (jnp.sum(jnp.where(mask, 0, size)), jnp.sum(size))

    keys = jax.random.split(jax.random.key(0, impl="threefry2x32"), 1500)
    _, (hidden, total) = jax.jit(lambda s: jax.lax.scan(body, s, keys))(tx.init(params))
    return float(hidden.sum() / total.sum())


@pytest.mark.parametrize("keep, share", [(0.5, 0.45), slow(0.125, 0.79)])
def test_a_mask_before_adam_does_not_freeze(keep, share):
    """The figures of mask_gradients' warning, with gradients that are pure noise."""
    before = movement_in_hidden_directions(
        lambda k: optax.chain(mask_gradients(k), optax.adam(1e-3)), keep
    )
    assert abs(before - share) < 0.01
    after = movement_in_hidden_directions(
        lambda k: optax.chain(optax.adam(1e-3), mask_gradients(k)), keep
    )
    lazy = movement_in_hidden_directions(lambda k: lazily_masked(optax.adam(1e-3), k), keep)
    assert after == lazy == 0
