"""The metrics of a task over a whole split, by scikit-learn and scipy."""

from collections.abc import Callable, Iterable

import numpy as np

NAMES = ("accuracy", "matthews", "f1", "f1_macro", "pearson", "spearman", "mse")


def score(
    predictions: np.ndarray, labels: np.ndarray, names: Iterable[str]
) -> dict[str, float]:
    """The metrics ``names``, in their order.

    * ``accuracy``; ``matthews``, the Matthews correlation; ``f1`` of class 1 against class 0, as in
      GLUE; ``f1_macro``, the mean of every class's F1: of int (n,) classes.
    * ``pearson`` and ``spearman`` correlation; ``mse``, the mean squared error: of float (n,)
      values.

    A correlation with predictions or labels that are all the same is 0. A prediction that is not a
    number makes the metrics of values nan.

    >>> score(np.array([1, 0, 1, 1]), np.array([1, 0, 0, 1]), ("matthews", "accuracy"))
    {'matthews': 0.5773502691896258, 'accuracy': 0.75}
    """
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    return {name: float(_METRICS[name](predictions, labels)) for name in names}


def higher_is_better(name: str) -> bool:
    return name not in ("mse", "loss")


def _sklearn(name: str, **options) -> Callable:
    def metric(predictions, labels):
        from sklearn import metrics

        return getattr(metrics, name)(labels, predictions, **options)

    return metric


def _correlation(name: str) -> Callable:
    def metric(predictions, labels):
        from scipy import stats

        if not np.isfinite(predictions).all():
            return np.nan
        if np.ptp(predictions) == 0 or np.ptp(labels) == 0:
            return 0.0
        pair = predictions.astype(np.float64), labels.astype(np.float64)
        return getattr(stats, name)(*pair).statistic

    return metric


def _mse(predictions, labels):
    return np.square(predictions.astype(np.float64) - labels.astype(np.float64)).mean()


_METRICS = {
    "accuracy": lambda predictions, labels: np.mean(predictions == labels),
    "matthews": _sklearn("matthews_corrcoef"),
    "f1": _sklearn("f1_score", zero_division=0.0),
    "f1_macro": _sklearn("f1_score", average="macro", zero_division=0.0),
    "pearson": _correlation("pearsonr"),
    "spearman": _correlation("spearmanr"),
    "mse": _mse,
}
