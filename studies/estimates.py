"""How long cells take and how much disk they keep, from those that are finished."""

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from studies.cell_folder import CellFolder
from studies.cells import Cell
from studies.runner import folder_of
from studies.spec import Study

Key = tuple[Any, ...]


@dataclass(frozen=True)
class Estimate:
    """What cells will take.

    Attributes:
        seconds: Of training and evaluation, one cell after another.
        bytes: Disk that their folders will keep.
        known: Cells that a finished one could stand for.
        unknown: Cells that none could.
        measured: Finished cells that this rests on.
    """

    seconds: float
    bytes: float
    known: int
    unknown: int
    measured: int


@dataclass
class Measurements:
    """Seconds and bytes of finished cells, by what they have in common with those to come."""

    seconds: dict[Key, list[float]] = field(default_factory=lambda: defaultdict(list))
    bytes: dict[Key, list[float]] = field(default_factory=lambda: defaultdict(list))
    cells: int = 0

    def add(self, cell: Cell, seconds: float, size: float) -> None:
        """Add a finished cell."""
        self.cells += 1
        for key in keys_of(cell):
            self.seconds[key].append(seconds)
            self.bytes[key].append(size)

    def seconds_of(self, cell: Cell) -> float | None:
        """Median seconds of the finished cells most like this one; None where there is none of its kind."""
        key = next((key for key in keys_of(cell) if key in self.seconds), None)
        return statistics.median(self.seconds[key]) if key is not None else None

    def estimate(self, cells: Iterable[Cell]) -> Estimate:
        """What some cells will take."""
        seconds, size, known, unknown = 0.0, 0.0, 0, 0
        for cell in cells:
            key = next((key for key in keys_of(cell) if key in self.seconds), None)
            if key is None:
                unknown += 1
                continue
            known += 1
            seconds += statistics.median(self.seconds[key])
            size += statistics.median(self.bytes[key])
        return Estimate(seconds, size, known, unknown, self.cells)


def keys_of(cell: Cell) -> list[Key]:
    """What a cell has in common with others, the closest first; the last two keys are shared with few demands."""
    columns: Mapping[str, Any] = cell.columns
    own = cell.kind, columns.get("architecture"), columns.get("target")
    budget = tuple(columns.get(name) for name in ("shots", "num_images", "fraction"))
    return [(*own, columns.get("protocol"), *budget), (*own, columns.get("protocol")), own]


def measure(study: Study, runs_dir: Path) -> Measurements:
    """Measure the finished cells of a study."""
    found = Measurements()
    for cell in study.cells:
        folder = folder_of(study, cell, runs_dir)
        summary = folder.run.read_summary() if (folder.path / "summary.json").is_file() else {}
        if summary.get("state") == "finished":
            found.add(cell, float(summary.get("run", {}).get("seconds") or 0.0), _size(folder))
    return found


def _size(folder: CellFolder) -> float:
    return float(sum(path.stat().st_size for path in folder.path.rglob("*") if path.is_file()))


def in_time(seconds: float) -> str:
    """A duration in words: "40 s", "12 min", "3.4 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def in_bytes(size: float) -> str:
    """A size in words: "0.3 MB", "12 GB"."""
    return f"{size / 1e6:.1f} MB" if size < 1e9 else f"{size / 1e9:.1f} GB"
