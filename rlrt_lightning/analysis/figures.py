"""How figures look: colours that colour-blind readers tell apart, lines and hatches that tell in black and white."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rlrt_lightning.runtime.errors import ConfigError


class Style(NamedTuple):
    """How one of several things that are compared is drawn."""

    color: str
    linestyle: Any
    marker: str
    hatch: str


STYLES = [  # colours by Okabe and Ito, 2008
    Style("#0072B2", "-", "o", ""),
    Style("#D55E00", (0, (5, 1.5)), "s", "//"),
    Style("#009E73", (0, (1, 1)), "^", ".."),
    Style("#CC79A7", (0, (4, 1.2, 1, 1.2)), "D", "xx"),
    Style("#E69F00", (0, (7, 2)), "v", "\\\\"),
    Style("#56B4E9", (0, (2, 1)), "P", "oo"),
    Style("#000000", (0, (3, 1, 1, 1, 1, 1)), "X", "--"),
    Style("#8C6D00", (0, (6, 1, 1, 1)), "<", "++"),
    Style("#666666", (0, (1, 2.5)), ">", "**"),
]


def style(number: int) -> Style:
    """The style of the thing that comes at a place."""
    return STYLES[number % len(STYLES)]


def panels(titles: Sequence[str], width: float = 3.1, height: float = 2.5) -> tuple[Any, list[Any]]:
    """A figure with a panel for each title, side by side, at most three in a row.

    Args:
        titles: What stands over the panels.
        width: Of each, in inches.
        height: Of each, in inches.

    Returns:
        The matplotlib figure and its panels' axes.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(3, len(titles))
    rows = -(-len(titles) // columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = [figure.add_subplot(rows, columns, i + 1) for i in range(len(titles))]
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, fontsize=9)
        axis.tick_params(labelsize=8)
        axis.xaxis.label.set_fontsize(8)
        axis.yaxis.label.set_fontsize(8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", linewidth=0.4, alpha=0.4)
    return figure, axes


def legend(figure: Any, axis: Any) -> None:
    """Puts the names of what an axis shows below all panels."""
    handles, names = axis.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(5, len(names)), fontsize=8, frameon=False)


def fresh(out: Path, name: str) -> Path:
    """Makes a folder ready for figures and tables whose names begin with a name.

    Args:
        out: The folder.
        name: The name.

    Raises:
        ConfigError: If it has some already, which would be overwritten.
    """
    out.mkdir(parents=True, exist_ok=True)
    if there := sorted(path for pattern in (f"{name}.*", f"{name}_summary.*") for path in out.glob(pattern)):
        raise ConfigError(f"out: {there[0]} is there already and would be overwritten; name another folder by --out")
    return out


def save(figure: Any, out: Path, name: str) -> list[Path]:
    """Writes `<out>/<name>.png` and `.svg`."""
    paths = [out / f"{name}.{ending}" for ending in ("png", "svg")]
    for path in paths:
        figure.savefig(path, dpi=200)
    return paths
