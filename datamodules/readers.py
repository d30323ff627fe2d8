"""Reads metadata: folder trees, CSV and Parquet files, label columns. Never opens an image."""

import csv
import gzip
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pandas as pd

from datamodules import io
from datamodules.errors import DataError, closest, shorten

SPLIT_FOLDERS = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}
"""Folder names (and values of a split column) and the split that each stands for, lower case."""


def require_folder(root: Path, name: str) -> None:
    """Raise a DataError that says what to do where `root` is not a folder."""
    if not root.is_dir():
        near = closest(root.name, os.listdir(root.parent)) if root.parent.is_dir() else None
        raise DataError(
            f"no folder {root} for {name}" + (f"; did you mean {root.parent / near}?" if near else ""),
            where="data.init_args.root (default: $FARSHOT_DATA/<data set>)",
            hint="give --data.root FOLDER, or set FARSHOT_DATA",
        )


def split_folders(root: Path) -> dict[str, str]:
    """Folders directly under `root` that are named after splits, and their split; empty where there are none."""
    found = {entry.name: SPLIT_FOLDERS.get(entry.name.lower(), "") for entry in os.scandir(root) if entry.is_dir()}
    named = {folder: split for folder, split in found.items() if split}
    return named if "train" in named.values() else {}


def class_folders(root: Path) -> list[str]:
    """Names of the class folders of a tree, sorted: below the training folder where there is one, else below `root`.

    Raises:
        DataError: No class folder, or a split has other classes than training.
    """
    splits = split_folders(root)
    if not splits:
        names = _folders(root)
    else:
        trees = {split: set(_folders(root / folder)) for folder, split in splits.items()}
        names = sorted(trees["train"])
        for split, classes in trees.items():
            extra = sorted(classes - trees["train"])
            if extra:
                raise DataError(
                    f"{split} has class folders that training lacks: {shorten(extra)}",
                    where=str(root),
                    valid=names,
                )
    if not names:
        raise DataError(
            f"no class folders in {root}",
            where="data.init_args.root",
            valid="root/CLASS/*.jpg or root/{train,val,test}/CLASS/*.jpg",
        )
    return names


def _folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def read_tree(root: Path, class_names: Sequence[str]) -> tuple[list[str], np.ndarray, list[str]]:
    """Read a folder tree of classes: (relative paths, labels int64 (N,), splits)."""
    paths = io.list_images(root)
    splits = split_folders(root)
    number = {name: index for index, name in enumerate(class_names)}
    kept: list[str] = []
    labels: list[int] = []
    split: list[str] = []
    for path in paths:
        parts = path.split("/")
        folder = parts[0] if splits else ""
        depth = 1 if splits else 0
        if (splits and folder not in splits) or len(parts) < depth + 2 or parts[depth] not in number:
            continue  # images beside the class folders belong to no class
        kept.append(path)
        labels.append(number[parts[depth]])
        split.append(splits.get(folder, ""))
    return kept, np.asarray(labels, dtype=np.int64), split


def read_frame(path: Path, columns: Sequence[str] | None = None) -> pd.DataFrame:
    """Read a CSV (also gzipped) or Parquet file; CSV cells stay text, blanks become "".

    Args:
        path: The file. pyarrow reads CSV: two to four times as fast as pandas, and it names the line of a row that has
            too few or too many fields, such as the last one of a truncated file.
        columns: Columns to read; the others are not even converted. Default: all.

    Raises:
        DataError: Missing, broken or truncated file, or a missing column (with the nearest match).
    """
    if not path.is_file():
        near = closest(path.name, os.listdir(path.parent)) if path.parent.is_dir() else None
        raise DataError(
            f"no table {path}" + (f"; did you mean {near!r}?" if near else ""),
            where="data.init_args.table",
            hint="paths are relative to root",
        )
    try:
        present = header(path)
        for column in columns or []:
            if column not in present:
                near = closest(column, present)
                raise DataError(
                    f"no column {column!r}" + (f"; did you mean {near!r}?" if near else ""),
                    where=f"{path}, line 1",
                    valid=present,
                )
        if path.suffix == ".parquet":
            frame = _read_parquet(path, columns)
        else:
            frame = _read_csv(path, present, columns)
        if not len(frame):
            raise DataError("the table has no rows", where=str(path), hint="check that the file is whole")
        return frame
    except DataError:
        raise
    except Exception as error:
        raise DataError(
            f"cannot read the table: {error}", where=str(path), hint="check that the file is whole"
        ) from error


def text_column(cells: "pd.Series[Any]") -> "pd.Series[str]":
    """A column of a CSV or Parquet file as text without blanks around it: a missing value is "", 7.0 is "7"."""
    if isinstance(cells.dtype, pd.StringDtype):  # stays in Arrow's memory
        return _trimmed(cells)
    if cells.dtype.kind == "f" and (cells.dropna() % 1 == 0).all():  # whole numbers that a missing one made floats
        cells = cells.astype("Int64")
    text: pd.Series[str] = cells.astype(object).where(cells.notna(), "").astype(str).str.strip()
    return text


def _trimmed(cells: "pd.Series[str]") -> "pd.Series[str]":
    """Text without blanks around it, missing values as ""; parts in which nothing changes are not copied."""
    import pyarrow as pa
    import pyarrow.compute as pc

    def trim(part: Any) -> Any:
        trimmed = pc.utf8_trim_whitespace(part.fill_null(""))
        changed = part.null_count or pc.sum(pc.binary_length(trimmed)) != pc.sum(pc.binary_length(part))
        return trimmed if changed else part

    column = pa.chunked_array(pa.array(cells.array))
    parts = [trim(part) for part in column.chunks]
    return pd.Series(pa.chunked_array(parts, column.type), index=cells.index, name=cells.name, dtype="str")


def header(path: Path) -> list[str]:
    """Column names: of a Parquet file from its footer, of a CSV from its first line."""
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        return list(pq.read_schema(path).names)
    with _open_text(path) as file:
        return next(csv.reader(file), [])


def _open_text(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def _read_parquet(path: Path, columns: Sequence[str] | None) -> pd.DataFrame:
    """Read in batches: text becomes what pandas keeps part by part, and is not twice in memory."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path, pre_buffer=False)
    names = list(columns) if columns else None
    schema = pa.schema(
        pa.field(field.name, pa.large_string()) if field.type == pa.string() else field for field in file.schema_arrow
    )
    batches = [
        pa.Table.from_batches([batch]).cast(pa.schema([schema.field(name) for name in batch.schema.names]))
        for batch in file.iter_batches(batch_size=1 << 20, columns=names, use_threads=False)
    ]
    frame: pd.DataFrame = pa.concat_tables(batches).to_pandas() if batches else pd.read_parquet(path, columns=names)
    return frame if names is None else frame[names]


def _read_csv(path: Path, present: Sequence[str], columns: Sequence[str] | None) -> pd.DataFrame:
    import pyarrow as pa
    from pyarrow import csv as arrow_csv

    doubled = [name for name, count in Counter(present).items() if count > 1]
    if doubled:
        raise DataError(f"column {doubled[0]!r} stands twice in the header", where=f"{path}, line 1")

    def read(threads: bool) -> pd.DataFrame:
        table = arrow_csv.read_csv(
            path,
            read_options=arrow_csv.ReadOptions(use_threads=threads),
            parse_options=arrow_csv.ParseOptions(newlines_in_values=True),
            convert_options=arrow_csv.ConvertOptions(
                include_columns=list(dict.fromkeys(columns)) if columns else None,
                column_types={name: pa.string() for name in present},
                strings_can_be_null=False,
            ),
        )
        frame: pd.DataFrame = table.to_pandas()
        return frame

    try:
        return read(True)
    except pa.ArrowInvalid as problem:
        if "Expected" not in str(problem):
            raise
        try:
            return read(False)  # only the serial reader knows the line
        except pa.ArrowInvalid as error:
            found = re.search(r"Row #(\d+): Expected (\d+) columns, got (\d+)", str(error))
            if not found:
                raise
            raise DataError(
                f"a row has {found[3]} fields, the header has {found[2]}",
                where=f"{path}, line {found[1]}",
                hint="the file may be cut off: download it again, or correct the row",
            ) from error


def class_labels(values: Any, class_names: Sequence[str], where: str, line: int = 2) -> np.ndarray:
    """Turn a column of class names (or class numbers) into int64 labels (N,); blank = −1.

    Args:
        values: The column's cells (N,).
        class_names: Names in index order.
        where: File, for messages.
        line: Line of the first cell.

    Raises:
        DataError: An unknown class name or a number out of range, with its line.
    """
    codes, texts = pd.factorize(text_column(pd.Series(values, copy=False)))
    number = {"": -1, **{name: index for index, name in enumerate(class_names)}}
    # A number is a class index only where no class bears a number for a name.
    if not any(name.lstrip("-").isdigit() for name in class_names):
        indices = dict(zip(texts, pd.to_numeric(pd.Series(texts, dtype=object), errors="coerce").tolist(), strict=True))
        valid = {float(index) for index in range(len(class_names))}
        number |= {text: int(index) for text, index in indices.items() if text not in number and index in valid}
    labels = np.asarray([number.get(text, -1) for text in texts], dtype=np.int64)[codes]
    bad = np.flatnonzero(np.asarray([text not in number for text in texts], dtype=bool)[codes])
    if len(bad):
        value = str(texts[codes[bad[0]]])
        near = closest(value, class_names)
        raise DataError(
            f"unknown label {value!r}" + (f"; did you mean {near!r}?" if near else "") + f" ({len(bad)} such rows)",
            where=f"{where}, line {bad[0] + line}",
            valid=class_names if not value.lstrip("-").isdigit() else f"0 to {len(class_names) - 1}, or a class name",
        )
    return labels


def binary_cells(frame: pd.DataFrame, where: str, line: int = 2) -> np.ndarray:
    """Turn label columns into float32 (N, L): 1, 0, or NaN where a cell is blank.

    Raises:
        DataError: A cell that is neither 0, 1 nor blank, with its line and column.
    """
    result = np.full(frame.shape, np.nan, dtype=np.float32)
    for column, name in enumerate(frame.columns):
        text = text_column(frame[name]).replace({"True": "1", "False": "0"})  # booleans of a Parquet file
        values = pd.to_numeric(text, errors="coerce")
        bad = np.flatnonzero(((text != "") & ~values.isin([0, 1])).to_numpy())
        if len(bad):
            raise DataError(
                f"label {text.iloc[bad[0]]!r} in column {name!r} is out of range ({len(bad)} such rows)",
                where=f"{where}, line {bad[0] + line}",
                valid="0, 1 or blank (unknown)",
            )
        result[:, column] = values.to_numpy(dtype=np.float32)
    return result
