"""How long a training step waits for its data, and what uint8 saves in the hand-over from workers.

    python benchmarks/waiting.py [--batches N] [--batch N ...] [--rounds N] [--workers N ...] [--headroom X]

Waiting: the training loader of an ImageTable on generated JPEG photos (500x375 to a random crop of 224), and a step
that only sleeps, as one does that waits for an accelerator. Its rate is supply / headroom, where supply is the
images/s that the same workers give to a step of no length just before; start-up is not counted. On a machine of
one's own supply is close to workers x images/s of one process, which is printed too: where it is far below, others
use the cores and the shares say little.
Hand-over: the same batches, decoded beforehand, stacked in a worker and received here as uint8 and as float32.
Rounds are interleaved; one thread a process.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from input_pipeline import BATCH, SIZE, write_photos

from datamodules.dataset import keep_batch
from datamodules.image_table import ImageTable

PHOTOS = 128  # different files; the others are hard links to them
START_UP = 8  # batches that fill the queues and warm the imports


def write_folder(root: Path, count: int) -> None:
    """Write a folder tree of one class with `count` photos to train on and one to test."""
    photos = root / "train" / "photo"
    photos.mkdir(parents=True)
    originals = write_photos(photos, min(count, PHOTOS))
    for number in range(len(originals), count):
        os.link(originals[number % len(originals)], photos / f"{number}.jpg")
    (root / "test" / "photo").mkdir(parents=True)
    os.link(originals[0], root / "test" / "photo" / "0.jpg")


def train_loader(root: Path, batch: int, workers: int) -> DataLoader:
    """The training loader of an ImageTable on the folder of photos."""
    data = ImageTable(root=str(root), batch_size=batch, num_workers=workers, image_size=SIZE, val_fraction=0, seed=0)
    data.setup()
    return data.train_dataloader()


def images_per_second(root: Path, batch: int, workers: int) -> float:
    """What the loader gives to someone who only takes."""
    batches = iter(train_loader(root, batch, workers))
    for _ in range(START_UP):
        next(batches)
    start = time.perf_counter()
    count = sum(len(images["image"]) for images in batches)
    return count / (time.perf_counter() - start)


def waiting_share(root: Path, batch: int, workers: int, step: float) -> float:
    """Share of the time of steps of `step` seconds that is spent waiting for the next batch."""
    batches = iter(train_loader(root, batch, workers))
    for _ in range(START_UP):
        next(batches)
        time.sleep(step)
    waited = 0.0
    start = time.perf_counter()
    while True:
        before = time.perf_counter()
        if next(batches, None) is None:
            return waited / (before - start)
        waited += time.perf_counter() - before
        time.sleep(step)


class Decoded(Dataset):
    """Batches of images in memory, stacked on request: what is left is collate and hand-over."""

    def __init__(self, dtype: type, batches: int) -> None:
        shape = (BATCH, 3, SIZE, SIZE)
        self.images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8).astype(dtype)
        self.batches = batches

    def __len__(self) -> int:
        return self.batches

    def __getitem__(self, number: int) -> torch.Tensor:
        return torch.from_numpy(np.stack(list(self.images)))


def hand_over(dtype: type, batches: int) -> float:
    """Seconds a batch from one worker, start-up left out."""
    loader = DataLoader(Decoded(dtype, batches), batch_size=None, num_workers=1, collate_fn=keep_batch)
    received = iter(loader)
    for _ in range(START_UP):
        next(received)
    start = time.perf_counter()
    count = sum(1 for _ in received)
    return (time.perf_counter() - start) / count


def print_waiting(batch: int, workers: Sequence[int], batches: int, rounds: int, headroom: float) -> None:
    """Share of the time that a step of fixed length waits for its batch."""
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        write_folder(root, batches * batch)
        for count in workers:
            alone, supply, shares = [], [], []
            for _ in range(rounds):
                alone.append(images_per_second(root, batch, 0))
                supply.append(images_per_second(root, batch, count))
                shares.append(waiting_share(root, batch, count, headroom * batch / supply[-1]))
            print(
                f"batches of {batch}, {count} workers: {statistics.median(supply):.0f} images/s, one process "
                f"{statistics.median(alone):.0f}; supply = {headroom} x step rate: "
                f"waiting median {100 * statistics.median(shares):.2f} % of the time, "
                f"min {100 * min(shares):.2f}, max {100 * max(shares):.2f}; {os.cpu_count()} cores"
            )


def print_hand_over(batches: int, rounds: int) -> None:
    """Milliseconds to receive a batch from a worker as uint8 and as float32."""
    pairs = []
    for turn in range(rounds):
        order = (np.uint8, np.float32) if turn % 2 == 0 else (np.float32, np.uint8)
        seconds = {dtype: hand_over(dtype, batches) for dtype in order}
        pairs.append((seconds[np.float32], seconds[np.uint8]))
    ratios = [wide / narrow for wide, narrow in pairs]
    print(
        f"hand-over of {BATCH} x 3 x {SIZE} x {SIZE}: float32 {1e3 * statistics.median(a for a, _ in pairs):.1f} ms, "
        f"uint8 {1e3 * statistics.median(b for _, b in pairs):.1f} ms; ratio min {min(ratios):.2f}, "
        f"median {statistics.median(ratios):.2f}, max {max(ratios):.2f}"
    )


def main() -> None:
    """Measure on generated photos in a scratch folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=60, help="batches of a pass (default 60)")
    parser.add_argument("--batch", type=int, nargs="+", default=[32, 128], help="images of a batch (default 32 128)")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds (default 3)")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="loader processes (default 1 2)")
    parser.add_argument("--headroom", type=float, default=1.2, help="supply over demand (default 1.2)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    for batch in arguments.batch:
        print_waiting(batch, arguments.workers, arguments.batches, arguments.rounds, arguments.headroom)
    print_hand_over(4 * arguments.batches, arguments.rounds)


if __name__ == "__main__":
    main()
