"""What a run has left in its folder, read: ``metrics.jsonl`` and ``intrinsic.jsonl``.

`rmlora_jax.train.metrics` writes both files and describes their lines.
"""

import math
import os
import pathlib
from typing import Any

import numpy as np

from rmlora_jax.files import read_json_lines

METRICS = "metrics.jsonl"
INTRINSIC = "intrinsic.jsonl"


def read_metrics(workdir: str | os.PathLike) -> list[dict[str, float]]:
    """The lines of ``metrics.jsonl`` by increasing step; [] if there is no such file.

    Non-finite numbers come back as float nan, inf and -inf.

    Raises:
      UserError: a line other than the last is not a JSON object with a step.
    """
    rows = []
    for row in read_lines(pathlib.Path(workdir) / METRICS):
        nonfinite = row.pop("nonfinite", {})
        rows.append(row | {key: float(text) for key, text in nonfinite.items()})
    return rows


def read_intrinsic(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines of ``intrinsic.jsonl``: ``{"step": s, "modules": {path: {name: float64 array}}}``.

    [] if there is no such file; null comes back as nan. For each module path the arrays are
    ``singular_values`` (*layers, r) and ``effective_rank``, ... (*layers,).

    Raises:
      UserError: as `read_metrics`.
    """
    return [
        {"step": row["step"],
         "modules": {path: {name: np.asarray(value, np.float64) for name, value in values.items()}
                     for path, values in row.get("modules", {}).items()}}
        for row in read_lines(pathlib.Path(workdir) / INTRINSIC)
    ]


def read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """The objects of one of the two files, as JSON has them; a last line that is torn is left out.

    Raises:
      UserError: as `read_metrics`.
    """
    return read_json_lines(
        path, "step", int, "is not a JSON object with a step.\n"
        "Delete that line, or start again with another --workdir.")


def number(value: float | None) -> str:
    """Four decimals; small values in scientific notation; ``-`` for None.

    >>> number(0.25), number(0.00012), number(None)
    ('0.2500', '1.20e-04', '-')
    """
    if value is None:
        return "-"
    return f"{value:.4f}" if value == 0 or abs(value) >= 1e-3 else f"{value:.2e}"


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss, m:ss, or s with one decimal below ten.

    >>> duration(3.21), duration(75), duration(7384)
    ('3.2 s', '1:15', '2:03:04')
    """
    if not math.isfinite(seconds):
        return "?"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
