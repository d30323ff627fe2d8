"""Metrics of a test set with intervals, by a bootstrap over patients: pure functions on arrays."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from lightning_modules.thresholds import Task, probabilities

DRAWS, SEED = 1000, 0
SHOWN_CLASSES = 30
"""Classes that are ranked one by one; with more of them a draw would take seconds, and only accuracies are given."""
_CHUNK = 50  # draws at a time: 10 MB for 25,000 images
_DEFINED = 0.95  # share of draws that must have a value; rare labels lack positives in some


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
    generator = np.random.default_rng(seed)
    point = _metrics(logits, labels, np.ones((len(logits), 1)), task, class_names)
    parts = []
    for start in range(0, draws, _CHUNK):
        size = min(_CHUNK, draws - start)
        drawn = generator.integers(len(patients), size=(size, len(patients)))
        drawn += len(patients) * np.arange(size)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=size * len(patients)).reshape(size, len(patients))
        parts.append(_metrics(logits, labels, counts.T[patient].astype(np.float64), task, class_names))
    estimates = []
    for key, (value,) in point.items():
        values = np.concatenate([part[key] for part in parts])
        values = values[~np.isnan(values)]
        enough = len(values) >= _DEFINED * draws
        low, high = np.quantile(values, [0.025, 0.975]) if enough else (np.nan, np.nan)
        estimates.append(Estimate(*key, float(value), float(low), float(high)))
    return estimates


_Values = dict[tuple[str, str], np.ndarray]


def _metrics(
    logits: np.ndarray, labels: np.ndarray, weights: np.ndarray, task: Task, class_names: Sequence[str]
) -> _Values:
    """Each metric, (B,), with image i counted `weights[i, b]` times."""
    scores = probabilities(logits, task)
    overall: _Values = {}
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
        rankings.append(weighted_ranking(truth[known] == 1, columns[known, number], weights[known]))
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
    order = np.argsort(scores, kind="stable")
    everything, positive = scores[order], scores[order[truth[order]]]
    counts = weights[order[truth[order]]]
    below, up_to = (np.searchsorted(everything, positive, side) for side in ("left", "right"))
    positives_below, positives_up_to = (np.searchsorted(positive, positive, side) for side in ("left", "right"))
    summed, positives_summed = _running_sum(weights[order]), _running_sum(counts)
    total, positives = summed[-1], positives_summed[-1]
    # A positive beats the negatives below it and half of those it is tied with.
    lower = summed[below] - positives_summed[positives_below]
    no_higher = summed[up_to] - positives_summed[positives_up_to]
    area = _divide((counts * (lower + no_higher)).sum(axis=0) / 2, positives * (total - positives))
    # Of what scores at least as high as a positive, the share that is positive.
    share = (positives - positives_summed[positives_below]) / np.maximum(total - summed[below], 1)
    precision = _divide((counts * share).sum(axis=0), positives)
    return area, np.where(total > positives, precision, np.nan)


def _running_sum(values: np.ndarray) -> np.ndarray:
    """Sums of the first 0, 1, ... rows: (N, B) → (N + 1, B)."""
    sums = np.zeros((len(values) + 1, values.shape[1]))
    np.cumsum(values, axis=0, out=sums[1:])
    return sums


def _divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    quotient = np.full(np.broadcast_shapes(numerator.shape, denominator.shape), np.nan)
    np.divide(numerator, denominator, out=quotient, where=denominator > 0)
    return quotient


def _mean_known(values: np.ndarray) -> np.ndarray:
    known = ~np.isnan(values)
    return _divide(np.where(known, values, 0).sum(axis=0), known.sum(axis=0))
