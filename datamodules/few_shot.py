"""Few-shot sets and nested subsets as pure functions of labels: no image is opened.

A set is a function of (labels, groups, seed) that grows: with the same seed the 1-shot set lies inside the
5-shot set. Random numbers are the raw 64-bit output of PCG64 under a SeedSequence, whose streams numpy keeps
fixed across versions and platforms (NEP 19); it promises no such thing for `Generator.permutation` or
`choice`.
"""

import warnings
import zlib
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from datamodules.errors import DataError, shorten
from datamodules.splits import (
    BoolArray,
    Int64Array,
    UInt64Array,
    check_seed,
    distinct,
    group_minimum,
    group_order,
    rank_within,
    rarity,
)


def sample(
    labels: npt.NDArray[Any],
    shots: int | str,
    seed: int,
    groups: npt.ArrayLike | None = None,
    *,
    class_names: Sequence[str] | None = None,
    on_small: Literal["error", "warn"] = "error",
    one_per_group: bool = True,
) -> Int64Array:
    """Draw a nested few-shot set.

    Multi-class: exactly k images of every class of `class_names` (without names: of every class that occurs).
    Multi-label: every label orders its positives by a random order of its own; the set is the union of the
    first k of all labels and of the first k images that are positive for none. So a label has at least k
    positives, and more where images drawn for other labels have it too. Positive for none is an image where
    no label is 1 and at least one is known to be 0. A single label gives k positives and k negatives. Values
    other than 1 and 0 are unknown and never count.

    With `groups` each group first keeps one image, of a class or label chosen so that small classes lose as
    few candidates as possible (see `_one_per_group`). Which images go depends on the seed and never on k: a
    patient is at most once in a set, and sets stay nested.

    Args:
        labels: int64 (N,) with -1 = unlabelled, or float32 (N, L) with 1 / 0 / NaN.
        shots: k, as a number or text, or "full" for all rows.
        seed: Non-negative; sets of different seeds are independent draws.
        groups: (N,) group (patient) of every row.
        class_names: Names of the C classes or L labels.
        on_small: What a class with fewer than k images is: an error, or a warning and all there are.
        one_per_group: False ignores `groups`.

    Returns:
        int64, row indices in ascending order.

    Raises:
        DataError: A class is too small, nothing is labelled, `shots` is no number, or names do not fit.
    """
    k = _parse_shots(shots)
    if k is None:
        return np.arange(len(labels), dtype=np.int64)
    check_seed(seed, "few_shot_seed")
    labels = _check_labels(labels, class_names)
    names = _stratum_names(labels, class_names)
    rows = np.flatnonzero(labels >= 0 if labels.ndim == 1 else ((labels == 0) | (labels == 1)).any(axis=1))
    if len(rows) == 0:
        raise DataError(f"none of {len(labels)} rows has a known label to draw from", where=f"shots={shots}")
    expected = np.arange(len(names))
    if labels.ndim == 1 and class_names is None:
        expected = np.flatnonzero(np.bincount(labels[rows]))
    if groups is not None and one_per_group:
        rows = rows[_one_per_group(labels, rows, groups, len(names), seed)]
    draw = _draw_classes if labels.ndim == 1 else _draw_labels
    chosen, counts = draw(labels if len(rows) == len(labels) else labels[rows], k, len(names), seed)
    grouped = groups is not None and one_per_group
    _report_small(counts[expected], [names[i] for i in expected], k, on_small, grouped=grouped)
    return rows[chosen]


def subset(
    n_or_labels: int | npt.NDArray[Any],
    *,
    num_images: int | None = None,
    fraction: float | None = None,
    seed: int,
    groups: npt.ArrayLike | None = None,
) -> Int64Array:
    """Draw a nested subset at natural prevalence.

    Multi-class labels are stratified: with n_c of N images in class c, a subset of m images has m * n_c / N
    of them, rounded, to ±1 (unlabelled rows count as a class). Multi-label sets are drawn at random. Where
    groups have several images, a group belongs to the stratum of its rarest class; in each stratum whole groups
    are taken in random order and the last one is cut, so that the number of images is exact.

    Args:
        n_or_labels: Number of rows N, int64 (N,) labels, or float32 (N, L) labels.
        num_images: Size of the subset, 1 to N.
        fraction: Or its share in (0, 1], rounded to whole images, at least one.
        seed: Non-negative; the smaller of two subsets of one seed lies inside the larger.
        groups: (N,) group (patient) of every row.

    Returns:
        int64, row indices in ascending order.

    Raises:
        DataError: The size is out of range, or not exactly one of `num_images` and `fraction` is given.
    """
    labels = np.asarray(n_or_labels)
    n = int(labels) if labels.ndim == 0 else len(labels)
    size = _parse_size(n, num_images, fraction)
    check_seed(seed, "few_shot_seed")
    keys = random_keys(n, seed, "subset")
    strata = _check_labels(labels, None) + 1 if labels.ndim == 1 else np.zeros(n, dtype=np.int64)
    codes = None
    if groups is not None:
        codes, hashes = group_order(groups, f"subset {seed}")
        if len(hashes) == n:
            codes = None
        elif labels.ndim == 1:
            strata = group_minimum(rarity(labels, codes), codes, len(hashes))[codes]
    counts = _nested_counts(np.bincount(strata), size, seed)
    if codes is None:
        return np.flatnonzero(rank_within(strata, keys) < counts[strata])
    order = np.lexsort((keys, codes, strata))  # group by group in each stratum
    sizes = np.bincount(strata)
    place = np.arange(n) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.sort(order[place < np.repeat(counts, sizes)])


def random_keys(n: int, seed: int, purpose: str, index: int = 0) -> UInt64Array:
    """Draw n raw 64-bit words, uint64 (n,), from the stream of (seed, purpose, index)."""
    sequence = np.random.SeedSequence(seed, spawn_key=(zlib.crc32(purpose.encode()), index))
    return np.random.PCG64(sequence).random_raw(n)


def _draw_classes(labels: Int64Array, k: int, n_strata: int, seed: int) -> tuple[BoolArray, Int64Array]:
    """Mark the first k of every class; return also how many candidates each stratum has."""
    chosen = rank_within(labels, random_keys(len(labels), seed, "shots")) < k
    return chosen, np.bincount(labels, minlength=n_strata)


def _draw_labels(labels: npt.NDArray[Any], k: int, n_strata: int, seed: int) -> tuple[BoolArray, Int64Array]:
    """Mark the first k positives of every label and the first k positive for none; see `_draw_classes`."""
    rows, strata = _memberships(labels)
    chosen = np.zeros(len(labels), dtype=np.bool_)
    for stratum in range(n_strata):
        members = rows[strata == stratum]
        keys = random_keys(len(members), seed, "shots", stratum)
        chosen[members[np.argsort(keys, kind="stable")[:k]]] = True
    return chosen, np.bincount(strata, minlength=n_strata)


def _memberships(labels: npt.NDArray[Any]) -> tuple[Int64Array, Int64Array]:
    """List who is in which stratum: rows and strata, ascending by row.

    The strata are the classes; of labels (N, L), the positives of each and, as stratum L, positive for none.
    All rows have a class or at least one label that is known to be 1 or 0.
    """
    if labels.ndim == 1:
        return np.arange(len(labels)), labels
    positive = labels == 1
    rows, strata = np.nonzero(np.column_stack([positive, ~positive.any(axis=1)]))
    return rows, strata


def _one_per_group(
    labels: npt.NDArray[Any], rows: Int64Array, groups: npt.ArrayLike, n_strata: int, seed: int
) -> BoolArray:
    """Mark in `rows` one image of every group.

    Groups with images of one class count for it. The others follow in random order, each for the one of its
    classes that has the fewest groups by then; so a patient with one COVID and thirty normal images serves
    the rare class, and classes that share all their patients get equal parts of them. The image is a random
    one of the group's in that class. Its random keys are not those of the draw: the smallest of many keys is
    small, which would favour patients with many images.
    """
    codes, hashes = group_order(groups, f"few-shot {seed}")
    codes = codes[rows]
    member, strata = _memberships(labels[rows])
    options = distinct(codes[member] * n_strata + strata)
    group_of, option = np.divmod(options, n_strata)
    n_options = np.bincount(group_of, minlength=len(hashes))
    stratum_of = np.full(len(hashes), -1, dtype=np.int64)
    alone = n_options[group_of] == 1
    stratum_of[group_of[alone]] = option[alone]
    counts = np.bincount(option[alone], minlength=n_strata).tolist()
    starts = np.cumsum(n_options) - n_options
    for group in np.flatnonzero(n_options > 1).tolist():
        choices = option[starts[group] : starts[group] + n_options[group]].tolist()
        fewest = min(choices, key=counts.__getitem__)
        counts[fewest] += 1
        stratum_of[group] = fewest
    candidates = member[strata == stratum_of[codes[member]]]
    keys = random_keys(len(rows), seed, "one per group")[candidates]
    marked = np.zeros(len(rows), dtype=np.bool_)
    marked[candidates[rank_within(codes[candidates], keys) == 0]] = True
    return marked


def _nested_counts(sizes: npt.NDArray[np.intp], total: int, seed: int) -> Int64Array:
    """Divide `total` among classes in proportion to their sizes; no count falls as `total` grows: int64 (C,).

    Rounding every total by itself would not nest (the Alabama paradox of apportionment). Instead the range
    [0, N] is halved towards `total`, and every midpoint is apportioned between the counts at its ends. The
    halvings are the same for all totals, so the counts are nested. Each class rounds at a random offset of
    its own: every image is in the set with the same probability, also where a thousand classes have one image
    each.
    """
    offsets = (random_keys(len(sizes), seed, "class offsets") >> np.uint64(11)).astype(np.float64) * 2.0**-53
    low, high = 0, int(sizes.sum())
    at_low, at_high = np.zeros_like(sizes), sizes
    while low < total < high:
        middle = (low + high) // 2
        share = sizes * (middle / sizes.sum())
        counts = np.clip(np.floor(share + offsets).astype(sizes.dtype), at_low, at_high)
        while (gap := middle - int(counts.sum())) != 0:
            step = 1 if gap > 0 else -1
            movable = np.flatnonzero(counts != (at_high if gap > 0 else at_low))
            # Those that stay within one image of their share, and of these the nearest to their next
            # rounding.
            strays = step * (counts - share)[movable] >= 0
            nearest = np.lexsort((step * (counts - share - offsets)[movable], strays))
            counts[movable[nearest[: abs(gap)]]] += step
        if total < middle:
            high, at_high = middle, counts
        else:
            low, at_low = middle, counts
    return at_high if total == high else at_low


def _report_small(
    counts: Int64Array, names: list[str], k: int, on_small: Literal["error", "warn"], *, grouped: bool
) -> None:
    small = np.flatnonzero(counts < k)
    if len(small) == 0:
        return
    have = shorten([f"{names[i]} has {counts[i]}" for i in small])
    problem = f"{len(small)} of {len(counts)} classes have fewer than {k} images: {have}"
    if grouped:
        problem += " (one image per group counted)"
    if on_small == "warn":
        warnings.warn(f"{problem}; all there are were taken", stacklevel=3)
        return
    raise DataError(
        problem,
        where=f"shots={k}",
        valid=f"1 to {counts.min()} shots" if counts.min() > 0 else "classes that occur in the training set",
        hint="choose fewer shots, leave these classes out, or take all there are with --data.on_small warn",
    )


def _check_labels(labels: npt.NDArray[Any], class_names: Sequence[str] | None) -> npt.NDArray[Any]:
    labels = np.asarray(labels)
    if labels.ndim not in (1, 2) or (labels.ndim == 1 and labels.dtype.kind not in "iu"):
        raise DataError(
            f"labels are {labels.dtype} of shape {labels.shape}",
            valid="whole numbers (N,) for classes, or (N, L) with 1 / 0 / NaN for labels",
        )
    if class_names is not None:
        needed = labels.shape[1] if labels.ndim == 2 else int(labels.max(initial=-1)) + 1
        if (labels.ndim == 2 and needed != len(class_names)) or needed > len(class_names):
            raise DataError(f"labels need {needed} names, class_names has {len(class_names)}", where="class_names")
    return labels.astype(np.int64, copy=False) if labels.ndim == 1 else labels


def _stratum_names(labels: npt.NDArray[Any], class_names: Sequence[str] | None) -> list[str]:
    """Name the strata of `_memberships` for messages."""
    if labels.ndim == 1:
        n_classes = int(labels.max(initial=-1)) + 1
        return [str(name) for name in class_names or [f"class {c}" for c in range(n_classes)]]
    names = [str(name) for name in class_names or [f"label {i}" for i in range(labels.shape[1])]]
    return [*names, f"negatives of {names[0]}" if len(names) == 1 else "positive for none"]


def _parse_shots(shots: int | str) -> int | None:
    """Return k, or None for "full"."""
    text = str(shots)
    if text == "full":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise DataError(f"shots is {shots!r}", where="shots", valid='a whole number of 1 or more, or "full"')
    return int(text)


def _parse_size(n: int, num_images: int | None, fraction: float | None) -> int:
    if (num_images is None) == (fraction is None):
        raise DataError(
            f"num_images is {num_images} and fraction is {fraction}",
            where="num_images, fraction",
            valid="exactly one of the two",
        )
    if fraction is not None:
        if not 0 < fraction <= 1:
            raise DataError(f"fraction is {fraction}", where="fraction", valid="0 < fraction <= 1")
        num_images = max(1, round(fraction * n))
    if num_images is None or not 1 <= num_images <= n:
        raise DataError(f"num_images is {num_images}", where="num_images", valid=f"1 to {n}, the images there are")
    return num_images
