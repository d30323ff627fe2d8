"""Train, validation, test and folds as pure functions of labels and group ids; groups (patients) never cross.

Every draw over groups is a keyed hash of the group's id (see `hashing`): no order of rows, dtype of the ids,
platform or version of numpy can change it. Ids are compared as text: 7, 7.0 and "7" are one group, "007" is another.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from datamodules.errors import DataError, shorten
from datamodules.hashing import as_text, hash_ids

Int64Array = npt.NDArray[np.int64]
UInt64Array = npt.NDArray[np.uint64]
BoolArray = npt.NDArray[np.bool_]


def group_order(groups: npt.ArrayLike, key: str, rows: Int64Array | None = None) -> tuple[Int64Array, UInt64Array]:
    """Shuffle groups by a keyed hash of their ids and number them in that order.

    Args:
        groups: (N,) group id of every row.
        key: What the order is for, with its seed.
        rows: Look at these rows only; cheaper than copying the ids of millions of them.

    Returns:
        int64 (N,): each row's group as its place 0..G-1 in the shuffled order;
        uint64 (G,): the groups' hashes, ascending.
    """
    hashes = hash_ids(groups, key)
    if rows is not None:
        hashes = hashes[rows]
    order = np.argsort(hashes)
    hashes = hashes[order]
    first = _first_of_equals(hashes)
    places = np.cumsum(first, dtype=np.int64)
    places -= 1
    codes = np.empty(len(hashes), dtype=np.int64)
    codes[order] = places
    return codes, hashes if first.all() else hashes[first]


def rank_within(strata: Int64Array, keys: UInt64Array) -> Int64Array:
    """Rank items inside their stratum by random keys: int64 (N,), 0 for the smallest key of a stratum.

    Stratum, leading bits of the key and row share one 64-bit word, so that a single sort without ties does it
    (40 times faster than `np.lexsort` on 14 M rows).
    """
    n = len(strata)
    if n == 0:
        return np.empty(0, dtype=np.int64)
    row_bits = max(1, (n - 1).bit_length())
    stratum_bits = max(1, int(strata.max()).bit_length())
    # In place: at 14 M rows every array has 112 MB.
    words = strata.astype(np.uint64)
    words <<= np.uint64(64 - stratum_bits)
    leading = keys >> np.uint64(stratum_bits + row_bits)
    leading <<= np.uint64(row_bits)
    words |= leading
    words |= np.arange(n, dtype=np.uint64)
    del leading
    words.sort()
    words &= np.uint64((1 << row_bits) - 1)
    sizes = np.bincount(strata)
    within = np.arange(n)
    within -= np.repeat(np.cumsum(sizes) - sizes, sizes)
    ranks = np.empty(n, dtype=np.int64)
    ranks[words.view(np.int64)] = within
    return ranks


def distinct(values: Int64Array) -> Int64Array:
    """Sort in place and deduplicate; `np.unique` hashes since numpy 2.3, 50 times slower on 14 M values."""
    values.sort()
    return values[_first_of_equals(values)]


def rarity(labels: npt.NDArray[Any], groups: Int64Array) -> Int64Array:
    """Rank every row by its rarest class or positive label, counted in groups.

    Args:
        labels: int64 (N,) classes with -1 = unlabelled, or float (N, L) with 1 / 0 / NaN.
        groups: int64 (N,) codes 0..G-1 of the groups, each of which occurs.

    Returns:
        int64 (N,): 0 where the row has the rarest class or label of all; C or L where it has none. Ties go to
        the lower index.
    """
    if labels.ndim == 1:
        known = labels >= 0
        n_classes = int(labels.max(initial=-1)) + 1
        if len(groups) == int(groups.max(initial=-1)) + 1:  # one row a group: nothing to deduplicate
            counts = np.bincount(labels[known], minlength=n_classes)
        else:
            pairs = distinct(groups[known] * n_classes + labels[known])
            counts = np.bincount(pairs % max(n_classes, 1), minlength=n_classes)
    else:
        counts = np.array([len(distinct(groups[column == 1])) for column in labels.T], dtype=np.int64)
    ranks = np.empty(len(counts) + 1, dtype=np.int64)
    ranks[np.argsort(counts, kind="stable")] = np.arange(len(counts))
    ranks[-1] = len(counts)
    if labels.ndim == 1:
        return ranks[np.where(known, labels, -1)]
    rarest = np.full(len(labels), len(counts), dtype=np.int64)
    for rank, column in zip(ranks, labels.T, strict=False):  # label by label: no (N, L) integers in memory
        rarest[(column == 1) & (rank < rarest)] = rank
    return rarest


def group_minimum(values: Int64Array, groups: Int64Array, n_groups: int) -> Int64Array:
    """Take the smallest value of each group's rows: int64 (G,). Of `rarity` it is the group's stratum."""
    smallest = np.full(n_groups, values.max(initial=0), dtype=np.int64)
    if n_groups == len(values):  # one row a group
        smallest[groups] = values
    else:
        np.minimum.at(smallest, groups, values)
    return smallest


def hash_unit(ids: npt.ArrayLike, dataset: str) -> npt.NDArray[np.float64]:
    """Map ids (N,) to fixed uniform numbers in [0, 1): float64 (N,), a function of data set and id alone."""
    return (hash_ids(ids, f"test {dataset}") >> np.uint64(11)).astype(np.float64) * 2.0**-53


def hash_test(groups: npt.ArrayLike, dataset: str, test_fraction: float) -> BoolArray:
    """Test membership where no official split exists: bool (N,), True = test.

    A fixed hash of data set and group: independent of seeds and of the rows present, and a larger fraction's
    test set contains a smaller one's. The share of groups is therefore `test_fraction` only in expectation.

    Raises:
        DataError: `test_fraction` is not in [0, 1).
    """
    _check_fraction(test_fraction, "test_fraction")
    return hash_unit(groups, dataset) < test_fraction


def train_validation(
    labels: npt.NDArray[Any], groups: npt.ArrayLike, val_fraction: float, seed: int, rows: Int64Array | None = None
) -> BoolArray:
    """Split rows into training and validation by group, stratified.

    A group belongs to the stratum of its rarest class or positive label ("none" where it has none). The
    validation set has round(val_fraction * groups) groups, at least one and never all. Each stratum gives the
    whole part of its share; the groups still missing come one each from the strata with the largest
    remainders (rarest first where equal), and only then from strata that have no other group for training.
    So a class with very few groups is rather missing from validation than from training.

    Args:
        labels: int64 (N,) classes with -1 = unlabelled, or float (N, L) with 1 / 0 / NaN.
        groups: (N,) group id of every row; with `rows` of every row of the table.
        val_fraction: Share of the groups in [0, 1); 0 gives an empty validation set.
        seed: Non-negative seed of the split.
        rows: int64 (N,), the table's rows that are divided; default: all.

    Returns:
        bool (N,), True = validation.

    Raises:
        DataError: A setting out of range, a missing group id, or fewer than two groups to divide.
    """
    _check_fraction(val_fraction, "val_fraction")
    check_seed(seed, "split_seed")
    if val_fraction == 0:
        return np.zeros(len(labels), dtype=np.bool_)
    codes, hashes = group_order(groups, f"validation {seed}", rows)
    if len(hashes) < 2:
        raise DataError(
            f"{len(hashes)} group cannot be divided into training and validation",
            where=f"val_fraction={val_fraction}",
            valid="at least 2 groups",
            hint="set val_fraction: 0, or name the column that identifies patients",
        )
    strata = group_minimum(rarity(labels, codes), codes, len(hashes))
    total = min(max(1, round(val_fraction * len(hashes))), len(hashes) - 1)
    quota = _apportion(np.bincount(strata), total)
    validation: BoolArray = rank_within(strata, hashes) < quota[strata]
    return validation[codes]


def folds(labels: npt.NDArray[Any], groups: npt.ArrayLike, folds: int, seed: int) -> Int64Array:
    """Assign rows to folds by group, stratified and balanced.

    Inside a stratum (see `train_validation`) groups are lined up by size and dealt, `folds` at a time and in
    random order, one to each fold. So folds differ by at most one group, in every stratum and in total, and
    large groups are spread evenly.

    Args:
        labels: int64 (N,) classes with -1 = unlabelled, or float (N, L) with 1 / 0 / NaN.
        groups: (N,) group id of every row.
        folds: Number of folds, at least 2.
        seed: Non-negative seed of the split.

    Returns:
        int64 (N,) in [0, folds).

    Raises:
        DataError: Fewer than two folds, fewer groups than folds, or a missing group id.
    """
    check_seed(seed, "split_seed")
    codes, hashes = group_order(groups, f"folds {seed}")
    n_groups = len(hashes)
    _check_folds(folds, n_groups, "groups")
    strata = group_minimum(rarity(labels, codes), codes, n_groups)
    by_size = np.lexsort((np.arange(n_groups), -np.bincount(codes), strata))
    starts = np.cumsum(np.bincount(strata)) - np.bincount(strata)
    rounds = np.empty(n_groups, dtype=np.int64)
    rounds[by_size] = (np.arange(n_groups) - starts[strata[by_size]]) // folds
    dealt = np.lexsort((np.arange(n_groups), rounds, strata))  # inside a round by hash
    fold = np.empty(n_groups, dtype=np.int64)
    fold[dealt] = np.arange(n_groups) % folds
    return fold[codes]


def folds_by_value(values: npt.ArrayLike) -> tuple[Int64Array, list[str]]:
    """Make one fold of every value of a metadata column, such as the site (leave one site out).

    Groups are not looked at: whoever uses the folds asks `check_disjoint` whether a patient is at two sites.

    Returns:
        int64 (N,) fold of every row; the values as text, sorted, where the place is the fold.

    Raises:
        DataError: A value is missing, or all are the same.
    """
    text = as_text(np.asarray(values), 0, "fold_by value")
    names, codes = np.unique(text.astype(str), return_inverse=True)
    _check_folds(len(names), len(names), "values")
    return codes.astype(np.int64, copy=False), [str(name) for name in names]


def folds_by_date(dates: npt.ArrayLike, folds: int, groups: npt.ArrayLike) -> Int64Array:
    """Cut time into folds that hold equally many groups (±1), each group at its first date.

    Args:
        dates: (N,) dates: datetime64, ISO 8601 text ("2014-09-15") or DICOM's 20140915.
        folds: Number of folds, at least 2; fold 0 is the earliest.
        groups: (N,) group id of every row. Groups of one day are ordered by a hash of their ids.

    Returns:
        int64 (N,) in [0, folds).

    Raises:
        DataError: A date is missing or not ISO 8601, fewer than two folds, or fewer groups than folds.
    """
    text = as_text(np.asarray(dates), 0, "date")
    try:
        days = pd.to_datetime(pd.Series(text, dtype=object), format="ISO8601")
    except ValueError as error:
        raise DataError(
            f"a date cannot be read: {error}",
            where="fold_by: date",
            valid="ISO 8601 dates such as 2014-09-15 or 20140915",
        ) from error
    when = np.unique(days.to_numpy(), return_inverse=True)[1]
    codes, hashes = group_order(groups, "date")
    _check_folds(folds, len(hashes), "groups")
    fold = np.empty(len(hashes), dtype=np.int64)
    fold[np.argsort(group_minimum(when, codes, len(hashes)), kind="stable")] = (
        np.arange(len(hashes)) * folds // len(hashes)
    )
    return fold[codes]


def crossing_groups(groups: npt.ArrayLike, split: Any) -> list[str]:
    """Find the groups that occur in more than one split.

    Args:
        groups: (N,) group id of every row.
        split: (N,) name of every row's split; rows whose split is "" or missing are not looked at.

    Returns:
        Each such group as "id (test, train)", in the order of the rows.
    """
    names = pd.Categorical(split)
    split_codes, split_names = names.codes, names.categories
    ids: Any = pd.Series(groups, copy=False)
    used = np.append(split_names != "", False).astype(np.bool_)[split_codes]  # missing has the code -1
    ids, split_codes = ids[used].reset_index(drop=True), split_codes[used]
    codes, hashes = group_order(ids, "disjoint")
    width = max(1, len(split_names))
    pairs = distinct(codes * width + split_codes)
    crossing = np.flatnonzero(np.bincount(pairs // width, minlength=len(hashes)) > 1)
    if len(crossing) == 0:
        return []
    first = group_minimum(np.arange(len(codes)), codes, len(hashes))
    crossing = crossing[np.argsort(first[crossing])]
    places: dict[int, list[str]] = {code: [] for code in crossing.tolist()}  # in the table's order
    for pair in pairs[np.isin(pairs // width, crossing)].tolist():
        places[pair // width].append(str(split_names[pair % width]))
    return [f"{ids.iloc[first[code]]} ({', '.join(sorted(names))})" for code, names in places.items()]


def check_disjoint(groups: npt.ArrayLike, split: Any, where: str = "the table's columns group and split") -> None:
    """Make sure that no group occurs in two splits; arguments as in `crossing_groups`.

    Raises:
        DataError: Groups are in several splits; names them and where they are.
    """
    found = crossing_groups(groups, split)
    if found:
        raise DataError(
            f"{len(found)} groups occur in more than one split: {shorten(found)}",
            where=where,
            valid="every group (patient) in exactly one split",
            hint="correct the split, drop these groups' rows from all splits but one, or mark the results with "
            "--data.leaks record",
        )


def check_seed(seed: int, name: str) -> None:
    """Raise a DataError that names the setting where a seed is negative."""
    if seed < 0:
        raise DataError(f"{name} is {seed}", where=name, valid="0, 1, 2, ...")


def _first_of_equals(ordered: npt.NDArray[Any]) -> BoolArray:
    """Mark the first of equal neighbours."""
    first = np.ones(len(ordered), dtype=np.bool_)
    np.not_equal(ordered[1:], ordered[:-1], out=first[1:])
    return first


def _apportion(sizes: npt.NDArray[np.intp], total: int) -> Int64Array:
    """Divide `total` among strata in proportion to their sizes by largest remainders: int64 (S,)."""
    share = sizes * (total / sizes.sum())
    quota: Int64Array = np.floor(share).astype(np.int64)
    takes_last = quota + 1 >= sizes
    order = np.lexsort((np.arange(len(sizes)), quota - share, takes_last))
    order = order[sizes[order] > quota[order]]
    quota[order[: total - int(quota.sum())]] += 1
    return quota


def _check_fraction(fraction: float, name: str) -> None:
    if not 0 <= fraction < 1:
        raise DataError(f"{name} is {fraction}", where=name, valid="0 <= fraction < 1")


def _check_folds(folds: int, available: int, what: str) -> None:
    if folds < 2 or available < folds:
        raise DataError(
            f"{folds} folds cannot be made of {available} {what}",
            where="folds",
            valid=f"2 to {available} folds" if available >= 2 else f"a table with at least 2 {what}",
        )
