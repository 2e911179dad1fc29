"""A config file of one's own that is wrong: a line or two with its name and line, no traceback."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rmlora_jax import config_file
from rmlora_jax.errors import UserError
from rmlora_jax.study.config import check_study, default_study, load
from rmlora_jax.train.config import default_config, mistakes, resolve

ROOT = Path(__file__).parents[2]
HEAD = """from rmlora_jax.train.config import default_config


def get_config():
    c = default_config()
"""  # the next line is line 6


def body(line):
    return f"{HEAD}    {line}\n    return c\n"


FILES = {  # name: (what is in it, the one line that a person reads)
    "empty.py": ("", "empty.py has no function called get_config"),
    "other.py": ("def getconfig():\n    return 1\n",
                 "other.py has no function called get_config; did you mean getconfig?"),
    "number.py": ("get_config = 3\n", "number.py has no function called get_config"),
    "nothing.py": (HEAD, "nothing.py, line 4: get_config() returns nothing; does it end with"),
    "dict.py": ("\ndef get_config():\n    return {'steps': 3}\n",
                "dict.py, line 2: get_config() returns 'dict', not the ConfigDict of default_con"),
    "text.py": (HEAD + "    return 'c'\n", "text.py, line 4: get_config() returns 'str'"),
    "a.json": ('{"steps": 3}', "a.json: a config is a Python file with get_config(), as "
               "configs/quickstart.py, not .json"),
    "a.yaml": ("steps: 3\n", "a.yaml: a config is a Python file"),
    "flow.py": ('{\n"flip": true}', "flow.py, line 2: NameError: name 'true' is not defined"),
    "syntax.py": (body("c.steps = = 3"), "syntax.py, line 6: SyntaxError: invalid syntax"),
    "open.py": (body("c.steps = ("), "open.py, line 6: SyntaxError: '(' was never closed"),
    "tabs.py": ("def get_config():\n\tc = 1\n        return c\n", "tabs.py, line 3: TabError: "),
    "bytes.py": (b"x = '\xe9'\n", "bytes.py, line 1: SyntaxError: (unicode error)"),
    "null.py": ("x = 1\0\n", "null.py: SyntaxError: source code"),
    "import.py": ("\nimport nosuchmodule\n", "import.py, line 2: ModuleNotFoundError: No module"),
    "name.py": (body("c.steps = many"), "name.py, line 6: NameError: name 'many'"),
    "key.py": (body("{}['x']"), "key.py, line 6: KeyError: x"),
    "none.py": (body("None.x"), "none.py, line 6: AttributeError: 'NoneType' object has no"),
    "exit.py": (body("raise SystemExit(3)"), "exit.py, line 6: SystemExit: 3"),
    "deep.py": ("\ndef get_config():\n    return get_config()\n",
                "deep.py, line 3: RecursionError: maximum recursion depth"),
    "lines.py": (body("raise ValueError('one\\ntwo')"), "lines.py, line 6: ValueError: one"),
    "section.py": (body("c.optimiser.b1 = 0.9"),
                   "section.py, line 6: there is no field optimiser; did you mean optimizer?"),
    "item.py": (body("c['optimiser']['b1'] = 0.9"),
                "item.py, line 6: there is no field optimiser; did you mean optimizer?"),
    "read.py": (body("print(c.batchsize)"),
                "read.py, line 6: there is no field batchsize; did you mean batch_size?"),
    "type.py": (body("c.steps = '100'"), "type.py, line 6: steps is str '100': must be a whole"),
    "float.py": (body("c.steps = 1e2"), "float.py, line 6: steps is float '100.0': must be a who"),
    "flip.py": (body("c.data.flip = 'no'"), "flip.py, line 6: flip is str 'no': must be True or"),
    "columns.py": (body("c.text.columns = 'text'"),
                   "columns.py, line 6: columns is str 'text': must be a tuple, such as ('a',)"),
    "whole.py": (body("c.lora = 5"), "whole.py, line 6: lora is int '5': must be a section"),
    "task.py": ("from rmlora_jax.train.config import *\n\ndef get_config(task):\n"
                "    c = default_config()\n    use_glue(c, task)\n    return c\n",
                "task.py, line 3: get_config() needs an argument: task.py:ARGUMENT"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("configs")
    for name, (text, _) in FILES.items():
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    (folder / "plain.py").write_text(body("c.steps = 7"))
    return folder


@pytest.fixture(autouse=True)
def there(folder, monkeypatch):
    monkeypatch.chdir(folder)


def told(function, *args):
    with pytest.raises(UserError) as error:
        function(*args)
    assert "\\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_gives_no_config(name):
    words = told(config_file.load, name)
    assert words.startswith(FILES[name][1]) and "\n" not in words
    assert told(load, name) == f"config.tasks: {words}"  # as the task of a study


def test_arguments():
    assert told(config_file.load, "plain.py:cola") == (
        "plain.py, line 4: get_config() takes no argument; leave out ':cola'"
    )
    words = told(config_file.load, "task.py:colla")
    assert words.startswith("task.py, line 5: no GLUE task 'colla'")
    assert words.endswith("did you mean cola?")
    assert config_file.load("task.py:cola").data.name == "glue/cola"


def test_places(tmp_path, monkeypatch):
    assert told(config_file.load, "plian.py") == (
        "there is no config file 'plian.py'; did you mean plain.py?"
    )
    monkeypatch.chdir(tmp_path)
    assert "there are configs/ablation.py" in told(config_file.load, "")
    assert "there are configs/ablation.py" in told(config_file.load, "configs/none.py")
    (tmp_path / "mine").mkdir()
    assert "'mine' is a folder" in told(config_file.load, "mine")
    assert config_file.load("configs/quickstart.py").steps == 300  # from any folder


def test_a_field_is_told_with_its_line(tmp_path):
    file = tmp_path / "mine.py"
    lines = "c.batchsize = 8", "c.optimizer.lr = 1.0", "c['steps'] = -1", "c.seed = -1"
    file.write_text(body("\n    ".join(lines)))
    words = told(resolve, config_file.load(str(file)))
    assert config_file.located(words, file, elsewhere=["seed"]).splitlines() == [
        "config.seed=-1: must be 0 or more",
        "config.steps=-1: must be 0 or more (mine.py, line 8)",
        "config.batchsize: there is no such field; did you mean batch_size? (mine.py, line 6)",
        "config.optimizer.lr: there is no such field; did you mean optimizer.learning_rate? "
        "(mine.py, line 7)",
    ]


def test_a_section_that_is_made_anew_is_one_line(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(body("c.lora = {'rank': 8}"))
    words = config_file.located(told(resolve, config_file.load(str(file))), file)
    assert words.startswith("config.lora lacks ") and words.endswith("(mine.py, line 6)")
    assert "\n" not in words
    scratch = default_config()
    for name in [name for name in scratch if name != "steps"]:
        del scratch[name]
    assert len(mistakes(scratch)[1]) == 1


@pytest.mark.parametrize(("given", "words"), [
    ({"tasks": ("study.py",)}, "'study.py' is a study"),
    ({"set": ("lora.rnk=8",)}, "'lora.rnk=8': must be a field and its value, such as epochs=4; "
     "did you mean lora.rank?"),
    ({"set": ("lr=8",)}, "did you mean optimizer.learning_rate?"),
    ({"set": ("steps=many",)}, "'steps=many': must be like 7"),
    ({"tasks": ("wrong.py",)}, "digits lora: config.batchsize: there is no such field; did you "
     "mean batch_size? (wrong.py, line 6)"),
])
def test_studies(given, words, folder):
    (folder / "study.py").write_text(
        "from rmlora_jax.study.config import default_study as get_config\n"
    )
    (folder / "wrong.py").write_text(body("c.batchsize, c.data.name = 8, 'digits'"))
    c = default_study()
    c.study, c.tasks, c.methods, c.rates = "a", ("plain.py",), ("lora",), (1e-3,)
    c.update(given)
    assert words in told(check_study, c)


COMMANDS = {  # the arguments: the first line
    "--steps=5": "there is no flag --steps; did you mean --config.steps?",
    "--lora.rank 8": "there is no flag --lora.rank; did you mean --config.lora.rank?",
    "--lr=1": "there is no flag --lr; did you mean --config.optimizer.learning_rate?",
    "--confg=plain.py": "there is no flag --confg; did you mean --config?",
    "--wrokdir=x": "there is no flag --wrokdir; did you mean --workdir?",
    "--config.lora.rnk=2": "the config has no field lora.rnk; did you mean lora.rank?",
    "--config.data.root=x": "the config has no field data.root",
    "--config.steps=abc": "--config.steps=abc: must be a whole number",
    "--config.lora=5": "--config.lora=5: must be a section",
    "--config.data.flip=maybe": "--config.data.flip=maybe: must be True or False",
    "plain.py": "unexpected argument 'plain.py'; did you mean --config=plain.py?",
    "--config=none.py": "none.py, line 6: AttributeError: 'NoneType' object has no attribute 'x'",
    "--config=key.py": "key.py, line 6: KeyError: x",
    "--config=a.json": "a.json: a config is a Python file",
    "--config=nothing.py": "nothing.py, line 4: get_config() returns nothing",
    "--config=fields.py": "config.batchsize: there is no such field; did you mean batch_size? "
                          "(fields.py, line 6)",
    "--config=fields.py --config.batchsize=9": "config.batchsize: there is no such field; did "
                                               "you mean batch_size?",
    "--flagfile=flags.txt": "--config.steps=abc: must be a whole number",
}
EACH = """import json, os, sys
sys.path.insert(0, sys.argv.pop())
from absl import app
from rmlora_jax.command import actions, flags
from rmlora_jax.study.run import run_study
from rmlora_jax.sweep import train
for given in json.loads(sys.argv.pop()):
    if not os.fork():
        sys.argv[:] = ["run.py", *given.split()]
        app.run(actions.main, flags_parser=flags.parse)
    _, code = os.wait()
    print(f"code {os.waitstatus_to_exitcode(code)}", file=sys.stderr, flush=True)
"""


def test_commands(folder):
    """Each in a process of its own, which need not import jax again."""
    (folder / "fields.py").write_text(body("c.batchsize = 8"))
    (folder / "flags.txt").write_text("--config=plain.py\n--config.steps=abc\n")
    done = subprocess.run(
        [sys.executable, "-P", "-c", EACH, json.dumps(list(COMMANDS)), str(ROOT)],
        capture_output=True, text=True, env=os.environ, cwd=folder, check=True,
    )
    assert "Traceback" not in done.stderr and "\\n" not in done.stderr, done.stderr
    outputs = done.stderr.split("code 1\n")
    assert len(outputs) == len(COMMANDS) + 1 and not outputs[-1], done.stderr
    for (given, words), output in zip(COMMANDS.items(), outputs, strict=False):
        assert output.startswith(f"error: {words}"), (given, output)
        assert len(output.splitlines()) <= 2, (given, output)
