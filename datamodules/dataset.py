"""Reads the images of one batch, transforms them, once or as two views, and stacks them as uint8."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from datamodules.samplers import Key, mix

ReadImages = Callable[[Sequence[int]], Sequence[np.ndarray]]
"""Rows of the table → their images, each uint8 (H, W, C)."""

Augment = Callable[[np.ndarray, int], np.ndarray]
"""(image uint8 (H, W, C), seed) → uint8 (C, size, size)."""
Texts = Callable[[Sequence[int], Sequence[int]], list[str] | None]
"""(rows of the table, seeds) → their captions; None where a set has none."""
SECOND_VIEW = 2  # mixed into a sample's seed, so that its two views are independent draws


class BatchDataset(Dataset[Any]):
    """Maps the keys of a batch to the batch.

    The loader fetches whole batches, so images are stacked once, and generators can render a batch at a time.

    Args:
        read_images: Reads images by table row.
        transform: Augments one image under a seed.
        labels: The table's labels, int64 (N,) or float32 (N, L).
        texts: Captions by table row, for image–text training.
        two_views: Also give a second view of every image, augmented under another seed.
    """

    def __init__(
        self,
        read_images: ReadImages,
        transform: Augment,
        labels: np.ndarray,
        texts: Texts | None = None,
        two_views: bool = False,
    ) -> None:
        self.read_images, self.transform, self.labels = read_images, transform, labels
        self.texts, self.two_views = texts, two_views

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        """One sample as a batch without its first dimension."""
        return {name: value[0] for name, value in self.__getitems__([key]).items()}

    def __getitems__(self, keys: Sequence[Key]) -> dict[str, Any]:
        """The batch of `keys`: image uint8 (B, C, H, W), label, index int64 (B,), and view2 or text where asked.

        Only the image is a tensor: each one is handed over by a file descriptor that a worker is asked for, which
        takes a millisecond; arrays travel in the message itself (see `as_tensors`).
        """
        rows = [row for row, _, _ in keys]
        seeds = [seed for _, seed, _ in keys]
        images = self.read_images(rows)
        batch = {
            "image": self._views(images, seeds),
            "label": self.labels[rows],
            "index": np.array([index for _, _, index in keys], dtype=np.int64),
        }
        if self.two_views:
            batch["view2"] = self._views(images, mix(np.array(seeds, dtype=np.uint64), SECOND_VIEW).tolist())
        texts = self.texts(rows, seeds) if self.texts is not None else None
        return batch if texts is None else batch | {"text": texts}

    def _views(self, images: Sequence[np.ndarray], seeds: Sequence[int]) -> torch.Tensor:
        return torch.from_numpy(
            np.stack([self.transform(image, seed) for image, seed in zip(images, seeds, strict=True)])
        )


def keep_batch(batch: dict[str, Any]) -> dict[str, Any]:
    """Collate function: `BatchDataset` has stacked the batch already."""
    return batch


def as_tensors(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch of `BatchDataset` as the model gets it: tensors, and texts as they are."""
    return {name: value if name == "text" else torch.as_tensor(value) for name, value in batch.items()}
