"""Reliability diagrams: what came about over what was claimed, a panel for each label. Imports Matplotlib to draw."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from studies.figures import CHANCE, LABEL_SIZE, MARKERS, PALETTE, PANELS_PER_ROW, RC, legend, wrap

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS = 8
"""Panels that a figure holds; further labels are named below it."""
_FEW = 10  # images below which a point is drawn faintly: its interval spans half the panel


def reliability_diagram(points: Mapping[str, Mapping[str, pd.DataFrame]]) -> "Figure":
    """Draw reliability diagrams with Wilson's 95 % intervals, and the confidences' histograms below them.

    On the dotted diagonal a claim of 70 % comes about in 70 of 100 images; below it the model claims too much. A point
    of fewer than ten images is drawn faintly.

    Args:
        points: Panel ("" for no title) → series, such as "as trained" → `studies.calibration_errors.reliability` of it.
            Only the first `PANELS` are drawn: put those first that matter. The same series in all panels.

    Returns:
        A figure that belongs to no window and needs no closing.
    """
    import matplotlib
    from matplotlib.figure import Figure

    drawn, left_out = list(points)[:PANELS], list(points)[PANELS:]
    rows = -(-len(drawn) // PANELS_PER_ROW)
    columns = -(-len(drawn) // rows)
    series = list(dict.fromkeys(name for name in drawn for name in points[name]))
    styles = {name: {"color": PALETTE[i], "marker": MARKERS[i]} for i, name in enumerate(series)}
    width = 3.4 if columns == 1 else 2.3 * columns + 0.5
    titles = {name: wrap(name, 0.8 * width / columns * 72) for name in drawn}
    lines = max(title.count("\n") + 1 for title in titles.values())
    with matplotlib.rc_context({**RC, "axes.grid.axis": "both"}):
        figure = Figure((width, rows * (1.1 * width / columns + 0.35 + 0.16 * lines) + 0.4), layout="constrained")
        grid = figure.add_gridspec(2 * rows, columns, height_ratios=[3.2, 1] * rows)
        for place, name in enumerate(drawn):
            row, column = divmod(place, columns)
            upper = figure.add_subplot(grid[2 * row, column])
            lower = figure.add_subplot(grid[2 * row + 1, column], sharex=upper)
            _draw_points(upper, points[name], styles)
            _draw_histogram(lower, points[name], styles)
            upper.set_title(titles[name], loc="left")
            if column == 0:
                upper.set_ylabel("came about (%)")
                lower.set_ylabel("images (%)")
            if place + columns >= len(drawn):
                lower.set_xlabel("claimed (%)")
        if series:
            named = {name: {**style, "linestyle": "-", "linewidth": 0.9} for name, style in styles.items()}
            legend(figure, {**named, "calibrated": CHANCE}, 3 if columns > 1 else 1)
        if left_out:
            text = wrap(f"not drawn: {', '.join(left_out)}", 72 * width)
            figure.supxlabel(text, x=0.01, ha="left", fontsize=LABEL_SIZE)
        figure.align_ylabels()
        figure.draw_without_rendering()
        figure.set_layout_engine(None)  # the layout is done: the same in every file
    return figure


def _draw_points(axes: "Axes", frames: Mapping[str, pd.DataFrame], styles: Mapping[str, Mapping[str, str]]) -> None:
    axes.plot([0, 100], [0, 100], zorder=1, **CHANCE)
    for name, frame in frames.items():
        x, y, low, high = (100 * frame[column].to_numpy(float) for column in ("confidence", "frequency", "low", "high"))
        axes.plot(x, y, color=styles[name]["color"], linewidth=0.9, alpha=0.5, zorder=3)
        many = frame["count"].to_numpy(float) >= _FEW
        for chosen, alpha in ((many, 1.0), (~many, 0.3)):
            axes.errorbar(
                x[chosen], y[chosen], np.abs(np.stack([y - low, high - y]))[:, chosen], fmt=styles[name]["marker"],
                color=styles[name]["color"], alpha=alpha, markersize=4.2, markeredgecolor="white",
                markeredgewidth=0.5, elinewidth=1.0, zorder=4,
            )  # fmt: skip
    axes.set(xlim=(-3, 103), ylim=(-3, 103))  # so that points at the edges are seen
    axes.set_xticks(range(0, 101, 25))
    axes.set_yticks(range(0, 101, 25))
    axes.tick_params(labelbottom=False)


def _draw_histogram(axes: "Axes", frames: Mapping[str, pd.DataFrame], styles: Mapping[str, Mapping[str, str]]) -> None:
    """Bars of the first series, outlines of the others."""
    for place, (name, frame) in enumerate(frames.items()):
        left, right, count = (frame[column].to_numpy(float) for column in ("left", "right", "count"))
        colour = styles[name]["color"]
        look = {"color": colour, "alpha": 0.45} if place == 0 else {"facecolor": "none", "edgecolor": colour}
        share = 100 * count / max(count.sum(), 1)
        axes.bar(100 * left, share, 100 * (right - left), align="edge", linewidth=0.9, **look)
    axes.set_ylim(bottom=0)
