"""Data sets by name: digits, prepared TFDS folders of many kinds, and what goes wrong."""

import io
import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from rmlora_jax.data import load_images, load_resident, plan_storage
from rmlora_jax.data import prepare as prepare_command
from rmlora_jax.data.vision import open_image, pixels
from rmlora_jax.errors import UserError


def encoded(array, kind="PNG", mode=None):
    image = Image.fromarray(array)
    file = io.BytesIO()
    (image.convert(mode) if mode else image).save(file, kind, quality=95)
    return file.getvalue()


def as_files(row):
    """TFDS takes an encoded image as a file, and reads it once."""
    return {k: io.BytesIO(v) if k == "image" else v for k, v in row.items()}


def make(folder, dataset, features, splits, config=None, version="1.0.0"):
    """A TFDS data set with ``splits = {split: [example, ...]}``."""
    import tensorflow_datasets as tfds

    class Made(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = dataset
        VERSION = tfds.core.Version(version)
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=config)] if config else []

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
            )

        def _split_generators(self, _):
            return {
                split: ((i, as_files(row)) for i, row in enumerate(rows))
                for split, rows in splits.items()
            }

        def _generate_examples(self):
            raise AssertionError("never called: the splits are given")

    builder = Made(data_dir=str(folder), file_format="array_record")
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(try_download_gcs=False)
    )
    return builder


def image_features(shape, classes=("cat", "dog"), **more):
    import tensorflow_datasets as tfds

    return {
        "image": tfds.features.Image(shape=shape, **more),
        "label": tfds.features.ClassLabel(names=list(classes)),
    }


def gray(n, side=9, seed=0):
    return np.random.RandomState(seed).randint(0, 256, (n, side, side)).astype(np.uint8)


def gray_rows(n, seed=0, label=lambda i: i % 2):
    return [
        {"image": encoded(a), "label": label(i)} for i, a in enumerate(gray(n, seed=seed))
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data sets shared by the tests below."""
    root = tmp_path_factory.mktemp("tfds")
    rng = np.random.RandomState(5)
    photos = [
        {
            "image": encoded(
                np.asarray(
                    Image.fromarray(rng.randint(0, 256, (5, 7, 3)).astype(np.uint8)).resize(
                        (200 + 10 * i, 160), Image.Resampling.BICUBIC
                    )
                ),
                "JPEG",
                mode="L" if i == 3 else None,
            ),
            "label": i % 2,
        }
        for i in range(6)
    ]
    make(root, "photos", image_features((None, None, 3)), {"train": photos, "validation": photos})
    make(
        root,
        "gray",
        image_features((9, 9, 1)),
        {"train": gray_rows(20), "test": gray_rows(4, 1, lambda _: -1), "validation": gray_rows(5)},
    )
    old = make(root, "old", image_features((9, 9, 1)), {"train": gray_rows(3)})
    info = old.data_path / "dataset_info.json"
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    for config in ("rgb", "all"):
        make(root, "two", image_features((9, 9, 1)), {"train": gray_rows(3)}, config=config)
    make(root, "grown", image_features((9, 9, 1)), {"train": gray_rows(3)}, version="9.0.0")
    make(root, "grown", image_features((9, 9, 1)), {"train": gray_rows(4)}, version="10.0.0")
    return root


def pairs(images, labels):
    """Every (image, label) in an order of its own."""
    flat = images.reshape(len(labels), -1).tolist()
    return sorted(zip(flat, labels.tolist(), strict=True))


def test_digits():
    from sklearn.datasets import load_digits

    raw = load_digits()
    data = load_images("digits")
    parts = [load_resident(s) for s in (data.train, data.validation, data.test)]
    assert [len(y) for _, y in parts] == [1293, 144, 360]
    images = np.concatenate([x for x, _ in parts])
    assert images.dtype == np.uint8 and images.shape == (1797, 8, 8, 3) and images.max() == 255
    # The same multiset of images and labels as scikit-learn's.
    labels = np.concatenate([y for _, y in parts])
    levels = (raw.images * 255 / 16).round().astype(int)
    assert pairs(images[..., 1], labels) == pairs(levels, raw.target)
    for _, labels in parts:
        share = np.bincount(labels, minlength=10) / len(labels)
        np.testing.assert_allclose(share, np.bincount(raw.target) / 1797, atol=0.01)
    again = load_images("digits", validation=200, seed=3)
    np.testing.assert_array_equal(again.test.images, data.test.images)  # whatever is held out
    assert len(again.validation) == 200 and len(again.train) == 1237


def test_gray_prepared_set_with_an_unlabelled_test_split(folder):
    data = load_images("gray", data_dir=folder, validation=0.25)
    assert data.image_shape == (9, 9, 1) and data.channels == 1
    assert data.class_names == ("cat", "dog") and data.num_classes == 2
    assert (len(data.train), len(data.validation), len(data.test)) == (15, 5, 5)
    everything = gray(20)
    found = [
        next(i for i in range(20) if np.array_equal(everything[i], row["image"][..., 0]))
        for source in (data.train, data.validation)
        for row in (source[j] for j in range(len(source)))
    ]
    assert sorted(found) == list(range(20))
    assert [data.train[j]["label"] for j in range(15)] == [i % 2 for i in found[:15]]
    other = load_images("gray", data_dir=folder, validation=0.25)
    assert list(other.train.ids) == list(data.train.ids)
    copy = pickle.loads(pickle.dumps(data.train))
    np.testing.assert_array_equal(copy[3]["image"], data.train[3]["image"])


def test_splits_limit_and_no_validation(folder):
    data = load_images(
        "gray", data_dir=folder, validation=0, train_split="train[:12]", test_split="train[12:]"
    )
    assert data.validation is None and (len(data.train), len(data.test)) == (12, 8)
    np.testing.assert_array_equal(data.test[0]["image"][..., 0], gray(20)[12])
    assert len(load_images("gray", data_dir=folder, limit=3).train) == 3
    assert len(load_images("gray", data_dir=folder, limit=0).train) == 18


def test_photos_of_many_sizes_are_cut_to_one(folder):
    data = load_images("photos", data_dir=folder, validation=1)
    assert data.image_shape is None and data.channels == 3
    plan = plan_storage(data, 28)
    images, labels = load_resident(data.test, plan.size)
    assert images.shape == (6, 32, 32, 3) and labels.tolist() == [0, 1, 0, 1, 0, 1]
    for i in range(6):
        whole = data.test[i]["image"]
        height, width = whole.shape[:2]
        assert (height, width) == (160, 200 + 10 * i)
        left = (width - height) // 2
        middle = whole[:, left : left + height].astype(float)
        want = middle.reshape(32, 5, 32, 5, 3).mean((1, 3))  # box means: these photos are smooth
        assert np.abs(images[i] - want).mean() < 6
    assert (images[3, ..., 0] == images[3, ..., 2]).all()  # the gray JPEG became RGB


def test_decoding_of_modes():
    rgb = np.random.RandomState(0).randint(0, 256, (6, 6, 3)).astype(np.uint8)
    np.testing.assert_array_equal(pixels(open_image(encoded(rgb))), rgb)
    alpha = np.concatenate([rgb, np.full((6, 6, 1), 9, np.uint8)], -1)
    np.testing.assert_array_equal(pixels(open_image(encoded(alpha))), rgb)
    palette = encoded(np.full((6, 6, 3), 51, np.uint8), mode="P")
    np.testing.assert_array_equal(pixels(open_image(palette)), np.full((6, 6, 3), 51))


def test_newest_version_and_default_config(folder):
    half = {"data_dir": folder, "validation": 0, "test_split": "train"}
    assert len(load_images("grown", **half).train) == 4
    assert len(load_images("grown:9.0.0", **half).train) == 3
    assert len(load_images("grown:9.*.*", **half).train) == 3
    assert len(load_images("two/rgb", **half).train) == 3


def test_data_dir_from_the_environment(folder, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(folder))
    assert len(load_images("gray").test) == 5


def says(folder, name, *parts, **arguments):
    with pytest.raises(UserError) as error:
        load_images(name, data_dir=folder, **arguments)
    message = str(error.value)
    assert len(message.splitlines()) <= 2, message
    for part in parts:
        assert part in message
    return message


def test_errors_name_what_to_type(folder):
    says(folder, "cifar1000", "did you mean", "cifar100", "--config.data.data_dir")
    says(folder, "photo", "did you mean photos")
    says(folder, "digit", "did you mean digits")
    says(
        folder,
        "oxford_flowers102",
        "needs TensorFlow",
        f"pip install 'rmlora-jax[prepare]' && python -m rmlora_jax.data.prepare oxford_flowers102 "
        f"--data_dir={folder}",
    )
    says(folder, "cifar100", f"prepare cifar100 --data_dir={folder}", download=False)
    says(folder, "gray:2.0.0", "1.0.0", "--config.data.name")
    says(folder, "two", "all, rgb", "--config.data.name=two/all")
    says(folder, "my data!", "is not the name of a data set")
    says(folder, "old", "tfrecord", "python -m rmlora_jax.data.prepare old --data_dir=OTHER")
    says(folder, "gray", "no split 'training'", "test, train, validation", train_split="training")
    says(folder, "gray", "split 'test' has no labels", test_split="test")
    says(folder, "grown", "only train", "--config.data.test_split")
    says(folder, "gray", "validation=20", validation=20)
    says(folder, "gray", "no image under 'picture'", "under image", image_key="picture")
    says(folder, "gray", "its labels are under label", label_key="class")


def test_errors_of_foreign_features_and_damaged_folders(tmp_path):
    import tensorflow_datasets as tfds

    text = {"text": tfds.features.Text(), "label": tfds.features.ClassLabel(num_classes=2)}
    make(tmp_path, "words", text, {"train": [{"text": "a", "label": 1}]})
    says(tmp_path, "words", "no image under 'image'")
    image = {"image": tfds.features.Image(shape=(9, 9, 1))}
    make(tmp_path, "bare", image, {"train": [{"image": encoded(gray(1)[0])}]})
    says(tmp_path, "bare", "it has no class labels")

    rows = {"train": gray_rows(3), "test": gray_rows(3)}
    builder = make(tmp_path, "torn", image_features((9, 9, 1)), rows)
    shard = next(builder.data_path.glob("*train*"))
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    says(tmp_path, "torn", "is damaged: image 0 of 'train'", "prepare it again")
    shard.unlink()
    says(tmp_path, "torn", "is damaged: image 0 of 'train'", "prepare it again")
    (builder.data_path / "features.json").write_text("{")
    says(tmp_path, "torn", "cannot be read as a TFDS data set")


def test_prepare_command(tmp_path, monkeypatch, capsys):
    arguments = ["beans", f"--data_dir={tmp_path}"]
    monkeypatch.setattr(prepare_command.importlib.util, "find_spec", lambda _: None)
    assert prepare_command.main(arguments) == 1
    assert "pip install 'rmlora-jax[prepare]'" in capsys.readouterr().err
    assert prepare_command.main(["beanz", f"--data_dir={tmp_path}"]) == 1
    assert "did you mean beans" in capsys.readouterr().err
    # With TensorFlow but without network: an answer at once.
    monkeypatch.setattr(prepare_command.importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(prepare_command.urllib.request, "getproxies", dict)

    def unreachable(*_, **__):
        raise OSError("unreachable")

    monkeypatch.setattr(prepare_command.socket, "create_connection", unreachable)
    assert prepare_command.main(arguments) == 1
    assert "no network: " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_data_code_needs_tensorflow_nowhere(folder):
    code = (
        "import sys\n"
        "from rmlora_jax.data import load_images, load_resident\n"
        f"d = load_images('gray', data_dir={str(folder)!r})\n"
        "print(load_resident(d.test)[0].shape, 'tensorflow' in sys.modules)\n"
    )
    light = (
        "import sys, json\n"
        "import rmlora_jax.data\n"
        "late = ['grain', 'tensorflow_datasets', 'tensorflow', 'sklearn', 'tqdm']\n"
        "print(json.dumps([m for m in late if m in sys.modules]))\n"
    )
    done = [
        subprocess.run(
            [sys.executable, "-c", c], capture_output=True, text=True, check=True, timeout=120
        )
        for c in (code, light)
    ]
    assert done[0].stdout.strip() == "(5, 9, 9, 1) False"
    assert "OpenCV" not in done[0].stderr
    assert json.loads(done[1].stdout) == []


@pytest.mark.skipif(
    not os.environ.get("RMLORA_DATA"),
    reason="RMLORA_DATA does not name a TFDS folder with the real cifar100",
)
def test_the_real_cifar100():
    data = load_images("cifar100", data_dir=os.environ["RMLORA_DATA"])
    assert (len(data.train), len(data.validation), len(data.test)) == (45_000, 5_000, 10_000)
    images, labels = load_resident(data.test, desc="decoding cifar100 test")
    assert np.bincount(labels).tolist() == [100] * 100
    # Channel means of the published test set.
    np.testing.assert_allclose(images.mean((0, 1, 2)) / 255, [0.509, 0.487, 0.442], atol=2e-3)
