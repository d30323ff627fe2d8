import numpy as np
import pandas as pd
import pytest

from datamodules.errors import DataError
from datamodules.splits import (
    check_disjoint,
    crossing_groups,
    folds,
    folds_by_date,
    folds_by_value,
    hash_test,
    hash_unit,
    rank_within,
    rarity,
    train_validation,
)

N = 4000


def patients(seed=0, n=N, n_patients=900):
    """Skewed sizes: a few patients have dozens of images, most have few."""
    rng = np.random.default_rng(seed)
    weights = rng.pareto(1.5, n_patients) + 0.2
    return np.array([f"patient{i}" for i in rng.choice(n_patients, n, p=weights / weights.sum())], dtype=object)


def classes(seed=0, n=N):
    return np.random.default_rng(seed).choice(4, n, p=[0.6, 0.25, 0.12, 0.03]).astype(np.int64)


def findings(seed=0, n=N):
    rng = np.random.default_rng(seed)
    labels = (rng.random((n, 3)) < [0.2, 0.08, 0.02]).astype(np.float32)
    labels[rng.random((n, 3)) < 0.1] = np.nan
    return labels


def slow_strata(labels, groups):
    """The rarest class or positive label of each group (counted in groups), None where it has none."""
    has = {group: set() for group in groups}
    for row, group in enumerate(groups):
        if labels.ndim == 1:
            has[group] |= {int(labels[row])} - {-1}
        else:
            has[group] |= set(np.flatnonzero(labels[row] == 1).tolist())
    counts = pd.Series([c for found in has.values() for c in found], dtype="int64").value_counts()
    return {g: min(found, key=lambda c: (counts[c], c)) if found else None for g, found in has.items()}


def strata_counts(strata, groups):
    return pd.Series([str(strata[group]) for group in set(groups)]).value_counts()


DATA = {
    "classes, patients": (classes(), patients()),
    "labels, patients": (findings(), patients()),
    "classes, one image a group": (classes(), np.arange(N)),
    "unlabelled": (np.full(N, -1), patients()),
}


@pytest.fixture(params=list(DATA))
def data(request):
    return DATA[request.param]


# --- hashed test sets ---


def test_hash_unit_is_pinned():
    """Published test sets hang on these numbers: they may never change."""
    assert hash_unit(np.array(["p1", "p2", "Ä"], dtype=object), "nih").tolist() == [
        0.48362036814669196,
        0.29919221076075175,
        0.30251711069427745,
    ]
    assert hash_unit(np.array([1, 23]), "tuberculosis").tolist() == [0.7137944079084184, 0.4336903081287018]


def test_hash_is_the_same_for_every_way_to_store_an_id():
    numbers = np.array([7, 12, 7, 10**9])
    expected = hash_unit(numbers, "x")
    ways = [
        numbers.astype(float),
        numbers.astype(str),
        numbers.astype(str).astype(object),
        numbers.astype("int32"),
    ]
    ways += [
        pd.Series(numbers),
        pd.Series(numbers, dtype="Int64"),
        pd.Series(numbers.astype(str)),
        list(numbers),
    ]
    ways += [
        pd.Series(numbers.astype(str), dtype="string[pyarrow]"),
        pd.Series(numbers.astype(str), dtype="category"),
    ]
    for way in ways:
        assert np.array_equal(hash_unit(way, "x"), expected)
    assert hash_unit(["007"], "x") != hash_unit(["7"], "x")


def test_hash_is_uniform_and_differs_between_data_sets():
    values = hash_unit(np.arange(100_000), "a")
    assert values.min() >= 0
    assert values.max() < 1
    deciles = np.histogram(values, 10, (0, 1))[0]
    assert np.abs(deciles - 10_000).max() < 5 * np.sqrt(9000)
    assert abs(np.corrcoef(values, hash_unit(np.arange(100_000), "b"))[0, 1]) < 0.02


def test_test_membership_depends_on_no_other_row():
    groups = patients()
    test = hash_test(groups, "nih", 0.2)
    assert abs(test.mean() - 0.2) < 0.08
    assert np.array_equal(hash_test(groups[100:300][::-1], "nih", 0.2), test[100:300][::-1])
    assert (hash_test(groups, "nih", 0.3) | ~test).all()
    assert not set(groups[test]) & set(groups[~test])
    assert not hash_test(groups, "nih", 0).any()


def test_ids_beyond_one_chunk_hash_as_alone():
    ids = np.arange(600_000)
    assert np.array_equal(hash_unit(ids, "x")[-5:], hash_unit(ids[-5:], "x"))


@pytest.mark.parametrize("missing", [None, np.nan, pd.NA])
def test_missing_ids_are_errors(missing):
    with pytest.raises(DataError, match="a group id is missing in row 1 and 0 more"):
        hash_test(np.array(["a", missing, "b"], dtype=object), "nih", 0.1)
    with pytest.raises(DataError, match=r"a group id is 0\.5"):
        hash_unit(np.array([1.0, 0.5]), "nih")


# --- strata ---


@pytest.mark.parametrize("labels", [classes(n=500), findings(n=500)], ids=["classes", "labels"])
def test_rarity_agrees_with_a_slow_count(labels):
    groups = np.random.default_rng(1).integers(0, 120, 500)
    ranks = rarity(labels, groups)
    n_classes = 4 if labels.ndim == 1 else 3
    members = labels[:, None] == np.arange(n_classes) if labels.ndim == 1 else labels == 1
    counts = [len(set(groups[members[:, c]])) for c in range(n_classes)]
    order = sorted(range(n_classes), key=lambda c: (counts[c], c))
    for row in range(500):
        places = [order.index(c) for c in range(n_classes) if members[row, c]]
        assert ranks[row] == (min(places) if places else n_classes)


def test_rank_within_agrees_with_sorting_each_stratum():
    rng = np.random.default_rng(0)
    strata, keys = rng.integers(0, 9, 1000), rng.integers(0, 2**64, 1000, dtype=np.uint64)
    expected = pd.Series(keys).groupby(strata).rank().to_numpy().astype(int) - 1
    assert np.array_equal(rank_within(strata, keys), expected)


# --- training and validation ---


def test_validation_is_group_disjoint_and_has_the_asked_number_of_groups(data):
    labels, groups = data
    for seed in range(5):
        for fraction in (0.05, 0.1, 0.5):
            validation = train_validation(labels, groups, fraction, seed)
            inside, outside = set(groups[validation]), set(groups[~validation])
            assert not inside & outside
            assert len(inside) == round(fraction * len(set(groups)))


def test_validation_is_stratified_to_one_group(data):
    labels, groups = data
    strata = slow_strata(labels, groups)
    everything = strata_counts(strata, groups)
    for seed in range(3):
        inside = strata_counts(strata, groups[train_validation(labels, groups, 0.15, seed)])
        assert (inside.reindex(everything.index, fill_value=0) - 0.15 * everything).abs().max() <= 1


def test_splits_do_not_depend_on_the_order_of_rows_or_the_type_of_ids(data):
    labels, groups = data
    order = np.random.default_rng(5).permutation(N)
    validation, fold = train_validation(labels, groups, 0.1, 3), folds(labels, groups, 5, 3)
    assert np.array_equal(train_validation(labels[order], groups[order], 0.1, 3), validation[order])
    assert np.array_equal(folds(labels[order], groups[order], 5, 3), fold[order])
    text = pd.Series(groups.astype(str), dtype="string[pyarrow]")
    assert np.array_equal(train_validation(labels, text, 0.1, 3), validation)
    assert not np.array_equal(train_validation(labels, groups, 0.1, 4), validation)


def test_the_edges_of_the_validation_fraction():
    labels, groups = np.zeros(6, dtype=np.int64), np.array([1, 1, 1, 2, 2, 3])
    assert not train_validation(labels, groups, 0, 0).any()
    assert len(set(groups[train_validation(labels, groups, 0.01, 0)])) == 1
    assert len(set(groups[train_validation(labels, groups, 0.99, 0)])) == 2
    with pytest.raises(DataError, match="1 group cannot be divided"):
        train_validation(labels, np.zeros(6), 0.5, 0)
    with pytest.raises(DataError, match="val_fraction is 1"):
        train_validation(labels, groups, 1, 0)
    with pytest.raises(DataError, match="split_seed is -2"):
        train_validation(labels, groups, 0.5, -2)


def test_training_keeps_the_only_group_of_a_class():
    labels = np.repeat([0, 1, 2], [7, 7, 1])  # shares 4.2, 4.2 and 0.6: the largest remainder is the lone group's
    for seed in range(10):
        validation = train_validation(labels, np.arange(15), 0.6, seed)
        assert sorted(np.bincount(labels[validation], minlength=3).tolist()) == [0, 4, 5]
        assert not validation[-1]


def test_splits_are_pinned():
    labels = np.arange(60) % 3
    validation = np.flatnonzero(train_validation(labels, np.arange(60) // 3, 0.2, 0))
    assert validation.tolist() == [21, 22, 23, 30, 31, 32, 48, 49, 50, 57, 58, 59]
    assert folds(labels[:12], np.arange(12) // 2, 3, 0).tolist() == [1, 1, 0, 0, 2, 2, 2, 2, 0, 0, 1, 1]


# --- folds ---


@pytest.mark.parametrize("n_folds", [2, 5, 7])
def test_folds_are_disjoint_stratified_and_balanced(data, n_folds):
    labels, groups = data
    strata = slow_strata(labels, groups)
    largest = pd.Series(groups).value_counts().max()
    for seed in range(3):
        fold = folds(labels, groups, n_folds, seed)
        assert fold.dtype == np.int64
        per_fold = [groups[fold == f] for f in range(n_folds)]
        assert sum(len(set(part)) for part in per_fold) == len(set(groups))
        assert np.ptp([len(set(part)) for part in per_fold]) <= 1
        assert np.ptp([len(part) for part in per_fold]) <= max(1, largest)
        counts = pd.concat([strata_counts(strata, part) for part in per_fold], axis=1).fillna(0)
        assert (counts.max(axis=1) - counts.min(axis=1)).max() <= 1


def test_folds_spread_large_groups():
    groups = np.concatenate([np.repeat(np.arange(5), 100), np.arange(5, 105)])
    for seed in range(5):
        fold = folds(np.zeros(600, dtype=np.int64), groups, 5, seed)
        assert np.bincount(fold).tolist() == [120] * 5
    assert len({folds(np.zeros(600, dtype=np.int64), groups, 5, s)[:500:100].tobytes() for s in range(9)}) > 1


def test_folds_that_cannot_be_made_are_errors():
    labels = np.zeros(6, dtype=np.int64)
    with pytest.raises(DataError, match="4 folds cannot be made of 3 groups"):
        folds(labels, np.array([1, 1, 1, 2, 2, 3]), 4, 0)
    with pytest.raises(DataError, match="1 folds cannot be made"):
        folds(labels, np.arange(6), 1, 0)


def test_folds_by_value():
    fold, names = folds_by_value(pd.Series(["Rome", "Bonn", "Rome", "Oslo"]))
    assert fold.tolist() == [2, 0, 2, 1]
    assert names == ["Bonn", "Oslo", "Rome"]
    with pytest.raises(DataError, match="1 values"):
        folds_by_value(["Rome", "Rome"])
    with pytest.raises(DataError, match="a fold_by value is missing in row 0"):
        folds_by_value([None, "Rome"])


def test_folds_by_date_are_chronological_equal_and_disjoint():
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 103, 600)
    dates = np.datetime64("2014-01-01") + rng.integers(0, 3000, 600)
    fold = folds_by_date(dates, 4, groups)
    first = pd.Series(dates).groupby(groups).min()
    of_group = pd.Series(fold).groupby(groups).agg(["min", "max"])
    assert (of_group["min"] == of_group["max"]).all()
    assert np.ptp(of_group["min"].value_counts()) <= 1
    spans = first.groupby(of_group["min"]).agg(["min", "max"])
    assert (spans["max"].to_numpy()[:-1] <= spans["min"].to_numpy()[1:]).all()


@pytest.mark.parametrize("dates", [[20140915, 20131231, 20150101], ["2014-09-15", "2013-12-31", "2015-01-01"]])
def test_dates_are_read_from_numbers_and_text(dates):
    assert folds_by_date(dates, 3, ["a", "b", "c"]).tolist() == [1, 0, 2]


@pytest.mark.parametrize("dates", [["31/12/2014", "01/02/2015"], ["2014-13-01", "2014-01-01"], [None, "2014-01-01"]])
def test_dates_that_cannot_be_ordered_are_errors(dates):
    with pytest.raises(DataError, match="date"):
        folds_by_date(dates, 2, ["a", "b"])


# --- the guard ---


def test_disjoint_splits_pass_and_unassigned_rows_are_ignored():
    check_disjoint(patients(), hash_test(patients(), "nih", 0.3).astype(str))
    check_disjoint(["a", "a", None, "b"], ["train", "", "", "test"])
    check_disjoint(pd.Series(["a", "a"], dtype="string[pyarrow]"), pd.Series(["test", None]))
    check_disjoint([], [])
    assert crossing_groups(["a", "a", None, "b"], ["train", "", "", "test"]) == []
    assert crossing_groups(["a", "a"], ["train", "test"]) == ["a (test, train)"]


def test_groups_in_two_splits_are_named_in_the_order_of_the_table():
    groups = ["z", "b", "z", "b", "c", "b", "d", "d"]
    split = ["train", "train", "test", "validation", "test", "test", "train", ""]
    with pytest.raises(DataError, match=r"2 groups .*: z \(test, train\), b \(test, train, validation\)"):
        check_disjoint(groups, split)


def test_a_long_list_of_crossing_groups_is_shortened():
    ids = np.repeat(np.arange(1000), 2)
    with pytest.raises(DataError, match=r"1000 groups .* 11 \(a, b\), \.\.\. \(988 more\)"):
        check_disjoint(ids, np.tile(["a", "b"], 1000))
