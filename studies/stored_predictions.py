"""One split of a run's stored predictions."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from datamodules.errors import DataError
from lightning_modules.thresholds import Task


@dataclass(frozen=True)
class Predictions:
    """One split of `predictions.parquet`.

    Attributes:
        ids: (N,), paths of the images.
        patients: (N,), whose image it is.
        labels: int64 (N,), or float32 (N, L) with 1 / 0 / NaN = unknown.
        logits: float32 (N, C) or (N, L).
        task: multiclass, or multilabel (binary is one label).
        class_names: One a column of the logits.
        metadata: Of `studies.outcome.SUBGROUPS` what the data set has; none in files of earlier versions.
    """

    ids: np.ndarray
    patients: np.ndarray
    labels: np.ndarray
    logits: np.ndarray
    task: Task
    class_names: list[str]
    metadata: dict[str, np.ndarray]


def read_predictions(path: Path | str, split: str = "test") -> Predictions:
    """Read one split of a run's predictions, as `studies.outcome.write_predictions` stored them.

    Raises:
        DataError: The file is missing or no such table, or has no rows of this split.
    """
    try:
        part = pd.read_parquet(path, filters=[("split", "==", split)])
        names = [str(name).removeprefix("logit/") for name in part.columns if str(name).startswith("logit/")]
        several = "label" in part.columns
        labels = part["label"] if several else part[[f"label/{name}" for name in names]]
        ids, patients = (part[name].to_numpy(dtype=object) for name in ("id", "group"))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"cannot read predictions: {error}",
            where=str(path),
            valid="a run's predictions.parquet: id, group, split, label, logit/<class>, ...",
        ) from error
    if part.empty:
        raise DataError(
            f"there are no predictions of {split}",
            where=str(path),
            valid=sorted(set(pd.read_parquet(path, columns=["split"])["split"])),
            hint="run `test` or `validate` of this run",
        )
    metadata = {
        str(name).removeprefix("meta/"): part[name].to_numpy() for name in part.columns if str(name).startswith("meta/")
    }
    logits = part[[f"logit/{name}" for name in names]].to_numpy(dtype=np.float32)
    task: Task = "multiclass" if several else "multilabel"
    return Predictions(ids, patients, labels.to_numpy(), logits, task, names, metadata)
