"""What commands print: lines, tables of metrics, the progress of a study."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

if TYPE_CHECKING:
    from lightning_modules.metrics import EvaluationResult

console = Console(highlight=False, soft_wrap=True)
_quiet = False


@contextmanager
def quiet() -> Iterator[None]:
    """Within it, runs print neither lines nor tables."""
    global _quiet
    before, _quiet = _quiet, True
    try:
        yield
    finally:
        _quiet = before


def say(text: str) -> None:
    """Print one line."""
    if not _quiet:
        console.print(text, markup=False)


def show_metrics(split: str, result: "EvaluationResult") -> None:
    """Print the overall metrics and, for up to 30 classes, AUROC and average precision of each."""
    if _quiet:
        return
    overall = Table(title=f"{split}: {len(result.index)} images", title_justify="left")
    overall.add_column("metric")
    overall.add_column("value", justify="right")
    for value in result.metrics:
        if not value.class_name:
            overall.add_row(value.name, f"{value.value:.4f}")
    console.print(overall)
    classes = {value.class_name: value for value in result.metrics if value.name == "auroc" and value.class_name}
    if not 1 < len(classes) <= 30:
        return
    precision = {value.class_name: value.value for value in result.metrics if value.name == "average_precision"}
    table = Table(title=f"{split}, each class", title_justify="left")
    for column in ("class", "positives", "known", "AUROC", "average precision"):
        table.add_column(column, justify="left" if column == "class" else "right")
    for name, value in classes.items():
        numbers = (str(value.positives), str(value.support), f"{value.value:.4f}", f"{precision[name]:.4f}")
        table.add_row(name, *numbers)
    console.print(table)


class CellsProgress:
    """A bar over cells with the time left, judged from the cells done so far."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task, self._failed = progress, task, 0

    def begin(self, cell: str) -> None:
        """Name the cell that runs."""
        self._progress.update(self._task, cell=cell)

    def done(self, *, failed: bool) -> None:
        """Count a cell; on a terminal that shows no live bar, print a line."""
        self._failed += failed
        failures = f", {self._failed} failed" if self._failed else ""
        self._progress.update(self._task, advance=1, failures=failures)
        task = self._progress.tasks[self._task]
        if not console.is_terminal:
            left = task.time_remaining
            minutes = f", about {left / 60:.0f} min left" if left else ""
            line = f"{task.completed:.0f}/{task.total:.0f}{failures}{minutes}: {task.fields['cell']}"
            console.print(line, markup=False)


@contextmanager
def cells_progress(name: str, total: int) -> Iterator[CellsProgress]:
    """Show the progress of a study's cells."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[failures]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[cell]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal, speed_estimate_period=3600) as progress:
        yield CellsProgress(progress, progress.add_task(name, total=total, cell="", failures=""))
