"""Images looked at once, before a run: which of them cannot be used.

A stream meets a damaged image at some step of a run, too late to agree on how many there are. So
where records may be left out, each is read, decoded and compared with the declared features first;
what was found is kept beside the decoded images, and costs the next run of these files nothing.
"""

import contextlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from rmlora_jax.data.bad import BadRecord, Skipped
from rmlora_jax.data.dataset import ImageSource, Subset
from rmlora_jax.data.decoded import fingerprint
from rmlora_jax.data.progress import progress
from rmlora_jax.files import read_json, write_json

CHUNK = 256


def usable(
    source: ImageSource,
    skipped: Skipped,
    *,
    cache: os.PathLike | None = None,
    threads: int = 8,
    desc: str = "checking",
) -> ImageSource:
    """The records of ``source`` that can be used; ``source`` itself where all can, or all must.

    Args:
      source: with ``check(index)``, which raises `BadRecord`.
      skipped: takes those that cannot.
      cache: folder in which what was found is kept; None for none.
      threads: that read and decode.
      desc: of the progress bar.

    Raises:
      UserError: more cannot be used than may be left out.
    """
    if not skipped.limit:
        return source
    name = cache and fingerprint(source, None)
    path = Path(cache).expanduser() / f"{name}.bad.json" if name else None
    found = _remembered(path, len(source)) if path else None
    if found is None:
        found = _found(source, skipped.limit, threads, desc)
        if path and len(found) <= skipped.limit:
            with contextlib.suppress(OSError):
                write_json(path, found)
    skipped.add(*(BadRecord(why) for _, why in found))
    if not found:
        return source
    return Subset(source, np.setdiff1d(np.arange(len(source)), [index for index, _ in found]))


def _found(source: ImageSource, limit: int, threads: int, desc: str) -> list[tuple[int, str]]:
    """(index, why) of the records that cannot be used, in order; a little over ``limit`` of them
    where there are more."""
    n, found = len(source), []

    def look(start: int) -> list[tuple[int, str]]:
        bad = []
        for index in range(start, min(start + CHUNK, n)):
            try:
                source.check(index)
            except BadRecord as error:
                bad.append((index, str(error).partition("\n")[0]))
        return bad

    pool = ThreadPoolExecutor(threads)
    try:
        with progress(n, desc, " images", disable=n < 2000) as bar:
            for bad in pool.map(look, range(0, n, CHUNK)):
                found += bad
                bar.update(CHUNK)
                if len(found) > limit:
                    break
    finally:
        pool.shutdown(cancel_futures=True)
    return found


def _remembered(path: Path, n: int) -> list[tuple[int, str]] | None:
    try:
        found = read_json(path)
        whole = all(type(i) is int and 0 <= i < n and isinstance(why, str) for i, why in found)
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    return [(index, why) for index, why in found] if whole else None
