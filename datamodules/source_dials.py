"""The dials of a source: fewer classes, wrong labels, curation. They change the table and nothing else."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from datamodules import dials, readers
from datamodules.errors import DataError, closest
from datamodules.table import SPLITS, Table


@dataclass(frozen=True)
class SourceDials:
    """How large and how clean a source is; `fraction` is the draw's.

    Attributes:
        num_classes_kept: Classes of a multi-class set that stay, drawn at random; None = all.
        label_noise: Share of the training labels that are made wrong, 0–1.
        noise_confusion: CSV of probabilities of the wrong class (column) given the true one (row); None = any other
            class is equally likely.
        curation: Share of the training images that stays, those with the highest scores; None = all.
        curation_scores: CSV or Parquet file with columns path and score.
        seed: Seed of the draws.
    """

    num_classes_kept: int | None = None
    label_noise: float = 0.0
    noise_confusion: str | None = None
    curation: float | None = None
    curation_scores: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.label_noise <= 1:
            raise DataError(f"label_noise: {self.label_noise}", where="data.init_args.label_noise", valid="0 to 1")
        if self.noise_confusion is not None and not self.label_noise:
            raise DataError("noise_confusion without label_noise changes nothing", where="data.init_args")
        if (self.curation is None) != (self.curation_scores is None):
            raise DataError("curation and curation_scores need each other", where="data.init_args")

    def describe(self) -> str | None:
        """The dials that are turned, for result rows; None where none is."""
        kind = f" by {Path(self.noise_confusion).name}" if self.noise_confusion else ""
        scores = Path(self.curation_scores).name if self.curation_scores else ""
        parts = [
            f"{self.num_classes_kept} classes" if self.num_classes_kept is not None else "",
            f"label noise {self.label_noise:g}{kind}" if self.label_noise else "",
            f"best {self.curation:g} by {scores}" if self.curation is not None else "",
        ]
        turned = [part for part in parts if part]
        return f"{', '.join(turned)} (seed {self.seed})" if turned else None

    def classes(self, names: Sequence[str], task: str) -> list[int] | None:
        """Numbers of the classes that stay; None for all.

        Raises:
            DataError: The set has labels instead of classes, or not so many classes.
        """
        if self.num_classes_kept is None:
            return None
        if task != "multiclass":
            raise DataError(
                f"num_classes_kept wants classes; the set is {task}", where="data.init_args.num_classes_kept"
            )
        kept: list[int] = dials.kept_classes(np.arange(len(names)), self.num_classes_kept, self.seed).tolist()
        return kept

    def add_noise(self, table: Table, class_names: Sequence[str]) -> Table:
        """Make a share of the training labels wrong; those of validation and test stay right."""
        train = table.rows("train")
        if not self.label_noise or not len(train):
            return table
        labels, ids = table.labels[train], table.paths[train]
        if self.noise_confusion is None:
            noisy = dials.symmetric_noise(labels, self.label_noise, len(class_names), self.seed, ids)
        else:
            confusion = dials.read_confusion(Path(self.noise_confusion), class_names)
            noisy = dials.asymmetric_noise(labels, self.label_noise, confusion, self.seed, ids)
        changed = table.labels.copy()
        changed[train] = noisy
        return table.relabelled(changed)

    def exclusions(self, table: Table) -> dict[str, np.ndarray]:
        """Training rows whose score is not among the best, bool (N,), by the reason in words."""
        if self.curation is None or self.curation_scores is None:
            return {}
        train = np.asarray(table.split.codes) == SPLITS.index("train")
        kept = np.ones(len(table), dtype=bool)
        kept[train] = dials.curated(read_scores(Path(self.curation_scores), table.paths[train]), self.curation)
        return {f"score not among the best {self.curation:.0%} of {Path(self.curation_scores).name}": ~kept}


def read_scores(path: Path, images: Sequence[str]) -> np.ndarray:
    """Scores of images, float64 (N,), NaN where the file has none.

    Args:
        path: CSV or Parquet file with columns path (as the data set's table has it) and score.
        images: Paths (N,).

    Raises:
        DataError: A score that is no number, an image twice, or a file that names none of the images.
    """
    frame = readers.read_frame(path, ["path", "score"])
    names = readers.text_column(frame["path"])
    scores = pd.to_numeric(frame["score"], errors="coerce")
    bad = np.flatnonzero((scores.isna() & (readers.text_column(frame["score"]) != "")).to_numpy())
    twice = np.flatnonzero(names.duplicated().to_numpy())
    for rows, problem in ((bad, "a score that is no number"), (twice, "an image listed twice")):
        if len(rows):
            row = frame.iloc[rows[0]]
            raise DataError(f"{problem}: {row['path']}, {row['score']}", where=f"{path}, line {rows[0] + 2}")
    place = pd.Index(names).get_indexer(pd.Index(np.asarray(images, dtype=object)))
    if not (place >= 0).any():
        near = closest(images[0], names.head(1000)) if len(images) else None
        raise DataError(
            f"{path.name} has a score for none of {len(images)} images, such as {images[0]}",
            where=str(path),
            hint=f"its paths are written otherwise, such as {near or names.iloc[0]}",
        )
    return np.where(place >= 0, scores.to_numpy(dtype=np.float64)[place], np.nan)
