"""TensorBoard: event files in ``WORKDIR/tensorboard``."""

import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rmlora_jax.train.loggers.logger import Logger

EVENT_FILE = re.compile(r"events\.out\.tfevents\.(\d{10,11})\b")
EVENTS = "tensorboard"
FLUSH_SECONDS = 10.0  # how late TensorBoard may be


class Events:
    """An event file while a run trains."""

    def __init__(self, writer: Any):
        self._writer = writer  # an EventsWriter of tensorboardX
        self._flushed = time.monotonic()

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
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
        self._writer.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        self._writer.close()


def open_in(workdir: Path, start_step: int, config: Mapping[str, Any]) -> Events:
    """The events of a run, as `open_events`; TensorBoard does not show the config."""
    del config
    return Events(open_events(workdir / EVENTS, start_step))


def open_events(folder: Path, start_step: int) -> Any:
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


LOGGER = Logger("events for TensorBoard, but not of many runs at once", open_in)
