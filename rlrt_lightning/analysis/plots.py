"""Plot styles: colors that are distinguishable with color blindness; line styles and hatches for black and white."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rlrt_lightning.runtime.errors import ConfigError
from rlrt_lightning.runtime.files import new_folder


class Style(NamedTuple):
    """The style of one of the compared series."""

    color: str
    linestyle: Any
    marker: str
    hatch: str


STYLES = [  # colors from Okabe and Ito, 2008
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
    """The style of series `number`; styles repeat."""
    return STYLES[number % len(STYLES)]


def panels(titles: Sequence[str], width: float = 3.1, height: float = 2.5) -> tuple[Any, list[Any]]:
    """Creates a figure with one panel per title, at most three per row.

    Args:
        titles: Titles of the panels.
        width: Width of a panel, in inches.
        height: Height of a panel, in inches.

    Returns:
        The matplotlib figure and the axes of its panels.
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
    """Adds a legend for the series of one axis below all panels."""
    handles, names = axis.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(5, len(names)), fontsize=8, frameon=False)


def prepare_folder(out: Path, name: str, new: bool = False) -> Path:
    """Creates the output folder if needed, and checks that no file would be overwritten.

    Args:
        out: The folder.
        name: Base name of the plots and tables.
        new: Use a new folder `<name>[-n]` in it.

    Raises:
        ConfigError: If the folder already has files with this base name.
    """
    if new:
        return new_folder(out, name)
    out.mkdir(parents=True, exist_ok=True)
    if existing := sorted(path for pattern in (f"{name}.*", f"{name}_summary.*") for path in out.glob(pattern)):
        raise ConfigError(f"out: {existing[0]} already exists and would be overwritten; set --out to another folder")
    return out


def save(figure: Any, out: Path, name: str) -> list[Path]:
    """Writes `<out>/<name>.png` and `.svg`, and creates the folder if needed."""
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"{name}.{ending}" for ending in ("png", "svg")]
    for path in paths:
        figure.savefig(path, dpi=200)
    return paths
