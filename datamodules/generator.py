"""Controlled images: an endless labelled data set, computed instead of read, and dials for what two tasks share.

A latent feature (`datamodules.hidden_manifold`) shows as its generative direction, a motif of Gabor patches that lies
somewhere in the image (`datamodules.rendering`). Every number is a hash of (seed, purpose, index), so image i is the
same whatever else is drawn.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from datamodules.errors import DataError
from datamodules.hidden_manifold import HiddenManifold, check_choice, checked_index
from datamodules.random_numbers import Floats, Ints, normal, uniform
from datamodules.rendering import SCENE, STYLES, Look, Patches, polar, random_patches, rotate

PARTS = 3  # Gabor patches in a motif
CLUTTER = 2  # patches in an image that belong to no latent feature
CHUNK = 64  # images rendered at a time: bounds memory, fits the cache at 32 px


@dataclass(frozen=True)
class ImageGenerator(HiddenManifold):
    """Images of the latent features of a `HiddenManifold`, whose arguments come first.

    In the natural look a motif lies anywhere; in the radiograph it has a home, as findings have. The looks of one
    `seed` share the geometry of the motifs.

    Args:
        look: "natural" (colour scenes, 3 channels) or "radiograph" (a grey chest, 1 channel).
        image_size: Height and width in pixels, at least 8. A world looks the same at every size; its waves of
            up to about 5 cycles in an image width need 16 px.

    Raises:
        DataError: An argument out of range.
    """

    look: Look = "natural"
    image_size: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("look", self.look, get_args(Look))
        if self.image_size < 8:
            raise DataError(f"image_size {self.image_size} is too small", where="image_size", valid="8 or more")

    @cached_property
    def directions(self) -> Patches:
        """Generative direction of every latent feature: a motif of patches (D, PARTS) around the origin."""
        style = STYLES[self.look]
        patches = random_patches(self._direction_draws("direction", PARTS, 9), style.channels)
        return patches._replace(centre=0.2 * (patches.centre - 0.5), colour=style.contrast * patches.colour)

    @cached_property
    def homes(self) -> Floats:
        """Where in the field each generative direction is at home: (D, 2) in [0, 1), x before y."""
        return self._direction_draws("home", 2)

    def images(self, index: Ints) -> NDArray[np.uint8]:
        """Render images: uint8 (n, image_size, image_size, C).

        Args:
            index: Which images, int64 (n,), 0 or more.

        Raises:
            DataError: An index that is negative or no integer, or an array that is not flat.
        """
        index, size = checked_index(index), self.image_size
        images = np.empty((len(index), size, size, STYLES[self.look].channels), np.uint8)
        for start in range(0, len(index), CHUNK):
            images[start : start + CHUNK] = self._render(index[start : start + CHUNK])
        return images

    def _render(self, index: Ints) -> NDArray[np.uint8]:
        style, size = STYLES[self.look], self.image_size
        scene = style.scene(self._uniform("scene", index, SCENE, 9))
        layers = (scene, self._clutter(index), self._motifs(index))
        patches = Patches(*(np.concatenate(parts, axis=1) for parts in zip(*layers, strict=True)))
        gain = 0.75 + 0.5 * self._uniform("gain", index, 1, 1)
        image = patches._replace(colour=gain * patches.colour).render(size)
        noise = normal(self.seed, f"{self.role} noise", index, size * size * style.channels)
        noise *= style.noise
        noise += style.base
        image += noise.reshape(image.shape)
        np.rint(image, out=image)
        return image.clip(0, 255, out=image).astype(np.uint8)

    def _clutter(self, index: Ints) -> Patches:
        style = STYLES[self.look]
        patches = random_patches(self._uniform("clutter", index, CLUTTER, 9), style.channels)
        return patches._replace(centre=style.place(patches.centre), colour=style.contrast * patches.colour)

    def _motifs(self, index: Ints) -> Patches:
        style, latents = STYLES[self.look], self.latents(index)
        present = latents > 0
        order = (~present).argsort(axis=1, kind="stable")[:, : present.sum(1).max()]  # draw no absent feature
        draws = np.take_along_axis(self._uniform("motif", index, self.num_features, 4), order[..., None], 1)
        strength = np.take_along_axis(latents, order, 1)
        motif = Patches(*(part[order] for part in self.directions))  # (n, features, PARTS, ...)
        place = style.roam * draws[..., :2] + (1 - style.roam) * self.homes[order]
        turn = polar(0.06 * (draws[..., 2:3] - 0.5), 0.9 + 0.2 * draws[..., 3:4])
        motif = motif._replace(
            centre=style.place(place)[..., None, :] + rotate(motif.centre, turn),
            frequency=rotate(motif.frequency, turn),
            colour=motif.colour * strength[..., None, None],
        )
        return Patches(*(part.reshape(len(index), order.shape[1] * PARTS, *part.shape[3:]) for part in motif))

    def _direction_draws(self, purpose: str, *shape: int) -> Floats:
        """Draws behind the generative directions (D, *shape): the source's where shared, else the task's own."""
        index = np.arange(self.num_features)
        source, own = (uniform(self.seed, f"{role} {purpose}", index, *shape) for role in ("source", self.role))
        return np.where(self.source_directions.reshape(-1, *[1] * len(shape)), source, own)
