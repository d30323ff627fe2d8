"""RandAugment and random erasing on uint8 planes, pure functions of (planes, random generator).

They run after crop and flip, on what the model will see. RandAugment is torchvision's (v2, on tensors); it draws
from torch's global generator, which is seeded for the call and put back as it was.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

Planes = NDArray[np.uint8]

# Computed on ImageNet's training images, in [0, 1] (torchvision, timm), here in grey levels.
IMAGENET_MEAN = 255 * np.array([0.485, 0.456, 0.406], np.float32)
IMAGENET_STD = 255 * np.array([0.229, 0.224, 0.225], np.float32)

_OPERATIONS = 2  # RandAugment's N, in both papers


@contextmanager
def torch_seed(seed: int) -> Iterator[None]:
    """Seed torch's CPU generator inside the block, and give it back its state afterwards (3 µs in all).

    `torch.manual_seed` would touch the generators of the accelerators too. Of the seed only the lower 32 bits
    count: torch's CPU generator is a Mersenne Twister that takes no more.
    """
    import torch

    state = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.default_generator.set_state(state)


class RandAugment:
    """Two random operations of torchvision's 14 (Cubuk et al. 2020), each with replacement.

    Args:
        magnitude: Strength of an operation in parts of `levels`; 9 of 30 turns by 9 degrees, 9 of 10 by 27.
        levels: What the largest magnitude is called.
        magnitude_std: Standard deviation of a normal draw around `magnitude`, clipped to [0, levels].
        probability: With which each of the two operations is applied at all.
        interpolation: Of shear, translation and rotation: "nearest" or "bilinear".
        fill: Grey levels (R, G, B) that these show outside the image; a grey image gets their mean. None: black.
    """

    def __init__(
        self,
        magnitude: float,
        levels: int,
        *,
        magnitude_std: float = 0.0,
        probability: float = 1.0,
        interpolation: str = "nearest",
        fill: tuple[float, float, float] | None = None,
    ) -> None:
        from torchvision.transforms import v2

        self.magnitude, self.levels, self.magnitude_std = magnitude, levels, magnitude_std
        self.probability = probability
        # Torchvision looks strengths up in a table of bins: ten a level let a drawn magnitude take decimals.
        self._bins_per_level = 10 if magnitude_std else 1
        bins = levels * self._bins_per_level + 1
        mode = v2.InterpolationMode(interpolation)
        fills = {1: fill and [sum(fill) / 3], 3: fill and list(fill)}
        self._augment = {
            channels: v2.RandAugment(1, 0, bins, interpolation=mode, fill=values) for channels, values in fills.items()
        }

    def __call__(self, planes: Planes, random: np.random.Generator) -> Planes:
        """Augment one image.

        Args:
            planes: uint8, (1, H, W) or (3, H, W); not changed.
            random: Everything random comes from it.

        Returns:
            uint8, of the same shape, contiguous; `planes` itself where no operation was applied.
        """
        import torch

        augment = self._augment[planes.shape[0]]
        seed = int(random.integers(1 << 32))
        applied = _OPERATIONS if self.probability == 1 else int(random.binomial(_OPERATIONS, self.probability))
        image = torch.from_numpy(planes)
        with torch_seed(seed):
            for _ in range(applied):
                augment.magnitude = self._draw_bin(random)
                image = augment(image)
        return np.ascontiguousarray(image.numpy())

    def _draw_bin(self, random: np.random.Generator) -> int:
        magnitude = random.normal(self.magnitude, self.magnitude_std) if self.magnitude_std else self.magnitude
        return round(min(max(magnitude, 0), self.levels) * self._bins_per_level)


class RandomErasing:
    """Overwrite a random rectangle by noise (Zhong et al. 2020), as timm's mode "pixel" does.

    Timm draws every pixel from a standard normal distribution after normalising by mean and standard deviation. On
    uint8 this is the same distribution around ImageNet's mean colour, rounded and clipped to 0-255 (3 % of it lies
    outside). Area and aspect are those of timm and torchvision; a rectangle that does not fit is drawn again, ten
    times at most.

    Args:
        probability: Of erasing at all.
        area: Range of the rectangle's share of the image.
        aspect: Range of height / width, uniform in its logarithm.
    """

    _ATTEMPTS = 10

    def __init__(
        self,
        probability: float,
        *,
        area: tuple[float, float] = (0.02, 1 / 3),
        aspect: tuple[float, float] = (0.3, 1 / 0.3),
    ) -> None:
        self.probability, self.area = probability, area
        self._log_aspect = (math.log(aspect[0]), math.log(aspect[1]))

    def __call__(self, planes: Planes, random: np.random.Generator) -> Planes:
        """Erase in a copy of `planes`, uint8 (1, H, W) or (3, H, W); return `planes` itself where nothing is erased."""
        if random.random() >= self.probability:
            return planes
        channels, height, width = planes.shape
        for _ in range(self._ATTEMPTS):
            area = random.uniform(*self.area) * height * width
            aspect = math.exp(random.uniform(*self._log_aspect))
            rows, columns = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if rows < height and columns < width:
                break
        else:
            return planes
        top, left = random.integers(height - rows + 1), random.integers(width - columns + 1)
        erased = planes.copy()
        noise = random.standard_normal((channels, rows, columns), dtype=np.float32)
        mean, std = (IMAGENET_MEAN, IMAGENET_STD) if channels == 3 else (IMAGENET_MEAN.mean(), IMAGENET_STD.mean())
        noise = noise * np.reshape(std, (-1, 1, 1)) + np.reshape(mean, (-1, 1, 1))
        erased[:, top : top + rows, left : left + columns] = np.rint(noise).clip(0, 255)
        return erased
