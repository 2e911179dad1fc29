"""Folders and files of Hugging Face's datasets: images, texts, labels by name, and mistakes."""

import contextlib
import io
import os
import pickle
import re
import socket
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from rmlora_jax.data import Request, load_images, load_texts, missing, open_images
from rmlora_jax.data.subsets import fingerprint, labels_of
from rmlora_jax.errors import UserError

datasets = pytest.importorskip(
    "datasets", reason="the library datasets is not installed: pip install 'rmlora-jax[datasets]'"
)
pa = pytest.importorskip("pyarrow")

NAMES = ("bird", "cat", "dog")


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """A cache of its own, and no network."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def refused(*arguments):
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(socket.socket, "connect", refused)


def encoded(seed, kind="PNG"):
    """The bytes of a file with a picture."""
    array = np.random.RandomState(seed).randint(0, 256, (9 + seed % 3, 8, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind)
    return file.getvalue()


def decoded(content):
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def pictures(n, first=0, names=NAMES, kinds=("PNG", "JPEG")):
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))}
    )
    files = [encoded(first + i, kinds[i % len(kinds)]) for i in range(n)]
    rows = {"image": [{"bytes": file, "path": None} for file in files],
            "label": [i % len(names) for i in range(n)]}
    return datasets.Dataset.from_dict(rows, features=features), files


def sentences(n, first=0, label=lambda i: i % 2, kind=None):
    features = {"one": datasets.Value("string"), "two": datasets.Value("string"),
                "label": kind or datasets.ClassLabel(names=["bad", "good"])}
    rows = {"one": [f"one ü {first + i}" for i in range(n)],
            "two": [f"two {first + i}" for i in range(n)], "label": [label(i) for i in range(n)]}
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


def save_to_disk(path, splits):
    datasets.DatasetDict(splits).save_to_disk(path)


def shards(path, splits):
    """Two files for each split, as on the hub."""
    path.mkdir(parents=True)
    for name, data in splits.items():
        for i in range(2):
            shard = data.shard(2, i, contiguous=True)
            shard.to_parquet(path / f"{name}-{i:05}-of-00002.parquet")


def in_data(path, splits):
    shards(path / "data", splits)


def single(path, splits):
    path.mkdir(parents=True)
    for name, data in splits.items():
        data.to_parquet(path / f"{name}.parquet")


def in_folders(path, splits):
    for name, data in splits.items():
        (path / name).mkdir(parents=True)
        data.to_parquet(path / name / "0000.parquet")


LAYOUTS = [save_to_disk, shards, in_data, single, in_folders]


def images(path, **options):
    return load_images("datasets", data_dir=path, **options)


def texts(path, columns=("one",), test_split=None, **options):
    return load_texts(
        "datasets", data_dir=path, columns=columns, test_splits={"test": test_split}, **options
    )


@pytest.mark.parametrize("write", LAYOUTS)
def test_images_are_pillows(write, tmp_path):
    train, train_files = pictures(12)
    test, test_files = pictures(6, first=20)
    path = tmp_path / "[0-9] ünï {a}* ?"  # no pattern
    write(path, {"train": train, "test": test})
    data = images(path, validation=3)
    assert data.class_names == NAMES and data.image_shape is None
    assert [len(part) for part in (data.train, data.validation, data.test)] == [9, 3, 6]
    for seed in range(3, 6):  # each class gives its share
        held = images(path, validation=3, seed=seed).validation
        assert np.bincount(labels_of(held)).tolist() == [1, 1, 1]
    for i, file in enumerate(test_files):
        np.testing.assert_array_equal(data.test[i]["image"], decoded(file))
        assert data.test[i]["label"] == i % 3
    for part in (data.train, data.validation):
        for i, row in enumerate(part.ids):
            np.testing.assert_array_equal(part[i]["image"], decoded(train_files[row]))
            assert part[i]["label"] == row % 3
    assert data.validation.ids.tolist() == images(path, validation=3).validation.ids.tolist()
    source = pickle.loads(pickle.dumps(data.train))  # as worker processes get it
    np.testing.assert_array_equal(source[4]["image"], data.train[4]["image"])
    before = fingerprint(data.test, 8)
    assert fingerprint(images(path, validation=3).test, 8) == before
    file = max(p for p in path.rglob("*") if p.suffix in (".parquet", ".arrow"))
    os.utime(file, ns=(1, 1))
    assert fingerprint(images(path, validation=3).test, 8) != before


def test_one_split_is_the_training_split(tmp_path):
    data, _ = pictures(12)
    data.save_to_disk(tmp_path / "saved")
    data.to_parquet(tmp_path / "any.parquet")
    (tmp_path / "parts").mkdir()
    for i in range(2):
        data.shard(2, i, contiguous=True).to_parquet(tmp_path / "parts" / f"part-{i}.parquet")
    for name in ("saved", "any.parquet", "parts"):
        assert missing("images", Request("datasets", data_dir=tmp_path / name)) == []
        found = images(tmp_path / name, validation=3)
        assert [len(part) for part in (found.train, found.validation, found.test)] == [6, 3, 3]
        assert np.bincount(labels_of(found.test)).tolist() == [1, 1, 1]
        found = images(
            tmp_path / name, train_split="train[:75%]", test_split="train[75%:]", validation=3
        )
        assert [len(part) for part in (found.train, found.validation, found.test)] == [6, 3, 3]
        assert labels_of(found.test).tolist() == [0, 1, 2]  # the last three rows
    found = images(tmp_path / "saved", train_split="train[6:]", test_split="train[:6]")
    assert [found.test[i]["image"].shape[0] for i in range(6)] == [9, 10, 11] * 2


def test_files_that_datasets_did_not_write(tmp_path):
    """Columns of bytes, of {bytes, path} and of paths, with labels that declare no names."""
    import pyarrow.parquet as pq

    files = [encoded(i) for i in range(8)]
    (tmp_path / "7.png").write_bytes(files[7])
    struct = [{"bytes": file, "path": "x.png"} for file in files[:7]]
    table = {
        "raw": files,
        "struct": [*struct, {"bytes": None, "path": "7.png"}],
        "word": ["b", "a", " b ", "c", "a", "b", "c", "a"],
        "number": [10, 9, 10, -1, 9, 10, -1, 9],
        "yes": [i % 2 == 0 for i in range(8)],
    }
    pq.write_table(pa.table(table), tmp_path / "train.parquet")
    for image_key, label_key, names, labels in (
        ("raw", "word", ("a", "b", "c"), [1, 0, 1, 2, 0, 1, 2, 0]),
        ("struct", "number", ("-1", "9", "10"), [2, 1, 2, 0, 1, 2, 0, 1]),
        ("struct", "yes", ("False", "True"), [1, 0] * 4),
    ):
        data = images(tmp_path, image_key=image_key, label_key=label_key, test_split="train")
        assert data.class_names == names and labels_of(data.test).tolist() == labels
        for i, file in enumerate(files):
            np.testing.assert_array_equal(data.test[i]["image"], decoded(file))


def test_labels_are_matched_by_name(tmp_path):
    train, _ = pictures(6)
    test, _ = pictures(6, names=("dog", "bird", "cat"))
    single(tmp_path / "images", {"train": train, "test": test})
    data = images(tmp_path / "images", validation=1)
    assert data.class_names == NAMES
    assert labels_of(data.test).tolist() == [2, 0, 1, 2, 0, 1]
    words = ["no", "yes", "perhaps"]
    split = {"train": sentences(8, label=lambda i: words[i % 2], kind=datasets.Value("string")),
             "test": sentences(6, label=lambda i: words[i % 3], kind=datasets.Value("string"))}
    save_to_disk(tmp_path / "texts", split)
    with pytest.raises(UserError, match=r"text 2 of 'test': its label is 'perhaps', which the tr"):
        texts(tmp_path / "texts")
    data = texts(tmp_path / "texts", bad_records=2)
    assert data.label_names == ("no", "yes")
    assert data.tests["test"].ids.tolist() == [0, 1, 3, 4]
    assert data.tests["test"].labels.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("write", LAYOUTS)
def test_texts(write, tmp_path):
    splits = {"train": sentences(20), "validation": sentences(6, 100),
              "test": sentences(5, 200, label=lambda i: -1)}
    write(tmp_path / "mine", splits)
    data = texts(
        tmp_path / "mine", ("one", "two"), validation=4, unlabelled_splits={"predict": "test"}
    )
    assert data.columns == ("one", "two") and data.label_names == ("bad", "good")
    assert [len(s.ids) for s in (data.train, data.validation, data.tests["test"])] == [16, 4, 6]
    assert np.bincount(data.validation.labels).tolist() == [2, 2]
    for split, first in ((data.train, 0), (data.validation, 0), (data.tests["test"], 100)):
        assert split.texts[0] == [f"one ü {first + i}" for i in split.ids]
        assert split.texts[1] == [f"two {first + i}" for i in split.ids]
        assert split.labels.tolist() == [i % 2 for i in split.ids]
    assert data.unlabelled["predict"].texts[1] == [f"two {200 + i}" for i in range(5)]
    assert data.unlabelled["predict"].labels.tolist() == [-1] * 5
    held = texts(tmp_path / "mine", train_split="train[:10]", test_split="train[10:]", validation=2)
    assert held.tests["test"].texts[0][0] == "one ü 10" and len(held.train.ids) == 8


def test_one_column_of_text_needs_no_name_and_values_are_regressed(tmp_path):
    score = sentences(12, label=lambda i: i / 4, kind=datasets.Value("float64"))
    score = score.remove_columns("two")
    score.save_to_disk(tmp_path / "scores")
    data = texts(tmp_path / "scores", (), regression=True, validation=3)
    assert data.columns == ("one",) and data.label_names is None
    assert [len(s.ids) for s in (data.train, data.validation, data.tests["test"])] == [6, 3, 3]
    for split in (data.train, data.validation, data.tests["test"]):
        np.testing.assert_array_equal(split.labels, split.ids / np.float32(4))


def test_bad_records_of_images(tmp_path):
    import pyarrow.parquet as pq

    files = [encoded(i, "JPEG") for i in range(12)]
    cells = [{"bytes": file, "path": None} for file in files]
    cells[1]["bytes"] = files[1][:200]
    cells[3] = {"bytes": None, "path": "https://example.org/a.png"}
    cells[5] = {"bytes": None, "path": "nowhere.png"}
    cells[6] = None
    labels = ["a", "b"] * 6
    labels[8] = None
    table = pa.table({"image": cells, "label": labels})
    pq.write_table(table, tmp_path / "all.parquet")
    path = tmp_path / "all.parquet"
    with pytest.raises(UserError, match="5 records cannot be used, where"):
        open_images(Request("datasets", data_dir=path, bad_records=4))
    data = images(path, bad_records=5, validation=1, test_split="train[-2:]")
    whys = {1: "it cannot be read: Truncated File Read", 6: "it is missing",
            3: "it lies at https://example.org/a.png, and nothing is fetched",
            5: "it cannot be read: No such file or directory", 8: "it has no label"}
    assert len(data.skipped) == len(whys)
    for (i, why), record in zip(sorted(whys.items()), data.skipped, strict=True):
        assert record.startswith(f"{path}: image {i} of 'train': {why}")
    with pytest.raises(UserError, match=r"image 0 of 'train\[1:2\]': .*\n.*data.bad_records"):
        images(path, test_split="train[1:2]").test[0]


def test_bad_records_of_texts(tmp_path):
    data = sentences(12, label=lambda i: None if i == 2 else i % 2)
    rows = data.to_dict()
    rows["one"][4], rows["one"][7] = None, "  "
    datasets.Dataset.from_dict(rows, features=data.features).save_to_disk(tmp_path / "mine")
    with pytest.raises(UserError, match=r"text 2 of 'train': it has no label\nCorrect it, or type"):
        texts(tmp_path / "mine")
    found = texts(tmp_path / "mine", bad_records=3, validation=2)
    assert [re.sub(".*: ", "", why) for why in found.skipped] == [
        "it has no label", "its text is empty", "its text is empty"
    ]
    left = [*found.train.ids, *found.validation.ids, *found.tests["test"].ids]
    assert sorted(left) == [0, 1, 3, 5, 6, 8, 9, 10, 11]
    # Of a pair one text may be empty.
    assert len(texts(tmp_path / "mine", ("one", "two"), bad_records=1).skipped) == 1


def test_nothing_is_run(tmp_path):
    """Neither scripts and pickles beside the data, nor a pickle in the schema of a file."""
    import pyarrow.parquet as pq

    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "evil"), "w")

    metadata = {b"ARROW:extension:name": b"arrow.py_extension_type",
                b"ARROW:extension:metadata": pickle.dumps(Evil())}
    schema = pa.schema([
        pa.field("one", pa.string(), metadata=metadata), pa.field("label", pa.string())
    ])
    table = pa.table([[f"a{i}" for i in range(8)], ["a", "b"] * 4], schema=schema)
    folder = tmp_path / "mine"
    folder.mkdir()
    pq.write_table(table, folder / "train.parquet")
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'evil')!r}, 'w')")
    (folder / "train.pkl").write_bytes(pickle.dumps(Evil()))
    with contextlib.suppress(UserError):  # refused is right as well
        texts(folder)
    assert not (tmp_path / "evil").exists()
    (folder / "train.parquet").unlink()
    for path in (folder, folder / "train.pkl"):
        with pytest.raises(UserError, match="pickles are not read"):
            texts(path)
    assert not (tmp_path / "evil").exists()


def test_mistakes_in_images(tmp_path):
    train, _ = pictures(6)
    save_to_disk(tmp_path / "mine", {"train": train.rename_column("image", "img")})
    for options, words in (
        ({}, "has no image under 'image'; its images are under img\nName it with --config"),
        ({"image_key": "label"}, "has no image under 'label'"),
        ({"image_key": "img", "label_key": "fine"}, "'fine'; its class labels are under label"),
        ({"image_key": "img", "label_key": "img"}, "no labels of classes under 'img'"),
        ({"train_split": "fit"}, "has no split 'fit'; it has train\nA slice is written"),
        ({"train_split": "train[:x]"}, "has no split 'train[:x]'"),
        ({"train_split": "train[:0]"}, "split 'train[:0]' has no rows"),
        ({"image_key": "img", "test_split": "test"}, "has no split 'test'"),
    ):
        with pytest.raises(UserError, match=re.escape(words)) as error:
            images(tmp_path / "mine", **options)
        assert str(tmp_path / "mine") in str(error.value)
    for name in ("cola", "sst2"):
        single(tmp_path / "several" / name, {"train": sentences(4)})
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn.parquet").write_bytes(b"PAR1")
    save_to_disk(tmp_path / "torn", {"train": train})
    for file in (tmp_path / "torn" / "train").glob("*.arrow"):
        file.write_bytes(file.read_bytes()[:100])
    for name, words in (
        ("several", f"has several data sets: cola, sst2; name one of them, such as "
         f"--config.data.data_dir={tmp_path}/several/cola"),
        ("empty", "has neither dataset_dict.json or state.json nor .parquet files"),
        ("torn.parquet", "torn.parquet cannot be read by the library datasets"),
        ("torn", "torn cannot be read by the library datasets"),
    ):
        with pytest.raises(UserError, match=re.escape(words)):
            images(tmp_path / name)


def test_mistakes_in_texts(tmp_path):
    save_to_disk(tmp_path / "mine", {
        "train": sentences(8), "test": sentences(4, label=lambda i: -1)
    })
    for options, words in (
        ({"columns": ("three",)}, "has no text under 'three'; it has one (string), two (string)"),
        ({"columns": ()}, "has no text under no name"),
        ({"columns": ("label",)}, "has no text under 'label'"),
        ({"label_key": "one", "regression": True}, "has no numbers under 'one'"),
        ({"label_key": "score"}, "'score'; its class labels are under label"),
        ({}, "has no labelled test or validation split"),
        ({"test_split": "test"}, "split 'test' has no labels"),
    ):
        with pytest.raises(UserError, match=re.escape(words)):
            texts(tmp_path / "mine", **options)
    one = sentences(4, label=lambda i: "a", kind=datasets.Value("string"))
    one.save_to_disk(tmp_path / "one")
    with pytest.raises(UserError, match="every 'label' is 'a'; two classes are needed"):
        texts(tmp_path / "one")
    real = sentences(4, label=lambda i: i / 2, kind=datasets.Value("float32"))
    real.save_to_disk(tmp_path / "real")
    with pytest.raises(UserError, match=r"it has one .*, label \(float32\)"):
        texts(tmp_path / "real")


def test_what_is_missing(tmp_path, monkeypatch):
    (line,) = missing("images", Request("datasets"))
    assert line.startswith("config.data.data_dir=None: name a folder that save_to_disk wrote, a .p")
    (tmp_path / "cifar").mkdir()
    (line,) = missing("texts", Request("datasets", data_dir=tmp_path / "cifar1"))
    assert line.endswith("did you mean cifar?; nothing is fetched from a hub")
    with pytest.raises(UserError, match="there is no stanfordnlp/imdb; nothing is fetched"):
        texts("stanfordnlp/imdb")
    monkeypatch.setitem(sys.modules, "datasets", None)
    (line,) = missing("images", Request("datasets", data_dir=tmp_path))
    assert line.endswith("it needs a library that is not here: pip install 'rmlora-jax[datasets]'")
    with pytest.raises(UserError, match=r"pip install 'rmlora-jax\[datasets\]'"):
        images(tmp_path)


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    shards(tmp_path / "mine", {"train": sentences(8)})
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match=r"cannot be written; name .*HF_DATASETS_CACHE=FOLDER"):
        texts(tmp_path / "mine")


def test_the_library_is_imported_where_it_is_used():
    code = (
        "import sys, rmlora_jax.data as d; d.missing('images', d.Request('digits')); "
        "assert 'datasets' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
