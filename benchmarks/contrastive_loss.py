"""Times a contrastive loss against the network's step that it belongs to: forward and backward of both, interleaved.

Usage: PYTHONPATH=. python benchmarks/contrastive_loss.py [--batch 1024] [--width 256] [--small 8] [--device cpu]

The network sees a small batch, whose time is scaled up to the images of a step: 2 views for NT-Xent, 1 for InfoNCE
(whose text tower is left out, which makes the loss look dearer than it is).
"""

import argparse
import statistics
import time
from collections.abc import Callable

import timm
import torch

from lightning_modules.contrastive_losses import info_nce, nt_xent


def main() -> None:
    """Measure the sides in turn and print medians and shares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default="resnet50")
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--small", type=int, default=8, help="images that the network is timed on")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    device, batch = torch.device(arguments.device), arguments.batch
    model = timm.create_model(arguments.architecture, num_classes=0).to(device)
    images = torch.randn(arguments.small, 3, 224, 224, device=device)
    first, second = (torch.randn(batch, arguments.width, device=device, requires_grad=True) for _ in range(2))
    scale = torch.tensor(14.3, device=device, requires_grad=True)

    def seconds(forward: Callable[[], torch.Tensor]) -> float:
        start = time.perf_counter()
        forward().backward()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter() - start

    losses = {
        "NT-Xent": (2, lambda: nt_xent(first, second, 0.1)),
        "InfoNCE": (1, lambda: info_nce(first, second, scale)),
    }
    shares = {name: [] for name in losses}
    for number in range(arguments.rounds + 1):
        network = seconds(lambda: model(images).mean()) / arguments.small * batch
        for name, (views, loss) in losses.items():
            if number:  # the first round warms up
                shares[name].append((seconds(loss), views * network))
            else:
                seconds(loss)
    print(
        f"{arguments.architecture} at 224 px, batch {batch}, width {arguments.width}, {device}, "
        f"{torch.get_num_threads()} thread(s), torch {torch.__version__}, {arguments.rounds} rounds"
    )
    for name, pairs in shares.items():
        ratios = sorted(loss / (loss + network) for loss, network in pairs)
        loss, network = (statistics.median(side) for side in zip(*pairs, strict=True))
        print(
            f"{name}: loss {1e3 * loss:.1f} ms, network {network:.1f} s a step; "
            f"{statistics.median(ratios):.3%} of the step ({ratios[0]:.3%} to {ratios[-1]:.3%})"
        )


if __name__ == "__main__":
    main()
