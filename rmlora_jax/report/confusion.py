"""Which classes a trained model takes for which: a matrix, and the most confused pairs."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rmlora_jax.report import style

FEWEST = 10  # rows that there is room for: a bar for one pair is no thicker than for ten


def confusion_panels(figure, place, confused: Mapping[str, Any]) -> None:
    """The matrix, where the summary has it, and beside it the pairs; names have their room."""
    words = [f"{style.shorten(true, 18)} taken for {style.shorten(took, 18)}"
             for true, took, *_ in confused["pairs"]]
    names = [style.shorten(name, 18) for name in confused.get("names", ())]
    letters = [max(map(len, texts), default=0) for texts in (names, words)]
    before, between = (0.08 * count for count in letters)  # inches
    before = max(before - 0.1, 0)
    matrix = 5.2 if names else 0.0
    inches = (before, matrix, between + 0.4, 14.8 - before - matrix - between - 0.4)
    inner = place.subgridspec(1, 4, width_ratios=[max(x, 1e-3) for x in inches], wspace=0)
    if names:
        matrix_panel(figure.add_subplot(inner[1]), np.asarray(confused["matrix"], float), names)
    pairs_panel(figure.add_subplot(inner[3]), confused["pairs"], words)


def matrix_panel(ax, counts: np.ndarray, names: Sequence[str]) -> None:
    """Test examples by their true class (rows) and the one they were taken for (columns).

    Columns are numbered where their names do not fit.
    """
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    right = np.eye(len(counts), dtype=bool)
    top = max(share[~right].max(initial=0), 1e-12)
    for cells, tints, most in ((right, "Blues", 1.6), (~right, "Oranges", 1.6 * top)):
        ax.imshow(np.where(cells, share, np.nan), cmap=tints, vmin=0, vmax=most, aspect="auto")
    for i, j in np.argwhere(counts > 0):
        ax.text(j, i, f"{counts[i, j]:,.0f}", ha="center", va="center", color=style.INK,
                fontsize=11 if len(counts) <= 10 else 7.5)
    fits = max(map(len, names)) <= 50 // len(names)
    numbered = [f"{name}  {i}" for i, name in enumerate(names, 1)]
    title = f"Classes: {int(counts[right].sum()):,} of {int(counts.sum()):,} test examples right"
    style.finish_panel(ax, title, "taken for", "true class", legend=False,
                       caption="last step; colour: share of the true class")
    ax.set_yticks(range(len(names)), names if fits else numbered)
    ax.set_xticks(range(len(names)), names if fits else range(1, len(names) + 1))
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_ticks(np.arange(len(names) + 1) - 0.5, minor=True)
    ax.grid(which="minor", color="white", lw=1.5)
    ax.tick_params(which="minor", length=0)
    ax.spines[["left", "bottom"]].set_visible(False)


def pairs_panel(ax, pairs: Sequence[Sequence[Any]], words: Sequence[str]) -> None:
    """The pairs of classes that were confused most, as bars of their examples."""
    ax.barh(range(len(pairs)), [pair[2] for pair in pairs], color=style.VALIDATION, height=0.7,
            alpha=0.75)
    for i, (_, _, count, of) in enumerate(pairs):
        ax.text(count, i, f" {count:,} of {of:,}", va="center", fontsize=9.5, color=style.INK)
    most = f"The {len(pairs)} most confused" if len(pairs) > 1 else "Confused"
    style.finish_panel(ax, f"{most} pairs of classes", "", "", legend=False,
                       caption="test examples of the true class, last step" if pairs else
                       "no test example was taken for another class")
    if words:
        style.rows(ax, words, size=9.5)
        ax.set_ylim(max(len(words), FEWEST) - 0.5, -0.5)
    else:
        ax.set_yticks([])
    ax.set_xticks([])
    ax.set_xlim(0, 1.18 * max((pair[2] for pair in pairs), default=1))
    ax.spines[["left", "bottom"]].set_visible(False)
