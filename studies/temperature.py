"""Temperature scaling: how much surer a model is than it should be, from validation."""

from typing import Any

import numpy as np

from lightning_modules.thresholds import Task

TEMPERATURES = (0.01, 100.0)
"""Range of a fitted temperature. At the lower end validation was separated without error and has no optimum; at the
upper end its logits do not speak of the labels."""


def fit_temperature(logits: np.ndarray, labels: np.ndarray, task: Task) -> np.ndarray:
    """Temperatures that maximise the likelihood of validation (Guo et al. 2017); logits are divided by them.

    The loss is convex in 1 / temperature.

    Args:
        logits: (N, C) or (N, L) of the validation set.
        labels: int (N,), or (N, L) with 1 / 0 / NaN = unknown.
        task: multiclass: one temperature; otherwise one a label.

    Returns:
        float64 (1,) or (L,), in `TEMPERATURES`; NaN without images, or for a label without positives or negatives.
    """
    from scipy.special import logsumexp

    values = logits.astype(np.float64)
    if task == "multiclass":
        own = values[np.arange(len(values)), labels]
        return np.array([_minimum(lambda b: float(np.mean(logsumexp(b * values, axis=1) - b * own)), len(own) > 0)])
    fitted = []
    for column in range(values.shape[1]):
        known = ~np.isnan(labels[:, column])
        truth = labels[known, column] == 1
        margin = np.where(truth, values[known, column], -values[known, column])

        def loss(b: float, margin: np.ndarray = margin) -> float:
            return float(np.mean(np.logaddexp(0.0, -b * margin)))

        fitted.append(_minimum(loss, bool(truth.any() and not truth.all())))
    return np.array(fitted)


def _minimum(loss: Any, defined: bool) -> float:
    from scipy.optimize import minimize_scalar

    if not defined:
        return np.nan
    low, high = np.log(TEMPERATURES)
    found = minimize_scalar(lambda t: loss(np.exp(-t)), bounds=(low, high), method="bounded", options={"xatol": 1e-8})
    return float(np.exp(found.x))
