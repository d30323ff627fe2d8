"""Few-shot probes on cached features against probing through the backbone at every step.

    OMP_NUM_THREADS=1 python benchmarks/probe.py [--backbone resnet18] [--image-size 64] [--steps 100] [--batch 64]

Cached: one forward pass of every training and test image, then ridge, penalty chosen by leave-one-out, for each of
7 numbers of shots x 20 seeds, with scores of all test images; measured whole. "full" is fitted 20 times, although all
its draws are the same, so that both sides do the same 140 probes.
Through the backbone: a linear layer trained by SGD on the frozen backbone, whose forward pass is part of every step.
A step is measured (median) for every size of batch that occurs, the smaller of --batch and the episode, and multiplied
by steps x episodes. Left out, in favour of this side: its passes over the test images, its choice of a penalty or
learning rate, and reading and decoding images.
"""

import argparse
import os
import statistics
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import timm
import torch

from studies.episodes import draw_episodes
from studies.probe_heads import ridge

SHOTS = (1, 5, 10, 20, 50, 100, "full")
SEEDS = 20
CLASSES = 10


def make_images(n, size, seed):
    """Noise around a pattern of each class: uint8 (n, 3, size, size) and labels."""
    random = torch.Generator().manual_seed(seed)
    patterns = torch.rand(CLASSES, 3, size, size, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(n) % CLASSES
    images = 0.15 * patterns[labels] + 0.85 * torch.rand(n, 3, size, size, generator=random)
    return (255 * images).byte(), labels


def forward(backbone, images):
    """Pooled features of uint8 images, the way both sides get them."""
    with torch.no_grad():
        return backbone(images.float().sub_(127.5).div_(57.0))


def cached(backbone, train, labels, test, truth, batch):
    """Seconds of extraction and of all probes, and the mean accuracy by shots."""
    started = time.perf_counter()
    pool, held_out = (torch.cat([forward(backbone, part) for part in images.split(batch)]) for images in (train, test))
    extraction = time.perf_counter() - started
    started, accuracy = time.perf_counter(), {}
    for shots in SHOTS:
        for seed in range(SEEDS):
            (episode,) = draw_episodes(labels.numpy(), None, [shots], [seed])
            rows = torch.from_numpy(episode.rows)
            scores = ridge(pool[rows], labels[rows], held_out, num_classes=CLASSES, task="multiclass").scores
            accuracy.setdefault(shots, []).append((scores.argmax(dim=1) == truth).double().mean().item())
    return extraction, time.perf_counter() - started, {shots: np.mean(values) for shots, values in accuracy.items()}


def through_the_backbone(backbone, train, labels, batch, repeats):
    """Median seconds of a step of a linear layer on the frozen backbone."""
    head = torch.nn.Linear(backbone.num_features, CLASSES)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.01, momentum=0.9)
    seconds = []
    for _ in range(repeats + 2):
        started = time.perf_counter()
        loss = torch.nn.functional.cross_entropy(head(forward(backbone, train[:batch])), labels[:batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[2:])


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--train", type=int, default=2000, help="images that episodes are drawn from")
    parser.add_argument("--test", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=100, help="SGD steps of a probe through the backbone")
    parser.add_argument("--batch", type=int, default=64, help="images of such a step, and of a pass of the extraction")
    parser.add_argument("--repeats", type=int, default=9, help="steps that are measured")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    backbone = timm.create_model(options.backbone, num_classes=0).eval()
    train, labels = make_images(options.train, options.image_size, 1)
    test, truth = make_images(options.test, options.image_size, 2)

    sizes = [options.train if shots == "full" else min(shots * CLASSES, options.train) for shots in SHOTS]
    batches = [min(size, options.batch) for size in sizes]

    def measure_steps():
        return {n: through_the_backbone(backbone, train, labels, n, options.repeats) for n in sorted(set(batches))}

    before = measure_steps()
    extraction, probes, accuracy = cached(backbone, train, labels, test, truth, options.batch)
    after = measure_steps()  # on both sides of the other measurement: the machine may have got slower or faster
    step = {batch: (before[batch] + after[batch]) / 2 for batch in before}
    episodes, whole = len(SHOTS) * SEEDS, extraction + probes
    total = options.steps * SEEDS * sum(step[batch] for batch in batches)
    print(
        f"{options.backbone} at {options.image_size} px, {backbone.num_features} features, {CLASSES} classes, "
        f"{options.train} training and {options.test} test images, {episodes} episodes, 1 thread"
    )
    print("accuracy of ridge by shots: " + ", ".join(f"{shots}: {value:.2f}" for shots, value in accuracy.items()))
    print(
        f"cached: {extraction:.1f} s extraction + {probes:.1f} s of {episodes} ridge probes = {whole:.1f} s, measured"
    )
    print("through the backbone, measured: ", end="")
    print(", ".join(f"{1e3 * seconds:.0f} ms a step of {batch} images" for batch, seconds in step.items()))
    print(f"through the backbone, x {options.steps} steps x {episodes} episodes: {total:.0f} s, multiplied, not run")
    print(f"ratio {total / whole:.0f}x")


if __name__ == "__main__":
    main()
