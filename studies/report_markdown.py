"""A report's tables and sentences in Markdown; they say no more than the intervals allow."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd

from studies.report_text import image_link, in_words, mean_sd, metric_name, pivot, points, records

KEYS = ("target", "source", "architecture", "protocol")

CAPTION = (
    "Intervals are 95 % t intervals over seeds. They cover the draw of the few-shot set and of the "
    "initialisation, not the choice of the test set, and the pre-training run only where that varies too."
)


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


def markdown_page(
    frame: pd.DataFrame,
    tables: Tables,
    drawn: Sequence[Path],
    title: str,
    baseline: str,
    failures: Sequence[Mapping[str, str]],
) -> list[str]:
    """The paragraphs of `report.md`; arguments as in `report.write_report`, `drawn`: files of figures."""
    rows, settings, summary, gains = tables.rows, tables.settings, tables.summary, tables.gains
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
        metric = metric_name(str(part["metric"].iloc[0]))
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
    caption = (
        f"Gain over {baseline} in points, paired on seeds, with its 95 % interval ({pairs} pairs), which is not "
        "corrected for the number of comparisons."
    )
    return [caption, gain_table(gains, settings)]


def _provenance(frame: pd.DataFrame) -> str:
    versions = sorted(frame["code_version"].dropna().unique())
    text = f"{len(frame)} rows from {frame['run'].nunique()} runs."
    if len(versions) > 1:
        text += f" They mix {len(versions)} versions of the code: {', '.join(versions)}."
    elif versions:
        text += f" Code version {versions[0]}."
    return text


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


def counts_caption(summary: pd.DataFrame) -> str:
    """What the cells of a table are, and over how many seeds."""
    usual, most = _usual_n(summary), summary["n"].max()
    if most < 2:
        return "Percent; one seed a cell, so there is no spread to show."
    same = (summary["n"] == usual).all()
    return f"Percent, mean ± SD over {usual} seeds" + ("." if same else ", or as many as the cell says (n).")


def _usual_n(summary: pd.DataFrame) -> int:
    return int(summary["n"].mode().max())
