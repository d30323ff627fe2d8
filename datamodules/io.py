"""Image files to uint8 arrays: fast decoding with OpenCV, and errors instead of half a picture."""

import functools
import os
import re
import struct
import tempfile
import threading
from collections.abc import Callable
from io import BytesIO, FileIO
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from datamodules.errors import DataError, UnreadableImageError

Image = NDArray[np.uint8]
Mode = Literal["rgb", "grey", "unchanged"]

DICOM_EXTENSIONS = frozenset({".dcm", ".dicom"})
IMAGE_EXTENSIONS = DICOM_EXTENSIONS | {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}

RESTORE = "copy or download the file again, or take its row out of the table"
"""Next step where a file is damaged."""

_JPEG_START, _JPEG_END = b"\xff\xd8", b"\xff\xd9"
_PNG_START, _PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"
_CODEC_NOISE = re.compile(
    rb"libpng |Corrupt JPEG|Premature end|Inconsistent progression|Invalid SOS|Warning: unknown JFIF"
    rb"|\[ ?[A-Z]+:\d"
)

# The C decoders write to file descriptor 2, which a process has only once.
_STDERR_LOCK = threading.Lock()
if hasattr(os, "register_at_fork"):
    # A worker forked while another thread decodes would otherwise keep the diverted descriptor.
    os.register_at_fork(
        before=_STDERR_LOCK.acquire,
        after_in_parent=_STDERR_LOCK.release,
        after_in_child=_STDERR_LOCK.release,
    )


def read_image(
    path: str | Path, *, mode: Mode, window: tuple[float, float] | None = None, at_least: int | None = None
) -> Image:
    """Read and decode one image file.

    The EXIF orientation is applied in every mode; alpha is dropped (the colours under it stay). OpenCV
    decodes; Pillow is asked where OpenCV declines and where the end of the file is missing, because it
    refuses to decode part of a picture. Decoding is serial within a process: use processes, not threads.

    Args:
        path: A JPEG, PNG, WebP, BMP, TIFF or PNM file; or a DICOM file, by its extension .dcm or .dicom.
        mode: `rgb` gives 3 channels (grey is repeated), `grey` 1 channel (luma of a colour image),
            `unchanged` 1 channel for a grey file and 3 for any other. DICOM is always grey.
        window: Intensities (low, high) that become 0 and 255, by `window_to_uint8`; only files deeper than
            8 bits are changed, and DICOM, where it overrides the file's own (see `dicom.read_dicom`).
        at_least: Pixels that both sides keep where the image may be decoded smaller; see `decode_image`.

    Returns:
        uint8, (H, W, 3) in RGB order or (H, W, 1).

    Raises:
        UnreadableImageError: The file is missing, empty, truncated or not an image.
        DataError: It is deeper than 8 bits and there is no `window`.
    """
    if is_dicom(path):
        from datamodules.dicom import read_dicom

        image = read_dicom(path, window=window)
        return np.repeat(image, 3, axis=2) if mode == "rgb" else image
    try:
        # numpy's own file reader costs 10 µs more per small file.
        with open(path, "rb", buffering=0) as file:
            data = file.read()
    except OSError as error:
        raise UnreadableImageError(
            f"An image cannot be opened: {error.strerror}.",
            where=str(path),
            hint="check `root` and the paths of the data set's table",
        ) from error
    return decode_image(data, mode=mode, window=window, name=str(path), at_least=at_least)


def is_dicom(path: str | Path) -> bool:
    """Tell by the extension whether a file is DICOM; no file is opened."""
    return os.path.splitext(path)[1].lower() in DICOM_EXTENSIONS


def decode_image(
    data: bytes,
    *,
    mode: Mode,
    window: tuple[float, float] | None = None,
    name: str = "bytes",
    at_least: int | None = None,
) -> Image:
    """Decode the bytes of an image file; `name` stands for it in errors. Otherwise as `read_image`.

    With `at_least` a JPEG may come at a half, a quarter or an eighth of its size, both sides at least so many pixels:
    libjpeg then averages in the frequency domain, which is anti-aliased and costs a part of the time.
    """
    if not data:
        raise UnreadableImageError("An image file is empty (0 bytes).", where=name, hint=RESTORE)
    image = _decode_with_opencv(data, mode, name, at_least) if _has_its_end(data) else None
    if image is None:
        image = _decode_with_pillow(data, mode, name)
    if image.dtype != np.uint8:
        if window is None:
            raise DataError(
                f"An image has {image.dtype} values; images deeper than 8 bits need an explicit window.",
                where=name,
                hint="set the window: the intensities (low, high) that become black and white",
            )
        image = window_to_uint8(image, *window)
    # A view costs nothing and leaves the array contiguous.
    return image if image.ndim == 3 else image[:, :, None]


def window_to_uint8(image: NDArray[Any], low: float, high: float) -> Image:
    """Map intensities linearly: `low` and below to 0, `high` and above to 255, rounded to integers.

    Args:
        image: Any shape; uint16 radiographs, or any other real type.
        low: Intensity that becomes 0.
        high: Intensity that becomes 255; above `low`.

    Returns:
        uint8 of the same shape.

    Raises:
        DataError: `high` is not above `low`.
    """
    if not high > low:
        raise DataError(f"The window ({low}, {high}) is empty.", where="window", valid="low < high")
    scaled = (image.astype(np.float32) - low) * (255.0 / (high - low))
    windowed: Image = np.rint(scaled.clip(0, 255)).astype(np.uint8)
    return windowed


def list_images(root: str | Path) -> list[str]:
    """List the image files below a folder in one walk.

    Hidden files and folders (a leading dot) are skipped, links are followed, and the case of an extension
    does not matter.

    Returns:
        Paths relative to `root` with forward slashes, sorted.

    Raises:
        DataError: `root` is not a folder that can be read.
    """
    found: list[str] = []

    def walk(folder: str, prefix: str, above: frozenset[tuple[int, int]]) -> None:
        status = os.stat(folder)
        here = (status.st_dev, status.st_ino)
        if here in above:  # a link back to a parent folder
            return
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    walk(entry.path, f"{prefix}{entry.name}/", above | {here})
                elif os.path.splitext(entry.name)[1].lower() in IMAGE_EXTENSIONS:
                    found.append(prefix + entry.name)

    try:
        walk(str(root), "", frozenset())
    except OSError as error:
        raise DataError(
            f"A folder of images cannot be read: {error.strerror}.",
            where=str(error.filename),
            hint="check `root`, or set $FARSHOT_DATA to the folder that holds the data sets",
        ) from error
    return sorted(found)


class ImageCache:
    """Decoded images kept in the memory of one process.

    Nothing is evicted: an image that would exceed the cap is decoded again every time, so that every epoch
    hits the same images (an LRU cache smaller than the data set would never hit).

    Args:
        max_bytes: Cap on the pixels held, in bytes.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.nbytes = 0
        self._images: dict[str, Image] = {}

    def __len__(self) -> int:
        return len(self._images)

    def get(self, path: str, decode: Callable[[str], Image]) -> Image:
        """Return the image of `path`, from memory or by `decode(path)`; a kept image is read-only."""
        image = self._images.get(path)
        if image is None:
            image = decode(path)
            if self.nbytes + image.nbytes <= self.max_bytes:
                image = image.copy()  # a view would keep more memory alive than is counted here
                image.setflags(write=False)
                self._images[path] = image
                self.nbytes += image.nbytes
        return image


@functools.cache
def _opencv() -> ModuleType:
    """Import OpenCV on first use: one thread (the workers are the parallelism) and no log of its own."""
    import cv2

    cv2.setNumThreads(0)
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    return cv2


def _has_its_end(data: bytes) -> bool:
    """Tell whether a JPEG or PNG closes properly; other formats carry no such mark and pass."""
    if data.startswith(_JPEG_START):
        return data.endswith(_JPEG_END)
    if data.startswith(_PNG_START):
        return data.endswith(_PNG_END)
    return True


def _decode_with_opencv(data: bytes, mode: Mode, name: str, at_least: int | None) -> NDArray[Any] | None:
    """Decode to (H, W) or (H, W, 3) RGB at the file's bit depth; None where OpenCV cannot."""
    cv2 = _opencv()
    reduction = jpeg_reduction(data, at_least) if at_least is not None and mode != "unchanged" else 1
    if reduction > 1:
        colour = getattr(cv2, f"IMREAD_REDUCED_{'COLOR' if mode == 'rgb' else 'GRAYSCALE'}_{reduction}")
    else:
        colour = {"rgb": cv2.IMREAD_COLOR, "grey": cv2.IMREAD_GRAYSCALE, "unchanged": cv2.IMREAD_ANYCOLOR}[mode]
        colour |= cv2.IMREAD_ANYDEPTH
    image, noise = _quietly(cv2, np.frombuffer(data, np.uint8), colour)
    if image is None:
        return None
    if b"remature end" in noise and _has_blank_corner(image, 8 // reduction):
        raise UnreadableImageError("An image's data ends early: part is missing.", where=name, hint=RESTORE)
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=image) if image.ndim == 3 else image


def jpeg_reduction(data: bytes, at_least: int) -> int:
    """How many times smaller (1, 2, 4, 8) a JPEG may be decoded so that both sides keep `at_least` pixels."""
    position = 2
    while data.startswith(_JPEG_START) and position + 9 < len(data) and data[position] == 0xFF:
        marker, length = data[position + 1], int.from_bytes(data[position + 2 : position + 4], "big")
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # a frame header: height and width
            sides = struct.unpack(">HH", data[position + 5 : position + 9])
            return next((factor for factor in (8, 4, 2) if min(sides) // factor >= at_least), 1)
        position += 2 + length
    return 1


def _has_blank_corner(image: NDArray[Any], block: int) -> bool:
    """Tell whether a corner is all 128, libjpeg's filling for missing blocks (EXIF may have turned the last one)."""
    sides = slice(None, block), slice(-block, None)
    return any(bool((image[rows, columns] == 128).all()) for rows in sides for columns in sides)


@functools.lru_cache(maxsize=1)
def _sink(pid: int) -> FileIO:
    """Open the file that takes a process's decoder messages; by process, since forks share file offsets."""
    return tempfile.TemporaryFile("w+b", buffering=0)


def _quietly(cv2: ModuleType, data: Image, flags: int) -> tuple[NDArray[Any] | None, bytes]:
    """Decode; catch and return what libjpeg and libpng write to stderr, and pass other text on."""
    with _STDERR_LOCK:
        sink = _sink(os.getpid()).fileno()
        stderr = os.dup(2)
        os.dup2(sink, 2)
        try:
            image = cv2.imdecode(data, flags)
        except cv2.error:  # refused before decoding, such as more than 2^30 pixels
            image = None
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
        size = os.lseek(sink, 0, os.SEEK_CUR)
        if not size:
            return image, b""
        text = os.pread(sink, size, 0)
        os.ftruncate(sink, 0)
        os.lseek(sink, 0, os.SEEK_SET)
    lines = text.splitlines(keepends=True)
    foreign = b"".join(line for line in lines if line.strip() and not _CODEC_NOISE.match(line))
    if foreign:  # another thread's
        os.write(2, foreign)
    return image, text


def _decode_with_pillow(data: bytes, mode: Mode, name: str) -> NDArray[Any]:
    """Decode what OpenCV does not, strictly; Pillow's reason becomes the error's."""
    from PIL import Image as PillowImage
    from PIL import ImageOps, UnidentifiedImageError

    try:
        with PillowImage.open(BytesIO(data)) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith(("I", "F")):  # grey with 16 or 32 bits
                deep = np.array(image)
                return np.stack([deep] * 3, axis=-1) if mode == "rgb" else deep
            grey = mode == "grey" or (mode == "unchanged" and image.mode in ("1", "L"))
            return np.array(image.convert("L" if grey else "RGB"))
    except UnidentifiedImageError as error:
        problem = f"A file is not an image that OpenCV or Pillow can decode; it begins with {data[:24]!r}."
        hint = "name DICOM files .dcm" if data[128:132] == b"DICM" else RESTORE
        raise UnreadableImageError(problem, where=name, hint=hint) from error
    except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, ValueError, struct.error, ...
        problem = f"An image is truncated or damaged: {error}."
        raise UnreadableImageError(problem, where=name, hint=RESTORE) from error
