"""What the pictures of a study have in common: colours, names, axes."""

import textwrap
from collections.abc import Sequence

from rmlora_jax.report.panels import GRID, INK, MUTED
from rmlora_jax.tasks.scores import describe, higher_is_better

# Okabe & Ito 2008: told apart by every kind of colour vision.
COLOURS = {
    "full": "#3b3b3b", "head": "#8f8f8f", "bitfit": "#b8a100", "lora": "#0072b2",
    "adalora": "#56b4e9", "sora": "#009e73", "reg_only": "#e69f00", "mask_only": "#cc79a7",
    "rm_lora": "#d55e00", "bottleneck": "#56b4e9", "prefix": "#009e73",
}
OTHERS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#3b3b3b", "#8f8f8f")
NEVER = 10**8  # steps between draws, or before the first: so many that it does not happen


def colour(name: str, names: Sequence[str] = ()) -> str:
    """A method's own, or one by the place of ``name`` among ``names``."""
    place = names.index(name) if name in names else 0
    return COLOURS.get(name, OTHERS[place % len(OTHERS)])


def new_figure(width: float, height: float):
    """A matplotlib Figure on the Agg canvas, in inches, without pyplot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure


def finish(ax, title: str, xlabel: str = "", ylabel: str = "", *, grid: str = "y") -> None:
    """Title at the left, quiet axes."""
    ax.set_title(title, loc="left", fontsize=12, fontweight="bold", color=INK, pad=10)
    ax.set_xlabel(xlabel, fontsize=10, color=MUTED)
    ax.set_ylabel(ylabel, fontsize=10, color=MUTED)
    ax.tick_params(colors=MUTED, labelsize=9.5, length=0)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(GRID)
    if grid:
        ax.grid(axis=grid, color=GRID, lw=0.8)
        ax.set_axisbelow(True)


def caption(figure, text: str) -> None:
    """Small words under everything, as wide as the figure."""
    width, height = figure.get_size_inches()
    lines = textwrap.fill(text, int(14.5 * width))
    figure.text(0.1 / width, -0.12 / height, lines, fontsize=9, color=MUTED, va="top",
                linespacing=1.4)


def axis(metric: str) -> str:
    """How a metric is called along an axis, in the units of the tables.

    >>> axis("accuracy"), axis("matthews")
    ('accuracy, %', 'Matthews correlation x 100')
    """
    name = describe(metric)[0].long
    if not higher_is_better(metric):
        return name
    return f"{name}, %" if metric.startswith("accuracy") else f"{name} x 100"


def short(field: str) -> str:
    """
    >>> short("rm.resample_every"), short("penalty")
    ('resample every', 'penalty')
    """
    return field.rpartition(".")[2].replace("_", " ")


def shown(value) -> str:
    """A value of a setting or of a field, as a label.

    >>> shown(0.5), shown("1000000000"), shown("10"), shown("cola")
    ('0.5', 'never', '10', 'cola')
    """
    try:
        number = float(value)
    except ValueError:
        return str(value)
    return "never" if number >= NEVER else f"{number:g}"


def thousands(count: int) -> str:
    """
    >>> thousands(165888), thousands(22713986), thousands(900), thousands(0)
    ('166 k', '22.7 M', '900', '')
    """
    for size, letter in ((10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.3g} {letter}"
    return str(count or "")
