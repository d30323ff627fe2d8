"""Describable Textures in the layout that torchvision unpacks, with two partitions."""

from datamodules.natural.dtd import DTD
from tests.data.images import write_image


def create(root, *, images=2):
    """Write 3 × `images` images a class, and the lists of partitions 1 and 2; each part has `images` of every class."""
    home = root / "dtd" / "dtd"
    (home / "labels").mkdir(parents=True)
    for number, name in enumerate(DTD.class_names):
        for image in range(3 * images):
            write_image(home / "images" / name / f"{name}_{image:04d}.jpg", 100 * number + image)
    for partition in (1, 2):
        for place, part in enumerate(("train", "val", "test")):
            first = (place + partition - 1) % 3 * images
            lines = [
                f"{name}/{name}_{image:04d}.jpg" for name in DTD.class_names for image in range(first, first + images)
            ]
            (home / "labels" / f"{part}{partition}.txt").write_text("\n".join(lines) + "\n")
    return root
