"""Variance of a mean over pre-trainings, seeds and patients: crossed factors, each with its degrees of freedom.

- Pre-trainings and seeds: their mean squares, from the spread of the runs' values. They are crossed and not nested,
  because a seed draws the same few-shot set for every pre-training, and a mean over pre-trainings keeps what it does.
- Patients: the variance of the mean under a bootstrap with the same draws for all runs.

What the test images do to runs one by one is in both spreads; the bootstrap tells how much, and it counts once. A
percentile bootstrap of 3-5 seeds covers too little (resampling 5 values shrinks their variance by a fifth, and it is
known with 4 degrees of freedom only), hence a t interval.
"""

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from studies.patient_bootstrap import DEFINED
from studies.statistics import CONFIDENCE, ROUNDING


def standard_error(
    values: np.ndarray, draws: np.ndarray | None, patient_freedom: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Standard error of the mean over a grid of runs, for other pre-trainings, seeds and patients.

    Args:
        values: (P, S, M): P pre-trainings, S seeds, M metrics.
        draws: (P, S, M, B): the same under B draws of patients, NaN where undefined; None: patients stay as they are.
        patient_freedom: (M,), degrees of freedom of the patients' part.

    Returns:
        Two arrays (M,): the standard error and its degrees of freedom; NaN where nothing varies, or where too few draws
        have a value.
    """
    runs, freedom = between_runs(values)
    variance = runs
    inverse = 1 / freedom
    if draws is not None:
        patients, in_both = between_draws(draws)
        variance = patients + np.maximum(runs - in_both, 0)
        share = np.divide(runs, variance, out=np.zeros_like(runs), where=variance > 0).clip(max=1)
        # Satterthwaite squares the shares. Then few pre-trainings that agree by chance count for too little: where
        # three of them are most of the variance, 92.5 % are covered; without squares it is 94.5 %.
        inverse = share * inverse + (1 - share) * (1 / patient_freedom + 1 / (draws.shape[3] - 1))
    known = _more_than_rounding(variance, values.mean(axis=(0, 1)))
    return np.sqrt(np.where(known, variance, np.nan)), np.where(known, 1 / inverse, np.nan)


def between_runs(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Variance of the mean over a complete grid of runs, and its degrees of freedom.

    Args:
        values: (P, S, M), P pre-trainings and S seeds.

    Returns:
        Two arrays (M,): the variance (0 for a single run) and the degrees of freedom, at least 1.
    """
    return _crossed(*_mean_squares(values), *(np.asarray(size) for size in values.shape[:2]))


def over_runs(frame: pd.DataFrame, value: str) -> pd.DataFrame:
    """Mean of each group over pre-trainings and seeds, with the 95 % t interval for others of them.

    Several values of one pre-training and seed (folds) are averaged first. Where a group's grid has gaps, the larger of
    the spreads over pre-trainings and over seeds stands for both.

    Args:
        frame: Rows with the columns "group", "pretrain_seed" (a missing one is one value), "seed" and `value`.
        value: The column to average; NaN is left out.

    Returns:
        A row a group, indexed by it: "n" (pairs of a pre-training and a seed), "pretrainings", "seeds", "mean", "se",
        "freedom", "low" and "high"; the last four are NaN for one value and for values without spread.
    """
    keys = ["group", "pretrain_seed", "seed"]
    cells = frame.dropna(subset=[value]).groupby(keys, dropna=False)[value].mean().reset_index()
    table = cells.groupby("group")[value].agg(["count", "mean", "var"])
    sides = [
        cells.groupby(["group", side], dropna=False)[value].mean().groupby("group").agg(["count", "var"]).fillna(0.0)
        for side in ("pretrain_seed", "seed")
    ]
    rows, columns = (side["count"].to_numpy() for side in sides)
    by_row, by_column = (side["var"].to_numpy() for side in sides)
    count = table["count"].to_numpy()
    rest = table["var"].fillna(0.0).to_numpy() * (count - 1) - columns * (rows - 1) * by_row
    rest = np.maximum(rest - rows * (columns - 1) * by_column, 0) / np.maximum((rows - 1) * (columns - 1), 1) / count
    both = np.where(count == rows * columns, rest, np.inf)
    variance, freedom = _crossed(by_row / rows, by_column / columns, both, rows, columns)
    known = _more_than_rounding(variance, table["mean"].to_numpy())
    se, freedom = np.sqrt(np.where(known, variance, np.nan)), np.where(known, freedom, np.nan)
    half = stdtrit(freedom, (1 + CONFIDENCE) / 2) * se
    table = table[["mean"]].assign(n=count, pretrainings=rows, seeds=columns, se=se, freedom=freedom)
    table = table.assign(low=table["mean"] - half, high=table["mean"] + half)
    return table[["n", "pretrainings", "seeds", "mean", "se", "freedom", "low", "high"]]


def _more_than_rounding(variance: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Whether values differ by more than their last digits, which rounding leaves to equal ones."""
    return np.asarray(variance > (ROUNDING * np.maximum(np.abs(mean), 1)) ** 2)


def _crossed(
    pretrainings: np.ndarray, seeds: np.ndarray, both: np.ndarray, rows: np.ndarray, columns: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Variance of a mean over two crossed factors, and its degrees of freedom (at least 1).

    It is (MS_pretrainings + MS_seeds - MS_both) / (P S), with Satterthwaite's degrees of freedom. Where a factor shows
    no effect of its own (its mean square is below MS_both), the larger of MS_pretrainings and MS_seeds stands alone.

    Args:
        pretrainings: The mean square between pre-trainings, over P S.
        seeds: The same between seeds.
        both: The same of the rest.
        rows: P, the number of pre-trainings.
        columns: S, the number of seeds.
    """
    rows, columns = np.maximum(rows - 1, 1), np.maximum(columns - 1, 1)
    low, high = np.minimum(pretrainings, seeds), np.maximum(pretrainings, seeds)
    crossed = low > both
    variance = high + np.where(crossed, low - both, 0)
    alone = high**2 / np.where(pretrainings >= seeds, rows, columns)
    together = pretrainings**2 / rows + seeds**2 / columns + both**2 / (rows * columns)
    spread = np.where(crossed, together, alone)
    freedom = np.divide(variance**2, spread, out=np.ones_like(spread), where=spread > 0)
    return variance, np.maximum(freedom, 1)


def _mean_squares(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean squares of a grid (P, S, ...) between rows, between columns and of the rest, over P S; 0 where undefined."""
    rows, columns = values.shape[:2]
    by_row, by_column, mean = values.mean(axis=1), values.mean(axis=0), values.mean(axis=(0, 1))
    rest = values - by_row[:, None] - by_column + mean
    return (
        ((by_row - mean) ** 2).sum(axis=0) / max(rows - 1, 1) / rows,
        ((by_column - mean) ** 2).sum(axis=0) / max(columns - 1, 1) / columns,
        (rest**2).sum(axis=(0, 1)) / max((rows - 1) * (columns - 1), 1) / (rows * columns),
    )


def between_draws(draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the patients add to a mean's variance, and how much of it is in the spread of runs as well; (M,) each.

    Args:
        draws: (P, S, M, B); NaN where undefined. Both are NaN where too few draws have a value.
    """
    defined = np.isfinite(draws).all(axis=(0, 1))
    count = np.maximum(defined.sum(axis=1), 2)
    mean = np.where(defined, draws, 0).sum(axis=3) / count
    spread = np.where(defined, draws - mean[..., None], 0)
    patients = (spread.mean(axis=(0, 1)) ** 2).sum(axis=1) / (count - 1)
    pretrainings, seeds, both = _mean_squares(spread)
    in_both = (pretrainings + seeds - both).sum(axis=1) / (count - 1)
    enough = defined.mean(axis=1) >= DEFINED
    return np.where(enough, patients, np.nan), np.where(enough, in_both, np.nan)
