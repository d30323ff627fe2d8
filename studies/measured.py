"""Metrics of runs on one test set, on all its images and under the same draws of its patients for all runs."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from datamodules.errors import DataError, shorten
from lightning_modules.thresholds import Task
from studies.patient_bootstrap import SEED, patient_strata, patient_weights, weighted_metrics
from studies.stored_predictions import Predictions, read_predictions

DRAWS = 200
"""Enough for a variance (± 10 %); the degrees of freedom allow for it."""

FACTS = ("source", "pretrain_seed", "seed")


@dataclass(frozen=True, eq=False)
class Runs:
    """Predictions of R runs on one test set of N images.

    Attributes:
        facts: R rows with the columns "run" and `FACTS`; `pretrain_seed` is missing where nothing says it.
        logits: R arrays (N, C) or (N, L).
        labels: int (N,) for multiclass, otherwise float32 (N, L) with 1 / 0 / NaN = unknown.
        groups: (N,), the patient of each image.
        task: multiclass, binary or multilabel.
        class_names: One a column of the logits.
    """

    facts: pd.DataFrame
    logits: Sequence[np.ndarray]
    labels: np.ndarray
    groups: np.ndarray
    task: Task
    class_names: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Measured:
    """Metrics of R runs, on the test set and under each of B draws of its patients.

    Attributes:
        facts: R rows, as in `Runs`.
        metrics: M pairs of metric and class.
        values: (R, M).
        draws: (R, M, B), or None where there are no predictions.
        freedom: (M,), degrees of freedom of the patients' part.
        patients: Their number; 0 without predictions.
        test_set: What must be equal for a paired difference: a hash of labels, patients and draws.
    """

    facts: pd.DataFrame
    metrics: tuple[tuple[str, str], ...]
    values: np.ndarray
    draws: np.ndarray | None
    freedom: np.ndarray
    patients: int
    test_set: str

    def of(self, source: str) -> "Measured":
        """The runs from one source."""
        chosen = np.flatnonzero(self.facts["source"].eq(source).fillna(False).to_numpy(bool))
        if not len(chosen):
            raise DataError(
                f"there are no runs from {source!r}", valid=[str(name) for name in self.facts["source"].unique()]
            )
        return self._take(chosen, self.facts.iloc[chosen].reset_index(drop=True))

    def _take(self, rows: np.ndarray, facts: pd.DataFrame) -> "Measured":
        draws = None if self.draws is None else self.draws[rows]
        return Measured(facts, self.metrics, self.values[rows], draws, self.freedom, self.patients, self.test_set)


def read_runs(folders: Sequence[Path | str], split: str = "test") -> Runs:
    """Read the stored predictions of runs on the same images.

    Args:
        folders: Run folders, with `predictions.parquet` and `summary.json` (see `studies.runs`).
        split: "test" or "validation".

    Raises:
        DataError: No folders, a file that is missing or lacks the split, or a run that saw other images, patients,
            labels or classes than the first one; names the run.
    """
    if not folders:
        raise DataError("there are no runs to read", where="folders")
    read = [_read_run(Path(folder), split) for folder in folders]
    facts, first = read[0]
    for other, found in read[1:]:
        for name, what in (("class_names", "classes"), ("ids", "images"), ("labels", "labels"), ("patients",) * 2):
            if not _equal(getattr(first, name), getattr(found, name)):
                raise DataError(
                    f"run {other['run']!r} has other {split} {what} than run {facts['run']!r}",
                    where=other["run"],
                    valid="runs on one and the same test set",
                    hint="compare runs of one target, split policy, label policy and fold",
                )
    logits = [found.logits for _, found in read]
    table = pd.DataFrame([one for one, _ in read]).convert_dtypes()
    task: Task = "binary" if first.task == "multilabel" and len(first.class_names) == 1 else first.task
    return Runs(table, logits, first.labels, first.patients, task, tuple(first.class_names))


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, list):
        return bool(one == other)
    return one.shape == other.shape and bool(((one == other) | ((one != one) & (other != other))).all())


def _read_run(folder: Path, split: str) -> tuple[dict[str, Any], Predictions]:
    """Facts of a run, and its images in the order of their ids."""
    try:
        facts = json.loads((folder / "summary.json").read_text(encoding="utf-8")).get("run", {})
        found = read_predictions(folder / "predictions.parquet", split)
    except (OSError, ValueError, DataError) as error:
        raise DataError(
            f"run {folder.name!r}: {error.problem if isinstance(error, DataError) else error}",
            where=str(folder),
            hint="run this cell again, or take intervals over seeds from the result rows alone",
        ) from error
    order = np.argsort(found.ids, kind="stable")
    parts = {name: getattr(found, name)[order] for name in ("ids", "patients", "labels", "logits")}
    return {"run": folder.name, **{name: facts.get(name) for name in FACTS}}, replace(found, **parts)


def measure(runs: Runs, draws: int = DRAWS, seed: int = SEED) -> Measured:
    """Metrics of each run on all images, and under the same draws of patients for all runs.

    Patients are drawn within strata (see `patient_bootstrap.patient_strata`), so an interval is for test sets with this
    mix of classes.

    Args:
        runs: The runs.
        draws: Number of resamples.
        seed: Of these draws.
    """
    patient, patients = pd.factorize(runs.groups)
    strata = patient_strata(runs.labels, patient)
    metrics, values = _metrics(runs, np.ones((len(patient), 1)))
    parts = [_metrics(runs, weights[patient])[1] for weights in patient_weights(strata, draws, seed)]
    digest = hashlib.sha256(repr((draws, seed, runs.class_names)).encode())
    for content in (patient.astype(np.int64), np.nan_to_num(runs.labels, nan=-1.0).astype(np.float32)):
        digest.update(np.ascontiguousarray(content).tobytes())
    return Measured(
        runs.facts,
        metrics,
        values[:, :, 0],
        np.concatenate(parts, axis=2),
        _freedom(runs, patient, strata, metrics),
        len(patients),
        digest.hexdigest(),
    )


def _metrics(runs: Runs, weights: np.ndarray) -> tuple[tuple[tuple[str, str], ...], np.ndarray]:
    """The M metrics' names, and (R, M, B) with image i counted `weights[i, b]` times."""
    tables = [weighted_metrics(logits, runs.labels, weights, runs.task, runs.class_names) for logits in runs.logits]
    return tuple(tables[0]), np.stack([np.stack(list(table.values())) for table in tables])


def _freedom(runs: Runs, patient: np.ndarray, strata: np.ndarray, metrics: Sequence[tuple[str, str]]) -> np.ndarray:
    """Degrees of freedom of each metric's variance under draws of patients, (M,).

    Of accuracy patients less strata. Of a class one less than the smaller of its two sides, whose spread decides. Of a
    mean over classes Satterthwaite's combination, taking each class's variance as inverse to its own degrees of
    freedom: a class with few patients makes most of the variance, and is least sure of it.
    """
    columns = runs.labels[:, None] == np.arange(len(runs.class_names)) if runs.labels.ndim == 1 else runs.labels
    patients = np.array(
        [[np.count_nonzero(np.bincount(patient[column == side])) for side in (0, 1)] for column in columns.T]
    )
    smaller = patients.min(axis=1)
    own = dict(zip(runs.class_names, np.maximum(smaller - 1, 1), strict=True))
    every = max(len(strata) - int(strata.max()) - 1, 1)
    overall = {"accuracy": every, "balanced_accuracy": min(_combined(patients[:, 1]), every)}
    ranking = min(_combined(smaller), every)
    return np.array([own[name] if name else overall.get(metric, ranking) for metric, name in metrics], float)


def _combined(patients: np.ndarray) -> float:
    """Satterthwaite's degrees of freedom of a mean over those of (C,) classes that have patients; at least 1."""
    inverse = 1 / np.maximum(patients[patients > 0] - 1, 1)
    return float(inverse.sum() ** 2 / (inverse**3).sum()) if len(inverse) else 1.0


def from_rows(frame: pd.DataFrame) -> Measured:
    """What result rows tell without predictions: the values of runs, several folds of one averaged.

    Args:
        frame: Result rows of one target and setting: the columns "run", `FACTS`, "fold", "metric", "class_name" and
            "value".

    Raises:
        DataError: Two runs of the same source, pre-training, seed and fold.
    """
    unit = list(FACTS)
    doubled = frame.duplicated([*unit, "fold", "metric", "class_name"], keep=False)
    if doubled.any():
        first = frame[doubled].iloc[0]
        raise DataError(
            f"runs from {first['source']!r} have seed {first['seed']}, pre-training seed and fold in common",
            where=shorten(list(frame.loc[doubled, "run"].astype(str).unique()), 4),
            hint="take the runs of one source, architecture, protocol and budget",
        )
    rows = frame.assign(class_name=frame["class_name"].fillna("").astype(str), metric=frame["metric"].astype(str))
    means = rows.groupby([*unit, "metric", "class_name"], dropna=False)["value"].mean()
    table = means.unstack(["metric", "class_name"])
    facts = rows.groupby(unit, dropna=False)["run"].first().reindex(table.index).reset_index()
    metrics = tuple((str(column[0]), str(column[1])) for column in table.columns)
    return Measured(facts, metrics, table.to_numpy(float), None, np.ones(len(metrics)), 0, "")
