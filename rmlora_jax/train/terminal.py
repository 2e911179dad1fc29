"""What a run says on the terminal: a table at its head, its progress, a table at its end."""

import collections
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

from rmlora_jax.report.records import duration, number, speed
from rmlora_jax.tasks.scores import describe


def format_table(title: str, rows: Sequence[tuple[str, Any]]) -> str:
    """Two aligned columns under a title; rows whose value is None are left out.

    >>> print(format_table("run", [("model", "vit"), ("mesh", None), ("seed", 3)]))
    run
      model  vit
      seed   3
    """
    rows = [(name, str(value)) for name, value in rows if value is not None]
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in rows)])


def closing(summary: Mapping[str, Any], workdir: str | os.PathLike, verdict: str) -> str:
    """The table that a run ends with, from its ``summary.json``."""
    def scores(entry):
        if not entry:
            return None
        at = f" (step {entry['step']:,})" if "step" in entry else ""
        keys = [key for key in entry if key != "step" and not key.startswith("loss")]
        if summary.get("metric") == "loss":
            keys += [key for key in entry if key.startswith("loss_")]
        return ", ".join(f"{_name(key)} {number(entry.get(key))}" for key in [*keys, "loss"]) + at

    report = os.path.join(workdir, "report.png")
    total = summary.get("total_parameters")
    return format_table("done", [
        ("test, last step", scores(summary.get("test"))),
        ("test, best validation", scores(summary.get("test_best"))),
        ("stopped early", _early(summary)),
        ("parameters", parameters(summary["trainable_parameters"], total) if total else None),
        ("speed", speed(summary)),
        ("time", times(summary) if "wall_seconds" in summary else None),
        ("verdict", verdict),
        ("report", report if os.path.exists(report) else None),
    ])


def _early(summary: Mapping[str, Any]) -> str | None:
    """Why a run ended before its planned steps; None where it did not."""
    if "stopped" not in summary:
        return None
    steps, planned = summary["steps"], summary["planned_steps"]
    return f"after step {steps:,} of {planned:,}: {summary['stopped']}"


def times(summary: Mapping[str, Any]) -> str:
    """How long a run or a sweep took.

    >>> times({"wall_seconds": 3671.2, "compile_seconds": 8.04})
    '1:01:11, of which 8.0 s compilation'
    """
    wall, compiling = summary["wall_seconds"], summary["compile_seconds"]
    return f"{duration(wall)}, of which {duration(compiling)} compilation"


def count_devices(devices: Sequence[Any]) -> str:
    """``8 x NVIDIA H100 80GB HBM3 of 2 processes`` from jax devices."""
    kinds = collections.Counter(d.device_kind for d in devices)
    text = ", ".join(f"{n} x {kind}" for kind, n in kinds.items())
    processes = len({d.process_index for d in devices})
    return f"{text} of {processes} processes" if processes > 1 else text


def parameters(trainable: int, total: int) -> str:
    """``50,000 trained of 5,000,000 (1.00 %)``."""
    return f"{trainable:,} trained of {total:,} ({100 * trainable / max(total, 1):.2f} %)"


class Progress:
    """A progress bar on a terminal; a plain line every ``interval`` seconds anywhere else.

    The first step and the last, ``total``, always have a line. Time is counted from the first
    `update`, so that the compilation before it does not spoil the estimate of what is left.
    """

    def __init__(self, total: int, *, stream: TextIO | None = None, interval: float = 5.0,
                 clock: Callable[[], float] = time.monotonic):
        self.total = total
        self.stream = sys.stdout if stream is None else stream
        self._interval = interval
        self._clock = clock
        self._draws_bar = _has_room(self.stream)
        self._bar = None
        self._first = None  # (step, seconds) of the first update
        self._printed = (None, -math.inf)  # (step, seconds) of the last plain line

    def update(self, step: int, shown: Mapping[str, float]) -> None:
        """Moves to ``step``; ``shown`` holds the latest metrics, by their full names."""
        if self._draws_bar:
            self._move_bar(step, shown)
        else:
            self._print_line(step, shown)

    def print(self, text: str) -> None:
        """Prints ``text`` on lines of its own, above the bar if there is one."""
        if self._bar is not None:
            self._bar.write(text, file=self.stream)
        else:
            print(text, file=self.stream, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _move_bar(self, step, shown):
        if self._bar is None:
            import tqdm

            self._bar = tqdm.tqdm(
                total=self.total, initial=step, file=self.stream, dynamic_ncols=True,
                smoothing=0.02,
                bar_format="{desc} |{bar}| step {n_fmt}/{total_fmt}  ETA {remaining}",
            )
        self._bar.set_description_str("  ".join(_parts(shown)), refresh=False)
        self._bar.update(step - self._bar.n)

    def _print_line(self, step, shown):
        now = self._clock()
        if self._first is None:
            self._first = step, now
        printed_step, printed = self._printed
        if step == printed_step or (now - printed < self._interval and step < self.total):
            return
        self._printed = step, now
        done, spent = step - self._first[0], now - self._first[1]
        parts = [f"step {step}/{self.total}", *_parts(shown)]
        if done:
            parts.append(f"ETA {duration(spent / done * (self.total - step))}")
        self.print("  ".join(parts))


def _has_room(stream: TextIO) -> bool:
    """Whether a bar can be seen: some containers' terminals claim to have no rows and columns."""
    if not getattr(stream, "isatty", lambda: False)():
        return False
    try:
        return min(os.get_terminal_size(stream.fileno())) > 0
    except OSError:
        return False


def _name(key: str) -> str:
    metric, part = describe(key)
    return f"{metric.short} {part}" if part else metric.short


def _parts(shown: Mapping[str, float]) -> list[str]:
    """The loss and accuracy of training; instead of accuracy the metric that was evaluated first,
    in training where it is measured there.
    """
    evaluated = (k for k in shown if k.startswith("validation/") and k != "validation/loss")
    chosen = next(evaluated, "validation/accuracy")
    measured = chosen.replace("validation/", "train/", 1)
    measured = measured if measured in shown or chosen == "validation/accuracy" else chosen
    parts = []
    for key in ("train/loss", measured):
        split, _, metric = key.partition("/")
        parts += [f"{split} {_name(metric)} {number(shown[key])}"] if key in shown else []
    if parts and "train/loss/low" in shown:  # of many runs, whose mean is the loss
        parts[0] += f" ({number(shown['train/loss/low'])} to {number(shown['train/loss/high'])})"
    rate = speed(shown)
    return [*parts, rate] if rate else parts
