"""A study's report mirrored to Weights & Biases: one run with aggregate rows, figures and the study's settings."""

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import pandas as pd

from datamodules.errors import DataError
from lightning_modules.callbacks import wandb_mirror
from lightning_modules.callbacks.wandb_mode import Mode, choose_mode, plain_name
from studies.runs import VOLATILE, flatten
from studies.statistics import summarise, varying

log = logging.getLogger("farshot.wandb")

JOB_TYPE = "report"
KINDS = (".png", ".svg", ".pdf")
#: What makes a cell of the table. Nothing that names an image, a patient, a folder or a single run.
CELL = (
    *("source", "source_n", "source_dials", "architecture", "method", "target", "protocol"),
    *("transfer_depth", "frozen_depth", "granularity", "shots", "num_images", "fraction", "dials"),
    *("image_size", "selection", "split_policy", "label_policy", "metric"),
)
#: Settings that say where something lies: their names, wherever they stand in a study.
PLACES = frozenset(key.rpartition(".")[2] for key in VOLATILE)
ABSOLUTE = re.compile(r"[/~\\]|\.\.?[/\\]|[A-Za-z]:[/\\]|file:")


def mirror_study(
    name: str,
    frame: pd.DataFrame,
    figures: Sequence[Path],
    *,
    config: Mapping[str, Any],
    project: str,
    mode: Mode,
    folder: Path,
) -> str:
    """Send a study's report to W&B: a run "report" of job type report, in the group of the study.

    It holds the table `cells` (mean, SD, n and 95 % interval of each cell), the figures as an artifact, and the
    study's settings. No prediction, id, table row or path leaves the machine. A server that is dead or slow costs
    three short waits at most (`wandb_mirror.PATIENCE`), and a warning.

    Args:
        name: The study: the W&B group.
        frame: Result rows of `studies.results`.
        figures: The report's figures: PNG, SVG or PDF files.
        config: The study's settings; places of files and workers are left out.
        project: W&B project.
        mode: auto = online with a key, else offline; off = nothing.
        folder: The report's folder; the mirror's files are kept in its `wandb/` (send them with `wandb sync`).

    Returns:
        What came of it: "online", "offline" or "off".

    Raises:
        DataError: If a file is no figure.
    """
    others = [path for path in figures if Path(path).suffix not in KINDS]
    if others:
        raise DataError(f"{others[0]} is no figure and is not mirrored", where="figures", valid=KINDS)
    chosen = choose_mode(mode)
    if chosen == "off":
        return "off"
    table = aggregate(frame)
    run = wandb_mirror.open_run(
        chosen, folder=folder, project=project, group=name, name=JOB_TYPE, job_type=JOB_TYPE, config=shown(config)
    )
    if run is None:
        return "off"
    _, reason = wandb_mirror.within_patience(lambda: _send(run, name, table, figures))
    if reason is not None:
        log.warning("W&B: %s; what was not sent is kept for: wandb sync %s/wandb/*run-*", reason, folder)
    return "offline" if run.settings.mode == "offline" else "online"


def aggregate(frame: pd.DataFrame) -> pd.DataFrame:
    """Summarise result rows to one row a cell and metric, over all classes and images.

    Returns:
        `CELL` (and "pretrain_seed" where one seed has several), "n" (seeds), "mean", "sd", "low", "high" (95 % t
        interval of the mean over seeds; missing for one seed). Of names that are paths, the last part.
    """
    rows = frame[frame["class_name"].isna() & frame["subgroup"].isna()]
    by = [*CELL, *varying(rows, [*CELL, "seed", "fold"], ["pretrain_seed"])]
    cells = summarise(rows, by)
    names = ("source", "target", "architecture")
    return cells.assign(**{name: cells[name].map(_without_folders) for name in names})


def shown(config: Mapping[str, Any]) -> dict[str, Any]:
    """A study's settings as dotted keys, without places, workers and devices; of paths, the last part."""
    flat = {key: value for key, value in flatten(config).items() if key.rpartition(".")[2] not in PLACES}
    return {key: _without_folders(value) for key, value in flat.items()}


def _without_folders(value: Any) -> Any:
    """The value; of a path (absolute, from here or from home, or one that exists) its last part."""
    if isinstance(value, list | tuple):
        return [_without_folders(item) for item in value]
    if isinstance(value, str | PurePath):
        text = str(value)
        folders = ABSOLUTE.match(text) or (re.search(r"[/\\]", text) and Path(text).exists())
        return PurePath(text).name if folders or isinstance(value, PurePath) else value
    return value


def _send(run: Any, name: str, table: pd.DataFrame, figures: Sequence[Path]) -> None:
    """Log the table, then the figures, and finish the run in any case."""
    import wandb

    try:
        values = table.astype(object).where(table.notna(), None)
        run.log({"cells": wandb.Table(columns=list(table.columns), data=values.to_numpy().tolist())})
        if figures:
            artifact = wandb.Artifact(plain_name(f"{name}-figures"), type="figures")
            for path in figures:
                artifact.add_file(str(path), name=Path(path).name)
            run.log_artifact(artifact)
    finally:
        run.finish()
