"""What commands print: lines, tables of metrics, the progress of a study."""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
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

    def __init__(self, progress: Progress, task: TaskID, kinds: Sequence[str]) -> None:
        self._progress, self._task, self._failed = progress, task, 0
        self._waiting = Counter(kinds)
        self._seconds: dict[str, list[float]] = {}
        self._begun = time.monotonic()

    def begin(self, cell: str) -> None:
        """Name the cell that runs."""
        self._begun = time.monotonic()
        self._progress.update(self._task, cell=cell)

    def done(self, kind: str, *, failed: bool) -> None:
        """Count a cell of a kind; where no live bar can be shown, print a line."""
        self._failed += failed
        self._waiting[kind] -= 1
        self._seconds.setdefault(kind, []).append(time.monotonic() - self._begun)
        failures = f", {self._failed} failed" if self._failed else ""
        left = self._time_left()
        self._progress.update(self._task, advance=1, failures=failures, left=left.removeprefix(", "))
        task = self._progress.tasks[self._task]
        if not console.is_terminal:
            line = f"{task.completed:.0f}/{task.total:.0f}{failures}{left}: {task.fields['cell']}"
            console.print(line, markup=False)

    def _time_left(self) -> str:
        """Time of the waiting cells, judged by the median of their kind: weights take longer than transfers."""
        if any(count and kind not in self._seconds for kind, count in self._waiting.items()):
            return ""
        left = sum(count * median(self._seconds[kind]) for kind, count in self._waiting.items() if count)
        return f", about {left / 60:.0f} min left" if left >= 60 else f", about {left:.0f} s left" if left else ""


@contextmanager
def cells_progress(name: str, kinds: Sequence[str]) -> Iterator[CellsProgress]:
    """Show the progress of a study's cells, given the kind of each."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[failures]}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
        TextColumn("{task.fields[cell]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(name, total=len(kinds), cell="", failures="", left="")
        yield CellsProgress(progress, task, kinds)
