"""A plain-word verdict on a run's learning curves: overfitting, underfitting or oscillation.

The rules are tried in this order and the first that holds is the verdict. "Late" is the second
half of the run; "descent" is the first level of the training loss less its lowest, at least a
tenth of the first level; levels of the training loss are means over neighbouring lines, because
one line is one batch.

1. Too early to tell: fewer than `FEWEST` lines with a training loss.
2. Diverged: a training or validation loss that is not finite, or a last level of the training
   loss above the first by more than `BARELY` of it.
3. Oscillation: around its own straight-line trend the late loss, of training (in levels) or of
   validation, has a standard deviation above `SWING` of the descent.
4. Overfitting: the validation loss ended more than `RISE` (and `RISE_FLOOR`) above its minimum,
   while the training loss fell by `STILL_FALLS` or more since that minimum.
5. Underfitting: over the last quarter the trend of the training loss fell by more than `STEEP` of
   the descent; or the last training accuracy is below `LOW_ACCURACY` with the validation accuracy
   no more than `GAP` below it; or the last validation correlation, of a task measured by one, is
   below `LOW_CORRELATION`; or the last level of the training loss is not even `BARELY` below the
   first, with a training accuracy, where it is measured, below `FITTED`.
6. Healthy: none of these.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from rmlora_jax.report.records import bin_means, series
from rmlora_jax.tasks.scores import METRICS

FEWEST = 5  # lines: with fewer no rule means anything
LEVELS = 20  # levels that the training curve is cut into, at most
SWING = 0.10  # of the descent; noise of batches of 32 leaves about 0.02 to 0.05
RISE = 0.10  # of the lowest validation loss
RISE_FLOOR = 0.02  # nats, or squared error: a rise from 0.01 to 0.02 does not count
STILL_FALLS = 0.02  # of the training loss at the validation minimum
STEEP = 0.08  # of the descent in a quarter of the run; exponential decay over 2 spans leaves 0.10
LOW_ACCURACY = 0.5
GAP = 0.05
CORRELATIONS = ("matthews", "pearson", "spearman")
LOW_CORRELATION = 0.1  # 0 is guessing
BARELY = 0.05  # of the first level: of two classes guessing costs 0.69 nats, before and after
FITTED = 0.9  # a run that begins with this need not improve


def verdict(history: Sequence[Mapping[str, float]]) -> str:
    """One sentence or two on how a run went, first word first, from the lines of its metrics.

    Args:
      history: the lines of metrics.jsonl, as `rmlora_jax.report.records.read_metrics` reads them;
        losses in nats or squared units, accuracies in [0, 1]. Any but "step" may be absent.

    Returns:
      A text that begins with the name of a rule of the module's docstring and a colon.

    >>> falling = [{"step": s, "train/loss": 0.1 + 2 * 0.9**s, "eval/loss": 0.2 + 2 * 0.9**s}
    ...            for s in range(1, 60)]
    >>> verdict(falling)
    'Healthy: training loss settled at 0.10, validation loss at 0.20.'
    """
    steps, loss = series(history, "train/loss")
    eval_steps, eval_loss = series(history, "eval/loss")
    broken = first_broken(history)
    if broken is not None:
        return (f"Diverged: the loss is not finite from step {broken:,} on. "
                "Lower the learning rate, warm up, or clip the gradient.")
    if len(loss) < FEWEST:
        return (f"Too early to tell: {len(loss)} lines of training loss, "
                f"at least {FEWEST} are needed.")
    level_steps, levels = bin_means(steps, loss, LEVELS)
    if levels[-1] > (1 + BARELY) * levels[0]:
        return (f"Diverged: training loss ended at {levels[-1]:.2f}, above its start at "
                f"{levels[0]:.2f}. Lower the learning rate.")
    descent = max(levels[0] - levels.min(), 0.1 * levels[0])
    return (
        _oscillation(level_steps, levels, eval_steps, eval_loss, descent)
        or _overfitting(steps, loss, eval_steps, eval_loss)
        or _underfitting(history, level_steps, levels, descent)
        or f"Healthy: training loss settled at {levels[-1]:.2f}"
        + (f", validation loss at {eval_loss[-1]:.2f}." if eval_loss.size else ".")
    )


def first_broken(history: Sequence[Mapping[str, float]]) -> int | None:
    """The first step whose training or validation loss is not finite."""
    steps = [int(row["step"]) for row in history for key in ("train/loss", "eval/loss")
             if row.get(key) is not None and not math.isfinite(row[key])]
    return min(steps, default=None)


def _trend(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """(fall over the range of x, standard deviation around it) of the least-squares line."""
    slope, level = np.polyfit(x - x.mean(), y, 1)
    residual = y - level - slope * (x - x.mean())
    return -slope * np.ptp(x), math.sqrt(np.sum(residual**2) / max(len(x) - 2, 1))


def _oscillation(steps, levels, eval_steps, eval_loss, descent):
    for name, x, y in (("training", steps, levels), ("validation", eval_steps, eval_loss)):
        late = x > (steps[0] + steps[-1]) / 2
        if late.sum() >= 4:
            swing = _trend(x[late], y[late])[1]
            if swing > SWING * descent:
                return (f"Oscillation: in the second half the {name} loss swings by {swing:.2f} "
                        f"around its trend, {swing / descent:.0%} of what training gained. "
                        "Lower the learning rate, or use larger batches.")
    return None


def _overfitting(steps, loss, eval_steps, eval_loss):
    if len(eval_loss) < 2:
        return None
    at = int(np.argmin(eval_loss))
    lowest, last = eval_loss[at], eval_loss[-1]
    if last - lowest <= max(RISE * lowest, RISE_FLOOR):
        return None
    width = max(np.ptp(steps) / LEVELS, 1.0)
    then = loss[np.abs(steps - eval_steps[at]) <= width]
    now = loss[steps >= steps[-1] - 2 * width]
    if not then.size or now.mean() > (1 - STILL_FALLS) * then.mean():
        return None
    return (f"Overfitting: validation loss rose from {lowest:.2f} at step {int(eval_steps[at]):,} "
            f"to {last:.2f} while training loss fell from {then.mean():.2f} to {now.mean():.2f}. "
            "Stop earlier, lower the rank, or regularise more.")


def _underfitting(history, steps, levels, descent):
    quarter = steps >= steps[-1] - (steps[-1] - steps[0]) / 4
    if quarter.sum() >= 2:
        fall, spread = _trend(steps[quarter], levels[quarter])
        if fall > max(STEEP * descent, 2 * spread):
            return (f"Underfitting: training loss was still falling, by {fall:.2f} in the last "
                    "quarter. Train longer, or raise the learning rate.")
    _, accuracy = series(history, "train/accuracy")
    _, eval_accuracy = series(history, "eval/accuracy")
    reached = bin_means(accuracy, accuracy, LEVELS)[1][-1] if accuracy.size else -math.inf
    if eval_accuracy.size and 0 <= reached < LOW_ACCURACY and eval_accuracy[-1] > reached - GAP:
        return (f"Underfitting: training accuracy ended at {reached:.2f} and validation is no "
                "worse. Raise the rank or the learning rate, or adapt more layers.")
    for name in CORRELATIONS:
        _, found = series(history, f"eval/{name}")
        if found.size and found[-1] < LOW_CORRELATION:
            return (f"Underfitting: the {METRICS[name].long} on validation ended at "
                    f"{found[-1]:.2f}, and 0 is guessing. Raise the learning rate, train longer, "
                    "or adapt more layers.")
    if levels[-1] > (1 - BARELY) * levels[0] and reached < FITTED:
        return (f"Underfitting: training loss went from {levels[0]:.2f} to {levels[-1]:.2f} only. "
                "Raise the learning rate, train longer, or adapt more layers.")
    return None
