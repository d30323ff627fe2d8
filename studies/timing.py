"""Short timings for `study run --dry-run --measure`: a few real training steps of cells that nothing tells of.

A cell of each kind is trained for a few seconds as it would be, with its data and batch, from new weights where its own
are not there yet, without evaluation. What came out stays in the study's `.timings/` and is not measured again.
"""

import shutil
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

from datamodules.atomic import write_text
from studies.cells import Cell
from studies.estimates import Measurements, budget_of, in_time, keys_of, timing_folder
from studies.failures import describe_exception, exit_code
from studies.layers import merge, nest
from studies.runner import Execute, complete, execute_apart, execute_here, folder_of, starts_processes
from studies.spec import Study
from studies.step_times import TIMINGS, read_record

SECONDS = 5  # of training, after which no further step is begun
STEPS = 50  # at most
LIMIT = 60  # seconds of one timing with all that it takes to start


def time_kinds(
    study: Study, cells: Iterable[Cell], runs_dir: Path, known: Measurements, execute: Execute | None = None
) -> Iterator[str]:
    """Time the first cell of each kind that `known` cannot judge, and add it; yields a line for each."""
    done = set()
    for cell in cells:
        kind = (keys_of(cell)[0], budget_of(cell)[0])
        if kind in done or known.seconds_of(cell) is not None:
            continue
        done.add(kind)
        folder = timing_folder(study, cell, runs_dir)
        shutil.rmtree(folder.path, ignore_errors=True)  # one that came to nothing
        try:
            with _limited(LIMIT):
                (execute or (execute_apart if starts_processes(cell) else execute_here))(
                    _words(study, cell, runs_dir), cell
                )
        except (Exception, SystemExit) as error:
            if exit_code(error) in (130, 143):
                raise
            reason = describe_exception(error).removeprefix("error: ").splitlines()[0]
            yield f"not timed: {cell.name}: {reason}"
            continue
        finally:
            shutil.rmtree(folder.run.checkpoints, ignore_errors=True)
        record = read_record(folder)
        if record is not None:
            known.add(cell, record)
            speed = f"{1000 * record.seconds:.0f} ms a step of {record.batch:.0f} images"
            yield f"timed: {cell.name}: {speed} on {record.device}"


def _words(study: Study, cell: Cell, runs_dir: Path) -> list[str]:
    folder = timing_folder(study, cell, runs_dir)
    folder.path.mkdir(parents=True)
    write_text(folder.path / "cell.yaml", yaml.safe_dump(_shortened(study, cell, runs_dir), sort_keys=False))
    words = ["fit", "--config", str(folder.path / "cell.yaml"), "--runs_dir", str(runs_dir / study.name)]
    return [*words, "--experiment", TIMINGS, "--run", cell.name, "--evaluate", "false", "--image_hashes", "false"]


def _shortened(study: Study, cell: Cell, runs_dir: Path) -> dict[str, Any]:
    """A cell's configuration for its first steps alone."""
    if cell.weights is None or folder_of(study, cell.weights, runs_dir).finished():
        config = complete(study, cell, runs_dir).config if cell.tuning is None else cell.config
    else:
        config = merge(cell.config, nest("model.init_args.transfer_depth", None))
    schedule = {"class_path": "ConstantSchedule", "init_args": {}}
    trainer = {"max_steps": STEPS, "max_epochs": -1, "max_time": {"seconds": SECONDS}}
    trainer |= {"log_every_n_steps": 1, "limit_val_batches": 0}
    return merge(config, {"trainer": trainer, "model": {"init_args": {"lr_scheduler": schedule}}})


@contextmanager
def _limited(seconds: int) -> Iterator[None]:
    """Raise TimeoutError in what takes longer."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"it took more than {in_time(seconds)}")

    before: Any = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
