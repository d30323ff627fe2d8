"""Our few-shot curves drawn on published ones: a panel for each target and architecture. Imports Matplotlib to draw."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from datamodules.errors import DataError
from studies import figures
from studies.overlay import CELL, comparable, own_cells, published_cells, standardised_differences
from studies.statistics import varying

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANEL = ["paper", "target", "architecture", "metric"]
DASHED = (0, (3, 1.6))
#: Solid and filled, dashed and open, grey: told apart in black and white, too.
KEYS: dict[str, dict[str, Any]] = {
    "ours: mean, 95 % interval": {"color": "black", "marker": "o", "linestyle": "-"},
    "published: mean, band ± SD": {"color": "black", "marker": "o", "linestyle": DASHED, "markerfacecolor": "white"},
    "published: others": {"color": "#B5B5B5", "linestyle": "-", "linewidth": 1.0},
}


def overlay_figure(
    ours: pd.DataFrame, theirs: pd.DataFrame, *, colours: Mapping[str, str] | None = None, baseline: str = "scratch"
) -> "Figure":
    """Draw our means and intervals on the published means and their spread, where cells match.

    Shots lie on a log scale and "full" behind a break of the axis. A source has one colour and one marker for ours
    (solid, filled) and theirs (dashed, open). Published sources that we did not run are thin grey lines.

    Args:
        ours: Result rows, of one metric a target (see `report.select_headline`).
        theirs: From `overlay.published_rows`.
        colours: Source → colour for every source of ours; by default `figures.source_colours` of them.
        baseline: The source drawn in grey.

    Returns:
        A figure that belongs to no window and needs no closing.

    Raises:
        DataError: If no cell of ours is published.
    """
    import matplotlib
    from matplotlib.figure import Figure

    own, published, panels = _curves(ours, theirs)
    colours = colours or figures.source_colours(ours["source"].dropna(), baseline)
    styles = _styles(own, colours, baseline)
    positions = figures.shot_positions([*own["shots"], *published["shots"]])
    places, columns = _arrange(panels)
    rows = 1 + max(row for row, _ in places)
    width = 4.6 if len(panels) == 1 else 2.75 * columns + 0.4
    panel_width = 0.75 * width / columns * 72  # points
    others = (~published["matched"]).any()
    lines = {**styles, **{name: style for name, style in KEYS.items() if others or "others" not in name}}
    fitting = max(1, int(width * 72 / (0.5 * figures.LABEL_SIZE * max(map(len, lines)) + 34)))
    height = 2.55 * rows + 0.3 + 0.19 * math.ceil(len(lines) / fitting)
    with matplotlib.rc_context(figures.RC):
        figure = Figure(figsize=(width, height), layout="constrained")
        grid = figure.add_gridspec(rows, columns)
        for (row, column), panel in zip(places, panels, strict=True):
            axes = figure.add_subplot(grid[row, column])
            mine, their = (table[(table[PANEL] == panel).all(axis=1)] for table in (own, published))
            _draw_panel(axes, mine, their, positions, styles)
            figures.decorate_shots(axes, positions, panel_width)
            axes.set_title(figures.wrap(f"{panel[1]}\n{panel[2]}", panel_width), loc="left")
            axes.set_ylabel(f"{panel[3].replace('_', ' ').replace('auroc', 'AUROC')} (%)")
            if (row + 1, column) not in places:
                axes.set_xlabel("shots per class")
        figures.legend(figure, lines, fitting)
        figure.draw_without_rendering()
        figure.set_layout_engine(None)
    return figure


def _curves(ours: pd.DataFrame, theirs: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame, list[list[str]]]:
    """Our cells with "series" and "paper", all published cells of the panels with "matched", and the panels."""
    pairs = standardised_differences(ours, theirs)
    if pairs.empty:
        raise DataError(
            "no cell of these results is published",
            valid="targets, sources and architectures of studies.overlay.published_rows()",
            hint="name a study's architectures and sources as timm and the data modules do",
        )
    panels = sorted(map(list, set(pairs[PANEL].itertuples(index=False, name=None))))
    own, published = own_cells(comparable(ours)), published_cells(theirs)
    place = ["target", "source", "architecture", "metric"]
    own = own.merge(pairs[["paper", *place]].drop_duplicates(), on=place)
    settings = [name for name in own.columns if name not in (*CELL, "paper", "n", "mean", "sd", "low", "high")]
    settings = [name for name in varying(own, ["paper", *CELL], settings) if name in settings]
    extras = own[settings].astype("string").fillna("").agg(", ".join, axis=1) if settings else ""
    own = own.assign(series=own["source"] + np.where(extras == "", "", " (" + extras + ")"))
    drawn = ["paper", *place, "published_method", "published_protocol"]
    published = published.merge(pairs[drawn].drop_duplicates(), on=drawn, how="left", indicator="found")
    published = published.assign(matched=published["found"] == "both").drop(columns="found")
    keep = published.set_index(PANEL).index.isin([tuple(panel) for panel in panels])
    return own, published[keep], panels


def _arrange(panels: list[list[str]]) -> tuple[list[tuple[int, int]], int]:
    """Row and column of each panel: a column an architecture where there are two or three, else rows of three."""
    targets = list(dict.fromkeys((paper, target, metric) for paper, target, _, metric in panels))
    architectures = sorted({architecture for _, _, architecture, _ in panels})
    if len(architectures) in (2, 3):
        places = [(targets.index((panel[0], panel[1], panel[3])), architectures.index(panel[2])) for panel in panels]
        return places, len(architectures)
    columns = min(len(panels), 3)
    return [divmod(place, columns) for place in range(len(panels))], columns


def _styles(own: pd.DataFrame, colours: Mapping[str, str], baseline: str) -> dict[str, dict[str, Any]]:
    """Series → line style, with the source's colour and a marker of its own."""
    pairs = own[["source", "series"]].drop_duplicates().sort_values(["source", "series"])
    ranks = {source: rank for rank, source in enumerate(sorted(set(colours) - {baseline}))}
    within = pairs.groupby("source").cumcount()
    return {
        series: {
            "color": colours[source],
            "marker": figures.MARKERS[(ranks.get(source, 0) + 3 * int(i)) % len(figures.MARKERS)],
            "linestyle": "-",
        }
        for source, series, i in zip(pairs["source"], pairs["series"], within, strict=True)
    }


def _draw_panel(
    axes: "Axes",
    own: pd.DataFrame,
    published: pd.DataFrame,
    positions: Mapping[str, float],
    styles: Mapping[str, Mapping[str, Any]],
) -> None:
    """Draw grey, published and own lines of one panel, in this order, and set its limits."""
    left, right = min(positions.values()), max(positions.values())
    extent = max(right - left, 0.6)
    axes.set_xlim(left - 0.07 * extent, right + 0.07 * extent)
    context = ["source", "published_method", "published_protocol"]
    for _, line in published[~published["matched"]].groupby(context, dropna=False):
        x, (mean,), near = _points(line, positions, "published_mean")
        _line(axes, x, mean, near, KEYS["published: others"] | {"zorder": 2})
    first = own.sort_values("series").drop_duplicates("source")
    style_of = {name: styles[series] for name, series in zip(first["source"], first["series"], strict=True)}
    for (source, _, _), line in published[published["matched"]].groupby(context, dropna=False):
        style = style_of[source]
        x, (mean, sd), near = _points(line, positions, "published_mean", "published_sd")
        _band(axes, x, mean, sd, near, style["color"], 0.035 * extent)
        dashed: dict[str, Any] = {"color": style["color"], "linestyle": DASHED, "linewidth": 1.0, "zorder": 3}
        _line(axes, x, mean, near, dashed)
        axes.plot(
            x, mean, linestyle="none", marker=style["marker"], markersize=4.6, markerfacecolor="white",
            markeredgecolor=style["color"], markeredgewidth=0.9, zorder=3.5,
        )  # fmt: skip
    names = [name for name in styles if (own["series"] == name).any()]
    for i, name in enumerate(names):
        style = styles[name]
        x, (mean, low, high), near = _points(own[own["series"] == name], positions, "mean", "low", "high")
        x = x + (i - (len(names) - 1) / 2) * 0.022 * extent  # so that intervals stand side by side
        axes.vlines(x, low, high, color=style["color"], linewidth=1.3, zorder=4)
        _line(axes, x, mean, near, {"color": style["color"], "linestyle": "-", "linewidth": 1.6, "zorder": 5})
        axes.plot(
            x, mean, linestyle="none", marker=style["marker"], markersize=5.4, color=style["color"],
            markeredgecolor="white", markeredgewidth=0.5, zorder=6,
        )  # fmt: skip
    spread = published["published_sd"].where(published["matched"]).fillna(0)
    middle = published["published_mean"]
    shown = pd.DataFrame({"mean": middle, "low": middle - spread, "high": middle + spread})
    shown = pd.concat([shown, own[["mean", "low", "high"]]], ignore_index=True)
    axes.set_ylim(*figures.y_limits(shown, pd.DataFrame({"value": shown["mean"]})))


def _points(
    line: pd.DataFrame, positions: Mapping[str, float], *columns: str
) -> tuple[npt.NDArray[np.float64], list[npt.NDArray[np.float64]], npt.NDArray[np.bool_]]:
    """Positions of a line's points from left to right, columns in percent, and which points lie on the log scale."""
    line = line.assign(x=line["shots"].map(positions).astype(float)).sort_values("x")
    values = [100 * line[name].to_numpy(dtype=float) for name in columns]
    return line["x"].to_numpy(dtype=float), values, ~line["shots"].isin(["0", "full"]).to_numpy(dtype=bool)


def _line(
    axes: "Axes",
    x: npt.NDArray[np.float64],
    y: npt.NDArray[np.float64],
    near: npt.NDArray[np.bool_],
    style: Mapping[str, Any],
) -> None:
    """Join points on the log scale, and thinly those across the axis's break."""
    axes.plot(x[near], y[near], **style)
    for j in np.flatnonzero(~(near[1:] & near[:-1])):
        axes.plot(x[j : j + 2], y[j : j + 2], **{**style, "linestyle": ":", "linewidth": 0.8})


def _band(
    axes: "Axes",
    x: npt.NDArray[np.float64],
    mean: npt.NDArray[np.float64],
    sd: npt.NDArray[np.float64],
    near: npt.NDArray[np.bool_],
    colour: str,
    width: float,
) -> None:
    """Shade mean ± SD: a band on the log scale, a bar (of this width) for a point alone; nothing without an SD."""
    light: dict[str, Any] = {"color": colour, "alpha": 0.13, "linewidth": 0, "zorder": 1.5}
    axes.fill_between(x[near], (mean - sd)[near], (mean + sd)[near], **light)
    alone = ~near if near.sum() > 1 else np.ones_like(near)
    axes.bar(x[alone], 2 * np.nan_to_num(sd[alone]), width, (mean - sd)[alone], **light)
