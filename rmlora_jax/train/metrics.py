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
import math
import os
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from rmlora_jax.files import plain, write_text_atomic
from rmlora_jax.report.records import INTRINSIC, METRICS, read_lines
from rmlora_jax.report.records import read_intrinsic as read_intrinsic
from rmlora_jax.report.records import read_metrics as read_metrics
from rmlora_jax.train import snapshots

EVENTS = "tensorboard"
FLUSH_SECONDS = 10.0  # how late TensorBoard may be


def append_intrinsic(
    workdir: str | os.PathLike, step: int, modules: Mapping[str, Mapping[str, Any]]
) -> None:
    """Adds one line to ``intrinsic.jsonl``: ``{"step": s, "modules": {path: {name: numbers}}}``.

    ``modules`` is what `rmlora_jax.intrinsic_dimension` returns: for each module path the arrays
    ``singular_values`` (*layers, r) and ``effective_rank``, ... (*layers,). Values that are not
    finite are written as null.
    """
    line = json.dumps({"step": int(step), "modules": plain(modules)}, allow_nan=False)
    _append(pathlib.Path(workdir) / INTRINSIC, line)


def drop_after(path: str | os.PathLike, step: int) -> None:
    """Keeps the lines of a JSON-lines file up to and including ``step``, atomically.

    At step 0 the run begins anew and no line stays. A file that is already as it should be, or is
    not there, is left alone.
    """
    path = pathlib.Path(path)
    if not path.exists():
        return
    kept = [row for row in read_lines(path) if step > 0 and row["step"] <= step]
    text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in kept)
    if text.encode() != path.read_bytes():
        write_text_atomic(path, text)


class MetricWriter:
    """Writes a run's metrics to its folder.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with MetricWriter(folder, tensorboard=False) as writer:
    ...         writer.write(1, {"train/loss": 0.5})
    ...         writer.write(2, {"train/loss": 0.25, "eval/loss": 0.3})
    ...     read_metrics(folder)
    [{'step': 1, 'train/loss': 0.5}, {'step': 2, 'train/loss': 0.25, 'eval/loss': 0.3}]

    Args:
      workdir: the run's folder, made if missing.
      start_step: the step after which the run continues; lines and snapshots of later steps are
        dropped. At 0 the run begins anew and earlier lines are dropped too.
      enabled: False makes every method do nothing; pass ``jax.process_index() == 0``.
      tensorboard: whether to write events to the folder ``tensorboard`` (by tensorboardX).

    Raises:
      UserError: a file to be continued holds a line that is not one of this class's.
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
        self._events = None
        self._last_step = start_step if start_step > 0 else -1
        if not enabled:
            return
        self.workdir.mkdir(parents=True, exist_ok=True)
        for name in (METRICS, INTRINSIC):
            drop_after(self.workdir / name, start_step)
        snapshots.drop_after(self.workdir, start_step)
        if tensorboard:
            self._events = Events(self.workdir / EVENTS, start_step)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Records the metrics of ``step``, all of them at once.

        ``metrics`` maps names to scalars (Python, numpy or jax; a jax scalar is waited for).

        Raises:
          ValueError: ``step`` is not larger than that of the last line.
        """
        if not self.enabled:
            return
        step = int(step)
        if step <= self._last_step:
            raise ValueError(
                f"metrics of step {step} after those of step {self._last_step}: steps must "
                "increase; pass everything that belongs to a step in one call of write")
        values = {key: _scalar(key, value) for key, value in metrics.items()}
        _append(self.workdir / METRICS, _line(step, values))
        self._last_step = step
        if self._events is not None:
            # tensorboardX warns on the terminal about each number that is not finite.
            self._events.add(step, {k: v for k, v in values.items() if math.isfinite(v)})

    def intrinsic(self, step: int, modules: Mapping[str, Mapping[str, Any]]) -> None:
        """`append_intrinsic` for this run, and the mean effective rank as a TensorBoard scalar."""
        if not self.enabled:
            return
        append_intrinsic(self.workdir, step, modules)
        if self._events is not None:
            means = {}
            for path, values in modules.items():
                ranks = np.asarray(values.get("effective_rank", np.nan), np.float64)
                if np.isfinite(ranks).any():
                    means[f"effective_rank/{path}"] = np.mean(ranks[np.isfinite(ranks)])
            self._events.add(step, means)

    def flush(self) -> None:
        """Events to the disk: to be called before the checkpoint of the step is written."""
        if self._events is not None:
            self._events.flush()

    def close(self) -> None:
        """Flushes the events; a second call does nothing."""
        if self._events is not None:
            self._events.close()
            self._events = None

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *_) -> None:
        self.close()



class Events:
    """The event file of one process in the folder ``folder`` of TensorBoard, written at once.

    tensorboardX's SummaryWriter hands events to a thread: a killed process loses what is queued,
    and on a full disk the thread dies and the run waits for it for ever. Here a write is a write,
    and `flush` before a checkpoint makes sure that no scalar of a step before it can be lost.

    Args:
      folder: of TensorBoard; made if missing.
      start_step: the step after which the run continues: TensorBoard is told to hide later events
        of earlier processes.
    """

    def __init__(self, folder: str | os.PathLike, start_step: int = 0):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore (generated)

        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        earlier = any(folder.iterdir())
        # TensorBoard reads files in the order of their names, which have the second; this is what
        # keeps a process that begins within the same one from writing over the file before.
        fraction = f".{time.time_ns() % 10**9:09}"
        self._writer = EventsWriter(str(folder / "events"), fraction)
        self._flushed = time.monotonic()
        if earlier:
            first = start_step + 1 if start_step > 0 else 0
            start = SessionLog(status=SessionLog.START)
            self._writer.write_event(Event(wall_time=time.time(), step=first, session_log=start))

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes the scalars of a step as one event."""
        from tensorboardX.proto.event_pb2 import Event  # pyright: ignore (generated)

        # Without the metadata that tensorboardX adds to each: TensorBoard needs none for scalars,
        # and the checksum of each byte is computed in Python.
        event = Event(wall_time=time.time(), step=step)
        for name, value in scalars.items():
            event.summary.value.add(tag=name, simple_value=value)
        self._writer.write_event(event)
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """To the disk."""
        self._writer.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        self._writer.close()


def _scalar(key: str, value: Any) -> float | int:
    array = np.asarray(value)
    if array.ndim:
        raise ValueError(f"metric {key!r} has shape {array.shape}: must be a scalar")
    if array.dtype.kind in "iu":
        return int(array)
    # Shortest decimal of the value's own precision, as `plain`, which says None where not finite.
    short = plain(array)
    return float(array) if short is None else float(short)


def _line(step: int, values: Mapping[str, float]) -> str:
    finite = {key: value if math.isfinite(value) else None for key, value in values.items()}
    row = {"step": step} | finite
    nonfinite = {key: str(value) for key, value in values.items() if not math.isfinite(value)}
    return json.dumps(row | ({"nonfinite": nonfinite} if nonfinite else {}), allow_nan=False)


def _append(path: pathlib.Path, line: str) -> None:
    """One line in one write, so that a kill can tear the last line only."""
    with open(path, "ab") as file:
        file.write(line.encode() + b"\n")
