"""Images per second and core from file to batch: our input path against the usual ones.

    python benchmarks/input_pipeline.py [--images N] [--rounds N] [--folder DIR]

Photos: JPEG to a 224 px random resized crop, flip, collate; against Pillow and torchvision v1 in float32.
Radiographs: 1024 px grey PNG to 224 px; against the loader of Cherti & Jitsev 2022. One thread each, rounds
interleaved, so that a ratio compares neighbours in time. Without `--folder`, photos are generated (smooth
colours, edges, grain); with it, both comparisons run on the folder's images.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision import transforms as tv

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datamodules.io import Mode, list_images, read_image
from datamodules.transforms import POLICIES, create_transform

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BATCH = 32
SIZE = 224

Pipeline = Callable[[Sequence[str]], torch.Tensor]


def paint(height: int, width: int, seed: int) -> NDArray[np.uint8]:
    """Paint what photos are made of: smooth colours, hard edges, fine grain. uint8, (height, width, 3)."""
    rng = np.random.default_rng(seed)
    picture = np.zeros((height, width, 3), np.float32)
    for cells, strength in ((4, 60), (16, 35), (64, 12)):
        coarse = rng.normal(0, strength, (cells, cells, 3)).astype(np.float32)
        picture += cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    for _ in range(12):
        corners = rng.integers(0, (width, height), (3, 2)).astype(np.int32)
        mask = cv2.fillPoly(np.zeros((height, width), np.float32), [corners], 1.0, cv2.LINE_AA)
        picture += mask[..., None] * rng.normal(0, 30, 3).astype(np.float32)
    picture += rng.normal(0, 3, picture.shape).astype(np.float32)
    return (picture + 120).clip(0, 255).astype(np.uint8)


def write_photos(folder: Path, count: int) -> list[str]:
    """Write photo-like JPEG files."""
    paths = [folder / f"{number}.jpg" for number in range(count)]
    for number, path in enumerate(paths):
        Image.fromarray(paint(375, 500, number)).save(path, quality=90)
    return [str(path) for path in paths]


def write_radiographs(folder: Path, count: int) -> list[str]:
    """Write radiograph-like PNG files."""
    paths = [folder / f"{number}.png" for number in range(count)]
    for number, path in enumerate(paths):
        Image.fromarray(paint(1024, 1024, number)[..., 0]).save(path)
    return [str(path) for path in paths]


def torchvision_float() -> Pipeline:
    """PIL and torchvision's float recipe."""
    recipe = tv.Compose(
        [
            tv.RandomResizedCrop(SIZE, antialias=True),
            tv.RandomHorizontalFlip(),
            tv.ToTensor(),
            tv.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    return lambda paths: torch.stack([recipe(Image.open(path).convert("RGB")) for path in paths])


def timm_loader() -> Pipeline:
    """What timm's `create_loader` with its prefetcher does on the CPU: its transform to uint8, its collate function."""
    from timm.data import create_transform as timm_transform
    from timm.data.loader import fast_collate

    recipe = timm_transform(
        (3, SIZE, SIZE), is_training=True, use_prefetcher=True, color_jitter=None, interpolation="bilinear"
    )
    return lambda paths: fast_collate([(recipe(Image.open(path).convert("RGB")), 0) for path in paths])[0]


def ours(mode: Mode, policy: str, *, train: bool) -> Pipeline:
    """Our decoding, crop and uint8 batch."""
    transform = create_transform(policy, SIZE, train=train)

    def load(paths: Sequence[str]) -> torch.Tensor:
        images = [transform(read_image(path, mode=mode), seed) for seed, path in enumerate(paths)]
        return torch.from_numpy(np.stack(images))

    return load


def cherti2022_loader(paths: Sequence[str]) -> torch.Tensor:
    """Decode to BGR, float64 in [0, 1], centre square, resize, (x - 0.5) / 0.5, 3 equal channels."""

    def load(path: str) -> torch.Tensor:
        image = np.asarray(cv2.imread(path))[..., 0].astype(np.float64) / 255
        side = min(image.shape)
        top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
        image = cv2.resize(image[top : top + side, left : left + side], (SIZE, SIZE), interpolation=cv2.INTER_AREA)
        return torch.from_numpy(np.repeat((image[None] - 0.5) / 0.5, 3, axis=0).astype(np.float32))

    return torch.stack([load(path) for path in paths])


def images_per_second(load: Pipeline, paths: Sequence[str]) -> float:
    """Images a second of one pass."""
    start = time.perf_counter()
    for first in range(0, len(paths), BATCH):
        load(paths[first : first + BATCH])
    return len(paths) / (time.perf_counter() - start)


def compare(title: str, theirs: Pipeline, mine: Pipeline, paths: Sequence[str], rounds: int) -> None:
    """Run two sides in turn and print their ratio."""
    for load in (theirs, mine):  # warm the file cache and the imports
        load(paths[:BATCH])
    pairs = []
    for turn in range(rounds):
        order = (theirs, mine) if turn % 2 == 0 else (mine, theirs)
        speed = {load: images_per_second(load, paths) for load in order}
        pairs.append((speed[theirs], speed[mine]))
    ratios = [b / a for a, b in pairs]
    print(
        f"{title}: theirs {statistics.median(a for a, _ in pairs):.0f}, ours "
        f"{statistics.median(b for _, b in pairs):.0f} images/s; ratio min {min(ratios):.2f}, "
        f"median {statistics.median(ratios):.2f}, max {max(ratios):.2f}"
    )


def print_aliasing() -> None:
    """Shrink white noise from 512 to 64 px: a filter that aliases leaves more of it than Pillow's does."""
    noise = np.random.default_rng(0).integers(0, 256, (512, 512, 1), dtype=np.uint8)
    pillow = np.asarray(Image.fromarray(noise[..., 0]).resize((64, 64), Image.Resampling.BILINEAR)).std()
    area = create_transform("resize_center", 64, train=False)(noise, 0).std()
    linear = cv2.resize(noise, (64, 64), interpolation=cv2.INTER_LINEAR).std()
    print(
        f"sigma of noise 512 -> 64: ours {area:.1f}, Pillow {pillow:.1f}, ratio {area / pillow:.2f} "
        f"(plain bilinear {linear / pillow:.2f})"
    )


def print_overhead(calls: int = 300) -> None:
    """Median microseconds per call of every policy, without decoding."""
    cases = {(32, 32): 32, (256, 256): 64, (375, 500): 224}
    print(f"{'us per call':24}" + "".join(f"{w}x{h} -> {size}".rjust(16) for (h, w), size in cases.items()))
    for policy in POLICIES:
        for train in (True, False):
            row = []
            for (height, width), size in cases.items():
                transform = create_transform(policy, size, train=train)
                image = paint(height, width, 0)
                transform(image, 0)
                starts = [time.perf_counter()]
                for seed in range(calls):
                    transform(image, seed)
                    starts.append(time.perf_counter())
                row.append(statistics.median(np.diff(starts)) * 1e6)
            name = f"{policy} {'train' if train else 'eval'}"
            print(f"{name:28}" + "".join(f"{microseconds:14.0f}" for microseconds in row))


def main() -> None:
    """Compare on photos and radiographs, then print aliasing and the cost of every policy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=128, help="photos per round (default 128)")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default 5)")
    parser.add_argument("--folder", type=Path, help="your own images instead of generated photos")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "photos").mkdir()
        (folder / "radiographs").mkdir()
        if arguments.folder:
            photos = [str(arguments.folder / path) for path in list_images(arguments.folder)][: arguments.images]
            radiographs = photos
        else:
            photos = write_photos(folder / "photos", arguments.images)
            radiographs = write_radiographs(folder / "radiographs", max(1, arguments.images // 4))
        mine = ours("rgb", "inception_crop", train=True)
        compare("photo -> random crop 224", torchvision_float(), mine, photos, arguments.rounds)
        compare("photo -> random crop 224, against timm", timm_loader(), mine, photos, arguments.rounds)
        mine = ours("grey", "chest_xray_cherti2022", train=False)
        compare("radiograph -> 224", cherti2022_loader, mine, radiographs, arguments.rounds)
    print_aliasing()
    print_overhead()


if __name__ == "__main__":
    main()
