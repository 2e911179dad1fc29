"""The pictures of a study, each from its rows: which there are, and how they look."""

import io
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from rmlora_jax.files import write_bytes_atomic
from rmlora_jax.study import dots, lines, maps
from rmlora_jax.study.plan import FINAL

# name -> function of (rows, along) that returns a matplotlib Figure, or None without such rows
PICTURES: dict[str, Callable] = {
    "table": dots.table_picture,
    "heat": maps.heat_picture,
    "frequency": lines.frequency_picture,
    "gap": lines.gap_picture,
    "layers": maps.layers_picture,
    "dimension": dots.dimension_picture,
}


def write_pictures(
    rows: Sequence[dict[str, Any]], folder: str | os.PathLike, names: Iterable[str], along: str
) -> list[Path]:
    """Draws ``folder/NAME.png`` for each of ``names`` and returns the paths.

    A picture of which no row has the figures (the effective rank of methods without factors) is
    left out.
    """
    drawn = [draw(rows, Path(folder) / f"{name}.png", name, along) for name in names]
    return [path for path in drawn if path is not None]


def draw(rows: Sequence[dict[str, Any]], path: Path, name: str, along: str) -> Path | None:
    """One of `PICTURES`, of the rows of stage "final", or None where they have no such figures."""
    final = [row for row in rows if row["stage"] == FINAL]
    figure = PICTURES[name](final, along) if final else None
    if figure is None:
        return None
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120, facecolor="white", metadata={"Software": None},
                   bbox_inches="tight", pad_inches=0.2)
    return write_bytes_atomic(path, picture.getvalue())
