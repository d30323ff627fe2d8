"""What comes out of a run: predictions, thresholds and result rows, written to its folder."""

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from datamodules.atomic import replace_file
from datamodules.base import BaseDataModule
from lightning_modules.base import BaseTask
from lightning_modules.labelled import LabelledTask
from lightning_modules.metrics import EvaluationResult, MetricValue, evaluate
from lightning_modules.thresholds import choose_thresholds
from studies.runs import RunFolder, code_version

SUBGROUPS = ("sex", "age", "view", "scanner", "site")
"""Metadata that is kept beside the predictions (see `datamodules.table.METADATA`), to compare groups later."""


def describe_run(
    model: BaseTask, data: BaseDataModule, weights_hash: str | None, seed: int, guard: str
) -> dict[str, Any]:
    """The columns of a result row that the run's arguments decide, without a metric."""
    table = data.read_table()
    rows = {split: data.rows(split) for split in ("train", "validation", "test")}
    shots = data.shots if data.shots is not None else "full"
    return {
        **model.describe(),
        **source_facts(model.weights),
        "weights_hash": weights_hash,
        "target": data.name,
        "shots": None if data.num_images is not None or data.fraction is not None else str(shots),
        "num_images": data.num_images,
        "fraction": data.fraction,
        "dials": data.dials.describe(),
        "fold": data.fold if data.folds is not None else None,
        "seed": seed,
        "n_train": len(rows["train"]),
        "n_val": len(rows["validation"]),
        "n_test": len(rows["test"]),
        "n_patients": len(pd.unique(np.asarray(table.groups[rows["test"]]))),
        "image_size": data.image_size,
        "split_policy": data.split_policy,
        "label_policy": data.label_policy,
        "guard": guard,
        "trials": 1,
        "code_version": code_version(),
    }


def describe_untrained(
    folder: RunFolder, data: BaseDataModule, rows: np.ndarray, protocol: str, guard: str, weights_hash: str
) -> dict[str, Any]:
    """The columns of a result row of a run that is evaluated on data which nothing was trained on.

    Args:
        folder: The run; it is the source.
        data: What it is evaluated on.
        rows: Table rows of the images, int64 (N,).
        protocol: Name of the protocol.
        guard: Outcome of the guard against seen images.
        weights_hash: Hash of the run's weights.
    """
    source = folder.read_summary().get("run", {})
    return {
        "study": folder.path.parent.name,
        **{name: source.get(name) for name in ("architecture", "seed", "selection")},
        "source": source.get("target"),
        "source_n": source.get("n_train"),
        "source_dials": dials_of(source),
        "method": source.get("method") or "supervised",
        "pretrain_seed": source.get("seed"),
        "weights_hash": weights_hash,
        "target": data.name,
        "protocol": protocol,
        "shots": "0",
        "fold": data.fold if data.folds is not None else None,
        **dict.fromkeys(("n_train", "n_val", "step", "epochs", "images_seen"), 0),
        "n_test": len(rows),
        "n_patients": len(pd.unique(data.read_table().groups[rows])),
        "image_size": data.image_size,
        "split_policy": data.split_policy,
        "label_policy": data.label_policy,
        "guard": guard,
        "trials": 1,
        "code_version": code_version(),
    }


def source_facts(weights: str | None) -> dict[str, Any]:
    """Columns of result rows on weights: the run that trained them tells, otherwise their name has to do."""
    if weights is None:
        return {"source": "scratch", "source_n": 0, "pretrain_seed": None}
    path = Path(weights)
    run = RunFolder(path.parent.parent if path.parent.name == "checkpoints" else path)
    summary = run.read_summary()
    if not summary:  # a file is named by its stem; a timm name keeps its tag, which says what it was trained on
        name = path.stem if path.is_file() else weights
        return {"source": name, "source_n": None, "method": None, "pretrain_seed": None}
    origin = summary.get("run", {})
    return {
        "source": origin.get("target"),
        "source_n": origin.get("n_train"),
        "source_dials": dials_of(origin),
        "method": origin.get("method") or "supervised",
        "pretrain_seed": origin.get("seed"),
    }


def dials_of(origin: Mapping[str, Any]) -> str | None:
    """How the source's own source was cut and disturbed, in words; None = not at all."""
    fraction = origin.get("fraction")
    parts = [f"fraction {fraction:g}" if fraction is not None else "", origin.get("dials") or ""]
    return ", ".join(part for part in parts if part) or None


def result_rows(result: EvaluationResult, run: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row a metric (and class) of a test evaluation; an undefined value is missing."""
    return [
        {
            **run,
            "metric": value.name,
            "class_name": value.class_name or None,
            "value": float(value.value) if math.isfinite(value.value) else None,
        }
        for value in result.metrics
    ]


def source_rows(
    result: EvaluationResult,
    run: Mapping[str, Any],
    model: LabelledTask,
    data: BaseDataModule,
    names: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """The same rows for each source of a mixture (subgroup source=NAME), of the classes `names`; none for one set."""
    column = data.read_table().metadata.get("source")
    if column is None:
        return []
    rows: list[dict[str, Any]] = []
    sources = np.asarray(column, dtype=object)[result.index]
    for name in pd.unique(sources):
        chosen = np.flatnonzero(sources == name)
        groups = data.read_table().groups[result.index[chosen]]
        metrics = evaluate(result.logits[chosen], result.labels[chosen], model.task, model.class_names)
        metrics = [value for value in metrics if names is None or not value.class_name or value.class_name in names]
        part = EvaluationResult(result.logits[chosen], result.labels[chosen], result.index[chosen], metrics)
        of_source = {"subgroup": f"source={name}", "n_test": len(chosen), "n_patients": len(pd.unique(groups))}
        rows += result_rows(part, {**run, **of_source})
    return rows


def metric_table(scores: Sequence[MetricValue]) -> list[dict[str, Any]]:
    """Every metric with its support, for `summary.json`; undefined values are null."""
    table = [asdict(value) for value in scores]
    return [{**row, "value": float(row["value"]) if math.isfinite(row["value"]) else None} for row in table]


def thresholds_of(result: EvaluationResult | None, model: BaseTask) -> dict[str, Any]:
    """Decision thresholds (probabilities, one a label) and where they come from; none for a task without labels."""
    if not isinstance(model, LabelledTask):
        return {}
    if model.task == "multiclass":
        return {"thresholds": [], "thresholds_from": "argmax"}
    if result is None or not len(result.index):
        return {
            "thresholds": [0.5] * len(model.class_names),
            "thresholds_from": "default 0.5 (no validation images)",
        }
    return {
        "thresholds": choose_thresholds(result.logits, result.labels, model.task),
        "thresholds_from": "validation (Youden's J)",
    }


def write_predictions(folder: RunFolder, split: str, result: EvaluationResult, data: BaseDataModule) -> None:
    """Replace one split's rows in `predictions.parquet`: id, group, split, labels and logits of every image.

    Of the columns `SUBGROUPS` those that the data set has are added as `meta/<name>`, so that a comparison of groups
    needs the file alone.
    """
    table = data.read_table()
    known = [name for name in SUBGROUPS if name in table.metadata]
    labels = result.labels[:, None] if result.labels.ndim == 1 else result.labels
    names = ["label"] if result.labels.ndim == 1 else [f"label/{name}" for name in data.class_names]
    frame = pd.DataFrame(
        {
            "id": np.asarray(table.paths[result.index], dtype=object),
            "group": np.asarray(table.groups[result.index], dtype=object),
            "split": split,
            **{name: labels[:, column] for column, name in enumerate(names)},
            **{f"logit/{name}": result.logits[:, column] for column, name in enumerate(data.class_names)},
            **{f"meta/{name}": np.asarray(table.metadata[name])[result.index] for name in known},
        }
    )
    if folder.predictions.is_file():
        stored = pd.read_parquet(folder.predictions)
        frame = pd.concat([stored[stored["split"] != split], frame], ignore_index=True)
    replace_file(folder.predictions, lambda path: frame.to_parquet(path, index=False))


def reset_peak_memory() -> None:
    """Begin to measure the peak anew: the runs of a study share a process."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):  # Linux only
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> float | None:
    """Peak bytes since `reset_peak_memory` of the device, or of this process where there is none; None if unknown."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    return 1024.0 * int(found[1]) if found else None
