"""Results of each target: curves, means and spreads, gains over the baseline."""

from urllib.parse import quote

from studies.page import Block, FigureBlock, Section, TableBlock
from studies.report import counts_caption, gain_section, summary_table
from studies.sections.material import Material, blocks_of


def targets(material: Material) -> Section | None:
    """A figure, a table of means and one of gains for each target."""
    tables, folder = material.tables, material.folder
    blocks: list[Block] = []
    for target, part in tables.summary.groupby("target"):
        metric = str(part["metric"].iloc[0]).replace("_", " ").replace("auroc", "AUROC")
        stem = f"few_shot_{quote(str(target), safe='')}"
        if (folder / f"{stem}.svg").is_file():
            caption = f"{target}: test {metric} over images a class. Points: single seeds; bars: 95 % intervals."
            files = [f"{stem}.{ending}" for ending in ("png", "pdf") if (folder / f"{stem}.{ending}").is_file()]
            blocks.append(FigureBlock(folder / f"{stem}.svg", caption, f"Curves of test {metric} on {target}", files))
        shown = blocks_of(
            [summary_table(part, tables.settings)], folder, f"{target}: test {metric}. {counts_caption(part)}"
        )
        gains = tables.gains[tables.gains["target"] == target]
        blocks += [*shown, *blocks_of(gain_section(gains, tables.settings, material.baseline), folder)]
    files = ["summary.csv", "gains.csv"]
    last = next((place for place in range(len(blocks) - 1, -1, -1) if isinstance(blocks[place], TableBlock)), None)
    if last is not None:
        table = blocks[last]
        assert isinstance(table, TableBlock)
        blocks[last] = TableBlock(table.frame, table.caption, table.sides, table.sortable, files)
    return Section("Results by target", blocks) if blocks else None
