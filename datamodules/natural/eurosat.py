"""EuroSAT: land use in Sentinel-2 images."""

from collections.abc import Sequence

from datamodules.natural.torchvision_set import TorchvisionSet
from datamodules.table import Table

IMAGES = 27_000
"""Number of images in the release."""


class EuroSAT(TorchvisionSet):
    """EuroSAT, RGB: 27,000 satellite images of 10 kinds of land use, 64×64.

    Source: https://github.com/phelber/EuroSAT (Helber, Bischke, Dengel & Borth 2019, IEEE JSTARS 12(7), arXiv
    1709.00029); from Sentinel-2, 10 m a pixel, 34 European countries. 94 MB of 8-bit JPEG; the release with 13 bands
    (GeoTIFF) is another one and not read. Layout: `<class>/*.jpg` in `root/eurosat/2750/`, as torchvision unpacks it,
    or in `root/2750/`, `root/EuroSAT_RGB/` (Zenodo) or `root`.
    Classes alphabetical, 2,000 to 3,000 images each. Split: there is no official one; the test set is a fixed hash of
    the image, validation is carved from the rest. One group an image: the JPEG release has no coordinates, so
    neighbouring tiles may be on both sides. Licence: MIT; Copernicus data are free and open.
    """

    name = "eurosat"
    reader = "EuroSAT"
    homes = ("eurosat/2750", "2750", "EuroSAT_RGB", "")
    archives = (
        "https://huggingface.co/datasets/torchgeo/eurosat/resolve/c877bcd43f099cd0196738f714544e355477f3fd/EuroSAT.zip",
    )
    class_names = (
        "AnnualCrop Forest HerbaceousVegetation Highway Industrial Pasture PermanentCrop Residential River SeaLake"
    ).split()

    @property
    def required(self) -> Sequence[str]:
        """Every class's folder."""
        return self.space.own

    def load_table(self) -> Table:
        """Images by class and name."""
        return self.read_class_folders(IMAGES)
