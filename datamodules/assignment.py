"""Which split every row of a table belongs to: official where there is one, hashed or folded otherwise."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from datamodules import splits
from datamodules.errors import DataError
from datamodules.hashing import hash_ids
from datamodules.table import SPLITS, Table

FoldBy = Literal["group", "site", "date"]
TRAIN, VALIDATION, TEST = SPLITS.index("train"), SPLITS.index("validation"), SPLITS.index("test")


@dataclass(frozen=True)
class SplitSettings:
    """What a user may choose about splits; `BaseDataModule` explains the arguments of the same names."""

    val_fraction: float = 0.1
    test_fraction: float = 0.15
    seed: int = 0
    folds: int | None = None
    fold: int = 0
    fold_by: FoldBy = "group"


def assign_splits(table: Table, dataset: str, settings: SplitSettings) -> tuple[Table, str]:
    """Give every row its split.

    Official splits stay. Without an official test set, its members are a fixed hash of data set and group, taken from
    train. With folds, one fold is the test set and an official test set takes no part. Validation is carved from train
    by group where there is none.

    Returns:
        (the table with its splits, the policy in words for result rows).

    Raises:
        DataError: Folds that do not suit the table.
    """
    codes = np.array(table.split.codes)
    official = bool(codes.any())
    policy = "official"
    if settings.folds is not None:
        # Which fold it is has a column of its own: rows of the same study differ in nothing else.
        policy = f"{settings.folds} folds by {settings.fold_by}"
        codes = _fold_codes(table, codes, settings)
    elif not (codes == TEST).any():
        policy = "official train and validation, hashed test" if official else "hash"
        codes = np.where(codes, codes, 0 if official else TRAIN).astype(np.int8)
        codes[splits.hash_test(table.groups, dataset, settings.test_fraction) & (codes == TRAIN)] = TEST
    train = np.flatnonzero(codes == TRAIN)
    if settings.val_fraction and len(train) and not (codes == VALIDATION).any():
        labels, share, seed = table.labels[train], settings.val_fraction, settings.seed
        codes[train[splits.train_validation(labels, table.groups, share, seed, train)]] = VALIDATION
    return table.with_split(codes), policy


def assign_by_image(table: Table, settings: SplitSettings, key: str, strata: np.ndarray | None = None) -> Table:
    """Split by image, as paper A does: a patient's images may fall on both sides. For reproduction only.

    Official test images stay. Otherwise the first `test_fraction` of the images of each stratum, in the order of a hash
    of their paths, are the test set, and likewise `val_fraction` of the training images are for validation.

    Args:
        table: Rows with their official splits.
        settings: Fractions and the seed of validation.
        key: Data set's name, key of the hash.
        strata: int64 (N,) such as the site; default: one stratum.
    """
    codes = np.array(table.split.codes)
    strata = np.zeros(len(table), dtype=np.int64) if strata is None else strata
    if not (codes == TEST).any():
        codes[:] = np.where(codes, codes, 0 if codes.any() else TRAIN)
        codes[_first_share(table, codes == TRAIN, strata, settings.test_fraction, f"test by image {key}")] = TEST
    if settings.val_fraction and not (codes == VALIDATION).any():
        validation = f"validation by image {key} {settings.seed}"
        codes[_first_share(table, codes == TRAIN, strata, settings.val_fraction, validation)] = VALIDATION
    return table.with_split(codes)


def _first_share(table: Table, among: np.ndarray, strata: np.ndarray, share: float, key: str) -> np.ndarray:
    """Rows of the first `share` of the images of each stratum, by a hash of their paths."""
    rows = np.flatnonzero(among)
    ranks = splits.rank_within(strata[rows], hash_ids(table.paths[rows], key))
    sizes = np.bincount(strata[rows])
    return np.asarray(rows[ranks < np.rint(sizes * share).astype(np.int64)[strata[rows]]])


def _fold_codes(table: Table, codes: np.ndarray, settings: SplitSettings) -> np.ndarray:
    rows = np.flatnonzero((codes != TEST) & (codes != 0)) if codes.any() else np.arange(len(codes))
    folded = np.zeros(len(codes), dtype=np.int8)
    folded[rows] = np.where(_fold_numbers(table, rows, settings) == settings.fold, TEST, TRAIN)
    return folded


def _fold_numbers(table: Table, rows: np.ndarray, settings: SplitSettings) -> np.ndarray:
    folds, groups = settings.folds or 1, table.groups[rows]
    if settings.fold_by == "group":
        return splits.folds(table.labels[rows], groups, folds, settings.seed)
    if settings.fold_by not in table.metadata:
        raise DataError(
            f"fold_by: {settings.fold_by} needs a column {settings.fold_by}",
            where=str(table.source or "data.init_args.fold_by"),
            valid=["group", *(name for name in ("site", "date") if name in table.metadata)],
        )
    values = np.asarray(table.metadata[settings.fold_by])[rows]
    if settings.fold_by == "date":
        return splits.folds_by_date(values, folds, groups)
    numbers, names = splits.folds_by_value(values)
    if len(names) != folds:
        raise DataError(
            f"folds: {folds} does not match the {len(names)} sites", where="data.init_args.folds", valid=names
        )
    return numbers
