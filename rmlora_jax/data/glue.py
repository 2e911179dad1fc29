"""The nine tasks of GLUE: their texts, metrics, splits, and the leaderboard's files.

Source: Wang et al. 2019, https://arxiv.org/abs/1804.07461, and the submission format at
https://gluebenchmark.com.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from rmlora_jax.files import write_text_atomic


class GlueTask(NamedTuple):
    """One task.

    Attributes:
      columns: features that hold the text or the two texts.
      metrics: official metrics, and accuracy for every classification; the first picks the best
        step.
      words: what the leaderboard wants for label 0, 1, ...: words, or None for the number itself.
      files: split without labels -> file of the leaderboard.
      tests: reported split -> split of TFDS.
      unlabelled: split to predict -> split of TFDS.
    """

    columns: tuple[str, ...]
    metrics: tuple[str, ...]
    words: tuple[str, ...] | None
    files: dict[str, str]
    tests: Mapping[str, str] = MappingProxyType({"test": "validation"})
    unlabelled: Mapping[str, str] = MappingProxyType({"predict": "test"})

    @property
    def regression(self) -> bool:
        return "pearson" in self.metrics


_PAIR = ("sentence1", "sentence2")
_ENTAILED = ("entailment", "not_entailment")

TASKS = {
    "cola": GlueTask(("sentence",), ("matthews", "accuracy"), None, {"predict": "CoLA.tsv"}),
    "sst2": GlueTask(("sentence",), ("accuracy",), None, {"predict": "SST-2.tsv"}),
    "mrpc": GlueTask(_PAIR, ("f1", "accuracy"), None, {"predict": "MRPC.tsv"}),
    "stsb": GlueTask(_PAIR, ("pearson", "spearman"), None, {"predict": "STS-B.tsv"}),
    "qqp": GlueTask(
        ("question1", "question2"), ("f1", "accuracy"), None, {"predict": "QQP.tsv"}
    ),
    "mnli": GlueTask(
        ("premise", "hypothesis"),
        ("accuracy",),
        ("entailment", "neutral", "contradiction"),
        {"predict": "MNLI-m.tsv", "predict_mismatched": "MNLI-mm.tsv"},
        {"test": "validation_matched", "test_mismatched": "validation_mismatched"},
        {"predict": "test_matched", "predict_mismatched": "test_mismatched"},
    ),
    "qnli": GlueTask(("question", "sentence"), ("accuracy",), _ENTAILED, {"predict": "QNLI.tsv"}),
    "rte": GlueTask(_PAIR, ("accuracy",), _ENTAILED, {"predict": "RTE.tsv"}),
    "wnli": GlueTask(_PAIR, ("accuracy",), None, {"predict": "WNLI.tsv"}),
}


def glue_task(name: str) -> GlueTask | None:
    """The task of a TFDS name; None where that is no GLUE task.

    >>> glue_task("glue/rte:2.0.0").metrics
    ('accuracy',)
    """
    head, _, config = name.partition(":")[0].partition("/")
    return TASKS.get(config) if head == "glue" else None


def write_predictions(
    folder: Path,
    split: str,
    ids: np.ndarray,
    predictions: np.ndarray,
    label_names: Sequence[str] | None,
    task: GlueTask | None = None,
) -> Path:
    """Writes ``index``, ``prediction`` rows in the order of ``ids``, as the leaderboard reads them.

    Args:
      folder: made if missing.
      split: that was predicted; names the file where ``task`` has no name for it.
      ids: int (n,), the rows' numbers in the published file.
      predictions: int (n,) classes, or float (n,) values.
      label_names: of the classes; None for regression.
      task: a GLUE task: its words for the labels and its range of values, STS-B's [0, 5].

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     ids, found = np.array([1, 0]), np.array([0, 1])
    ...     print(write_predictions(Path(folder), "predict", ids, found, None, TASKS["rte"])
    ...           .read_text())
    index	prediction
    0	not_entailment
    1	entailment
    <BLANKLINE>
    """
    if label_names is None and (task is None or task.regression):
        values = predictions if task is None else np.clip(predictions, 0.0, 5.0)
        found = [f"{value:.3f}" if task else repr(float(value)) for value in values]
    elif task is not None:
        found = [task.words[value] if task.words else str(int(value)) for value in predictions]
    else:
        found = [label_names[value] for value in predictions]
    rows = [f"{ids[i]}\t{found[i]}\n" for i in np.argsort(ids, kind="stable")]
    name = task.files.get(split, f"{split}.tsv") if task else f"{split}.tsv"
    return write_text_atomic(Path(folder) / name, "".join(["index\tprediction\n", *rows]))
