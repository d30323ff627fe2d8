"""The report of a study: its rows as tables and figures, and one page that says what they allow to say."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pandas as pd

from datamodules.atomic import write_text
from studies.jobs import lost_cells
from studies.page import Details, FigureBlock, Page, Section, render_page
from studies.report import make_tables, write_report
from studies.results import ResultsError
from studies.runner import folder_of
from studies.sections.answer import answer
from studies.sections.beside_published import beside_published
from studies.sections.claims import claims
from studies.sections.cost import cost
from studies.sections.depth import depth
from studies.sections.material import Material
from studies.sections.predictions import predictions
from studies.sections.provenance import provenance
from studies.sections.scaling import scaling
from studies.sections.sources import sources
from studies.sections.targets import targets
from studies.spec import Study
from studies.store import collect

SECTIONS: tuple[Callable[[Material], Section | None], ...] = (
    claims, targets, sources, scaling, depth, beside_published, predictions, cost, provenance,
)  # fmt: skip
"""Sections of the page, in their order; each is left out where it has nothing to say."""
BASELINE = "scratch"


def write_study_report(study: Study, runs_dir: Path, wandb: str = "off") -> list[str]:
    """Write the study's `report/` folder: index.html, report.md, tables as CSV and LaTeX, figures.

    Args:
        study: The study.
        runs_dir: Folder of all experiments.
        wandb: Mode of the mirror; "off" sends nothing.

    Returns:
        Lines to print: where the report is.
    """
    material = read_material(study, runs_dir)
    folder = material.folder
    chosen = headline_metrics(material.transfers) | study.metrics
    written = write_report(
        material.transfers,
        folder,
        title=study.title,
        metric_by_target=chosen,
        baseline=BASELINE,
        chance=chance_levels(material.transfers, chosen),
        failures=material.failures,
        everything=material.frame,  # pre-training too
    )
    found = [section(material) for section in SECTIONS]
    # Not by their rows: a pre-training without outputs has none.
    cells = sum(folder_of(study, cell, material.runs_dir).finished() for cell in study.cells)
    facts = {
        "finished cells": f"{cells:,} of {len(study.cells):,}",
        "seeds": str(material.rows["seed"].nunique()),
        "±": "SD over seeds",
        "[ ]": "95 % interval",
    }
    page = Page(study.title, answer(material), facts, [section for section in found if section is not None])
    write_text(folder / "index.html", render_page(page))
    lines = [f"report: {folder / 'index.html'} (text: {written.report})"]
    drawn = dict.fromkeys([*written.figures, *(path for part in page.sections for path in figure_files(part, folder))])
    return lines if wandb == "off" else [*lines, *mirror(material, list(drawn), wandb)]


def figure_files(section: Section, folder: Path) -> list[Path]:
    """Files of a section's figures, in all formats: those of this report, where the folder may hold older ones."""
    found: list[Path] = []
    blocks = list(section.blocks)
    while blocks:
        block = blocks.pop(0)
        if isinstance(block, Details):
            blocks = [*block.blocks, *blocks]
        elif isinstance(block, FigureBlock):
            found += [*([block.svg] if isinstance(block.svg, Path) else []), *(folder / name for name in block.files)]
    return found


def read_material(study: Study, runs_dir: Path) -> Material:
    """Collect a study's rows and what its report is made from.

    Raises:
        ResultsError: There are no rows, or broken ones.
    """
    known = {cell.name for cell in study.cells}
    frame = collect(runs_dir / study.name)
    # Results of a cell on other data, protocols direct and zero_shot, are named after it: CELL/direct/...
    frame = frame[frame["cell"].str.split("/").str[0].isin(known)].reset_index(drop=True)
    failures = [{"cell": failure.cell, "reason": failure.reason} for failure in lost_cells(study, runs_dir)]
    unfinished = sum(not folder_of(study, cell, runs_dir).finished() for cell in study.cells) - len(failures)
    if unfinished:
        failures.append({"cell": f"{unfinished} cells", "reason": "not run yet"})
    transfers = frame[frame["protocol"] != "pretrain"].reset_index(drop=True)
    if transfers.empty:
        raise ResultsError(
            f"no transfer of {study.name} has a result yet",
            where=str(runs_dir / study.name),
            hint=f"python cli.py study status {study.path} says what has failed or waits",
        )
    folder = runs_dir / study.name / "report"
    tables = make_tables(transfers, headline_metrics(transfers) | study.metrics, BASELINE)
    return Material(study, runs_dir, folder, frame, transfers, tables, BASELINE, failures)


def mirror(material: Material, figures: Sequence[Path], mode: str) -> list[str]:
    """Send the aggregate rows and figures to W&B; returns a line that says what became of it, none where it is off."""
    from studies.wandb_study import mirror_study

    study = material.study
    config = {"study": study.name, "title": study.title, "cells": len(study.cells)}
    places = {"project": "farshot", "mode": mode, "folder": material.folder}
    found = mirror_study(study.name, material.transfers, figures, config=config, **places)  # type: ignore[arg-type]
    later = f" (wandb sync {material.folder}/wandb/offline-run-* sends it)" if found == "offline" else ""
    return [f"W&B: {found}{later}"] if found != "off" else []


def headline_metrics(frame: pd.DataFrame) -> dict[str, str]:
    """The metric that stands for each target: accuracy of classes, mean AUROC of labels (accuracy hides rare ones)."""
    labels = set(frame.loc[frame["metric"] == "mean_balanced_accuracy", "target"])
    return {target: "mean_auroc" if target in labels else "accuracy" for target in set(frame["target"])}


def chance_levels(frame: pd.DataFrame, metrics: Mapping[str, str]) -> dict[str, float]:
    """What guessing gives for each target's metric: 1 / classes for accuracy, 0.5 for AUROC; others are not known."""
    classes = frame[(frame["metric"] == "auroc")].groupby("target")["class_name"].nunique()
    known = {
        "accuracy": {str(target): 1 / count for target, count in classes.items()},
        "balanced_accuracy": {str(target): 1 / count for target, count in classes.items()},
    }
    names = {target: metric.removeprefix("test/") for target, metric in metrics.items()}
    found = {target: 0.5 if "auroc" in name else known.get(name, {}).get(target) for target, name in names.items()}
    return {target: level for target, level in found.items() if level is not None}
