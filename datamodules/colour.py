"""Colour changes of uint8 images, each with a given strength: Pillow's (and so torchvision's), several times as fast.

Images are (H, W, 3) RGB or, where it says so, (H, W, 1) grey; results are new arrays of the same shape. Brightness,
contrast and saturation are linear in the colours, and so is each of them one matrix; they clip to 0-255 and round
down as Pillow does, so that two of them in a row cannot be merged into one.
"""

from types import ModuleType

import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]

LUMA = np.array([0.299, 0.587, 0.114])
"""Weights of red, green and blue in grey (ITU-R BT.601, as in Pillow and OpenCV)."""


def adjust_brightness(image: Image, factor: float) -> Image:
    """Multiply every channel, grey or RGB, by `factor` >= 0."""
    return _mix(image, factor, 0.0, 0.0)


def adjust_contrast(image: Image, factor: float) -> Image:
    """Stretch grey or RGB by `factor` >= 0 around the image's mean grey level."""
    means = np.array(_opencv().mean(image)[: image.shape[2]])
    mean = float(means @ LUMA) if image.shape[2] == 3 else float(means[0])
    # Pillow stretches around a whole grey level.
    return _mix(image, factor, 0.0, (1 - factor) * int(mean + 0.5))


def adjust_saturation(image: Image, factor: float) -> Image:
    """Move RGB away from its grey (`factor` > 1) or towards it; 0 is grey."""
    return _mix(image, factor, 1 - factor, 0.0)


def adjust_hue(image: Image, turns: float) -> Image:
    """Turn the hue of RGB by `turns` of the colour circle, -0.5 to 0.5, in HSV with 256 hues."""
    cv2 = _opencv()
    hsv: Image = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
    hsv[..., 0] += np.uint8(round(turns * 256) % 256)  # 256 hues are a full turn: the overflow is wanted
    rgb: Image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)
    return rgb


def grey(image: Image) -> Image:
    """Grey levels (H, W) of RGB."""
    cv2 = _opencv()
    levels: Image = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    return levels


def _mix(image: Image, own: float, grey_share: float, offset: float) -> Image:
    """Return own * channel + grey_share * grey + offset, rounded down and clipped to 0-255."""
    channels = image.shape[2]
    matrix = np.empty((channels, channels + 1), np.float32)
    matrix[:, :-1] = own * np.eye(channels)
    if channels == 3:
        matrix[:, :-1] += grey_share * LUMA
    # OpenCV rounds to the nearest level; 1/64 keeps whole levels, which its fixed point misses by less, where they are.
    matrix[:, -1] = offset - 0.5 + 1 / 64
    mixed: Image = _opencv().transform(image, matrix)
    return mixed.reshape(image.shape)


def _opencv() -> ModuleType:
    import cv2

    return cv2
