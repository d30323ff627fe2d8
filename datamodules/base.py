"""The base of every data set: table → splits → few-shot draw → stream of uint8 batches."""

import os
import warnings
from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from datamodules import few_shot, io, splits
from datamodules.arguments import check_arguments
from datamodules.assignment import FoldBy, SplitSettings, assign_splits
from datamodules.errors import DataError
from datamodules.exclusions import Exclusion, exclusion_flow, unlabelled, usable_rows
from datamodules.files import check_files
from datamodules.label_space import Task, choose_labels
from datamodules.source_dials import SourceDials
from datamodules.streaming import StreamingDataModule
from datamodules.table import SPLITS, ImageNames, Table
from datamodules.transforms import create_transform


@lru_cache(maxsize=1)
def shared_cache(max_bytes: int) -> io.ImageCache:
    """The process's image cache: the runs of a study decode an image once."""
    return io.ImageCache(max_bytes)


class BaseDataModule(StreamingDataModule):
    """What all data sets share. A subclass states facts and implements `load_table` (and `read_images` if not files).

    Args:
        root: Folder of the data set; default `$FARSHOT_DATA/<name>`.
        batch_size: Global batch: devices and accumulation divide it.
        max_batch_per_device: Largest batch that fits on a device; a larger share is accumulated.
        num_workers: Loader processes. The stream is the same for any number.
        image_size: Side of the square images that the model sees, pixels.
        transform: Policy by name: bit, inception_crop, inception_crop_randaugment, entezari2023, resize_center,
            chest_xray or chest_xray_cherti2022.
        shots: Training images per class (multi-label: positives per label), a number or "full".
        num_images: Train on this many images at natural prevalence.
        fraction: Train on this share of the training images, 0–1.
        few_shot_seed: Seed of the draw for shots, num_images and fraction.
        on_small: What a class with fewer images than `shots` is: an error, or a warning and all there are.
        one_per_group: Few-shot draws take at most one image a patient.
        num_classes_kept: Keep this many classes of a multi-class set, drawn by few_shot_seed.
        label_noise: Make this share of the training labels wrong, 0–1.
        noise_confusion: CSV with the probability of each wrong class (column) given the true one (row); default: all
            other classes alike.
        curation: Train on this share of the images, those with the highest scores.
        curation_scores: CSV or Parquet file with columns path and score.
        prepared: Folder of `python cli.py prepare`: images come from there, everything else from the set's own table.
        val_fraction: Share of the training groups held out for validation where no official validation exists.
        test_fraction: Share of the groups in the test set where no official test set exists (fixed hash).
        split_seed: Seed of the validation split and the folds.
        folds: Cross-validation: fold number `fold` of `folds` is the test set. An official test set stays untouched.
        fold: Which fold is the test set, 0 … folds − 1.
        fold_by: What a fold holds together: group (patients), site (each site a fold) or date (chronological).
        balance: Draw training images so that every class has the same share (weights from the table).
        labels: Restrict a multi-label set to these labels, in this order.
        outputs: Arrange the labels as these outputs of a trained model, by canonical name; an output that the set does
            not annotate is unknown. For evaluation without training.
        leaks: Patients in several splits, and test images that the source of the weights has seen: stop, or record them
            and go on with marked result rows.
        missing_images: Rows whose image file is not there: an error, or drop them with a counted warning.
        seed: Seed of the stream; default the run's seed.
        cache_gb: Keep decoded images in memory up to this many GB per process (0: none).
    """

    name: str
    """Data set's name: its default folder, the key of its hashed splits, its name in results."""
    channels: ClassVar[Literal[1, 3]] = 3
    window: tuple[float, float] | None = None
    """Intensities that become black and white in images deeper than 8 bits; None where a set has none such."""
    task: Task
    class_names: list[str]

    def __init__(
        self,
        root: str | None = None,
        *,
        batch_size: int = 32,
        max_batch_per_device: int | None = None,
        num_workers: int = 0,
        image_size: int = 224,
        transform: str = "inception_crop",
        shots: int | Literal["full"] | None = None,
        num_images: int | None = None,
        fraction: float | None = None,
        few_shot_seed: int = 0,
        on_small: Literal["error", "warn"] = "error",
        one_per_group: bool = True,
        num_classes_kept: int | None = None,
        label_noise: float = 0.0,
        noise_confusion: str | None = None,
        curation: float | None = None,
        curation_scores: str | None = None,
        prepared: str | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.15,
        split_seed: int = 0,
        folds: int | None = None,
        fold: int = 0,
        fold_by: FoldBy = "group",
        balance: bool = False,
        labels: list[str] | None = None,
        outputs: list[str] | None = None,
        leaks: Literal["stop", "record"] = "stop",
        missing_images: Literal["error", "drop"] = "error",
        seed: int | None = None,
        cache_gb: float = 0.0,
    ) -> None:
        super().__init__()
        self.root = Path(root if root is not None else Path(os.environ.get("FARSHOT_DATA", "data")) / self.name)
        self.batch_size, self.max_batch_per_device, self.num_workers = (
            batch_size,
            max_batch_per_device,
            num_workers,
        )
        self.image_size, self.transform = image_size, transform
        self.shots, self.num_images, self.fraction, self.few_shot_seed = (
            shots,
            num_images,
            fraction,
            few_shot_seed,
        )
        self.on_small, self.one_per_group = on_small, one_per_group
        self.val_fraction, self.test_fraction, self.split_seed = val_fraction, test_fraction, split_seed
        self.folds, self.fold, self.fold_by = folds, fold, fold_by
        self.balance, self.labels, self.outputs, self.seed = balance, labels, outputs, seed
        self.leaks, self.missing_images = leaks, missing_images
        self.num_classes_kept, self.label_noise, self.noise_confusion = num_classes_kept, label_noise, noise_confusion
        self.curation, self.curation_scores, self.prepared = curation, curation_scores, prepared
        self.dials = SourceDials(
            num_classes_kept, label_noise, noise_confusion, curation, curation_scores, seed=few_shot_seed
        )
        self.cache = shared_cache(int(cache_gb * 1e9))
        check_arguments(vars(self))
        create_transform(transform, image_size, train=False)
        self._rows: dict[str, np.ndarray] = {}
        if hasattr(self, "class_names"):  # fixed by the class; otherwise the subclass finds them and calls this
            self.restrict_labels()

    # What a data set says of itself ------------------------------------------------------------------------------

    @abstractmethod
    def load_table(self) -> Table:
        """Read the metadata: all rows of the source in its order, official splits ("" where there are none)."""

    def resolve_labels(self, table: Table) -> Table:
        """Turn what `load_table` gave as labels into what training and evaluation use, splits known. Default: as is."""
        return table

    def exclusions(self, table: Table) -> dict[str, np.ndarray]:
        """Rows that are not used, bool (N,), by their reason in words, in order: other views, say. Default: none."""
        return {}

    @property
    def label_policy(self) -> str | None:
        """How labels were read where there is a choice, for result rows."""
        return None

    def read_images(self, rows: Sequence[int]) -> Sequence[np.ndarray]:
        """Read images by table row, uint8 (H, W, C); from files under `root` by default."""
        paths = self.raw_table.paths
        return [self.read_file(self.root / paths[row]) for row in rows]

    def read_file(self, path: Path) -> np.ndarray:
        """Decode one image file with this data set's number of channels, through the cache."""
        mode: Literal["grey", "rgb"] = "grey" if self.channels == 1 else "rgb"
        key = f"{mode}:{self.window}:{path}"
        return self.cache.get(key, lambda _: io.read_image(path, mode=mode, window=self.window))

    @property
    def release(self) -> str:
        """Name of the release that images and patients belong to; variants of one release share it."""
        return self.name

    @property
    def unnamed_releases(self) -> frozenset[str]:
        """Releases here whose name is the user's own choice: another set may bear it, too."""
        return frozenset()

    def image_names(self, rows: np.ndarray) -> ImageNames:
        """What each of `rows` (int64) is called: data set, image and group; a run records its training images so."""
        table = self.raw_table
        return ImageNames(
            np.full(len(rows), self.release, dtype=object),
            np.asarray(table.paths[rows], dtype=object),
            np.asarray(table.groups[rows], dtype=object),
        )

    content_hashed: ClassVar[bool] = True
    """Whether an image's content tells more than its name; rendered images are what their names say."""

    def image_files(self, rows: np.ndarray) -> list[tuple[Path, str] | None]:
        """File of each of `rows` (int64), and how it is decoded in words; None for images that are no files."""
        decoding = f"{self.channels} channels, window {self.window}"
        return [(self.root / path, decoding) for path in self.raw_table.paths[rows]]

    def missing_files(self, table: Table, rows: np.ndarray) -> np.ndarray:
        """Those of `rows` (int64) whose image is not in its directory's listing."""
        return np.asarray(rows[check_files(self.root, table.paths[rows])])

    # The table and its splits ------------------------------------------------------------------------------------

    @property
    def num_classes(self) -> int:
        """Number of model outputs: classes, labels, or 1 for a binary task."""
        return len(self.class_names)

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
        self._rows = rows

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
        reasons = {**self.exclusions(table), **self._dropped_classes(table), "no label": unlabelled(table.labels)}
        return reasons | self.dials.exclusions(table)

    def absent_images(self, table: Table, rows: np.ndarray) -> np.ndarray:
        """Those of `rows` without an image, in their files or in the prepared folder."""
        if self.prepared is None:
            return self.missing_files(table, rows)
        return np.asarray(rows[self.prepared_rows[rows] < 0])

    def _guard_groups(self, table: Table, usable: np.ndarray) -> None:
        """Stop where a patient is in several splits, or note it in `group_leak`."""
        if self.outputs is not None:  # nothing is trained on this set, so nothing can leak within it
            self.group_leak = ""
            return
        if self.leaks == "stop":
            strict = usable & ~self.leaky_rows(table)
            where = f"splits of {self.name} ({self.split_policy})"
            splits.check_disjoint(table.groups[strict], table.split[strict], where)
        crossing = splits.crossing_groups(table.groups[usable], table.split[usable])
        self.group_leak = f"LEAK: {len(crossing)} patients in several splits" if crossing else ""
        if crossing:
            warnings.warn(f"{self.name}: {self.group_leak}, such as {crossing[0]}; result rows say so", stacklevel=2)

    def leaky_rows(self, table: Table) -> np.ndarray:
        """Rows, bool (N,), whose chosen split is known to put a patient's images on both sides. Default: none."""
        return np.zeros(len(table), dtype=bool)

    def draw(self, table: Table, train: np.ndarray) -> np.ndarray:
        """Positions within `train` of the images to train on: shots, num_images, fraction or all."""
        labels, groups = table.labels[train], table.groups[train]
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
                groups=groups,
            )
        return np.arange(len(train))

    def rows(self, split: str) -> np.ndarray:
        """Table rows in use for a split after `setup`, int64: draws and exclusions applied."""
        if not self._rows:
            self.setup()
        return self._rows[split]

    # The names in use --------------------------------------------------------------------------------------------

    def restrict_labels(self) -> None:
        """Apply `labels` or `outputs` to the names; a subclass that finds its `class_names` late calls it itself."""
        self.space = choose_labels(
            self.class_names,
            self.task,
            dataset=self.name,
            labels=self.labels,
            outputs=self.outputs,
            classes=self.dials.classes(self.class_names, self.task),
        )
        self.class_names, self.task = self.space.names, self.space.task

    @property
    def own_class_names(self) -> list[str]:
        """Names that the set annotates, restricted by `labels`, whatever `outputs` they are arranged as."""
        return self.space.annotated
