"""Which files of a table exist, from one listing of each directory."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd


def check_files(root: Path, paths: Any) -> list[int]:
    """Return the rows whose file is missing.

    Args:
        root: Folder that the paths are relative to.
        paths: Relative paths (N,), strings.
    """
    parents, names = split_parents(paths)
    missing: list[int] = []
    for parent, rows in names.groupby(parents, sort=False):
        try:
            present = {entry.name for entry in os.scandir(root / str(parent))}
        except OSError:
            present = set()
        missing += rows.index[~rows.isin(present)].tolist()
    return sorted(missing)


def split_parents(paths: Any) -> tuple[np.ndarray, "pd.Series[str]"]:
    """Split relative paths into directory and file name, (N,) each."""
    parts = pd.Series(np.asarray(paths, dtype=object), dtype="object").str.rpartition("/")
    return parts[0].to_numpy(), parts[2]
