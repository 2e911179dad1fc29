"""One process at a time in a folder: a lock that the kernel frees, however the process ends.

    with held(workdir):
        ...  # a second process gets a UserError that says who is here

The lock is on the file ``.lock`` (flock), not the file itself: one that a killed process left
behind does not block. Of the processes of one run the first holds it for all.
"""

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from rmlora_jax.errors import UserError

try:
    import fcntl
except ImportError:  # Windows has none; runs there are not kept apart
    fcntl = None

FILE = ".lock"
PATIENCE = 1.0  # seconds in which the holder has written who it is


@contextlib.contextmanager
def held(folder: Path, *, alone: bool = False) -> Iterator[None]:
    """Holds ``folder``, which must be there, until the block ends.

    ``alone``: this process is no one of several, and jax is not asked, as that would take the
    devices from those that it starts.

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
    if fcntl is None:
        return None, None
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
