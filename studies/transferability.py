"""How well features would transfer to labels, without training a network: LogME, LEEP, neighbours, linear probe.

Labels are int64 (N,) classes, or float32 (N, L) with 1 / 0 / NaN = unknown (soft ones count from 0.5): of those every
label is scored over its known rows, and labels with one value alone are left out of the mean. Pure functions; higher is
better for all of them.
"""

from typing import TYPE_CHECKING

import numpy as np

from datamodules.errors import DataError
from studies.representations import check_features, neighbours

if TYPE_CHECKING:
    from datamodules.label_space import Task

NEIGHBOURS = 5
FOLDS = 5
VARIANCE = 0.8  # of the features, kept by the PCA of N-LEEP (Li et al. 2021)
COMPONENTS_PER_CLASS = 5  # of its Gaussian mixture (Li et al. 2021)
MIN_PER_COMPONENT = 5  # images: smaller sets get fewer components
RATIOS = np.log(10) * np.arange(-14, 10.5, 0.5)
"""Where the search for log(α / β) may start, features scaled to a largest eigenvalue of 1: no noise to no signal."""
STEPS = 25  # of the golden section: the evidence is then right to 1e-9 nats
CHUNK = 4096  # images


def logme(features: np.ndarray, labels: np.ndarray) -> float:
    """Log marginal likelihood of the labels under a Bayesian linear regression (You et al., arXiv 2102.11005).

    Each class against the rest (or each label) is a target in {0, 1}, y ~ N(Fw, 1/β) with w ~ N(0, 1/α); α and β
    maximise the evidence: β in closed form, their ratio by a search. (The paper's fixed point may end in a lower
    maximum where there are more features than images.) No intercept and no standardisation, as in the paper.

    Args:
        features: (N, D).
        labels: See the module.

    Returns:
        Mean over classes or labels of the evidence per image, nats; higher is better.

    Raises:
        DataError: Features that `check_features` refuses, or no label with two values.
    """
    targets = _targets(features, labels)
    known = ~np.isnan(targets)
    patterns, which = np.unique(np.packbits(known, axis=0), axis=1, return_inverse=True)
    found = [np.zeros(0)]
    for pattern in range(patterns.shape[1]):  # labels known for the same rows share a decomposition
        columns = which.reshape(-1) == pattern
        rows = known[:, columns.argmax()]
        found.append(_evidence(features[rows], targets[rows][:, columns]))
    return float(np.concatenate(found).mean())


def leep(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Log expected empirical prediction (Nguyen et al., arXiv 2002.12462).

    The empirical joint distribution of labels y and source classes z gives P(y | z); the score is the mean
    log Σ_z P(y_i | z) θ_i(z).

    Args:
        probabilities: θ (N, Z): what the source's classifier says of every image; rows sum to 1.
        labels: See the module.

    Returns:
        At most 0; minus the labels' entropy, or more. Labels of a multi-label set are binary problems, averaged.

    Raises:
        DataError: Rows that are no probabilities, or no label with two values.
    """
    check_features(probabilities, "probabilities")
    wrong = (probabilities < 0).any(axis=1) | (abs(probabilities.sum(axis=1, dtype=np.float64) - 1) > 1e-3)
    if wrong.any():
        raise DataError("probabilities that are negative or do not sum to 1", where=f"image {int(wrong.argmax())}")
    targets = _targets(probabilities, labels)
    if labels.ndim == 1:
        return _leep(probabilities, np.unique(labels, return_inverse=True)[1])
    scores = []
    for column in targets.T:
        known = ~np.isnan(column)
        scores.append(_leep(probabilities[known], column[known].astype(np.int64)))
    return float(np.mean(scores))


def n_leep(features: np.ndarray, labels: np.ndarray, *, seed: int = 0) -> float:
    """LEEP for a source without a classifier: the components of a Gaussian mixture stand for its classes (N-LEEP).

    As Li et al. (arXiv 2011.11200): PCA to 80 % of the variance, 5 components a class (or label, two at least). Unlike
    there, covariances are diagonal, and there are at least five images a component: full ones of many dimensions cannot
    be estimated from the few images of a target.

    Args:
        features: (N, D).
        labels: See the module.
        seed: Of the mixture's start.

    Raises:
        DataError: As `logme`.
    """
    from sklearn.decomposition import PCA
    from sklearn.mixture import GaussianMixture

    classes = _targets(features, labels).shape[1]
    components = max(1, min(COMPONENTS_PER_CLASS * max(2, classes), len(features) // MIN_PER_COMPONENT))
    values = np.asarray(features, dtype=np.float64)
    spread = values.std()
    if spread == 0:
        return leep(np.ones((len(values), 1)), labels)
    solver = "covariance_eigh" if values.shape[1] <= len(values) else "full"
    reduced = PCA(VARIANCE, svd_solver=solver).fit_transform((values - values.mean(axis=0)) / spread)
    mixture = GaussianMixture(components, covariance_type="diag", random_state=seed).fit(reduced)
    return leep(mixture.predict_proba(reduced), labels)


def knn_score(
    features: np.ndarray, labels: np.ndarray, groups: np.ndarray | None = None, *, k: int = NEIGHBOURS
) -> float:
    """Leave-one-out classification by the k nearest neighbours in cosine distance.

    Args:
        features: (N, D).
        labels: See the module.
        groups: Integers (N,), such as patients: another image of the same patient is no neighbour.
        k: Neighbours.

    Returns:
        Classes: accuracy of the majority; a tie of t classes with the true one among them counts 1 / t. Labels: mean
        AUROC of the neighbours' share of positives (their known labels; prevalence where none is known).

    Raises:
        DataError: As `logme`, or there are fewer than `k` images of other groups.
    """
    targets = _targets(features, labels)
    lengths = np.linalg.norm(np.asarray(features, dtype=np.float64), axis=1, keepdims=True)
    nearest = neighbours(features / np.maximum(lengths, np.finfo(np.float64).tiny), k, groups)
    if labels.ndim == 2:
        around = targets[nearest]  # (N, k, L)
        known = (~np.isnan(around)).sum(axis=1)
        share = np.nansum(around, axis=1) / np.maximum(known, 1)
        return _mean_auroc(np.where(known, share, np.nanmean(targets, axis=0)), targets)
    votes = np.zeros(targets.shape, dtype=np.int32)
    classes, rows = targets.argmax(axis=1), np.arange(len(targets))
    for column in nearest.T:
        votes[rows, classes[column]] += 1
    winners = votes == votes.max(axis=1, keepdims=True)
    return float((winners[rows, classes] / winners.sum(axis=1)).mean())


def probe_score(
    features: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray | None = None,
    *,
    folds: int = FOLDS,
    seed: int = 0,
) -> float:
    """Cross-validated ridge classifier on the features; its penalty is chosen inside each training fold.

    Args:
        features: (N, D).
        labels: See the module.
        groups: Integers (N,), such as patients: never on both sides.
        folds: Number of folds.
        seed: Of the folds.

    Returns:
        Mean over folds of the accuracy, of labels the mean AUROC. A class that a training fold lacks is not predicted.

    Raises:
        DataError: As `logme`, or there are fewer groups than folds.
    """
    import torch

    from studies.probe_heads import ridge

    targets = _targets(features, labels)
    scores = []
    for test in _folds(labels, groups, folds, seed):
        train = np.setdiff1d(np.arange(len(labels)), test)
        inside, outside = (torch.from_numpy(np.array(features[rows])) for rows in (train, test))
        if labels.ndim == 2:
            task: Task = "binary" if targets.shape[1] == 1 else "multilabel"
            known = torch.from_numpy(targets[train])
            found = ridge(inside, known, outside, num_classes=targets.shape[1], task=task).scores
            scores.append(_mean_auroc(found.numpy(), targets[test]))
        else:
            present, codes = np.unique(labels[train], return_inverse=True)
            classes = torch.from_numpy(codes.astype(np.int64))
            found = ridge(inside, classes, outside, num_classes=len(present), task="multiclass").scores
            scores.append(float((present[found.numpy().argmax(axis=1)] == labels[test]).mean()))
    defined = [score for score in scores if score == score]  # a fold may hold one value of each label
    return float(np.mean(defined)) if defined else float("nan")


# ---------------------------------------------------------------------------------------------------------------------


def _targets(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Targets float64 (N, L) in {0, 1, NaN}: each class against the rest, or the labels; those of one value left out.

    Raises:
        DataError: As `check_features`, labels of other rows, an unlabelled image, or no label with two values.
    """
    check_features(features)
    if len(labels) != len(features):
        raise DataError(f"{len(labels)} labels for {len(features)} images", valid="a label for every image")
    if labels.ndim == 1:
        if labels.min() < 0:
            raise DataError("an image without a class", where=f"image {int(labels.argmin())}", valid="0 or more")
        classes, places = np.unique(labels, return_inverse=True)
        targets = np.eye(len(classes))[places]
    else:
        targets = np.where(np.isnan(labels), np.nan, labels >= 0.5)
    positive, negative = (targets == 1).any(axis=0), (targets == 0).any(axis=0)
    if not (positive & negative).any():
        raise DataError(
            "the images have no label with two values", valid="two classes, or positives and negatives of a label",
            hint="take more images",
        )  # fmt: skip
    return np.asarray(targets[:, positive & negative])


def _evidence(features: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Maximum of the log evidence per image for every column of the targets, (L,)."""
    n, d = features.shape
    if d <= n:
        gram, cross = np.zeros((d, d)), np.zeros((d, targets.shape[1]))
        for start in range(0, n, CHUNK):
            part = np.asarray(features[start : start + CHUNK], dtype=np.float64)
            gram += part.T @ part
            cross += part.T @ targets[start : start + CHUNK]
        values, vectors = np.linalg.eigh(gram)
    else:
        exact = np.asarray(features, dtype=np.float64)
        values, vectors = np.linalg.eigh(exact @ exact.T)
        cross = targets
    kept = values > values[-1] * max(n, d) * np.finfo(np.float64).eps
    sigma = values[kept, None]
    squares = (vectors[:, kept].T @ cross) ** 2 / (sigma if d <= n else 1.0)  # of the targets along each direction
    sigma = sigma / values[-1] if kept.any() else sigma  # the features' scale is a matter of α alone
    total = (targets**2).sum(axis=0)
    rest = np.maximum(total - squares.sum(axis=0), 1e-12 * total)  # a perfect fit stays finite

    def evidence(log_ratio: np.ndarray) -> np.ndarray:
        """With the best β for log(α / β), (L,) or (1,) for all targets."""
        noise = 1 / (1 + sigma * np.exp(-log_ratio))  # share of the noise in the variance along each direction
        variance = ((noise * squares).sum(axis=0) + rest) / n
        return np.asarray(-0.5 * (np.log(2 * np.pi * variance) + 1 - np.log(noise).sum(axis=0) / n))

    start = RATIOS[np.stack([evidence(RATIOS[[place]]) for place in range(len(RATIOS))]).argmax(axis=0)]
    low, high = start - (RATIOS[1] - RATIOS[0]), start + (RATIOS[1] - RATIOS[0])
    golden = (np.sqrt(5) - 1) / 2
    for _ in range(STEPS):
        inner, outer = high - golden * (high - low), low + golden * (high - low)
        rises = evidence(inner) < evidence(outer)
        low, high = np.where(rises, inner, low), np.where(rises, high, outer)
    return evidence((low + high) / 2)


def _leep(probabilities: np.ndarray, classes: np.ndarray) -> float:
    """LEEP of classes 0 … C − 1."""
    joint = np.zeros((int(classes.max()) + 1, probabilities.shape[1]))
    for place in range(len(joint)):
        joint[place] = probabilities[classes == place].sum(axis=0, dtype=np.float64)
    marginal = joint.sum(axis=0)
    conditional = joint / np.where(marginal > 0, marginal, 1.0)
    total = 0.0
    for start in range(0, len(classes), CHUNK):
        rows = slice(start, start + CHUNK)
        total += np.log(np.einsum("nz,nz->n", conditional[classes[rows]], probabilities[rows])).sum()
    return float(total / len(classes))


def _folds(labels: np.ndarray, groups: np.ndarray | None, folds: int, seed: int) -> list[np.ndarray]:
    """Rows of each test fold: classes spread evenly, groups held together."""
    owners = np.arange(len(labels)) if groups is None else np.unique(groups, return_inverse=True)[1]
    if folds > owners.max() + 1:
        what = "images" if groups is None else "patients"
        raise DataError(
            f"{owners.max() + 1} {what} cannot make {folds} folds", valid=f"{folds} or more", hint="take more images"
        )
    order = np.random.default_rng(seed).permutation(owners.max() + 1)
    key = np.zeros(len(order), dtype=np.int64)
    if labels.ndim == 1:
        key[owners] = labels  # of a group with several classes one of them
    fold = np.empty(len(order), dtype=np.int64)
    fold[order[np.argsort(key[order], kind="stable")]] = np.arange(len(order)) % folds
    return [np.flatnonzero(fold[owners] == one) for one in range(folds)]


def _mean_auroc(scores: np.ndarray, targets: np.ndarray) -> float:
    """Mean AUROC of the labels over their known rows; NaN where none has both values."""
    from sklearn.metrics import roc_auc_score

    found = []
    for score, target in zip(scores.T, targets.T, strict=True):
        known = ~np.isnan(target)
        if len(np.unique(target[known])) == 2:
            found.append(roc_auc_score(target[known], score[known]))
    return float(np.mean(found)) if found else float("nan")
