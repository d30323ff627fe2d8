"""CIFAR-10 and CIFAR-100 from their official files, read and verified by torchvision."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar
from urllib.error import URLError

import numpy as np

from datamodules.base import BaseDataModule
from datamodules.errors import DataError
from datamodules.table import Table, split_column, strings


class _CIFAR(BaseDataModule):
    """Reads both parts of a CIFAR release into one uint8 array; the table's path is the part and the position in it."""

    reader: ClassVar[str]
    folder: ClassVar[str]
    archive: ClassVar[str]
    task = "multiclass"

    def __init__(
        self,
        *,
        image_size: int = 32,
        transform: str = "bit",
        download: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(image_size=image_size, transform=transform, **kwargs)
        self.download = download

    def prepare_data(self) -> None:
        """Download the archive and check its md5, where `download` says so."""
        if self.download:
            self._read_part(train=True, download=True)

    @cached_property
    def _parts(self) -> tuple[Any, Any]:
        return self._read_part(train=True), self._read_part(train=False)

    @cached_property
    def _images(self) -> np.ndarray:
        return np.concatenate([part.data for part in self._parts])

    def _read_part(self, *, train: bool, download: bool = False) -> Any:
        import torchvision.datasets

        try:
            return getattr(torchvision.datasets, self.reader)(self.root, train=train, download=download)
        except (URLError, OSError) as error:
            if not download:
                raise DataError(f"cannot read {self.name}: {error}", where=str(self.root)) from error
            raise DataError(
                f"cannot download {self.name}: {error}",
                where=str(self.root),
                hint=f"where there is a network, fetch {self.archive} and unpack it as {self.root / self.folder}",
            ) from error
        except RuntimeError as error:
            state = "its files fail their md5 checksums" if (self.root / self.folder).is_dir() else "it is not there"
            raise DataError(
                f"no usable {self.name}: {state}",
                where=str(self.root / self.folder),
                hint=f"set data.init_args.download: true, or unpack {self.archive} in {self.root}",
            ) from error

    def load_table(self) -> Table:
        """Official train (50,000) and test (10,000) parts; validation is carved from train."""
        train, test = self._parts
        paths = [f"train/{row:05d}" for row in range(len(train.targets))]
        paths += [f"test/{row:05d}" for row in range(len(test.targets))]
        images = strings(paths)
        return Table(
            paths=images,
            labels=np.asarray([*train.targets, *test.targets], dtype=np.int64),
            groups=images,
            split=split_column(["train"] * len(train.targets) + ["test"] * len(test.targets)),
        )

    def image_files(self, rows: np.ndarray) -> list[tuple[Path, str] | None]:
        """None: the images are no files of their own."""
        return [None] * len(rows)

    def missing_files(self, table: Table, rows: np.ndarray) -> np.ndarray:
        """None: the checksums cover every image."""
        return rows[:0]

    def read_images(self, rows: Sequence[int], at_least: int | None = None) -> Sequence[np.ndarray]:
        """Images by row, uint8 (32, 32, 3), from memory."""
        return [self._images[row] for row in rows]


class CIFAR10(_CIFAR):
    """CIFAR-10: 60,000 colour photos of 10 things, 32×32.

    Source: https://www.cs.toronto.edu/~kriz/cifar.html (Krizhevsky 2009, Learning multiple layers of features from tiny
    images). Layout: `root/cifar-10-batches-py/`, 170 MB archive. Split: official, 50,000 train and 10,000 test, one
    group an image. Licence: none stated; research use.

    Args:
        image_size: Side of the images that the model sees, pixels.
        transform: Transform policy by name.
        download: Fetch the archive where it is not there.
        **kwargs: Arguments shared by all data sets.
    """

    name = "cifar10"
    reader = "CIFAR10"
    folder = "cifar-10-batches-py"
    archive = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
    class_names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]  # noqa: RUF012


class CIFAR100(_CIFAR):
    """CIFAR-100: 60,000 colour photos of 100 things (fine labels), 32×32.

    Source: https://www.cs.toronto.edu/~kriz/cifar.html (Krizhevsky 2009). Layout: `root/cifar-100-python/`, 170 MB
    archive. Split: official, 50,000 train and 10,000 test, one group an image. Licence: none stated; research use.

    Args:
        image_size: Side of the images that the model sees, pixels.
        transform: Transform policy by name.
        download: Fetch the archive where it is not there.
        **kwargs: Arguments shared by all data sets.
    """

    name = "cifar100"
    reader = "CIFAR100"
    folder = "cifar-100-python"
    archive = "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"
    class_names = (
        "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can "
        "castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin "
        "elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster "
        "man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck "
        "pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk "
        "skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger "
        "tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm"
    ).split()
