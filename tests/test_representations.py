"""Measures of similarity against slow definitions, invariances and limits."""

import tracemalloc

import numpy as np
import pytest
from scipy.spatial.distance import cdist
from scipy.stats import rankdata

from datamodules.errors import DataError
from studies import representations
from studies.representations import (
    compare,
    information_imbalance,
    linear_cka,
    minibatch_cka,
    neighbourhood_overlap,
    neighbours,
    random_batches,
)


def draw(n, d, seed=0):
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)


def rotation(d, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(d, d)))[0]


def related(n=90, d=12, e=7):
    """Two representations that share a part, with a mean far from zero."""
    a = draw(n, d)
    return a + 3, (a[:, :e] + draw(n, e, 1)).astype(np.float32) - 5


def slow_cka(a, b):
    """By its definition: HSIC of centred kernels."""
    n = len(a)
    centre = np.eye(n) - 1 / n
    k, m = (centre @ (x.astype(np.float64) @ x.T.astype(np.float64)) @ centre for x in (a, b))
    return np.trace(k @ m) / np.sqrt(np.trace(k @ k) * np.trace(m @ m))


def slow_hsic1(k, m):
    """U-statistic of Song et al. (2012) as the sum over all ordered quadruples of different rows."""
    n = len(k)
    total = 0.0
    for i in range(n):
        for j in range(n):
            for q in range(n):
                for r in range(n):
                    if len({i, j, q, r}) == 4:
                        total += k[i, j] * (m[i, j] + m[q, r] - 2 * m[i, q])
    return total / (n * (n - 1) * (n - 2) * (n - 3))


def slow_ranks(x):
    """Rank of every row among the others by distance, 1 for the nearest; (N, N)."""
    distances = cdist(x.astype(np.float64), x.astype(np.float64))
    np.fill_diagonal(distances, -1)
    return np.stack([rankdata(row, method="min") - 1 for row in distances])


def slow_imbalance(a, b):
    ranks_a, ranks_b = slow_ranks(a), slow_ranks(b)
    np.fill_diagonal(ranks_a, len(a) + 1)
    mean_rank = np.mean([ranks_b[i, ranks_a[i].argmin()] for i in range(len(a))])
    return 2 * (mean_rank - 1) / (len(a) - 2)


@pytest.mark.parametrize(("n", "d", "e"), [(90, 12, 7), (20, 60, 45), (30, 4, 200)])
def test_cka_is_its_definition_in_both_forms(n, d, e, monkeypatch):
    a, b = draw(n, d) + 3, draw(n, e, 1) - 5
    b[:, : min(d, e)] += a[:, : min(d, e)]
    assert linear_cka(a, b) == pytest.approx(slow_cka(a, b), abs=1e-10)
    monkeypatch.setattr(representations, "CHUNK_BYTES", 8 * 7 * n)  # several chunks
    assert linear_cka(a, b) == pytest.approx(slow_cka(a, b), abs=1e-10)


def test_cka_ignores_rotation_scale_and_shift_but_no_other_linear_map():
    a, b = related()
    value = linear_cka(a, b)
    assert 0.2 < value < 0.95
    assert linear_cka(7.5 * a @ rotation(12) + 4, b) == pytest.approx(value, abs=1e-6)
    assert linear_cka(a, -0.01 * b @ rotation(7)) == pytest.approx(value, abs=1e-6)
    assert linear_cka(a, a @ rotation(12)) == pytest.approx(1, abs=1e-10)
    stretched = a * np.geomspace(1, 100, 12)
    assert abs(linear_cka(stretched, b) - value) > 0.05
    assert linear_cka(b, a) == pytest.approx(value, abs=1e-12)


def test_hsic1_is_the_u_statistic():
    a, b = related(9, 5, 3)
    k, m = (representations._bare_kernel(x) for x in (a, b))
    assert representations._hsic1(k, m) == pytest.approx(slow_hsic1(k, m), rel=1e-10)
    raw = [x.astype(np.float64) @ x.T.astype(np.float64) for x in (a, b)]  # the mean makes no difference
    assert representations._hsic1(k, m) == pytest.approx(slow_hsic1(*raw), rel=1e-8)


def test_minibatch_cka_is_unbiased_where_the_exact_one_is_not():
    a, b = draw(1000, 100), draw(1000, 100, 1)  # independent
    assert linear_cka(a[:100], b[:100]) > 0.4
    assert abs(minibatch_cka(random_batches(a, b, 100))) < 0.01
    assert minibatch_cka(random_batches(a, 2 * a @ rotation(100), 100)) == pytest.approx(1, abs=1e-6)


def test_minibatch_cka_hardly_depends_on_the_batch_size():
    a, b = related(2000)
    exact = linear_cka(a, b)
    assert minibatch_cka([(a, b)]) == pytest.approx(exact, abs=0.005)
    assert minibatch_cka(random_batches(a, b, 32)) == pytest.approx(exact, abs=0.02)


def test_minibatch_cka_averages_terms_and_not_ratios():
    batches = [related(5)[:2], (draw(6, 4, 4), draw(6, 3, 5))]
    terms = []
    for pair in batches:
        kernels = [x.astype(np.float64) @ x.T.astype(np.float64) for x in pair]
        terms.append([slow_hsic1(kernels[i], kernels[j]) for i, j in ((0, 1), (0, 0), (1, 1))])
    cross, own_a, own_b = np.mean(terms, axis=0)
    assert minibatch_cka(batches) == pytest.approx(cross / np.sqrt(own_a * own_b), rel=1e-8)


@pytest.mark.parametrize("n", [4, 5, 7, 100, 129])
def test_random_batches_use_every_row_once(n):
    rows = np.arange(n, dtype=np.float32)[:, None]
    batches = list(random_batches(rows, -rows, 8))
    assert sorted(np.concatenate([a for a, _ in batches])[:, 0]) == list(range(n))
    assert all((a == -b).all() for a, b in batches)
    assert min(len(a) for a, _ in batches) >= 4
    assert n < 100 or (np.diff(batches[0][0][:, 0]) != 1).any()  # not neighbours of the table


def test_imbalance_is_its_definition_in_both_directions(monkeypatch):
    a, b = related()
    for x, y in ((a, b), (b, a)):
        assert information_imbalance(x, y) == pytest.approx(slow_imbalance(x, y), abs=1e-12)
    monkeypatch.setattr(representations, "CHUNK_BYTES", 8 * 11 * len(a))
    assert information_imbalance(a, b) == pytest.approx(slow_imbalance(a, b), abs=1e-12)


def test_imbalance_of_equal_independent_and_nested_representations():
    a, b = draw(800, 6), draw(800, 6, 1)
    assert information_imbalance(a, a) == 0
    assert information_imbalance(a, 3 * a @ rotation(6) + 1) == 0
    assert information_imbalance(a, b) == pytest.approx(1, abs=0.07)  # standard error 2 / √(12 · 800) = 0.02
    part = a[:, :2]
    assert information_imbalance(a, part) < 0.5 * information_imbalance(part, a)  # the whole tells the part


def test_ties_are_as_documented(monkeypatch):
    a, constant = draw(800, 3), np.full((800, 4), 0.1, dtype=np.float32)
    assert information_imbalance(a, constant) == 0
    assert information_imbalance(constant, a) == pytest.approx(1, abs=0.07)
    assert neighbourhood_overlap(a, constant, 20) == pytest.approx(20 / 799, abs=0.005)
    points = np.array([[0.0], [1.0], [2.0], [2.0], [5.0], [9.0]]).repeat(30, axis=0)
    assert information_imbalance(points, points) == 0
    assert neighbourhood_overlap(points, points, 40) == 1
    first = neighbours(points, 40)
    assert (np.diff(first, axis=1) > 0).all()  # k different ones
    assert len(np.unique(neighbours(points, 1)[:30])) > 10  # no hub
    monkeypatch.setattr(representations, "CHUNK_BYTES", 8 * 11 * 180)
    assert (neighbours(points, 40) == first).all()


def test_ranks_among_ties_count_the_strictly_nearer():
    x = np.array([[0.0], [1.0], [-1.0], [3.0], [-3.0]])
    nearest = np.array([[1], [0], [0], [1], [2]])
    # From row 0 nothing is nearer than 1 and -1; from 1 nothing than 0; from 3 nothing than 1. All first: 0.
    assert representations._imbalances(x, nearest).tolist() == [0]
    # Row 0 → 3: two are nearer, though -3 is as far. 2 · 2 / (5 · 3).
    nearest[0] = 3
    assert representations._imbalances(x, nearest)[0] == pytest.approx(4 / 15)


@pytest.mark.parametrize("k", [1, 3, 10, 89])
def test_overlap_is_its_definition(k):
    a, b = related()
    orders = [slow_ranks(x).argsort(axis=1)[:, 1 : k + 1] for x in (a, b)]
    slow = np.mean([len(set(x) & set(y)) / k for x, y in zip(*orders, strict=True)])
    assert neighbourhood_overlap(a, b, k) == pytest.approx(slow, abs=1e-12)
    assert neighbourhood_overlap(a, a, k) == 1


def test_overlap_of_independent_representations_is_chance():
    assert neighbourhood_overlap(draw(1000, 5), draw(1000, 5, 1), 50) == pytest.approx(50 / 999, abs=0.005)


def test_images_of_one_group_are_no_neighbours():
    x = np.array([[0.0], [0.1], [1.0], [1.3], [5.0]])
    assert neighbours(x, 1, np.array([0, 0, 1, 1, 2]))[:, 0].tolist() == [2, 2, 1, 1, 3]
    with pytest.raises(DataError, match="no 4 neighbours among 3 other images"):
        neighbours(x, 4, np.array([0, 0, 1, 1, 2]))


def test_compare_agrees_with_the_single_measures():
    a, b = {"stem": draw(60, 5), "stage1": draw(60, 8, 1)}, {"stem": draw(60, 4, 2), "stage1": draw(60, 5) ** 3}
    table = compare(a, b, k=6, batch=20, seed=3).set_index(["layer_a", "layer_b"])
    assert list(table.index) == [("stem", "stem"), ("stem", "stage1"), ("stage1", "stem"), ("stage1", "stage1")]
    for (first, second), row in table.iterrows():
        x, y = a[first], b[second]
        assert row["linear_cka"] == linear_cka(x, y)
        assert row["minibatch_cka"] == minibatch_cka(random_batches(x, y, 20, 3))
        assert row["imbalance_ab"] == information_imbalance(x, y)
        assert row["imbalance_ba"] == information_imbalance(y, x)
        assert row["overlap"] == neighbourhood_overlap(x, y, 6)
    assert table["imbalance_ab"].idxmin() == ("stem", "stage1")  # the only related pair


def test_a_constant_has_no_cka():
    a, constant = draw(40, 3), np.full((40, 2), 0.1, dtype=np.float32)
    assert np.isnan(linear_cka(a, constant))
    assert np.isnan(minibatch_cka([(constant, a)]))


def test_memory_mapped_features_and_no_square_matrix(tmp_path, monkeypatch):
    n = 2000
    files = []
    for seed in (0, 1):
        np.save(tmp_path / f"{seed}.npy", draw(n, 4, seed) + draw(n, 4, 2))
        files.append(np.load(tmp_path / f"{seed}.npy", mmap_mode="r"))
    whole = compare({"last": files[0]}, {"last": files[1]})
    monkeypatch.setattr(representations, "CHUNK_BYTES", 1 << 20)
    tracemalloc.start()
    chunked = compare({"last": files[0]}, {"last": files[1]})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * n * n / 4  # bytes
    for name in representations.MEASURES:
        assert chunked[name][0] == pytest.approx(whole[name][0], abs=1e-9)


def test_bad_features_are_errors():
    a, broken = draw(30, 3), draw(30, 3)
    broken[17, 2] = np.nan
    for measure in (linear_cka, information_imbalance, lambda x, y: neighbourhood_overlap(x, y, 3)):
        with pytest.raises(DataError, match=r"features of B with NaN(.|\n)*image 17 of 30"):
            measure(a, broken)
        with pytest.raises(DataError, match="features of 30 and 29 images"):
            measure(a, a[1:])
        with pytest.raises(DataError, match=r"shape \(3, 3\)"):
            measure(a[:3], a[:3])
    with pytest.raises(DataError, match="NaN"):
        minibatch_cka([(a, broken)])
    with pytest.raises(DataError, match="features of 30 and 29 images"):
        compare({"last": a}, {"last": a[1:]})
    with pytest.raises(DataError, match="no minibatch"):
        minibatch_cka([])
    with pytest.raises(DataError, match="no 30 neighbours among 29"):
        neighbourhood_overlap(a, a, 30)


def test_neighbours_of_features_far_from_zero():
    a = (1e6 + draw(200, 300)).astype(np.float32)
    assert information_imbalance(a, a[:, :150]) == pytest.approx(slow_imbalance(a, a[:, :150]), abs=1e-12)
