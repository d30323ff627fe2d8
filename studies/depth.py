"""How deep to transfer, from result rows: accuracy against depth, the best depth, the regret of fixed policies.

The question of Gerace et al. (arXiv 2303.01429): take the first k layer groups of a source network, hold them fixed
or let them train, and start the rest anew. Everything here is a pure function of rows; seeds are the replicates.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd

from datamodules.errors import shorten
from studies.statistics import BUDGET, half_width, summarise, varying

MODES = ("frozen", "trained")
"""What happens to the transferred layer groups. Depth 0, training from scratch, belongs to both."""

SHARED = ["target", "architecture", "metric", *BUDGET]
SHARED += ["study", "image_size", "dials", "selection", "split_policy", "label_policy"]
"""What a transfer and its counterpart from scratch have in common, besides fold and seed."""

ORIGIN = ["source", "source_n", "source_dials", "method", "pretrain_seed", "granularity"]
"""What only transfers have."""

PLACE = [*SHARED, *ORIGIN]
"""What one curve over depth has in common: runs that differ in one of these are never averaged."""

POLICIES = {"freeze all": ("frozen", True), "fine-tune all": ("trained", True), "from scratch": ("trained", False)}
"""Policies that need no sweep: mode, and whether all groups are transferred or none."""

OTHERS = ("pretrain", "lp_ft")
"""Protocols that are no point of a curve: other recipes, though their depths would fit."""

POINT = [*PLACE, "mode", "depth"]
RESAMPLES = 2000


def depth_values(frame: pd.DataFrame) -> pd.DataFrame:
    """One value for each place, mode, depth, fold and seed.

    Args:
        frame: Result rows of one metric over all classes. Depth and mode come from `transfer_depth` and
            `frozen_depth`; a run from scratch has depth 0. Left out: rows without a `frozen_depth` (probes, tests
            without training), runs that hold only a part of the transferred groups fixed, and what `left_out` names.

    Returns:
        Columns `PLACE`, "mode", "depth" (0 to the number of groups), "fold", "seed", "value". Runs from scratch stand
        once for each source and mode. Places with fewer than three depths have no rows. The pre-training seed is
        missing where it goes with the seeds, one by one.
    """
    points, mixed, _ = _points(frame)
    values = points.loc[~mixed, [*POINT, "fold", "seed", "value"]]
    return values[_depths(values) > 2].reset_index(drop=True)


def left_out(frame: pd.DataFrame) -> list[str]:
    """Sentences on runs of a sweep that no curve can take: their depth is unknown, or others stand at their point.

    Returns:
        None where depth was not varied.
    """
    points, mixed, unknown = _points(frame)
    if not (_depths(points) > 2).any():
        return []
    found = []
    if len(unknown):
        names = shorten(sorted(unknown["protocol"].dropna().unique()))
        found.append(
            f"Left out, because their rows do not say how many layer groups were transferred: {names}. "
            "A number as `transfer_depth` in place of null says it."
        )
    if mixed.any():
        each = points[mixed].groupby(["mode", "depth"])["protocol"].agg(lambda names: ", ".join(sorted(set(names))))
        rows = each.reset_index().itertuples(index=False, name=None)
        names = shorten([f"{mode} {depth} ({protocols})" for mode, depth, protocols in rows])
        found.append(
            f"Left out, because runs with different settings stand at one depth, which no mean may mix: {names}."
        )
    return found


def depth_curves(values: pd.DataFrame) -> pd.DataFrame:
    """Mean and 95 % t interval over seeds at each depth; columns as in `statistics.summarise`."""
    return summarise(values, POINT)


def best_depths(values: pd.DataFrame, resamples: int = RESAMPLES, seed: int = 0) -> pd.DataFrame:
    """The depth with the highest mean, k*, with the interval that a bootstrap over seeds gives it.

    Args:
        values: From `depth_values`.
        resamples: Bootstrap samples of the seeds that all depths have.
        seed: Of the bootstrap.

    Returns:
        One row a place and mode: "depth" (k*, ties to the shallower), "low" and "high" (2.5 and 97.5 % of the resampled
        k*; NaN for one seed), "n" seeds.
    """
    rows = []
    for place, mode, grid in _grids(values):
        means = grid.mean(axis=0).to_numpy()
        draws = _resamples(len(grid), resamples, seed)
        chosen = grid.columns.to_numpy()[grid.to_numpy()[draws].mean(axis=1).argmax(axis=1)] if len(grid) > 1 else None
        low, high = np.quantile(chosen, [0.025, 0.975], method="nearest") if chosen is not None else (np.nan, np.nan)
        best = int(grid.columns.to_numpy()[means.argmax()])
        rows.append({**place, "mode": mode, "depth": best, "low": low, "high": high, "n": len(grid)})
    return pd.DataFrame(rows, columns=[*POINT, "low", "high", "n"])


def regrets(values: pd.DataFrame) -> pd.DataFrame:
    """What a policy without a sweep loses against choosing mode and depth by the other seeds.

    For each seed the mode and depth are chosen by the mean of the other seeds, and both are judged on this seed: the
    choice never sees what it is judged by, so that a sweep of noise has a regret of zero on average. "All" groups are
    the most that any run of the architecture and granularity transferred.

    Returns:
        One row a place and policy of `POLICIES`: "regret" (mean), "low" and "high" (95 % t interval over seeds; the
        folds of the choice share seeds, so it is approximate), "n". Places with one seed have no rows.
    """
    rows = []
    values = values.assign(
        deepest=values.groupby(["architecture", "granularity"], dropna=False)["depth"].transform("max")
    )
    for place, part in values.groupby(PLACE, dropna=False):
        grid = _grid(part, ["mode", "depth"])
        if len(grid) < 2:
            continue
        cells: list[Any] = list(grid.columns)  # (mode, depth)
        table = grid.to_numpy(dtype=np.float64)
        others = (table.sum(axis=0) - table) / (len(table) - 1)
        swept = table[np.arange(len(table)), others.argmax(axis=1)]
        deepest = int(part["deepest"].iloc[0])
        for policy, (mode, all_groups) in POLICIES.items():
            wanted = [(mode, deepest)] if all_groups else [(mode, 0) for mode in MODES]  # depth 0 is the same in both
            column = next((cells.index(cell) for cell in wanted if cell in cells), None)
            if column is None:
                continue
            loss = swept - table[:, column]
            half = float(half_width(np.array(len(loss)), np.array(loss.std(ddof=1))))
            found = {"policy": policy, "regret": loss.mean(), "low": loss.mean() - half, "high": loss.mean() + half}
            rows.append({**dict(zip(PLACE, place, strict=True)), **found, "n": len(loss)})
    return pd.DataFrame(rows, columns=[*PLACE, "policy", "regret", "low", "high", "n"])


# ---------------------------------------------------------------------------------------------------------------------


def _points(frame: pd.DataFrame) -> tuple[pd.DataFrame, pd.Series, pd.DataFrame]:
    """Rows with "mode" and "depth"; which of them share a point with other settings; transfers of unknown depth."""
    rows = frame[frame["frozen_depth"].notna() & ~frame["protocol"].isin(OTHERS)]
    scratch = rows["source"].eq("scratch").fillna(False).astype(bool)
    moved = rows[~scratch]
    unknown = moved["transfer_depth"].isna()
    moved, lost = moved[~unknown], moved[unknown]
    moved = moved.assign(depth=moved["transfer_depth"].astype(int))
    fixed = moved["frozen_depth"].astype(int)
    at = {"frozen": fixed == moved["depth"], "trained": fixed == 0}  # depth 0 is both
    moved = pd.concat([moved[at[mode]].assign(mode=mode) for mode in MODES], ignore_index=True)
    by = [name for name in POINT if name != "pretrain_seed"]
    if not varying(moved, [*by, "fold", "seed"], ["pretrain_seed"]):
        moved["pretrain_seed"] = pd.NA
    places = moved[[*PLACE, "mode"]].drop_duplicates()
    own = moved.loc[moved["depth"] == 0, [*PLACE, "mode"]].drop_duplicates()  # depth 0, run for this very source
    places = pd.concat([places, own, own]).drop_duplicates(keep=False)
    zero = rows[scratch].drop(columns=ORIGIN).assign(depth=0).merge(places, on=SHARED)
    points = pd.concat(
        [part[[*POINT, "fold", "seed", "protocol", "value"]] for part in (moved, zero)], ignore_index=True
    )
    doubled = points.duplicated([*POINT, "fold", "seed"], keep=False)
    cells = points.assign(doubled=doubled).groupby(POINT, dropna=False)
    mixed = cells["doubled"].transform("any") | (cells["protocol"].transform("nunique") > 1)
    return points, mixed.astype(bool), lost


def _depths(values: pd.DataFrame) -> pd.Series:
    """Number of depths of each row's place."""
    return values.groupby(PLACE, dropna=False)["depth"].transform("nunique")


def _grids(values: pd.DataFrame) -> Iterable[tuple[dict[str, Any], str, pd.DataFrame]]:
    """Place, mode and the values as seeds × depths, of the seeds that all depths have."""
    for key, part in values.groupby([*PLACE, "mode"], dropna=False):
        grid = _grid(part, ["depth"])
        if len(grid):
            yield dict(zip(PLACE, key[:-1], strict=True)), str(key[-1]), grid


def _grid(part: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    """Values as seeds × columns, mean over folds, of the seeds and folds that all columns have."""
    part = part.assign(fold=part["fold"].fillna(-1).astype(int))
    return part.pivot(index=["seed", "fold"], columns=columns, values="value").dropna().groupby("seed").mean()


def _resamples(n: int, resamples: int, seed: int) -> np.ndarray:
    """Bootstrap draws of `n` seeds, int64 (resamples, n)."""
    return np.random.default_rng(seed).integers(0, n, (resamples, n))
