"""The few-shot figures of a report: one of all targets, and one of each."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

import pandas as pd

from studies import figures
from studies.report_text import records
from studies.statistics import spread_baseline, summarise


def write_figures(
    rows: pd.DataFrame, settings: Sequence[str], folder: Path, baseline: str, chance: Mapping[str, float]
) -> tuple[Path, ...]:
    """Draw `few_shot` and one `few_shot_<target>` each, of the cells given in shots; none: no figure.

    Args:
        rows: Headline rows of all cells: they give the sources their colours.
        settings: Columns that tell series of one source apart.
        folder: Where the files go.
        baseline: The source in grey.
        chance: Target → the metric of a guess, a fraction; 0.5 is known for AUROC.

    Returns:
        Paths of all files.
    """
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
    colours = figures.source_colours(rows["source"].fillna("?"), baseline)
    is_auroc = summary[summary["metric"].str.contains("auroc")]
    guesses = {**dict.fromkeys(is_auroc["target"], 0.5), **chance}

    def draw(stem: str, part: pd.DataFrame, dots: pd.DataFrame) -> tuple[Path, ...]:
        figure = figures.few_shot_curves(part, dots, colours=colours, chance=guesses, baseline=baseline)
        return figures.save(figure, folder / stem)

    every = draw("few_shot", summary, values)
    paths = [*every]
    for target, part in summary.groupby("target"):
        stem = f"few_shot_{quote(str(target), safe='')}"
        if summary["target"].nunique() == 1:  # the same figure
            paths += [Path(shutil.copyfile(path, folder / f"{stem}{path.suffix}")) for path in every]
        else:
            paths += draw(stem, part, values[values["target"] == target])
    return tuple(paths)
