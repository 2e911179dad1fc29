"""A run is its data and its base: what is recorded, what is refused, and what goes on all the same.

What a run read is changed behind its back, the way a person would do it."""

import hashlib
import json
import os
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from faults.small import check_same_end, config_of, on_one_device, train
from fixtures.text import tiny
from marks import slow_but
from PIL import Image
from safetensors.numpy import load_file, save_file

import rmlora_jax as rm
from rmlora_jax import methods
from rmlora_jax.data import TextSplit, content_of, load_images
from rmlora_jax.data.subsets import fingerprint
from rmlora_jax.errors import UserError
from rmlora_jax.parallel.mesh import all_devices
from rmlora_jax.tasks import TASKS
from rmlora_jax.tasks.task import Opening
from rmlora_jax.train import checkpoint, finished, loop, setup
from rmlora_jax.train.config import changes, default_config, resolve, ways_on
from rmlora_jax.train.record import _adapter, check_record, record_of
from rmlora_jax.train.workdir import check_workdir

WORDS = ("neg", "pos")


def write_rows(path, words=WORDS, n=40, edit=lambda rows: rows):
    rng = np.random.default_rng(0)
    rows = [(" ".join(rng.choice(tiny.WORDS[2:], 5)), words[i % 2]) for i in range(n)]
    path.write_text("text,label\n" + "".join(f"{text},{word}\n" for text, word in edit(rows)))
    return path


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    root = tmp_path_factory.mktemp("record")
    tiny.write_model(root / "model")
    write_rows(root / "a.csv")
    return root


def text_config(root):
    c = tiny.config_of(root, 4)
    c.text.train_file = str(root / "a.csv")
    return c


def read(config):
    """The record of a run of this config, of which nothing but data and model is opened."""
    run, devices = resolve(config), all_devices(limit=1)
    problem = TASKS[run.task].open(run, Opening(devices, jax.random.key(0), checkpoint.read_base))
    return record_of(SimpleNamespace(config=run, problem=problem, feed=problem.open_feed()))


@pytest.fixture(scope="module")
def first(there):
    return read(text_config(there))


@pytest.fixture
def begun(first, tmp_path):
    """The folder of a run on ``there`` with a checkpoint of step 2."""
    (tmp_path / "run" / "checkpoints" / "2").mkdir(parents=True)
    (tmp_path / "run" / "data.json").write_text(json.dumps(first))
    return tmp_path / "run"


def copy_of(there, tmp_path):
    return shutil.copytree(there, tmp_path / "copy")


# Texts


def test_the_record_of_texts_in_plain_hashlib(first, there):
    assert first["classes"] == ["neg", "pos"]
    assert first["examples"] == {"train": 32, "validation": 4, "test": 4}
    assert first["content"].keys() == {"train", "validation", "test", "tokens"}
    split = TextSplit((["a", "é"], ["b", ""]), np.array([1, 0], np.int32), np.arange(2))
    plain = np.array([1, 0], "<i4").tobytes() + b"".join(
        len(data).to_bytes(8, "little") + data for data in (b"a", "é".encode(), b"b", b""))
    assert content_of(split) == hashlib.sha256(plain).hexdigest()


def test_files_that_moved_are_the_same_data(first, there, begun, tmp_path):
    root = copy_of(there, tmp_path)
    os.utime(root / "a.csv", (0, 0))
    again = read(text_config(root))
    assert again == first
    check_record(begun, again)


def swapped_words(root):
    (root / "model" / "vocab.txt").write_text("\n".join(
        [*tiny.SPECIAL, *tiny.WORDS[:2], *reversed(tiny.WORDS[2:])]))


def other_weights(root):
    file = root / "model" / "model.safetensors"
    save_file({k: x * 1.001 for k, x in load_file(file).items()}, file)


CHANGES = {
    "classes": (lambda root: write_rows(root / "a.csv", ("pos", "zzz")),
                "classes: neg, pos -> pos, zzz"),
    "rows": (lambda root: write_rows(root / "a.csv", n=50),
             "examples of train: 32 -> 41; examples of test: 4 -> 5; other examples in train, "
             "validation, test"),
    "texts": (lambda root: write_rows(root / "a.csv", edit=lambda rows: [(f"{t} w1", w)
                                                                         for t, w in rows]),
              "other examples in train, validation, test"),
    "tokenizer": (swapped_words, "model.source has another tokenizer"),
    "weights": (other_weights, "model.source has other weights"),
}


@pytest.mark.parametrize("name", slow_but([*CHANGES], "classes", "tokenizer"))
def test_other_data_or_another_base_are_refused(there, begun, tmp_path, name):
    root, (change, said) = copy_of(there, tmp_path), CHANGES[name]
    change(root)
    with pytest.raises(UserError) as raised:
        check_record(begun, read(text_config(root)))
    first, advice = str(raised.value).splitlines()
    assert first == f"{begun} holds a run that read something else: {said}"
    assert advice.startswith("Put that back") and "another --workdir" in advice


def test_another_adapter_to_begin_from(first, begun, tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    hashes = []
    for alpha in (8, 16):
        (folder / "adapter_config.json").write_text(f'{{"lora_alpha": {alpha}}}')
        hashes.append(_adapter(str(folder)))
    (begun / "data.json").write_text(json.dumps(first | hashes[0]))
    check_record(begun, first | hashes[0])
    with pytest.raises(UserError, match=r"something else: model\.adapter has other content"):
        check_record(begun, first | hashes[1])


def test_a_label_that_was_corrected_is_other_data(first):
    split = TextSplit((["a", "b"],), np.array([0, 1], np.int32), np.arange(2))
    assert content_of(split) != content_of(split._replace(labels=np.array([1, 1], np.int32)))


def test_nothing_learnt_yet_and_runs_of_earlier_versions_go_on(first, begun, capsys):
    other = first | {"classes": ["a", "b"]}
    (begun / "checkpoints" / "2").rename(begun / "checkpoints" / "2.orbax-checkpoint-tmp-1")
    check_record(begun, other)  # killed before its first checkpoint
    (begun / "checkpoints" / "2").mkdir()
    (begun / "data.json").unlink()
    check_record(begun, other)
    assert capsys.readouterr().out.count("\n") == 1
    (begun / "data.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        check_record(begun, other)


# Images


def write_image(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(path)


def test_an_image_replaced_by_one_of_the_same_size_and_time(tmp_path):
    for i in range(8):
        write_image(tmp_path / "a" / ["cat", "dog"][i % 2] / f"{i}.bmp", 20 * i)
    shutil.copytree(tmp_path / "a", tmp_path / "b")

    def found(folder):
        data = load_images("folder", data_dir=tmp_path / folder, validation=2)
        return [content_of(split) for split in (data.train, data.validation, data.test)]

    before = found("a")
    assert found("b") == before and len(set(before)) == 3  # wherever it lies
    kept = fingerprint(load_images("folder", data_dir=tmp_path / "b").train, 8)
    for file in tmp_path.glob("b/*/*.bmp"):
        times = file.stat().st_atime_ns, file.stat().st_mtime_ns
        write_image(file, 255)
        os.utime(file, ns=times)
    assert not set(found("b")) & set(before)
    # Decoded images of before are not taken from the cache either.
    assert fingerprint(load_images("folder", data_dir=tmp_path / "b").train, 8) != kept
    digits = load_images("digits", validation=0.1).train
    assert content_of(digits) == content_of(load_images("digits", validation=0.1).train)


def test_a_large_split_is_known_by_a_sample(monkeypatch):
    from rmlora_jax.data import ArraySource, content

    monkeypatch.setattr(content, "READ", 64 * 10)
    images = np.zeros((100, 8, 8, 1), np.uint8)
    first = np.random.RandomState(0).permutation(100)[:9].tolist()  # 66 bytes or so each
    whole = content_of(ArraySource(images, np.zeros(100, int)))
    for i, same in ((first[0], False), (next(i for i in range(100) if i not in first), True)):
        other = images.copy()
        other[i] = 1
        assert (content_of(ArraySource(other, np.zeros(100, int))) == whole) is same


# Paths and lengths


def test_a_path_written_in_another_way_is_the_same_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "link").symlink_to(tmp_path)
    old = default_config().to_dict() | {"model": default_config().model.to_dict()}
    old["text"]["train_file"], old["model"]["source"] = "a.csv", "model"
    for train_file, source in [("./a.csv", "model/"), ("~/a.csv", "~/model"),
                               (f"{tmp_path}/a.csv", "x/../model"), ("link/a.csv", "model")]:
        new = default_config()
        new.text.train_file, new.model.source = train_file, source
        assert changes(old, new.to_dict()) == ([], [])
    new.text.train_file = "b.csv"
    refused, free = changes(old, new.to_dict())
    assert refused == ["text.train_file: 'a.csv' -> 'b.csv'"] and not free
    # With a record, the content decides; but no file at all is another config.
    none = default_config().to_dict()
    assert changes(old, none, recorded=True)[0][-1] == "text.train_file: 'a.csv' -> None"
    refused, free = changes(old, new.to_dict(), recorded=True)
    assert free == ["text.train_file: 'a.csv' -> 'b.csv'"] and not refused


def test_what_a_finished_run_can_do(tiny_vit, tmp_path):
    config = config_of(tiny_vit)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    begin = f"--config.model.adapter={adapter} and another --workdir begin a new run"
    assert "steps cannot grow: the rates of" in (said := ways_on(resolve(config), tmp_path))
    assert begin in said
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    config.steps = 99
    with pytest.raises(UserError) as raised:
        check_workdir(resolve(config), tmp_path)
    assert len(str(raised.value).splitlines()) == 2 and begin in str(raised.value)
    config.optimizer.schedule = "constant"
    assert "a larger --config.steps trains it longer" in ways_on(resolve(config), tmp_path)
    config.method = "full"
    said = ways_on(resolve(config), tmp_path)
    assert f"--export=merged, --config.model.source={tmp_path / 'merged'} and another" in said


# A run that is not finished


@pytest.fixture(scope="module")
def stopped(tiny_vit, tmp_path_factory):
    """A run with checkpoints of three steps, the second the best, and what that one holds."""
    workdir = tmp_path_factory.mktemp("stopped")
    job = setup.build(resolve(config_of(tiny_vit)), all_devices(limit=1))
    with checkpoint.open_checkpoints(workdir) as manager:
        kept = {}
        for step, accuracy in ((4, 0.5), (8, 0.75), (12, 0.25)):
            trained = jax.tree.map(lambda x, s=step: x + s / 100, job.state.trainable)
            state = job.state._replace(step=job.state.step + step, trainable=trained)
            kept[step] = jax.device_get(trained)
            figures = checkpoint.scored({"accuracy": accuracy, "loss": 1.0}, "accuracy")
            checkpoint.write(manager, step, state, figures)
    loop.write_beginning(workdir, job.base.config, record_of(job.base), job.problem.info)
    return workdir, job, kept[8]


def test_a_run_that_is_not_finished_gives_its_best_step(stopped, capsys):
    workdir, job, best = stopped
    before = sorted(p.relative_to(workdir) for p in workdir.rglob("*"))
    model = finished.model_of(workdir)
    assert "not finished; its model is that of step 8, the best" in capsys.readouterr().out
    assert sorted(p.relative_to(workdir) for p in workdir.rglob("*")) == before
    image = np.random.default_rng(0).integers(0, 255, (1, 8, 8, 3), np.uint8)
    params = finished.joined(job.problem.pretrained.params, best)
    adapted = rm.adapt(model.base.family.model(model.base.config, model.base.num_labels),
                       methods.description(job.base.config))
    ((_, (pixels,)),) = model.read(image, 1, None)[1]
    expected = adapted.apply({"params": params}, pixels, train=False)
    np.testing.assert_allclose(model.logits(image), expected, rtol=1e-5, atol=1e-5)
    folder = finished.export_merged(workdir)
    info = json.loads((folder / "rmlora.json").read_text())
    assert info["about"]["step"] == 8 and info["labels"] == [str(i) for i in range(10)]
    whole = load_file(folder / "model.safetensors")["classifier.bias"]
    np.testing.assert_allclose(whole, best["head"]["bias"], rtol=1e-6)


def test_a_run_without_a_checkpoint_or_of_an_earlier_version(stopped, tmp_path):
    workdir, *_ = stopped
    shutil.copytree(workdir, tmp_path / "run")
    (tmp_path / "run" / "rmlora.json").unlink()
    with pytest.raises(UserError, match=r"no rmlora\.json: .*earlier version .*same command goes"):
        finished.model_of(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(UserError, match=r"holds no finished run; type python run\.py"):
        finished.export_merged(tmp_path / "run")


@pytest.mark.slow
def test_a_run_goes_on_where_its_data_lie_now(tiny_vit, tmp_path, monkeypatch, capsys):
    on_one_device(monkeypatch)
    rng = np.random.default_rng(0)
    for i in range(60):
        write_image(tmp_path / "a" / ["cat", "dog"][i % 2] / f"{i}.png", rng.integers(255))
    config = config_of(tiny_vit)
    config.data.name, config.data.limit, config.data.cache = "folder", 0, ""
    config.data.data_dir = str(tmp_path / "a")
    train(config, tmp_path / "whole")
    train(config, tmp_path / "run", until=4)
    (tmp_path / "a").rename(tmp_path / "b")
    (tmp_path / "a" / "cat").mkdir(parents=True)
    config.data.data_dir = str(tmp_path / "b")
    train(config, tmp_path / "run")
    check_same_end(tmp_path / "whole", tmp_path / "run")
    assert (tmp_path / "run" / "data.json").read_text() == (
        tmp_path / "whole" / "data.json").read_text()
    train(config, tmp_path / "other", until=4)
    (tmp_path / "b" / "cat").rename(tmp_path / "b" / "cow")
    with pytest.raises(UserError, match="classes: cat, dog -> cow, dog"):
        train(config, tmp_path / "other")
