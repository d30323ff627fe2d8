"""Filters of rows and cells."""

import numpy as np
import pandas as pd
import pytest

from datamodules.errors import DataError
from studies.filters import apply, read_filters

FRAME = pd.DataFrame(
    {
        "source": pd.array(["near (a=1, b=2)", "far", None, "NA"], dtype="string[pyarrow]"),
        "class_name": pd.array(["Mass [L]", "Mass L", "a,b", "Nodule"], dtype="string[pyarrow]"),
        "shots": pd.array(["1", "full", "10", None], dtype="string[pyarrow]"),
        "fraction": [1.0, 0.1, np.nan, 0.5],
        "num_images": pd.array([500, None, 20, 1], dtype="Int64"),
        "seed": pd.Series([0, 1, "x", None], dtype=object),
    }
)


@pytest.mark.parametrize(
    ("word", "rows"),
    [
        ("source=far", [1]),
        ("source==far", [1]),
        ("source!=far", [0, 2, 3]),
        ("source=far, NA", [1, 3]),  # NA is a name
        ("source=", [2]),
        ("source=far,", [1, 2]),
        ("source!=", [0, 1, 3]),
        ("source=near (a=1, b=2)", [0]),  # a name may hold commas,
        ("class_name=a,b", [2]),
        ("class_name=Mass [L]", [0]),  # and brackets
        ("class_name=Mass*", [0, 1]),
        ("class_name=Mass ?", [1]),
        ("shots=1,full", [0, 1]),
        ("shots>5", [2]),
        ("fraction=1", [0]),
        ("fraction=1.0", [0]),
        ("fraction=.1,5e-1", [1, 3]),
        ("fraction=0.*", [1, 3]),
        ("fraction>=0.5", [0, 3]),
        ("num_images=500.0", [0]),
        ("num_images!=20", [0, 1, 3]),
        ("num_images<=20", [2, 3]),
        ("seed=1,x", [1, 2]),
    ],
)
def test_rows_that_fulfil_a_filter(word, rows):
    assert apply(read_filters([word]), FRAME).index.tolist() == rows


def test_several_filters_all_hold():
    assert apply(read_filters(["fraction>0", "shots!=full"]), FRAME).index.tolist() == [0, 3]


@pytest.mark.parametrize(
    ("word", "problem"),
    [
        ("source", "'source' is no filter"),
        ("fraction=>0.5", "'fraction=>0.5' is no filter"),
        ("fraction>half", "'half' is no number"),
        ("sauce=near", "no column 'sauce'; did you mean 'source'"),
    ],
)
def test_mistakes_in_a_filter(word, problem):
    with pytest.raises(DataError, match=problem.replace("?", "[?]")):
        apply(read_filters([word]), FRAME)
