"""Describable Textures Dataset: 47 textures named by adjectives."""

from collections.abc import Sequence
from typing import Any

from datamodules.assignment import SplitSettings
from datamodules.errors import DataError
from datamodules.natural.torchvision_set import TorchvisionSet
from datamodules.table import Table

PARTS = {"train": "train", "val": "validation", "test": "test"}
PARTITIONS = range(1, 11)
LINE = r"(?P<image>(?P<class_name>[a-z-]+)/[^/]+)\.jpg"


class DTD(TorchvisionSet):
    """Describable Textures (DTD): 5,640 photos of 47 textures such as braided or polka-dotted, 120 each.

    Source: https://www.robots.ox.ac.uk/~vgg/data/dtd/, release 1.0.1 (Cimpoi, Maji, Kokkinos, Mohamed & Vedaldi 2014,
    Describing textures in the wild, CVPR, arXiv 1311.3618). 0.6 GB of JPEG, sides of 300 to 640 pixels. Layout:
    `images/<class>/*.jpg` and `labels/{train,val,test}{1..10}.txt` in `root/dtd/dtd/`, as torchvision unpacks them, or
    in `root/dtd/` or `root`.
    Classes alphabetical; the key attribute is the label, an image's further attributes are not used. Split: official,
    ten partitions of 1,880 train, 1,880 validation and 1,880 test (40 each a class); one partition is one split, so
    that a model trained on one has seen test images of another. One group an image. Licence: for research; the photos
    stay their owners'.

    Args:
        partition: Which official partition, 1 to 10; the one in general use is 1.
        **kwargs: Arguments of sets that torchvision downloads.
    """

    name = "dtd"
    reader = "DTD"
    homes = ("dtd/dtd", "dtd", "")
    archives = ("https://www.robots.ox.ac.uk/~vgg/data/dtd/download/dtd-r1.0.1.tar.gz",)
    class_names = (
        "banded blotchy braided bubbly bumpy chequered cobwebbed cracked crosshatched crystalline dotted fibrous "
        "flecked freckled frilly gauzy grid grooved honeycombed interlaced knitted lacelike lined marbled matted "
        "meshed paisley perforated pitted pleated polka-dotted porous potholed scaly smeared spiralled sprinkled "
        "stained stratified striped studded swirly veined waffled woven wrinkled zigzagged"
    ).split()

    def __init__(self, *, partition: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if partition not in PARTITIONS:
            raise DataError(
                f"DTD has no partition {partition}", where="data.init_args.partition", valid="a whole number, 1 to 10"
            )
        self.partition = partition

    @property
    def _lists(self) -> dict[str, str]:
        return {f"labels/{part}{self.partition}.txt": split for part, split in PARTS.items()}

    @property
    def required(self) -> Sequence[str]:
        """The images' folder and the partition's lists."""
        return ("images", *self._lists)

    def load_table(self) -> Table:
        """Lines of the partition's train, val and test list."""
        return self.read_lists(self._lists, LINE, self.space.own, "class/file: banded/banded_0002.jpg")

    def assign(self, table: Table, settings: SplitSettings) -> tuple[Table, str]:
        """As for all sets; the policy names the partition."""
        table, policy = super().assign(table, settings)
        return table, f"{policy}, partition {self.partition}"
