"""Operating points: thresholds chosen on validation, and what they give on test. Pure functions on arrays."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from datamodules.errors import DataError
from studies.patient_bootstrap import DRAWS, SEED
from studies.patient_sums import bootstrap_counts, patient_mean, percentiles, wilson


def threshold_at_specificity(scores: np.ndarray, positive: np.ndarray, specificity: float) -> float:
    """The lowest threshold with at least this specificity: of its negatives' scores one; positive is above it.

    Args:
        scores: (N,), higher means more likely positive.
        positive: bool (N,).
        specificity: In (0, 1).

    Returns:
        A threshold, to be used on other data; NaN without negatives.
    """
    negatives = np.sort(scores[~positive])
    return float(negatives[_needed(specificity, len(negatives)) - 1]) if len(negatives) else np.nan


def threshold_at_sensitivity(scores: np.ndarray, positive: np.ndarray, sensitivity: float) -> float:
    """The highest threshold with at least this sensitivity: the number next below the last positive it needs.

    Args:
        scores: (N,), higher means more likely positive.
        positive: bool (N,).
        sensitivity: In (0, 1).

    Returns:
        A threshold, to be used on other data; NaN without positives.
    """
    positives = np.sort(scores[positive])[::-1]
    if not len(positives):
        return np.nan
    return float(np.nextafter(positives[_needed(sensitivity, len(positives)) - 1], -np.inf))


def _needed(share: float, n: int) -> int:
    """The fewest of n that are at least this share; rounding of the product must not ask for one more."""
    return math.ceil(share * n - 1e-9)


class Share(NamedTuple):
    """A proportion with its 95 % interval.

    Attributes:
        value: NaN where there is nothing to count.
        low: NaN where undefined.
        high: NaN where undefined.
        n: Images.
        n_patients: Whose images these are.
        interval: How the interval was made; "" where there is none.
    """

    value: float
    low: float
    high: float
    n: int
    n_patients: int
    interval: str

    def complement(self) -> "Share":
        """1 - value, with its interval."""
        return self._replace(value=1 - self.value, low=1 - self.high, high=1 - self.low)


def share(hits: np.ndarray, patient: np.ndarray, counts: np.ndarray) -> Share:
    """A proportion: Wilson's interval where each patient has one image, else a bootstrap over patients.

    Where all or none of the images are hits no resample differs, so that the bootstrap would claim certainty: Wilson's
    interval then counts each patient once.

    Args:
        hits: bool (N,).
        patient: int (N,), rows of `counts`.
        counts: (P, 1 + draws), see `studies.patient_sums.bootstrap_counts`.
    """
    n, patients = len(hits), len(np.unique(patient))
    if not n:
        return Share(np.nan, np.nan, np.nan, 0, 0, "")
    value = float(hits.mean())
    if patients == n:
        return Share(value, *wilson(hits.sum(), n), n, patients, "Wilson")
    if value in (0.0, 1.0):
        return Share(value, *wilson(value * patients, patients), n, patients, "Wilson, a patient counted once")
    low, high = percentiles(patient_mean(hits, patient, counts))
    return Share(value, low, high, n, patients, "" if np.isnan(low) else "bootstrap over patients")


def operating_points(
    validation: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    patients: Sequence[object] | np.ndarray,
    label_names: Sequence[str],
    *,
    prevalences: Sequence[float],
    specificities: Sequence[float] = (0.9, 0.95),
    sensitivities: Sequence[float] = (0.9, 0.95),
    draws: int = DRAWS,
    seed: int = SEED,
) -> pd.DataFrame:
    """What thresholds that reach a specificity or a sensitivity on validation give on test.

    Thresholds never see the test set, so the specificity reached there differs from the one asked for, and is given.
    Intervals are of the test set at this threshold; they leave out that validation is a sample, too.

    Args:
        validation: Scores (N, L), higher means more likely positive, and labels (N, L), 1 / 0 / NaN = unknown.
        test: The same of the test set; scores on the same scale.
        patients: (N,) of the test set.
        label_names: One a column.
        prevalences: In (0, 1): those at which predictive values are stated. The sample's own is that of its selection.
        specificities: To reach on validation, in (0, 1).
        sensitivities: To reach on validation, in (0, 1).
        draws: Number of resamples of patients.
        seed: Of these draws.

    Returns:
        One row a label, rule and metric: `label`, `rule` ("specificity" or "sensitivity" on validation), `target`,
        `threshold`, `metric` ("sensitivity", "specificity", "ppv", "npv"), `prevalence` (NaN but for predictive
        values), `value`, `low`, `high` (95 %), `n` and `n_patients` (the images that the metric counts: positives,
        negatives, or both), `interval` (how it was made) and `note` (why a value is missing).

    Raises:
        DataError: A target or prevalence outside (0, 1).
    """
    for where, values in (
        ("prevalences", prevalences), ("specificities", specificities), ("sensitivities", sensitivities),
    ):  # fmt: skip
        wrong = [value for value in values if not 0 < value < 1]
        if wrong:
            raise DataError(f"{wrong[0]} is no share", where=where, valid="numbers above 0 and below 1")
    patient, names = pd.factorize(np.asarray(patients, dtype=object))
    counts = bootstrap_counts(len(names), draws, seed)
    rows: list[dict[str, Any]] = []
    for column, label in enumerate(label_names):
        old_scores, old, _ = _known(*validation, column)
        scores, truth, kept = _known(*test, column)
        owner = patient[kept]
        rules = [("specificity", t, threshold_at_specificity(old_scores, old, t)) for t in specificities]
        rules += [("sensitivity", t, threshold_at_sensitivity(old_scores, old, t)) for t in sensitivities]
        for rule, target, threshold in rules:
            note, found = "", _rates(scores, truth, owner, counts, threshold)
            if np.isnan(threshold):
                note = f"validation has no {'negatives' if rule == 'specificity' else 'positives'}"
            shared = {"label": label, "rule": rule, "target": target, "threshold": threshold}
            rows += [{**shared, **row} for row in _metric_rows(found, len(np.unique(owner)), prevalences, note)]
    return pd.DataFrame(rows)


def _rates(
    scores: np.ndarray, truth: np.ndarray, owner: np.ndarray, counts: np.ndarray, threshold: float
) -> dict[str, Share]:
    """Sensitivity and specificity at a threshold; undefined without one."""
    if np.isnan(threshold):
        return dict.fromkeys(("sensitivity", "specificity"), Share(np.nan, np.nan, np.nan, 0, 0, ""))
    return {
        "sensitivity": share(scores[truth] > threshold, owner[truth], counts),
        "specificity": share(scores[~truth] <= threshold, owner[~truth], counts),
    }


def _known(scores: np.ndarray, labels: np.ndarray, column: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores of one label (float64: a threshold must not be rounded), whether positive, and rows; of known cells."""
    rows = np.flatnonzero(~np.isnan(labels[:, column]))
    return scores[rows, column].astype(np.float64), labels[rows, column] == 1, rows


def _metric_rows(
    found: dict[str, Share], n_patients: int, prevalences: Sequence[float], note: str
) -> list[dict[str, Any]]:
    """Rows of sensitivity and specificity, and of the predictive values that follow at each prevalence."""
    lacking = {"sensitivity": "test has no positives", "specificity": "test has no negatives"}
    notes = {metric: note or (lacking[metric] if not found[metric].n else "") for metric in found}
    rows = [
        {"metric": metric, "prevalence": np.nan, **one._asdict(), "note": notes[metric]}
        for metric, one in found.items()
    ]
    either = next(filter(None, notes.values()), "")
    sensitivity, specificity = found["sensitivity"], found["specificity"]
    for prevalence in prevalences:
        odds = prevalence / (1 - prevalence)
        for metric, prior, right, wrong, called in (
            ("ppv", odds, sensitivity, specificity.complement(), "positive"),
            ("npv", 1 / odds, specificity, sensitivity.complement(), "negative"),
        ):
            value = predictive_value(prior, right, wrong)._replace(n_patients=0 if note else n_patients)
            empty = f"no test image is called {called}" if np.isnan(value.value) else ""
            rows.append({"metric": metric, "prevalence": prevalence, **value._asdict(), "note": either or empty})
    return rows


def predictive_value(prior_odds: float, right: Share, wrong: Share) -> Share:
    """Probability that a call is right: prior odds · rate of right calls / rate of wrong calls, as a probability.

    The interval is recovered from those of the two rates (MOVER for a ratio: Donner & Zou 2012, Newcombe 2016). It
    needs no resample and stays sensible where a rate is 0 or 1. It takes the rates as independent: they are of
    different images, but of patients that may have both kinds.

    Args:
        prior_odds: Odds of the called outcome at the stated prevalence.
        right: Share of the images with that outcome that are called so.
        wrong: Share of the images with the other outcome that are called so.

    Returns:
        The value, NaN where nothing is called so; `n_patients` counts a patient with both kinds twice.
    """
    n, patients = right.n + wrong.n, right.n_patients + wrong.n_patients
    if not (right.value + wrong.value > 0):  # also NaN
        return Share(np.nan, np.nan, np.nan, n, patients, "")
    product = right.value * wrong.value
    lower = right.low * (2 * right.value - right.low)
    upper = right.high * (2 * right.value - right.high)
    root_low = math.sqrt(max(product**2 - lower * wrong.high * (2 * wrong.value - wrong.high), 0.0))
    bottom = wrong.low * (2 * wrong.value - wrong.low)
    root_high = math.sqrt(max(product**2 - upper * bottom, 0.0))
    ratios = (
        lower / (product + root_low) if lower > 0 else 0.0,
        right.value / wrong.value if wrong.value > 0 else math.inf,
        (product + root_high) / bottom if bottom > 0 else math.inf,
    )
    low, value, high = (1.0 if math.isinf(one) else prior_odds * one / (1 + prior_odds * one) for one in ratios)
    if np.isnan([right.low, wrong.low]).any():  # a rate without an interval
        return Share(value, np.nan, np.nan, n, patients, "")
    return Share(value, low, high, n, patients, "MOVER")
