"""Subgroups: how well a model does by sex, age, view, scanner and site, from stored predictions."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from datamodules.errors import DataError
from lightning_modules.thresholds import Task, decide, probabilities
from studies.calibration_errors import calibration_errors, debiased, error_by_chance
from studies.operating_points import share
from studies.patient_bootstrap import DRAWS, SEED
from studies.patient_sums import bootstrap_counts, patient_mean, percentiles, weighted_auroc
from studies.statistics import holm
from studies.subgroup_attributes import UNKNOWN, group_numbers
from studies.subgroup_gaps import GAPS, Drawn, gap, mean_over_labels

MINIMUM = 10
"""Patients with a positive and patients with a negative image below which a group is too few to say anything."""

METRICS = ("auroc", "sensitivity", "fnr", "ece_debiased")

TABLE = {
    **dict.fromkeys(("attribute", "group", "label", "metric"), "str"),
    **dict.fromkeys(("value", "low", "high"), "float64"),
    **dict.fromkeys(("n", "n_patients", "n_positive"), "Int64"),
    "note": "str",
}
"""Columns and types of `Subgroups.table`."""

GAP = {
    **dict.fromkeys(("attribute", "label", "metric", "best", "worst"), "str"),
    **dict.fromkeys(("value", "low", "high", "p", "p_holm"), "float64"),
    "n_groups": "Int64",
    "note": "str",
}
"""Columns and types of `Subgroups.gaps`."""


class Subgroups(NamedTuple):
    """What `compare` returns.

    Attributes:
        table: One row an attribute, group, label ("" for a mean over labels) and metric; columns `TABLE`.
        gaps: One row an attribute, label and metric: `value` is the difference of `best` and `worst`; columns `GAP`.
    """

    table: pd.DataFrame
    gaps: pd.DataFrame


def compare(
    logits: np.ndarray,
    labels: np.ndarray,
    patients: Sequence[object] | np.ndarray,
    attributes: Mapping[str, Sequence[object] | np.ndarray],
    task: Task,
    class_names: Sequence[str],
    thresholds: Sequence[float],
    *,
    minimum: int = MINIMUM,
    draws: int = DRAWS,
    seed: int = SEED,
) -> Subgroups:
    """AUROC, sensitivity, false-negative rate and calibration error of each group, with 95 % intervals.

    Intervals come from a bootstrap over patients (sensitivity: see `operating_points.share`; calibration error: see
    `calibration_errors.debiased`). `ece_debiased` has 15 bins of equal width and is less its estimated bias, because a
    small group's error is inflated more. Images without a value of an attribute are its group "unknown", which has rows
    but no part in the gap.

    The gap of the best and the worst group is that of `subgroup_gaps.gap`; `p_holm` is corrected over the labels of one
    attribute and metric.

    Args:
        logits: (N, C) or (N, L).
        labels: int (N,) for multiclass, otherwise (N, L) with 1 / 0 / NaN = unknown.
        patients: (N,), whose image it is.
        attributes: Name → (N,) group of each image; "", NaN or None = unknown.
        task: multiclass (each class against the rest, decided by argmax), binary or multilabel.
        class_names: One a column of the logits.
        thresholds: Probabilities, one a label, chosen on validation; empty for multiclass.
        minimum: Patients with a positive, and with a negative, that a group needs; below it is "too few".
        draws: Number of resamples.
        seed: Of these draws.

    Raises:
        DataError: Not one threshold a label.
    """
    if task != "multiclass" and len(thresholds) != len(class_names):
        raise DataError(f"{len(thresholds)} decision thresholds for {len(class_names)} labels", valid="one a label")
    patient, names = pd.factorize(np.asarray(patients, dtype=object))
    counts = bootstrap_counts(len(names), draws, seed)
    scores = probabilities(logits, task)
    decided = decide(scores, thresholds, task)
    rows: list[dict[str, Any]] = []
    gaps: list[dict[str, Any]] = []
    for attribute, values in attributes.items():
        groups, code = group_numbers(values)
        drawn: dict[str, Drawn] = {}
        for column, label in enumerate(class_names):
            cells = _cells(column, logits, labels, scores, decided, code, patient)
            of_label = {"attribute": attribute, "label": label}
            found, drawn[label] = _label_rows(cells, groups, counts, minimum)
            rows += [{**of_label, **row} for row in found]
            gaps += [{**of_label, "metric": metric, **gap(drawn[label][metric], metric)} for metric in GAPS]
        found, of_means = _mean_rows(drawn, groups, code, patient)
        rows += [{"attribute": attribute, "label": "", **row} for row in found]
        gaps += [{"attribute": attribute, "label": "", **row} for row in of_means]
    return Subgroups(_typed(rows, TABLE), _with_holm(_typed(gaps, GAP)))


def _typed(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> pd.DataFrame:
    return pd.DataFrame(
        {name: pd.Series([row.get(name) for row in rows], dtype=kind) for name, kind in columns.items()}
    )


def _with_holm(gaps: pd.DataFrame) -> pd.DataFrame:
    for _, family in gaps.groupby(["attribute", "metric"]):
        gaps.loc[family.index, "p_holm"] = holm(family["p"].to_numpy())
    return gaps


class _Cells(NamedTuple):
    """Known cells of one label, (K,) each."""

    code: np.ndarray
    truth: np.ndarray
    decided: np.ndarray
    ranked: np.ndarray
    probability: np.ndarray
    patient: np.ndarray


def _cells(
    column: int,
    logits: np.ndarray,
    labels: np.ndarray,
    scores: np.ndarray,
    decided: np.ndarray,
    code: np.ndarray,
    patient: np.ndarray,
) -> _Cells:
    """Known cells of one column: a label, or a class against the rest."""
    several = labels.ndim == 1
    truth = (labels == column).astype(np.float64) if several else labels[:, column]
    known = np.flatnonzero(~np.isnan(truth))
    return _Cells(
        code[known],
        truth[known] == 1,
        (decided == column if several else decided[:, column] == 1)[known],
        (scores if several else logits)[known, column],
        scores[known, column],
        patient[known],
    )


def _label_rows(
    cells: _Cells, groups: Sequence[str], counts: np.ndarray, minimum: int
) -> tuple[list[dict[str, Any]], Drawn]:
    rows: list[dict[str, Any]] = []
    drawn: Drawn = {metric: {} for metric in (*GAPS, "chance")}
    for number, group in enumerate(groups):
        inside = cells.code == number
        part = _Cells(*(column[inside] for column in cells))
        positive, negative = (len(np.unique(part.patient[part.truth == kind])) for kind in (True, False))
        shared = {
            "group": group,
            "n": len(part.truth),
            "n_patients": len(np.unique(part.patient)),
            "n_positive": int(part.truth.sum()),
        }
        if min(positive, negative) < minimum:
            note = f"too few: {positive} patients with a positive and {negative} with a negative image"
            rows += _rows(shared, dict.fromkeys(METRICS, (np.nan, np.nan, np.nan)), note)
            continue
        hits = part.decided[part.truth], part.patient[part.truth], counts
        claims = part.probability, part.truth.astype(np.float64), part.patient
        values = {
            "auroc": weighted_auroc(part.truth, part.ranked, part.patient, counts),
            "sensitivity": patient_mean(*hits),
            "ece_debiased": calibration_errors(*claims, counts),
            "chance": error_by_chance(*claims),
        }
        hit = share(*hits)
        rows += _rows(shared, {**_estimates(values), "sensitivity": hit[:3], "fnr": hit.complement()[:3]})
        if group != UNKNOWN:
            for metric, one in values.items():
                drawn[metric][group] = one
    return rows, drawn


def _estimates(values: Mapping[str, np.ndarray]) -> dict[str, tuple[float, float, float]]:
    """Value, lower and upper end of each metric from its draws."""
    area, found = (float(values[metric][0]) for metric in ("auroc", "sensitivity"))
    low, high = percentiles(values["sensitivity"])
    ends = percentiles(values["auroc"])
    return {
        "auroc": (area, *ends) if ends[0] < ends[1] else (area, np.nan, np.nan),  # perfect: resamples do not differ
        "sensitivity": (found, low, high),
        "fnr": (1 - found, 1 - high, 1 - low),
        "ece_debiased": debiased(values["ece_debiased"], values["chance"]),
    }


def _rows(
    shared: Mapping[str, Any], estimates: Mapping[str, tuple[float, float, float]], note: str = ""
) -> list[dict[str, Any]]:
    return [
        {
            **shared,
            **dict(zip(("value", "low", "high"), estimates[metric], strict=True)),
            "metric": metric,
            "note": note or ("no interval from resamples" if np.isnan(estimates[metric][1]) else ""),
        }
        for metric in METRICS
    ]


def _mean_rows(
    drawn: Mapping[str, Drawn], groups: Sequence[str], code: np.ndarray, patient: np.ndarray
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows and gaps of the means over labels."""
    rows: list[dict[str, Any]] = []
    means, note = mean_over_labels(drawn)
    if not means:
        return [], []
    for group in means["auroc"]:
        inside = patient[code == groups.index(group)]
        size = {"group": group, "n": len(inside), "n_patients": len(np.unique(inside)), "n_positive": pd.NA}
        estimates = _estimates({metric: by_group[group] for metric, by_group in means.items()})
        rows += [{**row, "metric": f"mean_{row['metric']}"} for row in _rows(size, estimates, note)]
    gaps = [{**gap(means[metric], metric), "metric": f"mean_{metric}"} for metric in GAPS]
    return rows, [{**one, "note": "; ".join(filter(None, (note, one["note"])))} for one in gaps]
