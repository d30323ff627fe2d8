"""Our points on the published ones, and how far apart they are."""

import pandas as pd

from studies import figures
from studies.overlay import NOTE, published_rows, standardised_differences
from studies.overlay_figures import overlay_figure
from studies.page import Block, FigureBlock, Prose, Section, TableBlock
from studies.report_text import budget_name, mean_sd, records
from studies.sections.material import Material, interval_text
from studies.tables import write_table


def beside_published(material: Material) -> Section | None:
    """A figure and a table, where the study names published results."""
    name = material.study.published
    if name is None or material.study.scale is not None:  # a rehearsal bears the names of what it stands for
        return None
    theirs = published_rows()
    theirs = theirs[theirs["study"] == name]
    ours = material.transfers[material.transfers["protocol"] != "direct"]
    table = standardised_differences(ours, theirs)
    if table.empty:
        return Section("Beside the published results", [Prose(f"No cell of ours is among those of {name}.")])
    blocks: list[Block] = []
    drawn = material.tables.rows
    matched = standardised_differences(drawn, theirs)
    if len(matched):
        stem = material.folder / "published"
        _, svg, *_ = figures.save(overlay_figure(drawn, theirs, colours=material.colours), stem)
        caption = "Ours (solid, with 95 % intervals) on the published means ± SD (dashed, open)."
        blocks.append(FigureBlock(svg, caption, caption, ["published.png", "published.pdf"]))
    files = [path.name for path in write_table(table, material.folder / "published", "Beside the published results.")]
    shown = pd.DataFrame(
        [
            {
                **{key: row[key] for key in ("target", "source", "architecture")},
                "given": budget_name({"num_images": pd.NA, "fraction": pd.NA, **row}),
                "metric": row["metric"],
                "ours": f"{mean_sd(row['mean'], row['sd'])} (n = {row['n']})",
                "published": f"{mean_sd(row['published_mean'], row['published_sd'])} (n = {row['published_n']})",
                "difference": interval_text(row["difference"], row["low"], row["high"], sign=True),
                "in SDs": "–" if pd.isna(row["standardised"]) else f"{row['standardised']:+.1f} ({row['unit']})",
                "caveats": row["caveats"],
            }
            for row in records(table)
        ]
    )
    blocks.append(TableBlock(shown, f"Differences to the published means, in points. {NOTE}", files=files))
    return Section("Beside the published results", blocks)
