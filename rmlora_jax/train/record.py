"""``data.json``: what a run read and its checkpoints do not hold, so that it goes on with that.

    {"classes": ["neg", "pos"], "examples": {"train": 270, ...}, "content": {"train": HASH, ...},
     "base": HASH}

It does not say where the files lay: another path with the same content is the same run.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rmlora_jax.config import flatten
from rmlora_jax.data import hash_of
from rmlora_jax.errors import UserError
from rmlora_jax.files import placed, read_object
from rmlora_jax.hub import OnDisk
from rmlora_jax.models.family import flat_params
from rmlora_jax.train.setup import Base
from rmlora_jax.train.workdir import RECORD, has_checkpoints

SAMPLED = 1024  # numbers of a parameter that it is known by
LONGEST = 100  # letters of a value in an error


def record_of(base: Base) -> dict[str, Any]:
    """The record of a run that has opened its data and its model."""
    learnt = [name for name in base.feed.sizes if name not in base.feed.unlabelled]
    return {
        "classes": [*(base.problem.labels or ())],
        "examples": {name: base.feed.sizes[name] for name in learnt},
        "content": dict(base.feed.content),
        "base": hash_of(*_samples(base.problem.params, base.problem.new)),
    } | _adapter(base.config.model.adapter)


def _adapter(folder: str) -> dict[str, str]:
    """The hash of the adapter that a run began from, if it did."""
    files = sorted(placed(folder).glob("adapter_*")) if folder else []
    read = (np.frombuffer(file.read_bytes(), np.uint8) for file in files if file.is_file())
    return {"adapter": hash_of(*read)} if folder else {}


def _samples(params: Mapping[str, Any], new: tuple[str, ...]) -> Iterator[np.ndarray]:
    """Some numbers of each parameter that was read from a file, but the head: its rows depend on
    the classes, which are recorded."""
    for path, x in sorted(flat_params(params).items()):
        if path not in new and not path.startswith("head/"):
            stride = max(1, x.size // SAMPLED)
            on_disk = isinstance(x, OnDisk)
            yield x.every(stride) if on_disk else np.asarray(x).ravel()[::stride]


def check_record(workdir: Path, record: Mapping[str, Any]) -> None:
    """Refuses to go on from the checkpoints in ``workdir`` on anything but what the run read.

    A run of an earlier version has no record; it goes on, and a line says so.

    Raises:
      UserError: what differs.
    """
    if not has_checkpoints(workdir):
        return  # nothing was learnt yet
    file = workdir / RECORD
    if not file.exists():
        if jax.process_index() == 0:
            print(f"note: {workdir} has no {RECORD}, as runs of earlier versions; whether its data "
                  "and its base model are still the same is not known", flush=True)
        return
    try:
        was = flatten(read_object(file))
    except (UserError, RecursionError) as error:
        raise UserError(
            f"{error}\nOr delete it: the run then goes on without knowing whether its data are "
            "the same"
        ) from error
    differs = [*_differences(was, flatten(record))]
    if differs:
        raise UserError(
            f"{workdir} holds a run that read something else: {'; '.join(differs)}\n"
            "Put that back to continue the run, or give another --workdir to start a new one"
        )


def _differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """What differs between two flat records, in words; parts that one of them lacks do not."""
    others = [name for name in was if name in now and was[name] != now[name]]
    for name in others:
        kind, _, part = name.partition(".")
        if kind in ("classes", "examples"):
            words = " of ".join(filter(None, (kind, part)))
            yield f"{words}: {_short(was[name])} -> {_short(now[name])}"
    splits = [name.removeprefix("content.") for name in others if name.startswith("content.")]
    if splits == ["tokens"]:
        yield "model.source has another tokenizer"
    elif splits:
        yield f"other examples in {', '.join(split for split in splits if split != 'tokens')}"
    if "adapter" in others:
        yield "model.adapter has other content"
    if "base" in others:
        yield "model.source has other weights"


def _short(value: Any) -> str:
    words = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return words if len(words) <= LONGEST else f"{words[:LONGEST]}..."
