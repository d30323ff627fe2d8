"""Calibration of stored predictions: calibration error, Brier score, temperature, reliability. Functions on arrays.

Intervals come from a bootstrap over patients. A resample is a column of counts, one a patient, and every metric here is
made of sums over patients: so a thousand resamples cost one sparse product.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from lightning_modules.metrics import CALIBRATION_BINS
from lightning_modules.thresholds import Task, probabilities
from studies.patient_bootstrap import DEFINED, DRAWS, SEED, SHOWN_CLASSES, patient_weights

TEMPERATURES = (0.01, 100.0)
"""Range of a fitted temperature. At the lower end validation was separated without error and has no optimum; at the
upper end its logits do not speak of the labels."""

STAGES = ("as trained", "after temperature")
COLUMNS = [
    *("stage", "temperature", "metric", "class_name", "value", "low", "high", "debiased", "by_chance"),
    *("n", "n_patients", "note"),
]


def bootstrap_counts(patients: int, draws: int = DRAWS, seed: int = SEED) -> np.ndarray:
    """How often each patient occurs in the sample itself (column 0: once) and in each resample of patients.

    float64 (patients, 1 + draws): 200 MB for 25,000 patients and 1,000 draws.
    """
    drawn = patient_weights(np.zeros(patients, dtype=np.int64), draws, seed) if patients else ()
    return np.concatenate([np.ones((patients, 1)), *drawn], axis=1)


def patient_sums(
    cells: np.ndarray, values: np.ndarray, patient: np.ndarray, counts: np.ndarray, num_cells: int = 1
) -> np.ndarray:
    """Sums of the values in each cell, float64 (num_cells, B), with an image counted as often as its patient.

    Args:
        cells: int (N,) in [0, num_cells): bin, class, ...
        values: (N,).
        patient: int (N,), rows of `counts`.
        counts: (P, B), see `bootstrap_counts`.
        num_cells: Number of cells.
    """
    from scipy.sparse import csr_array

    matrix = csr_array((values.astype(np.float64), (cells, patient)), shape=(num_cells, len(counts)))
    return np.asarray(matrix @ counts)


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Quotient of arrays of one shape, NaN where the denominator is 0."""
    quotient: np.ndarray = numerator / np.where(denominator > 0, denominator, np.nan)
    return quotient


def patient_mean(values: np.ndarray, patient: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Mean of (N,) values in the sample and in each resample, (B,); NaN without images. See `patient_sums`."""
    nowhere, ones = np.zeros(len(values), dtype=int), np.ones(len(values))
    total, images = (patient_sums(nowhere, one, patient, counts)[0] for one in (values, ones))
    return ratio(total, images)


def percentiles(values: np.ndarray) -> tuple[float, float]:
    """95 % percentile interval of (1 + draws,), the first of which is the sample; NaN where too few are defined."""
    drawn = values[1:][~np.isnan(values[1:])]
    if len(drawn) < DEFINED * (len(values) - 1) or not len(drawn):
        return np.nan, np.nan
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def debiased(values: np.ndarray, chance: np.ndarray) -> tuple[float, float, float]:
    """A calibration error less its bias, with a 95 % interval.

    A resample adds as much noise to a bin as the sample itself holds, so the mean rise of the error from the sample to
    the resamples estimates the bias. It removes 40 % of it for a perfectly calibrated model, and takes off a little too
    much where a bin's error is as large as its noise. With a normal in place of the bootstrap this is the estimator of
    Kumar, Liang & Ma 2019, "Verified Uncertainty Calibration"; patients' images err alike, which resamples count.

    The interval is the basic one (2 · value - quantile), from 0 where the value is not above what chance gives a
    perfectly calibrated model (mean + 1.96 sd). In simulations of 200 to 2,000 images it covered 84 to 91 % for true
    errors of 0.05 to 0.17, and 96 to 98 % for none, where the basic interval alone covered 26 to 41 %.

    Args:
        values: (1 + draws,), from `calibration_errors`.
        chance: (2,), from `error_by_chance`.

    Returns:
        Value, lower and upper end, none below 0; NaN where too few resamples are defined.
    """
    low, high = percentiles(values)
    if np.isnan(low):
        return np.nan, np.nan, np.nan
    value, *ends = np.maximum(2 * values[0] - np.array([np.nanmean(values[1:]), high, low]), 0.0).tolist()
    return value, ends[0] if values[0] > chance[0] + 1.96 * chance[1] else 0.0, ends[1]


def wilson(hits: float, n: int) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927), for independent images; NaN without images."""
    if not n:
        return np.nan, np.nan
    z = 1.959963984540054  # SciPy's `binomtest` gives the same, a thousand times slower: it finds a p value first
    centre, half = hits + z**2 / 2, z * math.sqrt(hits * (n - hits) / n + z**2 / 4)
    return max((centre - half) / (n + z**2), 0.0), min((centre + half) / (n + z**2), 1.0)


class Confidences(NamedTuple):
    """What a model claims, in [0, 1], and whether it came about, 1 or 0; of the images `rows`; (K,) each."""

    rows: np.ndarray
    confidence: np.ndarray
    outcome: np.ndarray


def confidences(
    logits: np.ndarray, labels: np.ndarray, task: Task, class_names: Sequence[str]
) -> Iterator[tuple[str, Confidences]]:
    """Confidences by class: "" = of the decision (multiclass only), then one-vs-rest of each class or label.

    Args:
        logits: (N, C) or (N, L).
        labels: int (N,) for multiclass, otherwise (N, L) with 1 / 0 / NaN = unknown; unknown cells are left out.
        task: multiclass, binary or multilabel.
        class_names: One a column of the logits.

    Yields:
        Names and confidences, in the order of the columns; not all at once, which a thousand classes could not be.
    """
    scores = probabilities(logits, task)
    if task == "multiclass":
        right = scores.argmax(axis=1) == labels
        yield "", Confidences(np.arange(len(scores)), scores.max(axis=1), right.astype(np.float64))
    for column, name in enumerate(class_names):
        truth = labels == column if task == "multiclass" else labels[:, column]
        rows = np.flatnonzero(~np.isnan(truth))
        yield name, Confidences(rows, scores[rows, column], truth[rows].astype(np.float64))


def bin_edges(confidence: np.ndarray, bins: int = CALIBRATION_BINS, equal_mass: bool = False) -> np.ndarray:
    """Edges (bins + 1,) from 0 to 1 of bins (low, high]: of equal width, or at quantiles of the confidences."""
    edges = np.linspace(0.0, 1.0, bins + 1)
    if equal_mass and len(confidence):
        edges[1:-1] = np.quantile(confidence, edges[1:-1])
    return edges


def calibration_errors(
    confidence: np.ndarray,
    outcome: np.ndarray,
    patient: np.ndarray,
    counts: np.ndarray,
    *,
    equal_mass: bool = False,
    bins: int = CALIBRATION_BINS,
) -> np.ndarray:
    """Expected calibration error: mean over images of |mean confidence - mean outcome| of their bin (Guo et al. 2017).

    Biased upwards, the more so the fewer images a bin holds: noise cannot cancel in an absolute value. See `debiased`
    and `error_by_chance`. Bins are those of the sample in every resample.

    Args:
        confidence: (N,), in [0, 1].
        outcome: (N,), 1 or 0.
        patient: int (N,), rows of `counts`.
        counts: (P, B).
        equal_mass: Bins that hold equally many images, instead of equally wide ones.
        bins: Number of bins.

    Returns:
        float64 (B,), NaN without images.
    """
    number = np.digitize(confidence, bin_edges(confidence, bins, equal_mass)[1:-1], right=True)
    gaps = patient_sums(number, confidence - outcome, patient, counts, bins)
    images = patient_sums(np.zeros_like(number), np.ones(len(number)), patient, counts)[0]
    return ratio(np.abs(gaps).sum(axis=0), images)


def error_by_chance(
    confidence: np.ndarray,
    outcome: np.ndarray,
    patient: np.ndarray,
    *,
    equal_mass: bool = False,
    bins: int = CALIBRATION_BINS,
) -> np.ndarray:
    """Mean and standard deviation, (2,), of the calibration error of a perfectly calibrated model on these images.

    A bin's gap is then nearly normal with variance Σ c (1 - c), times a design effect because images of one patient are
    alike: squares of residuals summed by patient and bin over squares of residuals. NaN without images.
    """
    if not len(confidence):
        return np.full(2, np.nan)
    number = np.digitize(confidence, bin_edges(confidence, bins, equal_mass)[1:-1], right=True)
    gaps = np.bincount(number, confidence - outcome) / np.maximum(np.bincount(number), 1)
    residual = confidence - outcome - gaps[number]
    together = np.bincount(np.unique(number * (patient.max() + 1) + patient, return_inverse=True)[1], residual)
    effect = max(float(together @ together) / max(float(residual @ residual), 1e-12), 1.0)
    variance = effect * np.bincount(number, confidence * (1 - confidence))
    mean = np.sqrt(2 / np.pi) * np.sqrt(variance).sum()
    return np.array([mean, np.sqrt((1 - 2 / np.pi) * variance.sum())]) / len(confidence)


def fit_temperature(logits: np.ndarray, labels: np.ndarray, task: Task) -> np.ndarray:
    """Temperatures that maximise the likelihood of validation (Guo et al. 2017); logits are divided by them.

    The loss is convex in 1 / temperature.

    Args:
        logits: (N, C) or (N, L) of the validation set.
        labels: int (N,), or (N, L) with 1 / 0 / NaN = unknown.
        task: multiclass: one temperature; otherwise one a label.

    Returns:
        float64 (1,) or (L,), in `TEMPERATURES`; NaN without images, or for a label without positives or negatives.
    """
    from scipy.special import logsumexp

    values = logits.astype(np.float64)
    if task == "multiclass":
        own = values[np.arange(len(values)), labels]
        return np.array([_minimum(lambda b: float(np.mean(logsumexp(b * values, axis=1) - b * own)), len(own) > 0)])
    fitted = []
    for column in range(values.shape[1]):
        known = ~np.isnan(labels[:, column])
        truth = labels[known, column] == 1
        margin = np.where(truth, values[known, column], -values[known, column])

        def loss(b: float, margin: np.ndarray = margin) -> float:
            return float(np.mean(np.logaddexp(0.0, -b * margin)))

        fitted.append(_minimum(loss, bool(truth.any() and not truth.all())))
    return np.array(fitted)


def _minimum(loss: Any, defined: bool) -> float:
    from scipy.optimize import minimize_scalar

    if not defined:
        return np.nan
    low, high = np.log(TEMPERATURES)
    found = minimize_scalar(lambda t: loss(np.exp(-t)), bounds=(low, high), method="bounded", options={"xatol": 1e-8})
    return float(np.exp(found.x))


def reliability(
    confidence: np.ndarray, outcome: np.ndarray, *, equal_mass: bool = False, bins: int = CALIBRATION_BINS
) -> pd.DataFrame:
    """Points of a reliability diagram.

    Args:
        confidence: (N,), in [0, 1].
        outcome: (N,), 1 or 0.
        equal_mass: Bins that hold equally many images, instead of equally wide ones.
        bins: Number of bins.

    Returns:
        One row for each bin that holds images: `left`, `right` (its edges), `confidence` (mean), `frequency` (share
        of outcomes 1), `low`, `high` (Wilson's 95 % interval of it, as if images were independent: too narrow where
        patients have several) and `count`.
    """
    edges = bin_edges(confidence, bins, equal_mass)
    number = np.digitize(confidence, edges[1:-1], right=True)
    count = np.bincount(number, minlength=bins)
    filled = np.flatnonzero(count)
    hits = np.bincount(number, outcome, minlength=bins)[filled]
    intervals = np.array([wilson(k, n) for k, n in zip(hits, count[filled], strict=True)]).reshape(-1, 2)
    return pd.DataFrame(
        {
            "left": edges[filled],
            "right": edges[filled + 1],
            "confidence": np.bincount(number, confidence, minlength=bins)[filled] / count[filled],
            "frequency": hits / count[filled],
            "low": intervals[:, 0],
            "high": intervals[:, 1],
            "count": count[filled],
        }
    )


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
