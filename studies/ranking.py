"""Does a score choose the right weights? Orderings of candidates, held against what the transfers achieved."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from datamodules.errors import shorten
from studies.report import select_headline
from studies.report_text import budget_name
from studies.results import ResultsError
from studies.statistics import BUDGET, spread_baseline, varying

DEPTHS = ["transfer_depth", "frozen_depth", "granularity"]
SETTING = ("study", "protocol", *DEPTHS, *BUDGET, "image_size", "dials", "selection")
SETTING = (*SETTING, "split_policy", "label_policy", "metric")
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


def achievements(
    frame: pd.DataFrame, target: str, hashes: Sequence[str], metric: str | None = None, backbone: str | None = None
) -> pd.DataFrame:
    """What transfers from each candidate's weights achieved on the target, mean over the seeds that all of them have.

    Training from scratch is a candidate, too, in every protocol and at every depth of the others. Depths that the
    protocol and the architecture decide (such as all layer groups, more in one net than in another) do not part the
    candidates of one protocol; they are missing in its setting.

    Args:
        frame: Result rows of `studies.results`.
        target: Name of the target data set.
        hashes: `weights_hash` of every candidate; "scratch" for runs without weights.
        metric: Metric to judge by; default accuracy, or mean_auroc where there is none.
        backbone: Architecture of "scratch"; needed where several were trained from scratch.

    Returns:
        One row a setting: its columns `SETTING` and one for every hash, NaN where it has no result there. Empty where
        fewer than two candidates share a setting, or no seed and fold.

    Raises:
        ResultsError: The rows lack the metric, or it is no fraction; or a candidate has two results for one setting
            and seed.
    """
    empty = pd.DataFrame(columns=[*SETTING, *dict.fromkeys(hashes)])
    mine = frame["target"].eq(target).fillna(False).astype(bool) & frame["protocol"].ne("pretrain").fillna(True)
    rows = spread_baseline(frame[mine.astype(bool)])
    scratch = rows["source"].eq("scratch").fillna(False).astype(bool)
    if backbone is not None and backbone in set(rows.loc[scratch, "architecture"]):
        rows = rows[~scratch | rows["architecture"].eq(backbone).fillna(False)]
        scratch = scratch[rows.index]
    moved = rows[~scratch & rows["weights_hash"].isin(list(hashes)) & rows["transfer_depth"].ne(0).fillna(True)]
    begun = rows[scratch] if "scratch" in hashes else rows.iloc[:0]
    moved = _without_decided_depths(moved)
    place = ["study", "architecture", "protocol"]
    begun = begun.drop(columns=DEPTHS).merge(moved[[*place, *DEPTHS]].drop_duplicates(), on=place)
    rows = pd.concat([moved, begun.assign(weights_hash="scratch")[list(moved.columns)]], ignore_index=True)
    if rows.empty:
        return empty
    rows = select_headline(rows.astype(frame.dtypes.to_dict()), {target: metric} if metric else {})
    unit = [*SETTING, "fold", "seed"]
    _check_single(rows, [*unit, "weights_hash"])
    table = rows.groupby([*unit, "weights_hash"], dropna=False)["value"].first().unstack("weights_hash").reset_index()
    found = []
    for setting, part in table.groupby(list(SETTING), dropna=False):
        values = part.drop(columns=unit).dropna(axis=1, how="all").dropna()
        if len(values) and values.shape[1] > 1:
            per_seed = values.groupby(part.loc[values.index, "seed"], dropna=False).mean()
            means = {str(name): value for name, value in per_seed.mean().items()}
            found.append({**dict(zip(SETTING, setting, strict=True)), **means})
    return pd.DataFrame(found, columns=empty.columns)


def setting_name(row: pd.Series) -> str:
    """A setting of `achievements` in a few words."""
    blocks = " blocks" if str(row["granularity"]) == "block" else ""
    depth = [] if pd.isna(row["transfer_depth"]) else [f"transfer depth {row['transfer_depth']}{blocks}"]
    frozen = [] if pd.isna(row["frozen_depth"]) or not row["frozen_depth"] else [f"frozen depth {row['frozen_depth']}"]
    depth += [f"{name}{blocks}" for name in frozen]
    shots = budget_name({str(name): row[name] for name in BUDGET})
    size = [] if pd.isna(row["image_size"]) else [f"{row['image_size']} px"]
    return ", ".join([str(row["protocol"]), *depth, f"shots {shots}" if shots.isdigit() else shots, *size])


def _without_decided_depths(rows: pd.DataFrame) -> pd.DataFrame:
    """Blank the depths that differ between the architectures of a protocol but not within one."""
    for name in DEPTHS:
        if not varying(rows, ["study", "protocol", "architecture"], [name]):
            counts = rows.groupby(["study", "protocol"], dropna=False)[name].transform("nunique", dropna=False)
            rows = rows.assign(**{name: rows[name].mask(counts > 1)})
    return rows


def _check_single(rows: pd.DataFrame, unit: Sequence[str]) -> None:
    """Raise a ResultsError where a candidate has several values for one setting and seed."""
    doubled = rows[rows.duplicated(list(unit), keep=False)]
    if doubled.empty:
        return
    group = next(iter(doubled.groupby(list(unit), dropna=False, sort=False)))[1]
    names = [name for name in ("architecture", "source", "method", "cell", "run") if group[name].nunique() > 1]
    told = names[0] if names else "value"
    first = group.iloc[0]
    raise ResultsError(
        f"{len(group)} results of one candidate for one setting and seed, by {told}: {shorten(list(group[told]))}",
        where=f"weights_hash {first['weights_hash']}, {setting_name(first)}, seed {first['seed']}",
        valid="one",
        hint="name the net of scratch by --backbone"
        if told == "architecture"
        else "give --results a table (results.csv) of the runs that are meant",
    )
