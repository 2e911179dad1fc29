"""Order, shares, restarts and padding of batches; resident, streamed and cached images."""

import dataclasses
import functools
import itertools
import os
import shutil

import numpy as np
import pytest
from test_data_tfds import encoded, make

from rmlora_jax.data import ArraySource, Dataset, Subset, cached, load_images
from rmlora_jax.data.pipeline import (
    batch_ids,
    eval_batches,
    load_resident,
    plan_storage,
    stream_batches,
)
from rmlora_jax.data.subsets import fingerprint, held_out_count, hold_out
from rmlora_jax.errors import UserError


def take(iterator, n):
    return list(itertools.islice(iterator, n))


def source(n=23, side=8):
    rng = np.random.RandomState(0)
    images = rng.randint(0, 256, (n, side, side, 3)).astype(np.uint8)
    return ArraySource(images, rng.randint(0, 10, n))


def test_every_pass_holds_every_example_once_in_a_new_order():
    ids = np.concatenate(take(batch_ids(23, 5, seed=3), 23)).reshape(5, 23)
    for row in ids:
        assert sorted(row) == list(range(23))
    assert len({tuple(row) for row in ids}) == 5
    assert ids.dtype == np.int32
    assert not np.array_equal(ids[0], take(batch_ids(23, 23, seed=4), 1)[0])


@pytest.mark.parametrize("process_count", [2, 3, 6])
def test_processes_share_the_same_global_batches(process_count):
    want = take(batch_ids(23, 6, seed=0, start_step=2), 9)
    shares = [
        take(
            batch_ids(23, 6, seed=0, start_step=2, process_index=p, process_count=process_count), 9
        )
        for p in range(process_count)
    ]
    for step in range(9):
        np.testing.assert_array_equal(np.concatenate([s[step] for s in shares]), want[step])


def test_starts_at_any_step():
    whole = take(batch_ids(23, 6, seed=0), 12)
    for start in (0, 1, 7):
        np.testing.assert_array_equal(
            take(batch_ids(23, 6, seed=0, start_step=start), 5), whole[start : start + 5]
        )


def test_streaming_gives_what_resident_gives_in_the_same_order():
    data = source()
    images, labels = load_resident(data)
    for index, count in ((0, 1), (1, 2)):
        where = {"seed": 5, "start_step": 3, "process_index": index, "process_count": count}
        ids = take(batch_ids(23, 6, **where), 6)
        stream = stream_batches(data, 6, threads=3, **where)
        for want in ids:
            batch = next(stream)
            np.testing.assert_array_equal(batch["id"], want)
            np.testing.assert_array_equal(batch["image"], images[want])
            np.testing.assert_array_equal(batch["label"], labels[want])
            assert batch["image"].dtype == np.uint8 and batch["label"].dtype == np.int32
        stream.close()


@pytest.mark.slow
def test_worker_processes_do_not_change_a_batch():
    data = source()
    stream = stream_batches(data, 6, seed=5, start_step=3, workers=2, threads=2)
    for want in take(batch_ids(23, 6, seed=5, start_step=3), 6):
        batch = next(stream)
        np.testing.assert_array_equal(batch["id"], want)
        np.testing.assert_array_equal(batch["image"], data.images[want])
    stream.close()


@pytest.mark.parametrize("process_count", [1, 2, 4])
def test_evaluation_sees_each_example_once(process_count):
    data = source()
    shares = [
        list(eval_batches(data, 8, process_index=p, process_count=process_count, threads=2))
        for p in range(process_count)
    ]
    assert {len(s) for s in shares} == {3}
    seen = []
    for step in range(3):
        for share in shares:
            batch = share[step]
            assert batch["image"].shape == (8 // process_count, 8, 8, 3)
            real = batch["mask"]
            np.testing.assert_array_equal(batch["image"][real], data.images[batch["id"][real]])
            np.testing.assert_array_equal(batch["label"][real], data.labels[batch["id"][real]])
            seen += batch["id"][real].tolist()
    assert seen == list(range(23))
    for p, share in enumerate(shares):
        ids = eval_batches(23, 8, process_index=p, process_count=process_count)
        for batch, other in zip(share, ids, strict=True):
            np.testing.assert_array_equal(batch["id"], other["id"])
            np.testing.assert_array_equal(batch["mask"], other["mask"])


def test_a_batch_that_cannot_be_shared_is_refused():
    with pytest.raises(UserError, match="multiple of 4"):
        batch_ids(23, 6, seed=0, process_count=4)
    with pytest.raises(UserError, match="multiple of 4"):
        eval_batches(23, 6, process_count=4)
    with pytest.raises(UserError, match="empty"):
        batch_ids(0, 6, seed=0)


def test_resident_decodes_subsets_in_order_and_at_a_size():
    data = source(600)
    ids = np.random.RandomState(1).permutation(600)
    images, labels = load_resident(Subset(data, ids), threads=3)
    np.testing.assert_array_equal(images, data.images[ids])
    np.testing.assert_array_equal(labels, data.labels[ids])
    small, _ = load_resident(data, size=4)
    # Halving with the triangle filter weighs the pixels around 2 o + 1 by 1 3 3 1 (edges by 3 3 1).
    row = data.images[0, :, :, 0].astype(float)
    weights = np.array([0, 1, 3, 3, 1, 0, 0, 0]) / 8
    assert abs(small[0, 1, 1, 0] - weights @ row @ weights) <= 1


def dataset(shape, channels=3, n=10):
    return Dataset("x", range(n), None, range(n), 2, ("a", "b"), shape, channels)


def test_storage_plan():
    cifar = plan_storage(dataset((32, 32, 3)), 224)
    assert cifar == (True, None, (32, 32, 3), 1.0, 20 * 32 * 32 * 3)
    photos = plan_storage(dataset(None), 224)
    assert photos.size == 256 and photos.shape == (256, 256, 3) and photos.center == 224 / 256
    assert plan_storage(dataset((300, 200, 3)), 64).size == 73
    assert plan_storage(dataset((28, 28, 1), channels=1), 32).shape == (28, 28, 1)
    limit = photos.nbytes
    assert plan_storage(dataset(None), 224, resident_limit=limit).resident
    assert not plan_storage(dataset(None), 224, resident_limit=limit - 1).resident
    assert plan_storage(dataset(None), 224, mode="resident", resident_limit=1).resident
    assert not plan_storage(dataset((32, 32, 3)), 224, mode="stream").resident
    with pytest.raises(UserError, match="auto, resident or stream"):
        plan_storage(dataset(None), 224, mode="disk")


def test_hold_out_is_exact_stratified_and_fixed():
    labels = np.repeat(np.arange(4), [50, 30, 15, 5])
    kept, held = hold_out(100, 20, seed=0, labels=labels)
    assert sorted([*kept, *held]) == list(range(100))
    assert np.bincount(labels[held]).tolist() == [10, 6, 3, 1]
    np.testing.assert_array_equal(held, hold_out(100, 20, seed=0, labels=labels)[1])
    assert not np.array_equal(held, hold_out(100, 20, seed=1, labels=labels)[1])
    kept, held = hold_out(100, 7, seed=0)
    # numpy freezes RandomState's stream: these very images are held out for ever.
    assert held.tolist() == sorted(np.random.RandomState(0).permutation(100)[:7].tolist())
    assert len(kept) == 93


@pytest.mark.parametrize(("amount", "count"), [(0, 0), (0.1, 10), (0.001, 1), (25, 25)])
def test_held_out_count(amount, count):
    assert held_out_count(100, amount) == count


@pytest.mark.parametrize("amount", [-0.1, 1.5, 100, 0.999])
def test_held_out_count_refuses(amount):
    with pytest.raises(UserError, match="validation="):
        held_out_count(100, amount)


def test_dataset_is_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        dataset(None).name = "y"


# Decoded images kept on disk: found again by what they are of, and by nothing else.


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
        with file.open("wb") as opened:
            np.savez(opened, images=np.zeros((3, 6, 6, 3), np.uint8), labels=np.zeros(3, np.int32))
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
