"""Headline numbers with intervals over pre-training, seeds and patients together, from the stored predictions."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from datamodules.errors import DataError
from studies.headline import difference, headline
from studies.measured import Measured, from_rows, measure, read_runs
from studies.page import Block, Prose, Section, TableBlock
from studies.report_text import in_words, records
from studies.sections.material import Material, interval_text
from studies.statistics import holm, varying
from studies.tables import write_table

P = "p (Holm)"
SETTINGS = ("dials", "label_policy", "split_policy")
"""What a target's test set or training labels may differ in; each has headlines of its own."""
MOST_CELLS = 4e8
"""Logits that are read for one target and budget at most (3 GB); beyond it the intervals come from the rows alone."""


def claims(material: Material) -> Section | None:
    """One table: sources at the smallest and the largest budget of each target, each with what its interval covers."""
    lines: list[dict[str, Any]] = []
    notes: list[str] = []
    for _, part in material.rows.groupby("target", sort=True):
        mine = material.main_protocol(part)
        given = [str(name) for name in mine["given"].cat.categories if (mine["given"] == name).any()]
        for name in dict.fromkeys([given[0], given[-1]]):
            for setting, chosen in _settings(mine[mine["given"] == name]):
                try:
                    measured, note = _measured(material, chosen)
                    lines += [{**line, **setting} for line in _lines(material, chosen, name, measured)]
                except DataError as error:
                    note = f"no headline: {error.problem}"
                notes += [f"{chosen['target'].iloc[0]}{in_words(name)}: {note}"] if note else []
    if not lines:
        return Section("Headline numbers", [_listed(notes)]) if notes else None
    frame = pd.DataFrame(lines)
    shown = [name for name in SETTINGS if name in frame]
    frame[shown] = frame[shown].fillna("")
    frame = frame[["target", *shown, *(name for name in frame if name not in ("target", *shown))]]
    frame = frame.rename(columns=lambda name: name.replace("_", " "))
    frame[P] = [f"{value:.2g}" if pd.notna(value) else "–" for value in holm(frame[P].to_numpy(float))]
    files = [path.name for path in write_table(frame, material.folder / "headline", "Headline numbers.")]
    caption = (
        "Percent with 95 % intervals over what the column “interval covers” says; differences in points on equal seeds "
        "and patients, p corrected over this table. Patients count here as well as runs, so p may differ from pairs "
        "below, which compare runs alone. “These weights only”: there was one pre-training, so the interval "
        "holds for its weights. Of several protocols the one with the most runs is shown."
    )
    blocks: list[Block] = [TableBlock(frame, caption, files=files)]
    if notes:
        blocks.append(_listed(notes))
    return Section("Headline numbers", blocks)


def _listed(notes: list[str]) -> Prose:
    return Prose("\n".join(f"- {note}" for note in notes))


def _settings(rows: pd.DataFrame) -> Iterator[tuple[dict[str, str], pd.DataFrame]]:
    """Rows of each value of those `SETTINGS` that vary, and these values."""
    names = varying(rows, ["target"], SETTINGS)
    if not names:
        yield {}, rows
        return
    for values, part in rows.groupby(names, dropna=False, sort=False):
        texts = ["" if pd.isna(value) else str(value) for value in np.asarray(values)]
        yield dict(zip(names, texts, strict=True)), part


def _measured(material: Material, rows: pd.DataFrame) -> tuple[Measured, str]:
    """Predictions of all runs under the same draws of patients; the rows alone, and why, where that is impossible."""
    cells = rows.drop_duplicates("cell")
    folders = [material.run_folder(str(cell)) for cell in cells["cell"]]
    try:
        if rows["fold"].notna().any():
            raise DataError("folds have different test sets")
        if _size(folders) > MOST_CELLS:
            raise DataError("there are too many predictions to resample")
        measured = measure(read_runs(folders))
        return replace(measured, facts=measured.facts.assign(source=cells["source"].to_numpy())), ""
    except DataError as error:
        return from_rows(rows), f"the interval covers seeds alone: {error.problem}"


def _size(folders: list[Path]) -> float:
    import pyarrow.parquet as pq

    paths = [folder / "predictions.parquet" for folder in folders]
    sizes = [pq.read_metadata(path) for path in paths if path.is_file()]
    return float(sum(size.num_rows * size.num_columns for size in sizes))


def _lines(material: Material, rows: pd.DataFrame, given: str, measured: Measured) -> Iterator[dict[str, Any]]:
    baseline = material.baseline
    others = rows.loc[~rows["source"].eq(baseline).fillna(False).astype(bool), "protocol"]
    protocol = str(others.iloc[0]) if material.protocols > 1 and len(others) else ""
    metric = str(rows["metric"].iloc[0])
    names = [str(name) for name in measured.facts["source"].unique()]
    reference = measured.of(baseline) if baseline in names else None
    for source in sorted(names, key=lambda name: (name == baseline, name)):
        ours = measured.of(source)
        value = _row(headline(ours), metric)
        gain = None
        if reference is not None and source != baseline:
            try:
                gain = _row(difference(ours, reference), metric)
            except DataError:  # no seed in common
                gain = None
        if value is None:
            continue
        yield {
            "target": rows["target"].iloc[0],
            **({"protocol": protocol} if protocol else {}),
            "given": given,
            "source": source,
            "metric": metric.replace("_", " ").replace("auroc", "AUROC"),
            "value": interval_text(value["value"], value["low"], value["high"]),
            f"over {baseline}": _gain(gain),
            P: np.nan if gain is None else gain["p"],
            "runs": value["runs"],
            "interval covers": value["covers"],
            "holds for": value["scope"],
        }


def _gain(gain: dict[str, Any] | None) -> str:
    return "–" if gain is None else interval_text(gain["value"], gain["low"], gain["high"], sign=True)


def _row(table: pd.DataFrame, metric: str) -> dict[str, Any] | None:
    found = table[(table["metric"] == metric) & (table["class_name"] == "")]
    return records(found)[0] if len(found) else None
