"""Whether the cells of a study have settings that exist, found out before the first of them runs.

A typo in a transfer's settings would otherwise show when its pre-training is done, days later.
"""

import tempfile
import warnings
from collections.abc import Iterable
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import yaml

from studies.cells import Cell
from studies.layers import StudyError
from studies.lightning_cli import FarshotCLI
from studies.runs import flatten


class Parsed(FarshotCLI):
    """Reads the words of a command line and does nothing further."""

    def before_instantiate_classes(self) -> None:
        """Leave run folders alone."""
        self.finished = True

    def _run_subcommand(self, subcommand: str) -> None:
        """Run nothing."""


def check_settings(cells: Iterable[Cell]) -> None:
    """Read the settings of one cell of every form: same keys, same classes, same types of values (0.2 s each).

    Raises:
        StudyError: A setting does not exist or has a value of another type; what the parser says follows.
    """
    forms: dict[Any, Cell] = {}
    for cell in cells:
        forms.setdefault(_form(cell), cell)
    for cell in forms.values():
        _check(cell)


def _form(cell: Cell) -> Any:
    settings = flatten(cell.config)
    return frozenset(
        (key, value if key.endswith("class_path") else type(value).__name__) for key, value in settings.items()
    )


def _check(cell: Cell) -> None:
    said = StringIO()
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings(), redirect_stderr(said):
        warnings.simplefilter("ignore")
        file = Path(scratch) / "cell.yaml"
        file.write_text(yaml.safe_dump(cell.config, sort_keys=False))
        try:
            Parsed(["fit", "--config", str(file)])
        except SystemExit as stop:
            text = next(iter(getattr(stop, "__notes__", [])), said.getvalue()).replace(str(file), "its settings")
            problem, *details = text.removeprefix("error: ").splitlines()
            raise StudyError("\n".join([f"{cell.name}: {problem}", *details])) from stop
