"""Heat map of source × target: a metric or a gain, with its number in every cell. Imports Matplotlib to draw."""

import textwrap
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from datamodules.errors import DataError
from studies.figures import GREY, LABEL_SIZE, RC
from studies.report_text import points

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh
    from matplotlib.figure import Figure

CELL = (0.95, 0.48)  # inches: room for "+12.3" above an interval
LETTERS = 24  # of a line of a source's name
LETTERS_TARGET = 14  # of a line above a cell
#: Even to colour-blind eyes: lightness alone tells values (cividis), or blue from orange around white.
SEQUENTIAL, DIVERGING = "cividis", "PuOr"


def heat_map(
    cells: pd.DataFrame, value: str, label: str, *, diverging: bool = False, limit: float | None = None
) -> "Figure":
    """Draw a cell for each source (row) and target (column), in the order of their first rows.

    A pair without a row, or whose value is NaN, is hatched.

    Args:
        cells: One row a cell: "source", "target" and the column `value`, a fraction that is drawn in percent.
            A column "note", if there, is written small beneath the number: an interval, or "n.d.".
        value: Name of the column to draw.
        label: What the numbers are, beneath the map: "gain over scratch (points)".
        diverging: Whether values are differences: signs are shown, and colours part at zero.
        limit: The difference, a fraction, at which the colours end, so that several maps can be compared; by default
            the largest one.

    Returns:
        A figure that belongs to no window and needs no closing.

    Raises:
        DataError: If a source and target have two rows.
    """
    import matplotlib
    from matplotlib.figure import Figure

    sources, targets = (list(dict.fromkeys(cells[name])) for name in ("source", "target"))
    values = _values(cells, value, sources, targets)
    rows = [textwrap.fill(str(name), LETTERS) for name in sources]
    columns = [textwrap.fill(str(name), LETTERS_TARGET) for name in targets]
    width = CELL[0] * len(targets) + 0.075 * max(len(line) for name in rows for line in name.split("\n")) + 1.1
    label = textwrap.fill(label, int(72 * width / (0.56 * RC["font.size"])))
    lines = max(name.count("\n") + 1 for name in columns) + label.count("\n") + 1
    with matplotlib.rc_context({**RC, "axes.grid": False, "hatch.linewidth": 0.6}):
        figure = Figure(figsize=(width, CELL[1] * len(sources) + 0.15 * lines + 0.55), layout="constrained")
        axes = figure.subplots()
        low, high = _limits(values if limit is None else np.append(values, 100 * limit), diverging)
        image = axes.pcolormesh(
            values, cmap=DIVERGING if diverging else SEQUENTIAL, vmin=low, vmax=high, edgecolors="white", linewidth=1.5
        )
        axes.invert_yaxis()  # the first source on top
        _write_cells(axes, image, cells, value, diverging)
        axes.set_xticks(np.arange(len(targets)) + 0.5, columns)
        axes.set_yticks(np.arange(len(sources)) + 0.5, rows)
        axes.xaxis.tick_top()
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        bar = figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02, aspect=24)
        bar.outline.set_visible(False)  # type: ignore[operator]
        bar.ax.tick_params(length=2, color=GREY)
        figure.supxlabel(label, size=RC["font.size"])  # beside the bar it would not fit a map of few rows
        figure.draw_without_rendering()
        figure.set_layout_engine(None)  # the layout is done: not paid for again in every file
    return figure


def _values(cells: pd.DataFrame, value: str, sources: list[Any], targets: list[Any]) -> np.ndarray:
    """The map in percent, (sources, targets); NaN where there is no row."""
    doubled = cells[cells.duplicated(["source", "target"])]
    if len(doubled):
        raise DataError(
            f"two cells of a heat map are both {doubled['source'].iloc[0]} → {doubled['target'].iloc[0]}",
            valid="one row a source and target",
            hint="draw one map for each setting that varies",
        )
    values = np.full((len(sources), len(targets)), np.nan)
    places = [[names.index(name) for name in cells[key]] for key, names in (("source", sources), ("target", targets))]
    values[tuple(places)] = 100 * cells[value].to_numpy(dtype=float)
    return values


def _write_cells(axes: "Axes", image: "QuadMesh", cells: pd.DataFrame, value: str, sign: bool) -> None:
    """Write number and note into each cell; hatch those without a number."""
    from matplotlib.patches import Rectangle

    values = np.ma.filled(image.get_array(), np.nan)  # type: ignore[no-untyped-call, arg-type]
    for row, column in np.argwhere(np.isnan(values)):
        axes.add_patch(
            Rectangle((column, row), 1, 1, facecolor="#F2F2F2", edgecolor="#B0B0B0", hatch="////", linewidth=0)
        )
    sources, targets = (list(dict.fromkeys(cells[name])) for name in ("source", "target"))
    notes = cells["note"] if "note" in cells else pd.Series("", index=cells.index)
    for source, target, number, note in zip(cells["source"], cells["target"], cells[value], notes, strict=True):
        if np.isnan(number):
            continue
        x, row = targets.index(target) + 0.5, sources.index(source)
        style: dict[str, Any] = {"ha": "center", "va": "center"}
        style["color"] = _readable_on(np.ravel(image.to_rgba(100 * number)))
        has_note = isinstance(note, str) and note != ""
        axes.text(x, row + (0.36 if has_note else 0.5), points(number, sign=sign), size=LABEL_SIZE + 1, **style)
        if has_note:
            axes.text(x, row + 0.72, note, size=LABEL_SIZE - 1.5, **style)


def _limits(values: np.ndarray, diverging: bool) -> tuple[float, float]:
    """Ends of the scale of colours, in percent; never equal, around zero for differences."""
    seen = values[np.isfinite(values)]
    if not seen.size:
        return (-1.0, 1.0) if diverging else (0.0, 100.0)
    if diverging:
        end = max(float(np.abs(seen).max()), 1.0)
        return -end, end
    low, high = float(seen.min()), float(seen.max())
    return (low, high) if high - low >= 1 else (low - 0.5, high + 0.5)


def _readable_on(colour: np.ndarray) -> str:
    """Black or white, whichever has more contrast on an RGB(A) colour of [0, 1] (WCAG 2.1, relative luminance)."""
    rgb = colour[:3]
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    luminance = float(linear @ (0.2126, 0.7152, 0.0722))
    return "black" if (luminance + 0.05) ** 2 > 0.05 * 1.05 else "white"
