"""GLUE: its splits, its preparation and the leaderboard's files."""

import csv
import io
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from rmlora_jax.data import download, load_texts
from rmlora_jax.data.glue import TASKS, glue_task, write_predictions
from rmlora_jax.data.prepare import prepare
from rmlora_jax.errors import UserError

SHARED = Path(__file__).parent.parent.parent.parent / "shared" / "tfds"

@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the prepared data sets in ../shared/tfds")
@pytest.mark.parametrize(
    ("task", "sizes", "share"), [("cola", (8551, 1043), 721), ("rte", (2490, 277), 146)]
)
def test_the_real_tasks(task, sizes, share):
    data = load_texts(f"glue/{task}", columns=TASKS[task].columns, data_dir=SHARED,
                      test_splits=TASKS[task].tests)
    assert len(data.train.ids) + len(data.validation.ids) == sizes[0]
    assert len(data.validation.ids) == round(0.1 * sizes[0])
    test = data.tests["test"]
    assert len(test.ids) == sizes[1]
    assert (test.labels == (1 if task == "cola" else 0)).sum() == share
    whole = [np.mean(part.labels) for part in (data.train, data.validation)]
    assert abs(whole[0] - whole[1]) < 0.002  # the classes in their proportions
    assert all(all(column) for column in data.train.texts)


# GLUE as published, in a few lines: archive member -> text.
LINES = {
    "cola": ("CoLA", {
        "train.tsv": 'gj04\t1\t\tOur friends "won\'t buy this.\n' + "x\t0\t*\tBad the.\n" * 9,
        "dev.tsv": "gj04\t1\t\tThe sailors rode.\n",
        "test.tsv": "index\tsentence\n0\tBill whistled past.\n1\tIt was.\n"}),
    "sst2": ("SST-2", {
        "train.tsv": "sentence\tlabel\n" + "good\t1\nbad \t0\n" * 5,
        "dev.tsv": "sentence\tlabel\nfine\t1\n",
        "test.tsv": "index\tsentence\n0\tfine\n"}),
    "stsb": ("STS-B", {
        "train.tsv": "index\tsentence1\tsentence2\tscore\n" + "0\ta cat\ta dog\t2.500\n" * 10,
        "dev.tsv": "index\tsentence1\tsentence2\tscore\n0\ta\tb\t5.000\n",
        "test.tsv": "index\tsentence1\tsentence2\n0\ta\tb\n"}),
    "qqp": ("QQP", {
        "train.tsv": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
                     + "1\t2\t3\tWhy?\tHow?\t0\n1\t2\t3\tWhy?\tWhy\t1\n" * 5,
        "dev.tsv": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n1\t2\t3\ta?\tb?\t1\n",
        "test.tsv": "id\tquestion1\tquestion2\n0\ta?\tb?\n"}),
    "mnli": ("MNLI", {
        "train.tsv": "index\tsentence1\tsentence2\tgold_label\n"
                     + "".join(f"0\ta\tb\t{w}\n" for w in TASKS["mnli"].words) * 4,
        "dev_matched.tsv": "index\tsentence1\tsentence2\tgold_label\n0\ta\tb\tneutral\n",
        "dev_mismatched.tsv": "index\tsentence1\tsentence2\tgold_label\n0\tc\td\tentailment\n",
        "test_matched.tsv": "index\tsentence1\tsentence2\n0\ta\tb\n",
        "test_mismatched.tsv": "index\tsentence1\tsentence2\n0\te\tf\n"}),
    "qnli": ("QNLI", {
        "train.tsv": "index\tquestion\tsentence\tlabel\n"
                     + "0\tq\ts\tentailment\n0\tq\tt\tnot_entailment\n" * 5,
        "dev.tsv": "index\tquestion\tsentence\tlabel\n0\tq\ts\tnot_entailment\n",
        "test.tsv": "index\tquestion\tsentence\n0\tq\ts\n"}),
    "rte": ("RTE", {
        "train.tsv": "index\tsentence1\tsentence2\tlabel\n"
                     + "0\ta\tb\tentailment\n1\ta\tc\tnot_entailment\n" * 5,
        "dev.tsv": "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tnot_entailment\n",
        "test.tsv": "index\tsentence1\tsentence2\n0\ta\tb\n"}),
    "wnli": ("WNLI", {
        "train.tsv": "index\tsentence1\tsentence2\tlabel\n" + "0\ta\tb\t1\n1\ta\tc\t0\n" * 5,
        "dev.tsv": "index\tsentence1\tsentence2\tlabel\n0\ta\tb\t0\n",
        "test.tsv": "index\tsentence1\tsentence2\n0\ta\tb\n"}),
}
MRPC = {
    "dev": "1\t2\n",
    "train": "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t1\t2\tin dev\tb\n"
             + "0\t3\t4\tc\td\n1\t5\t6\te\tf\n" * 5,
    "test": "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\tg\th\n",
}


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A data folder in whose ``downloads`` the published files lie, in a few lines."""
    import tensorflow_datasets as tfds
    import tensorflow_datasets.text

    builder = tfds.builder_cls("glue")
    files = {c.name: builder.url_infos[c.data_url].filename
             for c in builder.BUILDER_CONFIGS if c.data_url}
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    for task, (folder, members) in LINES.items():
        with zipfile.ZipFile(downloads / files[task], "w", zipfile.ZIP_DEFLATED) as archive:
            for name, text in members.items():
                archive.writestr(f"{folder}/{name}", text)
    names = {"dev": "mrpc_dev_ids", "train": "msr_paraphrase_train", "test": "msr_paraphrase_test"}
    for part, stem in names.items():
        found = next(i.filename for u, i in builder.url_infos.items() if stem in u)
        (downloads / found).write_text(MRPC[part], encoding="utf-8")
    # The few lines have other checksums than the real files.
    monkeypatch.setattr(download, "verify", lambda path, sha256, size: None)
    return tmp_path


@pytest.mark.parametrize("task", TASKS)
def test_every_task_is_prepared_without_tensorflow(task, published, capsys):
    facts = TASKS[task]
    data = load_texts(
        f"glue/{task}", columns=facts.columns, regression=facts.regression, data_dir=published,
        test_splits=facts.tests, unlabelled_splits=facts.unlabelled, validation=2,
    )
    assert "tensorflow" not in sys.modules
    assert len(data.train.ids) + len(data.validation.ids) == (12 if task == "mnli" else 10)
    assert set(data.tests) == set(facts.tests) and set(data.unlabelled) == set(facts.files)
    assert len(data.tests["test"].texts) == len(facts.columns) == len(data.columns)
    assert all((split.labels == -1).all() for split in data.unlabelled.values())
    assert not list(published.glob(".glue*"))  # nothing half made is left
    if task == "cola":
        assert any('"won' in text for text in data.train.texts[0] + data.validation.texts[0])
        assert data.label_names == ("unacceptable", "acceptable")
        assert data.unlabelled["predict"].ids.tolist() in ([0, 1], [1, 0])
    if task == "stsb":
        assert data.label_names is None and data.tests["test"].labels.tolist() == [5.0]
    if task == "mnli":
        assert data.label_names == facts.words
        assert data.tests["test_mismatched"].texts == (["c"], ["d"])
    if task == "mrpc":
        assert data.tests["test"].texts[0] == ["in dev"]
    if facts.words:
        assert tuple(data.label_names) == facts.words
    assert prepare(f"glue/{task}", published) == published / "glue" / task / "2.0.0"


def test_an_archive_that_leads_out_is_refused(published):
    (archive,) = (p for p in (published / "downloads").iterdir() if p.name.startswith("RTE"))
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("../../escaped.tsv", "x")
    with pytest.raises(UserError, match=r"escaped\.tsv.*not a file of GLUE"):
        prepare("glue/rte", published)
    archive.write_bytes(b"not a zip")
    with pytest.raises(UserError, match="cannot be read as a zip"):
        prepare("glue/rte", published)
    assert not (published.parent / "escaped.tsv").exists()


def test_names_and_features_that_are_wrong(published, tmp_path):
    with pytest.raises(UserError, match="not prepared"):
        load_texts("glue/colla", columns=("sentence",), data_dir=published)
    with pytest.raises(UserError, match=r"type\npython -m rmlora_jax\.data\.prepare glue/sst2"):
        load_texts("glue/sst2", columns=(), data_dir=tmp_path / "x", download=False)
    prepare("glue/rte", published)
    with pytest.raises(UserError, match="its texts are under sentence1, sentence2"):
        load_texts("glue/rte", columns=("sentence",), data_dir=published)
    with pytest.raises(UserError, match="no class label under 'idx'"):
        load_texts("glue/rte", columns=("sentence1",), label_key="idx", data_dir=published)
    with pytest.raises(UserError, match="no split 'tset'"):
        load_texts("glue/rte", columns=("sentence1",), data_dir=published,
                   test_splits={"test": "tset"})
    with pytest.raises(UserError, match="has no labels"):
        load_texts("glue/rte", columns=("sentence1",), data_dir=published,
                   test_splits={"test": "test"})


def test_glue_names():
    assert glue_task("glue/cola") is TASKS["cola"] and glue_task("glue/cola:2.0.0") is TASKS["cola"]
    assert glue_task("imdb_reviews") is None and glue_task("glue/ax") is None


@pytest.mark.parametrize(
    ("task", "split", "predictions", "name", "column"),
    [
        ("cola", "predict", np.array([1, 0, 1]), "CoLA.tsv", ["0", "1", "1"]),
        ("qnli", "predict", np.array([1, 0, 1]), "QNLI.tsv",
         ["entailment", "not_entailment", "not_entailment"]),
        ("mnli", "predict_mismatched", np.array([2, 1, 0]), "MNLI-mm.tsv",
         ["neutral", "contradiction", "entailment"]),
        ("wnli", "predict", np.array([1, 0, 1]), "WNLI.tsv", ["0", "1", "1"]),
        ("stsb", "predict", np.array([5.7, -0.2, 2.34567], np.float32), "STS-B.tsv",
         ["0.000", "5.000", "2.346"]),
    ],
)
def test_the_leaderboards_files(task, split, predictions, name, column, tmp_path):
    path = write_predictions(
        tmp_path, split, np.array([1, 0, 2]), predictions, None, TASKS[task]
    )
    assert path == tmp_path / name
    rows = list(csv.reader(io.StringIO(path.read_text()), delimiter="\t"))
    assert rows == [["index", "prediction"], *([str(i), v] for i, v in enumerate(column))]


def test_predictions_of_ones_own_data(tmp_path):
    path = write_predictions(tmp_path, "predict", np.arange(2), np.array([1, 0]), ("bad", "good"))
    assert path.read_text() == "index\tprediction\n0\tgood\n1\tbad\n"
    path = write_predictions(tmp_path, "p", np.arange(1), np.array([7.25], np.float32), None)
    assert path.read_text() == "index\tprediction\n0\t7.25\n"
