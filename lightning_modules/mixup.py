"""Mixup (Zhang et al. 2018, arXiv 1710.09412) as in BiT: one mixing weight and one permutation a batch."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.errors import ModelError


def mixup(
    images: Tensor,
    targets: Tensor,
    alpha: float,
    num_classes: int,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Mixes every image and target with a partner from the same batch.

    The weight λ ~ Beta(alpha, alpha) and the partners come from torch's CPU generator: `torch.manual_seed`
    governs them, they are the same on every device, and drawing them does not wait for it.

    Args:
        images: Floating (B, C, H, W), normalised.
        targets: Classes, int64 (B,), or multi-label values in [0, 1] or NaN = unknown, floating (B, L).
        alpha: Concentration of the Beta distribution, >= 0; 0 returns images and targets as they are.
        num_classes: Width of the soft targets of int64 classes.
        generator: CPU generator instead of torch's default one.

    Returns:
        Images of the same shape and soft targets, floating: (B, num_classes) for int64 targets, otherwise
        (B, L), NaN where either partner's cell is NaN.

    Raises:
        ModelError: `alpha` is negative, or the images are integers.
    """
    if not alpha >= 0:
        raise ModelError(f"mixup: alpha is {alpha}", valid=">= 0 (0 = no mixup; BiT: 0.1)")
    if alpha == 0:
        return images, targets
    if not images.is_floating_point():
        raise ModelError(f"mixup: images are {images.dtype}", hint="normalise them to floating point before mixing")
    # numpy draws Beta in log space: in float32 a ratio of two gamma draws underflows to 0/0 at small alphas.
    seed = int(torch.randint(2**63 - 1, (), generator=generator))
    weight = float(np.random.default_rng(seed).beta(alpha, alpha))
    partner = torch.randperm(len(images), generator=generator).to(images.device, non_blocking=True)
    if not targets.is_floating_point():
        targets = F.one_hot(targets, num_classes).float()
    # NaN spreads through the interpolation from either side, even at weight 0 or 1.
    return images[partner].lerp(images, weight), targets[partner].lerp(targets, weight)
