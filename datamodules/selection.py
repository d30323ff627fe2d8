"""Which rows of a data set a run uses: table → splits → exclusions → few-shot draw."""

import warnings
from abc import abstractmethod
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from datamodules import few_shot, splits
from datamodules.assignment import FoldBy, SplitSettings, assign_splits
from datamodules.errors import DataError
from datamodules.exclusions import Exclusion, exclusion_flow, unlabelled, usable_rows
from datamodules.label_space import LabelSpace, Task
from datamodules.source_dials import SourceDials
from datamodules.streaming import StreamingDataModule
from datamodules.table import SPLITS, Table


class SelectingDataModule(StreamingDataModule):
    """From the metadata of a data set to the rows of each split; `BaseDataModule` explains the settings."""

    labelled: ClassVar[bool] = True
    """Whether images have classes or labels; of a set with captions alone no row is left out for want of a label."""
    name: str
    root: Path
    task: Task
    class_names: list[str]
    space: LabelSpace
    dials: SourceDials
    shots: int | Literal["full"] | None
    num_images: int | None
    fraction: float | None
    few_shot_seed: int
    on_small: Literal["error", "warn"]
    one_per_group: bool
    num_classes_kept: int | None
    val_fraction: float
    test_fraction: float
    split_seed: int
    folds: int | None
    fold: int
    fold_by: FoldBy
    inner_folds: int | None
    inner_fold: int | None
    outputs: list[str] | None
    leaks: Literal["stop", "record"]
    missing_images: Literal["error", "drop"]

    def __init__(self) -> None:
        super().__init__()
        self._rows: dict[str, np.ndarray] = {}

    # What a data set says ----------------------------------------------------------------------------------------

    @abstractmethod
    def load_table(self) -> Table:
        """Read the metadata: all rows of the source in its order, official splits ("" where there are none)."""

    def resolve_labels(self, table: Table) -> Table:
        """Turn what `load_table` gave as labels into what training and evaluation use, splits known. Default: as is."""
        return table

    def exclusions(self, table: Table) -> dict[str, np.ndarray]:
        """Rows that are not used, bool (N,), by their reason in words, in order: other views, say. Default: none."""
        return {}

    @abstractmethod
    def missing_files(self, table: Table, rows: np.ndarray) -> np.ndarray:
        """Those of `rows` (int64) whose image file is not there."""

    # The table and its splits ------------------------------------------------------------------------------------

    @property
    def split_policy(self) -> str:
        """Where the test set comes from, for result rows."""
        self.read_table()
        return self._split_policy

    def read_table(self) -> Table:
        """Metadata of every row in the source's order, with splits assigned and labels restricted; read once."""
        return self._table

    @cached_property
    def raw_table(self) -> Table:
        """The table as `load_table` gives it, read once."""
        return self.load_table()

    @cached_property
    def _table(self) -> Table:
        table, self._split_policy = self.assigned_table(
            SplitSettings(
                val_fraction=self.val_fraction,
                test_fraction=self.test_fraction,
                seed=self.split_seed,
                folds=self.folds,
                fold=self.fold,
                fold_by=self.fold_by,
            )
        )
        if self.outputs is not None:  # nothing is trained on this set, and tests are never made wrong
            return table.relabelled(self.space.apply(table.labels))
        if self.task == "multiclass":  # wrong among the classes that stay
            table = table.relabelled(self.space.apply(table.labels))
            return self.dials.add_noise(table, self.class_names)
        table = self.dials.add_noise(table, self.space.own)  # of a label, whichever others are chosen
        return table.relabelled(self.space.apply(table.labels))

    def assigned_table(self, settings: SplitSettings) -> tuple[Table, str]:
        """Load the table, give every row its split, and resolve its labels: (table, split policy in words)."""
        table, policy = self.assign(self.raw_table, settings)
        return self.resolve_labels(table), policy

    def assign(self, table: Table, settings: SplitSettings) -> tuple[Table, str]:
        """Give every row its split: (table, policy in words)."""
        return assign_splits(table, self.release, settings)

    # Lightning's hooks -------------------------------------------------------------------------------------------

    def setup(self, stage: str | None = None) -> None:
        """Check the table against the files, guard the splits, and draw the training set."""
        if stage == "fit":
            self.share_batch()
        if self._rows:
            return
        table = self.read_table()
        self.excluded = self.exclusion_steps(table)
        usable = usable_rows(table, self.excluded)
        self._guard_groups(table, usable)
        rows = {name: part[usable[part]] for name in SPLITS[1:] for part in [table.rows(name)]}
        if not len(rows["train"]) and self.outputs is None:
            gone = "; ".join(f"{len(step.rows)}: {step.reason}" for step in self.excluded)
            raise DataError(
                f"{self.name} has no training images",
                where=str(table.source or self.root),
                hint=f"{len(table)} rows, of which left out are {gone}" if gone else None,
            )
        if self.outputs is None:
            rows["train"] = rows["train"][self.draw(table, rows["train"])]
            if self.inner_folds is not None:
                held_out = self._held_out(table, rows["train"])
                rows["train"], rows["validation"] = rows["train"][~held_out], rows["train"][held_out]
        self._rows = rows

    def _held_out(self, table: Table, drawn: np.ndarray) -> np.ndarray:
        """Which of the drawn rows (n,) are the inner fold that is held out, bool (n,); by the draw's own seed."""
        assert self.inner_folds is not None
        labels = table.labels[drawn]
        parts = splits.folds(labels, table.groups[drawn], self.inner_folds, self.few_shot_seed)
        held_out = np.asarray(parts == self.inner_fold)
        if labels.ndim == 1:
            lost = np.setdiff1d(labels[held_out], labels[~held_out])
            if len(lost):
                raise DataError(
                    f"class {self.class_names[lost[0]]} has all of its images in inner fold {self.inner_fold}",
                    where="data.init_args.inner_folds",
                    hint="cross-validation needs two images (patients) of every class at least: draw more, or tune by "
                    "the validation set",
                )
        return held_out

    def test_on_all(self) -> None:
        """Make every usable row a test row: for evaluation without training on this set."""
        rows = np.sort(np.concatenate([self.rows(split) for split in SPLITS[1:]]))
        none = rows[:0]
        self._rows, self._split_policy = {"train": none, "validation": none, "test": rows}, "all images"

    def exclusion_steps(self, table: Table) -> list[Exclusion]:
        """The steps by which rows leave: the set's own reasons, no label, no image file.

        Raises:
            DataError: Image files are missing, unless `missing_images: drop` leaves them out with a warning.
        """
        steps = exclusion_flow(self.exclusion_reasons(table))
        missing = self.absent_images(table, np.flatnonzero(usable_rows(table, steps)))
        if not len(missing):
            return steps
        problem = f"{len(missing)} images of {self.name} are missing, the first is {table.paths[missing[0]]}"
        if self.missing_images == "error":
            raise DataError(
                problem,
                where=f"{table.where(missing[0])}; looked in {self.root}",
                hint="complete the download, or leave these rows out with --data.missing_images drop",
            )
        warnings.warn(f"{problem}; these rows are left out", stacklevel=2)
        return [*steps, Exclusion("no image file", missing)]

    def _dropped_classes(self, table: Table) -> dict[str, np.ndarray]:
        if self.num_classes_kept is None:
            return {}
        return {"class not kept": (self.raw_table.labels >= 0) & (table.labels < 0)}

    def exclusion_reasons(self, table: Table) -> dict[str, np.ndarray]:
        """All rows that the metadata leaves out, bool (N,), by reason in order: the set's own, the dials', no label."""
        no_label = unlabelled(table.labels) if self.labelled else np.zeros(len(table), dtype=bool)
        reasons = {**self.exclusions(table), **self._dropped_classes(table), "no label": no_label}
        if self.outputs is not None:
            return reasons
        return reasons | self.dials.exclusions(table, ~np.logical_or.reduce(list(reasons.values())))

    def absent_images(self, table: Table, rows: np.ndarray) -> np.ndarray:
        """Those of `rows` without an image, in their files or in the prepared folder."""
        if self.prepared is None:
            return self.missing_files(table, rows)
        return np.asarray(rows[self.prepared_rows[rows] < 0])

    def _guard_groups(self, table: Table, usable: np.ndarray) -> None:
        """Stop where a patient is in several splits, or note it in `group_leak`."""
        self.group_leak = ""
        if self.outputs is not None or not table.grouped:  # nothing is trained on this set, or nothing is shared
            return
        crossing = splits.crossing_groups(table.groups[usable], table.split[usable])
        if not crossing:
            return
        if self.leaks == "stop":
            strict = usable & ~self.leaky_rows(table)
            where = f"splits of {self.name} ({self.split_policy})"
            splits.check_disjoint(table.groups[strict], table.split[strict], where)
        self.group_leak = f"LEAK: {len(crossing)} patients in several splits"
        warnings.warn(f"{self.name}: {self.group_leak}, such as {crossing[0]}; result rows say so", stacklevel=2)

    def leaky_rows(self, table: Table) -> np.ndarray:
        """Rows, bool (N,), whose chosen split is known to put a patient's images on both sides. Default: none."""
        return np.zeros(len(table), dtype=bool)

    def draw(self, table: Table, train: np.ndarray) -> np.ndarray:
        """Positions within `train` of the images to train on: shots, num_images, fraction or all."""
        labels, groups = table.labels[train], table.groups[train] if table.grouped else None
        if self.shots is not None and self.shots != "full":
            return few_shot.sample(
                labels,
                self.shots,
                self.few_shot_seed,
                groups,
                class_names=self.class_names,
                one_per_group=self.one_per_group,
                on_small=self.on_small,
            )
        if self.num_images is not None or self.fraction is not None:
            return few_shot.subset(
                labels,
                num_images=self.num_images,
                fraction=self.fraction,
                seed=self.few_shot_seed,
                groups=groups if self.one_per_group else None,
            )
        return np.arange(len(train))

    def rows(self, split: str) -> np.ndarray:
        """Table rows in use for a split after `setup`, int64: draws and exclusions applied."""
        if not self._rows:
            self.setup()
        return self._rows[split]
