"""Runs one cell of a study: fills in weights and chosen settings, goes through the command line, records a failure."""

import errno
import json
import os
import shutil
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from datamodules.atomic import write_text
from datamodules.errors import DataError
from studies import display
from studies.cell_folder import CellFolder, Failure
from studies.cells import Cell
from studies.failures import exit_code
from studies.layers import StudyError, merge, nest
from studies.spec import Study
from studies.tuning import choose

Execute = Callable[[Sequence[str], Cell], None]
COLUMNS = "FARSHOT_COLUMNS"
"""Environment variable that hands a cell's columns to a process of its own."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
LEAST_SPACE = 1 << 20  # bytes; below them a disk is full, whatever the error that it led to


class CellProcessError(RuntimeError):
    """A cell that ran in processes of its own has failed.

    Attributes:
        exit_code: The exit code of its process.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.exit_code = code


def folder_of(study: Study, cell: Cell | str, runs_dir: Path) -> CellFolder:
    """Folder of a cell."""
    return CellFolder(runs_dir / study.name / (cell if isinstance(cell, str) else cell.name))


def run_cell(study: Study, cell: Cell, runs_dir: Path, execute: Execute | None = None) -> Failure | None:
    """Run one cell through the command line that a user would type; returns its failure, if any.

    The caller holds the cell's lock. An interrupted run goes on where it was.

    Raises:
        StudyError: The disk is full, which is no failure of the cell: all others would meet it, too.
    """
    folder = folder_of(study, cell, runs_dir)
    execute = execute or (execute_apart if starts_processes(cell) else execute_here)
    try:
        cell = complete(study, cell, runs_dir)
        write_text(folder.path / "cell.yaml", yaml.safe_dump(cell.config, sort_keys=False))
        words = ["fit", "--config", str(folder.path / "cell.yaml"), "--runs_dir", str(runs_dir)]
        words += ["--experiment", study.name, "--run", cell.name, "--evaluate", str(cell.kind != "trial").lower()]
        execute(words, cell)
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        code = exit_code(error)
        if code in (130, 143):  # somebody stops the study, not the cell
            raise
        if _is_full(error, folder.path):
            raise StudyError(
                f"no space left, or none that can be written to, while {cell.name} ran",
                where=str(runs_dir),
                hint="make room; the same command goes on with what is left",
            ) from error
        text = next(iter(getattr(error, "__notes__", [])), str(error))
        reason = next(iter(text.splitlines()), type(error).__name__)
        return folder.record_failure(reason, traceback.format_exc(), code=code)
    folder.forget_failure()
    clean(study, cell, runs_dir)
    return None


def _is_full(error: BaseException | None, folder: Path) -> bool:
    if shutil.disk_usage(folder).free < LEAST_SPACE:
        return True
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return True
        error = error.__cause__ or error.__context__
    return False


def complete(study: Study, cell: Cell, runs_dir: Path) -> Cell:
    """Fill in what is known only now: the place of the weights, their architecture, the settings that trials chose."""
    config, columns = cell.config, cell.columns
    if cell.weights is not None:
        config = merge(config, nest("model.init_args.weights", str(folder_of(study, cell.weights, runs_dir).path)))
    given = (config.get("model") or {}).get("init_args") or {}
    if cell.weights is None and given.get("weights") and "backbone" not in given:
        config = merge(config, nest("model.init_args.backbone", _architecture(given["weights"])))
    if cell.tuning is not None:
        names = [name for candidate in cell.candidates for name in candidate.trials]
        evaluations = {
            name: folder_of(study, name, runs_dir).run.read_summary().get("validation", []) for name in names
        }
        chosen = choose(cell.tuning, cell.candidates, evaluations)
        config = merge(config, *(nest(key, value) for key, value in chosen.items()))
        tuned = ", ".join(f"{key.rpartition('.')[2]}={value}" for key, value in chosen.items())
        columns = {**columns, "trials": len(names), "selection": cell.tuning.selection, "tuned": tuned}
    return replace(cell, config=config, columns=columns)


def _architecture(weights: str) -> str:
    """Architecture that weights name.

    Raises:
        DataError: They do not.
    """
    from lightning_modules.backbones.checkpoints import read_weights

    name = read_weights(weights).architecture
    if name is None:
        raise DataError(
            f"the weights {weights} do not say which network they belong to",
            where="weights",
            hint="set model.init_args.backbone in the block's config",
        )
    return name


def clean(study: Study, cell: Cell, runs_dir: Path) -> None:
    """Remove what a finished cell is not to keep: checkpoints, of which a study has thousands, and what kills left."""
    folder = folder_of(study, cell, runs_dir)
    keep = {"pretrain": "last", "trial": "none"}.get(cell.kind, study.keep)
    for leftover in folder.path.glob(".*.tmp*"):
        leftover.unlink()
    checkpoints = folder.run.checkpoints
    if keep == "none":
        shutil.rmtree(checkpoints, ignore_errors=True)
        return
    selected = folder.run.read_summary().get("checkpoint")
    kept = {selected, "checkpoints/last.ckpt"} if keep == "last" else {selected}
    for path in checkpoints.iterdir() if checkpoints.is_dir() else ():
        if path.relative_to(folder.path).as_posix() not in kept:
            path.unlink()


def starts_processes(cell: Cell) -> bool:
    """Whether the trainer's strategy starts further processes, each with the command line of the first."""
    trainer: Mapping[str, Any] = cell.config.get("trainer") or {}
    return str(trainer.get("strategy") or "auto").startswith(("ddp", "fsdp", "deepspeed"))


def execute_here(words: Sequence[str], cell: Cell) -> None:
    """Run a cell in this process, quietly: the study shows its own progress."""
    from studies.lightning_cli import FarshotCLI

    quiet = ["--trainer.enable_progress_bar", "false", *mirror_words()]
    with warnings.catch_warnings(), display.quiet():
        warnings.simplefilter("ignore")
        FarshotCLI([*words, *quiet], columns=cell.columns)


def execute_apart(words: Sequence[str], cell: Cell) -> None:
    """Run a cell as a command of its own, whose processes may start it once more each.

    Raises:
        CellProcessError: It failed; the message ends with what it printed.
    """
    door = Path(__file__).parent.parent / "cli.py"  # a file: Lightning starts the other processes by its name
    command = [sys.executable, str(door), *words, "--trainer.enable_progress_bar", "false"]
    # Without SLURM's variables: Lightning would wait for processes that a job of one task does not start.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    environment[COLUMNS] = json.dumps(cell.columns)
    # It shares this process's lock of the cell, so that nobody starts the cell while it goes on without this process.
    done = subprocess.run([*command, *mirror_words()], env=environment, capture_output=True, text=True, close_fds=False)
    if done.returncode:
        code = 143 if done.returncode in (-15, -2) else max(done.returncode, 1)
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        last = errors[-1].removeprefix("error: ") if errors else f"its process ended with {done.returncode}"
        raise CellProcessError(f"{last}\n{done.stderr[-4000:]}", code)


def mirror_words() -> list[str]:
    """Whether cells are mirrored to W&B: `study run --wandb` says."""
    return ["--wandb", os.environ.get("FARSHOT_STUDY_WANDB", "off")]
