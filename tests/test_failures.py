"""What an error means: its exit code and its message, and the line of a key in a file."""

import pytest
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities.exceptions import SIGTERMException

from datamodules.errors import DataError
from lightning_modules.errors import NonFiniteLossError
from studies.failures import describe_exception, exit_code
from studies.given import find_line


def raised(error, *, cause=None, context=None):
    """Return the error as Python leaves it after it was raised from a cause or while handling another."""
    error.__cause__, error.__context__ = cause, context
    error.__suppress_context__ = cause is not None
    return error


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DataError("x"), 2),
        (MisconfigurationException("x"), 2),
        (NonFiniteLossError("x"), 3),
        (raised(RuntimeError("y"), cause=DataError("x")), 2),
        (raised(RuntimeError("y"), context=raised(KeyError("z"), cause=NonFiniteLossError("x"))), 3),
        (raised(RuntimeError("y"), cause=KeyError("z"), context=DataError("x")), 1),
        (RuntimeError("x"), 1),
        (KeyboardInterrupt(), 130),
        (raised(SystemExit(1), context=KeyboardInterrupt()), 130),  # how Lightning ends after Ctrl+C
        (SIGTERMException(), 143),
        (SystemExit(), 0),
        (SystemExit(0), 0),
        (raised(SystemExit(0), context=DataError("handled")), 0),
        (SystemExit(2), 2),
        (SystemExit("text"), 1),
    ],
)
def test_exit_code(error, code):
    assert exit_code(error) == code


def test_describe_exception():
    inner = DataError("no such class", where="labels.csv, line 3", valid=["a", "b"], hint="rename it")
    text = describe_exception(raised(RuntimeError("could not instantiate"), cause=inner))
    assert text == f"error: {inner}"
    assert describe_exception(RuntimeError("broken")) == "error: RuntimeError: broken"
    assert "resumes" in describe_exception(KeyboardInterrupt())
    assert len(describe_exception(DataError("\n".join("x" * 40))).splitlines()) == 15


def test_find_line():
    text = "# a\ndata:\n  init_args:\n    shots: 5\n"
    text += "trainer:\n  callbacks:\n  - class_path: A\n    init_args: {patience: 3}\n"
    assert find_line(text, "data") == 2
    assert find_line(text, "data.init_args.shots") == find_line(text, "data.shots") == 4
    assert find_line(text, "trainer.callbacks.0.class_path") == 7
    assert find_line(text, "trainer.callbacks.patience") == 8
    assert find_line(text, "data.batch_size") is None
    assert find_line("", "data") is None
    assert find_line("a: [", "a") is None
