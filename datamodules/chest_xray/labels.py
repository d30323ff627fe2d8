"""Labels of radiology reports: uncertain and blank cells, healthy images, token lists. Pure functions on arrays."""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import pandas as pd

from datamodules.errors import DataError

Uncertainty = Literal["ignore", "zeros", "ones", "soft"]
Healthy = Literal["fill", "cherti2022"]

UNCERTAIN = -1.0
"""Value of a cell that the reader of a report could not decide."""

SOFT_TARGET = 0.7
"""Training target of an uncertain cell under `soft`: the mean of U(0.55, 0.85), by which Pham et al. (2021, arXiv
1911.06475) smooth uncertain labels; the mean keeps the stream free of random labels."""


def read_cells(frame: pd.DataFrame, where: str, line: int = 2) -> np.ndarray:
    """Turn label columns of text into float32 (N, L): 1, 0, −1 = uncertain, NaN = blank.

    Args:
        frame: Cells such as "1.0", "-1", "0", "".
        where: File, for messages.
        line: Line of the first row.

    Raises:
        DataError: Any other value, with file, line and column.
    """
    result = np.empty(frame.shape, dtype=np.float32)
    for column, name in enumerate(frame.columns):
        codes, texts = pd.factorize(frame[name])
        cells = [str(text).strip() for text in texts]
        numbers = pd.to_numeric(pd.Series(cells, dtype=object), errors="coerce").to_numpy(dtype=np.float32)
        wrong = [text != "" and number not in (1, 0, UNCERTAIN) for text, number in zip(cells, numbers, strict=True)]
        bad = np.flatnonzero(np.asarray(wrong, dtype=bool)[codes])
        if len(bad):
            raise DataError(
                f"label {texts[codes[bad[0]]]!r} in column {name!r} is out of range ({len(bad)} such rows)",
                where=f"{where}, line {bad[0] + line}",
                valid="1 (present), 0 (absent), -1 (uncertain) or blank (not mentioned)",
            )
        result[:, column] = numbers[codes]
    return result


def fill_healthy(values: np.ndarray, healthy: np.ndarray, rule: Healthy, exempt: Sequence[int] = ()) -> np.ndarray:
    """Use "No Finding" = 1 for the labels of its row.

    Args:
        values: float32 (N, L) of 1, 0, −1 and NaN = blank.
        healthy: bool (N,), rows whose report says "No Finding".
        rule: `fill` turns the blank cells of such a row into 0 and leaves what is explicit. `cherti2022` turns every
            cell into 0, also a true positive (8,808 images of CheXpert with a support device).
        exempt: Columns that `fill` leaves alone, because "No Finding" does not speak of them (support devices).

    Returns:
        float32 (N, L).
    """
    filled = healthy[:, None] & (np.isnan(values) if rule == "fill" else True)
    if rule == "fill":
        filled[:, list(exempt)] = False
    return np.where(filled, np.float32(0), values)


def resolve_uncertain(values: np.ndarray, policy: Uncertainty, training: np.ndarray) -> np.ndarray:
    """Replace uncertain cells: by the policy in training rows, by unknown in all others.

    Evaluation counts only what somebody has decided; so a policy cannot change the labels that results are made with.

    Args:
        values: float32 (N, L) of 1, 0, −1 and NaN.
        policy: `ignore` → NaN, `zeros` → 0, `ones` → 1, `soft` → `SOFT_TARGET`.
        training: bool (N,), rows of the training split.
    """
    target = {"ignore": np.nan, "zeros": 0.0, "ones": 1.0, "soft": SOFT_TARGET}[policy]
    replacement = np.where(training, np.float32(target), np.float32(np.nan))[:, None]
    return np.where(values == UNCERTAIN, replacement, values).astype(np.float32)


def token_matrix(
    token_lists: Sequence[Sequence[str]],
    columns: Mapping[str, Sequence[int]],
    width: int,
    uninformative: frozenset[str],
) -> np.ndarray:
    """Turn lists of tokens into float32 (N, width): 1 where a token stands for the label, else 0.

    A list of nothing but uninformative tokens, or without any, is unknown: all NaN.

    Args:
        token_lists: Tokens of each (distinct) row, without blanks around them.
        columns: Label columns of every known token.
        width: Number of labels.
        uninformative: Tokens that say nothing about findings ("unchanged").

    Raises:
        KeyError: A token that `columns` does not know.
    """
    result = np.zeros((len(token_lists), width), dtype=np.float32)
    for row, tokens in enumerate(token_lists):
        if all(token in uninformative for token in tokens):
            result[row] = np.nan
        for token in tokens:
            result[row, list(columns[token])] = 1.0
    return result


def substring_matrix(cells: Sequence[str], substrings: Mapping[str, Sequence[str]]) -> np.ndarray:
    """Labels by substring search as in paper A: float32 (N, L), 1 where any of a label's substrings is in the cell.

    Args:
        cells: The (distinct) cells of the table, lower case.
        substrings: What each label searches for, in column order.
    """
    found = [[any(part in cell for part in parts) for parts in substrings.values()] for cell in cells]
    return np.asarray(found, dtype=np.float32).reshape(len(cells), len(substrings))
