"""A run's folder before anything is written to it: it can be, is free, and is of this config."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import ml_collections

from rmlora_jax.errors import UserError
from rmlora_jax.files import read_json
from rmlora_jax.train.config import changes
from rmlora_jax.train.disk import in_plain_words
from rmlora_jax.train.lock import held
from rmlora_jax.train.metrics import read_metrics


@contextlib.contextmanager
def opened(workdir: Path, *, alone: bool = False) -> Iterator[None]:
    """Makes the folder if missing, and holds it; what its disk refuses is said in plain words.

    ``alone``: see `held`.

    Where a UserError ends the block and nothing was written, the folder is removed again.

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
        with contextlib.suppress(OSError):
            workdir.rmdir()  # which only an empty folder can be
        raise


def check_workdir(config: ml_collections.ConfigDict, workdir: Path) -> bool:
    """Refuses a folder that holds a run of another config; says what else is new in this one.

    Returns:
      Whether the number of steps is another: a run that was finished may go on.

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
        refused, free = changes(read_json(file), config.to_dict())
    except (ValueError, AttributeError, TypeError, OSError, RecursionError) as e:
        raise UserError(f"{file} is not a config ({e}); give another --workdir") from e
    if refused:
        raise UserError(
            f"{workdir} holds a run with another config: {'; '.join(refused)}\n"
            "Give the same config to continue that run, or another --workdir to start a new one"
        )
    if free and jax.process_index() == 0:
        print(f"continues with {'; '.join(free)}", flush=True)
    return any(change.startswith(("steps:", "epochs:")) for change in free)


def check_nothing_lost(workdir: Path) -> None:
    """Refuses to begin at step 0 where checkpoints were written and are gone.

    The metrics of the second evaluation are only written when the checkpoint of the first is whole.
    With one alone the run may have been killed while it wrote its first.

    Raises:
      UserError: the metrics say that there were checkpoints.
    """
    evaluated = [row["step"] for row in read_metrics(workdir) if "eval/loss" in row]
    if len(evaluated) > 1:
        raise UserError(
            f"{workdir} has the metrics of {evaluated[-1]:,} steps and no checkpoint any more; "
            "beginning again would overwrite them\n"
            "Put checkpoints/ back, or give another --workdir, or delete metrics.jsonl to begin "
            "again at step 0"
        )
