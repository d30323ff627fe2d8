"""Size and quality of a source as pure functions of its table: fewer classes, wrong labels, curation.

Every draw is nested: what is kept at a small setting is kept at a larger one, and a label that is wrong at a rate
of 0.2 is wrong in the same way at 0.4. With `ids` a row's draw is a keyed hash of its id, so that it depends on no
other row; without, it depends on the row's number.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from datamodules.errors import DataError, closest
from datamodules.few_shot import random_keys
from datamodules.hashing import hash_ids
from datamodules.readers import read_frame
from datamodules.splits import BoolArray, Int64Array, UInt64Array, check_seed

Float64Array = npt.NDArray[np.float64]


def kept_classes(labels: Int64Array, count: int, seed: int) -> Int64Array:
    """Draw the classes of a smaller source from those that occur.

    Args:
        labels: int64 (N,), -1 = unlabelled.
        count: How many classes to keep.
        seed: Non-negative; the smaller of two draws of one seed lies inside the larger.

    Returns:
        int64 (count,), class indices in ascending order.

    Raises:
        DataError: `count` is not between 1 and the number of classes that occur, or the seed is negative.
    """
    check_seed(seed, "few_shot_seed")
    present = np.flatnonzero(np.bincount(labels[labels >= 0]))
    if not 1 <= count <= len(present):
        raise DataError(
            f"num_classes_kept is {count}",
            where="num_classes_kept",
            valid=f"1 to {len(present)}, the classes that occur",
        )
    order = np.argsort(hash_ids(present, f"kept classes {seed}"))
    return np.sort(present[order[:count]])


def symmetric_noise(
    labels: npt.NDArray[Any], rate: float, num_classes: int, seed: int, ids: npt.ArrayLike | None = None
) -> npt.NDArray[Any]:
    """Make labels wrong, every wrong label equally likely.

    Multi-class: each labelled row gets, with probability `rate`, one of the other classes. Multi-label: each known
    cell v becomes 1 - v with probability `rate`, independently of the row's other cells. Unlabelled rows (-1) and
    unknown cells (NaN) stay.

    Args:
        labels: int64 (N,), or float (N, L) in [0, 1] or NaN.
        rate: Probability in [0, 1].
        num_classes: C or L.
        seed: Non-negative.
        ids: (N,) id of every row.

    Returns:
        New labels of the same type and shape.

    Raises:
        DataError: A setting, a label or an id is out of range.
    """
    _check_noise(labels, rate, num_classes, seed)
    words = _row_words(len(labels), seed, ids)
    noisy = labels.copy()
    if labels.ndim == 2:
        for label in range(num_classes):
            # SplitMix64 of the row's word gives every label an independent one; hashing ids again costs 20 times more.
            cells = pd.util.hash_array(words ^ random_keys(1, seed, "label noise", label + 1), categorize=False)
            flipped = _flips(cells, rate)
            noisy[flipped, label] = 1 - labels[flipped, label]
        return noisy
    rows = np.flatnonzero(_flips(words, rate) & (labels >= 0))
    if len(rows) and num_classes < 2:
        raise DataError("one class has no wrong label", where="label_noise", valid="at least 2 classes")
    wrong = (_second_half(words[rows]) * (num_classes - 1)).astype(np.int64)
    noisy[rows] = wrong + (wrong >= labels[rows])
    return noisy


def asymmetric_noise(
    labels: Int64Array, rate: float, confusion: Float64Array, seed: int, ids: npt.ArrayLike | None = None
) -> Int64Array:
    """Make labels wrong, each class confused with others as a matrix says.

    The rows that become wrong are those of `symmetric_noise` with the same seed, except in classes that the matrix
    confuses with nothing.

    Args:
        labels: int64 (N,), -1 = unlabelled, which stays.
        rate: Probability in [0, 1] that a label becomes wrong.
        confusion: float (C, C), non-negative: row i weighs the wrong labels of the true class i. The diagonal is
            ignored and the rest of a row normalised; a class whose row is 0 otherwise keeps its labels.
        seed: Non-negative.
        ids: (N,) id of every row.

    Returns:
        int64 (N,), new labels.

    Raises:
        DataError: A setting, a label, an id or the matrix is out of range.
    """
    if confusion.ndim != 2 or confusion.shape[0] != confusion.shape[1]:
        raise DataError(f"the confusion matrix has shape {confusion.shape}", valid="(C, C) for C classes")
    bad = np.argwhere(~(np.isfinite(confusion) & (confusion >= 0)))
    if len(bad):
        row, column = bad[0]
        raise DataError(
            f"the confusion matrix has {confusion[row, column]} at row {row}, column {column}",
            valid="numbers of 0 or more",
        )
    if labels.ndim != 1:
        raise DataError("asymmetric noise is for one class an image", where="label_noise", hint="use symmetric noise")
    _check_noise(labels, rate, len(confusion), seed)
    words = _row_words(len(labels), seed, ids)
    upto = np.cumsum(np.where(np.eye(len(confusion), dtype=np.bool_), 0, confusion), axis=1)
    rows = np.flatnonzero(_flips(words, rate) & (labels >= 0))
    rows = rows[upto[labels[rows], -1] > 0]
    # Row i of the matrix fills [i, i + 1): one search over all of it finds every row's wrong class.
    upto /= np.where(upto[:, -1:] > 0, upto[:, -1:], 1)
    upto += np.arange(len(confusion))[:, None]
    true = labels[rows]
    noisy = labels.copy()
    noisy[rows] = np.searchsorted(upto.ravel(), true + _second_half(words[rows]), side="right") - true * len(confusion)
    return noisy


def curated(scores: npt.NDArray[Any], keep: float) -> BoolArray:
    """Keep the rows of the highest scores.

    Args:
        scores: (N,) numbers; NaN = no score: such a row is never kept.
        keep: Share of all N rows in (0, 1], rounded to whole rows, at least one.

    Returns:
        bool (N,), True = kept; of equal scores the first rows are.

    Raises:
        DataError: `keep` is out of range, or fewer rows have a score.
    """
    if not 0 < keep <= 1:
        raise DataError(f"curation keeps a share of {keep}", where="curation", valid="0 < share <= 1")
    size = min(len(scores), max(1, round(keep * len(scores))))
    scored = np.flatnonzero(~np.isnan(scores))
    if len(scored) < size:
        raise DataError(
            f"curation would keep {size} rows, but only {len(scored)} of {len(scores)} have a score",
            where="curation",
            valid=f"0 < share <= {len(scored) / len(scores):.4f}" if len(scored) else "a column with scores",
        )
    kept = np.zeros(len(scores), dtype=np.bool_)
    if size == 0:
        return kept
    values = scores[scored]
    lowest = np.partition(values, len(values) - size)[len(values) - size]
    above = values > lowest
    ties = np.flatnonzero(values == lowest)[: size - int(above.sum())]
    kept[scored[above]] = True
    kept[scored[ties]] = True
    return kept


def read_confusion(path: Path, class_names: Sequence[str], *, further: bool = False) -> Float64Array:
    """Read a confusion matrix from CSV: class names in the first row and the first column, in any order.

    Args:
        path: The file.
        class_names: Names in index order.
        further: Whether the file may have further classes, which are left out.

    Returns:
        float64 (C, C) in the order of `class_names`: the row is the true class, the column the wrong label.

    Raises:
        DataError: A missing, unknown or repeated class, a cell that is no number of 0 or more, or a class that is
            confused with further classes only; with its line.
    """
    frame = read_frame(path)
    columns, rows = [str(name).strip() for name in frame.columns[1:]], [str(n).strip() for n in frame.iloc[:, 0]]
    _check_names(columns, class_names, [f"{path}, line 1"] * len(columns), f"{path}, line 1", further)
    _check_names(rows, class_names, [f"{path}, line {line}" for line in range(2, len(rows) + 2)], str(path), further)
    cells = frame.iloc[:, 1:]
    matrix = cells.apply(pd.to_numeric, errors="coerce").to_numpy(dtype=np.float64)
    bad = np.argwhere(~(np.isfinite(matrix) & (matrix >= 0)))
    if len(bad):
        row, column = bad[0]
        raise DataError(
            f"the confusion of {rows[row]!r} with {columns[column]!r} is {str(cells.iat[row, column])!r}",
            where=f"{path}, line {row + 2}",
            valid="a number of 0 or more",
        )
    down, across = (pd.Index(names).get_indexer(pd.Index(class_names)) for names in (rows, columns))
    ordered: Float64Array = matrix[np.ix_(down, across)]
    inside = (ordered * (1 - np.eye(len(ordered)))).any(axis=1)
    lost = np.flatnonzero(~inside & np.delete(matrix[down], across, axis=1).any(axis=1))
    if len(lost):
        raise DataError(
            f"class {class_names[lost[0]]!r} is confused only with classes that do not stay ({len(lost)} such classes)",
            where=f"{path}, line {down[lost[0]] + 2}",
            hint="confuse it with a class that stays, keep more classes, or draw them by another seed",
        )
    return ordered


def _check_names(
    names: Sequence[str], class_names: Sequence[str], places: Sequence[str], where: str, further: bool
) -> None:
    seen: set[str] = set()
    known = set(class_names)
    for name, place in zip(names, places, strict=True):
        if name not in known and not further:
            near = closest(name, class_names)
            raise DataError(
                f"unknown class {name!r}" + (f"; did you mean {near!r}?" if near else ""),
                where=place,
                valid=class_names,
            )
        if name in seen:
            raise DataError(f"class {name!r} stands twice", where=place)
        seen.add(name)
    missing = [name for name in class_names if name not in seen]
    if missing:
        raise DataError(
            f"{len(missing)} classes are missing in the confusion matrix, the first is {missing[0]!r}",
            where=where,
            hint="give every class a row and a column; zeros leave its labels as they are",
        )


def _row_words(n: int, seed: int, ids: npt.ArrayLike | None) -> UInt64Array:
    """Draw one random word a row: uint64 (N,)."""
    return random_keys(n, seed, "label noise") if ids is None else hash_ids(ids, f"label noise {seed}")


def _flips(words: UInt64Array, rate: float) -> BoolArray:
    """Decide by the first 32 bits which labels become wrong."""
    return (words >> np.uint64(32)).astype(np.float64) < rate * 2.0**32


def _second_half(words: UInt64Array) -> Float64Array:
    """Turn the last 32 bits, which are independent of the first, into numbers in [0, 1)."""
    return (words & np.uint64(0xFFFFFFFF)).astype(np.float64) * 2.0**-32


def _check_noise(labels: npt.NDArray[Any], rate: float, num_classes: int, seed: int) -> None:
    check_seed(seed, "label_noise seed")
    if not 0 <= rate <= 1:
        raise DataError(f"the rate of label noise is {rate}", where="label_noise", valid="0 <= rate <= 1")
    if labels.ndim == 2:
        if labels.shape[1] != num_classes:
            raise DataError(f"labels have {labels.shape[1]} columns", valid=f"{num_classes}, one a label")
        outside = np.flatnonzero(((labels < 0) | (labels > 1)).any(axis=1))
        valid = "0 to 1, or NaN"
    else:
        outside = np.flatnonzero((labels < -1) | (labels >= num_classes))
        valid = f"-1 to {num_classes - 1}"
    if len(outside):
        raise DataError(f"the label {labels[outside[0]]} is out of range", where=f"row {outside[0]}", valid=valid)
