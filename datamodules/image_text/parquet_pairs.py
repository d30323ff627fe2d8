"""The pairs of one Parquet file that holds the images themselves, as Hugging Face distributes them.

Parquet has no cheap access by row: a row group is read as a whole. So the images are copied once, a few rows at a time,
to a tar shard in the cache folder, where each is read at its offset as in any other shard.
"""

import fcntl
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from datamodules import shards
from datamodules.atomic import clear_temporaries, replace_file
from datamodules.errors import DataError
from datamodules.image_text import pairs
from datamodules.image_text.pairs import Shard, Wanted
from datamodules.sharded_images import whole

IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img", "image_bytes")
ROWS = 32
"""Rows in memory at a time while images are copied."""
FORMAT = 1  # raised when the copy's meaning changes


def index_parquet(file: str, wanted: Wanted) -> Shard:
    """List the pairs of a Parquet file; copies its images to the cache.

    Raises:
        DataError: The file is damaged or holds no images, or a score is no number.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = shards.local_file(file)
    schema, image = _schema(path), image_column(path)
    present = [name for name in wanted.fields() if name in schema.names and name != image]
    try:
        table = pq.read_table(path, columns=present)
        count = pq.read_metadata(path).num_rows
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, error) from error
    columns = {name: whole(table[name]) for name in present}
    captions, lacking = [], []
    for name in wanted.captions:
        found = next((columns[one] for one in pairs.caption_fields(name) if one in columns), None)
        lacking += [name] if found is None else []
        captions.append(pairs.clean(pa.nulls(count) if found is None else found))
    lacking += [wanted.score] if wanted.score and wanted.score not in columns else []
    members = shards.index_shards([copied_images(path)])
    rows = members["key"].cast(pa.int64()).to_numpy()
    offsets, sizes = np.zeros(count, dtype=np.int64), np.zeros(count, dtype=np.int64)
    offsets[rows], sizes[rows] = members["offset"].to_numpy(), members["size"].to_numpy()
    samples = pairs.pair_table(
        pa.array(np.arange(count)).cast(pa.string()),
        offsets,
        sizes,
        captions,
        status=columns.get("status"),
        sha256=columns.get("sha256"),
        scores=pairs.read_scores(columns.get(wanted.score), count, file) if wanted.score else None,
    )
    return Shard(samples, tuple(name for name in schema.names if name != image), tuple(lacking))


def image_column(path: Path) -> str:
    """The column with the images' bytes: binary, or a struct with a field `bytes`.

    Raises:
        DataError: There is none, or there are several of which none is called like an image.
    """
    import pyarrow as pa

    schema = _schema(path)

    def holds_bytes(kind: Any) -> bool:
        if pa.types.is_struct(kind):
            return "bytes" in [kind.field(place).name for place in range(kind.num_fields)]
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    found = [field.name for field in schema if holds_bytes(field.type)]
    named = [name for name in IMAGE_COLUMNS if name in found]
    if not named and len(found) != 1:
        problem = f"{len(found)} columns hold bytes" if found else "no column holds images"
        raise DataError(
            f"{problem} in a Parquet file",
            where=str(path),
            valid=f"a binary column, or a struct with bytes, called {' or '.join(IMAGE_COLUMNS[:2])}; it has "
            + ", ".join(schema.names[:10]),
            hint="a list of URLs: fetch the images by img2dataset --output_format webdataset" if not found else None,
        )
    return (named or found)[0]


def copied_images(path: Path) -> Path:
    """The tar shard with a Parquet file's images, written if it is not there; members are called by their rows.

    It appears in one step. Of several processes one writes and the others wait.
    """
    import pyarrow as pa

    state = path.stat()
    text = f"{FORMAT} {path.resolve()} {state.st_size} {state.st_mtime_ns}"
    folder = shards.cache_folder() / "parquet"
    copy = folder / f"{hashlib.blake2b(text.encode(), digest_size=16).hexdigest()}.tar"
    if copy.is_file():
        return copy
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(copy.with_suffix(".lock"), "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not copy.is_file():
                clear_temporaries(copy)
                replace_file(copy, lambda temporary: shards.write_shard(temporary, _images(path)))
    except pa.ArrowException as error:
        raise _unreadable(path, error) from error
    except OSError as error:
        raise DataError(
            f"the images of a Parquet file cannot be copied: {error}",
            where=f"{path} to {folder}",
            hint="FARSHOT_CACHE names a folder with room for them",
        ) from error
    return copy


def _images(path: Path) -> Iterator[tuple[str, bytes]]:
    """Members of the tar shard: rows without an image are left out."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    column, row = image_column(path), 0
    # Through a buffer two pages are in memory (pyarrow writes 1,024 rows in one), never a whole row group.
    with pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
        for batch in file.iter_batches(batch_size=ROWS, columns=[column], use_threads=False):
            images = batch.column(0)
            for image in pc.struct_field(images, "bytes") if pa.types.is_struct(images.type) else images:
                if content := image.as_py():
                    yield f"{row:09d}.image", content
                row += 1


def _schema(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_schema(path)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(f"a Parquet file cannot be read: {error}", where=str(path), hint="download it again")
