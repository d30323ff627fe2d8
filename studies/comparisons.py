"""All pairs of sources (or architectures, methods, protocols) on equal seeds, as claims that the intervals allow."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from datamodules.errors import DataError, closest, shorten
from studies.statistics import CONFIDENCE, SHARED, holm, paired_p, spread_baseline
from studies.variance_components import over_runs

DEPTHS = ("transfer_depth", "frozen_depth", "granularity")
MATCHED = (*SHARED, "source", "source_n", "source_dials", "method", *DEPTHS, "dials", "label_policy")
"""What two runs have in common, besides seeds and folds, unless it is compared."""

GOES_WITH = {
    "source": ("source_n", "source_dials", "method"),
    "source_n": ("source", "source_dials"),
    "protocol": (*DEPTHS, "selection"),
}
"""What changes with a compared column, and so need not be equal."""


def compare(frame: pd.DataFrame, by: str | Sequence[str] = "source", baseline: str | None = None) -> pd.DataFrame:
    """Paired differences of all pairs of contestants within each setting.

    A setting is a value of all columns of `MATCHED` that are neither compared nor go with what is. Runs are paired on
    seed and fold, and on the pre-training seed where both contestants have several; folds are averaged. An interval is
    for other seeds (and pre-trainings, where there are several) on the same test set. Training from scratch stands
    beside every protocol and depth of the other sources.

    Args:
        frame: Result rows. Holm's correction is over all rows that come out: give it the metric of the claim alone.
        by: The column that names the contestants, or several whose combinations do.
        baseline: A contestant of `by` that all others are held against: whether they help is one question and which of
            them helps most another, so p is corrected over the pairs with it, and over the others, each by themselves.

    Returns:
        One row a pair of contestants and setting, in the settings' order of appearance: the setting's columns, those of
        `by`, and the same ending in "_reference"; "n" (pairs), "pretrainings" and "seeds" among them, "unit" in words;
        "mean" and "mean_reference" over the pairs, "difference", "low", "high" (95 % t interval), "p", "p_holm" and
        "verdict": "higher" or "lower" (by p_holm) than the reference, "not distinguishable", "one pair: no claim", or
        "no spread: no claim" where all pairs differ by the same. Empty where nothing pairs.

    Raises:
        DataError: A column is missing, or two runs of a contestant share setting, seeds and fold.
    """
    names = [by] if isinstance(by, str) else list(by)
    _require(frame, [*names, "pretrain_seed", "seed", "fold", "value"])
    rows = _beside_others(frame) if "source" in names else frame
    rows = rows.dropna(subset=["value"]).reset_index(drop=True)
    free = {*names, *(column for name in names for column in GOES_WITH.get(name, ()))}
    setting = [column for column in MATCHED if column in frame and column not in free]
    runs = pd.DataFrame(
        {
            "setting": rows.groupby(setting, dropna=False, sort=False).ngroup(),
            "contestant": rows.groupby(names, dropna=False).ngroup(),
            **{
                name: rows[name].astype("Float64").to_numpy(float, na_value=np.nan)
                for name in ("pretrain_seed", "seed", "fold")
            },
            "value": rows["value"].to_numpy(float),
        }
    )
    _require_one_run_each(rows, runs, names)
    pairs = _pairs(runs)
    key = ["setting", "contestant", "contestant_reference"]
    pairs = pairs.assign(group=pairs.groupby(key).ngroup())
    table = over_runs(pairs, "difference").rename(columns={"mean": "difference"})
    groups = pairs.groupby("group")
    first = groups[["row", "row_reference"]].first()
    freedom = table["freedom"].to_numpy()
    p = paired_p(freedom + 1, table["difference"].to_numpy(), table["se"].to_numpy() * np.sqrt(freedom + 1))
    facts = {name: rows[name].iloc[first["row"]].to_numpy() for name in (*setting, *names)}
    reference = {f"{name}_reference": rows[name].iloc[first["row_reference"]].to_numpy() for name in names}
    sides = (facts[names[0]], reference[f"{names[0]}_reference"])
    described = table.assign(p=p, p_holm=_by_family(p, sides, baseline), unit=_units(table, groups["fold"].nunique()))
    described = described.assign(
        mean=groups["value"].mean(), mean_reference=groups["value_reference"].mean(), verdict=_verdicts(described)
    )
    shown = ["n", "pretrainings", "seeds", "unit", "mean", "mean_reference", "difference", "low", "high", "p", "p_holm"]
    return pd.concat([pd.DataFrame(facts | reference), described[[*shown, "verdict"]].reset_index(drop=True)], axis=1)


def _by_family(p: np.ndarray, sides: Sequence[np.ndarray], baseline: str | None) -> np.ndarray:
    """Holm's correction over the pairs with the baseline, and over the others, each by themselves."""
    asked = np.any([[baseline is not None and name == baseline for name in side] for side in sides], axis=0)
    corrected = np.full(len(p), np.nan)
    for family in (asked, ~asked):
        corrected[family] = holm(p[family])
    return corrected


def _pairs(runs: pd.DataFrame) -> pd.DataFrame:
    """Pairs of runs of two contestants on equal seeds and folds, each pair of contestants in one order."""
    several = runs.groupby(["setting", "contestant"])["pretrain_seed"].transform("nunique") > 1
    runs = runs.assign(several=several, row=np.arange(len(runs)))
    pairs = runs.merge(runs, on=["setting", "seed", "fold"], suffixes=("", "_reference"))
    equal = pairs["pretrain_seed"] == pairs["pretrain_seed_reference"]
    comparable = equal | ~(pairs["several"] & pairs["several_reference"])
    pairs = pairs[(pairs["contestant"] < pairs["contestant_reference"]) & comparable]
    own = pairs["pretrain_seed"].where(pairs["several"], pairs["pretrain_seed_reference"])
    return pairs.assign(pretrain_seed=own, difference=pairs["value"] - pairs["value_reference"])


def _units(table: pd.DataFrame, folds: pd.Series) -> np.ndarray:
    """What a pair is."""
    pretrainings, seeds = table["pretrainings"] > 1, table["seeds"] > 1
    unit = np.select([pretrainings & seeds, pretrainings], ["pre-training and seed", "pre-training"], "seed")
    return np.where(folds > 1, np.char.add(unit.astype(str), ", mean over folds"), unit)


def _verdicts(table: pd.DataFrame) -> np.ndarray:
    sure = (table["p_holm"] <= 1 - CONFIDENCE + 1e-12).to_numpy()
    above = (table["difference"] > 0).to_numpy()
    equal = (table["difference"] == 0).to_numpy()
    return np.select(
        [table["n"] == 1, table["se"].isna() & ~equal, sure & above, sure],
        ["one pair: no claim", "no spread: no claim", "higher", "lower"],
        "not distinguishable",
    )


def _beside_others(frame: pd.DataFrame) -> pd.DataFrame:
    """Repeat the rows of training from scratch under each protocol and depth of the other sources."""
    spread = spread_baseline(frame)
    scratch = spread["source"].eq("scratch").fillna(False).astype(bool)
    place, depths = ["target", "architecture", "protocol"], [name for name in DEPTHS if name in frame]
    wanted = spread.loc[~scratch, [*place, *depths]].drop_duplicates()
    repeated = spread[scratch].drop(columns=depths).merge(wanted, on=place, how="left")
    return pd.concat([spread[~scratch], repeated[list(frame.columns)]], ignore_index=True)


def _require(frame: pd.DataFrame, names: Sequence[str]) -> None:
    missing = [name for name in names if name not in frame]
    if missing:
        near = closest(missing[0], frame.columns)
        raise DataError(
            f"result rows lack the column {shorten(missing)}",
            valid=[str(name) for name in frame.columns],
            hint=f"did you mean {near!r}?" if near else None,
        )


def _require_one_run_each(rows: pd.DataFrame, runs: pd.DataFrame, names: Sequence[str]) -> None:
    unit = ["setting", "contestant", "pretrain_seed", "seed", "fold"]
    doubled = runs.duplicated(unit, keep=False)
    if not doubled.any():
        return
    same = runs[doubled].groupby(unit, dropna=False).ngroup()
    some = rows.loc[same.index[same == same.iloc[0]]]
    differ = [str(name) for name in some if name not in ("run", "cell", "value") and some[name].nunique(False) > 1]
    contestant = ", ".join(f"{name} {some[name].iloc[0]}" for name in names)
    raise DataError(
        f"{int(doubled.sum())} rows share contestant, setting, seeds and fold with another",
        where=f"{contestant}, seed {some['seed'].iloc[0]}: {len(some)} rows, unequal in {shorten(differ) or 'nothing'}",
        hint=f"compare by {[*names, *differ[:1]]}, or keep the rows of one value" if differ else "remove doubled rows",
    )
