"""How hidden features look: Gabor patches before a colour scene or a grey chest, with noise.

Patches are summed by one matrix product an image, in float32 and in fixed point: every factor is rounded so that all
products and sums are exact, and the pixels do not depend on the order of summation, which differs between numbers of
threads and between processors.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from datamodules.random_numbers import Floats

Look = Literal["natural", "radiograph"]
Pixels = NDArray[np.float32]

# Steps of the fixed point, per unit of a wave and per grey level. Products are multiples of 1/4096 of a grey level, and
# float32 adds multiples of 1/4096 without error up to 4,096: 20 patches at full contrast upon one another.
WAVE_STEPS, GREY_STEPS = 256, 16


class Patches(NamedTuple):
    """Gabor patches: gaussian envelopes times cosine waves. Lengths in image widths, x before y."""

    centre: Floats  # (..., 2)
    width: Floats  # (..., 2), standard deviation of the envelope
    frequency: Floats  # (..., 2), cycles in an image width
    phase: Floats  # (...), in cycles
    colour: Floats  # (..., C), amplitude in grey levels

    def render(self, size: int) -> Pixels:
        """Sum the patches (n, K) of every image: grey levels, float32 (n, size, size, C), off by about 0.1.

        A Gabor patch is the real part of a column times a row, so the sum over patches is one matrix product.
        """
        ticks = (np.arange(size, dtype=np.float32) + np.float32(0.5)) / np.float32(size)
        away = ticks - _axis_first(self.centre)  # (2, n, K, size)
        envelope = away * _axis_first(np.sqrt(0.5) / self.width)
        envelope = np.exp(-envelope * envelope) * WAVE_STEPS
        away *= _axis_first(2 * np.pi * self.frequency)
        away[0] += (2 * np.pi * self.phase[..., None]).astype(np.float32)
        cosine, sine = np.cos(away) * envelope, np.sin(away) * envelope
        columns = np.rint(np.concatenate([cosine[1], sine[1]], axis=1))
        waves = np.concatenate([cosine[0], -sine[0]], axis=1)  # Re(a·b) = Re a·Re b − Im a·Im b
        amplitude = np.tile(self.colour.astype(np.float32) * (GREY_STEPS / WAVE_STEPS), (1, 2, 1))
        rows = np.empty((*waves.shape, amplitude.shape[-1]), np.float32)
        for channel in range(rows.shape[-1]):
            np.multiply(waves, amplitude[..., channel, None], out=rows[..., channel])
        np.rint(rows, out=rows)
        image: Pixels = columns.transpose(0, 2, 1) @ rows.reshape(*rows.shape[:2], -1)
        image *= 1 / (WAVE_STEPS * GREY_STEPS)
        return image.reshape(len(image), size, size, -1)


def _axis_first(vectors: Floats) -> Pixels:
    """Vectors (n, K, 2) as float32 (2, n, K, 1)."""
    return np.moveaxis(vectors, -1, 0)[..., None].astype(np.float32)


def polar(turns: Floats, length: Floats) -> Floats:
    """Vectors (..., 2) of a given direction, in turns, and length."""
    angle = 2 * np.pi * turns
    return np.stack([np.cos(angle), np.sin(angle)], axis=-1) * length[..., None]


def rotate(vectors: Floats, turn: Floats) -> Floats:
    """Rotate and scale vectors (..., 2) by the complex numbers `turn` (..., 2)."""
    x, y, c, s = vectors[..., 0], vectors[..., 1], turn[..., 0], turn[..., 1]
    rotated: Floats = np.stack([c * x - s * y, s * x + c * y], axis=-1)
    return rotated


def random_patches(draws: Floats, channels: int) -> Patches:
    """Turn uniform draws (..., 9) into patches some quarter of an image wide, with colours of length 1."""
    width = np.repeat(0.055 + 0.03 * draws[..., 2:3], 2, axis=-1)
    frequency = polar(draws[..., 3] / 2, 2 + 3 * draws[..., 4])
    colour = 2 * draws[..., 6 : 6 + channels] - 1
    colour /= np.sqrt((colour**2).sum(-1, keepdims=True) + 1e-6)
    return Patches(draws[..., :2], width, frequency, draws[..., 5], colour)


def natural_scene(draws: Floats) -> Patches:
    """Soft colour gradients and shapes: (n, SCENE) patches from uniform draws (n, SCENE, 9)."""
    width = 0.2 + 0.3 * draws[..., 2:4]
    frequency = polar(draws[..., 4] / 2, 1.2 * draws[..., 5])
    return Patches(draws[..., :2], width, frequency, np.zeros_like(draws[..., 0]), 80 * draws[..., 6:9] - 40)


# x, y, width in x, width in y, frequency in x, frequency in y, grey levels
ANATOMY = np.array(
    [
        [0.50, 0.62, 0.32, 0.52, 0, 0, 180],  # body
        [0.29, 0.45, 0.10, 0.19, 0, 0, -100],  # lungs
        [0.71, 0.45, 0.10, 0.19, 0, 0, -100],
        [0.50, 0.45, 0.04, 0.60, 0, 0, 40],  # spine
        [0.57, 0.62, 0.08, 0.09, 0, 0, 60],  # heart
        [0.28, 0.97, 0.18, 0.10, 0, 0, 40],  # diaphragm
        [0.72, 0.99, 0.18, 0.10, 0, 0, 40],
        [0.27, 0.42, 0.11, 0.20, -1.5, 9, 14],  # ribs
        [0.73, 0.42, 0.11, 0.20, 1.5, 9, 14],
    ]
)


def chest(draws: Floats) -> Patches:
    """A chest that varies in place, size and density: (n, SCENE) patches from uniform draws (n, SCENE, 9)."""
    parts = np.broadcast_to(ANATOMY, (len(draws), *ANATOMY.shape))
    vary = 2 * draws - 1
    return Patches(
        parts[..., 0:2] + 0.025 * vary[..., 0:2],
        parts[..., 2:4] * (1 + 0.12 * vary[..., 2:4]),
        parts[..., 4:6],
        0.1 * vary[..., 4],
        parts[..., 6:7] * (1 + 0.15 * vary[..., 5:6]),
    )


SCENE = len(ANATOMY)  # patches behind the motifs


class Style(NamedTuple):
    """What a look draws with and around the motifs; grey levels from 0 to 255."""

    channels: int
    base: float  # grey level under everything
    contrast: float  # of a motif's patches, in grey levels
    noise: float  # standard deviation, in grey levels
    field: tuple[float, float, float, float]  # where motifs lie: left, top, width, height, in image widths
    roam: float  # share of the field that one motif roams: 1 = it may lie anywhere
    scene: Callable[[Floats], Patches]  # uniform draws (n, SCENE, 9) -> patches behind the motifs

    def place(self, draws: Floats) -> Floats:
        """Points of the field (..., 2), in image widths, from draws in [0, 1)."""
        left, top, width, height = self.field
        placed: Floats = draws * (width, height) + (left, top)
        return placed


STYLES = {
    "natural": Style(3, 128, 112, 10, (0.15, 0.15, 0.7, 0.7), 1.0, natural_scene),
    "radiograph": Style(1, 8, 55, 4, (0.18, 0.2, 0.64, 0.55), 0.25, chest),
}
