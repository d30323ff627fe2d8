"""Words and tables of reports: budgets, percentages, Markdown."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd


def budget(shots: Any, num_images: Any, fraction: Any) -> tuple[tuple[int, float], str]:
    """Rank and name of what a cell was given: shots, then images, then a share of them, then everything."""
    if not pd.isna(num_images):
        return (1, float(num_images)), f"{num_images} images"
    if not pd.isna(fraction) and fraction != 1:
        return (2, float(fraction)), f"{100 * fraction:g} %"
    if pd.isna(shots) and pd.isna(fraction):
        return (4, 0.0), "–"
    return ((3, 0.0), "full") if pd.isna(shots) or shots == "full" else ((0, float(shots)), str(shots))


def budget_name(row: Mapping[str, Any]) -> str:
    """Name of what a row's cell was given."""
    return budget(row["shots"], row["num_images"], row["fraction"])[1]


def in_words(budget: str) -> str:
    """A budget's name as the end of a phrase."""
    if budget.isdigit():
        return f" at {budget} shot{'' if budget == '1' else 's'}"
    words = {"full": " on the full training set", "–": ""}
    return words.get(budget, f" with {budget} of the images" if budget.endswith("%") else f" with {budget}")


def metric_name(metric: str) -> str:
    """A metric as readers write it: mean_auroc → "mean AUROC"."""
    return metric.replace("_", " ").replace("auroc", "AUROC")


def file_word(text: str) -> str:
    """A budget or setting as part of a file's name: "10 %" → "10percent"."""
    return quote(text.replace(" %", "percent").replace("%", "percent").replace(" ", ""), safe="")


def pivot(table: pd.DataFrame, keys: Sequence[str], cell: Callable[[Mapping[str, Any]], str]) -> str:
    """A Markdown table: a row for each value of `keys`, a column a budget; `cell` writes a row's cell."""
    budgets = [str(name) for name in table["budget"].cat.categories if (table["budget"] == name).any()]
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for row in records(table):
        key = tuple("–" if pd.isna(row[name]) else str(row[name]) for name in keys)
        lines.setdefault(key, {})[row["budget"]] = cell(row)
    rows = [[*keys, *budgets], ["---"] * len(keys) + ["---:"] * len(budgets)]
    rows += [[*key, *(cells.get(budget, "–") for budget in budgets)] for key, cells in lines.items()]
    return "\n".join(f"| {' | '.join(text.replace('|', chr(92) + '|') for text in row)} |" for row in rows)


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a table as mappings."""
    return [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]


def mean_sd(mean: float, sd: float) -> str:
    """Mean ± SD in percent, the mean alone without an SD."""
    return points(mean) if pd.isna(sd) else f"{points(mean)} ± {points(sd)}"


def points(fraction: float, sign: bool = False) -> str:
    """A fraction in percent with one decimal, more where it would round to a zero that it is not."""
    percent = round(100 * fraction, 6) + 0.0  # a zero, where rounding left almost one
    digits = ".1g" if 0 < abs(percent) < 0.05 else ".1f"
    return format(percent, f"+{digits}" if sign else digits).replace("-", "−")


def image_link(path: Path, alternative: str) -> str:
    """Markdown of a figure beside the page."""
    return f"![{alternative}]({quote(path.name)})"
