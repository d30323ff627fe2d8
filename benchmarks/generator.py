"""Images that the generator renders in a second on one core, by look and size.

Usage: python benchmarks/generator.py [--images 4096] [--rounds 7]

Times are of the processor, not the clock, so a busy machine changes them little. A round renders about as many pixels
at every size.
"""

import argparse
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from threadpoolctl import threadpool_limits

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from datamodules.generator import ImageGenerator

TASKS = (
    ("natural, 10 classes", ImageGenerator()),
    ("radiograph, 10 classes", ImageGenerator(look="radiograph")),
    ("radiograph, 14 labels", ImageGenerator(look="radiograph", task="multilabel", num_classes=14)),
)


def rate(generator: ImageGenerator, images: int, start: int) -> float:
    """Images per second of processor time."""
    index = start + np.arange(images)
    begin = time.process_time()
    generator.images(index)
    return images / (time.process_time() - begin)


def main() -> None:
    """Measure every look at three sizes, some rounds each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4096, help="images a round at 32 px")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    table = Table("task", "size", "images/s, median", "slowest", "fastest")
    for name, generator in TASKS:
        for size in (32, 64, 224):
            sized = replace(generator, image_size=size)
            count = max(64, arguments.images * 32**2 // size**2)
            with threadpool_limits(1):
                rate(sized, 64, 0)
                rates = [rate(sized, count, count * turn) for turn in range(arguments.rounds)]
            figures = (f"{figure:,.0f}" for figure in (statistics.median(rates), min(rates), max(rates)))
            table.add_row(name, str(size), *figures)
    Console().print(table)


if __name__ == "__main__":
    main()
