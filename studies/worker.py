"""One process that works on a study: takes the cells that nobody else has, in an order that dependencies allow.

There is no master: any number of workers, on one machine or on many that share the disk, agree by the cells' locks and
states. `python -m studies.worker FILE --runs_dir DIR` is such a process; `study run --jobs N` starts N of them.
"""

import argparse
import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Collection
from pathlib import Path

from studies.cell_folder import CellFolder, Failure
from studies.cells import Cell
from studies.failures import describe_exception, exit_code
from studies.runner import Execute, clean, folder_of, run_cell
from studies.spec import Study, read_study

POLL = 0.5  # seconds between two looks at cells that others run
SLOWEST_POLL = 5.0


def work(
    study: Study, runs_dir: Path, execute: Execute | None = None, only: Collection[str] | None = None
) -> list[Failure]:
    """Run every cell that is not finished, until all are finished or cannot be; cells of others are waited for.

    A cell is tried again in this call unless its failure is lasting; after three attempts it is set aside.

    Args:
        study: The study.
        runs_dir: Folder of all experiments.
        execute: Runs one cell from the words of its command line; default: in this process.
        only: Names of the cells to run; default: all. What they need is waited for, not run.

    Returns:
        The cells without a result: failed, or in need of one that failed. Trials whose loss was not finite are none:
        that is what they found.
    """
    waiting = [cell for cell in study.cells if only is None or cell.name in only]
    folders = {cell.name: folder_of(study, cell, runs_dir) for cell in study.cells}
    finished: set[str] = set()
    failures: dict[str, Failure] = {}
    pause = POLL
    while True:
        progress = False
        again: list[Cell] = []
        for cell in waiting:
            outcome = _step(study, cell, runs_dir, execute, folders, finished, failures)
            progress |= outcome is not None
            if cell.name not in finished and cell.name not in failures:
                again.append(cell)
        if not again:
            trials = {cell.name for cell in study.cells if cell.kind == "trial"}
            return [lost for lost in failures.values() if not (lost.diverged and lost.cell in trials)]
        waiting, pause = again, POLL if progress else min(2 * pause, SLOWEST_POLL)
        if not progress:
            time.sleep(pause)


def _step(
    study: Study,
    cell: Cell,
    runs_dir: Path,
    execute: Execute | None,
    folders: dict[str, CellFolder],
    finished: set[str],
    failures: dict[str, Failure],
) -> bool | None:
    """Bring a cell forward if that is possible now; None where it has to wait."""
    folder = folders[cell.name]
    for need in cell.needs:
        if need not in finished and folders[need].finished():
            finished.add(need)
        lost = failures.get(need) or (_lost(folders[need]) if need not in finished else None)
        if lost is not None and lost.diverged and need != cell.weights:
            failures[need] = lost  # a trial whose rate was too high, say: its settings are not chosen
            continue
        if lost is not None:
            # A finished cell stays finished, whatever has become of its weights since.
            if not folder.finished():
                failures[cell.name] = Failure(cell.name, f"what it needs failed: {need}")
            else:
                finished.add(cell.name)
            return True
    if folder.finished():
        finished.add(cell.name)
        return True
    lost = _lost(folder)
    if lost is not None:
        failures[cell.name] = lost
        return True
    if any(need not in finished and need not in failures for need in cell.needs):
        return None
    with folder.claim() as mine:
        if not mine:
            return None
        if folder.finished():  # by another process, since the look above
            finished.add(cell.name)
            return True
        lost = _lost(folder) or run_cell(study, cell, runs_dir, execute)
    if lost is None:
        finished.add(cell.name)
    elif lost.lasting or lost.set_aside:
        failures[cell.name] = lost
    return True


def _lost(folder: CellFolder) -> Failure | None:
    """The failure of a cell that nobody will try again now, or None."""
    failure = folder.failure()
    return failure if failure is not None and (failure.lasting or failure.set_aside) else None


def begin(study: Study, runs_dir: Path) -> None:
    """Let a command that begins try again what failed before, unless set aside, and finish what a kill cut off."""
    for cell in study.cells:
        folder = folder_of(study, cell, runs_dir)
        folder.forgive()
        if folder.holders() and folder.finished():  # killed between its last row and its checkpoints' end
            with folder.claim() as mine:
                if mine:
                    clean(study, cell, runs_dir)


def end_with_parent() -> None:
    """Stop this process, resumable, when the process that started it is gone: its end of the pipe closes.

    A worker that was started by hand has no such pipe and stands alone.
    """
    if not stat.S_ISFIFO(os.fstat(0).st_mode):
        return

    def watch() -> None:
        while os.read(0, 1024):  # not by sys.stdin, whose lock the end of the interpreter would wait for
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    """Work on a study file until nothing is left that could be done; failures of cells are in their folders."""
    parser = argparse.ArgumentParser(prog="python -m studies.worker", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--runs_dir", type=Path, required=True)
    parser.add_argument("--scale")
    parser.add_argument("--only", type=Path, help="file with the names of the cells to run, one a line")
    options = parser.parse_args()
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    end_with_parent()
    only = set(options.only.read_text().splitlines()) if options.only else None
    try:
        work(read_study(options.file, options.scale), options.runs_dir, only=only)
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        print(describe_exception(error), file=sys.stderr)
        raise SystemExit(exit_code(error)) from error


if __name__ == "__main__":
    main()
