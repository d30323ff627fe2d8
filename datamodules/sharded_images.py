"""Images that are stretches of large files: an index says where each one lies, and nothing is extracted."""

import glob
import hashlib
import json
import os
import re
from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pandas as pd

from datamodules import io, readers, shards
from datamodules.arguments import checked_window
from datamodules.atomic import replace_file
from datamodules.base import BaseDataModule
from datamodules.errors import DataError
from datamodules.hashing import hash_ids
from datamodules.table import SPLITS, Table, strings

INDEX_FORMAT = 1  # raised when the meaning of a cached index changes


class ShardedImages(BaseDataModule):
    """What sets of shards share: the list of files, the cached index, and images read at their offsets.

    A subclass makes the index: a pyarrow table, a row a sample, with shard (int32), offset and size (int64, bytes) of
    its image, and whatever else it wants to keep.

    Args:
        shards: Files or URLs (s3://bucket/train-0000.tar) in place of all shards below `root`; URLs are copied to the
            local cache.
        mode: rgb, or grey for one channel.
        window: Intensities that become black and white in images deeper than 8 bits.
        dataset_name: Name in results, key of the hashed test split, and default folder in `$FARSHOT_DATA`; default: the
            release's own, or the name of `root`.
        **kwargs: Arguments shared by all data sets.
    """

    patterns: ClassVar[Sequence[str]] = ("**/*.tar",)
    """Which files below `root` are the shards: those of the first pattern that finds any."""
    named_by_folder: ClassVar[bool] = True
    """Whether the set is called as its folder; a release has a name of its own."""

    def __init__(
        self,
        *,
        shards: list[str] | None = None,
        mode: Literal["rgb", "grey"] = "rgb",
        window: tuple[float, float] | None = None,
        dataset_name: str | None = None,
        **kwargs: Any,
    ) -> None:
        if dataset_name is not None:
            self.name = dataset_name
        self.window = checked_window(window) if window is not None else None
        super().__init__(**kwargs)
        if shards is None:
            readers.require_folder(self.root, dataset_name or type(self).__name__)
        if dataset_name is None and self.named_by_folder:
            self.name = self.root.resolve().name
        self.channels = 3 if mode == "rgb" else 1  # type: ignore[misc]
        self.shard_files = list(shards) if shards is not None else self._list_shards()

    def _list_shards(self) -> list[str]:
        for pattern in self.patterns:
            # Unlike rglob, glob follows links to folders; of several ways to one file the shortest counts.
            names = glob.glob(pattern, root_dir=self.root, recursive=True)
            names.sort(key=lambda name: (name.count("/"), name))
            paths = [str(self.root / name) for name in names]
            found = sorted({os.path.realpath(path): path for path in reversed(paths)}.values())
            if found:
                return found
        kinds = " or ".join(Path(pattern).suffix.removeprefix(".") for pattern in self.patterns)
        raise DataError(
            f"no {kinds} shards below {self.root}", where="data.init_args.root", valid="train-0000.tar, ..."
        )

    @property
    def unnamed_releases(self) -> frozenset[str]:
        """This set: its name is that of a folder, or the user's choice."""
        return frozenset({self.release})

    # The index -------------------------------------------------------------------------------------------------------

    @abstractmethod
    def make_index(self) -> Any:
        """Read the shards and return the index, a pyarrow table."""

    @abstractmethod
    def index_key(self) -> list[Any]:
        """What the index depends on beside the shards, as JSON."""

    @cached_property
    def index(self) -> Any:
        """The index, from its cache where the shards are as they were; every column in one piece."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        status = [(file, path.stat()) for file, path in zip(self.shard_files, self.local_files(), strict=True)]
        known = [(file, state.st_size, state.st_mtime_ns) for file, state in status]
        text = json.dumps([INDEX_FORMAT, *self.index_key(), known])
        name = f".index-{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}.parquet"
        places = [self.root / name, shards.cache_folder() / "shards" / name]
        for place in places:
            try:
                return pq.read_table(place).combine_chunks()
            except (pa.ArrowException, OSError):  # not there, or damaged
                continue
        index = self.make_index().combine_chunks()
        place = places[0] if os.access(self.root, os.W_OK) else places[1]
        place.parent.mkdir(parents=True, exist_ok=True)
        replace_file(place, lambda temporary: pq.write_table(index, temporary))
        return index

    def local_files(self) -> list[Path]:
        """Local paths of the shards.

        Raises:
            DataError: One is not there.
        """
        try:
            files = [shards.local_file(file) for file in self.shard_files]
            for file in files:
                file.stat()
        except OSError as error:
            problem = f"a shard cannot be opened: {error.strerror}"
            raise DataError(problem, where=str(error.filename), hint="check data.init_args.shards") from error
        return files

    def shard_name(self, file: str) -> str:
        """What a shard is called in the table: its path below `root`, or its address."""
        path = Path(file)
        return path.relative_to(self.root).as_posix() if path.is_relative_to(self.root) else file

    def indexed_table(self, samples: Any, labels: np.ndarray) -> Table:
        """The table of the index: a row's path is its shard and its sample (Arrow strings (N,)) in it.

        Raises:
            DataError: Two samples of a shard have one name, or shards disagree on whether they name a split.
        """
        import pyarrow as pa
        import pyarrow.compute as pc

        names = [self.shard_name(file) for file in self.shard_files]
        number = whole(self.index["shard"])
        folders = pa.array(names, pa.large_string()).take(number)
        slash = pa.scalar("/", pa.large_string())
        paths = arrow_strings(pc.binary_join_element_wise(folders, samples.cast(pa.large_string()), slash))
        hashes = hash_ids(paths, "samples")
        order = np.argsort(hashes)
        twice = np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]])
        if len(twice):
            raise DataError(
                f"a sample is twice in one shard: {paths[order[twice[0]]]} ({len(twice)} such)", where=str(self.root)
            )
        codes = np.asarray([SPLITS.index(split) for split in split_names(names)], dtype=np.int8)[number.to_numpy()]
        split = pd.Categorical.from_codes(codes, categories=list(SPLITS))  # type: ignore[call-overload]
        return Table(paths, labels, paths, split)

    # Images ----------------------------------------------------------------------------------------------------------

    def image_shards(self) -> Sequence[str | Path]:
        """The files that the index's offsets are in."""
        return self.shard_files

    @cached_property
    def _places(self) -> tuple[shards.ShardReader, list[np.ndarray]]:
        columns = [self.index[name].to_numpy() for name in ("shard", "offset", "size")]
        return shards.ShardReader(self.image_shards()), columns

    def image_bytes(self, row: int) -> bytes:
        """The image's bytes as they are in the shard."""
        reader, (shard, offset, size) = self._places
        return reader.read(int(shard[row]), int(offset[row]), int(size[row]))

    def read_images(self, rows: Sequence[int], at_least: int | None = None) -> Sequence[np.ndarray]:
        """Images by table row, uint8 (H, W, C), through the cache; `at_least` as in `io.decode_image`."""
        return [self._read(int(row), at_least) for row in rows]

    def _read(self, row: int, at_least: int | None) -> np.ndarray:
        mode: io.Mode = "grey" if self.channels == 1 else "rgb"
        name = f"{self.root}/{self.raw_table.paths[row]}"

        def decode(_: str) -> io.Image:
            return io.decode_image(self.image_bytes(row), mode=mode, window=self.window, name=name, at_least=at_least)

        return self.cache.get(f"{mode}:{self.window}:{at_least}:{name}", decode)

    def image_files(self, rows: np.ndarray) -> list[tuple[Path, str] | None]:
        """None: the images are no files of their own."""
        return [None] * len(rows)

    def missing_files(self, table: Table, rows: np.ndarray) -> np.ndarray:
        """None: the index lists what the shards hold."""
        return rows[:0]


def whole(column: Any) -> Any:
    """A column of a pyarrow table as one array, not copied where it is one already."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def arrow_strings(values: Any) -> Any:
    """An Arrow array of large strings as the column that `table.strings` gives, without a Python string a row."""
    import pyarrow as pa

    return strings(pd.arrays.ArrowStringArray(pa.chunked_array([values])))  # type: ignore[attr-defined]


IMAGE_MEMBERS = sorted(extension[1:] for extension in io.IMAGE_EXTENSIONS - io.DICOM_EXTENSIONS)
"""Extensions of the members of a tar shard that are images."""


def sample_numbers(members: Any) -> np.ndarray:
    """Number the samples of `shards.index_shards`' members: int64 (N,), one more where key or shard changes."""
    import pyarrow.compute as pc

    keys, shard = whole(members["key"]), members["shard"].to_numpy()
    if not len(keys):
        return np.zeros(0, dtype=np.int64)
    changes = pc.not_equal(keys[1:], keys[:-1]).to_numpy(zero_copy_only=False) | (np.diff(shard) != 0)
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(changes)])


def image_members(members: Any) -> np.ndarray:
    """Those of `shards.index_shards`' members that are images, int64."""
    import pyarrow as pa
    import pyarrow.compute as pc

    return np.flatnonzero(pc.is_in(members["extension"], value_set=pa.array(IMAGE_MEMBERS)))


def split_names(names: Sequence[str]) -> list[str]:
    """Split of each shard by a word of its name or folder; "" for all where no name has one.

    Raises:
        DataError: Some shards name a split and others do not.
    """

    def split_of(name: str) -> str:
        words = re.split(r"[-_./]", name.lower())
        return next((readers.SPLIT_FOLDERS[word] for word in reversed(words) if word in readers.SPLIT_FOLDERS), "")

    found = [split_of(name) for name in names]
    without = [name for name, split in zip(names, found, strict=True) if not split]
    if without and any(found):
        raise DataError(
            f"shard {without[0]} does not say to which split it belongs, others do ({len(without)} such)",
            valid="train-0000.tar, val-0000.tar, test-0000.tar",
        )
    return found
