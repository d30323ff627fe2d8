"""The dials of a source: fewer classes, wrong labels, curation. They change the table and nothing else."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from datamodules import dials, readers
from datamodules.errors import DataError, closest
from datamodules.exclusions import unlabelled
from datamodules.hashing import hash_ids
from datamodules.table import SPLITS, Origin, Table


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
        score: In place of a file, the name of a score that the set itself holds, as its table's column `score`.
    """

    num_classes_kept: int | None = None
    label_noise: float = 0.0
    noise_confusion: str | None = None
    curation: float | None = None
    curation_scores: str | None = None
    seed: int = 0
    score: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.label_noise <= 1:
            raise DataError(f"label_noise: {self.label_noise}", where="data.init_args.label_noise", valid="0 to 1")
        if self.noise_confusion is not None and not self.label_noise:
            raise DataError("noise_confusion without label_noise changes nothing", where="data.init_args")
        if (self.curation is None) != (self.curation_scores is None and self.score is None):
            raise DataError("curation and curation_scores (or score) need each other", where="data.init_args")
        if self.curation_scores is not None and self.score is not None:
            raise DataError("curation_scores and score exclude each other", where="data.init_args")

    def describe(self) -> str | None:
        """The dials that are turned, for result rows; None where none is."""
        kind = f" by {Path(self.noise_confusion).name}" if self.noise_confusion else ""
        parts = [
            f"{self.num_classes_kept} classes" if self.num_classes_kept is not None else "",
            f"label noise {self.label_noise:g}{kind}" if self.label_noise else "",
            f"best {self.curation:g} by {self._scores_name}" if self.curation is not None else "",
        ]
        turned = [part for part in parts if part]
        return f"{', '.join(turned)} (seed {self.seed})" if turned else None

    @property
    def _scores_name(self) -> str:
        return Path(self.curation_scores).name if self.curation_scores else self.score or ""

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
        if self.noise_confusion is not None and labels.ndim != 1:
            raise DataError(
                "noise_confusion is for one class an image; here labels may occur together",
                where="data.init_args.noise_confusion",
                hint="leave it out: label_noise alone turns each label over",
            )
        if self.noise_confusion is None:
            noisy = dials.symmetric_noise(labels, self.label_noise, len(class_names), self.seed, ids)
        else:
            kept = self.num_classes_kept is not None  # of all classes, which the file names
            confusion = dials.read_confusion(Path(self.noise_confusion), class_names, further=kept)
            noisy = dials.asymmetric_noise(labels, self.label_noise, confusion, self.seed, ids)
        changed = table.labels.copy()
        changed[train] = noisy
        return table.relabelled(changed)

    def exclusions(self, table: Table, usable: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Training rows whose score is not among the best, bool (N,), by the reason in words.

        Args:
            table: All rows.
            usable: Rows that a run uses otherwise, bool (N,), of whose training rows a share is kept; default: those
                that have a label.
        """
        if self.curation is None:
            return {}
        usable = ~unlabelled(table.labels) if usable is None else usable
        train = np.flatnonzero(usable & (table.split.codes == SPLITS.index("train")))
        if not len(train):
            return {}
        if self.curation_scores is not None:
            scores = read_scores(Path(self.curation_scores), table.paths[train])
        else:
            scores = np.asarray(table.metadata["score"])[train]
        kept = dials.curated(scores, self.curation)
        left_out = np.zeros(len(table), dtype=bool)
        left_out[train[~kept]] = True
        return {f"score not among the best {100 * self.curation:g}% of {self._scores_name}": left_out}


def read_scores(path: Path, images: Any) -> np.ndarray:
    """Scores of images, float64 (N,), NaN where the file has none.

    Args:
        path: CSV or Parquet file with columns path (as the data set's table has it) and score.
        images: Paths, strings (N,).

    Raises:
        DataError: A score that is no number, an image twice, or a file that names none of the images.
    """
    frame = readers.read_frame(path, ["path", "score"])
    scores = _numbers(frame["score"], path)
    names = frame["path"].astype("str").str.strip().fillna("")
    # Millions of paths are compared by their hashes, and those in order: no Python string is made of them.
    listed, wanted = hash_ids(names, "scores"), hash_ids(images, "scores")
    order, by_hash = np.argsort(listed), np.argsort(wanted)
    listed, wanted = listed[order], wanted[by_hash]
    equal = np.flatnonzero(listed[1:] == listed[:-1])
    if len(equal):
        row = int(np.maximum(order[equal], order[equal + 1]).min())
        raise DataError(
            f"an image listed twice: {names.iloc[row]} ({len(equal)} such rows)", where=Origin(path).place(row)
        )
    place = np.minimum(np.searchsorted(listed, wanted), len(listed) - 1)
    found = np.flatnonzero(listed[place] == wanted)
    if not len(found):
        near = closest(images[0], names.head(1000)) or names.iloc[0]
        raise DataError(
            f"{path.name} has a score for none of {len(images)} images, such as {images[0]}",
            where=str(path),
            hint=f"its paths are written otherwise, such as {near}",
        )
    result = np.full(len(images), np.nan)
    result[by_hash[found]] = scores[order[place[found]]]
    return result


def _numbers(cells: "pd.Series[Any]", path: Path) -> np.ndarray:
    """A column of numbers, float64 (N,), NaN where a cell is blank."""
    numbers: np.ndarray = pd.to_numeric(cells, errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
    unread = np.flatnonzero(np.isnan(numbers))
    bad = unread[readers.text_column(cells.iloc[unread]) != ""]
    if len(bad):
        row = int(bad[0])
        raise DataError(
            f"a score that is no number: {cells.iloc[row]!r} ({len(bad)} such rows)",
            where=Origin(path).place(row),
            valid="a number, or blank for an image without a score",
        )
    return numbers
