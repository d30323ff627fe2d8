"""Calibration of a test set in one table: errors, Brier scores and their intervals, before and after a temperature."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from lightning_modules.thresholds import Task, probabilities
from studies.calibration_errors import calibration_errors, confidences, debiased, error_by_chance
from studies.patient_bootstrap import DRAWS, SEED, SHOWN_CLASSES
from studies.patient_sums import bootstrap_counts, patient_mean, patient_sums, percentiles, ratio

STAGES = ("as trained", "after temperature")

COLUMNS = [
    *("stage", "temperature", "metric", "class_name", "value", "low", "high", "debiased", "by_chance"),
    *("n", "n_patients", "note"),
]


def calibration_table(
    logits: np.ndarray,
    labels: np.ndarray,
    patients: Sequence[object] | np.ndarray,
    task: Task,
    class_names: Sequence[str],
    temperatures: np.ndarray | None = None,
    *,
    draws: int = DRAWS,
    seed: int = SEED,
) -> pd.DataFrame:
    """Calibration errors and Brier scores of a test set, as trained and after temperature scaling, with intervals.

    Metrics: `ece` and `ece_equal_mass` (15 bins), `brier` (of several classes: the sum over the classes, up to 2) and
    `brier_skill` = 1 - brier / brier of always saying the sample's own prevalence. They are given for each class or
    label, of several classes (class_name "") for the decision, and as `mean_...` over those that are defined. Of more
    than `SHOWN_CLASSES` classes only overall values are given, the means without an interval.

    Args:
        logits: (N, C) or (N, L).
        labels: int (N,), or (N, L) with 1 / 0 / NaN = unknown.
        patients: (N,), whose image it is.
        task: multiclass, binary or multilabel.
        class_names: One a column of the logits.
        temperatures: From `fit_temperature` on validation, NaN = keep as trained; None leaves the second stage out.
        draws: Number of resamples.
        seed: Of these draws.

    Returns:
        One row a stage (see `STAGES`), metric and class with the columns `COLUMNS`: `low` and `high` are 95 %, of
        calibration errors those of `debiased`, which may leave out the biased `value`; `by_chance` is the error to
        expect of a perfectly calibrated model; `n` are images with a known label. The uncertainty of the temperature
        is not in the intervals.
    """
    patient, names = pd.factorize(np.asarray(patients, dtype=object))
    counts = bootstrap_counts(len(names), draws, seed)
    table = _stage(logits, labels, patient, counts, task, class_names).assign(stage=STAGES[0], temperature=1.0)
    if temperatures is None:
        return table[COLUMNS]
    used = np.where(np.isnan(temperatures), 1.0, temperatures)
    scaled = _stage(logits / used, labels, patient, counts, task, class_names).assign(stage=STAGES[1])
    own = dict(zip(class_names, temperatures, strict=True)) if task != "multiclass" else {}
    shared = temperatures[0] if len(temperatures) == 1 else np.nan
    of_row = np.array([own.get(name, shared) for name in scaled["class_name"]], dtype=np.float64)
    kept = np.isnan(of_row) & (scaled["n"] > 0) & ((task == "multiclass") | (scaled["class_name"] != ""))
    scaled.loc[kept, "note"] = "kept as trained: validation has too little to fit a temperature"
    return pd.concat([table, scaled.assign(temperature=np.where(kept, 1.0, of_row))], ignore_index=True)[COLUMNS]


def _stage(
    logits: np.ndarray,
    labels: np.ndarray,
    patient: np.ndarray,
    counts: np.ndarray,
    task: Task,
    class_names: Sequence[str],
) -> pd.DataFrame:
    several = task == "multiclass"
    many = several and len(class_names) > SHOWN_CLASSES
    drawn: dict[tuple[str, str], np.ndarray] = {}
    chance: dict[tuple[str, str], np.ndarray] = {}
    rows_of = {"": np.arange(len(labels)) if several else np.flatnonzero(~np.isnan(labels).all(axis=1))}
    for name, (rows, confidence, outcome) in confidences(logits, labels, task, class_names):
        resampled = counts[:, :1] if many and name else counts
        if not many:
            rows_of[name] = rows
        claims = confidence, outcome, patient[rows]
        for metric, equal_mass in (("ece", False), ("ece_equal_mass", True)):
            drawn[metric, name] = calibration_errors(*claims, resampled, equal_mass=equal_mass)
            chance[metric, name] = error_by_chance(*claims, equal_mass=equal_mass)
        if name:
            squares = (confidence - outcome) ** 2
            drawn["brier", name], skill = _brier(squares, outcome.astype(int), patient[rows], resampled)
            drawn["brier_skill", name] = 1 - 2 * skill  # the reference counts both outcomes
    for metric in dict.fromkeys(metric for metric, name in drawn if name):
        keys = [key for key in drawn if key[0] == metric and key[1]]
        drawn[f"mean_{metric}", ""] = _mean_known(np.stack([drawn[key] for key in keys]))
        if metric.startswith("ece"):
            chance[f"mean_{metric}", ""] = _mean_known(np.stack([chance[key] for key in keys]))
    if several:
        squares = ((probabilities(logits, task) - np.eye(logits.shape[1])[labels]) ** 2).sum(axis=1)
        drawn["brier", ""], skill = _brier(squares, labels, patient, counts)
        drawn["brier_skill", ""] = 1 - skill
    shown = [key for key in drawn if key[1] in rows_of]
    return pd.DataFrame([_row(key, drawn[key], chance.get(key), patient[rows_of[key[1]]]) for key in shown])


def _row(key: tuple[str, str], values: np.ndarray, chance: np.ndarray | None, patient: np.ndarray) -> dict[str, Any]:
    corrected, low, high = (np.nan, *percentiles(values)) if chance is None else debiased(values, chance)
    return {
        **dict(zip(("metric", "class_name"), key, strict=True)),
        **{"value": float(values[0]), "low": low, "high": high, "debiased": corrected},
        "by_chance": np.nan if chance is None else float(chance[0]),
        "n": len(patient),
        "n_patients": len(np.unique(patient)),
        "note": "" if len(patient) else "no known label",
    }


def _brier(
    squares: np.ndarray, classes: np.ndarray, patient: np.ndarray, counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Mean square, and its quotient by Σ p (1 - p) over the classes' shares; (B,) each."""
    score = patient_mean(squares, patient, counts)
    images = patient_sums(classes, np.ones(len(classes)), patient, counts, int(classes.max(initial=0)) + 1)
    shares = ratio(images, images.sum(axis=0))
    return score, ratio(score, 1 - (shares**2).sum(axis=0))


def _mean_known(values: np.ndarray) -> np.ndarray:
    """Over axis 0, of what is not NaN."""
    known = ~np.isnan(values)
    return ratio(np.where(known, values, 0.0).sum(axis=0), known.sum(axis=0))
