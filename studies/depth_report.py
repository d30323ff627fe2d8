"""The part of a study's report that says how deep to transfer; nothing where depth was not varied."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd

from studies import figures
from studies.depth import MODES, PLACE, POLICIES, best_depths, depth_curves, depth_values, left_out, regrets
from studies.depth_figures import depth_figure
from studies.report_text import budget_name, image_link, points, records
from studies.results import write_csv
from studies.statistics import BUDGET, varying

CAPTION = (
    "The first k layer groups come from the source, held fixed (frozen) or trained on (trained); the rest is new. "
    "k = 0 is training from scratch. k* has the highest mean; its interval is a bootstrap over seeds. The regret of a "
    "policy is what it loses, in points, against choosing mode and depth by the other seeds."
)


def depth_section(rows: pd.DataFrame, folder: Path, colours: Mapping[str, str] | None = None) -> list[str]:
    """Write `depth.csv`, `best_depth.csv`, `depth_regret.csv` and a figure a source; return the section's paragraphs.

    Args:
        rows: Headline rows: one metric a target, over all classes.
        folder: Folder of the report.
        colours: Source → colour; by default `figures.source_colours` of all sources of the rows.

    Returns:
        Markdown paragraphs; none where fewer than three depths were run.
    """
    values, notes = depth_values(rows), left_out(rows)
    page = ["## Depth of transfer", *notes]
    if values.empty:
        return page if notes else []
    curves, best, lost = depth_curves(values), best_depths(values), regrets(values)
    for name, table in (("depth", curves), ("best_depth", best), ("depth_regret", lost)):
        write_csv(table, folder / f"{name}.csv")
    colours = colours or figures.source_colours(rows["source"].dropna())
    shown = ["target", *BUDGET]  # panels and lines of a figure; what else tells curves apart has a figure each
    apart = varying(values, [*shown, "source"], [name for name in PLACE if name not in (*shown, "source")])
    drawn = list(dict.fromkeys(["source", "architecture", "metric", *apart]))
    page.insert(1, f"{CAPTION} {_deepest(values)}")
    of_best = dict(list(best.groupby(drawn, dropna=False)))
    for key, part in curves.groupby(drawn, dropna=False):
        words = ["–" if pd.isna(value) else str(value) for value in part[drawn].iloc[0].tolist()]
        stem = quote("_".join(["depth", *words]), safe="")
        png, *_ = figures.save(depth_figure(part, of_best[key], colours[words[0]]), folder / stem)
        extras = [f"{name} {word}" for name, word in zip(drawn, words, strict=True) if name in apart]
        page.append(image_link(png, f"Depth of transfer from {', '.join([words[0], *extras])}"))
    return [*page, depth_table(best, lost, apart)]


def depth_table(best: pd.DataFrame, lost: pd.DataFrame, apart: Sequence[str] = ()) -> str:
    """A Markdown table: a row a target, source and budget with k* of both modes and the regret of each policy.

    Args:
        best: From `depth.best_depths`.
        lost: From `depth.regrets`.
        apart: Further columns of `PLACE` that tell the rows apart.
    """
    keys = ["target", "source", *apart]
    found: dict[tuple[str, ...], dict[str, str]] = {}
    for table, name, cell in ((best, "mode", _depth), (lost, "policy", _regret)):
        for row in records(table):
            key = (*("–" if pd.isna(row[column]) else str(row[column]) for column in keys), budget_name(row))
            found.setdefault(key, {})[row[name]] = cell(row)
    lines = [[*keys, "given", *(f"k* {mode}" for mode in MODES), *POLICIES]]
    lines += [["---"] * (len(keys) + 1) + ["---:"] * (len(MODES) + len(POLICIES))]
    lines += [[*key, *(cells.get(name, "–") for name in (*MODES, *POLICIES))] for key, cells in found.items()]
    return "\n".join(f"| {' | '.join(text.replace('|', chr(92) + '|') for text in line)} |" for line in lines)


def _deepest(values: pd.DataFrame) -> str:
    """What "all" means: the rows do not say how many layer groups a network has."""
    most = values.groupby(["architecture", "granularity"], dropna=False)["depth"].max()
    names = [
        f"{architecture}{' by blocks' if str(granularity) == 'block' else ''}: {depth}"
        for architecture, granularity, depth in most.reset_index().itertuples(index=False, name=None)
    ]
    return f"All groups are the most that any of these runs transferred ({', '.join(names)})."


def _depth(row: Mapping[str, Any]) -> str:
    interval = "" if pd.isna(row["low"]) else f" [{row['low']:g}, {row['high']:g}]"
    return f"{row['depth']}{interval}"


def _regret(row: Mapping[str, Any]) -> str:
    return f"{points(row['regret'], sign=True)} [{points(row['low'])}, {points(row['high'])}]"
