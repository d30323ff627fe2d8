"""From logits to probabilities, and from probabilities to decisions."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.special import expit

Task = Literal["multiclass", "binary", "multilabel"]
Floats = npt.NDArray[np.floating]

DEFAULT_THRESHOLD = 0.5


def probabilities(logits: Floats, task: Task) -> npt.NDArray[np.float64]:
    """Softmax over the classes, or one sigmoid per label.

    In float64: float32 would round a confident model's probabilities to 1 and so tie samples that differ.

    Args:
        logits: (N, C) for multiclass, (N, 1) for binary, (N, L) for multilabel.
        task: What the columns mean.

    Returns:
        float64 of the same shape, in [0, 1].
    """
    values = logits.astype(np.float64)
    if task != "multiclass":
        return np.asarray(expit(values))
    values -= values.max(axis=1, keepdims=True)
    np.exp(values, out=values)
    values /= values.sum(axis=1, keepdims=True)
    return values


def decide(probabilities: Floats, thresholds: Sequence[float], task: Task) -> npt.NDArray[np.int64]:
    """What a model that must commit itself answers.

    Args:
        probabilities: (N, C) or (N, L), in [0, 1].
        thresholds: One per label; a label is positive above its threshold, not at it. Empty for multiclass.
        task: What the columns mean.

    Returns:
        int64: (N,) the most probable class (of equals the first) for multiclass, otherwise (N, L) of 0 and 1.
    """
    if task == "multiclass":
        return np.asarray(probabilities.argmax(axis=1), dtype=np.int64)
    return (probabilities > np.asarray(thresholds)).astype(np.int64)


def choose_thresholds(logits: Floats, labels: Floats | npt.NDArray[np.int64], task: Task) -> list[float]:
    """The operating points that maximise Youden's J = sensitivity + specificity - 1, for use on other data.

    Candidates lie midway between neighbouring scores; of equally good ones the lowest, the most sensitive, is
    taken. A label without both classes, or that no candidate separates better than chance, keeps 0.5.

    Args:
        logits: (N, L) of the validation set.
        labels: (N, L), 1 / 0 / NaN; unknown cells are left out.
        task: What the columns mean.

    Returns:
        One probability per label; an empty list for multiclass, which decides by argmax.
    """
    if task == "multiclass":
        return []
    scores = probabilities(logits, task)
    return [_youden(labels[:, i] == 1, labels[:, i] == 0, scores[:, i]) for i in range(scores.shape[1])]


def _youden(positive: npt.NDArray[np.bool_], negative: npt.NDArray[np.bool_], scores: Floats) -> float:
    if not (positive.any() and negative.any()):
        return DEFAULT_THRESHOLD
    neighbours = np.unique(scores[positive | negative])
    candidates = (neighbours[:-1] + neighbours[1:]) / 2
    gain = _share_above(scores[positive], candidates) - _share_above(scores[negative], candidates)
    if not (gain > 0).any():
        return DEFAULT_THRESHOLD
    # Rounding must not decide between equally good candidates.
    return float(candidates[np.argmax(gain >= gain.max() - 1e-12)])


def _share_above(scores: Floats, candidates: Floats) -> Floats:
    return np.asarray(1 - np.searchsorted(np.sort(scores), candidates, side="right") / len(scores))
