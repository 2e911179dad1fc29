"""Decoded images kept on disk: found again by what they are of, and by nothing else."""

import functools
import os
import shutil

import numpy as np
import pytest
from test_data_sources import encoded, make

from rmlora_jax.data import ArraySource, Subset, cached, load_images, load_resident
from rmlora_jax.data.subsets import fingerprint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    import tensorflow_datasets as tfds

    root = tmp_path_factory.mktemp("sets")
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (30, 6, 6, 3), np.uint8)
    rows = [{"image": encoded(p), "label": i % 3} for i, p in enumerate(pixels)]
    features = {"image": tfds.features.Image(shape=(6, 6, 3)),
                "label": tfds.features.ClassLabel(num_classes=3)}
    make(root, "made", features, {"train": rows[:20], "test": rows[20:]})
    return root, pixels


class Counting:
    def __init__(self, source, size=None):
        self.source, self.size, self.calls = source, size, 0

    def __call__(self):
        self.calls += 1
        return load_resident(self.source, self.size)


def test_the_second_time_nothing_is_decoded(folder, tmp_path):
    root, pixels = folder
    made = Counting(load_images("made", data_dir=root, validation=4).train)
    first = cached(made.source, None, tmp_path / "cache", made)
    again = load_images("made", data_dir=root, validation=4).train
    second = cached(again, None, tmp_path / "cache", made)
    assert made.calls == 1
    ids = np.asarray(again.ids)
    for images, labels in (first, second):
        np.testing.assert_array_equal(images, pixels[ids])
        assert labels.tolist() == (ids % 3).tolist() and labels.dtype == np.int32


def test_other_images_are_not_mistaken(folder, tmp_path):
    root, _ = folder
    data = load_images("made", data_dir=root, validation=4)
    other = load_images("made", data_dir=root, validation=5)
    found = [(data.train, None), (data.train, 3), (data.validation, None), (data.test, None),
             (other.train, None), (Subset(data.train, [0, 1]), None),
             (Subset(data.train, [1, 0]), None), (Subset(Subset(data.train, [2, 1, 0]), [1, 2]), 3)]
    names = [fingerprint(source, size) for source, size in found]
    assert len(set(names)) == len(names) and None not in names
    fewer = load_images("made", data_dir=root, validation=4, classes=2)
    assert fingerprint(fewer.train, None) not in (None, *names)  # other labels, other images
    elsewhere = tmp_path / "copy"
    shutil.copytree(root, elsewhere)
    file = next((elsewhere / "made" / "1.0.0").glob("*train*record*"))
    copy = fingerprint(load_images("made", data_dir=elsewhere, validation=4).train, None)
    os.utime(file, (1, 1))
    touched = fingerprint(load_images("made", data_dir=elsewhere, validation=4).train, None)
    assert len({copy, touched, names[0]}) == 3
    assert fingerprint(ArraySource(np.zeros((2, 4, 4, 3), np.uint8), np.zeros(2)), None) is None


@pytest.mark.parametrize("damage", ["cut", "flipped", "other", "empty"])
def test_a_damaged_file_is_made_anew(folder, tmp_path, damage):
    root, pixels = folder
    made = Counting(load_images("made", data_dir=root, validation=4).test)
    cached(made.source, None, tmp_path, made)
    (file,) = tmp_path.iterdir()
    data = file.read_bytes()
    if damage == "flipped":
        middle = len(data) // 2
        data = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
    file.write_bytes({"cut": data[:-40], "flipped": data, "empty": b""}.get(damage, data))
    if damage == "other":
        np.savez(file.open("wb"), images=np.zeros((3, 6, 6, 3), np.uint8),
                 labels=np.zeros(3, np.int32))
    images, _ = cached(made.source, None, tmp_path, made)
    assert made.calls == 2
    np.testing.assert_array_equal(images, pixels[20:])
    cached(made.source, None, tmp_path, made)
    assert made.calls == 2  # and is whole again


def test_a_folder_that_cannot_be_written_costs_time_alone(folder, tmp_path):
    root, pixels = folder
    (tmp_path / "file").write_text("in the way")
    made = Counting(load_images("made", data_dir=root, validation=4).test)
    for _ in range(2):
        images, _ = cached(made.source, None, tmp_path / "file" / "cache", made)
        np.testing.assert_array_equal(images, pixels[20:])
    assert made.calls == 2
    plain = ArraySource(pixels, np.arange(30, dtype=np.int32))
    cached(plain, None, tmp_path / "new", functools.partial(load_resident, plain))
    assert not (tmp_path / "new").exists()
