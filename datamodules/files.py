"""Which files of a table exist, from one listing of each directory."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd


def check_files(root: Path, paths: Any) -> list[int]:
    """Return the rows whose file is missing, ascending.

    A directory is listed once; a path is a plain set lookup, since releases with a folder for every study have as many
    directories as images.

    Args:
        root: Folder that the paths are relative to.
        paths: Relative paths (N,), strings.
    """
    parents, names = split_parents(paths)
    codes, folders = pd.factorize(parents)
    present = [_listing(root / folder) for folder in folders]
    return [
        row
        for row, (code, name) in enumerate(zip(codes.tolist(), names.tolist(), strict=True))
        if name not in present[code]
    ]


def _listing(folder: Path) -> frozenset[str]:
    try:
        return frozenset(os.listdir(folder))
    except OSError:
        return frozenset()


def split_parents(paths: Any) -> tuple[np.ndarray, "pd.Series[str]"]:
    """Split relative paths into directory and file name, (N,) each."""
    parts = [path.rpartition("/") for path in np.asarray(paths, dtype=object)]
    parents = np.asarray([parent for parent, _, _ in parts], dtype=object)
    return parents, pd.Series([name for _, _, name in parts], dtype=object)
