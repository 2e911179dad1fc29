"""The numbers a run leaves behind: metrics.jsonl, intrinsic.jsonl, and a logger's.

``metrics.jsonl`` has one object a line, in strict JSON, ``"step"`` first:

    {"step": 20, "train/loss": 3.91, "train/accuracy": 0.12, "learning_rate": 0.00098}

A number that is not finite is ``null``, and the line says which under ``"nonfinite"``:

    {"step": 40, "train/loss": null, "nonfinite": {"train/loss": "nan"}}

Steps only ever increase. A run that continues after step s first drops the lines of later steps
(and a last line that a killed process left half written), so that no step is missing or repeated.
For that to hold write a step's line before its checkpoint.
"""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from rmlora_jax.files import plain, write_text_atomic
from rmlora_jax.report.records import INTRINSIC, METRICS, read_lines
from rmlora_jax.train.checkpoint import drop_snapshots
from rmlora_jax.train.loggers import LOGGERS, Opened


def append_intrinsic(
    workdir: str | os.PathLike, step: int, modules: Mapping[str, Mapping[str, Any]]
) -> None:
    """Adds one line to ``intrinsic.jsonl``: ``{"step": s, "modules": {path: {name: numbers}}}``.

    ``modules`` is what `rmlora_jax.intrinsic_dimension` returns. A value that is not finite becomes
    null.
    """
    line = json.dumps({"step": int(step), "modules": plain(modules)}, allow_nan=False)
    _append(pathlib.Path(workdir) / INTRINSIC, line)


def drop_after(path: str | os.PathLike, step: int) -> None:
    """Keeps the lines of a JSON-lines file up to and including ``step``, atomically.

    At step 0 the run begins anew and no line stays. A file without later lines is left alone.
    """
    path = pathlib.Path(path)
    if not path.exists():
        return
    kept = [row for row in read_lines(path) if step > 0 and row["step"] <= step]
    text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in kept)
    if text.encode() != path.read_bytes():
        write_text_atomic(path, text)


def line_of(step: int, metrics: Mapping[str, float]) -> dict[str, Any]:
    """A line of metrics.jsonl, as Python's own numbers.

    >>> line_of(40, {"train/loss": np.float32("nan"), "skipped": np.int64(0)})
    {'step': 40, 'train/loss': None, 'skipped': 0, 'nonfinite': {'train/loss': 'nan'}}

    Raises:
      ValueError: a metric is no scalar.
    """
    for key, value in metrics.items():
        if np.ndim(value):
            raise ValueError(f"metric {key!r} has shape {np.shape(value)}: must be a scalar")
    row = plain(metrics)
    broken = {key: str(float(metrics[key])) for key, value in row.items() if value is None}
    return {"step": int(step)} | row | ({"nonfinite": broken} if broken else {})


class MetricWriter:
    """Writes a run's metrics to its folder.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with MetricWriter(folder, logger="none") as writer:
    ...         writer.write(1, {"train/loss": 0.5})
    ...         writer.write(2, {"train/loss": 0.25, "validation/loss": 0.3})
    ...     read_lines(pathlib.Path(folder) / METRICS)
    [{'step': 1, 'train/loss': 0.5}, {'step': 2, 'train/loss': 0.25, 'validation/loss': 0.3}]

    Args:
      workdir: the run's folder, made if missing.
      start_step: the step after which the run continues; lines and snapshots of later steps are
        dropped. At 0 the run begins anew and earlier lines are dropped too.
      enabled: False makes every method do nothing, as in all processes but the first.
      logger: the name of a second place for the numbers, in ``LOGGERS``.
      config: the flat config of the run, for a logger that shows it.

    Raises:
      UserError: a file to be continued holds another line, or the logger cannot be had.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        *,
        start_step: int = 0,
        enabled: bool = True,
        logger: str = "tensorboard",
        config: Mapping[str, Any] | None = None,
    ):
        self.workdir = pathlib.Path(workdir)
        self.enabled = enabled
        self._logger: Opened | None = None
        self._last_step = start_step if start_step > 0 else -1
        if not enabled:
            return
        self.workdir.mkdir(parents=True, exist_ok=True)
        for name in (METRICS, INTRINSIC):
            drop_after(self.workdir / name, start_step)
        drop_snapshots(self.workdir, start_step)
        if (found := LOGGERS[logger].open) is not None:
            self._logger = found(self.workdir, start_step, config or {})

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Records the metrics of ``step``, scalars by name, all of them at once.

        Raises:
          ValueError: ``step`` is not larger than that of the last line.
        """
        if not self.enabled:
            return
        line = line_of(step, metrics)
        if step <= self._last_step:
            raise ValueError(
                f"metrics of step {step} after those of step {self._last_step}: steps must "
                "increase; pass everything that belongs to a step in one call of write")
        _append(self.workdir / METRICS, json.dumps(line, allow_nan=False))
        self._last_step = int(step)
        self._show(self._last_step, {key: line[key] for key in metrics if line[key] is not None})

    def intrinsic(self, step: int, modules: Mapping[str, Mapping[str, Any]]) -> None:
        """`append_intrinsic` for this run, and the mean effective rank for its logger."""
        if not self.enabled:
            return
        append_intrinsic(self.workdir, step, modules)
        ranks = {path: np.asarray(values["effective_rank"]) for path, values in modules.items()}
        self._show(step, {
            f"effective_rank/{path}": np.mean(found[np.isfinite(found)], dtype=np.float64)
            for path, found in ranks.items() if np.isfinite(found).any()
        })

    def _show(self, step: int, scalars: Mapping[str, float]) -> None:
        if self._logger is not None:
            self._logger.add(step, scalars)

    def flush(self) -> None:
        """Flushes the logger; call it before the checkpoint of the step."""
        if self._logger is not None:
            self._logger.flush()

    def close(self) -> None:
        """Closes the logger; a second call does nothing."""
        if self._logger is not None:
            self._logger.close()
            self._logger = None

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _append(path: pathlib.Path, line: str) -> None:
    """One line in one write, so that a kill can tear the last line only."""
    with open(path, "ab") as file:
        file.write(line.encode() + b"\n")
