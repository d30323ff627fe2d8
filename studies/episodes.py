"""Few-shot episodes and their statistics: what is drawn for training, means over draws, differences on equal draws.

An interval here covers the draw of the training images, from one pool and judged on one test set; it says nothing of
other test images. Pure functions of labels and result rows (see `studies.results`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from datamodules import few_shot
from datamodules.errors import DataError, closest, shorten
from studies.statistics import holm, paired_p, summarise

CANDIDATE = ("source", "architecture", "transfer_depth", "granularity")
"""Columns that say which features: weights, their network, and the layer groups below them (stages or blocks)."""

SETTING = ("target", "protocol", "shots", "metric", "class_name")
"""Columns that say what was done with them; the head is part of `protocol`."""


@dataclass(frozen=True, eq=False)
class Episode:
    """A training episode.

    Attributes:
        shots: "1", "5", ..., or "full".
        seed: Of the draw.
        rows: int64, ascending; places in the labels it was drawn from.
    """

    shots: str
    seed: int
    rows: npt.NDArray[np.int64]


def draw_episodes(
    labels: npt.NDArray[Any],
    groups: npt.ArrayLike | None,
    shots: Sequence[int | str],
    seeds: Sequence[int],
    class_names: Sequence[str] | None = None,
    *,
    one_per_group: bool = True,
    on_small: Literal["error", "warn"] = "error",
) -> list[Episode]:
    """Draw an episode for every number of shots and seed: a pure function, so the same for all weights.

    Episodes of one seed are nested over shots (see `datamodules.few_shot.sample`). "full" is every labelled row, once,
    under the first seed: further draws would be the same images, and an interval over them would be a claim to
    certainty.

    Args:
        labels: int64 (N,) with -1 = unlabelled, or floats (N, L) with 1 / 0 / NaN.
        groups: (N,) group (patient) of every row, or None.
        shots: Images a class, as numbers or text, and "full".
        seeds: Non-negative.
        class_names: Names of the C classes or L labels.
        one_per_group: At most one image of a group in a draw.
        on_small: What a class with fewer images than shots is: an error, or a warning and all there are.

    Returns:
        Episodes in the order of shots, then seeds.

    Raises:
        DataError: No or repeated shots or seeds, a class that is too small, or labels that do not fit.
    """
    # "05" is 5; what is no number is refused by the draw.
    levels = [str(int(level)) if str(level).isdecimal() else str(level) for level in shots]
    for what, values in (("shots", levels), ("seeds", list(seeds))):
        if not values or len(set(values)) < len(values):
            raise DataError(
                f"{what} are {shorten(values) or 'none'}", where=what, valid="different values, at least one"
            )
    labels = np.asarray(labels)
    episodes = []
    for level in levels:
        for seed in list(seeds)[:1] if level == "full" else seeds:
            if level == "full":
                rows = labelled(labels)
            else:
                rows = few_shot.sample(
                    labels, level, seed, groups,
                    class_names=class_names, on_small=on_small, one_per_group=one_per_group,
                )  # fmt: skip
            if labels.ndim == 1 and class_names is not None:
                _check_classes(labels[rows], class_names, level)
            episodes.append(Episode(level, int(seed), rows))
    return episodes


def labelled(labels: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Rows with a class, or with one known label at least: int64, ascending."""
    return np.flatnonzero(labels >= 0 if labels.ndim == 1 else (~np.isnan(labels)).any(axis=1))


def summarise_episodes(frame: pd.DataFrame, by: Sequence[str] = (*CANDIDATE, *SETTING)) -> pd.DataFrame:
    """Mean, spread and 95 % t interval over seeds.

    Args:
        frame: Result rows: the columns `by`, "seed" and "value".
        by: The columns that make a group, "shots" among them.

    Returns:
        `by`, then `n` (seeds with a value), `mean`, `sd` (ddof 1), `low`, `high` (NaN for one seed); sorted, shots by
        their number.

    Raises:
        DataError: A column is missing, or an episode has two values.
    """
    _check_frame(frame, by)
    return _sorted(summarise(frame, by), by)


def paired_differences(
    frame: pd.DataFrame,
    reference: str,
    *,
    candidate: Sequence[str] = CANDIDATE,
    setting: Sequence[str] = SETTING,
) -> pd.DataFrame:
    """Differences of all weights to reference weights on identical episodes.

    Values are paired where `setting` and seed agree. Layer groups are counted from the deepest one probed, so that the
    last groups of two networks are compared although one has more of them. Seeds that one of both lacks, and NaN, are
    left out.

    Args:
        frame: Result rows: the columns `candidate`, `setting`, "seed" and "value".
        reference: A value of the first column of `candidate`.
        candidate: Columns that tell weights apart; "transfer_depth" is matched as said among groups of one
            "granularity", the others need not agree.
        setting: Columns that must agree.

    Returns:
        `candidate` and `setting`, then `n` (pairs), `difference` (mean of value less reference value), `sd` and
        `low`, `high` (its 95 % t interval), `p` (two-sided paired t test) and `p_holm`, corrected for all rows of this
        table together. Interval and p are NaN for one pair, and where all pairs differ by the same, which is not zero:
        no spread, no claim. Empty where nothing pairs.

    Raises:
        DataError: The reference does not occur, a column is missing, or an episode has two values.
    """
    _check_frame(frame, [*candidate, *setting])
    name = candidate[0]
    if reference not in set(frame[name].dropna()):
        known = [str(value) for value in frame[name].dropna().unique()]
        near = closest(reference, known)
        raise DataError(
            f"there are no results of {reference!r} to compare with",
            where=name,
            valid=known,
            hint=f"did you mean {near!r}?" if near else None,
        )
    unit = [*setting, "seed"]
    values = frame.dropna(subset=["value"])
    if "transfer_depth" in candidate:
        kind = [column for column in candidate if column == "granularity"]
        deepest = values.groupby([name, *kind], dropna=False)["transfer_depth"].transform("max")
        values = values.assign(from_last=(deepest - values["transfer_depth"]).fillna(0).astype(int))
        unit += [*kind, "from_last"]
    is_reference = values[name].eq(reference).fillna(False).astype(bool)
    base = values.loc[is_reference, [*unit, "value"]]
    if base.duplicated(unit).any():
        raise DataError(f"{reference!r} is more than one network", where=name, hint="keep the rows of one of them")
    pairs = values[~is_reference].merge(base, on=unit, suffixes=("", "_reference"))
    pairs = pairs.assign(difference=pairs["value"] - pairs["value_reference"])
    by = [*candidate, *setting]
    table = summarise(pairs, by, "difference").rename(columns={"mean": "difference"})
    p = paired_p(table["n"].to_numpy(), table["difference"].to_numpy(float), table["sd"].to_numpy(float))
    table.loc[np.isnan(p), ["low", "high"]] = np.nan
    return _sorted(table.assign(p=p, p_holm=holm(p)), by)


def _check_classes(labels: npt.NDArray[Any], class_names: Sequence[str], level: str) -> None:
    missing = np.flatnonzero(np.bincount(labels, minlength=len(class_names)) == 0)
    if len(missing):
        raise DataError(
            f"{len(missing)} of {len(class_names)} classes have no training image: "
            f"{shorten([class_names[place] for place in missing.tolist()])}",
            where=f"shots={level}",
            hint="leave these classes out of the data set, or move images of theirs to the training split",
        )


def _check_frame(frame: pd.DataFrame, by: Sequence[str]) -> None:
    missing = [name for name in (*by, "seed", "value") if name not in frame]
    if missing:
        raise DataError(f"result rows lack the column {shorten(missing)}", valid=[str(name) for name in frame.columns])
    doubled = frame.duplicated([*by, "seed"], keep=False).to_numpy()
    if doubled.any():
        first = frame[[*by, "seed"]].iloc[int(doubled.argmax())].dropna()
        raise DataError(
            f"{int(doubled.sum())} result rows share an episode with another",
            where=", ".join(f"{name} {value}" for name, value in first.items()),
            hint="summarise one study at a time, or tell the rows apart by a further column",
        )


def _sorted(table: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Rows by `by`, shots by their number with "full" last."""

    def key(column: pd.Series) -> pd.Series:
        if column.name != "shots":
            return column
        return pd.to_numeric(column.astype(str).replace("full", "inf")).astype(float)

    return table.sort_values(list(by), key=key, kind="stable").reset_index(drop=True)
