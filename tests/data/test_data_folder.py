"""Image files in folders: what is read and in which order, what is left alone, and mistakes."""

import csv
import os
import pickle
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from rmlora_jax.data import Request, load_images, missing, open_images
from rmlora_jax.data.folder import files_below
from rmlora_jax.data.pipeline import stream_batches
from rmlora_jax.data.subsets import fingerprint, labels_of
from rmlora_jax.errors import UserError
from rmlora_jax.inference import inputs, predict
from rmlora_jax.parallel import mesh
from rmlora_jax.train import loop

CLASSES = ("bird", "cat", "dog")
COLOURS = {"bird": (200, 30, 30), "cat": (30, 200, 30), "dog": (30, 30, 200)}


def draw(path, seed=0, size=(20, 16), colour=None, **options):
    """A picture of one colour with noise."""
    noise = np.random.RandomState(seed).randint(0, 50, (*size, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    array = (noise + np.array(colour or (0, 0, 0))).astype(np.uint8)
    Image.fromarray(array).save(path, **options)
    return path


def draw_split(folder, count, names=CLASSES):
    for c, name in enumerate(names):
        for i in range(count):
            draw(folder / name / f"{i:02}.png", seed=100 * c + i, colour=COLOURS.get(name))
    return folder


@pytest.fixture
def photos(tmp_path):
    draw_split(tmp_path / "photos" / "train", 12)
    draw_split(tmp_path / "photos" / "test", 3)
    return tmp_path / "photos"


def load(folder, **options):
    return load_images("folder", data_dir=folder, **options)


def paths(source):
    """The files of a source, through the subsets of it."""
    if hasattr(source, "files"):
        return list(source.files)
    return [paths(source.source)[i] for i in source.ids]


def test_images_are_pillows_in_the_order_of_class_and_name(photos):
    data = load(photos, validation=6)
    assert data.class_names == CLASSES and data.image_shape is None and data.notes == ()
    assert (len(data.train), len(data.validation), len(data.test)) == (30, 6, 9)
    assert paths(data.test) == [f"{photos}/test/{c}/{i:02}.png" for c in CLASSES for i in range(3)]
    both = sorted(paths(data.train) + paths(data.validation))
    assert both == [f"{photos}/train/{c}/{i:02}.png" for c in CLASSES for i in range(12)]
    for split in (data.train, data.validation, data.test):
        for i, path in enumerate(paths(split)):
            with Image.open(path) as image:
                np.testing.assert_array_equal(split[i]["image"], np.asarray(image))
            assert CLASSES[split[i]["label"]] == path.split("/")[-2]
    assert np.bincount(labels_of(data.validation)).tolist() == [2, 2, 2]  # each its share
    assert paths(load(photos, validation=6).validation) == paths(data.validation)
    assert paths(load(photos, validation=6, seed=1).validation) != paths(data.validation)
    assert load(photos, test_split="train").test[0]["label"] == 0


def test_one_folder_of_classes(photos):
    data = load(photos / "train", validation=3)
    assert [len(part) for part in (data.train, data.validation, data.test)] == [30, 3, 3]
    parts = [set(paths(part)) for part in (data.train, data.validation, data.test)]
    assert len(set.union(*parts)) == 36
    assert data.class_names == CLASSES and np.bincount(labels_of(data.test)).tolist() == [1, 1, 1]
    assert paths(load(photos / "train", validation=3).test) == paths(data.test)
    # A class may be called "train", which is no split beside other classes.
    draw_split(photos / "vehicles", 2, ("bus", "car", "train"))
    assert load(photos / "vehicles").class_names == ("bus", "car", "train")


@pytest.mark.parametrize(
    ("name", "mode", "options"),
    [
        ("a.jpg", "RGB", {"quality": 90}), ("a.JPEG", "L", {}), ("a.png", "RGBA", {}),
        ("a.webp", "RGB", {"lossless": True}), ("a.gif", "P", {}), ("a.bmp", "RGB", {}),
        ("a.tiff", "RGB", {}), ("a.TIF", "L", {"compression": "tiff_lzw"}),
    ],
)  # fmt: skip
def test_kinds_of_files(photos, name, mode, options):
    draw(photos / "test" / "cat" / "b.png")
    array = np.random.RandomState(1).randint(0, 256, (18, 24, 3)).astype(np.uint8)
    path = photos / "test" / "cat" / name
    Image.fromarray(array).convert(mode).save(path, **options)
    source = load(photos).test
    with Image.open(path) as image:
        expected = np.asarray(image.convert("RGB"))
    found = source[paths(source).index(str(path))]
    np.testing.assert_array_equal(found["image"], expected)
    assert found["image"].shape == (18, 24, 3) and found["label"] == 1


def test_names_are_taken_as_they_are(photos):
    names = ["ünï çödé 猫.png", " spaces .png", "~root.png", "a\nb.png", "[0-9]*.png", "%20.png"]
    for i, name in enumerate(names):
        draw(photos / "train" / " Größe {x} " / "deeper" / name, seed=i)
    data = load(photos, validation=1)
    assert data.class_names == (" Größe {x} ", *CLASSES)
    below = [p for p in paths(data.train) + paths(data.validation) if "deeper" in p]
    assert sorted(map(os.path.basename, below)) == sorted(names)
    (photos / "train" / " Größe {x} " / "a\nb.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"a\\nb.png' cannot be read as an image: its content"):
        open_images(Request("folder", data_dir=photos, validation=1)).train[0]


def test_names_that_are_not_utf8(photos):
    folder = os.fsencode(photos / "train" / "cat")
    os.rename(os.path.join(folder, b"00.png"), os.path.join(folder, b"caf\xe9.png"))
    data = load(photos, bad_records=1)
    assert len(data.train) + len(data.validation) == 36 and not data.skipped
    assert fingerprint(data.train, 8)
    os.rename(folder, folder + b"\xe9")
    with pytest.raises(UserError, match=r"not UTF-8: 'cat\\udce9'; rename it"):
        load(photos)


def test_linked_folders_are_followed_and_end(photos, tmp_path):
    elsewhere = draw_split(tmp_path / "elsewhere", 2, ("eagle", "fox"))
    cat = photos / "train" / "cat"
    (photos / "train" / "fox").symlink_to(elsewhere / "fox")  # a class
    (photos / "test" / "fox").symlink_to("../../elsewhere/fox")
    (cat / "more").symlink_to(elsewhere / "eagle")  # a part of a class
    (cat / "again").symlink_to(elsewhere / "eagle")  # the same: not twice
    for name, target in {"up": "..", "top": "../../..", "self": ".", "loop": "loop"}.items():
        (cat / name).symlink_to(target)
    (elsewhere / "eagle" / "back").symlink_to("..")  # holds a folder that is being read
    (photos / "train" / "upwards").symlink_to("..")  # not a class
    (cat / "file.png").symlink_to(elsewhere / "fox" / "00.png")
    data = load(photos, validation=1)
    assert data.class_names == ("bird", "cat", "dog", "fox")
    assert np.bincount(labels_of(data.train) if not data.validation else np.concatenate(
        [labels_of(data.train), labels_of(data.validation)]
    )).tolist() == [12, 12 + 2 + 1, 12, 2]
    assert [p for p in files_below(cat) if "/up/" in p or "/top/" in p or "/back/" in p] == []
    # --predict finds images in the same way.
    assert inputs.find_images(cat) == [p for p in files_below(cat) if not p.endswith("loop")]


def test_what_is_ignored_is_said(photos):
    for name in ("notes.txt", "b.TXT", "raw.heic", "noend", ".hidden.png", "Thumbs.db"):
        (photos / "train" / "cat" / name).write_bytes(b"")
    draw(photos / "train" / "dog" / ".cache" / "a.png")
    draw(photos / "train" / "loose.png")
    os.mkfifo(photos / "train" / "cat" / "pipe.png")  # opening it would wait for ever
    draw_split(photos / "validation", 1)
    data = load(photos)
    assert len(data.train) + len(data.validation) == 36
    assert data.notes == (
        f"not used of {photos}: validation",
        f"ignored in {photos}: 5 files without the suffix of an image: "
        ".txt (2), .db (1), .heic (1), no suffix (1)",
        f"ignored in {photos}: 1 image beside the folders of classes",
    )


def test_the_test_split(photos):
    draw_split(photos / "val", 1)
    draw_split(photos / "extra", 2)
    assert len(load(photos, test_split="extra").test) == 6
    draw_split(photos / "dogs", 2, ("dog",))  # not all classes: labels are matched by name
    assert labels_of(load(photos, test_split="dogs").test).tolist() == [2, 2]
    shutil.rmtree(photos / "dogs")
    for path in list((photos / "test").rglob("*.png")):  # without labels, as some publish it
        path.rename(photos / "test" / f"{path.parent.name}{path.name}")
    for folder in CLASSES:
        (photos / "test" / folder).rmdir()
    data = load(photos)
    assert len(data.test) == 3 and data.notes == (f"not used of {photos}: extra, test",)
    (photos / "val").rename(photos / "other")
    data = load(photos, validation=0.25)
    assert [len(part) for part in (data.train, data.validation, data.test)] == [20, 7, 9]
    with pytest.raises(UserError, match="test has 9 images, but no folders of classes"):
        load(photos, test_split="test")
    (photos / "train").rename(photos / "training_set")
    assert len(load(photos, train_split="training_set", validation=3).train) == 30
    with pytest.raises(UserError, match=r"train_split='train': there is no .*, test, training_set"):
        load(photos)
    (photos / "training_set").rename(photos / "fit")  # by its name it could be that of a class
    shutil.rmtree(photos / "test")
    data = load(photos)
    assert data.class_names == ("extra", "fit", "other")
    assert data.notes == (f"classes are the folders of {photos} with all below: extra, fit, other",)


def test_bad_records_are_named_and_counted(photos, tmp_path):
    cat = photos / "train" / "cat"
    (cat / "00.png").write_bytes((cat / "01.png").read_bytes()[:200])  # cut short
    (cat / "03.png").write_bytes(b"no image")
    (cat / "05.png").unlink()
    (cat / "05.png").symlink_to("nowhere.png")
    with pytest.raises(UserError) as error:
        open_images(Request("folder", data_dir=photos, bad_records=2))
    assert str(error.value).startswith("3 records cannot be used, where config.data.bad_records=2:")
    data = load(photos, bad_records=3, cache=tmp_path / "cache", validation=3)
    whys = ("image file is truncated", "its content is none of JPEG, PNG", "No such file or direct")
    assert len(data.skipped) == 3
    for number, why, record in zip((0, 3, 5), whys, data.skipped, strict=True):
        assert record.startswith(f"'{cat}/{number:02}.png' cannot be read as an image: {why}")
    # As if the files had never been there; what was found is kept for the next run.
    assert load(photos, bad_records=3, cache=tmp_path / "cache").skipped == data.skipped
    for number in (0, 3, 5):
        (cat / f"{number:02}.png").unlink()
    clean = load(photos, validation=3)
    for part in ("train", "validation", "test"):
        assert paths(getattr(clean, part)) == paths(getattr(data, part))
    (cat / "00.png").write_bytes(b"no image")
    source = load(photos, validation=1).train
    index = paths(source).index(f"{cat}/00.png") if f"{cat}/00.png" in paths(source) else None
    with pytest.raises(UserError, match=r"--config.data.bad_records=10 to leave out up to 10"):
        source.load(index)


def test_nothing_is_opened_before_it_is_asked_for(photos, monkeypatch):
    def never(*arguments, **options):
        raise AssertionError("a file was opened")

    with monkeypatch.context() as patch:
        patch.setattr("rmlora_jax.data.folder.open_image", never)
        patch.setattr("pathlib.Path.read_bytes", never)
        data = load(photos)
    source = pickle.loads(pickle.dumps(data.train))  # as worker processes get it
    np.testing.assert_array_equal(source[3]["image"], data.train[3]["image"])
    batch = next(stream_batches(data.train, 8, seed=0, size=12))
    assert batch["image"].shape == (8, 12, 12, 3)
    for image, label, i in zip(batch["image"], batch["label"], batch["id"], strict=True):
        expected, _ = data.train.load(int(i), 12)
        np.testing.assert_array_equal(image, expected)
        assert label == labels_of(data.train)[i]


def test_the_cache_knows_changed_files(photos):
    before = fingerprint(load(photos).test, 8)
    assert fingerprint(load(photos).test, 8) == before
    draw(photos / "test" / "cat" / "00.png", seed=9, size=(21, 16))
    assert fingerprint(load(photos).test, 8) != before


def split_of_two(root):
    draw_split(root / "train", 1, ("cat", "dog"))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda root: root.mkdir(),
         "no images and no folders of classes; give each class a folder, "
         "DATA_DIR/train/CLASS/NAME.jpg or DATA_DIR/CLASS/NAME.jpg, or another "
         "folder with --config.data.data_dir"),
        (lambda root: [draw(root / f"{i}.png") for i in range(2)], "2 images, but no folders of "),
        (lambda root: [draw(root / s / "a.png") for s in ("train", "test")],
         "train has 1 images, but no folders of classes"),
        (lambda root: draw_split(root / "train", 2, ("cat",)),
         "one folder, 'cat', and a classifier needs two classes; give each class a folder"),
        (lambda root: [(root / c).mkdir(parents=True) for c in ("a", "b")],
         "has no image in its folders a, b; images end in .bmp, .gif, "),
        (lambda root: [(root / c).mkdir(parents=True) or (root / c / "1.heic").touch()
                       for c in ("a", "b")], "other files there: .heic (2)"),
        (lambda root: (draw_split(root, 2), (root / "fish").mkdir()),
         "has folders without an image: fish\nDelete them, or put images in"),
        (lambda root: (split_of_two(root), draw_split(root / "test", 1, ("cat", "dog", "wolf"))),
         "test has class folders that the training images lack: 'wolf'; these have 'cat', 'dog'"),
        (lambda root: [split_of_two(root / s) for s in ("Train", "Test")],
         "there is no folder"),
        (lambda root: [draw(root / s / "1.png") for s in ("Train", "Test")],
         "config.data.train_split='train': there is no folder"),
    ],
)  # fmt: skip
def test_mistakes(tmp_path, make, words):
    make(tmp_path / "mine")
    with pytest.raises(UserError, match=re.escape(words)) as error:
        load(tmp_path / "mine")
    assert str(tmp_path / "mine") in str(error.value)


def test_mistakes_in_the_request(photos, monkeypatch):
    (line,) = missing("images", Request("folder"))
    assert line.startswith("config.data.data_dir=None: name the folder with the images")
    (line,) = missing("images", Request("folder", data_dir=photos.with_name("photo")))
    assert line.endswith("; did you mean photos?")
    assert missing("images", Request("folder", data_dir=photos)) == []
    with pytest.raises(UserError, match="name the folder with the images"):
        load(None)
    for options, words in (
        ({"train_split": "train[:80%]"}, r"folders have no slices, and data.validation"),
        ({"train_split": "trian"}, r"did you mean train\?; .* has test, train\n"),
        ({"test_split": "tset"}, r"config.data.test_split='tset': .*did you mean test\?"),
    ):
        with pytest.raises(UserError, match=words):
            load(photos, **options)
    with pytest.raises(UserError, match="has no folder 'train' of training images beside it"):
        load(photos / "train", test_split="cat")

    def refused(folder):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(UserError, match="cannot be read: Permission denied"):
        load(photos)


def test_a_run_on_a_folder(config, photos, tmp_path, capsys, monkeypatch):
    """The whole way: train, leave out a bad file, name the classes of new pictures."""
    monkeypatch.setattr(loop, "all_devices", lambda name, **_: mesh.all_devices(name, limit=1))
    (photos / "train" / "cat" / "12.png").write_bytes(b"no image")
    (photos / "train" / "cat" / "notes.txt").write_text("")
    config.data.name, config.data.data_dir = "folder", str(photos)
    config.data.validation, config.data.bad_records, config.data.cache = 6, 1, ""
    config.data.flip = False
    config.steps, config.batch_size, config.eval_batch_size, config.eval_every = 30, 8, 8, 30
    config.optimizer.learning_rate = 1e-2
    summary = loop.train(config, tmp_path / "run")
    out = capsys.readouterr().out
    assert f"ignored in {photos}: 1 file without the suffix of an image: .txt (1)" in out
    assert "left out 1 record that cannot be used" in out
    assert [re.sub(".*/", "", why)[:28] for why in summary["skipped_records"]] == [
        "12.png' cannot be read as an"
    ]
    assert summary["test_best"]["accuracy"] == 1.0
    new = [draw(tmp_path / "new" / f"{name}.png", seed=7, colour=COLOURS[name]) for name in CLASSES]
    out = tmp_path / "out.csv"
    assert predict.predict(str(tmp_path / "run"), [str(tmp_path / "new")], out=str(out)) == 0
    with open(out, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["input"], row["label"]) for row in rows] == [
        (str(path), name) for path, name in zip(new, CLASSES, strict=True)
    ]
