"""The random steps of SimCLR's views on uint8 planes, pure functions of (planes, random generator).

Chen et al. 2020 (arXiv 2002.05709, appendix A), with the distributions, filters and rounding of torchvision's
transforms on Pillow images. Planes are (1, H, W) grey or (3, H, W) RGB; what concerns colour leaves grey as it is.
No step changes its input; a step that changes nothing may return it.
"""

import math
from collections.abc import Callable
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from datamodules import colour

Planes = NDArray[np.uint8]
Box = tuple[int, int, int, int]
Change = tuple[Callable[[colour.Image, float], colour.Image], float, float]
"""A change of colour and the range of its strength."""


class RandomResizedCrop:
    """Crop a random box and resize it to a square with Pillow's anti-aliased bilinear filter.

    OpenCV's area averages are sharper: they leave a detailed photo 40 % more Laplacian energy than this filter.

    Args:
        image_size: Side of the output in pixels.
        smallest: Smallest share of the image that a box has; the share is uniform from there to 1.
    """

    _ASPECT = (3 / 4, 4 / 3)  # width / height, uniform in its logarithm (Szegedy et al. 2015)
    _ATTEMPTS = 10  # as torchvision, which then takes the largest box in the centre that has a permitted aspect

    def __init__(self, image_size: int, smallest: float = 0.08) -> None:
        self.image_size, self.smallest = image_size, smallest

    def __call__(self, planes: Planes, random: np.random.Generator) -> Planes:
        """Crop planes of any size to (C, image_size, image_size)."""
        import torch

        top, left, height, width = self.draw(planes.shape[1], planes.shape[2], random)
        box = planes[:, top : top + height, left : left + width]
        # Of three channels torch resizes interleaved ones twice as fast, the same result within rounding.
        image = torch.from_numpy(_interleave(box))
        resized = torch.nn.functional.interpolate(
            image.permute(2, 0, 1)[None], (self.image_size, self.image_size), mode="bilinear", antialias=True
        )
        return resized[0].contiguous().numpy()

    def draw(self, height: int, width: int, random: np.random.Generator) -> Box:
        """Draw (top, left, height, width) of a box in an image of (height, width)."""
        lowest, highest = self._ASPECT
        for _ in range(self._ATTEMPTS):
            area = random.uniform(self.smallest, 1) * height * width
            aspect = math.exp(random.uniform(math.log(lowest), math.log(highest)))
            rows, columns = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
            if 0 < rows <= height and 0 < columns <= width:
                return int(random.integers(height - rows + 1)), int(random.integers(width - columns + 1)), rows, columns
        rows, columns = min(height, round(width / lowest)), min(width, round(height * highest))
        return (height - rows) // 2, (width - columns) // 2, rows, columns


class RandomFlip:
    """Mirror left and right with probability 0.5."""

    def __call__(self, planes: Planes, random: np.random.Generator) -> Planes:
        """Mirror or return `planes` itself."""
        if random.random() >= 0.5:
            return planes
        mirrored: Planes = _opencv().flip(planes.reshape(-1, planes.shape[2]), 1)
        return mirrored.reshape(planes.shape)


class RandomRotation:
    """Turn around the centre by a uniform angle, bilinear, black outside.

    Args:
        degrees: The most, in both directions.
    """

    def __init__(self, degrees: float) -> None:
        self.degrees = degrees

    def __call__(self, planes: Planes, random: np.random.Generator) -> Planes:
        """Turn every plane by the same angle."""
        cv2 = _opencv()
        _, height, width = planes.shape
        centre = ((width - 1) / 2, (height - 1) / 2)
        matrix = cv2.getRotationMatrix2D(centre, random.uniform(-self.degrees, self.degrees), 1.0)
        return np.stack([cv2.warpAffine(plane, matrix, (width, height)) for plane in planes])


class ColourJitter:
    """Change brightness, contrast, saturation and hue in random order, all or none of them.

    Args:
        brightness: b of a factor that is uniform in 1 - b to 1 + b; at most 1. So are contrast and saturation.
        contrast: See `brightness`.
        saturation: See `brightness`.
        hue: The largest turn in either direction, as a share of the colour circle; uniform, at most 0.5.
        probability: Of changing anything.
    """

    def __init__(
        self, brightness: float, contrast: float, saturation: float = 0.0, hue: float = 0.0, *, probability: float = 0.8
    ) -> None:
        self.probability = probability
        light: list[Change] = [
            (colour.adjust_brightness, 1 - brightness, 1 + brightness),
            (colour.adjust_contrast, 1 - contrast, 1 + contrast),
        ]
        colours: list[Change] = [
            (colour.adjust_saturation, 1 - saturation, 1 + saturation),
            (colour.adjust_hue, -hue, hue),
        ]
        self._changes = {1: light, 3: light + [change for change in colours if change[1] < change[2]]}

    def __call__(self, planes: Planes, random: np.random.Generator) -> Planes:
        """Jitter, or return `planes` itself."""
        if random.random() >= self.probability:
            return planes
        image, changes = _interleave(planes), self._changes[len(planes)]
        for place in random.permutation(len(changes)):
            change, lowest, highest = changes[place]
            image = change(image, random.uniform(lowest, highest))
        return _separate(image)


class RandomGrey:
    """Replace RGB by three times its grey.

    Args:
        probability: Of doing so.
    """

    def __init__(self, probability: float = 0.2) -> None:
        self.probability = probability

    def __call__(self, planes: Planes, random: np.random.Generator) -> Planes:
        """Take the colour out, or return `planes` itself."""
        if random.random() >= self.probability or len(planes) == 1:
            return planes
        return np.stack([colour.grey(_interleave(planes))] * 3)


class RandomGaussianBlur:
    """Blur with a kernel of a tenth of the image's side, made odd.

    Args:
        probability: Of blurring.
    """

    _SIGMA = (0.1, 2.0)  # pixels, uniform

    def __init__(self, probability: float = 0.5) -> None:
        self.probability = probability

    def __call__(self, planes: Planes, random: np.random.Generator) -> Planes:
        """Blur every plane alike, or return `planes` itself."""
        if random.random() >= self.probability:
            return planes
        return blur(planes, random.uniform(*self._SIGMA), planes.shape[1] // 20)


def blur(planes: Planes, sigma: float, radius: int) -> Planes:
    """Convolve every plane with a Gaussian, mirrored at the border; `planes` itself where the kernel is one pixel.

    Args:
        planes: uint8, (C, H, W).
        sigma: Standard deviation in pixels, above 0.
        radius: Pixels of the kernel on either side of its centre. What lies beyond three standard deviations is left
            out too: it is 0.3 % of the kernel and changes a photo by 0.02 levels on average at most.
    """
    radius = min(radius, math.ceil(3 * sigma))
    if radius == 0:
        return planes
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    kernel /= kernel.sum()
    cv2 = _opencv()
    # A quarter to a half of the time of cv2.GaussianBlur, and nearer to the convolution in float.
    return np.stack([cv2.sepFilter2D(plane, -1, kernel, kernel) for plane in planes])


def _interleave(planes: Planes) -> colour.Image:
    """(C, H, W) to a contiguous (H, W, C)."""
    if len(planes) == 1:
        return np.ascontiguousarray(planes[0])[:, :, None]
    merged: colour.Image = _opencv().merge(list(planes))
    return merged


def _separate(image: colour.Image) -> Planes:
    """(H, W, C) to a contiguous (C, H, W)."""
    return np.stack(_opencv().split(image))


def _opencv() -> ModuleType:
    import cv2

    return cv2
