"""Has a representation collapsed? The spread and the effective rank of its features."""

import torch
import torch.nn.functional as F
from torch import Tensor


def feature_sd(features: Tensor) -> float:
    """Mean over the dimensions of the standard deviation of l2-normalised features, times √D.

    After Chen & He (SimSiam, arXiv 2011.10566, section 4.1), who compare it with 1/√D: 1 for features that point in all
    directions alike, 0 where all images have the same ones. Features that are never negative, as after a ReLU, stay
    below 1.

    Args:
        features: (N, D), N ≥ 1.

    Returns:
        In [0, 1].
    """
    unit = F.normalize(features.double(), dim=1)
    return float(unit.std(dim=0, correction=0).mean() * unit.shape[1] ** 0.5)


def effective_rank(features: Tensor) -> float:
    """Exponential of the entropy of the centred features' normalised singular values (Roy & Vetterli 2007).

    Args:
        features: (N, D), N ≥ 1.

    Returns:
        From 1 to min(N − 1, D): the number of directions that the features use, were they used alike; 0 for constant
        features, which use none.
    """
    features = features.double()
    centred = features - features.mean(dim=0)
    # The Gram matrix of the shorter side: its eigenvalues cost a fraction of a singular value decomposition.
    gram = centred @ centred.T if len(centred) < centred.shape[1] else centred.T @ centred
    squares = torch.linalg.eigvalsh(gram)
    # Below this is only rounding: of the decomposition, and of centring features that lie far from the origin.
    rounding = torch.finfo(squares.dtype).eps * len(gram) * squares[-1]
    offset = torch.finfo(squares.dtype).eps ** 2 * features.square().sum() * len(features)
    singular = squares[squares > torch.maximum(rounding, offset)].sqrt()
    shares = singular / singular.sum()
    return float(torch.special.entr(shares).sum().exp()) if len(shares) else 0.0
