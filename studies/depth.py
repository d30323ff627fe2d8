"""How deep to transfer, from result rows: accuracy against depth, the best depth, the regret of fixed policies.

The question of Gerace et al. (arXiv 2303.01429): take the first k layer groups of a source network, hold them fixed
or let them train, and start the rest anew. Everything here is a pure function of rows; seeds are the replicates.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd

from studies.statistics import BUDGET, half_width, summarise

MODES = ("frozen", "trained")
"""What happens to the transferred layer groups. Depth 0, training from scratch, belongs to both."""

PLACE = ["target", "source", "architecture", "granularity", "metric", *BUDGET]
"""What one curve over depth has in common."""

POLICIES = {"freeze all": ("frozen", True), "fine-tune all": ("trained", True), "from scratch": ("trained", False)}
"""Policies that need no sweep: mode, and whether all groups are transferred or none."""

RESAMPLES = 2000


def depth_values(frame: pd.DataFrame) -> pd.DataFrame:
    """One value for each place, mode, depth and seed.

    Args:
        frame: Result rows of one metric over all classes. Depth and mode come from `transfer_depth` and
            `frozen_depth`; a run from scratch has depth 0, one without a `transfer_depth` has them all. Runs that hold
            only a part of the transferred groups fixed are left out.

    Returns:
        Columns `PLACE`, "mode", "depth" (0 to the number of groups), "seed", "value". Runs from scratch stand once for
        each source and mode. Empty where fewer than three depths were run.
    """
    scratch = frame["protocol"].eq("scratch").fillna(False).astype(bool) | frame["transfer_depth"].eq(0).fillna(False)
    scratch |= frame["source"].eq("scratch").fillna(False)
    scratch = scratch.astype(bool)
    moved = frame[~scratch]
    deepest = moved.groupby("architecture", dropna=False)["transfer_depth"].transform("max")
    moved = moved.assign(depth=moved["transfer_depth"].fillna(deepest)).dropna(subset="depth")
    fixed = moved["frozen_depth"].fillna(0)
    moved = moved.assign(mode=np.where(fixed == moved["depth"], "frozen", np.where(fixed == 0, "trained", "")))
    moved = moved[moved["mode"] != ""]
    sources = moved[["target", "architecture", "source", "granularity", "mode"]].drop_duplicates()
    zero = (
        frame[scratch]
        .drop(columns=["source", "granularity"])
        .assign(depth=0)
        .merge(sources, on=["target", "architecture"])
    )
    columns = [*PLACE, "mode", "depth", "seed"]
    both = pd.concat([part[[*columns, "value"]] for part in (moved, zero)], ignore_index=True)
    values: pd.DataFrame = both.groupby(columns, dropna=False)["value"].mean().reset_index()
    values["depth"] = values["depth"].astype(int)
    return values if values["depth"].nunique() > 2 else values.iloc[:0]


def depth_curves(values: pd.DataFrame) -> pd.DataFrame:
    """Mean and 95 % t interval over seeds at each depth; columns as in `statistics.summarise`."""
    return summarise(values, [*PLACE, "mode", "depth"])


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
    return pd.DataFrame(rows, columns=[*PLACE, "mode", "depth", "low", "high", "n"])


def regrets(values: pd.DataFrame) -> pd.DataFrame:
    """What a policy without a sweep loses against choosing mode and depth by the other seeds.

    For each seed the mode and depth are chosen by the mean of the other seeds, and both are judged on this seed: the
    choice never sees what it is judged by, so that a sweep of noise has a regret of zero on average.

    Returns:
        One row a place and policy of `POLICIES`: "regret" (mean), "low" and "high" (95 % t interval over seeds; the
        folds of the choice share seeds, so it is approximate), "n". Places with one seed have no rows.
    """
    rows = []
    for place, part in values.groupby(PLACE, dropna=False):
        grid = part.pivot_table(index="seed", columns=["mode", "depth"], values="value").dropna()
        if len(grid) < 2:
            continue
        cells: list[Any] = list(grid.columns)  # (mode, depth)
        table = grid.to_numpy(dtype=np.float64)
        others = (table.sum(axis=0) - table) / (len(table) - 1)
        swept = table[np.arange(len(table)), others.argmax(axis=1)]
        deepest = max(depth for _, depth in cells)
        for policy, (mode, all_groups) in POLICIES.items():
            cell = (mode, deepest if all_groups else 0)
            if cell not in cells:
                continue
            loss = swept - table[:, cells.index(cell)]
            half = float(half_width(np.array(len(loss)), np.array(loss.std(ddof=1))))
            found = {"policy": policy, "regret": loss.mean(), "low": loss.mean() - half, "high": loss.mean() + half}
            rows.append({**dict(zip(PLACE, place, strict=True)), **found, "n": len(loss)})
    return pd.DataFrame(rows, columns=[*PLACE, "policy", "regret", "low", "high", "n"])


def _grids(values: pd.DataFrame) -> Iterable[tuple[dict[str, Any], str, pd.DataFrame]]:
    """Place, mode and the values as seeds × depths, of the seeds that all depths have."""
    for key, part in values.groupby([*PLACE, "mode"], dropna=False):
        grid = part.pivot_table(index="seed", columns="depth", values="value").dropna()
        if len(grid):
            yield dict(zip(PLACE, key[:-1], strict=True)), str(key[-1]), grid


def _resamples(n: int, resamples: int, seed: int) -> np.ndarray:
    """Bootstrap draws of `n` seeds, int64 (resamples, n)."""
    return np.random.default_rng(seed).integers(0, n, (resamples, n))
