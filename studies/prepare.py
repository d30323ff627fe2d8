"""Prepare a data set once: decode, shrink, encode, and write tar shards (or one array) with a manifest.

Which image lies in which shard depends on the table alone, so every shard can be made by itself: a run that was killed
at any point makes the missing ones, and the folder is the same, byte for byte, as that of an undisturbed run.
`datamodules.prepared` says what the folder holds and reads it.
"""

import errno
import fcntl
import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import asdict
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from datamodules import prepared, shards
from datamodules.atomic import clear_temporaries, replace_file, write_text
from datamodules.base import BaseDataModule
from datamodules.errors import DataError, UnreadableImageError
from datamodules.hashing import hash_ids
from studies.encoding import Encoded, Encoder, Recipe, Rows, shrink
from studies.prepare_parts import is_finished, make_part, part_path, read_part
from studies.processes import parallel
from studies.runs import code_version

SAMPLE = 64  # images by which the number of images of a shard is judged
TASK_ROWS = 16  # images that a process encodes at a time
UNREADABLE = "unreadable.tsv"

Advance = Callable[[int], None]


class Summary(NamedTuple):
    """What a prepared folder holds; `made` images of it were made by this call, in `seconds`."""

    images: int
    unreadable: int
    before: int
    after: int
    made: int
    seconds: float


def prepare(
    datamodule: BaseDataModule,
    rows: Rows,
    folder: Path,
    recipe: Recipe,
    *,
    workers: int = 1,
    skip_unreadable: bool = False,
    advance: Advance = lambda images: None,
    report: Callable[[str], None] = lambda line: None,
) -> Summary:
    """Prepare images of a data set; finish what an earlier call began.

    Images are known by their paths: one that changes after it was prepared stays there as it was.

    Args:
        datamodule: The data set.
        rows: Its table's rows, as `rows_to_prepare` gives them.
        folder: Where the prepared images go.
        recipe: How they are prepared.
        workers: Processes that decode and encode.
        skip_unreadable: Leave unreadable images out, named in the settings, instead of stopping at the end.
        advance: Called with the number of images that are done.
        report: Called with a line after the first shard, which foretells bytes and time, and after each tenth of all.

    Raises:
        DataError: Missing or unreadable images (listed in `unreadable.tsv`), a folder prepared with other settings, or
            one that another process is writing, that holds other files, or that cannot be written.
    """
    begun = time.monotonic()
    _check_place(datamodule, folder)
    with _locked(folder):
        settings = _settings(datamodule, folder, recipe, rows)
        numbers = range(settings["shards"])
        stretches = [
            rows[number * settings["images_per_shard"] :][: settings["images_per_shard"]] for number in numbers
        ]
        waiting = [number for number in numbers if not is_finished(folder, settings, number, skip_unreadable)]
        advance(len(rows) - sum(len(stretches[number]) for number in waiting))
        if waiting:
            (folder / prepared.MANIFEST).unlink(missing_ok=True)
        for number in waiting:  # the numbers of what is written anew, should this call be killed amid
            part_path(folder, number).unlink(missing_ok=True)
        encoder = Encoder(datamodule, recipe, tuple(settings["shape"]) if settings["shape"] else None)
        made = size = 0
        with closing(_encoded(encoder, [stretches[number] for number in waiting], workers)) as stream:
            for count, number in enumerate(waiting, start=1):
                images = islice(stream, len(stretches[number]))
                part = make_part(folder, settings, number, stretches[number], _counted(images, advance))
                made, size = made + len(stretches[number]), size + sum(part.sizes)
                if count == 1 or count * 10 // len(waiting) > (count - 1) * 10 // len(waiting):
                    left = sum(len(stretches[later]) for later in waiting[count:])
                    rate = made / (time.monotonic() - begun)
                    whole = size / made * len(rows) / 1e9
                    report(
                        f"shard {number + 1} of {len(numbers)}: {rate:.0f} images/s, about {whole:.3g} GB in all and "
                        f"{timedelta(seconds=round(left / rate))} left"
                    )
        before, after, unreadable = _join(datamodule, folder, settings, rows, skip_unreadable=skip_unreadable)
    return Summary(len(rows) - unreadable, unreadable, before, after, made, time.monotonic() - begun)


def rows_to_prepare(datamodule: BaseDataModule) -> Rows:
    """Table rows to prepare, whatever their label and split, since those may change.

    Left out are the set's own exclusions (other views), missing files where it drops them, and paths that come again.

    Raises:
        DataError: Files are missing, or nothing is left.
    """
    if getattr(datamodule, "prepared", None) is not None:
        raise DataError("the images would come from a prepared folder", hint="leave out --data.prepared")
    table = datamodule.read_table()
    used = np.ones(len(table), dtype=bool)
    for excluded in datamodule.exclusions(table).values():
        used &= ~excluded
    rows = np.flatnonzero(used)
    rows = rows[~pd.Series(datamodule.raw_table.paths[rows], copy=False).duplicated().to_numpy(dtype=bool)]
    missing = datamodule.missing_files(table, rows)
    if len(missing) and datamodule.missing_images == "error":
        raise DataError(
            f"{len(missing)} images of {datamodule.name} are missing, the first is {table.paths[missing[0]]}",
            where=f"{table.where(missing[0])}; looked in {datamodule.root}",
            hint="complete the download, or leave these rows out with --data.missing_images drop",
        )
    rows = np.setdiff1d(rows, missing, assume_unique=True)
    if not len(rows):
        raise DataError(f"{datamodule.name} has no images to prepare", where=str(datamodule.root))
    return rows


def verify(folder: Path, *, workers: int = 1, advance: Advance = lambda images: None) -> int:
    """Read every image's bytes again and compare their checksums; returns the number of images.

    Raises:
        DataError: Some differ.
    """
    images = prepared.PreparedImages(folder)

    def damaged(rows: Rows) -> list[int]:
        return [row for row in rows.tolist() if not _reads_well(images, row)]

    bad: list[int] = []
    for found in parallel(damaged, _tasks([np.arange(len(images))]), workers):
        advance(TASK_ROWS)
        bad += found
    if bad:
        named = sorted({images.file(row) for row in bad})
        raise DataError(
            f"{len(bad)} of {len(images)} images differ from what was written, the first is {images.path(bad[0])}",
            where=", ".join(named[:5]) + (", ..." if len(named) > 5 else ""),
            hint="delete these files and run prepare again: what is missing is made anew",
        )
    return len(images)


def _reads_well(images: prepared.PreparedImages, row: int) -> bool:
    try:
        images.read_bytes(row)
    except UnreadableImageError:
        return False
    return True


# The parts -----------------------------------------------------------------------------------------------------------


def _tasks(stretches: list[Rows]) -> Iterator[Rows]:
    for rows in stretches:
        for first in range(0, len(rows), TASK_ROWS):
            yield rows[first : first + TASK_ROWS]


def _encoded(encoder: Encoder, stretches: list[Rows], workers: int) -> Any:
    """Generator of all images in order; processes stay busy across the border of two shards."""
    try:
        for images in parallel(encoder, _tasks(stretches), workers):
            yield from images
    except BrokenProcessPool as error:
        raise DataError(
            "a process that encodes images was killed, perhaps for want of memory",
            where=f"one of {workers} workers",
            hint="give fewer --workers; what is finished is kept",
        ) from error


def _counted(images: Iterator[Encoded], advance: Advance) -> Iterator[Encoded]:
    for image in images:
        yield image
        advance(1)


# The folder ----------------------------------------------------------------------------------------------------------


def _check_place(datamodule: BaseDataModule, folder: Path) -> None:
    """Refuse a folder that is not for prepared images, before anything in it is touched."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(folder)):  # Path has made one slash of s3://
        raise DataError(
            f"{folder} is the address of a store",
            where="--output",
            hint="prepare into a local folder and copy it to the store; --data.prepared then takes its URL",
        )
    if folder.resolve().is_relative_to(datamodule.root.resolve()):
        raise DataError(
            f"{folder} is inside the data set's own folder, and would be read as a part of it",
            where=f"--output; the data set is {datamodule.root}",
            hint="give an --output elsewhere",
        )
    own = [folder / "shards", folder / "parts"]
    inside = [path for place in (folder, *own) if place.is_dir() for path in sorted(place.iterdir())]
    other = [path for path in inside if path not in own and not path.name.startswith(".")]
    if other and not (folder / prepared.SETTINGS).is_file():
        raise DataError(
            f"{folder} holds files, such as {other[0].name}, and no {prepared.SETTINGS} that says what they are",
            where="--output",
            hint="give a new folder, or empty this one",
        )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a prepared folder for one process, and clear what a killed one left half written."""
    try:
        for name in ("shards", "parts"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("wb")
    except OSError as error:
        problem = f"a prepared folder cannot be written: {error.strerror}"
        raise DataError(problem, where=str(error.filename), hint="give another --output") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError("another process prepares this folder", where=str(folder), hint="wait for it") from None
        for name in (prepared.SETTINGS, prepared.MANIFEST, UNREADABLE, "shards/*.tar", "parts/*.parquet"):
            clear_temporaries(folder / name)
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            hint = "make room and run the same command again: what is finished is kept"
            raise DataError(f"the disk is full: {error.strerror}", where=str(folder), hint=hint) from error


def _settings(datamodule: BaseDataModule, folder: Path, recipe: Recipe, rows: Rows) -> dict[str, Any]:
    """The folder's settings, written on the first call, compared on later ones."""
    paths = hash_ids(datamodule.raw_table.paths[rows], "paths")
    window = datamodule.window
    asked: dict[str, Any] = {
        "release": datamodule.release,
        "channels": datamodule.channels,
        "window": list(window) if window is not None else None,
        **asdict(recipe),
        "images": len(rows),
        "paths": hashlib.blake2b(paths.tobytes(), digest_size=16).hexdigest(),
    }
    if (folder / prepared.SETTINGS).is_file():
        there = prepared.read_settings(folder)
        other = [
            f"{key}: {there.get(key)!r} there, {value!r} asked"
            for key, value in asked.items()
            if there.get(key) != value
        ]
        if other:
            raise DataError(
                f"{folder} was prepared with other settings",
                where=str(folder / prepared.SETTINGS),
                valid="; ".join(other),
                hint="give the same settings, or another --output",
            )
        return there
    sample = rows[np.unique(np.linspace(0, len(rows) - 1, SAMPLE).astype(np.int64))]
    shape = _first_shape(datamodule, sample, recipe.short_side) if recipe.raw else None
    if shape is not None:
        mean = float(np.prod(shape))
    else:
        sizes = [len(image.content) for image in Encoder(datamodule, recipe, None)(sample) if image.content]
        mean = (float(np.mean(sizes)) if sizes else 0.0) + shards.BLOCK * 1.5  # the header, and padding
    per_shard = max(1, int(recipe.shard_mb * 1e6 / mean))
    settings = {
        **asked,
        "shape": shape,
        "images_per_shard": per_shard,
        "shards": -(-len(rows) // per_shard),
        "versions": _versions(),
    }
    _write_settings(folder, settings)
    return settings


def _versions() -> dict[str, str]:
    import cv2

    return {"farshot": code_version(), "opencv": cv2.__version__, "numpy": np.__version__}


def _write_settings(folder: Path, settings: dict[str, Any]) -> None:
    write_text(folder / prepared.SETTINGS, json.dumps(settings, indent=1, ensure_ascii=False) + "\n")


def _first_shape(datamodule: BaseDataModule, rows: Rows, short_side: int) -> list[int]:
    """Shape of the first image that can be read."""
    for row in rows.tolist():
        try:
            return list(shrink(datamodule.read_images([row])[0], short_side).shape)
        except UnreadableImageError as error:
            reason = error
    raise reason


def _join(
    datamodule: BaseDataModule, folder: Path, settings: dict[str, Any], rows: Rows, *, skip_unreadable: bool
) -> tuple[int, int, int]:
    """Join the parts to the manifest; returns bytes before, bytes after and the number of unreadable images."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    parts, facts = zip(*(read_part(folder, number) for number in range(settings["shards"])), strict=True)
    table = datamodule.read_table()
    unreadable = [[table.paths[row], reason] for fact in facts for row, reason in fact["unreadable"]]
    _list_unreadable(datamodule, folder, unreadable, len(rows), skip_unreadable=skip_unreadable)
    numbers = pa.concat_tables(parts)
    taken = numbers["row"].to_numpy()
    manifest = {
        "key": pc.utf8_lpad(pc.cast(numbers["row"], pa.string()), 9, "0"),
        **{name: numbers[name] for name in ("shard", "offset", "size")},
        "group": pa.array(table.groups[taken]),
        "split": pa.array(table.split[taken]),
        "path": pa.array(datamodule.raw_table.paths[taken]),
        "checksum": numbers["checksum"],
        "path_hash": pa.array(prepared.hash_paths(datamodule.raw_table.paths[taken])),
    }
    _write_settings(folder, {**settings, "unreadable": unreadable})
    content = pa.table(manifest)
    replace_file(folder / prepared.MANIFEST, lambda path: pq.write_table(content, path, compression="zstd"))
    return sum(fact["before"] for fact in facts), int(numbers["size"].to_numpy().sum(dtype=np.int64)), len(unreadable)


def _list_unreadable(
    datamodule: BaseDataModule, folder: Path, unreadable: list[list[str]], images: int, *, skip_unreadable: bool
) -> None:
    listing = folder / UNREADABLE
    if not unreadable or skip_unreadable:
        listing.unlink(missing_ok=True)
        return
    write_text(listing, "".join(f"{path}\t{reason}\n" for path, reason in unreadable))
    raise DataError(
        f"{len(unreadable)} of {images} images of {datamodule.name} cannot be read, the first is {unreadable[0][0]}",
        where=str(datamodule.root),
        hint=f"the list is in {listing}; restore them and run prepare again, or leave them out with "
        "--skip-unreadable true",
    )
