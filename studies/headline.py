"""Intervals of headline numbers over pre-training, seeds and patients together, from predictions or result rows.

The runs are a grid of pre-trainings and seeds on one test set. What a seed draws (the few-shot set, the order) is the
same for each pre-training. Patients are drawn by a stratified bootstrap, with the same draws for all runs;
`variance_components` makes one interval of the three.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.special import expit, logit, stdtr, stdtrit

from datamodules.errors import DataError, shorten
from studies.measured import FACTS, Measured
from studies.statistics import CONFIDENCE
from studies.variance_components import standard_error


def headline(measured: Measured) -> pd.DataFrame:
    """Means over runs with 95 % intervals.

    Args:
        measured: Runs from one source, each pre-training and seed once. Where pre-trainings share two or more seeds,
            those that all of them have are taken; otherwise each pre-training counts with the mean of its runs.

    Returns:
        One row a metric: "metric", "class_name", "value" (mean over pre-trainings of the mean over seeds), "se", "low",
        "high" (on the logit scale, so within 0 and 1; NaN where undefined, and where nothing varied, as with a test set
        without errors), "freedom" (degrees of freedom), "pretrainings", "seeds", "runs" and "left_out" (runs),
        "patients", "covers" (what the interval resamples, and what it lacks) and "scope": "these weights only" (one
        pre-training), "this pre-training procedure" or "no pre-training".

    Raises:
        DataError: Runs from several sources, or two of the same pre-training and seed.
    """
    sources = [str(name) for name in measured.facts["source"].unique()]
    if len(sources) > 1:
        raise DataError(f"runs from {len(sources)} sources have no common mean", where="source", valid=sources)
    table = _table(measured)
    value, se = table["value"], table["se"]
    # The delta method; the logit keeps intervals of accuracies near 1 inside, and covers where they are skewed.
    half = stdtrit(table["freedom"], (1 + CONFIDENCE) / 2) * se / (value * (1 - value))
    table = table.assign(low=expit(logit(value) - half), high=expit(logit(value) + half))
    return _finish(table, measured, [_scope(measured.facts)])


def difference(ours: Measured, reference: Measured) -> pd.DataFrame:
    """Differences of two sources on equal seeds and equal patients, with 95 % intervals and p.

    Runs are paired on seed and pre-training seed; on the seed alone where one of both has a single pre-training (or
    none, as training from scratch). With predictions both must come from one `measure`, so that draws are equal.

    Returns:
        As `headline`, "value" being ours less the reference's, with symmetric intervals and "p" (two-sided t test; NaN
        where "low" and "high" are). "runs" counts pairs.

    Raises:
        DataError: Nothing pairs, the test sets or draws differ, or a run of the same pre-training and seed is there
            twice.
    """
    if ours.test_set != reference.test_set or ours.metrics != reference.metrics:
        raise DataError(
            "the runs to compare were not measured on the same test set and draws",
            hint="read all runs with one read_runs, measure them together and take the sources with `of`",
        )
    pairs = _pairs(ours.facts, reference.facts)
    left, right = (pairs[name].to_numpy() for name in ("ours", "reference"))
    draws = None
    if ours.draws is not None and reference.draws is not None:
        draws = ours.draws[left] - reference.draws[right]
    paired = Measured(
        pairs,
        ours.metrics,
        ours.values[left] - reference.values[right],
        draws,
        ours.freedom,
        ours.patients,
        ours.test_set,
    )
    table = _table(paired)
    half = stdtrit(table["freedom"], (1 + CONFIDENCE) / 2) * table["se"]
    p = 2 * stdtr(table["freedom"], -np.abs(table["value"] / table["se"]))
    table = table.assign(low=table["value"] - half, high=table["value"] + half, p=p)
    return _finish(table, paired, [_scope(ours.facts), _scope(reference.facts)])


def _pairs(ours: pd.DataFrame, reference: pd.DataFrame) -> pd.DataFrame:
    """Facts of pairs of runs, with their places in both."""
    several = [facts["pretrain_seed"].nunique(dropna=False) > 1 for facts in (ours, reference)]
    on = ["pretrain_seed", "seed"] if all(several) else ["seed"]
    sides = [
        facts.assign(**{name: np.arange(len(facts))})[["run", *FACTS, name]]
        for name, facts in (("ours", ours), ("reference", reference))
    ]
    pairs = sides[0].merge(sides[1], on=on, suffixes=("", "_reference"))
    if pairs.empty:
        seeds = [shorten(sorted(facts["seed"].dropna().unique())) for facts in (ours, reference)]
        raise DataError(
            f"no runs to pair: seeds {seeds[0]} against {seeds[1]}, matched on {' and '.join(on)}",
            hint="run both sources with the same seeds",
        )
    return pairs.assign(pretrain_seed=pairs["pretrain_seed_reference"]) if several == [False, True] else pairs


def _table(measured: Measured) -> pd.DataFrame:
    average = _grid(measured.facts)
    values = np.tensordot(average, measured.values, axes=1)
    draws = None if measured.draws is None else np.tensordot(average, measured.draws, axes=1)
    se, freedom = standard_error(values, draws, measured.freedom)
    table = pd.DataFrame(list(measured.metrics), columns=["metric", "class_name"])
    return table.assign(value=values.mean(axis=(0, 1)), se=se, freedom=freedom)


def _grid(facts: pd.DataFrame) -> np.ndarray:
    """Weights (P, S, R) that make runs a grid of pre-trainings and seeds; runs that it has no place for weigh 0."""
    rows, pretrainings = pd.factorize(facts["pretrain_seed"], use_na_sentinel=False)
    columns, seeds = pd.factorize(facts["seed"], use_na_sentinel=False)
    grid = np.zeros((len(pretrainings), len(seeds), len(facts)))
    grid[rows, columns, np.arange(len(facts))] = 1
    filled = grid.sum(axis=2)
    if (filled > 1).any():
        row, column = np.argwhere(filled > 1)[0]
        names = facts.loc[grid[row, column] > 0, "run"]
        weights = "no pre-training seed" if pd.isna(pretrainings[row]) else f"the pre-training seed {pretrainings[row]}"
        raise DataError(
            f"{len(names)} runs have the seed {seeds[column]} and {weights}",
            where=shorten(list(names), 4),
            hint="take the runs of one source, architecture, protocol and budget",
        )
    common = filled.all(axis=0)
    if common.sum() > 1 or len(seeds) == 1:
        return grid[:, common]
    return np.asarray(grid.sum(axis=1, keepdims=True) / filled.sum(axis=1)[:, None, None])


def _finish(table: pd.DataFrame, measured: Measured, scopes: Sequence[str]) -> pd.DataFrame:
    """Add what the intervals rest on."""
    facts = measured.facts
    used = _grid(facts).sum(axis=(0, 1)) > 0
    pretrainings, seeds = (int(facts.loc[used, name].nunique(dropna=False)) for name in ("pretrain_seed", "seed"))
    counted = {"pre-training": pretrainings > 1, "seeds": seeds > 1, "patients": measured.draws is not None}
    named = [name for name, there in counted.items() if there]
    missing = [text for text, lacks in (("one seed", seeds == 1), ("no predictions", measured.draws is None)) if lacks]
    if len(named) > 1:
        covers = f"{', '.join(named[:-1])} and {named[-1]}"
    else:
        covers = f"{named[0]} only" if named else "nothing"
    order = ("these weights only", "this pre-training procedure", "no pre-training")
    return table.assign(
        pretrainings=pretrainings,
        seeds=seeds,
        runs=int(used.sum()),
        left_out=int((~used).sum()),
        patients=measured.patients,
        covers=covers + (f": {', '.join(missing)}" if missing else ""),
        scope=min(scopes, key=order.index),
    )


def _scope(facts: pd.DataFrame) -> str:
    if facts["source"].eq("scratch").fillna(False).all():
        return "no pre-training"
    several = facts["pretrain_seed"].nunique() > 1
    return "this pre-training procedure" if several else "these weights only"
