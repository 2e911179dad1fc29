"""A disk that is full, or that cannot be written, in plain words."""

import contextlib
import errno
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from absl import logging

from rmlora_jax.errors import UserError

# What only happens to who writes.
ADVICE = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some of your quota",
    errno.EFBIG: "raise the limit of a file's size (ulimit -f)",
    errno.EROFS: "make it writable again",
}


@contextlib.contextmanager
def in_plain_words(workdir: Path) -> Iterator[None]:
    """Turns what a disk refuses inside the block into a UserError that says what is kept.

    Everything in ``workdir`` is written whole or as lines at the end of a file, so that the same
    command goes on from the newest checkpoint.
    """
    shown, threading.excepthook = threading.excepthook, _without_refusals(threading.excepthook)
    late, sys.unraisablehook = sys.unraisablehook, without_late(sys.unraisablehook)
    logger = logging.get_absl_logger()
    logger.addFilter(_no_refusal)
    refused = False
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        number = refusal(error)
        if number is None:
            raise
        refused = True
        found = [*workdir.glob("checkpoints/*"), *workdir.glob("program/checkpoints/*")]
        saved = [int(p.name) for p in found if p.name.isdigit()]
        kept = f"the checkpoint of step {max(saved):,} is whole" if saved else "nothing is lost"
        raise UserError(
            f"cannot write to {workdir}: {os.strerror(number)}; {kept}\n"
            f"Now {ADVICE[number]}; the same command goes on from there"
        ) from error
    else:
        sys.unraisablehook = late
    finally:
        if not refused:
            threading.excepthook = shown
            logger.removeFilter(_no_refusal)


def _without_refusals(hook: Callable) -> Callable:
    """Orbax writes in threads: what ends them comes back to the run, which says it in plain words,
    and need not be shown with its traceback as well. After such an end other threads may still be
    under way, hence hooks and filter then stay."""

    def quiet(thread):
        if thread.exc_value is None or refusal(thread.exc_value) is None:
            hook(thread)

    return quiet


def without_late(hook: Callable) -> Callable:
    """After orbax failed, reads and writes still under way fail, too, or come back to an event loop
    that is closed, each with a traceback in the middle of our own words. Hence this stays in place.
    """
    late = ("Event loop is closed", "error while reading array index")

    def quiet(unraisable):
        if not any(words in str(unraisable.exc_value) for words in late):
            hook(unraisable)

    return quiet


def _no_refusal(record) -> bool:
    return not record.exc_info or refusal(record.exc_info[1]) is None


def refusal(error: BaseException | None) -> int | None:
    """The errno of a disk that refuses, in the error or in one behind it; None if there is none.

    Orbax and tensorstore have errors of their own, with the system's words in them.

    >>> refusal(ValueError("RESOURCE_EXHAUSTED: writing a: No space left on device")) == 28
    True
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in ADVICE:
            return error.errno
        for number in ADVICE:
            if os.strerror(number) in str(error):
                return number
        error = error.__cause__ or error.__context__
    return None
