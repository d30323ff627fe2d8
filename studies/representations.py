"""How alike two representations of the same images are: linear CKA, information imbalance, neighbourhood overlap.

A representation is a matrix of features (N, D): one row an image, in the same order in both. Pure functions, computed
in float64 and in chunks: for many images no N × N matrix is held, and features may be memory-mapped.
"""

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import pandas as pd

from datamodules.errors import DataError

CHUNK_BYTES = 1 << 27  # of one chunk of distances, kernels or features
MIN_ROWS = 4
"""Fewest images of any measure: HSIC_1 divides by n − 3."""
MINIBATCH = 256  # images of a minibatch; the unbiased estimate hardly depends on it
MEASURES = ("linear_cka", "minibatch_cka", "imbalance_ab", "imbalance_ba", "overlap")
"""Columns of `compare`: for the imbalances 0 is alike, for the others 1."""


def linear_cka(a: np.ndarray, b: np.ndarray) -> float:
    """Linear centred kernel alignment (Kornblith et al., arXiv 1905.00414), exact.

    ‖AᵀB‖² / (‖AᵀA‖ ‖BᵀB‖) of the centred features, in Frobenius norms. The cheaper of two equal forms is used: products
    of features (D × D) for many images, or of images (N × N, in chunks of rows) for many features. The estimate is
    biased: independent features of few images have a CKA near 1 once D is above N; `minibatch_cka` has no such bias.

    Args:
        a: Features (N, D).
        b: Features (N, E) of the same images.

    Returns:
        In [0, 1]: 1 for representations that are equal up to rotation and isotropic scale. NaN where one is constant.

    Raises:
        DataError: The numbers of images differ, there are fewer than `MIN_ROWS`, or a value is not finite.
    """
    _check_pair(a, b)
    n, d, e = len(a), a.shape[1], b.shape[1]
    if _is_constant(a) or _is_constant(b):
        return np.nan
    means = a.mean(axis=0, dtype=np.float64), b.mean(axis=0, dtype=np.float64)
    if n * (d + e) < d * d + e * e + d * e:
        cross, own_a, own_b = _kernel_products(a - means[0], b - means[1])
    else:
        cross, own_a, own_b = (
            float(np.square(_product(x, y, mean_x, mean_y)).sum())
            for x, y, mean_x, mean_y in ((a, b, *means), (a, a, means[0], means[0]), (b, b, means[1], means[1]))
        )
    return float(cross / (np.sqrt(own_a) * np.sqrt(own_b)))


def minibatch_cka(batches: Iterable[tuple[np.ndarray, np.ndarray]]) -> float:
    """Linear CKA from the unbiased HSIC_1 of minibatches (Song et al. 2012; Nguyen et al., arXiv 2010.15327).

    HSIC_1 is averaged over the batches for each of the three terms, then the ratio is taken; so memory is that of one
    batch, and the expected value of each term does not depend on the batch size. Draw the batches at random: those of a
    table that is sorted by class would see one class each.

    Args:
        batches: Pairs of features (n, D) and (n, E) of the same n ≥ 4 images.

    Returns:
        At most 1 (equal representations), about 0 for independent ones, and slightly below by chance. NaN where one
        is constant.

    Raises:
        DataError: As `linear_cka`, for any of the batches; or there is none.
    """
    total, count = np.zeros(3), 0
    for a, b in batches:
        _check_pair(a, b)
        own, other = _bare_kernel(a), _bare_kernel(b)
        total += _hsic1(own, other), _hsic1(own, own), _hsic1(other, other)
        count += 1
    if not count:
        raise DataError("no minibatch to compare", valid="one or more")
    cross, own_a, own_b = (total / count).tolist()
    return float(cross / (np.sqrt(own_a) * np.sqrt(own_b))) if min(own_a, own_b) > 0 else np.nan


def random_batches(
    a: np.ndarray, b: np.ndarray, size: int = MINIBATCH, seed: int = 0
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Split the rows of two representations into random batches of about `size` and at least `MIN_ROWS` rows."""
    order = np.random.default_rng(seed).permutation(len(a))
    for rows in np.array_split(order, max(1, min(round(len(a) / size), len(a) // MIN_ROWS))):
        inside = np.sort(rows)  # memory-mapped features are read in one direction
        yield a[inside], b[inside]


def information_imbalance(a: np.ndarray, b: np.ndarray) -> float:
    """Information imbalance Δ(A → B) (Glielmo et al., PNAS Nexus 2022): is the nearest neighbour in A near in B, too?

    Ranks of Euclidean distances start at 1 for the nearest neighbour, as in the paper. Its Δ = 2/N · mean rank is 2/N
    for equal representations; here the finite sample is corrected for, Δ = 2 (mean rank − 1) / (N − 2), which is
    exactly 0 for equal ones, 1 in expectation for independent ones, and the paper's value for large N.

    Ties: of equally near neighbours in A one is drawn at random, the same in every call; its rank in B is 1 + the
    number of rows that are strictly nearer. So everything predicts a constant (Δ = 0), and a constant predicts nothing.

    Args:
        a: Features (N, D).
        b: Features (N, E) of the same images.

    Returns:
        0 where A predicts B, about 1 where it has no information on B.

    Raises:
        DataError: As `linear_cka`.
    """
    _check_pair(a, b)
    return float(_imbalances(b, neighbours(a, 1))[0])


def neighbourhood_overlap(a: np.ndarray, b: np.ndarray, k: int) -> float:
    """Mean share of the k nearest neighbours (Euclidean) that both representations have in common.

    Ties at the k-th place are broken as by `neighbours`, so that a neighbourhood always has k members.

    Args:
        a: Features (N, D).
        b: Features (N, E) of the same images.
        k: Neighbours, 1 to N − 1.

    Returns:
        1 for equal neighbourhoods; k / (N − 1) in expectation for independent ones.

    Raises:
        DataError: As `linear_cka`, or `k` is out of range.
    """
    _check_pair(a, b)
    return _shared(neighbours(a, k), neighbours(b, k))


def neighbours(x: np.ndarray, k: int, groups: np.ndarray | None = None) -> np.ndarray:
    """The k nearest other rows of every row by Euclidean distance.

    Of rows that are tied at the k-th place some are drawn at random, the same in every call: the lowest ones would make
    hubs of the first rows, and tables are often sorted by class.

    Args:
        x: Features (N, D).
        k: Neighbours of each row.
        groups: Integers (N,), such as patients: rows of one group are no neighbours of each other.

    Returns:
        int64 (N, k), each row ascending.

    Raises:
        DataError: `k` is out of range.
    """
    n = len(x)
    others = n - (1 if groups is None else int(np.unique(groups, return_counts=True)[1].max()))
    if not 1 <= k <= others:
        raise DataError(
            f"no {k} neighbours among {others} other images", valid=f"1 to {others}", hint="take more images"
        )
    rng = np.random.default_rng(0)
    found = np.empty((n, k), dtype=np.int64)
    for rows, distances in _distances(x):
        if groups is not None:
            distances[groups[rows, None] == groups] = np.inf
        least = distances.min(axis=1) if k == 1 else np.partition(distances, k - 1, axis=1)[:, k - 1]
        chosen = distances <= least[:, None]
        surplus = np.count_nonzero(chosen, axis=1) - k
        for row in np.flatnonzero(surplus).tolist():
            tied = np.flatnonzero(distances[row] == least[row])
            chosen[row, rng.permutation(tied)[: surplus[row]]] = False
        found[rows] = chosen.nonzero()[1].reshape(-1, k)
    return found


def compare(
    a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray], *, k: int = 10, batch: int = MINIBATCH, seed: int = 0
) -> pd.DataFrame:
    """Compare every layer of one network with every layer of another one on the same images, by all measures.

    Each layer's distances are computed twice, however many layers it is compared with.

    Args:
        a: Layer's name → features (N, D).
        b: The same of the other network.
        k: Neighbours of the overlap; fewer where there are not so many images.
        batch: Images of a minibatch of the unbiased CKA.
        seed: Of the minibatches.

    Returns:
        One row a pair: "layer_a", "layer_b" and `MEASURES`; imbalance_ab is Δ(A → B).

    Raises:
        DataError: As `linear_cka`.
    """
    first = next(iter(a.values()))
    for x in (*a.values(), *b.values()):
        _check_pair(first, x)
    size = len(first)
    sides = (a, b)
    nearest = [np.hstack([neighbours(x, 1) for x in side.values()]) for side in sides]
    around = [[neighbours(x, min(k, size - 1)) for x in side.values()] for side in sides]
    forward = np.stack([_imbalances(y, nearest[0]) for y in b.values()], axis=1)
    backward = np.stack([_imbalances(x, nearest[1]) for x in a.values()])
    rows = [
        {
            "layer_a": name_a,
            "layer_b": name_b,
            "linear_cka": linear_cka(x, y),
            "minibatch_cka": minibatch_cka(random_batches(x, y, batch, seed)),
            "imbalance_ab": float(forward[i, j]),
            "imbalance_ba": float(backward[i, j]),
            "overlap": _shared(around[0][i], around[1][j]),
        }
        for i, (name_a, x) in enumerate(a.items())
        for j, (name_b, y) in enumerate(b.items())
    ]
    return pd.DataFrame(rows, columns=["layer_a", "layer_b", *MEASURES])


def check_features(x: np.ndarray, name: str = "features") -> None:
    """Refuse what is no matrix of finite features of enough images.

    Raises:
        DataError: Not two dimensions, fewer than `MIN_ROWS` rows, no column, or NaN or infinite values.
    """
    if x.ndim != 2 or x.shape[0] < MIN_ROWS or not x.shape[1]:
        raise DataError(f"{name} of shape {x.shape}", valid=f"(N, D) with N ≥ {MIN_ROWS} images and D ≥ 1 features")
    for rows in _chunks(len(x), x.shape[1]):
        finite = np.isfinite(x[rows]).all(axis=1)
        if not finite.all():
            raise DataError(
                f"{name} with NaN or infinite values",
                where=f"image {rows.start + int(finite.argmin())} of {len(x)}",
                hint="the weights or the image are damaged, or the network overflows in half precision",
            )


# ---------------------------------------------------------------------------------------------------------------------


def _check_pair(a: np.ndarray, b: np.ndarray) -> None:
    check_features(a, "features of A")
    check_features(b, "features of B")
    if len(a) != len(b):
        raise DataError(f"features of {len(a)} and {len(b)} images", valid="the same images in the same order in both")


def _chunks(rows: int, columns: int) -> Iterator[slice]:
    """Slices of rows of which each has about `CHUNK_BYTES` of float64."""
    step = max(1, CHUNK_BYTES // (8 * columns))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _product(a: np.ndarray, b: np.ndarray, mean_a: np.ndarray, mean_b: np.ndarray) -> np.ndarray:
    """AᵀB of the centred features, float64 (D, E)."""
    product = np.zeros((a.shape[1], b.shape[1]))
    for rows in _chunks(len(a), a.shape[1] + b.shape[1]):
        product += (a[rows] - mean_a).T @ (b[rows] - mean_b)
    return product


def _kernel_products(a: np.ndarray, b: np.ndarray) -> tuple[float, float, float]:
    """⟨K, L⟩, ⟨K, K⟩ and ⟨L, L⟩ of the kernels K = AAᵀ and L = BBᵀ of centred float64 features."""
    total = np.zeros(3)
    for rows in _chunks(len(a), 2 * len(a)):
        own, other = a[rows] @ a.T, b[rows] @ b.T
        total += np.vdot(own, other), np.vdot(own, own), np.vdot(other, other)
    cross, own_a, own_b = total.tolist()
    return cross, own_a, own_b


def _bare_kernel(x: np.ndarray) -> np.ndarray:
    """Linear kernel without its diagonal; zeros for a constant."""
    if _is_constant(x):
        return np.zeros((len(x), len(x)))
    centred = x - x.mean(axis=0, dtype=np.float64)  # HSIC_1 does not depend on the mean, its rounding errors do
    kernel = centred @ centred.T
    np.fill_diagonal(kernel, 0.0)
    return np.asarray(kernel)


def _hsic1(a: np.ndarray, b: np.ndarray) -> float:
    """Unbiased HSIC of two kernels without their diagonals; equation 5 of Song et al. 2012."""
    n = len(a)
    trace = np.vdot(a, b)
    sums = a.sum() * b.sum() / ((n - 1) * (n - 2))
    mixed = 2 * (a.sum(axis=0) @ b.sum(axis=0)) / (n - 2)
    return float((trace + sums - mixed) / (n * (n - 3)))


def _is_constant(x: np.ndarray) -> bool:
    """Whether all images have the same features: their centred values would be rounding errors alone."""
    return all(bool((x[rows] == x[0]).all()) for rows in _chunks(len(x), x.shape[1]))


def _distances(x: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Slices of rows with numbers in the order of their Euclidean distances to all rows, float64 (n, N).

    Squared distances without the row's own square: the order within a row does not need it. Infinite to themselves.
    """
    x = x - np.asarray(x[0], dtype=np.float64)  # a common offset would cancel; one image's is exact, so that ties stay
    squares = np.einsum("nd,nd->n", x, x)
    for rows in _chunks(len(x), len(x)):
        distances = (-2 * x[rows]) @ x.T
        distances += squares
        own = np.arange(rows.start, rows.stop)
        distances[own - rows.start, own] = np.inf
        yield rows, distances


def _imbalances(b: np.ndarray, nearest: np.ndarray) -> np.ndarray:
    """Δ(A → B) for several A, (M,), given the nearest neighbours in each, int64 (N, M)."""
    n = len(b)
    nearer = np.zeros(nearest.shape[1], dtype=np.int64)
    for rows, distances in _distances(b):
        for place, column in enumerate(nearest[rows].T):
            own = np.take_along_axis(distances, column[:, None], axis=1)
            nearer[place] += np.count_nonzero(distances < own)
    return np.asarray(2 * nearer / (n * (n - 2)))


def _shared(a: np.ndarray, b: np.ndarray) -> float:
    """Mean share of common members of neighbourhoods, int64 (N, k) each."""
    n, k = a.shape
    start = np.arange(n)[:, None] * n  # rows apart, so that one set operation serves all
    return float(len(np.intersect1d(a + start, b + start, assume_unique=True)) / (n * k))
