"""Times a step of SGDAGC against a loop over parameters, on one network's weights and random gradients.

Usage: python benchmarks/agc.py [--architecture resnetv2_50x1_bit] [--rounds 9] [--device cpu]

Rounds are interleaved, so a busy machine slows all contenders alike; restoring gradients is not timed.
Their norms are spread widely enough that some rows are clipped and others are not; the share is printed.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from timm.utils.agc import adaptive_clip_grad
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lightning_modules.optimizers import SGDAGC, agc_parameter_groups

LR, MOMENTUM, WEIGHT_DECAY, CLIP_FACTOR, EPS = 0.1, 0.9, 1e-4, 0.01, 1e-3


class CountOps(TorchDispatchMode):
    """Counts the torch operations that run inside the context."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Counts one operation and runs it."""
        self.count += 1
        return func(*args, **(kwargs or {}))


def loop_step(parameters: list[nn.Parameter], buffers: list[Tensor], exempt: set[int]) -> None:
    """AGC and SGD with Nesterov momentum, one parameter after the other."""
    with torch.no_grad():
        for parameter, buffer in zip(parameters, buffers, strict=True):
            gradient = parameter.grad
            if id(parameter) not in exempt:
                if parameter.ndim >= 2:
                    dims = tuple(range(1, parameter.ndim))
                    weight_norm = parameter.norm(2, dim=dims, keepdim=True)
                    gradient_norm = gradient.norm(2, dim=dims, keepdim=True)
                else:
                    weight_norm, gradient_norm = parameter.norm(2), gradient.norm(2)
                bound = weight_norm.clamp(min=EPS) * CLIP_FACTOR
                clipped = gradient * (bound / gradient_norm.clamp(min=1e-6))
                gradient = torch.where(gradient_norm > bound, clipped, gradient)
            gradient = gradient.add(parameter, alpha=WEIGHT_DECAY)
            buffer.mul_(MOMENTUM).add_(gradient)
            parameter.add_(gradient.add(buffer, alpha=MOMENTUM), alpha=-LR)


def random_gradients(parameters: list[nn.Parameter]) -> list[Tensor]:
    """Gradients whose norm lies between 0.001 and 0.1 of the weights' norm, log-uniform over the units."""
    gradients = []
    for parameter in parameters:
        units = parameter.detach().reshape(len(parameter) if parameter.ndim >= 2 else 1, -1)
        bound = units.norm(dim=1, keepdim=True).clamp(min=EPS)
        target = bound * 10 ** (2 * torch.rand_like(bound) - 3)
        noise = torch.randn_like(units)
        gradients.append((noise / noise.norm(dim=1, keepdim=True) * target).reshape(parameter.shape))
    return gradients


def main() -> None:
    """Measure the sides in turn and print medians, ratios, operations and differences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default="resnetv2_50x1_bit")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.manual_seed(0)

    def build() -> nn.Module:
        return timm.create_model(arguments.architecture, num_classes=1000).to(device)

    models = [build() for _ in range(3)]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    parameters = [list(model.parameters()) for model in models]
    heads = [list(model.get_classifier().parameters()) for model in models]
    gradients = random_gradients(parameters[0])

    ours = SGDAGC(agc_parameter_groups(models[0], heads[0]), lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    buffers = [torch.zeros_like(parameter) for parameter in parameters[1]]
    exempt = {id(parameter) for parameter in heads[1]}
    timm_head = {id(parameter) for parameter in heads[2]}
    timm_clipped = [parameter for parameter in parameters[2] if id(parameter) not in timm_head]
    sgd = torch.optim.SGD(parameters[2], lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True)

    def timm_step() -> None:
        adaptive_clip_grad(timm_clipped, clip_factor=CLIP_FACTOR, eps=EPS)
        sgd.step()

    steps: dict[str, Callable[[], object]] = {
        "SGDAGC": ours.step,
        "per-parameter loop": lambda: loop_step(parameters[1], buffers, exempt),
        "timm AGC + torch SGD": timm_step,
    }

    def set_gradients(contender: int) -> None:
        for parameter, gradient in zip(parameters[contender], gradients, strict=True):
            parameter.grad = gradient.clone()

    def synchronize() -> None:
        if device.type != "cpu":
            torch.accelerator.synchronize()

    operations, milliseconds = {}, {name: [] for name in steps}
    for contender, (name, step) in enumerate(steps.items()):  # also warms up and creates the buffers
        set_gradients(contender)
        with CountOps() as counter:
            step()
        operations[name] = counter.count
    unchanged = sum(
        int(torch.isclose(new.grad.flatten(1).norm(dim=1), old.flatten(1).norm(dim=1)).sum())
        for new, old in zip(parameters[0], gradients, strict=True)
        if new.ndim >= 2
    )
    rows = sum(len(parameter) for parameter in parameters[0] if parameter.ndim >= 2)
    for _ in range(arguments.rounds):
        for contender, (name, step) in enumerate(steps.items()):
            set_gradients(contender)
            synchronize()
            start = time.perf_counter()
            step()
            synchronize()
            milliseconds[name].append(1e3 * (time.perf_counter() - start))

    size = sum(parameter.numel() for parameter in parameters[0])
    print(
        f"{arguments.architecture}: {len(parameters[0])} tensors, {size / 1e6:.1f} M parameters, {device}, ",
        end="",
    )
    print(f"{torch.get_num_threads()} thread(s), torch {torch.__version__}, {arguments.rounds} rounds, ", end="")
    print(f"{1 - unchanged / rows:.0%} of {rows} rows clipped")
    for contender, name in enumerate(steps):
        pairs = zip(milliseconds[name], milliseconds["SGDAGC"], strict=True)
        ratios = sorted(other / own for other, own in pairs)
        pairs_of_weights = zip(parameters[contender], parameters[0], strict=True)
        difference = torch.stack([(other - own).detach().abs().max() for other, own in pairs_of_weights]).max()
        print(
            f"{name:22s} median {statistics.median(milliseconds[name]):7.2f} ms  {operations[name]:5d} ops  "
            f"x{statistics.median(ratios):.2f} of SGDAGC ({ratios[0]:.2f} to {ratios[-1]:.2f})  "
            f"max |difference| {difference:.1e}"
        )


if __name__ == "__main__":
    main()
