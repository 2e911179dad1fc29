"""The methods of the trainer: what each trains, and its optimizer against optax's own parts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

import rmlora_jax as rm
from rmlora_jax import methods
from rmlora_jax.errors import UserError
from rmlora_jax.parallel.mesh import all_devices, shard
from rmlora_jax.sweep.grid import check_config
from rmlora_jax.train import setup
from rmlora_jax.train.config import resolve


def trained(config, steps=5):
    """(job, trainable at the start, at the end, metrics of every step), on one device."""
    devices = all_devices(limit=1)
    job = setup.build(resolve(config), devices)
    start = flatten_dict(jax.device_get(job.state.trainable), sep="/")
    state, batches, history = job.state, job.feed.train(0), []
    for _ in range(steps):
        state, metrics = job.train_step(state, job.constants, shard(next(batches), devices))
        history.append(jax.device_get(metrics))
    return job, start, flatten_dict(jax.device_get(state.trainable), sep="/"), history


def changed(config, **fields):
    """A copy with other values; ``rm__keep`` is ``rm.keep``."""
    other = config.copy_and_resolve_references()
    other.update_from_flattened_dict({k.replace("__", "."): v for k, v in fields.items()})
    return other


def equal(one, other):
    assert one.keys() == other.keys()
    return all(np.array_equal(one[path], other[path]) for path in one)


@pytest.mark.slow
def test_the_halves_are_rm_lora_without_the_other(config):
    config.rm.penalty, config.rm.keep = 0.5, 0.5
    names = ("rm_lora", "lora", "reg_only", "mask_only")
    ends = {name: trained(changed(config, method=name))[2] for name in names}
    assert equal(ends["reg_only"], trained(changed(config, rm__keep=1.0))[2])
    assert equal(ends["mask_only"], trained(changed(config, rm__penalty=0.0))[2])
    neither = trained(changed(config, rm__penalty=0.0, rm__keep=1.0))[2]
    assert equal(ends["lora"], neither)
    for one, other in (("reg_only", "lora"), ("mask_only", "lora"), ("reg_only", "rm_lora"),
                       ("mask_only", "rm_lora"), ("reg_only", "mask_only")):
        assert not equal(ends[one], ends[other]), (one, other)


@pytest.mark.slow
def test_reg_only_has_no_mask_whatever_rm_says(config):
    config.method = "reg_only"
    plain = trained(config, 3)[2]
    config.rm.draw, config.rm.keep, config.rm.placement = "exact", 2, "lazy"
    check_config(config)
    assert equal(plain, trained(config, 3)[2])


@pytest.mark.slow
def test_the_penalty_makes_factors_orthogonal_and_the_mask_hardly(config):
    config.rm.penalty, config.optimizer.learning_rate = 10.0, 1e-2
    config.optimizer.schedule = "constant"
    found = {}
    for name in ("reg_only", "mask_only"):
        history = trained(changed(config, method=name, steps=40), 40)[3]
        found[name] = float(history[-1]["penalty"]) / float(history[0]["penalty"])
    assert found["reg_only"] < found["mask_only"] / 2, found


def test_bitfit_trains_biases_and_the_head(config):
    config.method = "bitfit"
    job, start, end, history = trained(config)
    assert job.lora[0].target is None and "penalty" not in history[0]
    frozen = flatten_dict(jax.device_get(job.constants.frozen), sep="/")
    assert all(path.endswith("/bias") or path.startswith("head/") for path in start)
    assert not any(path.endswith("bias") or path.startswith("head/") for path in frozen)
    assert {"head/kernel", "head/bias"} < start.keys()
    # Two layers of width 32: query, key, value, out, fc2 and two norms; fc1 of 64. A norm at the
    # end, the patches, a head of 32 x 10.
    assert job.base.trainable_parameters == 2 * (7 * 32 + 64) + 32 + 32 + 330
    # A bias of keys adds the same to all scores of a query: softmax does not see it.
    still = [path for path in start if np.array_equal(start[path], end[path])]
    assert [path for path in still if "key" not in path] == []


@pytest.mark.parametrize("placement", ["before", "after", "lazy"])
@pytest.mark.parametrize("name", ["lora", "rm_lora"])
def test_lora_plus_is_a_learning_rate_of_b(config, name, placement):
    """Against two groups of parameters, each with an AdamW of its own rate."""
    config.method, config.rm.penalty, config.rm.placement = name, 0.0, placement
    config.rm.keep = 0.5 if name == "rm_lora" else 1.0
    config.optimizer.lora_plus, config.optimizer.weight_decay = 16.0, 0.1
    rng = np.random.default_rng(0)

    def tree(scale):
        normal = lambda *shape: jnp.asarray(rng.normal(size=shape) * scale, jnp.float32)  # noqa: E731
        return {"q": {"lora_a": normal(3, 6, 4), "lora_b": normal(3, 4, 5)},
                "head": {"kernel": normal(5, 2)}}

    schedule = methods.learning_rate(resolve(config), 10)
    tx = methods.optimizer(resolve(config), 10)
    adamw = [optax.adamw(lambda step, k=k: k * schedule(step), weight_decay=0.1) for k in (1, 16)]
    labels = {"q": {"lora_a": "one", "lora_b": "b"}, "head": {"kernel": "one"}}
    theirs = optax.multi_transform(dict(zip(("one", "b"), adamw, strict=True)), labels)
    clip = optax.clip_by_global_norm(1.0)
    if name == "rm_lora" and placement == "lazy":
        theirs = optax.chain(clip, rm.lazily_masked(theirs, 0.5))
    elif name == "rm_lora":
        mask = rm.mask_gradients(0.5)
        theirs = optax.chain(clip, *((mask, theirs) if placement == "before" else (theirs, mask)))
    else:
        theirs = optax.chain(clip, theirs)
    params, expected = (tree(1.0),) * 2
    state, their_state = tx.init(params), theirs.init(expected)
    for _ in range(5):
        gradients = tree(0.3)
        updates, state = jax.jit(tx.update)(gradients, state, params)
        params = optax.apply_updates(params, updates)
        wanted, their_state = jax.jit(theirs.update)(gradients, their_state, expected)
        expected = optax.apply_updates(expected, wanted)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-7), updates, wanted)
    assert float(jnp.abs(params["q"]["lora_b"] - expected["q"]["lora_b"]).max()) < 1e-5


@pytest.mark.slow
def test_lora_plus_reaches_the_step_of_a_run(config):
    config.method = "lora"
    _, start, one, _ = trained(config, 1)
    _, _, plus, _ = trained(changed(config, optimizer__lora_plus=4.0), 1)
    for path in start:
        factor = 4 if path.endswith("lora_b") else 1
        np.testing.assert_allclose(
            plus[path] - start[path], factor * (one[path] - start[path]), rtol=1e-4, atol=1e-9)


def test_lora_plus_of_a_method_without_factors_is_refused(config):
    config.method, config.optimizer.lora_plus = "bitfit", 16.0
    with pytest.raises(UserError, match=r"lora_plus=16\.0: must be 1: bitfit has no lora_b"):
        check_config(config)
    config.method, config.optimizer.lora_plus = "lora", 0.0
    with pytest.raises(UserError, match=r"lora_plus=0\.0: must be above 0"):
        check_config(config)


def test_rank_stabilised_scale_and_pissa_are_fields(config):
    config.method, config.lora.rs, config.lora.alpha = "lora", True, 16.0
    job = trained(config, 0)[0]
    assert job.lora[0].scale_of("encoder/layers/mlp/fc1") == 16 / 2  # alpha / sqrt(4)
    base = {}
    for init in ("kaiming", "pissa"):
        job = trained(changed(config, lora__init=init), 0)[0]
        params = rm.join(jax.device_get(job.state.trainable), jax.device_get(job.constants.frozen))
        base[init] = flatten_dict(rm.merge(params, job.lora[0]), sep="/")
        moved = flatten_dict(jax.device_get(job.state.trainable), sep="/")
        large = [np.abs(v).max() for path, v in moved.items() if path.endswith("lora_b")]
        assert (min(large) > 1e-3) == (init == "pissa")
    for path, value in base["kaiming"].items():
        np.testing.assert_allclose(base["pissa"][path], value, atol=1e-5)
