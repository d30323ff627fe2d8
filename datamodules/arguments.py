"""Checks of the arguments that all data sets share, before anything is read."""

from collections.abc import Mapping
from typing import Any

from datamodules.errors import DataError


def check_arguments(given: Mapping[str, Any]) -> None:
    """Raise a DataError that names the first argument out of range.

    Args:
        given: Values of batch_size, num_workers, image_size, shots, num_images, fraction, val_fraction, test_fraction,
            folds, fold, inner_folds and inner_fold; `BaseDataModule` explains them.
    """
    _check_exclusive(given, ("shots", "num_images", "fraction"))
    shots, folds = given["shots"], given["folds"]
    inner_folds, inner_fold = given["inner_folds"], given["inner_fold"]
    inner = range(inner_folds) if inner_folds is not None else (None,)
    fits: list[tuple[str, bool, str]] = [
        ("batch_size", given["batch_size"] >= 1, "1 or more"),
        ("num_workers", given["num_workers"] >= 0, "0 or more"),
        ("image_size", given["image_size"] >= 8, "8 pixels or more"),
        ("shots", shots in (None, "full") or int(shots) >= 1, '1 or more, or "full"'),
        ("val_fraction", 0 <= given["val_fraction"] < 1, "0 ≤ val_fraction < 1"),
        ("test_fraction", 0 < given["test_fraction"] < 1, "0 < test_fraction < 1"),
        ("folds", folds is None or folds >= 2, "2 or more"),
        ("fold", 0 <= given["fold"] < (folds or 1), f"0 to {(folds or 1) - 1}"),
        ("inner_folds", inner_folds is None or inner_folds >= 2, "2 or more"),
        ("inner_fold", inner_fold in inner, f"0 to {inner_folds - 1}" if inner_folds else "none without inner_folds"),
    ]
    for key, fine, valid in fits:
        if not fine:
            raise DataError(f"{key}: {given[key]} is out of range", where=f"data.init_args.{key}", valid=valid)


def checked_window(window: tuple[float, float]) -> tuple[float, float]:
    """Return a window of intensities (low, high); raise a DataError where it is empty."""
    low, high = window
    if not low < high:
        raise DataError(f"the window ({low}, {high}) is empty", where="data.init_args.window", valid="low < high")
    return low, high


def _check_exclusive(given: Mapping[str, Any], keys: tuple[str, ...]) -> None:
    found = [key for key in keys if given[key] is not None]
    if len(found) > 1:
        raise DataError(f"{' and '.join(found)} exclude each other", where="data.init_args", hint="give one of them")
