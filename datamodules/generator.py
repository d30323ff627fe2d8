"""Controlled images: classes made of hidden features, and a dial for how much two tasks have in common.

After the correlated hidden manifold model (Gerace et al., arXiv 2106.05418): a world draws latent features,
each with a generative direction (here a motif of Gabor patches); a label rule over the features makes a task.
A target task shares a fraction of the source's generative directions and has a label rule of its own.

Every number is a hash of (seed, purpose, index): SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), one stream
an index. So image i is the same whatever else is drawn, and rendering is vectorised over a batch of indices.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import comb
from statistics import NormalDist
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from datamodules.errors import DataError, closest

Task = Literal["multiclass", "binary", "multilabel"]
Role = Literal["source", "target"]
Look = Literal["natural", "radiograph"]
Floats = NDArray[np.float64]  # in float32 the number of threads of the matrix product would change pixels
Ints = NDArray[np.int64]
Words = NDArray[np.uint64]

CODE = 4  # latent features that are on in a class
FLIP = 0.03  # chance that a latent feature differs from its class's code
STRAY = 0.12  # chance of a latent feature that no label uses
PREVALENCE = (0.4, 0.1)  # of the first and the last label
PARTS = 3  # Gabor patches in a motif
CLUTTER = 2  # patches in an image that belong to no latent feature
CHUNK = 64  # images rendered at a time: bounds memory, fits the cache at 32 px
GOLDEN = 0x9E3779B97F4A7C15  # SplitMix64's increment, 2**64 / golden ratio
NORMAL = np.array([NormalDist().inv_cdf((i + 0.5) / 256) for i in range(256)])


def _mix(words: Words) -> Words:
    """SplitMix64's output function."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def random_words(seed: int, purpose: str, index: Ints, count: int) -> Words:
    """Draw `count` random words for every index: uint64 (n, count), a pure function of its arguments."""
    key = np.array([seed % 2**64, zlib.crc32(purpose.encode())], np.uint64)
    streams = _mix(_mix(_mix(key[:1]) + key[1:]) + index.astype(np.uint64) * np.uint64(GOLDEN))
    return _mix(streams[:, None] + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(GOLDEN))


def uniform(seed: int, purpose: str, index: Ints, *shape: int) -> Floats:
    """Draw uniform numbers in [0, 1) for every index: float64 (n, *shape)."""
    words = random_words(seed, purpose, index, int(np.prod(shape)))
    return ((words >> np.uint64(11)).astype(np.float64) * 2.0**-53).reshape(len(index), *shape)


def normal(seed: int, purpose: str, index: Ints, count: int) -> Floats:
    """Draw standard normal numbers, quantised to 256 values, for every index: float64 (n, count)."""
    words = random_words(seed, purpose, index, -(-count // 8))
    return NORMAL[words.astype("<u8").view(np.uint8)[:, :count]]


class Patches(NamedTuple):
    """Gabor patches: gaussian envelopes times cosine waves. Lengths in image widths, x before y."""

    centre: Floats  # (..., 2)
    width: Floats  # (..., 2), standard deviation of the envelope
    frequency: Floats  # (..., 2), cycles in an image width
    phase: Floats  # (...), in cycles
    colour: Floats  # (..., C), amplitude in grey levels

    def render(self, size: int) -> Floats:
        """Sum the patches (n, K) of every image: float64 (n, size, size, C).

        A Gabor patch is the real part of a column times a row, so the sum over patches is one matrix product.
        """
        ticks = (np.arange(size) + 0.5) / size
        away = ticks - self.centre[..., None]  # (n, K, 2, size)
        envelope = np.exp(-0.5 * (away / self.width[..., None]) ** 2)
        angle = away * self.frequency[..., None]
        angle[..., 0, :] += self.phase[..., None]
        angle *= 2 * np.pi
        waves = np.stack([np.cos(angle), np.sin(angle)], axis=1) * envelope[:, None]  # (n, 2, K, 2, size)
        n, patches, channels = self.colour.shape
        columns, rows = waves[..., 1, :], waves[..., 0, :]
        rows = rows[..., None] * self.colour[:, None, :, None, :]
        rows[:, 1] *= -1  # Re(a·b) = Re a·Re b − Im a·Im b
        columns = columns.reshape(n, 2 * patches, size).transpose(0, 2, 1)
        image: Floats = columns @ rows.reshape(n, 2 * patches, size * channels)
        return image.reshape(n, size, size, channels)


def polar(turns: Floats, length: Floats) -> Floats:
    """Vectors (..., 2) of a given direction, in turns, and length."""
    angle = 2 * np.pi * turns
    return np.stack([np.cos(angle), np.sin(angle)], axis=-1) * length[..., None]


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


STYLES = {
    "natural": Style(3, 128, 112, 10, (0.15, 0.15, 0.7, 0.7), 1.0, natural_scene),
    "radiograph": Style(1, 8, 55, 4, (0.18, 0.2, 0.64, 0.55), 0.25, chest),
}


@dataclass(frozen=True)
class ImageGenerator:
    """An endless labelled data set, computed instead of read.

    Source and target of one `seed` belong together: `round(similarity * num_features)` generative directions
    of the target are the source's, the rest are its own. Labels, positions and noise do not depend on
    `similarity`, and a more similar target keeps what a less similar one shares, so that comparisons between
    similarities are paired. In the natural look a motif lies anywhere; in the radiograph it has a home, as
    findings have. The looks of one `seed` share the geometry of the motifs.

    Multi-class: a class is a code of 4 latent features, each of which may flip. Binary (one label) and
    multi-label: a label is the presence of one latent feature, with prevalences from 40 % (first label) to
    10 % (last); the other features come and go.

    Args:
        num_classes: Classes, at least 2 for multi-class; labels for multi-label; 1 for binary.
        task: The kind of labels.
        seed: Which world.
        role: The source task, or the target task that shares directions with it.
        similarity: Share of the target's directions that are the source's, in [0, 1]; a source has 1.
        look: "natural" (colour scenes, 3 channels) or "radiograph" (a grey chest, 1 channel).
        image_size: Height and width in pixels, at least 8. A world looks the same at every size; its waves of
            up to about 5 cycles in an image width need 16 px.
        num_features: Latent features D of the task.

    Raises:
        DataError: An argument out of range.
    """

    num_classes: int = 10
    task: Task = "multiclass"
    seed: int = 0
    role: Role = "source"
    similarity: float = 1.0
    look: Look = "natural"
    image_size: int = 32
    num_features: int = 20

    def __post_init__(self) -> None:
        for name, kind in (("task", Task), ("role", Role), ("look", Look)):
            value, valid = getattr(self, name), get_args(kind)
            if value not in valid:
                raise DataError(
                    f"{value!r} is no {name}",
                    where=name,
                    valid=valid,
                    hint=f"did you mean {closest(value, valid)!r}?",
                )
        if not 0 <= self.similarity <= 1:
            raise DataError(f"similarity {self.similarity} is out of range", where="similarity", valid="0 to 1")
        if self.role == "source" and self.similarity != 1:
            raise DataError(
                f"a source task has no similarity {self.similarity}: it shares everything with itself",
                where="similarity",
                valid="1 for role 'source', 0 to 1 for role 'target'",
                hint="set role: target",
            )
        if self.image_size < 8:
            raise DataError(f"image_size {self.image_size} is too small", where="image_size", valid="8 or more")
        if self.num_features < CODE + 1:
            raise DataError(
                f"num_features {self.num_features} is too small",
                where="num_features",
                valid=f"{CODE + 1} or more",
            )
        low, high = {
            "multiclass": (2, comb(self.num_features, CODE) // 2),
            "binary": (1, 1),
            "multilabel": (1, self.num_features),
        }[self.task]
        if not low <= self.num_classes <= high:
            raise DataError(
                f"num_classes {self.num_classes} does not suit {self.task} with {self.num_features} features",
                where="num_classes",
                valid=f"{low} to {high}",
                hint="change num_classes or raise num_features",
            )

    @cached_property
    def codes(self) -> NDArray[np.bool_]:
        """Which latent features are on in a class or for a label: bool (num_classes, D), the label rule."""
        classes, features = self.num_classes, self.num_features
        if self.task != "multiclass":
            order = self._uniform("code", np.arange(1), features)[0].argsort(kind="stable")
            findings: NDArray[np.bool_] = order[:classes, None] == np.arange(features)
            return findings
        codes = np.zeros((classes, features))  # as floats, whose matrix products are fast
        rank = self._uniform("code", np.arange(classes), 64, features).argsort(-1, kind="stable")
        candidates = np.zeros(rank.shape)
        np.put_along_axis(candidates, rank[..., :CODE], 1, axis=-1)
        for row in range(classes):  # take the candidate least like any earlier class, then least like all
            overlap = candidates[row] @ codes[:row].T
            likeness = overlap.max(-1, initial=0) * (CODE * row + 1) + overlap.sum(-1)
            codes[row] = candidates[row, likeness.argmin()]
        return codes > 0

    @cached_property
    def shared(self) -> NDArray[np.bool_]:
        """Which generative directions are the source's: bool (D,)."""
        return np.arange(self.num_features) < round(self.similarity * self.num_features)

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

    def labels(self, index: Ints) -> Ints | NDArray[np.float32]:
        """Labels of the images, without rendering them.

        Classes are balanced exactly: every num_classes images, counted from image 0, hold each class once.

        Args:
            index: Which images, int64 (n,), 0 or more.

        Returns:
            int64 (n,) for multi-class; float32 (n, num_classes) of 1 / 0 for binary and multi-label.

        Raises:
            DataError: An index that is negative or no integer, or an array that is not flat.
        """
        index = _checked(index)
        if self.task == "multiclass":
            block, place = np.divmod(index, self.num_classes)
            turn = self._uniform("label", block, 1)[:, 0] * self.num_classes
            return (place + turn.astype(np.int64)) % self.num_classes
        prevalence = np.linspace(*PREVALENCE, self.num_classes)
        return (self._uniform("label", index, self.num_classes) < prevalence).astype(np.float32)

    def latents(self, index: Ints) -> NDArray[np.float32]:
        """Latent features of the images: float32 (n, D), 0 = absent, else the strength, 0.7 to 1.3."""
        index = _checked(index)
        labels = self.labels(index)
        if self.task == "multiclass":
            coded, flip = self.codes[labels.astype(np.int64)], np.full(self.num_features, FLIP)
        else:
            coded, flip = labels @ self.codes > 0, np.where(self.codes.any(0), 0, STRAY)
        draws = self._uniform("latent", index, 2, self.num_features)
        return ((coded ^ (draws[:, 0] < flip)) * (0.7 + 0.6 * draws[:, 1])).astype(np.float32)

    def images(self, index: Ints) -> NDArray[np.uint8]:
        """Render images: uint8 (n, image_size, image_size, C).

        Args:
            index: Which images, int64 (n,), 0 or more.

        Raises:
            DataError: An index that is negative or no integer, or an array that is not flat.
        """
        index, size = _checked(index), self.image_size
        images = np.empty((len(index), size, size, STYLES[self.look].channels), np.uint8)
        for start in range(0, len(index), CHUNK):
            images[start : start + CHUNK] = self._render(index[start : start + CHUNK])
        return images

    def _render(self, index: Ints) -> NDArray[np.uint8]:
        style, size = STYLES[self.look], self.image_size
        scene = style.scene(self._uniform("scene", index, SCENE, 9))
        layers = (scene, self._clutter(index), self._motifs(index))
        patches = Patches(*(np.concatenate(parts, axis=1) for parts in zip(*layers, strict=True)))
        gain = 0.75 + 0.5 * self._uniform("gain", index, 1, 1, 1)
        noise = normal(self.seed, f"{self.role} noise", index, size * size * style.channels)
        image = style.base + gain * patches.render(size)
        image += style.noise * noise.reshape(image.shape)
        pixels: NDArray[np.uint8] = np.rint(image.clip(0, 255)).astype(np.uint8)
        return pixels

    def _clutter(self, index: Ints) -> Patches:
        style = STYLES[self.look]
        patches = random_patches(self._uniform("clutter", index, CLUTTER, 9), style.channels)
        return patches._replace(centre=self._place(patches.centre), colour=style.contrast * patches.colour)

    def _motifs(self, index: Ints) -> Patches:
        latents = self.latents(index)
        present = latents > 0
        order = (~present).argsort(axis=1, kind="stable")[:, : present.sum(1).max()]  # draw no absent feature
        draws = np.take_along_axis(self._uniform("motif", index, self.num_features, 4), order[..., None], 1)
        strength = np.take_along_axis(latents, order, 1)
        motif = Patches(*(part[order] for part in self.directions))  # (n, features, PARTS, ...)
        roam = STYLES[self.look].roam
        place = roam * draws[..., :2] + (1 - roam) * self.homes[order]
        turn = polar(0.06 * (draws[..., 2:3] - 0.5), 0.9 + 0.2 * draws[..., 3:4])
        motif = motif._replace(
            centre=self._place(place)[..., None, :] + _rotate(motif.centre, turn),
            frequency=_rotate(motif.frequency, turn),
            colour=motif.colour * strength[..., None, None],
        )
        return Patches(*(part.reshape(len(index), order.shape[1] * PARTS, *part.shape[3:]) for part in motif))

    def _place(self, draws: Floats) -> Floats:
        left, top, width, height = STYLES[self.look].field
        placed: Floats = draws * (width, height) + (left, top)
        return placed

    def _direction_draws(self, purpose: str, *shape: int) -> Floats:
        """Draws behind the generative directions (D, *shape): the source's where shared, else the task's own."""
        index = np.arange(self.num_features)
        source, own = (uniform(self.seed, f"{role} {purpose}", index, *shape) for role in ("source", self.role))
        return np.where(self.shared.reshape(-1, *[1] * len(shape)), source, own)

    def _uniform(self, purpose: str, index: Ints, *shape: int) -> Floats:
        return uniform(self.seed, f"{self.role} {purpose}", index, *shape)


def _rotate(vectors: Floats, turn: Floats) -> Floats:
    """Rotate and scale vectors (..., 2) by the complex numbers `turn` (..., 2)."""
    x, y, c, s = vectors[..., 0], vectors[..., 1], turn[..., 0], turn[..., 1]
    rotated: Floats = np.stack([c * x - s * y, s * x + c * y], axis=-1)
    return rotated


def _checked(index: Ints) -> Ints:
    index = np.asarray(index)
    if index.ndim != 1 or not (np.issubdtype(index.dtype, np.integer) or index.size == 0):
        raise DataError(
            f"index of type {index.dtype} and shape {index.shape}",
            where="index",
            valid="integers of shape (n,)",
        )
    if (index < 0).any():
        raise DataError(f"image {index.min()} does not exist", where="index", valid="0 or more")
    return index.astype(np.int64)
