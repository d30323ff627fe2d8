"""What a study says of its data: table 1 of a paper, the exclusion flow, counts of every label. Pure functions."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pandas as pd

from datamodules.base import BaseDataModule
from datamodules.exclusions import Exclusion, exclusion_flow, usable_rows
from datamodules.splits import crossing_groups
from datamodules.table import SPLITS, Table

ALL = "all used"
MAX_LEVELS = 8  # sites or scanners with a row of their own; the rest is "other"
MAX_LABELS = 30  # more classes than that are summed up in one row
UNKNOWN = "unknown"
NONE = "-"  # a statistic of nothing
KNOWN = "Known (0 or 1), n (%)"

Rows = Mapping[str, np.ndarray]  # table rows, int64, of each column of table 1


@dataclass(frozen=True)
class Usage:
    """Which rows of a table a run uses.

    Attributes:
        steps: Why the others are left out, in order.
        available: Usable rows of each split, int64.
        rows: Rows in use: `available`, of train only those drawn.
        missing: Usable rows without an image file, int64; a run would stop at them.
        leaking: Number of patients with usable images in several splits.
    """

    steps: list[Exclusion]
    available: dict[str, np.ndarray]
    rows: dict[str, np.ndarray]
    missing: np.ndarray
    leaking: int


def find_usage(datamodule: BaseDataModule) -> Usage:
    """Select rows as `BaseDataModule.setup` does, but neither missing files nor leaking patients are errors here.

    Raises:
        DataError: The metadata cannot be read, or hold fewer images than the draw asks for.
    """
    table = datamodule.read_table()
    steps = exclusion_flow(datamodule.exclusion_reasons(table))
    missing = datamodule.absent_images(table, np.flatnonzero(usable_rows(table, steps)))
    if datamodule.missing_images == "drop" and len(missing):
        steps, missing = [*steps, Exclusion("no image file", missing)], missing[:0]
    usable = usable_rows(table, steps)
    available = {split: part[usable[part]] for split in SPLITS[1:] for part in [table.rows(split)]}
    train = available["train"]
    drawn = train[datamodule.draw(table, train)] if len(train) else train
    leaking = len(crossing_groups(table.groups[usable], table.split[usable]))
    return Usage(steps, available, {**available, "train": drawn}, missing, leaking)


# The exclusion flow --------------------------------------------------------------------------------------------------


def exclusion_frame(table: Table, usage: Usage, draw: str = "") -> pd.DataFrame:
    """From the release to the training set: columns step, images, patients.

    Rows that leave are negative numbers, and a patient leaves with the last of his images; so each column adds up from
    the release to "used".

    Args:
        table: All rows.
        usage: Which of them are used.
        draw: How the training images were drawn, in words ("shots: 5").
    """
    patients = pd.factorize(table.groups)[0]
    left = np.ones(len(table), dtype=bool)
    flow = [("rows of the release", len(table), _distinct(patients))]
    no_split = np.flatnonzero(usable_rows(table, usage.steps) & (table.split.codes == 0))
    for step in [*usage.steps, Exclusion("in no split", no_split)]:
        before = _distinct(patients[left])
        left[step.rows] = False
        if len(step.rows):
            flow.append((f"left out: {step.reason}", -len(step.rows), _distinct(patients[left]) - before))
    parts = {"used": np.flatnonzero(left), **{f"used for {split}": rows for split, rows in usage.available.items()}}
    if len(usage.rows["train"]) < len(usage.available["train"]):
        parts[f"drawn for train ({draw})" if draw else "drawn for train"] = usage.rows["train"]
    if len(usage.missing):
        parts["usable, but the image file is missing"] = usage.missing
    flow += [(name, len(rows), _distinct(patients[rows])) for name, rows in parts.items()]
    return pd.DataFrame(flow, columns=["step", "images", "patients"])


# Table 1 -------------------------------------------------------------------------------------------------------------


def table_one(table: Table, rows: Rows, class_names: Sequence[str]) -> pd.DataFrame:
    """Table 1: text cells, indexed by (characteristic, level), a column for each split and one for all used images.

    Args:
        table: All rows, with the optional metadata columns of `datamodules.table.METADATA` and `source`.
        rows: Rows in use of each split.
        class_names: Names of the classes or label columns.
    """
    parts = {**rows, ALL: np.sort(np.concatenate(list(rows.values())))}
    patients = pd.factorize(table.groups)[0]
    lines: dict[tuple[str, str], list[str]] = {}

    def add(characteristic: str, level: str, cell: Callable[[np.ndarray], str]) -> None:
        lines[characteristic, level] = [cell(part) for part in parts.values()]

    add("Images", "", lambda part: f"{len(part):,}")
    add("Patients (groups)", "", lambda part: f"{_distinct(patients[part]):,}")
    add("Images each, median (max)", "", lambda part: _images_each(patients[part]))
    if "sex" in table.metadata:
        sexes = [_sex_of_patients(patients[part], np.asarray(table.metadata["sex"])[part]) for part in parts.values()]
        for level in sexes[-1]:
            if level in ("F", "M") or sexes[-1][level]:
                cells = [_share(counts[level], sum(counts.values())) for counts in sexes]
                lines["Sex, n (% of patients)", level] = cells
    if "age" in table.metadata:
        age = np.asarray(table.metadata["age"], dtype=np.float64)
        add("Age at the image, years", "mean ± SD", lambda part: _mean_sd(age[part]))
        add("Age at the image, years", "median [IQR]", lambda part: _median_iqr(age[part]))
        if np.isnan(age[parts[ALL]]).any():
            add("Age at the image, years", f"{UNKNOWN}, n", lambda part: f"{int(np.isnan(age[part]).sum()):,}")
    for name in ("view", "scanner", "site", "source"):
        if name in table.metadata:
            codes, levels = _levels(np.asarray(table.metadata[name], dtype=object), parts[ALL])
            for code, level in enumerate(levels):
                title = f"{name.capitalize()}, n (% of images)"
                add(title, level, lambda part, codes=codes, code=code: _share_of(codes[part] == code))  # type: ignore[misc]
    if "date" in table.metadata:
        years = _years(np.asarray(table.metadata["date"], dtype=object))
        add("Years, first–last", "", lambda part: _range(years[part]))
    tallies = [_tally(table.labels, part, len(class_names)) for part in parts.values()]
    for characteristic, level, cells in _label_lines(table.labels, tallies, class_names):
        lines[characteristic, level] = cells
    if table.labels.ndim == 2:
        positive = (table.labels == 1).any(axis=1)
        add("No label positive, n (%)", "", lambda part: _share_of(~positive[part]))
    index = pd.MultiIndex.from_tuples(list(lines), names=["characteristic", "level"])
    return pd.DataFrame(list(lines.values()), index=index, columns=list(parts))


def _label_lines(
    labels: np.ndarray, tallies: Sequence[pd.DataFrame], class_names: Sequence[str]
) -> Iterator[tuple[str, str, list[str]]]:
    """Rows of table 1 about labels; the last tally is that of all used images."""
    single = labels.ndim == 1
    if len(class_names) > MAX_LABELS:
        title = f"Images of each of {len(class_names)} classes" if single else f"Positives of {len(class_names)} labels"
        cells = [_spread(tally["positives"].to_numpy()) for tally in tallies]
        yield f"{title}, median (min–max)", "", cells
        return
    title = "Class, n (% of images)" if single else "Positive, n (% of known)"
    for place, name in enumerate(class_names):
        counts = [tally.iloc[place] for tally in tallies]
        known = [int(count["positives"] + count["negatives"]) for count in counts]
        positives = [_share(int(count["positives"]), whole) for count, whole in zip(counts, known, strict=True)]
        yield title, name, positives
    for place, name in enumerate(class_names):
        counts = [tally.iloc[place] for tally in tallies]
        if counts[-1]["soft"] or counts[-1]["unknown"]:
            known = [int(count["positives"] + count["negatives"]) for count in counts]
            totals = [int(count.sum()) for count in counts]
            yield KNOWN, name, [_share(number, whole) for number, whole in zip(known, totals, strict=True)]


# Counts --------------------------------------------------------------------------------------------------------------


def label_counts(table: Table, rows: Rows, class_names: Sequence[str]) -> pd.DataFrame:
    """Effective counts, after all policies: one row a label, split, view and source.

    Args:
        table: All rows.
        rows: Rows in use of each split.
        class_names: Names of the classes or label columns.

    Returns:
        Columns label, split, view, source (text; "" where the table has no such column) and the numbers of images:
        positives (1), negatives (0), soft (in between: uncertain cells with a target), unknown.
    """
    keys = {}
    for name in ("view", "source"):
        column = pd.Series(np.asarray(table.metadata.get(name, np.full(len(table), "")), dtype=object))
        keys[name] = column.replace("", UNKNOWN) if name in table.metadata else column
    frames = []
    for split, part in rows.items():
        pairs = pd.DataFrame({name: column.iloc[part].to_numpy() for name, column in keys.items()})
        for pair, places in pairs.groupby(["view", "source"]).indices.items():
            view, source = cast("tuple[str, str]", pair)
            tally = _tally(table.labels, part[places], len(class_names))
            names = {"label": list(class_names), "split": split, "view": view, "source": source}
            frames.append(tally.assign(order=range(len(tally)), **names))
    columns = ["label", "split", "view", "source", "positives", "negatives", "soft", "unknown"]
    if not frames:
        return pd.DataFrame(columns=columns)
    return pd.concat(frames).sort_values("order", kind="stable")[columns].reset_index(drop=True)


def _tally(labels: np.ndarray, rows: np.ndarray, width: int) -> pd.DataFrame:
    """Images of `rows` by what is known of each label: (width, 4) whole numbers."""
    part = labels[rows]
    if part.ndim == 1:
        positives = np.bincount(part[part >= 0], minlength=width)
        unknown = np.full(width, np.count_nonzero(part < 0))
        negatives, soft = len(part) - unknown - positives, np.zeros(width, dtype=np.int64)
    else:
        columns = np.ascontiguousarray(part.T)  # counting along memory is ten times as fast
        positives, negatives, unknown = (
            np.asarray([np.count_nonzero(of_kind(column)) for column in columns], dtype=np.int64)
            for of_kind in (lambda values: values == 1, lambda values: values == 0, np.isnan)
        )
        soft = len(part) - positives - negatives - unknown
    return pd.DataFrame({"positives": positives, "negatives": negatives, "soft": soft, "unknown": unknown})


# Cells ---------------------------------------------------------------------------------------------------------------


def _distinct(codes: np.ndarray) -> int:
    return int(np.count_nonzero(np.bincount(codes)))


def _images_each(patients: np.ndarray) -> str:
    counts = np.bincount(patients)
    counts = counts[counts > 0]
    return f"{np.median(counts):g} ({counts.max():,})" if len(counts) else NONE


def _sex_of_patients(patients: np.ndarray, sex: np.ndarray) -> dict[str, int]:
    """Count patients by the sexes that their images are labelled with."""
    size = int(patients.max(initial=-1)) + 1
    female, male = (np.bincount(patients[sex == letter], minlength=size) > 0 for letter in ("F", "M"))
    both, total = int((female & male).sum()), _distinct(patients)
    known = int((female | male).sum())
    return {"F": int(female.sum()) - both, "M": int(male.sum()) - both, "F and M": both, UNKNOWN: total - known}


def _levels(values: np.ndarray, used: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Code a column: (codes (N,), names), the most frequent of the used rows first, then "other", then unknown."""
    codes, texts = pd.factorize(values)
    names = [str(text) for text in texts]
    counts = np.bincount(codes[used], minlength=len(names))
    nothing = [code for code, name in enumerate(names) if name in ("", UNKNOWN)]
    known = [code for code in np.argsort(-counts, kind="stable").tolist() if counts[code] and code not in nothing]
    shown, others = known[:MAX_LEVELS], len(known[MAX_LEVELS:])
    levels = [names[code] for code in shown] + [f"other ({others} more)"] * (others > 0)
    place = np.full(len(names), len(shown))
    place[shown] = np.arange(len(shown))
    place[nothing] = len(levels)
    return place[codes], levels + [UNKNOWN] * bool(counts[nothing].any())


def _share(count: int, total: int) -> str:
    return f"{count:,} ({100 * count / total:.1f}%)" if total else NONE


def _share_of(chosen: np.ndarray) -> str:
    return _share(int(np.count_nonzero(chosen)), len(chosen))


def _mean_sd(values: np.ndarray) -> str:
    values = values[~np.isnan(values)]
    return f"{values.mean():.1f} ± {values.std(ddof=1):.1f}" if len(values) > 1 else NONE


def _median_iqr(values: np.ndarray) -> str:
    values = values[~np.isnan(values)]
    if not len(values):
        return NONE
    low, median, high = np.percentile(values, [25, 50, 75])
    return f"{median:.1f} [{low:.1f}–{high:.1f}]"


def _years(dates: np.ndarray) -> np.ndarray:
    """Years of dates that begin with them, float64 (N,), NaN = unknown."""
    codes, texts = pd.factorize(dates)
    return np.asarray(pd.to_numeric(pd.Series(texts, dtype=object).str[:4], errors="coerce"), dtype=np.float64)[codes]


def _range(values: np.ndarray) -> str:
    values = values[~np.isnan(values)]
    return f"{values.min():.0f}–{values.max():.0f}" if len(values) else NONE


def _spread(counts: np.ndarray) -> str:
    return f"{np.median(counts):,g} ({counts.min():,}–{counts.max():,})"


# The forms of a frame ------------------------------------------------------------------------------------------------


def outline(frame: pd.DataFrame) -> pd.DataFrame:
    """Turn table 1 into one with a single first column: headings, and below them their levels, indented."""
    lines: list[list[Any]] = []
    heading = ""
    for (characteristic, level), cells in zip(frame.index, frame.to_numpy().tolist(), strict=True):
        if level and characteristic != heading:
            lines.append([characteristic, *[""] * frame.shape[1]])
        heading = characteristic
        lines.append([f"  {level}" if level else characteristic, *cells])
    return pd.DataFrame(lines, columns=["", *frame.columns])
