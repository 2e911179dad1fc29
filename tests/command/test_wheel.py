"""The wheel: what is in it, what its metadata say, and that it works where there is no checkout."""

import email
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import rmlora_jax

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]


def test_the_citation_is_of_this_version():
    text = (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^version: (.*)$", text, re.MULTILINE)[1] == rmlora_jax.__version__
    assert PROJECT["urls"]["Paper"] in text


def test_every_folder_with_code_is_a_package_of_the_wheel():
    folders = {path.parent for path in (ROOT / "rmlora_jax").rglob("*.py")}
    named = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert {*PYPROJECT["tool"]["setuptools"]["packages"]} == named | {"rmlora_jax.configs"}


def test_the_weights_have_a_licence_of_their_own():
    """Its name stands in the expression, and its text is among the licence files."""
    (own,) = set(re.split(r" AND ", PROJECT["license"])) - {"Apache-2.0"}
    files = [path for glob in PROJECT["license-files"] for path in ROOT.glob(glob)]
    texts = {path.read_text().splitlines()[0]: path.parent.name for path in files}
    assert texts[f"SPDX-License-Identifier: {own}"] == "vit-tiny-patch8-64-tinyimagenet"
    weights = {path.parent for path in (ROOT / "rmlora_jax").rglob("*.safetensors")}
    assert weights <= {path.parent for path in files}


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """A folder with sdist and wheel, built from a copy: building writes into the source."""
    pytest.importorskip("build", reason="needs the package build: pip install build")
    folder = tmp_path_factory.mktemp("build")
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, check=True,
                            capture_output=True, text=True).stdout.splitlines()  # fmt: skip
    for name in listed:
        if not name.startswith("tests/") and (ROOT / name).is_file():
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / "source" / name)
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", "source"],
        cwd=folder, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "dist"


@pytest.mark.slow
def test_what_is_in_the_wheel(dist):
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as opened:
        names = set(opened.namelist())
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        told = email.message_from_bytes(opened.read(metadata))
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "rmlora_jax").rglob("*")
               if path.suffix == ".py" or ("assets" in path.parts and path.is_file())}
    bundled = {f"rmlora_jax/configs/{path.name}" for path in (ROOT / "configs").glob("*.py")}
    ours = {name for name in names if ".dist-info/" not in name}
    assert ours == package | bundled | {"rmlora_jax/py.typed"}
    assert told["License-Expression"] == PROJECT["license"]
    assert len(told.get_all("License-File")) == 2 and not told["License"]
    done = subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *dist.iterdir()],
                          capture_output=True, text=True)
    if "No module named twine" in done.stderr:
        pytest.skip("needs the package twine: pip install twine")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def rmlora(dist, tmp_path_factory):
    """Runs the installed command in an empty folder, with the libraries of this environment."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder / "venv", with_pip=True)
    (wheel,) = dist.glob("*.whl")
    python = folder / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", wheel],
                   check=True, timeout=300)
    (site,) = folder.glob("venv/lib/*/site-packages")
    (site / "libraries.pth").write_text(sysconfig.get_paths()["purelib"])  # behind the wheel
    (folder / "empty").mkdir()
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"XLA_FLAGS": ""}

    def run(*arguments, start=("rmlora",)):
        command = [folder / "venv" / "bin" / start[0], *start[1:], *arguments]
        return subprocess.run(command, cwd=folder / "empty", env=environment, timeout=600,
                              capture_output=True, text=True)  # fmt: skip

    run.folder = folder / "empty"
    where = run("-c", "import rmlora_jax as rm; print(rm.__file__)", start=("python",))
    assert where.stdout.strip() == str(site / "rmlora_jax" / "__init__.py"), where.stderr
    return run


@pytest.mark.slow
def test_the_quickstart_outside_of_a_checkout(rmlora):
    few = ["--config.steps=4", "--config.eval_every=4", "--config.log_every=2"]
    done = rmlora("train", "--workdir=run", *few)
    assert done.returncode == 0, done.stderr
    assert (rmlora.folder / "run" / "summary.json").exists()
    assert (rmlora.folder / "run" / "adapter" / "adapter_model.safetensors").exists()
    done = rmlora("export", "--workdir=run")
    assert done.stdout == f"merged model: {rmlora.folder / 'run' / 'merged'}\n", done.stderr
    assert "run.py" not in (rmlora.folder / "run" / "adapter" / "README.md").read_text()


@pytest.mark.slow
def test_configs_outside_of_a_checkout(rmlora):
    listed = rmlora("configs").stdout
    assert all(f"\n{name} " in f"\n{listed}" for name in ("quickstart", "smollm2_sft", "speech"))
    done = rmlora("new", "mine.py", "--config=roberta_glue", start=("python", "-m", "rmlora_jax"))
    assert done.stdout.endswith("python -m rmlora_jax train --config=mine.py\n"), done.stderr
    for config, model in [("mine.py:rte", "FacebookAI/roberta-base"),
                          ("configs/gemma3_sft.py", "google/gemma-3-1b-it"),
                          ("smollm2_sft", "smollm2-135m-instruct")]:
        done = rmlora("train", f"--config={config}", "--print_config")
        assert f"model.source={model}" in done.stdout.replace("'", ""), done.stderr
    # A study, whose tasks are bundled configs by their paths in a checkout.
    done = rmlora("train", "--config=small_data", "--config.dry_run")
    assert "cifar100_10_a_class lora final" in done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("typed", "told"), [
    (["predict", "--workdir=none"], "type rmlora predict --workdir=none ..."),
    (["predict", "x.png"], "Type rmlora predict --workdir=DIR ..."),
    (["chat", "none"], "did you mean --workdir=none?"),
    (["export"], "Type rmlora export --workdir=DIR"),
    (["train", "--seed=3"], "type rmlora predict, or chat"),
    (["train", "smollm2_sft"], "did you mean --config=smollm2_sft?"),
    (["train", "--config=smollm2"], "did you mean smollm2_sft?"),
])
def test_errors_name_the_installed_command(rmlora, typed, told):
    done = rmlora(*typed)
    assert done.returncode == 1 and told in done.stderr, done.stderr
    assert "run.py" not in done.stderr and "Traceback" not in done.stderr
