"""Keyed hashes: equal to pandas', whatever holds the ids."""

import hashlib
import random

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from datamodules.errors import DataError
from datamodules.hashing import hash_ids
from datamodules.rows import repeated_rows


def by_pandas(texts, key):
    hash_key = hashlib.blake2b(key.encode(), digest_size=8).hexdigest()
    return pd.util.hash_array(np.asarray(texts, dtype=object), hash_key=hash_key, categorize=False)


@pytest.fixture(scope="module")
def texts():
    """Every length of 0 to 70 bytes, and characters of one to four bytes."""
    draw = random.Random(0)
    lengths = ["x" * length for length in range(70)]
    return lengths + ["".join(draw.choice("abcäß€😀 /") for _ in range(draw.randrange(40))) for _ in range(3000)]


def test_pandas_gives_the_same(texts):
    for key in ("a", "another key"):
        np.testing.assert_array_equal(hash_ids(texts, key), by_pandas(texts, key))
    assert (hash_ids(texts[:70], "a") != hash_ids(texts[:70], "b")).all()


def test_what_holds_the_ids_does_not_matter(texts):
    expected = by_pandas(texts, "k")
    arrow = pa.array(texts)
    for held in (
        np.asarray(texts, dtype=object),
        pd.Series(texts),
        pd.Series(texts, dtype="category"),
        pd.array(texts, dtype="string[pyarrow]"),
        pd.array(pa.chunked_array([arrow[:11], arrow[11:11], arrow[11:]]), dtype="string[pyarrow]"),
        pd.Series(["left out", *texts], dtype="string[pyarrow]").iloc[1:],
    ):
        np.testing.assert_array_equal(hash_ids(held, "k"), expected)
    np.testing.assert_array_equal(hash_ids(np.array([7.0, 12.0]), "k"), by_pandas(["7", "12"], "k"))
    assert hash_ids([], "k").shape == (0,)


def test_more_rows_than_a_block():
    names = pd.array([f"n{row % 17:08d}/{row}.JPEG" for row in range(70_000)], dtype="string[pyarrow]")
    np.testing.assert_array_equal(hash_ids(names, "k"), by_pandas(names, "k"))


@pytest.mark.parametrize("kind", ["string[pyarrow]", "str", "object"])
def test_a_missing_id_is_named_by_its_row(kind):
    with pytest.raises(DataError, match="missing in row 2 and 1 more"):
        hash_ids(pd.Series(["a", "b", None, "c", None], dtype=kind), "k")


def test_repeated_rows():
    texts = pd.Series([f"{row}.png" for row in range(1000)], dtype="str")
    assert not repeated_rows(texts).any()
    texts[900] = "3.png"
    assert np.flatnonzero(repeated_rows(texts)).tolist() == [900]
