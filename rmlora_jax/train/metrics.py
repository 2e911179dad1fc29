"""The numbers a run leaves behind: metrics.jsonl, intrinsic.jsonl and TensorBoard events.

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
import re
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from rmlora_jax.files import plain, write_text_atomic
from rmlora_jax.report.records import INTRINSIC, METRICS, read_lines
from rmlora_jax.train.checkpoint import drop_snapshots

EVENT_FILE = re.compile(r"events\.out\.tfevents\.(\d{10,11})\b")
EVENTS = "tensorboard"
FLUSH_SECONDS = 10.0  # how late TensorBoard may be


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
    ...     with MetricWriter(folder, tensorboard=False) as writer:
    ...         writer.write(1, {"train/loss": 0.5})
    ...         writer.write(2, {"train/loss": 0.25, "eval/loss": 0.3})
    ...     read_lines(pathlib.Path(folder) / METRICS)
    [{'step': 1, 'train/loss': 0.5}, {'step': 2, 'train/loss': 0.25, 'eval/loss': 0.3}]

    Args:
      workdir: the run's folder, made if missing.
      start_step: the step after which the run continues; lines and snapshots of later steps are
        dropped. At 0 the run begins anew and earlier lines are dropped too.
      enabled: False makes every method do nothing, as in all processes but the first.
      tensorboard: whether to write events to the folder ``tensorboard``.

    Raises:
      UserError: a file to be continued holds another line.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        *,
        start_step: int = 0,
        enabled: bool = True,
        tensorboard: bool = True,
    ):
        self.workdir = pathlib.Path(workdir)
        self.enabled = enabled
        self._events = None  # an EventsWriter of tensorboardX
        self._flushed = time.monotonic()
        self._last_step = start_step if start_step > 0 else -1
        if not enabled:
            return
        self.workdir.mkdir(parents=True, exist_ok=True)
        for name in (METRICS, INTRINSIC):
            drop_after(self.workdir / name, start_step)
        drop_snapshots(self.workdir, start_step)
        if tensorboard:
            self._events = open_events(self.workdir / EVENTS, start_step)

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
        # tensorboardX warns on the terminal about each number that is not finite.
        self._add_events(step, {key: line[key] for key in metrics if line[key] is not None})

    def intrinsic(self, step: int, modules: Mapping[str, Mapping[str, Any]]) -> None:
        """`append_intrinsic` for this run, and the mean effective rank as a TensorBoard scalar."""
        if not self.enabled:
            return
        append_intrinsic(self.workdir, step, modules)
        ranks = {path: np.asarray(values["effective_rank"]) for path, values in modules.items()}
        self._add_events(step, {
            f"effective_rank/{path}": np.mean(found[np.isfinite(found)], dtype=np.float64)
            for path, found in ranks.items() if np.isfinite(found).any()
        })

    def _add_events(self, step: int, scalars: Mapping[str, float]) -> None:
        if self._events is None:
            return
        from tensorboardX.proto.event_pb2 import Event  # pyright: ignore (generated)

        # Without the metadata that tensorboardX adds to each: TensorBoard needs none for scalars,
        # and the checksum of each byte is computed in Python.
        event = Event(wall_time=time.time(), step=step)
        for name, value in scalars.items():
            event.summary.value.add(tag=name, simple_value=value)
        self._events.write_event(event)
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Writes the events to the disk; call it before the checkpoint of the step."""
        if self._events is not None:
            self._events.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        """Flushes the events; a second call does nothing."""
        if self._events is not None:
            self._events.close()
            self._events = None

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def open_events(folder: pathlib.Path, start_step: int) -> Any:
    """A writer of one event file in a folder of TensorBoard, made if missing.

    It has no thread, unlike tensorboardX's SummaryWriter: there a killed process loses what is
    queued, and on a full disk the thread dies and the run waits for it for ever. TensorBoard hides
    events of earlier processes after ``start_step``.
    """
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore (generated)

    folder.mkdir(parents=True, exist_ok=True)
    # TensorBoard reads files in the order of their names. Ours begin with a time in seconds that is
    # after those of all earlier processes, whatever the clock says.
    earlier = [match for file in folder.iterdir() if (match := EVENT_FILE.match(file.name))]
    seconds = max([int(time.time()), *(int(match[1]) + 1 for match in earlier)])
    writer = EventsWriter(str(folder / f"events.out.tfevents.{seconds:010}"))  # and more
    if earlier:
        first = start_step + 1 if start_step > 0 else 0
        start = SessionLog(status=SessionLog.START)
        writer.write_event(Event(wall_time=time.time(), step=first, session_log=start))
    return writer


def _append(path: pathlib.Path, line: str) -> None:
    """One line in one write, so that a kill can tear the last line only."""
    with open(path, "ab") as file:
        file.write(line.encode() + b"\n")
