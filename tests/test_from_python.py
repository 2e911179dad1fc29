"""`rmlora_jax.train` compared with the command; what a run leaves of the process that called it."""

import asyncio
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import absl.logging
import jax
import matplotlib
import orbax.checkpoint  # noqa: F401  (these libraries set variables of the environment)
import pytest
import safetensors.numpy
import sklearn.datasets  # noqa: F401
import tensorboardX.event_file_writer  # noqa: F401
from command.test_extras import WITHOUT

import rmlora_jax
from rmlora_jax import from_python, methods, tasks
from rmlora_jax.errors import UserError
from rmlora_jax.fields import Lora, Run
from rmlora_jax.sweep.grid import check_config
from rmlora_jax.train.config import RunConfig, default_config

ROOT = Path(__file__).parents[1]
STEPS = 8


def changed(tiny_vit, **more):
    """What differs from the quickstart, by field."""
    return {
        "model.source": str(tiny_vit), "model.image_size": 16, "data.limit": 160, "batch_size": 16,
        "steps": STEPS, "eval_every": 4, "log_every": 2, "lora.rank": 2, **more,
    }  # fmt: skip


def config_of(tiny_vit, **more):
    config = rmlora_jax.load_config("quickstart")
    config.update_from_flattened_dict(changed(tiny_vit, **more))  # pyright: ignore
    return config


def lines_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def at_first(number):
    """A callback that sends this process a signal with the first line."""
    return lambda line: signal.raise_signal(number) if line["step"] == 2 else None


def numbers(lines):
    """The lines without what a clock says."""
    return [{k: v for k, v in line.items() if k != "examples_per_second"} for line in lines]


def state():
    """What a run must leave as it is in the process that calls it."""
    return {
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "blocked": signal.pthread_sigmask(signal.SIG_BLOCK, []),
        "jax": dict(jax.config.values),
        "verbosity": absl.logging.get_verbosity(),
        "hooks": (sys.excepthook, threading.excepthook, sys.unraisablehook),
        "backend": matplotlib.rcParams["backend"],
        "environment": {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")},
    }


@pytest.fixture(scope="module")
def trained(tiny_vit, tmp_path_factory):
    """A run from Python: its folder, its summary, what a callback saw, state before and after."""
    workdir, seen = tmp_path_factory.mktemp("python") / "run", []
    before = state()
    summary = rmlora_jax.train(config_of(tiny_vit), workdir, callbacks=seen.append)
    return workdir, summary, seen, (before, state())


def test_numbers_are_those_of_the_command(trained, tiny_vit, tmp_path):
    workdir, *_ = trained
    flags = [f"--config.{path}={value}" for path, value in changed(tiny_vit).items()]
    command = [sys.executable, "run.py", "--config=configs/quickstart.py", f"--workdir={tmp_path}"]
    subprocess.run([*command, *flags], cwd=ROOT, check=True, capture_output=True)
    assert numbers(lines_of(workdir)) == numbers(lines_of(tmp_path))
    own, other = (
        safetensors.numpy.load_file(folder / "adapter" / "adapter_model.safetensors")
        for folder in (workdir, tmp_path)
    )
    assert {k: x.tobytes() for k, x in own.items()} == {k: x.tobytes() for k, x in other.items()}
    assert (workdir / "config.json").read_text() == (tmp_path / "config.json").read_text()


def test_summary_and_lines_are_those_of_the_files(trained):
    workdir, summary, seen, _ = trained
    assert summary == json.loads((workdir / "summary.json").read_text())
    text = (workdir / "metrics.jsonl").read_text()
    assert [json.dumps(line) for line in seen] == text.splitlines()
    assert [line["step"] for line in seen] == [2, 4, 6, 8]
    assert [line["step"] for line in seen if "validation/loss" in line] == [4, 8]


def test_the_process_is_left_as_it_was(trained):
    *_, (before, after) = trained
    assert before == after


def test_output_that_is_no_terminal_has_no_control_characters(trained, tiny_vit, tmp_path, capfd):
    rmlora_jax.train(config_of(tiny_vit), tmp_path)
    out, err = capfd.readouterr()
    assert re.search(rf"^step {STEPS}/{STEPS}  train loss \d", out, re.MULTILINE)
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", out + err)


def test_the_model_is_loaded(trained):
    workdir, *_ = trained
    model = rmlora_jax.load(workdir)
    assert model.info.labels == tuple("0123456789")


def test_an_exception_in_a_callback_ends_the_run_which_goes_on(trained, tiny_vit, tmp_path):
    class Enough(Exception):
        pass

    def stop(line):
        if line["step"] == 6:
            raise Enough

    with pytest.raises(Enough):
        rmlora_jax.train(config_of(tiny_vit), tmp_path, callbacks=[stop])
    assert not (tmp_path / "summary.json").exists()
    assert (tmp_path / "checkpoints" / "6").is_dir()
    later = []
    rmlora_jax.train(config_of(tiny_vit), tmp_path, callbacks=[later.append])
    assert [line["step"] for line in later] == [8]
    assert numbers(lines_of(tmp_path)) == numbers(lines_of(trained[0]))


@pytest.fixture
def pythons_own_ctrl_c(monkeypatch):
    """Ctrl-C as a program finds it that has begun; other tests of this process may have set it."""
    monkeypatch.setattr("rmlora_jax.stopping._commands", [])
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("pythons_own_ctrl_c")
def test_ctrl_c_saves_and_is_a_keyboard_interrupt(tiny_vit, tmp_path):
    before = state()
    with pytest.raises(KeyboardInterrupt, match="saved after step 3 of 8"):
        rmlora_jax.train(config_of(tiny_vit), tmp_path,
                         callbacks=at_first(signal.SIGINT))
    assert (tmp_path / "checkpoints" / "3").is_dir()
    assert state() == before


@pytest.mark.usefixtures("pythons_own_ctrl_c")
def test_a_second_ctrl_c_does_not_end_the_process(tiny_vit, tmp_path):
    def twice(line):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("the second is a KeyboardInterrupt")

    with pytest.raises(KeyboardInterrupt):
        rmlora_jax.train(config_of(tiny_vit), tmp_path, callbacks=twice)
    assert (tmp_path / "checkpoints" / "2").is_dir()


def test_sigterm_reaches_the_program_once_all_is_saved(tiny_vit, tmp_path):
    came, before = [], signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM,
                  lambda *_: came.append((tmp_path / "checkpoints" / "3").is_dir()))
    try:
        with pytest.raises(KeyboardInterrupt):
            rmlora_jax.train(config_of(tiny_vit), tmp_path,
                             callbacks=at_first(signal.SIGTERM))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert came == [True]


@pytest.mark.slow
def test_in_a_thread_and_in_a_running_loop(trained, tiny_vit, tmp_path):
    async def run():
        return rmlora_jax.train(config_of(tiny_vit), tmp_path / "loop")

    thread = threading.Thread(
        target=rmlora_jax.train, args=(config_of(tiny_vit), tmp_path / "thread")
    )
    thread.start()
    thread.join()
    asyncio.run(run())
    for name in ("loop", "thread"):
        assert numbers(lines_of(tmp_path / name)) == numbers(lines_of(trained[0]))


def test_the_example_of_the_readme(tiny_vit, tmp_path, monkeypatch):
    text = (ROOT / "rmlora_jax" / "train" / "README.md").read_text()
    code = text.partition("## From Python")[2].partition("```python\n")[2].partition("```")[0]
    (tmp_path / "own.py").write_text(
        "from rmlora_jax.train.config import default_config\n\ndef get_config():\n"
        f"    c = default_config()\n    c.update_from_flattened_dict({changed(tiny_vit)})\n"
        "    c.data.name = 'digits'\n    return c\n"
    )
    assert '"quickstart"' in code
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(code.replace('"quickstart"', '"own.py"'), "README.md", "exec"), names)
    expected = [(line["step"], line["train/loss"]) for line in lines_of(tmp_path / "runs/digits")]
    assert names["losses"] == expected and expected[-1][0] == 20
    assert names["model"].info.outputs == 10


@pytest.mark.slow
def test_lines_of_a_sweep_name_their_run(tiny_vit, tmp_path):
    seen = []
    config = config_of(tiny_vit, **{"sweep.seeds": 2})
    summary = rmlora_jax.train(config, tmp_path, callbacks=seen.append)
    for name in summary["runs"]:
        own = [{k: v for k, v in line.items() if k != "run"} for line in seen
               if line["run"] == name]
        assert own == lines_of(tmp_path / name)
    assert len(seen) == 8


def test_the_typed_config_has_the_sections_of_all_tasks_and_methods():
    own = {one.name: one.default_factory for one in dataclasses.fields(RunConfig)}
    expected = tasks.SECTIONS | methods.SECTIONS
    assert {name: own.get(name) for name in expected} == expected
    assert {*own} - {*expected} == {one.name for one in dataclasses.fields(Run)}


def test_names_of_fields_are_completed_and_checked_at_once():
    config = rmlora_jax.load_config("quickstart")
    assert {"lora", "steps"} <= {*dir(config)} and "rank" in dir(config.lora)
    with pytest.raises(AttributeError, match="rnak"):
        config.lora.rnak = 4  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(TypeError, match="rank"):
        config.lora.rank = 4.5  # pyright: ignore[reportAttributeAccessIssue]


def test_a_config_is_given_in_many_forms(tmp_path):
    file = tmp_path / "own.py"
    file.write_text("from rmlora_jax.train.config import default_config\n\n"
                    "def get_config():\n    c = default_config()\n    c.lora.rank = 3\n"
                    "    return c\n")
    expected = default_config()
    expected.lora.rank = 3
    found = rmlora_jax.load_config()
    found.lora.rank = 3
    typed = RunConfig(lora=Lora(rank=3))
    given = [found, {"lora.rank": 3}, {"lora": {"rank": 3}}, typed, file, str(file)]
    for one in given:
        assert check_config(from_python._given(one)) == check_config(expected)
    assert check_config(from_python._given("quickstart")).steps == 300


@pytest.mark.parametrize(
    "config, words",
    [
        ("quickstrat", "no config file 'quickstrat'; did you mean quickstart"),
        ({"lora": {"rnak": 4}}, "config.lora.rnak: there is no such field; did you mean lora.rank"),
        ({"lora": 4}, "config.lora=4: must be a section"),
        ({4: 4}, "4 is not the name of a field"),
        (None, "config is NoneType None: give a name"),
        (RunConfig, "config is type"),
        ("ablation", "give it to\n?.*rmlora_jax.study.run.run_study"),
    ],
)
def test_a_wrong_config_is_refused_in_words(config, words, tmp_path):
    with pytest.raises(UserError, match=words):
        rmlora_jax.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_callbacks_are_functions(tmp_path):
    callbacks: Any = [print, 5]
    with pytest.raises(UserError, match="callbacks: 5 is not a function"):
        rmlora_jax.train("quickstart", tmp_path / "run", callbacks=callbacks)


def test_a_missing_library_is_named_with_its_extra():
    code = WITHOUT + (
        "import rmlora_jax\n"
        "rmlora_jax.train, rmlora_jax.load, rmlora_jax.load_config\n"
        "for call in (lambda: rmlora_jax.train({}, 'x'), rmlora_jax.load_config,\n"
        "             lambda: rmlora_jax.load('x')):\n"
        "    try: call()\n"
        "    except ValueError as error: print(type(error).__name__, error)\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert out.stdout.count("UserError this needs the extra train of rmlora-jax") == 3, out.stderr
    assert out.stdout.count("[train]'") == 3
