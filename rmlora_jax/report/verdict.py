"""A plain-word verdict on a run's learning curves: what a person would say who looks at them.

The rules are tried in this order and the first that holds is the verdict. "Late" is the second
half of the run; levels of the training loss are means over neighbouring lines, because one line is
one batch; "descent" is the first level less the lowest, at least a tenth of the first level; the
noise of a level is that of its lines, told from their second differences, which no trend changes.

1. Diverged: a training or validation loss that is not finite, other than of skipped steps after
   which training went on; or more than `SKIPPED` of the steps skipped.
2. Too early to tell: fewer than `FEWEST` lines with a training loss or `FEWEST_STEPS` steps, unless
   the loss has doubled.
3. Diverged: a last level above the first by more than `BARELY` of it and more than its noise; or
   one that fell, and went back by `BACK` of the descent for good, a quarter of the run at least; or
   one above `WILD_FLOOR` and `WILD` times -log of the last training accuracy, which is the loss of
   who guesses among as many classes as make that accuracy.
4. Overfitting: the validation loss ended more than `RISE` (and `RISE_FLOOR`) above its minimum,
   while the training loss fell by `STILL_FALLS` or more since that minimum. Not where the late
   validation loss swings by more than half of that rise.
5. Where no level is further than `BARELY`, or than its noise, from the first. Cannot tell: the loss
   is 0. Healthy: the training accuracy is at least `FITTED`. Cannot tell: as in 9. Underfitting:
   all else, unless the validation loss moved by more than `BARELY`.
6. Oscillation: around its own straight-line trend the late loss, of training (in levels) or of
   validation, has a standard deviation above `SWING` of the descent; that of training also above
   `BEYOND` times the noise of a level.
7. Overfitting: the training accuracy ended at `FITTED` or more and the validation accuracy `APART`
   below it; or, where there is no accuracy, the validation loss `FAR` of the descent above the
   training loss.
8. Underfitting: over the last quarter the trend of the training loss fell by more than `STEEP` of
   the descent; or the last training accuracy is below `LOW_ACCURACY` with the validation accuracy
   no more than `GAP` below it; or the last validation correlation, of a task measured by one, is
   below `LOW_CORRELATION`; or the last level of the training loss is not even `BARELY` below the
   first, with a training accuracy, where it is measured, below `FITTED`.
9. Cannot tell: the noise of a late level is above `NOISY` of the descent, and there are not two
   validation losses.
10. Healthy: none of these.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from rmlora_jax.report.records import bin_means, finite, series
from rmlora_jax.tasks.scores import METRICS

FEWEST = 8  # lines: with fewer no rule means anything
FEWEST_STEPS = 20
SKIPPED = 0.1  # of the steps
LEVELS = 20  # levels that the training curve is cut into, at most
SWING = 0.10  # of the descent; noise of batches of 32 leaves about 0.02 to 0.05
BEYOND = 1.7  # of 100 curves of noise alone about 3 are above this
NOISY = 0.25  # of the descent, or of a first level that nothing left
RISE = 0.10  # of the lowest validation loss
RISE_FLOOR = 0.02  # nats, or squared error: a rise from 0.01 to 0.02 does not count
STILL = 0.02  # of the first level: less is no move
STILL_FALLS = 0.02  # of the training loss at the validation minimum
APART = 0.2  # in accuracy
FAR = 0.7  # of the descent
WILD = 4.0
WILD_FLOOR = 2.0  # nats
BACK = 0.5  # of the descent
STEEP = 0.08  # of the descent in a quarter of the run; exponential decay over 2 spans leaves 0.10
LOW_ACCURACY = 0.5
GAP = 0.05
CORRELATIONS = ("matthews", "pearson", "spearman")
LOW_CORRELATION = 0.1  # 0 is guessing
BARELY = 0.05  # of the first level: of two classes guessing costs 0.69 nats, before and after
FITTED = 0.9  # a run that begins with this need not improve


class Curves(NamedTuple):
    """What the rules look at. Arrays over lines, over levels and over evaluations."""

    history: Sequence[Mapping[str, float]]
    steps: np.ndarray
    loss: np.ndarray
    level_steps: np.ndarray
    levels: np.ndarray
    eval_steps: np.ndarray
    eval_loss: np.ndarray

    @property
    def descent(self) -> float:
        return max(self.levels[0] - self.levels.min(), 0.1 * self.levels[0])

    @property
    def late(self) -> float:
        """The step after which lines are late."""
        return (self.steps[0] + self.steps[-1]) / 2

    def noise(self, *, late: bool = False) -> float:
        """The standard deviation of a level around the curve."""
        lines = self.loss[self.steps > self.late] if late else self.loss
        second = np.diff(lines, 2)
        return math.sqrt(np.mean(second**2) / 6 * len(self.levels) / len(self.loss))

    @property
    def margin(self) -> float:
        """By how much two levels of one height differ at most, three of their deviations."""
        return 3 * math.sqrt(2) * self.noise()

    def accuracy(self, split: str) -> float:
        """The last accuracy on a split, in training the last level; nan where there is none."""
        _, found = series(self.history, f"{split}/accuracy")
        if split == "train" and found.size:
            return bin_means(found, found, LEVELS)[1][-1]
        return found[-1] if found.size else math.nan


def verdict(history: Sequence[Mapping[str, float]]) -> str:
    """One sentence or two on how a run went, first word first, from the lines of its metrics.

    Args:
      history: the lines of metrics.jsonl, as `rmlora_jax.report.records.read_metrics` reads them;
        losses in nats or squared units, accuracies in [0, 1]. Any but "step" may be absent.

    Returns:
      A text that begins with the name of a rule of the module's docstring and a colon, and ends
      with the number of skipped steps, where there are any.

    >>> falling = [{"step": s, "train/loss": 0.1 + 2 * 0.9**s, "validation/loss": 0.2 + 2 * 0.9**s}
    ...            for s in range(1, 60)]
    >>> verdict(falling)
    'Healthy: training loss settled at 0.10, validation loss at 0.20.'
    """
    skipped = int(sum(row.get("skipped") or 0 for row in history))
    total = int(history[-1]["step"]) if history else 0
    broken = first_broken(history)
    if broken is not None:
        return (f"Diverged: the loss is not finite from step {broken:,} on. "
                "Lower the learning rate, warm up, or clip the gradient.")
    if skipped > SKIPPED * total:
        return (f"Diverged: {skipped:,} of {total:,} steps changed nothing, because their loss or "
                "gradient was not finite. Lower the learning rate, warm up, or clip the gradient.")
    note = f" {skipped:,} of {total:,} steps were skipped as not finite." if skipped else ""
    return _judged(history) + note


def first_broken(history: Sequence[Mapping[str, float]]) -> int | None:
    """The first step whose training or validation loss is not finite.

    Skipped steps, which changed nothing, do not count if a finite training loss follows them.
    """
    steps, loss = series(history, "train/loss")
    recovered = steps[np.isfinite(loss)].max(initial=-math.inf)
    found = [
        int(row["step"]) for row in history for key in ("train/loss", "validation/loss")
        if row.get(key) is not None and not math.isfinite(row[key])
        and not (key == "train/loss" and row.get("skipped") and row["step"] < recovered)]
    return min(found, default=None)


def _judged(history) -> str:
    steps, loss = finite(*series(history, "train/loss"))
    doubled = len(loss) > 2 and loss[-1] > 2 * loss[0] > 0
    if not doubled and (len(loss) < FEWEST or np.ptp(steps) < FEWEST_STEPS - 1):
        lines = f"{len(loss)} line{'s' * (len(loss) != 1)}"
        return (f"Too early to tell: {lines} of training loss up to step "
                f"{int(max(steps, default=0)):,}; at least {FEWEST} lines and {FEWEST_STEPS} steps "
                "are needed. Train longer, or lower log_every.")
    level_steps, levels = bin_means(steps, loss, LEVELS)
    curves = Curves(history, steps, loss, level_steps, levels, *series(history, "validation/loss"))
    rules = (_divergence, _rise, _stillness, _oscillation, _memory, _underfitting, _doubt)
    return next(filter(None, (rule(curves) for rule in rules)), None) or _health(curves)


def _divergence(c: Curves):
    first, last, lowest = c.levels[0], c.levels[-1], c.levels.min()
    margin = 0.0 if len(c.loss) < FEWEST else c.margin
    if last - first > max(BARELY * first, margin):
        return (f"Diverged: training loss ended at {last:.2f}, above its start at "
                f"{first:.2f}. Lower the learning rate.")
    accuracy = c.accuracy("train")
    if accuracy > 0 and last > max(-WILD * math.log(accuracy), WILD_FLOOR):
        return (f"Diverged: training loss ended at {last:.2f} with an accuracy of {accuracy:.2f}, "
                "worse than guessing. Lower the learning rate.")
    after = c.levels[np.argmin(c.levels):] > lowest + BACK * c.descent
    returned = after[-2:].all() and np.diff(after.astype(int)).clip(0).sum() == 1
    if first - lowest > 0.25 * first and returned and len(after) > len(c.levels) / 4:
        step = int(c.level_steps[np.argmin(c.levels)])
        return (f"Diverged: training loss fell from {first:.2f} to {lowest:.2f} around step "
                f"{step:,} and went back to {last:.2f} for good. Lower the learning rate.")
    return None


def _stillness(c: Curves):
    first, last, reached = c.levels[0], c.levels[-1], c.accuracy("train")
    margin = max(BARELY * first, c.margin, RISE_FLOOR if reached >= FITTED else 0.0)
    if np.abs(c.levels - first).max() > margin:
        return None
    if first <= 0:
        return (f"Cannot tell: training loss was {first:.2f} from the start, so there was nothing "
                "to learn. Do all examples have one label?")
    if reached >= FITTED:
        return (f"Healthy: training loss stayed at {last:.2f}, with a training accuracy of "
                f"{reached:.2f}; there was little to learn.")
    if len(c.eval_loss) < 2:
        if margin > NOISY * first:
            return _doubt(c)
    elif np.ptp(c.eval_loss) > BARELY * c.eval_loss[0]:
        return None
    went = f"did not move, {first:.2f} at first and {last:.2f} at the end"
    if abs(first - last) > max(STILL * first, c.margin):
        went = f"went from {first:.2f} to {last:.2f} only"
    return (f"Underfitting: training loss {went}. "
            "Raise the learning rate, train longer, or adapt more layers.")


def _trend(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """(fall over the range of x, standard deviation around it) of the least-squares line."""
    slope, level = np.polyfit(x - x.mean(), y, 1)
    residual = y - level - slope * (x - x.mean())
    return -slope * np.ptp(x), math.sqrt(np.sum(residual**2) / max(len(x) - 2, 1))


def _swing(c: Curves, x, y) -> float:
    """The standard deviation of a late curve around its trend; 0 of fewer than four points."""
    late = x > c.late
    return _trend(x[late], y[late])[1] if late.sum() >= 4 else 0.0


def _rise(c: Curves):
    """Overfitting that a rise of the validation loss shows, larger than its swings."""
    if len(c.eval_loss) < 2:
        return None
    at = int(np.argmin(c.eval_loss))
    lowest, last = c.eval_loss[at], c.eval_loss[-1]
    swing = _swing(c, c.eval_steps, c.eval_loss)
    if last - lowest <= max(RISE * lowest, RISE_FLOOR):
        return None
    if swing > (last - lowest) / 2:
        return None
    width = max(np.ptp(c.steps) / LEVELS, 1.0)
    then = c.loss[np.abs(c.steps - c.eval_steps[at]) <= width]
    now = c.loss[c.steps >= c.steps[-1] - 2 * width]
    if not then.size or now.mean() > (1 - STILL_FALLS) * then.mean():
        return None
    return (f"Overfitting: validation loss rose from {lowest:.2f} at step "
            f"{int(c.eval_steps[at]):,} to {last:.2f} while training loss fell from "
            f"{then.mean():.2f} to {now.mean():.2f}. "
            "Stop earlier, lower the rank, or regularise more.")


def _oscillation(c: Curves):
    for name, x, y in (("training", c.level_steps, c.levels),
                       ("validation", c.eval_steps, c.eval_loss)):
        swing = _swing(c, x, y)
        noise = BEYOND * c.noise(late=True) if name == "training" else 0.0
        if swing > max(SWING * c.descent, noise):
            return (f"Oscillation: in the second half the {name} loss swings by {swing:.2f} "
                    f"around its trend, {swing / c.descent:.0%} of what training gained. "
                    "Lower the learning rate, or use larger batches.")
    return None


def _memory(c: Curves):
    """Overfitting that the distance between training and validation shows."""
    train, validation = c.accuracy("train"), c.accuracy("validation")
    if train >= FITTED and validation < train - APART:
        return (f"Overfitting: training accuracy ended at {train:.2f}, validation accuracy at "
                f"{validation:.2f}. Use more data, lower the rank, or regularise more.")
    gap = c.eval_loss[-1] - c.levels[-1] if c.eval_loss.size else 0.0
    if math.isnan(train) and gap > FAR * c.descent:
        return (f"Overfitting: training loss ended at {c.levels[-1]:.2f}, validation loss at "
                f"{c.eval_loss[-1]:.2f}. Use more data, lower the rank, or regularise more.")
    return None


def _underfitting(c: Curves):
    steps, levels, descent = c.level_steps, c.levels, c.descent
    quarter = steps >= steps[-1] - (steps[-1] - steps[0]) / 4
    if quarter.sum() >= 2:
        fall, spread = _trend(steps[quarter], levels[quarter])
        if fall > max(STEEP * descent, 2 * spread):
            return (f"Underfitting: training loss was still falling, by {fall:.2f} in the last "
                    "quarter. Train longer, or raise the learning rate.")
    reached, eval_accuracy = c.accuracy("train"), c.accuracy("validation")
    if reached < LOW_ACCURACY and eval_accuracy > reached - GAP:
        return (f"Underfitting: training accuracy ended at {reached:.2f} and validation is no "
                "worse. Raise the rank or the learning rate, or adapt more layers.")
    for name in CORRELATIONS:
        _, found = series(c.history, f"validation/{name}")
        if found.size and found[-1] < LOW_CORRELATION:
            return (f"Underfitting: the {METRICS[name].long} on validation ended at "
                    f"{found[-1]:.2f}, and 0 is guessing. Raise the learning rate, train longer, "
                    "or adapt more layers.")
    if levels[-1] > (1 - BARELY) * levels[0] and not reached >= FITTED:
        return (f"Underfitting: training loss went from {levels[0]:.2f} to {levels[-1]:.2f} only. "
                "Raise the learning rate, train longer, or adapt more layers.")
    return None


def _doubt(c: Curves):
    if len(c.eval_loss) > 1 or c.noise(late=True) <= NOISY * c.descent:
        return None
    return (f"Cannot tell: the training loss, {c.levels[0]:.2f} at first and {c.levels[-1]:.2f} at "
            "the end, swings from line to line by about as much as it fell. Raise log_every, lower "
            "eval_every, or use larger batches.")


def _health(c: Curves) -> str:
    end = f", validation loss at {c.eval_loss[-1]:.2f}." if c.eval_loss.size else (
        "; without validation, overfitting cannot be seen.")
    return f"Healthy: training loss settled at {c.levels[-1]:.2f}{end}"
