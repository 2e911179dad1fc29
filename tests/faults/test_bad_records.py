"""Damaged, empty and wrongly labelled records: named, left out up to a number, the same for all."""

import json
import re

import jax
import numpy as np
import pytest
from PIL import Image
from test_data_tfds import encoded, gray, gray_rows, image_features, make

from rmlora_jax.data import batch_ids, load_images, load_resident, load_texts, stream_batches
from rmlora_jax.data.dataset import BadRecord
from rmlora_jax.data.tfds import TfdsImages
from rmlora_jax.errors import UserError
from rmlora_jax.models.processor import Resize
from rmlora_jax.parallel import mesh
from rmlora_jax.train import loop, setup
from rmlora_jax.train.config import resolve

# Of 20 images: what is no image, a class that is not declared, another shape.
BAD = {4: "it cannot be decoded", 9: "its label is 2, the declared classes are 0 to 1",
       13: "it is 8 x 9, where 9 x 9 is declared"}


def fewer_classes(builder):
    """Declares two classes where the records have three."""
    (names,) = builder.data_path.glob("*labels.txt")
    names.write_text("cat\ndog\n")
    features = builder.data_path / "features.json"
    text = features.read_text()
    assert text.count('"numClasses": "3"') == 1
    features.write_text(text.replace('"numClasses": "3"', '"numClasses": "2"'))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("bad")
    rows = gray_rows(20)
    rows[4]["image"] = rows[4]["image"][:60]
    rows[9]["label"] = 2
    rows[13]["image"] = encoded(gray(1)[0][:8])
    features = image_features((9, 9, 1), ("cat", "dog", "owl"))
    fewer_classes(make(root, "gray", features, {"train": rows, "test": gray_rows(8, 1)}))
    return root


def load(folder, **more):
    return load_images("gray", data_dir=folder, validation=3, **more)


def test_without_leave_the_first_one_met_ends_it(folder):
    source = load_images("gray", data_dir=folder, validation=0).train
    for index, why in BAD.items():
        with pytest.raises(BadRecord) as error:
            source.load(index)
        first, second = str(error.value).splitlines()
        assert f"image {index} of 'train': {why}" in first and str(folder) in first
        assert "--config.data.bad_records=10" in second and "0, the default: none" in second
    assert source.load(5)[0].shape == (9, 9, 1)
    with pytest.raises(BadRecord, match="image 4 of 'train'"):
        load_resident(source)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_names_it_too(folder, workers):
    source = load_images("gray", data_dir=folder, validation=0).train
    batches = stream_batches(source, 5, seed=0, workers=workers, threads=2)
    with pytest.raises(UserError, match=r"image (4|9|13) of 'train'.*\n.*bad_records"):
        for _ in range(4):
            next(batches)


def test_up_to_so_many_are_left_out(folder):
    with pytest.raises(UserError, match=r"3 records cannot be used, .*_records=2") as error:
        load(folder, bad_records=2)
    for index in BAD:
        assert f"image {index} of 'train'" in str(error.value)
    data = load(folder, bad_records=3)
    assert [len(s) for s in (data.train, data.validation, data.test)] == [14, 3, 8]
    assert len(data.skipped) == 3
    for words, (index, why) in zip(data.skipped, BAD.items(), strict=True):
        assert f"image {index} of 'train': {why}" in words
    good = [i for i in range(20) if i not in BAD]
    images = np.concatenate([load_resident(part)[0] for part in (data.train, data.validation)])
    everything = gray(20)
    found = [int(np.flatnonzero((everything == x[..., 0]).all((1, 2)))[0]) for x in images]
    assert sorted(found) == good
    # As if the set had been made without them: what is held out, too.
    clean = folder.parent / "clean"
    if not clean.exists():
        rows = [row for i, row in enumerate(gray_rows(20)) if i in good]
        make(clean, "gray", image_features((9, 9, 1)), {"train": rows, "test": gray_rows(8, 1)})
    same = load(clean)
    np.testing.assert_array_equal(load_resident(same.train)[0], load_resident(data.train)[0])
    assert same.skipped == ()


def test_the_order_is_that_of_what_is_left(folder):
    """Resident or streamed, one process or two, from any step on."""
    data = load(folder, bad_records=3)
    images, labels = load_resident(data.train)
    ids = batch_ids(14, 4, seed=7)
    wanted = [next(ids) for _ in range(8)]
    for count in (1, 2):
        streams = [
            stream_batches(data.train, 4, seed=7, start_step=2, process_index=p,
                           process_count=count, threads=2)
            for p in range(count)
        ]
        for step in range(2, 8):
            parts = [next(stream) for stream in streams]
            own = np.concatenate([part["id"] for part in parts])
            np.testing.assert_array_equal(own, wanted[step])
            pixels = np.concatenate([part["image"] for part in parts])
            np.testing.assert_array_equal(pixels, images[own])
            np.testing.assert_array_equal(
                np.concatenate([part["label"] for part in parts]), labels[own]
            )


def test_what_was_found_is_remembered(folder, tmp_path, monkeypatch):
    first = load(folder, bad_records=3, cache=tmp_path)
    kept = sorted(tmp_path.glob("*.bad.json"))
    assert sorted(len(json.loads(path.read_text())) for path in kept) == [0, 3]

    def never(self, index):
        raise AssertionError("looked at again")

    with monkeypatch.context() as patched:
        patched.setattr(TfdsImages, "check", never)
        again = load(folder, bad_records=5, cache=tmp_path)
        with pytest.raises(UserError, match="3 records cannot be used"):
            load(folder, bad_records=1, cache=tmp_path)
    assert again.skipped == first.skipped and list(again.train.ids) == list(first.train.ids)
    for path in kept:
        path.write_text('[[99, "?"]]')  # of no record: looked at again
    assert load(folder, bad_records=3, cache=tmp_path).skipped == first.skipped


@pytest.fixture
def run_config(config, folder):
    config.data.name = "gray"
    config.data.data_dir = str(folder)
    config.data.validation = 3
    config.data.cache = ""
    config.eval_batch_size = 8
    config.steps = 3
    config.log_every = 1
    return config


def metrics(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [[row[k] for k in ("train/loss", "validation/loss") if k in row] for row in rows]


@pytest.mark.slow
def test_a_run_tells_of_them(run_config, tmp_path, capsys):
    losses = {}
    for mode in ("resident", "stream"):
        run_config.data.mode = mode
        run_config.data.bad_records = 3
        summary = loop.train(run_config, tmp_path / mode)
        said = capsys.readouterr().out
        assert "left out 3 records that cannot be used: " in said
        assert "image 9 of 'train': its label is 2" in said
        assert "training examples: 14, fewer than batch_size 16; a step has each 1.14 " in said
        assert len(summary["skipped_records"]) == 3
        losses[mode] = metrics(tmp_path / mode)
        run_config.data.bad_records = 0
        with pytest.raises(UserError, match=r"image (4|9|13) of 'train'"):
            loop.train(run_config, tmp_path / "none")
        assert not (tmp_path / "none").exists()
    np.testing.assert_array_equal(losses["resident"], losses["stream"])


def test_a_set_of_one_image_and_none(tmp_path):
    rows = {"train": gray_rows(1), "test": gray_rows(3)}
    make(tmp_path, "one", image_features((9, 9, 1)), rows)
    with pytest.raises(UserError, match="1 training example; two are needed"):
        load_images("one", data_dir=tmp_path)
    bad = [row | {"image": b"GIF89a"} for row in gray_rows(3)]
    make(tmp_path, "all", image_features((9, 9, 1)), {"train": bad, "test": gray_rows(3)})
    with pytest.raises(UserError, match="split 'train' of all has no image that can be used"):
        load_images("all", data_dir=tmp_path, bad_records=9)


def test_images_of_which_no_square_is_made_are_left_out_too(tmp_path):
    for i, (height, width) in enumerate([(40, 40), (40, 80), (32, 32), (50, 50), (9, 9)]):
        for kind in ("cat", "dog"):
            (tmp_path / kind).mkdir(exist_ok=True)
            name = tmp_path / kind / f"{i}.png"
            Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(name)

    def load(bad_records, resize):
        cache = tmp_path.with_name(f"{tmp_path.name}-cache")
        return load_images("folder", data_dir=tmp_path, validation=2, resize=resize, cache=cache,
                           bad_records=bad_records)

    shortest = Resize(32, 32)
    found = load(2, shortest)
    assert len(found.skipped) == 2 and all("1.png" in words for words in found.skipped)
    assert "preprocessor_config.json makes it 32 x 64 pixels" in found.skipped[0]
    assert load_resident(found.train, shortest)[0].shape[1:] == (32, 32, 3)
    with pytest.raises(UserError, match=r"2 records cannot be used, .*_records=1"):
        load(1, shortest)
    for whole in (None, shortest._replace(crop=True), shortest._replace(size=(32, 32))):
        assert load(2, whole).skipped == ()  # nor does the cache of another resize count


def test_more_examples_than_bytes(tmp_path):
    """What is said of a set is no reason to make room for so many."""
    rows = {"train": gray_rows(3), "test": gray_rows(3)}
    info = make(tmp_path, "many", image_features((9, 9, 1)), rows).data_path / "dataset_info.json"
    text = info.read_text()
    changed = re.sub(r'("shardLengths": \[\s*)"3"', r'\1"3000000000"', text, count=1)
    assert changed != text
    info.write_text(changed)
    with pytest.raises(UserError, match=r"many/1\.0\.0 is damaged: split .* 3000000000 examples"):
        load_images("many", data_dir=tmp_path)


LINES = ["good,0", "fine,1", ",1", "nice,", "a,b,c", "well,2", '"two\nlines",0', "bad\xff,1",
         "so,0"]


def test_lines_of_text_files(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes("\n".join(["text,label", *LINES, "x,1", "y,0", "z,1"]).encode("latin-1"))
    wrong = {4: "'text' is empty", 5: "'label' is empty", 6: "more cells", 10: "is not UTF-8"}
    for limit in range(4):
        with pytest.raises(UserError) as error:
            load_texts("mine", columns=("text",), train_file=path, bad_records=limit)
        assert f"{path}, line {[*wrong][limit]}" in str(error.value)
        assert "bad_records" in str(error.value)
    data = load_texts("mine", columns=("text",), train_file=path, bad_records=4, validation=2)
    parts = (data.train, data.validation, data.tests["test"])
    numbers = sorted(int(i) for part in parts for i in part.ids)
    assert numbers == [0, 1, 5, 6, 8, 9, 10, 11]
    assert [words.partition(": ")[0] for words in data.skipped] == [
        f"{path}, line {line}" for line in wrong
    ]
    for words, why in zip(data.skipped, wrong.values(), strict=True):
        assert why in words
    texts = {int(i): t for part in parts for i, t in zip(part.ids, part.texts[0], strict=True)}
    assert texts[6] == "two\nlines" and texts[11] == "z"


def test_lines_of_json(tmp_path):
    path, deep = tmp_path / "a.jsonl", "[" * 100_000
    good = [json.dumps({"text": f"t{i}", "label": i / 2}) for i in range(6)]
    bad = ['{"text": "x"}', deep, '["x"]', '{"text": "\\ud800", "label": 1}',
           '{"text": "x", "label": "NaN"}', '{"text": "x", "label": 1e999}']
    path.write_text("\n".join([*good, *bad]))
    known = {"columns": ("text",), "regression": True, "train_file": path, "validation": 1}
    data = load_texts("mine", **known, bad_records=6)
    assert len(data.skipped) == 6
    lines = sorted(int(words.split("line ")[1].partition(":")[0]) for words in data.skipped)
    assert lines == [7, 8, 9, 10, 11, 12]
    with pytest.raises(UserError, match="6 records cannot be used"):
        load_texts("mine", **known, bad_records=5)


def test_a_row_to_be_predicted_is_never_left_out(tmp_path):
    train, blind = tmp_path / "a.csv", tmp_path / "b.csv"
    train.write_text("text,label\n" + "a,0\nb,1\n" * 5)
    blind.write_text("text\na\n\"\"\nb\n")
    with pytest.raises(UserError, match=r"b\.csv, line 3: 'text' is empty") as error:
        load_texts("mine", columns=("text",), train_file=train, predict_file=blind, bad_records=9)
    assert "bad_records" not in str(error.value)


def test_texts_of_tfds(tmp_path):
    import tensorflow_datasets as tfds

    def rows(n, label):
        return [{"text": f"text {i}", "label": label(i)} for i in range(n)]

    features = {"text": tfds.features.Text(), "label": tfds.features.ClassLabel(num_classes=3)}
    train = rows(12, lambda i: i % 2)
    train[3]["text"] = " "
    train[7]["label"] = 2
    train[8]["text"] = b"\xff\xfe"
    blind = rows(4, lambda _: -1)
    blind[1]["text"] = ""
    builder = make(tmp_path, "words", features,
                   {"train": train, "test": rows(4, lambda i: i % 2), "blind": blind})
    features = builder.data_path / "features.json"
    features.write_text(features.read_text().replace('"numClasses": "3"', '"numClasses": "2"'))
    known = {"columns": ("text",), "data_dir": tmp_path, "validation": 2,
             "unlabelled_splits": {"predict": "blind"}}
    wrong = {3: "its text is empty", 7: "its label is 2", 8: "it cannot be read"}
    with pytest.raises(UserError, match=r"words/1.0.0 is damaged: text 8 of 'train'.*\n.*bad_rec"):
        load_texts("words", **known)
    with pytest.raises(UserError, match=r"3 records cannot be used, where .*=2"):
        load_texts("words", **known, bad_records=2)
    data = load_texts("words", **known, bad_records=3)
    assert sorted([*data.train.ids, *data.validation.ids]) == [0, 1, 2, 4, 5, 6, 9, 10, 11]
    for words, (i, why) in zip(data.skipped, wrong.items(), strict=True):
        assert f"text {i} of 'train': {why}" in words
    assert data.unlabelled["predict"].texts == (["text 0", "", "text 2", "text 3"],)


def test_classes_without_a_training_example_are_told(run_config):
    run_config.data.bad_records, run_config.data.limit = 3, 1
    for mode in ("resident", "stream"):
        run_config.data.mode = mode
        *_, absent, few = setup.open_base(resolve(run_config), mesh.all_devices()).problem.notes
        assert absent == "no training example of 1 of the classes, which cannot be learnt: dog"
        assert few.startswith("training examples: 1, fewer than batch_size 16; a step has each 16 ")


def test_processes_that_read_other_files_are_told(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(mesh.multihost_utils, "process_allgather", lambda x: np.array([x, x]))
    mesh.check_same("the data", {"train": 5})
    monkeypatch.setattr(mesh.multihost_utils, "process_allgather", lambda x: np.array([x, x + 1]))
    with pytest.raises(UserError, match=r"the data of process 1 is not that of process 0.*train"):
        mesh.check_same("the data", {"train": 5})
