"""Labels of one vocabulary as columns of another: what a data set can say about a trained model's outputs."""

from collections.abc import Sequence

import numpy as np

from datamodules import ontology
from datamodules.errors import DataError


def shared_names(have: Sequence[str], want: Sequence[str]) -> list[str]:
    """Names of `want` that `have` holds, too, by their canonical spelling (`datamodules.ontology`)."""
    known = {ontology.canonical(name) for name in have}
    return [name for name in want if ontology.canonical(name) in known]


def align_labels(labels: np.ndarray, have: Sequence[str], want: Sequence[str]) -> np.ndarray:
    """Rearrange labels to other names, canonical spelling against canonical spelling.

    Args:
        labels: int64 (N,) classes with −1 = none, or float32 (N, L) of 1 / 0 / NaN.
        have: Names of the classes or label columns.
        want: Names in the wanted order.

    Returns:
        int64 (N,), where a class that `want` lacks becomes −1, or float32 (N, len(want)), where a label that `have`
        lacks is NaN = unknown.

    Raises:
        DataError: The two share no name.
    """
    place = {ontology.canonical(name): index for index, name in enumerate(want)}
    targets = [place.get(ontology.canonical(name), -1) for name in have]
    if max(targets, default=-1) < 0:
        raise DataError(
            f"labels {', '.join(have[:6])} share no name with the outputs {', '.join(want[:6])}",
            where="data.init_args.outputs",
            valid=list(have),
        )
    if labels.ndim == 1:
        return np.asarray(np.asarray([*targets, -1], dtype=np.int64)[labels])
    aligned = np.full((len(labels), len(want)), np.nan, dtype=np.float32)
    for column, target in enumerate(targets):
        if target >= 0:
            aligned[:, target] = labels[:, column]
    return aligned
