"""A data set without files: hidden features rendered as images, with a dial for how alike source and target are."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from datamodules.base import BaseDataModule
from datamodules.errors import DataError
from datamodules.generator import ImageGenerator
from datamodules.label_space import Task
from datamodules.table import Table, split_column, strings

TEST_START = 1 << 40  # test images are counted from here, so they never depend on the number of training images
IN_MEMORY = 1 << 29  # bytes of rendered images kept; a larger set is rendered as it is read


class Synthetic(BaseDataModule):
    """Rendered images of a correlated hidden-manifold world (after Gerace et al., arXiv 2106.05418); no files.

    Source: `datamodules.generator`, computed at once from the arguments; any size; no licence applies. Classes:
    "class 0", "class 1", ... (multi-class) or "feature 0", ... (binary, multi-label). Split: train and test images are
    different draws from one distribution; one group an image.

    Args:
        classes: Classes, or labels; 1 for binary.
        task: multiclass, binary or multilabel.
        world: Seed of the world: its generative directions and label rules.
        role: The source task of the world, or its target task.
        similarity: Share of the target's generative directions that are the source's, 0–1.
        shared_features: Share of the target's features that occur, and occur together, as in the source, 0–1.
        shared_directions: As `similarity`, and wins over it; null = `similarity`.
        shared_rule: Share of the target's classes that are the source's classes, 0–1: the same codes of features. All
            three at 1: the target is the source's task; all at 0: it shares no more than the look.
        look: natural (colour) or radiograph (grey chests).
        num_train: Training images before the validation split.
        num_test: Test images.
        image_size: Side of the rendered images, pixels.
        transform: Transform policy by name.
        **kwargs: Arguments shared by all data sets.
    """

    name = "synthetic"

    def __init__(
        self,
        *,
        classes: int = 10,
        task: Task = "multiclass",
        world: int = 0,
        role: Literal["source", "target"] = "source",
        similarity: float = 1.0,
        shared_features: float = 1.0,
        shared_directions: float | None = None,
        shared_rule: float = 0.0,
        look: Literal["natural", "radiograph"] = "natural",
        num_train: int = 5000,
        num_test: int = 1000,
        image_size: int = 32,
        transform: str = "resize_center",
        **kwargs: Any,
    ) -> None:
        self.generator = ImageGenerator(
            num_classes=classes,
            task=task,
            seed=world,
            role=role,
            similarity=similarity,
            shared_features=shared_features,
            shared_directions=shared_directions,
            shared_rule=shared_rule,
            look=look,
            image_size=image_size,
        )
        if min(num_train, num_test) < 1:
            raise DataError(f"num_train {num_train}, num_test {num_test}", valid="1 or more each")
        self.task = task
        self.channels = 3 if look == "natural" else 1  # type: ignore[misc]
        word = "class" if task == "multiclass" else "feature"
        self.class_names = [f"{word} {number}" for number in range(classes)]
        self._numbers = np.concatenate([np.arange(num_train), TEST_START + np.arange(num_test)])
        self._num_train = num_train
        super().__init__(image_size=image_size, transform=transform, **kwargs)

    content_hashed = False

    def load_table(self) -> Table:
        """Labels of all images, not rendered."""
        names = strings([f"image {number}" for number in self._numbers])
        split = np.where(self._numbers < TEST_START, "train", "test")
        return Table(names, self.generator.labels(self._numbers), names, split_column(split))

    def image_files(self, rows: np.ndarray) -> list[tuple[Path, str] | None]:
        """None: the images are no files of their own."""
        return [None] * len(rows)

    def missing_files(self, table: Table, rows: np.ndarray) -> np.ndarray:
        """None: there are no files."""
        return rows[:0]

    def read_images(self, rows: Sequence[int], at_least: int | None = None) -> Sequence[np.ndarray]:
        """Images by row, uint8 (size, size, C)."""
        if len(self._numbers) * self.image_size**2 * self.channels > IN_MEMORY:
            return list(self.generator.images(self._numbers[list(rows)]))
        rendered = _rendered(self.generator, self._num_train, len(self._numbers) - self._num_train)
        return [rendered[row] for row in rows]


@lru_cache(maxsize=4)
def _rendered(generator: ImageGenerator, num_train: int, num_test: int) -> np.ndarray:
    """All images of a set; the same set is rendered once, however many runs of a study use it."""
    return generator.images(np.concatenate([np.arange(num_train), TEST_START + np.arange(num_test)]))
