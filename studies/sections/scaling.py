"""Scale: the metric over the size of the source, power laws, and whether scale helps near more than far."""

import numpy as np
import pandas as pd

from datamodules.errors import DataError
from studies import figures
from studies.interaction import Scale, interaction
from studies.page import Block, FigureBlock, Prose, Section
from studies.power_law import PowerLaw, fit_power_law
from studies.report_text import budget_name, file_word, in_words, metric_name, records
from studies.scaling_figures import FittedCurve, scaling_curves
from studies.sections.material import Material, interval_text
from studies.statistics import summarise

CURVE = 50  # points of a drawn law


def scaling(material: Material) -> Section | None:
    """Curves where a source or a family of sources has several sizes; the interaction where domains are named."""
    rows = material.rows
    known = rows["source_n"].notna() & rows["source_n"].gt(0).fillna(False).astype(bool)
    moved = rows[known & ~rows["source"].eq(material.baseline).fillna(False).astype(bool)]
    blocks: list[Block] = [*_curves(material, moved), *_interaction(material, moved)]
    return Section("Scale of the source", blocks) if blocks else None


def _curves(material: Material, rows: pd.DataFrame) -> list[Block]:
    family = rows["family"].map(lambda name: material.study.domains.get(str(name), str(name)))
    rows = rows.assign(source_family=rows["family"], family=family.astype(str))
    sizes = rows.groupby(["target", "family", "architecture"], dropna=False)["source_n"].transform("nunique")
    rows = rows[sizes > 1]
    if rows.empty:
        return []
    blocks: list[Block] = []
    for given in dict.fromkeys([rows["given"].min(), rows["given"].max()]):
        mine = rows[rows["given"] == given]
        parts = [material.main_protocol(part) for _, part in mine.groupby(["target", "architecture"])]
        if not parts:
            continue
        mine = pd.concat(parts)
        several = mine["architecture"].nunique() > 1
        series = mine["family"] + (", " + mine["architecture"].astype(str) if several else "")
        mine = mine.assign(panel=mine["target"].astype(str), series=series, x=mine["source_n"].astype(float))
        summary = summarise(mine, ["panel", "series", "x"])
        fits, lines = [], []
        for (panel, name), part in mine.groupby(["panel", "series"]):
            law = fit_power_law(part["x"].to_numpy(), 1 - part["value"].to_numpy(float), part["seed"].to_numpy(float))
            lines.append(_law_line(str(panel), str(name), law))
            if not np.isnan(law.exponent):
                fits.append(_drawn(str(panel), str(name), law))
        metrics = [metric_name(name) for name in mine["metric"].unique()]
        metric = f"{metrics[0] if len(metrics) == 1 else 'test metric'} (%)"
        stem = material.folder / f"scaling_{file_word(str(given))}"
        colours = _colours(material, mine)
        figure = scaling_curves(summary, "images of the source", metric, fits=fits, colours=colours)
        _, svg, *_ = figures.save(figure, stem)
        caption = f"Test metric over the size of the source{in_words(str(given))}; bars: 95 % intervals over seeds."
        blocks.append(FigureBlock(svg, caption, caption, [f"{stem.name}.png", f"{stem.name}.pdf"]))
        about = f"Power laws of the error, 1 − metric{in_words(str(given))}; exponents with 95 % intervals."
        blocks.append(material.table(pd.DataFrame(lines), f"power_law_{file_word(str(given))}", about))
    return blocks


def _colours(material: Material, rows: pd.DataFrame) -> dict[str, str] | None:
    """Colour of each line: that of its source; None where a line is a domain of several sources."""
    named = rows[["series", "source_family"]].drop_duplicates()
    if named["series"].duplicated().any():
        return None
    return {str(series): material.colours[str(name)] for series, name in named.itertuples(index=False, name=None)}


def _law_line(panel: str, name: str, law: PowerLaw) -> dict[str, str]:
    interval = "–" if np.isnan(law.exponent) else _exponent(law)
    p = "–" if np.isnan(law.p) else f"{law.p:.2g}"
    return {"target": panel, "sources": name, "exponent": interval, "p (flat)": p, "verdict": law.verdict}


def _exponent(law: PowerLaw) -> str:
    return f"{law.exponent:.2f} [{law.low:.2f}, {law.high:.2f}]".replace("-", "−")


def _drawn(panel: str, name: str, law: PowerLaw) -> FittedCurve:
    used = law.points.loc[law.points["used"], "n"]
    x = np.geomspace(used.min(), used.max(), CURVE).clip(used.min(), used.max())
    return FittedCurve(panel, name, x, 1 - law.predict(x), f"exponent {_exponent(law)}")


def _interaction(material: Material, rows: pd.DataFrame) -> list[Block]:
    domains = material.study.domains
    if not domains or rows.empty:
        return []
    try:
        table = interaction(rows.assign(source=rows["family"]).drop(columns="given"), domains, Scale("source_n"))
    except DataError as error:
        return [Prose(f"No comparison of scale near and far: {error.problem}.")]
    if table.empty:
        return []
    shown = pd.DataFrame(
        [
            {
                "metric": row["metric"],
                "protocol": row["protocol"],
                "given": budget_name(row),
                "near, a decade": interval_text(row["near"], row["near_low"], row["near_high"], sign=True),
                "far, a decade": interval_text(row["far"], row["far_low"], row["far_high"], sign=True),
                "near − far": interval_text(row["difference"], row["low"], row["high"], sign=True),
                "p (Holm)": "–" if pd.isna(row["p_holm"]) else f"{row['p_holm']:.2g}",
                "verdict": row["verdict"],
            }
            for row in records(table)
        ]
    )
    caption = (
        "Points of the metric a tenfold source, near (source and target of one domain) and far, with 95 % intervals "
        "over seeds, for these sources and targets."
    )
    return [material.table(shown, "interaction", caption)]
