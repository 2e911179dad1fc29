"""The registry: which source serves a name, what it misses, and what all sources have in common."""

import re
from pathlib import Path

import numpy as np
import pytest

from rmlora_jax.data import ArraySource, Request, known, missing, open_images, open_texts
from rmlora_jax.data import sources as registry
from rmlora_jax.data.cifar import ARCHIVES
from rmlora_jax.data.dataset import (
    BadRecord,
    FoundImages,
    FoundTexts,
    Source,
    TextSplit,
)
from rmlora_jax.data.subsets import hold_out, labels_of
from rmlora_jax.errors import UserError

LABELS = np.arange(40) % 4


class Damaged(ArraySource):
    """Images of which one cannot be used."""

    def check(self, index):
        if index == 7:
            raise BadRecord("made: image 7 is damaged\nadvice")


def images(request):
    pixels = np.arange(40, dtype=np.uint8)[:, None, None, None] + np.zeros((8, 8, 3), np.uint8)
    return FoundImages(
        Damaged(pixels, LABELS), None, ("a", "b", "c", "d"), (8, 8, 3), place="made",
        by_class=True, notes=("ignored: a.txt",),
    )


def texts(request, skipped):
    skipped.add(BadRecord("made: row 3 is empty"))
    split = TextSplit(([str(i) for i in range(40)],), LABELS, np.arange(40))
    return FoundTexts(("text",), ("a", "b", "c", "d"), split, {}, {}, place="made")


@pytest.fixture
def made(monkeypatch):
    """A source that someone adds: one entry of the registry."""
    source = Source(
        handles=lambda request: request.name == "made",
        missing=lambda request: ["config.data.data_dir=None: give a folder"],
        images=images,
        texts=texts,
    )
    monkeypatch.setattr(registry, "SOURCES", (source, *registry.SOURCES))


def test_an_added_source_is_treated_like_all_others(made):
    with pytest.raises(UserError, match="no test split, and validation=0"):
        open_images(Request("made", validation=0))
    data = open_images(Request("made", validation=4, seed=1, bad_records=1, per_class=5, limit=18))
    assert data.skipped == ("made: image 7 is damaged",)
    assert data.notes == ("ignored: a.txt",)
    assert (len(data.train), len(data.validation), len(data.test)) == (18, 4, 4)
    numbers = {n: [int(s[i]["image"][0, 0, 0]) for i in range(len(s))]
               for n, s in (("test", data.test), ("validation", data.validation))}
    # As if the damaged one had never been there; each class gives its share.
    left = np.delete(np.arange(40), 7)
    kept, held = hold_out(39, 4, seed=2, labels=LABELS[left])
    assert numbers["test"] == left[held].tolist()
    _, chosen = hold_out(35, 4, seed=1, labels=LABELS[left][kept])
    assert numbers["validation"] == left[kept][chosen].tolist()
    assert np.bincount(labels_of(data.test)).tolist() == [1] * 4
    with pytest.raises(UserError, match="row 3 is empty"):
        open_texts(Request("made"))
    data = open_texts(Request("made", validation=4, bad_records=1, limit=20))
    assert [len(s.ids) for s in (data.train, data.validation, data.tests["test"])] == [20, 4, 4]
    assert data.skipped == ("made: row 3 is empty",)


def test_the_source_in_the_readme(monkeypatch):
    readme = Path(registry.__file__).with_name("README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", readme, re.S)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    monkeypatch.setattr(registry, "SOURCES", (names["SOURCE"], *registry.SOURCES))
    data = open_images(Request("mine", validation=2))
    assert [len(part) for part in (data.train, data.validation, data.test)] == [16, 2, 2]
    assert data.class_names == ("cat", "dog")


def test_what_is_missing(made, tmp_path, monkeypatch):
    assert missing("images", Request("made")) == ["config.data.data_dir=None: give a folder"]
    assert missing("images", Request("digits")) == []
    assert missing("images", Request("cifar100", data_dir=tmp_path)) == []  # it can be fetched
    assert missing("texts", Request("glue/cola", data_dir=tmp_path / "new")) == []
    for name in ("cifar100", "digits", "folder"):
        (line,) = missing("texts", Request(name, data_dir=tmp_path))
        assert line == f"config.data.name={name!r}: {name!r} holds images, not texts"
    (line,) = missing("texts", Request("imdb_reviews", data_dir=tmp_path))
    assert line.startswith("config.data.name='imdb_reviews': imdb_reviews is not prepared in ")
    (line,) = missing("images", Request("digits", data_dir=__file__))
    assert line == f"config.data.data_dir={__file__!r}: it is a file; give a folder"
    takes = registry.SOURCES[0]._replace(takes_file=True, missing=lambda request: [])
    monkeypatch.setattr(registry, "SOURCES", (takes, *registry.SOURCES[1:]))
    assert missing("images", Request("made", data_dir=__file__)) == []
    (line,) = missing("utterances", Request("digits"))
    assert line == "config.data.name='digits': 'digits' holds images, not utterances"
    (line,) = missing("utterances", Request("japanese_vowels", data_dir=tmp_path / "x"))
    assert line.startswith("config.data.data_dir: there is no folder ")
    (tmp_path / "rows.csv").write_text("")
    files = {"train_file": tmp_path / "row.csv", "test_file": "a.xlsx"}
    train, test = missing("texts", Request("mine", columns=("text",), **files))
    assert train.endswith("there is no such file; did you mean rows.csv?")
    assert test.startswith("config.text.test_file='a.xlsx': files of texts end in .csv")


def test_what_is_known_without_the_data(made):
    assert known("images", Request("cifar10")) == (10, 50_000, 10_000, (32, 32, 3))
    assert known("images", Request("cifar100", label_key="coarse_label")).classes == 20
    assert known("images", Request("cifar100", label_key="id")) is None
    assert known("images", Request("cifar10:1.0.0")) is None
    assert known("texts", Request("glue/mnli")) == (3, 0, 0, None)
    assert known("texts", Request("glue/stsb")) is None  # a regression has no classes
    for name in ("made", "beans", "no name!"):
        assert known("images", Request(name)) is None
    for archive in ARCHIVES.values():
        assert sum(n for _, n in archive.train) == known("images", Request(archive.name)).train
