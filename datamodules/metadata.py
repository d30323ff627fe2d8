"""Metadata columns as releases write them, in the form that every table has."""

from typing import Any

import numpy as np
import pandas as pd


def sex_column(cells: Any) -> np.ndarray:
    """F, M or "" = unknown, object (N,), from F / Female / female / M / Male / ..."""
    codes, texts = pd.factorize(np.asarray(cells, dtype=object))
    letters = [str(text).strip()[:1].upper() for text in texts]
    return np.asarray([letter if letter in ("F", "M") else "" for letter in letters], dtype=object)[codes]


def years_column(cells: Any) -> np.ndarray:
    """Ages in years, float32 (N,), NaN = unknown, from 58, 58.0, 058Y, 011M, 003W and 002D."""
    codes, texts = pd.factorize(np.asarray(cells, dtype=object))
    parts = pd.Series(texts, dtype=object).astype(str).str.extract(r"^\s*(\d+(?:\.\d+)?)\s*([YMWD]?)\s*$")
    unit = parts[1].map({"Y": 1.0, "M": 1 / 12, "W": 7 / 365.25, "D": 1 / 365.25, "": 1.0})
    years = (pd.to_numeric(parts[0]) * unit).to_numpy(dtype=np.float32)
    return years[codes]


def mapped_column(cells: Any, names: dict[str, str]) -> np.ndarray:
    """Rename values, object (N,); values that `names` lacks stay, blanks around them go, missing ones become ""."""
    codes, texts = pd.factorize(np.asarray(cells, dtype=object))
    values = [str(text).strip() for text in texts]
    values = ["" if value.lower() in ("nan", "none") else names.get(value, value) for value in values]
    return np.asarray([*values, ""], dtype=object)[codes]


def metadata_column(role: str, cells: Any) -> np.ndarray:
    """A column of `datamodules.table.METADATA` in its common form."""
    readers = {"sex": sex_column, "age": years_column}
    return readers[role](cells) if role in readers else mapped_column(cells, {})
