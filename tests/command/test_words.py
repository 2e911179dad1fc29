"""The command ``rmlora``: its words, what it says of mistakes, and how little it imports."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rmlora_jax import called, config_file
from rmlora_jax.command import help as help_text
from rmlora_jax.command import words
from rmlora_jax.errors import UserError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def rmlora(monkeypatch):
    """As if this process were the installed command."""
    monkeypatch.setattr(sys, "argv", ["/usr/local/bin/rmlora"])


@pytest.fixture
def run_py(monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(ROOT / "run.py")])


def test_help(rmlora, capsys):
    for asked in ([], ["--help"], ["-h"], ["help"]):
        words.run(asked)
        lines = capsys.readouterr().out.splitlines()
        found = [line.split()[1] for line in lines if line.startswith("  rmlora ")]
        assert found == ["train", "predict", "chat", "export", "bench", "configs", "new"]
        assert max(map(len, lines)) <= 90


@pytest.mark.parametrize(("word", "has", "lacks"), [
    ("train", ["rmlora train --config=NAME --workdir=DIR", "--compile_only"], "--temperature"),
    ("predict", ["rmlora predict --workdir=DIR INPUT ...", "--top\n", "@FILE"], "--predict"),
    ("chat", ["rmlora chat --workdir=DIR\n", "--temperature", "(default: 256)"], "--config"),
    ("export", ["rmlora export --workdir=DIR\n", "--workdir"], "--export"),
    ("configs", ["rmlora configs"], "--workdir"),
    ("new", ["rmlora new FILE.py --config=NAME"], "--workdir"),
])
def test_help_of_a_word(rmlora, capsys, word, has, lacks):
    words.run([word, "--help"])
    told = capsys.readouterr().out
    assert all(part in told for part in has) and lacks not in told
    assert "run.py" not in told and "repeat this option" not in told


def test_help_of_the_script(run_py):
    meanings = {"config": "a file", "workdir": "a folder"}
    told = help_text.of_script(meanings)
    for use in ("--config=NAME --workdir=DIR", "--workdir=DIR --predict INPUT ...",
                "--workdir=DIR --chat", "--workdir=DIR --export=merged"):
        assert f"  python run.py {use}" in told
    assert "  --config\n      a file\n  --workdir\n      a folder\n" in told


@pytest.mark.parametrize(("typed", "flags"), [
    ("train --config=a.py", ["--config=a.py"]),
    ("predict --workdir=a b.jpg --top=3", ["--predict=", "--workdir=a", "b.jpg", "--top=3"]),
    ("chat --workdir=a", ["--chat", "--workdir=a"]),
    ("export --workdir=a", ["--export=merged", "--workdir=a"]),
])
def test_a_word_of_the_trainer_is_a_flag_of_the_script(monkeypatch, typed, flags):
    seen = []
    monkeypatch.setattr(words, "flagged", seen.append)
    words.run(typed.split())
    assert seen == [flags]


@pytest.mark.parametrize(("typed", "told"), [
    ("tarin", "there is no command 'tarin'; did you mean train?\nrmlora --help lists them"),
    ("zzz", "there is no command 'zzz'\nrmlora --help lists them"),
    ("--config=a.py", "--config=a.py: a command comes first, such as rmlora train --config=a.py"),
    ("configs all", "unexpected argument 'all'; type rmlora configs"),
    ("new", "new takes a file to make and the config to copy; type rmlora new my.py --config=NAME"),
    ("new a.py b.py", "new takes a file"),
    ("new a.py --from=quickstart", "new takes a file"),
    ("new mine", "'mine': a config is a Python file; type rmlora new mine.py"),
    ("new a.py --config=smolm2_sft", "there is no bundled config 'smolm2_sft'; did you mean "
     "smollm2_sft?\nrmlora configs lists them"),
    ("new none/a.py", "none/a.py: No such file or directory; give another place"),
    ("new there.py", "there.py exists already; give another name"),
])
def test_mistakes(rmlora, tmp_path, monkeypatch, typed, told):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.py").write_text("mine")
    with pytest.raises(UserError) as error:
        words.run(typed.split())
    assert str(error.value).startswith(told)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("there.py", "mine")]


def test_configs_are_listed_with_a_line_each(rmlora, capsys):
    words.run(["configs"])
    lines = capsys.readouterr().out.splitlines()
    files = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))
    assert [line.split()[0] for line in lines[: len(files)]] == files
    first = (ROOT / "configs" / "quickstart.py").read_text().splitlines()[0].strip('"')
    assert any(line.split(maxsplit=1) == ["quickstart", first] for line in lines)
    assert all(len(line.split()) > 3 and len(line) <= 120 for line in lines[: len(files)])
    assert lines[-1].startswith("rmlora train --config=NAME trains one; rmlora new my.py ")


@pytest.mark.parametrize(("typed", "name"), [
    ("mine.py", "quickstart"), ("speech.py", "speech"),
    ("mine.py --config=roberta_glue", "roberta_glue"),
    ("--config=configs/ablation.py mine.py", "ablation"),
])
def test_a_new_config_is_a_copy(rmlora, tmp_path, monkeypatch, capsys, typed, name):
    monkeypatch.chdir(tmp_path)
    words.run(["new", *typed.split()])
    (copy,), source = tmp_path.iterdir(), ROOT / "configs" / f"{name}.py"
    assert copy.read_bytes() == source.read_bytes()
    assert capsys.readouterr().out.endswith(f"then type\nrmlora train --config={copy.name}\n")
    given = ":grid" if name == "ablation" else ""
    assert config_file.load(copy.name + given) == config_file.load(name + given)


def test_configs_by_name_from_any_folder(rmlora, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    same = [config_file.load(text).to_dict() for text in ("vit_cifar10", "configs/vit_cifar10.py")]
    assert same[0] == same[1] and same[0]["data"]["name"] == "cifar10"
    assert config_file.load("roberta_glue:rte").data.name == "glue/rte"
    for text, told in [("smollm2-sft", "; did you mean smollm2_sft?"),
                       ("none", "; there are ablation, beyond_lora,"),
                       ("run", "; there are"), ("__main__", "; there are")]:
        with pytest.raises(UserError) as error:
            config_file.load(text)
        assert f"there is no config file {text!r}{told}" in str(error.value)
    (tmp_path / "quickstart").write_text("def get_config():\n    return 3\n")  # one's own file
    with pytest.raises(UserError, match="returns 'int'"):
        config_file.load("quickstart")


def test_a_config_may_build_on_a_bundled_one(tmp_path, monkeypatch):
    """By either name, also where no folder ``configs`` can be imported."""
    monkeypatch.setattr(sys, "path", [p for p in sys.path if Path(p).resolve() != ROOT])
    monkeypatch.chdir(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "configs"]:
        monkeypatch.delitem(sys.modules, name)
    for package in ("configs", "rmlora_jax.configs"):
        (tmp_path / "mine.py").write_text(
            f"from {package} import speech\n\n\ndef get_config():\n    return speech.get_config()\n"
        )
        assert config_file.load("mine.py").data.name == "japanese_vowels"


@pytest.mark.parametrize(("argv", "train", "config"), [
    (["/usr/bin/rmlora", "train"], "rmlora train --workdir=a", "speech:base"),
    ([str(ROOT / "rmlora_jax" / "__main__.py")], "python -m rmlora_jax train --workdir=a",
     "speech:base"),
    (["run.py"], "python run.py --workdir=a", "configs/speech.py:base"),
    (["ipython"], "python run.py --workdir=a", "configs/speech.py:base"),  # this is a checkout
])
def test_messages_name_the_command_that_was_called(monkeypatch, argv, train, config):
    monkeypatch.setattr(sys, "argv", argv)
    assert called.command("train", "--workdir=a") == train
    assert called.config("speech:base") == config


def test_the_base_of_speech_is_made_by_the_command_that_was_called(rmlora):
    from rmlora_jax.tasks import speech

    assert speech._advice() == "type: rmlora train --config=speech:base --workdir=FOLDER"


def test_messages_of_an_installation(monkeypatch, tmp_path):
    monkeypatch.setattr(called, "SCRIPT", tmp_path / "run.py")  # which is not there
    monkeypatch.setattr(sys, "argv", ["ipython"])
    assert called.command("export", "--workdir=a") == "rmlora export --workdir=a"
    assert called.bench() == "rmlora bench"
    with pytest.raises(UserError, match=r"such as the copy that rmlora new quickstart\.py makes"):
        config_file.load(str(tmp_path))


def test_no_message_names_run_py_by_itself():
    """`called` says what the person has; a message that names run.py may name what is not there."""
    files = [path for path in (ROOT / "rmlora_jax").rglob("*.py") if path.stem != "called"]
    named = [path.name for path in files if "python run.py" in path.read_text()]
    assert not named


def test_words_that_need_no_jax_do_not_import_it():
    code = ("import json, sys\nfrom rmlora_jax.command import words\n"
            "for typed in (['--help'], ['configs'], ['train', '--help']):\n    words.run(typed)\n"
            "print(json.dumps([name.partition('.')[0] for name in sys.modules]))")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                         cwd=ROOT)  # fmt: skip
    found = set(json.loads(out.stdout.splitlines()[-1]))
    assert not found & {"jax", "flax", "optax", "tensorflow", "transformers", "tensorflow_datasets"}
    assert {"rmlora_jax", "absl"} <= found
