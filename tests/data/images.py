"""Small images with structure, written as files."""

import cv2
import numpy as np


def write_image(path, seed, *, size=(24, 20), channels=3, value=None):
    """Write one smooth random image; `value` gives a flat one."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (4, 4, channels)).astype(np.uint8)
    image = cv2.resize(coarse, size, interpolation=cv2.INTER_CUBIC).reshape(size[1], size[0], channels)
    if value is not None:
        image[:] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image)


def picture(seed, height=120, width=100, channels=1):
    """A smooth random image with the spectrum of natural ones: amplitudes fall with frequency."""
    rng = np.random.default_rng(seed)
    image = sum(
        cv2.resize(rng.normal(0, 40 / cells**0.5, (cells, cells)), (width, height), interpolation=cv2.INTER_CUBIC)
        for cells in (3, 6, 12, 24)
    )
    return np.repeat((image + 128).clip(0, 255).astype(np.uint8)[:, :, None], channels, axis=2)
