"""Oxford-IIIT Pets: 37 breeds of cats and dogs."""

from collections.abc import Sequence

from datamodules.natural.torchvision_set import TorchvisionSet
from datamodules.table import Table

LISTS = {"annotations/trainval.txt": "train", "annotations/test.txt": "test"}
BREEDS = (
    "Abyssinian american_bulldog american_pit_bull_terrier basset_hound beagle Bengal Birman Bombay boxer "
    "British_Shorthair chihuahua Egyptian_Mau english_cocker_spaniel english_setter german_shorthaired great_pyrenees "
    "havanese japanese_chin keeshond leonberger Maine_Coon miniature_pinscher newfoundland Persian pomeranian pug "
    "Ragdoll Russian_Blue saint_bernard samoyed scottish_terrier shiba_inu Siamese Sphynx staffordshire_bull_terrier "
    "wheaten_terrier yorkshire_terrier"
).split()
"""Breeds by the lists' class number, spelled as in file names."""
LINE = r"(?P<image>(?P<class_name>[A-Za-z_]+)_\d+) (?P<number>\d+) [12] \d+"


class OxfordPets(TorchvisionSet):
    """Oxford-IIIT Pets: 7,349 photos of 37 breeds, 12 of cats and 25 of dogs.

    Source: https://www.robots.ox.ac.uk/~vgg/data/pets/ (Parkhi, Vedaldi, Zisserman & Jawahar 2012, Cats and dogs,
    CVPR). 0.8 GB of photos of many sizes, named .jpg; a few are PNG or GIF inside and are decoded as what they are.
    Layout: `images/` and `annotations/{trainval,test}.txt` in `root/oxford-iiit-pet/`, as torchvision unpacks them, or
    in `root`. Images that neither list names take no part.
    Classes by the lists' class number, named as in torchvision ("American Bulldog"). Split: official, 3,680 trainval
    and 3,669 test, about 100 each a class; validation is carved from trainval. One group an image: animals are not
    identified. Licence: CC BY-SA 4.0; the photos stay their owners'.
    """

    name = "oxford_pets"
    reader = "OxfordIIITPet"
    homes = ("oxford-iiit-pet", "")
    archives = (
        "https://www.robots.ox.ac.uk/~vgg/data/pets/data/images.tar.gz",
        "https://www.robots.ox.ac.uk/~vgg/data/pets/data/annotations.tar.gz",
    )
    class_names = [breed.replace("_", " ").title() for breed in BREEDS]  # noqa: RUF012

    @property
    def required(self) -> Sequence[str]:
        """The images' folder and both lists."""
        return ("images", *LISTS)

    def load_table(self) -> Table:
        """Lines of trainval.txt, then of test.txt."""
        return self.read_lists(LISTS, LINE, BREEDS, 'image, class number, species and breed: "Abyssinian_100 1 1 1"')
