"""Results of each target: curves, means and spreads, gains over the baseline."""

from collections.abc import Sequence
from dataclasses import replace
from urllib.parse import quote

import pandas as pd

from datamodules.atomic import write_text
from studies.page import Block, FigureBlock, Section, TableBlock
from studies.report_markdown import KEYS, counts_caption, gain_section, gain_table, summary_table
from studies.report_text import in_words, metric_name
from studies.sections.material import Material, blocks_of, read_table
from studies.tables import to_latex

SUMMARY, GAINS = ("summary.csv", "summary.tex"), ("gains.csv", "gains.tex")


def targets(material: Material) -> Section | None:
    """A figure, a table of means and one of gains for each target."""
    tables, folder = material.tables, material.folder
    blocks: list[Block] = []
    for target, part in tables.summary.groupby("target"):
        metric = metric_name(str(part["metric"].iloc[0]))
        stem = f"few_shot_{quote(str(target), safe='')}"
        if (folder / f"{stem}.svg").is_file():
            caption = f"{target}: test {metric} over images a class. Points: single seeds; bars: 95 % intervals."
            files = [f"{stem}.{ending}" for ending in ("png", "pdf") if (folder / f"{stem}.{ending}").is_file()]
            blocks.append(FigureBlock(folder / f"{stem}.svg", caption, f"Curves of test {metric} on {target}", files))
        said = f"{target}: test {metric}. {counts_caption(part)}"
        blocks += _compact(blocks_of([summary_table(part, tables.settings)], folder, said), SUMMARY)
        gains = tables.gains[tables.gains["target"] == target]
        blocks += _compact(blocks_of(gain_section(gains, tables.settings, material.baseline), folder), GAINS)
    _write_latex(material)
    return Section("Results by target", blocks) if blocks else None


def _compact(blocks: Sequence[Block], files: Sequence[str]) -> list[Block]:
    """Tables without the columns that say the same in every row, which their captions say instead."""
    found: list[Block] = []
    for block in blocks:
        if isinstance(block, TableBlock):
            same = [name for name in KEYS if name != "source" and block.frame[name].nunique() == 1]
            words = [str(block.frame[name].iloc[0]) for name in same if name != "target"]
            caption = f"{block.caption} {', '.join(words)}." if words else block.caption
            shown = block.frame.drop(columns=[*same, *(["metric"] if block.frame["metric"].nunique() == 1 else [])])
            shown = shown.rename(columns=lambda name: in_words(name).removeprefix(" at ") if name.isdigit() else name)
            block = replace(block, frame=shown, caption=caption, files=files)
        found.append(block)
    return found


def _write_latex(material: Material) -> None:
    """The tables of all targets as LaTeX; their CSV has the exact numbers."""
    tables = material.tables
    about = {
        SUMMARY[1]: (summary_table(tables.summary, tables.settings), counts_caption(tables.summary)),
        GAINS[1]: (
            gain_table(tables.gains, tables.settings) if len(tables.gains) else "",
            f"Gains over {material.baseline} in points with 95 % intervals.",
        ),
    }
    for name, (text, caption) in about.items():
        frame: pd.DataFrame = read_table(text) if text else pd.DataFrame()
        if len(frame):
            write_text(material.folder / name, to_latex(frame, caption))
