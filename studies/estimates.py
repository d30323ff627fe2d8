"""How long cells take and how much disk they keep: measured step times × the steps that each cell will take.

A run's own files tell what a step took: `summary.json` of a finished one, `metrics.jsonl` of one that runs. They count
for cells with the same network, image size, batch and device settings, first of all for those of its target.
"""

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_modules.schedules import HyperRuleSchedule
from studies.cell_folder import CellFolder
from studies.cells import Cell
from studies.runner import folder_of
from studies.runs import flatten
from studies.spec import Study
from studies.step_times import TIMINGS, Origin, Record, read_record

Key = tuple[Any, ...]
DECIDES = (
    "model.class_path",
    *(f"model.init_args.{name}" for name in ("backbone", "weights", "frozen_depth", "probe_fraction")),
    *(f"data.init_args.{name}" for name in ("image_size", "batch_size", "max_batch_per_device")),
    *(f"trainer.{name}" for name in ("precision", "accelerator", "devices", "strategy", "num_nodes")),
)
"""Settings that decide what a step takes; the images behind it are those of the target."""


@dataclass
class Estimate:
    """What cells will take.

    Attributes:
        seconds: One cell after another.
        size: Bytes that their folders will keep.
        judged_by: Cells by what they were judged by.
        devices: What that ran on.
        unknown: Cells that nothing tells of.
        sized: Cells whose size a finished one tells.
    """

    seconds: float = 0.0
    size: float = 0.0
    judged_by: Counter[Origin] = field(default_factory=Counter)
    devices: set[str] = field(default_factory=set)
    unknown: list[Cell] = field(default_factory=list)
    sized: int = 0


@dataclass
class Measurements:
    """Records of runs, by what they have in common with cells to come."""

    records: dict[str, Record] = field(default_factory=dict)
    _names: dict[Key, set[str]] = field(default_factory=lambda: defaultdict(set))
    _keys: dict[str, tuple[Key, Key]] = field(default_factory=dict)
    _images: dict[tuple[str, str], float] = field(default_factory=dict)

    def add(self, cell: Cell, record: Record) -> None:
        """Add a run of a cell, or bring it up to date."""
        self.records[cell.name] = record
        for key in (*self._keys_of(cell), ("size", cell.kind, *self._keys_of(cell)[0])):
            self._names[key].add(cell.name)
        unit, number = budget_of(cell)
        if record.n_train is not None and number:
            self._images[str(cell.columns.get("target")), unit] = record.n_train / number

    def like(self, cell: Cell) -> list[Record]:
        """Records of the runs most like a cell: itself, those of its target, or any; short timings only for want."""
        own = self.records.get(cell.name)
        if own is not None and own.origin != "timed":
            return [own]
        for key in self._keys_of(cell):
            found = [self.records[name] for name in self._names.get(key, ())]
            if found:
                return [record for record in found if record.origin != "timed"] or found
        return []

    def seconds_of(self, cell: Cell) -> float | None:
        """Seconds that a cell will still take; None where nothing tells."""
        records = self.like(cell)
        steps = self._steps(cell, records)
        if steps is None:
            return None
        rest = [record.rest for record in records if record.rest is not None]
        return steps * statistics.median(record.seconds for record in records) + (
            statistics.median(rest) if rest else 0.0
        )

    def estimate(self, cells: Iterable[Cell]) -> Estimate:
        """What some cells will still take."""
        found = Estimate()
        for cell in cells:
            seconds, records = self.seconds_of(cell), self.like(cell)
            sizes = [
                self.records[name].size for name in self._names.get(("size", cell.kind, *self._keys_of(cell)[0]), ())
            ]
            known = [size for size in sizes if size is not None]
            found.size += statistics.median(known) if known else 0.0
            found.sized += bool(known)
            if seconds is None:
                found.unknown.append(cell)
                continue
            found.seconds += seconds
            found.judged_by[records[0].origin] += 1
            found.devices |= {record.device for record in records}
        return found

    def _steps(self, cell: Cell, records: list[Record]) -> float | None:
        if not records:
            return None
        unit, number = budget_of(cell)
        each = 1.0 if unit == "num_images" else self._images.get((str(cell.columns.get("target")), unit))
        own = self.records.get(cell.name)
        n_train = own.n_train if own is not None and own.n_train else round(each * number) if each else None
        steps = steps_of(cell.config, n_train, statistics.median(record.batch for record in records))
        done = own.steps if own is not None and own.origin == "running" else 0
        return None if steps is None else max(0, steps - done)

    def _keys_of(self, cell: Cell) -> tuple[Key, Key]:
        if cell.name not in self._keys:
            self._keys[cell.name] = keys_of(cell)
        return self._keys[cell.name]


def keys_of(cell: Cell) -> tuple[Key, Key]:
    """What decides the seconds of a cell's step: with its target, and without."""
    flat = flatten(cell.config)
    network = tuple(str(flat.get(name) or None) for name in DECIDES)  # nothing frozen may be 0, too
    return (str(cell.columns.get("target")), *network), network


def budget_of(cell: Cell) -> tuple[str, float]:
    """How much data a cell is given: ("shots", 5), ("num_images", 100) or ("fraction", 0.1)."""
    given = (cell.config.get("data") or {}).get("init_args") or {}
    if given.get("num_images") is not None:
        return "num_images", float(given["num_images"])
    if given.get("shots") not in (None, "full"):
        return "shots", float(given["shots"])
    return "fraction", float(given.get("fraction") or 1.0)


def steps_of(config: Mapping[str, Any], n_train: int | None, batch: float) -> int | None:
    """Optimizer steps of a run: its schedule's own length, or the trainer's; None where the images are not known."""
    trainer = config.get("trainer") or {}
    schedule = ((config.get("model") or {}).get("init_args") or {}).get("lr_scheduler") or {}
    if str(schedule.get("class_path")).endswith(HyperRuleSchedule.__name__):
        with suppress(ValueError, TypeError):  # settings that the run itself will refuse
            rule = HyperRuleSchedule(**(schedule.get("init_args") or {}))
            return rule.length or (rule.plan(n_train).total if n_train else None)
        return None
    lengths = [int(trainer["max_steps"])] if (trainer.get("max_steps") or -1) > 0 else []
    if (trainer.get("max_epochs") or -1) > 0:
        if n_train is None:
            return min(lengths, default=None)
        lengths.append(int(trainer["max_epochs"]) * max(1, int(n_train // batch)))
    return min(lengths, default=None)


def measure(study: Study, runs_dir: Path) -> Measurements:
    """Read the records of a study's finished and running cells, and of its short timings."""
    found = Measurements()
    for cell in study.cells:
        for folder in (timing_folder(study, cell, runs_dir), folder_of(study, cell, runs_dir)):
            record = read_record(folder)
            if record is not None:
                found.add(cell, record)
    return found


def timing_folder(study: Study, cell: Cell, runs_dir: Path) -> CellFolder:
    """Where a short timing of a cell is, if there was one."""
    return CellFolder(runs_dir / study.name / TIMINGS / cell.name)


# Words ---------------------------------------------------------------------------------------------------------------


def in_time(seconds: float) -> str:
    """A duration in words: "40 s", "12 min", "3.4 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def in_bytes(size: float) -> str:
    """A size in words: "0.3 MB", "12 GB"."""
    return f"{size / 1e6:.1f} MB" if size < 1e9 else f"{size / 1e9:.1f} GB"
