"""``python run.py --predict``: what it prints and writes, and how it refuses."""

import csv
import io
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from fake_devices import with_devices
from fixtures.text.tiny import write_head, write_model
from PIL import Image

from rmlora_jax import hub
from rmlora_jax.errors import UserError
from rmlora_jax.hub.info import Info, write_info
from rmlora_jax.inference import inputs, predict
from rmlora_jax.inference.classifier import Prediction
from rmlora_jax.train import finished

ROOT = Path(__file__).parent.parent.parent


def run(*arguments, check=True, **options):
    done = subprocess.run(
        [sys.executable, str(ROOT / "run.py"), *map(str, arguments)],
        env=with_devices(1),
        capture_output=True,
        text=True,
        timeout=300,
        **options,
    )
    assert done.returncode == 0 or not check, done.stderr
    return done


def read(file):
    with open(file, newline="", encoding="utf-8") as lines:
        return list(csv.reader(lines))


@pytest.fixture
def photos(tmp_path):
    """Five images in two folders, one with a comma in its name."""
    folder = tmp_path / "photos"
    for i, name in enumerate(["a.png", "b.png", "c, d.png", "more/e.jpg", "more/[f].png"]):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.RandomState(i).randint(0, 256, (12, 12, 3), np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = write_head(write_model(tmp_path_factory.mktemp("pairs")), 2)
    write_info(folder, Info(
        "text_classification", ("no", "yes, sir"), max_length=32, columns=("one", "two")
    ))
    return folder


def test_images_from_the_command_line(tiny_vit, photos, tmp_path):
    (photos / "b.png").write_bytes(b"no image")
    out = tmp_path / "new" / "out.csv"
    done = run(
        "--workdir", tiny_vit, "--predict", f"{photos / 'a.png'},{photos / 'more'}",
        photos / "b.png", photos / "c, d.png", f"--out={out}", check=False,
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr
    errors = done.stderr.strip().splitlines()
    said = f"error: {photos / 'b.png'} cannot be read as an image: its content is none of JPEG, PNG"
    assert errors[0].startswith(said)
    assert errors[1:] == ["error: 1 of 5 images cannot be read"]
    expected = hub.load(tiny_vit)([photos / "a.png", photos / "more", photos / "c, d.png"])
    heading, *rows = read(out)
    assert heading == ["input", "label", "probability"]
    names = ["a.png", "more/[f].png", "more/e.jpg", "c, d.png"]
    assert [row[0] for row in rows] == [str(photos / name) for name in names]
    assert [row[1] for row in rows] == [p.label for p in expected]
    found = [float(row[2]) for row in rows]
    np.testing.assert_allclose(found, [p.probability for p in expected], atol=1e-5)
    *lines, said = done.stdout.splitlines()
    assert said == f"predictions: {out}"
    assert lines[0].split() == heading and len(lines) == 5
    assert len(set(map(len, lines))) == 1  # aligned
    assert lines[1].endswith(f"{expected[0].label}       {expected[0].probability:.4f}")


def test_texts_from_standard_input_and_elsewhere(pairs, tmp_path):
    rows = [("good, w1", 'bad "w2"'), ("w3", "w4 w5"), ("w6", "w7")]
    (tmp_path / "texts.tsv").write_bytes(b"\xef\xbb\xbfw3\tw4 w5\r\n\r\n")
    done = run(
        "--workdir", pairs, "--predict", "-", f"@{tmp_path / 'texts.tsv'}", "w6\tw7", "--top=2",
        input="\t".join(rows[0]) + "\n",
    )  # fmt: skip
    found = read(pairs / "predictions.csv")[1:]
    assert f"predictions: {pairs / 'predictions.csv'}" in done.stdout
    assert [tuple(row[0].split("\t")) for row in found] == [row for row in rows for _ in range(2)]
    expected = hub.load(pairs)(rows, top=2)
    assert [row[1] for row in found] == [p.label for p in expected]
    found = [float(row[2]) for row in found]
    np.testing.assert_allclose(found, [p.probability for p in expected], atol=1e-5)
    np.testing.assert_allclose(np.array(found).reshape(3, 2).sum(1), 1, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--workdir=RUN", "--predict=a.png"], ["neither adapter/ nor merged/", "--export=merged"]),
        (["--predict=a.png"], ["--workdir=DIR --predict"]),
        (["--workdir=RUN", "--predict=", "--config=configs/nothing.py"], ["no config file"]),
    ],
)
def test_mistakes_end_in_plain_words(tmp_path, arguments, words):
    (tmp_path / "checkpoints").mkdir()
    done = run(*(a.replace("RUN", str(tmp_path)) for a in arguments), check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr and not done.stdout
    assert all(line.startswith("error: ") for line in done.stderr.strip().splitlines())
    for word in words:
        assert word in done.stderr


def test_mistakes_in_inputs(tiny_vit, pairs, photos, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "one.tsv").write_text("a\tb\n\nonly one\n")
    (tmp_path / "latin.tsv").write_bytes(b"a\tb\ncaf\xe9\tb\n")
    (tmp_path / "blank.tsv").write_text("\n\n")
    for model, values, words in (
        (tiny_vit, ["", " "], f"nothing to predict: type python run.py --workdir={tiny_vit}"),
        (tiny_vit, [","], "names no image"),
        (tiny_vit, [str(tmp_path / "empty")], "there is no image in"),
        (tiny_vit, [str(tmp_path / "notes.txt")], "the suffix of an image; give one of .bmp"),
        (tiny_vit, [f"{photos}/a.png,{photos}/x.png"], "there is no file or folder"),
        (tiny_vit, ["a text " * 100], "there is no file or folder 'a text a"),
        (tiny_vit, [f"{photos}/*.gif"], "no image is called"),
        (pairs, ["a", "b"], "--predict, line 1: this model takes 2 texts (one, two) with a tab"),
        (pairs, [f"@{tmp_path}/one.tsv"], "one.tsv, line 3: this model takes 2 texts"),
        (pairs, [f"{tmp_path}/latin.tsv"], "latin.tsv, line 2: not UTF-8"),
        (pairs, [f"{tmp_path}/blank.tsv"], "there is no text in"),
        (pairs, ["@user\thello"], "must be in a file"),
    ):
        with pytest.raises(UserError) as error:
            predict.predict(str(model), values)
        assert words in str(error.value)
    with pytest.raises(UserError, match="is a folder; name a file in it"):
        predict.predict(str(tiny_vit), [str(photos)], out=str(tmp_path))
    with pytest.raises(UserError, match="cannot be written"):
        predict.predict(str(tiny_vit), [str(photos)], out=str(tmp_path / "notes.txt" / "a.csv"))
    assert not (tiny_vit / "predictions.csv").exists()


def test_nothing_is_written_where_nothing_was_read(tiny_vit, tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(b"no image")
    out = tmp_path / "out.csv"
    assert predict.predict(str(tiny_vit), [str(tmp_path)], out=str(out)) == 1
    assert not out.exists() and "error: 1 of 1 images" in capsys.readouterr().err


def test_out_of_memory_is_two_lines_with_what_to_lower(tiny_vit, photos, monkeypatch):
    model = hub.load(tiny_vit)

    def forward(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 17 bytes.")

    model.forward = forward
    for found in (lambda _: model, forward):
        with pytest.raises(UserError) as error:
            predict.predict(str(tiny_vit), [str(photos)], find=found)
        first, advice = str(error.value).splitlines()
        assert first.startswith(f"the model in {tiny_vit} needs more memory than there is")
        assert advice == "Type the command with --at_once=8"
    monkeypatch.setattr(finished, "placed", forward)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(UserError, match=r"\nType the command with JAX_PLATFORMS=cpu before it$"):
        finished.export_merged(tiny_vit)
    assert not (tiny_vit / predict.FILE).exists()


def test_nothing_of_pillow_comes_between(tiny_vit, tmp_path, monkeypatch, recwarn):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60)  # 81 are more, and less than twice as many
    assert predict.predict(str(tiny_vit), [str(tmp_path)], out=str(tmp_path / "a.csv")) == 0
    assert not [w for w in recwarn if issubclass(w.category, Image.DecompressionBombWarning)]


def test_images_are_found_by_patterns(photos, monkeypatch):
    names = ["a.png", "b.png", "c, d.png", "more/[f].png", "more/e.jpg"]
    every = [str(photos / name) for name in names]
    (photos / "notes.txt").write_text("no image")
    (photos / "nothing").mkdir()
    assert inputs.images_of([f"{photos}/*.png"]) == every[:3]
    assert inputs.images_of([f"{photos}/**"]) == every
    assert inputs.images_of([f"{photos}/more/[f].png"]) == every[3:4]
    assert inputs.images_of([f"{photos}/[ab].png, {photos}/more/"]) == every[:2] + every[3:]
    assert inputs.images_of([every[1], every[0], every[1]]) == [every[1], every[0], every[1]]
    monkeypatch.chdir(photos)
    assert inputs.images_of(["./b.png", "more"]) == ["b.png", "more/[f].png", "more/e.jpg"]


def test_texts_are_taken_as_they_are(tmp_path, monkeypatch):
    file = tmp_path / "texts.txt"
    file.write_text("one, two\n  \n three\u2028four\tfive")
    lines = ["one, two", " three\u2028four\tfive"]
    for value in (str(file), f"@{file}"):
        assert inputs.texts_of([value], ("text",)) == lines
    assert inputs.texts_of(["a, b", "x" * 5000], ("text",)) == ["a, b", "x" * 5000]
    stream = SimpleNamespace(buffer=io.BytesIO("é\n".encode()))
    monkeypatch.setattr(sys, "stdin", stream)
    assert inputs.texts_of(["-"], ("text",)) == ["é"]
    assert inputs.texts_of(["a\tb"], ("one", "two")) == [("a", "b")]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl"])
def test_a_table_is_read_by_its_columns(pairs, tmp_path, name):
    """No heading, label or other column is ever a part of a text."""
    rows = [("good, w1", 'bad "w2"'), ("w3\nw4", "w5"), ("null" if "j" in name else "w6", "w7")]
    table = [{"id": i, "label": "no", "two": two, "one": one} for i, (one, two) in enumerate(rows)]
    with open(tmp_path / name, "w", newline="") as file:
        if name == "a.jsonl":
            file.writelines(json.dumps(row) + "\n" for row in table)
        else:
            dialect = {"a.csv": "excel", "a.tsv": "excel-tab"}[name]
            writer = csv.DictWriter(file, table[0], dialect=dialect)
            writer.writeheader()
            writer.writerows(table)
    for value in (f"@{tmp_path / name}", str(tmp_path / name)):
        assert inputs.texts_of([value, "w8\tw9"], ("one", "two")) == [*rows, ("w8", "w9")]
        assert inputs.texts_of([value], ("two",)) == [row[1] for row in rows]
    if name != "a.csv":
        return
    out = tmp_path / "out.csv"
    assert predict.predict(str(pairs), [f"@{tmp_path / name}"], out=str(out)) == 0
    found = read(out)[1:]
    assert [row[0] for row in found] == ["\t".join(row) for row in rows]
    expected = hub.load(pairs)(rows)
    assert [row[1] for row in found] == [p.label for p in expected]


def test_tables_that_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    advice = "\nThe model reads the columns of these names: rename those of the file, or put a text"
    for name, content, words in (
        ("a.csv", "sentence,label\ng,pos\n", f"a.csv, line 1: no 'text'; it has 'sentence', 'label'"
         f"{advice}"),
        ("a.tsv", "g\tpos\n", f"a.tsv, line 1: no 'text'; it has 'g', 'pos'{advice}"),
        ("a.csv", "text,label\ng,pos\n,neg\n", "a.csv, line 3: 'text' is empty"),
        ("a.csv", "text,text\ng,h\n", "a.csv, line 1: the heading has 'text' twice"),
        ("a.jsonl", '{"text": ["g"]}\n', "a.jsonl, line 1: 'text' is a list"),
        ("a.json", '[{"text": "g"}]', "a.json: files of texts end in .csv, .tsv or .jsonl;"),
        ("a.csv", "text\n", "a.csv has no rows"),
    ):
        Path(name).write_text(content)
        with pytest.raises(UserError) as error:
            inputs.texts_of([f"@{name}"], ("text",))
        assert str(error.value).startswith(words)
    assert not capsys.readouterr().err
    # Without a heading, pairs are read as in earlier versions, and this is said.
    Path("b.tsv").write_text("w1\tw2\n")
    assert inputs.texts_of(["@b.tsv"], ("one", "two")) == [("w1", "w2")]
    assert capsys.readouterr().err == (
        "b.tsv: no heading with 'one', 'two'; each line is read as a pair\n"
    )
    Path("~c.csv").write_text("label,text\npos,g\n")
    assert inputs.texts_of(["@~c.csv", "~c.csv"], ("text",)) == ["g", "g"]


def test_csv_is_read_back(tmp_path):
    odd = ['a, "b"', "two\nlines", "é\t—", "plain"]
    rows = [Prediction(text, "yes, sir", 1 / (3 + i)) for i, text in enumerate(odd)]
    file = tmp_path / "a.csv"
    file.write_text(predict.to_csv(rows), encoding="utf-8", newline="")
    heading, *found = read(file)
    assert heading == ["input", "label", "probability"]
    assert [row[:2] for row in found] == [[text, "yes, sir"] for text in odd]
    np.testing.assert_allclose([float(row[2]) for row in found], 1 / np.arange(3, 7), rtol=1e-5)
    values = [Prediction(("a", "b"), None, None, 2.5)]
    assert list(csv.reader(io.StringIO(predict.to_csv(values)))) == [
        ["input", "value"], ["a\tb", "2.5"]
    ]  # fmt: skip


def test_the_table_fits_a_terminal():
    rows = [Prediction(f"{'deep/' * 30}{i}.png", "cat", 0.5) for i in range(150)]
    lines = predict.table(rows).splitlines()
    assert len(lines) == 1 + 100 + 1 and lines[-1] == "... and 50 more"
    assert max(map(len, lines)) < 85 and "/7.png" in lines[8]
    text, = predict.table([Prediction("w " * 50 + "end", "cat", 0.5)]).splitlines()[1:]
    assert text.startswith("w w") and "end" not in text and "..." in text
    text, = predict.table([Prediction("\x1b[2Jred\nline \udcff", "a\rb", 0.5)]).splitlines()[1:]
    assert text.isprintable() and text.encode()
