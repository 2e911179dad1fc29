"""Being asked to stop: by SIGINT (Ctrl-C), or by SIGTERM, as machines are taken back.

Asked once, the process stops at the next safe point: a run that trains finishes its step, saves and
ends with the exit code 75, which says that the same command goes on from there (`watch`); files
that are being written become whole first (`later`); otherwise it ends at once, with 128 plus the
number of the signal. Asked again it ends at once. A program that calls the trainer as a library
also saves at the first signal. The second does what it does without us.

A signal raises no exception. Python would raise KeyboardInterrupt wherever the main thread happens
to be: in a callback of JAX, which prints it and goes on, or after a compilation of minutes. In a
command a thread waits for SIGINT and calls `ask` (`heed`).
"""

import contextlib
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker

RESUME = 75  # EX_TEMPFAIL of sysexits.h: a failure that is worth another try

SIGNALS = (signal.SIGTERM, signal.SIGINT)

_asked: list[int] = []  # signals so far
_waits: list[str] = []  # what has to be done before the process may end, in words
_unwanted: list[str | os.PathLike] = []  # folders that nobody needs once the process has ended
_commands: list[bool] = []  # not empty: this process is a command, which signals may end
_lock = threading.RLock()  # reentrant: a handler interrupts the main thread anywhere


class Stopped(Exception):
    """A run was asked to stop, and all that it had is saved.

    ``number`` is that of the signal.
    """

    number: int = signal.SIGINT


def heed() -> None:
    """Has a thread wait for Ctrl-C, from now on: no KeyboardInterrupt, which a callback can lose.

    Threads and processes that start later leave SIGINT to it.
    """

    def wait():
        while True:
            ask(signal.sigwait([signal.SIGINT]))

    _commands.append(True)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    signal.signal(signal.SIGINT, lambda number, frame: ask(number))  # where a library unblocks it
    threading.Thread(target=wait, daemon=True).start()


def ask(number: int) -> None:
    """Ends the process, or notes the signal if something has to be done first."""
    with _lock:
        if _asked or not _waits:
            end(number)
        _asked.append(number)
        say(f"\n{signal.Signals(number).name}: {_waits[-1]}; once more ends at once")


def end(number: int) -> None:
    """Ends the process now. Threads of data readers or of a checkpoint must not delay that."""
    for folder in _unwanted:
        shutil.rmtree(folder, ignore_errors=True)
    begun = "jax" in sys.modules  # which comes before all work
    say("\nstopped: nothing " + ("is half written; the same command goes on from what is there"
                                 if begun else "has begun"))
    os._exit(128 + number)


def done() -> None:
    """All is done, and the process is about to end: from now on SIGINT ends it at once.

    A signal that is being answered is answered first: the exit code agrees with what was said.
    """
    with _lock:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])


def say(words: str) -> None:
    with contextlib.suppress(OSError):  # nobody reads it any more
        os.write(2, f"{words}\n".encode())


@contextlib.contextmanager
def passing(folder: str | os.PathLike) -> Iterator[None]:
    """``folder`` is removed when the block ends, or a signal the process."""
    _unwanted.append(folder)
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _unwanted.remove(folder)


@contextlib.contextmanager
def later(words: str) -> Iterator[None]:
    """The block is done before a signal ends the process; ``words`` say so at the signal."""
    with _lock:
        _waits.append(words)
    try:
        yield
    except BaseException:
        with _lock:
            _waits.remove(words)
        raise  # which is reported; if it does not end the process, the next block does
    with _lock:
        _waits.remove(words)
        if _asked and not _waits:
            end(_asked[0])


@contextlib.contextmanager
def watch(words: str, *, alone: bool = False) -> Iterator[Callable[[int], bool]]:
    """Lets the block decide when to stop; yields ``asked(step)``: whether to save and stop now.

    ``words`` are printed at the first signal. With several processes, of which one gets SIGTERM,
    ``asked`` is true in all of them after the same step; SIGINT ends them at once. Outside the main
    thread, where Python gets no signals, ``asked`` is never true. With ``alone`` this process runs
    alone, and jax is not asked.

    Raises:
      Stopped: a signal came, and the block ended by itself.
    """
    if not alone:
        import jax
        from jax.experimental import multihost_utils

        if jax.process_count() > 1:  # jax itself watches for SIGTERM, and tells the others
            yield multihost_utils.reached_preemption_sync_point
            return
    main = threading.current_thread() is threading.main_thread()
    before = {}

    def hear(number, frame):
        if _asked and not _commands:
            signal.signal(number, before[number])
            signal.raise_signal(number)
        else:
            ask(number)

    with _lock:
        _waits.append(words)
    try:
        for number in SIGNALS if main else ():
            before[number] = signal.signal(number, hear)
        yield lambda step: bool(_asked)
    except Stopped as stopped:
        stopped.number = (_asked or [stopped.number])[0]
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        with _lock:
            _waits.remove(words)
            came, _asked[:] = _asked[:1], []
    if came:
        stopped = Stopped("what was under way is done and saved; the same command goes on from "
                          "there")
        stopped.number = came[0]
        raise stopped


@contextlib.contextmanager
def deaf() -> Iterator[None]:
    """Processes that this thread starts in the block do not hear Ctrl-C: this one answers it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    resource_tracker.ensure_running()  # which starts once, and unblocks SIGINT
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
