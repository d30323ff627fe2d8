"""Does scale help near more than far? Slopes over scale within and across domains, and their difference."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from datamodules.errors import DataError, closest, shorten
from studies.comparisons import MATCHED
from studies.statistics import BUDGET, CONFIDENCE, holm, paired_p
from studies.variance_components import over_runs

BY = ("protocol", *BUDGET, "metric", "class_name", "subgroup")
SOURCE = ("source", "source_n", "source_dials")
SIDES = {"near": True, "far": False}


@dataclass(frozen=True)
class Scale:
    """An axis of scale.

    Attributes:
        column: Of result rows, such as "source_n" or "architecture".
        values: The size of each name, such as parameters of an architecture; None: the column is the size itself.
        order: Or the names from the smallest to the largest, where sizes say nothing.
    """

    column: str
    values: Mapping[str, float] | None = None
    order: Sequence[str] = ()

    @property
    def unit(self) -> str:
        """What a slope is per: a tenfold scale, or the whole way along `order`."""
        return "smallest to largest" if self.order else "decade"

    def positions(self, column: pd.Series) -> np.ndarray:
        """Places on the axis: log10 of the size, or 0 to 1 along `order`; NaN for a missing or zero size.

        Raises:
            DataError: A name without a size or place, or fewer than two names in `order`.
        """
        if not self.order and self.values is None:
            sizes = column.astype("Float64").to_numpy(float, na_value=np.nan)
            return np.log10(np.where(sizes > 0, sizes, np.nan))
        if self.order:
            if len(self.order) < 2:
                raise DataError(f"an order of {len(self.order)} names has no scale", where=self.column)
            known = {name: rank / (len(self.order) - 1) for rank, name in enumerate(self.order)}
        else:
            known = {name: math.log10(size) for name, size in (self.values or {}).items()}
        return _look_up(column, known, f"place on the scale of {self.column}").astype(float)


def interaction(frame: pd.DataFrame, domains: Mapping[str, str], scale: Scale, by: Sequence[str] = BY) -> pd.DataFrame:
    """Slopes of the metric over scale, near and far, and near less far.

    A line is what is measured at several scales, all else equal: for a scale of architectures one source and target;
    for a scale of sources all of one domain, on one target. It is near where source and target are of one domain.
    Slopes are fitted for each seed that has all scales of a line (a line without such a seed is left out, and not
    counted), then averaged over the near and over the far lines. So an interval is for other seeds with these sources
    and targets, and for other pre-trainings where all weights have several, which are otherwise averaged. Training
    from scratch and sources of unknown size are left out.

    Args:
        frame: Result rows.
        domains: Source or target → domain, such as {"imagenet1k": "natural", "nih": "x-ray"}.
        scale: The axis.
        by: Columns with a result for each of their values; a metric must mean the same on near and far targets.

    Returns:
        One row a value of `by`: these columns, "unit" of the slopes, "near", "near_low", "near_high", "near_lines",
        "near_scales" (most scales of a line), the same for "far", then "n" (seeds with all lines), "pretrainings",
        "difference" (near less far), "low", "high" (95 % t interval), "p", "p_holm" over the rows, and "verdict":
        "larger slope near", "larger slope far", "not distinguishable" or "too few: " and what.

    Raises:
        DataError: A source or target without a domain, or a name without a place on the scale.
    """
    rows, points = _points(frame, domains, scale, list(by))
    slopes = _slopes(points)
    sides = {name: _mean_over_lines(slopes[slopes["near"] == near]) for name, near in SIDES.items()}
    groups = rows.groupby(list(by), dropna=False, sort=False)[list(by)].head(1).reset_index(drop=True)
    result: pd.DataFrame = groups.assign(unit=scale.unit)
    for name, near in SIDES.items():
        table = over_runs(sides[name], "slope").reindex(result.index)
        lines = slopes[slopes["near"] == near].groupby("group")
        result[[name, f"{name}_low", f"{name}_high"]] = table[["mean", "low", "high"]].to_numpy()
        result[f"{name}_lines"] = lines["line"].nunique().reindex(result.index, fill_value=0)
        there = points[points["near"] == near].groupby(["group", "line"])["scale"].nunique().groupby("group").max()
        result[f"{name}_scales"] = there.reindex(result.index, fill_value=0)
    paired = sides["near"].merge(sides["far"], on=["group", "pretrain_seed", "seed"], suffixes=("", "_far"))
    paired = paired.assign(difference=paired["slope"] - paired["slope_far"])
    return _with_test(result, over_runs(paired, "difference").reindex(result.index))


def _points(
    frame: pd.DataFrame, domains: Mapping[str, str], scale: Scale, by: list[str]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rows that have a place on the axis, and their numbers: group, line, near, seeds, scale and value."""
    rows = frame[~frame["source"].eq("scratch").fillna(False).astype(bool)].dropna(subset=["value"])
    position = scale.positions(rows[scale.column])
    rows, position = rows[np.isfinite(position)].reset_index(drop=True), position[np.isfinite(position)]
    origin, target = (_look_up(rows[name], domains, "domain") for name in ("source", "target"))
    of_sources = SOURCE if scale.column in SOURCE else ()
    matched = [name for name in MATCHED if name in rows and name not in (scale.column, *of_sources)]
    keys = rows[list(dict.fromkeys([*matched, *by]))].assign(origin=origin)
    points = pd.DataFrame(
        {
            "group": rows.groupby(by, dropna=False, sort=False).ngroup(),
            "line": keys.groupby(list(keys), dropna=False, sort=False).ngroup(),
            "near": origin == target,
            **{
                name: rows[name].astype("Float64").to_numpy(float, na_value=np.nan)
                for name in ("pretrain_seed", "seed")
            },
            "scale": position,
            "value": rows["value"].to_numpy(float),
        }
    )
    return rows, points


def _with_test(result: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """Add the differences of `over_runs`, their test and what it says."""
    freedom = table["freedom"].to_numpy()
    p = paired_p(freedom + 1, table["mean"].to_numpy(), table["se"].to_numpy() * np.sqrt(freedom + 1))
    result[["n", "pretrainings"]] = table[["n", "pretrainings"]].fillna(0).astype(int)
    result[["difference", "low", "high"]] = table[["mean", "low", "high"]]
    result = result.assign(p=p, p_holm=holm(p))
    return result.assign(verdict=_verdicts(result))


def _slopes(points: pd.DataFrame) -> pd.DataFrame:
    """Least-squares slope of each line, pre-training and seed that has all of the line's scales, at least two."""
    weights = points.groupby(["group", "line", "scale"])["pretrain_seed"].nunique().groupby("group").min()
    several = points["group"].map(weights) > 1
    points = points.assign(pretrain_seed=points["pretrain_seed"].where(several))
    unit = ["group", "line", "near", "pretrain_seed", "seed"]
    points = points.groupby([*unit, "scale"], dropna=False)["value"].mean().reset_index()
    scales = points.groupby("line")["scale"].transform("nunique")
    fits = points.groupby(unit, dropna=False)
    complete = (fits["scale"].transform("size") == scales) & (scales > 1)
    x = points["scale"] - fits["scale"].transform("mean")
    points = points.assign(xy=x * points["value"], xx=x**2)[complete]
    sums = points.groupby(unit, dropna=False)[["xy", "xx"]].sum()
    return sums.assign(slope=sums["xy"] / sums["xx"])[["slope"]].reset_index()


def _mean_over_lines(slopes: pd.DataFrame) -> pd.DataFrame:
    """Mean slope of each pre-training and seed that has all lines of its group."""
    lines = slopes.groupby("group")["line"].nunique()
    means = (
        slopes.groupby(["group", "pretrain_seed", "seed"], dropna=False)["slope"].agg(["mean", "size"]).reset_index()
    )
    complete = means["size"] == means["group"].map(lines)
    return means[complete].drop(columns="size").rename(columns={"mean": "slope"})


def _verdicts(result: pd.DataFrame) -> np.ndarray:
    sure = result["p_holm"] <= 1 - CONFIDENCE + 1e-12
    reasons = {
        "too few: no source and target of one domain": result["near_scales"] == 0,
        "too few: no source and target of two domains": result["far_scales"] == 0,
        "too few: fewer than two scales near": result["near_scales"] < 2,
        "too few: fewer than two scales far": result["far_scales"] < 2,
        "too few: no seed with all scales near and far": result["n"] == 0,
        "too few: one seed": result["n"] == 1,
        "too few: all seeds gave the same difference": result["p"].isna(),
        "larger slope near": sure & (result["difference"] > 0),
        "larger slope far": sure,
    }
    return np.select(list(reasons.values()), list(reasons), "not distinguishable")


def _look_up(column: pd.Series, known: Mapping[str, object], what: str) -> np.ndarray:
    """Values of names, (N,); a name that has none is an error."""
    code, names = pd.factorize(column)
    missing = [str(name) for name in names if name not in known]
    if missing or (code < 0).any():
        near = closest(missing[0], known) if missing else None
        raise DataError(
            f"no {what}: {shorten(missing) or 'a missing name'}",
            where=str(column.name),
            valid=[str(name) for name in known],
            hint=f"did you mean {near!r}?" if near else "add it, or leave its rows out",
        )
    return np.array([known[name] for name in names], dtype=object)[code] if len(names) else np.empty(0, dtype=object)
