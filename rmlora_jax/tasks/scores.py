"""The metrics of a split, computed by scikit-learn and scipy, and their names."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from rmlora_jax.errors import UserError


class Metric(NamedTuple):
    """A metric and its names: beside a progress bar, in a sentence, along an axis."""

    # (predictions, labels) -> float, or of `OF_TARGETS` means -> float; None for a loss
    value: Callable[..., Any] | None
    short: str
    long: str
    axis: str
    of_classes: bool = True  # False: of values

    @property
    def title(self) -> str:
        return self.long[0].upper() + self.long[1:]


def score(
    predictions: np.ndarray, labels: np.ndarray, names: Iterable[str], positive: int = 1
) -> dict[str, float]:
    """The metrics ``names``, in their order.

    * For int (n,) classes: ``accuracy``; ``matthews``, the Matthews correlation; ``f1`` of the
      class ``positive`` of two; ``f1_macro``, the mean F1 of the classes that occur; ``f1_micro``,
      the F1 of all decisions together.
    * For float (n,) values: ``pearson`` and ``spearman`` correlation; ``mse``, the mean squared
      error.

    A correlation is 0 where all predictions or all labels are the same, and the F1 of a class that
    is never predicted rightly is 0. Where a predicted value is not finite, or a predicted class is
    -1 for lack of finite logits, the metrics are nan.

    Raises:
      UserError: ``f1`` for classes other than 0 and 1.
      ValueError: predictions and labels differ in number, or are empty.

    >>> score(np.array([1, 0, 1, 1]), np.array([1, 0, 0, 1]), ("matthews", "accuracy"))
    {'matthews': 0.5773502691896258, 'accuracy': 0.75}

    Source: GLUE (Wang et al. 2019, https://arxiv.org/abs/1804.07461), section 3, for its tasks.
    """
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    if predictions.shape != labels.shape or not labels.size or labels.ndim != 1:
        raise ValueError(
            f"predictions {predictions.shape} and labels {labels.shape} must both be (n,), n > 0")
    values = {name: METRICS[name].value for name in names}
    if np.issubdtype(predictions.dtype, np.integer) and (predictions < 0).any():
        return dict.fromkeys(values, np.nan)
    own = {"f1": (positive,)}
    return {
        name: float(value(predictions, labels, *own.get(name, ())))
        for name, value in values.items() if value
    }


def score_sums(
    sums: Mapping[str, np.ndarray], weights: np.ndarray, names: Iterable[str]
) -> dict[str, float]:
    """The metrics ``names`` of `OF_TARGETS`, in their order, of rows with several targets each.

    ``sums`` are a row's sums (n,) over its targets: ``loss`` in nats, ``token_accuracy`` the
    number of targets whose most probable token is right. ``weights`` (n,) are the numbers of
    targets. A mean is over all targets, so that it does not depend on which of them share a row.

    >>> found = score_sums({"loss": np.array([2.0, 1.0])}, np.array([3, 1]), ("loss", "perplexity"))
    >>> {name: round(value, 4) for name, value in found.items()}
    {'loss': 0.75, 'perplexity': 2.117}

    Raises:
      ValueError: there are no targets.
    """
    total = float(np.sum(weights, dtype=np.float64))
    if total <= 0:
        raise ValueError("there is no target to score")
    means = {name: float(np.sum(own, dtype=np.float64)) / total for name, own in sums.items()}
    own = {name: OF_TARGETS[name].value for name in names}
    return {name: float(value(means)) for name, value in own.items() if value}


def higher_is_better(name: str) -> bool:
    """False for ``mse``, ``loss`` and ``perplexity``: the best step has the smallest."""
    return name not in ("mse", "loss", "perplexity")


def describe(key: str) -> tuple[Metric, str]:
    """The metric that a key of summary.json names, and the part of the data at the key's end.

    >>> metric, part = describe("accuracy_mismatched")
    >>> metric.short, part
    ('accuracy', 'mismatched')
    """
    every = METRICS | OF_TARGETS
    for name in sorted(every, key=len, reverse=True):  # f1_macro before f1
        if key == name or key.startswith(f"{name}_"):
            return every[name], key[len(name) + 1:]
    return Metric(None, key, key, key), ""


def shown(key: str, value: float) -> str:
    """A value in words: an accuracy in percent, other metrics with three decimals.

    >>> shown("accuracy", 0.7456), shown("matthews", 0.4123)
    ('74.6 %', '0.412')
    """
    percent = describe(key)[0].short == "accuracy"
    return f"{100 * value:.1f} %" if percent else f"{value:.3f}"


def _accuracy(predictions, labels):
    return np.mean(predictions == labels)


def _matthews(predictions, labels):
    from sklearn.metrics import matthews_corrcoef

    if _constant(predictions, labels):
        return 0.0
    return matthews_corrcoef(labels, predictions)


def _f1(predictions, labels, positive):
    largest = max(predictions.max(), labels.max())
    if largest > 1:
        raise UserError(
            f"f1 is of two classes, 0 and 1, but here is a class {largest}; "
            "use f1_macro, the mean over all classes")
    return _f1_over("binary")(predictions == positive, labels == positive)


def _f1_over(average: Any) -> Callable:
    def value(predictions, labels):
        from sklearn.metrics import f1_score

        none: Any = 0.0  # scikit-learn's annotation allows strings alone
        return f1_score(labels, predictions, average=average, zero_division=none)

    return value


def _correlation(name: str) -> Callable:
    def value(predictions, labels):
        from scipy import stats

        if not np.isfinite(predictions).all():
            return np.nan
        if _constant(predictions, labels):
            return 0.0
        pair = predictions.astype(np.float64), labels.astype(np.float64)
        return getattr(stats, name)(*pair).statistic

    return value


def _constant(predictions, labels):
    return np.ptp(predictions) == 0 or np.ptp(labels) == 0


def _exp(value: float) -> float:
    return float(np.exp(min(value, 700.0)))  # larger ones have no float


def _mse(predictions, labels):
    if not np.isfinite(predictions).all():
        return np.nan
    return np.square(predictions.astype(np.float64) - labels.astype(np.float64)).mean()


METRICS = {
    "accuracy": Metric(_accuracy, "accuracy", "accuracy", "fraction correct"),
    "matthews": Metric(
        _matthews, "Matthews", "Matthews correlation", "correlation of classes; 0: guessing"),
    "f1": Metric(_f1, "F1", "F1", "F1 of the positive class"),
    "f1_macro": Metric(_f1_over("macro"), "macro F1", "macro F1", "mean F1 of the classes"),
    "f1_micro": Metric(_f1_over("micro"), "micro F1", "micro F1", "F1 of all decisions"),
    "pearson": Metric(
        _correlation("pearsonr"), "Pearson", "Pearson correlation", "correlation of values", False),
    "spearman": Metric(
        _correlation("spearmanr"), "Spearman", "Spearman correlation", "correlation of ranks",
        False),
    "mse": Metric(_mse, "MSE", "mean squared error", "squared error", False),
}
NAMES = tuple(METRICS)

# Metrics of rows with several targets each, such as the tokens of a text: see `score_sums`.
OF_TARGETS = {
    "loss": Metric(lambda means: means["loss"], "loss", "loss", "loss"),
    "token_accuracy": Metric(
        lambda means: means["token_accuracy"], "accuracy", "token accuracy",
        "fraction of tokens"),
    "perplexity": Metric(
        lambda means: _exp(means["loss"]), "perplexity", "perplexity", "exp(loss)"),
    # Of answers that the trained model writes, see `rmlora_jax.train.answers`.
    "exact_match": Metric(None, "exact match", "exact match of answers", "fraction right"),
}


def names_of(classes: bool) -> tuple[str, ...]:
    """The metrics of classes, or else those of values.

    >>> names_of(classes=False)
    ('pearson', 'spearman', 'mse')
    """
    return tuple(name for name, metric in METRICS.items() if metric.of_classes == classes)
