"""Texts from files: what is read, and the mistakes that are named."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from rmlora_jax.data import load_texts
from rmlora_jax.data.subsets import hold_out
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


MORE = [(f"t{i}", ["neg", "pos"][i % 2]) for i in range(20)]


def rows_of(path, content, **options):
    """The texts of a file with their classes, and what was left out."""
    path.write_text(content, encoding="utf-8", newline="")
    options = {"columns": ("text",), "validation": 2} | options
    data = load_texts("mine", train_file=path, **options)
    parts = (data.train, data.validation, data.tests["test"])
    names = data.label_names
    rows = {
        int(i): (text, label.item() if names is None else names[label])
        for part in parts
        for i, text, label in zip(part.ids, part.texts[0], part.labels, strict=True)
    }
    return [rows[i] for i in sorted(rows)], data.skipped


def table(rows, delimiter=",", heading=("text", "label")):
    return "".join(delimiter.join(row) + "\n" for row in (heading, *rows))


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_the_delimiter_is_that_of_the_heading(tmp_path, name, delimiter):
    found, _ = rows_of(tmp_path / name, table(MORE, delimiter))
    assert found == MORE
    # A name that is asked for decides: the other delimiters may be in texts and in other names.
    odd = [(f"a; b {i}", "x|y", label) for i, (_, label) in enumerate(MORE)]
    found, _ = rows_of(tmp_path / name, table(odd, ",", ("text", "k;l|m", "label")))
    assert found == [(row[0], row[2]) for row in odd]


def test_headings(tmp_path):
    path = tmp_path / "a.csv"
    assert rows_of(path, "\ufeff" + table(MORE, heading=(" text ", '"label"')))[0] == MORE
    assert rows_of(path, "\r\n" + table(MORE).replace("\n", "\r\n"))[0] == MORE
    twice = [(text, label, "other") for text, label in MORE]
    for heading in (("text", "label", "text"), ("text", "label", " label")):
        with pytest.raises(UserError, match=rf"1: the heading has {heading[2].strip()!r} twice"):
            rows_of(path, table(twice, heading=heading))
    assert rows_of(path, table([(*r, "") for r in twice], heading=("text", "label", "", "")))[0] \
        == MORE  # other names may be equal
    for content, words in (
        (table(MORE, ":"), r"line 1: no 'text'; it has 'text:label'\n"),
        (table(MORE[1:], heading=MORE[0]), r"line 1: no 'text'; it has 't0', 'neg'\n"),
    ):
        with pytest.raises(UserError, match=words):
            rows_of(path, content)


def test_what_counts_as_missing(tmp_path):
    """A word in a table, no value in JSON. It is named by its line, and never a class."""
    bad = [("nan", "pos"), ("x", "NaN"), ("x", " null "), ("NULL", "neg")]
    kept = [("None", "neg"), ("NA", "pos"), ("a nan", "pos")]
    found, skipped = rows_of(tmp_path / "a.csv", table([*bad, *kept, *MORE]), bad_records=4)
    assert found == [*kept, *MORE]
    for why, line, cell in zip(
        skipped, range(2, 6), ("'text' is 'nan'", "'label' is 'NaN'", "'label' is 'null'",
                               "'text' is 'NULL'"), strict=True
    ):  # fmt: skip
        assert f"a.csv, line {line}: {cell}, which counts as missing; delete the line, or" in why
    rows = [{"text": text, "label": label} for text, label in MORE]
    for key, value, words in (
        ("label", float("nan"), "'label' is nan, which counts as missing"),
        ("text", float("nan"), "'text' is nan, which counts as missing"),
        ("text", float("inf"), "'text' is inf, which counts as missing"),
        ("label", None, "'label' is empty"),
        ("text", ["a", None], "'text' is a list, not a text or a number"),
        ("label", {"id": 1}, "'label' is a dict, not a text or a number"),
    ):
        with pytest.raises(UserError, match=f"line 1: {words}"):
            rows_of(tmp_path / "a.jsonl", lines([rows[0] | {key: value}, *rows]))
    meant = [{"text": "null", "label": "nan"}, {"text": 7, "label": "nan"}] * 3
    found, _ = rows_of(tmp_path / "a.jsonl", lines(meant + rows))
    assert found[:2] == [("null", "nan"), ("7", "nan")]


def test_a_key_that_is_given_twice(tmp_path):
    twice = '{"text": "1", "text": "2", "label": "pos"}\n'
    rows = lines({"text": text, "label": label} for text, label in MORE)
    with pytest.raises(UserError, match=r"a\.jsonl, line 1: 'text' is given twice"):
        rows_of(tmp_path / "a.jsonl", twice + rows)
    assert rows_of(tmp_path / "a.jsonl", twice + rows, bad_records=1)[0] == MORE


def test_labels_that_mean_the_same_are_one_class(tmp_path):
    path = tmp_path / "a.jsonl"

    def classes(labels, name="a.jsonl"):
        rows = [(f"t{i}", label) for i, label in enumerate(labels)]
        content = lines({"text": text, "label": label} for text, label in rows)
        if name == "a.csv":
            content = table([(text, str(label)) for text, label in rows])
        return [label for _, label in rows_of(path.with_name(name), content)[0]]

    mixed = [1, 0, 1.0, "1", " 1 ", 0.0, 10, 2] * 3
    for name in ("a.jsonl", "a.csv"):
        assert classes(mixed, name) == ["1", "0", "1", "1", "1", "0", "10", "2"] * 3
    assert classes(["pos", "neg", "pos ", "\tneg"] * 3) == ["pos", "neg"] * 6
    # As in earlier versions, where each class is spelt in one way.
    assert classes([1.0, 0.0] * 6) == ["1.0", "0.0"] * 6
    assert classes([True, False] * 6) == ["true", "false"] * 6
    assert classes(["v1.0", "v1"] * 6) == ["v1.0", "v1"] * 6
    with pytest.raises(UserError, match="'label' is 'true' in some rows and a number in others"):
        classes([True, 0, 1] * 6)
    test = tmp_path / "test.csv"
    test.write_text(table([("x", "1.0"), ("y", "0")]))
    train = tmp_path / "train.csv"
    train.write_text(table([(text, str(i % 2)) for i, (text, _) in enumerate(MORE)]))
    data = load_texts("mine", columns=("text",), train_file=train, test_file=test)
    assert data.tests["test"].labels.tolist() == [1, 0]


def test_long_texts_are_read(tmp_path):
    long = "w " * 70_000
    for name, delimiter in (("a.csv", ","), ("a.tsv", "\t")):
        content = table([*MORE, (f'"{long}{delimiter}"', "pos")], delimiter)
        assert rows_of(tmp_path / name, content)[0] == [*MORE, (long + delimiter, "pos")]


def test_quotes_between_tabs(tmp_path):
    """They are letters, as in GLUE's files, or enclose a cell, as csv and pandas write them."""
    plain = [('"Bad" film', "neg"), ('"Hello', "pos"), ('a "word"', "neg"), ('bye"', "pos")]
    content = table([*plain, ("a", '"neg"'), *MORE, ('"', "pos")], "\t")
    found, _ = rows_of(tmp_path / "a.tsv", content)
    assert found == [*plain, ("a", "neg"), *MORE, ('"', "pos")]
    rows = [{"text": text, "label": "ab"[i % 2]} for i, text in enumerate(
        ["two\nlines", "a\ttab", 'say "x"', '"', "x\r\n\r\ny", 'a\n\t"of\nthem"\t', "z"] * 3
    )]
    path = write(tmp_path / "b.tsv", rows)
    found, _ = rows_of(path, path.read_bytes().decode())
    assert found == [(row["text"], row["label"]) for row in rows]
    # The delimiter, not the suffix, decides.
    assert rows_of(tmp_path / "c.csv", path.read_bytes().decode())[0] == found
    # Without a quotation mark between them, these two lines may be one row.
    both = table([('"Hello', "pos"), ('bye"', "neg"), *MORE], "\t")
    with pytest.raises(UserError, match="line 2: its quotation mark may be a letter, or"):
        rows_of(tmp_path / "a.tsv", both)


def test_numbers_are_written_in_digits(tmp_path):
    good = [(f"t{i}", word) for i, word in enumerate(["1", " 2.5 ", "-3e2", "0", "1", "2", "3"])]
    found, _ = rows_of(tmp_path / "a.csv", table(good), regression=True)
    assert [value for _, value in found] == [1, 2.5, -300, 0, 1, 2, 3]
    for word in ("1_000", "3,5", "٣", "1e400", "inf"):
        with pytest.raises(UserError, match=r"line 9: 'label' is '.*', not a number"):
            rows_of(tmp_path / "a.csv", table([*good, ("x", word)], ";"), regression=True)


def test_equal_texts_are_on_one_side_of_each_hold_out(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(table([(f"same {i % 25}", "np"[i % 25 % 2]) for i in range(100)]))
    data = load_texts("mine", columns=("text",), train_file=path, validation=0.2)
    parts = [part.texts[0] for part in (data.train, data.validation, data.tests["test"])]
    assert list(map(len, parts)) == [68, 16, 16]
    assert len(set.union(*map(set, parts))) == sum(len(set(part)) for part in parts) == 25
    # As runs of earlier versions drew, row by row.
    rows = load_texts("mine", columns=("text",), train_file=path, validation=0.2, apart=False)
    assert set(rows.train.texts[0]) & set(rows.validation.texts[0])
    _, held = hold_out(100, 20, seed=1, labels=np.arange(100) % 25 % 2)
    assert rows.tests["test"].ids.tolist() == held.tolist()
    test = tmp_path / "b.csv"
    test.write_text(table([("same 3", "n"), ("new", "n"), ("same 3", "p")]))
    data = load_texts("mine", columns=("text",), train_file=path, test_file=test)
    assert data.notes == ("2 of 3 rows of 'test' are training texts, too",)


def test_a_name_that_begins_with_a_tilde(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert rows_of(Path("~a.csv"), table(MORE))[0] == MORE
