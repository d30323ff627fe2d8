"""Does a score choose the right weights? Orderings of candidates, held against what the transfers achieved."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from studies.report import select_headline
from studies.report_text import budget_name
from studies.statistics import BUDGET, spread_baseline

SETTING = ("protocol", "transfer_depth", "frozen_depth", *BUDGET, "image_size", "metric")
"""What transfers have in common whose candidates are compared; `judge` runs once for each."""


def orderings(scores: pd.DataFrame) -> pd.DataFrame:
    """Places of the candidates by every measure.

    Args:
        scores: A row a candidate, a column a measure; higher is better, NaN = the measure does not apply.

    Returns:
        The same shape: 1 for the best, equal scores share the mean of their places, NaN stays.
    """
    return scores.rank(ascending=False, method="average")


def judge(scores: pd.DataFrame, achieved: pd.Series) -> pd.DataFrame:
    """Hold every ordering against what was achieved.

    Args:
        scores: As in `orderings`.
        achieved: What each candidate achieved, a fraction, by the same index; candidates without a result are left out.

    Returns:
        One row a measure: "measure", "n" candidates with a score and a result, "pick" (the best by the measure; all of
        them where several are equal), "tau" (Kendall's τ-b, which allows for ties; NaN for fewer than two candidates or
        where all are equal), "regret" (the best achieved by any candidate with a result, minus what the pick achieved;
        the mean of equal picks). The last row, "random pick", is what choosing without a measure would lose on average.
    """
    from scipy.stats import kendalltau

    results = achieved.reindex(scores.index).dropna()
    best = results.max() if len(results) else np.nan
    rows = []
    for measure in scores.columns:
        known = scores.loc[results.index, measure].dropna()
        reached = results[known.index]
        picks = known.index[known == known.max()]
        rows.append(
            {
                "measure": measure,
                "n": len(known),
                "pick": ", ".join(str(name) for name in picks),
                "tau": float(kendalltau(known, reached).statistic) if len(known) > 1 else np.nan,
                "regret": float(best - results[picks].mean()) if len(picks) else np.nan,
            }
        )
    loss = float(best - results.mean()) if len(results) else np.nan
    rows.append({"measure": "random pick", "n": len(results), "pick": "", "tau": np.nan, "regret": loss})
    return pd.DataFrame(rows, columns=["measure", "n", "pick", "tau", "regret"])


def achievements(frame: pd.DataFrame, target: str, hashes: Sequence[str], metric: str | None = None) -> pd.DataFrame:
    """What transfers from each candidate's weights achieved on the target, mean over seeds.

    Training from scratch is a candidate, too, in every protocol of the others.

    Args:
        frame: Result rows of `studies.results`.
        target: Name of the target data set.
        hashes: `weights_hash` of every candidate; "scratch" for runs without weights.
        metric: Metric to judge by; default accuracy, or mean_auroc where there is none.

    Returns:
        One row a setting: its columns `SETTING` and one for every hash, NaN where it has no result there. Empty where
        fewer than two candidates share a setting.

    Raises:
        ResultsError: The rows lack the metric, or it is no fraction.
    """
    columns = list(SETTING)
    rows = spread_baseline(frame[frame["target"].eq(target).fillna(False).astype(bool)])
    scratch = rows["source"].eq("scratch").fillna(False).astype(bool)
    rows = rows.assign(weights_hash=rows["weights_hash"].mask(scratch, "scratch"))
    rows = rows[rows["weights_hash"].isin(list(hashes))]
    if rows.empty:
        return pd.DataFrame(columns=[*columns, *hashes])
    rows = select_headline(rows, {target: metric} if metric else {})
    per_seed = rows.groupby([*columns, "weights_hash", "seed"], dropna=False)["value"].mean().reset_index()
    means = per_seed.groupby([*columns, "weights_hash"], dropna=False)["value"].mean().unstack("weights_hash")
    means = means.reindex(columns=list(dict.fromkeys(hashes)))
    return means[means.notna().sum(axis=1) > 1].reset_index()


def setting_name(row: pd.Series) -> str:
    """A setting of `achievements` in a few words."""
    depth = [] if pd.isna(row["transfer_depth"]) else [f"transfer depth {row['transfer_depth']}"]
    depth += [] if pd.isna(row["frozen_depth"]) or not row["frozen_depth"] else [f"frozen depth {row['frozen_depth']}"]
    shots = budget_name({str(name): row[name] for name in BUDGET})
    return ", ".join([str(row["protocol"]), *depth, f"shots {shots}" if shots.isdigit() else shots])
