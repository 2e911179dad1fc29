"""One file from the network: whole and verified, or a plain error within seconds."""

import hashlib
import http.client
import os
import queue
import threading
import urllib.error
import urllib.request
from pathlib import Path

from rmlora_jax.data.progress import progress
from rmlora_jax.errors import UserError

_CHUNK = 1 << 20


def fetch(
    url: str,
    path: os.PathLike,
    *,
    sha256: str,
    size: int,
    otherwise: str,
    connect_seconds: float = 4.0,
    stall_seconds: float = 30.0,
) -> None:
    """Downloads ``url`` to ``path`` with a progress bar.

    Nothing is tried twice. ``path`` exists afterwards only if the file is whole and verified.

    Args:
      url: http, https or file.
      path: file to write.
      sha256: hexadecimal digest the file must have.
      size: bytes the file must have; reading stops one byte beyond.
      otherwise: what a person without network should do, as a sentence for the error.
      connect_seconds: for the name look-up, the connection and the first answer, together.
      stall_seconds: the longest pause between two pieces.

    Raises:
      UserError: no connection, a refusal, a file cut short or one that is not the expected file.
    """
    path = Path(path)
    digest = hashlib.sha256()
    received = 0
    try:
        with (
            _open(url, connect_seconds, stall_seconds) as response,
            open(path, "wb") as file,
            progress(size, f"fetching {path.name}", "B", unit_scale=True) as bar,
        ):
            while received <= size and (chunk := response.read(min(_CHUNK, size + 1 - received))):
                file.write(chunk)
                digest.update(chunk)
                received += len(chunk)
                bar.update(len(chunk))
    except (OSError, http.client.HTTPException) as error:
        path.unlink(missing_ok=True)
        reason = getattr(error, "reason", None) or error or type(error).__name__
        raise UserError(f"cannot fetch {url}: {reason}\n{otherwise}") from error
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    try:
        _check(received, digest.hexdigest(), sha256=sha256, size=size, what=url, advice=otherwise)
    except UserError:
        path.unlink(missing_ok=True)
        raise


def verify(path: os.PathLike, *, sha256: str, size: int) -> None:
    """Raises UserError unless the file at ``path`` is the expected one."""
    path = Path(path)
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    advice = "Delete it and run again, or put the right file there."
    _check(path.stat().st_size, digest, sha256=sha256, size=size, what=str(path), advice=advice)


def _check(received: int, digest: str, *, sha256: str, size: int, what: str, advice: str) -> None:
    if received < size:
        raise UserError(f"{what} is cut short: {received} of {size} bytes\n{advice}")
    if received > size or digest != sha256:
        raise UserError(f"{what} is not the expected file: its SHA-256 is not {sha256}\n{advice}")


def _open(url: str, connect_seconds: float, stall_seconds: float):
    """urlopen whose whole opening is bounded, the name look-up included.

    A socket's timeout bounds neither the look-up nor the sum over a host's several addresses, so
    the opening runs in a thread that is abandoned when time is up.
    """
    answers = queue.SimpleQueue()
    late = threading.Event()

    def opening():
        try:
            response = urllib.request.urlopen(url, timeout=stall_seconds)
        except Exception as error:
            answers.put(error)
            return
        answers.put(response)
        if late.is_set():
            response.close()

    threading.Thread(target=opening, daemon=True).start()
    try:
        answer = answers.get(timeout=connect_seconds)
    except queue.Empty:
        late.set()
        raise TimeoutError(f"no answer within {connect_seconds:g} s") from None
    if isinstance(answer, urllib.error.HTTPError):
        answer.close()
        raise OSError(f"the server answers {answer.code} {answer.msg}")
    if isinstance(answer, ValueError):
        raise OSError(f"not a web address ({answer})")
    if isinstance(answer, Exception):
        raise answer
    return answer
