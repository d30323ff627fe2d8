"""Standardised training features, and their turn into the basis of their Gram matrix, in bounded memory.

A linear head with an L2 penalty and a free intercept does not change when its features are turned. In the basis of
the eigenvectors the penalty stays what it is, directions without variance drop out, n images need at most n - 1
numbers each, and a whole grid of penalties costs one decomposition.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK_ROWS, CHUNK_NUMBERS = 2**12, 2**23
"""Images, and numbers, of a chunk at most; in float64 64 MiB."""

STORED_NUMBERS = 2**25
"""Turned features up to this many numbers (256 MiB) are kept; larger ones are recomputed chunk by chunk."""

SCALE_FLOOR = 0.01
"""Least divisor, as a share of the features' root mean square standard deviation. A feature that hardly varies in a
few images is not blown up to the size of the others, nor are its values in other images."""


@dataclass(frozen=True)
class Rows:
    """Some rows of a feature matrix, read in chunks, so that a memory-mapped matrix need not fit into memory.

    Attributes:
        features: Floats (N, D).
        index: int64 (n,), which rows; None for all.
    """

    features: Tensor
    index: Tensor | None = None

    def __len__(self) -> int:
        return len(self.features if self.index is None else self.index)

    @property
    def width(self) -> int:
        """Number of features D."""
        return self.features.shape[1]

    def new(self, *shape: int) -> Tensor:
        """Zeros in float64 on the features' device."""
        return torch.zeros(shape, dtype=torch.float64, device=self.features.device)

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield (slice into the n rows, float64 (b, D)), in order."""
        step = max(1, min(CHUNK_ROWS, CHUNK_NUMBERS // self.width))
        for start in range(0, len(self), step):
            part = slice(start, min(start + step, len(self)))
            yield part, self.features[part if self.index is None else self.index[part]].double()


class Standardisation:
    """Centres features and divides them by their standard deviation (ddof 0, see `SCALE_FLOOR`) in some rows.

    Args:
        rows: The images of a training episode.

    Attributes:
        mean: float64 (D,).
        scale: float64 (D,), above zero; infinite for a constant feature, which says nothing of other images.
    """

    def __init__(self, rows: Rows) -> None:
        total = rows.new(rows.width)
        for _, x in rows.chunks():
            total += x.sum(dim=0)
        self.mean = total / len(rows)
        total = rows.new(rows.width)
        for _, x in rows.chunks():
            total += (x - self.mean).square().sum(dim=0)
        deviation = (total / len(rows)).sqrt()
        # The mean of equal numbers may be off by its last digit.
        deviation = torch.where(deviation > 1e-12 * self.mean.abs(), deviation, 0.0)
        floor = SCALE_FLOOR * deviation.square().mean().sqrt()
        self.scale = torch.where(deviation > 0, torch.maximum(deviation, floor), torch.inf)

    def __call__(self, x: Tensor) -> Tensor:
        """Standardise float64 (b, D)."""
        return (x - self.mean) / self.scale


class Eigenbasis:
    """Standardised features of a training episode in the basis of their Gram matrix.

    With Z = X V the turned features (n, r), r the rank: Z'Z is diagonal and holds `eigenvalues`. One eigendecomposition
    of the smaller of X X' and X'X; everything in float64.

    Args:
        rows: The episode's images.

    Attributes:
        eigenvalues: float64 (r,), above zero, ascending.
        n: Number of images.
        width: Number of features D before turning.
    """

    def __init__(self, rows: Rows) -> None:
        self.n, self.width = len(rows), rows.width
        self._rows = rows
        standardise = Standardisation(rows)
        matrix = torch.cat([standardise(x) for _, x in rows.chunks()]) if self.n <= self.width else None
        values, vectors = torch.linalg.eigh(matrix @ matrix.T if matrix is not None else _gram(rows, standardise))
        # As in numpy's matrix_rank: what is below is rounding.
        kept = values > values[-1] * max(self.n, self.width) * torch.finfo(torch.float64).eps
        self.eigenvalues, vectors = values[kept], vectors[:, kept]
        if matrix is not None:
            self._turn = matrix.T @ (vectors / self.eigenvalues.sqrt())
            self._turned: Tensor | None = vectors * self.eigenvalues.sqrt()
        else:
            self._turn, self._turned = vectors, None
        self._turn /= standardise.scale[:, None]  # now straight from raw features, but for the mean
        self._offset = standardise.mean @ self._turn
        if self._turned is None and self.n * len(self.eigenvalues) <= STORED_NUMBERS:
            self._turned = torch.cat([x @ self._turn - self._offset for _, x in rows.chunks()])

    def apply(self, coefficients: Tensor) -> Tensor:
        """Z b: float64 (n, C) from coefficients (r, C)."""
        if self._turned is not None:
            return self._turned @ coefficients
        return self.scores(self._rows, coefficients)

    def adjoint(self, values: Tensor) -> Tensor:
        """Z'v: float64 (r, C) from one value an image and column, (n, C)."""
        if self._turned is not None:
            return self._turned.T @ values
        total = self._rows.new(self.width, values.shape[1])
        for part, x in self._rows.chunks():
            total += x.T @ values[part]
        return torch.addmm(-self._offset[:, None] * values.sum(dim=0), self._turn.T, total)

    def squares(self, factors: Tensor) -> Tensor:
        """(Z * Z) f: float64 (n, A) from factors (r, A)."""
        if self._turned is not None:
            return self._turned.square() @ factors
        result = self._rows.new(self.n, factors.shape[1])
        for part, x in self._rows.chunks():
            result[part] = (x @ self._turn - self._offset).square() @ factors
        return result

    def left_out_errors(self, values: Tensor, factors: Tensor, groups: Tensor) -> Tensor:
        """Squared errors of ridge fits where the image's whole group is left out, exactly, summed: float64 (A, C).

        With H the matrix that maps values to fitted values, and e the residuals of the fit to all images, a group's are
        (I - H_gg)^-1 e_g. Memory grows with the largest group.

        Args:
            values: Centred targets, float64 (n, C).
            factors: 1 / (eigenvalue + penalty) of every penalty, float64 (r, A).
            groups: Group of every image, int64 (n,); two at least.
        """
        projected = self.adjoint(values)
        errors = values.new_zeros(factors.shape[1], values.shape[1])
        order, sizes = groups.argsort(stable=True), groups.bincount()
        starts = sizes.cumsum(0) - sizes
        limit = min(CHUNK_ROWS, CHUNK_NUMBERS // self.width)
        for size in sorted(set(sizes.tolist()) - {0}):
            span = torch.arange(size, device=order.device)
            for first in torch.split(starts[sizes == size], max(1, limit // size)):
                rows = order[first[:, None] + span]  # (B, size)
                z = self._turn_rows(rows.flatten()).reshape(*rows.shape, -1)
                for a, factor in enumerate(factors.T):
                    residuals = values[rows] - z @ (factor[:, None] * projected)
                    u = torch.cat([z * factor.sqrt(), z.new_full((*rows.shape, 1), self.n**-0.5)], dim=2)  # u u' = H_gg
                    errors[a] += _solve_less(u, residuals).square().sum(dim=(0, 1))
        return errors

    def _turn_rows(self, index: Tensor) -> Tensor:
        """Z of some of the training images, (b, r)."""
        if self._turned is not None:
            return self._turned[index]
        rows = Rows(self._rows.features, index if self._rows.index is None else self._rows.index[index])
        return torch.cat([x @ self._turn - self._offset for _, x in rows.chunks()])

    def scores(self, rows: Rows, coefficients: Tensor) -> Tensor:
        """Z b of any images, treated by the training images' statistics: float64 (m, C) from (r, C)."""
        weights = self._turn @ coefficients
        offset = self._offset @ coefficients
        result = rows.new(len(rows), coefficients.shape[1])
        for part, x in rows.chunks():
            result[part] = x @ weights - offset
        return result


def _gram(rows: Rows, standardise: Standardisation) -> Tensor:
    gram = rows.new(rows.width, rows.width)
    for _, x in rows.chunks():
        x = standardise(x)
        gram += x.T @ x
    return gram


def _solve_less(u: Tensor, values: Tensor) -> Tensor:
    """(I - u u')^-1 v for u (B, s, k) and v (B, s, C), by way of the smaller of the s x s and the k x k matrix."""
    wide = u.shape[1] <= u.shape[2]
    matrix = torch.eye(min(u.shape[1:]), dtype=u.dtype, device=u.device) - (u @ u.mT if wide else u.mT @ u)
    factor = torch.linalg.cholesky(matrix)
    if wide:
        return torch.cholesky_solve(values, factor)
    return values + u @ torch.cholesky_solve(u.mT @ values, factor)
