"""TensorBoard events, written at once and in order.

tensorboardX's SummaryWriter hands events to a thread: a killed process loses what is queued, and on
a full disk the thread dies and the run waits for it for ever. Here a write is a write, and `flush`
before a checkpoint makes sure that no scalar of a step before it can be lost.
"""

import os
import pathlib
import time
from collections.abc import Mapping

FLUSH_SECONDS = 10.0  # how late TensorBoard may be


class Events:
    """The event file of one process in the folder ``folder``.

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
