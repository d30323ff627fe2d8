"""Image–text pairs as an index: where a pair's image lies, its captions, and why it cannot be used. Pure functions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from datamodules.errors import DataError

MAX_CAPTION_BYTES = 1 << 20
"""A caption above 1 MB is no caption but a wrong or damaged file."""

PROBLEMS = (
    "",
    "the download failed",
    "text without image",
    "image without text",
    "caption is empty",
    "caption is not UTF-8",
    "caption above 1 MB",
    "JSON cannot be read",
)
"""Why a pair cannot be used, by the code that an index keeps; 0 = it can."""
FINE, FAILED, NO_IMAGE, NO_TEXT, EMPTY, NOT_UTF8, TOO_LONG, BAD_JSON = range(len(PROBLEMS))

CAPTION_FIELDS = ("txt", "caption", "text")
"""Columns or JSON keys that hold what the member .txt holds: img2dataset calls it `caption` there."""


@dataclass(frozen=True)
class Wanted:
    """What an index is to hold of each pair.

    Attributes:
        captions: Where captions are: a member's extension, `json:KEY`, or a column of a Parquet file.
        score: Column or JSON key of the score; None = no score.
    """

    captions: tuple[str, ...]
    score: str | None = None

    def fields(self) -> list[str]:
        """Columns or JSON keys that are of use where they exist."""
        names = [one for caption in self.captions for one in caption_fields(caption)]
        return list(dict.fromkeys([*names, *([self.score] if self.score else []), "status", "sha256"]))


def caption_fields(caption: str) -> tuple[str, ...]:
    """Columns or JSON keys that a caption's name may stand for, the likeliest first."""
    return CAPTION_FIELDS if caption == "txt" else (caption.removeprefix("json:"),)


@dataclass(frozen=True)
class Shard:
    """What one shard holds.

    Attributes:
        samples: The index, as `pair_table` makes it.
        names: What captions and scores could be called here: members' extensions, columns, `json:KEY`.
        lacking: What was wanted and is nowhere in it.
    """

    samples: Any
    names: tuple[str, ...]
    lacking: tuple[str, ...]


class Captions(NamedTuple):
    """One caption of every pair.

    Attributes:
        text: Arrow large strings (N,), "" where there is none to use.
        problem: Why not, codes of `PROBLEMS`, int8 (N,).
    """

    text: Any
    problem: np.ndarray


def clean(raw: Any, problem: np.ndarray | None = None) -> Captions:
    """Check captions, and trim blanks around them.

    Args:
        raw: Arrow strings or binary (N,), null = no caption; of any other type none is a caption. Strings are checked
            again, because a Parquet file may call any bytes a string.
        problem: Problems that are known already, int8 (N,).
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    problem = np.zeros(len(raw), dtype=np.int8) if problem is None else problem.copy()
    raw = raw.dictionary_decode() if pa.types.is_dictionary(raw.type) else raw
    raw = raw.cast(pa.large_binary()) if is_text(raw.type) else pa.nulls(len(raw), pa.large_binary())
    _mark(problem, NO_TEXT, raw.is_null())
    raw = raw.fill_null(b"")
    _mark(problem, TOO_LONG, pc.greater(pc.binary_length(raw), MAX_CAPTION_BYTES))
    nothing = pa.scalar(b"", pa.large_binary())
    raw = pc.if_else(pa.array(problem == FINE), raw, nothing)
    try:
        text = raw.cast(pa.large_string())
    except pa.ArrowInvalid:  # some bytes are no text: find out which
        bad = pa.array([not _decodes(value) for value in raw.to_pylist()])
        _mark(problem, NOT_UTF8, bad)
        text = pc.if_else(bad, nothing, raw).cast(pa.large_string())
    text = pc.utf8_trim_whitespace(pc.replace_substring(text, "\x00", " "))
    # Control and invisible characters alone say nothing either, and no text tower takes them.
    _mark(problem, EMPTY, pc.invert(pc.match_substring_regex(text, r"[^\p{C}\p{Z}\s]")))
    return Captions(text, problem)


def is_text(kind: Any) -> bool:
    """Whether an Arrow type is of strings or of bytes."""
    import pyarrow.types as types

    return bool(
        types.is_string(kind) or types.is_large_string(kind) or types.is_binary(kind) or types.is_large_binary(kind)
    )


def _mark(problem: np.ndarray, code: int, where: Any) -> None:
    problem[(problem == FINE) & where.to_numpy(zero_copy_only=False)] = code


def _decodes(value: bytes) -> bool:
    try:
        value.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def pair_table(
    names: Any,
    offsets: np.ndarray,
    sizes: np.ndarray,
    captions: Sequence[Captions],
    *,
    status: Any | None = None,
    sha256: Any | None = None,
    scores: np.ndarray | None = None,
) -> Any:
    """The index of one shard.

    Args:
        names: What each sample is called in the shard, Arrow strings (N,).
        offsets: First byte of its image, int64 (N,).
        sizes: Bytes of its image, int64 (N,), 0 = there is none.
        captions: Its captions, of which one that is fine makes it usable.
        status: "success" or why its download failed, Arrow strings or binary (N,); nothing = not known to have failed.
        sha256: Hash of its image's bytes in hexadecimal, Arrow strings or binary (N,): equal images are one group.
        scores: float64 (N,), NaN = none.

    Returns:
        A pyarrow table: name, offset, size, group ("" = its own), problem (code of `PROBLEMS`), text0, text1, ..., and
        score where there is one.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    problem = captions[0].problem.copy()
    for caption in captions[1:]:
        problem[caption.problem == FINE] = FINE
    problem[sizes == 0] = NO_IMAGE
    if status is not None:
        success = pa.array(["", "success"], pa.large_string())
        problem[~pc.is_in(clean(status).text, success).to_numpy(zero_copy_only=False)] = FAILED
    group = pa.repeat(pa.scalar("", pa.large_string()), len(sizes))
    if sha256 is not None:
        # 64 of its bits, of which 15 million images share none by chance (p < 1e-5).
        texts = pc.utf8_lower(clean(sha256).text)
        whole = pc.match_substring_regex(texts, "^[0-9a-f]{64}$")
        group = pc.if_else(whole, pc.utf8_slice_codeunits(texts, 0, 16), group)
    columns = {"name": names.cast(pa.large_string()), "offset": offsets, "size": sizes, "group": group}
    columns |= {f"text{number}": caption.text for number, caption in enumerate(captions)}
    return pa.table(columns | {"problem": problem} | ({} if scores is None else {"score": scores}))


def read_scores(values: Any | None, count: int, where: str) -> np.ndarray:
    """Scores as float64 (N,) from an Arrow array of numbers or their texts, NaN where there is none.

    Raises:
        DataError: A text that is no number.
    """
    import pyarrow as pa

    if values is None:
        return np.full(count, np.nan)
    try:
        if is_text(values.type):
            texts = clean(values)
            values = pa.compute.if_else(pa.array(texts.problem == FINE), texts.text, None)
        return np.asarray(values.cast(pa.float64()).fill_null(np.nan).to_numpy(zero_copy_only=False))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise DataError(f"a score is no number: {error}", where=where, valid="a column of numbers") from error
