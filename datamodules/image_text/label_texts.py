"""Labels of images in words, for captions."""

from collections.abc import Sequence

import numpy as np

NOTHING = "no finding"


def label_texts(labels: np.ndarray, names: Sequence[str]) -> list[str]:
    """What is in each image, in words.

    Args:
        labels: Classes int64 (B,), or labels float32 (B, L) with 1 / 0 / NaN = unknown.
        names: Names of the classes or labels.

    Returns:
        The class's name; of several labels those that are positive, "edema and effusion", or "no finding".
    """
    if labels.ndim == 1:
        return [names[label] for label in labels.tolist()]
    found = ([name for name, value in zip(names, row, strict=True) if value == 1] for row in labels.tolist())
    return [" and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words) or NOTHING for words in found]
