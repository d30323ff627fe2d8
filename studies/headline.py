"""Intervals of headline numbers over pre-training, seeds and patients together, from predictions or result rows.

The runs are a grid of pre-trainings and seeds on one test set. What a seed draws (the few-shot set, the order) is the
same for each pre-training. Patients are drawn by a stratified bootstrap, with the same draws for all runs;
`variance_components` makes one interval of the three.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import stdtr, stdtrit

from datamodules.errors import DataError, shorten
from lightning_modules.thresholds import Task
from studies.patient_bootstrap import (
    SEED,
    patient_strata,
    patient_weights,
    weighted_metrics,
)
from studies.statistics import CONFIDENCE
from studies.variance_components import standard_error

DRAWS = 200
"""Enough for a variance (± 10 %); the degrees of freedom allow for it."""

FACTS = ("source", "pretrain_seed", "seed")


@dataclass(frozen=True, eq=False)
class Runs:
    """Predictions of R runs on one test set of N images.

    Attributes:
        facts: R rows with the columns "run" and `FACTS`; `pretrain_seed` is missing where nothing says it.
        logits: R arrays (N, C) or (N, L).
        labels: int (N,) for multiclass, otherwise float32 (N, L) with 1 / 0 / NaN = unknown.
        groups: (N,), the patient of each image.
        task: multiclass, binary or multilabel.
        class_names: One a column of the logits.
    """

    facts: pd.DataFrame
    logits: Sequence[np.ndarray]
    labels: np.ndarray
    groups: np.ndarray
    task: Task
    class_names: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Measured:
    """Metrics of R runs, on the test set and under each of B draws of its patients.

    Attributes:
        facts: R rows, as in `Runs`.
        metrics: M pairs of metric and class.
        values: (R, M).
        draws: (R, M, B), or None where there are no predictions.
        freedom: (M,), degrees of freedom of the patients' part.
        patients: Their number; 0 without predictions.
        test_set: What must be equal for a paired difference: a hash of labels, patients and draws.
    """

    facts: pd.DataFrame
    metrics: tuple[tuple[str, str], ...]
    values: np.ndarray
    draws: np.ndarray | None
    freedom: np.ndarray
    patients: int
    test_set: str

    def of(self, source: str) -> "Measured":
        """The runs from one source."""
        chosen = np.flatnonzero(self.facts["source"].eq(source).fillna(False).to_numpy(bool))
        if not len(chosen):
            raise DataError(
                f"there are no runs from {source!r}", valid=[str(name) for name in self.facts["source"].unique()]
            )
        return self._take(chosen, self.facts.iloc[chosen].reset_index(drop=True))

    def _take(self, rows: np.ndarray, facts: pd.DataFrame) -> "Measured":
        draws = None if self.draws is None else self.draws[rows]
        return Measured(facts, self.metrics, self.values[rows], draws, self.freedom, self.patients, self.test_set)


def read_runs(folders: Sequence[Path | str], split: str = "test") -> Runs:
    """Read the stored predictions of runs on the same images.

    Args:
        folders: Run folders, with `predictions.parquet` and `summary.json` (see `studies.runs`).
        split: "test" or "validation".

    Raises:
        DataError: No folders, a file that is missing or lacks the split, or a run that saw other images, patients,
            labels or classes than the first one; names the run.
    """
    if not folders:
        raise DataError("there are no runs to read", where="folders")
    read = [_read_run(Path(folder), split) for folder in folders]
    first = read[0]
    for run in read[1:]:
        for what in ("class_names", "ids", "labels", "groups"):
            if not _equal(first[what], run[what]):
                names = {"class_names": "classes", "ids": "images", "groups": "patients"}.get(what, what)
                raise DataError(
                    f"run {run['run']!r} has other {split} {names} than run {first['run']!r}",
                    where=str(run["path"]),
                    valid="runs on one and the same test set",
                    hint="compare runs of one target, split policy, label policy and fold",
                )
    labels, names = first["labels"], first["class_names"]
    task: Task = "multiclass" if labels.ndim == 1 else "binary" if len(names) == 1 else "multilabel"
    facts = pd.DataFrame([{name: run[name] for name in ("run", *FACTS)} for run in read]).convert_dtypes()
    return Runs(facts, [run["logits"] for run in read], labels, first["groups"], task, names)


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, tuple):
        return bool(one == other)
    return one.shape == other.shape and bool(((one == other) | ((one != one) & (other != other))).all())


def _read_run(folder: Path, split: str) -> dict[str, Any]:
    """Facts of a run, and its images in the order of their ids."""
    path = folder / "predictions.parquet"
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        frame = pd.read_parquet(path, filters=[("split", "==", split)])
    except (OSError, ValueError) as error:
        raise DataError(
            f"cannot read the predictions of run {folder.name!r}: {error}",
            where=str(path),
            hint="run this cell again, or take intervals over seeds from the result rows alone",
        ) from error
    if frame.empty:
        raise DataError(f"run {folder.name!r} has no predictions of the split {split!r}", where=str(path))
    frame = frame.sort_values("id", kind="stable")
    columns = [str(name) for name in frame]
    label_columns = [name for name in columns if name == "label" or name.startswith("label/")]
    labels = frame[label_columns].to_numpy()
    logits = [name for name in columns if name.startswith("logit/")]
    facts = summary.get("run", {})
    return {
        "run": folder.name,
        "path": path,
        **{name: facts.get(name) for name in FACTS},
        "ids": frame["id"].to_numpy(object),
        "groups": frame["group"].to_numpy(object),
        "labels": labels[:, 0] if label_columns == ["label"] else labels,
        "logits": frame[logits].to_numpy(),
        "class_names": tuple(name.removeprefix("logit/") for name in logits),
    }


def measure(runs: Runs, draws: int = DRAWS, seed: int = SEED) -> Measured:
    """Metrics of each run on all images, and under the same draws of patients for all runs.

    Patients are drawn within strata (see `patient_bootstrap.patient_strata`), so an interval is for test sets with this
    mix of classes.

    Args:
        runs: The runs.
        draws: Number of resamples.
        seed: Of these draws.
    """
    patient, patients = pd.factorize(runs.groups)
    strata = patient_strata(runs.labels, patient)
    metrics, values = _metrics(runs, np.ones((len(patient), 1)))
    parts = [_metrics(runs, weights[patient])[1] for weights in patient_weights(strata, draws, seed)]
    digest = hashlib.sha256(repr((draws, seed, runs.class_names)).encode())
    for content in (patient.astype(np.int64), np.nan_to_num(runs.labels, nan=-1.0).astype(np.float32)):
        digest.update(np.ascontiguousarray(content).tobytes())
    return Measured(
        runs.facts,
        metrics,
        values[:, :, 0],
        np.concatenate(parts, axis=2),
        np.array([_freedom(runs, patient, strata, name) for _, name in metrics]),
        len(patients),
        digest.hexdigest(),
    )


def _metrics(runs: Runs, weights: np.ndarray) -> tuple[tuple[tuple[str, str], ...], np.ndarray]:
    """The M metrics' names, and (R, M, B) with image i counted `weights[i, b]` times."""
    tables = [weighted_metrics(logits, runs.labels, weights, runs.task, runs.class_names) for logits in runs.logits]
    return tuple(tables[0]), np.stack([np.stack(list(table.values())) for table in tables])


def _freedom(runs: Runs, patient: np.ndarray, strata: np.ndarray, class_name: str) -> int:
    """Patients less strata; for a class, one less than the smaller of its two sides, whose spread decides."""
    if not class_name:
        return max(len(strata) - int(strata.max()) - 1, 1)
    number = runs.class_names.index(class_name)
    truth = runs.labels == number if runs.labels.ndim == 1 else runs.labels[:, number]
    return max(min(len(np.unique(patient[truth == side])) for side in (0, 1)) - 1, 1)


def from_rows(frame: pd.DataFrame) -> Measured:
    """What result rows tell without predictions: the values of runs, several folds of one averaged.

    Args:
        frame: Result rows of one target and setting: the columns "run", `FACTS`, "metric", "class_name" and "value".
    """
    unit = list(FACTS)
    rows = frame.assign(class_name=frame["class_name"].fillna("").astype(str), metric=frame["metric"].astype(str))
    means = rows.groupby([*unit, "metric", "class_name"], dropna=False)["value"].mean()
    table = means.unstack(["metric", "class_name"])
    facts = rows.groupby(unit, dropna=False)["run"].first().reindex(table.index).reset_index()
    metrics = tuple((str(column[0]), str(column[1])) for column in table.columns)
    return Measured(facts, metrics, table.to_numpy(float), None, np.ones(len(metrics)), 0, "")


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
    odds = np.log(value / (1 - value))
    table = table.assign(low=1 / (1 + np.exp(half - odds)), high=1 / (1 + np.exp(-half - odds)))
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
        raise DataError(
            f"{len(names)} runs have the seed {seeds[column]} and the pre-training seed {pretrainings[row]}",
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
