"""Result rows: one value a row, with fixed columns and types, from run folders to a CSV and back."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from datamodules.atomic import write_text
from datamodules.errors import DataError, closest, shorten

TEXT, INTEGER, REAL = "string[pyarrow]", "Int64", "float64"

#: Columns in their order, with types that hold a missing value: text (`pd.NA`), integers (`pd.NA`), reals
#: (NaN). `shots` is text: "1", "5", ..., "full". Metrics in `value` are fractions, not percent. `seconds` is
#: wall time, `peak_memory` bytes, `energy` joules.
DTYPES: dict[str, str] = {
    **dict.fromkeys(("study", "cell", "run", "source"), TEXT),
    "source_n": INTEGER,
    "source_dials": TEXT,
    **dict.fromkeys(("architecture", "method", "weights_hash"), TEXT),
    "pretrain_seed": INTEGER,
    **dict.fromkeys(("target", "protocol"), TEXT),
    **dict.fromkeys(("transfer_depth", "frozen_depth"), INTEGER),
    "granularity": TEXT,
    "shots": TEXT,
    "num_images": INTEGER,
    "fraction": REAL,
    "dials": TEXT,
    **dict.fromkeys(("fold", "seed"), INTEGER),
    **dict.fromkeys(("metric", "class_name", "subgroup"), TEXT),
    "value": REAL,
    **dict.fromkeys(("n_train", "n_val", "n_test", "n_patients", "image_size", "step"), INTEGER),
    "epochs": REAL,
    "images_seen": INTEGER,
    "selection": TEXT,
    "trials": INTEGER,
    "tuned": TEXT,
    **dict.fromkeys(("split_policy", "label_policy", "guard"), TEXT),
    **dict.fromkeys(("seconds", "peak_memory", "energy"), REAL),
    **dict.fromkeys(("config_hash", "code_version"), TEXT),
}
COLUMNS: tuple[str, ...] = tuple(DTYPES)

#: What one value stands for. `run` is not part of it: a cell that ran twice has two values where
#: one may be.
IDENTITY: tuple[str, ...] = (
    *(
        "study",
        "cell",
        "source",
        "source_n",
        "source_dials",
        "architecture",
        "method",
        "pretrain_seed",
        "target",
        "protocol",
    ),
    *("transfer_depth", "frozen_depth", "granularity", "shots", "num_images", "fraction", "dials", "fold", "seed"),
    *("metric", "class_name", "subgroup"),
)


class ResultsError(DataError):
    """Result rows that are broken, doubled or too few to report. Ends the command with exit code 2."""


def rows_to_frame(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Put rows into a frame with the columns and types of `DTYPES`; None, NaN and "" are missing.

    Args:
        rows: Mappings from column to value; a column that a row lacks is missing there.

    Returns:
        One row for each mapping, in their order, with a fresh index.

    Raises:
        ResultsError: For an unknown column, a value that does not fit its column, or a `shots` that is
            neither a whole number nor "full".
    """
    records = list(rows)
    _require_known_columns(set().union(*records), where=None)
    frame = pd.DataFrame({name: _column(name, [row.get(name) for row in records]) for name in COLUMNS})
    wrong = ~frame["shots"].str.fullmatch(r"\d+|full").fillna(True).astype(bool)
    if wrong.any():
        row = int(wrong.to_numpy().argmax())
        raise ResultsError(
            f"shots {frame['shots'].iloc[row]!r} is no number of shots",
            where=f"row {row}, column shots",
            valid='a whole number such as "5", or "full"',
        )
    return frame


def check_unique(frame: pd.DataFrame) -> None:
    """Raise ResultsError, naming the rows, where two rows give a value for one thing (see `IDENTITY`)."""
    doubled = frame[frame.duplicated(list(IDENTITY), keep=False)]
    if doubled.empty:
        return
    groups = doubled.groupby(list(IDENTITY), dropna=False, sort=False)
    shown = []
    for _, group in list(groups)[:4]:
        first = group.iloc[0]
        facts = [f"{name} {first[name]}" for name in IDENTITY if not pd.isna(first[name])]
        runs = shorten(list(dict.fromkeys(group["run"].dropna())), 4) or "?"
        shown.append(f"rows {shorten(list(group.index), 4)} (runs {runs}): {', '.join(facts)}")
    raise ResultsError(
        f"{groups.ngroups} results appear more than once, in {len(doubled)} rows",
        where="\n         ".join(shown),
        hint="keep one run folder of each cell; move the others out of the study's folder",
    )


def write_csv(frame: pd.DataFrame, path: Path | str) -> None:
    """Write a frame as CSV in one step (see `write_text`); missing values are empty, reals exact."""
    write_text(Path(path), frame.to_csv(index=False, lineterminator="\n"))


def read_csv(path: Path | str) -> pd.DataFrame:
    """Read result rows that `write_csv` wrote, with the same values and types.

    Names such as "None", "NA" or "nan" stay text; only an empty field is missing.

    Raises:
        ResultsError: If the file is missing, is not such a table or has an unknown column.
    """
    try:
        frame = pd.read_csv(
            path,
            dtype=DTYPES,  # type: ignore[arg-type]
            keep_default_na=False,
            na_values=[""],
            float_precision="round_trip",  # the default parser may be off by the last digit
        )
    except (OSError, ValueError, TypeError) as error:
        raise ResultsError(f"cannot read result rows: {error}", where=str(path)) from error
    _require_known_columns(frame.columns, where=str(path))
    missing = {name: _column(name, [None] * len(frame)) for name in COLUMNS if name not in frame}
    return frame.assign(**missing)[list(COLUMNS)]


def _require_known_columns(names: Iterable[str], where: str | None) -> None:
    unknown = sorted(set(names) - set(COLUMNS))
    if unknown:
        near = closest(unknown[0], COLUMNS)
        raise ResultsError(
            f"unknown column{'s' if len(unknown) > 1 else ''} in result rows: {shorten(unknown)}",
            where=where,
            valid=shorten(COLUMNS, len(COLUMNS)),
            hint=f"did you mean {near!r}?" if near else None,
        )


def _column(name: str, values: list[Any]) -> pd.Series:
    column = pd.Series(values, dtype=object, name=name)
    column = column.where(column.notna() & (column != ""), None)
    try:
        return column.astype(DTYPES[name])  # type: ignore[call-overload, no-any-return]
    except (TypeError, ValueError) as error:
        kind = {INTEGER: "whole numbers", REAL: "numbers"}.get(DTYPES[name], "text")
        raise ResultsError(f"column {name!r} must hold {kind}: {error}") from error
