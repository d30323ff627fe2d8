"""Filters of rows and cells by column: `source=near`, `shots=1,5`, `value>0.9`, `target!=nih`, `class_name=`."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import pandas as pd

from datamodules.errors import DataError, closest

FORM = re.compile(r"(?P<column>\w+)\s*(?P<sign>!=|<=|>=|==?|<|>)\s*(?![<>=])(?P<value>.*)", re.DOTALL)
ORDER: dict[str, Callable[[pd.Series, float], pd.Series]] = {
    "<": pd.Series.lt,
    ">": pd.Series.gt,
    "<=": pd.Series.le,
    ">=": pd.Series.ge,
}


@dataclass(frozen=True)
class Filter:
    """One condition on a column.

    Attributes:
        column: The column.
        sign: =, !=, <, >, <= or >=.
        value: For = and !=: texts joined by commas, with * and ? as wildcards; nothing stands for a missing value. The
            whole counts as a text, too: names may hold commas.
    """

    column: str
    sign: str
    value: str

    def mask(self, frame: pd.DataFrame) -> pd.Series:
        """Rows of a frame that fulfil it, bool.

        Raises:
            DataError: There is no such column, or an order is asked for where the column has no numbers.
        """
        if self.column not in frame:
            near = closest(self.column, [str(name) for name in frame.columns])
            raise DataError(
                f"no column {self.column!r}" + (f"; did you mean {near!r}?" if near else ""),
                where=f"{self.column}{self.sign}{self.value}",
                valid=[str(name) for name in frame.columns],
            )
        values = frame[self.column]
        if self.sign in ORDER:
            numbers = pd.to_numeric(values, errors="coerce")
            bound = _number(self.value)
            if bound is None:
                raise DataError(
                    f"{self.value!r} is no number", where=f"{self.column}{self.sign}{self.value}", valid="such as 0.9"
                )
            return ORDER[self.sign](numbers, bound).fillna(False).astype(bool)
        found = self._equal(values)
        return found if self.sign == "=" else ~found

    def _equal(self, values: pd.Series) -> pd.Series:
        """Rows that have one of the values, bool. Numbers are compared as numbers: 1, 1.0 and 1e0 are one."""
        parts = {part.strip() for part in (self.value, *self.value.split(","))}  # whole: a name may hold a comma
        found = values.isna() if "" in parts else pd.Series(False, index=values.index)
        if pd.api.types.is_numeric_dtype(values):
            numbers = {part: number for part in parts if (number := _number(part)) is not None}
            found |= values.isin(list(numbers.values()))
            parts -= numbers.keys()
        patterns = [part.replace("[", "[[]") for part in parts if part]  # only * and ? are wildcards
        if patterns:
            codes, distinct = pd.factorize(values)  # -1 = missing
            hits = [any(fnmatchcase(_text(value), pattern) for pattern in patterns) for value in distinct]
            found |= np.array([*hits, False])[codes]
        return found.astype(bool)


def read_filters(words: Iterable[str]) -> list[Filter]:
    """Read conditions.

    Raises:
        DataError: A word is none.
    """
    filters = []
    for word in words:
        match = FORM.fullmatch(word)
        if match is None:
            raise DataError(
                f"{word!r} is no filter",
                valid="COLUMN=VALUE, or with !=, <, >, <=, >=",
                hint="such as source=near, shots=1,5 or 'value>0.9'",
            )
        filters.append(Filter(match["column"], match["sign"].replace("==", "="), match["value"]))
    return filters


def apply(filters: Sequence[Filter], frame: pd.DataFrame) -> pd.DataFrame:
    """Rows that fulfil all conditions."""
    for condition in filters:
        frame = frame[condition.mask(frame)]
    return frame


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _text(value: Any) -> str:
    """A value as one would type it: 0.1, 5, near."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
