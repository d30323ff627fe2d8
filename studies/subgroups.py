"""Subgroups: how well a model does by sex, age, view, scanner and site, from stored predictions."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from datamodules.errors import DataError
from lightning_modules.thresholds import Task, decide, probabilities
from studies.calibration import (
    bootstrap_counts,
    calibration_errors,
    debiased,
    error_by_chance,
    patient_mean,
    patient_sums,
    percentiles,
    ratio,
)
from studies.operating_points import share
from studies.patient_bootstrap import DRAWS, SEED
from studies.statistics import holm

UNKNOWN = "unknown"
MINIMUM = 10
"""Patients with a positive and patients with a negative image below which a group is too few to say anything."""

AGE_EDGES = (0, 20, 40, 60, 80)
OLDEST = 120
"""Years; NIH's table has ages up to 414, which are typing errors."""

METRICS = ("auroc", "sensitivity", "fnr", "ece_debiased")
GAPS = ("auroc", "sensitivity", "ece_debiased")  # the gap in FNR is that in sensitivity


@dataclass(frozen=True)
class Predictions:
    """One split of `predictions.parquet`.

    Attributes:
        ids: (N,), paths of the images.
        patients: (N,), whose image it is.
        labels: int64 (N,), or float32 (N, L) with 1 / 0 / NaN = unknown.
        logits: float32 (N, C) or (N, L).
        task: multiclass, or multilabel (binary is one label).
        class_names: One a column of the logits.
        metadata: Of `studies.outcome.SUBGROUPS` what the data set has; none in files of earlier versions.
    """

    ids: np.ndarray
    patients: np.ndarray
    labels: np.ndarray
    logits: np.ndarray
    task: Task
    class_names: list[str]
    metadata: dict[str, np.ndarray]


def read_predictions(path: Path | str, split: str = "test") -> Predictions:
    """Read one split of a run's predictions, as `studies.outcome.write_predictions` stored them.

    Raises:
        DataError: The file is missing or no such table, or has no rows of this split.
    """
    try:
        frame = pd.read_parquet(path)
        part = frame[frame["split"] == split]
        names = [str(name).removeprefix("logit/") for name in frame.columns if str(name).startswith("logit/")]
        several = "label" in frame.columns
        labels = part["label"] if several else part[[f"label/{name}" for name in names]]
        ids, patients = (part[name].to_numpy(dtype=object) for name in ("id", "group"))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"cannot read predictions: {error}",
            where=str(path),
            valid="a run's predictions.parquet: id, group, split, label, logit/<class>, ...",
        ) from error
    if part.empty:
        raise DataError(
            f"there are no predictions of {split}",
            where=str(path),
            valid=sorted(set(frame["split"])),
            hint="run `test` or `validate` of this run",
        )
    metadata = {
        str(name).removeprefix("meta/"): part[name].to_numpy() for name in part.columns if str(name).startswith("meta/")
    }
    logits = part[[f"logit/{name}" for name in names]].to_numpy(dtype=np.float32)
    task: Task = "multiclass" if several else "multilabel"
    return Predictions(ids, patients, labels.to_numpy(), logits, task, names, metadata)


def age_bands(years: np.ndarray, edges: Sequence[int] = AGE_EDGES) -> np.ndarray:
    """Names of age bands, object (N,): "0-19", ..., "80+"; unknown where NaN, below the first edge or above `OLDEST`.

    Args:
        years: (N,), NaN = unknown.
        edges: First year of each band, ascending.
    """
    names = [f"{low}-{high - 1}" for low, high in pairwise(edges)] + [f"{edges[-1]}+", UNKNOWN]
    band = np.searchsorted(edges, years, side="right") - 1
    return np.asarray(names, dtype=object)[np.where((band < 0) | ~(years <= OLDEST), len(edges), band)]


def attributes_of(metadata: Mapping[str, np.ndarray], edges: Sequence[int] = AGE_EDGES) -> dict[str, np.ndarray]:
    """Attributes to compare by: metadata columns as they are, age in bands."""
    return {name: age_bands(values, edges) if name == "age" else values for name, values in metadata.items()}


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
    `calibration.debiased`). `ece_debiased` has 15 bins of equal width and is less its estimated bias, because a small
    group's error is inflated more. Images without a value of an attribute are its group "unknown", which has rows but
    no part in the gap.

    The gap is the difference of the best and the worst group. The largest less the smallest of several noisy values is
    biased upwards, so its interval is simultaneous over all pairs of groups: [gap - q, gap + q] with q the 95 %
    quantile of the range, over groups, of a resample's deviations. p is the share of resamples with a range of
    deviations at least as large as the gap: how often groups that are equal would show it. `p_holm` is corrected over
    the labels of one attribute and metric.

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
    """
    patient, names = pd.factorize(np.asarray(patients, dtype=object))
    counts = bootstrap_counts(len(names), draws, seed)
    scores = probabilities(logits, task)
    decided = decide(scores, thresholds, task)
    rows: list[dict[str, Any]] = []
    gaps: list[dict[str, Any]] = []
    for attribute, values in attributes.items():
        groups, code = _groups(values)
        drawn: dict[str, _Drawn] = {}
        for column, label in enumerate(class_names):
            several = task == "multiclass"
            truth = (labels == column).astype(np.float64) if several else labels[:, column]
            known = np.flatnonzero(~np.isnan(truth))
            cells = _Cells(
                code[known],
                truth[known] == 1,
                (decided == column if several else decided[:, column] == 1)[known],
                (scores if several else logits)[known, column],
                scores[known, column],
                patient[known],
            )
            found, drawn[label] = _label_rows(cells, groups, counts, minimum)
            rows += [{"attribute": attribute, "label": label, **row} for row in found]
            gaps += [
                {"attribute": attribute, "label": label, "metric": metric, **_gap(drawn[label][metric], metric)}
                for metric in GAPS
            ]
        means, note = _mean_over_labels(drawn)
        shared = {"attribute": attribute, "label": ""}
        for group in means["auroc"]:
            inside = patient[code == groups.index(group)]
            size = {"group": group, "n": len(inside), "n_patients": len(np.unique(inside)), "n_positive": pd.NA}
            estimates = _estimates({metric: by_group[group] for metric, by_group in means.items()})
            rows += [{**row, **shared, "metric": f"mean_{row['metric']}"} for row in _rows(size, estimates, note)]
        for metric in GAPS if means["auroc"] else ():
            gap = _gap(means[metric], metric)
            both = "; ".join(filter(None, (note, gap["note"])))
            gaps.append({**gap, **shared, "metric": f"mean_{metric}", "note": both})
    return Subgroups(_typed(rows, TABLE), _with_holm(_typed(gaps, GAP)))


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


def _groups(values: Sequence[object] | np.ndarray) -> tuple[list[str], np.ndarray]:
    """Names in order of their leading number and letters, unknown last; the group's number of each image."""
    code, found = pd.factorize(np.asarray(values, dtype=object))
    names = [*(str(name).strip() or UNKNOWN for name in found), UNKNOWN]  # a missing value has the code -1

    def place(name: str) -> tuple[bool, float, str]:
        leading = re.match(r"\d+", name)
        return name == UNKNOWN, float(leading[0]) if leading else np.inf, name

    used = sorted({names[i] for i in np.unique(code)}, key=place)
    number = {name: i for i, name in enumerate(used)}
    return used, np.asarray([number.get(name, -1) for name in names])[code]


_Drawn = dict[str, dict[str, np.ndarray]]
"""Metric → known group with enough patients → values (1 + draws,), the first of them of the sample. And "chance" →
group → the two numbers of `error_by_chance`."""


def _label_rows(
    cells: _Cells, groups: Sequence[str], counts: np.ndarray, minimum: int
) -> tuple[list[dict[str, Any]], _Drawn]:
    rows: list[dict[str, Any]] = []
    drawn: _Drawn = {metric: {} for metric in (*GAPS, "chance")}
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


def _mean_over_labels(drawn: Mapping[str, _Drawn]) -> tuple[_Drawn, str]:
    """Means over the labels that every group has enough of, so that groups are compared on the same labels."""
    groups = dict.fromkeys(group for one in drawn.values() for group in one["auroc"])
    common = [one for one in drawn.values() if len(one["auroc"]) == len(groups)]
    if len(common) < 2:
        return {metric: {} for metric in GAPS}, ""
    means = {
        metric: {group: np.mean([one[metric][group] for one in common], axis=0) for group in groups}
        for metric in common[0]
    }
    return means, f"mean of {len(common)} labels with enough patients in every group"


def _gap(values: Mapping[str, np.ndarray], metric: str) -> dict[str, Any]:
    names = list(values)
    drawn = np.stack([values[name] for name in names]) if names else np.empty((0, 1))
    complete = drawn[:, 1:][:, ~np.isnan(drawn[:, 1:]).any(axis=0)]
    if len(names) < 2 or not complete.size:
        return {"best": "", "worst": "", "n_groups": len(names), "note": "fewer than two groups with enough patients"}
    point = drawn[:, 0]
    if metric == "ece_debiased":
        point = np.maximum(2 * point - complete.mean(axis=1), 0.0)
    gap = float(point.max() - point.min())
    deviations = complete - complete.mean(axis=1, keepdims=True)
    spread = deviations.max(axis=0) - deviations.min(axis=0)
    reach = float(np.quantile(spread, 0.95))
    ends = names[int(point.argmax())], names[int(point.argmin())]
    best, worst = ends[::-1] if metric == "ece_debiased" else ends
    still = [name for name, row in zip(names, deviations, strict=True) if not row.any()]
    return {
        "best": best,
        "worst": worst,
        "value": gap,
        "low": max(gap - reach, 0.0),
        "high": min(gap + reach, 1.0),
        "p": (1 + np.count_nonzero(spread >= gap - 1e-12)) / (1 + len(spread)),
        "n_groups": len(names),
        "note": f"interval and p too optimistic: no resample of {', '.join(still)} differs" if still else "",
    }


def weighted_auroc(truth: np.ndarray, scores: np.ndarray, patient: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Area under the ROC curve of the sample and of each resample of patients.

    The same numbers as `patient_bootstrap.weighted_ranking` with a twentieth of its time: only the places of the
    positives are visited, negatives between two of them are summed by a sparse product.

    Args:
        truth: bool (N,).
        scores: (N,), higher means more likely positive; no NaN.
        patient: int (N,), rows of `counts`.
        counts: (P, B).

    Returns:
        float64 (B,), NaN where positives or negatives are missing.
    """
    steps, place = np.unique(scores[truth], return_inverse=True)
    # Negatives below step k are in the slots up to 2k, those tied with it in slot 2k + 1.
    slot = sum(np.searchsorted(steps, scores[~truth], side) for side in ("left", "right"))
    positive = patient_sums(place, np.ones(len(place)), patient[truth], counts, len(steps))
    negative = patient_sums(slot, np.ones(len(slot)), patient[~truth], counts, 2 * len(steps) + 1)
    below = np.cumsum(negative, axis=0)
    won = (positive * (below[0:-1:2] + negative[1::2] / 2)).sum(axis=0)
    return ratio(won, positive.sum(axis=0) * below[-1])
