"""study run|status|report FILE."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from datamodules.errors import DataError
from studies import display
from studies.runner import failures_of, folder_of, run_study, state_of
from studies.spec import Study, read_study

if TYPE_CHECKING:
    import pandas as pd


class StudyIncompleteError(RuntimeError):
    """Some cells of a study failed. Ends the command with exit code 1."""

    exit_code = 1


def run(words: Sequence[str]) -> None:
    """Run, show or report one study."""
    parser = argparse.ArgumentParser(prog="cli.py study", description="Run, show or report a whole study.")
    parser.add_argument("action", choices=ACTIONS, help="run: cells that are not finished, then the report")
    parser.add_argument("file", type=Path, help="study file, such as configs/studies/quickstart.yaml")
    parser.add_argument("--runs_dir", type=Path, default=Path("runs"), help="folder of all experiments")
    options = parser.parse_args(list(words[1:]))
    ACTIONS[options.action](read_study(options.file), options.runs_dir)


def run_and_report(study: Study, runs_dir: Path) -> None:
    """Run the cells, then write the report of what is there.

    Raises:
        StudyIncompleteError: Cells failed; the others are done.
    """
    failures = run_study(study, runs_dir)
    try:
        report(study, runs_dir)
    except DataError:
        if not failures:  # otherwise there may be nothing to report, and the failures say why
            raise
    if failures:
        lines = [f"  {failure.cell}: {failure.reason}" for failure in failures[:8]]
        more = [f"  ... ({len(failures) - 8} more)"] if len(failures) > 8 else []
        raise StudyIncompleteError(
            "\n".join([f"{len(failures)} of {len(study.cells)} cells failed:", *lines, *more])
            + f"\n  next:  read {runs_dir / study.name}/CELL/failed.log; the same command tries them again"
        )


def status(study: Study, runs_dir: Path) -> None:
    """Print how many cells are finished, failed and waiting."""
    states = {cell.name: state_of(folder_of(study, cell, runs_dir)) for cell in study.cells}
    for kind in ("pretrain", "transfer"):
        mine = [states[cell.name] for cell in study.cells if cell.kind == kind]
        counts = ", ".join(f"{mine.count(state)} {state}" for state in ("finished", "failed", "waiting"))
        display.say(f"{kind:9} {len(mine):5} cells: {counts}")
    for failure in failures_of(study, runs_dir):
        display.say(f"failed: {failure.cell}: {failure.reason}")


def report(study: Study, runs_dir: Path) -> None:
    """Write results.csv, tables and figures of the finished cells to the study's `report/` folder."""
    from studies.report import write_report
    from studies.results import collect, write_csv

    known = {cell.name for cell in study.cells}
    frame = collect(runs_dir / study.name)
    # Results of a cell on other data, protocol direct, are named after it: CELL/direct/...
    frame = frame[frame["cell"].str.partition("/")[0].isin(known)].reset_index(drop=True)
    waiting = sum(state_of(folder_of(study, cell, runs_dir)) == "waiting" for cell in study.cells)
    missing = [{"cell": failure.cell, "reason": failure.reason} for failure in failures_of(study, runs_dir)]
    if waiting:
        missing.append({"cell": f"{waiting} cells", "reason": "not run yet"})
    folder = runs_dir / study.name / "report"
    transfers = frame[frame["protocol"] != "pretrain"].reset_index(drop=True)
    written = write_report(
        transfers,
        folder,
        title=study.title,
        metric_by_target=headline_metrics(transfers) | study.metrics,
        chance=chance_levels(transfers),
        failures=missing,
    )
    write_csv(frame, folder / "results.csv")  # pre-training too
    display.say(f"report: {written.report}")


def headline_metrics(frame: "pd.DataFrame") -> dict[str, str]:
    """The metric that stands for each target: accuracy of classes, mean AUROC of labels (accuracy hides rare ones)."""
    labels = set(frame.loc[frame["metric"] == "mean_balanced_accuracy", "target"])
    return {target: "mean_auroc" if target in labels else "accuracy" for target in set(frame["target"])}


def chance_levels(frame: "pd.DataFrame") -> dict[str, float]:
    """What guessing gives for each target's headline metric: 1 / classes for accuracy, 0.5 for AUROC."""
    classes = frame[(frame["metric"] == "auroc")].groupby("target")["class_name"].nunique()
    metrics = headline_metrics(frame)
    return {
        str(target): 0.5 if metrics[str(target)] == "mean_auroc" else 1 / count for target, count in classes.items()
    }


ACTIONS = {"run": run_and_report, "status": status, "report": report}
