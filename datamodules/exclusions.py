"""Which rows of a table a run does not use, and for which reason: the flow from the release to the training set."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from datamodules.table import Table


@dataclass(frozen=True)
class Exclusion:
    """Rows that leave at one step of the flow.

    Attributes:
        reason: Why, as read by a user: "view is not PA or AP".
        rows: Table rows that leave here, int64, ascending; a row leaves for its first reason only.
    """

    reason: str
    rows: np.ndarray


def exclusion_flow(reasons: Mapping[str, np.ndarray]) -> list[Exclusion]:
    """Turn reasons, each with the rows that it excludes (bool (N,)), into steps; steps without rows are left out."""
    steps: list[Exclusion] = []
    gone: np.ndarray | None = None
    for reason, rows in reasons.items():
        leaving = rows if gone is None else rows & ~gone
        gone = rows if gone is None else gone | rows
        if leaving.any():
            steps.append(Exclusion(reason, np.flatnonzero(leaving)))
    return steps


def usable_rows(table: Table, steps: list[Exclusion]) -> np.ndarray:
    """Rows that remain, bool (N,)."""
    usable = np.ones(len(table), dtype=bool)
    for step in steps:
        usable[step.rows] = False
    return usable


def unlabelled(labels: np.ndarray) -> np.ndarray:
    """Rows without a label, bool (N,): −1, or no cell that is known."""
    return labels < 0 if labels.ndim == 1 else np.isnan(labels).all(axis=1)
