"""Submits a study to SLURM through submitit: weights first, short cells packed into jobs, arrays of bounded size.

The section `slurm` of a study file:

    slurm:
      job_minutes: 60         # cells of the same weights and target share a job of about this length
      cells_per_job: 20       # where no finished cell tells how long they take
      array_limit: 500        # jobs of one array
      executor: slurm         # or local: processes on this machine
      resources:              # as submitit's update_parameters takes them, by kind of cell
        pretrain: {timeout_min: 1440, gpus_per_node: 4, cpus_per_task: 32, mem_gb: 120, slurm_partition: long}
        transfer: {timeout_min: 240, gpus_per_node: 1, cpus_per_task: 8, mem_gb: 32}
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from studies.cells import Cell
from studies.estimates import Measurements, measure
from studies.layers import StudyError, check_keys
from studies.runner import folder_of
from studies.spec import Study, read_study
from studies.worker import begin, work

KEYS = ("job_minutes", "cells_per_job", "array_limit", "executor", "resources")
KINDS = ("pretrain", "transfer")
JOB_MINUTES, CELLS_PER_JOB, ARRAY_LIMIT = 60.0, 20, 500
FOLDER = ".slurm"  # of the jobs' logs, in the study's


class JobError(RuntimeError):
    """Cells of a job that have no result."""


@dataclass(frozen=True)
class Pack:
    """The work of one job: some cells of a study, in this order. Submitted again where the cluster ends it early.

    Attributes:
        study: The study file.
        scale: Its scale.
        runs_dir: Folder of all experiments.
        cells: Names.
    """

    study: str
    scale: str | None
    runs_dir: str
    cells: tuple[str, ...]

    def __call__(self) -> None:
        """Run the cells.

        Raises:
            JobError: Some have no result, so that the cluster shows the job as failed.
        """
        failures = work(read_study(Path(self.study), self.scale), Path(self.runs_dir), only=self.cells)
        if failures:
            lines = [f"  {failure.cell}: {failure.reason}" for failure in failures]
            raise JobError("\n".join([f"{len(failures)} of {len(self.cells)} cells have no result:", *lines]))

    def checkpoint(self) -> Any:
        """What submitit submits when the time is over: the same again, which goes on where this one was."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


@dataclass(frozen=True)
class Batch:
    """Jobs that may start together.

    Attributes:
        kind: pretrain or transfer: which resources they take.
        needs: The pre-training cell that they wait for, or None.
        packs: The jobs.
    """

    kind: str
    needs: str | None
    packs: tuple[Pack, ...]


def plan(study: Study, runs_dir: Path, only: Collection[str] | None = None) -> list[Batch]:
    """Divide the cells that are not finished into batches of jobs.

    Each pre-training is a job of its own. Transfers of the same weights and target are packed, a tuned one with its
    trials; batches hold at most `array_limit` jobs.

    Raises:
        StudyError: Unknown settings in the section slurm.
    """
    where = f"{study.path}, slurm"
    check_keys(study.slurm, KEYS, where)
    check_keys(study.slurm.get("resources") or {}, KINDS, f"{where}, resources")
    limit = int(_number(study, "array_limit", ARRAY_LIMIT))
    known = measure(study, runs_dir)
    left = {
        cell.name: cell
        for cell in study.cells
        if (only is None or cell.name in only) and not folder_of(study, cell, runs_dir).finished()
    }

    def pack(cells: Sequence[str]) -> Pack:
        return Pack(str(study.path.resolve()), study.scale, str(runs_dir.resolve()), tuple(cells))

    weights = [pack([cell.name]) for cell in left.values() if cell.kind == "pretrain"]
    batches = [Batch("pretrain", None, tuple(part)) for part in _chunks(weights, limit)]
    chosen = {need for cell in left.values() for need in cell.needs}  # trials that come with what they choose
    transfers = [cell for cell in left.values() if cell.kind != "pretrain" and cell.name not in chosen]
    transfers.sort(key=_together)
    for need, cells in groupby(transfers, key=lambda cell: cell.weights or ""):
        packs = [pack(names) for _, part in groupby(cells, key=_together) for names in _packs(study, part, left, known)]
        batches += [Batch("transfer", need if need in left else None, tuple(part)) for part in _chunks(packs, limit)]
    return batches


def _together(cell: Cell) -> tuple[str, str]:
    return cell.weights or "", str(cell.columns.get("target"))


def _packs(study: Study, cells: Iterator[Cell], left: dict[str, Cell], known: Measurements) -> Iterator[list[str]]:
    """Cells of one job after another; trials come with the transfer that they are for, if they have no job yet."""
    seconds = 60 * _number(study, "job_minutes", JOB_MINUTES)
    unknown = seconds / _number(study, "cells_per_job", CELLS_PER_JOB)
    taken: list[str] = []
    filled = 0.0
    placed: set[str] = set()
    for cell in cells:
        trials = [name for name in cell.needs if name in left and left[name].kind == "trial" and name not in placed]
        names = [*trials, cell.name]
        length = sum(known.seconds_of(left[name]) or unknown for name in names)
        if taken and filled + length > seconds:
            yield taken
            taken, filled = [], 0.0
        taken += names
        placed.update(names)
        filled += length
    if taken:
        yield taken


def _number(study: Study, name: str, default: float) -> float:
    value = study.slurm.get(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 1:
        raise StudyError(f"{name}: {value!r}", where=f"{study.path}, slurm", valid="a number, 1 or more")
    return value


def _chunks(items: Sequence[Pack], size: int) -> Iterator[Sequence[Pack]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def submit_study(study: Study, runs_dir: Path, only: Collection[str] | None = None) -> Iterator[str]:
    """Submit the jobs; yields a line for each batch.

    Jobs that start before their weights are there wait for them. Submitting again while jobs wait is safe: a cell is
    never run twice.

    Raises:
        StudyError: submitit is not installed, there is no SLURM here, or resources are none that submitit knows.
    """
    try:
        import submitit
    except ImportError as error:
        raise StudyError("submitit is not installed", where="--slurm", hint='pip install "farshot[slurm]"') from error
    folder = runs_dir / study.name / FOLDER
    kind = study.slurm.get("executor", "slurm")
    resources = study.slurm.get("resources") or {}
    jobs_of: dict[str, str] = {}
    batches = plan(study, runs_dir, only)
    begin(study, runs_dir)
    for batch in batches:
        try:
            executor = submitit.AutoExecutor(folder=folder / "%j", cluster=kind)
        except (RuntimeError, ValueError) as error:
            raise StudyError(
                f"no jobs can be submitted here: {error}", where=f"{study.path}, slurm, executor", valid="slurm, local"
            ) from error
        try:
            executor.update_parameters(**{"name": f"{study.name}-{batch.kind}", **(resources.get(batch.kind) or {})})
        except (NameError, ValueError, TypeError, AssertionError) as error:
            raise StudyError(str(error), where=f"{study.path}, slurm, resources, {batch.kind}") from error
        if kind == "slurm" and batch.needs is not None:
            # afterany: where the weights fail, the jobs start, see it, and end.
            dependency = {"dependency": f"afterany:{jobs_of[batch.needs]}"}
            executor.update_parameters(slurm_additional_parameters=dependency)
        with executor.batch():
            jobs = [executor.submit(pack) for pack in batch.packs]
        for pack, job in zip(batch.packs, jobs, strict=True):
            jobs_of |= dict.fromkeys(pack.cells, str(job.job_id))
        cells = sum(len(pack.cells) for pack in batch.packs)
        after = f" after {jobs_of[batch.needs]}" if batch.needs is not None else ""
        yield f"{jobs[0].job_id}: {len(jobs)} {batch.kind} jobs, {cells} cells{after}"
    yield f"logs: {folder}; python cli.py study status {study.path} shows what has been done"
