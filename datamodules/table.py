"""The table: every data set as one row an image, in memory that workers share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

SPLITS = ("", "train", "validation", "test")
"""Values of `Table.split`; the empty string is a row that no split uses."""

METADATA = ("sex", "age", "view", "scanner", "site", "date")
"""Optional columns that every data set names alike."""


def strings(values: Any) -> Any:
    """Return `values` as a compact string array: one Arrow buffer, so forked workers share it."""
    return pd.array(np.asarray(values, dtype=object), dtype="string[pyarrow]")  # type: ignore[call-overload]


def split_column(values: Any) -> pd.Categorical:
    """Return split names as a categorical of one byte a row; see `SPLITS`."""
    return pd.Categorical(values, categories=list(SPLITS))


@dataclass(frozen=True)
class Table:
    """One data set's rows, in the order of its source.

    Attributes:
        paths: Image paths relative to the data set's root (or any key the data set reads by), strings (N,).
        labels: int64 (N,), −1 = no label, for multi-class; float32 (N, L), 1 / 0 / NaN = unknown, otherwise.
        groups: Whose image it is (the patient); strings (N,). Groups never cross splits.
        split: Categorical (N,) of `SPLITS`.
        metadata: Optional columns (N,), named as in `METADATA`.
        source: File that the rows come from, for messages; None for a folder tree or generated images.
    """

    paths: Any
    labels: np.ndarray
    groups: Any
    split: pd.Categorical
    metadata: Mapping[str, Any] = field(default_factory=dict)
    source: Path | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def where(self, row: int) -> str:
        """Say where row `row` comes from: file and line (the header is line 1), else its path."""
        if self.source is None:
            return f"row {row} ({self.paths[row]})"
        if self.source.suffix == ".parquet":
            return f"{self.source}, row {row}"
        return f"{self.source}, line {row + 2}"

    def rows(self, split: str) -> np.ndarray:
        """Row numbers of one split, int64, ascending."""
        code = SPLITS.index(split)
        return np.flatnonzero(self.split.codes == code)

    def with_split(self, codes: np.ndarray) -> "Table":
        """Return the table with other splits, given as int8 codes into `SPLITS`."""
        return replace(self, split=pd.Categorical.from_codes(codes, categories=list(SPLITS)))  # type: ignore[call-overload]

    def with_labels(self, columns: Sequence[int]) -> "Table":
        """Return the table with only the given label columns (multi-label and binary)."""
        return replace(self, labels=np.ascontiguousarray(self.labels[:, list(columns)]))
