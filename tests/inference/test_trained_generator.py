"""A language model of a run in use: finished, stopped before its end, and merged."""

import json
import shutil

import pytest
from fixtures.sft.tiny import config_of, write_chats, write_model

from rmlora_jax.inference.predict import predict
from rmlora_jax.sweep import grid
from rmlora_jax.train import loop
from rmlora_jax.train.finished import export_merged, model_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("sft")
    write_model(root / "model")
    write_chats(root / "train.jsonl", 400, 0)
    loop.train(grid.check_config(config_of(root, 120)), root / "run")
    return root


def right(root, folder):
    """The share of training questions whose answer is that of the file."""
    options = {"out": str(root / "answers.jsonl"), "find": model_of, "max_new_tokens": 6}
    assert predict(str(folder), [f"@{root / 'train.jsonl'}"], **options) == 0
    pairs = zip(*(map(json.loads, (root / name).read_text().splitlines())
                  for name in ("answers.jsonl", "train.jsonl")), strict=True)
    found = [a["answer"] == b["messages"][1]["content"] for a, b in pairs]
    return sum(found) / len(found)


def test_it_has_learnt_its_answers(root, capsys):
    assert right(root, root / "model") < 0.05
    share = right(root, root / "run")
    assert share > 0.7
    assert right(root, root / "run" / "adapter") == share
    assert right(root, export_merged(root / "run")) == pytest.approx(share, abs=0.01)
    stopped = shutil.copytree(root / "run", root / "stopped")
    (stopped / "summary.json").unlink()
    capsys.readouterr()
    assert right(root, stopped) == share
    assert "note: this run is not finished; its model is that of step" in capsys.readouterr().out
