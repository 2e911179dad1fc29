"""``--predict`` with a language model: what is printed and written, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fake_devices import with_devices
from fixtures.sft.tiny import write_model

from rmlora_jax import hub
from rmlora_jax.errors import UserError
from rmlora_jax.hub.info import Info
from rmlora_jax.inference import written
from rmlora_jax.inference.generator import Answer, Generator
from rmlora_jax.inference.predict import predict
from rmlora_jax.inference.prompts import as_prompt, prompts_of

ROOT = Path(__file__).parents[2]
ROWS = [{"prompt": "q1 q2", "id": 7}, {"messages": [{"role": "user", "content": "q3"},
        {"role": "assistant", "content": "a3"}]}, {"text": "q4 is"}]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "plain")


def read(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_file_of_prompts(folder, tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "b.txt").write_text("q5\n\nq6 q7\n")
    values, out = [f"@{tmp_path / 'a.jsonl'}", str(tmp_path / "b.txt"), "q8"], tmp_path / "o.jsonl"
    assert predict(str(folder), values, out=str(out), max_new_tokens=6) == 0
    found = read(out)
    given = [*ROWS, "q5", "q6 q7", "q8"]
    expected = hub.load(folder).generate(given, max_new_tokens=6)
    assert [row["answer"] for row in found] == [answer.text for answer in expected]
    assert [(row["tokens"], row["ended"]) for row in found] == [a[2:] for a in expected]
    # What was asked, without what was not: other columns, and the answer in the file.
    assert [row.get("prompt") for row in found] == ["q1 q2", None, None, "q5", "q6 q7", "q8"]
    assert found[1]["messages"] == ROWS[1]["messages"][:1] and found[2]["text"] == "q4 is"
    told = capsys.readouterr().out
    assert told.endswith(f"predictions: {out}\n")
    assert f"> q5\n{expected[3].text}\n" in told and f"> q3\n{expected[1].text}\n" in told


@pytest.mark.slow
def test_one_prompt_from_the_command_line(folder):
    done = subprocess.run(
        [sys.executable, str(ROOT / "run.py"), f"--workdir={folder}", "--predict", "q1 q2",
         "--max_new_tokens=5", "--temperature=1.5", "--seed=4"],
        env=with_devices(1), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer, = hub.load(folder).generate(["q1 q2"], max_new_tokens=5, temperature=1.5, seed=4)
    out = folder / "answers.jsonl"
    assert done.stdout == f"{answer.text}\npredictions: {out}\n"
    assert read(out) == [{"prompt": "q1 q2", "answer": answer.text, "tokens": answer.tokens,
                          "ended": answer.ended}]  # fmt: skip


@pytest.mark.parametrize(("flags", "words"), [
    (["--predict=a", "--temperature=9999"], "temperature is 9999.0; it must be 0"),
    (["--predict=a", "--top_k=-3"], "top_k is -3"),
    (["--predict=a", "--max_new_tokens=0"], "max_new_tokens is 0"),
    (["--predict=a", "--top=3"], "--top does not go with the model in"),
    (["--seed=3"], "--seed is for a trained model; add --predict or --chat"),
])
def test_flags_that_are_refused(folder, flags, words, monkeypatch):
    from absl import flags as absl_flags

    from rmlora_jax.command import actions

    values = absl_flags.FLAGS
    names = [flag.lstrip("-").partition("=")[0] for flag in flags]
    with monkeypatch.context():
        saved = {name: (values[name].value, values[name].present) for name in (*names, "workdir")}
        try:
            values(["run.py", f"--workdir={folder}", *flags])
            with pytest.raises(UserError) as error:
                actions.command([])
            assert str(error.value).startswith(words)
        finally:
            for name, (value, present) in saved.items():
                values[name].value, values[name].present = value, present


def test_options_of_a_language_model_and_a_classifier(tiny_vit, tmp_path):
    with pytest.raises(UserError, match=r"--seed does not go with the model in .*; it takes --top"):
        predict(str(tiny_vit), ["a.png"], seed=3)


def test_rows_that_are_refused(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for content, words in (
        ('{"prompt": "a"}\n{"question": "b"}\n', "a.jsonl, line 2 is {'question': 'b'}; it must"),
        ('{"prompt": "a"\n', "a.jsonl, line 1: not JSON"),
        ('{"messages": "hello"}\n', "a.jsonl, line 1"),
        ('{"prompt": "a", "adapter": 3}\n', "a.jsonl, line 1: adapter is 3"),
        ("", "a.jsonl has no rows"),
    ):
        Path("a.jsonl").write_text(content)
        with pytest.raises(UserError) as error:
            predict(str(folder), ["@a.jsonl"])
        assert str(error.value).startswith(words)
    with pytest.raises(UserError, match="there is no such file"):
        prompts_of(["@b.jsonl"])
    assert not (folder / written.FILE).exists() or read(folder / written.FILE)


def test_no_answer_of_logits_that_are_not_finite(folder, tmp_path, capsys):
    base = hub.load_pretrained(folder)
    base.params["embed"]["embedding"][-1] = np.nan  # of the word a19
    model = Generator(base, base.params, None, Info("sft"))
    out = tmp_path / "answers.jsonl"
    options = {"out": str(out), "find": lambda workdir: model, "max_new_tokens": 2}
    assert predict(str(tmp_path), ["a19", "q1"], **options) == 1
    assert [row["prompt"] for row in read(out)] == ["q1"]
    assert "error: the logits for 1 of 2 prompts are not finite" in capsys.readouterr().err
    out.unlink()
    assert predict(str(tmp_path), ["a19"], **options) == 1 and not out.exists()


def test_what_is_shown():
    rows = [Answer(as_prompt("a\x1b[2J", ""), f"b\x07{i}", 1, "stop") for i in range(30)]
    told = written.shown(rows)
    assert told.startswith("> a [2J\nb 0\n\n> a [2J\nb 1\n") and told.endswith("... and 10 more")
    assert written.shown(rows[:1]) == "b 0"
    named = as_prompt({"prompt": "a", "adapter": "x"}, "")
    assert written.shown([Answer(named, "b", 1, "stop")] * 2) == "> [x] a\nb\n\n> [x] a\nb"
    assert json.loads(written.to_lines([Answer(named, "é\n", 1, "stop")])) == {
        "prompt": "a", "adapter": "x", "answer": "é\n", "tokens": 1, "ended": "stop"}  # fmt: skip
