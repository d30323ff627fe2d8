"""Figures of scale: a metric over source size, images seen or parameters. Imports Matplotlib to draw."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from datamodules.errors import DataError
from studies.figures import LABEL_SIZE, MARKERS, PANELS_PER_ROW, RC, label_ends, legend, source_colours, wrap

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 3.2, 2.6  # inches of one panel of several
UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))


@dataclass(frozen=True)
class FittedCurve:
    """A curve beside the points of one line.

    Args:
        panel: The points' "panel".
        series: The points' "series".
        x: Where it is drawn, in the units of the points.
        y: The curve, fractions.
        text: What it says: "exponent 0.21 [0.10, 0.33]". Written above the panel.
    """

    panel: str
    series: str
    x: np.ndarray
    y: np.ndarray
    text: str


def scaling_curves(
    points: pd.DataFrame,
    x_label: str,
    y_label: str,
    *,
    fits: Sequence[FittedCurve] = (),
    colours: Mapping[str, str] | None = None,
) -> "Figure":
    """Draw means and 95 % intervals over a quantity on a log axis: a panel each "panel", a line each "series".

    Args:
        points: One row a point: texts "panel" ("" for the only one) and "series"; "x", positive; reals "mean",
            "low", "high": fractions, drawn in percent; an interval of NaN is not drawn.
        x_label: "images of the source".
        y_label: "accuracy (%)".
        fits: Fitted curves, drawn dashed.
        colours: Series → colour; by default one of the palette each.

    Returns:
        A figure that belongs to no window and needs no closing.

    Raises:
        DataError: If an x is not positive.
    """
    import matplotlib
    from matplotlib.figure import Figure

    wrong = points[~(points["x"].astype(float) > 0)]
    if len(wrong):
        row = wrong.iloc[0]
        raise DataError(
            f"{row['series']} has {x_label} {row['x']}, which has no place on a log axis",
            valid="numbers above 0",
            hint="draw runs without a source as a line of their own, or leave them out",
        )
    series, panels = (list(dict.fromkeys(points[name])) for name in ("series", "panel"))
    chosen = colours or source_colours(series, baseline="")
    styles: dict[str, dict[str, Any]] = {
        name: {"color": chosen[name], "marker": MARKERS[i % len(MARKERS)], "linestyle": "-"}
        for i, name in enumerate(series)
    }
    single = len(panels) == 1
    columns = min(len(panels), PANELS_PER_ROW)
    rows = math.ceil(len(panels) / columns)
    longest = max(len(name) for name in series)
    width = 4.3 + 0.065 * longest if single else WIDTH * columns
    panel_width = (4.0 if single else 0.8 * WIDTH) * 72  # points
    notes = max((sum(fit.panel == panel for fit in fits) for panel in panels), default=0)
    height = (HEIGHT + 0.5 * single + 0.16 * notes) * rows
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(width, height), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False)
        named = False
        for place, axes in enumerate(grid.flat):
            if place >= len(panels):
                axes.set_visible(False)
                continue
            panel = panels[place]
            inside = points[points["panel"] == panel]
            mine = [fit for fit in fits if fit.panel == panel]
            ends = _draw_panel(axes, inside, mine, styles)
            _set_ticks(axes, inside["x"].to_numpy(dtype=float), panel_width)
            _write_fits(axes, mine, styles)
            title = wrap(panel, panel_width)
            axes.set_title(title, loc="left", pad=6 + 1.3 * LABEL_SIZE * len(mine))
            if place % columns == 0:
                axes.set_ylabel(y_label)
            if place + columns >= len(panels):
                axes.set_xlabel(x_label)
            named = single and label_ends(figure, axes, ends, styles)
        if not named:
            fitting = max(1, int(width * 72 / (0.56 * LABEL_SIZE * longest + 36)))
            figure.set_size_inches(width, height + 0.2 * math.ceil(len(styles) / fitting))
            legend(figure, styles, fitting)
        figure.draw_without_rendering()
        figure.set_layout_engine(None)  # the layout is done: the same in every file, and not paid for again
    return figure


def short_number(value: float) -> str:
    """A number with three digits and its thousands as a letter: 1280000 → "1.28M"."""
    unit, letter = next((unit, letter) for unit, letter in UNITS if float(f"{value:.3g}") >= unit or unit == 1)
    return f"{float(f'{value:.3g}') / unit:.3g}{letter}"


def _draw_panel(
    axes: "Axes",
    points: pd.DataFrame,
    fits: Sequence[FittedCurve],
    styles: Mapping[str, Mapping[str, Any]],
) -> dict[str, tuple[float, float]]:
    """Draw the lines and curves of one panel; return each series' last point (x, percent)."""
    axes.set_xscale("log")
    ends = {}
    present = points[points["mean"].notna()]
    for name, line in present.groupby("series", sort=False):
        line, style = line.sort_values("x"), styles[str(name)]
        x, mean, low, high = (line[column].to_numpy(dtype=float) for column in ("x", "mean", "low", "high"))
        axes.vlines(x, 100 * low, 100 * high, color=style["color"], linewidth=1.1, alpha=0.75, zorder=3)
        fitted = any(fit.series == name for fit in fits)
        axes.plot(
            x, 100 * mean, **{**style, "linestyle": "none" if fitted else "-"}, linewidth=1.5, markersize=4.6,
            markeredgecolor="white", markeredgewidth=0.5, zorder=5,
        )  # fmt: skip
        ends[str(name)] = (float(x[-1]), float(100 * mean[-1]))
    for fit in fits:
        axes.plot(fit.x, 100 * fit.y, color=styles[fit.series]["color"], linewidth=1.1, linestyle=(0, (4, 2)), zorder=4)
    return ends


def _set_ticks(axes: "Axes", values: np.ndarray, width: float) -> None:
    """Put ticks at the points' own x, without labels that would touch (panel `width` in points)."""
    places = np.unique(values)
    axes.margins(x=0.08)
    left, right = np.log(axes.get_xlim())
    texts, edge = [], -math.inf
    for place in places:
        text = short_number(place)
        centre, half = (np.log(place) - left) / (right - left) * width, 0.3 * LABEL_SIZE * len(text)
        fits = centre - half - 3 >= edge
        texts.append(text if fits else "")
        edge = centre + half if fits else edge
    axes.set_xticks(places, texts)
    axes.xaxis.set_ticks([], minor=True)


def _write_fits(axes: "Axes", fits: Sequence[FittedCurve], styles: Mapping[str, Mapping[str, Any]]) -> None:
    """Write what the curves say above the panel, in the colours of their lines."""
    for i, fit in enumerate(reversed(fits)):
        axes.annotate(
            f"{fit.series}: {fit.text}", (0, 1), xycoords="axes fraction", xytext=(0, 4 + 1.3 * LABEL_SIZE * i),
            textcoords="offset points", fontsize=LABEL_SIZE - 0.5, color=styles[fit.series]["color"], va="bottom",
        )  # fmt: skip
