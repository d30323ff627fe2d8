"""What commands print: lines and tables of metrics."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from lightning_modules.metrics import MetricValue

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


def show_metrics(split: str, scores: Sequence["MetricValue"], images: int) -> None:
    """Print the overall metrics and, for up to 30 classes, AUROC and average precision of each."""
    if _quiet:
        return
    overall = Table(title=f"{split}: {images} images", title_justify="left")
    overall.add_column("metric")
    overall.add_column("value", justify="right")
    for value in scores:
        if not value.class_name:
            overall.add_row(value.name, f"{value.value:.4f}")
    console.print(overall)
    classes = {value.class_name: value for value in scores if value.name == "auroc" and value.class_name}
    if not 1 < len(classes) <= 30:
        return
    precision = {value.class_name: value.value for value in scores if value.name == "average_precision"}
    table = Table(title=f"{split}, each class", title_justify="left")
    for column in ("class", "positives", "known", "AUROC", "average precision"):
        table.add_column(column, justify="left" if column == "class" else "right")
    for name, value in classes.items():
        numbers = (str(value.positives), str(value.support), f"{value.value:.4f}", f"{precision[name]:.4f}")
        table.add_row(name, *numbers)
    console.print(table)
