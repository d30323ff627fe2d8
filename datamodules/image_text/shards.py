"""Images with captions in tar shards or Parquet files, as img2dataset and Hugging Face write them."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from datamodules import shards as tar
from datamodules.errors import DataError, closest
from datamodules.image_text import pairs
from datamodules.image_text.captions import draw_one
from datamodules.image_text.pairs import Shard, Wanted
from datamodules.image_text.parquet_pairs import copied_images, index_parquet
from datamodules.image_text.tar_pairs import index_tar
from datamodules.sharded_images import ShardedImages, arrow_strings, whole
from datamodules.table import Table

READERS: dict[str, Callable[[str, Wanted], Shard]] = {".tar": index_tar, ".parquet": index_parquet}
"""What indexes a shard, by its extension."""
NEEDS_CLASSES = ("shots", "num_classes_kept", "label_noise", "balance", "outputs", "captions")
"""Settings that mean nothing where images have no classes."""


class ImageTextShards(ShardedImages):
    """Images with captions in tar shards or Parquet files, for language–image training; no classes.

    Layout: what `img2dataset --output_format webdataset` writes below `root`, at any depth: `00000.tar` with KEY.jpg,
    KEY.txt and KEY.json, and `00000.parquet` beside it with url, caption, key, status, ... in rows; or, where there is
    no tar file, Parquet files that hold the images themselves (a binary column `image` or `jpg`, or Hugging Face's
    struct of bytes and path) and a column of text. Images of Parquet files are copied once to `$FARSHOT_CACHE`, because
    Parquet has no cheap access by row; nothing else is copied or extracted. The first use reads every header and
    caption and keeps an index beside the shards (or in `$FARSHOT_CACHE`); captions stay in memory as one Arrow buffer.

    A row is a sample of a shard. Left out, and counted by reason, are failed downloads (a status other than success),
    texts without image, images without text, and captions that are empty, not UTF-8 or above 1 MB. The batch has
    `text`, and `label` −1. Splits: by train, val and test in the shards' names, otherwise hashed; a group is the image,
    or all images of one SHA-256 where the shards tell it (img2dataset does), so that copies stay in one split.

    Subsets: `num_images` or `fraction` with `few_shot_seed` are nested; `score` with `curation: 0.3` trains on the 30 %
    with the highest scores; `shards` takes some of the files.

    Args:
        caption: Where the caption is: a member's extension (txt), a key of the JSON member (json:KEY), or a column of
            the Parquet file. txt stands for the columns txt, caption and text, too. A list gives several, of which each
            sample draws one by its seed among those that are there.
        score: Column of the Parquet file or key of the JSON member with the scores of `curation`, such as similarity.
        max_bad: Share of the rows that may have no usable image or caption, 0–1, before it is an error: most likely
            `caption` names the wrong member.
        curation: Train on this share of the images, those with the highest scores.
        curation_scores: In place of `score`, a CSV or Parquet file with columns path and score.
        val_fraction: Share of the training groups held out for validation where no official validation exists.
        test_fraction: Share of the groups in the test set where no official test set exists (fixed hash).
        **kwargs: `shards` (files or URLs in place of all below `root`), `mode`, `window`, `dataset_name`, and the
            arguments shared by all data sets.
    """

    name = "image_text"
    task = "multiclass"
    class_names: list[str] = []  # noqa: RUF012
    labelled = False
    patterns: ClassVar[Sequence[str]] = ("**/*.tar", "**/*.parquet")

    def __init__(
        self,
        *,
        caption: str | list[str] = "txt",
        score: str | None = None,
        max_bad: float = 0.05,
        curation: float | None = None,
        curation_scores: str | None = None,
        val_fraction: float = 0.01,
        test_fraction: float = 0.01,
        **kwargs: Any,
    ) -> None:
        super().__init__(val_fraction=val_fraction, test_fraction=test_fraction, **kwargs)
        for setting in NEEDS_CLASSES:
            value = getattr(self, setting)
            if value and value != "full":
                raise DataError(
                    f"{setting} wants classes; {self.name} has captions alone", where=f"data.init_args.{setting}"
                )
        names = [caption] if isinstance(caption, str) else list(caption)
        if not names or not all(names):
            raise DataError(f"caption: {caption!r} names nothing", where="data.init_args.caption", valid="txt")
        if not 0 <= max_bad <= 1:
            raise DataError(f"max_bad: {max_bad} is out of range", where="data.init_args.max_bad", valid="0 to 1")
        self.wanted, self.max_bad = Wanted(tuple(name.removeprefix(".") for name in names), score), max_bad
        self.curation, self.curation_scores = curation, curation_scores
        self.dials = replace(self.dials, curation=curation, curation_scores=curation_scores, score=score)
        self._index_shard = READERS[self._kind()]

    def _kind(self) -> str:
        kinds = {Path(file).suffix.lower() for file in self.shard_files}
        if len(kinds) != 1 or not kinds <= set(READERS):
            raise DataError(
                f"shards are {' and '.join(sorted(kinds)) or 'an empty list'}",
                where="data.init_args.shards",
                valid=f"files of one kind: {' or '.join(READERS)}",
            )
        return kinds.pop()

    # The table -------------------------------------------------------------------------------------------------------

    def index_key(self) -> list[Any]:
        """What is kept of each pair, and the files beside the shards."""
        beside = [Path(file).with_suffix(".parquet") for file in self.shard_files if not tar.is_remote(file)]
        states = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in beside if path.is_file()]
        return ["pairs", self.wanted.captions, self.wanted.score, states]

    def make_index(self) -> Any:
        """A row a sample: shard and the columns of `pairs.pair_table`."""
        import pyarrow as pa

        parts: list[Any] = []
        for number, file in enumerate(self.shard_files):
            shard = self._index_shard(file, self.wanted)
            count = len(shard.samples)  # none where all downloads failed
            if shard.lacking and count and not any(map(len, parts)):  # before thousands of other shards are read
                self._reject_names(shard, file)
            parts.append(shard.samples.append_column("shard", pa.array(np.full(count, number, dtype=np.int32))))
        return pa.concat_tables(parts)

    def _reject_names(self, shard: Shard, file: str) -> None:
        name = shard.lacking[0]
        what = "score" if name == self.wanted.score else "caption"
        near = closest(name, shard.names)
        raise DataError(
            f"{what} {name!r} is neither a member nor a column" + (f"; did you mean {near!r}?" if near else ""),
            where=f"data.init_args.{what}; looked in {file}",
            valid=shard.names,
        )

    def load_table(self) -> Table:
        """One row a sample; its path is the shard and the image in it.

        Raises:
            DataError: More than `max_bad` of the rows have no usable image or caption.
        """
        import pyarrow as pa
        import pyarrow.compute as pc

        table = self.indexed_table(whole(self.index["name"]), np.full(len(self.index), -1, dtype=np.int64))
        self._check_share(table)
        group = whole(self.index["group"])
        if pc.any(pc.not_equal(group, "")).as_py():
            own = pa.chunked_array(pa.array(table.paths)).combine_chunks().cast(pa.large_string())
            table = replace(table, groups=arrow_strings(pc.if_else(pc.equal(group, ""), own, group)))
        scores = {"score": self.index["score"].to_numpy()} if self.wanted.score else {}
        return replace(table, metadata=scores)

    def _check_share(self, table: Table) -> None:
        """Stop where too many rows are bad; warn of captions that are no text, naming the first."""
        counts = np.bincount(self._problems, minlength=len(pairs.PROBLEMS))
        fetched = len(table) - counts[pairs.FAILED]
        bad = fetched - counts[pairs.FINE]
        if bad > self.max_bad * fetched:
            found = [
                f"{count}: {reason}" for count, reason in zip(counts[2:], pairs.PROBLEMS[2:], strict=True) if count
            ]
            raise DataError(
                f"{bad} of {fetched} rows of {self.name} cannot be used ({'; '.join(found)})",
                where=f"data.init_args.caption: {', '.join(self.wanted.captions)}",
                valid=self._index_shard(self.shard_files[0], self.wanted).names,
                hint=f"name the right member or column, or set max_bad above {bad / fetched:.3f}",
            )
        if counts[pairs.NOT_UTF8]:
            first = table.paths[int(np.argmax(self._problems == pairs.NOT_UTF8))]
            warnings.warn(
                f"{self.name}: {counts[pairs.NOT_UTF8]} captions are not UTF-8, the first is that of {first}; these "
                "rows are left out",
                stacklevel=2,
            )

    @cached_property
    def _problems(self) -> np.ndarray:
        return np.asarray(self.index["problem"].to_numpy())

    def exclusions(self, table: Table) -> dict[str, np.ndarray]:
        """Rows that are no usable pair, by reason."""
        return {reason: self._problems == code for code, reason in enumerate(pairs.PROBLEMS) if code != pairs.FINE}

    # Images and captions ---------------------------------------------------------------------------------------------

    def image_shards(self) -> Sequence[str | Path]:
        """The tar shards themselves, or the copies of Parquet files' images."""
        if self._index_shard is index_tar:
            return self.shard_files
        return [copied_images(path) for path in self.local_files()]

    @cached_property
    def _captions(self) -> list[Any]:
        return [whole(self.index[f"text{number}"]) for number in range(len(self.wanted.captions))]

    def texts(self, rows: Sequence[int], seeds: Sequence[int]) -> list[str]:
        """Captions by table row; of several that are there the seed draws one."""
        import pyarrow as pa

        places = pa.array(rows, pa.int64())
        found = zip(*(column.take(places).to_pylist() for column in self._captions), strict=True)
        there = [[text for text in texts if text] or [""] for texts in found]
        drawn = draw_one(seeds, np.array([len(texts) for texts in there]), "caption")
        return [texts[place] for texts, place in zip(there, drawn.tolist(), strict=True)]
