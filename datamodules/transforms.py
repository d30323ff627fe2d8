"""Image transforms by name: crop, resize and augment on uint8, the same for the same image and seed.

Every resize is anti-aliased: pixels are averaged (`INTER_AREA`) when an image shrinks, interpolated linearly
when it grows.
"""

import functools
import importlib
import os
import random
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from datamodules.errors import DataError, closest
from datamodules.randaugment import IMAGENET_MEAN, RandAugment, RandomErasing
from datamodules.simclr_views import (
    ColourJitter,
    RandomFlip,
    RandomGaussianBlur,
    RandomGrey,
    RandomResizedCrop,
    RandomRotation,
)

Image = NDArray[np.uint8]
Geometry = Callable[[Image], Image]
PlaneStep = Callable[[Image, np.random.Generator], Image]


class Steps(NamedTuple):
    """What a policy does to an image, in this order."""

    geometry: Geometry
    """Fixed step on (H, W, C)."""
    augmentations: Sequence[Any] = ()
    """Random transforms of albumentations."""
    finish: Sequence[PlaneStep] = ()
    """Random steps on (C, H, W), under the sample's generator; a crop comes first, the rest at image_size."""
    whole: int | None = None
    """Pixels of the short side that are enough where `geometry` resizes the whole image; None = a crop needs all."""


Policy = Callable[[int, bool], Steps]
"""(image_size, train) → its steps."""


def create_transform(policy: str, image_size: int, *, train: bool) -> "Transform":
    """Create the transform of a policy.

    Args:
        policy: A key of `POLICIES`.
        image_size: Side of the square output in pixels.
        train: Augment; otherwise the policy's fixed evaluation transform.

    Raises:
        DataError: There is no such policy, or the size is not positive.
    """
    if policy not in POLICIES:
        near = closest(policy, POLICIES)
        raise DataError(
            f"There is no transform policy {policy!r}.",
            where="policy",
            valid=sorted(POLICIES),
            hint=f"did you mean {near!r}?" if near else "choose one of these",
        )
    if image_size < 1:
        raise DataError(f"An image size of {image_size} is impossible.", where="image_size", valid="1 or more")
    return Transform(*POLICIES[policy](image_size, train))


class Transform:
    """A fixed geometric step and then random ones, a pure function of (image, seed).

    Args:
        geometry: Fixed step on (H, W, C) images.
        augmentations: Transforms of albumentations, applied in order; none for evaluation.
        finish: Random steps on (C, H, W) images after them; none for evaluation.
        whole: Pixels of the short side that are enough, if the whole image is resized; see `Steps`.
    """

    def __init__(
        self,
        geometry: Geometry,
        augmentations: Sequence[Any] = (),
        finish: Sequence[PlaneStep] = (),
        whole: int | None = None,
    ) -> None:
        self._geometry, self.whole = geometry, whole
        self._finish = tuple(finish)
        self._compose = _albumentations().Compose(list(augmentations), p=1.0) if augmentations else None
        # `Compose.set_random_seed` hands the same seed to every step, so that their draws are equal: a flip
        # would happen exactly when the random crop is small. One generator for all steps gives independent
        # draws, and re-seeding it in place costs 6 µs instead of 40.
        self._random = random.Random(0)
        self._generator = np.random.Generator(np.random.Philox(key=0))
        self._state: dict[str, Any] = dict(self._generator.bit_generator.state)
        if self._compose is not None:
            self._compose.set_random_state(self._generator, self._random)

    @property
    def is_random(self) -> bool:
        """Whether the seed changes anything."""
        return self._compose is not None or bool(self._finish)

    def __call__(self, image: Image, seed: int) -> Image:
        """Transform one image.

        Args:
            image: uint8, (H, W, 1) or (H, W, 3), at least 1 x 1 pixel; it is not changed.
            seed: 0 to 2^64 - 1; no effect in evaluation.

        Returns:
            uint8, (C, image_size, image_size), contiguous and sharing no memory with `image`.

        Raises:
            DataError: The image's type or shape is not as above.
        """
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (1, 3) or image.size == 0:
            raise DataError(
                f"A transform got an image of type {image.dtype} and shape {image.shape}.",
                valid="uint8, (H, W, 1) or (H, W, 3)",
            )
        image = self._geometry(image)
        if self.is_random:
            self._seed(seed)
        if self._compose is not None:
            image = self._compose(image=image)["image"]
        image = _channels_first(image)
        for step in self._finish:
            image = step(image, self._generator)
        return image

    def _seed(self, seed: int) -> None:
        self._random.seed(int(seed))
        self._state["state"]["key"][0] = seed
        self._generator.bit_generator.state = self._state


def bit(image_size: int, train: bool) -> Steps:
    """BiT-HyperRule, aspect kept: short side to 160/128 (up to 160 px) or 512/480, random crop, flip.

    Sizes of Kolesnikov et al. 2020 (BiT) with the aspect-keeping resize of Cherti & Jitsev 2022; BiT itself
    resizes to a square: `bit_square`. Evaluation: short side to `image_size`, centre crop.
    """
    if not train:
        return resize_center(image_size, train)
    short_side = round(image_size * 160 / 128 if image_size <= 160 else image_size * 512 / 480)
    A = _albumentations()
    return Steps(
        functools.partial(_resize_short_side, short_side=short_side),
        [A.RandomCrop(image_size, image_size), A.HorizontalFlip(p=0.5)],
        whole=short_side,
    )


def bit_square(image_size: int, train: bool) -> Steps:
    """BiT-HyperRule as its own paper resizes: to a square of 160/128 or 512/480, random crop, flip.

    Kolesnikov et al. 2020 (arXiv 1912.11370). Evaluation: resize to a square of `image_size`.
    """
    side = image_size if not train else round(image_size * (160 / 128 if image_size <= 160 else 512 / 480))
    geometry = functools.partial(_resize, height=side, width=side)
    if not train:
        return Steps(geometry, whole=side)
    A = _albumentations()
    return Steps(geometry, [A.RandomCrop(image_size, image_size), A.HorizontalFlip(p=0.5)], whole=side)


def inception_crop(image_size: int, train: bool) -> Steps:
    """ImageNet recipe: crop of 8-100 % of the area at aspect 3/4 to 4/3, resize, flip (Szegedy et al. 2015).

    Evaluation: short side to 256/224 of `image_size`, centre crop.
    """
    if not train:
        short_side = round(image_size * 256 / 224)
        geometry = functools.partial(_resize_and_center_crop, short_side=short_side, image_size=image_size)
        return Steps(geometry, whole=short_side)
    A = _albumentations()
    size = (image_size, image_size)
    crop = A.RandomResizedCrop(size, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), area_for_downscale="image")
    return Steps(_unchanged, [crop, A.HorizontalFlip(p=0.5)])


def inception_crop_randaugment(image_size: int, train: bool) -> Steps:
    """ImageNet recipe with RandAugment (N = 2, M = 9 of 30): the "optimized" recipes of Cherti & Jitsev 2022.

    `inception_crop`, then torchvision's RandAugment with its own defaults. Their code applies the operations of
    pytorch-randaugment to the photo before the crop, M on the same scale of 30; there translations are in pixels
    (up to 100), and Invert, SolarizeAdd and Cutout are among the operations instead of Identity.
    """
    steps = inception_crop(image_size, train)
    return steps._replace(finish=[RandAugment(9, 30)]) if train else steps


def entezari2023(image_size: int, train: bool) -> Steps:
    """Fine-tuning recipe of Entezari et al. 2023: inception crop, RandAugment m9, random erasing with 0.25.

    Their code calls timm with `rand-m9-mstd0.5-inc1`, erasing mode "pixel" and bicubic crops: two operations, each
    applied with probability 0.5 at a magnitude of 9 ± 0.5 of 10 (three times the strength of torchvision's 9 of
    30), bilinear or bicubic, with ImageNet's mean colour outside. Here these are torchvision's operations, always
    bilinear: Identity is among them, Invert and SolarizeAdd are not, and posterising keeps 4 bits instead of 1.
    Evaluation: short side to 256/224 of `image_size`, centre crop.
    """
    steps = inception_crop(image_size, train)
    if not train:
        return steps
    red, green, blue = np.rint(IMAGENET_MEAN).tolist()
    augment = RandAugment(9, 10, magnitude_std=0.5, probability=0.5, interpolation="bilinear", fill=(red, green, blue))
    return steps._replace(finish=[augment, RandomErasing(0.25)])


def resize_center(image_size: int, train: bool) -> Steps:
    """No augmentation: short side to `image_size`, centre crop, in training and evaluation."""
    geometry = functools.partial(_resize_and_center_crop, short_side=image_size, image_size=image_size)
    return Steps(geometry, whole=image_size)


def chest_xray(image_size: int, train: bool) -> Steps:
    """Radiographs, safe default: pad to a square with black, resize; small changes and never a flip.

    A flip would put the heart on the right. Training: rotation up to 10 degrees, shift and scale up to 5 %,
    brightness and contrast up to 10 %.
    """
    geometry = functools.partial(_pad_to_square, image_size=image_size)
    if not train:
        return Steps(geometry, whole=image_size)
    A = _albumentations()
    changes = [
        _affine(shift=0.05, scale=0.05, rotate=10),
        A.RandomBrightnessContrast(brightness_limit=0.1, contrast_limit=0.1, p=1.0),
    ]
    return Steps(geometry, changes, whole=image_size)


def chest_xray_cherti2022(image_size: int, train: bool) -> Steps:
    """Radiographs as in Cherti & Jitsev 2022 (their code): centre-crop to a square, resize; strong affine.

    Training: shift up to 25 %, scale up to 10 %, rotation up to 45 degrees, horizontal flip. For reproduction
    only: the flip mirrors the anatomy.
    """
    geometry = functools.partial(_center_square, image_size=image_size)
    if not train:
        return Steps(geometry, whole=image_size)
    A = _albumentations()
    return Steps(geometry, [_affine(shift=0.25, scale=0.1, rotate=45), A.HorizontalFlip(p=0.5)], whole=image_size)


def simclr(image_size: int, train: bool) -> Steps:
    """SimCLR's views for photos: crop of 8-100 % of the area, flip, colour jitter, grey, blur.

    Chen et al. 2020 (arXiv 2002.05709, appendix A) at strength s = 1: brightness, contrast and saturation 0.8, hue
    0.2, in random order with probability 0.8; grey with 0.2; blur with 0.5. Grey images keep to brightness and
    contrast. Crop and filter are torchvision's, not those of `inception_crop`. Evaluation: as `inception_crop`.
    """
    if not train:
        return inception_crop(image_size, train)
    jitter = ColourJitter(0.8, 0.8, 0.8, 0.2)
    crop = RandomResizedCrop(image_size)
    return Steps(_unchanged, finish=[crop, RandomFlip(), jitter, RandomGrey(), RandomGaussianBlur()])


def simclr_cifar(image_size: int, train: bool) -> Steps:
    """SimCLR's views for images of 32 px: `simclr` without blur and at half its strength of colour (appendix B.9).

    Evaluation: as `resize_center`.
    """
    if not train:
        return resize_center(image_size, train)
    jitter = ColourJitter(0.4, 0.4, 0.4, 0.1)
    return Steps(_unchanged, finish=[RandomResizedCrop(image_size), RandomFlip(), jitter, RandomGrey()])


def simclr_chest_xray(image_size: int, train: bool) -> Steps:
    """SimCLR's views for radiographs, our own choice: crop of 30-100 % of the area, rotation, light, blur.

    A view must keep what it is to be recognised by. A flip would put the heart on the right; a crop of 8 % often
    shows ribs only, and two of them seldom overlap. Rotation up to 10 degrees is what positioning leaves. Exposure
    and window differ between hospitals, hence brightness and contrast by up to 0.4 with probability 0.8, half of the
    paper's as in its half strength: density is a finding. There is no colour to change; blur is the paper's.
    Evaluation: as `chest_xray`.
    """
    if not train:
        return chest_xray(image_size, train)
    crop = RandomResizedCrop(image_size, smallest=0.3)
    return Steps(_unchanged, finish=[crop, RandomRotation(10), ColourJitter(0.4, 0.4), RandomGaussianBlur()])


POLICIES: Mapping[str, Policy] = {
    "bit": bit,
    "bit_square": bit_square,
    "inception_crop": inception_crop,
    "inception_crop_randaugment": inception_crop_randaugment,
    "entezari2023": entezari2023,
    "resize_center": resize_center,
    "chest_xray": chest_xray,
    "chest_xray_cherti2022": chest_xray_cherti2022,
    "simclr": simclr,
    "simclr_cifar": simclr_cifar,
    "simclr_chest_xray": simclr_chest_xray,
}


@functools.cache
def _albumentations() -> ModuleType:
    """Import albumentations (2 s) for the first augmentation, without its call to a package registry."""
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    return importlib.import_module("albumentations")


@functools.cache
def _opencv() -> ModuleType:
    import cv2

    return cv2


def _affine(*, shift: float, scale: float, rotate: float) -> Any:
    """Shift (fraction of the side), scale (both axes alike) and rotate (degrees); black outside."""
    return _albumentations().Affine(
        translate_percent=(-shift, shift),
        scale=(1 - scale, 1 + scale),
        keep_ratio=True,
        rotate=(-rotate, rotate),
        p=1.0,
    )


def _unchanged(image: Image) -> Image:
    return image


def _resize(image: Image, height: int, width: int) -> Image:
    """Resize (H, W, C) to (height, width, C): area averages if a side shrinks, bilinear otherwise."""
    if image.shape[:2] == (height, width):
        return image
    cv2 = _opencv()
    shrinks = height < image.shape[0] or width < image.shape[1]
    resized: Image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    # OpenCV drops the axis of a single channel.
    return resized if resized.ndim == 3 else resized[:, :, None]


def _scale(image: Image, factor: float) -> Image:
    height, width = image.shape[:2]
    return _resize(image, max(1, round(height * factor)), max(1, round(width * factor)))


def _resize_short_side(image: Image, *, short_side: int) -> Image:
    return _scale(image, short_side / min(image.shape[:2]))


def _center_crop(image: Image, height: int, width: int) -> Image:
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    return image[top : top + height, left : left + width]


def _resize_and_center_crop(image: Image, *, short_side: int, image_size: int) -> Image:
    return _center_crop(_resize_short_side(image, short_side=short_side), image_size, image_size)


def _center_square(image: Image, *, image_size: int) -> Image:
    """Centre-crop to a square of the short side, then resize."""
    side = min(image.shape[:2])
    return _resize(_center_crop(image, side, side), image_size, image_size)


def _pad_to_square(image: Image, *, image_size: int) -> Image:
    """Resize the long side to `image_size` and centre on black: padding first would move more pixels."""
    resized = _scale(image, image_size / max(image.shape[:2]))
    height, width, channels = resized.shape
    if height == width:
        return resized
    square = np.zeros((image_size, image_size, channels), np.uint8)
    top, left = (image_size - height) // 2, (image_size - width) // 2
    square[top : top + height, left : left + width] = resized
    return square


def _channels_first(image: Image) -> Image:
    """Copy (H, W, C) to a contiguous (C, H, W)."""
    height, width, channels = image.shape
    if channels == 1:
        return image.reshape(1, height, width).copy()
    planes = np.empty((channels, height, width), np.uint8)
    # Three to five times as fast as a transposed copy.
    _opencv().split(image, list(planes))
    return planes
