"""The pairs of one tar shard, as img2dataset writes it: KEY.jpg, KEY.txt and KEY.json, and a Parquet file beside it.

Captions, scores, states and hashes come from the Parquet file where its keys are those of the shard: one read in place
of thousands. Otherwise they come from the members.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from datamodules import shards
from datamodules.errors import DataError
from datamodules.image_text import pairs
from datamodules.image_text.pairs import Captions, Shard, Wanted
from datamodules.sharded_images import IMAGE_MEMBERS, image_members, sample_numbers, whole


class _Fields(NamedTuple):
    """What is known of the samples: Arrow arrays by column or key, all names there are, and unreadable ones."""

    columns: dict[str, Any]
    names: tuple[str, ...]
    problem: np.ndarray | None = None


def index_tar(file: str, wanted: Wanted) -> Shard:
    """List the pairs of a tar shard.

    Raises:
        DataError: The shard is damaged, a sample has two images or two texts, or a score is no number.
    """
    samples = _Samples(file)
    beside = _beside(file, samples.keys, wanted.fields())
    inside = _Fields({}, ())
    if beside is None or _lacking(wanted, samples, [beside]):
        inside = _from_json(samples, wanted)
    beside = beside or _Fields({}, ())
    captions = [_captions(samples, name, beside, inside) for name in wanted.captions]
    columns = inside.columns | beside.columns
    table = pairs.pair_table(
        samples.names(),
        samples.offsets[samples.images],
        np.where(samples.images >= 0, samples.sizes[samples.images], 0),
        captions,
        status=columns.get("status"),
        sha256=columns.get("sha256"),
        scores=pairs.read_scores(columns.get(wanted.score), samples.count, file) if wanted.score else None,
    )
    members = sorted(samples.extensions - frozenset(IMAGE_MEMBERS))
    keys = [f"json:{name}" for name in inside.names if name not in beside.names]
    return Shard(table, (*members, *beside.names, *keys), _lacking(wanted, samples, [beside, inside]))


class _Samples:
    """The members of a shard by sample."""

    def __init__(self, file: str) -> None:
        self.file, self.reader = file, shards.ShardReader([file])
        self.members = shards.index_shards([file]).combine_chunks()
        self.numbers = sample_numbers(self.members)
        first = np.flatnonzero(np.diff(self.numbers, prepend=-1))
        self.keys, self.count = whole(self.members["key"]).take(first), len(first)
        # One more, which a sample without such a member has: nothing at the shard's beginning.
        self.offsets, self.sizes = (np.append(self.members[name].to_numpy(), 0) for name in ("offset", "size"))
        self.extensions: frozenset[str] = frozenset(self.members["extension"].unique().to_pylist())
        self.images = self._by_sample(image_members(self.members), "images")

    def _by_sample(self, rows: np.ndarray, what: str) -> np.ndarray:
        twice = rows[1:][np.diff(self.numbers[rows]) == 0]
        if len(twice):
            where = f"{self.file}, sample {self.members['key'][int(twice[0])]}"
            raise DataError(f"a sample of a tar shard has two {what} ({len(twice)} such)", where=where)
        found = np.full(self.count, -1, dtype=np.int64)
        found[self.numbers[rows]] = rows
        return found

    def names(self) -> Any:
        """KEY.jpg of each sample, KEY of one without an image: Arrow strings (N,)."""
        import pyarrow as pa
        import pyarrow.compute as pc

        has_image = pa.array(self.images >= 0)
        places = pc.if_else(has_image, pa.array(self.images), None)
        extensions = whole(self.members["extension"]).take(places).fill_null("")
        return pc.if_else(has_image, pc.binary_join_element_wise(self.keys, extensions, "."), self.keys)

    def members_named(self, extension: str) -> np.ndarray:
        """Member of each sample with this extension, int64 (N,), −1 = none."""
        import pyarrow.compute as pc

        rows = np.flatnonzero(pc.equal(self.members["extension"], extension))
        return self._by_sample(rows, f"members .{extension}")

    def read(self, members: np.ndarray) -> list[bytes | None]:
        """Contents of members; None where there is none or it is too long."""
        offsets, sizes = self.offsets[members].tolist(), self.sizes[members].tolist()
        places = zip(members.tolist(), offsets, sizes, strict=True)
        return [
            None
            if member < 0 or size > pairs.MAX_CAPTION_BYTES
            else (self.reader.read(0, offset, size) if size else b"")
            for member, offset, size in places
        ]

    def too_long(self, members: np.ndarray) -> np.ndarray:
        """Which of members are too long, as codes of `pairs.PROBLEMS`, int8 (N,)."""
        return np.where(self.sizes[members] > pairs.MAX_CAPTION_BYTES, pairs.TOO_LONG, pairs.FINE).astype(np.int8)


def _lacking(wanted: Wanted, samples: _Samples, fields: Sequence[_Fields]) -> tuple[str, ...]:
    """Captions and score that are nowhere."""
    known = frozenset[str]().union(*(one.columns for one in fields))
    captions = [
        name
        for name in wanted.captions
        if name not in samples.extensions and known.isdisjoint(pairs.caption_fields(name))
    ]
    return tuple([*captions, *([wanted.score] if wanted.score and wanted.score not in known else [])])


def _beside(file: str, keys: Any, wanted: Sequence[str]) -> _Fields | None:
    """The columns of the Parquet file beside a shard, in the order of its samples; None where it is not about them."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    path = Path(file).with_suffix(".parquet")
    if shards.is_remote(file) or not path.is_file():
        return None
    try:
        names = pq.read_schema(path).names
        if "key" not in names:
            return None
        table = pq.read_table(path, columns=["key", *(name for name in wanted if name in names)])
        listed = whole(table["key"]).cast(pa.string())
        places = pc.index_in(keys, value_set=listed)
    except (pa.ArrowException, OSError):  # a damaged copy of what the members say
        return None
    if places.null_count or pc.count_distinct(listed).as_py() < len(listed):
        return None
    columns = {name: whole(table[name]).take(places) for name in table.column_names if name != "key"}
    return _Fields(columns, tuple(names))


def _from_json(samples: _Samples, wanted: Wanted) -> _Fields:
    """What the JSON members say."""
    import pyarrow as pa

    if "json" not in samples.extensions:
        return _Fields({}, ())
    members = samples.members_named("json")
    problem = np.zeros(samples.count, dtype=np.int8)
    documents: list[dict[str, Any]] = []
    for sample, content in enumerate(samples.read(members)):
        try:
            document = json.loads(content) if content is not None else {}
        except (ValueError, RecursionError):  # no JSON, or not UTF-8
            document = None
        if not isinstance(document, dict) or (content is None and members[sample] >= 0):
            document, problem[sample] = {}, pairs.BAD_JSON
        documents.append(document)
    names = tuple(dict.fromkeys(name for document in documents for name in document))
    columns = {}
    for name in wanted.fields():
        values = [document.get(name) for document in documents]
        if name in names and name == wanted.score:
            columns[name] = pa.array([_number(value) for value in values], pa.float64())
        elif name in names:
            columns[name] = pa.array([_encoded(value) for value in values], pa.large_binary())
    return _Fields(columns, names, problem)


def _number(value: Any) -> float | None:
    """A score from JSON; None where it is none."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _encoded(value: Any) -> bytes | None:
    """A text from JSON as bytes, half of an escaped surrogate pair as what is no UTF-8; None where it is no text."""
    return value.encode("utf-8", "surrogatepass") if isinstance(value, str) else None


def _captions(samples: _Samples, name: str, beside: _Fields, inside: _Fields) -> Captions:
    """One caption of each sample: from the Parquet file if it says what the members say, then members, then JSON."""
    import pyarrow as pa

    fields = pairs.caption_fields(name)
    listed = next((beside.columns[field] for field in fields if field in beside.columns), None)
    if name in samples.extensions:
        members = samples.members_named(name)
        if listed is not None and _agree(samples, members, listed):
            return pairs.clean(listed)
        contents = samples.read(members)
        return pairs.clean(pa.array(contents, pa.large_binary()), samples.too_long(members))
    if listed is not None:
        return pairs.clean(listed)
    found = next((inside.columns[field] for field in fields if field in inside.columns), None)
    return pairs.clean(pa.nulls(samples.count) if found is None else found, inside.problem)


def _agree(samples: _Samples, members: np.ndarray, listed: Any) -> bool:
    """Whether the first and the last member say what a column says."""
    ends = np.flatnonzero(members >= 0)[[0, -1]]
    said = [content.strip() if content else b"" for content in samples.read(members[ends])]
    texts = pairs.clean(listed.take(ends)).text.to_pylist()
    return [text.encode() for text in texts] == said
