"""The package as a whole: what importing it costs, docstrings, code and tables of READMEs."""

import ast
import builtins
import doctest
import importlib
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import rmlora_jax

ROOT = Path(__file__).parent.parent
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "rmlora_jax").rglob("*.py")
)


def test_import_is_light():
    code = """
import json, sys, time
import jax, flax, flax.linen, optax
began = time.perf_counter()
import rmlora_jax
rmlora_jax.adapt, rmlora_jax.mask_gradients
print(json.dumps([sorted(sys.modules), time.perf_counter() - began]))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules, _ = json.loads(out.stdout)
    heavy = {
        "transformers",
        "tensorflow_datasets",
        "orbax",
        "matplotlib",
        "grain",
        "flax.nnx",
        "tensorflow",
        "torch",
        "sklearn",
        "ml_collections",
        "safetensors",
    }
    before = "import json, sys, jax, flax.linen, optax; print(json.dumps(sorted(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", before], capture_output=True, text=True, check=True)
    # Whatever flax itself brings (its nnx, say) is not ours to answer for.
    assert not (heavy & set(modules)) - set(json.loads(out.stdout))
    never = {"transformers", "tensorflow_datasets", "orbax", "matplotlib", "grain"}
    assert not never & set(modules)


def test_every_public_name_is_there_and_documented():
    for name in rmlora_jax.__all__:
        assert getattr(rmlora_jax, name).__doc__, name
    assert rmlora_jax.__all__ == sorted(rmlora_jax.__all__)


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name):
    module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


def documented(tree):
    """(class or None, docstring) of a module, and of its classes and functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (
            text := ast.get_docstring(node)
        ):
            yield node.name if isinstance(node, ast.ClassDef) else None, text


def leads_somewhere(reference, scopes):
    path = reference.removesuffix("()").removeprefix("rmlora_jax.")
    first, *rest = path.split(".")
    if first == "train" and rest:  # the room; as an attribute of the package it is the function
        room, *rest = rest
        name = f"rmlora_jax.train.{room}"
        found = importlib.import_module(name) if name in MODULES else None
        return found is not None and (not rest or leads_somewhere(".".join(rest), [found]))
    first, *rest = reference.removesuffix("()").split(".")
    found = next((getattr(scope, first) for scope in scopes if hasattr(scope, first)), None)
    if found is None and importlib.util.find_spec(first):
        found = importlib.import_module(first)
    for name in rest:
        found = getattr(found, name, None)
    return found is not None


@pytest.mark.parametrize("name", MODULES)
def test_references_in_docstrings_lead_somewhere(name):
    """`like_this`: to a name of the module, of its package, of the public ones, or of a library."""
    module = importlib.import_module(name)
    near = importlib.import_module(name.rpartition(".")[0] or name)
    public = [rmlora_jax, *(importlib.import_module(f"rmlora_jax.{p}")
                            for p in ("hub", "models", "data"))]  # fmt: skip
    lost = []
    for owner, text in documented(ast.parse(Path(module.__file__).read_text())):
        own = [getattr(module, owner)] if owner else []
        # Not math, which optax writes as :math:`x`, nor a link, `text <address>`_.
        for reference in re.findall(r"(?<![`\w:])`([\w.]+(?:\(\))?)`(?!`)", text):
            if not leads_somewhere(reference, [*own, module, near, *public, builtins]):
                lost.append(reference)
    assert not lost, lost


def test_readme_example_runs():
    code, *examples = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len(examples) == 2  # tests/test_examples.py runs these
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert float(names["value"]) < 2.6  # from log(10) + 0.1 R, R near 1.6
    base, plain = names["base"].params, names["plain"]
    import jax

    assert jax.tree.structure(base) == jax.tree.structure(plain)
    assert int(names["state"][0].count) == 3


def test_tables_are_those_of_the_stored_rows():
    sys.path.insert(0, str(ROOT / "tests" / "results"))
    import tables

    text = (ROOT / "configs" / "README.md").read_text()
    assert tables.with_tables(text) == text
    # The table's figures once more, by hand.
    rows = tables.rows("paper_table")
    for task in ("cifar100", "cola", "rte"):
        for method in ("lora", "reg_only", "mask_only", "rm_lora"):
            values = [
                100 * row["test"]
                for row in rows
                if (row["task"], row["method"], row["stage"]) == (task, method, "final")
            ]
            assert len(values) == 5
            assert f"{sum(values) / len(values):.2f} ± {statistics.stdev(values):.2f}" in text


@pytest.mark.slow
def test_quickstart_reaches_98_percent(tmp_path):
    command = [sys.executable, str(ROOT / "run.py"), f"--workdir={tmp_path}"]
    environment = os.environ | {"XLA_FLAGS": ""}  # as a user has it
    subprocess.run(command, env=environment, check=True, timeout=900, stdout=subprocess.DEVNULL)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["test"]["accuracy"] >= 0.98
    assert summary["method"] == "rm_lora" and summary["dataset"] == "digits"
