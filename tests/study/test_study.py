"""Studies: the plan, the choice of rates, resuming, and figures by statistics and numpy."""

import csv
import io
import json
import math
import statistics
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import study_rows
from fake_devices import with_devices

import rmlora_jax as rm
from rmlora_jax.config import nested
from rmlora_jax.errors import UserError
from rmlora_jax.files import read_json, write_json
from rmlora_jax.study import config as study_config
from rmlora_jax.study import lines, plan, program, rows, tables
from rmlora_jax.study.config import check_study, default_study, open_tasks
from rmlora_jax.study.pictures import PICTURES, write_pictures
from rmlora_jax.study.run import cost_table, run_study, seconds_per_example
from rmlora_jax.sweep.grid import runs
from rmlora_jax.train.checkpoint import save_snapshot
from rmlora_jax.train.config import default_config, flatten, resolve
from rmlora_jax.train.metrics import append_intrinsic

ROOT = Path(__file__).parent.parent.parent
SHIPPED = ("paper_table.py", "ablation.py:grid", "ablation.py:frequency", "intrinsic.py:methods",
           "intrinsic.py:penalty", "intrinsic.py:classes", "intrinsic.py:domain", "small_data.py")


def shipped(name):
    file, _, part = name.partition(":")
    return study_config.load(f"configs/{file}:{part}" if part else f"configs/{file}")


@pytest.fixture
def study():
    """Two methods on digits: four rates and two grid values of the penalty's halves."""
    c = default_study()
    c.study = "small"
    c.tasks = ("configs/quickstart.py steps=20",)
    c.methods = ("lora", "head")
    c.rates = (1e-3, 3e-3)
    c.head_rates = (1e-2,)
    c.seeds = 3
    return c


# A trainer that trains nothing


def value_of(config):
    """The accuracy that a fake run ends with: best at a rate of 3e-3, exact in binary."""
    distance = abs(math.log10(config["optimizer"]["learning_rate"] / 3e-3))
    return round(0.5 + 0.01 * config["seed"] % 0.1 - 0.1 * distance, 6)


class Fake:
    """Writes what `loop.train` would leave; counts its calls, and can be told to stop."""

    def __init__(self, stop_after=None):
        self.calls, self.stop_after = [], stop_after

    def __call__(self, config, workdir):
        if self.stop_after is not None and len(self.calls) >= self.stop_after:
            raise KeyboardInterrupt
        found = runs(config) if config.is_sweep else [("", {}, config)]
        self.calls.append([one for *_, one in found])
        for name, _, one in found:
            leave(workdir / name, nested(flatten(one)), len(found))
        if config.is_sweep:  # of the whole, as sweep.train leaves it
            write_json(workdir / "summary.json", {"sweep": len(found)})


def leave(folder, config, together=1):
    value, steps = value_of(config), config["steps"]
    folder.mkdir(parents=True)
    write_json(folder / "config.json", config)
    history = []
    for step in range(1, steps + 1):
        line = {"step": step, "train/loss": 2.0 / step, "train/accuracy": value * step / steps}
        if step % 5 == 0:
            line |= {"validation/loss": 3.0 / step, "validation/accuracy": value * step / steps}
        history.append(json.dumps(line) + "\n")
    (folder / "metrics.jsonl").write_text("".join(history))
    factors = config["method"] not in ("head", "full")
    ranks = {"encoder/query": {"singular_values": np.ones((2, 4)), "effective_rank": [3.0, 3.5]},
             "encoder/key": {"singular_values": np.ones((2, 4)), "effective_rank": [2.0, 2.5]}}
    if factors:
        for step in range(5, steps + 1, 5):
            append_intrinsic(folder, step, ranks)
    write_json(folder / "summary.json", {
        "task": config["task"], "method": config["method"], "model": config["model"]["source"],
        "dataset": config["data"]["name"], "steps": steps, "metric": "accuracy",
        "test": {"accuracy": value - 0.02, "loss": 1.5},
        "test_best": {"step": steps, "accuracy": value - 0.01, "loss": 1.4},
        "trainable_parameters": 1000 + 4000 * factors, "total_parameters": 90_000,
        "examples_per_second": 64.0, "wall_seconds": 12.0, "compile_seconds": 1.0,
        "peak_memory_bytes": None, "train_seconds": 2.5, "sweep": together,
        "final_parameters": {"factors": 4000 * factors, "head": 1000},
        "intrinsic_dimension": ranks if factors else {},
    })


# The plan


@pytest.mark.parametrize(("name", "runs"), [
    # tasks x methods x (rates x 2 + 5)
    ("paper_table.py", 3 * 8 * (4 * 2 + 5)),
    ("ablation.py:grid", 2 * (4 * 2 + 25 * 3)),
    ("ablation.py:frequency", 2 * (4 * 2 + 8 * 3)),
    ("intrinsic.py:methods", 2 * 6 * 3),
    ("intrinsic.py:penalty", 2 * 6 * 3),
    ("intrinsic.py:classes", 2 * 4 * 3),
    ("intrinsic.py:domain", 2 * 2 * 3),
    ("small_data.py", 6 * (4 * 2 + 5)),
])
def test_shipped_studies_have_their_runs(name, runs):
    c = shipped(name)
    cells = plan.cells(c, open_tasks(c))
    assert sum(cell.runs for cell in cells) == runs
    for cell in cells:
        if cell.stage == "choose":
            assert cell.seeds == (100, 101) and len(cell.settings) == 4
        else:
            assert cell.seeds == tuple(range(c.seeds))


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_studies_are_fine(name):
    c = shipped(name)
    assert {task for task, *_ in check_study(c)[1]} == set(open_tasks(c))
    assert c.study == name.replace(".py", "").replace(":", "_")


def test_the_plan_in_full(study):
    study.grid.penalty = (0, 1)
    study.variants = (("lora.rank=2",), ())
    final = {"stage": "final", "seeds": (0, 1, 2), "method": "lora", "task": "digits"}
    cells = plan.cells(study, ["digits"])
    assert cells[:3] == (
        plan.Cell("digits", "lora", "choose", ({"learning_rate": 1e-3}, {"learning_rate": 3e-3}),
                  (100, 101)),
        plan.Cell(settings=({"penalty": 0.0}, {"penalty": 1.0}), variant=("lora.rank=2",), **final),
        plan.Cell(settings=({"penalty": 0.0}, {"penalty": 1.0}), **final),
    )
    # One rate: nothing to choose.
    assert [c.stage for c in cells[3:]] == ["final", "final"]
    assert cells[3].settings[1] == {"learning_rate": 1e-2, "penalty": 1.0}


def test_a_program_holds_the_runs_of_its_cell():
    settings = ({"keep": 0.5, "penalty": 0.0}, {"keep": 1.0, "penalty": 0.2})
    cell = plan.Cell("a", "rm_lora", "final", settings, (4, 5))
    c = resolve(default_config())
    one = program.program(cell, c, Path("w"), at_once=3)
    config = resolve(one.config)
    assert config.is_sweep and config.sweep.at_once == 3
    found = [(r.config.rm.keep, r.config.rm.penalty, r.config.seed) for r in runs(config)]
    assert found == [(0.5, 0, 4), (0.5, 0, 5), (1, 0.2, 4), (1, 0.2, 5)]
    for (_, setting, seed), run in zip(one.runs, runs(config), strict=True):
        assert (run.setting, run.config.seed) == (setting, seed)
    single = program.program(cell._replace(settings=settings[1:], seeds=(7,)), c, Path("w"))
    config = resolve(single.config)
    assert not config.is_sweep and (config.seed, config.rm.keep) == (7, 1)
    assert len({*one.keys, *single.keys}) == 5 and one.folder != single.folder


def choice(values, metric="accuracy"):
    return [{"metric": metric, "settings": {"learning_rate": rate}, "validation": v}
            for rate, vs in values.items() for v in vs]


@pytest.mark.parametrize(("values", "metric", "best"), [
    ({1e-3: (0.5, 0.7), 3e-3: (0.62, 0.6), 1e-2: (0.9, 0.1)}, "accuracy", 3e-3),  # .6 .61 .5
    ({1e-3: (0.5, 0.7), 3e-3: (0.62, 0.6), 1e-2: (0.9, 0.1)}, "mse", 1e-2),
    ({3e-3: (0.6, 0.6), 1e-3: (0.5, 0.7)}, "accuracy", 1e-3),  # equal: the smaller
    ({1e-3: (0.1, 0.1), 3e-3: (0.9, None)}, "accuracy", 1e-3),  # one diverged
    ({1e-3: (-0.1, -0.1), 3e-3: (-0.2, math.nan)}, "matthews", 1e-3),
])
def test_the_rate_with_the_best_mean_is_chosen(values, metric, best):
    assert plan.choose_rate(choice(values, metric)) == best
    assert plan.choose_rate(choice(values, metric)[::-1]) == best


def test_identity_is_of_what_changes_numbers():
    c = default_config()
    one = plan.identity(c.to_dict(), "final")
    c.data.data_dir, c.log_every = "/elsewhere", 5
    assert plan.identity(c.to_dict(), "final") == one
    assert plan.identity(json.loads(json.dumps(c.to_dict())), "final") == one
    assert plan.identity(c.to_dict() | {"sweep": {"seeds": 3}}, "final") == one
    different = {plan.identity(c.to_dict(), "choose")}
    for field, value in (("seed", 1), ("method", "lora"), ("epochs", 3.0)):
        changed = c.copy_and_resolve_references()
        changed[field] = value
        different.add(plan.identity(changed.to_dict(), "final"))
    c.lora.rank_pattern = (("query", 2),)
    different.add(plan.identity(c.to_dict(), "final"))
    assert len(different | {one}) == 6


def test_tasks_are_files_with_fields_and_names():
    c = default_study()
    c.tasks = ("configs/minilm_glue.py:rte epochs=3 as short", "configs/quickstart.py steps=7",
               "configs/minilm_glue.py:rte")
    c.fields, c.set = ("batch_size=8", "steps=5"), ("data.data_dir=/a=b", "seed=3")
    found = open_tasks(c)
    assert list(found) == ["short", "digits", "rte"]
    assert found["short"].epochs == 3.0 and found["rte"].epochs == 10.0
    assert [t.steps for t in found.values()] == [5, 7, 5]
    assert {t.data.data_dir for t in found.values()} == {"/a=b"}
    assert {(t.batch_size, t.seed) for t in found.values()} == {(8, 3)}
    c.method_set.lora = ("optimizer.lora_plus=16",)
    both = [study_config.configured(c, found["rte"], m, ("lora.rank=2",)) for m in ("lora", "head")]
    assert [(t.method, t.optimizer.lora_plus, t.lora.rank) for t in both] == [
        ("lora", 16.0, 2), ("head", 1.0, 2)]
    assert found["rte"].lora.rank == 4  # a copy was changed


# Mistakes


@pytest.mark.parametrize(("field", "value", "words"), [
    ("study", "", "config.study='': must be the study's name"),
    ("tasks", (), "config.tasks=(): must be one config file or more"),
    ("tasks", ("configs/none.py",), "there is no config file 'configs/none.py'"),
    ("tasks", ("configs/quickstart.py epoch=3",), "'epoch=3': must be a field and its value, such "
     "as epochs=4; did you mean epochs?"),
    ("tasks", ("configs/quickstart.py steps=many",), "'steps=many': must be like 300"),
    ("tasks", ("configs/quickstart.py",) * 2, "two are called 'digits'; name one of them"),
    ("tasks", ("configs/minilm_glue.py:cole",), "no GLUE task 'cole'"),
    ("methods", (), "config.methods=(): must be one method or more"),
    ("methods", ("lora", "lora"), "must be one method or more, each of them once"),
    ("methods", ("rmlora",), "no method 'rmlora'"),
    ("methods", ("rmlora",), "did you mean rm_lora?"),
    ("rates", (), "config.rates=(): must be numbers above 0, each once"),
    ("head_rates", (1e-3, -1.0), "config.head_rates=(0.001, -1.0): must be numbers above 0"),
    ("seeds", 0, "config.seeds=0: must be at least 1"),
    ("seeds", 101, "config.seeds=101: must be at most 100"),
    ("at_once", -1, "config.at_once=-1: must be 0 or more"),
    ("pictures", ("tabel",), "no picture 'tabel'"),
    ("along", "keep", "config.along: no axis 'keep': there are method, task"),
    ("fields", ("steps",), "'steps': must be a field and its value"),
    ("variants", (("rm.keep=2.0",),), "digits lora rm.keep=2.0: config.rm.keep=2.0: must be a"),
    ("grid", {"keep": (0.5,)}, "config.grid.keep: it changes nothing with lora, head"),
    ("grid", {"learning_rate": (0.5,)}, "give the rates as config.rates"),
    ("grid", {"weight_decay": (-1.0,)}, "optimizer.weight_decay=-1.0: must be 0 or more"),
    ("grid", {"momentum": (0.5,)}, "config.grid: no name 'momentum': there are learning_rate"),
    ("method_set", {"lorra": ()}, "config.method_set: no method 'lorra'"),
])
def test_mistakes_are_said_before_anything_runs(study, field, value, words, tmp_path):
    if isinstance(value, dict):
        study[field].update(value)
    else:
        study[field] = value
    fake = Fake()
    with pytest.raises(UserError) as error:
        run_study(study, tmp_path / "a", trainer=fake)
    assert words in str(error.value)
    assert not fake.calls and not (tmp_path / "a").exists()


def test_all_mistakes_are_said_at_once(study):
    study.seeds, study.choose_seeds, study.methods = 0, 0, ("lorra",)
    with pytest.raises(UserError) as error:
        check_study(study)
    assert len(str(error.value).splitlines()) == 3


# Running and resuming


def test_a_study_chooses_and_reports(study, tmp_path, capsys):
    fake = Fake()
    found = run_study(study, tmp_path, trainer=fake)
    assert [len(call) for call in fake.calls] == [4, 3, 3]
    lora = [r for r in found if r["method"] == "lora" and r["stage"] == "final"]
    assert [(r["seed"], r["settings"]) for r in lora] == [
        (s, {"learning_rate": 3e-3}) for s in range(3)]  # where value_of is best
    assert [r["settings"]["learning_rate"] for r in found if r["stage"] == "choose"] == [
        1e-3, 1e-3, 3e-3, 3e-3]
    assert rows.read_rows(tmp_path / "rows.jsonl") == found and len(found) == 10
    out = capsys.readouterr().out
    assert "[1/3] digits lora choose: 4 runs\n[2/3] digits lora final: 3 runs\n" in out
    assert "[3/3] digits head final: 3 runs" in out
    for name in ("table.md", "table.csv", "table.png"):
        assert (tmp_path / name).stat().st_size > 100
    again = Fake()
    assert run_study(study, tmp_path, trainer=again) == found
    assert not again.calls


def test_a_row_holds_what_the_run_left(study, tmp_path):
    row, *_ = [r for r in run_study(study, tmp_path, trainer=Fake()) if r["method"] == "lora"]
    value = 0.5 + 0.01 * 100 % 0.1 - 0.1 * math.log10(3)
    assert row["seed"] == 100 and row["stage"] == "choose" and row["study"] == "small"
    assert row["validation"] == pytest.approx(value, abs=1e-5)
    assert row["test"] == pytest.approx(value - 0.02, abs=1e-5)
    assert row["test_best"] == pytest.approx(value - 0.01, abs=1e-5)
    assert row["test_loss"] == 1.5 and row["steps"] == 20 and row["batch_size"] == 32
    assert row["train_loss"] == pytest.approx(np.mean([2 / s for s in range(16, 21)]), rel=1e-5)
    assert row["train"] == pytest.approx(value * 18 / 20, abs=1e-5)
    assert row["effective_rank"] == np.mean([3, 3.5, 2, 2.5])
    assert row["effective_rank_modules"] == {"encoder/query": 3.25, "encoder/key": 2.25}
    assert row["layers"] == {"step": [5, 10, 15, 20], "effective_rank": [[2.5, 3.0]] * 4}
    assert row["curve"]["step"] == [5, 10, 15, 20]
    assert row["curve"]["train_loss"][0] == pytest.approx(np.mean([2, 1, 2 / 3, 0.5, 0.4]))
    assert row["curve"]["validation_loss"] == [0.6, 0.3, 0.2, 0.15]
    assert row["curve"]["test"] == [None] * 4
    assert row["seconds"] == 2.5 and row["together"] == 4
    assert row["device"] == "cpu" and row["jax"].count(".") >= 2
    assert (row["trainable_parameters"], row["factor_parameters"]) == (5000, 4000)
    assert row["rank"] == 4 and row["data_seed"] == 100  # of all in the program


@pytest.mark.parametrize("stopped", [0, 1, 2])
def test_a_study_goes_on_where_it_stopped(study, tmp_path, stopped):
    whole = run_study(study, tmp_path / "whole", trainer=Fake())
    first, second = Fake(stop_after=stopped), Fake()
    with pytest.raises(KeyboardInterrupt):
        run_study(study, tmp_path / "cut", trainer=first)
    assert run_study(study, tmp_path / "cut", trainer=second) == whole
    assert len(first.calls) == stopped and len(second.calls) == 3 - stopped


def test_a_torn_line_is_written_anew(study, tmp_path):
    whole = run_study(study, tmp_path, trainer=Fake())
    file = tmp_path / "rows.jsonl"
    lines_ = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines_[:5]) + lines_[5][:77])  # within the second program

    def trainer(config, workdir):
        assert (workdir / "summary.json").exists()  # finished: loop.train does nothing

    assert run_study(study, tmp_path, trainer=trainer) == whole
    assert file.read_bytes() == b"".join(lines_)


def test_rows_are_appended_once(tmp_path):
    file = tmp_path / "a" / "rows.jsonl"
    one, two = study_rows.row(seed=0), study_rows.row(seed=1)
    rows.append_rows(file, [one, two])
    before = file.read_bytes()
    rows.append_rows(file, [two, one, two])
    assert file.read_bytes() == before
    file.write_bytes(before[:-30])
    assert rows.read_rows(file) == [one]
    rows.append_rows(file, [two])
    assert file.read_bytes() == before
    file.write_bytes(b"{}\n" + before)
    with pytest.raises(UserError, match="line 1 is not the row of a run"):
        rows.read_rows(file)


def test_other_settings_are_other_runs(study, tmp_path):
    run_study(study, tmp_path, trainer=Fake())
    study.set = ("steps=10",)
    fake = Fake()
    found = run_study(study, tmp_path, trainer=fake)
    assert len(fake.calls) == 3
    assert {row["steps"] for row in found} == {10}
    assert {row["steps"] for row in rows.read_rows(tmp_path / "rows.jsonl")} == {10, 20}


def test_a_program_that_lacks_a_run_is_refused(study, tmp_path):

    def trainer(config, workdir):
        first, *_ = runs(config)
        leave(workdir / first.name, nested(flatten(first.config)))

    with pytest.raises(UserError, match="3 of 4 runs left no summary"):
        run_study(study, tmp_path, trainer=trainer)


def test_values_of_a_sweep_reach_the_trainer(study, tmp_path):
    study.methods, study.rates = ("rm_lora",), (2e-3,)
    study.grid.update({"penalty": (0.0, 0.5), "keep": (0.25, 1.0)})
    study.along = "keep"
    fake = Fake()
    found = run_study(study, tmp_path, trainer=fake)
    (call,) = fake.calls
    assert [(c.rm.penalty, c.rm.keep, c.seed) for c in call] == [
        (p, k, s) for k in (0.25, 1.0) for p in (0.0, 0.5) for s in range(3)]
    assert {c.optimizer.learning_rate for c in call} == {2e-3}
    assert found[3]["settings"] == {"learning_rate": 2e-3, "keep": 0.25, "penalty": 0.5}


# What it costs


def test_a_dry_run_prints_the_plan_and_starts_nothing(study, tmp_path, capsys):
    study.dry_run = True
    fake = Fake()
    run_study(study, tmp_path / "a", trainer=fake)
    out = capsys.readouterr().out.splitlines()
    assert not fake.calls and not (tmp_path / "a").exists()
    assert out[1].split() == ["digits", "lora", "choose", "4", "4", "20", "2,560", "?"]
    assert out[-1].split() == ["all", "3", "10", "10", "6,400", "?"]

    study.dry_run = False
    with pytest.raises(KeyboardInterrupt):
        run_study(study, tmp_path / "a", trainer=Fake(stop_after=1))
    study.dry_run = True
    run_study(study, tmp_path / "a", trainer=fake)
    out = capsys.readouterr().out.splitlines()
    # 2.5 s a run of 20 steps, measured; the time of head is that of lora.
    assert [line.split()[2:] for line in out[-4:-1]] == [
        ["choose", "4", "0", "20", "0", "0.0", "s"],
        ["final", "3", "3", "20", "1,920", "7.5", "s"],
        ["final", "3", "3", "20", "1,920", "7.5", "s"]]
    assert out[-1].split() == ["all", "3", "10", "6", "3,840", "0:15"]


def test_time_is_that_of_the_method_or_else_of_the_task():
    cell = plan.Cell("cola", "lora", "final", ({},), (0,))
    slow = study_rows.row("cola", "full", seconds=12.8)  # 2000 steps of 64
    fast = study_rows.row("cola", "lora", seconds=1.28)
    other = study_rows.row("rte", "lora", seconds=99.0)
    assert seconds_per_example([other], cell) is None
    assert seconds_per_example([other, slow], cell) == pytest.approx(1e-4)
    assert seconds_per_example([other, slow, fast], cell) == pytest.approx(1e-5)


def test_steps_of_data_that_are_not_here_are_unknown(study, tmp_path):
    study.tasks = ("configs/vit_tiny_cifar100.py", "configs/quickstart.py steps=0 epochs=2")
    study.set = (f"data.data_dir={tmp_path}",)
    study, bases = check_study(study)
    cells = plan.cells(study, ("cifar100", "digits"))
    table = cost_table(cells, bases, [], lambda cell: program.program(
        cell, bases[cell.place], tmp_path)).splitlines()
    assert table[1].split()[-3:] == ["?", "?", "?"]
    assert f" {round(2 * 1293 / 32)} " in table[4]
    assert not list(tmp_path.iterdir())


# Tables


def figures(found, task, method, name="test", factor=100):
    values = [factor * r[name] for r in found
              if (r["task"], r["method"], r["stage"]) == (task, method, "final")]
    return np.mean(values), np.std(values, ddof=1)


def test_table_figures_are_those_of_numpy():
    found = study_rows.paper_table()
    text = tables.markdown(found)
    blocks = dict(zip(study_rows.TASKS, text.split("**")[2::2], strict=True))
    for task in study_rows.TASKS:
        for method in study_rows.METHODS:
            mean, deviation = figures(found, task, method)
            (line,) = [s for s in blocks[task].splitlines() if s.startswith(f"| {method} |")]
            cells = [c.strip() for c in line.strip("|").split("|")]
            assert cells[3] == f"{mean:.2f} ± {deviation:.2f}" and cells[2] == "5"
            mean, deviation = figures(found, task, method, "test_loss", 1)
            assert cells[4] == f"{mean:.3f} ± {deviation:.3f}"
            if method == "head":
                assert cells[6:9] == ["-", "0", "19,300"]
            if method == "lora":
                assert cells[7:9] == ["165,888", "185,188"]
            assert cells[10] == "3.00"
    assert text.count("\n\n**") == 2


def test_a_table_of_csv_parses_to_all_digits():
    found = study_rows.paper_table(tasks=("cola",), methods=("full", "head", "lora"))
    parsed = list(csv.DictReader(io.StringIO(tables.csv_text(found))))
    assert [line["method"] for line in parsed] == ["full", "head", "lora"]
    for line in parsed:
        values = [r["test"] for r in found
                  if r["method"] == line["method"] and r["stage"] == "final"]
        assert float(line["test_mean"]) == pytest.approx(statistics.mean(values), rel=1e-12)
        assert float(line["test_std"]) == pytest.approx(statistics.stdev(values), rel=1e-12)
        assert line["seeds"] == "5" and line["metric"] == "matthews"
        assert float(line["learning_rate"]) == 1e-3
    assert parsed[2]["parameters_without_head"] == "165888"
    assert parsed[0]["effective_rank_mean"] == ""


def test_parameters_are_those_that_are_left():
    pruned = [study_rows.row("cola", "sora", s, factor_parameters=n, head_parameters=10)
              for s, n in enumerate((100, 103))]
    assert tables.parameters(pruned) == (102, 112)


@pytest.mark.parametrize(("count", "said"), [(101, False), (102, False), (103, True)])
def test_unequal_parameters_are_said(count, said):
    found = [study_rows.row("cola", m, factor_parameters=n, head_parameters=10)
             for m, n in (("lora", 100), ("rm_lora", count), ("full", 9999))]
    text = tables.markdown(found)
    assert ("cola: rm_lora trained more than 2 % more" in text) == said
    assert "full trained" not in text


def test_a_rate_at_the_edge_is_marked():
    found = study_rows.paper_table(tasks=("cola",), methods=("lora",))
    assert "*" not in tables.markdown(found).replace("**", "")
    edge = [r | {"settings": {"learning_rate": 3e-3}} if r["stage"] == "final" else r
            for r in found]
    assert "| 0.003 * |" in tables.markdown(edge)
    assert "at the edge of the rates" in tables.markdown(edge)


def test_how_rates_were_chosen_is_shown():
    found = study_rows.paper_table(tasks=("cola",), methods=("lora",))
    (line,) = tables.rates_table(found).splitlines()[2:]
    for rate in (3e-4, 1e-3, 3e-3):
        mean = 100 * np.mean([r["validation"] for r in found if r["stage"] == "choose"
                              and r["settings"]["learning_rate"] == rate])
        cell = f"{rate:g}: {mean:.2f}"
        assert (f"**{cell}**" if rate == 1e-3 else cell) in line


def test_what_is_compared_has_columns_of_its_own():
    text = tables.markdown(study_rows.grid(tasks=("cola",)))
    assert text.splitlines()[2].startswith("| method | keep | penalty | rate | seeds |")
    assert text.count("\n| rm_lora |") == 25
    parsed = list(csv.DictReader(io.StringIO(tables.csv_text(study_rows.frequency()))))
    assert len(parsed) == 14 and parsed[1]["rm.resample_every"] == "10"


def test_errors_are_not_percentages():
    assert tables.scale("mse") == 1 and tables.unit("mse", "short") == "MSE"
    assert tables.unit("f1") == "F1 x 100"
    text = tables.markdown([study_rows.row("cola", seed=s, metric="mse") for s in range(3)])
    assert "test MSE" in text


# Figures of the pictures


def curve(values, **more):
    steps = list(range(10, 10 * len(values) + 1, 10))
    return {"metric": "accuracy", "dataset": "cifar100", "classes": 0,
            "curve": {"step": steps, "validation": values}} | more


@pytest.mark.parametrize(("run", "steps"), [
    (curve([0.2, 0.45, 0.46, 0.5]), 30),  # from 1 / 100: 0.451 is needed
    (curve([0.2, 0.45, 0.46, 0.5], metric="matthews"), 20),  # from 0: 0.45
    (curve([0.2, 0.4, 0.5], metric="matthews"), 30),
    (curve([0.6, 0.7, 0.94, 1.0], classes=2), 40),  # from 1 / 2: 0.95
    (curve([0.6, 0.7, 0.94, 1.0], dataset="glue/rte"), 40),
    (curve([0.6, 0.7, 0.94, 1.0], dataset="glue/mnli"), 30),  # from 1 / 3: 0.933
    (curve([0.005]), None), (curve([None, 0.5]), 20), (curve([0.3, None]), None),
])
def test_steps_to_ninety_percent_of_the_gain(run, steps):
    assert lines.steps_to_gain(run) == steps


def test_curves_are_a_row_a_seed():
    found = [study_rows.row("cifar100", seed=s) for s in range(3)]
    (group,) = tables.groups(found)
    steps, curves = lines.curves_of(group, "train_loss")
    assert steps == found[0]["curve"]["step"] and curves.shape == (3, 10)
    assert curves[2].tolist() == found[2]["curve"]["train_loss"]


def size(path):
    return struct.unpack(">II", path.read_bytes()[16:24])


@pytest.mark.parametrize(("name", "found", "along", "least"), [
    ("table", study_rows.paper_table, "method", (1500, 450)),
    ("gap", study_rows.paper_table, "method", (1500, 1200)),
    ("layers", study_rows.paper_table, "method", (1500, 800)),
    ("dimension", study_rows.paper_table, "method", (1300, 1000)),
    ("heat", study_rows.grid, "keep", (1300, 500)),
    ("frequency", study_rows.frequency, "rm.resample_every", (1500, 700)),
    ("dimension", study_rows.classes, "data.classes", (1000, 350)),
    ("gap", study_rows.classes, "data.classes", (1500, 400)),
    ("table", lambda: study_rows.paper_table(("rte",), ("lora",), 1), "method", (500, 180)),
    ("gap", lambda: study_rows.paper_table(("rte",), ("lora",), 1), "method", (1500, 400)),
    ("dimension", lambda: [study_rows.row(t) for t in study_rows.TASKS], "task", (900, 300)),
    ("dimension", lambda: [study_rows.row(trajectory=False)], "method", (400, 300)),
])
def test_pictures_are_drawn(name, found, along, least, tmp_path):
    (path,) = write_pictures(found(), tmp_path, [name], along)
    assert path == tmp_path / f"{name}.png" and path.stat().st_size > 8000
    width, height = size(path)
    assert least[0] <= width <= 2600 and least[1] <= height <= 2600


@pytest.mark.parametrize("name", [n for n in PICTURES if n not in ("table", "gap")])
def test_pictures_without_their_figures_are_left_out(name, tmp_path):
    found = [study_rows.row("cola", "head", s) for s in range(2)]
    assert write_pictures(found, tmp_path, [name], "method") == []
    assert write_pictures([study_rows.row(stage="choose")], tmp_path, ["table"], "method") == []
    assert not list(tmp_path.iterdir())


# Stored rows


def test_stored_rows_make_the_tables_and_pictures_of_the_readme(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "results"))
    import tables as stored

    configs = tmp_path / "configs"
    configs.mkdir()
    (configs / "ablation.py").write_text((ROOT / "configs" / "ablation.py").read_text())
    monkeypatch.setattr(stored, "HERE", tmp_path)
    monkeypatch.setattr(stored, "README", configs / "README.md")
    found = study_rows.grid()
    for i in range(2):  # the same rows twice
        rows.append_rows(tmp_path / f"run_{i}" / "rows.jsonl", found)
        stored.add_study(tmp_path / f"run_{i}")
    assert stored.rows("ablation_grid") == found
    begin = stored.BEGIN.format(name="ablation_grid")
    text = stored.with_tables(f"above\n{begin}\nold\n{stored.END}\nbelow")
    assert text == f"above\n{begin}\n{tables.markdown(found)}\n{stored.END}\nbelow"
    stored.pictures()
    assert (configs / "ablation_grid_heat.png").stat().st_size > 8000
    with pytest.raises(ValueError, match="has a study 'elsewhere'"):
        stored.config_of("elsewhere")


# The dimension of a trajectory


def test_trajectory_from_snapshots_is_that_of_whole_matrices(tmp_path):
    rng = np.random.default_rng(0)
    c = default_config()
    c.lora.rank, c.lora.alpha, c.lora.target = 2, 6.0, "layers/.*"
    taken = []
    for step in (0, 10, 20, 30):
        a, b = rng.standard_normal((3, 12, 2)), rng.standard_normal((3, 2, 9))
        taken.append(3.0 * (a @ b))  # s = 6 / 2
        save_snapshot(tmp_path, step, {"layers": {"q": {"lora_a": a, "lora_b": b}}})
    write_json(tmp_path / "config.json", c.to_dict())
    found = rows.trajectory(tmp_path)
    assert found["step"] == [10, 20, 30] and found["bound"] == [4, 8, 9]
    for k, (rank, effective) in enumerate(
            zip(found["numerical_rank"], found["effective_rank"], strict=True), 1):
        ranks, effectives = [], []
        for layer in range(3):
            stacked = np.concatenate([taken[i + 1][layer] - taken[i][layer] for i in range(k)])
            s = np.linalg.svd(stacked, compute_uv=False)
            p = s / s.sum()
            ranks.append((s > 1e-3 * s[0]).sum())
            effectives.append(np.exp(-(p[p > 1e-12] * np.log(p[p > 1e-12])).sum()))
        assert rank == pytest.approx(np.mean(ranks))
        assert effective == pytest.approx(np.mean(effectives), rel=1e-3)
    assert found["layers"] == pytest.approx(effectives, rel=1e-3)
    assert found["numerical_rank"][-1] > 2  # more than r, which one update never has
    assert rows.trajectory(tmp_path / "none") is None


def test_dimension_takes_modules_at_the_top():
    tree = {"lora_a": np.eye(4, 1), "lora_b": np.ones((1, 3))}
    still = {"lora_a": np.eye(4, 1), "lora_b": np.zeros((1, 3))}
    found = rows.dimension([still, tree], rm.LoRA(rank=1))
    assert float(found[""]["numerical_rank"]) == 1


# Real runs


def command(tiny_vit, workdir, *more):
    task = (f"configs/quickstart.py steps=6 eval_every=3 log_every=1 batch_size=16 lora.rank=2 "
            f"model.image_size=16 model.source={tiny_vit} compilation_cache=")
    config = workdir.parent / "tiny_study.py"
    config.write_text(
        "from rmlora_jax.study.config import default_study\n"
        "def get_config():\n"
        "    c = default_study()\n"
        f"    c.study, c.tasks = 'tiny', ({task!r},)\n"
        "    c.methods, c.rates, c.head_rates = ('rm_lora', 'head'), (1e-3, 1e-2), (1e-2,)\n"
        "    c.seeds, c.choose_seeds, c.pictures = 2, 1, ('table', 'gap', 'layers')\n"
        "    return c\n")
    return [sys.executable, str(ROOT / "run.py"), f"--config={config}", f"--workdir={workdir}",
            *more]


@pytest.mark.slow
def test_a_real_study_from_the_command_line(tiny_vit, tmp_path):
    def run(*more):
        done = subprocess.run(command(tiny_vit, tmp_path / "out", *more), env=with_devices(1),
                              capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        return done.stdout

    plan_ = run("--config.dry_run")
    assert plan_.splitlines()[-1].split()[:1] == ["all"] and not (tmp_path / "out").exists()
    out = run("--config.processes=False")
    assert "digits rm_lora choose: " in out and "**digits**" in out
    found = rows.read_rows(tmp_path / "out" / "rows.jsonl")
    assert len(found) == 2 + 2 + 2
    final = [r for r in found if (r["stage"], r["method"]) == ("final", "rm_lora")]
    chosen = max((r for r in found if r["stage"] == "choose"), key=lambda r: r["validation"])
    assert {r["settings"]["learning_rate"] for r in final} == {
        chosen["settings"]["learning_rate"]}
    for row in final:
        assert row["steps"] == 6 and row["curve"]["step"] == [3, 6]
        assert 1 <= row["effective_rank"] <= 2 and 0 <= row["test"] <= 1
    assert final[0]["test_loss"] != final[1]["test_loss"]
    for name in ("table.md", "table.csv", "table.png", "gap.png", "layers.png"):
        assert (tmp_path / "out" / name).exists()
    assert "[1/" not in run("--config.processes=False")


@pytest.mark.slow
def test_a_program_in_a_process_of_its_own(tiny_vit, tmp_path, capfd):
    c = default_study()
    c.study, c.methods, c.rates, c.seeds = "own", ("lora",), (1e-3,), 1
    task = (f"configs/quickstart.py steps=2 log_every=1 batch_size=16 model.image_size=16 "
            f"model.source={tiny_vit} compilation_cache=")
    c.tasks = (task,)
    (row,) = run_study(c, tmp_path / "a")
    assert row["steps"] == 2 and row["device"] == "cpu"
    (folder,) = (p for p in (tmp_path / "a" / "runs").iterdir() if p.is_dir())
    assert read_json(folder / "config.json")["method"] == "lora"
    # Killed between the run and its row: nothing is trained again.
    (tmp_path / "a" / "rows.jsonl").unlink()
    (folder / "summary.json").unlink()
    assert run_study(c, tmp_path / "a") == [row]
    c.tasks = (task + " model.source=/nowhere",)
    with pytest.raises(UserError, match="digits lora final failed with code 1"):
        run_study(c, tmp_path / "b")
    assert "error: " in capfd.readouterr().err


def test_columns_without_a_figure_are_left_out_and_shared_devices_give_no_times():
    found = [study_rows.row("rte", seed=s) | {"seconds": 4.0} for s in range(2)]
    assert "| seconds |" in tables.markdown(found)
    shared = [row | {"alone": False, "peak_memory_bytes": None} for row in found]
    head = tables.markdown(shared).splitlines()[2]
    assert "| parameters |" in head and "seconds" not in head and "GiB" not in head
