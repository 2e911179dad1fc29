"""What runs leave for use elsewhere: adapters, whole models, and runs that begin from adapters."""

import json

import jax
import numpy as np
import pytest
from fixtures.text.tiny import config_of, write_model, write_texts
from flax.traverse_util import flatten_dict
from marks import slow
from test_train_methods import changed

import rmlora_jax as rm
from rmlora_jax.errors import UserError
from rmlora_jax.hub import load_peft, load_pretrained, read_info, stored_labels
from rmlora_jax.hub.peft_config import read_config
from rmlora_jax.parallel import mesh
from rmlora_jax.parallel.mesh import all_devices, shard
from rmlora_jax.sweep import train as sweep
from rmlora_jax.sweep.grid import check_config
from rmlora_jax.train import checkpoint, finished, loop, setup
from rmlora_jax.train.config import resolve


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    for module in (loop, sweep):
        one = lambda name, **_: mesh.all_devices(name, limit=1)  # noqa: E731
        monkeypatch.setattr(module, "all_devices", one)


def short(config, **fields):
    config = changed(config, **fields)
    config.steps, config.eval_every, config.log_every = 6, 3, 3
    config.optimizer.learning_rate = 1e-2
    config.compilation_cache = ""
    return config


def model_logits(base, params, lora, images):
    model = base.family.model(base.config, base.num_labels)
    model = model if lora is None else rm.adapt(model, lora)
    return np.asarray(jax.jit(lambda p, x: model.apply({"params": p}, x))(params, images))


def images_of(base, seed=3):
    size = base.image_size
    return np.random.default_rng(seed).normal(size=(4, size, size, 3)).astype(np.float32)


def restored(config, workdir):
    """Logits of a run's best checkpoint, read through orbax and the trainer's own model."""
    job = setup.build(resolve(config), all_devices(limit=1))
    with checkpoint.open_checkpoints(workdir) as manager:
        state = checkpoint.restore(manager, job.state, checkpoint.by_score(manager)[0])
    params = rm.join(state.trainable, job.constants.frozen)
    base = job.problem.pretrained
    model = rm.adapt(job.problem.model, job.lora[0])
    return np.asarray(jax.jit(lambda p, x: model.apply({"params": p}, x))(params, images_of(base)))


@pytest.mark.parametrize("fields", [
    {"method": "rm_lora"},
    slow({"method": "adalora", "adalora__initial_rank": 6, "adalora__every": 1}),
    slow({"method": "lora", "lora__init": "pissa", "lora__rs": True}),
], ids=["rm_lora", "adalora", "pissa"])
def test_a_run_leaves_its_adapter_and_its_whole_model(config, tmp_path, fields):
    config = short(config, **fields)
    summary = loop.train(config, tmp_path)
    folder = tmp_path / "adapter"
    info = read_info(folder)
    assert info.labels == tuple("0123456789") and stored_labels(folder) == 10
    assert (info.task, info.image_size, info.stored_size) == ("image_classification", 16, None)
    assert info.about["step"] == summary["test_best"]["step"]
    assert info.about["metrics"]["accuracy"] == summary["test_best"]["accuracy"]
    assert read_config(folder).base == config.model.source
    card = (folder / "README.md").read_text()
    assert f"| accuracy | {summary['test_best']['accuracy']:.4f} |" in card
    assert 'ViT' not in card.splitlines()[0] and f'base_model: "{config.model.source}"' in card

    expected = restored(config, tmp_path)
    base = load_pretrained(config.model.source, num_labels=10, image_size=16)
    params, lora = load_peft(folder, base)
    np.testing.assert_allclose(
        model_logits(base, params, lora, images_of(base)), expected, atol=2e-5)
    untouched = model_logits(base, base.params, None, images_of(base))
    assert np.abs(untouched - expected).max() > 1e-2

    merged = load_pretrained(finished.export_merged(tmp_path))
    assert merged.labels == info.labels and merged.image_size == 16 and not merged.new
    np.testing.assert_allclose(
        model_logits(merged, merged.params, None, images_of(base)), expected, atol=2e-5)
    assert "fine-tuned" in (tmp_path / "merged" / "README.md").read_text()

    (tmp_path / "summary.json").unlink()  # the best step of a run that is not finished
    base, params, lora, _ = finished.unfinished(tmp_path)
    np.testing.assert_allclose(
        model_logits(base, params, lora, images_of(base)), expected, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "head", "bitfit"])
def test_methods_without_factors_leave_a_whole_model(config, tmp_path, method):
    config = short(config, method=method)
    loop.train(config, tmp_path)
    assert not (tmp_path / "adapter").exists()
    merged = load_pretrained(finished.export_merged(tmp_path))
    np.testing.assert_array_equal(
        model_logits(merged, merged.params, None, images_of(merged)), restored(config, tmp_path))


@pytest.mark.slow
def test_what_has_no_model_in_transformers_is_refused(config, tmp_path):
    with pytest.raises(UserError, match=r"holds no finished run; type python run.py --config="):
        finished.export_merged(tmp_path)
    loop.train(short(config, method="bottleneck"), tmp_path)
    with pytest.raises(UserError, match="method bottleneck has no model in transformers"):
        finished.export_merged(tmp_path)


@pytest.mark.slow
def test_a_run_killed_before_its_summary_writes_the_adapter_again(config, tmp_path):
    config = short(config)
    loop.train(config, tmp_path)
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    first = weights.read_bytes()
    (tmp_path / "summary.json").unlink()
    weights.write_bytes(b"")
    loop.train(config, tmp_path)
    assert weights.read_bytes() == first


@pytest.mark.slow
def test_every_run_of_a_sweep_leaves_the_adapter_of_the_single_run(config, tmp_path):
    config = short(config, sweep__seeds=2, sweep__grid="{'alpha': (8.0, 16.0)}")
    sweep.train(config, tmp_path / "many")
    name = "seed=1,alpha=8"
    single = short(config, sweep__seeds=0, sweep__grid="", seed=1, data__seed=0, lora__alpha=8.0)
    loop.train(single, tmp_path / "one")
    base = load_pretrained(config.model.source, num_labels=10, image_size=16)
    one, lora = load_peft(tmp_path / "one" / "adapter", base)
    many, same = load_peft(tmp_path / "many" / name / "adapter", base)
    assert lora == same and lora.scale_of("encoder/layers/mlp/fc1") == 2.0
    one, many = flatten_dict(one), flatten_dict(many)
    assert one.keys() == many.keys()
    for path in one:
        np.testing.assert_allclose(one[path], many[path], atol=1e-4)


def first_metrics(config):
    devices = all_devices(limit=1)
    job = setup.build(resolve(config), devices)
    batch = shard(next(iter(job.feed.train(0))), devices)
    start = jax.device_get(job.state.trainable)
    _, metrics = job.train_step(job.state, job.constants, batch)
    return job, start, jax.device_get(metrics)


@pytest.mark.slow
def test_a_run_goes_on_from_an_adapter(config, tmp_path, capsys):
    first = short(config, method="lora")
    loop.train(first, tmp_path / "first")
    again = short(config, model__adapter=str(tmp_path / "first" / "adapter"), lora__dropout=0.1)
    check_config(again)
    job, start, _ = first_metrics(again)
    best = checkpoint.best_trainable(tmp_path / "first")
    best, start = flatten_dict(best), flatten_dict(start)
    assert best.keys() == start.keys()
    for path in best:
        np.testing.assert_array_equal(best[path], start[path])
    assert job.lora[0].dropout == 0.1 and job.lora[0].scale_of("encoder/layers/mlp/fc2") == 4.0
    assert any("goes on from" in note and "rank=4" in note for note in job.problem.notes)
    again.lora.dropout = 0.0
    loop.train(again, tmp_path / "second")
    losses = [json.loads(line)["train/loss"] for name in ("first", "second")
              for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
              if "train/loss" in line]
    assert losses[2] < losses[0]  # it does not begin anew
    assert (tmp_path / "second" / "adapter" / "adapter_config.json").exists()


def test_dora_leaves_an_adapter_of_peft_and_goes_on_from_it(config, tmp_path):
    first = short(config, method="dora")
    first.steps = first.eval_every = 2
    loop.train(first, tmp_path / "first")
    folder = tmp_path / "first" / "adapter"
    assert json.loads((folder / "adapter_config.json").read_text())["use_dora"] is True
    base = load_pretrained(config.model.source, num_labels=10, image_size=16)
    params, lora = load_peft(folder, base)
    assert type(lora) is rm.DoRA
    np.testing.assert_allclose(
        model_logits(base, params, lora, images_of(base)), restored(first, tmp_path / "first"),
        atol=2e-5)

    again = short(config, method="dora", model__adapter=str(folder))
    check_config(again)
    job = setup.build(resolve(again), all_devices(limit=1))
    assert type(job.lora[0]) is rm.DoRA
    best = flatten_dict(checkpoint.best_trainable(tmp_path / "first"), sep="/")
    start = flatten_dict(jax.device_get(job.state.trainable), sep="/")
    assert best.keys() == start.keys()
    weights = flatten_dict(base.params, sep="/")
    for path in best:
        np.testing.assert_array_equal(best[path], start[path])
        if path.endswith("lora_m"):  # trained, from the norms of the base
            begun = np.linalg.norm(weights[path.replace("lora_m", "kernel")], axis=-2)
            assert 1e-3 < np.abs(best[path] - begun).max() < 0.1
    with pytest.raises(UserError, match=r"DoRA factors, which .* lora .*method=dora"):
        setup.build(resolve(changed(again, method="lora")), all_devices(limit=1))
    with pytest.raises(UserError, match=r"lora\.init.*another than pissa for dora"):
        check_config(changed(first, lora__init="pissa"))


@pytest.mark.slow
def test_factors_go_on_to_a_task_of_other_classes(config, tmp_path):
    loop.train(short(config, method="lora"), tmp_path / "first")
    other = short(config, model__adapter=str(tmp_path / "first" / "adapter"), data__classes=4)
    _, start, metrics = first_metrics(other)
    assert start["head"]["kernel"].shape == (32, 4) and np.isfinite(metrics["loss"])
    best = flatten_dict(checkpoint.best_trainable(tmp_path / "first"), sep="/")
    for path, x in flatten_dict(start, sep="/").items():
        if "lora_" in path:
            np.testing.assert_array_equal(x, best[path])


@pytest.mark.parametrize(("fields", "words"), [
    ({"method": "adalora"}, "empty for adalora; it is for rm_lora, lora, reg_only, mask_only"),
    ({"method": "full"}, "empty for full; it is for rm_lora"),
    ({"sweep__seeds": 2}, r"empty for sweep\.\*, whose runs begin with factors of"),
])
def test_what_cannot_go_on_from_an_adapter_is_refused(config, fields, words):
    with pytest.raises(UserError, match=words):
        check_config(short(config, model__adapter="somewhere", **fields))
    with pytest.raises(UserError, match=r"somewhere has no adapter_model.safetensors"):
        setup.build(resolve(short(config, model__adapter="somewhere")), all_devices(limit=1))


@pytest.mark.slow
def test_a_run_on_texts_leaves_labels_and_lengths(tmp_path):
    write_model(tmp_path / "model")
    for name, n in (("train", 96), ("test", 24)):
        write_texts(tmp_path / f"{name}.jsonl", n, seed=n)
    config = config_of(tmp_path, 4)
    config.method, config.compilation_cache, config.lora.train = "lora", "", "head"
    loop.train(config, tmp_path / "run")
    info = read_info(tmp_path / "run" / "adapter")
    labels = sorted({json.loads(line)["label"] for line in
                     (tmp_path / "train.jsonl").read_text().splitlines()})
    assert info.labels == tuple(map(str, labels)) and info.columns == tuple(config.text.columns)
    assert info.max_length == config.text.max_length
    merged = load_pretrained(finished.export_merged(tmp_path / "run"))
    assert merged.labels == info.labels and not merged.new
    assert (tmp_path / "run" / "merged" / "vocab.txt").exists()
