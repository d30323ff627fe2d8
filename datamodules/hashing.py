"""Keyed hashes of ids: what `pandas.util.hash_array` gives for their text, vectorised over Arrow's buffers.

A hash depends on the id and the key alone: no order of rows, dtype of the ids, platform or version can change it. Ids
are compared as text: 7, 7.0 and "7" are one id, "007" is another. Python strings are never made of a column that Arrow
holds: 14 million paths need half the time and no memory.
"""

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from datamodules.errors import DataError

UInt64Array = npt.NDArray[np.uint64]

_BLOCK = 1 << 15  # rows at a time: the words of state stay in the cache
_TEXT_BLOCK = 1 << 18  # rows turned to text at a time, where ids are not Arrow strings


def hash_ids(ids: Any, key: str) -> UInt64Array:
    """Hash ids (N,) as text to uint64 (N,) under a key, each id by itself.

    Raises:
        DataError: An id is missing, or is a number that is not whole.
    """
    # SipHash wants 16 bytes of key.
    hash_key = hashlib.blake2b(key.encode(), digest_size=8).hexdigest().encode()
    hashes = np.empty(len(ids), dtype=np.uint64)
    done = 0
    for text in arrow_text(ids):
        for first in range(0, len(text), _BLOCK):
            block = text[first : first + _BLOCK]
            hashes[done : done + len(block)] = _hash_strings(block, hash_key)
            done += len(block)
    return hashes


def arrow_text(ids: Any, what: str = "group id") -> Iterator[Any]:
    """Ids (N,) as Arrow arrays of large strings, a part at a time; `what` names them in errors.

    Raises:
        DataError: As `hash_ids`.
    """
    import pyarrow as pa

    ids = getattr(ids, "array", ids)  # a pandas column
    if isinstance(getattr(ids, "dtype", None), pd.StringDtype):
        column = pa.array(ids)
        row = 0
        for chunk in column.chunks if isinstance(column, pa.ChunkedArray) else [column]:
            if chunk.null_count:
                _missing(np.flatnonzero(chunk.is_null().to_numpy(zero_copy_only=False)) + row, what)
            row += len(chunk)
            yield chunk.cast(pa.large_string())
        return
    values = ids if isinstance(ids, pd.api.extensions.ExtensionArray) else np.asarray(ids)
    for first in range(0, len(values), _TEXT_BLOCK):
        yield pa.array(as_text(np.asarray(values[first : first + _TEXT_BLOCK]), first, what), pa.large_string())


def as_text(values: npt.NDArray[Any], first_row: int, what: str = "group id") -> npt.NDArray[np.object_]:
    """Turn ids into Python strings: object (N,). `first_row` is the row of values[0], for messages."""
    _missing(np.flatnonzero(pd.isna(values)) + first_row, what)
    if values.dtype.kind == "f":  # whole numbers that became floats when another row of the file had none
        whole = values.astype(np.int64)
        if (whole != values).any():
            raise DataError(f"a {what} is {values[whole != values][0]}", valid="text or whole numbers")
        values = whole
    if values.dtype != object or pd.api.types.infer_dtype(values, skipna=False) != "string":
        values = values.astype(str).astype(object)
    return values


def _missing(rows: npt.NDArray[np.int64], what: str) -> None:
    if len(rows):
        raise DataError(
            f"a {what} is missing in row {rows[0]} and {len(rows) - 1} more",
            where="the table's rows, counted from 0",
            hint=f"give every row a {what}, or drop these rows",
        )


def _hash_strings(text: Any, key: bytes) -> UInt64Array:
    """SipHash-2-4 (Aumasson & Bernstein 2012) of an Arrow array of large strings, uint64 (N,)."""
    offsets = np.frombuffer(text.buffers()[1], np.int64)[text.offset : text.offset + len(text) + 1]
    first, last = int(offsets[0]), int(offsets[-1])
    content = np.zeros(last - first + 8, np.uint8)  # so that the last word can be read past the end
    if last > first:
        content[:-8] = np.frombuffer(text.buffers()[2], np.uint8)[first:last]
    # The eight bytes that begin at each byte; unaligned reads.
    words = np.ndarray((len(content) - 7,), "<u8", content, strides=(1,))
    starts, sizes = offsets[:-1] - first, np.diff(offsets)
    whole = sizes // 8
    hashes = np.empty(len(text), dtype=np.uint64)
    for count in np.flatnonzero(np.bincount(whole)).tolist():  # equally many whole words at a time
        rows = np.flatnonzero(whole == count)
        hashes[rows] = _siphash(words, starts[rows], sizes[rows], count, key)
    return hashes


def _siphash(
    words: UInt64Array, starts: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64], count: int, key: bytes
) -> UInt64Array:
    """Hash strings of `count` whole words and a rest of 0 to 7 bytes."""
    low, high = np.frombuffer(key, "<u8")
    constants = (0x736F6D6570736575, 0x646F72616E646F6D, 0x6C7967656E657261, 0x7465646279746573)
    state = [
        np.full(len(starts), half ^ np.uint64(constant), np.uint64)
        for half, constant in zip((low, high, low, high), constants, strict=True)
    ]
    spare = np.empty(len(starts), np.uint64)
    for place in range(count + 1):
        word = words[starts + 8 * place]
        if place == count:  # the rest, and the length in the last byte
            rest = (sizes % 8).astype(np.uint64)
            word &= (np.uint64(1) << (rest * np.uint64(8))) - np.uint64(1)
            word |= sizes.astype(np.uint64) << np.uint64(56)
        state[3] ^= word
        _round(state, spare)
        _round(state, spare)
        state[0] ^= word
    state[2] ^= np.uint64(0xFF)
    for _ in range(4):
        _round(state, spare)
    hashes = state[0] ^ state[1] ^ state[2] ^ state[3]
    # Stirred once more, as pandas does.
    hashes ^= hashes >> np.uint64(30)
    hashes *= np.uint64(0xBF58476D1CE4E5B9)
    hashes ^= hashes >> np.uint64(27)
    hashes *= np.uint64(0x94D049BB133111EB)
    hashes ^= hashes >> np.uint64(31)
    return np.asarray(hashes)


def _round(state: list[UInt64Array], spare: UInt64Array) -> None:
    """One SipRound on the four words of state, in place."""
    a, b, c, d = state
    _mix(a, b, 13, spare)
    _rotate(a, 32, spare)
    _mix(c, d, 16, spare)
    _mix(a, d, 21, spare)
    _mix(c, b, 17, spare)
    _rotate(c, 32, spare)


def _mix(into: UInt64Array, other: UInt64Array, bits: int, spare: UInt64Array) -> None:
    """Add, rotate and exclusive-or: into += other; other = rotate(other) ^ into."""
    np.add(into, other, out=into)
    _rotate(other, bits, spare)
    np.bitwise_xor(other, into, out=other)


def _rotate(word: UInt64Array, bits: int, spare: UInt64Array) -> None:
    np.right_shift(word, np.uint64(64 - bits), out=spare)
    np.left_shift(word, np.uint64(bits), out=word)
    np.bitwise_or(word, spare, out=word)
