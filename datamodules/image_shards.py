"""Tar shards as a data set: WebDataset archives of images and labels, read by random access."""

import glob
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from datamodules import io, readers, shards
from datamodules.arguments import checked_window
from datamodules.atomic import replace_file
from datamodules.base import BaseDataModule
from datamodules.errors import DataError, closest
from datamodules.table import Table, split_column, strings

INDEX_FORMAT = 1  # raised when the meaning of a cached index changes
MAX_LABEL_BYTES = 1 << 20


class ImageShards(BaseDataModule):
    """Images and class labels in tar shards (WebDataset convention), multi-class.

    Layout: `root/train-000000.tar`, `val-*.tar`, `test-*.tar`, at any depth; without such names in any shard the set
    has no official split. A sample's members share a key: `000123.jpg` and `000123.cls`. Exact epochs, few-shot draws
    and splits hold as for files, because images are read at their offsets; nothing is extracted. The first use reads
    every header (8 µs a member) and keeps an index beside the shards, or in `$FARSHOT_CACHE` where they are read-only.
    One group an image.

    Args:
        label: Extension of the member that holds the label: cls, txt or json.
        label_key: Key of the label in a JSON member.
        class_names: Classes in index order; default: the lines of `root/classes.txt`, else the labels found, sorted
            (of whole numbers below a million: 0 to the largest).
        shards: Files or URLs (s3://bucket/train-0000.tar) in place of all tar files below `root`; URLs are copied to
            the local cache.
        mode: rgb, or grey for one channel.
        window: Intensities that become black and white in images deeper than 8 bits.
        dataset_name: Name in results, key of the hashed test split, and default folder in `$FARSHOT_DATA`; default: the
            name of `root`.
        **kwargs: Arguments shared by all data sets.
    """

    name = "shards"
    task = "multiclass"

    def __init__(
        self,
        *,
        label: str = "cls",
        label_key: str | None = None,
        class_names: list[str] | None = None,
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
        self.name = dataset_name or self.root.resolve().name  # type: ignore[misc]
        self.channels = 3 if mode == "rgb" else 1  # type: ignore[misc]
        if (label == "json") != (label_key is not None):
            raise DataError(
                f"label {label!r} with label_key {label_key!r}",
                where="data.init_args.label_key",
                hint="give the key of the label in a JSON member, and only there",
            )
        self.label, self.label_key = label.lower().removeprefix("."), label_key
        self.shard_files = list(shards) if shards is not None else self._list_shards()
        self.class_names = list(class_names) if class_names is not None else self._find_classes()
        self.restrict_labels()

    def _list_shards(self) -> list[str]:
        # Unlike rglob, glob follows links to folders; of several ways to one file the shortest counts.
        names = glob.glob("**/*.tar", root_dir=self.root, recursive=True)
        names.sort(key=lambda name: (name.count("/"), name))
        paths = [str(self.root / name) for name in names]
        found = sorted({os.path.realpath(path): path for path in reversed(paths)}.values())
        if not found:
            raise DataError(
                f"no tar shards below {self.root}", where="data.init_args.root", valid="train-0000.tar, ..."
            )
        return found

    def _find_classes(self) -> list[str]:
        listing = self.root / "classes.txt"
        if listing.is_file():
            lines = [line.strip() for line in listing.read_text(encoding="utf-8-sig").rstrip().splitlines()]
            if "" in lines:
                where = f"{listing}, line {lines.index('') + 1}"
                raise DataError("a class without a name", where=where, hint="a line is a class, in index order")
            return lines
        texts = sorted(set(self.index["label"].unique().to_pylist()) - {""})
        if all(re.fullmatch("0|[1-9][0-9]{0,5}", text) for text in texts):
            return [str(number) for number in range(max(map(int, texts), default=-1) + 1)]
        return texts

    # The table -------------------------------------------------------------------------------------------------------

    @cached_property
    def index(self) -> Any:
        """A pyarrow table, a row an image: key, extension, shard, offset, size, and its label's text ("" = none)."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        status = [(file, path.stat()) for file, path in zip(self.shard_files, self._local_files(), strict=True)]
        known = [(file, state.st_size, state.st_mtime_ns) for file, state in status]
        text = json.dumps([INDEX_FORMAT, self.label, self.label_key, known])
        name = f".index-{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}.parquet"
        places = [self.root / name, shards.cache_folder() / "shards" / name]
        for place in places:
            try:
                return pq.read_table(place)
            except (pa.ArrowException, OSError):  # not there, or damaged
                continue
        index = self._make_index()
        place = places[0] if os.access(self.root, os.W_OK) else places[1]
        place.parent.mkdir(parents=True, exist_ok=True)
        replace_file(place, lambda temporary: pq.write_table(index, temporary))
        return index

    def _local_files(self) -> list[Path]:
        try:
            files = [shards.local_file(file) for file in self.shard_files]
            for file in files:
                file.stat()
        except OSError as error:
            problem = f"a shard cannot be opened: {error.strerror}"
            raise DataError(problem, where=str(error.filename), hint="check data.init_args.shards") from error
        return files

    def _make_index(self) -> Any:
        import pyarrow as pa
        import pyarrow.compute as pc

        members = shards.index_shards(self.shard_files).combine_chunks()
        keys, number = members["key"].combine_chunks(), members["shard"].to_numpy()
        changes = pc.not_equal(keys[1:], keys[:-1]).to_numpy(zero_copy_only=False) | (np.diff(number) != 0)
        samples = np.cumsum(np.concatenate([np.zeros(min(1, len(keys)), dtype=np.int64), changes]))
        extensions = members["extension"]
        images = np.flatnonzero(pc.is_in(extensions, value_set=pa.array(_EXTENSIONS)))
        labels = np.flatnonzero(pc.equal(extensions, self.label))
        if not len(images) or not len(labels):
            raise DataError(
                f"the shards hold {len(images)} images and {len(labels)} labels named .{self.label}",
                where=str(self.root),
                valid=sorted(extensions.unique().to_pylist()),
                hint="say by data.init_args.label which member holds the label",
            )
        twice = np.concatenate([rows[1:][np.diff(samples[rows]) == 0] for rows in (images, labels)])
        alone = labels[~np.isin(samples[labels], samples[images])]
        for rows, problem in ((twice, "has two images or two labels"), (alone, "has a label and no image")):
            if len(rows):
                row = int(rows[0])
                where = f"{self.shard_files[number[row]]}, member {keys[row]}.{extensions[row]}"
                raise DataError(f"a sample of a tar shard {problem} ({len(rows)} such)", where=where)
        texts = np.full(len(images), "", dtype=object)
        texts[np.searchsorted(samples[images], samples[labels])] = self._read_labels(members.take(labels))
        return members.take(images).append_column("label", pa.array(texts, pa.string()))

    def _read_labels(self, members: Any) -> list[str]:
        reader = shards.ShardReader(self.shard_files, max_bytes=MAX_LABEL_BYTES)
        columns = [members[name].to_pylist() for name in ("shard", "offset", "size")]
        texts: dict[str, str] = {}  # one object for each distinct text
        found = []
        for shard, offset, size in zip(*columns, strict=True):
            content = reader.read(shard, offset, size) if size else b""
            try:
                text = content.decode("utf-8").strip()
                if self.label_key is not None:
                    text = _label_text(json.loads(text)[self.label_key])
            except (ValueError, KeyError, TypeError) as error:
                where = f"{self.shard_files[shard]}, byte {offset}"
                raise DataError(f"a label cannot be read: {error!r} in {content[:80]!r}", where=where) from error
            found.append(texts.setdefault(text, text))
        return found

    @property
    def unnamed_releases(self) -> frozenset[str]:
        """This set: its name is that of a folder, or the user's choice."""
        return frozenset({self.release})

    def load_table(self) -> Table:
        """One row an image; its path is the shard and the member in it."""
        import pyarrow.compute as pc

        names = [self._shard_name(file) for file in self.shard_files]
        number = self.index["shard"].to_numpy()
        stems = pc.binary_join_element_wise(self.index["key"], self.index["extension"], ".")
        paths = strings(np.asarray(names, dtype=object)[number] + "/" + stems.to_numpy(zero_copy_only=False))
        twice = np.flatnonzero(pd.Series(paths).duplicated())
        if len(twice):
            raise DataError(
                f"a sample is twice in one shard: {paths[twice[0]]} ({len(twice)} such)", where=str(self.root)
            )
        return Table(paths, self._labels(), paths, split_column(np.asarray(_splits(names), dtype=object)[number]))

    def _shard_name(self, file: str) -> str:
        path = Path(file)
        return path.relative_to(self.root).as_posix() if path.is_relative_to(self.root) else file

    def _labels(self) -> np.ndarray:
        """Class of every image, int64; texts are names of classes or, where none of them is, their numbers."""
        own = self.space.own
        codes, texts = pd.factorize(self.index["label"].to_numpy(zero_copy_only=False))
        known = {"": -1, **{name: place for place, name in enumerate(own)}}
        if not set(texts) & set(own):
            known |= {str(place): place for place in range(len(own))}
        doubled = sorted(name for name, count in Counter(own).items() if count > 1 and name in texts)
        if doubled:
            problem = f"label {doubled[0]!r} is the name of several classes ({len(doubled)} such)"
            raise DataError(
                problem, where="class_names", hint="give each class a name of its own, or number the labels"
            )
        unknown = [text for text in texts if text not in known]
        if unknown:
            near = closest(unknown[0], own)
            raise DataError(
                f"label {unknown[0]!r} is no class" + (f"; did you mean {near!r}?" if near else ""),
                where=str(self.root),
                valid=[*own[:10], f"or the numbers 0 to {len(own) - 1}"],
            )
        return np.asarray([known[text] for text in texts], dtype=np.int64)[codes]

    # Images ----------------------------------------------------------------------------------------------------------

    @cached_property
    def _places(self) -> tuple[shards.ShardReader, list[np.ndarray]]:
        columns = [self.index[name].to_numpy() for name in ("shard", "offset", "size")]
        return shards.ShardReader(self.shard_files), columns

    def image_bytes(self, row: int) -> bytes:
        """The member's bytes as they are in the shard."""
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


_EXTENSIONS = sorted(extension[1:] for extension in io.IMAGE_EXTENSIONS - io.DICOM_EXTENSIONS)


def _label_text(value: Any) -> str:
    """A label from JSON as text: "" for null and NaN, "7" for 7.0; ValueError for lists and objects."""
    if isinstance(value, (list, dict)):
        raise ValueError("neither text nor a number")
    if value is None or value != value:
        return ""
    return str(int(value) if isinstance(value, float) and value.is_integer() else value).strip()


def _splits(names: Sequence[str]) -> list[str]:
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
