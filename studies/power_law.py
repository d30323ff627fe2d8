"""Power laws of scale, error = c + a n^-b: the exponent with its interval, and a test against flat."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.special import fdtri, stdtr, stdtrit

from datamodules.errors import DataError
from studies.statistics import CONFIDENCE, ROUNDING

FEWEST = 5
"""Distinct scales below which nothing is fitted: two parameters need a few residuals to know their own error."""
FEWEST_FREE = 8
"""Distinct scales for a free floor c, which changes the exponent much and the fit little."""
PRIOR = 4.0
"""Degrees of freedom by which the variance of a scale's seeds is drawn to that of all; 3-5 seeds alone tell little."""
_EXPONENTS = np.geomspace(1e-3, 10, 2001)  # where the profile is taken; steps of 0.5 %


@dataclass(frozen=True, eq=False)
class PowerLaw:
    """A fit of error = floor + factor · n^-exponent.

    Attributes:
        points: A row a scale, ascending: "n", "error" (mean over seeds), "sd" (NaN for one seed), "seeds" and "used"
            (False where the error or n is 0 and has no logarithm).
        verdict: "falls with scale", "rises with scale", "not distinguishable from flat", or "too few points: " and how
            many there are.
        p: Two-sided, of a slope of 0 on log axes; NaN with too few points, as are the numbers below.
        exponent: Of the fall; negative where the error rises.
        low: Lower end of its 95 % interval.
        high: Upper end; infinite where the floor explains all but the first points.
        factor: a.
        floor: c, not negative.
        free_floor: Whether c was fitted; otherwise it is 0 and the exponent the mean slope over these scales.
    """

    points: pd.DataFrame
    verdict: str
    p: float = np.nan
    exponent: float = np.nan
    low: float = np.nan
    high: float = np.nan
    factor: float = np.nan
    floor: float = np.nan
    free_floor: bool = False

    def predict(self, n: Sequence[float] | np.ndarray, *, extrapolate: bool = False) -> np.ndarray:
        """Fitted errors at scales n.

        Raises:
            DataError: There is no fit, or a scale lies outside those fitted and `extrapolate` is not set.
        """
        if np.isnan(self.exponent):
            raise DataError(f"there is no power law to predict from ({self.verdict})")
        scales = np.asarray(n, dtype=np.float64)
        first, last = self.points.loc[self.points["used"], "n"].agg(["min", "max"])
        outside = scales[(scales < first) | (scales > last)]
        if len(outside) and not extrapolate:
            raise DataError(
                f"n = {outside[0]:g} lies outside the scales of the fit",
                where="n",
                valid=f"{first:g} to {last:g}",
                hint="set extrapolate=True, and say in the report that this is no measurement",
            )
        return np.asarray(self.floor + self.factor * scales**-self.exponent)


def fit_power_law(n: np.ndarray, error: np.ndarray, seed: np.ndarray) -> PowerLaw:
    """Fit a power law to the mean errors at each scale.

    The mean over seeds at a scale weighs by its relative variance, which the seeds tell (see `PRIOR`). How far the
    means scatter about the law tells the size of the error, so the interval holds what all seeds of a scale share (one
    pre-training). With c = 0 that is a weighted regression on log axes with a t interval. From `FEWEST_FREE` scales on,
    and where the error falls, c ≥ 0 is free and the interval is the profile likelihood's, with an F quantile.

    Args:
        n: (N,) scales: images, parameters, ...
        error: (N,) not negative, such as 1 - accuracy; NaN is left out.
        seed: (N,); several values of one scale and seed (folds) are averaged.

    Raises:
        DataError: A negative error or scale.
    """
    scale, value = np.asarray(n, dtype=np.float64), np.asarray(error, dtype=np.float64)
    known = np.isfinite(scale) & np.isfinite(value)
    scale, value = scale[known], value[known]
    for name, values in (("n", scale), ("error", value)):
        if (values < 0).any():
            raise DataError(f"{name} {values.min():g} is negative", where=name, hint="give errors, as 1 - accuracy")
    points = _points(scale, value, pd.factorize(np.asarray(seed)[known], use_na_sentinel=False)[0])
    used = points[points["used"]]
    if len(used) < FEWEST:
        return PowerLaw(points, f"too few points: {len(used)} of {FEWEST}")
    scales, errors = used["n"].to_numpy(), used["error"].to_numpy()
    variance = _relative_variance(errors, used["sd"].to_numpy(), used["seeds"].to_numpy())
    freedom = len(used) - 2
    slope, intercept, se = _line(np.log(scales), np.log(errors), 1 / variance)
    p = float(2 * stdtr(freedom, -abs(slope) / se)) if se > 0 else float(slope == 0)
    half = stdtrit(freedom, (1 + CONFIDENCE) / 2) * se
    if p > 1 - CONFIDENCE:
        verdict = "not distinguishable from flat"
    else:
        verdict = "falls with scale" if slope < 0 else "rises with scale"
    if verdict == "falls with scale" and len(used) >= FEWEST_FREE:
        return PowerLaw(points, verdict, p, *_profile(scales, errors, variance * errors**2), free_floor=True)
    return PowerLaw(points, verdict, p, 0.0 - slope, -slope - half, half - slope, float(np.exp(intercept)), 0.0)


def _points(n: np.ndarray, error: np.ndarray, seed: np.ndarray) -> pd.DataFrame:
    """Mean and spread over seeds of each scale."""
    scales, place = np.unique(n, return_inverse=True)
    cells, cell = np.unique(place * (seed.max(initial=0) + 1) + seed, return_inverse=True)
    per_seed = np.bincount(cell, error) / np.bincount(cell)
    place = cells // (seed.max(initial=0) + 1)
    seeds = np.bincount(place, minlength=len(scales))
    mean = np.bincount(place, per_seed, len(scales)) / seeds
    squares = np.bincount(place, (per_seed - mean[place]) ** 2, len(scales))
    sd = np.where(seeds > 1, np.sqrt(squares / np.maximum(seeds - 1, 1)), np.nan)
    return pd.DataFrame({"n": scales, "error": mean, "sd": sd, "seeds": seeds, "used": (mean > 0) & (scales > 0)})


def _relative_variance(error: np.ndarray, sd: np.ndarray, seeds: np.ndarray) -> np.ndarray:
    """Variance of each mean, relative to it squared: that of log error; equal where the seeds tell nothing."""
    freedom = seeds - 1
    own = np.where(freedom > 0, (np.nan_to_num(sd) / error) ** 2, 0.0)
    pooled = (freedom * own).sum() / max(freedom.sum(), 1)
    if pooled == 0:
        return 1.0 / seeds
    return np.asarray((PRIOR * pooled + freedom * own) / (PRIOR + freedom) / seeds)


def _line(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> tuple[float, float, float]:
    """Slope, intercept and the slope's standard error of a weighted regression, scaled by its residuals."""
    if np.ptp(y) <= ROUNDING:  # equal values: what rounding leaves of them is no slope
        return 0.0, float(y.mean()), 0.0
    share = weights / weights.sum()
    centred = x - share @ x
    spread = share @ centred**2
    slope = share @ (centred * y) / spread
    intercept = share @ y - slope * (share @ x)
    residual = share @ (y - intercept - slope * x) ** 2 / (len(x) - 2)
    return float(slope), float(intercept), float(np.sqrt(residual / spread))


def _profile(scales: np.ndarray, errors: np.ndarray, variance: np.ndarray) -> tuple[float, float, float, float, float]:
    """Exponent, low, high, factor and floor: least squares in factor and floor ≥ 0 at each exponent."""
    middle = np.exp(np.log(scales).mean())  # powers of n itself would leave the range of floats

    def solve(exponents: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Residual sums, factors (at the middle scale) and floors, (E,) each."""
        share = 1 / variance / (1 / variance).sum()
        powers = (scales / middle) ** -exponents[:, None]
        mean = powers @ share
        centred = powers - mean[:, None]
        factor = centred @ (share * errors) / (centred**2 @ share)
        floor = share @ errors - factor * mean
        through_zero = powers @ (share * errors) / (powers**2 @ share)
        factor, floor = np.where(floor < 0, through_zero, factor), np.maximum(floor, 0)
        residuals = errors - floor[:, None] - factor[:, None] * powers
        return residuals**2 @ share, factor, floor

    from scipy.optimize import minimize_scalar

    sums = solve(_EXPONENTS)[0]
    best = int(sums.argmin())
    around = np.log(_EXPONENTS[[max(best - 1, 0), min(best + 1, len(sums) - 1)]])
    found = minimize_scalar(
        lambda log_exponent: float(solve(np.exp([log_exponent]))[0][0]), bounds=tuple(around), method="bounded"
    )
    exponent = float(np.exp(found.x))
    least, factor, floor = (float(values[0]) for values in solve(np.array([exponent])))
    freedom = len(scales) - 3
    inside = np.flatnonzero(sums <= least * (1 + fdtri(1, freedom, CONFIDENCE) / freedom))
    first, last = (int(inside.min()), int(inside.max())) if len(inside) else (best, best)
    low = _EXPONENTS[first - 1] if first > 0 else 0.0  # outwards by a step: never too narrow
    high = _EXPONENTS[last + 1] if last + 1 < len(sums) else np.inf
    return exponent, float(low), float(high), float(factor * middle**exponent), floor
