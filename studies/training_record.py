"""What a run trained on: `training_images.parquet` in its folder, its sources' images included."""

from pathlib import Path

import numpy as np
import pandas as pd

from datamodules.atomic import replace_file
from datamodules.base import BaseDataModule
from datamodules.table import ImageNames
from studies import fingerprint_cache
from studies.fingerprints import hash_rows, image_sources
from studies.runs import RunFolder

RECORD = "training_images.parquet"
HASHES = ["hash0", "hash1", "hash2", "hash3"]
KEY = "file_key"  # of the fingerprint cache, where the thumbnail is
UNKNOWN = "unknown_sources"  # attribute of the record: weights in its history whose images nobody can tell


def write_record(folder: RunFolder, data: BaseDataModule, weights: str | None, *, hashes: bool) -> None:
    """Write what a run is about to train on, with what its source had trained on.

    Args:
        folder: The run's folder.
        data: Its data, set up.
        weights: Where its weights come from: a run folder, a file, a name, or None.
        hashes: Whether images are read to record their perceptual hashes, too; without them only names are compared.
    """
    rows = data.rows("train")
    frame = names_of(data, rows)
    if hashes and data.content_hashed:
        columns = [*hash_rows(data, rows).T, fingerprint_cache.file_keys(image_sources(data, rows))]
        words = {name: pd.array(column, dtype="UInt64") for name, column in zip([*HASHES, KEY], columns, strict=True)}
        frame = frame.assign(**words)
    inherited, unknown = read_history(weights)
    frame = pd.concat([frame, inherited], ignore_index=True)
    frame.attrs = {UNKNOWN: unknown}
    replace_file(folder.path / RECORD, lambda path: frame.to_parquet(path, index=False))


def read_history(weights: str | None) -> tuple[pd.DataFrame, list[str]]:
    """Images behind weights, one row each (dataset, image, group, hashes), and the weights that nobody can tell of."""
    nothing = _typed(pd.DataFrame(columns=ImageNames._fields))
    if weights is None:
        return nothing, []
    path = Path(weights).resolve()
    folder = path.parent.parent if path.parent.name == "checkpoints" else path
    if not (folder / RECORD).is_file():
        return nothing, [folder.name if path.exists() else weights]
    frame = pd.read_parquet(folder / RECORD)
    return frame, list(frame.attrs.get(UNKNOWN, []))


def names_of(data: BaseDataModule, rows: np.ndarray) -> pd.DataFrame:
    """Names of table rows as a record has them, without hashes."""
    return _typed(pd.DataFrame(data.image_names(rows)._asdict()))


def hashes_of(record: pd.DataFrame) -> np.ndarray:
    """Hashes of a record's rows, uint64 (N, 4), 0 where there are none."""
    return np.stack([record[name].to_numpy(dtype=np.uint64, na_value=0) for name in HASHES], axis=1)


def _typed(frame: pd.DataFrame) -> pd.DataFrame:
    blank = pd.Series(pd.NA, index=frame.index, dtype="UInt64")
    return frame.astype("string[pyarrow]").assign(**dict.fromkeys([*HASHES, KEY], blank))
