"""What no module does with data from outside: unpickle it, run it, or fetch more than it names."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
FILES = [ROOT / "run.py", *sorted((ROOT / "rmlora_jax").rglob("*.py")),
         *sorted((ROOT / "configs").rglob("*.py"))]

# Modules whose reading of a file runs what is in it, or can.
NEVER_IMPORTED = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal",
                  "shelve", "torch", "yaml"}
# Functions, and what their arguments must or must not be.
NEVER_CALLED = {"eval", "exec", "os.system", "os.popen", "torch.load", "torch.jit.load"}
FETCHING = {"urlopen", "urlretrieve", "hf_hub_download", "snapshot_download", "create_connection"}
COMPARES = "rmlora_jax/bench/torch_peft.py"  # with PEFT in PyTorch, where the user installed it
MAY_FETCH = {  # what the config names: a data set, a model
    "rmlora_jax/data/download.py", "rmlora_jax/data/prepare.py",
    "rmlora_jax/hub/source.py",
}


def name_of(node) -> str:
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def wrong_in(source: str, name: str = "a.py") -> list[str]:
    """What a module does that it must not, as NAME:LINE words."""
    wrong = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = ([node.module or ""] if isinstance(node, ast.ImportFrom)
                       else [one.name for one in node.names])
            roots = {module.split(".")[0] for module in modules}
            if roots & NEVER_IMPORTED - ({"torch"} if name == COMPARES else set()):
                wrong.append((node, f"imports {', '.join(modules)}"))
        if not isinstance(node, ast.Call):
            continue
        called, given = name_of(node.func), {k.arg: k.value for k in node.keywords}
        last = called.rpartition(".")[2]

        def says(argument, value, given=given):
            found = given.get(argument)
            return isinstance(found, ast.Constant) and found.value is value

        if called in NEVER_CALLED:
            wrong.append((node, f"calls {called}"))
        if called in ("np.load", "numpy.load") and not says("allow_pickle", False):
            wrong.append((node, "np.load without allow_pickle=False"))
        if last == "from_pretrained":
            if not says("trust_remote_code", False):
                wrong.append((node, "from_pretrained without trust_remote_code=False"))
            if not says("local_files_only", True):
                wrong.append((node, "from_pretrained without local_files_only=True"))
        elif "trust_remote_code" in given:
            wrong.append((node, "trust_remote_code"))
        if says("shell", True):
            wrong.append((node, "a shell"))
        if last in ("extractall", "extract", "unpack_archive"):
            wrong.append((node, f"unpacks with {last}"))
        if last in FETCHING and name not in MAY_FETCH:
            wrong.append((node, f"fetches with {last}"))
    return [f"{name}:{node.lineno} {words}" for node, words in wrong]


@pytest.mark.parametrize("source", [
    "import pickle", "from torch import load", "import yaml as y", "np.load(p)", "eval(text)",
    "torch.load(p)",
    "numpy.load(p, allow_pickle=True)", "A.from_pretrained(x, local_files_only=True)",
    "A.from_pretrained(x, trust_remote_code=False)", "load(x, trust_remote_code=True)",
    "subprocess.run(x, shell=True)", "tar.extractall(x)", "urllib.request.urlopen(x)",
])
def test_the_check_finds_it(source):
    assert len(wrong_in(source)) == 1


def test_no_module_unpickles_runs_or_fetches():
    wrong = [words for path in FILES
             for words in wrong_in(path.read_text(), str(path.relative_to(ROOT)))]
    assert len(FILES) > 120 and wrong == []


QUIET = """
import os, sys
asked = []
def hook(event, arguments):
    if event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.connect"):
        asked.append(f"{event} {arguments[-1]!r}" if event == "socket.connect" else
                     f"{event} {arguments[0]!r}")
sys.addaudithook(hook)
sys.path.insert(0, sys.argv[1])
os.environ.pop("HF_HUB_OFFLINE", None)
import jax
import rmlora_jax.data, rmlora_jax.hub as hub
from rmlora_jax.train.config import default_config, resolve
from rmlora_jax.parallel import mesh
from rmlora_jax.train import setup
c = default_config()
c.data.name, c.model.source, c.data.cache = "digits", "vit-tiny-patch8-64-tinyimagenet", ""
c.batch_size = c.eval_batch_size = 8 * jax.device_count()
c.steps = 1
setup.build(resolve(c), mesh.all_devices())
hub.load_tokenizer(__import__("pathlib").Path(sys.argv[2]))
print(asked)
"""


def test_nothing_is_asked_of_the_network(tmp_path):
    """A run whose model and data are here speaks to no one, and neither do the libraries it uses;
    nor does a tokenizer whose files name code and other repositories."""
    from fixtures.text.tiny import write_model

    folder = write_model(tmp_path / "model")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    evil = {"auto_map": {"AutoTokenizer": ["evil/repo--code.Evil", None]}, "name_or_path": "evil/x"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | evil))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    done = subprocess.run(
        [sys.executable, "-c", QUIET, str(ROOT), str(folder)],
        capture_output=True, text=True, timeout=300, cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    assert not (tmp_path / "ran").exists()


def test_the_network_would_have_been_seen():
    code = QUIET.split("sys.path.insert")[0] + """
import socket
for ask in (lambda: socket.getaddrinfo("nowhere.invalid", 80),
            lambda: socket.create_connection(("127.0.0.1", 9))):
    try: ask()
    except OSError: pass
print(asked)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "nowhere.invalid" in done.stdout and "('127.0.0.1', 9)" in done.stdout
