"""Caltech-101 in the layout that torchvision unpacks; the release's size is replaced by that of the generated files."""

from datamodules.natural import caltech
from tests.data.images import write_image

IMAGES = 6
"""Images of a class; of the background there are half as many."""


def create(root, monkeypatch):
    """Write the set and shrink the release to it."""
    write(root)
    shrink(monkeypatch)
    return root


def write(root):
    """Write all classes, every fourth photo grey, and a file that is no image."""
    home = root / "caltech101" / "101_ObjectCategories"
    for number, name in enumerate([*caltech.Caltech101.class_names, caltech.BACKGROUND]):
        images = IMAGES if name != caltech.BACKGROUND else IMAGES // 2
        for image in range(1, images + 1):
            path = home / name / f"image_{image:04d}.jpg"
            write_image(path, 100 * number + image, channels=3 if image % 4 else 1)
    (home / caltech.BACKGROUND / "tmp").write_text("")  # as in the release


def shrink(monkeypatch):
    """Let the release have as many images as `write` writes."""
    monkeypatch.setattr(caltech, "OBJECT_IMAGES", IMAGES * len(caltech.Caltech101.class_names))
    monkeypatch.setattr(caltech, "BACKGROUND_IMAGES", IMAGES // 2)
