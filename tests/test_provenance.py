"""Association of labels with provenance, against slow formulas, analytic tables and planted confounds."""

import numpy as np
import pytest
from scipy.stats.contingency import association as scipy_association
from sklearn.metrics import roc_auc_score

from studies.provenance import association, counts, label_columns, provenance_table
from studies.source_probe import choose_rows, probe_source


def slow_corrected_v(table):
    """Bergsma's formula cell by cell, from the definition of chi-square."""
    n, rows, columns = sum(map(sum, table)), len(table), len(table[0])
    row_sums = [sum(line) for line in table]
    column_sums = [sum(line[j] for line in table) for j in range(columns)]
    chi2 = 0.0
    for i in range(rows):
        for j in range(columns):
            expected = row_sums[i] * column_sums[j] / n
            chi2 += (table[i][j] - expected) ** 2 / expected
    phi2 = max(0.0, chi2 / n - (rows - 1) * (columns - 1) / (n - 1))
    least = min(rows - (rows - 1) ** 2 / (n - 1), columns - (columns - 1) ** 2 / (n - 1))
    return (phi2 / (least - 1)) ** 0.5


@pytest.mark.parametrize("shape", [(2, 2), (2, 7), (5, 3)])
def test_v_is_the_slow_formula(shape):
    rng = np.random.default_rng(sum(shape))
    for _ in range(20):
        table = rng.integers(1, 60, shape)
        assert association(table).v == pytest.approx(slow_corrected_v(table.tolist()), abs=1e-12)


def test_v_of_tables_known_by_hand():
    assert association(np.array([[200, 0], [0, 200]])).v == pytest.approx(1)
    assert association(np.array([[50, 50], [50, 50]])) == (0, 1)
    # Phi of this table is 0.5; without its bias, (0.25 − 1/399) / (1 − 1/399).
    assert association(np.array([[150, 50], [50, 150]])).v == pytest.approx(((0.25 - 1 / 399) / (1 - 1 / 399)) ** 0.5)
    assert np.isnan(association(np.array([[5, 7], [0, 0]])).v)  # one label only


def test_the_correction_takes_away_what_chance_gives():
    rng = np.random.default_rng(0)
    tables = [np.bincount(rng.integers(0, 60, 300), minlength=60).reshape(2, 30) for _ in range(20)]
    plain = np.mean([scipy_association(table) for table in tables])
    assert plain > 0.25
    assert np.mean([association(table).v for table in tables]) < plain / 3
    large = rng.integers(1000, 90000, (3, 4))
    assert association(large).v == pytest.approx(scipy_association(large), abs=1e-3)


def test_labels_become_columns():
    multilabel = np.array([[1, np.nan], [0, 0.7]], dtype=np.float32)
    columns = label_columns(multilabel, ["pleural_thickening", "Edema"])
    assert list(columns) == ["Pleural_Thickening", "Edema"]
    np.testing.assert_array_equal(columns["Edema"], [np.nan, 1])
    two = label_columns(np.array([0, 1, -1]), ["negative", "positive"])
    assert list(two) == ["positive"]
    np.testing.assert_array_equal(two["positive"], [0, 1, np.nan])
    three = label_columns(np.array([0, 2, 1, -1]), ["a", "b", "c"])
    assert list(three) == ["class", "a", "b", "c"]
    np.testing.assert_array_equal(three["class"], [0, 2, 1, np.nan])


def made(label, provenance, split=None, seed=0):
    n = len(label)
    halves = np.random.default_rng(seed).random(n) < 0.5
    split = np.full(n, "train", dtype=object) if split is None else split
    return provenance_table(
        {"label": np.asarray(label, float)}, {"site": np.asarray(provenance, object)}, split, halves
    )


def test_decided_in_the_test_set_alone():
    rng = np.random.default_rng(1)
    split = np.repeat(np.array(["train", "test", ""], dtype=object), [600, 200, 50])
    label = rng.integers(0, 2, 850)
    site = np.array(["north", "south"], dtype=object)[rng.integers(0, 2, 850)]
    site[600:800] = np.where(label[600:800] == 1, "north", "south")
    table = made(label, site, split).set_index("split")
    assert set(table.index) == {"all", "train", "test"}
    test, train = table.loc["test"], table.loc["train"]
    assert (test.v, test.guess, test.auroc) == (pytest.approx(1), 1, 1)
    assert test.decided
    assert test.flagged
    assert not train.flagged
    assert train.v < 0.15
    assert table.loc["all"].images == 800
    assert test.majority == max(label[600:800].mean(), 1 - label[600:800].mean())


def test_a_rare_label_is_flagged_by_auroc():
    site = np.repeat(np.array(["a", "b"], dtype=object), [1000, 3000])
    label = np.zeros(4000)
    label[:40] = 1  # every positive is of site a
    row = made(label, site).iloc[0]
    assert row.v < 0.2
    assert row.auroc == pytest.approx(roc_auc_score(label, site == "a"), abs=0.01)
    assert row.flagged
    assert not row.decided


def test_many_rare_provenances_tell_nothing():
    rng = np.random.default_rng(2)
    scanner = rng.integers(0, 400, 1000).astype(str).astype(object)
    row = made(rng.random(1000) < 0.05, scanner).iloc[0]
    assert row["values"] > 300
    assert 0.3 < row.auroc < 0.65  # the scanners' own shares of positives would give more than 0.9
    assert not row.flagged


def test_what_does_not_vary_has_no_row():
    assert made(np.ones(40), ["a", "b"] * 20).empty
    assert made([0, 1] * 20, ["a"] * 40).empty
    label = np.where(np.arange(40) < 20, np.nan, np.arange(40) % 2)  # annotated at one site only
    assert made(label, np.repeat(["a", "b"], 20)).empty


def test_counts_name_unknown_provenance():
    table = counts(np.array([1.0, 0, np.nan, 1]), np.array(["x", "", "x", "x"], dtype=object))
    assert table.loc[1, "x"] == 2
    assert table.loc[0, "(unknown)"] == 1
    assert table.to_numpy().sum() == 3


def noise(n, seed=0):
    return np.random.default_rng(seed).integers(60, 200, (n, 32, 32)).astype(np.uint8)


def test_the_probe_reads_a_border_and_nothing_from_noise():
    site = np.array(["a", "b"] * 100, dtype=object)
    patients = np.array([f"p{number // 2}" for number in range(200)], dtype=object)
    nothing = probe_source("site", noise(200), site, patients)
    assert nothing.low < 0.5 < nothing.high
    assert not nothing.readable
    images = noise(200)
    images[site == "a", :2] = 0
    border = probe_source("site", images, site, patients)
    assert border.auroc > 0.99
    assert border.balanced_accuracy > 0.95
    assert border.readable
    assert border.chance == 0.5


def test_the_probe_does_not_recognise_patients():
    """Each patient has one picture and one site: only by the patient could the site be told."""
    patients = np.repeat(np.arange(40), 5)
    images = noise(40)[patients]
    site = np.where(patients % 2, "a", "b").astype(object)
    assert not probe_source("site", images, site, patients.astype(str).astype(object)).readable


def test_rows_are_balanced_and_small_sources_left_out():
    values = np.repeat(np.array(["a", "b", "c", ""], dtype=object), [500, 100, 10, 300])
    groups = np.arange(910).astype(str).astype(object)
    rows = choose_rows(values, groups, 120, seed=0)
    assert sorted(values[rows]) == ["a"] * 60 + ["b"] * 60
    assert not np.array_equal(rows, choose_rows(values, groups, 120, seed=1))
    assert len(choose_rows(values[:500], groups[:500], 120, seed=0)) == 0
    few = np.where(values == "b", "one patient", groups).astype(object)
    assert len(choose_rows(values, few, 120, seed=0)) == 0
