"""From the rows of a split to a stream of batches, in any number of processes and on any number of devices."""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pytorch_lightning import LightningDataModule
from torch.utils.data import DataLoader

from datamodules.dataset import BatchDataset, as_tensors, keep_batch
from datamodules.errors import DataError
from datamodules.prepared import PreparedImages
from datamodules.samplers import EvaluationSampler, StreamSampler, balance_weights, divide_batch
from datamodules.table import Table
from datamodules.transforms import create_transform

EVALUATION_BATCH = 256  # images of an evaluation batch at least: without gradients more of them fit than in training


class StreamLoader(DataLoader[Any]):
    """A loader whose position is derived from the trainer's progress, so there is nothing to save for a resume."""

    def __iter__(self) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        """Batches of tensors."""
        return map(as_tensors, super().__iter__())

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the sampler starts where the trainer's count of batches says."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore; see `state_dict`."""


class StreamingDataModule(LightningDataModule, ABC):
    """The loaders of a data set that knows its table, the rows of each split, and how to read images by row."""

    batch_size: int
    max_batch_per_device: int | None
    num_workers: int
    image_size: int
    transform: str
    balance: bool
    prepared: str | None
    channels: ClassVar[Literal[1, 3]]
    window: tuple[float, float] | None
    seed: int | None
    augmented_views: Literal[2] | None

    @abstractmethod
    def read_table(self) -> Table:
        """Metadata of every row."""

    @abstractmethod
    def rows(self, split: str) -> np.ndarray:
        """Table rows in use for a split, int64."""

    @property
    @abstractmethod
    def release(self) -> str:
        """Name of the release that the images belong to."""

    @abstractmethod
    def read_images(self, rows: Sequence[int], at_least: int | None = None) -> Sequence[np.ndarray]:
        """Read images by table row from where the set keeps them, uint8 (H, W, C); `at_least` as in `images`."""

    @cached_property
    def prepared_images(self) -> PreparedImages:
        """The prepared folder, opened and checked against this set."""
        images = PreparedImages(str(self.prepared))
        images.check(self.release, self.channels, self.window)
        return images

    @cached_property
    def prepared_rows(self) -> np.ndarray:
        """Place of every table row in the prepared folder, int64 (N,), −1 where it is not there."""
        return self.prepared_images.find(self.read_table().paths)

    def images(self, rows: Sequence[int], at_least: int | None = None) -> Sequence[np.ndarray]:
        """Images by table row, from the prepared folder where there is one, uint8 (H, W, C).

        `at_least`: pixels that both sides keep where an image may be decoded smaller.
        """
        if self.prepared is None:
            return self.read_images(rows, at_least)
        return self.prepared_images.read(self.prepared_rows[list(rows)], at_least)

    def texts(self, rows: Sequence[int], seeds: Sequence[int]) -> list[str] | None:
        """Captions by table row, where one is drawn of several under the sample's seed; None: the set has none."""
        return None

    def confirm_prepared(self) -> None:
        """Raise a DataError where the prepared folder is evidently another set's; asked before images are read."""

    def sampling_weights(self, rows: np.ndarray) -> np.ndarray | None:
        """Weights (N,) by which training draws its rows; None = each once an epoch."""
        return balance_weights(self.read_table().labels[rows]) if self.balance else None

    @property
    def stream_seed(self) -> int:
        """Seed of the stream: `seed`, else the run's (`seed_everything`), else 0."""
        return self.seed if self.seed is not None else int(os.environ.get("PL_GLOBAL_SEED", "0"))

    def share_batch(self) -> None:
        """Divide the global batch over devices and accumulation steps, and tell the trainer."""
        trainer = self.trainer
        if trainer is None:
            return
        _, accumulate = divide_batch(self.batch_size, trainer.world_size, self.max_batch_per_device)
        if trainer.accumulate_grad_batches not in (1, accumulate):
            raise DataError(
                f"trainer.accumulate_grad_batches {trainer.accumulate_grad_batches} contradicts the global batch_size",
                where="trainer.accumulate_grad_batches",
                hint="leave it at 1 and set data.max_batch_per_device",
            )
        trainer.accumulate_grad_batches = accumulate

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
            weights=self.sampling_weights(rows),
            position=(lambda: trainer.fit_loop.epoch_loop.batch_progress.total.ready) if trainer is not None else None,
        )
        return self._loader(sampler, augment=True, persistent=True)

    def val_dataloader(self) -> StreamLoader:
        """Validation images, every one once; where training sees two views of an image, the same two every time."""
        rows = self.rows("validation")
        return (
            self._loader(self._evaluation_sampler(rows), augment=True)
            if self.augmented_views
            else self.evaluation_dataloader(rows)
        )

    def test_dataloader(self) -> StreamLoader:
        """Test images, every one once."""
        return self.evaluation_dataloader(self.rows("test"))

    def evaluation_dataloader(self, rows: np.ndarray) -> StreamLoader:
        """Any rows of the table with the evaluation transform, every one once over all ranks."""
        return self._loader(self._evaluation_sampler(rows), augment=False)

    def _evaluation_sampler(self, rows: np.ndarray) -> EvaluationSampler:
        world, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer is not None else (1, 0)
        size = self.max_batch_per_device or max(self.batch_size // world, EVALUATION_BATCH)
        return EvaluationSampler(rows, size, rank=rank, world=world)

    def _loader(
        self, sampler: StreamSampler | EvaluationSampler, *, augment: bool, persistent: bool = False
    ) -> StreamLoader:
        self.confirm_prepared()
        transform = create_transform(self.transform, self.image_size, train=augment)
        two_views = augment and self.augmented_views == 2
        if two_views and not transform.is_random:
            raise DataError(
                f"transform {self.transform!r} changes nothing at random, so both views of an image would be equal",
                where="data.init_args.transform",
                hint="with augmented_views: 2 take one that augments, such as simclr",
            )
        images, labels = partial(self.images, at_least=transform.whole), self.read_table().labels
        dataset = BatchDataset(images, transform, labels, self.texts, two_views)
        return StreamLoader(
            dataset,
            batch_sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=keep_batch,  # type: ignore[arg-type]
            pin_memory=torch.cuda.is_available(),
            persistent_workers=persistent and self.num_workers > 0,
        )
