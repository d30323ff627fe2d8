"""What the stored predictions say beyond the metrics: classes, calibration, operating points, subgroups."""

from typing import Any

import numpy as np
import pandas as pd

from datamodules.errors import DataError
from lightning_modules.thresholds import probabilities
from studies import figures
from studies.calibration import calibration_table
from studies.calibration_errors import confidences, reliability
from studies.calibration_figures import reliability_diagram
from studies.operating_points import operating_points
from studies.page import Block, Details, FigureBlock, Prose, Section, TableBlock
from studies.report_text import in_words, records
from studies.runs import RunFolder
from studies.sections.material import Material, interval_text
from studies.statistics import CONFIDENCE, summarise
from studies.stored_predictions import Predictions, read_predictions
from studies.subgroup_attributes import attributes_of
from studies.subgroups import compare
from studies.tables import write_table
from studies.temperature import fit_temperature

PREVALENCES = (0.01, 0.1)
"""At which predictive values are stated where the study names none."""
MOST_CLASSES = 30
"""Of which each has lines of its own."""


def predictions(material: Material) -> Section | None:
    """Of the best source's first run at each target's largest budget; classes over all seeds."""
    blocks: list[Block] = []
    for target, part in material.rows.groupby("target", sort=True):
        mine = material.main_protocol(part)
        largest = mine[mine["given"] == mine["given"].max()]
        means = summarise(largest, ["source"]).sort_values("mean", ascending=False)
        if means.empty or means["mean"].isna().all():
            continue
        best = largest[largest["source"] == means["source"].iloc[0]].sort_values(["seed", "fold"])
        run = RunFolder(material.run_folder(str(best["cell"].iloc[0])))
        what = f"{target}{in_words(str(largest['given'].iloc[0]))}, {best['source'].iloc[0]}"
        inner: list[Block] = [*_classes(material, best), *_of_run(material, str(target), run)]
        if inner:
            first = f"Seed {best['seed'].iloc[0]} of {what}; the table of classes is over all its seeds."
            blocks.append(Details(f"{what}", [Prose(first), *inner]))
    return Section("Classes, calibration and subgroups", blocks) if blocks else None


def _classes(material: Material, best: pd.DataFrame) -> list[Block]:
    rows = material.transfers[material.transfers["cell"].isin(best["cell"]) & material.transfers["subgroup"].isna()]
    rows = rows[rows["class_name"].notna() & rows["metric"].isin(["auroc", "average_precision", "f1", "recall"])]
    if rows.empty or rows["class_name"].nunique() > MOST_CLASSES:
        return []
    table = summarise(rows, ["class_name", "metric"])
    table = table.assign(text=[interval_text(row["mean"], row["low"], row["high"]) for row in records(table)])
    shown = table.pivot(index="class_name", columns="metric", values="text").reset_index()
    shown = shown.rename(columns=lambda name: str(name).replace("_", " ").replace("auroc", "AUROC"))
    return [TableBlock(shown, "Each class, percent with 95 % intervals over seeds.")]


def _of_run(material: Material, target: str, run: RunFolder) -> list[Block]:
    try:
        test = read_predictions(run.predictions)
    except DataError as error:
        return [Prose(f"No predictions: {error.problem}.")]
    try:
        validation = read_predictions(run.predictions, "validation")
    except DataError:
        validation = None
    blocks = _calibration(material, target, test, validation)
    if test.labels.ndim == 2:
        blocks += _operating_points(material, target, test, validation)
    return [*blocks, *_subgroups(material, target, run, test)]


def _calibration(material: Material, target: str, test: Predictions, validation: Predictions | None) -> list[Block]:
    temperatures = None
    if validation is not None and len(validation.labels):
        temperatures = fit_temperature(validation.logits, validation.labels, test.task)
    named = (test.logits, test.labels, test.patients, test.task, test.class_names, temperatures)
    table = calibration_table(*named)
    chosen = table[table["class_name"] == (test.class_names[0] if len(test.class_names) == 1 else "")]
    shown = pd.DataFrame(
        {
            "measure": chosen["metric"].str.replace("_", " "),
            "stage": chosen["stage"],
            "value": [_measure(row) for row in records(chosen)],
            "n": chosen["n"],
        }
    )
    files = [path.name for path in write_table(table, material.folder / f"calibration_{_safe(target)}", "Calibration.")]
    note = "" if temperatures is not None else " No temperature: there are no validation images."
    caption = f"Calibration with 95 % intervals over patients; calibration errors less their bias.{note}"
    return [TableBlock(shown, caption, files=files), *_reliability(material, target, test, temperatures)]


def _measure(row: dict[str, Any]) -> str:
    """A value with its interval; of calibration errors, whose interval leaves out their bias, less their bias."""
    value = row["debiased"] if "ece" in row["metric"] and pd.notna(row["debiased"]) else row["value"]
    if pd.isna(value):
        return "–"
    return f"{value:.3f}" + ("" if pd.isna(row["low"]) else f" [{row['low']:.3f}, {row['high']:.3f}]")


def _reliability(material: Material, target: str, test: Predictions, temperatures: np.ndarray | None) -> list[Block]:
    stages = {"as trained": test.logits}
    if temperatures is not None:
        stages["with temperature"] = test.logits / np.where(np.isnan(temperatures), 1.0, temperatures)
    points: dict[str, dict[str, pd.DataFrame]] = {}
    for stage, logits in stages.items():
        for name, (_, confidence, outcome) in confidences(logits, test.labels, test.task, test.class_names):
            if (test.task == "multiclass") == (name == ""):
                points.setdefault(name or "", {})[stage] = reliability(confidence, outcome)
    if not points:
        return []
    stem = material.folder / f"reliability_{_safe(target)}"
    _, svg, *_ = figures.save(reliability_diagram(points), stem)
    caption = f"Reliability on {target}: how often what is claimed comes about. Below the diagonal: it claims too much."
    return [FigureBlock(svg, caption, f"Reliability diagram on {target}", [f"{stem.name}.png", f"{stem.name}.pdf"])]


def _operating_points(
    material: Material, target: str, test: Predictions, validation: Predictions | None
) -> list[Block]:
    if validation is None or not len(validation.labels):
        return [Prose("No operating points: there are no validation images to choose thresholds on.")]
    stated = material.study.prevalence
    blocks: list[Block] = []
    sides = [(probabilities(part.logits, part.task), part.labels) for part in (validation, test)]
    prevalences = sorted(set(stated.values())) or list(PREVALENCES)
    table = operating_points(sides[0], sides[1], test.patients, test.class_names, prevalences=prevalences)
    if stated:
        known = table["prevalence"].isna() | (table["prevalence"] == table["label"].map(stated))
        table = table[known]
    files = [path.name for path in write_table(table, material.folder / f"operating_points_{_safe(target)}", "Points.")]
    shown = pd.DataFrame(
        {
            "label": table["label"],
            "on validation": [f"{row['rule']} {100 * row['target']:g} %" for row in records(table)],
            "on test": [
                row["metric"].upper() + f" at prevalence {100 * row['prevalence']:g} %"
                if pd.notna(row["prevalence"])
                else row["metric"]
                for row in records(table)
            ],
            "value": [interval_text(row["value"], row["low"], row["high"]) for row in records(table)],
            "n": table["n"],
            "note": table["note"],
        }
    )
    caption = "Operating points: thresholds chosen on validation, judged on test; percent with 95 % intervals."
    blocks.append(TableBlock(shown, caption, files=files))
    return blocks


def _subgroups(material: Material, target: str, run: RunFolder, test: Predictions) -> list[Block]:
    attributes = attributes_of(test.metadata)
    if not attributes:
        return []
    thresholds = run.read_summary().get("thresholds") or []
    named = (test.logits, test.labels, test.patients, attributes, test.task, test.class_names, thresholds)
    try:
        table, gaps = compare(*named)
    except DataError as error:
        return [Prose(f"No subgroups: {error.problem}.")]
    files = []
    for name, frame in (("subgroups", table), ("subgroup_gaps", gaps)):
        files.append([path.name for path in write_table(frame, material.folder / f"{name}_{_safe(target)}", name)])
    mean = table[table["label"] == ""] if (table["label"] == "").any() else table
    shown = pd.DataFrame(
        {
            **{name: mean[name] for name in ("attribute", "group", "label", "metric")},
            "value": [interval_text(row["value"], row["low"], row["high"]) for row in records(mean)],
            **{name: mean[name] for name in ("n", "n_patients", "note")},
        }
    )
    gap = pd.DataFrame(
        {
            **{name: gaps[name] for name in ("attribute", "label", "metric", "best", "worst")},
            "gap": [interval_text(row["value"], row["low"], row["high"]) for row in records(gaps)],
            "p (Holm)": [f"{value:.2g}" if pd.notna(value) else "–" for value in gaps["p_holm"]],
            "says": [_verdict(row) for row in records(gaps)],
            "note": gaps["note"],
        }
    )
    first = (
        "Subgroups, percent with 95 % intervals over patients. “Too few” is said where a group has too few patients."
    )
    second = "Gaps between the best and the worst group, in points; intervals allow for having picked the two."
    return [TableBlock(shown, first, files=files[0]), TableBlock(gap, second, files=files[1])]


def _verdict(gap: dict[str, Any]) -> str:
    """What a gap allows to say: none where an interval is known to be too narrow."""
    if pd.isna(gap["p_holm"]):
        return "too few"
    if "too optimistic" in gap["note"]:
        return "no claim"
    return "a gap" if gap["p_holm"] <= 1 - CONFIDENCE + 1e-12 else "not distinguishable"


def _safe(name: str) -> str:
    from urllib.parse import quote

    return quote(name, safe="")
