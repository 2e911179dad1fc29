"""Bottleneck, prefix and masked BitFit as methods of the trainer."""

import jax
import numpy as np
import pytest
from marks import slow, slow_but
from test_train_methods import changed, equal, trained

from rmlora_jax import methods
from rmlora_jax.errors import UserError
from rmlora_jax.optim.masking import step_masks
from rmlora_jax.parallel.mesh import all_devices
from rmlora_jax.sweep.grid import check_config
from rmlora_jax.train import setup
from rmlora_jax.train.config import resolve

# The tiny ViT: 2 layers of width 32, a head of 32 x 10.
HEAD = 32 * 10 + 10


def moved(start, end):
    return {path for path in start if not np.array_equal(start[path], end[path])}


@pytest.mark.parametrize(
    ("name", "own", "count"),
    [
        ("bottleneck", {f"encoder/layers/bottleneck{i}/{side}/kernel" for i in (1, 2)
                        for side in ("down", "up")}, 2 * 2 * (32 * 3 + 3 * 32)),
        ("prefix", {f"encoder/layers/attention/prefix/{side}" for side in ("key", "value")},
         2 * 2 * 6 * 32),
    ],
)
def test_what_is_trained(config, name, own, count):
    config.method, config.bottleneck.width, config.prefix.length = name, 3, 6
    check_config(config)
    job, start, end, history = trained(config, 3)
    assert start.keys() == own | {"head/kernel", "head/bias"}
    assert job.base.trainable_parameters == count + HEAD
    assert moved(start, end) == start.keys()
    assert not {"penalty", "kept_fraction"} & history[0].keys()
    if name == "bottleneck":
        assert all((leaf == 0).all() == ("/up/" in path) for path, leaf in start.items()
                   if path in own)
    other = setup.build(resolve(changed(config, seed=1)), all_devices(limit=1))
    path = "encoder/layers/attention/prefix/key" if name == "prefix" else (
        "encoder/layers/bottleneck1/down/kernel")
    drawn = other.state.trainable
    for part in path.split("/"):
        drawn = drawn[part]
    assert not np.array_equal(drawn, start[path])


CASES = {
    "bitfit": {"rm__unit": "element"},
    "prefix": {"rm__unit": "matrix"},
    "prefix by elements": {"rm__unit": "element"},
    "bottleneck": {"rm__draw": "exact", "rm__keep": 2},
}


def maskable(config):
    run = resolve(config)
    return methods.of(run).maskable(run)


@pytest.mark.parametrize("name", slow_but(list(CASES), "bottleneck"))
def test_the_mask_covers_the_method_and_leaves_the_head(config, name):
    """Behind the optimizer, where what is masked does not move at all."""
    config = changed(config, method=name.split()[0], rm__also=True, rm__start_step=0,
                     rm__placement="after", optimizer__clip=0.0, rm__keep=0.5)
    config = changed(config, **CASES[name])
    check_config(config)
    _, start, end, history = trained(config, 1)
    options = {"unit": config.rm.unit, "draw": config.rm.draw, "start_step": 0,
               "factors": maskable(config)}
    keep = int(config.rm.keep) if config.rm.draw == "exact" else config.rm.keep
    first = setup.build(resolve(config), all_devices(limit=1)).state
    masks = step_masks(first.opt_state, first.trainable, keep, **options)
    masks = {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(mask)
             for path, mask in jax.tree.leaves_with_path(masks)}
    kept = total = 0
    for path in start:
        step = end[path] != start[path]
        assert not (step & ~masks[path]).any(), path
        if path.startswith("head/"):
            assert masks[path].shape == () and step.any()
        else:
            kept += np.broadcast_to(masks[path], start[path].shape).sum()
            total += start[path].size
    np.testing.assert_allclose(history[0]["kept_fraction"], kept / total, rtol=1e-6)
    assert 0 < kept < total
    if name == "bottleneck":
        assert kept / total == 2 / 8
        down = masks["encoder/layers/bottleneck1/down/kernel"]
        up = masks["encoder/layers/bottleneck1/up/kernel"]
        assert down.shape == (2, 1, 8) and (down[:, 0] == up[..., 0]).all()
    if name == "prefix":
        assert masks["encoder/layers/attention/prefix/key"].shape == (2, 1, 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bitfit", "prefix", "bottleneck"])
def test_a_mask_that_keeps_all_is_none(config, name):
    config = changed(config, method=name, rm__keep=1.0, rm__unit="element")
    assert equal(trained(config, 2)[2], trained(changed(config, rm__also=True), 2)[2])


def test_bitfit_masks_no_bias_that_lora_train_names(config):
    from rmlora_jax.optim.factors import find_factors

    tree = {name: {"bias": np.ones(3), "kernel": np.ones((3, 3))}
            for name in ("head", "header", "pooler", "fc1")}
    config = changed(config, method="bitfit", rm__also=True, rm__unit="element",
                     lora__train=r"head|pooler")
    found = [factor.path for factor in find_factors(tree, maskable(config))]
    assert found == ["fc1/bias", "header/bias"]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"method": "lora"}, r"rm.also=True: must be False for lora; it is for bitfit"),
        ({"method": "bitfit"}, r"rm.unit='rank': must be element to mask bitfit"),
        ({"method": "prefix"}, r"rm.unit='rank': must be element or matrix to mask prefix"),
        ({"method": "bottleneck", "rm__draw": "exact", "rm__keep": 9},
         r"rm.keep=9.0: must be at most bottleneck.width 8"),
        ({"method": "bottleneck", "bottleneck__width": 0}, "bottleneck.width=0: must be at least"),
    ],
)
def test_masks_that_cannot_be_are_refused(config, fields, says):
    with pytest.raises(UserError, match=says):
        check_config(changed(config, rm__also=True, **fields))


@pytest.mark.parametrize("name", ["bottleneck", slow("prefix")])
def test_they_fit_bert(tmp_path, name):
    from fixtures.text.tiny import LAYERS, WIDTH, write_model, write_texts

    from rmlora_jax.train.config import default_config

    write_model(tmp_path / "model")
    file = write_texts(tmp_path / "train.jsonl", 60, seed=0)
    config = changed(
        default_config(), method=name, task="text_classification", data__name="texts",
        data__label_key="label", text__columns=("text",), text__train_file=str(file),
        text__cache="", text__max_length=32, model__source=str(tmp_path / "model"),
        model__dtype="float32", lora__train="head|pooler", batch_size=8, steps=2, rm__also=True,
        rm__unit="element")
    check_config(config)
    job, start, end, history = trained(config, 2)
    own = {"bottleneck": 4, "prefix": 2}[name] * 8 * WIDTH * LAYERS
    assert job.base.trainable_parameters == own + (WIDTH + 1) * WIDTH + (WIDTH + 1) * 2
    assert moved(start, end) == start.keys()
    assert history[0]["kept_fraction"] == 1 and 0.4 < history[1]["kept_fraction"] < 0.6


def test_prefix_does_not_fit_deberta(config):
    from rmlora_jax.models import DebertaConfig

    config.method = "prefix"
    with pytest.raises(UserError, match=r"'prefix' does not fit .*relative positions.*=bottleneck"):
        methods.architecture(resolve(config), DebertaConfig())
    config.method = "bottleneck"
    assert methods.architecture(resolve(config), DebertaConfig()).bottleneck_width == 8
