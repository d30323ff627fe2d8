"""The parts of a prepared folder: one shard, or a stretch of the array, and the file that says it is finished."""

import json
import os
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from datamodules import prepared, shards
from datamodules.atomic import replace_file
from studies.encoding import Encoded, Rows

FACTS = b"farshot"  # key of a part's own facts in its Parquet schema


class Part(NamedTuple):
    """One shard's images: table rows, and where each is in its file; the unreadable ones, and why."""

    rows: list[int]
    offsets: list[int]
    sizes: list[int]
    checksums: list[int]
    unreadable: list[tuple[int, str]]
    before: int


def make_part(folder: Path, settings: dict[str, Any], number: int, rows: Rows, images: Iterator[Encoded]) -> Part:
    """Write one shard, or its stretch of the array, and then the part's file, which says that it is finished.

    Args:
        folder: The prepared folder.
        settings: Its settings.
        number: The shard's number.
        rows: Table rows that belong to it.
        images: The same rows encoded.
    """
    part = Part([], [], [], [], [], 0)
    before = 0

    def readable() -> Iterator[tuple[str, bytes]]:
        nonlocal before
        for row, image in zip(rows.tolist(), images, strict=True):
            before += image.before
            if image.content:
                part.rows.append(row)
                part.sizes.append(len(image.content))
                part.checksums.append(shards.checksum(image.content))
                yield f"{row:09d}.jpg", image.content
            else:
                part.unreadable.append((row, image.reason))

    if settings["shape"] is None:
        path = folder / prepared.shard_name(number)
        offsets: list[int] = []
        replace_file(path, lambda temporary: offsets.extend(shards.write_shard(temporary, readable()).tolist()))
    else:
        offsets = _write_stretch(folder, settings, number, rows, readable())
    part = part._replace(offsets=offsets, before=before)
    _write_part(folder, number, part, shard=number if settings["shape"] is None else 0)  # the array is one file
    return part


def _write_stretch(
    folder: Path, settings: dict[str, Any], number: int, rows: Rows, images: Iterator[tuple[str, bytes]]
) -> list[int]:
    """Write a stretch of the array in place, an unreadable image as zeros. Returns the offsets."""
    header, item = _array_header(settings), int(np.prod(settings["shape"]))
    path = folder / prepared.ARRAY
    start = len(header) + number * settings["images_per_shard"] * item
    offsets = []
    with path.open("r+b" if path.exists() else "w+b") as file:
        file.write(header)
        file.truncate(len(header) + settings["images"] * item)
        places = {f"{row:09d}.jpg": start + place * item for place, row in enumerate(rows.tolist())}
        file.seek(start)
        for name, content in images:
            file.write(bytes(places[name] - file.tell()))  # an earlier call may have written something else here
            file.write(content)
            offsets.append(places[name])
        file.write(bytes(start + len(rows) * item - file.tell()))
        file.flush()
        os.fsync(file.fileno())
    return offsets


def _array_header(settings: dict[str, Any]) -> bytes:
    header = BytesIO()
    shape = (settings["images"], *settings["shape"])
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return header.getvalue()


def part_path(folder: Path, number: int) -> Path:
    """Place of a part's numbers."""
    return folder / "parts" / f"{number:06d}.parquet"


def _write_part(folder: Path, number: int, part: Part, *, shard: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    facts = json.dumps({"before": part.before, "unreadable": part.unreadable})
    columns = {
        "row": pa.array(part.rows, pa.int64()),
        "shard": pa.array(np.full(len(part.rows), shard), pa.int32()),
        "offset": pa.array(part.offsets, pa.int64()),
        "size": pa.array(part.sizes, pa.int32()),
        "checksum": pa.array(part.checksums, pa.uint32()),
    }
    table = pa.table(columns).replace_schema_metadata({FACTS: facts})
    replace_file(part_path(folder, number), lambda temporary: pq.write_table(table, temporary, compression="zstd"))


def is_finished(folder: Path, settings: dict[str, Any], number: int, skip_unreadable: bool) -> bool:
    """Tell whether a part and all its bytes are there; one that lacks images counts only where that is accepted."""
    import pyarrow as pa

    content = folder / (prepared.shard_name(number) if settings["shape"] is None else prepared.ARRAY)
    try:
        numbers, facts = read_part(folder, number)
        size = content.stat().st_size
    except (pa.ArrowException, OSError):  # not there, or damaged
        return False
    end = (numbers["offset"].to_numpy() + numbers["size"].to_numpy()).max(initial=0)
    return bool(size >= end) and (skip_unreadable or not facts["unreadable"])


def read_part(folder: Path, number: int) -> tuple[Any, dict[str, Any]]:
    """Numbers of a part (a pyarrow table: row, shard, offset, size, checksum) and its facts: before, unreadable."""
    import pyarrow.parquet as pq

    table = pq.read_table(part_path(folder, number))
    return table.replace_schema_metadata(), json.loads(table.schema.metadata[FACTS])
