"""The factors of a run at several steps, for `rmlora_jax.trajectory_dimension` afterwards.

``workdir/snapshots/00000120.npz`` holds every factor of step 120 under its path, in float32, with
the diagonal of AdaLoRA or SoRA multiplied into A; plain arrays, never pickles.
"""

import io
import os
import pathlib
import zipfile
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict

from rmlora_jax.adapt.diagonal import DIAGONAL
from rmlora_jax.errors import UserError
from rmlora_jax.files import write_bytes_atomic
from rmlora_jax.optim.factors import find_diagonals, find_factors, flatten

FOLDER = "snapshots"


def save(workdir: str | os.PathLike, step: int, params: Any) -> pathlib.Path:
    """Writes the factors among ``params`` (any tree; its other leaves are left out), atomically.

    Raises:
      ValueError: ``params`` has no factors.

    >>> import tempfile
    >>> layer = {"lora_a": np.ones((4, 2)), "lora_b": np.zeros((2, 3)), "bias": np.zeros(3)}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = save(folder, 5, {"fc": layer})
    ...     [(step, list(tree["fc"])) for step, tree in read(folder)]
    [(5, ['lora_a', 'lora_b'])]
    """
    leaves, _, paths = flatten(params)
    factors = {f.path: np.asarray(leaves[f.index], np.float32) for f in find_factors(params)}
    if any(path.endswith(DIAGONAL) for path in paths):
        for d in find_diagonals(params):
            e = np.asarray(leaves[d.e], np.float32)
            factors[d.a.path] = factors[d.a.path] * e[..., None, :]
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **factors)
    return write_bytes_atomic(pathlib.Path(workdir) / FOLDER / f"{step:08}.npz", file.getvalue())


def read(workdir: str | os.PathLike) -> list[tuple[int, dict]]:
    """``(step, nested dict of factors)`` of every snapshot by increasing step; [] without any.

    Raises:
      UserError: a file is damaged.
    """
    found = []
    for path in sorted((pathlib.Path(workdir) / FOLDER).glob("*.npz")):
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
                flat = {tuple(name.split("/")): arrays[name] for name in arrays.files}
            found.append((int(path.stem), unflatten_dict(flat)))
        except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile) as error:
            raise UserError(f"{path} is not a snapshot ({error}); delete it") from error
    return found


def drop_after(workdir: str | os.PathLike, step: int) -> None:
    """Deletes the snapshots of later steps: a run continuing after ``step`` makes them again."""
    for path in (pathlib.Path(workdir) / FOLDER).glob("*.npz"):
        if int(path.stem) > step:
            path.unlink(missing_ok=True)
