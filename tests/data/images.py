"""Small images with structure, written as files."""

import cv2
import numpy as np


def write_image(path, seed, *, size=(24, 20), channels=3, value=None, detail=4):
    """Write one smooth random image of `detail` blobs a side; `value` gives a flat one."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (detail, detail, channels)).astype(np.uint8)
    image = cv2.resize(coarse, size, interpolation=cv2.INTER_CUBIC).reshape(size[1], size[0], channels)
    if value is not None:
        image[:] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image)
