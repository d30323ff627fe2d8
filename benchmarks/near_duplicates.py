r"""Recall and false positives of the search for near-duplicates, on a folder of real images.

Usage: python benchmarks/near_duplicates.py FOLDER [--group REGEX] [--images N] [--copies N]

Images are changed in known ways and looked for among the originals: recall is the share found; `audit` means
`find_copies`, `guard` hashes within `STRICT_BITS`. False positives are found pairs of different images. `--group` is
the part of a file's name that says whose image it is, such as "^(\d+)_" for NIH ChestX-ray14: pairs within a group are
counted apart. Pairs of originals that are found are listed: look at them, they may be real.
"""

import argparse
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datamodules.io import list_images, read_image
from studies.fingerprints import Fingerprints, fingerprint_images
from studies.near_duplicates import STRICT_BITS, find_copies, hamming_matches

Image = NDArray[np.uint8]
Change = Callable[[Image], Image]


def resize(scale: float) -> Change:
    """Scale both sides, area-averaged."""
    return lambda image: cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)


def jpeg(quality: int) -> Change:
    """Compress and decode."""
    settings = [cv2.IMWRITE_JPEG_QUALITY, quality]
    return lambda image: cv2.imdecode(cv2.imencode(".jpg", image, settings)[1], cv2.IMREAD_UNCHANGED)


def crop(left: float = 0, top: float = 0, right: float = 0, bottom: float = 0) -> Change:
    """Cut shares of the sides off the borders."""

    def change(image: Image) -> Image:
        height, width = image.shape[:2]
        rows = slice(round(top * height), height - round(bottom * height))
        return np.ascontiguousarray(image[rows, round(left * width) : width - round(right * width)])

    return change


def contrast(gain: float, offset: float) -> Change:
    """Rescale intensities; what leaves 0-255 is clipped."""
    return lambda image: np.rint(image * gain + offset).clip(0, 255).astype(np.uint8)


def stretch(image: Image) -> Image:
    """Rescale to the full range, as conversions from 12 or 16 bits do."""
    low, high = int(image.min()), int(image.max())
    return np.rint((image.astype(np.float32) - low) * (255 / max(high - low, 1))).astype(np.uint8)


def pad(share: float, value: int) -> Change:
    """Add a uniform border left and right, each a share of the width."""

    def change(image: Image) -> Image:
        size = round(share * image.shape[1])
        return cv2.copyMakeBorder(image, 0, 0, size, size, cv2.BORDER_CONSTANT, value=[value] * 3)

    return change


def chain(*changes: Change) -> Change:
    """Apply changes one after the other."""

    def change(image: Image) -> Image:
        for step in changes:
            image = step(image)
        return image

    return change


CHANGES: dict[str, Change] = {
    **{f"resize {scale}": resize(scale) for scale in (0.25, 0.5, 0.75, 0.9)},
    **{f"JPEG q{quality}": jpeg(quality) for quality in (30, 60, 90)},
    "resize 0.5, JPEG q50": chain(resize(0.5), jpeg(50)),
    "resize 0.25, JPEG q30": chain(resize(0.25), jpeg(30)),
    "contrast ×0.6 + 30": contrast(0.6, 30),
    "contrast ×1.3 − 20 (clips)": contrast(1.3, -20),
    "full range": stretch,
    **{f"crop {share:.0%} left": crop(left=share) for share in (0.02, 0.05, 0.1)},
    **{f"crop {share:.0%} top": crop(top=share) for share in (0.02, 0.05, 0.1)},
    **{f"crop {share:.0%} right": crop(right=share) for share in (0.05, 0.1)},
    **{f"crop {share:.0%} bottom": crop(bottom=share) for share in (0.05, 0.1)},
    **{f"crop {share:.0%} centre": crop(*[share / 2] * 4) for share in (0.02, 0.05, 0.1)},
    **{f"crop {share:.0%} corner": crop(left=share, bottom=share) for share in (0.05, 0.1)},
    "crop 20% centre (beyond the aim)": crop(*[0.1] * 4),
    "pad 10% black": pad(0.1, 0),
    "pad 10% white": pad(0.1, 255),
    "pad 20% grey": pad(0.2, 128),
    "crop 5% top, resize, contrast, JPEG q50": chain(crop(top=0.05), resize(0.5), contrast(0.8, 10), jpeg(50)),
    "crop 5% centre, pad, resize, JPEG q60": chain(crop(*[0.025] * 4), pad(0.1, 0), resize(0.5), jpeg(60)),
    "crop 10% centre, resize, JPEG q50": chain(crop(*[0.05] * 4), resize(0.5), jpeg(50)),
}


def strict_pairs(a: Fingerprints, b: Fingerprints) -> set[tuple[int, int]]:
    """Pairs that the guard would stop at."""
    first, second, _ = hamming_matches(a.hashes, b.hashes, STRICT_BITS)
    return set(zip(first.tolist(), second.tolist(), strict=True))


def audit_pairs(a: Fingerprints, b: Fingerprints) -> set[tuple[int, int]]:
    """Pairs that the audit would list."""
    found = find_copies(a, b)
    return set(zip(found["row_a"].tolist(), found["row_b"].tolist(), strict=True))


def count_false(pairs: set[tuple[int, int]], groups: list[str], known: set[tuple[int, int]]) -> str:
    """Found pairs of different images, "across groups + within a group", without the pairs of originals in `known`."""
    within = [groups[i] == groups[j] for i, j in pairs if i != j and (min(i, j), max(i, j)) not in known]
    return f"{within.count(False)} + {within.count(True)}"


def main() -> None:
    """Fingerprint the originals and every kind of copy, search, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--group", help="regular expression; its first group says whose image it is")
    parser.add_argument("--images", type=int, default=1000, help="originals, evenly spaced over the folder")
    parser.add_argument("--copies", type=int, default=1000, help="of these so many are changed and looked for")
    arguments = parser.parse_args()
    names = list_images(arguments.folder)
    names = names[:: max(1, len(names) // arguments.images)][: arguments.images]
    images = [read_image(arguments.folder / name, mode="grey") for name in names]
    matches = [re.search(arguments.group, Path(name).name) if arguments.group else None for name in names]
    groups = [match[1] if match else name for match, name in zip(matches, names, strict=True)]
    originals = fingerprint_images(images)
    console = Console(width=120, highlight=False)

    started = time.perf_counter()
    found = find_copies(originals)
    seconds = time.perf_counter() - started
    sizes = np.unique(groups, return_counts=True)[1]
    within = int((sizes * (sizes - 1) // 2).sum())
    across = len(images) * (len(images) - 1) // 2 - within
    listed = set(zip(found["row_a"].tolist(), found["row_b"].tolist(), strict=True))
    strict = {(i, j) for i, j in strict_pairs(originals, originals) if i < j}
    console.print(
        f"{len(images)} originals, {across} pairs across groups and {within} within; searched in {seconds:.1f} s"
    )
    console.print(f"found among them, across + within: audit {count_false(listed, groups, set())}", end=", ")
    console.print(f"guard {count_false(strict, groups, set())}")
    for pair in found.itertuples():
        console.print(f"  {names[pair.row_a]}  {names[pair.row_b]}  {pair.bits} bits  {pair.correlation:.3f}")

    chosen = np.arange(len(images))[:: max(1, len(images) // arguments.copies)][: arguments.copies]
    table = Table(title=f"{len(chosen)} copies: recall, and other pairs found, across + within", title_justify="left")
    for column in ("change", "audit", "guard", "audit false", "guard false"):
        table.add_column(column, justify="left" if column == "change" else "right", no_wrap=True)
    for label, change in CHANGES.items():
        changed = (change(images[row]) for row in chosen)
        copies = fingerprint_images(image if image.ndim == 3 else image[:, :, None] for image in changed)
        recalls, false = [], []
        for search, known in ((audit_pairs, listed), (strict_pairs, strict)):
            pairs = {(i, int(chosen[j])) for i, j in search(originals, copies)}
            recalls.append(f"{sum(i == j for i, j in pairs) / len(chosen):.3f}")
            false.append(count_false(pairs, groups, known))
        table.add_row(label, *recalls, *false)
    console.print(table)


if __name__ == "__main__":
    main()
