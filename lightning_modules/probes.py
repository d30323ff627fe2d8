"""Probes of frozen features, closed-form and deterministic: a ridge classifier and nearest neighbours, in float64."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.metrics import ranking

STRENGTHS = (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0)
"""Grid of the ridge penalty, in units of the number of images: the mean eigenvalue of standardised features."""
MIN_IMAGES = 10
"""Fewest training images of a linear probe: a fifth of them chooses the penalty."""
FOLD = 5
CHUNK = 1024  # queries whose similarities are held at once


def linear_scores(features: Tensor, targets: Tensor, queries: Tensor) -> Tensor:
    """Scores of a ridge regression on standardised features.

    The penalty is the one of `STRENGTHS` with the least squared error on a fixed fifth of the images; the fit is then
    repeated on all of them. Targets that are known for the same images share a fit.

    Args:
        features: Training features (N, D), finite.
        targets: (N, K), 1 / 0, NaN = unknown.
        queries: Features (M, D).

    Returns:
        float64 (M, K); NaN for a target that is known for less than `MIN_IMAGES` images.
    """
    x, q = _standardised(features.double(), queries.double())
    targets = targets.double()
    scores = targets.new_full((len(q), targets.shape[1]), torch.nan)
    patterns, pattern = torch.unique(~targets.isnan(), dim=1, return_inverse=True)
    for number, known in enumerate(patterns.T):
        if known.sum() >= MIN_IMAGES:
            columns = pattern == number
            scores[:, columns] = _chosen_ridge(x[known], targets[known][:, columns], q)
    return scores


def knn_scores(
    features: Tensor, labels: Tensor, queries: Tensor, num_classes: int, neighbours: int, temperature: float
) -> Tensor:
    """Votes of the nearest training images by cosine, weighted by exp(cosine / temperature).

    After Wu et al. 2018 (arXiv 1805.01978, section 3.4), as Caron et al. 2021 (DINO, arXiv 2104.14294) use it.

    Args:
        features: Training features (N, D).
        labels: int64 (N,).
        queries: Features (M, D).
        num_classes: C.
        neighbours: Images that vote; all where there are fewer.
        temperature: Above 0.

    Returns:
        float64 (M, C), in units of the nearest image's vote.
    """
    x, q = F.normalize(features.double(), dim=1), F.normalize(queries.double(), dim=1)
    votes = x.new_zeros(len(q), num_classes)
    for chunk, counted in zip(torch.split(q, CHUNK), torch.split(votes, CHUNK), strict=True):
        cosine, place = (chunk @ x.T).topk(min(neighbours, len(x)), dim=1)
        counted.scatter_add_(1, labels[place], ((cosine - cosine[:, :1]) / temperature).exp())
    return votes


def accuracy(scores: Tensor, labels: Tensor) -> float:
    """Share of the rows of (M, C) whose largest score is at their label, int64 (M,)."""
    return float((scores.argmax(dim=1) == labels).double().mean())


def mean_auroc(scores: Tensor, labels: Tensor) -> float:
    """Mean area under the ROC curve over the labels that have one; NaN where none has.

    Args:
        scores: (M, L); a column of NaN is left out.
        labels: (M, L), 1 / 0, NaN = unknown and left out.
    """
    known = ~labels.isnan()
    columns = [column for column in range(labels.shape[1]) if not scores[:, column].isnan().any()]
    areas = np.array(
        [
            ranking(*(values[known[:, c], c].cpu().numpy() for values in (labels == 1, scores)))[0]  # truth, scores
            for c in columns
        ]
    )
    areas = areas[~np.isnan(areas)]
    return float(areas.mean()) if areas.size else np.nan


def _standardised(x: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    """Both by mean and SD of the first; a dimension of next to no spread is not blown up."""
    mean, sd = x.mean(dim=0), x.std(dim=0, correction=0)
    least = torch.stack([1e-3 * sd.square().mean().sqrt(), 1e-9 * x.abs().max()]).max()
    scale = sd.clamp(min=max(float(least), torch.finfo(x.dtype).tiny))
    return (x - mean) / scale, (queries - mean) / scale


def _chosen_ridge(x: Tensor, y: Tensor, queries: Tensor) -> Tensor:
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).to(x.device)
    held_out, rest = order[: len(x) // FOLD], order[len(x) // FOLD :]
    tried = _ridge(x[rest], y[rest], x[held_out], STRENGTHS)
    errors = torch.stack([(scores - y[held_out]).square().mean() for scores in tried])
    return next(_ridge(x, y, queries, [STRENGTHS[int(errors.argmin())]]))


def _ridge(x: Tensor, y: Tensor, queries: Tensor, strengths: Sequence[float]) -> Iterator[Tensor]:
    """Predictions (M, K) of ridge regressions with a free intercept, one for each strength."""
    mean, level = x.mean(dim=0), y.mean(dim=0)
    x, y, queries = x - mean, y - level, queries - mean
    if len(x) < x.shape[1]:  # the smaller of two equal systems: between images, or between features
        gram, right, left = x @ x.T, y, queries @ x.T
    else:
        gram, right, left = x.T @ x, x.T @ y, queries
    for strength in strengths:
        shifted = gram + strength * len(x) * torch.eye(len(gram), dtype=x.dtype, device=x.device)
        yield left @ torch.cholesky_solve(right, torch.linalg.cholesky(shifted)) + level
