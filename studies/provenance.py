"""Does the label go with where an image comes from? Contingency tables, Cramér's V and guesses: pure functions."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from datamodules import ontology

FLAG_V = 0.5
"""Cramér's V from which a label is flagged: Cohen's "large" effect (Cohen 1988, Statistical Power Analysis, 7.2). For
two equally frequent provenances and labels it means that provenance alone guesses 75 % of the labels."""

FLAG_AUROC = 0.75
"""AUROC of provenance alone from which a label is flagged. V is small wherever a label is rare, AUROC is not; for two
equally frequent provenances and labels AUROC = (1 + V) / 2, so that this is the same line as `FLAG_V`."""

FLAG_P = 1e-3
"""Largest p of a flag: an audit makes hundreds of comparisons, and chance alone should not flag one."""

DECIDED = 0.95
"""Share of the majority guess's errors that a guess by provenance avoids (Goodman and Kruskal's λ) from which a label
counts as decided by provenance: what is left is of the order of annotation errors."""

UNKNOWN = "(unknown)"

COLUMNS = (
    *("label", "provenance", "split", "images", "values"),
    *("v", "p", "majority", "guess", "auroc", "decided", "flagged"),
)


class Association(NamedTuple):
    """Association of two nominal variables: bias-corrected Cramér's V in [0, 1] and the p of the chi-square test."""

    v: float
    p: float


def association(table: np.ndarray) -> Association:
    """Cramér's V with the correction of Bergsma (2013, doi 10.1016/j.jkss.2012.10.002), and chi-square's p.

    Without correction V grows with the number of values: 30 scanners and 300 images give 0.3 by chance. The correction
    leaves a perfect association at 1. `scipy.stats.contingency.association` has none.

    Args:
        table: Counts, (rows, columns); empty rows and columns do not count.

    Returns:
        NaN for both where fewer than two rows or columns have counts.
    """
    from scipy.stats import chi2_contingency

    table = table[table.sum(axis=1) > 0][:, table.sum(axis=0) > 0]
    n = table.sum()
    if min(table.shape) < 2 or n < 2:
        return Association(np.nan, np.nan)
    test = chi2_contingency(table, correction=False)
    rows, columns = table.shape
    phi2 = max(0.0, test.statistic / n - (rows - 1) * (columns - 1) / (n - 1))
    least = min(rows - (rows - 1) ** 2 / (n - 1), columns - (columns - 1) ** 2 / (n - 1)) - 1
    return Association(float(np.sqrt(phi2 / least)) if least > 0 else np.nan, float(test.pvalue))


def label_columns(labels: np.ndarray, class_names: Sequence[str]) -> dict[str, np.ndarray]:
    """Labels as float columns (N,) by canonical name, NaN = unknown.

    Classes become one column each, 1 / 0, of which two classes need only the second; more than two get a column
    "class" with their numbers before.

    Args:
        labels: int64 (N,), −1 = none, or float32 (N, L), 1 / 0 / NaN (soft labels count from 0.5).
        class_names: Names of the classes or labels.
    """
    names = [ontology.canonical(name) for name in class_names]
    if labels.ndim == 2:
        return {
            name: np.where(np.isnan(column), np.nan, column >= 0.5)
            for name, column in zip(names, labels.T, strict=True)
        }
    known = labels >= 0
    each = {name: np.where(known, labels == number, np.nan) for number, name in enumerate(names)}
    if len(names) == 2:
        return {names[1]: each[names[1]]}
    return {"class": np.where(known, labels, np.nan), **each}


def counts(label: np.ndarray, provenance: np.ndarray) -> pd.DataFrame:
    """Contingency table, label values by provenance values; unknown labels are left out, unknown provenance is not.

    Args:
        label: float (N,), NaN = unknown.
        provenance: Texts (N,), "" = unknown.
    """
    known = ~np.isnan(label)
    values = pd.Series(np.asarray(provenance, dtype=object)[known], name="provenance").replace("", UNKNOWN)
    return pd.crosstab(pd.Series(label[known].astype(int), name="label"), values)


def provenance_table(
    labels: Mapping[str, np.ndarray],
    provenances: Mapping[str, np.ndarray],
    split: np.ndarray,
    halves: np.ndarray,
) -> pd.DataFrame:
    """Association of every label with every provenance column, overall and in each split.

    Args:
        labels: Columns of `label_columns`, (N,) each.
        provenances: Where images come from, by what kind of provenance it is (site, scanner, ...), texts (N,), "" =
            unknown.
        split: Name of every row's split (N,); rows of "" are left out.
        halves: bool (N,), random halves that hold a patient together. Guesses are learnt on one half and judged on the
            other, else rare provenances would seem to tell the label.

    Returns:
        A row for each label, provenance and split in which both vary: `images`, number of provenance `values`, `v`,
        `p`; accuracy of the `majority` label and of the best `guess` by provenance; `auroc` of that guess (labels of
        two values); whether provenance has `decided` the label; whether the row is `flagged`.
    """
    used = split != ""
    places = {"all": used, **{str(name): split == name for name in pd.unique(split[used])}}
    rows = []
    for kind, values in provenances.items():
        codes, names = pd.factorize(np.asarray(values, dtype=object))
        for label, column in labels.items():
            known = ~np.isnan(column)
            for place, inside in places.items():
                chosen = known & inside
                numbers = column[chosen].astype(np.int64)
                tables = _tables(numbers, codes[chosen], halves[chosen], len(names))
                if (tables.sum(axis=0).sum(axis=0) > 0).sum() < 2 or (tables.sum(axis=(0, 2)) > 0).sum() < 2:
                    continue
                rows.append((label, kind, place, len(numbers), *_judge(tables)))
    kinds = dict.fromkeys(COLUMNS[5:10], np.float64) | dict.fromkeys(COLUMNS[10:], np.bool_)  # of an empty table, too
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype(kinds)


def _tables(label: np.ndarray, provenance: np.ndarray, halves: np.ndarray, n_values: int) -> np.ndarray:
    """Counts of each half: (2, labels, provenances)."""
    n_labels = int(label.max(initial=0)) + 1
    cells = (halves.astype(np.int64) * n_labels + label) * n_values + provenance
    return np.bincount(cells, minlength=2 * n_labels * n_values).reshape(2, n_labels, n_values)


def _judge(tables: np.ndarray) -> tuple[int, float, float, float, float, float, bool, bool]:
    """Values of the columns from `values` on, from the counts of the two halves."""
    both = tables.sum(axis=0)
    both_halves = bool(tables.sum(axis=(1, 2)).all())
    v, p = association(both)
    majority = float(both.sum(axis=1).max() / both.sum())
    guess = auroc = np.nan
    if both_halves:
        right = _guess_accuracy(tables[0], tables[1]) + _guess_accuracy(tables[1], tables[0])
        guess = right / float(both.sum())
    if both_halves and len(both) == 2:
        found = [_guess_auroc(tables[0], tables[1]), _guess_auroc(tables[1], tables[0])]
        auroc = float(np.nanmean(found)) if not np.isnan(found).all() else np.nan
    strong = v >= FLAG_V or auroc >= FLAG_AUROC
    decided = guess - majority >= DECIDED * (1 - majority)
    values = int((both.sum(axis=0) > 0).sum())
    return values, v, p, majority, guess, auroc, bool(decided and p <= FLAG_P), bool(strong and p <= FLAG_P)


def _guess_accuracy(learn: np.ndarray, judge: np.ndarray) -> float:
    """Right guesses in `judge` when every provenance gets its most frequent label of `learn`."""
    usual = learn.sum(axis=1).argmax()
    best = np.where(learn.sum(axis=0) > 0, learn.argmax(axis=0), usual)
    return float(judge[best, np.arange(judge.shape[1])].sum())


def _guess_auroc(learn: np.ndarray, judge: np.ndarray) -> float:
    """AUROC in `judge` of scoring an image by the share of positives that its provenance has in `learn`; or NaN."""
    negatives, positives = judge.astype(np.float64)
    if not negatives.sum() or not positives.sum():
        return np.nan
    seen = learn.sum(axis=0)
    score = np.where(seen > 0, learn[1] / np.maximum(seen, 1), learn[1].sum() / seen.sum())
    above, equal = score[:, None] > score[None, :], score[:, None] == score[None, :]
    return float(positives @ (above + 0.5 * equal) @ negatives / (positives.sum() * negatives.sum()))
