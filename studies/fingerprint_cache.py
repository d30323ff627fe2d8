"""Fingerprints on disk between commands: an SQLite file that any number of processes may use at once."""

import hashlib
import os
import sqlite3
import warnings
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from datamodules.shards import cache_folder

Keys = NDArray[np.uint64]

FORMAT = 2  # raised when a fingerprint's meaning changes
CHUNK = 900  # keys of one query; SQLite takes 999 variables at least
WAIT_S = 30.0  # for another process's write


def cache_file() -> Path:
    """The cache of all data sets: a file has one fingerprint, whichever set it is read through."""
    return cache_folder() / f"fingerprints-v{FORMAT}.sqlite"


def file_keys(files: Sequence[tuple[Path, str] | None]) -> Keys:
    """Key of each file as it is now (path, size, time of change) and how it is decoded; 0 where there is no file.

    Args:
        files: (N,) file and decoding; None for an image that is no file of its own.

    Returns:
        uint64 (N,).
    """
    keys = np.zeros(len(files), np.uint64)
    for position, entry in enumerate(files):
        if entry is None:
            continue
        path, decoding = entry
        try:
            status = os.stat(path)
        except OSError:
            continue
        text = f"{os.path.abspath(path)}|{decoding}|{status.st_size}|{status.st_mtime_ns}".encode()
        keys[position] = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
    return keys


def look_up(keys: Keys, column: str) -> dict[int, bytes]:
    """One column (hash or thumbnails) of the keys that the cache has; nothing, with a warning, from a damaged file."""
    wanted = [_signed(key) for key in keys.tolist() if key]
    found: dict[int, bytes] = {}
    if not wanted or not cache_file().is_file():
        return found
    try:
        with closing(_connect()) as database:
            for start in range(0, len(wanted), CHUNK):
                part = wanted[start : start + CHUNK]
                marks = ",".join("?" * len(part))
                rows = database.execute(f"SELECT key, {column} FROM fingerprints WHERE key IN ({marks})", part)
                found |= {key & 0xFFFFFFFFFFFFFFFF: value for key, value in rows}
    except sqlite3.OperationalError:  # busy, or another process is about to make the table
        return found
    except sqlite3.Error as error:
        _start_anew(error)
        return {}
    return found


def add(keys: Keys, hashes: Sequence[bytes], thumbnails: Sequence[bytes]) -> None:
    """Store fingerprints under their keys, but for the key 0; where nothing can be written, go on without."""
    rows = [
        (_signed(key), *values)
        for key, values in zip(keys.tolist(), zip(hashes, thumbnails, strict=True), strict=True)
        if key
    ]
    if not rows:
        return
    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
        with closing(_connect()) as database, database:
            database.execute(
                "CREATE TABLE IF NOT EXISTS fingerprints (key INTEGER PRIMARY KEY, hash BLOB, thumbnails BLOB)"
            )
            database.executemany("INSERT OR REPLACE INTO fingerprints VALUES (?, ?, ?)", rows)
    except (OSError, sqlite3.OperationalError) as error:
        warnings.warn(f"the cache {cache_file()} cannot be written: {error}", stacklevel=2)
    except sqlite3.Error as error:
        _start_anew(error)


def _connect() -> sqlite3.Connection:
    return sqlite3.connect(cache_file(), timeout=WAIT_S)


def _signed(key: int) -> int:
    """SQLite's integers are signed."""
    return key - (1 << 64) if key >= 1 << 63 else key


def _start_anew(error: sqlite3.Error) -> None:
    warnings.warn(f"the cache {cache_file()} is damaged and is made anew: {error}", stacklevel=3)
    with suppress(OSError):
        cache_file().unlink()
