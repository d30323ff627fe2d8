"""Losses of contrastive pre-training: NT-Xent between two views, InfoNCE between images and texts.

Every other sample of all ranks is a negative. Each rank averages over its own anchors, so that DDP's mean of the
gradients is the gradient of the global loss; `across_ranks=False` stays on the rank's own samples, for evaluation and
for chunks. Losses are computed in at least float32, also under autocast.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.errors import ModelError
from lightning_modules.gather import gather_with_gradient, rank_offset, world_size

LARGEST_SCALE = 100.0
"""Bound of exp(log scale), a temperature of 0.01 (Radford et al. 2021, arXiv 2103.00020, section 2.5)."""


def nt_xent(first: Tensor, second: Tensor, temperature: float, *, across_ranks: bool = True) -> Tensor:
    """Normalised temperature-scaled cross-entropy of SimCLR (Chen et al. 2020, arXiv 2002.05709, equation 1).

    An anchor's positive is the other view of its image; its negatives are the other 2N − 2 views of the N images of all
    ranks.

    Args:
        first: Projections (B, D) of one view of this rank's images, not normalised; B is the same on every rank.
        second: Those of the other view, in the same order.
        temperature: Above 0.
        across_ranks: Whether other ranks' views are negatives, too.

    Returns:
        Scalar: the mean over this rank's 2B anchors.

    Raises:
        ModelError: Shapes differ, there is a single pair, or the temperature is not above 0.
    """
    if not 0 < temperature < math.inf:
        raise ModelError(f"temperature {temperature}", valid="a finite number above 0")
    _check_pairs(first, second, across_ranks)
    with torch.autocast(first.device.type, enabled=False):
        anchors, keys, start = _normalised(first, second, across_ranks)
        own = torch.arange(len(anchors), device=anchors.device)
        logits = anchors @ keys.T / temperature
        # A view is no candidate of its own. Ranks stand one after the other, each with both of its views.
        logits = logits.scatter(1, own[:, None] + start, -torch.inf)
        return F.cross_entropy(logits, own.roll(len(first)) + start)


def info_nce(images: Tensor, texts: Tensor, scale: Tensor, *, across_ranks: bool = True) -> Tensor:
    """Symmetric InfoNCE of CLIP (Radford et al. 2021, arXiv 2103.00020, figure 3).

    Each image chooses among the N texts of all ranks, each text among their N images; the two cross-entropies are
    averaged. Equal texts in a batch are each other's negatives, as there.

    Args:
        images: Embeddings (B, D) of this rank's images, not normalised; B is the same on every rank.
        texts: Those of their texts, in the same order.
        scale: Scalar, 1 / temperature; see `clamped_scale`.
        across_ranks: Whether other ranks' images and texts are negatives, too.

    Returns:
        Scalar: the mean over this rank's 2B anchors.

    Raises:
        ModelError: Shapes differ, or there is a single pair.
    """
    _check_pairs(images, texts, across_ranks)
    with torch.autocast(images.device.type, enabled=False):
        anchors, keys, start = _normalised(images, texts, across_ranks)
        own_images, own_texts = (part * scale.to(part.dtype) for part in anchors.chunk(2))
        parts = keys.view(-1, 2, *images.shape)  # rank, side, pair
        all_images, all_texts = parts[:, 0].flatten(0, 1), parts[:, 1].flatten(0, 1)
        partner = torch.arange(len(images), device=images.device) + start // 2
        from_images = F.cross_entropy(own_images @ all_texts.T, partner)
        return (from_images + F.cross_entropy(own_texts @ all_images.T, partner)) / 2


def clamped_scale(log_scale: Tensor, largest: float = LARGEST_SCALE) -> Tensor:
    """exp(log_scale), at most `largest`, with a gradient also beyond it.

    A plain clamp has no gradient where it acts: a scale that is too large would stay so for ever. Here the gradient is
    that of the bound, so it is finite for every value, and the parameter can come back. What keeps it from growing on
    meanwhile is `clamp_log_scale_` after the step.

    Args:
        log_scale: Scalar, floating, finite: the learned parameter.
        largest: Bound of the scale.

    Returns:
        Scalar.
    """
    bounded = log_scale.detach().clamp(max=math.log(largest))
    return (bounded + (log_scale - log_scale.detach())).exp()


@torch.no_grad()
def clamp_log_scale_(log_scale: nn.Parameter, largest: float = LARGEST_SCALE) -> None:
    """Bound the learned parameter itself, in place, after an optimizer step: exp(log_scale) is at most `largest`."""
    log_scale.clamp_(max=math.log(largest))


def _normalised(first: Tensor, second: Tensor, across_ranks: bool) -> tuple[Tensor, Tensor, int]:
    """Both sides as unit vectors (2B, D), those of all ranks (W·2B, D), and the place of this rank's among them."""
    both = torch.cat([first, second])
    anchors = F.normalize(both.to(torch.promote_types(both.dtype, torch.float32)), dim=1)
    if not across_ranks:
        return anchors, anchors, 0
    return anchors, gather_with_gradient(anchors), rank_offset(len(anchors))


def _check_pairs(first: Tensor, second: Tensor, across_ranks: bool) -> None:
    if first.ndim != 2 or first.shape != second.shape:
        raise ModelError(
            f"contrastive pairs of shapes {tuple(first.shape)} and {tuple(second.shape)}",
            valid="(B, D) for both",
        )
    pairs = len(first) * (world_size() if across_ranks else 1)
    if pairs < 2:
        raise ModelError(
            f"a contrastive loss over {pairs} pair{'s' if pairs == 0 else ''} has no negatives",
            valid="2 pairs or more over all devices",
            hint="raise data.batch_size (the global batch)",
        )
