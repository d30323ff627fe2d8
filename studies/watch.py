"""What a study is doing, read from its folders: for `study status` and for the display of `study run`."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

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
from studies.step_times import last_metrics, read_record

INTERVAL = 1.0  # seconds between two looks
SHOWN = 8  # running cells in the display


@dataclass
class Watch:
    """Follows a study's cells on disk; a cell that is finished is looked at once.

    Attributes:
        study: The study.
        runs_dir: Folder of all experiments.
        states: State of each cell at the last look.
        measured: Costs of the finished and running cells.
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
            if state in ("finished", "running"):
                record = read_record(folder)
                if record is not None:
                    self.measured.add(cell, record)
                if record is not None and state == "finished" and not first:
                    self.trained += record.steps * record.seconds
            if state != self.states.get(cell.name):
                self.states[cell.name] = state
                changed.append(cell)
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

    def blocked(self) -> list[Cell]:
        """Cells that wait in vain: what they need has failed and is not tried again now."""
        lost = {failure.cell for failure in self.failures() if failure.lasting or failure.set_aside}
        found = []
        for cell in self.study.cells:  # needs come before what needs them
            if self.states[cell.name] == "waiting" and lost & set(cell.needs):
                lost.add(cell.name)
                found.append(cell)
        return found

    def left(self) -> list[Cell]:
        """Cells that are running, or that a running study will still come to."""
        lost = {failure.cell for failure in self.failures() if failure.lasting or failure.set_aside}
        lost |= {cell.name for cell in self.blocked()}
        return [cell for cell in self.study.cells if self.states[cell.name] != "finished" and cell.name not in lost]

    def progress_of(self, cell: Cell) -> str:
        """What a cell shows of itself: step and a few metrics; empty where there are none yet."""
        metrics = last_metrics(folder_of(self.study, cell, self.runs_dir).run.metrics)
        shown = [f"step {metrics['step']}"] if "step" in metrics else []
        for name, value in metrics.items():
            if isinstance(value, float) and name.endswith(("loss", "accuracy", "mean_auroc")) and len(shown) < 4:
                shown.append(f"{name} {value:.3f}")
        return ", ".join(shown)

    def time_left(self, jobs: int | None = None) -> float | None:
        """Seconds until the open cells are done by so many processes (default: as many as run now).

        None while some kind has not been measured.
        """
        estimate = self.measured.estimate(self.left())
        return None if estimate.unknown else estimate.seconds / (jobs or max(1, len(self.running())))


def table_of(watch: Watch) -> Table:
    """Cells by kind and state."""
    table = Table(box=None, padding=(0, 2, 0, 0), show_edge=False)
    table.add_column("cells")
    for state in STATES:
        table.add_column(state, justify="right")
    for kind, counter in watch.counts().items():
        table.add_row(kind, *(str(counter[state] or "–") for state in STATES))
    return table


@dataclass
class Display:
    """A study's progress on the screen: a live table and a line a finished cell, or the lines alone without a screen.

    Attributes:
        watch: The study's cells.
        jobs: Processes that run them; None: as many as run at the moment.
    """

    watch: Watch
    jobs: int | None = None
    begun: float = field(default_factory=time.monotonic)

    def time_left(self) -> str:
        """Time left in words; empty while nobody can tell."""
        seconds = self.watch.time_left(self.jobs)
        if not seconds:
            return ""
        # What lies between the training of two cells shows in the time that has passed.
        trained = self.watch.trained
        overhead = (time.monotonic() - self.begun) * (self.jobs or 1) / trained if trained else 1.0
        return f", about {in_time(seconds * max(1.0, overhead))} left"

    def line(self, cell: Cell) -> str:
        """What is said of a cell that is done."""
        counts = Counter(self.watch.states.values())
        state, broken = self.watch.states[cell.name], counts["failed"] + counts["set aside"]
        failed = f", {broken} failed" if broken else ""
        tail = f" ({state})" if state != "finished" else f"  {self.watch.progress_of(cell)}".rstrip()
        done = f"{counts['finished'] + broken}/{len(self.watch.study.cells)}"
        return f"{done}{failed}{self.time_left()}: {cell.name}{tail}"

    def render(self) -> Group:
        """The live table."""
        watch = self.watch
        rows = [Text(f"  {cell.name}  {watch.progress_of(cell)}", style="dim") for cell in watch.running()[:SHOWN]]
        return Group(table_of(watch), Text(f"{in_time(time.monotonic() - self.begun)} so far{self.time_left()}"), *rows)


@contextmanager
def shown(watch: Watch, jobs: int | None = None, on_finished: Callable[[], None] | None = None) -> Iterator[None]:
    """Show a study's progress while it runs.

    Args:
        watch: The study's cells.
        jobs: Processes that run them; None: as many as run at the moment.
        on_finished: Called from time to time after cells have finished.
    """
    watch.look()
    display, done, news = Display(watch, jobs), threading.Event(), False
    live = Live(display.render(), console=console, auto_refresh=False) if console.is_terminal else None

    def update() -> bool:
        changed = [cell for cell in watch.look() if watch.states[cell.name] in ("finished", "failed", "set aside")]
        for cell in changed:
            console.print(display.line(cell), markup=False)
        if live is not None:
            live.update(display.render(), refresh=True)
        return bool(changed)

    def follow() -> None:
        nonlocal news
        while not done.wait(INTERVAL):
            news |= update()
            if news and on_finished is not None:
                on_finished()

    with live or nullcontext():
        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            update()
