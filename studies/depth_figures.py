"""Figures of transfer depth: the metric against the number of transferred layer groups. Imports Matplotlib to draw."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from studies.figures import LABEL_SIZE, MARKERS, PALETTE, RC
from studies.report_text import budget_name, records

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

LINES: dict[str, Any] = {"frozen": "-", "trained": (0, (4, 2))}


def depth_figure(curves: pd.DataFrame, best: pd.DataFrame, colour: str = PALETTE[0]) -> "Figure":
    """Draw one panel a target, and a line for each budget and mode: means, 95 % intervals, and k* as a ring.

    Budgets are shades of the source's colour, the largest the darkest, and have markers of their own.

    Args:
        curves: From `depth.depth_curves`: "target", the budget, "mode", "depth", "mean", "low", "high" (fractions,
            drawn in percent). One source, architecture and metric.
        best: From `depth.best_depths`, of the same.
        colour: Of the source.

    Returns:
        A figure that belongs to no window and needs no closing.
    """
    import matplotlib
    from matplotlib.figure import Figure

    curves, best = (table.assign(budget=[budget_name(row) for row in records(table)]) for table in (curves, best))
    targets, budgets = list(dict.fromkeys(curves["target"])), _in_order(curves)
    colours = dict(zip(budgets, shades(colour, len(budgets)), strict=True))
    markers = {budget: MARKERS[place % len(MARKERS)] for place, budget in enumerate(budgets)}
    with matplotlib.rc_context(RC):
        width, entries = 1.2 + 2.5 * len(targets), _entries(budgets, colours, markers)
        longest = max(len(str(entry.get_label())) for entry in entries)
        fitting = max(1, int(width * 72 / (0.56 * LABEL_SIZE * longest + 36)))
        figure = Figure(figsize=(width, 2.9 + 0.2 * math.ceil(len(entries) / fitting)), layout="constrained")
        panels = figure.subplots(1, len(targets), sharey=True, squeeze=False)[0]
        for axes, target in zip(panels, targets, strict=True):
            for (budget, mode), line in curves[curves["target"] == target].groupby(["budget", "mode"]):
                shade = colours[budget]
                axes.fill_between(line["depth"], 100 * line["low"], 100 * line["high"], color=shade, alpha=0.13, lw=0)
                axes.plot(
                    line["depth"],
                    100 * line["mean"],
                    color=shade,
                    linestyle=LINES[mode],
                    marker=markers[budget],
                    ms=3.5,
                )
                place = best[(best["target"] == target) & (best["budget"] == budget) & (best["mode"] == mode)]["depth"]
                top = line[line["depth"].isin(place)]
                axes.plot(top["depth"], 100 * top["mean"], "o", ms=9, mfc="none", mec=shade)
            axes.set_title(target, loc="left")
            axes.set_xlabel("transferred layer groups")
            axes.set_xticks(sorted(curves["depth"].unique()))
        panels[0].set_ylabel(f"{str(curves['metric'].iloc[0]).replace('_', ' ').replace('auroc', 'AUROC')} (%)")
        figure.legend(handles=entries, loc="outside upper left", ncols=fitting, fontsize=LABEL_SIZE, frameon=False)
    return figure


def _entries(budgets: Sequence[str], colours: Mapping[str, Any], markers: Mapping[str, str]) -> list["Line2D"]:
    """What the legend says: budgets, modes, the ring."""
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], color=colours[name], marker=markers[name], ms=3.5, label=_shots(name)) for name in budgets]
    lines += [Line2D([], [], color="black", linestyle=LINES[mode], label=mode) for mode in LINES]
    return [*lines, Line2D([], [], color="black", marker="o", ms=9, mfc="none", lw=0, label="best depth")]


def shades(colour: str, number: int) -> list[tuple[float, float, float]]:
    """So many shades of a colour, from light to dark: lightness is told apart by all eyes; one is the colour itself."""
    from matplotlib.colors import to_rgb

    own = np.array(to_rgb(colour))
    steps = np.linspace(0.55, -0.6, number) if number > 1 else np.zeros(1)  # towards white, towards black
    mixed = [own + step * (1 - own) if step > 0 else own * (1 + step) for step in steps]
    return [(float(red), float(green), float(blue)) for red, green, blue in mixed]


def _in_order(curves: pd.DataFrame) -> list[str]:
    """Names of the budgets, the smallest first."""
    order = curves.sort_values(["num_images", "fraction", "shots"], key=lambda column: pd.to_numeric(column, "coerce"))
    return list(dict.fromkeys(order["budget"]))


def _shots(budget: str) -> str:
    return f"{budget} shot{'' if budget == '1' else 's'} a class" if budget.isdigit() else budget
