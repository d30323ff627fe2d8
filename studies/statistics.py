"""Means, spreads and intervals over seeds, and paired gains over a baseline: pure functions on rows."""

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
from scipy.special import stdtr, stdtrit

CONFIDENCE = 0.95

ROUNDING = 1e-12
"""A spread below this share of the mean (or of 1) is rounding of equal values."""

#: How much of the target was given. One of the three is used by a cell.
BUDGET = ("shots", "num_images", "fraction")

#: What a run and the baseline it is held against must have in common, besides seed and fold.
SHARED = (
    *("study", "target", "architecture", "protocol", *BUDGET),
    *("image_size", "selection", "split_policy", "metric", "class_name", "subgroup"),
)


def summarise(frame: pd.DataFrame, by: Sequence[str], value: str = "value") -> pd.DataFrame:
    """Summarise the values of each group over seeds.

    Several values of one seed (folds) are averaged first, so that the unit of replication is the seed: values
    of one seed share their draw and are not independent. NaN (an undefined metric) is left out.

    Args:
        frame: Rows with the columns `by`, "seed" and `value`.
        by: The columns that make a group; missing values are a group of their own.
        value: The column to summarise.

    Returns:
        One row a group, sorted by `by`: these columns, then `n` (distinct seeds with a value), `mean`, `sd`
        (ddof 1; NaN for one seed) and `low`, `high`, the 95 % t interval of the mean (NaN for one seed).
    """
    keys = list(by)
    per_seed = frame.groupby([*keys, "seed"], dropna=False)[value].mean().reset_index()
    table = per_seed.groupby(keys, dropna=False)[value].agg(["count", "mean", "std"]).reset_index()
    table = table.rename(columns={"count": "n", "std": "sd"})
    half = half_width(table["n"].to_numpy(), table["sd"].to_numpy(dtype=float))
    return table.assign(low=table["mean"] - half, high=table["mean"] + half)


def half_width(n: np.ndarray, sd: np.ndarray, confidence: float = CONFIDENCE) -> np.ndarray:
    """Half the width of a mean's t interval: t((1 + confidence) / 2; n - 1) · sd / √n; NaN below two values.

    Args:
        n: Numbers of values, integers of any shape.
        sd: Their standard deviations with ddof 1, the same shape.
        confidence: Coverage in (0, 1).
    """
    enough = n > 1
    count = np.where(enough, n, 2)
    return np.where(enough, stdtrit(count - 1, (1 + confidence) / 2) * sd / np.sqrt(count), np.nan)


def paired_p(n: np.ndarray, mean: np.ndarray, sd: np.ndarray) -> np.ndarray:
    """Two-sided p of paired t tests from the differences' numbers, means and standard deviations (ddof 1), any shape.

    NaN below two pairs. Differences that are equal but for rounding: 1 where they are zero, otherwise NaN, because a
    few equal differences, which coarse metrics often have, say nothing of their spread.
    """
    enough = np.asarray(n) > 1
    count = np.where(enough, n, 2)
    size = np.abs(mean)
    spread = sd > ROUNDING * np.maximum(size, 1)
    t = np.divide(size * np.sqrt(count), sd, where=spread, out=np.zeros_like(size, dtype=float))
    p = np.where(spread, 2 * stdtr(count - 1, -t), np.where(size <= ROUNDING, 1.0, np.nan))
    return np.where(enough, p, np.nan)


def holm(p: np.ndarray) -> np.ndarray:
    """Holm's step-down correction (Holm 1979) of p values (m,); NaN are no tests and stay."""
    order = np.argsort(p)  # NaN last
    tests = int(np.isfinite(p).sum())
    corrected = np.full(len(p), np.nan)
    steps = np.arange(tests, 0, -1) * p[order[:tests]]
    corrected[order[:tests]] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return corrected


def gain_over(frame: pd.DataFrame, baseline_source: str = "scratch", settings: Sequence[str] = ()) -> pd.DataFrame:
    """Paired differences of each source to a baseline source, over seeds.

    A run is paired with the baseline run of the same seed and fold that agrees in all of `SHARED`; baseline
    runs under the protocol "scratch" stand for every protocol (see `spread_baseline`). Runs without a partner
    are left out.

    Args:
        frame: Result rows.
        baseline_source: The source to compare with.
        settings: Further columns that tell the sources' runs apart (such as "method"); the baseline needs not
            have them.

    Returns:
        One row for each group of `SHARED`, "source" and `settings`: these columns, then `n` (pairs: distinct
        seeds), `mean`, `sd` and `baseline_mean`, `baseline_sd` over the paired seeds, `gain` (mean
        difference), `gain_sd`, and `low`, `high`, the 95 % t interval of the gain (NaN for one pair). Empty
        where nothing pairs.
    """
    is_baseline = frame["source"].eq(baseline_source).fillna(False).astype(bool)
    spread = spread_baseline(frame, baseline_source)
    baseline = spread[spread["source"].eq(baseline_source).fillna(False).astype(bool)]
    unit = [*SHARED, "fold", "seed"]
    baseline = baseline.groupby(unit, dropna=False)["value"].mean().reset_index()
    pairs = frame[~is_baseline].merge(baseline, on=unit, suffixes=("", "_baseline"))
    pairs = pairs.dropna(subset=["value", "value_baseline"])
    pairs = pairs.assign(gain=pairs["value"] - pairs["value_baseline"])
    by = list(dict.fromkeys([*SHARED, "source", *settings]))
    table = summarise(pairs, by, "gain").rename(columns={"mean": "gain", "sd": "gain_sd"})
    own, reference = summarise(pairs, by), summarise(pairs, by, "value_baseline")
    table = table.assign(mean=own["mean"], sd=own["sd"], baseline_mean=reference["mean"], baseline_sd=reference["sd"])
    return table[[*by, "n", "mean", "sd", "baseline_mean", "baseline_sd", "gain", "gain_sd", "low", "high"]]


def spread_baseline(frame: pd.DataFrame, baseline_source: str = "scratch") -> pd.DataFrame:
    """Let the baseline's runs under the protocol "scratch" stand beside every protocol of the other sources.

    Training from scratch is one protocol, and the partner of all others: its rows are repeated under each
    protocol that other sources use on the same target and architecture, unless the baseline was run under
    that protocol itself. Where no other source exists the rows stay as they are.
    """
    place = ["target", "architecture"]
    is_baseline = frame["source"].eq(baseline_source).fillna(False).astype(bool)
    from_scratch = is_baseline & frame["protocol"].eq("scratch").fillna(False).astype(bool)
    wanted = frame.loc[~is_baseline, [*place, "protocol"]].drop_duplicates()
    present = frame.loc[is_baseline & ~from_scratch, [*place, "protocol"]].drop_duplicates()
    wanted = wanted.merge(present, on=[*place, "protocol"], how="left", indicator="found")
    wanted = wanted.loc[wanted["found"] == "left_only", [*place, "protocol"]]
    merged = frame[from_scratch].merge(wanted, on=place, how="left", suffixes=("_scratch", ""))
    merged["protocol"] = merged["protocol"].fillna(merged["protocol_scratch"])
    return pd.concat([frame[~from_scratch], merged[list(frame.columns)]], ignore_index=True)


def varying(frame: pd.DataFrame, by: Sequence[str], candidates: Iterable[str]) -> list[str]:
    """The candidate columns that take more than one value (missing counts as one) inside a group of `by`."""
    names = [name for name in candidates if frame[name].nunique(dropna=False) > 1]
    counts = frame.groupby(list(by), dropna=False)[names].nunique(dropna=False) if names else pd.DataFrame()
    return [name for name in names if counts[name].max() > 1]
