"""The table: every data set as one row an image, in memory that workers share."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from datamodules.errors import DataError

SPLITS = ("", "train", "validation", "test")
"""Values of `Table.split`; the empty string is a row that no split uses."""

METADATA = ("sex", "age", "view", "scanner", "site", "date")
"""Optional columns that every data set names alike: sex F, M or "" = unknown; age float32 years, NaN = unknown; the
others text, "" = unknown (date as YYYY-MM-DD or YYYYMMDD)."""


def strings(values: Any) -> Any:
    """Return `values` as a compact string array: one Arrow buffer, so forked workers share it."""
    if not isinstance(getattr(values, "dtype", None), pd.StringDtype):  # that is in Arrow's memory already
        values = np.asarray(values, dtype=object)
    try:
        return pd.array(values, dtype="string[pyarrow]")
    except UnicodeEncodeError as error:
        raise DataError(
            f"a name holds bytes that are no text: {error.object!r}", hint="names have to be UTF-8: rename these files"
        ) from error


def no_split(n: int) -> pd.Categorical:
    """Splits of `n` rows of which none has an official one."""
    codes = np.zeros(n, dtype=np.int8)
    return pd.Categorical.from_codes(codes, categories=list(SPLITS))  # type: ignore[call-overload, no-any-return]


def split_column(values: Any) -> pd.Categorical:
    """Return split names as a categorical of one byte a row; see `SPLITS`."""
    return pd.Categorical(values, categories=list(SPLITS))


class ImageNames(NamedTuple):
    """Names of images, object (N,) each: the data set's, the image's own in it (path), and its group's (patient)."""

    dataset: np.ndarray
    image: np.ndarray
    group: np.ndarray


@dataclass(frozen=True)
class Origin:
    """A stretch of a table that comes from one file.

    Attributes:
        path: The file.
        first_row: The table's first row from it; the stretch ends where the next one begins.
        first_line: Line of that row in the file: 2 below a header, 1 without one.
    """

    path: Path
    first_row: int = 0
    first_line: int = 2

    def place(self, row: int) -> str:
        """File and line of a table row."""
        if self.path.suffix == ".parquet":
            return f"{self.path}, row {row - self.first_row}"
        return f"{self.path}, line {row - self.first_row + self.first_line}"


@dataclass(frozen=True)
class Table:
    """One data set's rows, in the order of its source.

    Attributes:
        paths: Image paths relative to the data set's root (or any key the data set reads by), strings (N,).
        labels: int64 (N,), −1 = no label, for multi-class; float32 (N, L), 1 / 0 / NaN = unknown, otherwise.
        groups: Whose image it is (the patient); strings (N,), the very array `paths` where every image is one's own.
            Groups never cross splits.
        split: Categorical (N,) of `SPLITS`.
        metadata: Optional columns (N,), named as in `METADATA`; a mixture adds `source`, the data set's name.
        origins: Files that the rows come from, by their first row, for messages; empty for a folder tree.
    """

    paths: Any
    labels: np.ndarray
    groups: Any
    split: pd.Categorical
    metadata: Mapping[str, Any] = field(default_factory=dict)
    origins: tuple[Origin, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def where(self, row: int) -> str:
        """Say where row `row` comes from: file and line (the header is line 1), else its path."""
        position = bisect_right([origin.first_row for origin in self.origins], row) - 1
        return self.origins[position].place(row) if position >= 0 else f"row {row} ({self.paths[row]})"

    def rows(self, split: str) -> np.ndarray:
        """Row numbers of one split, int64, ascending."""
        code = SPLITS.index(split)
        return np.flatnonzero(self.split.codes == code)

    def with_split(self, codes: np.ndarray) -> "Table":
        """Return the table with other splits, given as int8 codes into `SPLITS`."""
        return replace(self, split=pd.Categorical.from_codes(codes, categories=list(SPLITS)))  # type: ignore[call-overload]

    @property
    def grouped(self) -> bool:
        """Whether a group may have several images; millions of rows need not be compared where none has."""
        return self.groups is not self.paths

    @property
    def source(self) -> Path | None:
        """The first file that the rows come from."""
        return self.origins[0].path if self.origins else None

    def relabelled(self, labels: np.ndarray) -> "Table":
        """Return the table with other labels, (N,) or (N, L)."""
        return replace(self, labels=labels)


def concatenate(tables: Sequence[Table]) -> Table:
    """Put tables with the same labels below each other; a metadata column that a table lacks is unknown there."""
    columns = [name for name in dict.fromkeys(name for table in tables for name in table.metadata)]
    starts = np.cumsum([0, *(len(table) for table in tables)]).tolist()

    def column(name: str) -> np.ndarray:
        kind = next(np.asarray(table.metadata[name]).dtype for table in tables if name in table.metadata)
        unknown: Any = np.nan if kind.kind == "f" else ""
        parts = [
            np.asarray(table.metadata[name]) if name in table.metadata else np.full(len(table), unknown, dtype=kind)
            for table in tables
        ]
        return np.concatenate(parts)

    return Table(
        paths=strings(np.concatenate([np.asarray(table.paths, dtype=object) for table in tables])),
        labels=np.concatenate([table.labels for table in tables]),
        groups=strings(np.concatenate([np.asarray(table.groups, dtype=object) for table in tables])),
        split=pd.Categorical.from_codes(  # type: ignore[call-overload]
            np.concatenate([table.split.codes for table in tables]), categories=list(SPLITS)
        ),
        metadata={name: column(name) for name in columns},
        origins=tuple(
            replace(origin, first_row=origin.first_row + start)
            for table, start in zip(tables, starts, strict=False)
            for origin in table.origins
        ),
    )
