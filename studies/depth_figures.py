"""Figures of transfer depth: the metric against the number of transferred layer groups. Imports Matplotlib to draw."""

from typing import TYPE_CHECKING, Any

import pandas as pd

from studies.figures import LABEL_SIZE, MARKERS, PALETTE, RC
from studies.report_text import budget_name, records

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LINES: dict[str, Any] = {"frozen": "-", "trained": (0, (4, 2))}


def depth_figure(curves: pd.DataFrame, best: pd.DataFrame) -> "Figure":
    """Draw one panel a target, and a line for each budget and mode: means, 95 % intervals, and k* as a ring.

    Args:
        curves: From `depth.depth_curves`: "target", the budget, "mode", "depth", "mean", "low", "high" (fractions,
            drawn in percent). One source, architecture and metric.
        best: From `depth.best_depths`, of the same.

    Returns:
        A figure that belongs to no window and needs no closing.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    curves, best = (table.assign(budget=[budget_name(row) for row in records(table)]) for table in (curves, best))
    targets, budgets = list(dict.fromkeys(curves["target"])), _in_order(curves)
    colours = {budget: PALETTE[place % len(PALETTE)] for place, budget in enumerate(budgets)}
    markers = {budget: MARKERS[place % len(MARKERS)] for place, budget in enumerate(budgets)}
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(1.2 + 2.5 * len(targets), 3.1), layout="constrained")
        panels = figure.subplots(1, len(targets), sharey=True, squeeze=False)[0]
        for axes, target in zip(panels, targets, strict=True):
            for (budget, mode), line in curves[curves["target"] == target].groupby(["budget", "mode"]):
                colour = colours[budget]
                axes.fill_between(line["depth"], 100 * line["low"], 100 * line["high"], color=colour, alpha=0.13, lw=0)
                axes.plot(
                    line["depth"],
                    100 * line["mean"],
                    color=colour,
                    linestyle=LINES[mode],
                    marker=markers[budget],
                    ms=3.5,
                )
                place = best[(best["target"] == target) & (best["budget"] == budget) & (best["mode"] == mode)]["depth"]
                top = line[line["depth"].isin(place)]
                axes.plot(top["depth"], 100 * top["mean"], "o", ms=9, mfc="none", mec=colour)
            axes.set_title(target, loc="left")
            axes.set_xlabel("transferred layer groups")
            axes.set_xticks(sorted(curves["depth"].unique()))
        panels[0].set_ylabel(f"{str(curves['metric'].iloc[0]).replace('_', ' ').replace('auroc', 'AUROC')} (%)")
        entries = [
            Line2D([], [], color=colours[name], marker=markers[name], ms=3.5, label=_shots(name)) for name in budgets
        ]
        entries += [Line2D([], [], color="black", linestyle=LINES[mode], label=mode) for mode in LINES]
        entries += [Line2D([], [], color="black", marker="o", ms=9, mfc="none", lw=0, label="best depth")]
        figure.legend(handles=entries, loc="outside upper left", ncols=len(entries), fontsize=LABEL_SIZE, frameon=False)
    return figure


def _in_order(curves: pd.DataFrame) -> list[str]:
    """Names of the budgets, the smallest first."""
    order = curves.sort_values(["num_images", "fraction", "shots"], key=lambda column: pd.to_numeric(column, "coerce"))
    return list(dict.fromkeys(order["budget"]))


def _shots(budget: str) -> str:
    return f"{budget} shot{'' if budget == '1' else 's'} a class" if budget.isdigit() else budget
