"""Gaps between subgroups: the best less the worst, allowing for having picked the two."""

from collections.abc import Mapping
from typing import Any

import numpy as np

GAPS = ("auroc", "sensitivity", "ece_debiased")  # the gap in FNR is that in sensitivity

Drawn = dict[str, dict[str, np.ndarray]]
"""Metric → known group with enough patients → values (1 + draws,), the first of them of the sample. And "chance" →
group → the two numbers of `calibration_errors.error_by_chance`."""


def gap(values: Mapping[str, np.ndarray], metric: str) -> dict[str, Any]:
    """Difference of the best and the worst group, with a simultaneous 95 % interval.

    The largest less the smallest of several noisy values is biased upwards, so the interval holds for all pairs of
    groups at once: [gap - q, gap + q] with q the 95 % quantile of the range, over groups, of a resample's deviations.
    p is the share of resamples with a range of deviations at least as large as the gap: how often groups that are equal
    would show it.

    Args:
        values: Group → (1 + draws,) of the metric.
        metric: Of `GAPS`.

    Returns:
        "best", "worst", "n_groups" and "note", and where two groups have enough patients "value", "low", "high", "p".
    """
    names = list(values)
    drawn = np.stack([values[name] for name in names]) if names else np.empty((0, 1))
    complete = drawn[:, 1:][:, ~np.isnan(drawn[:, 1:]).any(axis=0)]
    if len(names) < 2 or not complete.size:
        return {"best": "", "worst": "", "n_groups": len(names), "note": "fewer than two groups with enough patients"}
    point = drawn[:, 0]
    if metric == "ece_debiased":
        point = np.maximum(2 * point - complete.mean(axis=1), 0.0)
    value = float(point.max() - point.min())
    deviations = complete - complete.mean(axis=1, keepdims=True)
    spread = deviations.max(axis=0) - deviations.min(axis=0)
    reach = float(np.quantile(spread, 0.95))
    ends = names[int(point.argmax())], names[int(point.argmin())]
    best, worst = ends[::-1] if metric == "ece_debiased" else ends
    still = [name for name, row in zip(names, deviations, strict=True) if not row.any()]
    return {
        "best": best,
        "worst": worst,
        "value": value,
        "low": max(value - reach, 0.0),
        "high": min(value + reach, 1.0),
        "p": (1 + np.count_nonzero(spread >= value - 1e-12)) / (1 + len(spread)),
        "n_groups": len(names),
        "note": f"interval and p too optimistic: no resample of {', '.join(still)} differs" if still else "",
    }


def mean_over_labels(drawn: Mapping[str, Drawn]) -> tuple[Drawn, str]:
    """Means over the labels that every group has enough of, so that groups are compared on the same labels.

    Returns:
        The means, empty for fewer than two such labels; and a note that counts them.
    """
    groups = dict.fromkeys(group for one in drawn.values() for group in one["auroc"])
    common = [one for one in drawn.values() if len(one["auroc"]) == len(groups)]
    if len(common) < 2:
        return {}, ""
    means = {
        metric: {group: np.mean([one[metric][group] for one in common], axis=0) for group in groups}
        for metric in common[0]
    }
    return means, f"mean of {len(common)} labels with enough patients in every group"
