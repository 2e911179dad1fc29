"""Texts from files: what is read, and the mistakes that are named."""

import csv
import json

import numpy as np
import pytest

from rmlora_jax.data import load_texts
from rmlora_jax.errors import UserError

ROWS = [
    {"text": f'comma, "quote" and ünïcode {i}', "other": f"second {i}",
     "label": ["bad", "good", "so so"][i % 3], "score": i / 4}
    for i in range(30)
]


def write(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path
    with open(path, "w", newline="", encoding="utf-8") as file:
        dialect = "excel" if path.suffix == ".csv" else "excel-tab"
        writer = csv.DictWriter(file, rows[0], dialect=dialect)
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.mark.parametrize("kind", [".csv", ".tsv", ".jsonl"])
def test_files(kind, tmp_path):
    train = write(tmp_path / f"train{kind}", ROWS)
    test = write(tmp_path / f"test{kind}", ROWS[:5])
    blind = write(tmp_path / f"blind{kind}", [{"text": "a", "other": "b"}])
    data = load_texts(
        "mine", columns=("text", "other"), train_file=train, test_file=test, predict_file=blind,
        validation=6,
    )
    assert data.label_names == ("bad", "good", "so so")
    assert len(data.train.ids) == 24 and len(data.validation.ids) == 6
    assert np.bincount(data.validation.labels).tolist() == [2, 2, 2]
    for split in (data.train, data.validation, data.tests["test"]):
        for i, row in enumerate(split.ids):
            assert split.texts[0][i] == ROWS[row]["text"]
            assert split.texts[1][i] == ROWS[row]["other"]
            assert data.label_names[split.labels[i]] == ROWS[row]["label"]
    assert sorted([*data.train.ids, *data.validation.ids]) == list(range(30))
    assert data.unlabelled["predict"].texts == (["a"], ["b"])
    values = load_texts(
        "mine", columns=("text",), label_key="score", regression=True, train_file=train,
        validation=5,
    )
    assert values.label_names is None
    parts = (values.train, values.validation, values.tests["test"])
    assert [len(part.ids) for part in parts] == [20, 5, 5]  # held out twice
    assert sorted(i for part in parts for i in part.ids) == list(range(30))
    for part in parts:
        np.testing.assert_allclose(part.labels, part.ids / 4)


def test_whole_numbers_as_labels_keep_their_order(tmp_path):
    rows = [{"text": "x", "label": str(n)} for n in (10, 2, 0, 2, 10, 0, 10, 2)]
    data = load_texts(
        "mine", columns=("text",), train_file=write(tmp_path / "a.csv", rows), validation=2
    )
    assert data.label_names == ("0", "2", "10")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", "text,label\na,1\n,2\n", r"line 3: 'text' is empty"),
        ("a.csv", "text,label\na,1\nb\n", r"line 3: 'label' is empty"),
        ("a.csv", "text,label\na,b,1\n", r"line 2: more cells"),
        ("a.csv", "words,label\na,1\n", r"no 'text'; it has 'words', 'label'"),
        ("a.csv", "text,kind\na,1\n", r"no 'label'.*\n.*label_key"),
        ("a.csv", "text,label\n", "no rows"),
        ("a.csv", 'text,label\n"a,1\n', "quotes"),
        ("a.csv", "text,label\na,1\nb,1\nc,1\n", "two classes"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text"\n', "line 2: not JSON"),
        ("a.jsonl", '["a"]\n', "a list, not an object"),
        ("a.xlsx", "", r"\.csv, \.tsv or \.jsonl"),
        ("a.csv", b"text,label\n\xff\xfe,1\n", "not UTF-8"),
    ],
)
def test_files_that_are_wrong(name, content, words, tmp_path):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=words):
        load_texts("mine", columns=("text",), train_file=path)


def test_labels_that_do_not_fit(tmp_path):
    train = write(tmp_path / "a.csv", ROWS)
    test = write(tmp_path / "b.csv", [ROWS[0] | {"label": "great"}])
    with pytest.raises(UserError, match=r"b\.csv, line 2: label 'great' is not in the training"):
        load_texts("mine", columns=("text",), train_file=train, test_file=test)
    with pytest.raises(UserError, match=r"line 2: 'label' is 'bad', not a number"):
        load_texts("mine", columns=("text",), train_file=train, regression=True)
    with pytest.raises(UserError, match="cannot read"):
        load_texts("mine", columns=("text",), train_file=tmp_path / "nothing.csv")
    with pytest.raises(UserError, match=r"text\.columns"):
        load_texts("mine", columns=(), train_file=train)
