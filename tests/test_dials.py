"""Dials of a source: draws nest, hit their rates, agree with slow loops, and depend on no other row."""

import itertools

import numpy as np
import pytest
from scipy import stats

from datamodules import dials
from datamodules.dials import asymmetric_noise, curated, kept_classes, read_confusion, symmetric_noise
from datamodules.errors import DataError

N = 60_000
CONFUSION = np.array([[9.0, 1, 3, 0], [0, 5, 0, 0], [2, 2, 0, 4], [1, 0, 0, 7]])


def classes(n=N, c=4, seed=0):
    return np.random.default_rng(seed).integers(0, c, n)


def paths(n=N):
    return np.array([f"folder/{i}.jpg" for i in range(n)], dtype=object)


def assert_share(hits, p):
    """The number of hits lies within the middle 99.99 % of its binomial distribution."""
    low, high = stats.binom.interval(0.9999, len(hits), p)
    assert low <= hits.sum() <= high


def test_kept_classes_nest_occur_and_are_drawn_evenly():
    labels = np.repeat([-1, 0, 2, 3, 5, 7, 11, 12, 20], 3)
    present = {0, 2, 3, 5, 7, 11, 12, 20}
    for seed in range(5):
        sets = [kept_classes(labels, count, seed) for count in range(1, 9)]
        for smaller, larger in itertools.pairwise(sets):
            assert set(smaller) < set(larger) <= present
        assert all((np.diff(kept) > 0).all() and kept.dtype == np.int64 for kept in sets)
        assert set(sets[-1]) == present
    draws = np.concatenate([kept_classes(labels, 3, seed) for seed in range(400)])
    counts = np.array([(draws == c).sum() for c in sorted(present)])
    assert stats.chisquare(counts).pvalue > 1e-4
    # How often a class occurs, and in which row, does not matter.
    shuffled = np.random.default_rng(1).permutation(np.append(labels, [20] * 50))
    np.testing.assert_array_equal(kept_classes(shuffled, 4, 3), kept_classes(labels, 4, 3))


@pytest.mark.parametrize("count", [0, -1, 9])
def test_impossible_numbers_of_classes(count):
    with pytest.raises(DataError, match=rf"(?s)num_classes_kept is {count}.*1 to 8"):
        kept_classes(np.arange(8), count, 0)


@pytest.mark.parametrize("ids", [None, paths()])
@pytest.mark.parametrize("rate", [0.0, 0.05, 0.4, 1.0])
def test_symmetric_noise_has_its_rate_and_even_wrong_classes(rate, ids):
    labels = classes()
    labels[::7] = -1
    before = labels.copy()
    noisy = symmetric_noise(labels, rate, 4, 3, ids)
    np.testing.assert_array_equal(labels, before)
    assert noisy.dtype == np.int64
    known = labels >= 0
    assert (noisy[~known] == -1).all()
    wrong = noisy[known] != labels[known]
    assert_share(wrong, rate)
    if rate:
        steps = np.bincount((noisy - labels)[known][wrong] % 4, minlength=4)
        assert steps[0] == 0
        assert stats.chisquare(steps[1:]).pvalue > 1e-4
        assert set(np.unique(noisy[known])) == {0, 1, 2, 3}


def test_asymmetric_noise_follows_the_matrix():
    labels = classes()
    labels[::9] = -1
    noisy = asymmetric_noise(labels, 0.5, CONFUSION, 1)
    assert (noisy[::9] == -1).all()
    for true in range(4):
        rows = noisy[labels == true]
        weights = CONFUSION[true].copy()
        weights[true] = 0
        if not weights.any():
            assert (rows == true).all()
            continue
        assert_share(rows != true, 0.5)
        counts = np.bincount(rows[rows != true], minlength=4)
        assert (counts[weights == 0] == 0).all()
        possible = weights > 0
        if possible.sum() > 1:
            expected = counts.sum() * weights[possible] / weights.sum()
            assert stats.chisquare(counts[possible], expected).pvalue > 1e-4


def test_asymmetric_noise_agrees_with_a_loop():
    """Row by row: the same words, the wrong class by walking through the weights."""
    from datamodules.few_shot import random_keys

    rng = np.random.default_rng(5)
    c = 37
    confusion = rng.random((c, c)) * (rng.random((c, c)) < 0.2)
    labels = classes(4000, c)
    expected = labels.copy()
    for row, word in enumerate(random_keys(len(labels), 8, "label noise").tolist()):
        weights = confusion[labels[row]].copy()
        weights[labels[row]] = 0
        if word >> 32 < 0.6 * 2**32 and weights.sum() > 0:
            target = (word % 2**32) / 2**32 * weights.sum()
            total = 0.0
            for wrong in range(c):
                total += weights[wrong]
                if total > target:
                    expected[row] = wrong
                    break
    np.testing.assert_array_equal(asymmetric_noise(labels, 0.6, confusion, 8), expected)


@pytest.mark.parametrize(("second_half", "expected"), [(0, [2, 0, 1]), (2**32 - 1, [4, 4, 3])])
def test_the_ends_of_a_row_are_classes_that_it_has(monkeypatch, second_half, expected):
    monkeypatch.setattr(dials, "_row_words", lambda n, *_: np.full(n, second_half, np.uint64))
    confusion = np.array([[5, 0, 1, 0, 0.1], [0.1, 0, 0, 0, 0.3], [0, 0.7, 0, 0.1, 0]])
    confusion = np.vstack([confusion, np.zeros((2, 5))])
    assert asymmetric_noise(np.arange(5), 0.1, confusion, 0).tolist() == [*expected, 3, 4]


def test_a_uniform_matrix_is_symmetric_noise():
    labels = classes(5000, 10)
    np.testing.assert_array_equal(
        asymmetric_noise(labels, 0.3, np.ones((10, 10)), 4), symmetric_noise(labels, 0.3, 10, 4)
    )


def multilabel(n=20_000):
    rng = np.random.default_rng(2)
    labels = rng.integers(0, 2, (n, 3)).astype(np.float32)
    labels[rng.random((n, 3)) < 0.2] = np.nan
    return labels


@pytest.mark.parametrize("ids", [None, paths(20_000)])
def test_multilabel_cells_flip_independently(ids):
    labels = multilabel()
    noisy = symmetric_noise(labels, 0.25, 3, 6, ids)
    assert noisy.dtype == np.float32
    np.testing.assert_array_equal(np.isnan(noisy), np.isnan(labels))
    known = ~np.isnan(labels)
    assert set(np.unique(noisy[known])) == {0, 1}
    flipped = noisy != labels
    for label in range(3):
        assert_share(flipped[known[:, label], label], 0.25)
        other = (label + 1) % 3
        both = known[:, label] & known[:, other]
        assert_share(flipped[both, label] & flipped[both, other], 0.25**2)
    soft = np.full((50, 1), 0.25)
    assert set(np.unique(symmetric_noise(soft, 0.5, 1, 0))) == {0.25, 0.75}


@pytest.mark.parametrize(
    "make_noise",
    [
        lambda rate, seed: symmetric_noise(classes(), rate, 4, seed, paths()),
        lambda rate, seed: asymmetric_noise(classes(), rate, CONFUSION, seed),
        lambda rate, seed: np.nan_to_num(symmetric_noise(multilabel(), rate, 3, seed)),
    ],
)
def test_noise_nests_across_rates_and_differs_by_seed(make_noise):
    clean, some, more = (make_noise(rate, 0) for rate in (0.0, 0.2, 0.4))
    wrong = some != clean
    np.testing.assert_array_equal(more[wrong], some[wrong])
    assert (more != clean).sum() > 1.8 * wrong.sum()
    np.testing.assert_array_equal(make_noise(0.2, 0), some)
    other = make_noise(0.2, 1)
    # Independent draws agree on a label's being wrong as often as chance has it, where it can be wrong at all.
    possible = make_noise(1.0, 0) != clean
    assert_share((wrong & (other != clean))[possible], 0.2**2)


def test_with_ids_a_row_depends_on_no_other():
    labels, ids = classes(), paths()
    subset = np.random.default_rng(3).permutation(N)[: N // 3]
    for make_noise in (
        lambda y, i: symmetric_noise(y, 0.3, 4, 2, i),
        lambda y, i: asymmetric_noise(y, 0.3, CONFUSION, 2, i),
    ):
        np.testing.assert_array_equal(make_noise(labels[subset], ids[subset]), make_noise(labels, ids)[subset])
    cells, ids = multilabel(), paths(20_000)
    subset = subset[subset < 20_000]
    np.testing.assert_array_equal(
        symmetric_noise(cells[subset], 0.3, 3, 2, ids[subset]), symmetric_noise(cells, 0.3, 3, 2, ids)[subset]
    )


def test_curation_agrees_with_a_sort():
    rng = np.random.default_rng(0)
    for n in (1, 2, 17, 300):
        for missing in (0, n // 3):
            scores = rng.integers(0, 9, n).astype(np.float32)  # many ties
            scores[rng.permutation(n)[:missing]] = np.nan
            for keep in (1e-6, 0.1, 0.33, 0.5, (n - missing) / n):
                size = max(1, round(keep * n))
                best = sorted((row for row in range(n) if scores[row] == scores[row]), key=lambda row: -scores[row])
                kept = curated(scores, keep)
                assert kept.dtype == np.bool_
                assert set(np.flatnonzero(kept)) == set(best[:size])
    assert curated(np.array([-np.inf, np.inf, 0.0]), 2 / 3).tolist() == [False, True, True]
    assert curated(np.array([3, 1, 2]), 0.34).tolist() == [True, False, False]


def test_curation_nests():
    scores = np.random.default_rng(1).integers(0, 20, 500) / 20
    sets = [set(np.flatnonzero(curated(scores, keep))) for keep in np.linspace(0.01, 1, 40)]
    for smaller, larger in itertools.pairwise(sets):
        assert smaller <= larger


def test_curation_errors():
    for keep in (0, -0.1, 1.1, float("nan")):
        with pytest.raises(DataError, match=rf"share of {keep}"):
            curated(np.arange(3.0), keep)
    with pytest.raises(DataError, match=r"(?s)keep 3 rows, but only 2 of 4.*<= 0\.5000"):
        curated(np.array([1, np.nan, 2, np.nan]), 0.75)
    with pytest.raises(DataError, match="only 0 of 2"):
        curated(np.full(2, np.nan), 0.5)


def test_noise_errors_name_value_and_range():
    labels = np.array([0, 1, 2, -1])
    for rate in (-0.1, 1.5, float("nan")):
        with pytest.raises(DataError, match=rf"(?s)noise is {rate}.*0 <= rate <= 1"):
            symmetric_noise(labels, rate, 3, 0)
    with pytest.raises(DataError, match=r"(?s)label 2 is out of range.*row 2.*-1 to 1"):
        symmetric_noise(labels, 0.1, 2, 0)
    with pytest.raises(DataError, match=r"label -2"):
        symmetric_noise(labels - 1, 0.1, 3, 0)
    with pytest.raises(DataError, match="at least 2 classes"):
        symmetric_noise(np.zeros(3, np.int64), 1.0, 1, 0)
    with pytest.raises(DataError, match="seed"):
        symmetric_noise(labels, 0.1, 3, -1)
    with pytest.raises(DataError, match=r"(?s)3 columns.*4"):
        symmetric_noise(multilabel(5), 0.1, 4, 0)
    with pytest.raises(DataError, match=r"(?s)row 0.*0 to 1, or NaN"):
        symmetric_noise(np.array([[2.0, 0.0]]), 0.1, 2, 0)
    with pytest.raises(DataError, match="symmetric"):
        asymmetric_noise(multilabel(5), 0.1, np.ones((3, 3)), 0)
    for bad in (-1.0, np.nan, np.inf):
        matrix = np.ones((3, 3))
        matrix[1, 2] = bad
        with pytest.raises(DataError, match=rf"{bad} at row 1, column 2"):
            asymmetric_noise(labels, 0.1, matrix, 0)
    with pytest.raises(DataError, match=r"\(2, 3\)"):
        asymmetric_noise(labels, 0.1, np.ones((2, 3)), 0)


def write(folder, text):
    path = folder / "confusion.csv"
    path.write_text(text)
    return path


@pytest.mark.parametrize("corner", ["", "true"])
def test_a_confusion_file_is_read_by_name(tmp_path, corner):
    path = write(tmp_path, f"{corner},dog,cat,cow\ncow,1,2,97\ncat, 0.5,9,0\ndog,8,1e-1,3\n")
    np.testing.assert_array_equal(read_confusion(path, ["cat", "cow", "dog"]), [[9, 0, 0.5], [2, 97, 1], [0.1, 3, 8]])


def test_further_classes_of_a_confusion_file(tmp_path):
    path = write(tmp_path, ",cat,dog,cow\ncat,0,1,2\ndog,3,4,5\ncow,0,9,0\n")
    np.testing.assert_array_equal(read_confusion(path, ["dog", "cat"], further=True), [[4, 3], [1, 0]])
    with pytest.raises(DataError, match=r"(?s)'cow' is confused only with classes that do not stay.*line 4"):
        read_confusion(path, ["cat", "cow"], further=True)
    with pytest.raises(DataError, match="unknown class 'cow'"):
        read_confusion(path, ["cat", "dog"])
    with pytest.raises(DataError, match=r"missing.*'pig'"):
        read_confusion(path, ["cat", "pig"], further=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (",cat,dog\ncat,0,1\ndgo,1,0\n", r"(?s)'dgo'; did you mean 'dog'.*line 3"),
        (",cat,bird\ncat,0,1\ndog,1,0\n", r"(?s)unknown class 'bird'.*line 1"),
        (",cat,dog\ncat,0,1\n", r"(?s)1 classes are missing.*'dog'.*confusion\.csv"),
        (",cat\ncat,0\ndog,1\n", r"(?s)missing.*'dog'.*line 1"),
        (",cat,dog\ncat,0,1\ncat,1,0\n", r"(?s)'cat' stands twice.*line 3"),
        (",cat,dog\ncat,0,1\ndog,-1,0\n", r"(?s)'dog' with 'cat' is '-1'.*line 3.*0 or more"),
        (",cat,dog\ncat,0,many\ndog,1,0\n", r"(?s)'cat' with 'dog' is 'many'.*line 2"),
        (",cat,dog\ncat,0,\ndog,1,0\n", r"(?s)'cat' with 'dog' is ''.*line 2"),
        (",cat,dog\ncat,0,inf\ndog,1,0\n", r"(?s)is 'inf'.*line 2"),
        (",cat,dog\ncat,0\n", r"line 2"),
    ],
)
def test_confusion_files_with_errors(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        read_confusion(write(tmp_path, text), ["cat", "dog"])
