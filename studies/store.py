"""The rows of a study in one table, brought up to date with its run folders: Parquet and CSV, whole at any moment.

runs/<study>/results.parquet   the rows, typed as in `studies.results`; pandas, DuckDB and others read it as it is
runs/<study>/results.csv       the same as text

Only folders that have changed are read again: which state of each file went in stands in the Parquet file's metadata.
"""

import fcntl
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from datamodules.atomic import clear_temporaries, replace_file
from studies.results import COLUMNS, DTYPES, ResultsError, check_unique, rows_to_frame

PARQUET, CSV = "results.parquet", "results.csv"
KEY = b"farshot"
FORMAT = 1  # raised when the meaning of a row changes


@dataclass(frozen=True)
class Part:
    """What one file gave: the rows of one run, on one data set.

    Attributes:
        file: Path of the summary below the study's folder.
        changed: Its time of change, ns.
        size: Its bytes.
        rows: Number of rows.
    """

    file: str
    changed: int
    size: int
    rows: int = 0


def collect(study_dir: Path | str) -> pd.DataFrame:
    """Gather the rows of a study's runs and write the table where something has changed.

    A run's rows are in `<study_dir>/<run>/summary.json` = {"rows": [...], ...}; those of a run on other data sets
    (protocol `direct`) in `<study_dir>/<run>/direct/<data set>/summary.json`. A run without such a file is unfinished:
    skipped. Of a folder that cannot be written to, the rows are returned all the same, with a warning where it could
    before.

    Returns:
        The rows in the order of the folders' names; empty where no run is finished.

    Raises:
        ResultsError: The folder does not exist, a summary is broken (names the file), or a result is doubled.
    """
    root = Path(study_dir)
    if not root.is_dir():
        raise ResultsError(f"there is no folder {root}", hint="run the study first, or check the path")
    with _locked(root) as writable:
        stored, parts = _read_store(root / PARQUET)
        found = list(_summaries(root))
        if [(part.file, part.changed, part.size) for part in parts] == found and (root / CSV).is_file():
            return stored
        frame, parts = _merge(root, stored, parts, found)
        check_unique(frame)
        if writable:
            try:
                _write(root, frame, parts)
            except OSError as error:  # a full disk, a folder that belongs to somebody else
                warnings.warn(f"{root / PARQUET} is not brought up to date: {error.strerror}", stacklevel=2)
    return frame


def _summaries(root: Path) -> Iterator[tuple[str, int, int]]:
    """Every summary file with its time of change and size; hidden folders hold runs that were replaced."""
    for pattern in ("*/summary.json", "*/direct/*/summary.json", "*/zero_shot/*/summary.json"):
        for path in sorted(root.glob(pattern)):
            name = path.relative_to(root).as_posix()
            if not name.startswith("."):
                with suppress(FileNotFoundError):  # moved away since it was listed
                    stat = path.stat()
                    yield name, stat.st_mtime_ns, stat.st_size


def _merge(
    root: Path, stored: pd.DataFrame, parts: list[Part], found: list[tuple[str, int, int]]
) -> tuple[pd.DataFrame, list[Part]]:
    """Rows of all files, in their order: as stored where a file is unchanged, else read."""
    places, start = {}, 0
    for part in parts:
        places[part.file, part.changed, part.size] = (start, part.rows)
        start += part.rows
    frames: list[pd.DataFrame] = []
    merged: list[Part] = []
    fresh: list[tuple[Path, list[dict[str, Any]]]] = []

    def flush() -> None:
        """One frame of all rows read since the last one that was stored: making one a file costs milliseconds."""
        if fresh:
            frames.append(_to_frame(root, dict(fresh)))
            fresh.clear()

    for key in found:
        if key in places:
            flush()
            first, count = places[key]
            frames.append(stored.iloc[first : first + count])
            merged.append(Part(*key, rows=count))
            continue
        rows = read_rows(root / key[0])
        fresh.append((root / key[0], rows))
        merged.append(Part(*key, rows=len(rows)))
    flush()
    frames = [frame for frame in frames if len(frame)]
    return pd.concat(frames, ignore_index=True) if frames else rows_to_frame([]), merged


def _to_frame(root: Path, rows_of: Mapping[Path, list[dict[str, Any]]]) -> pd.DataFrame:
    try:
        return rows_to_frame(row for rows in rows_of.values() for row in rows)
    except ResultsError:
        for path, rows in rows_of.items():  # once more, file by file, to say which one it was
            try:
                rows_to_frame(rows)
            except ResultsError as error:
                raise ResultsError(error.problem, where=str(path), hint="repair or remove this run") from error
        raise


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of one run's summary; none where it was not tested (yet).

    Raises:
        ResultsError: The file is no such summary.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8")).get("rows", [])
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise TypeError("'rows' must be a list of mappings from column to value")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ResultsError(
            f"not a run's summary ({type(error).__name__}: {error})",
            where=str(path),
            valid='{"rows": [{"metric": ..., "value": ...}, ...]}',
            hint="remove the file and run the cell again",
        ) from error
    return rows


# The files -----------------------------------------------------------------------------------------------------------


def _read_store(path: Path) -> tuple[pd.DataFrame, list[Part]]:
    """Rows as stored and what they came from; nothing where there is no table, or one of another format."""
    nothing = rows_to_frame([]), list[Part]()
    try:
        table = pq.read_table(path)
        stored = json.loads((table.schema.metadata or {}).get(KEY, b"{}"))
    except (OSError, ValueError, pa.ArrowException):
        return nothing
    if stored.get("format") != FORMAT or tuple(table.column_names) != COLUMNS:
        return nothing
    frame = table.to_pandas().astype(DTYPES)
    parts = [Part(**part) for part in stored["parts"]]
    return (frame, parts) if len(frame) == sum(part.rows for part in parts) else nothing


def _write(root: Path, frame: pd.DataFrame, parts: list[Part]) -> None:
    from pyarrow import csv

    table = pa.Table.from_pandas(frame, preserve_index=False)
    facts = json.dumps({"format": FORMAT, "parts": [asdict(part) for part in parts]}).encode()
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), KEY: facts})
    for name in (PARQUET, CSV):
        clear_temporaries(root / name)
    options = csv.WriteOptions(quoting_style="needed")
    replace_file(root / CSV, lambda path: csv.write_csv(table, path, options))
    replace_file(root / PARQUET, lambda path: pq.write_table(table, path))


@contextmanager
def _locked(root: Path) -> Iterator[bool]:
    """One process at a time brings the table up to date; yields whether the folder can be written to."""
    try:
        file = (root / ".results.lock").open("ab")
    except OSError:
        yield False
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            raise ResultsError(f"{file.name} cannot be locked: {error.strerror}") from error
        yield True
