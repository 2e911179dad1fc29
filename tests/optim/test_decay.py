"""Which parameters decay, against transformers' Trainer, and by how much, against numpy."""

import doctest
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

import rmlora_jax as rm
from rmlora_jax import methods
from rmlora_jax.models import FAMILIES
from rmlora_jax.optim import decay
from rmlora_jax.train.config import default_config, resolve

TRAINER = json.loads((Path(__file__).parents[1] / "fixtures" / "trainer_decay.json").read_text())
RATE, DECAY = 1e-2, 0.3
# Two layers in a stack: their biases have two axes. `still` are those that must not decay.
SHAPES = {
    "encoder/layers/attention/query/kernel": (2, 3, 4),
    "encoder/layers/attention/query/bias": (2, 4),
    "encoder/layers/attention/query/lora_a": (2, 3, 2),
    "encoder/layers/attention/query/lora_b": (2, 2, 4),
    "encoder/layers/attention/query/lora_e": (2, 2),
    "encoder/layers/norm1/scale": (2, 3),
    "embed/class_token": (1, 3),
}
STILL = {path for path in SHAPES if path.endswith(("bias", "scale"))}


def test_example():
    result = doctest.testmod(decay)
    assert result.attempted and not result.failed


def decays(path):
    return flatten_dict(rm.decayed(unflatten_dict({path: 1.0}, sep="/")), sep="/")[path]


@pytest.mark.parametrize("family", ["vit", "bert", "roberta", "deberta-v2"])
def test_the_parameters_of_a_family_decay_as_in_the_trainer(family):
    found, seen = {}, TRAINER[family]
    for entry in FAMILIES[family].table:
        for name in {spelled.format(i) for spelled in entry.names for i in range(2)} & seen.keys():
            found[name] = decays(entry.path)
    assert found == seen


@pytest.mark.parametrize("kind", ["lora", "dora", "adalora"])
def test_factors_diagonals_and_magnitudes_decay_as_in_the_trainer(kind):
    names = {"lora_A": "lora_a", "lora_B": "lora_b", "lora_E": "lora_e",
             "lora_magnitude_vector": "lora_m"}
    for name, expected in TRAINER[kind].items():
        (own,) = (ours for theirs, ours in names.items() if theirs in name)
        assert decays(f"encoder/layers/attention/query/{own}") is expected


@pytest.mark.parametrize("path", [
    "LayerNorm_0/scale", "ln_1/scale", "ln_f/weight", "rms/weight", "blocks/0/norm1/weight",
    "norms/0/weight", "decoder/final_norm/w", "q_norm/scale", "BatchNorm_3/scale", "bn1/weight",
    "layer_norm/weight", "attention/q_bias", "in_proj_bias", "params/Dense_0/bias",
    "rel/relative_attention_bias/embedding"])
def test_norms_and_biases_of_own_models_do_not_decay(path):
    assert not decays(path)


@pytest.mark.parametrize("path", [
    "Dense_0/kernel", "norm_proj/kernel", "normal/kernel", "plan/kernel", "layer_scale/lambda1",
    "logit_scale", "encoder/scaled/kernel", "lnguage/kernel", "0/weight"])
def test_what_only_looks_like_a_norm_decays(path):
    assert decays(path)


def test_boxes_absent_leaves_and_lists_keep_their_places():
    tree = {"layers": [{"bias": jnp.ones(2), "kernel": optax.MaskedNode()}, None], "w": 1.0}
    assert rm.decayed(tree) == {
        "layers": [{"bias": False, "kernel": optax.MaskedNode()}, None], "w": True}


def tree_of(rng):
    return {path: rng.normal(size=shape).astype(np.float32) for path, shape in SHAPES.items()}


def adamw(params, gradients, still, b1=0.9, b2=0.999, eps=1e-8):
    """AdamW as Loshchilov and Hutter 2019 write it, in float64."""
    found = {}
    for path, start in params.items():
        p, m, v = start.astype(np.float64), 0.0, 0.0
        for t, tree in enumerate(gradients, 1):
            g = tree[path].astype(np.float64)
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
            step = m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps)
            p = p - RATE * (step + (path not in still) * DECAY * p)
        found[path] = p
    return found


def moved(tx, params, gradients) -> dict[Any, Any]:
    tree = unflatten_dict({k: jnp.asarray(x) for k, x in params.items()}, sep="/")
    state = tx.init(tree)
    for g in gradients:
        g = unflatten_dict(g, sep="/")
        updates, state = jax.jit(tx.update)(g, state, tree)
        tree = optax.apply_updates(tree, updates)
    return flatten_dict(tree, sep="/")


def config_of(method, **more):
    c = default_config()
    c.update_from_flattened_dict({
        "method": method, "optimizer.learning_rate": RATE, "optimizer.weight_decay": DECAY,
        "optimizer.schedule": "constant", "optimizer.clip": 0.0, "rm.penalty": 0.0, "rm.keep": 1.0,
        "adalora.initial_rank": 2, "adalora.target": 1, "lora.rank": 1, "adalora.orthogonal": 0.0,
        "adalora.warmup": 0.9, "adalora.final": 0.05, "adalora.every": 1} | more)
    return resolve(c)


@pytest.mark.parametrize(("method", "everything", "more"), [
    ("full", False, {}),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        ("full", True, {}), ("rm_lora", False, {}), ("adalora", False, {}),
        ("rm_lora", False, {"rm.placement": "after"}), ("rm_lora", False, {"rm.placement": "lazy"}),
        ("sora", False, {"sora.sparsity": 0.0}), ("sora", True, {"sora.sparsity": 0.0})))])
def test_steps_equal_adamw_in_numpy(method, everything, more):
    """The gates of SoRA never decay, and have an epsilon of their own."""
    rng = np.random.default_rng(0)
    params, gradients = tree_of(rng), [tree_of(rng) for _ in range(3)]
    tx = methods.optimizer(config_of(method, **more | {"optimizer.decay_all": everything}), 100)
    found = moved(tx, params, gradients)
    expected = adamw(params, gradients, set() if everything else STILL)
    gates = {path for path in SHAPES if method == "sora" and path.endswith("lora_e")}
    expected |= {k: adamw(params, gradients, gates, eps=1e-6)[k] for k in gates}
    for path, value in expected.items():
        np.testing.assert_allclose(found[path], value, rtol=2e-5, atol=2e-6, err_msg=path)


def test_a_mask_of_ones_own_reaches_adamw():
    """The same bits as optax's ``mask``; by default every leaf decays."""
    rng = np.random.default_rng(1)
    params, gradients = tree_of(rng), [tree_of(rng) for _ in range(2)]
    options = {"penalty": 0.0, "keep": 1.0, "clip": None, "weight_decay": DECAY}
    for mask in (None, rm.decayed, lambda tree: jax.tree.map(lambda x: x.ndim > 2, tree)):
        ours = moved(rm.rm_lora(RATE, weight_decay_mask=mask, **options), params, gradients)
        theirs = moved(optax.adamw(RATE, weight_decay=DECAY, mask=mask), params, gradients)
        for path in params:
            np.testing.assert_array_equal(ours[path], theirs[path], err_msg=path)


@pytest.mark.slow
def test_the_authors_step_takes_the_mask_too():
    rng = np.random.default_rng(2)
    params, gradients = tree_of(rng), [{k: 0 * x for k, x in tree_of(rng).items()}]
    tx = rm.authors_exact(RATE, rank=2, k=1, penalty=0.0, weight_decay=DECAY,
                          weight_decay_mask=rm.decayed)
    for path, x in moved(tx, params, gradients).items():
        left = 1.0 if path in STILL else 1 - RATE * DECAY
        np.testing.assert_allclose(x, left * params[path], rtol=1e-6, err_msg=path)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "rm_lora"])
def test_without_decay_the_bits_are_those_of_before(method):
    rng = np.random.default_rng(3)
    params, gradients = tree_of(rng), [tree_of(rng) for _ in range(3)]
    one, other = (
        moved(methods.optimizer(config_of(
            method, **{"optimizer.weight_decay": 0.0, "optimizer.decay_all": everything}), 9),
            params, gradients)
        for everything in (False, True))
    for path in params:
        np.testing.assert_array_equal(one[path], other[path], err_msg=path)
