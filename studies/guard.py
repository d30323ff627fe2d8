"""Has the source of the weights trained on the target's test images? What a run saw is compared before a transfer.

Within one release ids and patients are compared; across releases distinctive file names and the images themselves.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from datamodules.base import BaseDataModule
from datamodules.errors import DataError, shorten
from studies.fingerprint_cache import look_up
from studies.fingerprints import fingerprint_rows, hash_rows, stored_thumbnail
from studies.near_duplicates import STRICT_BITS, hamming, hamming_matches
from studies.overlap import distinctive_names
from studies.training_record import KEY, RECORD, hashes_of, names_of, read_history

TWIN_BITS = 64
"""Bits of 256 in which two images of one file name may differ and still be one. Of 300 NIH radiographs 90 % differ
from their own centre crop (2 % off each side) in 60 at most; of pairs of different ones 1 ‰ in fewer than 86."""
SAME_RMS = 5.0
"""Grey levels (RMS over 32×32 thumbnails) by which copies may differ. Of 400 NIH radiographs and 500 CIFAR photos
resized to a half or re-compressed (JPEG q30) none moves more than 3.2; different radiographs differ by 15 or more, and
simulated micrographs of single cells, which have one hash, by 5.9."""
CONFIRM = 32  # images looked at to tell whether two sets of one user-given name are one


@dataclass(frozen=True)
class Overlap:
    """Test images that the source of the weights has seen.

    Attributes:
        by: Number of test images found by each means: id, patient, file name, image content.
        tested: Number of test images.
        unchecked: Weights of the history that cannot be checked.
        examples: Ids of the first few.
    """

    by: dict[str, int] = field(default_factory=dict)
    tested: int = 0
    unchecked: Sequence[str] = ()
    examples: Sequence[str] = ()

    @property
    def found(self) -> str:
        """What was found, in words; "" for nothing."""
        return ", ".join(f"{count} by {means}" for means, count in self.by.items() if count)

    def describe(self) -> str:
        """The finding for result rows."""
        parts = [f"LEAK: the source has seen test images ({self.found}, of {self.tested})"] if self.found else []
        if self.unchecked:
            parts.append(f"source cannot be checked ({shorten(self.unchecked, 3)})")
        return "; ".join(parts) or "source checked"


def guard(weights: str | None, data: BaseDataModule) -> str:
    """Check a transfer and say what was found, for the result rows' column `guard`.

    Raises:
        DataError: The source has seen test images, unless `leaks: record` lets the run go on with marked rows.
    """
    overlap = check_source(weights, data)
    if overlap is not None and overlap.found and data.leaks == "stop":
        raise DataError(
            f"the source of the weights was trained on test images of {data.name}: {overlap.found}, of "
            f"{overlap.tested}; such as {shorten(list(overlap.examples))}",
            where=f"{weights} ({RECORD})",
            hint="choose weights that have not seen them, or go on with marked rows: --data.leaks record",
        )
    groups = data.group_leak or "patients disjoint"
    return groups if overlap is None else f"{groups}; {overlap.describe()}"


def check_source(weights: str | None, data: BaseDataModule) -> Overlap | None:
    """Compare the training images behind `weights` with the test images of `data`; None without weights."""
    if weights is None:
        return None
    seen, unknown = read_history(weights)
    rows = data.rows("test")
    test = names_of(data, rows)
    found = {means: np.zeros(len(rows), dtype=bool) for means in ("id", "patient", "file name", "image content")}
    for release in test["dataset"].unique():
        places = np.flatnonzero(test["dataset"] == release)
        mine, others = seen[seen["dataset"] == release], seen[seen["dataset"] != release]
        if len(mine) and release in data.unnamed_releases and not _is_one_set(data, release, mine):
            mine, others = mine[:0], seen  # another set of the same name: ids and patients mean nothing
        part = test.iloc[places]
        found["id"][places] = part["image"].isin(mine["image"])
        found["patient"][places] = part["group"].isin(mine["group"])
        found["file name"][places], found["image content"][places] = _across_releases(data, rows[places], part, others)
    any_of = np.logical_or.reduce(list(found.values()))
    return Overlap(
        by={means: int(hits.sum()) for means, hits in found.items()},
        tested=len(rows),
        unchecked=unknown,
        examples=test["image"][any_of].head(3).tolist(),
    )


def _across_releases(
    data: BaseDataModule, rows: np.ndarray, test: pd.DataFrame, others: pd.DataFrame
) -> tuple[np.ndarray, np.ndarray]:
    """Test images that other releases have by a distinctive file name, and by their content, bool (N,) each."""
    by_name, by_content = np.zeros(len(rows), dtype=bool), np.zeros(len(rows), dtype=bool)
    named, twins = same_file_names(test["image"], others["image"])
    known = hashes_of(others)
    if data.content_hashed and known.any():
        hashes = hash_rows(data, rows)
        mine, theirs, _ = hamming_matches(hashes, known, STRICT_BITS)
        by_content[mine[_same_pictures(data, rows[mine], others.iloc[theirs])]] = True
        both = hashes[named].any(axis=1) & known[twins].any(axis=1)
        # Equal names of unlike images mean that both sets merely count from 1.
        named = named[~both | (hamming(hashes[named], known[twins]) <= TWIN_BITS)]
    by_name[named] = True
    return by_name, by_content


def _same_pictures(data: BaseDataModule, rows: np.ndarray, seen: pd.DataFrame) -> np.ndarray:
    """Which pairs of close hashes are one picture, bool (K,), by their thumbnails; a lost thumbnail is no excuse."""
    if not len(rows):
        return np.zeros(0, dtype=bool)
    distinct, place = np.unique(rows, return_inverse=True)
    mine = fingerprint_rows(data, distinct).thumbnails[place]
    stored = look_up(seen[KEY].to_numpy(dtype=np.uint64, na_value=0), "thumbnails")
    same = np.ones(len(rows), dtype=bool)
    for pair, key in enumerate(seen[KEY].tolist()):
        thumbnail = stored_thumbnail(stored[key]) if key in stored else None
        if thumbnail is not None:
            difference = mine[pair].astype(np.float64) - thumbnail
            same[pair] = np.sqrt((difference**2).mean()) <= SAME_RMS
    return same


def _is_one_set(data: BaseDataModule, release: str, seen: pd.DataFrame) -> bool:
    """Whether a set with a name of the user's own is the recorded one of that name: its images of equal ids are equal.

    Without an id in common they are two sets; without hashes the name has to do.
    """
    names = names_of(data, np.arange(len(data.raw_table)))
    place = pd.Index(seen["image"]).get_indexer(pd.Index(names["image"]))
    both = np.flatnonzero((place >= 0) & (names["dataset"] == release).to_numpy())[:CONFIRM]
    recorded = hashes_of(seen.iloc[place[both]])
    if not len(both) or not data.content_hashed or not recorded.any():
        return bool(len(both))
    looked = both[~np.isin(both, data.missing_files(data.raw_table, both))]
    return not len(looked) or bool(
        np.median(hamming(hash_rows(data, looked), hashes_of(seen.iloc[place[looked]]))) <= TWIN_BITS
    )


def same_file_names(test: "pd.Series[str]", seen: "pd.Series[str]") -> tuple[np.ndarray, np.ndarray]:
    """Pairs of images of two releases with one file name that is no coincidence; see `overlap.distinctive_names`.

    Returns:
        Places in `test` and in `seen`, int64 (K,) each.
    """
    names, others = distinctive_names(test.to_numpy(dtype=object)), distinctive_names(seen.to_numpy(dtype=object))
    named = np.flatnonzero(others != "")
    twins = pd.Index(others[named]).get_indexer(pd.Index(names))
    found = np.flatnonzero((twins >= 0) & (names != ""))
    return found, named[twins[found]]
