"""Power laws against scipy's fits and exact ones; coverage of the exponent's interval."""

import numpy as np
import pytest
from scipy import stats
from scipy.optimize import curve_fit

from datamodules.errors import DataError
from studies.power_law import fit_power_law


def simulated(rng, scales, exponent, floor, seeds=5, noise=0.05, shared=0.0):
    """n, error and seed: multiplicative noise of each run, and what all seeds of a scale share."""
    n = np.geomspace(1e3, 1e5, scales).round()
    law = floor + (n / 1e3) ** -exponent
    spread = noise * rng.normal(size=(scales, seeds)) + shared * rng.normal(size=(scales, 1))
    return np.repeat(n, seeds), (law[:, None] * np.exp(spread)).ravel(), np.tile(np.arange(seeds), scales)


def test_exact_laws_are_found():
    n = np.geomspace(100, 1e5, 6)
    law = fit_power_law(n, 3 * n**-0.4, np.zeros(6))
    assert (law.exponent, law.factor, law.floor) == pytest.approx((0.4, 3, 0))
    assert (law.low, law.high) == pytest.approx((0.4, 0.4))
    assert (law.verdict, law.free_floor) == ("falls with scale", False)
    n = np.geomspace(100, 1e5, 9)
    law = fit_power_law(n, 0.07 + 3 * n**-0.4, np.zeros(9))
    assert (law.exponent, law.factor, law.floor) == pytest.approx((0.4, 3, 0.07), rel=1e-3)
    assert law.free_floor
    assert law.predict([n[3]]) == pytest.approx(0.07 + 3 * n[3] ** -0.4, rel=1e-4)
    rising = fit_power_law(n, 0.01 * n**0.2, np.zeros(9))
    assert (rising.verdict, rising.exponent) == ("rises with scale", pytest.approx(-0.2))


def test_line_is_that_of_a_regression():
    n, error, seed = simulated(np.random.default_rng(0), 6, 0.3, 0.0, seeds=1)
    law, line = fit_power_law(n, error, seed), stats.linregress(np.log(n), np.log(error))
    half = stats.t.ppf(0.975, 4) * line.stderr
    assert (law.exponent, law.p) == pytest.approx((-line.slope, line.pvalue))
    assert (law.low, law.high) == pytest.approx((-line.slope - half, -line.slope + half))
    assert law.factor == pytest.approx(np.exp(line.intercept))


def test_seeds_weigh_scales():
    """Against curve_fit with the weights of the definition; one scale is noisier than the others."""
    rng = np.random.default_rng(1)
    n, error, seed = simulated(rng, 7, 0.3, 0.0, noise=0.02)
    error[:5] *= np.exp(rng.normal(scale=0.5, size=5))
    means, sds = error.reshape(7, 5).mean(axis=1), error.reshape(7, 5).std(axis=1, ddof=1)
    own = (sds / means) ** 2
    sigma = np.sqrt((4 * own.mean() + 4 * own) / 8 / 5)
    x = np.log(n.reshape(7, 5)[:, 0])
    (slope, _), covariance = curve_fit(lambda x, b, a: a - b * x, x, np.log(means), sigma=sigma, p0=(0.1, 0.0))
    law = fit_power_law(n, error, seed)
    assert law.exponent == pytest.approx(slope, rel=1e-4)
    assert law.high - law.low == pytest.approx(2 * stats.t.ppf(0.975, 5) * np.sqrt(covariance[0, 0]), rel=1e-3)


def test_free_floor_is_that_of_curve_fit():
    n, error, seed = simulated(np.random.default_rng(2), 10, 0.6, 0.15, noise=0.03)
    means = error.reshape(10, 5).mean(axis=1)
    own = (error.reshape(10, 5).std(axis=1, ddof=1) / means) ** 2
    sigma = np.sqrt((4 * own.mean() + 4 * own) / 8 / 5) * means
    scales = n.reshape(10, 5)[:, 0] / 1e3
    found, covariance = curve_fit(lambda x, c, a, b: c + a * x**-b, scales, means, sigma=sigma, p0=(0.1, 1, 0.5))
    law = fit_power_law(n, error, seed)
    assert (law.floor, law.exponent) == pytest.approx((found[0], found[2]), rel=1e-3)
    assert law.factor == pytest.approx(found[1] * 1e3 ** found[2], rel=1e-2)
    half = stats.t.ppf(0.975, 7) * np.sqrt(covariance[2, 2])
    assert (law.low, law.high) == pytest.approx((found[2] - half, found[2] + half), abs=0.35 * half)  # not symmetric
    assert law.low < law.exponent < law.high


@pytest.mark.parametrize(
    ("scales", "exponent", "floor", "seeds", "shared"),
    [(5, 0.3, 0.0, 5, 0.0), (6, 0.3, 0.0, 3, 0.05), (8, 0.5, 0.05, 5, 0.0), (10, 0.5, 0.1, 3, 0.02)],
)
def test_intervals_of_the_exponent_cover(scales, exponent, floor, seeds, shared):
    rng = np.random.default_rng(3)
    laws = [fit_power_law(*simulated(rng, scales, exponent, floor, seeds, 0.05, shared)) for _ in range(500)]
    assert all(law.free_floor == (scales >= 8) for law in laws)
    assert 0.925 <= np.mean([law.low <= exponent <= law.high for law in laws]) <= 0.975  # known to ± 0.02


def test_flat_errors_are_called_flat():
    rng = np.random.default_rng(4)
    laws = [fit_power_law(*simulated(rng, 6, 0.0, 0.0, noise=0.1, shared=0.1)) for _ in range(500)]
    flat = [law.verdict == "not distinguishable from flat" for law in laws]
    assert 0.925 <= np.mean(flat) <= 0.975
    assert all((law.low <= 0 <= law.high) == called for law, called in zip(laws, flat, strict=True))


@pytest.mark.parametrize("scales", [5, 8, 12])
def test_equal_errors_are_flat(scales):
    """Rounding of their logarithms is no slope."""
    for error in (0.1, 0.3, 0.77):
        law = fit_power_law(np.geomspace(100, 1e5, scales), np.full(scales, error), np.zeros(scales))
        assert (law.verdict, law.p) == ("not distinguishable from flat", 1.0)
        assert (law.exponent, law.factor) == (0.0, pytest.approx(error))


def test_too_few_points_are_listed_and_not_fitted():
    n, error, seed = simulated(np.random.default_rng(5), 4, 0.3, 0.0)
    law = fit_power_law(n, error, seed)
    assert law.verdict == "too few points: 4 of 5"
    assert law.points["n"].tolist() == sorted(set(n))
    assert law.points["error"].to_numpy() == pytest.approx(error.reshape(4, 5).mean(axis=1))
    assert (law.points["seeds"] == 5).all()
    assert np.isnan([law.exponent, law.low, law.p]).all()
    with pytest.raises(DataError, match="no power law to predict"):
        law.predict([1e3])
    assert fit_power_law(np.array([]), np.array([]), np.array([])).verdict == "too few points: 0 of 5"
    zero = fit_power_law(np.arange(6.0), np.full(6, 0.5), np.zeros(6))
    assert zero.points["used"].tolist() == [False] + 5 * [True]
    perfect = fit_power_law(np.arange(1.0, 6), np.array([0.4, 0.3, 0.2, 0.1, 0.0]), np.zeros(5))
    assert perfect.verdict == "too few points: 4 of 5"


def test_folds_of_a_seed_are_one_value():
    n, error, seed = simulated(np.random.default_rng(6), 5, 0.3, 0.0, seeds=2)
    doubled = fit_power_law(np.tile(n, 2), np.concatenate([error * 0.9, error * 1.1]), np.tile(seed, 2))
    assert (doubled.points["seeds"] == 2).all()
    assert doubled.exponent == pytest.approx(fit_power_law(n, error, seed).exponent)


def test_scales_outside_are_not_predicted_silently():
    n, error, seed = simulated(np.random.default_rng(7), 5, 0.3, 0.0)
    law = fit_power_law(n, error, seed)
    assert law.predict([1e3, 1e5]).shape == (2,)
    with pytest.raises(DataError, match=r"(?s)n = 1e\+06 lies outside.*1000 to 100000"):
        law.predict([1e4, 1e6])
    assert law.predict([1e6], extrapolate=True)[0] < law.predict([1e5])[0]
    with pytest.raises(DataError, match=r"error -0\.1 is negative"):
        fit_power_law(n, np.where(error == error[0], -0.1, error), seed)
