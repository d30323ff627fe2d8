"""The part of a study's report that says how deep to transfer; nothing where depth was not varied."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd

from studies import figures
from studies.depth import PLACE, POLICIES, best_depths, depth_curves, depth_values, regrets
from studies.depth_figures import depth_figure
from studies.report_text import budget_name, image_link, points, records
from studies.results import write_csv

CAPTION = (
    "The first k layer groups come from the source, held fixed (frozen) or trained on (trained); the rest is new. "
    "k = 0 is training from scratch. k* has the highest mean; its interval is a bootstrap over seeds. The regret of a "
    "policy is what it loses, in points, against choosing mode and depth by the other seeds."
)


def depth_section(rows: pd.DataFrame, folder: Path) -> list[str]:
    """Write `depth.csv`, `best_depth.csv`, `depth_regret.csv` and a figure a source; return the section's paragraphs.

    Args:
        rows: Headline rows: one metric a target, over all classes.
        folder: Folder of the report.

    Returns:
        Markdown paragraphs; none where fewer than three depths were run.
    """
    values = depth_values(rows)
    if values.empty:
        return []
    curves, best, lost = depth_curves(values), best_depths(values), regrets(values)
    for name, table in (("depth", curves), ("best_depth", best), ("depth_regret", lost)):
        write_csv(table, folder / f"{name}.csv")
    page = ["## Depth of transfer", CAPTION]
    for (source, architecture, metric), part in curves.groupby(["source", "architecture", "metric"], dropna=False):
        mine = best[(best["source"] == source) & (best["architecture"] == architecture) & (best["metric"] == metric)]
        stem = quote(f"depth_{source}_{architecture}_{metric}", safe="")
        png, _ = figures.save(depth_figure(part, mine), folder / stem)
        page.append(image_link(png, f"Depth of transfer from {source}"))
    return [*page, depth_table(best, lost)]


def depth_table(best: pd.DataFrame, lost: pd.DataFrame) -> str:
    """A Markdown table: a row a target, source and budget with k* of both modes and the regret of each policy."""
    found: dict[tuple[Any, ...], dict[str, str]] = {}
    for row in records(best):
        found.setdefault(_key(row), {})[f"k* {row['mode']}"] = _depth(row)
    for row in records(lost):
        found.setdefault(_key(row), {})[row["policy"]] = _regret(row)
    columns = [*(f"k* {mode}" for mode in ("frozen", "trained")), *POLICIES]
    lines = [["target", "source", "given", *columns], ["---"] * 3 + ["---:"] * len(columns)]
    lines += [[*key, *(cells.get(name, "–") for name in columns)] for key, cells in found.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return (str(row[PLACE[0]]), str(row[PLACE[1]]), budget_name(row))


def _depth(row: Mapping[str, Any]) -> str:
    interval = "" if pd.isna(row["low"]) else f" [{row['low']:g}, {row['high']:g}]"
    return f"{row['depth']}{interval}"


def _regret(row: Mapping[str, Any]) -> str:
    return f"{points(row['regret'], sign=True)} [{points(row['low'])}, {points(row['high'])}]"
