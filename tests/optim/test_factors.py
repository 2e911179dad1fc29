"""Factors whose axes are not (*stack, in, r) and (*stack, r, out): stated, or refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import slow_but

from rmlora_jax.optim.factors import ADAPTED, DEFAULT_FACTORS, find_factors
from rmlora_jax.optim.masking import lazily_masked, mask_gradients, step_masks
from rmlora_jax.optim.orthogonality import add_orthogonality, orthogonality
from rmlora_jax.optim.rm_lora import rm_lora


def pair(a, b, seed=0):
    rng = np.random.default_rng(seed)
    leaves = {"lora_a": rng.normal(size=a), "lora_b": rng.normal(size=b)}
    return {"q": jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), leaves)}


READ_IN_SEVERAL_WAYS = {  # shapes, and the axes that the message names
    "PyTorch, Equinox": ((4, 64), (64, 4), "...ri,...or"),
    "PyTorch, stacked": ((3, 4, 64), (3, 64, 4), "...ri,...or"),
    "PyTorch, rank 1": ((1, 64), (64, 1), "...ri,...or"),
    "MaxText, axis 1": ((8, 3, 2), (2, 3, 5), "ilr,rlo"),
    "MaxText, axis 1, as many layers as inputs": ((8, 8, 2), (2, 8, 8), "ilr,rlo"),
    "last axis, as many layers as directions": ((8, 3, 3), (3, 5, 3), "irl,rol"),
    "axis 1 behind a stack": ((5, 8, 3, 2), (5, 2, 3, 6), "ailr,arlo"),
}


@pytest.mark.parametrize("name", READ_IN_SEVERAL_WAYS)
def test_shapes_that_fit_another_layout_are_refused_and_the_message_helps(name):
    a, b, axes = READ_IN_SEVERAL_WAYS[name]
    tree = pair(a, b)
    words = r"'q' can be read in several ways.*" + axes.replace(".", r"\.")
    for refused in (
        lambda: mask_gradients(0.5).init(tree),
        lambda: lazily_masked(mask_gradients(0.5), 0.5).init(tree),
        lambda: orthogonality(tree),
        lambda: add_orthogonality(0.1).init(tree),
        lambda: rm_lora(1e-3).init(tree),
    ):
        with pytest.raises(ValueError, match=words):
            refused()
    found = find_factors(tree, (*DEFAULT_FACTORS, axes))  # what the message advises
    assert found[0].rank == found[1].rank < found[0].shape[-2]


LAYOUTS = {  # axes, shapes of A and B, and the axes of A and B in the usual order
    "ri,or": ((4, 6), (5, 4), (1, 0), (1, 0)),
    "...ri,...or": ((2, 3, 4, 6), (2, 3, 5, 4), (0, 1, 3, 2), (0, 1, 3, 2)),
    "ilr,rlo": ((6, 3, 4), (4, 3, 5), (1, 0, 2), (1, 0, 2)),
    "irl,rol": ((6, 4, 3), (4, 5, 3), (2, 0, 1), (2, 0, 1)),
    "hrd,nor": ((2, 4, 6), (3, 5, 4), (0, 2, 1), (2, 0, 1)),  # several in and out axes
    "r i l, l o r": ((4, 6, 3), (3, 5, 4), (2, 1, 0), (0, 2, 1)),
}


@pytest.mark.parametrize("axes", slow_but(list(LAYOUTS), "ri,or", "ilr,rlo"))
def test_stated_axes_give_the_mask_and_the_penalty_of_the_usual_order(axes):
    a, b, *orders = LAYOUTS[axes]
    tree, names = pair(a, b), (*DEFAULT_FACTORS, axes)
    leaves = (tree["q"]["lora_a"], tree["q"]["lora_b"])
    one, two = (np.transpose(leaf, order) for leaf, order in zip(leaves, orders, strict=True))
    usual = {"q": {"lora_a": one, "lora_b": two}}
    depth = one.ndim - 2 if axes != "hrd,nor" else 0
    plain = (*DEFAULT_FACTORS, depth)

    def in_order(tree):
        pairs = zip(tree["q"].values(), orders, strict=True)
        return [np.transpose(leaf, order) for leaf, order in pairs]

    for options in (
        {"keep": 0.5}, {"keep": 2, "draw": "exact"}, {"keep": 0.5, "unit": "element"},
        {"keep": 0.5, "unit": "matrix"},
    ):  # fmt: skip
        options |= {"start_step": 0}
        masks = [
            step_masks(mask_gradients(**options, factors=f).init(t), t, **options, factors=f)
            for t, f in ((tree, names), (usual, plain))
        ]
        for found, wanted in zip(in_order(masks[0]), masks[1]["q"].values(), strict=True):
            np.testing.assert_array_equal(found, wanted)
    # The penalty from its formula, in numpy.
    size = [int(np.prod(one.shape[depth:-1])), int(np.prod(two.shape[depth + 1 :]))]
    as_, bs = np.reshape(one, (-1, size[0], 4)), np.reshape(two, (-1, 4, size[1]))
    grams = [*(x.T @ x for x in as_), *(x @ x.T for x in bs)]
    wanted = np.mean([np.linalg.norm(gram - np.eye(4)) for gram in grams])
    value, gradient = jax.value_and_grad(orthogonality)(tree, factors=names)
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    expected = jax.grad(orthogonality)(usual, factors=plain)["q"].values()
    for found, other in zip(in_order(gradient), expected, strict=True):
        np.testing.assert_allclose(found, other, rtol=1e-5, atol=1e-7)


def test_a_step_on_pytorchs_order_is_that_on_the_usual_one():
    tree, gradients = pair((4, 6), (5, 4)), pair((4, 6), (5, 4), seed=1)
    turned, turned_gradients = (jax.tree.map(jnp.transpose, t) for t in (tree, gradients))
    steps = []
    for params, own, names in (
        (tree, gradients, (*DEFAULT_FACTORS, "ri,or")), (turned, turned_gradients, None),
    ):  # fmt: skip
        tx = rm_lora(1e-2, start_step=0, factors=names, placement="lazy")
        updates, _ = jax.jit(tx.update)(own, tx.init(params), params)
        steps.append(updates["q"])
    for found, wanted in zip(*(step.values() for step in steps), strict=True):
        np.testing.assert_allclose(found.T, wanted, rtol=1e-5, atol=1e-9)
    assert (steps[0]["lora_a"] == 0).any()


def test_a_narrow_layer_with_one_reading_is_read():
    assert [f.rank for f in find_factors(pair((2, 4), (4, 1)))] == [4, 4]
    # The trees of adapt have one order, whatever their sizes.
    assert [f.rank for f in find_factors(pair((4, 64), (64, 4)), ADAPTED)] == [64, 64]


@pytest.mark.parametrize(
    "axes", ["ri", "ri,or,x", "ii,or", "ri,ri", "...ri,or", "1r,ro", "ir,o", "io,or", "r,ro"]
)
def test_axes_that_say_too_little_are_refused(axes):
    with pytest.raises(ValueError, match="one letter each: r for the rank"):
        mask_gradients(0.5, factors=("lora_a", "lora_b", axes)).init(pair((4, 6), (5, 4)))


def test_axes_that_the_shapes_contradict_are_refused():
    for a, b, words in (
        ((4, 6), (5, 3), r"do not fit.*\(6, 4\).*\(3, 5\)"),
        ((2, 4, 6), (5, 4), r"'q/lora_a' has shape \(2, 4, 6\).*states the axes 'ri'"),
        ((6,), (5, 4), "at least the axes"),
    ):
        with pytest.raises(ValueError, match=words):
            find_factors(pair(a, b), ("lora_a", "lora_b", "ri,or"))
    with pytest.raises(ValueError, match="'ri,or' is PyTorch's"):
        find_factors(pair((4, 6), (5, 4)))
