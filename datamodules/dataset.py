"""Reads the images of one batch, transforms them and stacks them as uint8."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from datamodules.samplers import Key

ReadImages = Callable[[Sequence[int]], Sequence[np.ndarray]]
"""Rows of the table → their images, each uint8 (H, W, C)."""

Augment = Callable[[np.ndarray, int], np.ndarray]
"""(image uint8 (H, W, C), seed) → uint8 (C, size, size)."""


class BatchDataset(Dataset[Any]):
    """Maps the keys of a batch to the batch.

    The loader fetches whole batches, so images are stacked once, and generators can render a batch at a time.

    Args:
        read_images: Reads images by table row.
        transform: Augments one image under a seed.
        labels: The table's labels, int64 (N,) or float32 (N, L).
    """

    def __init__(self, read_images: ReadImages, transform: Augment, labels: np.ndarray) -> None:
        self.read_images, self.transform, self.labels = read_images, transform, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        """One sample as a batch without its first dimension."""
        return {name: value[0] for name, value in self.__getitems__([key]).items()}

    def __getitems__(self, keys: Sequence[Key]) -> dict[str, Any]:
        """The batch of `keys`: image uint8 (B, C, H, W), label, index int64 (B,).

        Only the image is a tensor: each one is handed over by a file descriptor that a worker is asked for, which
        takes a millisecond; arrays travel in the message itself (see `as_tensors`).
        """
        rows = [row for row, _, _ in keys]
        images = self.read_images(rows)
        views = np.stack([self.transform(image, seed) for image, (_, seed, _) in zip(images, keys, strict=True)])
        return {
            "image": torch.from_numpy(views),
            "label": self.labels[rows],
            "index": np.array([index for _, _, index in keys], dtype=np.int64),
        }


def keep_batch(batch: dict[str, Any]) -> dict[str, Any]:
    """Collate function: `BatchDataset` has stacked the batch already."""
    return batch


def as_tensors(batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """A batch of `BatchDataset` as the model gets it."""
    return {name: torch.as_tensor(value) for name, value in batch.items()}
