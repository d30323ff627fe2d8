"""What a study is doing, read from its folders: for `study status` and for the display of `study run`."""

import json
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from studies.cell_folder import STATES, Failure, State
from studies.cells import KINDS, Cell
from studies.display import console
from studies.estimates import Measurements, in_time
from studies.runner import folder_of
from studies.spec import Study

INTERVAL = 1.0  # seconds between two looks
TAIL = 4096  # bytes of a metrics file that are read for its last line
SHOWN = 8  # running cells in the display


@dataclass
class Watch:
    """Follows a study's cells on disk; a cell that is finished is looked at once.

    Attributes:
        study: The study.
        runs_dir: Folder of all experiments.
        states: State of each cell at the last look.
        measured: Seconds of the finished cells.
        trained: Seconds of training of the cells that finished after the first look.
    """

    study: Study
    runs_dir: Path
    states: dict[str, State] = field(default_factory=dict)
    measured: Measurements = field(default_factory=Measurements)
    trained: float = 0.0

    def look(self) -> list[Cell]:
        """Look at all cells that were not finished; returns those whose state is new, finished or failed ones first."""
        changed, first = [], not self.states
        for cell in self.study.cells:
            if self.states.get(cell.name) == "finished":
                continue
            folder = folder_of(self.study, cell, self.runs_dir)
            state = folder.state()
            if state != self.states.get(cell.name):
                self.states[cell.name] = state
                changed.append(cell)
                if state == "finished":
                    seconds = float(folder.run.read_summary().get("run", {}).get("seconds") or 0.0)
                    self.measured.add(cell, seconds, 0.0)
                    self.trained += 0.0 if first else seconds
        return sorted(changed, key=lambda cell: STATES.index(self.states[cell.name]))

    def counts(self) -> dict[str, Counter[State]]:
        """Cells by kind and state."""
        found: dict[str, Counter[State]] = {kind: Counter() for kind in KINDS}
        for cell in self.study.cells:
            found[cell.kind][self.states[cell.name]] += 1
        return {kind: counter for kind, counter in found.items() if counter}

    def running(self) -> list[Cell]:
        """Cells that some process works on."""
        return [cell for cell in self.study.cells if self.states[cell.name] == "running"]

    def failures(self) -> list[Failure]:
        """Recorded failures."""
        failed = [cell for cell in self.study.cells if self.states[cell.name] in ("failed", "set aside")]
        found = [folder_of(self.study, cell, self.runs_dir).failure() for cell in failed]
        return [failure for failure in found if failure is not None]

    def last_metrics(self, cell: Cell) -> dict[str, Any]:
        """The last line of a run's metrics; empty where there is none yet."""
        path = folder_of(self.study, cell, self.runs_dir).run.metrics
        try:
            with path.open("rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL))
                lines = file.read().decode("utf-8", "replace").splitlines()
        except OSError:
            return {}
        for line in reversed(lines):
            try:
                return dict(json.loads(line))
            except (ValueError, TypeError):  # cut off, or being written
                continue
        return {}

    def progress_of(self, cell: Cell) -> str:
        """What a running cell shows of itself: step and a few metrics."""
        metrics = self.last_metrics(cell)
        shown = [f"step {metrics['step']}"] if "step" in metrics else []
        for name, value in metrics.items():
            if isinstance(value, float) and name.endswith(("loss", "accuracy", "mean_auroc")) and len(shown) < 4:
                shown.append(f"{name} {value:.3f}")
        return ", ".join(shown)

    def time_left(self, jobs: int) -> float | None:
        """Seconds until the open cells are done by so many processes; None while some kind has not been measured."""
        left = [cell for cell in self.study.cells if self.states[cell.name] in ("running", "waiting")]
        estimate = self.measured.estimate(left)
        return None if estimate.unknown else estimate.seconds / jobs


def table_of(watch: Watch) -> Table:
    """Cells by kind and state."""
    table = Table(box=None, padding=(0, 2, 0, 0), show_edge=False)
    table.add_column("cells")
    for state in STATES:
        table.add_column(state, justify="right")
    for kind, counter in watch.counts().items():
        table.add_row(kind, *(str(counter[state] or "–") for state in STATES))
    return table


@contextmanager
def shown(watch: Watch, jobs: int) -> Iterator[None]:
    """Show a study's progress while it runs: a live table, or a line a cell where there is no screen."""
    watch.look()
    done, cells, begun = threading.Event(), len(watch.study.cells), time.monotonic()

    def left() -> str:
        seconds = watch.time_left(jobs)
        if not watch.trained or not seconds:
            return ""
        # What lies between the training of two cells shows in the time that has passed.
        overhead = (time.monotonic() - begun) * jobs / watch.trained
        return f", about {in_time(seconds * max(1.0, overhead))} left"

    def line(cell: Cell) -> None:
        state = watch.states[cell.name]
        if state not in ("finished", "failed", "set aside"):
            return
        counts = Counter(watch.states.values())
        broken = counts["failed"] + counts["set aside"]
        failed = f", {broken} failed" if broken else ""
        tail = "" if state == "finished" else f" ({state})"
        console.print(f"{counts['finished'] + broken}/{cells}{failed}{left()}: {cell.name}{tail}", markup=False)

    def render() -> Group:
        rows = [Text(f"  {cell.name}  {watch.progress_of(cell)}", style="dim") for cell in watch.running()[:SHOWN]]
        return Group(table_of(watch), Text(f"{in_time(time.monotonic() - begun)} so far{left()}"), *rows)

    def follow(live: Live | None) -> None:
        while not done.wait(INTERVAL):
            update(live)

    def update(live: Live | None) -> None:
        changed = watch.look()
        if live is not None:
            live.update(render(), refresh=True)
            return
        for cell in changed:
            line(cell)

    live = Live(render(), console=console, auto_refresh=False) if console.is_terminal else None
    if live is not None:
        live.start()
    thread = threading.Thread(target=follow, args=(live,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        update(live)
        if live is not None:
            live.stop()
