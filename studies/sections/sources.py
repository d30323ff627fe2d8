"""Sources against each other: the heat map of gains, and all pairs with their corrected p."""

import pandas as pd

from studies import figures
from studies.heat_map import heat_map
from studies.page import Block, FigureBlock, Prose, Section, TableBlock
from studies.report import verdict
from studies.report_text import in_words, records
from studies.sections.material import Material, interval_text, source_labels
from studies.tables import write_table


def sources(material: Material) -> Section | None:
    """Heat maps at the smallest and the largest budget, and the table of all pairs of sources."""
    blocks: list[Block] = [*_maps(material), *_pairs(material)]
    return Section("What differs", blocks) if blocks else None


def _maps(material: Material) -> list[Block]:
    parts = [material.main_protocol(part) for _, part in material.rows.groupby("target")]
    chosen = pd.concat(parts) if parts else material.rows
    if chosen["target"].nunique() * chosen["source"].nunique() < 4:
        return []
    blocks: list[Block] = []
    names = [str(name) for name in chosen["given"].cat.categories if (chosen["given"] == name).any()]
    gains = material.tables.gains
    missing = {name: None for name in ("source_n", "source_dials", "method") if name not in gains}
    gains = gains.assign(source=source_labels(gains.assign(**missing)))
    for given in dict.fromkeys([names[0], names[-1]]):
        cells = chosen[chosen["given"] == given]
        keys = cells[["target", "source", "architecture", "protocol"]].drop_duplicates()
        mine = gains[gains["budget"] == given].merge(keys, on=["target", "source", "architecture", "protocol"])
        if mine.duplicated(["source", "target"]).any():  # another setting varies: the tables have it
            continue
        if len(mine) < 2:
            continue
        notes = ["n.d." if verdict(row) == "not distinguishable" else "" for row in records(mine)]
        stem = material.folder / f"gains_{given.replace(' ', '')}".replace("%", "percent")
        label = f"gain over {material.baseline} (points)"
        _, svg, *_ = figures.save(heat_map(mine.assign(note=notes), "gain", label, diverging=True), stem)
        caption = f"Gain over {material.baseline}{in_words(given)}, in points; n.d.: not distinguishable."
        alt = f"Heat map of gains, sources by targets{in_words(given)}"
        blocks.append(FigureBlock(svg, caption, alt, [f"{stem.name}.png", f"{stem.name}.pdf"]))
    return blocks


def _pairs(material: Material) -> list[Block]:
    rows = material.rows
    if rows["source"].nunique() < 2:
        return []
    table = material.comparisons
    if table.empty:
        return [Prose("No two sources have a run with the same target, protocol, budget and seed.")]
    apart = [name for name in ("architecture", "protocol") if name in table and table[name].nunique() > 1]
    shown = pd.DataFrame(
        {
            "target": table["target"],
            **{name: table[name] for name in apart},
            "given": table["given"],
            "source": table["source"],
            "reference": table["source_reference"],
            "difference": [interval_text(*values, sign=True) for values in _numbers(table)],
            "p (Holm)": [f"{value:.2g}" if pd.notna(value) else "–" for value in table["p_holm"]],
            "pairs": table["n"],
            "verdict": table["verdict"],
        }
    )
    write_table(shown, material.folder / "comparisons", "All pairs of sources on equal seeds.")
    tests = int(table["p_holm"].notna().sum())
    caption = (
        f"Differences in points on equal seeds with 95 % intervals; the verdict goes by p, corrected for all {tests} "
        "tests of this table (Holm). Intervals are for other seeds on the same test set."
    )
    return [TableBlock(shown, caption, files=["comparisons.csv", "comparisons.tex"])]


def _numbers(table: pd.DataFrame) -> list[tuple[float, float, float]]:
    return list(table[["difference", "low", "high"]].itertuples(index=False, name=None))
