"""A study's report: tables, gains, figures, and sentences that say no more than the intervals allow."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd

from datamodules.atomic import write_text
from studies import figures
from studies.depth_report import depth_section
from studies.report_text import budget, image_link, in_words, mean_sd, pivot, points, records
from studies.results import ResultsError, check_unique, write_csv
from studies.statistics import BUDGET, gain_over, spread_baseline, summarise, varying

KEYS = ("target", "source", "architecture", "protocol")

#: Where one of these varies among runs of equal `KEYS` and budget, the report keeps its values apart instead
#: of averaging over them.
SETTINGS = (
    *(
        "study",
        "method",
        "source_n",
        "transfer_depth",
        "frozen_depth",
        "granularity",
        "source_dials",
        "dials",
        "image_size",
        "selection",
        "split_policy",
    ),
)

CAPTION = (
    "Intervals are 95 % t intervals over seeds. They cover the draw of the few-shot set and of the "
    "initialisation, not the choice of the test set, and the pre-training run only where that varies too."
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


@dataclass(frozen=True)
class Tables:
    """The numbers of a report.

    Attributes:
        rows: Headline rows: one metric a target, over all classes and subgroups.
        settings: Columns of `SETTINGS` that vary, and so stand apart.
        summary: Mean, spread and interval over seeds of each cell; with "budget".
        gains: Paired differences to the baseline; with "budget".
    """

    rows: pd.DataFrame
    settings: list[str]
    summary: pd.DataFrame
    gains: pd.DataFrame


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
        figures=_write_figures(rows, settings, folder, baseline, chance or {}),
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
    page = _page(frame, rows, summary, gains, settings, report.figures, title, baseline, failures)
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


def summary_table(summary: pd.DataFrame, settings: Sequence[str] = ()) -> str:
    """A Markdown table: a row for each target, source, architecture, protocol and setting, a column a budget.

    Cells are "mean ± SD" in percent, the mean alone for one seed; the number of seeds follows where it is not
    the usual one, and a dash stands where there is no value.
    """
    usual = _usual_n(summary)

    def cell(row: Mapping[str, Any]) -> str:
        if not row["n"]:
            return "–"
        return mean_sd(row["mean"], row["sd"]) + (f" (n = {row['n']})" if row["n"] != usual else "")

    return pivot(summary, [*KEYS, *settings, "metric"], cell)


def gain_table(gains: pd.DataFrame, settings: Sequence[str] = ()) -> str:
    """A Markdown table of gains in percentage points, each with its 95 % interval (none for one pair)."""

    def cell(row: Mapping[str, Any]) -> str:
        interval = "" if row["n"] < 2 else f" [{points(row['low'])}, {points(row['high'])}]"
        return points(row["gain"], sign=True) + interval

    return pivot(gains, [*KEYS, *settings, "metric"], cell)


def verdict(gain: Mapping[str, Any], baseline: str = "scratch") -> str:
    """What a row of `gain_over` allows to say: higher, lower, "not distinguishable" or "no claim"."""
    if gain["n"] < 2 or gain["high"] - gain["low"] < 1e-9:  # no interval, or seeds that change nothing
        return "no claim"
    if gain["low"] > 0:
        return f"higher than {baseline}"
    return f"lower than {baseline}" if gain["high"] < 0 else "not distinguishable"


def sentence(gain: Mapping[str, Any], baseline: str = "scratch", context: Sequence[str] = ()) -> str:
    """A row of `gain_over`, with its "budget", in words; `context`: columns to mention with the source."""
    facts = [str(gain[name]) if name in KEYS else f"{name} {gain[name]}" for name in context if not pd.isna(gain[name])]
    who = f"{gain['source']} ({', '.join(facts)})" if facts else gain["source"]
    start = (
        f"On {gain['target']}{in_words(gain['budget'])}, {who} → {mean_sd(gain['mean'], gain['sd'])} "
        f"against {mean_sd(gain['baseline_mean'], gain['baseline_sd'])} from {baseline}: "
        f"{points(gain['gain'], sign=True)}"
    )
    result = verdict(gain, baseline)
    if gain["n"] < 2:
        return f"{start} (1 pair): one seed gives no interval, so {result}."
    if result == "no claim":
        return f"{start} (the same in all {gain['n']} pairs): no spread gives no interval, so {result}."
    interval = f"95 % interval {points(gain['low'])} to {points(gain['high'])}, {gain['n']} pairs"
    return f"{start} ({interval}): {result}."


def _page(
    frame: pd.DataFrame,
    rows: pd.DataFrame,
    summary: pd.DataFrame,
    gains: pd.DataFrame,
    settings: Sequence[str],
    drawn: Sequence[Path],
    title: str,
    baseline: str,
    failures: Sequence[Mapping[str, str]],
) -> list[str]:
    """The paragraphs of `report.md`."""
    page = [f"# {title}", _tally(gains, baseline)]
    page += [CAPTION] if summary["n"].max() > 1 else []
    images = {path.stem: path for path in drawn if path.suffix == ".png"}
    if "few_shot" in images and summary["target"].nunique() > 1:
        page.append(image_link(images["few_shot"], "All targets"))
    context = [
        name
        for name in ("architecture", "protocol", *settings)
        if name in settings or rows[name].nunique(dropna=False) > 1
    ]
    for target, part in summary.groupby("target"):
        metric = str(part["metric"].iloc[0]).replace("_", " ")
        page += [f"## {target}", f"Test {metric}. {counts_caption(part)}"]
        image = images.get(f"few_shot_{quote(str(target), safe='')}")
        page += [image_link(image, f"Few-shot curves on {target}")] if image else []
        page.append(summary_table(part, settings))
        own = gains[gains["target"] == target]
        page += gain_section(own, settings, baseline)
        lines = [f"- {sentence(row, baseline, context)}" for row in records(own)]
        page += ["\n".join(lines)] if lines else []
    page += ["## Provenance", _provenance(frame)]
    if failures:
        lines = [f"- {failure['cell']}: {failure['reason']}" for failure in failures]
        page += ["## Cells without a result", "\n".join(lines)]
    return page


def _tally(gains: pd.DataFrame, baseline: str) -> str:
    if gains.empty:
        return f"No run could be paired with one from {baseline}, so there are no gains to report."
    verdicts = [verdict(row, baseline).split()[0] for row in records(gains)]
    higher, lower, same, none = (verdicts.count(word) for word in ("higher", "lower", "not", "no"))
    text = (
        f"Comparisons with {baseline}: {len(gains)}. Higher: {higher}, lower: {lower}, not distinguishable: "
        f"{same}, no claim because the seeds give no interval: {none}."
    )
    if len(gains) > none:
        text += (
            " The intervals are not corrected for the number of comparisons: if no source made a difference, "
            "about 1 in 20 of them would still leave out zero."
        )
    return text


def gain_section(gains: pd.DataFrame, settings: Sequence[str], baseline: str) -> list[str]:
    """A sentence on how the gains were paired, and their table."""
    if gains.empty:
        return [f"No run could be paired with one from {baseline}."]
    low, high = gains["n"].min(), gains["n"].max()
    if high < 2:
        return [
            f"Gain over {baseline} in points, from one pair each: no intervals.",
            gain_table(gains, settings),
        ]
    pairs = f"{low}" if low == high else f"{low} to {high}"
    caption = f"Gain over {baseline} in points, paired on seeds, with its 95 % interval ({pairs} pairs)."
    return [caption, gain_table(gains, settings)]


def _provenance(frame: pd.DataFrame) -> str:
    versions = sorted(frame["code_version"].dropna().unique())
    text = f"{len(frame)} rows from {frame['run'].nunique()} runs."
    if len(versions) > 1:
        text += f" They mix {len(versions)} versions of the code: {', '.join(versions)}."
    elif versions:
        text += f" Code version {versions[0]}."
    return text


def _write_figures(
    rows: pd.DataFrame, settings: Sequence[str], folder: Path, baseline: str, chance: Mapping[str, float]
) -> tuple[Path, ...]:
    """Draw `few_shot` and one `few_shot_<target>` each, of the cells given in shots; none: no figure."""
    on_axis = rows[rows["shots"].notna() & rows["num_images"].isna() & (rows["fraction"].fillna(1) == 1)]
    on_axis = spread_baseline(on_axis, baseline)
    if on_axis.empty:
        return ()
    places = [on_axis[name].fillna("?") for name in ("architecture", "protocol") if on_axis[name].nunique() > 1]
    extras = [
        ", ".join(f"{name} {row[name]}" for name in settings if not pd.isna(row[name]))
        for row in records(on_axis[list(settings)])
    ]
    source = on_axis["source"].fillna("?")
    on_axis = on_axis.assign(
        source=source,
        setting=[", ".join(names) for names in zip(*places, strict=True)] if places else "",
        series=[f"{name} ({extra})" if extra else name for name, extra in zip(source, extras, strict=True)],
    )
    by = ["target", "setting", "series", "source", "shots", "metric"]
    summary = summarise(on_axis, by)
    values = on_axis.groupby([*by, "seed"], dropna=False)["value"].mean().reset_index()
    colours = figures.source_colours(source, baseline)
    is_auroc = summary[summary["metric"].str.contains("auroc")]
    guesses = {**dict.fromkeys(is_auroc["target"], 0.5), **chance}

    def draw(stem: str, part: pd.DataFrame, dots: pd.DataFrame) -> tuple[Path, ...]:
        figure = figures.few_shot_curves(part, dots, colours=colours, chance=guesses, baseline=baseline)
        return figures.save(figure, folder / stem)

    paths = [*draw("few_shot", summary, values)]
    for target, part in summary.groupby("target"):
        paths += draw(f"few_shot_{quote(str(target), safe='')}", part, values[values["target"] == target])
    return tuple(paths)


def _ordered(table: pd.DataFrame) -> pd.DataFrame:
    """Add "budget", the name of a table's column, as an ordered category, and sort by keys and budget."""
    budgets = [budget(*row) for row in table[list(BUDGET)].itertuples(index=False, name=None)]
    names = [name for _, name in sorted(set(budgets))]
    table = table.assign(budget=pd.Categorical([name for _, name in budgets], categories=names, ordered=True))
    others = [name for name in table.columns[: table.columns.get_loc("n")] if name not in (*KEYS, *BUDGET)]
    return table.sort_values([*KEYS, *others, "budget"], ignore_index=True)


def counts_caption(summary: pd.DataFrame) -> str:
    """What the cells of a table are, and over how many seeds."""
    usual, most = _usual_n(summary), summary["n"].max()
    if most < 2:
        return "Percent; one seed a cell, so there is no spread to show."
    same = (summary["n"] == usual).all()
    return f"Percent, mean ± SD over {usual} seeds" + ("." if same else ", or as many as the cell says (n).")


def _usual_n(summary: pd.DataFrame) -> int:
    return int(summary["n"].mode().max())
