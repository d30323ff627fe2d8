"""Tar shards as a data set: WebDataset archives of images and labels, read by random access."""

import json
import re
from collections import Counter
from typing import Any, Literal

import numpy as np
import pandas as pd

from datamodules import shards as tar
from datamodules.errors import DataError, closest
from datamodules.sharded_images import ShardedImages, image_members, sample_numbers, whole
from datamodules.table import Table

MAX_LABEL_BYTES = 1 << 20


class ImageShards(ShardedImages):
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
        super().__init__(shards=shards, mode=mode, window=window, dataset_name=dataset_name, **kwargs)
        if (label == "json") != (label_key is not None):
            raise DataError(
                f"label {label!r} with label_key {label_key!r}",
                where="data.init_args.label_key",
                hint="give the key of the label in a JSON member, and only there",
            )
        self.label, self.label_key = label.lower().removeprefix("."), label_key
        self.class_names = list(class_names) if class_names is not None else self._find_classes()
        self.restrict_labels()

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

    def index_key(self) -> list[Any]:
        """The member that holds the label."""
        return ["labels", self.label, self.label_key]

    def make_index(self) -> Any:
        """A row an image: key, extension, shard, offset, size, and its label's text ("" = none)."""
        import pyarrow as pa
        import pyarrow.compute as pc

        members = tar.index_shards(self.shard_files).combine_chunks()
        keys, number, samples = members["key"], members["shard"].to_numpy(), sample_numbers(members)
        extensions = members["extension"]
        images = image_members(members)
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
        reader = tar.ShardReader(self.shard_files, max_bytes=MAX_LABEL_BYTES)
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

    def load_table(self) -> Table:
        """One row an image; its path is the shard and the member in it."""
        import pyarrow.compute as pc

        members = pc.binary_join_element_wise(self.index["key"], self.index["extension"], ".")
        return self.indexed_table(whole(members), self._labels())

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


def _label_text(value: Any) -> str:
    """A label from JSON as text: "" for null and NaN, "7" for 7.0; ValueError for lists and objects."""
    if isinstance(value, (list, dict)):
        raise ValueError("neither text nor a number")
    if value is None or value != value:
        return ""
    return str(int(value) if isinstance(value, float) and value.is_integer() else value).strip()
