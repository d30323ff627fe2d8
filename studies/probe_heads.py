"""Heads of the few-shot probe: pure functions from the features of a training episode to scores of other images.

Everything that is estimated, regularisation included, is estimated inside the training episode. All heads centre
features and divide them by their standard deviation (see `studies.eigenbasis`); `prototype` and `knn` then divide each
image by its length, as is usual at few shots (Wang et al. 2019, arXiv 1911.04623), so that Euclidean distance and
cosine agree. A penalty or number of neighbours is chosen where every class (both values of a label) has at least two
training images; otherwise nothing in the episode can tell, and the head's default is used. Where groups (patients) are
given, they are left out whole and "two images" means images of two groups: images of one patient know each other.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, Protocol

import torch
from torch import Tensor

from datamodules.errors import DataError, shorten
from studies.eigenbasis import CHUNK_NUMBERS, Eigenbasis, Rows, Standardisation
from studies.logistic import choose_strength, fit_logistic
from studies.nearest import neighbours, unit_vectors

Task = Literal["multiclass", "binary", "multilabel"]

ALPHAS = tuple(float(10.0 ** (power / 2)) for power in range(-10, 9))
"""Grid of ridge's penalty, 1e-5 to 1e4 in half decades, in units of D, the number of features."""

NEIGHBOURS = (1, 3, 5, 10, 20, 50, 100, 200)
"""Grid of the number of neighbours."""

LEFT_OUT = 5000
"""Leave-one-out of `knn` leaves out at most this many images, a fixed random choice: all pairs of 50,000 are many."""


@dataclass(frozen=True)
class HeadResult:
    """What a head says of the test images.

    Attributes:
        scores: float64, on the features' device: (m, C) for multiclass, the largest wins; (m, 1) for binary and (m, L)
            for multilabel, above 0 for positive.
        regularisation: What was chosen (or the default): one number for multiclass, one a label otherwise, NaN for a
            label with one value in training; None for a head that has none.
    """

    scores: Tensor
    regularisation: tuple[float, ...] | None


class Head(Protocol):
    """Fits on a training episode and scores other images."""

    def __call__(
        self, train: Tensor, labels: Tensor, test: Tensor, *, num_classes: int, task: Task, groups: Tensor | None = None
    ) -> HeadResult:
        """Score the test images.

        Args:
            train: Features of the training episode, finite floats (n, D).
            labels: int64 (n,) of 0 to C - 1 for multiclass. Floats (n, L) with 1 / 0 / NaN = unknown otherwise, L = 1
                for binary; each label is learnt by itself from the images where it is known. A label with one value
                only gets a constant score: 1 where all are positive, -1 where none is, 0 where nothing is known.
            test: Features of the images to score, finite floats (m, D), on the same device.
            num_classes: C or L; not used for binary.
            task: What `labels` are.
            groups: Group (patient) of each training image, int64 (n,), any numbers; None where each is its own.

        Raises:
            DataError: For features that are not finite (names the row), a class without a training image, or shapes
                and labels that do not fit.
        """


Solver = Callable[[Rows, Tensor, Rows, bool, Tensor | None], tuple[Tensor, Tensor]]
"""(training rows, targets float64 (n, C) of 1 / 0, test rows, exclusive, groups) to scores (m, C) and what was chosen.

Exclusive: the columns are classes, and one number (1,) is chosen. Otherwise they are labels that do not know of each
other, each with both values present, and one number a column (C,) is chosen. Groups: int64 (n,) from 0, or None where
none has two images."""


def ridge(
    train: Tensor, labels: Tensor, test: Tensor, *, num_classes: int, task: Task, groups: Tensor | None = None
) -> HeadResult:
    """Least squares on targets of 1 and -1 with an L2 penalty from `ALPHAS` and a free intercept.

    The penalty has the least squared error in exact leave-one-out (of equal ones the smallest). By default it is D, the
    mean eigenvalue of the images' Gram matrix. Arguments and result as in `Head`.
    """
    return _solve(_ridge, train, labels, test, num_classes, task, groups)


def logistic(
    train: Tensor, labels: Tensor, test: Tensor, *, num_classes: int, task: Task, groups: Tensor | None = None
) -> HeadResult:
    """Logistic regression, softmax for classes, with an L2 penalty from `studies.logistic.STRENGTHS`.

    The penalty has the least log loss in stratified folds; by default it is D / 4. Two classes
    are one label (scores are half its logit, with both signs), as in scikit-learn.
    Memory beside the features grows with n * C * folds. Arguments and result as in `Head`.
    """
    return _solve(_logistic, train, labels, test, num_classes, task, groups)


def prototype(
    train: Tensor, labels: Tensor, test: Tensor, *, num_classes: int, task: Task, groups: Tensor | None = None
) -> HeadResult:
    """Nearest class mean; scores are minus the distances.

    For a label: the distance to the mean of its negatives minus that to the mean of its positives. Arguments and
    result as in `Head`.
    """
    return HeadResult(_solve(_prototype, train, labels, test, num_classes, task, groups).scores, None)


def knn(
    train: Tensor, labels: Tensor, test: Tensor, *, num_classes: int, task: Task, groups: Tensor | None = None
) -> HeadResult:
    """Share of each class among the k nearest training images, with equal votes.

    k from `NEIGHBOURS` has the least squared error of the shares in leave-one-out (of equal ones the smallest); by
    default it is 1. For a label: the share of positives minus that of negatives. Which of equally distant images
    count is left to `torch.topk`. Arguments and result as in `Head`.
    """
    return _solve(_knn, train, labels, test, num_classes, task, groups)


HEADS: Mapping[str, Head] = MappingProxyType({"ridge": ridge, "logistic": logistic, "prototype": prototype, "knn": knn})


def _solve(
    solver: Solver, train: Tensor, labels: Tensor, test: Tensor, num_classes: int, task: Task, groups: Tensor | None
) -> HeadResult:
    """Check the episode and split it into problems without unknown labels."""
    _check_features(train, "training features")
    _check_features(test, "test features")
    if train.shape[1] != test.shape[1]:
        raise DataError(f"training features have {train.shape[1]} columns, test features {test.shape[1]}")
    _check_labels(labels, len(train), num_classes, task)
    if groups is not None and groups.shape != (len(train),):
        raise DataError(f"groups are of shape {tuple(groups.shape)}", valid=f"one of each of {len(train)} images")
    rows, tests, labels = Rows(train), Rows(test), labels.to(train.device)
    groups = None if groups is None else groups.to(train.device)
    if task == "multiclass":
        targets = rows.new(len(train), num_classes).scatter_(1, labels[:, None].long(), 1.0)
        scores, chosen = solver(rows, targets, tests, True, _several(groups))
        return HeadResult(scores, tuple(chosen.tolist()))
    known = ~labels.isnan()
    positive = (labels == 1).sum(dim=0)
    varied = (positive > 0) & (positive < known.sum(dim=0))
    sign = torch.where(known.any(dim=0), torch.where(positive > 0, 1.0, -1.0), 0.0).double()
    scores = sign.repeat(len(test), 1)
    regularisation = torch.full_like(sign, torch.nan)
    patterns, pattern_of = torch.unique(known[:, varied], dim=1, return_inverse=True)
    for number, pattern in enumerate(patterns.T):  # labels that are known for the same images share all the work
        columns = varied.nonzero()[:, 0][pattern_of == number]
        index = None if pattern.all() else pattern.nonzero()[:, 0]
        targets = labels[:, columns].double() if index is None else labels[index][:, columns].double()
        mine = _several(groups if groups is None or index is None else groups[index])
        scores[:, columns], regularisation[columns] = solver(Rows(train, index), targets, tests, False, mine)
    return HeadResult(scores, tuple(regularisation.tolist()))


def _several(groups: Tensor | None) -> Tensor | None:
    """Groups numbered from 0; None where each image is its own, which is faster."""
    if groups is None:
        return None
    names, numbers = torch.unique(groups, return_inverse=True)
    return numbers if len(names) < len(groups) else None


def _ridge(rows: Rows, targets: Tensor, test: Rows, exclusive: bool, groups: Tensor | None) -> tuple[Tensor, Tensor]:
    basis = Eigenbasis(rows)
    values = 2 * targets - 1
    mean = values.mean(dim=0)
    values = values - mean
    projected = basis.adjoint(values)
    alphas = rows.width * basis.eigenvalues.new_tensor(ALPHAS)
    shrunk = 1 / (basis.eigenvalues[:, None] + alphas)  # (r, A)
    enough = _repeated(targets, exclusive, groups)
    if groups is not None and enough.any():
        errors = basis.left_out_errors(values, shrunk, groups)
    else:
        # 1 - H_ii, H the matrix that maps values to fitted values, the intercept's 1 / n included.
        slack = 1 - 1 / len(rows) - basis.squares(shrunk)
        errors = torch.stack(
            [
                ((values - basis.apply(shrunk[:, a, None] * projected)) / slack[:, a, None]).square().sum(dim=0)
                for a in range(len(alphas))
            ]
        )
    alpha = _choose(alphas, errors, enough, default=rows.width)
    coefficients = projected / (basis.eigenvalues[:, None] + alpha)
    return basis.scores(test, coefficients) + mean, alpha


def _logistic(rows: Rows, targets: Tensor, test: Rows, exclusive: bool, groups: Tensor | None) -> tuple[Tensor, Tensor]:
    basis = Eigenbasis(rows)
    halves = exclusive and targets.shape[1] == 2
    problems = targets[:, 1:, None] if halves else targets[:, None] if exclusive else targets[:, :, None]
    strength = problems.new_full((problems.shape[1],), rows.width / 4)
    enough = _repeated(targets, exclusive, groups)
    if enough.any():
        strength[enough] = choose_strength(basis, problems[:, enough], groups)
    coefficients = fit_logistic(basis, problems, strength)
    scores = basis.scores(test, coefficients[:-1].flatten(1)) + coefficients[-1].flatten()
    return torch.cat([-scores / 2, scores / 2], dim=1) if halves else scores, strength


def _prototype(
    rows: Rows, targets: Tensor, test: Rows, exclusive: bool, groups: Tensor | None
) -> tuple[Tensor, Tensor]:
    standardise = Standardisation(rows)
    members = targets if exclusive else torch.cat([targets, 1 - targets], dim=1)
    means = rows.new(members.shape[1], rows.width)
    for part, x in rows.chunks():
        means += members[part].T @ unit_vectors(x, standardise)
    means /= members.sum(dim=0)[:, None]
    distances = rows.new(len(test), len(means))
    for part, x in test.chunks():
        distances[part] = torch.cdist(unit_vectors(x, standardise), means)
    nothing, labels = rows.new(1), targets.shape[1]
    return -distances if exclusive else distances[:, labels:] - distances[:, :labels], nothing


def _knn(rows: Rows, targets: Tensor, test: Rows, exclusive: bool, groups: Tensor | None) -> tuple[Tensor, Tensor]:
    standardise = Standardisation(rows)
    enough = _repeated(targets, exclusive, groups)
    groups = torch.arange(len(rows), device=targets.device) if groups is None else groups
    others = len(rows) - int(groups.bincount().max())  # images that every one can be compared with
    sizes = [k for k in NEIGHBOURS if k <= others] or [1]
    errors = targets.new_zeros(len(sizes), targets.shape[1])
    if enough.any():
        left_out = torch.arange(len(rows))
        if len(rows) > LEFT_OUT:
            left_out = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:LEFT_OUT]
        left_out = left_out.to(targets.device)
        query = Rows(rows.features, left_out if rows.index is None else rows.index[left_out])
        nearest = neighbours(query, rows, standardise, sizes[-1], groups[left_out], groups)
        shares = _shares(nearest, targets, sizes)
        errors = torch.stack([(shares[k] - targets[left_out]).square().sum(dim=0) for k in sizes])
    chosen = _choose(targets.new_tensor(sizes), errors, enough, default=1)
    ks = [int(k) for k in chosen]
    shares = _shares(neighbours(test, rows, standardise, max(ks)), targets, ks)
    if exclusive:
        return shares[ks[0]], chosen
    return torch.stack([2 * shares[k][:, label] - 1 for label, k in enumerate(ks)], dim=1), chosen


def _shares(nearest: Tensor, targets: Tensor, sizes: Sequence[int]) -> dict[int, Tensor]:
    """Mean targets (m, C) of the first k of each image's nearest rows (m, K), for every k of `sizes`."""
    counts, shares = targets.new_zeros(len(nearest), targets.shape[1]), {}
    for k in range(1, max(sizes) + 1):
        counts += targets[nearest[:, k - 1]]
        if k in sizes:
            shares[k] = counts / k
    return shares


def _repeated(targets: Tensor, exclusive: bool, groups: Tensor | None) -> Tensor:
    """Whether every class (1,), or both values of each label (C,), occur in two images, or groups, at least."""
    present = torch.stack([targets, 1 - targets])
    if groups is not None:
        count = int(groups.max()) + 1
        present = present.new_zeros(2, count, targets.shape[1]).index_add_(1, groups, present).clamp(max=1)
    ones, zeros = present.sum(dim=1) >= 2
    enough: Tensor = ones.all()[None] if exclusive else ones & zeros
    return enough


def _choose(grid: Tensor, errors: Tensor, enough: Tensor, default: float) -> Tensor:
    """The first of `grid` (A,) with the least of `errors` (A, C), to rounding; one for each of `enough` (1 or C,)."""
    if len(enough) == 1:
        errors = errors.sum(dim=1, keepdim=True)
    best = (errors <= errors.amin(dim=0) * (1 + 1e-9)).int().argmax(dim=0)
    return torch.where(enough, grid[best], float(default))


def _check_features(features: Tensor, what: str) -> None:
    if features.ndim != 2 or features.shape[1] == 0 or not features.is_floating_point():
        raise DataError(
            f"{what} are {features.dtype} of shape {tuple(features.shape)}", valid="floats (images, features)"
        )
    step = max(1, CHUNK_NUMBERS // features.shape[1])
    for start in range(0, len(features), step):
        rows = features[start : start + step]
        wrong = ~rows.sum(dim=1, dtype=torch.float64).isfinite()
        if wrong.any():
            row = int(wrong.nonzero()[0, 0])
            column = int((~rows[row].isfinite()).nonzero()[0, 0])
            raise DataError(
                f"{what} hold {rows[row, column].item()}",
                where=f"row {start + row}, column {column}",
                valid="finite numbers",
                hint="the network's output overflowed or an image is broken: look at this image, extract in float32",
            )


def _check_labels(labels: Tensor, n: int, num_classes: int, task: Task) -> None:
    shape: tuple[int, ...] = (n,) if task == "multiclass" else (n, 1 if task == "binary" else num_classes)
    if n == 0 or tuple(labels.shape) != shape or labels.is_floating_point() != (task != "multiclass"):
        kind = "whole numbers" if task == "multiclass" else "floats"
        raise DataError(
            f"labels of a {task} episode are {labels.dtype} of shape {tuple(labels.shape)}",
            valid=f"{kind} of shape {shape}, for at least one image",
        )
    if task == "multiclass":
        wrong = (labels < 0) | (labels >= num_classes)
        valid = f"0 to {num_classes - 1}"
    else:
        wrong = ~(labels.isnan() | (labels == 0) | (labels == 1))
        valid = "1, 0 or NaN (unknown)"
    if wrong.any():
        place = wrong.nonzero()[0].tolist()
        raise DataError(f"a label is {labels[tuple(place)].item()}", where=f"row {place[0]}", valid=valid)
    if task == "multiclass":
        missing = (labels.bincount(minlength=num_classes) == 0).nonzero()[:, 0].tolist()
        if missing:
            raise DataError(
                f"{len(missing)} of {num_classes} classes have no training image: class {shorten(missing)}",
                where="training episode",
                hint="leave these classes out, or draw the episode with at least one image of each class",
            )
