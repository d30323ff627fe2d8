"""Sources against each other: heat maps of gains, and all pairs with their corrected p."""

from collections.abc import Iterator

import pandas as pd

from studies import figures
from studies.comparisons import DEPTHS
from studies.heat_map import heat_map
from studies.page import Block, FigureBlock, Prose, Section, TableBlock
from studies.report_text import file_word, in_words, points, records
from studies.sections.material import Material, interval_text
from studies.statistics import varying
from studies.tables import write_table

MAIN = ("target", "architecture", "protocol", "image_size", "selection", *DEPTHS)
"""What `Material.main_protocol` decides for each target."""
APART = ("study", "split_policy", "dials", "label_policy")
"""Settings beside it, of which each value has a map of its own."""


def sources(material: Material) -> Section | None:
    """Heat maps at the smallest and the largest budget, and the table of all pairs of sources."""
    blocks: list[Block] = [*_maps(material), *_pairs(material)]
    return Section("What differs", blocks) if blocks else None


def _maps(material: Material) -> list[Block]:
    """Maps of the differences to the baseline; all on one scale of colours."""
    table = material.comparisons
    if table.empty or material.rows["target"].nunique() * material.rows["source"].nunique() < 4:
        return []
    parts = [material.main_protocol(part) for _, part in material.rows.groupby("target")]
    chosen = pd.concat(parts)
    names = [str(name) for name in chosen["given"].cat.categories if (chosen["given"] == name).any()]
    moved = chosen[~chosen["source"].eq(material.baseline).fillna(False).astype(bool)]
    mine = table[(table["source_reference"] == material.baseline) & _keys(table).isin(set(_keys(moved)))]
    mine = mine[mine["given"].isin([names[0], names[-1]])]
    if mine.empty:
        return []
    apart = varying(mine, ["source", "target", "given"], [name for name in APART if name in mine])
    limit = float(mine["difference"].abs().max())
    drawn = [
        _map(material, part, given, words, limit)
        for given in dict.fromkeys([names[0], names[-1]])
        for words, part in _each(mine[mine["given"] == given], apart)
    ]
    return [block for block in drawn if block is not None]


def _keys(rows: pd.DataFrame) -> pd.Series:
    """What `MAIN` is in each row, as one text."""
    return rows[list(MAIN)].astype("string").fillna("").agg("\n".join, axis=1)


def _each(rows: pd.DataFrame, apart: list[str]) -> Iterator[tuple[str, pd.DataFrame]]:
    """The rows of each combination of settings, with its name: "dials a"; all rows under "" where none varies."""
    if not apart:
        yield "", rows
        return
    for _, part in rows.groupby(apart, dropna=False):
        values = part[apart].iloc[0]
        yield ", ".join(f"{name} {'–' if pd.isna(value) else value}" for name, value in values.items()), part


def _map(material: Material, rows: pd.DataFrame, given: str, words: str, limit: float) -> Block | None:
    if len(rows) < 2:
        return None
    where = in_words(given) + (f" ({words})" if words else "")
    if rows.duplicated(["source", "target"]).any():
        return Prose(f"No map of the gains{where}: runs of one source and target differ in more; the table has them.")
    short = {"not distinguishable": "n.d.", "higher": "", "lower": ""}
    notes = [short.get(str(verdict), "no claim") for verdict in rows["verdict"]]
    stem = material.folder / "_".join(["gains", *map(file_word, filter(None, [given, words]))])
    label = f"gain over {material.baseline} (points)"
    figure = heat_map(rows.assign(note=notes), "difference", label, diverging=True, limit=limit)
    _, svg, *_ = figures.save(figure, stem)
    caption = (
        f"Gain over {material.baseline}{where}, in points: sources by targets. n.d.: not distinguishable, by p "
        f"corrected for all comparisons with {material.baseline} in the table below. Hatched: not run."
    )
    cells = [f"{row['source']} to {row['target']} {points(row['difference'], sign=True)}" for row in records(rows)]
    alt = f"Heat map of gains over {material.baseline}{where}, in points: {', '.join(cells[:12])}"
    return FigureBlock(svg, caption, alt, [f"{stem.name}.png", f"{stem.name}.pdf"])


def _pairs(material: Material) -> list[Block]:
    if material.rows["source"].nunique() < 2:
        return []
    table = material.comparisons
    if table.empty:
        return [Prose("No two sources have a run with the same target, protocol, budget and seed.")]
    settings = ("architecture", "protocol", "image_size", "selection", *APART)
    apart = [name for name in settings if name in table and table[name].nunique(dropna=False) > 1]
    shown = pd.DataFrame(
        {
            "target": table["target"],
            **{name: table[name] for name in apart},
            "given": table["given"],
            "source": table["source"],
            "reference": table["source_reference"],
            "difference": [
                interval_text(row["difference"], row["low"], row["high"], sign=True) for row in records(table)
            ],
            "p (Holm)": [f"{value:.2g}" if pd.notna(value) else "–" for value in table["p_holm"]],
            "pairs": table["n"],
            "verdict": table["verdict"],
        }
    )
    files = write_table(shown, material.folder / "comparisons", "All pairs of sources on equal seeds.")
    tested = table["p_holm"].notna()
    asked = int((tested & table["source_reference"].eq(material.baseline)).sum())
    others = int(tested.sum()) - asked
    families = f"the {asked} tests against {material.baseline}" if asked else ""
    among = f"the {others} tests among sources" if others else ""
    caption = (
        "Source minus reference, in points, on equal seeds with 95 % intervals; the verdict goes by p, corrected "
        f"(Holm) over {' and, apart from them, over '.join(filter(None, [families, among]))}; the intervals are not "
        "corrected. They are for other seeds on the same test set."
    )
    return [TableBlock(shown, caption, files=[path.name for path in files])]
