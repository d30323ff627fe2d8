"""Attributes that subgroups are made of: age in bands, other metadata as they are, and names in a sensible order."""

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import pandas as pd

UNKNOWN = "unknown"

AGE_EDGES = (0, 20, 40, 60, 80)

OLDEST = 120
"""Years; NIH's table has ages up to 414, which are typing errors."""


def age_bands(years: np.ndarray, edges: Sequence[int] = AGE_EDGES) -> np.ndarray:
    """Names of age bands, object (N,): "0-19", ..., "80+"; unknown where NaN, below the first edge or above `OLDEST`.

    Args:
        years: (N,), NaN = unknown.
        edges: First year of each band, ascending.
    """
    names = [f"{low}-{high - 1}" for low, high in pairwise(edges)] + [f"{edges[-1]}+", UNKNOWN]
    band = np.searchsorted(edges, years, side="right") - 1
    return np.asarray(names, dtype=object)[np.where((band < 0) | ~(years <= OLDEST), len(edges), band)]


def attributes_of(metadata: Mapping[str, np.ndarray], edges: Sequence[int] = AGE_EDGES) -> dict[str, np.ndarray]:
    """Attributes to compare by: metadata columns as they are, age in bands."""
    return {name: age_bands(values, edges) if name == "age" else values for name, values in metadata.items()}


def group_numbers(values: Sequence[object] | np.ndarray) -> tuple[list[str], np.ndarray]:
    """Names in order of their leading number and letters, unknown last; the group's number of each image."""
    code, found = pd.factorize(np.asarray(values, dtype=object))
    names = [*(str(name).strip() or UNKNOWN for name in found), UNKNOWN]  # a missing value has the code -1

    def place(name: str) -> tuple[bool, float, str]:
        leading = re.match(r"\d+", name)
        return name == UNKNOWN, float(leading[0]) if leading else np.inf, name

    used = sorted({names[i] for i in np.unique(code)}, key=place)
    number = {name: i for i, name in enumerate(used)}
    return used, np.asarray([number.get(name, -1) for name in names])[code]
