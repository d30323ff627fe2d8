"""Metrics of a test set with intervals, by a bootstrap over patients: pure functions on arrays."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from lightning_modules.thresholds import Task, probabilities

DRAWS, SEED = 1000, 0
SHOWN_CLASSES = 30
"""Classes that are ranked one by one; with more of them a draw would take seconds, and only accuracies are given."""
DEFINED = 0.95
"""Share of draws that must have a value; rare labels lack positives in some."""
_CHUNK = 50  # draws at a time: 10 MB for 25,000 images


@dataclass(frozen=True)
class Estimate:
    """A metric on the test set.

    Attributes:
        name: As in result rows: "accuracy", "mean_auroc", "auroc", ...
        class_name: The class or label; "" for an overall value.
        value: NaN where undefined.
        low: Lower end of the 95 % interval; NaN where too few draws had a value.
        high: Upper end.
    """

    name: str
    class_name: str
    value: float
    low: float
    high: float


def estimate(
    logits: np.ndarray,
    labels: np.ndarray,
    groups: Sequence[object] | np.ndarray,
    task: Task,
    class_names: Sequence[str],
    *,
    draws: int = DRAWS,
    seed: int = SEED,
) -> list[Estimate]:
    """Metrics with 95 % percentile intervals by a bootstrap over patients: all images of a drawn patient go along.

    Args:
        logits: (N, C) or (N, L).
        labels: int (N,) for multiclass, otherwise (N, L) with 1 / 0 / NaN = unknown.
        groups: (N,), the patient of each image.
        task: multiclass, binary or multilabel.
        class_names: One a column of the logits.
        draws: Number of resamples.
        seed: Of these draws.

    Returns:
        The overall values, then AUROC of each class, where there are at most `SHOWN_CLASSES`.
    """
    patient, patients = pd.factorize(np.asarray(groups, dtype=object))
    point = weighted_metrics(logits, labels, np.ones((len(logits), 1)), task, class_names)
    one_stratum = np.zeros(len(patients), dtype=np.int64)
    parts = [
        weighted_metrics(logits, labels, weights[patient], task, class_names)
        for weights in patient_weights(one_stratum, draws, seed)
    ]
    estimates = []
    for key, (value,) in point.items():
        values = np.concatenate([part[key] for part in parts])
        values = values[~np.isnan(values)]
        enough = len(values) >= DEFINED * draws
        low, high = np.quantile(values, [0.025, 0.975]) if enough else (np.nan, np.nan)
        estimates.append(Estimate(*key, float(value), float(low), float(high)))
    return estimates


def patient_weights(strata: np.ndarray, draws: int, seed: int = SEED) -> Iterator[np.ndarray]:
    """How often each patient counts in each draw, the same for all that are compared: a bootstrap within strata.

    A single stratum is drawn as often as it has patients. With several, n - 1 of a stratum's n patients are drawn, with
    replacement, and each counts n / (n - 1) times: drawing n of them would understate the variance of small strata by
    that factor (Rao and Wu 1988, Resampling inference with complex survey data, with their m = n - 1).

    Args:
        strata: int (P,) from 0 (see `patient_strata`), with at least two patients in each of several strata.
        draws: Number of resamples.
        seed: Of these draws.

    Yields:
        float64 (P, b), with b draws at a time.
    """
    generator = np.random.default_rng(seed)
    patients, sizes = len(strata), np.bincount(strata)
    drawn_of = np.maximum(sizes - (len(sizes) > 1), 0)
    order = np.argsort(strata, kind="stable")
    first = np.repeat(np.cumsum(sizes) - sizes, drawn_of)
    scale = np.divide(sizes, drawn_of, where=drawn_of > 0, out=np.zeros(len(sizes)))[strata]
    for start in range(0, draws, _CHUNK):
        size = min(_CHUNK, draws - start)
        drawn = generator.integers(np.repeat(sizes, drawn_of), size=(size, len(first)))
        drawn = order[first + drawn] + patients * np.arange(size)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=size * patients).reshape(size, patients)
        yield np.ascontiguousarray(counts.T) * scale[:, None]


def patient_strata(labels: np.ndarray, patient: np.ndarray) -> np.ndarray:
    """Strata of patients that keep classes and rare labels represented in every draw.

    A patient belongs to the rarest class (label) among its images, counted in patients; those without any positive
    label are a stratum of their own. Strata of one patient, who could not be left out, join these.

    Args:
        labels: int (N,) of classes, or (N, L) with 1 / 0 / NaN = unknown.
        patient: int (N,) from 0, without gaps.

    Returns:
        int (P,) from 0, without gaps.
    """
    if labels.ndim == 1:
        row, (number, classes) = np.arange(len(labels)), pd.factorize(labels)
        columns = len(classes)
    else:
        (row, number), columns = np.nonzero(labels == 1), labels.shape[1]
    positive = np.zeros((int(patient.max()) + 1, columns), dtype=bool)
    positive[patient[row], number] = True
    rank = np.empty(columns, dtype=np.int64)
    rank[np.argsort(positive.sum(axis=0), kind="stable")] = np.arange(columns)
    stratum = np.where(positive, rank, columns).min(axis=1, initial=columns)
    sizes = np.bincount(stratum, minlength=columns + 1)
    stratum[sizes[stratum] == 1] = columns
    sizes = np.bincount(stratum, minlength=columns + 1)
    if sizes[columns] == 1:
        stratum[stratum == columns] = sizes.argmax()
    return np.unique(stratum, return_inverse=True)[1]


Values = dict[tuple[str, str], np.ndarray]
"""(metric, class) → values."""


def weighted_metrics(
    logits: np.ndarray, labels: np.ndarray, weights: np.ndarray, task: Task, class_names: Sequence[str]
) -> Values:
    """Each metric, (B,), with image i counted `weights[i, b]` times; arguments otherwise as in `estimate`."""
    scores = probabilities(logits, task)
    overall: Values = {}
    if task == "multiclass":
        correct = scores.argmax(axis=1) == labels
        overall["accuracy", ""] = correct @ weights / weights.sum(axis=0)
        order = np.argsort(labels, kind="stable")
        starts = np.flatnonzero(np.diff(labels[order], prepend=-1))
        of_class = np.add.reduceat(weights[order], starts)
        hits = np.add.reduceat(weights[order] * correct[order, None], starts)
        overall["balanced_accuracy", ""] = _mean_known(_divide(hits, of_class))
    if len(class_names) > SHOWN_CLASSES:
        return overall
    # One-vs-rest on the softmax, or each label on its logit: float64 probabilities may tie what logits tell apart.
    columns = scores if task == "multiclass" else logits
    rankings = []
    for number in range(len(class_names)):
        truth = labels == number if task == "multiclass" else labels[:, number]
        known = ~np.isnan(truth)
        counted = weights if known.all() else weights[known]
        rankings.append(weighted_ranking(truth[known] == 1, columns[known, number], counted))
    areas, precisions = (np.stack(values) for values in zip(*rankings, strict=True))
    overall["mean_auroc", ""], overall["mean_average_precision", ""] = _mean_known(areas), _mean_known(precisions)
    return overall | {("auroc", name): areas[number] for number, name in enumerate(class_names)}


def weighted_ranking(truth: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Area under the ROC curve and average precision with each sample counted several times, ties as in scikit-learn.

    Args:
        truth: bool (N,).
        scores: (N,), higher means more likely positive; no NaN.
        weights: (N, B), counts.

    Returns:
        Two arrays (B,), NaN where positives or negatives are missing.
    """
    # Cells: below the lowest score of a positive, at it, between it and the next one, at that, ... (2 L + 1 of them).
    levels = np.unique(scores[truth])
    cell = np.searchsorted(levels, scores, "left") + np.searchsorted(levels, scores, "right")
    positives, negatives = (_sum_by(cell, kind, 2 * len(levels) + 1, weights) for kind in (truth, ~truth))
    positives, tied = positives[1::2], negatives[1::2]
    below = np.cumsum(negatives, axis=0)[::2][: len(levels)]
    all_positives, all_negatives = positives.sum(axis=0), negatives.sum(axis=0)
    # A positive beats the negatives below it and half of those it is tied with.
    area = _divide((positives * (below + tied / 2)).sum(axis=0), all_positives * all_negatives)
    # Of what scores at least as high as a positive, the share that is positive.
    found = np.cumsum(positives[::-1], axis=0)[::-1]
    share = _divide(found, found + np.maximum(all_negatives - below, 0))
    precision = _divide(np.where(positives > 0, positives * share, 0).sum(axis=0), all_positives)
    return area, np.where(all_negatives > 0, precision, np.nan)


def _sum_by(cell: np.ndarray, kind: np.ndarray, cells: int, weights: np.ndarray) -> np.ndarray:
    """Sums (cells, B) of the weights (N, B) of the samples of a kind, bool (N,), in each cell."""
    from scipy.sparse import csr_array

    rows = np.flatnonzero(kind)
    rows = rows[np.argsort(cell[rows], kind="stable")]
    ends = np.cumsum(np.bincount(cell[rows], minlength=cells))
    member = csr_array((np.ones(len(rows)), rows, np.append(0, ends)), shape=(cells, len(weights)))
    return np.asarray(member @ weights)


def _divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    quotient = np.full(np.broadcast_shapes(numerator.shape, denominator.shape), np.nan)
    np.divide(numerator, denominator, out=quotient, where=denominator > 0)
    return quotient


def _mean_known(values: np.ndarray) -> np.ndarray:
    known = ~np.isnan(values)
    return _divide(np.where(known, values, 0).sum(axis=0), known.sum(axis=0))
