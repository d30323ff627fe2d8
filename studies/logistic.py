"""Logistic regression with an L2 penalty, several problems at once: scikit-learn's objective on torch tensors.

The objective of a problem is the sum over its images of the log loss, plus strength / 2 times the squared weights;
intercepts are free. That is scikit-learn's with C = 1 / strength. Problems (labels, folds) are independent; they are
minimised together because they share every pass over the features.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from studies.eigenbasis import Eigenbasis

STRENGTHS = tuple(float(10.0**power) for power in range(4, -5, -1))
"""Grid of the penalty, 1e4 to 1e-4, in units of D / 4: the number of standardised features, which is the mean
eigenvalue of a few images' Gram matrix, times the largest curvature of the log loss."""

FOLDS = 5
FOLD_SEED = 0

FINAL = (1.0, 0.1, 0.01, 1e-7)
"""Largest gradients, in coordinates where the curvature is about 1, at which the stages of a fit end. With the last one
logits of up to 30 were right to 2e-5 (down to a penalty of 1e-4 units)."""

SELECTION = (0.1, 0.01)
"""The same for fits that only choose a penalty: held-out losses differ by far more between two of them."""

ITERATIONS = 1000


def fit_logistic(
    basis: Eigenbasis,
    targets: Tensor,
    strength: Tensor,
    weights: Tensor | None = None,
    start: Tensor | None = None,
    tolerances: Sequence[float] = FINAL,
) -> Tensor:
    """Minimise B objectives by L-BFGS in coordinates that make the curvature about 1 in every direction.

    The curvature of the log loss falls as a fit gets confident, so it is measured anew at every stage: with well
    separated classes this takes 40 passes over the features instead of 700.

    Args:
        basis: The n training images, of rank r.
        targets: float64 (n, B, C), 1 / 0. C = 1: one label each, a sigmoid; C > 1: classes, a softmax.
        strength: float64 (B,), above zero.
        weights: float64 (n, B), weight of an image in a problem; None for 1.
        start: Coefficients to start from; None for zero.
        tolerances: See `FINAL`.

    Returns:
        float64 (r + 1, B, C): coefficients in the eigenbasis, then the intercepts.
    """
    from scipy.optimize import minimize

    shape = (len(basis.eigenvalues) + 1, *targets.shape[1:])
    penalty = torch.cat([strength.expand(shape[0] - 1, -1), torch.zeros_like(strength)[None]])[:, :, None]
    spread = torch.cat([basis.eigenvalues, basis.eigenvalues.new_tensor([basis.n])])[:, None, None]
    coefficients = targets.new_zeros(shape) if start is None else start

    for tolerance in tolerances:
        _, slope = _log_loss(linear(basis, coefficients), torch.zeros_like(targets))  # the probabilities
        curvature = (slope * (1 - slope)).mean(dim=(0, 2)).clamp(min=1e-9)
        scale = (curvature[:, None] * spread + penalty).rsqrt()

        def objective(flat: npt.NDArray[np.float64], scale: Tensor = scale) -> tuple[float, npt.NDArray[np.float64]]:
            coefficients = torch.from_numpy(flat).to(targets.device).reshape(shape) * scale
            loss, slope = _log_loss(linear(basis, coefficients), targets)
            if weights is not None:
                loss, slope = loss * weights, slope * weights[:, :, None]
            value = loss.sum() + (penalty * coefficients.square()).sum() / 2
            inner = basis.adjoint(slope.flatten(1)).reshape(-1, *shape[1:])
            gradient = torch.cat([inner, slope.sum(dim=0, keepdim=True)]) + penalty * coefficients
            return value.item(), (gradient * scale).flatten().cpu().numpy()

        first = (coefficients / scale).flatten().cpu().numpy()
        options = {"maxiter": ITERATIONS, "maxfun": 2 * ITERATIONS, "gtol": tolerance, "ftol": 0.0, "maxcor": 20}
        found = minimize(objective, first, jac=True, method="L-BFGS-B", options=options).x
        coefficients = torch.from_numpy(found).to(targets.device).reshape(shape) * scale
    return coefficients


def linear(basis: Eigenbasis, coefficients: Tensor) -> Tensor:
    """Logits of the training images: float64 (n, B, C) from coefficients (r + 1, B, C)."""
    shape = (basis.n, *coefficients.shape[1:])
    return basis.apply(coefficients[:-1].flatten(1)).reshape(shape) + coefficients[-1]


def choose_strength(basis: Eigenbasis, targets: Tensor, groups: Tensor | None = None) -> Tensor:
    """Choose a penalty from `STRENGTHS` for each problem by itself: the least log loss in stratified folds.

    There are `FOLDS` folds, or as many as the smallest class has images (or groups). Features keep the statistics of
    the whole episode.

    Args:
        basis: The n training images.
        targets: float64 (n, B, C) as in `fit_logistic`; every class, or both values of a label, in two groups at least.
        groups: Group of every image, int64 (n,), which no fold divides; None where each is its own.

    Returns:
        float64 (B,); of equally good strengths the largest.
    """
    folds = [_folds(targets[:, problem], groups) for problem in range(targets.shape[1])]
    problem = torch.tensor([b for b, fold in enumerate(folds) for _ in range(int(fold.max()) + 1)])
    held_out = torch.cat([fold[:, None] == torch.arange(int(fold.max()) + 1) for fold in folds], dim=1)
    problem, held_out = problem.to(targets.device), held_out.to(targets.device)
    repeated, weights = targets[:, problem], (~held_out).double()
    strengths = targets.new_tensor(STRENGTHS) * (basis.width / 4)
    losses, coefficients = [], None
    for strength in strengths:  # each starts from its stronger neighbour's solution
        coefficients = fit_logistic(basis, repeated, strength.expand(len(problem)), weights, coefficients, SELECTION)
        loss, _ = _log_loss(linear(basis, coefficients), repeated)
        total = targets.new_zeros(targets.shape[1])
        losses.append(total.index_add_(0, problem, (loss * held_out).sum(dim=0)))
    return strengths[torch.stack(losses).argmin(dim=0)]


def _folds(targets: Tensor, groups: Tensor | None) -> Tensor:
    """Number of the fold in which each image is held out, int64 (n,), from targets (n, C) and groups (n,).

    -1 where the others lack a class: groups of several classes cannot always be divided evenly.
    """
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    classes = (targets[:, 0] if targets.shape[1] == 1 else targets.argmax(dim=1)).long().cpu().numpy()
    owners = None if groups is None else groups.cpu().numpy()
    units = classes if owners is None else np.unique(np.stack([classes, owners]), axis=1)[0]
    counts = np.bincount(units)
    kind = StratifiedKFold if owners is None else StratifiedGroupKFold
    splitter = kind(min(FOLDS, int(counts[counts > 0].min())), shuffle=True, random_state=FOLD_SEED)
    folds = np.zeros(len(classes), dtype=np.int64)
    lacking = []
    for number, (rest, held_out) in enumerate(splitter.split(classes, classes, owners)):
        folds[held_out] = number
        if owners is not None and len(np.unique(classes[rest])) < np.count_nonzero(counts):
            lacking.append(number)
    useless = np.isin(folds, lacking)
    return torch.from_numpy(folds if useless.all() else np.where(useless, -1, folds))


def _log_loss(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log loss (n, B) of logits (n, B, C), and its slope in the logits (n, B, C)."""
    if logits.shape[2] == 1:
        return (logits.logaddexp(logits.new_zeros(())) - targets * logits)[:, :, 0], logits.sigmoid() - targets
    return logits.logsumexp(dim=2) - (targets * logits).sum(dim=2), logits.softmax(dim=2) - targets
