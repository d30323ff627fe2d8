"""Checks of a release's table row by row: the first bad row is named by value, file and line."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from datamodules.errors import DataError
from datamodules.hashing import hash_ids
from datamodules.table import Origin


def repeated_rows(texts: "pd.Series[str]") -> np.ndarray:
    """Rows whose text has occurred in a row above, bool (N,)."""
    hashes = hash_ids(texts, "rows")  # five times as fast as a table of strings
    hashes.sort()
    if (hashes[1:] != hashes[:-1]).all():
        return np.zeros(len(texts), dtype=bool)
    return texts.duplicated().to_numpy()


def reject_rows(
    bad: Any, values: "pd.Series[str]", problem: str, path: Path, valid: Sequence[object] | str | None = None
) -> None:
    """Raise a DataError that names the first bad row of a file whose header is line 1.

    Args:
        bad: Bad rows, bool (N,).
        values: Cells (N,), of which the offending one is shown.
        problem: What is wrong with it.
        path: The file.
        valid: What would be accepted.
    """
    rows = np.flatnonzero(np.asarray(bad, dtype=bool)).tolist()
    if rows:
        raise DataError(
            f"{problem} {values.iloc[rows[0]]!r} ({len(rows)} such rows)",
            where=Origin(path).place(rows[0]),
            valid=valid,
        )
