"""Near-duplicate images: pairs of close hashes, and copies that were resized, recompressed or lightly cropped."""

from collections.abc import Iterator
from functools import cache
from itertools import chain
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from studies.fingerprints import SIDE, Fingerprints, dct_basis, progress_bar

STRICT_BITS = 24
"""Hashes that differ in at most this many of 256 bits are taken for the same image (the guard's criterion).

Measured by benchmarks/near_duplicates.py: of 498,823 pairs of NIH radiographs of different patients the nearest differ
in 62 bits, two films of one patient in 44; of 50 million pairs of CIFAR-10 photos only copies are this near. Carried on
to 2.9 billion pairs (NIH against its test set) the distribution gives 0.01 (quadratic fit of the logarithm) to 0.8
(linear fit) false pairs. Copies resized to a quarter differ in 8 bits at most, JPEG q30 in 18, both together in 38."""
COPY = 0.92
"""Least correlation of a copy. On the same radiographs different patients reach 0.82, two films of one patient 0.94
(once in 677 pairs; the next have 0.82). 99 % or more of the copies exceed it, of those both cropped and padded 96 %."""
CANDIDATE = 0.70
"""Cosine from which a pair is aligned and verified: 0.04 % of the pairs of radiographs, at least 99 % of the copies."""
COARSE, FINE = 12, 16  # DCT frequencies a side: of the search over all pairs, and of the verification
CROPS = ((0.0, 0.0), (0.07, 0.0), (0.0, 0.07), (0.05, 0.05))  # shares cut off both ends of an axis: 16 windows
MAX_CROP = 0.15  # share of a side that the alignment may cut off one border
STEPS = 4  # of the alignment; 8 gave the same
PRIOR = 100  # images that the expected spectrum of natural images counts for, against the measured one
HASH_BLOCK = 1 << 18  # pairs of hashes a time: two words of them fit into a core's cache
BLOCK = 4096  # images of either side, and candidates, a time
BAR_FROM = 6  # blocks, of about three seconds each, from which a progress bar is shown

Floats = NDArray[np.float32]
Rows = NDArray[np.int64]


def hamming_matches(a: NDArray[np.uint64], b: NDArray[np.uint64], max_bits: int) -> tuple[Rows, Rows, Rows]:
    """Find all pairs of hashes that differ in at most `max_bits` bits.

    Every pair is compared, in blocks: memory grows with the number of matches only. Hashes that are 0 match nothing.

    Args:
        a: Hashes, uint64 (N, 4).
        b: Hashes, uint64 (M, 4).
        max_bits: Largest Hamming distance, 0-256.

    Returns:
        Rows of `a`, rows of `b` and distances, int64 (K,) each, in ascending order of the rows.
    """
    used_a, used_b = np.flatnonzero(a.any(axis=1)), np.flatnonzero(b.any(axis=1))
    words_a, words_b = np.ascontiguousarray(a[used_a].T), np.ascontiguousarray(b[used_b].T)
    width = min(max(len(used_b), 1), 8192)
    height = HASH_BLOCK // width
    found = [(np.zeros(0, np.int64),) * 3]
    for top in range(0, len(used_a), height):
        for left in range(0, len(used_b), width):
            part_a, part_b = words_a[:, top : top + height, None], words_b[:, None, left : left + width]
            # A pair whose last two words (the finer structure) differ too much already needs no look at the others.
            half = np.bitwise_count(part_a[2] ^ part_b[2]) + np.bitwise_count(part_a[3] ^ part_b[3])
            first, second = np.divmod(np.flatnonzero(half.ravel() <= max_bits), half.shape[1])
            first, second = used_a[top + first], used_b[left + second]
            bits = hamming(a[first], b[second])
            near = bits <= max_bits
            found.append((first[near], second[near], bits[near]))
    rows_a, rows_b, bits = (np.concatenate(column) for column in zip(*found, strict=True))
    order = np.lexsort((rows_b, rows_a))
    return rows_a[order], rows_b[order], bits[order]


def hamming(a: NDArray[np.uint64], b: NDArray[np.uint64]) -> Rows:
    """Bits in which hashes differ, row by row: uint64 (N, 4) twice to int64 (N,)."""
    bits: Rows = np.bitwise_count(a ^ b).sum(axis=1, dtype=np.int64)
    return bits


def find_copies(a: Fingerprints, b: Fingerprints | None = None) -> pd.DataFrame:
    """Find pairs of images of which one is a copy of the other.

    A copy may be resized, recompressed, changed linearly in contrast or bit depth, padded with a uniform border, and
    cropped by up to about 10 % a side. The thumbnails' DCT spectra are whitened: their mean over both sets, which is
    what radiographs have in common, is subtracted and every frequency scaled to equal variance. Pairs are candidates
    where the cosine of an image's spectrum and that of one of 16 windows of the other exceeds `CANDIDATE`. The
    window is then refined (Gauss-Newton on its four borders, gain and offset; Lucas & Kanade 1981) and the pair kept
    where the cosine of the aligned spectra is at least `COPY`; pairs within `STRICT_BITS` are kept in any case.

    Args:
        a: Fingerprints of N images.
        b: Fingerprints of M images of another set; None looks for pairs within `a`.

    Returns:
        One row a pair, the surest first: `row_a` and `row_b` (positions; `row_a < row_b` within `a`), `bits` (Hamming
        distance of the hashes, 0-256), `correlation` (cosine of the aligned whitened spectra, at most 1).
    """
    views_a = _views(a)
    views_b = views_a if b is None else _views(b)
    whitening = _measure_whitening([views_a.thumbnails, views_b.thumbnails])
    b = a if b is None else b
    columns, found = ["row_a", "row_b", "bits", "correlation"], []
    for pairs in chain(_strict_pairs(a, b), _candidates(views_a, views_b, whitening)):
        cosine = _verify(views_a, views_b, pairs, whitening)
        rows_a, rows_b = views_a.rows[pairs.a], views_b.rows[pairs.b]
        if a is b:
            rows_a, rows_b = np.minimum(rows_a, rows_b), np.maximum(rows_a, rows_b)
        bits = hamming(a.hashes[rows_a], b.hashes[rows_b])
        copy = ((bits <= STRICT_BITS) | (cosine >= COPY)) & ((rows_a != rows_b) | (a is not b))
        found.append(pd.DataFrame(dict(zip(columns, (rows_a, rows_b, bits, cosine), strict=True)))[copy])
    copies: pd.DataFrame = pd.concat(found).sort_values("correlation", ascending=False, kind="stable")
    return copies.drop_duplicates(["row_a", "row_b"], ignore_index=True)


class _Views(NamedTuple):
    """What can be compared of a set: thumbnails (V, 32, 32), and the image (V,) that each shows."""

    thumbnails: NDArray[np.uint8]
    rows: Rows


def _views(fingerprints: Fingerprints) -> _Views:
    """Every image as a whole, in its row, and then once more without its uniform borders where it has some."""
    framed = np.flatnonzero(fingerprints.contents.any(axis=(1, 2)))
    thumbnails = np.concatenate([fingerprints.thumbnails, fingerprints.contents[framed]])
    return _Views(thumbnails, np.concatenate([np.arange(len(fingerprints)), framed]))


class _Pairs(NamedTuple):
    """Candidates: the views, the window of the outer one, and whether `a` is the inner one; (K,) each."""

    a: Rows
    b: Rows
    window: NDArray[np.intp]
    a_inside: NDArray[np.bool_]


class _Whitening(NamedTuple):
    """Mean and 1 / standard deviation of the unit spectra's coefficients, float32 (16, 16) each."""

    mean: Floats
    weight: Floats


def _measure_whitening(thumbnails: list[NDArray[np.uint8]]) -> _Whitening:
    """Measure both sets; few images are shrunk towards what natural images have, amplitudes of frequency^-1.5."""
    count, total, squares = 0, np.zeros((FINE, FINE)), np.zeros((FINE, FINE))
    for part in (array[start : start + BLOCK] for array in thumbnails for start in range(0, len(array), BLOCK)):
        spectra = _unit(_spectra(part[part.any(axis=(1, 2))].astype(np.float32), FINE))
        count += len(spectra)
        total += spectra.sum(axis=0)
        squares += np.square(spectra).sum(axis=0)
    axis = np.arange(FINE)
    prior = np.maximum(np.hypot(axis[:, None], axis), 1.0) ** -3
    mean = total / (count + PRIOR)
    variance = (squares + PRIOR * prior / prior.sum()) / (count + PRIOR) - mean**2
    return _Whitening(mean.astype(np.float32), (variance**-0.5).astype(np.float32))


def _spectra(images: Floats, frequencies: int, rows: Floats | None = None, columns: Floats | None = None) -> Floats:
    """Low DCT coefficients of (a window of) images (N, 32, 32), without the constant one: (N, f, f)."""
    basis = dct_basis()[:frequencies]
    left = basis if rows is None else basis @ rows
    right = basis if columns is None else basis @ columns
    spectra: Floats = np.matmul(left, images @ right.T)
    spectra[:, 0, 0] = 0
    return spectra


def _unit(spectra: Floats) -> Floats:
    norm = np.sqrt(np.einsum("nij,nij->n", spectra, spectra))
    unit: Floats = spectra / np.maximum(norm, 1e-6)[:, None, None]
    return unit


def _whiten(spectra: Floats, whitening: _Whitening) -> Floats:
    """Unit vectors (N, f*f) of the whitened spectra (N, f, f); images without a spectrum give 0."""
    size = spectra.shape[1]
    empty = ~spectra.any(axis=(1, 2))
    white = (_unit(spectra) - whitening.mean[:size, :size]) * whitening.weight[:size, :size]
    white[:, 0, 0] = 0
    white[empty] = 0
    return _unit(white).reshape(len(white), -1)


def _resampling(low: Floats, high: Floats) -> Floats:
    """Matrices (..., 32, 32) that sample [low, high] of the unit interval by linear interpolation; bounds (...)."""
    centre = (np.arange(SIDE, dtype=np.float32) + 0.5) / SIDE
    place = ((low[..., None] + centre * (high - low)[..., None]) * SIDE - 0.5).clip(0, SIDE - 1)
    weights: Floats = np.maximum(0, 1 - np.abs(place[..., None] - np.arange(SIDE, dtype=np.float32)))
    return weights


@cache
def _windows() -> Floats:
    """Left, right, top and bottom of the windows in the unit square, float32 (16, 4); the first is the whole image."""
    spans = [(first, 1 - last) for first, last in CROPS]
    return np.array([(*across, *down) for down in spans for across in spans], np.float32)


def _window_vectors(thumbnails: NDArray[np.uint8], whitening: _Whitening) -> list[Floats]:
    """Whitened coarse spectra of every window, (N, 144) each."""
    images = thumbnails.astype(np.float32)
    windows = _windows()
    columns, rows = _resampling(windows[:, 0], windows[:, 1]), _resampling(windows[:, 2], windows[:, 3])
    return [_whiten(_spectra(images, COARSE, *pair), whitening) for pair in zip(rows, columns, strict=True)]


def _candidates(a: _Views, b: _Views, whitening: _Whitening) -> Iterator[_Pairs]:
    """Compare all images with all windows, block by block; a pair comes once, with its best window."""
    tops, lefts = (range(0, len(views.rows), BLOCK) for views in (a, b))
    starts = [(top, left) for top in tops for left in lefts if a is not b or left >= top]
    vectors: list[Floats] = []
    with progress_bar("looking for copies", len(starts), shown=len(starts) >= BAR_FROM) as advance:
        for number, (top, left) in enumerate(starts):
            if not number or top != starts[number - 1][0]:
                vectors = _window_vectors(a.thumbnails[top : top + BLOCK], whitening)
            others = _window_vectors(b.thumbnails[left : left + BLOCK], whitening)
            place, window, a_inside = _best_windows(vectors, others)
            first, second = np.divmod(place, len(others[0]))
            pairs = _Pairs(first + top, second + left, window, a_inside)
            yield _select(pairs, pairs.a < pairs.b) if a is b else pairs
            advance(1)


def _select(pairs: _Pairs, which: NDArray[np.bool_] | slice) -> _Pairs:
    return _Pairs(pairs.a[which], pairs.b[which], pairs.window[which], pairs.a_inside[which])


def _best_windows(a: list[Floats], b: list[Floats]) -> tuple[Rows, NDArray[np.intp], NDArray[np.bool_]]:
    """Flat places in the block (N, M) whose cosine with some window exceeds `CANDIDATE`, and which window it is."""
    best = np.full(len(a[0]) * len(b[0]), CANDIDATE, np.float32)
    code = np.full(len(best), -1, np.int8)  # twice the window, plus 1 where `a` is inside
    for window in range(len(a)):
        for a_inside in (True, False) if window else (True,):
            cosine = (a[0] @ b[window].T if a_inside else a[window] @ b[0].T).ravel()
            place = np.flatnonzero(cosine > best)
            best[place] = cosine[place]
            code[place] = 2 * window + a_inside
    place = np.flatnonzero(code >= 0)
    found = code[place].astype(np.intp)
    return place, found // 2, found % 2 == 1


def _strict_pairs(a: Fingerprints, b: Fingerprints) -> Iterator[_Pairs]:
    rows_a, rows_b, _ = hamming_matches(a.hashes, b.hashes, STRICT_BITS)
    pairs = _Pairs(rows_a, rows_b, np.zeros(len(rows_a), np.intp), np.ones(len(rows_a), np.bool_))
    yield _select(pairs, rows_a < rows_b) if a is b else pairs


def _verify(a: _Views, b: _Views, pairs: _Pairs, whitening: _Whitening) -> Floats:
    """Cosine of the whitened spectra of each pair after alignment, float32 (K,)."""
    cosines = [np.zeros(0, np.float32)]
    for start in range(0, len(pairs.a), BLOCK):
        part = _select(pairs, slice(start, start + BLOCK))
        images = np.stack([a.thumbnails[part.a], b.thumbnails[part.b]]).astype(np.float32)
        which, every = part.a_inside.astype(np.intp), np.arange(len(part.a))
        inner, outer = images[1 - which, every], images[which, every]
        views = _common_views(inner, outer, _align(inner, outer, _windows()[part.window]))
        vectors = [_whiten(_spectra(view, FINE), whitening) for view in views]
        cosines.append(np.einsum("nd,nd->n", *vectors))
    return np.concatenate(cosines)


def _align(inner: Floats, outer: Floats, windows: Floats) -> Floats:
    """Refine the windows (K, 4) of `outer` so that they look like `inner`, both (K, 32, 32), up to gain and offset.

    A window may reach beyond `outer`; what lies there does not count.
    """
    size = SIDE // 2  # half the resolution gives the same borders in a quarter of the time
    target = inner.reshape(-1, size, 2, size, 2).mean(axis=(2, 4))
    place = (np.arange(size, dtype=np.float32) + 0.5) / size
    for _ in range(STEPS):
        lows, lengths = windows[:, ::2], windows[:, 1::2] - windows[:, ::2]  # (K, 2): across, down
        across, down = _resampling(lows, lows + lengths).reshape(-1, 2, size, 2, SIDE).mean(axis=3).swapaxes(0, 1)
        view = down @ outer @ across.transpose(0, 2, 1)
        places = lows[..., None] + place * lengths[..., None]
        inside = (places > 0) & (places < 1)
        mask = inside[:, 1, :, None] & inside[:, 0, None, :]
        slope_down, slope_across = np.gradient(view, axis=(1, 2))
        columns = [slope_across * (1 - place), slope_across * place]
        columns += [slope_down * (1 - place)[:, None], slope_down * place[:, None]]
        system = (np.stack([*columns, view, np.ones_like(view)], axis=-1) * mask[..., None]).reshape(-1, size**2, 6)
        normal = (system.transpose(0, 2, 1) @ system).astype(np.float64)
        normal[:, range(6), range(6)] = normal[:, range(6), range(6)] * 1.001 + 1e-3  # flat images stay solvable
        solution = np.linalg.solve(normal, system.transpose(0, 2, 1) @ target.reshape(-1, size**2, 1))[:, :, 0]
        step = solution[:, :4] / np.maximum(solution[:, 4:5], 0.05) * lengths.repeat(2, axis=1) / size
        limits = np.array([(-MAX_CROP, MAX_CROP), (1 - MAX_CROP, 1 + MAX_CROP)] * 2, np.float32).T
        windows = (windows + step.clip(-0.03, 0.03)).clip(*limits).astype(np.float32)
    return windows


def _common_views(inner: Floats, outer: Floats, windows: Floats) -> tuple[Floats, Floats]:
    """What both images show, from either, stretched to (K, 32, 32); `windows` place `inner` in `outer`."""
    low, high = windows[:, ::2], windows[:, 1::2]
    common_low, common_high = np.maximum(low, 0), np.minimum(high, 1)
    outer_across, outer_down = _resampling(common_low, common_high).swapaxes(0, 1)
    ends = ((common - low) / (high - low) for common in (common_low, common_high))
    inner_across, inner_down = _resampling(*ends).swapaxes(0, 1)
    return inner_down @ inner @ inner_across.transpose(0, 2, 1), outer_down @ outer @ outer_across.transpose(0, 2, 1)
