"""Reads the files in a run's folder: curves over the steps, kinds of modules; numbers as text.

`rmlora_jax.train.metrics` writes both files and describes their lines.
"""

import math
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rmlora_jax.files import read_json_lines, read_object

METRICS = "metrics.jsonl"
INTRINSIC = "intrinsic.jsonl"
SUMMARY = "summary.json"
# What earlier versions called the validation split in metrics.jsonl, and test in summary.json.
OLD_SPLIT, SPLIT = "eval/", "validation/"
OLD_NAMES = {"eval": "test", "best_eval": "test_best"}
ORDER = ("query", "key", "value", "out", "intermediate", "fc1", "output", "fc2")


def read_metrics(workdir: str | os.PathLike) -> list[dict[str, float]]:
    """The lines of ``metrics.jsonl`` by increasing step; [] if there is no such file.

    Non-finite numbers come back as float nan, inf and -inf. Lines of earlier versions, which said
    ``eval/`` for ``validation/``, have the names of today.

    Raises:
      UserError: a line other than the last is not a JSON object with a step.
    """
    rows = []
    for row in read_lines(pathlib.Path(workdir) / METRICS):
        nonfinite = row.pop("nonfinite", {})
        row |= {key: float(text) for key, text in nonfinite.items()}
        rows.append({re.sub(f"^{OLD_SPLIT}", SPLIT, key): value for key, value in row.items()})
    return rows


def read_summary(workdir: str | os.PathLike) -> dict[str, Any]:
    """The ``summary.json`` of a run; that of an earlier version with the names of today.

    Raises:
      FileNotFoundError: the run is not finished.
      UserError: the file is not a JSON object.
    """
    found = read_object(pathlib.Path(workdir) / SUMMARY)
    return {OLD_NAMES.get(name, name): value for name, value in found.items()}


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
    """The objects of one of the two files, as JSON has them, without a torn last line."""
    return read_json_lines(
        path, "step", int, "is not a JSON object with a step.\n"
        "Delete that line, or start again with another --workdir.")


def series(history: Sequence[Mapping[str, float]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of the lines that have ``key``, as float64 arrays."""
    pairs = [(row["step"], row[key]) for row in history if row.get(key) is not None]
    steps, values = np.array(pairs, np.float64).reshape(-1, 2).T
    return steps, values


def bin_means(x: np.ndarray, y: np.ndarray, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """Means of neighbouring points, cut into at most ``bins`` groups of near equal size."""
    bins = max(min(bins, len(x)), 1)
    x, y = (np.array([part.mean() for part in np.array_split(z, bins)]) for z in (x, y))
    return x, y


def finite(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The points whose y is a finite number."""
    return x[np.isfinite(y)], y[np.isfinite(y)]


def smooth(y: np.ndarray) -> np.ndarray:
    """Moving average over about a twentieth of the points.

    It is centred, and narrower near the start, where curves are steep; the end keeps its width.
    """
    half = max(len(y) // 40, 1) if len(y) >= 8 else 0
    return np.array([y[i - min(half, i): i + min(half, i) + 1].mean() for i in range(len(y))])


def effective_ranks(summary: Mapping[str, Any]) -> np.ndarray:
    """The effective ranks of all modules and layers at the end of a run, from its summary."""
    found = [np.ravel(m["effective_rank"]) for m in summary["intrinsic_dimension"].values()]
    return np.concatenate([[], *found]).astype(np.float64)


def by_kind(modules: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, dict[str, np.ndarray]]:
    """Module paths gathered into kinds: singular_values (L, r), effective_rank (L,) of each.

    A stacked module is a kind by itself. Modules that differ only in their layer's number (a path
    component that is a number or ends in ``_number``) are the layers of one kind, by that number.
    A kind is named by the shortest end of its path that no other kind shares.
    """
    gathered = {}
    for path, values in modules.items():
        if not np.size(values.get("singular_values", ())):
            continue
        found = re.search(r"(?:^|/|_)(\d+)(?=/|$)", path)
        stacked = values["singular_values"].ndim > 1
        kind, layer = path, 0
        if found and not stacked:
            kind, layer = path[:found.start()] + path[found.end():], int(found[1])
        gathered.setdefault(kind.lstrip("/") or "module", []).append((layer, values))
    names = _short_names(list(gathered))
    last = {kind: kind.rsplit("/", 1)[-1] for kind in gathered}
    place = {kind: ORDER.index(n) if n in ORDER else len(ORDER) for kind, n in last.items()}
    return {names[kind]: _stack([v for _, v in sorted(gathered[kind], key=lambda entry: entry[0])])
            for kind in sorted(gathered, key=lambda k: (place[k], k))}


def _stack(layers):
    rows = [row for v in layers
            for row in v["singular_values"].reshape(-1, v["singular_values"].shape[-1])]
    singular = np.full((len(rows), max(map(len, rows))), np.nan)  # nan: left white
    for target, row in zip(singular, rows, strict=True):
        target[: len(row)] = row
    ranks = np.concatenate([np.ravel(v.get("effective_rank", np.nan)) for v in layers])
    return {"singular_values": singular, "effective_rank": ranks}


def _short_names(paths: Sequence[str]) -> dict[str, str]:
    names = {}
    for path in paths:
        parts = path.split("/")
        ends = ["/".join(parts[start:]) for start in range(len(parts) - 1, 0, -1)]
        alone = (e for e in ends if sum(f"/{p}".endswith(f"/{e}") for p in paths) == 1)
        names[path] = next(alone, path)
    return names


def number(value: float | None) -> str:
    """Four decimals; small values in scientific notation; ``-`` for None.

    >>> number(0.25), number(0.00012), number(None)
    ('0.2500', '1.20e-04', '-')
    """
    if value is None:
        return "-"
    return f"{value:.4f}" if value == 0 or abs(value) >= 1e-3 else f"{value:.2e}"


def amount(size: int) -> str:
    """Bytes in the largest fitting unit.

    >>> amount(123), amount(1536)
    ('123 bytes', '1.5 KiB')
    """
    for power, name in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if size >= 1024**power:
            return f"{size / 1024**power:.1f} {name}"
    return f"{size} bytes"


def speed(figures: Mapping[str, Any]) -> str | None:
    """Tokens a second where they are counted, else examples a second; None where neither is known.

    >>> speed({"examples_per_second": 812.3}), speed({"tokens_per_second": 14460, "mfu": 0.5})
    ('812 examples/s', '14,460 tokens/s (50 % MFU)')
    """
    for name in ("tokens", "examples"):
        rate = figures.get(f"{name}_per_second")
        if rate is not None:
            used = figures.get("mfu")
            return f"{rate:,.0f} {name}/s" + (f" ({100 * used:.0f} % MFU)" if used else "")
    return None


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
