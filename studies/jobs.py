"""Runs a study on this machine: in this process, or in several that each take a GPU where there are GPUs."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from datamodules.errors import DataError
from studies.cell_folder import Failure, holder_name
from studies.cells import Cell
from studies.layers import StudyError
from studies.processes import usable_cores
from studies.runner import Execute, folder_of, starts_processes
from studies.spec import Study
from studies.watch import Watch, shown
from studies.worker import begin, work

PATIENCE = 60.0  # seconds that an interrupted run has to save itself
LOOK = 0.2  # seconds between two looks at the workers
MAX_RESTARTS = 3  # of workers that were killed without a cell
JOBS_PER_CORE = 4  # more only wait for each other, and fill the memory
ROWS_EVERY = 30.0  # seconds between two looks for new rows, at least
ROWS_SHARE = 20  # and so many times as long as one takes
WORKERS = ".workers"  # folder of the workers' logs in the study's


def run_study(
    study: Study,
    runs_dir: Path,
    execute: Execute | None = None,
    *,
    jobs: int = 1,
    only: Collection[str] | None = None,
) -> list[Failure]:
    """Run every cell that is not finished; a failed cell is recorded and does not stop the others.

    Args:
        study: The study.
        runs_dir: Folder of all experiments.
        execute: Runs one cell from the words of its command line; for a single job.
        jobs: Processes that run cells, no more than there are cells to run; one runs them here.
        only: Names of the cells to run; default: all.

    Returns:
        The cells that have no result.

    Raises:
        StudyError: Far more jobs than cores.
    """
    begin(study, runs_dir)
    chosen = [cell for cell in study.cells if only is None or cell.name in only]
    left = [cell for cell in chosen if not folder_of(study, cell, runs_dir).finished()]
    jobs = max(1, min(jobs, len(left)))
    most = max(JOBS_PER_CORE * usable_cores(), len(visible_gpus()))
    if jobs > most:
        raise StudyError(f"{jobs} jobs on {usable_cores()} cores", where="--jobs", valid=f"1 to {most}")
    with shown(Watch(study, runs_dir), jobs, _new_rows(runs_dir / study.name)):
        if jobs == 1:
            return work(study, runs_dir, execute, only)
        alone = _alone(left)
        if alone:
            work(study, runs_dir, execute, alone)
        return _run_processes(study, runs_dir, jobs, only)


def _alone(cells: Collection[Cell]) -> set[str]:
    """Cells that take several devices by themselves, so that none may run beside them, and what they need."""
    names = {cell.name for cell in cells if starts_processes(cell)}
    for cell in reversed(list(cells)):  # needs come before what needs them
        names |= set(cell.needs) if cell.name in names else set()
    return names


def _new_rows(folder: Path) -> Callable[[], None]:
    """A function that brings the study's table up to date, if it is time to: rows appear as cells finish."""
    due = time.monotonic() + ROWS_EVERY

    def update() -> None:
        nonlocal due
        begun = time.monotonic()
        if begun < due:
            return
        from studies.store import collect

        with suppress(DataError, OSError):  # what is wrong with the rows is said in the end
            collect(folder)
        due = time.monotonic() + max(ROWS_EVERY, ROWS_SHARE * (time.monotonic() - begun))

    return update


def visible_gpus() -> list[str]:
    """GPUs that this process may use, as `CUDA_VISIBLE_DEVICES` names them; asks no CUDA library."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name.strip() not in ("", "-1", "NoDevFiles")]
    folder = Path("/proc/driver/nvidia/gpus")
    return [str(number) for number in range(len(list(folder.iterdir())))] if folder.is_dir() else []


def default_jobs() -> int:
    """One process a GPU, and one without GPUs."""
    return max(1, len(visible_gpus()))


@dataclass
class _Worker:
    """One worker process, started again when it is killed from outside."""

    number: int
    command: list[str]
    environment: dict[str, str]
    log: Path

    def start(self) -> "_Worker":
        self.said = self.log.stat().st_size if self.log.is_file() else 0
        with self.log.open("ab") as log:
            # The worker stops when its end of this pipe closes: also when this process is killed.
            self.process = subprocess.Popen(
                self.command, env=self.environment, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT
            )
        return self

    def last_words(self) -> str:
        """What it has printed since it was started, from its error on."""
        text = self.log.read_bytes()[self.said :].decode(errors="replace").strip()
        return text.rpartition("error: ")[2]

    def stop(self) -> None:
        with suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGTERM)


def _run_processes(study: Study, runs_dir: Path, jobs: int, only: Collection[str] | None) -> list[Failure]:
    logs = runs_dir / study.name / WORKERS
    logs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        words = [str(study.path), "--runs_dir", str(runs_dir), *(["--scale", study.scale] if study.scale else [])]
        if only is not None:
            names = Path(scratch) / "only.txt"
            names.write_text("\n".join(only))
            words += ["--only", str(names)]
        command = [sys.executable, "-m", "studies.worker", *words]
        workers = [
            _Worker(number, command, _environment(number, jobs), logs / f"{number}.log").start()
            for number in range(jobs)
        ]
        try:
            _supervise(study, runs_dir, list(workers))
        except BaseException:
            for worker in workers:
                worker.stop()
            for worker in workers:
                with suppress(subprocess.TimeoutExpired):
                    worker.process.wait(PATIENCE)
            raise
    return lost_cells(study, runs_dir, only)


def _environment(number: int, jobs: int) -> dict[str, str]:
    """Environment of a worker: its GPU, its share of the cores, and where the packages are."""
    environment = dict(os.environ)
    gpus = visible_gpus()
    if gpus:
        environment["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]
    environment.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // jobs)))
    root = str(Path(__file__).parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))
    return environment


def _supervise(study: Study, runs_dir: Path, workers: list[_Worker]) -> None:
    """Wait for the workers; one that was killed from outside is started again, and its cell has failed once more.

    Raises:
        KeyboardInterrupt: A worker was told to stop.
        StudyError: A worker cannot work.
    """
    restarts = 0
    while workers:
        time.sleep(LOOK)
        for worker in [worker for worker in workers if worker.process.poll() is not None]:
            code = worker.process.returncode
            if code == 0:
                workers.remove(worker)
                continue
            if code in (130, 143, -signal.SIGTERM, -signal.SIGINT):
                raise KeyboardInterrupt
            blamed = _blame(study, runs_dir, worker, code) if code < 0 else False
            restarts += not blamed
            if code > 0 or restarts > MAX_RESTARTS:
                words = worker.last_words() or f"a worker ended with exit code {code}"
                raise StudyError(f"{words}\n  log:   {worker.log}")
            worker.start()


def _blame(study: Study, runs_dir: Path, worker: _Worker, code: int) -> bool:
    """Record the failure of the cell that a killed worker was running; whether there was one.

    The cell may still be locked for a while: processes that load its images end a little later.
    """
    own = holder_name(worker.process.pid)
    for cell in study.cells:
        folder = folder_of(study, cell, runs_dir)
        if own in folder.holders() and not folder.finished():
            name = signal.Signals(-code).name
            reason = f"its process was killed ({name})" + (": out of memory?" if name == "SIGKILL" else "")
            folder.record_failure(reason, reason + "\n", code=1)
            return True
    return False


def lost_cells(study: Study, runs_dir: Path, only: Collection[str] | None = None) -> list[Failure]:
    """Cells without a result that nobody runs: failed, or in need of one that failed."""
    lost: dict[str, Failure] = {}
    for cell in study.cells:  # needs come before what needs them
        folder = folder_of(study, cell, runs_dir)
        if (only is not None and cell.name not in only) or folder.finished():
            continue
        failure = folder.failure()
        need = next((need for need in cell.needs if need in lost), None)
        if failure is None and need is not None:
            failure = Failure(cell.name, f"what it needs failed: {need}")
        if failure is not None:
            lost[cell.name] = failure
    return list(lost.values())
