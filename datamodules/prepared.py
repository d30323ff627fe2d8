"""A folder that `python cli.py prepare` wrote: images by their original path, from tar shards or one uint8 array.

settings.json      what was prepared, and how: release, channels, window, short side, quality, versions, unreadable
manifest.parquet   a row an image: key, shard, offset, size, group, split, path, checksum, path_hash; written last
shards/000000.tar  JPEG files named by their row in the table; or
images.npy         uint8 (N, H, W, C), the whole table, zeros where an image could not be read
parts/             the manifest of each finished shard, by which a stopped run resumes
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datamodules import io, shards
from datamodules.errors import DataError, UnreadableImageError
from datamodules.hashing import arrow_text, hash_ids

MANIFEST, SETTINGS, ARRAY = "manifest.parquet", "settings.json", "images.npy"
_HASH_KEY = "prepared paths"
_AGAIN = "run python cli.py prepare again; what is finished there is kept"
_CONFIRMED = 5  # images that are compared with their originals
_OTHER_PICTURE = 20.0
"""Grey levels (RMS over 16 × 16 thumbnails, median) that only other pictures differ by: 600 radiographs and photos
of CIFAR-10 move by 4 in the median when resized to 40 % or stored at JPEG q30; 99 of 100 neighbours differ by 20."""
_BATCH = 1 << 20  # paths that are looked up at a time


def shard_name(number: int) -> str:
    """Place of a shard in its folder."""
    return f"shards/{number:06d}.tar"


def hash_paths(paths: Any) -> NDArray[np.uint64]:
    """Hash paths (N,) to 64 bits, the same on every platform."""
    return hash_ids(paths, _HASH_KEY)


class PreparedImages:
    """Images of a prepared folder, by the paths that they have in their data set.

    Opening reads the numbers of the manifest, 20 bytes an image, into arrays that forked workers share.

    Args:
        folder: The folder, or its URL (s3://bucket/folder): shards are then copied to the local cache as they are used.

    Raises:
        DataError: The folder is not there, unfinished, or its manifest, settings and shards disagree.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = str(folder)
        self.settings = read_settings(folder)
        self._mode: io.Mode = "grey" if self.settings["channels"] == 1 else "rgb"
        self._manifest = self._manifest_file()
        # One after the other: Arrow's chunks and the array are both in memory while a column is read.
        self._shard, self._offset, self._size, self._checksum = map(
            self._read_column, ("shard", "offset", "size", "checksum")
        )
        shape = self.settings["shape"]
        self._shape = tuple(shape) if shape else None
        files = [shards.join(folder, ARRAY)]
        if self._shape is None:
            files = [shards.join(folder, shard_name(number)) for number in range(self.settings["shards"])]
        self._check_numbers(len(files))
        self._check_files(files)
        self._reader = shards.ShardReader(files)
        _release_unused()

    def __len__(self) -> int:
        return len(self._shard)

    def check(self, release: str, channels: int, window: tuple[float, float] | None) -> None:
        """Raise a DataError where the folder was prepared from another release, or with other channels or window."""
        asked = {"release": release, "channels": channels, "window": list(window) if window is not None else None}
        found = {key: self.settings[key] for key in asked}
        other = [f"{key} {found[key]!r}, not {value!r}" for key, value in asked.items() if found[key] != value]
        if other:
            raise DataError(
                f"the prepared folder has {'; '.join(other)}",
                where=f"{self.folder}/{SETTINGS}",
                hint="prepare this data set, with these settings, into a folder of its own",
            )

    def find(self, paths: Any) -> NDArray[np.int64]:
        """Rows of the manifest that hold these images.

        A table that was prepared whole and is asked for whole is recognised by its order. Otherwise paths are joined by
        64-bit hashes: of 14 million paths two share a hash in one of 200,000 such tables.

        Args:
            paths: Paths (N,) as the data set's table has them, strings.

        Returns:
            int64 (N,), −1 where the folder lacks an image.
        """
        if len(paths) == len(self) and self._has_paths(paths):
            _release_unused()
            return np.arange(len(self))
        hashes = self._read_column("path_hash")
        order = np.argsort(hashes)
        hashes = hashes[order]
        rows = np.full(len(paths), -1, dtype=np.int64)
        for first in range(0, len(paths) if len(self) else 0, _BATCH):
            asked = hash_paths(paths[first : first + _BATCH])
            # Sorted questions walk through memory once; random ones cost 15 times as much.
            turn = np.argsort(asked)
            places = np.minimum(np.searchsorted(hashes, asked[turn]), len(hashes) - 1)
            rows[first + turn] = np.where(hashes[places] == asked[turn], order[places], -1)
        return rows

    def read(self, rows: Sequence[int] | NDArray[np.int64], at_least: int | None = None) -> list[io.Image]:
        """Read images by row of the manifest, uint8 (H, W, C) in RGB order; every checksum is verified.

        Args:
            rows: Rows of the manifest.
            at_least: Pixels that both sides keep where an image may be decoded smaller; see `io.decode_image`.

        Raises:
            DataError: A row is out of range (−1, the answer of `find` for an absent image), or a shard is missing or
                truncated.
            UnreadableImageError: The bytes are not those that were written.
        """
        return [self._read(int(row), at_least) for row in rows]

    def read_bytes(self, row: int) -> bytes:
        """The bytes of one image as they are stored, JPEG or raw, their checksum verified."""
        if not 0 <= row < len(self):
            raise DataError(f"there is no row {row} in the manifest", where=self.folder, valid=f"0 to {len(self) - 1}")
        place = int(self._shard[row]), int(self._offset[row]), int(self._size[row]), int(self._checksum[row])
        try:
            return self._reader.read(*place)
        except UnreadableImageError as error:
            raise UnreadableImageError(f"{error.problem} ({self.path(row)})", where=self.folder) from error

    def file(self, row: int) -> str:
        """The file that holds a row's image."""
        return str(self._reader.files[int(self._shard[row])])

    def path(self, row: int) -> str:
        """The original path of a row, for messages."""
        import pyarrow.parquet as pq

        first = 0
        file = pq.ParquetFile(self._manifest)
        for group in range(file.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            if row < first + count:
                return str(file.read_row_group(group, columns=["path"])["path"][row - first])
            first += count
        raise IndexError(row)

    def _read(self, row: int, at_least: int | None) -> io.Image:
        content = self.read_bytes(row)
        if self._shape is not None:
            return np.frombuffer(content, np.uint8).reshape(self._shape)
        try:
            return io.decode_image(content, mode=self._mode, at_least=at_least)
        except UnreadableImageError as error:
            raise UnreadableImageError(error.problem, where=f"{self.path(row)} in {self.folder}") from error

    def _manifest_file(self) -> Path:
        address = shards.join(self.folder, MANIFEST)
        try:
            path = shards.local_file(address)
            path.stat()
        except (OSError, DataError) as error:
            problem = "a prepared folder has no manifest: it is not finished"
            raise DataError(problem, where=str(address), hint=_AGAIN) from error
        return path

    def _read_column(self, name: str) -> NDArray[Any]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            column: NDArray[Any] = pq.read_table(self._manifest, columns=[name])[name].to_numpy()
        except (pa.ArrowException, OSError, KeyError) as error:
            raise DataError(f"a manifest cannot be read: {error}", where=str(self._manifest), hint=_AGAIN) from error
        return column

    def _check_numbers(self, files: int) -> None:
        most = shards.MAX_BYTES if self._shape is None else int(np.prod(self._shape))
        good = (
            (self._shard >= 0) & (self._shard < files) & (self._offset >= 0) & (self._size > 0) & (self._size <= most)
        )
        if self._shape is not None:
            good &= self._size == most
        if not good.all():
            row = int(np.flatnonzero(~good)[0])
            raise DataError(
                f"a manifest has impossible numbers: shard {self._shard[row]}, offset {self._offset[row]}, "
                f"size {self._size[row]}",
                where=f"{self._manifest}, row {row}",
                valid=f"shards 0 to {files - 1}, offsets from 0, sizes 1 to {most} bytes",
                hint="copy the folder again, or prepare the data set again",
            )

    def _check_files(self, files: Sequence[str | Path]) -> None:
        """Compare the sizes of local shards with what the manifest needs, before training and not in its midst."""
        if shards.is_remote(self.folder):
            return
        ends = np.zeros(len(files), dtype=np.int64)
        np.maximum.at(ends, self._shard, self._offset + self._size)
        for path, end in zip(files, ends.tolist(), strict=True):
            size = Path(path).stat().st_size if Path(path).is_file() else -1
            if size < end:
                raise DataError(
                    "a shard is missing" if size < 0 else f"a shard has {size} bytes, the manifest needs {end}",
                    where=str(path),
                    hint=f"copy it again; or delete it and {_AGAIN}",
                )

    def _has_paths(self, paths: Any) -> bool:
        """Tell whether these are the manifest's paths in its order."""
        import pyarrow as pa
        import pyarrow.compute as pc

        asked, first = pa.chunked_array(arrow_text(paths), pa.large_string()), 0
        for batch in self._path_batches():
            if not pc.all(pc.equal(asked.slice(first, len(batch)), batch.cast(asked.type))).as_py():
                return False
            first += len(batch)
        return True

    def _path_batches(self) -> Any:
        import pyarrow.parquet as pq

        batches = pq.ParquetFile(self._manifest).iter_batches(batch_size=_BATCH, columns=["path"])
        return (batch.column(0) for batch in batches)


def confirm_images(
    images: PreparedImages,
    places: NDArray[np.int64],
    paths: Any,
    read_original: Callable[[Sequence[int]], Sequence[io.Image]],
) -> None:
    """Compare some prepared images with their originals, if these are still there.

    Paths such as `photos/1.jpg` are not proof enough that two sets are one.

    Args:
        images: The prepared folder.
        places: Its rows that hold the table's images, int64 (N,), −1 = none.
        paths: Paths (N,) as the data set's table has them.
        read_original: Rows of the table → their images, uint8 (H, W, C).

    Raises:
        DataError: They are other pictures.
    """
    import cv2

    rows = np.flatnonzero(places >= 0)
    rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), _CONFIRMED)).astype(np.int64)]
    differences = []
    for row in rows.tolist():
        try:
            pair = images.read(places[[row]])[0], read_original([row])[0]
        except UnreadableImageError:  # the originals may have been deleted since
            continue
        small = [cv2.resize(image, (16, 16), interpolation=cv2.INTER_AREA).astype(np.float64) for image in pair]
        differences.append(np.sqrt(np.square(small[0] - small[1]).mean()))
    if differences and np.median(differences) > _OTHER_PICTURE:
        raise DataError(
            f"the prepared folder holds other pictures than the data set, under the same paths: {paths[rows[0]]}, ...",
            where=images.folder,
            hint="it was prepared from another set of the same name, or the images have changed since: prepare this "
            "one into a folder of its own",
        )


def _release_unused() -> None:
    """Give back what Arrow keeps after reading columns; half as much again as the columns themselves."""
    import pyarrow as pa

    pa.default_memory_pool().release_unused()


def read_settings(folder: str | Path) -> dict[str, Any]:
    """Read the settings of a prepared folder, finished or not.

    Raises:
        DataError: They are not there, or damaged.
    """
    address = shards.join(folder, SETTINGS)
    try:
        settings = json.loads(shards.local_file(address).read_text(encoding="utf-8"))
        missing = {"release", "channels", "window", "shape", "shards"} - set(settings)
    except (OSError, DataError) as error:
        problem = "a folder of prepared images has no settings"
        raise DataError(problem, where=str(address), hint="python cli.py prepare DATA --output FOLDER") from error
    except ValueError as error:
        raise DataError(f"settings of a prepared folder are damaged: {error}", where=str(address)) from error
    if missing:
        raise DataError(f"settings of a prepared folder lack {', '.join(sorted(missing))}", where=str(address))
    return dict(settings)
