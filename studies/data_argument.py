"""DATA on the command line: a data set by its class name or by a configuration, for the commands that take one."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

from datamodules.base import BaseDataModule
from datamodules.errors import DataError
from studies.failures import meaning
from studies.given import SUFFIXES, Given
from studies.lightning_cli import import_classes
from studies.parsing import ReadableParser

DATA_HELP = (
    "DATA is the name of a data set (python cli.py list datasets), or a YAML file with a data section; --data.NAME "
    "VALUE overrides its settings, which --data.help DATA lists."
)


class DataParser(ReadableParser):
    """A parser whose mistakes are `DataError`: two data sets can be read in one command."""

    def _quit(self, text: str) -> NoReturn:
        raise DataError(text)


def read_data(
    words: Sequence[str],
    command: str,
    description: str,
    add_options: Callable[[ReadableParser], None] | None = None,
) -> tuple[BaseDataModule, Any]:
    """Read `DATA [--data.NAME VALUE ...] [options]`.

    DATA is a class name (`NIHChestXray14`) or a YAML file whose `data` section is used: a fragment of `configs/data`,
    or the configuration of a whole run, whose other sections are passed over. `--config FILE`, also several, does the
    same. Later words override earlier ones; `--root X` is short for `--data.root X`.

    Args:
        words: The words after the command.
        command: The command's name, for its help.
        description: What the command does, for its help.
        add_options: Adds the command's own options to the parser.

    Returns:
        (the data set, the parsed settings with the command's own options as attributes).

    Raises:
        DataError: Unknown class, file, setting or option, with the nearest match.
    """
    import_classes()
    words = _spell_out(words)
    # The program is cli.py alone, so that messages point to commands that exist (`python cli.py fit --data.help NAME`).
    usage = f"python cli.py {command} DATA [--root FOLDER] [--data.NAME VALUE ...] [options]"
    parser = DataParser(prog="cli.py", usage=usage, description=f"{description} {DATA_HELP}")
    parser.add_argument("--config", action="config", help="Configuration with a data section; the same as DATA.")
    parser.add_subclass_arguments(BaseDataModule, "data", required=True)
    if add_options is not None:
        add_options(parser)
    known = {action.dest.partition(".")[0] for action in parser._actions}
    for section in sorted(_sections(words) - known):
        parser.add_argument(f"--{section}", type=_pass_over, help=argparse.SUPPRESS)
    settings = parser.parse_args(words)
    try:
        datamodule: BaseDataModule = parser.instantiate_classes(settings).data
    except ValueError as error:  # jsonargparse wraps what a class says of its arguments
        own, _ = meaning(error)
        raise own or error from None
    return datamodule, settings


def build_data(word: str, options: Sequence[str] = (), command: str = "describe") -> BaseDataModule:
    """Build one data set from its DATA word and `--data.NAME VALUE` options; errors as in `read_data`."""
    return read_data([word, *options], command, "A data set.")[0]


def _spell_out(words: Sequence[str]) -> list[str]:
    """Give the first word its option, `--config FILE` or `--data=NAME`, and `--root` its full name."""
    words = [f"--data.root{word[6:]}" if word.partition("=")[0] == "--root" else word for word in words]
    if not words or words[0].startswith("-"):
        return words
    if Path(words[0]).suffix in SUFFIXES:
        return ["--config", *words]
    return [f"--data={words[0]}", *words[1:]]


def _pass_over(section: object) -> SimpleNamespace:
    """Stand for a section that the command does not use."""
    return SimpleNamespace()


def _sections(words: Sequence[str]) -> set[str]:
    """Top-level keys of all configuration files that the words name."""
    return {entry.dotted.partition(".")[0] for entry in Given(words).entries if entry.file is not None}
