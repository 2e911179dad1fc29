"""The mapped step against plain single-device code, and against itself on other device counts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rmlora_jax as rm
from rmlora_jax import methods
from rmlora_jax.data import augment, load_images
from rmlora_jax.errors import UserError
from rmlora_jax.hub import load_vit
from rmlora_jax.models import ViT
from rmlora_jax.parallel.mesh import all_devices, shard
from rmlora_jax.sweep.grid import check_config
from rmlora_jax.tasks.task import check_labels, measured
from rmlora_jax.train import evaluate, loop, setup
from rmlora_jax.train.config import changes, resolve

STEPS = 20


def follow(config, devices, steps=STEPS):
    """Every number of the first steps: ids, masks, losses and counts."""
    job = setup.build(resolve(config), devices)
    state = job.state
    seen = {"ids": [], "masks": [], "loss": [], "correct": [], "kept": []}
    options = {"start_step": config.rm.start_step}
    batches = job.feed.train(0)
    for _ in range(steps):
        batch = next(batches)
        if config.method == "rm_lora":
            masks = rm.step_masks(state.opt_state, state.trainable, config.rm.keep, **options)
            seen["masks"].append([np.asarray(m) for m in jax.tree.leaves(masks)])
        state, metrics = job.train_step(state, job.constants, shard(batch, devices))
        seen["ids"].append(batch["id"])
        seen["loss"].append(float(metrics["loss"]))
        seen["correct"].append(float(metrics["accuracy"]) * config.batch_size)
        seen["kept"].append(float(metrics.get("kept_fraction", 1.0)))
    return seen, job, state


@pytest.fixture
def one_device(config):
    return follow(config, all_devices(limit=1))


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["mesh", "pmap"])
def test_eight_devices_equal_one(config, one_device, parallel):
    one, _, _ = one_device
    devices = all_devices(parallel)
    assert devices.count == 8
    eight, _job, _state = follow(config, devices)
    np.testing.assert_array_equal(one["ids"], eight["ids"])
    np.testing.assert_array_equal(one["correct"], eight["correct"])
    np.testing.assert_array_equal(one["kept"], eight["kept"])
    drawn = 0
    for ours, theirs in zip(one["masks"], eight["masks"], strict=True):
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(a, b)
            drawn += int((~a).sum())
    assert drawn > 100  # the masks did hide something
    np.testing.assert_allclose(one["loss"], eight["loss"], rtol=1e-5)


@pytest.mark.slow
def test_evaluation_counts_are_equal_on_every_device_count(config, one_device):
    _, job, state = one_device
    results = []
    trainable = jax.device_get(state.trainable)
    for devices in (all_devices(limit=1), all_devices(), all_devices("pmap")):
        other = setup.build(resolve(config), devices)
        compiled = map(evaluate.Compiled, (other.train_step, other.eval_step))
        steps = evaluate.Steps(*compiled)
        results += evaluate.evaluate(steps, trainable, other, "test")
    for other in results[1:]:
        np.testing.assert_array_equal(results[0].predictions, other.predictions)
        np.testing.assert_array_equal(results[0].labels, other.labels)
        np.testing.assert_allclose(results[0].losses, other.losses, rtol=1e-5)
    assert len(results[0].ids) == 360  # of 384 rows, the padding left out
    assert (np.diff(results[0].ids) == 1).all()

    # By hand, all 360 at once.
    digits = load_images("digits")
    pixels = np.stack([digits.test[i]["image"] for i in range(360)])
    labels = np.array([digits.test[i]["label"] for i in range(360)])
    params = rm.join(trainable, jax.device_get(job.constants.frozen))
    pretrained = load_vit(config.model.source, num_classes=10)
    model = rm.adapt(ViT(pretrained.config, 10), job.lora[0])
    inputs = augment(jnp.asarray(pixels), image_size=16, train=False)
    logits = model.apply({"params": params}, inputs)
    np.testing.assert_array_equal(results[0].labels, labels)
    np.testing.assert_array_equal(results[0].predictions, np.asarray(logits).argmax(-1))
    log_p = np.asarray(jax.nn.log_softmax(logits))[np.arange(360), labels]
    np.testing.assert_allclose(results[0].losses, -log_p, rtol=1e-4, atol=1e-6)
    figures = measured(results[0], ("accuracy",))
    assert figures["accuracy"] == np.mean(np.asarray(logits).argmax(-1) == labels)
    np.testing.assert_allclose(figures["loss"], -log_p.mean(), rtol=1e-4)


@pytest.mark.slow
def test_lora_steps_equal_plain_optax(config):
    """Five steps of method lora against a loop with optax and a loss in a few lines."""
    config.method = "lora"
    config.data.crop, config.data.flip = "none", False
    config.optimizer.label_smoothing = 0.1
    config.optimizer.weight_decay = 0.01
    devices = all_devices()
    seen, _job, state = follow(config, devices, steps=5)

    start = setup.build(resolve(config), devices)
    trainable = jax.device_get(start.state.trainable)
    frozen = jax.device_get(start.constants.frozen)
    model = rm.adapt(ViT(load_vit(config.model.source, num_classes=10).config, 10), start.lora[0])
    digits = load_images("digits")
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(
            optax.linear_schedule(1e-3, 0, STEPS), weight_decay=0.01, mask=rm.decayed
        ),
    )
    opt_state = tx.init(trainable)

    def loss_fn(trainable, pixels, labels):
        inputs = augment(pixels, image_size=16, train=False)
        logits = model.apply({"params": rm.join(trainable, frozen)}, inputs)
        log_p = logits - jnp.log(jnp.sum(jnp.exp(logits), -1, keepdims=True))
        targets = 0.9 * (labels[:, None] == jnp.arange(10)) + 0.1 / 10
        return -jnp.mean(jnp.sum(targets * log_p, -1))

    losses = []
    for ids in seen["ids"]:
        pixels = np.stack([digits.train[int(i)]["image"] for i in ids])
        labels = np.array([digits.train[int(i)]["label"] for i in ids])
        loss, grads = jax.value_and_grad(loss_fn)(trainable, pixels, labels)
        updates, opt_state = tx.update(grads, opt_state, trainable)
        trainable = optax.apply_updates(trainable, updates)
        losses.append(float(loss))
    np.testing.assert_allclose(seen["loss"], losses, rtol=1e-5)
    for ours, theirs in zip(
        jax.tree.leaves(jax.device_get(state.trainable)), jax.tree.leaves(trainable), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.slow
def test_streamed_and_resident_data_give_the_same_run(config, one_device):
    config.data.mode = "stream"
    streamed, _, _ = follow(config, all_devices(limit=1))
    np.testing.assert_array_equal(one_device[0]["ids"], streamed["ids"])
    np.testing.assert_allclose(one_device[0]["loss"], streamed["loss"], rtol=1e-6)


def test_a_later_start_sees_the_same_batches(config):
    job = setup.build(resolve(config), all_devices())
    batches = job.feed.train(0)
    whole = [next(batches)["id"] for _ in range(120)]  # more than one pass
    later = job.feed.train(97)
    np.testing.assert_array_equal(whole[97:], [next(later)["id"] for _ in range(23)])


@pytest.mark.slow
def test_dropout_acts_in_training_only(config):
    config.lora.dropout = 0.5
    devices = all_devices(limit=1)
    with_dropout, job, state = follow(config, devices, steps=4)
    config.lora.dropout = 0.0
    without, plain, _ = follow(config, devices, steps=4)
    assert with_dropout["loss"][0] == without["loss"][0]  # B = 0 hides it at first
    assert with_dropout["loss"][3] != without["loss"][3]
    batch = shard(next(job.feed.evaluate("test")), devices)
    trainable = jax.tree.map(lambda x: x + 0.02, jax.device_get(state.trainable))
    ours = job.eval_step(trainable, job.constants, batch)
    theirs = plain.eval_step(trainable, plain.constants, batch)
    np.testing.assert_array_equal(ours["loss"], theirs["loss"])


@pytest.mark.slow
def test_bfloat16_base_trains_in_float32(config):
    config.model.base_dtype = config.model.dtype = "bfloat16"
    seen, job, state = follow(config, all_devices(limit=1), steps=10)
    kinds = {x.dtype for x in jax.tree.leaves(job.constants.frozen)}
    assert kinds == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves(state.trainable)} == {jnp.dtype("float32")}
    assert np.mean(seen["loss"][-3:]) < np.mean(seen["loss"][:3])


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_learning_rate(config, schedule):
    config.optimizer.schedule, config.optimizer.warmup = schedule, 0.25
    rate = methods.learning_rate(resolve(config), 100)
    t = np.arange(100)
    after = (t - 25) / 75
    cosine = 0.5 * (1 + np.cos(np.pi * after))
    shape = {"linear": 1 - after, "cosine": cosine, "constant": 1 + 0 * t}
    expected = 1e-3 * np.where(t < 25, t / 25, shape[schedule])
    np.testing.assert_allclose([float(rate(s)) for s in t], expected, atol=1e-9)


def test_all_mistakes_are_listed_at_once(config):
    config.method, config.batch_size, config.rm.keep = "lorra", 0, 0.0
    config.lora.target = "("
    with pytest.raises(UserError) as raised:
        check_config(config)
    text = str(raised.value)
    assert "did you mean lora?" in text
    assert "config.batch_size=0" in text and "config.rm.keep=0.0" in text
    assert "config.lora.target='('" in text and "not a regular expression" in text


def test_differences_name_what_matters(config):
    other = config.copy_and_resolve_references()
    other.optimizer.learning_rate = 5.0
    other.log_every = 7  # changes no number
    found, _ = changes(config.to_dict(), other.to_dict())
    assert found == ["optimizer.learning_rate: 0.001 -> 5.0"]


def test_labels_out_of_range_are_named():
    with pytest.raises(UserError, match=r"digits, split train: example 2 has label 9.* 8 classes"):
        check_labels(np.array([0, 1, 9]), [*"abcdefgh"], "digits, split train")


def test_mean_of_metrics():
    rows = [{"loss": np.float32(1)}, {"loss": np.float32(2)}, {"loss": np.float32(6)}]
    assert loop.mean_of(rows) == {"train/loss": 3.0}


def test_a_batch_that_the_devices_cannot_share_is_refused(config, tmp_path):
    config.batch_size = 12
    with pytest.raises(UserError, match=r"batch_size=12 .* 8 devices; type --config\.batch_size="):
        loop.train(config, tmp_path / "new")
    assert not (tmp_path / "new").exists()
