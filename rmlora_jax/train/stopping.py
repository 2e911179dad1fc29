"""Being asked to stop: by SIGTERM, as machines are taken back, or by SIGINT, from the keyboard.

Asked once, a run finishes its step, saves, and ends with the exit code 75, which says that the same
command goes on from there. Asked again it ends at once.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils

RESUME = 75  # EX_TEMPFAIL of sysexits.h: a failure that is worth another try

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(Exception):
    """A run was asked to stop, and all that it had is saved."""


@contextlib.contextmanager
def watch(saving: str) -> Iterator[Callable[[int], bool]]:
    """Watches for signals; yields ``asked(step)``: whether to save after this step, and stop.

    ``saving`` is printed at the first signal. With several processes, of which one gets SIGTERM,
    ``asked`` is true in all of them after the same step; SIGINT is not watched for then. Outside
    the main thread, where Python gets no signals, ``asked`` is never true.
    """
    seen: list[int] = []

    def first(number, frame):
        if seen:
            os._exit(128 + number)
        seen.append(number)
        name = signal.Signals(number).name
        os.write(sys.stderr.fileno(), f"\n{name}: {saving}; once more ends at once\n".encode())

    many = jax.process_count() > 1  # then jax itself watches for SIGTERM, and tells the others
    ours = not many and threading.current_thread() is threading.main_thread()
    handlers = dict.fromkeys(SIGNALS, first) if ours else {}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield multihost_utils.reached_preemption_sync_point if many else lambda step: bool(seen)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
