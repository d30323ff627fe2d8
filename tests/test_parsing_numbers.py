"""Arguments that take whole numbers and shares."""

from typing import Optional, Union

from jsonargparse import ArgumentParser

from studies.parsing import whole_numbers_first


def test_a_whole_number_of_batches_is_no_share():
    parser = ArgumentParser()
    parser.add_argument("--batches", type=Optional[Union[float, int]])  # noqa: UP007, UP045
    parser.add_argument("--other", type=Union[float, int])  # noqa: UP007
    whole_numbers_first(parser)
    found = parser.parse_args(["--batches=1", "--other=1"])
    assert (type(found.batches), type(found.other)) == (int, int)
    assert type(parser.parse_args(["--batches=1.0"]).batches) is float
