"""Has the source of the weights trained on the target's test images? What a run saw is recorded and checked.

A run writes `training_images.parquet`: the data set, id, patient and perceptual hash of every image that it trained on,
its sources' images included. Before a transfer that record is compared with the target's test set: names and patients
where both come from one release, file names and images' content across releases.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from datamodules.base import BaseDataModule
from datamodules.errors import DataError, shorten
from datamodules.table import ImageNames
from studies.atomic import replace_file
from studies.fingerprints import hash_rows
from studies.near_duplicates import STRICT_BITS, hamming, hamming_matches
from studies.overlap import distinctive_names
from studies.runs import RunFolder

RECORD = "training_images.parquet"
HASHES = ["hash0", "hash1", "hash2", "hash3"]
TWIN_BITS = 64
"""Bits of 256 in which two images of one file name may differ and still be one. Of 300 NIH radiographs 90 % differ
from their own centre crop (2 % off each side) in 60 at most; of pairs of different ones 1 ‰ in fewer than 86."""
UNKNOWN = "unknown_sources"  # attribute of the record: weights in its history whose images nobody can tell


@dataclass(frozen=True)
class Overlap:
    """Test images that the source of the weights has seen.

    Attributes:
        by: Rows of `tested` found by each means: id, patient, file name, image content.
        tested: Number of test images.
        unchecked: Weights of the history that cannot be checked.
        examples: Ids of the first few.
    """

    by: dict[str, int] = field(default_factory=dict)
    tested: int = 0
    unchecked: Sequence[str] = ()
    examples: Sequence[str] = ()

    def describe(self) -> str:
        """The finding in words, for result rows."""
        found = [f"{count} by {means}" for means, count in self.by.items() if count]
        parts = [f"LEAK: the source has seen test images ({', '.join(found)}, of {self.tested})"] if found else []
        if self.unchecked:
            parts.append(f"source cannot be checked ({shorten(self.unchecked, 3)})")
        return "; ".join(parts) or "source checked"


def record_training_images(folder: RunFolder, data: BaseDataModule, weights: str | None, *, hashes: bool) -> None:
    """Write what a run is about to train on, with what its source had trained on.

    Args:
        folder: The run's folder.
        data: Its data, set up.
        weights: Where its weights come from: a run folder, a file, a name, or None.
        hashes: Whether images are read to record their perceptual hashes, too; without them only names are compared.
    """
    rows = data.rows("train")
    frame = _names(data, rows)
    if hashes and data.content_hashed:
        words = hash_rows(data, rows).T
        frame = frame.assign(**{name: pd.array(word, dtype="UInt64") for name, word in zip(HASHES, words, strict=True)})
    inherited, unknown = _read_history(weights)
    frame = pd.concat([frame, inherited], ignore_index=True)
    frame.attrs = {UNKNOWN: unknown}
    replace_file(folder.path / RECORD, lambda path: frame.to_parquet(path, index=False))


def check_source(weights: str | None, data: BaseDataModule) -> Overlap | None:
    """Compare the training images behind `weights` with the test images of `data`; None without weights."""
    if weights is None:
        return None
    seen, unknown = _read_history(weights)
    test = _names(data, data.rows("test"))
    found = {
        "id": _in(test, seen, ["dataset", "image"]),
        "patient": _in(test, seen, ["dataset", "group"]),
        "file name": np.zeros(len(test), dtype=bool),
        "image content": np.zeros(len(test), dtype=bool),
    }
    others = seen[~seen["dataset"].isin(test["dataset"].unique())]
    if len(others) and len(test):
        named, twins = same_file_names(test["image"], others["image"])
        known = np.stack([others[name].to_numpy(dtype=np.uint64, na_value=0) for name in HASHES], axis=1)
        if data.content_hashed and known.any():
            hashes = hash_rows(data, data.rows("test"))
            found["image content"][hamming_matches(hashes, known, STRICT_BITS)[0]] = True
            both = hashes[named].any(axis=1) & known[twins].any(axis=1)
            # Equal names of unlike images mean that both sets merely count from 1.
            named = named[~both | (hamming(hashes[named], known[twins]) <= TWIN_BITS)]
        found["file name"][named] = True
    any_of = np.logical_or.reduce(list(found.values()))
    return Overlap(
        by={means: int(rows.sum()) for means, rows in found.items()},
        tested=len(test),
        unchecked=unknown,
        examples=test["image"][any_of].head(3).tolist(),
    )


def guard(weights: str | None, data: BaseDataModule) -> str:
    """Check a transfer and say what was found, for the result rows' column `guard`.

    Raises:
        DataError: The source has seen test images, unless `leaks: record` lets the run go on with marked rows.
    """
    overlap = check_source(weights, data)
    if overlap is not None and overlap.examples and data.leaks == "stop":
        found = ", ".join(f"{count} by {means}" for means, count in overlap.by.items() if count)
        raise DataError(
            f"the source of the weights was trained on test images of {data.name}: {found}, of {overlap.tested}; "
            f"such as {shorten(list(overlap.examples))}",
            where=f"{weights} ({RECORD})",
            hint="choose weights that have not seen them, or go on with marked rows: --data.leaks record",
        )
    groups = data.group_leak or "patients disjoint"
    return groups if overlap is None else f"{groups}; {overlap.describe()}"


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


def _names(data: BaseDataModule, rows: np.ndarray) -> pd.DataFrame:
    return _typed(pd.DataFrame(data.image_names(rows)._asdict()))


def _typed(frame: pd.DataFrame) -> pd.DataFrame:
    """A record with text names and no hashes yet."""
    blank = pd.Series(pd.NA, index=frame.index, dtype="UInt64")
    return frame.astype("string[pyarrow]").assign(**dict.fromkeys(HASHES, blank))


def _in(test: pd.DataFrame, seen: pd.DataFrame, columns: list[str]) -> np.ndarray:
    keys = pd.MultiIndex.from_frame(test[columns].astype(object))
    return np.asarray(keys.isin(pd.MultiIndex.from_frame(seen[columns].astype(object).drop_duplicates())))


def _read_history(weights: str | None) -> tuple[pd.DataFrame, list[str]]:
    """Images behind weights, and the weights in their history that nobody can check."""
    nothing = _typed(pd.DataFrame(columns=ImageNames._fields))
    if weights is None:
        return nothing, []
    path = Path(weights)
    folder = path.parent.parent if path.parent.name == "checkpoints" else path
    if not (folder / RECORD).is_file():
        return nothing, [folder.name if path.exists() else weights]
    frame = pd.read_parquet(folder / RECORD)
    return frame, list(frame.attrs.get(UNKNOWN, []))
