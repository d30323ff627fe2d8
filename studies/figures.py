"""Figures of a study: few-shot curves, a panel for each target and setting. Imports Matplotlib to draw."""

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito (2008), "Color universal design": told apart by colour-blind eyes. Yellow last: faint on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
GREY = "#7F7F7F"
MARKERS = "osD^vPXph<>*"
PANELS_PER_ROW = 4
LABEL_SIZE = 8.0  # points
CHANCE: dict[str, Any] = {"color": GREY, "linewidth": 0.9, "linestyle": (0, (1, 2))}
RC: Any = {
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9.0,
    "xtick.labelsize": LABEL_SIZE,
    "ytick.labelsize": LABEL_SIZE,
    "legend.fontsize": LABEL_SIZE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.6,
    "text.parse_math": False,  # a name may hold a dollar sign
    "svg.hashsalt": "farshot",  # else every SVG has new random ids
    "pdf.fonttype": 42,  # TrueType: journals turn away the default, Type 3
}


def source_colours(sources: Iterable[str], baseline: str = "scratch") -> dict[str, str]:
    """Give every source its colour, by its place among the sorted names; the baseline is grey.

    Pass all sources of a study at once, so that a source has one colour in all of its figures. With more than
    eight sources colours repeat, and markers tell the lines apart.
    """
    names = sorted(set(sources) - {baseline})
    return {baseline: GREY, **{name: PALETTE[i % len(PALETTE)] for i, name in enumerate(names)}}


def few_shot_curves(
    summary: pd.DataFrame,
    values: pd.DataFrame,
    *,
    colours: Mapping[str, str] | None = None,
    chance: Mapping[str, float] | None = None,
    baseline: str = "scratch",
) -> "Figure":
    """Draw the metric over the number of shots: means, 95 % intervals and, faintly, each seed.

    Shots lie on a log scale and "full" behind a break of the axis. There is one panel for each pair of
    "target" and "setting", and one line for each "series". Lines are named at their ends in a single panel,
    where the names fit, else in one legend above the panels. An interval that is much wider than the spread
    of the values leaves its panel.

    Args:
        summary: One row a point: text columns "target", "setting" ("" for none), "series", "source", "shots"
            ("5", "full") and "metric"; reals "mean", "low", "high": fractions in [-1, 1], drawn in percent;
            NaN is not drawn.
        values: One row a seed: "target", "setting", "series", "shots", "value" (a fraction).
        colours: Source → colour for every source; by default `source_colours` of the sources in `summary`.
        chance: Target → the metric of a guess, a fraction; drawn as a dotted line.
        baseline: The source drawn in dashed grey.

    Returns:
        A figure that belongs to no window and needs no closing.
    """
    import matplotlib
    from matplotlib.figure import Figure

    styles = _series_styles(summary, colours or source_colours(summary["source"], baseline), baseline)
    places, columns = _arrange(summary)
    rows, single = 1 + max(row for row, _ in places.values()), len(places) == 1
    longest = max(len(name) for name in styles)
    width = 4.3 + 0.065 * longest if single else (3.2 if columns < 3 else 2.3) * columns + 0.5
    panel_width = (4.0 if single else 0.8 * width / columns) * 72  # points
    titles = {panel: wrap("\n".join(filter(None, panel)), panel_width) for panel in places}
    height = (
        3.1
        if single
        else (2.5 if columns < 3 else 2.1) + 0.16 * max(title.count("\n") + 1 for title in titles.values())
    )
    guesses = {target: guess for target, guess in (chance or {}).items() if any(target == t for t, _ in places)}
    positions = shot_positions(summary["shots"])
    with matplotlib.rc_context(RC):
        figure = Figure(layout="constrained")
        grid = figure.add_gridspec(rows, columns)
        named = False
        for panel, (row, column) in places.items():
            axes = figure.add_subplot(grid[row, column])
            figure.set_size_inches(width, height * rows)
            inside = summary[(summary["target"] == panel[0]) & (summary["setting"] == panel[1])]
            dots = values[(values["target"] == panel[0]) & (values["setting"] == panel[1])]
            ends = _draw_panel(axes, inside, dots, positions, styles)
            if panel[0] in guesses:
                y = 100 * guesses[panel[0]]
                axes.axhline(y, zorder=1, **CHANCE)
                bottom, top = axes.get_ylim()
                axes.set_ylim(min(bottom, y - 0.03 * (top - bottom)), max(top, y + 0.03 * (top - bottom)))
                ends["chance"] = (axes.get_xlim()[1], y)
            decorate_shots(axes, positions, panel_width)
            axes.set_title(titles[panel], loc="left")
            if column == 0 or summary["metric"].nunique() > 1:
                name = inside["metric"].iloc[0].replace("_", " ").replace("auroc", "AUROC")
                axes.set_ylabel(f"{name} (%)")
            if (row + 1, column) not in places.values():
                axes.set_xlabel("shots per class")
            named = single and label_ends(figure, axes, ends, styles)
        if not named:
            lines = {**styles, **({"chance": CHANCE} if guesses else {})}
            fitting = max(1, int(width * 72 / (0.56 * LABEL_SIZE * longest + 36)))
            figure.set_size_inches(width, height * rows + 0.2 * math.ceil(len(lines) / fitting))
            legend(figure, lines, fitting)
        figure.draw_without_rendering()
        figure.set_layout_engine(None)  # the layout is done: the same in every file, and not paid for again
    return figure


def _arrange(summary: pd.DataFrame) -> tuple[dict[tuple[str, str], tuple[int, int]], int]:
    """Give each panel (target, setting) its (row, column): a grid where both vary, else rows of four."""
    panels = sorted(set(zip(summary["target"], summary["setting"], strict=True)))
    targets, settings = (sorted(set(names)) for names in zip(*panels, strict=True))
    if min(len(targets), len(settings)) > 1:
        return {(t, s): (settings.index(s), targets.index(t)) for t, s in panels}, len(targets)
    columns = min(len(panels), PANELS_PER_ROW)
    return {panel: divmod(i, columns) for i, panel in enumerate(panels)}, columns


def shot_positions(shots: Iterable[str]) -> dict[str, float]:
    """Place shots on an axis: log10 of the number; "0" and "full" stand apart at the left and right."""
    numbers = sorted({int(text) for text in shots if text.isdigit()} - {0})
    logs = [math.log10(number) for number in numbers]
    gap = max(0.3, 0.2 * (logs[-1] - logs[0])) if logs else 0.5
    places = {str(number): x for number, x in zip(numbers, logs, strict=True)}
    first, last = (logs[0], logs[-1]) if logs else (0.0, 0.0)
    wanted = {"0": first - gap, **places, "full": last + gap}
    return {text: x for text, x in wanted.items() if text in set(shots)}


def spread_labels(wanted: Sequence[float], distance: float, low: float = 0.0, high: float = 1.0) -> np.ndarray | None:
    """Move label positions apart, as little as possible (least squares), keeping their order.

    Args:
        wanted: Where the labels would be, any order.
        distance: The smallest distance between two labels.
        low: The lowest allowed position.
        high: The highest allowed position.

    Returns:
        The positions in the order of `wanted`, or None where they do not fit between `low` and `high`.
    """
    from scipy.optimize import isotonic_regression

    if (len(wanted) - 1) * distance > high - low:
        return None
    order = np.argsort(wanted, kind="stable")
    steps = distance * np.arange(len(wanted))
    # Positions at least `distance` apart are steps plus a rising sequence, which isotonic regression finds.
    rising = isotonic_regression(np.asarray(wanted, dtype=float)[order] - steps).x
    placed = np.empty(len(wanted))
    placed[order] = np.clip(rising, low, high - steps[-1]) + steps
    return placed


def save(figure: "Figure", path_stem: Path | str) -> tuple[Path, Path, Path]:
    """Write `<path_stem>.png` (200 dpi), `.svg` and `.pdf`, without dates or random ids; return their paths."""
    import matplotlib

    png, svg, pdf = (Path(f"{path_stem}.{kind}") for kind in ("png", "svg", "pdf"))
    with matplotlib.rc_context(RC):
        figure.savefig(png, dpi=200, facecolor="white")
        figure.savefig(svg, facecolor="white", metadata={"Date": None})
        figure.savefig(pdf, facecolor="white", metadata={"CreationDate": None})
    return png, svg, pdf


def _series_styles(summary: pd.DataFrame, colours: Mapping[str, str], baseline: str) -> dict[str, dict[str, Any]]:
    """Series → line style, the baseline last; markers follow the source, then the series of one source."""
    pairs = summary[["source", "series"]].drop_duplicates()
    ranks = {source: i for i, source in enumerate(sorted(set(colours) - {baseline}))}
    pairs = pairs.assign(last=pairs["source"] == baseline).sort_values(["last", "source", "series"])
    within = pairs.groupby("source").cumcount()
    return {
        series: {
            "color": colours[source],
            "marker": MARKERS[(ranks[source] + 3 * int(i)) % len(MARKERS)] if source != baseline else "o",
            "linestyle": "--" if source == baseline else "-",
        }
        for series, source, i in zip(pairs["series"], pairs["source"], within, strict=True)
    }


def _draw_panel(
    axes: "Axes",
    summary: pd.DataFrame,
    values: pd.DataFrame,
    positions: Mapping[str, float],
    styles: Mapping[str, Mapping[str, Any]],
) -> dict[str, tuple[float, float]]:
    """Draw all lines of one panel and set its limits; return each series' last point (x, percent)."""
    present = [name for name in styles if (summary["series"] == name).any()]
    left, right = min(positions.values()), max(positions.values())
    step = min(0.014 * max(right - left, 0.6), 0.11 / max(len(present), 1))
    ends = {}
    for i, name in enumerate(present):
        shift = (i - (len(present) - 1) / 2) * step  # so that intervals of several series stand side by side
        style, points = styles[name], summary[(summary["series"] == name) & summary["mean"].notna()]
        points = points.assign(x=points["shots"].map(positions)).sort_values("x")
        dots = values[values["series"] == name]
        x, mean = points["x"].to_numpy(dtype=float), 100 * points["mean"].to_numpy(dtype=float)
        low, high = 100 * points["low"].to_numpy(dtype=float), 100 * points["high"].to_numpy(dtype=float)
        dots_x = dots["shots"].map(positions).to_numpy(dtype=float) + shift
        axes.plot(
            dots_x, 100 * dots["value"].to_numpy(dtype=float), linestyle="none", marker="o", markersize=3.2,
            color=style["color"], alpha=0.4, markeredgewidth=0, zorder=3.5,
        )  # fmt: skip
        axes.vlines(x + shift, low, high, color=style["color"], linewidth=1.1, alpha=0.75, zorder=3)
        line = {"color": style["color"], "zorder": 4}
        on_scale = ~points["shots"].isin(["0", "full"]).to_numpy()
        axes.plot((x + shift)[on_scale], mean[on_scale], linewidth=1.5, linestyle=style["linestyle"], **line)
        for j in np.flatnonzero(~(on_scale[1:] & on_scale[:-1])):  # across a break of the axis
            axes.plot((x + shift)[j : j + 2], mean[j : j + 2], linewidth=0.9, linestyle=":", **line)
        axes.plot(
            x + shift, mean, linestyle="none", marker=style["marker"], markersize=4.6, color=style["color"],
            markeredgecolor="white", markeredgewidth=0.5, zorder=5,
        )  # fmt: skip
        if len(points):
            ends[name] = (float(x[-1] + shift), float(mean[-1]))
    margin = 0.06 * max(right - left, 0.6)
    axes.set_xlim(left - margin, right + margin)
    axes.set_ylim(*y_limits(summary, values))
    return ends


def y_limits(summary: pd.DataFrame, values: pd.DataFrame) -> tuple[float, float]:
    """Limits in percent that hold all values, and intervals up to a quarter of the values' range beyond."""
    seen = 100 * pd.concat([values["value"], summary["mean"]]).dropna().to_numpy(dtype=float)
    if not seen.size:
        return 0.0, 100.0
    low, high = float(seen.min()), float(seen.max())
    room = max(0.25 * (high - low), 1.0)
    bottom = max(low - room, float(np.nanmin([low, 100 * summary["low"].min()])))
    top = min(high + room, float(np.nanmax([high, 100 * summary["high"].max()])))
    pad = 0.05 * max(top - bottom, 1.0)
    return max(bottom - pad, min(low, 0.0) - pad), min(top + pad, 100.0 + pad)


def decorate_shots(axes: "Axes", positions: Mapping[str, float], width: float) -> None:
    """Put ticks at the shots, without labels that would touch (panel `width` in points), and axis breaks."""
    left, right = axes.get_xlim()
    texts: list[str] = []
    edge = math.inf
    for text, x in reversed(list(positions.items())):  # from the right, where labels are longest
        centre, half = (x - left) / (right - left) * width, 0.3 * LABEL_SIZE * len(text)
        fits = centre + half + 3 <= edge
        texts.append(text if fits else "")
        edge = centre - half if fits else edge
    axes.set_xticks(list(positions.values()), texts[::-1])
    for end, inner in (("0", 1), ("full", -2)):
        if end in positions and len(positions) > 1:
            neighbour = list(positions.values())[inner]
            axes.text(
                (positions[end] + neighbour) / 2, 0.0, "//", transform=axes.get_xaxis_transform(),
                ha="center", va="center", fontsize=8, zorder=6,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.2},
            )  # fmt: skip


def label_ends(
    figure: "Figure",
    axes: "Axes",
    ends: Mapping[str, tuple[float, float]],
    styles: Mapping[str, Mapping[str, Any]],
) -> bool:
    """Name each line at the right edge, moved apart where names would touch; False where they do not fit.

    Args:
        figure: The figure, whose layout is settled first.
        axes: Its only panel.
        ends: Name → last point of the line, in the units of the axes.
        styles: Name → line style with "color"; grey for a name that has none.
    """
    if not ends:
        return False
    figure.draw_without_rendering()  # settles the layout, so that the panel's height is known
    height = axes.get_window_extent().height * 72 / figure.dpi
    # Fractions of the panel, which place names alike on linear and on log axes.
    last = axes.transAxes.inverted().transform(axes.transData.transform(list(ends.values())))
    placed = spread_labels(last[:, 1].tolist(), 1.3 * LABEL_SIZE / height, 0.02, 0.98)
    if placed is None:
        return False
    for name, (x, y), place in zip(ends, last, placed, strict=True):
        colour = styles.get(name, CHANCE)["color"]
        axes.plot(
            [x, 1.02], [y, place], color=colour, linewidth=0.6, alpha=0.6, clip_on=False, zorder=2,
            transform=axes.transAxes,
        )  # fmt: skip
        axes.text(
            1.03, place, name, va="center_baseline", fontsize=LABEL_SIZE, transform=axes.transAxes,
            color="black" if colour == PALETTE[-1] else colour,
        )  # fmt: skip
    return True


def legend(figure: "Figure", styles: Mapping[str, Mapping[str, Any]], columns: int) -> None:
    """Name lines above all panels, so many beside each other."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], label=name, markersize=4.6, **style) for name, style in styles.items()]
    figure.legend(handles=handles, loc="outside upper left", ncols=columns, frameon=False)


def wrap(text: str, width: float) -> str:
    """Break long titles to the panel's width in points."""
    letters = max(12, int(width / (0.56 * RC["axes.titlesize"])))
    return "\n".join(textwrap.fill(line, letters) for line in text.split("\n"))
