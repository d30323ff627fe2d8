"""A study's report: its tables as files, its figures, and one page of Markdown."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from datamodules.atomic import write_text
from studies.depth_report import depth_section
from studies.report_figures import write_figures
from studies.report_markdown import KEYS, Tables, counts_caption, gain_section, markdown_page, summary_table
from studies.report_text import budget
from studies.results import ResultsError, check_unique, write_csv
from studies.statistics import BUDGET, gain_over, summarise, varying

#: Where one of these varies among runs of equal `KEYS` and budget, the report keeps its values apart instead
#: of averaging over them.
SETTINGS = (
    *("study", "method", "source_n", "transfer_depth", "frozen_depth", "granularity"),
    *("source_dials", "dials", "image_size", "selection", "split_policy"),
)


@dataclass(frozen=True)
class Report:
    """The files of a report."""

    report: Path
    results: Path
    summary_csv: Path
    summary_md: Path
    gains: Path
    figures: tuple[Path, ...]


def make_tables(frame: pd.DataFrame, metric_by_target: Mapping[str, str], baseline: str = "scratch") -> Tables:
    """Compute the tables of a report; arguments and errors as in `write_report`."""
    rows = select_headline(frame, metric_by_target)
    group = [*KEYS, *BUDGET]
    # Pre-training seeds may go with the seeds, one by one; they stand apart only where one seed has several.
    settings = varying(rows, group, SETTINGS) + varying(rows, [*group, "seed", "fold"], ["pretrain_seed"])
    summary = _ordered(summarise(rows, [*KEYS, *settings, *BUDGET, "metric"]))
    return Tables(rows, settings, summary, _ordered(gain_over(rows, baseline, settings)))


def write_report(
    frame: pd.DataFrame,
    output_dir: Path | str,
    *,
    title: str,
    metric_by_target: Mapping[str, str] | None = None,
    baseline: str = "scratch",
    chance: Mapping[str, float] | None = None,
    failures: Sequence[Mapping[str, str]] = (),
    everything: pd.DataFrame | None = None,
) -> Report:
    """Write `report.md` with `results.csv`, `summary.csv`, `summary.md`, `gains.csv` and figures beside it.

    Args:
        frame: Result rows with the columns of `studies.results.COLUMNS`.
        output_dir: The folder to write to; created where it is missing, equal names are replaced.
        title: The report's heading.
        metric_by_target: Target → metric to show; by default accuracy, or mean_auroc where there is none.
        baseline: The source that gains are measured against.
        chance: Target → the metric of a guess, a fraction in [0, 1], for the figures; 0.5 is known for AUROC.
        failures: Cells without a result: mappings with the keys "cell" and "reason".
        everything: Rows of `results.csv`, where those are more than the report's own.

    Raises:
        ResultsError: Without rows, for doubled rows, for a target without a metric to show, or for a metric
            beyond [-1, 1].
    """
    if frame.empty:
        raise ResultsError("there are no result rows to report", hint="run the study's cells first")
    check_unique(frame)
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    tables = make_tables(frame, metric_by_target or {}, baseline)
    rows, settings, summary, gains = tables.rows, tables.settings, tables.summary, tables.gains
    report = Report(
        report=folder / "report.md",
        results=folder / "results.csv",
        summary_csv=folder / "summary.csv",
        summary_md=folder / "summary.md",
        gains=folder / "gains.csv",
        figures=write_figures(rows, settings, folder, baseline, chance or {}),
    )
    write_csv(frame if everything is None else everything, report.results)
    write_csv(summary.drop(columns="budget"), report.summary_csv)
    write_csv(gains.drop(columns="budget"), report.gains)
    paragraphs = [
        f"# {title}: summary",
        counts_caption(summary),
        summary_table(summary, settings),
        f"## Gains over {baseline}",
        *gain_section(gains, settings, baseline),
    ]
    write_text(report.summary_md, "\n\n".join(paragraphs) + "\n")
    page = markdown_page(frame, tables, report.figures, title, baseline, failures)
    place = next(number for number, text in enumerate(page) if text == "## Provenance")
    page[place:place] = depth_section(rows, folder)
    write_text(report.report, "\n\n".join(page) + "\n")
    return report


def select_headline(frame: pd.DataFrame, metric_by_target: Mapping[str, str]) -> pd.DataFrame:
    """Keep each target's metric to show, over all classes and subgroups, its prefix "test/" dropped.

    Raises:
        ResultsError: If a target has no such metric, or it has values beyond [-1, 1] and so is no fraction.
    """
    whole: pd.DataFrame = frame[frame["class_name"].isna() & frame["subgroup"].isna() & frame["target"].notna()]
    whole = whole.assign(metric=whole["metric"].str.removeprefix("test/"))
    parts: list[pd.DataFrame] = []
    for target in sorted(frame["target"].dropna().unique()):
        rows = whole[whole["target"] == target]
        wanted = metric_by_target.get(target)
        names = [wanted.removeprefix("test/")] if wanted else ["accuracy", "mean_auroc"]
        present = set(rows["metric"].dropna())
        metric = next((name for name in names if name in present), None)
        if metric is None:
            raise ResultsError(
                f"{target} has no row with the metric {' or '.join(names)}",
                valid=sorted(present) or "none: all rows belong to one class or subgroup",
                hint="name the metric to show for this target",
            )
        rows = rows[rows["metric"] == metric]
        if (rows["value"].abs() > 1 + 1e-9).any():
            raise ResultsError(
                f"{metric} on {target} has values up to {rows['value'].abs().max():g}",
                valid="fractions in [-1, 1], which the report shows in percent",
                hint="name another metric for this target",
            )
        parts.append(rows)
    if not parts:
        raise ResultsError("no result row names its target")
    return pd.concat(parts, ignore_index=True)


def _ordered(table: pd.DataFrame) -> pd.DataFrame:
    """Add "budget", the name of a table's column, as an ordered category, and sort by keys and budget."""
    budgets = [budget(*row) for row in table[list(BUDGET)].itertuples(index=False, name=None)]
    names = [name for _, name in sorted(set(budgets))]
    table = table.assign(budget=pd.Categorical([name for _, name in budgets], categories=names, ordered=True))
    others = [name for name in table.columns[: table.columns.get_loc("n")] if name not in (*KEYS, *BUDGET)]
    return table.sort_values([*KEYS, *others, "budget"], ignore_index=True)
