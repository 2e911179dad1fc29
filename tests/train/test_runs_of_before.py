"""Runs that an earlier version left behind: they go on, and serve, as they did there.

The folders in tests/fixtures/runs are of the commit 90ff30b; make_runs.py tells how they were made.
"""

import csv
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fake_devices import with_devices
from fixtures import make_runs
from fixtures.make_runs import RUNS, fields_of, flags_of, outcome
from marks import slow_but

from rmlora_jax.config import flatten
from rmlora_jax.files import read_object
from rmlora_jax.train.config import changes, default_config, read_config, resolve
from rmlora_jax.train.loop import write_beginning
from rmlora_jax.train.workdir import as_begun

ROOT = Path(__file__).parents[2]
STOPPED = [name for name, case in RUNS.items() if case.stop]
FINISHED = [name for name, case in RUNS.items() if not case.stop]

# Sums of floats differ with the processor; what is counted does not.
RTOL, ATOL = 1e-5, 1e-5
COUNTED = ("step", "skipped", "train/accuracy", "train/kept_fraction", "train/open_directions",
           "validation/accuracy")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_runs.write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def work(inputs, tmp_path):
    """A folder with the models and the data, where the fixtures' relative paths hold."""
    shutil.copytree(inputs, tmp_path, dirs_exist_ok=True)
    return tmp_path


def copied(work, name):
    return Path(shutil.copytree(make_runs.HERE / name / "run", work / name))


def expected_of(name):
    return make_runs.renamed(json.loads((make_runs.HERE / name / "expected.json").read_text()))


def run(work, *flags, code=0):
    done = subprocess.run(
        [sys.executable, str(ROOT / "run.py"), *map(str, flags)],
        cwd=work, env=with_devices(1), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    return done


def train(work, folder, fields, code=0):
    return run(work, f"--config={ROOT}/configs/quickstart.py", f"--workdir={folder}",
               *flags_of(fields), code=code)


def check_equal(found, expected, where=""):
    """All figures that were there; there may be more by now."""
    if isinstance(expected, dict):
        assert expected.keys() <= found.keys(), where
        for name, value in expected.items():
            check_equal(found[name], value, f"{where} {name}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for i, pair in enumerate(zip(found, expected, strict=True)):
            check_equal(*pair, f"{where} {i}")
    elif isinstance(expected, float) and not where.endswith(COUNTED):
        np.testing.assert_allclose(found, expected, rtol=RTOL, atol=1e-7, err_msg=where)
    else:
        assert found == expected, where


def check_arrays(folder, name):
    """Adapters and what was trained; the mask's state to the bit."""
    found = {f"{one.name if one != folder else ''}:{k}": x
             for one in make_runs.runs_in(folder) for k, x in make_runs.ends(one).items()}
    with np.load(make_runs.HERE / name / "expected.npz") as expected:
        assert found.keys() == set(expected.files)
        for path in expected.files:
            x, y = found[path], expected[path]
            assert (x.shape, x.dtype) == (y.shape, y.dtype), path
            if ":opt_state/" in path:
                np.testing.assert_array_equal(x, y, err_msg=path)
            else:
                # Attention does not depend on the bias of its keys: its gradient is rounding, of
                # which Adam makes steps that differ from one processor to another. (Other runs
                # have a large eps against it.)
                noisy = name == "image_decay" and path.endswith("attention/key/bias")
                atol = 5e-3 if noisy else ATOL
                np.testing.assert_allclose(x, y, rtol=0, atol=atol, err_msg=path)


def check_used(work, name):
    """Predictions, and the weights of the whole model."""
    case, expected = RUNS[name], expected_of(name).get("used", {})
    place = f"{name}/{case.used}".rstrip("/")
    for flags in make_runs.flags_of_use(case):
        run(work, f"--workdir={place}", *flags)
    if "csv" in expected:
        found, wanted = (list(csv.reader(io.StringIO(text)))
                         for text in ((work / "out.csv").read_text(), expected["csv"]))
        assert [row[:2] for row in found] == [row[:2] for row in wanted]
        for row, other in zip(found[1:], wanted[1:], strict=True):
            # Pillow before 13 rounds a reduced photo otherwise, which moves them by up to 7e-5.
            assert float(row[2]) == pytest.approx(float(other[2]), abs=2e-5)
    if "merged" in expected:
        check_equal(make_runs.sums(work / place), expected["merged"])


@pytest.mark.parametrize("name", slow_but(STOPPED, "image_unfinished"))
def test_a_stopped_run_goes_on_to_its_end(work, name):
    folder = copied(work, name)
    files = [folder / "metrics.jsonl", *folder.glob("*/metrics.jsonl")]
    before = {file: file.read_text() for file in files if file.exists()}
    train(work, name, fields_of(RUNS[name], going_on=True))
    for file, text in before.items():  # with the times of then: no step was made again
        assert file.read_text().startswith(text) and text.count("\n") >= 5
    check_equal(outcome(folder), expected_of(name)["end"])
    check_arrays(folder, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", STOPPED)
def test_what_a_stopped_run_became_is_used(work, name):
    copied(work, name)
    train(work, name, fields_of(RUNS[name], going_on=True))
    check_used(work, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", FINISHED)
def test_a_finished_run_goes_on_for_more_steps(work, name):
    case, folder = RUNS[name], copied(work, name) / RUNS[name].folder
    train(work, f"{name}/{case.folder}", fields_of(case, going_on=True))
    check_equal(outcome(folder), expected_of(name)["end"])
    check_arrays(folder, name)


@pytest.mark.parametrize("name", slow_but([n for n in FINISHED if RUNS[n].inputs],
                                          "image_finished"))
def test_a_finished_run_is_used(work, name):
    copied(work, name)
    check_used(work, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", FINISHED)
def test_a_finished_run_is_known_as_such(work, name):
    folder = copied(work, name)
    before = (folder / "summary.json").read_bytes()
    said = train(work, name, fields_of(RUNS[name])).stdout
    assert "is finished" in said
    assert (folder / "summary.json").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in FINISHED if not RUNS[n].folder])
def test_without_its_summary_it_is_evaluated_again(work, name):
    folder = copied(work, name)
    before, lines = make_runs.summary(folder), make_runs.rows(folder)
    (folder / "summary.json").unlink()
    train(work, name, fields_of(RUNS[name]))
    check_equal(make_runs.summary(folder), before)
    assert make_runs.rows(folder) == lines


@pytest.mark.slow
def test_another_config_is_refused(work):
    copied(work, "image_unfinished")
    fields = fields_of(RUNS["image_unfinished"]) | {"optimizer.learning_rate": 0.5}
    assert "optimizer.learning_rate: 0.001 -> 0.5" in train(
        work, "image_unfinished", fields, code=1).stderr


@pytest.mark.slow
def test_a_run_goes_on_from_an_adapter_of_before(work):
    copied(work, "image_finished")
    train(work, "again", make_runs.FROM_ADAPTER)
    expected = make_runs.renamed(
        json.loads((make_runs.HERE / "others.json").read_text())["from_adapter"])
    check_equal(outcome(work / "again")[""], expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", make_runs.ORDERS)
def test_the_order_of_the_data(work, kind):
    """The examples of the second batch, which the error of a run that blows up names."""
    error = train(work, kind, make_runs.ORDERS[kind], code=1).stderr
    orders = json.loads((make_runs.HERE / "others.json").read_text())["orders"]
    assert make_runs.ids_of(error) == orders[kind]


def test_a_run_goes_on_with_the_default_that_it_began_with(work, capsys):
    """Biases decayed before `optimizer.decay_all`; with the file as it was and as it is now."""
    folder, config = copied(work, "image_decay"), default_config()
    config.update_from_flattened_dict({
        k: v for k, v in flatten(read_object(folder / "config.json")).items()
        if k in flatten(config)})
    for decay_all in (False, True):  # the default, and what a person may say now
        config.optimizer.decay_all = decay_all
        begun = as_begun(resolve(config), folder)
        assert begun.optimizer.decay_all and changes(read_object(folder / "config.json"),
                                                     begun) == ([], [])
        write_beginning(folder, begun, {})
    first, second = capsys.readouterr().out.splitlines()
    assert first == "goes on as it began, with data.resize=square; optimizer.decay_all=True"
    assert second == "goes on as it began, with data.resize=square"
    assert read_config(copied(work, "image_finished")).optimizer.decay_all


def test_a_run_that_began_without_decay_of_biases_stays_without(tmp_path):
    config = default_config()
    for folder in (tmp_path, tmp_path / "new"):
        assert not as_begun(resolve(config), folder).optimizer.decay_all
        write_beginning(tmp_path, resolve(config), {})
    config.optimizer.decay_all = True
    assert changes(read_object(tmp_path / "config.json"), config)[0] == [
        "optimizer.decay_all: False -> True"]


@pytest.mark.parametrize("name", ["image_unfinished", "image_bottleneck"])
def test_the_next_masks_of_a_checkpoint(name):
    found = make_runs.masks_of(make_runs.HERE / name / "run", RUNS[name])
    with np.load(make_runs.HERE / "masks.npz") as npz:
        expected = {k.partition(":")[2]: npz[k] for k in npz.files if k.startswith(f"{name}:")}
    assert found.keys() == expected.keys() and len(found) >= 12
    for path, bits in expected.items():
        np.testing.assert_array_equal(np.packbits(found[path]), bits, err_msg=path)


def test_the_fixtures_are_small_and_of_no_machine():
    files = [p for p in make_runs.HERE.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 1_500_000
    for path in files:
        assert b"/tmp/" not in path.read_bytes() and b"/home/" not in path.read_bytes(), path
