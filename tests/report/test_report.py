"""The verdict on synthetic curves, and the picture: what it draws, and that it can be read."""

import doctest
import itertools
import json
import math
import struct
import subprocess
import sys

import numpy as np
import pytest
from marks import every_other, slow

from rmlora_jax import files
from rmlora_jax.errors import UserError
from rmlora_jax.methods import METHODS
from rmlora_jax.report import records, style, verdict
from rmlora_jax.report import run as report
from rmlora_jax.tasks.task import Outputs
from rmlora_jax.train.finished import confusion
from rmlora_jax.train.metrics import append_intrinsic

KINDS = ("attention/key", "attention/out", "attention/query", "attention/value", "mlp/fc1",
         "mlp/fc2")
CONFIG = {
    "method": "rm_lora", "model": {"source": "google/vit-base-patch16-224-in21k"},
    "data": {"name": "cifar100"}, "lora": {"rank": 4, "alpha": 16.0},
    "rm": {"penalty": 0.1, "keep": 0.5},
}


def summary_of(steps, best):
    return {
        "method": "rm_lora", "model": "google/vit-base-patch16-224-in21k", "dataset": "cifar100",
        "steps": steps, "test": {"accuracy": 0.7123, "loss": 1.25},
        "test_best": {"accuracy": 0.7456, "loss": 1.5, "step": best},
        "trainable_parameters": 740_452, "total_parameters": 86_612_836,
        "examples_per_second": 5123.4, "compile_seconds": 12.0, "wall_seconds": 754.0,
        "intrinsic_dimension": {},
    }


def curves(steps, log, every, train, validation, accuracy=None, eval_accuracy=None, noise=0.1,
           seed=0):
    """Lines of metrics from functions of t in (0, 1]; noise relative to the training loss."""
    rng = np.random.default_rng(seed)
    history = []
    for step in range(1, steps + 1):
        t, row = step / steps, {"step": step}
        if step % log == 0:
            row["train/loss"] = train(t) * (1 + noise * rng.standard_normal())
            if accuracy:
                row["train/accuracy"] = float(np.clip(accuracy(t) + 0.05 * rng.normal(), 0, 1))
        if step % every == 0:
            row["validation/loss"] = validation(t) * (1 + 0.01 * rng.standard_normal())
            if eval_accuracy:
                row["validation/accuracy"] = eval_accuracy(t)
        if len(row) > 1:
            history.append(row)
    return history


LENGTHS = pytest.mark.parametrize(
    ("steps", "log", "every"), [(40, 1, 10), (600, 20, 60), (6000, 20, 700)])
SEEDS = pytest.mark.parametrize("seed", range(5))


def settle(t):
    return 1.0 + 3.6 * math.exp(-8 * t)


def rise(t):
    return 0.85 + 3.6 * math.exp(-9 * t) + 1.2 * max(t - 0.3, 0)


@pytest.mark.parametrize("module", [records, report, style, verdict], ids=lambda m: m.__name__)
def test_examples_in_docstrings(module):
    result = doctest.testmod(module)
    assert result.attempted > 0 and result.failed == 0


def test_a_method_without_a_colour_of_its_own_shares_that_of_no_other():
    new = [method for method in METHODS if method not in style.OWN]
    assert "dora" in new
    colours = [style.colour(method) for method in new]
    assert not {*colours} & {*style.OWN.values()} and len({*colours}) == len(new)
    assert style.colour("dora", ("lora", "dora")) == style.colour("dora")


# Verdict


@LENGTHS
@SEEDS
def test_noise_of_small_batches_is_healthy(steps, log, every, seed):
    history = curves(steps, log, every, settle, lambda t: settle(t) + 0.05,
                     lambda t: 0.8 - 0.7 * math.exp(-8 * t), lambda t: 0.75 * t**0.2, seed=seed)
    assert verdict.verdict(history).startswith("Healthy: training loss settled at ")


@LENGTHS
@SEEDS
def test_a_rising_validation_loss_is_overfitting(steps, log, every, seed):
    history = curves(steps, log, every, lambda t: 0.05 + 4.6 * math.exp(-5 * t), rise, seed=seed)
    assert verdict.verdict(history).startswith("Overfitting: validation loss rose from ")


def test_overfitting_names_the_step_and_the_losses():
    history = [{"step": s, "train/loss": 2.0 * 0.97**s} for s in range(1, 101)]
    for row in history[9::10]:
        row["validation/loss"] = 1 + ((row["step"] - 40) / 50) ** 2
    text = verdict.verdict(history)
    assert "from 1.00 at step 40 to 2.44" in text
    around = np.mean([2.0 * 0.97**s for s in range(36, 45)])  # 4.95 steps to either side of 40
    end = np.mean([2.0 * 0.97**s for s in range(91, 101)])
    assert f"training loss fell from {around:.2f} to {end:.2f}" in text


@pytest.mark.parametrize(("lowest", "last", "label"), [
    (1.0, 1.09, "Healthy"), (1.0, 1.11, "Overfitting"),  # 10 % of the lowest
    (0.02, 0.039, "Healthy"), (0.02, 0.041, "Overfitting"),  # at least 0.02
])
def test_overfitting_needs_a_margin(lowest, last, label):
    history = [{"step": s, "train/loss": 0.1 + 2 * 0.93**s} for s in range(1, 101)]
    for step, loss in ((25, lowest + 0.001), (50, lowest), (75, (lowest + last) / 2), (100, last)):
        history[step - 1]["validation/loss"] = loss
    assert verdict.verdict(history).startswith(label)


def test_a_rise_of_both_losses_is_not_overfitting():
    history = [{"step": s, "train/loss": 0.5 + 2 * 0.9**s + 0.002 * s} for s in range(1, 101)]
    for row in history[9::10]:
        row["validation/loss"] = row["train/loss"] + 0.1
    assert verdict.verdict(history).startswith("Healthy")


@LENGTHS
@SEEDS
def test_a_loss_still_falling_is_underfitting(steps, log, every, seed):
    def line(t):
        return 4.6 - 2.5 * t

    history = curves(steps, log, every, line, line, noise=0.02, seed=seed)
    text = verdict.verdict(history)
    assert text.startswith("Underfitting: training loss was still falling, by 0.")


@pytest.mark.parametrize(("train", "validation", "label"), [
    (0.45, 0.44, "Underfitting: training accuracy ended at 0.45"),
    (0.55, 0.54, "Healthy"),  # high enough
    (0.45, 0.35, "Healthy"),  # it is validation that is low
])
def test_low_training_accuracy_is_underfitting(train, validation, label):
    history = [{"step": s, "train/loss": 2 + 2 * 0.9**s, "train/accuracy": train,
                "validation/loss": 2.1 + 2 * 0.9**s, "validation/accuracy": validation}
               for s in range(1, 101)]
    assert verdict.verdict(history).startswith(label)


@pytest.mark.parametrize(("steps", "log", "every"), [(40, 1, 2), (600, 20, 60), (6000, 20, 250)])
@SEEDS
def test_a_swinging_loss_is_oscillation(steps, log, every, seed):
    def swing(t):
        return settle(t) + (0.9 * math.sin(33 * t) + 0.9 if t > 0.2 else 0)

    history = curves(steps, log, every, swing, swing, seed=seed)
    assert verdict.verdict(history).startswith("Oscillation: in the second half the ")


@pytest.mark.parametrize("key", ["train/loss", "validation/loss"])
def test_swings_of_one_loss_alone_count(key):
    other = {"train/loss": "validation/loss", "validation/loss": "train/loss"}[key]
    history = [{"step": s, other: settle(s / 40), key: settle(s / 40) + 0.8 * (s // 4 % 2)}
               for s in range(1, 41)]
    name = {"train/loss": "training", "validation/loss": "validation"}[key]
    assert f"the {name} loss swings" in verdict.verdict(history)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("key", ["train/loss", "validation/loss"])
def test_a_loss_that_is_not_finite_is_divergence(key, bad):
    history = [{"step": s, "train/loss": 1.0} for s in range(1000, 1020)]
    history[7][key] = bad
    history[9][key] = bad
    assert verdict.verdict(history).startswith("Diverged: the loss is not finite from step 1,007")


def test_a_loss_above_its_start_is_divergence():
    history = [{"step": s, "train/loss": 2.0 + 0.1 * s} for s in range(20)]
    assert verdict.verdict(history).startswith("Diverged: training loss ended at 3.90, above")


@pytest.mark.parametrize("history", [
    [], [{"step": 1, "validation/loss": 2.0}], [{"step": s, "train/loss": 1.0} for s in range(4)]])
def test_few_lines_are_too_early(history):
    assert verdict.verdict(history).startswith("Too early to tell: ")


@pytest.mark.parametrize("row", [{}, {"validation/loss": 1.5}, {"train/accuracy": 0.9}])
def test_lines_may_lack_any_metric_and_are_left_as_they_are(row):
    history = [{"step": s, "train/loss": 1 + 0.5**s} for s in range(20)] + [{"step": 30} | row]
    before = json.dumps(history)
    assert verdict.verdict(history).startswith("Healthy")
    assert json.dumps(history) == before


def test_every_label_has_a_colour_on_purpose():
    assert set(report.TONE) == {"Healthy", "Underfitting", "Too early to tell", "Cannot tell"}
    assert len({*report.TONE.values(), report.ALARM}) == 4


@pytest.mark.parametrize("name", ["matthews", "pearson", "spearman"])
@pytest.mark.parametrize(("last", "label"), [
    (-0.2, "Underfitting"), (0.0, "Underfitting"), (0.09, "Underfitting"), (0.11, "Healthy")])
def test_a_correlation_near_guessing_is_underfitting(name, last, label):
    history = [{"step": s, "train/loss": 0.5 + 0.2 * 0.9**s, "train/accuracy": 0.7}
               for s in range(1, 101)]
    history[49]["validation/" + name] = 0.5
    history[99]["validation/" + name] = last
    text = verdict.verdict(history)
    assert text.startswith(label)
    if label == "Underfitting":
        assert f"{name.capitalize()} correlation on validation ended at {last:.2f}" in text


@pytest.mark.parametrize(("fall", "accuracy", "label"), [
    (0.04, 0.7, "Underfitting: training loss went from 0.69 to 0.66 only"),
    (0.07, 0.7, "Healthy"),  # it gained something
    (0.04, 0.95, "Healthy"),  # there was nothing to gain
    (0.04, None, "Underfitting: training loss went from "),  # of values: no accuracy
])
def test_a_loss_that_stays_is_underfitting(fall, accuracy, label):
    """The fall is within the first of the 20 levels, which are means of 20 lines."""
    history = [{"step": s, "train/loss": 0.69 * (1 - fall * (s > 20))} for s in range(1, 401)]
    if accuracy:
        history = [row | {"train/accuracy": accuracy} for row in history]
    assert verdict.verdict(history).startswith(label)


# Grouping and smoothing


def test_modules_stacked_over_layers_are_kinds():
    modules = {f"encoder/layers/{kind}": {"singular_values": np.full((12, 4), i, float),
                                          "effective_rank": np.full(12, i, float)}
               for i, kind in enumerate(KINDS)}
    kinds = records.by_kind(modules)
    assert list(kinds) == ["query", "key", "value", "out", "fc1", "fc2"]
    assert (kinds["query"]["singular_values"] == 2).all()
    assert kinds["fc2"]["effective_rank"].shape == (12,)


@pytest.mark.parametrize("path", ["layers_{}/attn/q", "layers/{}/attn/q", "block_{}/q"])
def test_looped_layers_are_gathered_by_number(path):
    modules = {path.format(i): {"singular_values": np.array([i, 0.5]),
                                "effective_rank": np.float64(1 + i)} for i in (10, 2, 0, 1)}
    ((name, kind),) = records.by_kind(modules).items()
    assert name == "q"
    assert kind["singular_values"][:, 0].tolist() == [0, 1, 2, 10]
    assert kind["effective_rank"].tolist() == [1, 2, 3, 11]


def test_stages_that_are_stacked_stay_apart():
    stage = {"singular_values": np.ones((2, 1)), "effective_rank": np.ones(2)}
    assert list(records.by_kind({"stage_0/q": stage, "stage_1/q": stage})) == ["stage_0/q",
                                                                             "stage_1/q"]


def test_kinds_of_one_name_keep_the_path_that_tells_them_apart():
    one = {"singular_values": np.ones((2, 1)), "effective_rank": np.ones(2)}
    paths = ["a/norm/out", "b/norm/out", "mlp/fc1", "head"]
    assert set(records.by_kind(dict.fromkeys(paths, one))) == {"a/norm/out", "b/norm/out", "fc1",
                                                             "head"}


def test_layers_of_different_rank_leave_the_rest_blank():
    modules = {f"l_{i}/q": {"singular_values": np.arange(i + 1, 0, -1.0), "effective_rank": i}
               for i in range(2)}
    expected = [[1, np.nan], [2, 1]]
    found = records.by_kind(modules)["q"]["singular_values"]
    assert np.array_equal(found, expected, equal_nan=True)


def test_smoothing_keeps_lines_and_lowers_noise():
    line = np.linspace(3, 1, 200)
    assert np.allclose(records.smooth(line)[:190], line[:190], atol=1e-12)
    noise = np.random.default_rng(0).standard_normal(400)
    assert records.smooth(noise)[20:].std() == pytest.approx(noise.std() / math.sqrt(21), rel=0.35)
    assert records.smooth(np.array([1.0, 5.0])).tolist() == [1, 5]


# The picture


def spectra(layers=12, rank=4, scale=1.0, kinds=KINDS):
    rng = np.random.default_rng(0)
    modules = {}
    for kind in kinds:
        values = -np.sort(-rng.random((layers, rank)) * scale, -1)
        share = values / values.sum(-1, keepdims=True)
        modules["encoder/layers/" + kind] = {
            "singular_values": values,
            "effective_rank": np.exp(-(share * np.log(share)).sum(-1))}
    return modules


def write_run(folder, history, intrinsic=(), config=CONFIG, summary=None):
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in history))
    for step, modules in intrinsic:
        append_intrinsic(folder, step, modules)
    if config:
        files.write_json(folder / "config.json", config)
    if summary:
        files.write_json(folder / "summary.json", summary)
    return folder


def long_history(kind=rise):
    return curves(6000, 20, 300, settle if kind is settle else lambda t: 4 * math.exp(-5 * t) + 0.1,
                  kind, lambda t: 0.9 - 0.8 * math.exp(-8 * t), lambda t: 0.75 - 0.3 * (t - 0.4)**2)


def full_figure(history=None, **options):
    intrinsic = [{"step": s, "modules": spectra(scale=s / 6000)} for s in range(300, 6001, 300)]
    arguments = {"config": CONFIG, "summary": summary_of(6000, 2400), "intrinsic": intrinsic}
    return report.draw(history or long_history(), **(arguments | options))


def axes_titled(figure, start):
    return next(a for a in figure.axes if a.get_title(loc="left").startswith(start))


def png_size(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


def test_curves_hold_the_numbers_of_the_run():
    history = long_history()
    figure = full_figure(history)
    loss, accuracy = axes_titled(figure, "Loss"), axes_titled(figure, "Accuracy")
    by_label = {line.get_label(): line for line in loss.lines}
    expected = [(r["step"], r["validation/loss"]) for r in history if "validation/loss" in r]
    assert np.array_equal(by_label["validation"].get_xydata(), expected)
    lowest = min(expected, key=lambda point: point[1])
    assert np.array_equal(by_label["lowest"].get_xydata(), [lowest])
    assert np.array_equal(by_label["test"].get_xydata(), [(6000, 1.25)])
    assert loss.get_title(loc="left") == (
        f"Loss: validation ended at {expected[-1][1]:.2f}, lowest {lowest[1]:.2f}")
    raw = [(r["step"], r["train/loss"]) for r in history if "train/loss" in r]
    assert any(np.array_equal(line.get_xydata(), raw) for line in loss.lines)
    by_label = {line.get_label(): line for line in accuracy.lines}
    assert np.array_equal(by_label["test, last step"].get_xydata(), [(6000, 0.7123)])
    assert np.array_equal(by_label["test, best step"].get_xydata(), [(2400, 0.7456)])


def test_heat_map_holds_every_singular_value_of_the_last_step():
    intrinsic = [{"step": s, "modules": spectra(scale=s)} for s in (1, 2)]
    ax = axes_titled(full_figure(intrinsic=intrinsic), "What moved")
    assert ax.get_title(loc="left").endswith("at step 2")
    blocks = dict(zip([t.get_text() for t in ax.get_xticklabels()], ax.collections, strict=True))
    assert list(blocks) == ["query", "key", "value", "out", "fc1", "fc2"]
    for path, values in spectra(scale=2).items():
        drawn = np.asarray(blocks[path.rsplit("/", 1)[-1]].get_array()).reshape(12, 4)
        assert np.array_equal(drawn, values["singular_values"])
    assert ax.get_ylim() == (12.5, 0.5)  # the first layer on top
    limits = {mesh.get_clim() for mesh in ax.collections}
    top = max(v["singular_values"].max() for v in spectra(scale=2).values())
    assert limits == {(0, top)}, "one colour scale for all blocks"


def test_effective_rank_is_the_mean_over_layers_without_zero_deltas():
    still = {path: {"singular_values": np.zeros((12, 4)), "effective_rank": np.zeros(12)}
             for path in spectra()}
    intrinsic = [{"step": 0, "modules": still}, {"step": 9, "modules": spectra()}]
    ax = axes_titled(full_figure(intrinsic=intrinsic), "Effective rank")
    lines = {line.get_label(): line.get_ydata() for line in ax.lines}
    means = {p.rsplit("/", 1)[-1]: v["effective_rank"].mean() for p, v in spectra().items()}
    for kind, mean in means.items():
        assert np.isnan(lines[kind][0]) and lines[kind][1] == pytest.approx(mean, rel=1e-12)
    overall = np.mean(list(means.values()))
    assert ax.get_title(loc="left") == f"Effective rank of ΔW: mean {overall:.1f} of 4"


def test_ranks_above_16_show_the_values_that_matter():
    modules = {"q": {"singular_values": np.tile(0.7 ** np.arange(64), (3, 1)),
                     "effective_rank": np.full(3, 5.0)}}
    figure = full_figure(intrinsic=[{"step": 1, "modules": modules}])
    ax = axes_titled(figure, "What moved")
    # 0.7 ** 12 = 0.014 is the last above 1 %; 16 are shown at least.
    assert np.asarray(ax.collections[0].get_array()).size == 3 * 16
    assert any("its largest 16 of 64" in t.get_text() for t in ax.texts)


def test_facts_and_headline():
    shown = [t.get_text() for ax in full_figure().axes for t in ax.texts]
    for text in ("71.2 %", "74.6 % test at step 2,400", "1.2500", "rank 4, alpha 16",
                 "penalty 0.1, keep 0.5", "740,452 (0.85 %)", "6,000", "5,123 examples/s",
                 "12:34", "google/vit-base-patch16-224-in21k"):
        assert text in shown


def test_without_a_summary_the_last_finite_validation_accuracy_leads():
    history = [{"step": step, "validation/accuracy": value} for step, value
               in ((10, 0.5), (20, math.nan))]
    assert report.headline(history, {}) == ("50.0 %", "validation accuracy at step 10")
    assert report.headline([], {}) is None


def test_plain_lora_speaks_of_no_mask_and_local_paths_are_shortened():
    config = CONFIG | {"method": "lora", "model": {"source": "/data/models/vit-tiny"}}
    facts = dict(report.facts([{"step": 1}], config, {}))
    assert "RM-LoRA" not in facts and facts["adapters"] == "rank 4, alpha 16"
    assert facts["model"] == "vit-tiny"
    assert "adapters" not in dict(report.facts([{"step": 1}], config | {"method": "full"}, {}))
    for method, words in (("reg_only", "penalty 0.1"), ("mask_only", "keep 0.5")):
        found = dict(report.facts([{"step": 1}], config | {"method": method}, {}))
        assert found["RM-LoRA"] == words and found["adapters"] == "rank 4, alpha 16"


# Texts: other metrics than accuracy, losses in other units


def text_run(task, name, train, validation, metrics, last, best):
    """2,000 steps; ``metrics``: of t to those on validation, of which the first is chosen."""
    history = curves(2000, 20, 100, train, validation)
    for row in history:
        if "validation/loss" in row:
            found = metrics(row["step"] / 2000)
            row.update({f"validation/{metric}": value for metric, value in found.items()})
    config = CONFIG | {"task": task, "model": {"source": "all-MiniLM-L6-v2"},
                       "data": {"name": name}, "text": {"max_length": 128}}
    summary = summary_of(2000, best["step"]) | {
        "model": "all-MiniLM-L6-v2", "dataset": name, "task": task, "metric": next(iter(last)),
        "test": last, "test_best": best}
    return {"history": history, "summary": summary, "config": config}


def cola():
    """Correlation that starts below 0, no training curve of it."""
    return text_run(
        "text_classification", "glue/cola",
        lambda t: 0.4 + 0.25 * math.exp(-3 * t), lambda t: 0.55 + 0.1 * math.exp(-3 * t),
        lambda t: {"matthews": 0.3 - 0.5 * math.exp(-6 * t), "accuracy": 0.7},
        {"matthews": 0.281, "accuracy": 0.7123, "loss": 0.58},
        {"matthews": 0.2952, "accuracy": 0.72, "loss": 0.57, "step": 1500})


def stsb():
    def correlations(t):
        return {"pearson": 0.88 - 0.6 * math.exp(-9 * t), "spearman": 0.87 - 0.6 * math.exp(-9 * t)}

    return text_run(
        "text_regression", "glue/stsb",
        lambda t: 0.3 + 6 * math.exp(-9 * t), lambda t: 0.5 + 5 * math.exp(-9 * t), correlations,
        {"pearson": 0.871, "spearman": 0.8642, "loss": 0.612},
        {"pearson": 0.873, "spearman": 0.866, "loss": 0.6, "step": 1900})


def texts_of(figure):
    return [t.get_text() for ax in figure.axes for t in ax.texts]


def test_the_chosen_metric_has_its_panel_and_leads():
    run = cola()
    figure = full_figure(**run)
    ax = axes_titled(figure, "Matthews correlation")
    expected = [(r["step"], r["validation/matthews"]) for r in run["history"]
                if "validation/loss" in r]
    by_label = {line.get_label(): line for line in ax.lines}
    assert np.array_equal(by_label["validation"].get_xydata(), expected)
    assert np.array_equal(by_label["test, last step"].get_xydata(), [(2000, 0.281)])
    assert np.array_equal(by_label["test, best step"].get_xydata(), [(1500, 0.2952)])
    assert ax.get_title(loc="left") == f"Matthews correlation: validation {expected[-1][1]:.3f}"
    lowest = min(value for _, value in expected)
    assert lowest < -0.05 and ax.get_ylim()[0] == pytest.approx(1.2 * lowest)
    assert ax.get_ylim()[1] == pytest.approx(1.2 * max(v for _, v in expected))
    assert any(list(line.get_ydata()) == [0, 0] for line in ax.lines), "where guessing is"
    assert axes_titled(figure, "Loss").get_ylabel() == "nats per example"
    assert report.headline(run["history"], run["summary"]) == (
        "0.281", "test Matthews correlation at the last step")
    for text in ("0.281", "0.295 test at step 1,500", "test accuracy", "71.2 %", "0.5800",
                 "at most 128 tokens"):
        assert text in texts_of(figure)


def test_values_have_their_units_and_a_scale_up_to_one():
    figure = full_figure(**stsb())
    ax = axes_titled(figure, "Pearson correlation: validation 0.880")
    assert ax.get_ylim() == (0, 1.02)
    assert axes_titled(figure, "Loss").get_ylabel() == "squared error"
    for text in ("0.871", "0.873 test at step 1,900", "test Spearman", "0.864", "0.6120"):
        assert text in texts_of(figure)


def test_a_run_without_a_summary_shows_what_it_evaluated_first():
    history = [{"step": 5, "validation/loss": 1.0, "validation/spearman": 0.25,
                "validation/mse": 2.0}]
    assert report.chosen(history, {}) == "spearman"
    assert report.chosen(history, {"metric": "mse"}) == "mse"
    assert report.chosen([{"step": 1, "validation/loss": 1.0}], {}) == "accuracy"
    assert report.headline(history, {}) == ("0.250", "validation Spearman correlation at step 5")


def test_other_figures_name_the_part():
    last = {"accuracy": 0.84, "loss": 0.4, "accuracy_mismatched": 0.8512, "loss_mismatched": 0.5,
            "f1": 0.9, "pearson": None}
    assert report.other_figures(last, "accuracy") == [
        ("mismatched", "85.1 % accuracy"), ("test F1", "0.900")]


def test_images_have_no_length_of_text():
    config = CONFIG | {"text": {"max_length": 128}}
    assert "text" not in dict(report.facts([{"step": 1}], config, {}))


def visible_texts(figure):
    """(text, box in pixels) of all that is written, ticks outside of the view left out."""
    renderer = figure.canvas.get_renderer()
    figure.draw(renderer)
    texts = list(figure.texts)
    for ax in figure.axes:
        texts += [*ax.texts, ax.xaxis.label, ax.yaxis.label, ax._left_title]
        texts += ax.get_legend().get_texts() if ax.get_legend() else []
        if ax.axison:
            for axis, (low, high) in ((ax.xaxis, sorted(ax.get_xlim())),
                                      (ax.yaxis, sorted(ax.get_ylim()))):
                texts += [label for at, label in zip(axis.get_ticklocs(), axis.get_ticklabels(),
                                                     strict=True) if low <= at <= high]
    return [(t.get_text(), t.get_window_extent(renderer)) for t in texts if t.get_text().strip()]


CASES = {
    "overfit": {},
    "healthy": {"history": long_history(settle)},
    "head only": {"intrinsic": []},
    "not yet ended": {"summary": {}, "history": long_history()[:40]},
    "one line": {"summary": {}, "config": {}, "intrinsic": [],
                 "history": [{"step": 0, "validation/loss": 2.0}]},
    "short": {"history": curves(40, 1, 10, settle, settle), "summary": summary_of(40, 40),
              "intrinsic": [{"step": 40, "modules": spectra()}]},
    "rank 64, 24 layers": {"intrinsic": [{"step": 6000, "modules": spectra(24, 64)}]},
    "rank 1, one module": {"intrinsic": [{"step": 9, "modules": spectra(1, 1, kinds=["q"])}]},
    "ten kinds": {"intrinsic": [
        {"step": 9, "modules": spectra(3, 8, kinds=[f"{c}_projection" for c in "abcdefghij"])}]},
    "spikes": {"history": [r | ({"train/loss": 1e6} if r["step"] == 3000 else {})
                           for r in long_history(settle)]},
    "not finite": {"summary": {}, "history": [
        r | {k: math.nan for k in r if k != "step" and r["step"] > 3000} for r in long_history()]},
    "six long kinds": {"intrinsic": [
        {"step": 9, "modules": spectra(3, 8, kinds=[f"{c}_projection_MWMW" for c in "abcdef"])}]},
    "thirty kinds": {"intrinsic": [
        {"step": 9, "modules": spectra(3, 8, kinds=[f"kind{i}a" for i in range(30)])}]},
    "matthews": cola(),
    "pearson": stsb(),
    "long names": {"config": CONFIG | {"model": {"source": "organisation/" + "long-" * 20}},
                   "summary": {}},
}


@pytest.mark.parametrize("case", every_other(CASES))
def test_nothing_overlaps_or_leaves_the_picture(case):
    figure = full_figure(**CASES[case])
    width, height = figure.bbox.width, figure.bbox.height
    boxes = visible_texts(figure)
    assert len(boxes) > 15
    for text, box in boxes:
        inside = box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height
        assert inside, f"{text!r} leaves the picture"
    for (one, a), (other, b) in itertools.combinations(boxes, 2):
        assert not (a.x0 < b.x1 and b.x0 < a.x1 and a.y0 < b.y1 and b.y0 < a.y1), (
            f"{one!r} and {other!r} overlap")


@pytest.mark.parametrize(("classes", "letters", "right"), [
    (2, 3, 1.0), (2, 3, 0.5), slow(20, 40, 0.5), (60, 40, 0.5)])
def test_confused_classes_have_a_row_of_their_own(classes, letters, right):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, 500)
    taken = np.where(rng.random(500) < right, labels, rng.integers(0, classes, 500))
    names = [str(i).rjust(letters, "x") for i in range(classes)]
    found = confusion(Outputs(labels, taken, labels, labels), names)
    history = curves(100, 10, 50, settle, settle)
    figure = report.draw(history, CONFIG, summary_of(100, 50) | {"confusion": found}, [])
    assert tuple(figure.get_size_inches()) == pytest.approx((16, 5.9 + 5.77))
    figure.canvas.draw()
    axes = {ax.get_title(loc="left"): ax for ax in figure.axes}
    wrong = int((labels != taken).sum())
    if classes <= 20:
        matrix = axes.pop(f"Classes: {500 - wrong} of 500 test examples right")
        counts = sorted(int(text.get_text()) for text in matrix.texts if text.get_text().isdigit())
        whole = np.bincount(labels * classes + taken)
        assert counts == sorted(whole[whole > 0].tolist())
    shown = len(found["pairs"])
    bars = next(ax for title, ax in axes.items() if "pairs of classes" in title)
    assert len(bars.patches) == shown == min(20, len({*zip(labels, taken, strict=True)})
                                             - len({*labels[labels == taken]}))
    assert all(bar.get_window_extent().height < 40 for bar in bars.patches)  # pixels
    for ax in figure.axes[3:]:
        for label in (*ax.get_yticklabels(), *ax.texts):
            box = label.get_window_extent()
            assert box.x0 >= 0 and box.x1 <= 1600, label.get_text()


def test_longest_verdict_stays_in_the_picture(monkeypatch):
    monkeypatch.setattr(report, "verdict", lambda _: "Too early to tell: " + "measure again " * 20)
    for text, box in visible_texts(full_figure()):
        assert box.x1 <= 1600, text


def test_picture_has_the_promised_size_and_is_the_same_each_time(tmp_path):
    folder = write_run(tmp_path / "a", long_history(), [(6000, spectra())],
                       summary=summary_of(6000, 2400))
    path = report.write_report(folder)
    assert path == folder / "report.png" and png_size(path) == (1600, 1000)
    first = path.read_bytes()
    assert report.write_report(str(folder)).read_bytes() == first
    assert not list(folder.glob(".*"))
    head = write_run(tmp_path / "b", long_history(), config={})
    assert png_size(report.write_report(head)) == (1600, 590)


def test_errors_say_what_to_type(tmp_path):
    with pytest.raises(UserError, match=r"no metrics\.jsonl with a measurement.*\n.*workdir"):
        report.write_report(tmp_path)
    folder = write_run(tmp_path / "a", [{"step": 1, "train/loss": 1.0}], config=None)
    (folder / "summary.json").write_text("{")
    with pytest.raises(UserError, match=r"summary\.json cannot be read as JSON .*copy it again"):
        report.write_report(folder)


def test_pyplot_and_its_global_state_stay_out(tmp_path):
    folder = write_run(tmp_path / "a", [{"step": 1, "train/loss": 1.0}])
    code = ("import sys; from rmlora_jax.report.run import write_report; "
            f"write_report({str(folder)!r}); import matplotlib; "
            "print('matplotlib.pyplot' in sys.modules)")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
