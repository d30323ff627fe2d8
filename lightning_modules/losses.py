"""Losses of classification: cross-entropy, and binary cross-entropy that knows unknown labels."""

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Softmax cross-entropy, averaged over the batch and computed in at least float32.

    Args:
        logits: (B, C), floating.
        targets: Classes, int64 (B,), or probabilities, floating (B, C).
        label_smoothing: In [0, 1]; the share of the target spread evenly over the classes.

    Returns:
        Scalar.
    """
    logits = _at_least_float32(logits)
    if targets.is_floating_point():
        targets = targets.to(logits.dtype)
    return F.cross_entropy(logits, targets, label_smoothing=label_smoothing)


def masked_bce(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy averaged over the known cells; 0 with zero gradients where none is known.

    The average is the batch's own: under DDP, ranks with few known cells weigh as much as the others.

    Args:
        logits: (B, L), floating.
        targets: (B, L), floating, in [0, 1] or NaN = unknown.

    Returns:
        Scalar, in at least float32. It never waits for the device.
    """
    logits = _at_least_float32(logits)
    known = ~targets.isnan()
    # NaN is replaced before the loss, not after: the gradient of an unused NaN branch would still be NaN.
    filled = torch.where(known, targets, 0.0).to(logits.dtype)
    cells = F.binary_cross_entropy_with_logits(logits, filled, reduction="none")
    return torch.where(known, cells, 0.0).sum() / known.sum().clamp(min=1)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
