"""Labels of images in words, for captions."""

from collections.abc import Sequence

import numpy as np

NOTHING = "no finding"
UNKNOWN = "something unknown"


def label_texts(labels: np.ndarray, names: Sequence[str], *, complete: bool) -> list[str]:
    """What is in each image, in words; never more than its labels say.

    Args:
        labels: Classes int64 (B,), −1 = unknown, or labels float32 (B, L): 1 = there, 0 = not there; NaN and what lies
            between is not known.
        names: Names of the classes or labels.
        complete: Whether the labels are all that the set annotates, so that none of them means "no finding".

    Returns:
        The class's name; of several labels those that are there, "edema and effusion". Where none is, "no finding", or,
        if labels are unknown or only some are in use, what is known not to be there: "no edema or effusion".
    """
    if labels.ndim == 1:
        return [names[label] if label >= 0 else UNKNOWN for label in labels.tolist()]
    return [_row_text(row, names, complete) for row in labels.tolist()]


def _row_text(row: Sequence[float], names: Sequence[str], complete: bool) -> str:
    there, absent = ([name for name, value in zip(names, row, strict=True) if value == known] for known in (1, 0))
    if there:
        return _join(there, "and")
    if complete and len(absent) == len(names):
        return NOTHING
    return f"no {_join(absent, 'or')}" if absent else UNKNOWN


def _join(words: Sequence[str], last: str) -> str:
    return f" {last} ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
