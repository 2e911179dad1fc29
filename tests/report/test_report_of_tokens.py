"""The report of a run whose loss is a mean over tokens, and that is chosen by it."""

import pytest

from rmlora_jax.report import run as report
from rmlora_jax.report.verdict import verdict
from rmlora_jax.train import checkpoint, terminal

EVAL = {"loss": 0.63, "token_accuracy": 0.8, "perplexity": 1.8776, "loss_math": 1.25}
SUMMARY = {
    "task": "sft", "method": "lora", "metric": "loss", "steps": 100, "test": EVAL,
    "test_best": {"step": 80} | EVAL | {"loss": 0.61, "exact_match": 0.25},
    "tokens_per_second": 14460.4, "mfu": 0.494, "trainable_parameters": 10,
    "total_parameters": 1000,
}  # fmt: skip
HISTORY = [
    {"step": s, "train/loss": 0.6 + 2 * 0.9**s, "train/token_accuracy": 0.8 - 0.5 * 0.9**s}
    | ({"validation/loss": 0.65, "validation/token_accuracy": 0.79, "validation/loss_math": 1.2}
       if s > 90 else {})
    for s in range(1, 101)
]


def test_what_the_report_says():
    assert report.chosen(HISTORY, SUMMARY) == "loss"
    assert report.beside_loss(HISTORY, SUMMARY) == "token_accuracy"
    assert report.headline(HISTORY, SUMMARY) == ("0.630", "test loss at the last step")
    facts = dict(report.facts(HISTORY, {"sft": {"length": 1024, "pack": True}}, SUMMARY))
    assert facts["best step"] == "0.610 test at step 80"
    assert facts["test accuracy"] == "80.0 %" and facts["math"] == "1.250 loss"
    assert facts["rows"] == "1,024 tokens, packed"
    assert facts["speed"] == "14,460 tokens/s (49 % MFU)" and "test loss" not in facts
    figure = report.draw(HISTORY, {}, SUMMARY, [])
    labels = [(ax.get_title(loc="left"), ax.get_ylabel()) for ax in figure.axes]
    assert labels[0][1] == "nats per token" and labels[1][1] == "fraction of tokens"
    assert verdict(HISTORY).startswith("Healthy")


def test_what_the_terminal_says(tmp_path):
    text = terminal.closing(SUMMARY, tmp_path, "Healthy: so")
    assert "accuracy 0.8000, perplexity 1.8776, loss math 1.2500, loss 0.6300" in text
    assert "exact match 0.2500" in text and "14,460 tokens/s (49 % MFU)" in text


def test_the_best_step_has_the_lowest_loss():
    low, high = ({"loss": x, "perplexity": 2.0} for x in (0.5, 0.7))
    found = [checkpoint.score(checkpoint.scored(x, "loss")) for x in (low, high)]
    assert found[0] > found[1]
    lost = checkpoint.scored({"loss": float("nan")}, "loss")
    assert checkpoint.score(lost) == pytest.approx((float("-inf"),) * 2)
