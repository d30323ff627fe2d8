"""One image of a data set, encoded for a prepared folder: shrunk by area, as JPEG or as pixels."""

from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from datamodules.base import BaseDataModule
from datamodules.errors import DataError, UnreadableImageError
from datamodules.io import Image

ORIENTATION = 0x0112  # EXIF tag; 1 = upright

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Recipe:
    """How images are prepared.

    Attributes:
        short_side: Pixels of the short side; larger images are averaged down to it, none is enlarged.
        quality: JPEG quality, 1–100; colour is stored 4:2:0, grey with one channel.
        raw: One uint8 array in place of JPEG in shards, for small images of one shape.
        shard_mb: Size of a shard, about, in 10⁶ bytes.
    """

    short_side: int = 320
    quality: int = 90
    raw: bool = False
    shard_mb: float = 256

    def __post_init__(self) -> None:
        limits = (("short_side", 8, 65_500), ("quality", 1, 100), ("shard_mb", 0.001, 100_000))
        for name, low, high in limits:
            value = getattr(self, name)
            if not low <= value <= high:
                raise DataError(
                    f"{name}: {value} is out of range", where=f"--{name.replace('_', '-')}", valid=f"{low} to {high}"
                )


class Encoded(NamedTuple):
    """One image: its bytes ("" where it could not be read or stored, and why), and the bytes of its original."""

    content: bytes
    reason: str
    before: int


class Encoder:
    """Reads rows of a data set and encodes them; handed to the processes.

    Args:
        datamodule: Reads the images.
        recipe: How they are prepared.
        shape: (H, W, C) that every image of an array must have; None for JPEG.
    """

    def __init__(self, datamodule: BaseDataModule, recipe: Recipe, shape: tuple[int, ...] | None) -> None:
        self.datamodule, self.recipe, self.shape = datamodule, recipe, shape

    def __call__(self, rows: Rows) -> list[Encoded]:
        """Encode some rows; an unreadable image is an entry without bytes."""
        return [self.encode(int(row)) for row in rows]

    def encode(self, row: int) -> Encoded:
        """Encode one row.

        Raises:
            DataError: The image's shape is not that of the array, or it needs a window.
        """
        try:
            image = self.datamodule.read_images([row])[0]
        except UnreadableImageError as error:
            return Encoded(b"", error.problem, 0)
        source = source_bytes(self.datamodule, row)
        before = image.nbytes if source is None else len(source)
        if self.shape is None:
            content = encode_jpeg(image, source, self.recipe)
            if not content:
                height, width = image.shape[:2]
                return Encoded(b"", f"a JPEG cannot hold {width} x {height} pixels", 0)
            return Encoded(content, "", before)
        image = shrink(image, self.recipe.short_side)
        if image.shape != self.shape:
            raise DataError(
                f"one array needs images of one shape: {self.datamodule.raw_table.paths[row]} is {image.shape}, the "
                f"first is {self.shape}",
                where=str(self.datamodule.root),
                hint="leave out --raw: shards hold images of any shape",
            )
        return Encoded(image.tobytes(), "", before)


def source_bytes(datamodule: BaseDataModule, row: int) -> bytes | None:
    """Content of an image's file, or of its member in a shard; None where it has neither."""
    own: Callable[[int], bytes] | None = getattr(datamodule, "image_bytes", None)
    if own is not None:
        return own(row)
    file = datamodule.image_files(np.asarray([row]))[0]
    return file[0].read_bytes() if file is not None else None


def shrink(image: Image, short_side: int) -> Image:
    """Average areas until the short side has `short_side` pixels; a smaller image stays as it is."""
    import cv2

    height, width, channels = image.shape
    side = min(height, width)
    if side <= short_side:
        return image
    size = max(1, round(width * short_side / side)), max(1, round(height * short_side / side))
    shrunk: Image = cv2.resize(image, size, interpolation=cv2.INTER_AREA).reshape(size[1], size[0], channels)
    return shrunk


def encode_jpeg(image: Image, source: bytes | None, recipe: Recipe) -> bytes:
    """Encode an image, uint8 (H, W, 1 or 3), or take its original's bytes where they already are what is wanted.

    Nothing comes of an image with a side above 65,500 pixels.
    """
    import cv2

    if source is not None and min(image.shape[:2]) <= recipe.short_side and is_plain_jpeg(source):
        return source
    image = shrink(image, recipe.short_side)
    options = [cv2.IMWRITE_JPEG_QUALITY, recipe.quality]
    options += [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420]
    picture = cv2.cvtColor(image, cv2.COLOR_RGB2BGR) if image.shape[2] == 3 else image
    return bytes(cv2.imencode(".jpg", picture, options)[1])


def is_plain_jpeg(content: bytes) -> bool:
    """Tell whether bytes are an upright 8-bit JPEG in RGB or grey, from its header."""
    from PIL import Image as PillowImage

    if not content.startswith(b"\xff\xd8"):
        return False
    try:
        with PillowImage.open(BytesIO(content)) as file:
            upright = file.getexif().get(ORIENTATION, 1) == 1
            return upright and file.format == "JPEG" and file.mode in ("RGB", "L")
    except Exception:  # a header that Pillow does not read, though OpenCV did: encoded anew
        return False
