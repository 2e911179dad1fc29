"""What works without the trainer's libraries, and what a command says that lacks them."""

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from marks import slow

from rmlora_jax import extras

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# Refuses the modules of the extra `train`, but those which jax, flax and optax themselves import.
WITHOUT = """import sys
import jax, flax.linen, flax.nnx, optax
from rmlora_jax import extras
refused = {name for name in extras.TRAIN if name not in sys.modules}
class Refusing:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in refused:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Refusing)
assert {"ml_collections", "transformers", "tqdm"} <= refused, refused
"""
CORE = """
import importlib, pkgutil
import jax.numpy as jnp
import rmlora_jax as rm, rmlora_jax.adapt, rmlora_jax.optim
for room in ("adapt", "optim"):
    package = importlib.import_module(f"rmlora_jax.{room}")
    for module in pkgutil.iter_modules(package.__path__, f"rmlora_jax.{room}."):
        importlib.import_module(module.name)
assert callable(rm.adapt)  # the function, although the room of this name came first
from rmlora_jax import *  # every public name
x = jnp.ones((3, 8))
class Net(flax.linen.Module):
    @flax.linen.compact
    def __call__(self, x): return flax.linen.Dense(4, name="d")(x)
lora = rm.LoRA(rank=2, alpha=4)
model, base = rm.adapt(Net(), lora), Net().init(jax.random.key(0), x)["params"]
params = rm.attach(jax.random.key(1), model, base, x)
trainable, frozen = rm.split(params, lora)
tx = optax.chain(rm.mask_gradients(keep=0.5), optax.sgd(1.0))
loss = lambda t: model.apply({"params": rm.join(t, frozen)}, x).sum() + rm.orthogonality(t)
updates, _ = tx.update(jax.grad(loss)(trainable), tx.init(trainable), trainable)
moved = optax.apply_updates(trainable, updates)
change = rm.merge(rm.join(moved, frozen), lora)["d"]["kernel"] - base["d"]["kernel"]
factors = moved["d"]
print(float(jnp.abs(change - factors["lora_a"] @ factors["lora_b"] * 2).max()))
"""
COMMAND = """
sys.argv = {argv}
from rmlora_jax.command import {module}
{module}.{name}()
"""


def without(code):
    return subprocess.run([sys.executable, "-c", WITHOUT + code], capture_output=True, text=True,
                          cwd=ROOT, timeout=300)  # fmt: skip


def test_the_core_works_with_jax_flax_and_optax_alone():
    done = without(CORE)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1e-6


@pytest.mark.parametrize(("argv", "module", "name", "install"), [
    (["rmlora", "train"], "words", "main", "pip install 'rmlora-jax[train]'"),
    slow(["rmlora", "bench"], "words", "main", "pip install 'rmlora-jax[train]'"),
    (["run.py"], "start", "script", "pip install -e '.[train]'"),
])
def test_a_command_that_lacks_the_extra_names_it(argv, module, name, install):
    done = without(COMMAND.format(argv=argv, module=module, name=name))
    lines = done.stderr.splitlines()
    assert done.returncode == 1 and len(lines) == 2, done.stderr
    assert lines[0].startswith("error: this needs the extra train of rmlora-jax: there is no modul")
    assert lines[1] == f"error: {install}"


@pytest.mark.parametrize("words", [["configs"], slow(["--help"]), slow(["new", "FOLDER/my.py"])])
def test_other_words_need_no_extra(words, tmp_path):
    argv = ["rmlora", *(word.replace("FOLDER", str(tmp_path)) for word in words)]
    done = without(COMMAND.format(argv=argv, module="words", name="main"))
    assert done.returncode == 0 and not done.stderr and "rmlora" in done.stdout


def test_the_modules_of_the_extra_are_those_of_the_project():
    """Each distribution that the extra names has a module in the list, and no other is in it."""
    names = [re.match(r"[\w-]+", line)[0] for line in PROJECT["optional-dependencies"]["train"]]
    spelt = {re.sub(r"[-_.]+", "-", name).lower() for name in names}
    installed = importlib.metadata.packages_distributions()
    for module in extras.TRAIN:
        found = {re.sub(r"[-_.]+", "-", name).lower() for name in installed.get(module, [module])}
        assert spelt & found, module
    assert len(spelt) == len(extras.TRAIN)


def test_the_core_depends_on_jax_flax_and_optax_alone():
    assert [re.match(r"\w+", line)[0] for line in PROJECT["dependencies"]] == [
        "jax", "flax", "optax",
    ]  # fmt: skip
