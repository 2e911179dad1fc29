"""Published files, and the TFDS folders made of them: whole and verified, or a plain error."""

import contextlib
import hashlib
import http.client
import io
import os
import queue
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rmlora_jax.data.tfds_folder import import_tfds
from rmlora_jax.errors import UserError, progress
from rmlora_jax.stopping import passing

_CHUNK = 1 << 20
_CONNECT_SECONDS = 4  # for the name look-up, the connection and the first answer, together
_STALL_SECONDS = 30  # the longest pause between two pieces


def prepared_folder(
    name: str, version: str, data_dir: str | os.PathLike, make: Callable[[Path], Path]
) -> Path:
    """Makes ``data_dir/name/version`` and returns it; at once if it is there.

    A temporary folder inside ``data_dir`` is renamed when it is whole: a failure leaves nothing
    behind, and of two processes at once each finds a whole one.

    Args:
      name: of the data set, with its config: "cifar100", "glue/cola".
      make: given a temporary folder, returns a finished folder somewhere below it.

    Raises:
      UserError: what ``make`` raises, or a folder that cannot be written.
    """
    data_dir = Path(data_dir).expanduser()
    target = data_dir / name / version
    if (target / "features.json").exists():
        return target
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{name.replace('/', '-')}-", dir=data_dir))
    except OSError as error:
        raise UserError(
            f"cannot write to {data_dir}: {error.strerror}\n"
            "Choose another folder with --config.data.data_dir=DIR"
        ) from error
    try:
        with passing(work):
            made = make(work)
            target.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(OSError):  # another process was first
                made.rename(target)
        if not (target / "features.json").exists():
            raise UserError(f"{target} exists but is not whole: delete it and run again")
        return target
    except OSError as error:
        raise UserError(f"cannot prepare {name} in {data_dir}: {error}") from error


def built(name: str, work: Path, split_generators: Callable[[Any], dict], **options) -> Path:
    """The folder that TFDS's builder ``name`` makes below ``work``, without TensorFlow.

    ``split_generators`` takes the builder and stands in for its method ``_split_generators``.
    """
    from tensorflow_datasets.core.utils import tqdm_utils

    tfds = import_tfds()
    builder_class: Any = tfds.builder_cls(name)
    builder = builder_class(data_dir=str(work / "tfds"), file_format="array_record", **options)
    builder._split_generators = lambda dl_manager: split_generators(builder)
    # TFDS's own reporting is a heading, three bars and a footing; one bar says as much.
    tqdm_utils.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare(
                download_dir=str(work / "downloads"),
                download_config=tfds.download.DownloadConfig(try_download_gcs=False),
            )
    finally:
        tqdm_utils.enable_progress_bar()
    return Path(builder.data_dir)


def published_file(url: str, file: str, *, work: Path, sha256: str, size: int, name: str) -> Path:
    """The file at ``url``: from ``downloads`` beside ``work`` if it lies there, else fetched.

    Nothing is tried twice.

    Args:
      url: http, https or file.
      file: its name in ``downloads``.
      work: the folder of `prepared_folder`, to fetch into.
      sha256, size: what the file must have: a hexadecimal digest, and bytes. Reading stops one byte
        beyond.
      name: of the data set, for errors.

    Raises:
      UserError: no connection, a refusal, a file cut short or one that is not the expected file.
    """
    given, path = work.parent / "downloads" / file, work / file
    if given.exists():
        verify(given, sha256=sha256, size=size)
        return given
    advice = (
        f"Without network: put {file} into {given.parent}, or name a folder where "
        f"{name} is prepared with --config.data.data_dir=DIR"
    )
    digest, received = hashlib.sha256(), 0
    try:
        with (
            _open(url) as response,
            open(path, "wb") as copy,
            progress(size, f"fetching {file}", "B", unit_scale=True) as bar,
        ):
            while received <= size and (chunk := response.read(min(_CHUNK, size + 1 - received))):
                copy.write(chunk)
                digest.update(chunk)
                received += len(chunk)
                bar.update(len(chunk))
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error or type(error).__name__
        raise UserError(f"cannot fetch {url}: {reason}\n{advice}") from error
    _check(received, digest.hexdigest(), sha256=sha256, size=size, what=url, advice=advice)
    return path


def verify(path: Path, *, sha256: str, size: int) -> None:
    """Raises UserError unless the file at ``path`` is the expected one."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    advice = "Delete it and run again, or put the right file there."
    _check(path.stat().st_size, digest, sha256=sha256, size=size, what=str(path), advice=advice)


def _check(received: int, digest: str, *, sha256: str, size: int, what: str, advice: str) -> None:
    if received < size:
        raise UserError(f"{what} is cut short: {received} of {size} bytes\n{advice}")
    if received > size or digest != sha256:
        raise UserError(f"{what} is not the expected file: its SHA-256 is not {sha256}\n{advice}")


def _open(url: str):
    """urlopen whose whole opening is bounded, the name look-up included.

    A socket's timeout bounds neither the look-up nor the sum over a host's several addresses, so
    the opening runs in a thread that is abandoned when time is up.
    """
    answers = queue.SimpleQueue()
    late = threading.Event()

    def opening():
        try:
            response = urllib.request.urlopen(url, timeout=_STALL_SECONDS)
        except Exception as error:
            answers.put(error)
            return
        answers.put(response)
        if late.is_set():
            response.close()

    threading.Thread(target=opening, daemon=True).start()
    try:
        answer = answers.get(timeout=_CONNECT_SECONDS)
    except queue.Empty:
        late.set()
        raise TimeoutError(f"no answer within {_CONNECT_SECONDS} s") from None
    if isinstance(answer, urllib.error.HTTPError):
        answer.close()
        raise OSError(f"the server answers {answer.code} {answer.msg}")
    if isinstance(answer, ValueError):
        raise OSError(f"not a web address ({answer})")
    if isinstance(answer, Exception):
        raise answer
    return answer
