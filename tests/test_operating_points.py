"""Thresholds from validation applied to test: exact cases, slow versions, and coverage of known truths."""

import numpy as np
import pytest
from scipy.stats import binomtest, norm

from datamodules.errors import DataError
from studies.operating_points import (
    Share,
    operating_points,
    predictive_value,
    share,
    threshold_at_sensitivity,
    threshold_at_specificity,
)
from studies.patient_sums import bootstrap_counts, wilson


def scored(n=400, seed=0, prevalence=0.3):
    rng = np.random.default_rng(seed)
    positive = rng.random(n) < prevalence
    return rng.normal(size=n) + 1.5 * positive, positive


def points(validation, test, patients=None, **settings):
    parts = [(scores[:, None], positive.astype(np.float32)[:, None]) for scores, positive in (validation, test)]
    patients = np.arange(len(test[0])) if patients is None else patients
    table = operating_points(*parts, patients, ["a"], prevalences=[0.05, 0.5], draws=200, **settings)
    return {(row.rule, row.target, row.metric, row.prevalence if row.prevalence > 0 else None): row
            for row in table.itertuples()}  # fmt: skip


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_thresholds_are_the_best_of_all(kind):
    for seed in range(20):
        scores, positive = scored(31, seed)
        scores = scores.round(1 + seed % 2).astype(kind)  # rounded: there are ties
        candidates = np.concatenate([[-np.inf], np.unique(scores)])
        sensitivity, specificity = (
            np.array([hit.mean() for hit in hits])
            for hits in ([scores[positive] > t for t in candidates], [scores[~positive] <= t for t in candidates])
        )
        for target in (0.5, 0.7, 0.9, 0.95, 0.99):
            found = threshold_at_specificity(scores, positive, target)
            assert (scores[~positive] <= found).mean() >= target
            # No threshold that is specific enough is more sensitive, and the other way round.
            assert (scores[positive] > found).mean() == sensitivity[specificity >= target].max()
            found = kind(threshold_at_sensitivity(scores, positive, target))
            assert (scores[positive] > found).mean() >= target
            assert (scores[~positive] <= found).mean() == specificity[sensitivity >= target].max()
    assert threshold_at_specificity(np.arange(1.0, 11.0), np.zeros(10, bool), 0.9) == 9.0  # of ten, nine
    assert np.isnan(threshold_at_specificity(scores, np.ones(31, bool), 0.9))
    assert np.isnan(threshold_at_sensitivity(scores, np.zeros(31, bool), 0.9))


def test_threshold_comes_from_validation_and_test_tells_what_it_gives():
    validation, (scores, positive) = scored(), scored(seed=1)
    table = points(validation, (scores, positive))
    row = table["specificity", 0.9, "specificity", None]
    assert (validation[0][~validation[1]] <= row.threshold).mean() == pytest.approx(0.9, abs=0.005)
    assert row.value == (scores[~positive] <= row.threshold).mean() != 0.9
    assert (row.low, row.high, row.interval) == (*wilson(row.value * (~positive).sum(), (~positive).sum()), "Wilson")
    assert (row.n, row.n_patients, row.note) == ((~positive).sum(), (~positive).sum(), "")
    sensitivity = table["specificity", 0.9, "sensitivity", None]
    assert (sensitivity.value, sensitivity.threshold) == ((scores[positive] > row.threshold).mean(), row.threshold)
    for prevalence in (0.05, 0.5):
        right, wrong = sensitivity.value * prevalence, (1 - row.value) * (1 - prevalence)
        ppv = table["specificity", 0.9, "ppv", prevalence]
        assert ppv.value == pytest.approx(right / (right + wrong))
        right, wrong = row.value * (1 - prevalence), (1 - sensitivity.value) * prevalence
        npv = table["specificity", 0.9, "npv", prevalence]
        assert npv.value == pytest.approx(right / (right + wrong))
        assert ppv.low < ppv.value < ppv.high < 1
        assert (npv.n, npv.n_patients) == (400, 400)
    assert table["sensitivity", 0.95, "sensitivity", None].value == pytest.approx(0.95, abs=0.06)


def test_wilson_is_that_of_scipy():
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    for hits, n in ((0, 10), (7, 20), (20, 20), (1, 1), (999, 20_000)):
        expected = binomtest(hits, n).proportion_ci(method="wilson")
        assert wilson(hits, n) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert np.isnan(wilson(0, 0)).all()


def test_share_counts_patients():
    """Threefold images of a patient tell nothing new; resamples that cannot differ do not give certainty."""
    hits = np.random.default_rng(0).random(80) < 0.7
    single = share(hits, np.arange(80), bootstrap_counts(80, 400))
    thrice = share(np.repeat(hits, 3), np.repeat(np.arange(80), 3), bootstrap_counts(80, 400))
    assert (single.interval, thrice.interval) == ("Wilson", "bootstrap over patients")
    assert (thrice.value, thrice.n, thrice.n_patients) == (single.value, 240, 80)
    assert (thrice.low, thrice.high) == pytest.approx((single.low, single.high), abs=0.03)
    perfect = share(np.ones(240, bool), np.repeat(np.arange(80), 3), bootstrap_counts(80, 20))
    assert perfect[:3] == (1.0, *wilson(80, 80))
    assert perfect.complement()[:3] == pytest.approx((0.0, 0.0, 1 - perfect.low))


def test_patients_with_several_images_are_resampled():
    rng = np.random.default_rng(3)
    patients = np.repeat(np.arange(60), 4)
    positive = np.repeat(rng.random(60) < 0.5, 4)
    scores = np.repeat(rng.normal(size=60), 4) + 0.2 * rng.normal(size=240) + positive
    found = points(scored(seed=2), (scores, positive), patients)["specificity", 0.9, "sensitivity", None]
    assert found.interval == "bootstrap over patients"
    low, high = wilson(found.value * found.n, found.n)
    assert found.high - found.low > 1.4 * (high - low)  # images as if independent would be too sure


@pytest.mark.parametrize(
    ("rates", "sizes", "prevalence"), [((0.8, 0.05), (30, 200), 0.05), ((0.9, 0.1), (60, 60), 0.3)]
)
def test_intervals_of_predictive_values_cover(rates, sizes, prevalence):
    rng = np.random.default_rng(0)
    odds = prevalence / (1 - prevalence)
    truth = rates[0] * odds / (rates[0] * odds + rates[1])
    covered = []
    for hits in zip(*(rng.binomial(n, rate, size=400) for n, rate in zip(sizes, rates, strict=True)), strict=True):
        both = [Share(k / n, *wilson(k, n), n, n, "") for k, n in zip(hits, sizes, strict=True)]
        found = predictive_value(odds, *both)
        assert found.low <= found.value <= found.high
        covered.append(found.low <= truth <= found.high)
    assert 0.92 < np.mean(covered) < 0.985


def test_predictive_values_at_the_ends():
    perfect, none = (Share(v, *wilson(20 * v, 20), 20, 20, "") for v in (1.0, 0.0))
    found = predictive_value(0.1, perfect, none)
    assert (found.value, found.high) == (1.0, 1.0)
    assert 0.3 < found.low < 0.6  # 20 images do not prove it
    found = predictive_value(0.1, none, perfect)
    assert (found.value, found.low) == (0.0, 0.0)
    assert 0 < found.high < 0.1
    assert np.isnan(predictive_value(0.1, none, none)[:3]).all()
    unknown = predictive_value(0.1, Share(0.5, np.nan, np.nan, 3, 1, ""), perfect)
    assert unknown.value == pytest.approx(0.05 / 1.05)
    assert np.isnan([unknown.low, unknown.high]).all()


def test_expected_test_specificity():
    """On other data of the same kind the specificity is what was asked for, on average: (k / (n + 1))."""
    reached = [points(scored(seed=2 * s), scored(seed=2 * s + 1), specificities=[0.9], sensitivities=[])[
        "specificity", 0.9, "specificity", None] for s in range(15)]  # fmt: skip
    assert np.mean([row.value for row in reached]) == pytest.approx(0.9, abs=0.015)
    assert np.mean([row.threshold for row in reached]) == pytest.approx(norm.ppf(0.9), abs=0.06)


def test_what_is_missing_is_said():
    (scores, positive), test = scored(), scored(seed=1)
    none = np.zeros(400, bool)
    no_negatives = points((scores, ~none), test)
    row = no_negatives["specificity", 0.9, "sensitivity", None]
    assert (np.isnan(row.value), row.note) == (True, "validation has no negatives")
    assert no_negatives["specificity", 0.9, "ppv", 0.05].note == "validation has no negatives"
    assert no_negatives["sensitivity", 0.9, "sensitivity", None].value > 0
    no_positives = points((scores, positive), (scores, none))
    row = no_positives["specificity", 0.9, "sensitivity", None]
    assert (np.isnan(row.value), row.n, row.note) == (True, 0, "test has no positives")
    assert no_positives["specificity", 0.9, "specificity", None].note == ""
    nobody = points((scores, positive), (scores - 20, positive))["specificity", 0.9, "ppv", 0.05]
    assert (np.isnan(nobody.value), nobody.note) == (True, "no test image is called positive")
    labels = np.full((400, 1), np.nan)
    unknown = operating_points(
        (scores[:, None], labels), (scores[:, None], labels), range(400), ["a"], prevalences=[0.1]
    )
    assert unknown["value"].isna().all()
    with pytest.raises(DataError, match=r"5.0 is no share"):
        operating_points((scores[:, None], labels), (scores[:, None], labels), range(400), ["a"], prevalences=[5.0])
