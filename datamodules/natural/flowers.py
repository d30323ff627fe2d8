"""Oxford Flowers-102, in the literature's split and in paper A's reversed one."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd

from datamodules.assignment import TEST, TRAIN, SplitSettings
from datamodules.errors import DataError
from datamodules.natural.torchvision_set import TorchvisionSet
from datamodules.table import Table, split_column, strings

LABELS, SETS = "imagelabels.mat", "setid.mat"
PARTS = {"trnid": "train", "valid": "validation", "tstid": "test"}
"""Variables of setid.mat, and the split that each holds."""
REVERSED = np.array([0, TEST, TEST, TRAIN], dtype=np.int8)
"""Paper A's split by the code of the official one: none, train, validation, test."""


class OxfordFlowers102(TorchvisionSet):
    """Oxford Flowers-102: 8,189 photos of 102 flowers common in the United Kingdom, 40 to 258 each.

    Source: https://www.robots.ox.ac.uk/~vgg/data/flowers/102/ (Nilsback & Zisserman 2008, Automated flower
    classification over a large number of classes, ICVGIP). 345 MB of JPEG, short side 500 pixels. Layout:
    `jpg/image_00001.jpg`, `imagelabels.mat` and `setid.mat` in `root/flowers-102/`, as torchvision unpacks them, or in
    `root`. Classes by the number in imagelabels.mat, named as in torchvision.
    Split: official, 1,020 train and 1,020 validation (10 each a class), 6,149 test (20 to 238 a class). Cherti & Jitsev
    2022 (arXiv 2106.00116) trained on the 6,149 and tested on the other 2,040, which makes another, easier task:
    `split: cherti2022`, with validation carved from train. One group an image: which photos show one plant is not
    released. Licence: none stated; research use.

    Args:
        split: literature, or cherti2022: train and test reversed; result rows say so.
        **kwargs: Arguments of sets that torchvision downloads.
    """

    name = "oxford_flowers102"
    reader = "Flowers102"
    homes = ("flowers-102", "")
    archives = tuple(
        f"https://www.robots.ox.ac.uk/~vgg/data/flowers/102/{name}" for name in ("102flowers.tgz", LABELS, SETS)
    )
    class_names = (
        "pink primrose, hard-leaved pocket orchid, canterbury bells, sweet pea, english marigold, tiger lily, moon "
        "orchid, bird of paradise, monkshood, globe thistle, snapdragon, colt's foot, king protea, spear thistle, "
        "yellow iris, globe-flower, purple coneflower, peruvian lily, balloon flower, giant white arum lily, fire "
        "lily, pincushion flower, fritillary, red ginger, grape hyacinth, corn poppy, prince of wales feathers, "
        "stemless gentian, artichoke, sweet william, carnation, garden phlox, love in the mist, mexican aster, alpine "
        "sea holly, ruby-lipped cattleya, cape flower, great masterwort, siam tulip, lenten rose, barbeton daisy, "
        "daffodil, sword lily, poinsettia, bolero deep blue, wallflower, marigold, buttercup, oxeye daisy, common "
        "dandelion, petunia, wild pansy, primula, sunflower, pelargonium, bishop of llandaff, gaura, geranium, orange "
        "dahlia, pink-yellow dahlia?, cautleya spicata, japanese anemone, black-eyed susan, silverbush, californian "
        "poppy, osteospermum, spring crocus, bearded iris, windflower, tree poppy, gazania, azalea, water lily, rose, "
        "thorn apple, morning glory, passion flower, lotus, toad lily, anthurium, frangipani, clematis, hibiscus, "
        "columbine, desert-rose, tree mallow, magnolia, cyclamen, watercress, canna lily, hippeastrum, bee balm, ball "
        "moss, foxglove, bougainvillea, camellia, mallow, mexican petunia, bromelia, blanket flower, trumpet creeper, "
        "blackberry lily"
    ).split(", ")

    def __init__(self, *, split: Literal["literature", "cherti2022"] = "literature", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.split_choice = split

    @property
    def required(self) -> Sequence[str]:
        """The images' folder and both tables."""
        return ("jpg", LABELS, SETS)

    def load_table(self) -> Table:
        """Images by number, with their official splits.

        Raises:
            DataError: A damaged table, an unknown class, a number without an image, or an image in two sets.
        """
        labels = self._numbers(LABELS, "labels")
        classes = len(self.space.own)
        unknown = np.flatnonzero((labels < 1) | (labels > classes))
        if len(unknown):
            raise DataError(
                f"image {unknown[0] + 1} has the unknown class {labels[unknown[0]]} ({len(unknown)} such images)",
                where=f"{self.folder / LABELS}, labels, entry {unknown[0] + 1}",
                valid=f"1 to {classes}",
            )
        images = [f"image_{number:05d}" for number in range(1, len(labels) + 1)]
        return Table(
            paths=strings([f"{self.prefix}jpg/{image}.jpg" for image in images]),
            labels=labels - 1,
            groups=strings(images),
            split=split_column(self._official(len(labels))),
        )

    def _official(self, images: int) -> np.ndarray:
        """Official split of every image, object (N,); "" for one in no set."""
        sets = {variable: self._numbers(SETS, variable) for variable in PARTS}
        variables = np.repeat(list(sets), [len(numbers) for numbers in sets.values()])
        numbers = np.concatenate(list(sets.values()))
        unlabelled = (numbers < 1) | (numbers > images)
        bad = np.flatnonzero(unlabelled | pd.Series(numbers).duplicated().to_numpy())
        if len(bad):
            fault = f"has no label, {LABELS} has {images:,}" if unlabelled[bad[0]] else "is in two sets or twice in one"
            raise DataError(
                f"image {numbers[bad[0]]} {fault} ({len(bad)} such entries)",
                where=f"{self.folder / SETS}, {variables[bad[0]]}",
                hint=self.obtain,
            )
        split = np.full(images, "", dtype=object)
        split[numbers - 1] = pd.Series(variables).map(PARTS)
        return split

    def _numbers(self, name: str, variable: str) -> np.ndarray:
        """A variable of a MATLAB file, int64 (N,)."""
        from scipy.io import loadmat

        path = self.folder / name
        try:
            return np.asarray(loadmat(path)[variable]).ravel().astype(np.int64, casting="same_kind")
        except Exception as error:  # scipy's reader raises ValueError, TypeError, zlib.error, KeyError, ...
            raise DataError(
                f"cannot read the variable {variable!r}: {error}",
                where=str(path),
                hint=f"the file may be damaged: {self.obtain}",
            ) from error

    def assign(self, table: Table, settings: SplitSettings) -> tuple[Table, str]:
        """As for all sets, from the official split or from the reversed one."""
        if self.split_choice == "literature":
            return super().assign(table, settings)
        table, policy = super().assign(table.with_split(REVERSED[table.split.codes]), settings)
        return table, f"cherti2022: train and test reversed, {policy}"
