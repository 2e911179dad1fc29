"""A base that devices share: the same numbers, less memory, and the collectives that it costs."""

import json
from collections import Counter

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from configs import quickstart
from rmlora_jax.aot.counts import collectives
from rmlora_jax.errors import UserError
from rmlora_jax.parallel.mesh import all_devices, base_sharding, shard
from rmlora_jax.sweep import train as sweep
from rmlora_jax.sweep.grid import check_config
from rmlora_jax.train import loop, setup
from rmlora_jax.train.config import resolve

LAYERS, KERNELS = 12, 6  # of ViT-Tiny: layers, and the kernels in each that are shared


def quick():
    c = quickstart.get_config()
    c.lora.execution = "factored"  # the default; merged gathers parts of factors, too
    c.batch_size, c.eval_batch_size, c.steps, c.model.dtype = 32, 64, 4, "float32"
    return c


@pytest.fixture
def config():
    return quick()


@pytest.fixture(scope="module")
def alone():
    return follow(quick(), 1)


@pytest.fixture(scope="module")
def shared():
    return follow(quick(), 4)


def follow(config, fsdp, steps=4):
    """The compiled step, the losses, what is trained in the end, and an evaluated batch."""
    config.fsdp = fsdp
    devices = all_devices(fsdp=fsdp)
    job = setup.build(resolve(config), devices)
    batches = job.feed.train(0)
    batch = shard(next(batches), devices)
    step = job.train_step.lower(job.state, job.constants, batch).compile()
    state, losses = job.state, []
    for _ in range(steps):
        state, metrics = step(state, job.constants, batch)
        losses.append(float(metrics["loss"]))
        batch = shard(next(batches), devices)
    rows = shard(next(iter(job.feed.evaluate("validation"))), devices)
    outputs = jax.device_get(job.eval_step(state.trainable, job.constants, rows))
    return job, step, losses, state.trainable, outputs


def equal(alone, shared):
    _, _, losses, trained, outputs = alone
    _, _, shared_losses, shared_trained, shared_outputs = shared
    np.testing.assert_allclose(shared_losses, losses, rtol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-4), trained, shared_trained)
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(shared_trained))
    for name in ("id", "label", "mask", "prediction"):
        np.testing.assert_array_equal(outputs[name], shared_outputs[name])
    np.testing.assert_allclose(shared_outputs["loss"], outputs["loss"], rtol=1e-4, atol=1e-4)


def test_numbers_are_those_of_a_copy_each(alone, shared):
    equal(alone, shared)
    kernel = shared[0].constants.frozen["encoder"]["layers"]["mlp"]["fc1"]["kernel"]
    assert {s.data.shape for s in kernel.addressable_shards} == {(12, 192, 192)}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "sora"])
def test_numbers_of_other_methods(config, method):
    config.method = method
    equal(follow(config, 1), follow(config, 2))


def test_a_layers_weights_are_gathered_twice_and_nothing_else_is(alone, shared):
    job, step, *_ = shared
    times = Counter()
    for found in collectives(step.as_text()):
        times[found.kind] += found.times
    assert times["all-gather"] == 2 * LAYERS * KERNELS  # forward, and for the gradient of the input
    assert set(times) == {"all-gather", "all-reduce"}
    whole = sum(x.nbytes for x in jax.tree.leaves(job.constants.frozen))
    arguments = step.memory_analysis().argument_size_in_bytes
    cut = [x for x in jax.tree.leaves(job.constants.frozen) if not x.sharding.is_fully_replicated]
    saved = sum(x.nbytes for x in cut) * 3 / 4
    assert alone[1].memory_analysis().argument_size_in_bytes - arguments == saved > 0.7 * whole


def test_where_parameters_are_cut():
    devices = all_devices(fsdp=4)
    of = lambda *shape: base_sharding(shape, devices).spec  # noqa: E731
    assert of(12, 192, 768) == PartitionSpec(None, None, "model")
    assert of(12, 768, 192) == PartitionSpec(None, "model", None)
    assert of(768, 768) == PartitionSpec(None, "model")
    assert of(30522, 384) == PartitionSpec(None, "model")  # 30522 is no multiple of 4
    assert of(1024, 255) == PartitionSpec("model", None)
    assert of(12, 255, 1023) == PartitionSpec(None, None, None)  # not along the layers
    assert of(255, 1023) == PartitionSpec(None, None)
    assert of(12, 768) == PartitionSpec(None, None)  # small
    assert base_sharding((768, 768), all_devices()).spec == PartitionSpec(None, None)


def test_groups_are_neighbours_and_must_fit():
    devices = all_devices(fsdp=2)
    assert dict(devices.mesh.shape) == {"data": 4, "model": 2} and devices.count == 8
    assert devices.mesh.devices.ravel().tolist() == all_devices().mesh.devices.tolist()
    with pytest.raises(UserError, match=r"fsdp=3 does not divide the 8 devices.*1, 2, 4, 8"):
        all_devices(fsdp=3)


def test_pmap_is_refused(config):
    config.fsdp, config.parallel = 2, "pmap"
    with pytest.raises(UserError, match=r"config\.fsdp=2: must be 1 where parallel is pmap"):
        check_config(config)


@pytest.mark.slow
def test_a_run_and_a_sweep_from_start_to_end(config, tmp_path):
    alone = loop.train(config, tmp_path / "alone")
    config.fsdp = 4
    shared = loop.train(config, tmp_path / "shared")
    assert shared["test"]["loss"] == pytest.approx(alone["test"]["loss"], rel=1e-3)
    config.sweep.seeds = 2
    sweep.train(config, tmp_path / "sweep")
    first = json.loads((tmp_path / "sweep" / "seed=0" / "summary.json").read_text())
    assert first["test"]["loss"] == pytest.approx(alone["test"]["loss"], rel=1e-3)
