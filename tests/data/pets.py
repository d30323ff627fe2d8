"""Oxford-IIIT Pets in the layout that torchvision unpacks."""

from datamodules.natural.pets import BREEDS
from tests.data.images import write_image


def create(root, *, trainval=3, test=2):
    """Write images and both lists: `trainval` and `test` images a breed; cats' names begin with a capital."""
    home = root / "oxford-iiit-pet"
    lists = {"trainval": [], "test": []}
    for number, breed in enumerate(BREEDS, start=1):
        for image in range(1, trainval + test + 1):
            write_image(home / "images" / f"{breed}_{image}.jpg", 100 * number + image)
            species = 1 if breed[0].isupper() else 2
            lists["trainval" if image <= trainval else "test"].append(f"{breed}_{image} {number} {species} 1")
    write_image(home / "images" / "beagle_999.jpg", 1)  # in no list, as some of the release
    (home / "annotations").mkdir()
    for name, lines in lists.items():
        (home / "annotations" / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return root
