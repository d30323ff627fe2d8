import itertools

import numpy as np
import pytest

from datamodules.errors import DataError
from datamodules.few_shot import sample, subset

SHOTS = (1, 2, 5, 10, 20)
FINDINGS = ["Edema", "Effusion", "Hernia", "Mass"]


def classes(n=3000, n_classes=12, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.choice(n_classes, n, p=rng.dirichlet(np.full(n_classes, 8.0)))
    return np.where(rng.random(n) < 0.05, -1, labels).astype(np.int64)


def findings(n=3000, seed=0):
    rng = np.random.default_rng(seed)
    labels = (rng.random((n, 4)) < [0.3, 0.2, 0.05, 0.1]).astype(np.float32)
    labels[rng.random((n, 4)) < 0.1] = np.nan
    return labels


def patients(n=3000, seed=0):
    """Patients with 1 to about 30 images each, as text ids."""
    rng = np.random.default_rng(seed)
    return np.array([f"p{i}" for i in rng.geometric(1 / (n / 4), n)], dtype=object)


CASES = {
    "classes": (classes(), None),
    "classes, patients": (classes(n_classes=4), patients()),
    "one label": (findings()[:, :1], None),
    "one label, patients": (findings()[:, :1], patients()),
    "labels": (findings(), None),
    "labels, patients": (findings(), patients()),
}


@pytest.fixture(params=list(CASES))
def case(request):
    return CASES[request.param]


def test_smaller_sets_lie_inside_larger_ones(case):
    labels, groups = case
    for seed in range(8):
        sets = [set(sample(labels, k, seed, groups).tolist()) for k in SHOTS]
        assert all(small < large for small, large in itertools.pairwise(sets))


def test_sets_are_sorted_unique_and_depend_on_the_seed_only(case):
    labels, groups = case
    drawn = [sample(labels, "5", seed, groups) for seed in range(5)]
    assert all(rows.dtype == np.int64 and (np.diff(rows) > 0).all() for rows in drawn)
    assert np.array_equal(drawn[0], sample(labels, 5, 0, groups))
    assert len({rows.tobytes() for rows in drawn}) == 5


def test_full_is_every_row(case):
    labels, groups = case
    assert np.array_equal(sample(labels, "full", 0, groups), np.arange(len(labels)))


def test_every_class_gets_exactly_k_and_unlabelled_rows_none():
    labels = classes()
    for k in SHOTS:
        assert np.bincount(labels[sample(labels, k, 3)]).tolist() == [k] * 12


def test_a_single_label_gives_k_positives_and_k_negatives():
    labels = findings()[:, :1]
    for k in SHOTS:
        drawn = labels[sample(labels, k, 1)]
        assert (drawn == 1).sum() == k
        assert (drawn == 0).sum() == k


def test_every_label_gets_k_positives_and_k_images_are_positive_for_none():
    labels = findings()
    for k in SHOTS:
        drawn = labels[sample(labels, k, 1)]
        assert ((drawn == 1).sum(axis=0) >= k).all()
        assert (~(drawn == 1).any(axis=1)).sum() == k
        assert len(drawn) <= 5 * k


def test_unknown_labels_never_count():
    nan = np.nan
    labels = np.array([[1, nan], [nan, nan], [0, nan], [nan, 1], [0.4, nan], [nan, nan]], dtype=np.float32)
    for seed in range(20):
        assert sample(labels, 1, seed).tolist() == [0, 2, 3]


@pytest.mark.parametrize("name", [name for name in CASES if "patients" in name])
def test_a_patient_is_at_most_once_in_a_set_and_counts_still_hold(name):
    labels, groups = CASES[name]
    for seed in range(5):
        rows = sample(labels, 10, seed, groups)
        assert len(set(groups[rows])) == len(rows)
        if labels.ndim == 1:
            assert np.bincount(labels[rows]).tolist() == [10] * 4
        else:
            assert ((labels[rows] == 1).sum(axis=0) >= 10).all()
    everything = sample(labels, 20, 0, groups, one_per_group=False)
    assert np.array_equal(everything, sample(labels, 20, 0))


def test_a_rare_class_loses_no_patient_to_a_common_one():
    # 6 patients with 1 COVID and 30 normal images each, 50 patients who are normal.
    labels = np.concatenate([np.tile([1] + [0] * 30, 6), np.zeros(50, dtype=np.int64)])
    groups = np.concatenate([np.repeat(np.arange(6), 31), np.arange(6, 56)])
    for seed in range(10):
        assert np.bincount(labels[sample(labels, 6, seed, groups)]).tolist() == [6, 6]


def test_classes_that_share_all_their_patients_share_them_equally():
    labels, groups = np.arange(90) % 3, np.arange(90) // 6
    for seed in range(10):
        assert np.bincount(labels[sample(labels, 5, seed, groups)]).tolist() == [5, 5, 5]


def test_patients_with_many_images_are_not_favoured():
    labels = np.zeros(20 + 20 * 50, dtype=np.int64)
    groups = np.concatenate([np.arange(20), np.repeat(np.arange(20, 40), 50)])
    many = sum((groups[sample(labels, 5, seed, groups)] >= 20).sum() for seed in range(400))
    assert abs(many / 2000 - 0.5) < 0.05  # 4.5 standard deviations


def test_every_image_of_a_class_is_equally_likely():
    labels = np.repeat([0, 1], 20)
    hits = np.bincount(np.concatenate([sample(labels, 5, seed) for seed in range(2000)]), minlength=40)
    assert (np.abs(hits / 2000 - 0.25) < 4.5 * np.sqrt(0.25 * 0.75 / 2000)).all()


def test_classes_that_are_too_small_are_named_with_what_they_have():
    labels = np.array([0] * 10 + [1] * 3 + [3] * 10)
    names = ["cat", "dog", "eel", "fox"]
    with pytest.raises(DataError, match=r"2 of 4 classes have fewer than 5 images: dog has 3, eel has 0"):
        sample(labels, 5, 0, class_names=names)
    with pytest.warns(UserWarning, match="dog has 3, eel has 0; all there are were taken"):
        rows = sample(labels, 5, 0, class_names=names, on_small="warn")
    assert np.bincount(labels[rows]).tolist() == [5, 3, 0, 5]
    with pytest.raises(DataError, match="1 of 3 classes have fewer than 5 images: class 1 has 3"):
        sample(labels, 5, 0)


def test_a_long_list_of_small_classes_is_shortened():
    with pytest.raises(DataError, match=r"500 of 500 classes .* class 11 has 2, \.\.\. \(488 more\)") as error:
        sample(np.repeat(np.arange(500), 2), 3, 0)
    assert "1 to 2 shots" in str(error.value)


def test_small_labels_and_too_few_negatives_are_named():
    labels = np.zeros((50, 4), dtype=np.float32)
    labels[:2, 2] = labels[5:20, 0] = labels[20:35, 1] = labels[35:, 3] = 1
    with pytest.raises(DataError, match=r"2 of 5 classes .* Hernia has 2, positive for none has 3"):
        sample(labels, 4, 0, class_names=FINDINGS)
    with pytest.raises(DataError, match="negatives of Edema has 5"):
        sample((np.arange(50)[:, None] >= 5).astype(np.float32), 6, 0, class_names=["Edema"])
    with pytest.warns(UserWarning, match="Hernia has 2"):
        rows = sample(labels, 4, 0, class_names=FINDINGS, on_small="warn")
    assert (labels[rows] == 1).sum(axis=0).tolist() == [4, 4, 2, 4]


def test_a_class_that_is_small_in_patients_only_says_so():
    labels, groups = np.repeat([0, 1], 10), np.repeat(np.arange(4), 5)
    assert len(sample(labels, 3, 0)) == 6
    with pytest.raises(DataError, match=r"class 0 has 2, class 1 has 2 \(one image per group counted\)"):
        sample(labels, 3, 0, groups)


@pytest.mark.parametrize("shots", [0, -1, 2.5, "ten", "", "1.0", None])
def test_shots_that_are_no_number_are_an_error(shots):
    with pytest.raises(DataError, match=r'a whole number of 1 or more, or "full"'):
        sample(classes(), shots, 0)


def test_labels_that_cannot_be_drawn_from_are_errors():
    with pytest.raises(DataError, match="none of 5 rows has a known label"):
        sample(np.full(5, -1), 1, 0)
    with pytest.raises(DataError, match="labels are float64 of shape"):
        sample(np.zeros(5), 1, 0)
    with pytest.raises(DataError, match="labels need 12 names, class_names has 3"):
        sample(classes(), 1, 0, class_names=["a", "b", "c"])
    with pytest.raises(DataError, match="labels need 4 names, class_names has 5"):
        sample(findings(), 1, 0, class_names=[*FINDINGS, "Nodule"])
    with pytest.raises(DataError, match="few_shot_seed is -1"):
        sample(classes(), 1, -1)
    with pytest.raises(DataError, match="group id is missing in row 1"):
        sample(np.array([0, 1]), 1, 0, np.array(["p1", None], dtype=object))


def test_draws_are_pinned():
    """These sets are in published results: no change of numpy, pandas or this code may alter them."""
    labels = np.arange(60) % 3
    assert sample(labels, 2, 7).tolist() == PINNED["classes"]
    assert sample(labels, 2, 7, np.arange(60) // 4).tolist() == PINNED["patients"]
    assert sample((labels == np.arange(3)[:2, None]).T.astype(np.float32), 2, 7).tolist() == PINNED["labels"]
    assert subset(labels, num_images=7, seed=7).tolist() == PINNED["subset"]
    assert subset(60, num_images=7, seed=7, groups=np.arange(60) // 4).tolist() == PINNED["subset of patients"]


PINNED = {
    "classes": [5, 8, 10, 33, 40, 51],
    "patients": [10, 21, 25, 35, 42, 59],
    "labels": [5, 18, 30, 34, 40, 56],
    "subset": [0, 6, 22, 25, 26, 36, 38],
    "subset of patients": [44, 46, 47, 52, 53, 54, 55],
}


@pytest.mark.parametrize("groups", [None, patients()])
@pytest.mark.parametrize("labels", [3000, classes(), findings()], ids=["rows", "classes", "labels"])
def test_subsets_have_the_asked_size_and_nest(labels, groups):
    for seed in range(4):
        inner = set()
        for size in (1, 2, 3, 10, 77, 500, 501, 1499, 1500, 2999, 3000):
            rows = subset(labels, num_images=size, seed=seed, groups=groups)
            assert len(rows) == size
            assert (np.diff(rows) > 0).all()
            assert inner <= set(rows.tolist())
            inner = set(rows.tolist())
    tenth = subset(labels, fraction=0.1, seed=1, groups=groups)
    assert np.array_equal(tenth, subset(labels, num_images=300, seed=1, groups=groups))
    assert not np.array_equal(tenth, subset(labels, fraction=0.1, seed=2, groups=groups))


@pytest.mark.parametrize("n_classes", [2, 5, 40])
def test_every_class_has_its_natural_share_to_one_image_at_every_size(n_classes):
    for seed in range(6):
        rng = np.random.default_rng(seed)
        sizes = 1 + (rng.pareto(1.0, n_classes) * 5).astype(int).clip(0, 150)
        labels = rng.permutation(np.repeat(np.arange(n_classes), sizes))
        inner = np.zeros(n_classes, dtype=int)
        for m in range(1, len(labels) + 1, max(1, len(labels) // 100)):
            counts = np.bincount(labels[subset(labels, num_images=m, seed=seed)], minlength=n_classes)
            assert np.abs(counts - np.round(sizes * m / len(labels))).max() <= 1
            assert (counts >= inner).all()
            inner = counts


def test_classes_of_one_image_are_not_put_off_to_the_end():
    labels = np.concatenate([np.zeros(300, int), np.repeat(np.arange(1, 31), 7), np.arange(31, 521)])
    for m in (100, 250, 700):
        singles = [np.sum(labels[subset(labels, num_images=m, seed=seed)] > 30) / 490 for seed in range(40)]
        assert np.mean(singles) == pytest.approx(m / 1000, abs=0.01)


def test_unlabelled_rows_are_kept_at_their_share():
    labels = np.repeat([-1, 0, 1], [500, 300, 200])
    assert np.bincount(labels[subset(labels, fraction=0.1, seed=0)] + 1).tolist() == [50, 30, 20]


@pytest.mark.parametrize("labels", [classes(), np.full((len(classes()), 2), 1.0), np.zeros(len(classes()), np.int64)])
def test_a_subset_takes_whole_groups_and_cuts_one_a_stratum(labels):
    groups = patients()
    strata = len(np.unique(labels)) if labels.ndim == 1 else 1
    sizes = {group: int(np.sum(groups == group)) for group in np.unique(groups)}
    for seed in range(5):
        rows = subset(labels, num_images=400, seed=seed, groups=groups)
        assert len(rows) == len(set(rows)) == 400
        taken, counts = np.unique(groups[rows], return_counts=True)
        assert sum(sizes[group] != count for group, count in zip(taken, counts, strict=True)) <= strata


def test_one_shared_group_leaves_the_subset_stratified():
    labels = np.repeat(np.arange(101), 30)
    groups = np.arange(len(labels))
    groups[30:60] = groups[:30]  # photos that are in two classes
    for fraction in (0.1, 0.3):
        counts = np.bincount(labels[subset(labels, fraction=fraction, seed=0, groups=groups)], minlength=101)
        assert np.abs(counts[2:] - 30 * fraction).max() <= 1
        assert np.abs(counts[:2].sum() - 60 * fraction) <= 1


def test_groups_of_one_image_leave_the_subset_stratified():
    labels = classes()
    names = np.array([f"{i}.png" for i in range(len(labels))])
    expected = subset(labels, num_images=50, seed=0)
    assert np.array_equal(subset(labels, num_images=50, seed=0, groups=names), expected)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"num_images": 11}, "num_images is 11"),
        ({"num_images": 0}, "num_images is 0"),
        ({"fraction": 0.0}, "fraction is 0.0"),
        ({"fraction": 1.5}, "fraction is 1.5"),
        ({"fraction": float("nan")}, "fraction is nan"),
        ({}, "num_images is None and fraction is None"),
        ({"num_images": 3, "fraction": 0.5}, "num_images is 3 and fraction is 0.5"),
    ],
)
def test_sizes_out_of_range_are_errors(size, message):
    with pytest.raises(DataError, match=message):
        subset(10, seed=0, **size)


def test_a_million_rows_of_twenty_thousand_classes():
    labels = np.arange(1_000_000) * 7919 % 20_000
    rows = sample(labels, 10, 0)
    assert (np.bincount(labels[rows]) == 10).all()
    assert np.isin(rows, subset(labels, fraction=1.0, seed=0)).all()
    counts = np.bincount(labels[subset(labels, num_images=123_456, seed=0)], minlength=20_000)
    assert set(counts.tolist()) <= {5, 6, 7}
