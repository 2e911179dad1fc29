"""The random masks: their bits, their effect on updates, and where they must not differ."""

import os
import re
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fake_devices import with_devices
from flax import linen as nn
from flax import nnx
from flax.core import freeze
from threefry import reference_bits, reference_uniform

from rmlora_jax.optim.factors import find_factors
from rmlora_jax.optim.masking import (
    MaskState,
    kept_fraction,
    lazily_masked,
    mask_gradients,
    step_masks,
)


def tree(rank=4, stack=(), fill=1.0, dtype=jnp.float32):
    return {
        "encoder": {
            "query": {
                "kernel": jnp.full((*stack, 6, 5), fill, dtype),
                "lora_a": jnp.full((*stack, 6, rank), fill, dtype),
                "lora_b": jnp.full((*stack, rank, 5), fill, dtype),
            },
            "fc1": {
                "lora_a": jnp.full((*stack, 6, rank), fill, dtype),
                "lora_b": jnp.full((*stack, rank, 7), fill, dtype),
            },
        },
        "head": {"kernel": jnp.full((5, 3), fill, dtype), "bias": jnp.full((3,), fill, dtype)},
    }


def random_like(params, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), params)


def at_step(tx, params, step):
    state = tx.init(params)
    return state._replace(count=jnp.int32(step))


def masks_at(params, step, keep, seed=0, **options):
    tx = mask_gradients(keep, seed=seed, **options)
    return step_masks(at_step(tx, params, step), params, keep, **options)


# --- the bits ----------------------------------------------------------------------------


def test_masks_are_those_of_the_documented_generator():
    params = tree(rank=6, stack=(3,))
    masks = masks_at(params, 5, 0.4, seed=11)["encoder"]["query"]
    wanted = reference_uniform(11, 5, "encoder/query", (3, 6)) < 0.4
    np.testing.assert_array_equal(masks["lora_a"][:, 0, :], wanted)
    np.testing.assert_array_equal(masks["lora_b"][:, :, 0], wanted)
    assert masks["lora_a"].shape == (3, 1, 6) and masks["lora_b"].shape == (3, 6, 1)


def test_independent_element_and_matrix_masks_come_from_the_leaf_paths():
    params = tree(rank=6, stack=(3,))
    own = masks_at(params, 2, 0.4, coupling="independent")["encoder"]["fc1"]
    np.testing.assert_array_equal(
        own["lora_b"][..., 0], reference_uniform(0, 2, "encoder/fc1/lora_b", (3, 6)) < 0.4
    )
    entries = masks_at(params, 2, 0.4, unit="element")["encoder"]["fc1"]["lora_b"]
    np.testing.assert_array_equal(
        entries, reference_uniform(0, 2, "encoder/fc1/lora_b", (3, 6, 7)) < 0.4
    )
    whole = masks_at(params, 2, 0.4, unit="matrix")["encoder"]["fc1"]
    wanted = (reference_uniform(0, 2, "encoder/fc1", (3,)) < 0.4)[:, None, None]
    np.testing.assert_array_equal(whole["lora_a"], wanted)
    np.testing.assert_array_equal(whole["lora_b"], wanted)
    own = masks_at(params, 2, 0.4, unit="matrix", coupling="independent")["encoder"]["fc1"]
    wanted = (reference_uniform(0, 2, "encoder/fc1/lora_a", (3,)) < 0.4)[:, None, None]
    np.testing.assert_array_equal(own["lora_a"], wanted)


def test_exact_masks_are_the_smallest_words():
    masks = masks_at(tree(rank=6, stack=(3,)), 9, 2, draw="exact")["encoder"]["query"]
    bits = reference_bits(0, 9, "encoder/query", (3, 6))
    wanted = bits <= np.sort(bits, axis=-1)[:, 1:2]
    np.testing.assert_array_equal(masks["lora_a"][:, 0, :], wanted)


def test_golden_bits_never_change():
    """Written down once: a run resumed under another version of jax must go on as it began."""
    params = {"encoder": {"layers": {"query": tree(rank=8)["encoder"]["query"]}}}
    bernoulli = masks_at(params, 7, 0.5, seed=42)["encoder"]["layers"]["query"]["lora_a"][0]
    assert "".join("01"[int(bit)] for bit in bernoulli) == GOLDEN_BERNOULLI
    exact = masks_at(params, 7, 2, seed=42, draw="exact")["encoder"]["layers"]["query"]["lora_a"][0]
    assert "".join("01"[int(bit)] for bit in exact) == GOLDEN_EXACT


GOLDEN_BERNOULLI = "10101000"
GOLDEN_EXACT = "10100000"


@pytest.mark.parametrize("partitionable", [True, False])
@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_masks_ignore_the_users_generator_settings(partitionable, impl):
    params = tree()
    wanted = jax.tree.leaves(masks_at(params, 3, 0.5))
    with jax.threefry_partitionable(partitionable), jax.default_prng_impl(impl):
        found = jax.tree.leaves(masks_at(params, 3, 0.5))
    for a, b in zip(wanted, found, strict=True):
        np.testing.assert_array_equal(a, b)


def test_masks_do_not_depend_on_the_trees_kind_order_or_siblings():
    params = tree(stack=(2,))
    query = params["encoder"]["query"]
    wanted = masks_at(params, 4, 0.5)["encoder"]["query"]["lora_a"]

    def same(other, *path):
        mask = masks_at(other, 4, 0.5)
        for key in path:
            mask = mask[key]
        np.testing.assert_array_equal(jax.tree.leaves(mask)[0], wanted)

    same({"encoder": {"query": query}}, "encoder", "query", "lora_a")
    same({"encoder": {"query": dict(reversed(query.items())), "a": query, "z": query}},
         "encoder", "query", "lora_a")  # fmt: skip
    same({"params": params}, "params", "encoder", "query", "lora_a")
    same(freeze(params), "encoder", "query", "lora_a")
    same({f"encoder/query/{name}": leaf for name, leaf in query.items()}, "encoder/query/lora_a")
    boxed = {k: nn.Partitioned(v, (None,) * v.ndim) for k, v in query.items()}
    same({"encoder": {"query": boxed}}, "encoder", "query", "lora_a")
    state = nnx.State({"encoder": {"query": {k: nnx.Param(v) for k, v in query.items()}}})
    same(state, "encoder", "query", "lora_a")


def test_masks_differ_between_steps_modules_layers_and_seeds():
    params = tree(rank=32, stack=(2,))
    base = masks_at(params, 1, 0.5)["encoder"]
    query = np.asarray(base["query"]["lora_a"])
    assert (query[0] != query[1]).any()
    assert (query != np.asarray(base["fc1"]["lora_a"])).any()
    for step, seed in ((2, 0), (1, 1)):
        other = masks_at(params, step, 0.5, seed=seed)["encoder"]["query"]["lora_a"]
        assert (query != np.asarray(other)).any()


def many_masks(keep, steps=400, rank=8, **options):
    """(steps, 2, rank) of A's and B's rank masks of one module."""
    params = {"m": {"lora_a": jnp.ones((3, rank)), "lora_b": jnp.ones((rank, 2))}}
    state = mask_gradients(keep, **options).init(params)

    def one(step):
        masks = step_masks(state._replace(count=step), params, keep, **options)["m"]
        return jnp.stack([masks["lora_a"][0], masks["lora_b"][:, 0]])

    return np.asarray(jax.jit(jax.vmap(one))(jnp.arange(1, steps + 1)))


@pytest.mark.parametrize("keep", [0.125, 0.5, 0.9])
def test_bernoulli_statistics(keep):
    masks = many_masks(keep, steps=2000)[:, 0].astype(float)
    sigma = np.sqrt(keep * (1 - keep) / 2000)
    assert np.abs(masks.mean(0) - keep).max() < 4 * sigma
    assert abs(masks.mean() - keep) < 4 * sigma / np.sqrt(8)
    centred = masks - masks.mean(0)
    correlation = centred.T @ centred / 2000 / (keep * (1 - keep))
    assert np.abs(correlation - np.diag(np.diag(correlation))).max() < 5 / np.sqrt(2000)
    in_time = (centred[1:] * centred[:-1]).mean(0) / (keep * (1 - keep))
    assert np.abs(in_time).max() < 5 / np.sqrt(2000)


def test_exact_draws_k_directions_uniformly():
    masks = many_masks(3, steps=2000, draw="exact")[:, 0]
    np.testing.assert_array_equal(masks.sum(-1), 3)
    subsets = np.unique(masks, axis=0, return_counts=True)[1]
    assert len(subsets) == 56  # 8 choose 3
    expected = 2000 / 56
    chi_squared = ((subsets - expected) ** 2 / expected).sum()
    assert chi_squared < 55 + 5 * np.sqrt(2 * 55)


@pytest.mark.parametrize("draw, keep", [("bernoulli", 0.5), ("exact", 4)])
def test_coupling(draw, keep):
    paired = many_masks(keep, draw=draw)
    np.testing.assert_array_equal(paired[:, 0], paired[:, 1])
    own = many_masks(keep, draw=draw, coupling="independent").astype(float)
    agreement = (own[:, 0] == own[:, 1]).mean()
    assert abs(agreement - 0.5) < 0.06


def test_resample_every():
    masks = many_masks(0.5, steps=30, resample_every=10)[:, 0]  # steps 1..30
    for first, last in ((0, 9), (9, 19), (19, 29)):
        assert (masks[first:last] == masks[first]).all()
    assert (masks[8] != masks[9]).any() and (masks[18] != masks[19]).any()
    forever = many_masks(0.5, steps=30, resample_every=None)[:, 0]
    assert (forever == forever[0]).all() and 0 < forever[0].sum() < 8


# --- the update --------------------------------------------------------------------------


def test_update_is_the_mask_times_the_gradient_and_passes_the_rest():
    params = tree(stack=(2,))
    gradients = random_like(params)
    tx = mask_gradients(0.5, seed=3)
    state = at_step(tx, params, 6)
    masks = step_masks(state, params, 0.5)
    updates, new_state = tx.update(gradients, state)
    jax.tree.map(
        lambda u, m, g: np.testing.assert_array_equal(u, np.asarray(m) * np.asarray(g)),
        updates, masks, gradients,
    )  # fmt: skip
    assert updates["head"]["kernel"] is gradients["head"]["kernel"]
    assert 0 < int(jnp.sum(masks["encoder"]["query"]["lora_a"])) < 8
    assert int(new_state.count) == 7
    factor_entries = [gradients["encoder"][m][f] for m in ("query", "fc1")
                      for f in ("lora_a", "lora_b")]  # fmt: skip
    kept = sum((np.asarray(u) != 0).sum() for u in
               [updates["encoder"][m][f] for m in ("query", "fc1") for f in ("lora_a", "lora_b")])
    total = sum(g.size for g in factor_entries)
    np.testing.assert_allclose(kept_fraction(new_state), kept / total, rtol=1e-6)


@pytest.mark.parametrize("start_step", [0, 1, 3])
def test_start_step(start_step):
    params = tree(rank=16)
    tx = mask_gradients(0.5, start_step=start_step)
    state = tx.init(params)
    assert kept_fraction(state) == 1.0
    for step in range(5):
        updates, state = tx.update(params, state)
        masked = bool((updates["encoder"]["query"]["lora_a"] == 0).any())
        assert masked == (step >= start_step)
        assert (float(kept_fraction(state)) < 1) == masked


@pytest.mark.parametrize("unit", ["rank", "element", "matrix"])
@pytest.mark.parametrize("keep", [1, 1.0, "schedule", "array"])
def test_keep_one_returns_the_updates_bit_for_bit(unit, keep):
    keep = {"schedule": lambda step: 1.0, "array": jnp.float32(1)}.get(keep, keep)
    gradients = random_like(tree(stack=(2,)))
    gradients["head"]["bias"] = jnp.array([jnp.nan, -0.0, jnp.inf])
    tx = mask_gradients(keep, unit=unit, rescale=True, start_step=0)
    updates, state = tx.update(gradients, tx.init(gradients))
    for a, b in zip(jax.tree.leaves(updates), jax.tree.leaves(gradients), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    assert kept_fraction(state) == 1.0


@pytest.mark.parametrize("options", [{"keep": 0.0}, {"keep": 0, "draw": "exact"}])
def test_an_empty_draw_hides_everything_and_is_finite(options):
    gradients = random_like(tree())
    tx = mask_gradients(**options, rescale=True, start_step=0)
    updates, state = tx.update(gradients, tx.init(gradients))
    assert not jnp.any(updates["encoder"]["query"]["lora_a"])
    np.testing.assert_array_equal(updates["head"]["kernel"], gradients["head"]["kernel"])
    assert kept_fraction(state) == 0.0


def test_rescale_divides_by_the_expected_fraction_after_the_start():
    gradients = random_like(tree(rank=8))
    a = np.asarray(gradients["encoder"]["query"]["lora_a"])
    for options, factor in (({"keep": 0.4}, 0.4), ({"keep": 2, "draw": "exact"}, 0.25)):
        tx = mask_gradients(**options, rescale=True)
        updates, state = tx.update(gradients, tx.init(gradients))
        np.testing.assert_array_equal(updates["encoder"]["query"]["lora_a"], a)
        updates, _ = tx.update(gradients, state)
        found = np.asarray(updates["encoder"]["query"]["lora_a"])
        assert (found != 0).any()
        np.testing.assert_allclose(found[found != 0], (a / factor)[found != 0], rtol=1e-6)


def test_exact_count_is_clipped_to_each_rank():
    params = {
        "small": {"lora_a": jnp.ones((3, 2)), "lora_b": jnp.ones((2, 3))},
        "large": {"lora_a": jnp.ones((3, 6)), "lora_b": jnp.ones((6, 5))},
    }
    tx = mask_gradients(4, draw="exact", start_step=0, rescale=True)
    updates, _ = tx.update(params, tx.init(params))
    np.testing.assert_array_equal(updates["small"]["lora_a"], 1.0)
    assert sorted(np.asarray(updates["large"]["lora_a"][0]).tolist()) == [0, 0, 1.5, 1.5, 1.5, 1.5]


def test_keep_follows_a_schedule():
    params = {"lora_a": jnp.ones((1, 4096)), "lora_b": jnp.ones((4096, 2))}
    tx = mask_gradients(optax.linear_schedule(1.0, 0.0, 10), start_step=0)
    state, fractions = tx.init(params), []
    for _ in range(12):
        _, state = tx.update(params, state)
        fractions.append(float(kept_fraction(state)))
    wanted = [max(1 - t / 10, 0) for t in range(12)]
    np.testing.assert_allclose(fractions, wanted, atol=4 * 0.5 / 64)
    counts = mask_gradients(lambda t: jnp.minimum(t, 3), draw="exact", start_step=0)
    state = counts.init(tree(rank=4))
    for wanted in (0, 1, 2, 3, 3):
        updates, state = counts.update(tree(rank=4), state)
        assert float(updates["encoder"]["query"]["lora_a"][0].sum()) == wanted


def test_hidden_nans_stay_hidden():
    params = tree(fill=jnp.nan)
    tx = mask_gradients(2, draw="exact", start_step=0, rescale=True)
    updates, _ = tx.update(params, tx.init(params))
    assert np.isnan(updates["encoder"]["query"]["lora_a"]).sum() == 6 * 2


def test_dtypes_are_kept():
    params = tree(dtype=jnp.bfloat16)
    for tx in (
        mask_gradients(0.5, start_step=0, rescale=True),
        mask_gradients(lambda t: jnp.float32(0.5), start_step=0, rescale=True),
        mask_gradients(2, draw="exact", start_step=0, rescale=True),
        lazily_masked(optax.adamw(1e-3), 0.5, start_step=0, rescale=True),
    ):
        state = tx.init(params)
        updates, new_state = tx.update(params, state, params)
        assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}
        assert jax.tree.map(lambda x: x.dtype, state) == jax.tree.map(lambda x: x.dtype, new_state)
    state = mask_gradients(0.5).init(params)
    assert [x.dtype for x in state] == [jnp.int32, jnp.uint32, jnp.float32]
    assert [x.shape for x in state] == [(), (2,), (2,)]


def test_absent_leaves_pass_through():
    params = tree()
    params["encoder"]["query"]["lora_a"] = None
    params["encoder"]["fc1"]["lora_b"] = optax.MaskedNode()
    tx = mask_gradients(0.5, start_step=0)
    updates, _ = tx.update(params, tx.init(params))
    assert updates["encoder"]["query"]["lora_a"] is None
    assert isinstance(updates["encoder"]["fc1"]["lora_b"], optax.MaskedNode)
    whole, _ = tx.update(tree(), tx.init(tree()))
    np.testing.assert_array_equal(  # B alone draws what it draws beside A
        updates["encoder"]["query"]["lora_b"], whole["encoder"]["query"]["lora_b"]
    )


# --- factors with several in or out axes ---------------------------------------------------

SEVERAL_AXES = {  # shapes of A and B, the stack axes and the rank
    "qwix convolution": ((3, 6, 4), (4, 5), 0, 4),
    "qwix einsum, out": ((6, 4), (4, 2, 5), 0, 4),
    "qwix scanned einsum": ((3, 6, 4), (3, 4, 2, 5), 1, 4),
    "gemma attention output": ((2, 5, 4), (4, 6), 0, 4),
    "gemma keys and values": ((6, 4), (4, 2, 3, 5), 0, 4),
    "gemma several to several": ((2, 5, 4), (4, 3, 6), 0, 4),
    "stacked several to several": ((3, 2, 5, 4), (3, 4, 6, 7), 1, 4),
    "stacked twice": ((3, 2, 5, 4), (3, 2, 4, 6, 7), 2, 4),
    "one axis each": ((3, 6, 4), (3, 4, 5), 1, 4),
    "one axis each, and stack = in = rank": ((4, 4, 4), (4, 4, 4), 1, 4),
    "interleaved": ((1, 6, 4), (1, 4, 5), 1, 4),
}


def several_axes(name, seed=0):
    a, b, depth, rank = SEVERAL_AXES[name]
    params = {"m": {"lora": {"a": jnp.ones(a), "b": jnp.ones(b)}}, "head": jnp.ones(3)}
    return random_like(params, seed), a[:depth], rank


def spread(chosen, shape, depth, side):
    """Masks (*stack, r) over every axis of a factor, by loops over its indices."""
    out = np.zeros(shape, bool)
    for index in np.ndindex(shape):
        out[index] = chosen[(*index[:depth], index[-1] if side == "a" else index[depth])]
    return out


@pytest.mark.parametrize("name", SEVERAL_AXES)
def test_rank_directions_of_factors_with_several_axes(name):
    params, stack, rank = several_axes(name)
    a, b, depth, _ = SEVERAL_AXES[name]
    for seed, options in ((0, {"keep": 0.5}), (1, {"keep": 2, "draw": "exact"})):
        tx = mask_gradients(seed=seed, **options)
        state = at_step(tx, params, 3)
        updates, new_state = tx.update(params, state)
        if "draw" in options:
            bits = reference_bits(seed, 3, "m", (*stack, rank))
            chosen = bits <= np.sort(bits, axis=-1)[..., 1:2]
        else:
            chosen = reference_uniform(seed, 3, "m", (*stack, rank)) < 0.5
        wanted = {
            "a": np.where(spread(chosen, a, depth, "a"), params["m"]["lora"]["a"], 0),
            "b": np.where(spread(chosen, b, depth, "b"), params["m"]["lora"]["b"], 0),
        }
        jax.tree.map(np.testing.assert_array_equal, updates["m"]["lora"], wanted)
        np.testing.assert_array_equal(updates["head"], params["head"])
        np.testing.assert_allclose(kept_fraction(new_state), chosen.mean(), rtol=1e-6)
        masks = step_masks(state, params, **options)["m"]["lora"]
        assert masks["a"].shape == (*stack, *(1,) * (len(a) - depth - 1), rank)
        assert masks["b"].shape == (*stack, rank, *(1,) * (len(b) - depth - 1))


def test_other_units_on_factors_with_several_axes():
    params, _, _ = several_axes("qwix scanned einsum")
    masks = masks_at(params, 1, 0.5, unit="matrix")["m"]["lora"]
    wanted = reference_uniform(0, 1, "m", (3,)) < 0.5
    np.testing.assert_array_equal(masks["a"], wanted.reshape(3, 1, 1))
    np.testing.assert_array_equal(masks["b"], wanted.reshape(3, 1, 1, 1))
    masks = masks_at(params, 1, 0.5, unit="element")["m"]["lora"]
    wanted = reference_uniform(0, 1, "m/lora/b", (3, 4, 2, 5)) < 0.5
    np.testing.assert_array_equal(masks["b"], wanted)


def test_several_readings_are_an_error_until_one_is_stated():
    params = {"m": {"lora_a": jnp.ones((4, 6, 4)), "lora_b": jnp.ones((4, 4, 2, 5))}}
    with pytest.raises(ValueError, match=(
        r"'m' can be read in several ways: 'm/lora_a' has shape \(4, 6, 4\).*"
        r"k=0: stack \(\), in \(4, 6\), out \(4, 2, 5\); or "
        r"k=1: stack \(4,\), in \(6,\), out \(2, 5\).*"
        r"factors=\('lora_a\|lora/a', 'lora_b\|lora/b', 1\)"
    )):  # fmt: skip
        mask_gradients(0.5).init(params)
    names = ("lora_a", "lora_b")
    for depth, shape in ((0, (4,)), (1, (4, 4))):
        masks = masks_at(params, 1, 0.5, factors=(*names, depth))["m"]
        chosen = reference_uniform(0, 1, "m", shape) < 0.5
        for side in "ab":
            leaf = params["m"][f"lora_{side}"]
            np.testing.assert_array_equal(
                np.broadcast_to(masks[f"lora_{side}"], leaf.shape),
                spread(chosen, leaf.shape, depth, side),
            )
    with pytest.raises(ValueError, match=r"'m' do not fit.*same stack of 1 axes"):
        params["m"]["lora_a"] = jnp.ones((3, 6, 4))
        mask_gradients(0.5, factors=(*names, 1)).init(params)
    with pytest.raises(ValueError, match=r"\(3, 6, 4\), too few axes for the 2 stack axes"):
        mask_gradients(0.5, factors=(*names, 2)).init(params)


def test_a_factor_alone_is_read_as_stacked_unless_stated():
    params = {"m": {"lora_a": None, "lora_b": jnp.ones((4, 3, 5))}}
    stacked = masks_at(params, 1, 0.5)["m"]["lora_b"]
    np.testing.assert_array_equal(
        stacked[..., 0], reference_uniform(0, 1, "m", (4, 3)) < 0.5
    )
    several = masks_at(params, 1, 0.5, factors=("lora_a", "lora_b", 0))["m"]["lora_b"]
    np.testing.assert_array_equal(
        several[:, 0, 0], reference_uniform(0, 1, "m", (4,)) < 0.5
    )


# --- inside other transformations ---------------------------------------------------------


def test_multi_transform_masks_a_and_b_alike():
    """LoRA+: B has a learning rate of its own, and still shares its mask with A."""
    params = tree(rank=8)

    def group(path, _):
        return "b" if jax.tree_util.keystr(path).endswith("['lora_b']") else "rest"

    labels = jax.tree_util.tree_map_with_path(group, params)
    mask = mask_gradients(0.5, start_step=0)
    tx = optax.multi_transform(
        {"b": optax.chain(mask, optax.sgd(4.0)), "rest": optax.chain(mask, optax.sgd(1.0))}, labels
    )
    updates, state = tx.update(params, tx.init(params), params)
    wanted, wanted_state = mask.update(params, mask.init(params))
    query = updates["encoder"]["query"]
    np.testing.assert_array_equal(query["lora_a"], -wanted["encoder"]["query"]["lora_a"])
    np.testing.assert_array_equal(query["lora_b"], -4 * wanted["encoder"]["query"]["lora_b"])
    np.testing.assert_allclose(kept_fraction(state), kept_fraction(wanted_state), rtol=1e-6)


@pytest.mark.parametrize("lazy", [False, True])
def test_multi_steps_counts_optimizer_steps(lazy):
    params = tree(rank=8)
    if lazy:
        inner = lazily_masked(optax.adamw(1e-2), 0.5)
    else:
        inner = optax.chain(mask_gradients(0.5), optax.adamw(1e-2))
    tx = optax.MultiSteps(inner, every_k_schedule=3)
    state, inner_state = tx.init(params), inner.init(params)
    update = jax.jit(tx.update)
    fractions = []
    for step in range(4):
        batches = [random_like(params, 10 * step + i) for i in range(3)]
        for gradients in batches:
            updates, state = update(gradients, state, params)
        mean = jax.tree.map(lambda *g: sum(g) / 3, *batches)
        wanted, inner_state = inner.update(mean, inner_state, params)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-7), updates, wanted
        )
        assert kept_fraction(state) == kept_fraction(inner_state)
        fractions.append(float(kept_fraction(state)))
    assert fractions[0] == 1.0 and max(fractions[1:]) < 1.0


def test_inject_hyperparams():
    params = tree(rank=64)
    tx = optax.inject_hyperparams(mask_gradients, static_args=("seed",))(
        keep=0.25, start_step=0, resample_every=2
    )
    updates, state = tx.update(params, tx.init(params))
    wanted, _ = mask_gradients(0.25, start_step=0, resample_every=2).update(
        params, mask_gradients(0.25).init(params)
    )
    jax.tree.map(np.testing.assert_array_equal, updates, wanted)
    assert 0.1 < float(kept_fraction(state)) < 0.4


def test_tree_map_params_reaches_through_the_mask():
    params = tree()
    tx = optax.chain(mask_gradients(0.5), optax.adamw(1e-3))
    found = optax.tree_map_params(tx, lambda x: 7, tx.init(params))
    assert set(jax.tree.leaves(found[1][0].mu)) == {7}
    assert isinstance(found[0], MaskState)


def test_jit_vmap_over_seeds_and_scan_agree_with_eager():
    params = tree(stack=(2,))
    gradients = random_like(params)

    def after(seed, steps=3):
        tx = mask_gradients(0.5, seed=seed)

        def body(state, _):
            updates, state = tx.update(gradients, state)
            return state, updates["encoder"]["fc1"]["lora_b"]

        return jax.lax.scan(body, tx.init(params), length=steps)[1]

    seeds = jnp.arange(4)
    together = jax.jit(jax.vmap(after))(seeds)
    for seed in range(4):
        tx = mask_gradients(0.5, seed=seed)
        state = tx.init(params)
        for step in range(3):
            updates, state = tx.update(gradients, state)
            np.testing.assert_array_equal(
                together[seed, step], updates["encoder"]["fc1"]["lora_b"]
            )
    assert len({np.asarray(x).tobytes() for x in together}) == 4


def test_masks_go_on_after_a_checkpoint(tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    params = tree()
    tx = optax.chain(mask_gradients(0.5, seed=5), optax.adam(1e-3))
    state = tx.init(params)
    for step in range(3):
        _, state = tx.update(random_like(params, step), state)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.eval_shape(lambda: state))
    for step in range(3, 6):
        wanted, state = tx.update(random_like(params, step), state)
        found, restored = tx.update(random_like(params, step), restored)
        jax.tree.map(np.testing.assert_array_equal, found, wanted)
    assert kept_fraction(state) < 1


DEVICES = """
import jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import PartitionSpec as P
from rmlora_jax.optim.masking import lazily_masked, mask_gradients, kept_fraction

assert jax.device_count() == 8
params = {"m": {"lora_a": jnp.ones((2, 6, 8)), "lora_b": jnp.ones((2, 8, 4))},
          "head": {"kernel": jnp.ones((4, 2))}}
rng = np.random.default_rng(0)
per_device = jax.tree.map(
    lambda x: jnp.asarray(rng.integers(-8, 8, (8, *x.shape)), jnp.float32), params)
mean = jax.tree.map(lambda x: x.mean(0), per_device)

for tx in (optax.chain(mask_gradients(0.5), optax.sgd(0.5)), lazily_masked(optax.sgd(0.5), 0.5)):
    state = tx.init(params)
    _, state = tx.update(mean, state, params)
    wanted, wanted_state = jax.jit(tx.update)(mean, state, params)

    def step(gradients, state, params):
        gradients = jax.tree.map(lambda g: jax.lax.pmean(g[0], "data"), gradients)
        return tx.update(gradients, state, params)

    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    mapped = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(P("data"), P(), P()), out_specs=P()))
    found, found_state = mapped(per_device, state, params)
    for a, b in zip(jax.tree.leaves((found, found_state)), jax.tree.leaves((wanted, wanted_state)),
                    strict=True):
        assert np.array_equal(a, b), (a, b)

    def step(gradients, state, params):
        return tx.update(jax.lax.pmean(gradients, "data"), state, params)

    found, found_state = jax.pmap(step, "data", in_axes=(0, None, None))(per_device, state, params)
    for a, b in zip(jax.tree.leaves((found, found_state)), jax.tree.leaves((wanted, wanted_state)),
                    strict=True):
        assert all(np.array_equal(shard, b) for shard in np.asarray(a))
    assert float(kept_fraction(found_state)) == float(kept_fraction(wanted_state)) < 1
print("equal on 8 devices")
"""


def test_masks_are_the_same_on_eight_devices_under_shard_map_and_pmap():
    env = {**with_devices(8), "JAX_PLATFORMS": "cpu",
           "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}  # fmt: skip
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(DEVICES)],
        env=env, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert "equal on 8 devices" in run.stdout, run.stderr[-3000:]


# --- logging, names and errors -------------------------------------------------------------


def test_kept_fraction_without_a_mask_is_one():
    state = optax.adam(1e-3).init(tree())
    assert kept_fraction(state) == 1.0 and kept_fraction(state).dtype == jnp.float32


def test_kept_fraction_weighs_entries_and_works_under_jit():
    params = {
        "wide": {"lora_a": jnp.ones((100, 2)), "lora_b": jnp.ones((2, 100))},
        "thin": {"lora_a": jnp.ones((1, 8)), "lora_b": jnp.ones((8, 2))},
    }
    tx = optax.chain(mask_gradients(2, draw="exact", start_step=0), optax.adam(1e-3))
    _, state = tx.update(params, tx.init(params))
    np.testing.assert_allclose(jax.jit(kept_fraction)(state), (400 + 6) / (400 + 24), rtol=1e-6)


@pytest.mark.parametrize(
    "names, module",
    [
        (("m/lora_a", "m/lora_b"), "m"),
        (("m/w_lora_a", "m/w_lora_b"), "m/w"),
        (("m/lora/a", "m/lora/b"), "m"),
        (("lora_a", "lora_b"), ""),
        (("params/m/lora_a", "params/m/lora_b"), "m"),
    ],
)
def test_names_of_factors(names, module):
    params = {names[0]: jnp.ones((3, 2)), names[1]: jnp.ones((2, 3)), "m/kernel": jnp.ones((3, 3))}
    found = find_factors(params)
    assert [(f.module, f.side) for f in found] == [(module, "a"), (module, "b")]


def test_names_that_only_look_like_factors_are_left_alone():
    params = {"lora_a": jnp.ones((3, 2)), "explora_a": jnp.ones(3), "lora_a_scale": jnp.ones(3),
              "lora_a/value": jnp.ones(3)}  # fmt: skip
    assert [f.path for f in find_factors(params)] == ["lora_a"]


def test_nnx_lora_and_boxes():
    model = nnx.LoRA(3, 2, 4, rngs=nnx.Rngs(0), base_module=nnx.Linear(3, 4, rngs=nnx.Rngs(0)))
    state = nnx.state(model, nnx.Param)
    tx = mask_gradients(1, draw="exact", start_step=0)
    updates, _ = tx.update(state, tx.init(state))
    moved = np.asarray(updates["lora_a"][...]) != 0
    assert moved.any(0).sum() == 1
    np.testing.assert_array_equal(
        updates["base_module"]["kernel"][...], state["base_module"]["kernel"][...]
    )


def test_factors_given_as_regular_expressions():
    params = {
        "blk": {"q": {"down": {"kernel": jnp.ones((5, 4))}, "up": {"kernel": jnp.ones((4, 3))}}},
        "gate": jnp.ones((50,)),
    }
    names = (r"down/kernel", r"up/kernel")
    masks = masks_at(params, 1, 0.5, factors=names)
    wanted = reference_uniform(0, 1, "blk/q", (4,)) < 0.5
    np.testing.assert_array_equal(masks["blk"]["q"]["down"]["kernel"][0], wanted)
    assert masks["gate"].shape == () and bool(masks["gate"])
    masks = masks_at(params, 1, 0.5, factors=r"gate|.*/up/.*", unit="element")
    np.testing.assert_array_equal(masks["gate"], reference_uniform(0, 1, "gate", (50,)) < 0.5)
    assert bool(masks["blk"]["q"]["down"]["kernel"])
    masks = masks_at(params, 1, 0.5, factors=r".*/up/.*", unit="matrix")
    np.testing.assert_array_equal(
        masks["blk"]["q"]["up"]["kernel"],
        (reference_uniform(0, 1, "blk/q/up/kernel", ()) < 0.5).reshape(1, 1),
    )


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"keep": 2}, ["keep=2", "draw='bernoulli'"]),
        ({"keep": -0.1}, ["keep=-0.1", "draw='bernoulli'"]),
        ({"keep": float("nan")}, ["keep=nan", "draw='bernoulli'"]),
        ({"keep": 0.5, "draw": "exact"}, ["keep=0.5", "draw='exact'"]),
        ({"keep": -1, "draw": "exact"}, ["keep=-1", "draw='exact'"]),
        ({"keep": 2, "draw": "exact", "unit": "element"}, ["draw='exact'", "unit='element'"]),
        ({"keep": 2, "draw": "exact", "unit": "matrix"}, ["draw='exact'", "unit='matrix'"]),
        ({"keep": 0.5, "factors": ".*"}, ["factors='.*'", "unit='rank'"]),
        ({"keep": 0.5, "unit": "row"}, ["unit='row'", "'rank', 'element', 'matrix'"]),
        ({"keep": 0.5, "draw": "uniform"}, ["draw='uniform'", "'exact'"]),
        ({"keep": 0.5, "coupling": "none"}, ["coupling='none'", "'paired'"]),
        ({"keep": 0.5, "start_step": -1}, ["start_step=-1", "at least 0"]),
        ({"keep": 0.5, "resample_every": 0}, ["resample_every=0", "None"]),
    ],
)
@pytest.mark.parametrize("lazy", [False, True])
def test_bad_arguments_are_named(arguments, words, lazy):
    with pytest.raises(ValueError) as error:
        if lazy:
            lazily_masked(optax.sgd(1.0), **arguments)
        else:
            mask_gradients(**arguments)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    "arguments", [{"keep": "half"}, {"keep": True}, {"keep": 0.5, "start_step": 1.5},
                  {"keep": 0.5, "resample_every": 2.0}],
)  # fmt: skip
def test_bad_types_are_named(arguments):
    with pytest.raises(TypeError, match=list(arguments)[-1]):
        mask_gradients(**arguments)
    with pytest.raises(TypeError, match="unexpected"):
        lazily_masked(optax.sgd(1.0), 0.5, units="rank")


def test_errors_of_the_tree():
    tx = mask_gradients(0.5)
    with pytest.raises(ValueError, match=r"no LoRA factors.*'head/kernel'.*factors="):
        tx.init({"head": {"kernel": jnp.ones((2, 2))}})
    with pytest.raises(ValueError, match=r"factors=\('x', 'y'\) matches none"):
        mask_gradients(0.5, factors=("x", "y")).init(tree())
    for a, b in (((3, 2), (4, 3)), ((5, 3, 2), (4, 2, 3)), ((5, 3, 2), (3, 2))):
        with pytest.raises(ValueError, match=r"'m' do not fit.*\(\*stack, in, rank\)"):
            tx.init({"m": {"lora_a": jnp.ones(a), "lora_b": jnp.ones(b)}})
    with pytest.raises(ValueError, match="at least the axes"):
        tx.init({"m": {"lora_a": jnp.ones(3), "lora_b": jnp.ones((3, 2))}})
    with pytest.raises(ValueError, match="both factor 'a' of module 'm'"):
        tx.init({"m": {"lora_a": jnp.ones((3, 2))}, "m_lora_a": jnp.ones((3, 2))})
    with pytest.raises(ValueError, match="as A and as B"):
        mask_gradients(0.5, factors=("kernel", "kernel")).init({"kernel": jnp.ones((3, 2))})
    with pytest.raises(ValueError, match=r"exceeds the rank of every module.*4"):
        mask_gradients(5, draw="exact").init(tree(rank=4))
    with pytest.raises(ValueError, match="invalid regular expression"):
        mask_gradients(0.5, factors=("(", "b")).init(tree())
    for bad in (3, ("a", "b", 1.0), ("a", "b", -1), ("a", "b", True), ("a", 1), ("a",) * 4):
        with pytest.raises(TypeError, match=re.escape(f"factors={bad!r}")):
            mask_gradients(0.5, factors=bad).init(tree())
    with pytest.raises(ValueError, match="seed=4294967296"):
        mask_gradients(0.5, seed=2**32).init(tree())
    with pytest.raises(ValueError, match="0 mask states"):
        step_masks(optax.adam(1.0).init(tree()), tree(), 0.5)
