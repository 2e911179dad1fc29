"""The registry of forms, and that what reads it agrees with it."""

import jax
import jax.numpy as jnp
import pytest

from rmlora_jax.adapt import DESCRIPTIONS
from rmlora_jax.adapt.forms import FACTORS, LEAVES, is_factor
from rmlora_jax.adapt.geometry import Layout
from rmlora_jax.optim.diagonals import find_diagonals
from rmlora_jax.optim.factors import find_factors

LAYOUT = Layout((), (0,), (1,))


@pytest.mark.parametrize("description", DESCRIPTIONS)
def test_a_form_gives_every_leaf_its_shape_names_and_value(description):
    form = description.form
    assert form.leaves[:2] == FACTORS
    assert form.leaves == tuple(name for name in LEAVES if name in form.leaves)
    shapes = form.shapes((5, 3), LAYOUT, 2)
    assert shapes[:2] == ((5, 2), (2, 3))
    names = form.axis_names(("embed", "mlp"), LAYOUT)
    assert [len(own) for own in names] == [len(shape) for shape in shapes]
    weight, key = jnp.ones((5, 3)), jax.random.key(0)
    for init in form.inits:
        lora = description(2, init=init)
        values, rest = form.initial(key, weight, LAYOUT, shapes, 1.0, init, jnp.float32)
        assert [value.shape for value in values] == [*shapes] and len(shapes) == len(lora.factors)
        # Training starts at the base: exactly, save for pissa, which takes the weight apart.
        close = jnp.abs(form.merged(rest, values, 1.0) - weight).max()
        assert close == 0 or (init == "pissa" and close < 1e-5)


@pytest.mark.parametrize("description", DESCRIPTIONS)
def test_what_peft_calls_the_leaves_is_known_for_all_or_for_none(description):
    form = description.form
    if form.peft is None:
        assert form.folds  # into one that PEFT has
        return
    assert [len(names) for names in form.peft] == [len(form.leaves)] * 2
    assert len(form.peft_shapes((5, 3), 2)) == len(form.leaves)


def test_the_optimizers_find_the_leaves_by_the_names_of_the_registry():
    # optim/ does not import adapt/: it takes any tree, and knows the names by patterns of its own.
    tree = dict(zip(LEAVES, (jnp.ones((5, 2)), jnp.ones((2, 3)), jnp.ones(2)), strict=False))
    found = {factor.side: factor.path for factor in find_factors(tree)}
    assert (found["a"], found["b"]) == FACTORS
    (diagonal,) = find_diagonals(tree)
    assert list(tree)[diagonal.e] == "lora_e"
    assert all(map(is_factor, ([name] for name in LEAVES))) and not is_factor(["kernel"])
