"""The base of every data set: table → splits → few-shot draw → stream of uint8 batches."""

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pytorch_lightning import LightningDataModule
from torch.utils.data import DataLoader

from datamodules import few_shot, io, splits
from datamodules.assignment import FoldBy, SplitSettings, assign_splits
from datamodules.dataset import BatchDataset, keep_batch
from datamodules.errors import DataError, closest
from datamodules.files import check_files
from datamodules.samplers import EvaluationSampler, StreamSampler, balance_weights, divide_batch
from datamodules.table import SPLITS, Table
from datamodules.transforms import create_transform

Task = Literal["multiclass", "binary", "multilabel"]
EVALUATION_BATCH = 256  # images of an evaluation batch at least: without gradients more of them fit than in training


@lru_cache(maxsize=1)
def shared_cache(max_bytes: int) -> io.ImageCache:
    """The process's image cache: the runs of a study decode an image once."""
    return io.ImageCache(max_bytes)


class StreamLoader(DataLoader[Any]):
    """A loader whose position is derived from the trainer's progress, so there is nothing to save for a resume."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the sampler starts where the trainer's count of batches says."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore; see `state_dict`."""


class BaseDataModule(LightningDataModule, ABC):
    """What all data sets share. A subclass states facts and implements `load_table` (and `read_images` if not files).

    Args:
        root: Folder of the data set; default `$FARSHOT_DATA/<name>`.
        batch_size: Global batch: devices and accumulation divide it.
        max_batch_per_device: Largest batch that fits on a device; a larger share is accumulated.
        num_workers: Loader processes. The stream is the same for any number.
        image_size: Side of the square images that the model sees, pixels.
        transform: Policy by name: bit, inception_crop, resize_center, chest_xray or chest_xray_cherti2022.
        shots: Training images per class (multi-label: positives per label), a number or "full".
        num_images: Train on this many images at natural prevalence.
        fraction: Train on this share of the training images, 0–1.
        few_shot_seed: Seed of the draw for shots, num_images and fraction.
        one_per_group: Few-shot draws take at most one image a patient.
        val_fraction: Share of the training groups held out for validation where no official validation exists.
        test_fraction: Share of the groups in the test set where no official test set exists (fixed hash).
        split_seed: Seed of the validation split and the folds.
        folds: Cross-validation: fold number `fold` of `folds` is the test set. An official test set stays untouched.
        fold: Which fold is the test set, 0 … folds − 1.
        fold_by: What a fold holds together: group (patients), site (each site a fold) or date (chronological).
        balance: Draw training images so that every class has the same share (weights from the table).
        labels: Restrict a multi-label set to these labels, in this order.
        seed: Seed of the stream; default the run's seed.
        cache_gb: Keep decoded images in memory up to this many GB per process (0: none).
    """

    name: str
    """Data set's name: its default folder, the key of its hashed splits, its name in results."""
    channels: ClassVar[Literal[1, 3]] = 3
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
        one_per_group: bool = True,
        val_fraction: float = 0.1,
        test_fraction: float = 0.15,
        split_seed: int = 0,
        folds: int | None = None,
        fold: int = 0,
        fold_by: FoldBy = "group",
        balance: bool = False,
        labels: list[str] | None = None,
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
        self.one_per_group = one_per_group
        self.val_fraction, self.test_fraction, self.split_seed = val_fraction, test_fraction, split_seed
        self.folds, self.fold, self.fold_by = folds, fold, fold_by
        self.balance, self.labels, self.seed = balance, labels, seed
        self.cache = shared_cache(int(cache_gb * 1e9))
        self._check_arguments()
        self._rows: dict[str, np.ndarray] = {}
        if hasattr(self, "class_names"):  # fixed by the class; otherwise the subclass finds them and calls this
            self.restrict_labels()

    # What a data set says of itself ------------------------------------------------------------------------------

    @abstractmethod
    def load_table(self) -> Table:
        """Read the metadata: all rows of the source in its order, official splits ("" where there are none)."""

    def eligible(self, table: Table) -> np.ndarray:
        """Rows that may be used at all, bool (N,): for example the chosen views. Default: all."""
        return np.ones(len(table), dtype=bool)

    def read_images(self, rows: Sequence[int]) -> Sequence[np.ndarray]:
        """Read images by table row, uint8 (H, W, C); from files under `root` by default."""
        paths = self.read_table().paths
        return [self.read_file(self.root / paths[row]) for row in rows]

    def read_file(self, path: Path) -> np.ndarray:
        """Decode one image file with this data set's number of channels, through the cache."""
        mode: Literal["grey", "rgb"] = "grey" if self.channels == 1 else "rgb"
        return self.cache.get(f"{mode}:{path}", lambda _: io.read_image(path, mode=mode))

    def missing_files(self, table: Table) -> list[int]:
        """Rows whose image is not in its directory's listing."""
        return check_files(self.root, table.paths)

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
    def _table(self) -> Table:
        table = self.load_table()
        if self._label_columns is not None:
            table = table.with_labels(self._label_columns)
        wanted = SplitSettings(
            val_fraction=self.val_fraction,
            test_fraction=self.test_fraction,
            seed=self.split_seed,
            folds=self.folds,
            fold=self.fold,
            fold_by=self.fold_by,
        )
        table, self._split_policy = assign_splits(table, self.name, wanted)
        return table

    # Lightning's hooks -------------------------------------------------------------------------------------------

    def setup(self, stage: str | None = None) -> None:
        """Check the table against the files, guard the splits, and draw the training set."""
        if self.trainer is not None and stage == "fit":
            self._share_batch()
        if self._rows:
            return
        table = self.read_table()
        splits.check_disjoint(table.groups, table.split)
        usable = self.eligible(table) & labelled(table.labels)
        rows = {name: part[usable[part]] for name in SPLITS[1:] for part in [table.rows(name)]}
        if not len(rows["train"]):
            raise DataError(f"{self.name} has no training images", where=str(table.source or self.root))
        missing = self.missing_files(table)
        if missing:
            raise DataError(
                f"{len(missing)} images of {self.name} are missing, the first is {table.paths[missing[0]]}",
                where=f"{table.where(missing[0])}; looked in {self.root}",
                hint="complete the download, or remove these rows from the table",
            )
        rows["train"] = rows["train"][self._draw(table, rows["train"])]
        self._rows = rows

    def _draw(self, table: Table, train: np.ndarray) -> np.ndarray:
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

    def _share_batch(self) -> None:
        """Divide the global batch over devices and accumulation steps, and tell the trainer."""
        trainer = self.trainer
        assert trainer is not None
        _, accumulate = divide_batch(self.batch_size, trainer.world_size, self.max_batch_per_device)
        if trainer.accumulate_grad_batches not in (1, accumulate):
            raise DataError(
                f"trainer.accumulate_grad_batches {trainer.accumulate_grad_batches} contradicts the global batch_size",
                where="trainer.accumulate_grad_batches",
                hint="leave it at 1 and set data.max_batch_per_device",
            )
        trainer.accumulate_grad_batches = accumulate

    def rows(self, split: str) -> np.ndarray:
        """Table rows in use for a split after `setup`, int64: draws and exclusions applied."""
        if not self._rows:
            self.setup()
        return self._rows[split]

    @property
    def batches_per_epoch(self) -> int:
        """Global batches, that is optimizer steps, of one epoch of the data."""
        return max(1, len(self.rows("train")) // self.batch_size)

    def train_dataloader(self) -> StreamLoader:
        """The stream: uint8 batches in an order that depends on seed and position alone."""
        trainer = self.trainer
        world, rank = (trainer.world_size, trainer.global_rank) if trainer is not None else (1, 0)
        _, accumulate = divide_batch(self.batch_size, world, self.max_batch_per_device)
        rows = self.rows("train")
        sampler = StreamSampler(
            rows,
            self.batch_size,
            self.stream_seed,
            rank=rank,
            world=world,
            accumulate=accumulate,
            total_steps=trainer.max_steps if trainer is not None and trainer.max_steps > 0 else None,
            weights=balance_weights(self.read_table().labels[rows]) if self.balance else None,
            position=(lambda: trainer.fit_loop.epoch_loop.batch_progress.total.ready) if trainer is not None else None,
        )
        return self._loader(sampler, train=True)

    def val_dataloader(self) -> StreamLoader:
        """Validation images, every one once."""
        return self.evaluation_dataloader(self.rows("validation"))

    def test_dataloader(self) -> StreamLoader:
        """Test images, every one once."""
        return self.evaluation_dataloader(self.rows("test"))

    def evaluation_dataloader(self, rows: np.ndarray) -> StreamLoader:
        """Any rows of the table with the evaluation transform, every one once over all ranks."""
        world, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer is not None else (1, 0)
        size = self.max_batch_per_device or max(self.batch_size // world, EVALUATION_BATCH)
        return self._loader(EvaluationSampler(rows, size, rank=rank, world=world), train=False)

    def _loader(self, sampler: StreamSampler | EvaluationSampler, *, train: bool) -> StreamLoader:
        dataset = BatchDataset(
            self.read_images,
            create_transform(self.transform, self.image_size, train=train),
            self.read_table().labels,
        )
        return StreamLoader(
            dataset,
            batch_sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=keep_batch,  # type: ignore[arg-type]
            pin_memory=torch.cuda.is_available(),
            persistent_workers=train and self.num_workers > 0,
        )

    # Arguments ---------------------------------------------------------------------------------------------------

    @property
    def stream_seed(self) -> int:
        """Seed of the stream: `seed`, else the run's (`seed_everything`), else 0."""
        return self.seed if self.seed is not None else int(os.environ.get("PL_GLOBAL_SEED", "0"))

    @cached_property
    def _label_columns(self) -> list[int] | None:
        """Columns of the full label matrix that `labels` selects; also restricts `class_names`."""
        if self.labels is None:
            return None
        if self.task != "multilabel":
            raise DataError(
                f"labels: restricts multi-label sets; {self.name} is {self.task}",
                where="data.init_args.labels",
            )
        full = list(self.class_names)
        for label in self.labels:
            if label not in full:
                near = closest(label, full)
                raise DataError(
                    f"{self.name} has no label {label!r}" + (f"; did you mean {near!r}?" if near else ""),
                    where="data.init_args.labels",
                    valid=full,
                )
        return [full.index(label) for label in self.labels]

    def restrict_labels(self) -> None:
        """Apply `labels` to the names; a multi-label subclass calls it once its `class_names` are known."""
        columns = self._label_columns
        if columns is not None:
            self.class_names = [self.class_names[column] for column in columns]

    def _check_arguments(self) -> None:
        draws = {"shots": self.shots, "num_images": self.num_images, "fraction": self.fraction}
        given = [name for name, value in draws.items() if value is not None]
        if len(given) > 1:
            raise DataError(
                f"{' and '.join(given)} exclude each other", where="data.init_args", hint="give one of them"
            )
        checks: list[tuple[str, Any, bool, str]] = [
            ("batch_size", self.batch_size, self.batch_size >= 1, "1 or more"),
            ("num_workers", self.num_workers, self.num_workers >= 0, "0 or more"),
            ("image_size", self.image_size, self.image_size >= 8, "8 pixels or more"),
            (
                "shots",
                self.shots,
                self.shots in (None, "full") or int(self.shots) >= 1,
                '1 or more, or "full"',
            ),
            ("val_fraction", self.val_fraction, 0 <= self.val_fraction < 1, "0 ≤ val_fraction < 1"),
            ("test_fraction", self.test_fraction, 0 < self.test_fraction < 1, "0 < test_fraction < 1"),
            ("folds", self.folds, self.folds is None or self.folds >= 2, "2 or more"),
            ("fold", self.fold, 0 <= self.fold < (self.folds or 1), f"0 to {(self.folds or 1) - 1}"),
        ]
        for key, value, fine, valid in checks:
            if not fine:
                raise DataError(f"{key}: {value} is out of range", where=f"data.init_args.{key}", valid=valid)
        create_transform(self.transform, self.image_size, train=False)


def labelled(labels: np.ndarray) -> np.ndarray:
    """Rows with a label, bool (N,): not −1, or at least one known cell."""
    return labels >= 0 if labels.ndim == 1 else ~np.isnan(labels).all(axis=1)
