"""What the sections of a study's page are made from, and the way from a report's Markdown to the page's blocks."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pandas as pd

from studies.comparisons import compare
from studies.figures import source_colours
from studies.page import Block, FigureBlock, Prose, TableBlock
from studies.report_markdown import Tables
from studies.report_text import budget, budget_name, points, records
from studies.runner import folder_of
from studies.spec import Study
from studies.statistics import BUDGET
from studies.tables import write_table

IMAGE = re.compile(r"!\[(?P<alt>[^]]*)\]\((?P<file>[^)]+)\)")


@dataclass(frozen=True)
class Material:
    """A study's results.

    Attributes:
        study: The study.
        runs_dir: Folder of all experiments.
        folder: Folder of the report.
        frame: All result rows, pre-training too.
        transfers: Those of transfers.
        tables: Headline rows, summary and gains of the transfers.
        baseline: The source that gains are measured against.
        failures: Cells without a result: "cell" and "reason".
    """

    study: Study
    runs_dir: Path
    folder: Path
    frame: pd.DataFrame
    transfers: pd.DataFrame
    tables: Tables
    baseline: str
    failures: Sequence[Mapping[str, str]]

    @cached_property
    def rows(self) -> pd.DataFrame:
        """Headline rows: one metric a target, over all classes.

        Further columns: "given", the budget's name, in order; "family", the source's name, while "source" tells apart
        what was made from it: "near, n = 400".
        """
        found = [budget(*(row[name] for name in BUDGET)) for row in records(self.tables.rows[list(BUDGET)])]
        names = [name for _, name in sorted(set(found))]
        given = pd.Categorical([name for _, name in found], categories=names, ordered=True)
        rows = self.tables.rows.assign(given=given, family=self.tables.rows["source"])
        return rows.assign(source=source_labels(rows))

    @cached_property
    def protocols(self) -> int:
        """Number of protocols, training from scratch not counted."""
        others = self.rows[~self.rows["source"].eq(self.baseline).fillna(False).astype(bool)]
        return int(others["protocol"].nunique())

    @cached_property
    def comparisons(self) -> pd.DataFrame:
        """All pairs of sources, p corrected over those with the baseline and over the others (`comparisons.compare`).

        The baseline is always the reference. A further column, "given", is the budget's name; within a target and
        protocol the smallest budget is first.
        """
        rows = self.rows.drop(columns=["given", "family"])
        table = compare(rows, "source", self.baseline) if rows["source"].nunique() > 1 else pd.DataFrame()
        if table.empty:
            return table
        order = self.rows["given"].cat.categories
        names = pd.Categorical([budget_name(row) for row in records(table)], categories=order, ordered=True)
        place = ["target", "architecture", "protocol", "given"]
        table = turned(table, table["source"].eq(self.baseline).to_numpy(dtype=bool)).assign(given=names)
        return table.sort_values(place, kind="stable", ignore_index=True).astype({"given": object})

    @cached_property
    def colours(self) -> dict[str, str]:
        """Colour of every source of the study, the same in all figures."""
        return source_colours(self.tables.rows["source"].dropna(), self.baseline)

    def run_folder(self, cell: str) -> Path:
        """Folder of a cell's run."""
        return folder_of(self.study, cell, self.runs_dir).path

    def table(self, frame: pd.DataFrame, name: str, caption: str) -> TableBlock:
        """A table of the page, with itself as CSV and LaTeX beside it."""
        files = [path.name for path in write_table(frame, self.folder / name, caption)]
        return TableBlock(frame, caption, files=files)

    def main_protocol(self, rows: pd.DataFrame) -> pd.DataFrame:
        """Rows of the protocol, architecture and settings that most runs share, and those from scratch beside them.

        A sentence on sources must not mix protocols; the tables have the others.
        """
        names = ["architecture", "protocol", "image_size", "granularity", "transfer_depth", "frozen_depth", "selection"]
        scratch = rows["source"].eq(self.baseline).fillna(False).astype(bool)
        others = rows[~scratch] if (~scratch).any() else rows
        sizes = others.groupby(names, dropna=False).size().rename("runs").reset_index()
        # Of a sweep of depths, whose protocols have equally many runs, plain fine-tuning.
        sizes = sizes.sort_values(
            ["runs", "frozen_depth", "transfer_depth"], ascending=[False, True, False], kind="stable"
        )
        key = sizes.iloc[0][names].to_dict()
        mine = pd.Series(True, index=rows.index)
        for name, value in key.items():
            same = rows[name].isna() if pd.isna(value) else rows[name].eq(value).fillna(False)
            # From scratch there is one protocol, which has no depth.
            mine &= (same | scratch if name not in ("architecture", "image_size") else same).astype(bool)
        return rows[mine]


def turned(table: pd.DataFrame, where: np.ndarray) -> pd.DataFrame:
    """Comparisons with the source and its reference exchanged in some rows.

    Args:
        table: From `studies.comparisons.compare` by "source".
        where: Which rows to turn, bool (N,).
    """
    table = table.copy()
    for name in ("source", "mean"):
        own, other = table[name].copy(), table[f"{name}_reference"].copy()
        table[name], table[f"{name}_reference"] = own.where(~where, other), other.where(~where, own)
    low, high = table["low"].copy(), table["high"].copy()
    table["low"], table["high"] = low.where(~where, -high), high.where(~where, -low)
    table["difference"] = table["difference"].where(~where, -table["difference"])
    table["verdict"] = table["verdict"].where(~where, table["verdict"].replace({"higher": "lower", "lower": "higher"}))
    return table


def source_labels(rows: pd.DataFrame) -> pd.Series:
    """Names of sources that tell apart several sizes, cuts or methods of one: "near, n = 400"."""
    labels = rows["source"].astype(object)
    for column, word in (("source_n", "n = "), ("source_dials", ""), ("method", "")):
        several = rows.groupby("source", dropna=False)[column].transform("nunique") > 1
        shown = several & rows[column].notna()
        labels = labels.where(~shown, labels + f", {word}" + rows[column].astype(str))
    return labels


def blocks_of(paragraphs: Iterable[str], folder: Path, caption: str = "") -> list[Block]:
    """Turn paragraphs of Markdown as the report writes them into blocks: figures, tables, prose.

    Args:
        paragraphs: Text, a pipe table, or a link to a PNG beside the report that has an SVG of the same name.
        folder: Folder of the report.
        caption: Of tables that no line of text precedes.
    """
    blocks: list[Block] = []
    for text in paragraphs:
        image = IMAGE.fullmatch(text)
        if image is not None:
            stem = Path(unquote(image["file"])).stem
            files = [f"{stem}.{ending}" for ending in ("png", "pdf") if (folder / f"{stem}.{ending}").is_file()]
            blocks.append(FigureBlock(folder / f"{stem}.svg", image["alt"], image["alt"], files))
        elif text.startswith("|"):
            before = blocks.pop() if blocks and isinstance(blocks[-1], Prose) else None
            blocks.append(TableBlock(read_table(text), before.text if isinstance(before, Prose) else caption))
        elif not text.startswith("#"):
            blocks.append(Prose(text))
    return blocks


def read_table(text: str) -> pd.DataFrame:
    """A pipe table of Markdown as a frame of texts."""
    lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines()]
    cells = [[cell.strip().replace("\\|", "|") for cell in line] for line in lines]
    return pd.DataFrame(cells[2:], columns=cells[0])


def interval_text(value: float, low: float, high: float, sign: bool = False) -> str:
    """A fraction in percent with its interval: "12.3 [10.1, 14.2]"; a dash where it is undefined."""
    if pd.isna(value):
        return "–"
    interval = "" if pd.isna(low) else f" [{points(low, sign)}, {points(high, sign)}]"
    return points(value, sign) + interval


def joined(names: Sequence[Any]) -> str:
    """Names in a sentence: "a", "a and b", "a, b and c"; beyond four, "a, b, c and 3 others"."""
    words = [str(name) for name in names]
    if len(words) > 4:
        words = [*words[:3], f"{len(words) - 3} others"]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
