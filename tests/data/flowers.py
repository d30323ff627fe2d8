"""Oxford Flowers-102 in the layout that torchvision unpacks."""

import numpy as np
from scipy.io import savemat

from tests.data.images import write_image

CLASSES = 102


def create(root, *, train=2, validation=1, test=3):
    """Write images, labels and sets: so many images a class in each set, the classes' images not in a row."""
    home = root / "flowers-102"
    each = train + validation + test
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(1, CLASSES + 1), each)).astype(np.uint8)
    for number in range(1, len(labels) + 1):
        write_image(home / "jpg" / f"image_{number:05d}.jpg", number)
    by_class = np.argsort(labels, kind="stable").reshape(CLASSES, each) + 1
    sets = np.split(by_class, [train, train + validation], axis=1)
    savemat(home / "imagelabels.mat", {"labels": labels[None]})
    names = ("trnid", "valid", "tstid")
    savemat(
        home / "setid.mat",
        {name: numbers.reshape(1, -1).astype(np.uint16) for name, numbers in zip(names, sets, strict=True)},
    )
    return root
