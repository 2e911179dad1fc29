"""The code of rmlora_jax/hub/README.md runs, here and in PyTorch."""

import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from oracle import oracle
from PIL import Image

import rmlora_jax as rm
from rmlora_jax.hub import find_folder, load_vit, save_peft

README = Path(__file__).parent.parent.parent / "rmlora_jax" / "hub" / "README.md"
BASE = "vit-tiny-patch8-64-tinyimagenet"


def blocks():
    """(code in JAX, code in PyTorch), in their order."""
    found = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    torch = [code for code in found if code.startswith("# PyTorch")]
    return [code for code in found if code not in torch], torch


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("photo.png")


def test_the_code_in_jax():
    train, go_on, use = blocks()[0]
    names = {}
    exec(train, names)
    save_peft("from_torch", names["params"], names["lora"], names["base"])
    exec(go_on, names)
    assert names["logits"].shape == (2, 10)
    exec(use, names)
    assert names["found"][0].input == "photo.png" and names["logits"].shape == (1, 10)
    top = int(names["logits"].argmax())
    assert names["found"][0].label == str(top)


@pytest.mark.slow
def test_the_code_in_both(tmp_path):
    oracle.python()
    (train, go_on, _), torch = blocks()
    assert len(torch) == 2
    names = {}
    exec(train, names)
    Path(BASE).symlink_to(find_folder(BASE))  # a folder of the base's name, as PyTorch needs it
    script = tmp_path / "torch_side.py"
    script.write_text("\n".join([
        *torch, "import numpy as np", "from peft import PeftModel",
        "model = model.eval()", "with torch.no_grad():",
        "    np.save('logits.npy', model(torch.ones(2, 3, 64, 64)).logits.numpy())",
    ]))
    oracle.run(str(script))
    exec(go_on, names)
    theirs = np.load("logits.npy")
    np.testing.assert_allclose(names["logits"], theirs, atol=2e-4)
    base = load_vit(BASE, num_classes=10)
    untouched = base.family.model(base.config, 10).apply(
        {"params": rm.join(*rm.split(base.params, rm.LoRA(1, target=None, train="head")))},
        jnp.ones((2, 64, 64, 3)))
    assert np.abs(untouched - theirs).max() > 1e-2
