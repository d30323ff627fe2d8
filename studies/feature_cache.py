"""Files of features: complete or absent, locked while they are written, and removed where a limit is set.

$FARSHOT_CACHE/features/<key>/<group>.npy   float32 (N, D), the pooled features of one layer group
$FARSHOT_CACHE/features/<key>/lock          held by the process that extracts; its end releases it, however it ends.
                                            Its time of change is that of the last use

$FARSHOT_CACHE_GB limits what all features take together; without it nothing is ever removed.
"""

import errno
import fcntl
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from datamodules.atomic import clear_temporaries, replace_file
from datamodules.errors import DataError
from datamodules.shards import cache_folder
from studies import display

LIMIT = "FARSHOT_CACHE_GB"
ELSEWHERE = "let FARSHOT_CACHE name a folder with room"

Batches = Iterator[dict[str, NDArray[np.float32]]]


def folder_of(key: str) -> Path:
    """Where the features of a key are."""
    return cache_folder() / "features" / key


def limit_bytes() -> float:
    """What all features together may take, bytes: $FARSHOT_CACHE_GB in GB; infinite where it is not set.

    Raises:
        DataError: It is no number, or below zero.
    """
    text = os.environ.get(LIMIT, "").strip()
    try:
        limit = float(text) if text else math.inf
    except ValueError:
        limit = math.nan
    if not limit >= 0:
        raise DataError(f"{LIMIT} is {text!r}", where="environment", valid="0 or more GB, such as 50; unset: no limit")
    return limit * 1e9


def read_features(folder: Path, groups: Sequence[str], count: int) -> dict[str, NDArray[np.float32]]:
    """Features by group as far as they are stored: read-only memory maps (count, D), which outlive their files.

    Without those that are not what was written: files are copied and cut short.
    """
    found = {}
    for group in groups:
        with suppress(OSError, ValueError):
            values: NDArray[np.float32] = np.lib.format.open_memmap(folder / f"{group}.npy", mode="r")
            if values.ndim == 2 and len(values) == count and values.dtype == np.float32:
                found[group] = values
    return found


def write_features(folder: Path, groups: Sequence[str], batches: Batches, count: int) -> None:
    """Write batches of features, by group, to files of `count` rows; each is complete when it appears.

    Only where the folder is locked: what killed processes left is deleted.
    """
    paths = [folder / f"{group}.npy" for group in groups]
    for path in paths:
        clear_temporaries(path)
    _replace_files(paths, lambda files: _write(dict(zip(groups, files, strict=True)), batches, count))


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder of the cache for one process; others wait.

    Raises:
        DataError: The folder cannot be written, or what is written inside does not fit.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("wb")
    except OSError as error:
        problem = f"the cache of features cannot be written: {error.strerror}"
        raise DataError(problem, where=str(folder), hint=ELSEWHERE) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            display.say("another process extracts these features; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            problem = f"the features do not fit on the disk: {error.strerror}"
            raise DataError(problem, where=str(folder), hint=f"{ELSEWHERE}, or set {LIMIT}") from error


def mark_used(folder: Path) -> None:
    """Note that features are used now; a cache that cannot be written is no reason to stop."""
    with suppress(OSError):
        os.utime(folder / "lock")


def prune(keep: Path) -> None:
    """Remove features, those first whose last use is longest ago, until the rest is within $FARSHOT_CACHE_GB.

    What another process holds is passed over, and so is the folder `keep`. Locks stay, since a process may wait for
    one; memory maps of removed files stay readable.
    """
    limit = limit_bytes()
    if limit == math.inf:
        return
    folders = {lock.parent: _modified(lock) for lock in keep.parent.glob("*/lock")}
    sizes = {folder: sum(map(_size, _contents(folder))) for folder in folders}
    excess = sum(sizes.values()) - limit
    for folder in sorted(folders, key=folders.__getitem__):
        if excess <= 0:
            break
        if sizes[folder] and folder != keep and _remove(folder):
            excess -= sizes[folder]


def _remove(folder: Path) -> bool:
    """Remove the files of a folder that nobody holds, and say whether it was done."""
    try:
        with (folder / "lock").open("rb+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for path in _contents(folder):
                path.unlink(missing_ok=True)
    except OSError:  # held, or somebody else's
        return False
    return True


def _contents(folder: Path) -> list[Path]:
    """Features, and what killed processes left of them."""
    return [path for path in folder.iterdir() if path.suffix == ".npy"]


def _size(path: Path) -> int:
    with suppress(OSError):  # another process has removed it
        return path.stat().st_size
    return 0


def _modified(path: Path) -> float:
    with suppress(OSError):
        return path.stat().st_mtime
    return time.time()


def _replace_files(
    paths: Sequence[Path], write: Callable[[Sequence[Path]], object], temporaries: Sequence[Path] = ()
) -> None:
    """Let one `write` fill a temporary file for each of `paths`; each is complete when it appears."""
    if len(temporaries) == len(paths):
        write(temporaries)
    else:
        path = paths[len(temporaries)]
        replace_file(path, lambda temporary: _replace_files(paths, write, [*temporaries, temporary]))


def _write(paths: dict[str, Path], batches: Batches, count: int) -> None:
    """Write batches to .npy files of `count` rows.

    Not through a memory map: where the disk is full, writing to one ends the process by a signal.
    """
    with ExitStack() as stack:
        files = {name: stack.enter_context(path.open("wb")) for name, path in paths.items()}
        for batch in batches:
            for name, values in batch.items():
                file = files[name]
                if not file.tell():
                    shape = (count, values.shape[1])
                    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(file, header)
                    if hasattr(os, "posix_fallocate"):  # so that a full disk is noticed now and not after hours
                        os.posix_fallocate(file.fileno(), 0, file.tell() + 4 * count * values.shape[1])
                file.write(values.astype("<f4", copy=False).data)
