"""study run|status|report|query FILE."""

import argparse
import os
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from datamodules.errors import DataError, closest
from studies import display
from studies.cell_folder import Failure
from studies.cells import Cell
from studies.estimates import Estimate, in_bytes, in_time, measure
from studies.layers import StudyError
from studies.runner import folder_of
from studies.spec import Study, read_study
from studies.watch import Watch, shown, table_of

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

EXAMPLES = "source=near shots=1,5 'value>0.9' 'target!=nih*'"  # of filters

LISTED = 40  # cells that a dry run prints
SHOWN_ROWS = 60  # rows that a query prints
SHOWN_FAILURES = 8
ORIGINS = {
    "finished": "finished runs, with their start and evaluation",
    "running": "runs under way, training alone",
    "timed": "short timings, training alone",
}
"""What an estimate rests on, in words."""
QUERY_COLUMNS = (
    *("source", "source_n", "architecture", "target", "protocol", "transfer_depth", "shots", "num_images", "fraction"),
    *("seed", "metric", "class_name", "subgroup", "value"),
)
REFRESH = 2.0  # seconds between two looks of `status --watch`


class StudyIncompleteError(RuntimeError):
    """Some cells of a study failed. Ends the command with exit code 1."""

    exit_code = 1


def run(words: Sequence[str]) -> None:
    """Run, show, report or query one study."""
    options = _parser().parse_args(list(words[1:]))
    options.action(options)


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("file", type=Path, help="study file, such as configs/studies/quickstart.yaml")
    common.add_argument("--runs_dir", type=Path, default=Path("runs"), help="folder of all experiments")
    common.add_argument("--scale", help="one of the study's scales, such as a tiny rehearsal on generated data")
    parser = argparse.ArgumentParser(prog="cli.py study", description="Run, show, report or query a whole study.")
    actions = parser.add_subparsers(required=True, metavar="run|status|report|query")
    filters = f"cells to take, such as {EXAMPLES}; also kind=, cell=, state="

    command = actions.add_parser("run", parents=[common], help="cells that are not finished, then the report")
    command.add_argument("--jobs", type=_count, help="processes that run cells (default: one a GPU, else 1)")
    command.add_argument("--only", nargs="+", metavar="FILTER", help=filters + "; with what they need")
    command.add_argument("--rerun", nargs="+", metavar="FILTER", help=filters + "; old runs move to .replaced/")
    command.add_argument("--dry-run", action="store_true", help="list the cells, and what they will take")
    command.add_argument("--measure", action="store_true", help="with --dry-run: time a few steps of what is unknown")
    command.add_argument("--slurm", action="store_true", help="submit to SLURM instead (the study's section slurm)")
    command.add_argument("--wandb", choices=("auto", "online", "offline", "off"), default="auto", help="mirror to W&B")
    command.set_defaults(action=run_and_report)

    command = actions.add_parser("status", parents=[common], help="what is finished, running, waiting, failed")
    command.add_argument("--watch", action="store_true", help="again and again, until all is done")
    command.set_defaults(action=status)

    command = actions.add_parser("report", parents=[common], help="tables, figures and the page of what is there")
    command.set_defaults(action=lambda options: report(read_study(options.file, options.scale), options.runs_dir))

    command = actions.add_parser("query", parents=[common], help="result rows by column")
    command.add_argument("--where", nargs="+", metavar="FILTER", default=[], help=f"such as {EXAMPLES}")
    command.add_argument("--columns", help="columns to show, joined by commas (default: those that differ)")
    command.add_argument("--output", type=Path, help="write the rows to this .csv or .parquet file")
    command.set_defaults(action=query)
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: a whole number, 1 or more")
    return int(text)


# run -----------------------------------------------------------------------------------------------------------------


def run_and_report(options: argparse.Namespace) -> None:
    """Run the cells, then write the report of what is there.

    Raises:
        StudyIncompleteError: Cells failed; the others are done.
    """
    from studies import jobs
    from studies.settings_check import check_settings

    study, runs_dir = read_study(options.file, options.scale), options.runs_dir
    only = chosen(study, runs_dir, options.only) if options.only else None
    if options.rerun:
        again = rerun(study, runs_dir, options.rerun, dry=options.dry_run)
        only = only if only is None else only | again
    if options.dry_run:
        dry_run(study, runs_dir, only, options.jobs or jobs.default_jobs(), timed=options.measure)
        return
    if options.measure:
        raise StudyError("--measure measures for an estimate", where="--measure", hint="add --dry-run")
    os.environ["FARSHOT_STUDY_WANDB"] = cell_mirror(options.wandb)
    finished = {cell.name for cell in study.cells if folder_of(study, cell, runs_dir).finished()}
    # What needs no other cell is tried at once anyway.
    later = [cell for cell in study.cells if cell.needs and cell.name not in finished]
    check_settings(cell for cell in later if only is None or cell.name in only)
    if options.slurm:
        from studies.slurm import submit_study

        for line in submit_study(study, runs_dir, only):
            display.say(line)
        return
    display.say(f"{study.name}: {len(study.cells)} cells, {len(finished)} finished already")
    failures = jobs.run_study(study, runs_dir, jobs=options.jobs or jobs.default_jobs(), only=only)
    try:
        report(study, runs_dir, wandb=options.wandb)
    except DataError as error:
        if not failures:
            raise
        display.say(f"no report: {error.problem}")  # the failures may say why
    if failures:
        raise StudyIncompleteError(_failure_message(study, runs_dir, failures))


def cell_mirror(mode: str) -> str:
    """Mode of the mirror of single cells: unasked, thousands of them are mirrored only where there is a key."""
    from lightning_modules.callbacks.wandb_mode import has_key

    return ("online" if has_key() else "off") if mode == "auto" and "WANDB_MODE" not in os.environ else mode


def _failure_message(study: Study, runs_dir: Path, failures: Sequence[Failure]) -> str:
    lines = [f"  {failure.cell}: {failure.reason}" for failure in failures[:SHOWN_FAILURES]]
    more = [f"  ... ({len(failures) - SHOWN_FAILURES} more)"] if len(failures) > SHOWN_FAILURES else []
    aside = sum(failure.set_aside for failure in failures)
    hint = f"read {runs_dir / study.name}/CELL/failed.log; the same command tries them again"
    if aside:
        hint += f", but for {aside} set aside after three tries: --rerun 'state=set aside'"
    return "\n".join([f"{len(failures)} of {len(study.cells)} cells failed:", *lines, *more, f"  next:  {hint}"])


def cell_frame(study: Study, runs_dir: Path) -> "pd.DataFrame":
    """A row a cell: name, kind, state and the columns that its rows will have."""
    import pandas as pd

    rows = [
        {**cell.columns, "cell": cell.name, "kind": cell.kind, "state": folder_of(study, cell, runs_dir).state()}
        for cell in study.cells
    ]
    frame = pd.DataFrame(rows)
    first = ["cell", "kind", "state"]
    return frame[[*first, *(name for name in frame.columns if name not in first)]]


def chosen(study: Study, runs_dir: Path, words: Sequence[str]) -> set[str]:
    """Names of the cells that filters choose, and of what those need.

    Raises:
        StudyError: No cell fulfils them.
    """
    names = set(_filtered(study, runs_dir, words)["cell"])
    cells: dict[str, Cell] = {cell.name: cell for cell in study.cells}
    open_names = list(names)
    while open_names:
        for need in cells[open_names.pop()].needs:
            if need not in names:
                names.add(need)
                open_names.append(need)
    return names


def _filtered(study: Study, runs_dir: Path, words: Sequence[str]) -> "pd.DataFrame":
    from studies.filters import apply, read_filters

    frame = cell_frame(study, runs_dir)
    for condition in read_filters(words):
        left = apply([condition], frame)
        if left.empty:
            raise StudyError(
                f"no cell of {study.name} fulfils {' '.join(words)}",
                where=f"{condition.column}{condition.sign}{condition.value}",
                valid=[str(value) for value in frame[condition.column].dropna().unique()],
                hint="study run FILE --dry-run lists the cells",
            )
        frame = left
    return frame


def rerun(study: Study, runs_dir: Path, words: Sequence[str], *, dry: bool = False) -> set[str]:
    """Move the runs that filters choose out of the way, so that they run anew; what was written is kept.

    Raises:
        StudyError: No cell fulfils the filters, or one of them is running.
    """
    frame = _filtered(study, runs_dir, words)
    running = frame.loc[frame["state"] == "running", "cell"]
    if len(running):
        raise StudyError(f"{running.iloc[0]} is running", where="--rerun", hint="stop it first")
    names = set(frame["cell"])
    moved = [name for name in frame["cell"] if folder_of(study, name, runs_dir).path.is_dir()]
    if not dry:
        for name in moved:
            folder_of(study, name, runs_dir).replace()
    display.say(f"{len(frame)} cells run anew; {len(moved)} old runs {'would go to' if dry else 'are in'} .replaced/")
    after = [cell for cell in study.cells if names & set(cell.needs) and cell.name not in names]
    stay = sum(folder_of(study, cell, runs_dir).finished() for cell in after)
    if stay:
        display.say(
            f"{stay} finished cells that rest on them stay as they are: --rerun them, too, where they should not"
        )
    return names


def dry_run(study: Study, runs_dir: Path, only: set[str] | None, jobs: int, *, timed: bool = False) -> None:
    """Print the cells and what those that are not finished will take, as far as measured steps tell.

    Args:
        study: The study.
        runs_dir: Folder of all experiments.
        only: Names of the cells; default: all.
        jobs: Processes that would run them.
        timed: Time a few steps of cells that nothing tells of.
    """
    frame = cell_frame(study, runs_dir)
    frame = frame if only is None else frame[frame["cell"].isin(only)]
    for name, kind, state in frame[["cell", "kind", "state"]].head(LISTED).itertuples(index=False):
        display.say(f"{kind:9} {state:9} {name}")
    if len(frame) > LISTED:
        display.say(f"... ({len(frame) - LISTED} more)")
    counts = ", ".join(f"{count} {kind}" for kind, count in frame["kind"].value_counts(sort=False).items())
    display.say(f"{study.name}: {len(frame)} cells ({counts}), {(frame['state'] == 'finished').sum()} finished")
    names = set(frame.loc[frame["state"] != "finished", "cell"])
    left = [cell for cell in study.cells if cell.name in names]
    known = measure(study, runs_dir)
    if timed:
        from studies.timing import time_kinds

        for line in time_kinds(study, left, runs_dir, known):
            display.say(line)
    estimate = known.estimate(left)
    for line in _estimate_lines(estimate, jobs):
        display.say(line)
    free = shutil.disk_usage(next(path for path in (runs_dir, *runs_dir.absolute().parents) if path.exists())).free
    if estimate.size > free:
        display.say(f"WARNING: only {in_bytes(free)} of disk are free under {runs_dir}")


def _estimate_lines(estimate: Estimate, jobs: int) -> list[str]:
    """What cells will take, and which number came from what."""
    lines = []
    judged = sum(estimate.judged_by.values())
    if judged:
        each = f" ({jobs} at a time: {in_time(estimate.seconds / jobs)})" if jobs > 1 else ""
        lines.append(
            f"time left: {in_time(estimate.seconds)}{each} for {judged} cells, their steps × measured seconds a step"
        )
        lines += [f"  {count} cells by {ORIGINS[origin]}" for origin, count in estimate.judged_by.items()]
        lines.append(f"  measured on {', '.join(sorted(estimate.devices))}")
    if estimate.sized:
        lines.append(f"disk: {in_bytes(estimate.size)} for {estimate.sized} cells, as finished ones of their kind keep")
    if estimate.unknown:
        lines.append(
            f"{len(estimate.unknown)} cells cannot be judged, such as {estimate.unknown[0].name}: no step of their "
            "network, image and batch size has been measured, or the number of their images is not known; "
            "--measure times a few steps of one of each kind"
        )
    return lines


# status, report, query -----------------------------------------------------------------------------------------------


def status(options: argparse.Namespace) -> None:
    """Print how many cells are in which state, what runs, and what failed."""
    study = read_study(options.file, options.scale)
    watch = Watch(study, options.runs_dir)
    watch.look()
    if options.watch:
        with suppress(KeyboardInterrupt), shown(watch):
            while watch.left():
                time.sleep(REFRESH)
    display.console.print(table_of(watch))
    for line in _lines(watch):
        display.say(line)


def _lines(watch: Watch) -> list[str]:
    running, blocked, failures = watch.running(), watch.blocked(), watch.failures()
    left = watch.time_left()
    more = len(failures) - SHOWN_FAILURES
    return [
        *(f"running: {cell.name}  {watch.progress_of(cell)}".rstrip() for cell in running),
        *([f"about {in_time(left)} left at this pace"] if left and running else []),
        *([f"{len(blocked)} of the waiting cells need one that failed"] if blocked else []),
        *(
            f"{'set aside' if failure.set_aside else 'failed'} after {failure.attempts} "
            f"{'try' if failure.attempts == 1 else 'tries'}: {failure.cell}: {failure.reason}"
            for failure in failures[:SHOWN_FAILURES]
        ),
        *([f"... ({more} more failures)"] if more > 0 else []),
    ]


def report(study: Study, runs_dir: Path, wandb: str = "off") -> None:
    """Write the report of the finished cells to the study's `report/` folder."""
    from studies.study_report import write_study_report

    for line in write_study_report(study, runs_dir, wandb):
        display.say(line)


def query(options: argparse.Namespace) -> None:
    """Print or write the result rows that fulfil filters."""
    from studies.filters import apply, read_filters
    from studies.store import collect

    study = read_study(options.file, options.scale)
    everything = collect(options.runs_dir / study.name)
    known = everything["cell"].str.partition("/")[0].isin([cell.name for cell in study.cells])
    if not known.all():
        gone = everything.loc[~known, "cell"].nunique()
        display.say(f"left out: {gone} cells that the study's file no longer has")
    frame = apply(read_filters(options.where), everything[known])
    columns = [name.strip() for name in options.columns.split(",")] if options.columns else None
    unknown = [name for name in columns or [] if name not in frame]
    if unknown:
        near = closest(unknown[0], frame.columns)
        problem = f"no column {unknown[0]!r}" + (f"; did you mean {near!r}?" if near else "")
        raise DataError(problem, where="--columns", valid=", ".join(frame.columns))
    if options.output is not None:
        _write_rows(frame if columns is None else frame[columns], options.output)
        display.say(f"{len(frame)} rows: {options.output}")
        return
    few = frame[columns or [name for name in QUERY_COLUMNS if name == "value" or frame[name].nunique(dropna=False) > 1]]
    display.console.print(_grid(few.head(SHOWN_ROWS)))
    more = f", {SHOWN_ROWS} shown; --output FILE.csv has all" if len(frame) > SHOWN_ROWS else ""
    display.say(f"{len(frame)} rows{more}")


def _write_rows(frame: "pd.DataFrame", path: Path) -> None:
    from studies.results import write_csv

    if path.suffix not in (".csv", ".parquet"):
        raise DataError(f"{path.name} is no table that can be written", where="--output", valid=".csv, .parquet")
    try:
        if path.suffix == ".parquet":
            frame.to_parquet(path, index=False)
        else:
            write_csv(frame, path)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}", where="--output") from error


def _grid(frame: "pd.DataFrame") -> "Table":
    import pandas as pd
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=None, padding=(0, 2, 0, 0), show_edge=False)
    for name in frame.columns:
        grid.add_column(str(name), justify="right" if pd.api.types.is_numeric_dtype(frame[name]) else "left")
    for values in frame.itertuples(index=False):
        cells = [
            "" if pd.isna(value) else f"{value:.4f}" if isinstance(value, float) else str(value) for value in values
        ]
        grid.add_row(*(Text(cell) for cell in cells))
    return grid
