"""EuroSAT (RGB) in the layout that torchvision unpacks; the release's size is replaced by that of the files."""

from datamodules.natural import eurosat
from tests.data.images import write_image

IMAGES = 20
"""Images of a class."""


def create(root, monkeypatch):
    """Write the set and shrink the release to it."""
    write(root)
    shrink(monkeypatch)
    return root


def write(root):
    """Write all classes; images are numbered from 1 without leading zeros."""
    for number, name in enumerate(eurosat.EuroSAT.class_names):
        for image in range(1, IMAGES + 1):
            path = root / "eurosat" / "2750" / name / f"{name}_{image}.jpg"
            write_image(path, 100 * number + image, size=(16, 16))


def shrink(monkeypatch):
    """Let the release have as many images as `write` writes."""
    monkeypatch.setattr(eurosat, "IMAGES", IMAGES * len(eurosat.EuroSAT.class_names))
