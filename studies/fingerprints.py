"""Fingerprints of images: a perceptual hash and a small thumbnail, kept on disk between commands."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from datamodules.errors import UnreadableImageError
from studies import fingerprint_cache
from studies.processes import parallel, usable_cores

if TYPE_CHECKING:
    from datamodules.base import BaseDataModule

SIDE = 32  # thumbnails, pixels
WORKING_SIDE = 256  # images are reduced to this before anything else, so that cost does not grow with their size
FREQUENCIES = 16  # the hash keeps the DCT frequencies 1-16 of both axes: 256 bits
BLANK = 1.0  # standard deviation of the thumbnail, grey levels, below which an image has nothing to compare
UNIFORM = 0.12
"""A border line whose values span less than this share of the image's range is padding. JPEG q60 rings by about 0.1
beside an edge: at 0.04 half of the padded copies kept ringing lines, at 0.12 one in a hundred."""
NARROW = 0.02  # of a side: a narrower frame needs no thumbnail without it, copies are aligned anyway
MIN_CONTENT = 0.4  # of a side: where less would be left, the uniform lines are the picture and not its frame
TASK_ROWS, PART_ROWS = 32, 8_192  # images of one task of a worker; images after which the cache is written
MOST_WORKERS = 16
PARALLEL_FROM = 512  # images from which processes, and a progress bar, are worth starting

Image = NDArray[np.uint8]


@dataclass(frozen=True)
class Fingerprints:
    """What is kept of N images to recognise copies; 2,081 bytes an image.

    Attributes:
        hashes: uint64 (N, 4), 256-bit perceptual hash of the whole image. 0 = none (unreadable or blank image), which
            matches nothing; a hash has about 128 ones, so no image has it by chance.
        thumbnails: uint8 (N, 32, 32), the whole image in grey, area-averaged to the square and stretched to 0-255;
            all 0 where there is no hash.
        contents: uint8 (N, 32, 32), the same without uniform borders; all 0 where there are none to take off.
        readable: bool (N,), false where the image could not be decoded.
    """

    hashes: NDArray[np.uint64]
    thumbnails: NDArray[np.uint8]
    contents: NDArray[np.uint8]
    readable: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.hashes)

    def take(self, rows: Any) -> "Fingerprints":
        """Return some of the fingerprints, by position or mask."""
        return Fingerprints(*(getattr(self, field.name)[rows] for field in fields(self)))

    @staticmethod
    def empty(count: int) -> "Fingerprints":
        """Return `count` fingerprints of unreadable images, to be filled."""
        thumbnails, contents = np.zeros((2, count, SIDE, SIDE), np.uint8)
        return Fingerprints(np.zeros((count, 4), np.uint64), thumbnails, contents, np.zeros(count, np.bool_))

    def put(self, rows: Any, others: "Fingerprints") -> None:
        """Overwrite the fingerprints at some positions."""
        for name in (field.name for field in fields(self)):
            getattr(self, name)[rows] = getattr(others, name)


def fingerprint_images(images: Iterable[Image | None]) -> Fingerprints:
    """Fingerprint images.

    The hash is pHash (Zauner 2010, Implementation and Benchmarking of Perceptual Image Hash Functions, section 3.2.1)
    with 16×16 instead of 8×8 coefficients: grey, 32×32, DCT, the lowest frequencies without the constant ones,
    each bit whether a coefficient exceeds their median. The aspect ratio is given up on purpose: copies that were
    squeezed into a square then have the same fingerprint.

    Args:
        images: uint8 (H, W, 1 or 3), any sizes, RGB; None for an image that could not be read.
    """
    pieces = [_fingerprint(image) for image in images]
    return join(pieces) if pieces else Fingerprints.empty(0)


def join(parts: Sequence[Fingerprints]) -> Fingerprints:
    """Put fingerprints one after the other."""
    return Fingerprints(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(parts[0])))


def fingerprint_rows(
    datamodule: "BaseDataModule", rows: Sequence[int] | NDArray[np.int64], *, workers: int | None = None
) -> Fingerprints:
    """Fingerprint rows of a data set's table, in their order; images in files are looked up in the cache first.

    Decoding holds a lock within a process (`datamodules.io`), so the work is divided over forked processes.

    Args:
        datamodule: Reads the images.
        rows: Table rows (N,).
        workers: Processes; default one a usable core, 16 at most.
    """
    parts = list(_stream(datamodule, np.asarray(rows, dtype=np.int64), workers))
    return join(parts) if parts else Fingerprints.empty(0)


def hash_rows(
    datamodule: "BaseDataModule", rows: Sequence[int] | NDArray[np.int64], *, workers: int | None = None
) -> NDArray[np.uint64]:
    """The hashes alone, uint64 (N, 4), which fit into memory for millions of images; see `fingerprint_rows`."""
    hashes = [part.hashes for part in _stream(datamodule, np.asarray(rows, dtype=np.int64), workers, thumbnails=False)]
    return np.concatenate(hashes) if hashes else np.zeros((0, 4), np.uint64)


def _stream(
    datamodule: "BaseDataModule", rows: NDArray[np.int64], workers: int | None, *, thumbnails: bool = True
) -> Iterator[Fingerprints]:
    """Fingerprints of consecutive parts of `rows`, what is new written to the cache after each part."""
    with progress_bar(f"hashes of {datamodule.name}", len(rows), shown=len(rows) >= PARALLEL_FROM) as advance:
        for part in _parts(rows, PART_ROWS):
            keys = fingerprint_cache.file_keys(image_sources(datamodule, part))
            found, todo = _cached(keys, thumbnails=thumbnails)
            advance(len(part) - len(todo))
            pieces = []
            for piece in _computed(datamodule, part[todo], workers):
                pieces.append(piece)
                advance(len(piece))
            if pieces:
                new = join(pieces)
                found.put(todo, new)
                kept = np.flatnonzero(new.readable)
                _store(keys[todo[kept]], new.take(kept))
            yield found


def image_sources(datamodule: "BaseDataModule", rows: NDArray[np.int64]) -> list[tuple[Path, str] | None]:
    """Where the pixels come from, for the cache: a file and how it is decoded, or a place in a prepared file."""
    if datamodule.prepared is None:
        return datamodule.image_files(rows)
    places = datamodule.prepared_rows[rows].tolist()
    return [(Path(datamodule.prepared_images.file(place)), f"prepared {place}") for place in places]


def _store(keys: NDArray[np.uint64], new: Fingerprints) -> None:
    """Write fingerprints to the cache; the second thumbnail only where there is one."""
    pictures = [
        thumbnail.tobytes() + (content.tobytes() if content.any() else b"")
        for thumbnail, content in zip(new.thumbnails, new.contents, strict=True)
    ]
    fingerprint_cache.add(keys, [words.tobytes() for words in new.hashes], pictures)


def stored_thumbnail(stored: bytes) -> Image:
    """The thumbnail of a cache entry, uint8 (32, 32)."""
    return np.frombuffer(stored[: SIDE * SIDE], np.uint8).reshape(SIDE, SIDE)


def _cached(keys: NDArray[np.uint64], *, thumbnails: bool) -> tuple[Fingerprints, NDArray[np.int64]]:
    """Fingerprints of the keys as far as the cache has them, and the positions of the others."""
    found = Fingerprints.empty(len(keys))
    hashes = fingerprint_cache.look_up(keys, "hash")
    pictures = fingerprint_cache.look_up(keys, "thumbnails") if thumbnails else {}
    for position, key in enumerate(keys.tolist()):
        words, stored = hashes.get(key), pictures.get(key, b"")
        if words is None or len(words) != 32 or (thumbnails and len(stored) not in (SIDE * SIDE, 2 * SIDE * SIDE)):
            continue
        found.hashes[position] = np.frombuffer(words, np.uint64)
        for target, picture in zip(
            (found.thumbnails, found.contents), np.frombuffer(stored, np.uint8).reshape(-1, SIDE, SIDE), strict=False
        ):
            target[position] = picture
        found.readable[position] = True
    return found, np.flatnonzero(~found.readable)


def _fingerprint(image: Image | None) -> Fingerprints:
    one = Fingerprints.empty(1)
    if image is None:
        return one
    import cv2

    one.readable[:] = True
    height, width = image.shape[:2]
    small = cv2.resize(image, (min(width, WORKING_SIDE), min(height, WORKING_SIDE)), interpolation=cv2.INTER_AREA)
    values = (cv2.cvtColor(small, cv2.COLOR_RGB2GRAY) if small.ndim == 3 else small).astype(np.float32)
    whole = _thumbnail(values)
    if whole.std() >= BLANK:
        one.hashes[0], one.thumbnails[0] = _hash(whole), _stretch(whole)
        content = values[_content(values)]
        if any(cut < (1 - NARROW) * full for cut, full in zip(content.shape, values.shape, strict=True)):
            one.contents[0] = _stretch(_thumbnail(content))
    return one


def _stretch(thumbnail: NDArray[np.float32]) -> Image:
    low, high = thumbnail.min(), thumbnail.max()
    stretched: Image = np.rint((thumbnail - low) * (255 / (high - low))).astype(np.uint8)
    return stretched


def _thumbnail(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Average areas into a square of 32×32; a smaller side is enlarged smoothly first."""
    import cv2

    height, width = values.shape
    if min(height, width) < SIDE:
        values = cv2.resize(values, (max(width, SIDE), max(height, SIDE)), interpolation=cv2.INTER_CUBIC)
    thumbnail: NDArray[np.float32] = cv2.resize(values, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    return thumbnail


def _content(values: NDArray[np.float32]) -> tuple[slice, slice]:
    """Rows and columns between uniform borders, such as the padding of a square canvas."""
    limit = UNIFORM * np.ptp(values)
    box = [slice(0, size) for size in values.shape]
    for axis in (0, 1, 0, 1):  # again: a white frame at the sides hides that the lines above the picture are black
        inner = values[box[0], box[1]]
        varied = np.flatnonzero(np.ptp(inner, axis=1 - axis) > limit)
        if len(varied) and varied[-1] + 1 - varied[0] >= MIN_CONTENT * values.shape[axis]:
            box[axis] = slice(box[axis].start + varied[0], box[axis].start + varied[-1] + 1)
    return box[0], box[1]


def _hash(thumbnail: NDArray[np.float32]) -> NDArray[np.uint64]:
    basis = dct_basis()[1 : FREQUENCIES + 1]
    coefficients = (basis @ thumbnail @ basis.T).ravel()
    return np.packbits(coefficients > np.median(coefficients)).view("<u8").astype(np.uint64)


@cache
def dct_basis() -> NDArray[np.float32]:
    """Rows of the orthonormal DCT-II of 32 points, float32 (32, 32): the spectrum of x is `basis @ x @ basis.T`."""
    from scipy.fft import dct

    basis: NDArray[np.float32] = dct(np.eye(SIDE, dtype=np.float32), axis=0, norm="ortho")
    return basis


# Reading a data set's rows -----------------------------------------------------------------------------------------


def _computed(datamodule: "BaseDataModule", rows: NDArray[np.int64], workers: int | None) -> Iterator[Fingerprints]:
    """Fingerprints of consecutive pieces of `rows`, by several processes where that pays."""
    workers = min(usable_cores(), MOST_WORKERS) if workers is None else workers

    def compute(piece: NDArray[np.int64]) -> Fingerprints:
        return fingerprint_images(_read(datamodule, int(row)) for row in piece)

    yield from parallel(compute, _parts(rows, TASK_ROWS), workers if len(rows) >= PARALLEL_FROM else 1)


def _read(datamodule: "BaseDataModule", row: int) -> Image | None:
    try:
        return datamodule.images([row])[0]
    except UnreadableImageError:
        return None


def _parts(rows: NDArray[np.int64], size: int) -> list[NDArray[np.int64]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


@contextmanager
def progress_bar(text: str, total: int, *, shown: bool) -> Iterator[Callable[[int], None]]:
    """Show a bar in a terminal and give the function that advances it."""
    from rich.progress import Progress

    from studies.display import console

    with Progress(console=console, transient=True, disable=not (shown and console.is_terminal)) as progress:
        task = progress.add_task(text, total=total)
        yield lambda done: progress.advance(task, done)
