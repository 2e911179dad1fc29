"""A run's folder: that it can be written, is free, and is of this config; and a full disk.

    with held(workdir):
        ...  # a second process gets a UserError that says who is here

The lock is on the file ``.lock`` (flock), not the file itself: one that a killed process left
behind does not block. Of the processes of one run the first holds it for all.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from rmlora_jax.config import flatten, leaves, with_values
from rmlora_jax.errors import UserError
from rmlora_jax.fields import Run
from rmlora_jax.files import read_object
from rmlora_jax.report.records import read_metrics
from rmlora_jax.tasks import SECTIONS, TASKS
from rmlora_jax.train.config import changes, ways_on

# Errors that only a writer can get.
ADVICE = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some of your quota",
    errno.EFBIG: "raise the limit of a file's size (ulimit -f)",
    errno.EROFS: "make it writable again",
}

FILE = ".lock"
RECORD = "data.json"  # what the run read, see `train.record`
LENGTHS = ("steps:", "epochs:")  # changes that make a run longer
PATIENCE = 1.0  # seconds in which the holder has written who it is


@contextlib.contextmanager
def opened(workdir: Path, *, alone: bool = False) -> Iterator[None]:
    """Makes the folder if missing, and holds it (``alone``: see `held`) until the block ends.

    Errors of the disk become plain words. If a UserError ends the block and nothing was written,
    the folder is removed again.

    Raises:
      UserError: the folder cannot be written, or another process holds it.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=workdir).close()
    except OSError as e:
        raise UserError(
            f"cannot write to the workdir {workdir}: {e.strerror}; give another --workdir"
        ) from e
    try:
        with in_plain_words(workdir), held(workdir, alone=alone):
            yield
    except UserError:
        for folder in (workdir / "checkpoints", workdir):
            with contextlib.suppress(OSError):
                folder.rmdir()  # which only an empty folder can be
        raise


def check_workdir(config: Run, workdir: Path) -> bool:
    """Refuses a folder that holds a run of another config; prints what else is new in this one.

    Returns whether a run that was finished may go on: the number of steps is another, or the
    patience of a run that ended for want of it.

    Raises:
      UserError: the fields that differ and must not.
    """
    file = workdir / "config.json"
    if not file.exists():
        if (workdir / "checkpoints").is_dir() and any((workdir / "checkpoints").iterdir()):
            raise UserError(
                f"{workdir} has checkpoints but no config.json, so what they belong to is not "
                "known; give another --workdir"
            )
        return False
    try:
        recorded = (workdir / RECORD).exists()
        refused, free = changes(read_object(file), config, recorded=recorded)
    except (ValueError, OSError, RecursionError) as e:
        raise UserError(f"{file} is not a config ({e}); give another --workdir") from e
    if refused:
        advice = "Give its config to continue that run, or another --workdir to start a new one"
        if all(change.startswith(LENGTHS) for change in refused):
            advice = ways_on(config, workdir)
        raise UserError(
            f"{workdir} holds a run with another config: {'; '.join(refused)}\n{advice}"
        )
    if free and jax.process_index() == 0:
        print(f"continues with {'; '.join(free)}", flush=True)
    summary = workdir / "summary.json"
    early = summary.exists() and "stopped" in read_object(summary)
    return any(change.startswith(LENGTHS + ("patience:",) * early) for change in free)


def forget(workdir: Path) -> None:
    """Frees the folder of a run or a sweep without a checkpoint for another config."""
    if not has_checkpoints(workdir):
        for folder in (workdir, *workdir.glob("*/")):
            for name in ("config.json", RECORD):
                (folder / name).unlink(missing_ok=True)


def has_checkpoints(workdir: Path) -> bool:
    """Whether anything of a run, or of a run of a sweep, was saved."""
    return bool(saved_steps(workdir, *workdir.glob("*/")))


def saved_steps(*workdirs: Path) -> list[Path]:
    """The folders of the checkpoints in these folders of runs, one a step."""
    found = (path for one in workdirs for path in (one / "checkpoints").glob("*"))
    return [path for path in found if path.name.isdigit()]


def as_begun(config: Run, workdir: Path) -> Run:
    """``config`` with what the run in ``workdir`` began with where defaults were others before."""
    try:
        was = flatten(read_object(workdir / "config.json"))
    except (ValueError, OSError, RecursionError):  # `check_workdir` says what is wrong
        return config
    now, known = flatten(config), leaves(type(config))
    kept = {
        path: leaf.before
        for path, leaf in known.items()
        if now[path] == leaf.default != leaf.before == was.get(path, leaf.before)
    }
    own = TASKS[config.task].section
    foreign = tuple(f"{name}." for name, section in SECTIONS.items() if section is not own)
    words = [f"{path}={value}" for path, value in kept.items() if not path.startswith(foreign)]
    if words and jax.process_index() == 0:
        print(f"goes on as it began, with {'; '.join(words)}", flush=True)
    return with_values(config, kept)


def check_nothing_lost(workdir: Path) -> None:
    """Refuses to begin at step 0 where checkpoints were written and are gone.

    The metrics of the second evaluation are only written when the checkpoint of the first is whole.
    A run with the metrics of one may have been killed while it wrote its first checkpoint.

    Raises:
      UserError: the metrics say that there were checkpoints.
    """
    evaluated = [row["step"] for row in read_metrics(workdir) if "validation/loss" in row]
    if len(evaluated) > 1:
        raise UserError(
            f"{workdir} has the metrics of {evaluated[-1]:,} steps and no checkpoint any more; "
            "beginning again would overwrite them\n"
            "Put checkpoints/ back, or give another --workdir, or delete metrics.jsonl to begin "
            "again at step 0"
        )


@contextlib.contextmanager
def held(folder: Path, *, alone: bool = False) -> Iterator[None]:
    """Holds ``folder``, which must exist, until the block ends.

    With ``alone``, this process runs alone, and jax is not asked: that would take the devices from
    the processes that it starts.

    Raises:
      UserError: another process holds it; in all processes of this run.
    """
    file, other = None, None
    if alone or jax.process_index() == 0:
        file, other = take(folder)
    free = other is None
    if not alone and jax.process_count() > 1:
        free = bool(multihost_utils.broadcast_one_to_all(np.array(free)))
    if not free:
        raise UserError(
            f"{folder} is in use by {other or 'another run'}\n"
            "Wait for it, or stop it, or give another --workdir"
        )
    try:
        yield
    finally:
        if file is not None:
            (folder / FILE).unlink(missing_ok=True)
            os.close(file)


def take(folder: Path) -> tuple[int | None, str | None]:
    """The locked file's descriptor and None, or None and who else holds it."""
    path = folder / FILE
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            return None, holder(path)
        except OSError:  # a file system without locks
            os.close(file)
            return None, None
        # The one before unlinks the file at its end; then this lock is on a file without a name.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), os.stat(path)):
                break
        os.close(file)
    os.ftruncate(file, 0)
    since = datetime.now().isoformat(" ", "seconds")
    os.write(file, json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since})
             .encode())
    return file, None


def holder(path: Path) -> str:
    """Who holds the lock, in words."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        with contextlib.suppress(ValueError, KeyError, FileNotFoundError):
            who = json.loads(path.read_text())
            return f"process {who['pid']} on {who['host']} since {who['since']}"
        time.sleep(0.01)
    return "another process"


@contextlib.contextmanager
def in_plain_words(workdir: Path) -> Iterator[None]:
    """Turns what a disk refuses inside the block into a UserError that says what is kept.

    Everything in ``workdir`` is written whole or as lines at the end of a file, so that the same
    command goes on from the newest checkpoint.
    """
    shown, late = threading.excepthook, sys.unraisablehook
    # Orbax writes in threads. What ends one of them comes back to the run, which says it in plain
    # words. After such an end other threads may still be under way: hooks and filter then stay.
    threading.excepthook = quiet(shown, lambda error: refusal(error) is not None)
    sys.unraisablehook = quiet(late, is_late)
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
        saved = [int(p.name) for p in saved_steps(workdir, workdir / "program")]
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


def quiet(hook: Callable, hides: Callable[[BaseException | None], bool]) -> Callable:
    """A hook of `threading` or `sys` that leaves out the exceptions that ``hides`` accepts."""

    def quieter(args):
        if not hides(args.exc_value):
            hook(args)

    return quieter


def is_late(error: BaseException | None) -> bool:
    """Whether this comes from a read or write that was still under way when orbax failed.

    Each would put a traceback into the middle of our own words.
    """
    late = ("Event loop is closed", "error while reading array index")
    return any(words in str(error) for words in late)


def _no_refusal(record) -> bool:
    return not record.exc_info or refusal(record.exc_info[1]) is None


def refusal(error: BaseException | None) -> int | None:
    """The errno of a disk that refuses, from the error or one behind it; None for other errors.

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
