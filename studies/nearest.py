"""Nearest training images by the cosine of standardised features, in bounded memory."""

import torch
from torch import Tensor

from studies.eigenbasis import Rows, Standardisation


def neighbours(
    query: Rows,
    rows: Rows,
    standardise: Standardisation,
    k: int,
    left_out: Tensor | None = None,
    groups: Tensor | None = None,
) -> Tensor:
    """Places of the k rows with the largest cosine to each query, nearest first: int64 (m, k).

    Args:
        query: m images.
        rows: n images.
        standardise: Statistics of the training images.
        k: Number of neighbours.
        left_out: Group of each query, int64 (m,), whose rows it may not count.
        groups: Group of each row, int64 (n,), with `left_out`; k rows at least are of other groups than any one.
    """
    nearest = torch.empty(len(query), k, dtype=torch.int64, device=standardise.mean.device)
    for part, q in query.chunks():
        q = unit_vectors(q, standardise)
        best = q.new_empty(len(q), 0)
        places = nearest.new_empty(len(q), 0)
        for span, x in rows.chunks():
            cosine = q @ unit_vectors(x, standardise).T
            if left_out is not None and groups is not None:
                cosine.masked_fill_(left_out[part, None] == groups[span], -torch.inf)
            here = torch.arange(span.start, span.stop, device=standardise.mean.device).expand(len(q), -1)
            best, places = torch.cat([best, cosine], dim=1), torch.cat([places, here], dim=1)
            best, order = best.topk(min(k, best.shape[1]), dim=1)
            places = places.gather(1, order)
        nearest[part] = places
    return nearest


def unit_vectors(x: Tensor, standardise: Standardisation) -> Tensor:
    """Standardised features (b, D) of length 1; what lies on the mean, to rounding, stays near 0."""
    x = standardise(x)
    length: Tensor = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    rounding = 1e-12 * float(torch.linalg.vector_norm(standardise.mean / standardise.scale))
    return x / length.clamp(min=rounding + 1e-300)
