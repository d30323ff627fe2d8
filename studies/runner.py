"""Runs the cells of a study in one process: weights first, then their transfers; finished cells are skipped."""

import json
import shutil
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

from datamodules.atomic import write_text
from studies import display
from studies.failures import exit_code
from studies.runs import RunFolder
from studies.spec import Cell, Study, StudyError, merge

State = Literal["finished", "failed", "waiting"]
Execute = Callable[[Sequence[str], Cell], None]


@dataclass(frozen=True)
class Failure:
    """A cell that failed: its name, the last line of why, and its log."""

    cell: str
    reason: str
    log: Path | None = None


def folder_of(study: Study, cell: Cell, runs_dir: Path) -> RunFolder:
    """Run folder of a cell."""
    return RunFolder(runs_dir / study.name / cell.name)


def state_of(folder: RunFolder) -> State:
    """Say whether a cell is finished, failed at its last try, or waits (never begun, or interrupted)."""
    if folder.read_summary().get("state") == "finished":
        return "finished"
    return "failed" if (folder.path / "failed.json").is_file() else "waiting"


def run_study(study: Study, runs_dir: Path, execute: Execute | None = None) -> list[Failure]:
    """Run every cell that is not finished; a failed cell is recorded and does not stop the others.

    Args:
        study: The study.
        runs_dir: Folder of all experiments.
        execute: Runs one cell from the words of its command line; default: in this process.

    Returns:
        The cells that failed, or could not start because their weights failed.
    """
    execute = execute or execute_here
    refuse_processes(study)
    failures: dict[str, Failure] = {}
    waiting = [cell for cell in study.cells if state_of(folder_of(study, cell, runs_dir)) != "finished"]
    display.say(f"{study.name}: {len(study.cells)} cells, {len(study.cells) - len(waiting)} finished already")
    with display.cells_progress(study.name, [cell.kind for cell in waiting]) as progress:
        for cell in waiting:
            progress.begin(cell.name)
            if cell.needs in failures:
                failures[cell.name] = Failure(cell.name, f"its weights failed: {cell.needs}")
            else:
                failure = run_cell(study, cell, runs_dir, execute)
                if failure is not None:
                    failures[cell.name] = failure
            progress.done(cell.kind, failed=cell.name in failures)
    return list(failures.values())


def refuse_processes(study: Study) -> None:
    """Raise a StudyError where a cell would start processes of its own: they would start the study again."""
    for cell in study.cells:
        strategy = str(cell.config.get("trainer", {}).get("strategy") or "auto")
        if strategy.startswith(("ddp", "fsdp", "deepspeed")):
            raise StudyError(
                f"a study runs its cells in one process, not by strategy {strategy}",
                where=f"{study.path}, {cell.name}",
                hint="use configs/trainer/cpu.yaml or gpu.yaml, or `fit` for a single run on several devices",
            )


def run_cell(study: Study, cell: Cell, runs_dir: Path, execute: Execute) -> Failure | None:
    """Run one cell through the command line that a user would type; returns its failure, if any."""
    folder = folder_of(study, cell, runs_dir)
    folder.path.mkdir(parents=True, exist_ok=True)
    failed = folder.path / "failed.json"
    config = cell.config
    if cell.needs is not None:
        weights = str(runs_dir / study.name / cell.needs)
        config = merge(config, {"model": {"init_args": {"weights": weights}}})
    write_text(folder.path / "cell.yaml", yaml.safe_dump(config, sort_keys=False))
    words = ["fit", "--config", str(folder.path / "cell.yaml"), "--runs_dir", str(runs_dir)]
    words += ["--experiment", study.name, "--run", cell.name, "--evaluate", "true"]
    try:
        execute(words, cell)
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        if exit_code(error) in (130, 143):  # somebody stops the study, not the cell
            raise
        log = folder.path / "failed.log"
        write_text(log, traceback.format_exc())
        text = next(iter(getattr(error, "__notes__", [])), str(error))
        reason = next(iter(text.splitlines()), type(error).__name__)
        write_text(failed, json.dumps({"cell": cell.name, "reason": reason}))
        return Failure(cell.name, reason, log)
    failed.unlink(missing_ok=True)
    if cell.kind == "transfer" and study.keep == "none":
        shutil.rmtree(folder.checkpoints, ignore_errors=True)
    return None


def execute_here(words: Sequence[str], cell: Cell) -> None:
    """Run a cell in this process, quietly: the study shows its own progress."""
    from studies.lightning_cli import FarshotCLI

    quiet = ["--trainer.enable_progress_bar", "false", "--wandb", "off"]
    with warnings.catch_warnings(), display.quiet():
        warnings.simplefilter("ignore")
        FarshotCLI([*words, *quiet], columns=cell.columns)


def failures_of(study: Study, runs_dir: Path) -> list[Failure]:
    """Recorded failures of a study's cells."""
    found = []
    for cell in study.cells:
        path = folder_of(study, cell, runs_dir).path / "failed.json"
        if path.is_file():
            found.append(Failure(cell.name, json.loads(path.read_text())["reason"], path.with_suffix(".log")))
    return found
