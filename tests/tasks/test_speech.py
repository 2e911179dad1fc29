"""Speech: the reader, the model, and runs of the trainer from a base that a run has made."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from faults.small import on_one_device
from flax.traverse_util import flatten_dict
from marks import slow_but
from test_train_methods import changed, trained

import rmlora_jax as rm
from configs import speech as speech_config
from rmlora_jax.data import Request
from rmlora_jax.data import packaged as data
from rmlora_jax.data.packaged import read_ts
from rmlora_jax.errors import UserError
from rmlora_jax.methods import METHODS
from rmlora_jax.models.frames import Frames, FramesConfig
from rmlora_jax.parallel.mesh import all_devices
from rmlora_jax.sweep.grid import check_config
from rmlora_jax.train import loop, setup
from rmlora_jax.train.checkpoint import read_base
from rmlora_jax.train.config import resolve


def load_speech(**fields):
    return data.load_speech(Request("japanese_vowels", **fields))


def write_set(folder, channels=3, each=(6, 4)):
    """Nine made-up speakers: a mean of their own, noise, 4 to 9 frames."""
    rng = np.random.default_rng(0)
    means = rng.normal(size=(9, channels)) * 3
    for part, count in zip(("TRAIN", "TEST"), each, strict=True):
        lines = ["# made up", "@dimensions 3", "@classLabel true 1 2 3 4 5 6 7 8 9", "@data"]
        for speaker in range(1, 10):
            for _ in range(count):
                series = means[speaker - 1] + rng.normal(size=(rng.integers(4, 10), channels))
                values = [",".join(f"{v:.4f}" for v in channel) for channel in series.T]
                lines.append(":".join([*values, str(speaker)]))
        (folder / f"JapaneseVowels_{part}.ts").write_text("\n".join(lines) + "\n")
    return folder


def small(folder, part="adapted"):
    c = speech_config.get_config(part)
    c.data.data_dir = str(folder)
    c.data.validation, c.data.limit = 9, 0
    c.batch_size, c.eval_batch_size = 8, 16
    c.steps, c.eval_every, c.log_every = 30, 15, 15
    c.speech.clusters = min(c.speech.clusters, 8)
    c.speech.width, c.speech.layers, c.speech.heads = 16, 2, 2
    c.optimizer.learning_rate = 3e-3
    c.compilation_cache = ""
    return c


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder of the data, folder of the base's run)."""
    root = tmp_path_factory.mktemp("speech")
    write_set(root)
    with pytest.MonkeyPatch.context() as patch:
        on_one_device(patch)
        loop.train(small(root, "base"), root / "base")
    return root, root / "base"


def test_a_ts_file_is_read(tmp_path):
    file = tmp_path / "a.ts"
    file.write_text("# words: 1,2\n@data\n1,2,3:-4,5,6.5:2\n7:8:1\n")
    series, labels = read_ts(file)
    assert [one.tolist() for one in series] == [[[1, -4], [2, 5], [3, 6.5]], [[7, 8]]]
    assert labels.tolist() == [2, 1]


@pytest.mark.parametrize("text", ["", "@data\n1,2:a\n", "@data\n1,x:2,3:1\n", "1:2:1\n1:1\n"])
def test_a_damaged_ts_file_is_refused(tmp_path, text):
    file = tmp_path / "a.ts"
    file.write_text(text)
    with pytest.raises(UserError, match=r"a\.ts cannot be read as a \.ts file.*pip install"):
        read_ts(file)


def test_where_there_is_no_data_the_error_says_what_to_type(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="type: pip install --no-deps aeon"):
        load_speech()
    with pytest.raises(UserError, match=r"there is no .*JapaneseVowels_TRAIN\.ts"):
        load_speech(data_dir=str(tmp_path))


def test_splits(made):
    found = load_speech(speakers=(7, 2, 9), validation=3, data_dir=str(made[0]))
    sizes = [len(split.labels) for split in found[:3]]
    assert sizes == [15, 3, 12] and found.speakers == (7, 2, 9)
    assert all(np.bincount(split.labels).tolist() == [size // 3] * 3
               for split, size in zip(found[:3], sizes, strict=True))
    for split in found[:3]:
        real = np.arange(split.frames.shape[1]) < split.lengths[:, None]
        assert (split.frames[~real] == 0).all() and split.frames.shape[1:] == (9, 3)
    train = found.train
    frames = np.concatenate([f[:n] for f, n in zip(train.frames, train.lengths, strict=True)])
    np.testing.assert_allclose(frames.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(frames.std(0), 1, atol=1e-5)
    # Against the file: the second speaker of the three is the file's seventh to twelfth line.
    series, _ = read_ts(made[0] / "JapaneseVowels_TEST.ts")
    mine = [f[:n] for f, n in zip(found.test.frames, found.test.lengths, strict=True)]
    theirs = [series[i] for i in (*range(4, 8), *range(24, 28), *range(32, 36))]
    for one, other in zip(np.concatenate(mine).T, np.concatenate(theirs).T, strict=True):
        assert np.corrcoef(one, other)[0, 1] > 1 - 1e-6  # standardised, and otherwise the same
    few = load_speech(speakers=(7, 2, 9), validation=3, limit=6, data_dir=str(made[0]))
    assert np.bincount(few.train.labels).tolist() == [2, 2, 2]
    assert np.array_equal(few.validation.labels, found.validation.labels)


def test_hidden_frames(made):
    plain = load_speech(validation=9, data_dir=str(made[0]))
    found = load_speech(validation=9, clusters=8, data_dir=str(made[0]))
    assert found.num_classes == 8 and plain.num_classes == 9
    for split, whole in zip(found[:3], plain[:3], strict=True):
        assert len(split.labels) == whole.lengths.sum() and set(split.labels) <= set(range(8))
    row, place = 1, 2  # the third frame of the second utterance
    i = plain.test.lengths[0] + place
    expected = plain.test.frames[row].copy()
    expected[1:4] = 0
    assert np.array_equal(found.test.frames[i], expected)
    assert found.test.lengths[i] == plain.test.lengths[row]
    # Labels of the training frames are the nearest of the clusters' means.
    frames = np.concatenate(
        [f[:n] for f, n in zip(plain.train.frames, plain.train.lengths, strict=True)])
    means = np.stack([frames[found.train.labels == k].mean(0) for k in range(8)])
    nearest = ((frames[:, None] - means) ** 2).sum(-1).argmin(1)
    assert (nearest == found.train.labels).mean() > 0.97


@pytest.mark.parametrize("speakers", [(1,), (1, 1), (0, 1), (9, 10)])
def test_speakers_that_there_are_not_are_refused(speakers):
    with pytest.raises(UserError, match="two or more different numbers from 1 to 9"):
        load_speech(speakers=speakers)


def test_logits_do_not_depend_on_padding():
    model = Frames(FramesConfig(num_channels=3, longest=9, hidden_size=16), num_labels=2)
    frames = jax.random.normal(jax.random.key(0), (2, 9, 3))
    mask = jnp.arange(9) < jnp.array([[9], [5]])
    params = model.init(jax.random.key(1), frames, mask)["params"]
    logits = model.apply({"params": params}, frames, mask)
    alone = model.apply({"params": params}, frames[1:, :5], mask[1:, :5])
    np.testing.assert_allclose(logits[1:], alone, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"\(2, 10, 3\); expected \(batch, at most 9, 3\)"):
        model.apply({"params": params}, jnp.zeros((2, 10, 3)), jnp.ones((2, 10), bool))



@pytest.mark.parametrize("name", slow_but(METHODS, "prefix"))
def test_every_method_adapts_the_base(made, name):
    folder, base = made
    config = changed(small(folder), method=name, model__source=str(base))
    check_config(config)
    job, start, end, history = trained(config, 3)
    assert np.isfinite([h["loss"] for h in history]).all()
    assert any(not np.array_equal(start[path], end[path]) for path in start)
    assert start["head/kernel"].shape == (16, 9)
    _, pretrained = read_base(base, "speech_classification", "")
    params = flatten_dict(
        rm.join(jax.device_get(job.constants.frozen), jax.device_get(job.state.trainable)), sep="/")
    for path, leaf in flatten_dict(pretrained, sep="/").items():
        assert path.startswith("head/") or np.array_equal(params[path], leaf), path


@pytest.mark.slow
def test_a_run_on_other_speakers(made, tmp_path, monkeypatch):
    folder, base = made
    monkeypatch.chdir(base.parent)  # configs name the base by a relative path
    config = changed(small(folder), model__source=base.name, method="lora", steps=60)
    summary = loop.train(config, tmp_path / "run")
    assert summary["test"]["accuracy"] > 0.3  # by chance 1/9
    assert (tmp_path / "run" / "report.png").exists()
    config.model.source = str(tmp_path / "run")
    with pytest.raises(UserError, match=r"with method 'lora', not 'full'; type: python run\.py"):
        setup.build(resolve(config), all_devices(limit=1))
    config.model.source = str(tmp_path / "none")
    with pytest.raises(UserError, match=r"holds no finished run; type: python run\.py"):
        setup.build(resolve(config), all_devices(limit=1))


def test_fields_that_do_not_fit_are_refused(made):
    config = changed(small(made[0]), data__name="cifar100", speech__heads=3)
    with pytest.raises(UserError, match=r"(?s)japanese_vowels for speech.*divisor of speech.width"):
        check_config(config)
    with pytest.raises(ValueError, match="there are base and adapted"):
        speech_config.get_config("other")


def test_the_real_utterances():
    try:
        folder = data.find_files()
    except UserError as e:
        pytest.skip(str(e))
    series, labels = read_ts(folder / "JapaneseVowels_TRAIN.ts")
    assert len(series) == 270 and np.bincount(labels)[1:].tolist() == [30] * 9
    assert series[0].shape == (20, 12) and series[0][0, 0] == np.float32(1.860936)
    found = load_speech()
    assert np.bincount(found.test.labels).tolist() == [31, 35, 88, 44, 29, 24, 40, 50, 29]
    assert found.train.frames.shape == (243, 29, 12) and found.test.lengths.min() == 7
