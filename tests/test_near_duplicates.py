"""Near-duplicates: Hamming matches against a plain loop; copies are found, different images are not."""

import re

import cv2
import numpy as np
import pytest

from datamodules import io
from studies import near_duplicates
from studies.fingerprints import Fingerprints, fingerprint_images
from studies.near_duplicates import STRICT_BITS, find_copies, hamming_matches
from tests.data.images import picture


def crop(left=0.0, top=0.0, right=0.0, bottom=0.0):
    def change(image):
        height, width = image.shape[:2]
        return image[
            round(top * height) : height - round(bottom * height), round(left * width) : width - round(right * width)
        ]

    return change


def resize(scale):
    return lambda image: cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)


def jpeg(quality):
    return lambda image: cv2.imdecode(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1], 0)


def pad(share, value):
    def change(image):
        size = round(share * image.shape[1])
        return cv2.copyMakeBorder(image, 0, 0, size, size, cv2.BORDER_CONSTANT, value=value)

    return change


SIMPLE = {
    "resize 0.5": resize(0.5),
    "resize 0.9": resize(0.9),
    "jpeg 50": jpeg(50),
    "resize, jpeg": lambda image: jpeg(60)(resize(0.5)(image)),
    "contrast": lambda image: np.rint(image * 0.6 + 30).astype(np.uint8),
}
HARD = {
    "left 5 %": crop(left=0.05),
    "bottom 5 %": crop(bottom=0.05),
    "centre 5 %": crop(*[0.025] * 4),
    "right 10 %": crop(right=0.1),
    "centre 10 %": crop(*[0.05] * 4),
    "corner 7 %": crop(left=0.07, top=0.07),
    "pad black": pad(0.1, 0),
    "pad white": pad(0.1, 255),
    "all": lambda image: jpeg(60)(resize(0.5)(np.rint(crop(top=0.05)(image) * 0.8 + 10).astype(np.uint8))),
}


def fingerprints_of(images, change=lambda image: image):
    return fingerprint_images(np.atleast_3d(change(image)) for image in images)


def diagonal(frame):
    return (frame["row_a"] == frame["row_b"]).to_numpy()


@pytest.fixture(scope="module")
def pictures():
    return [picture(seed, 200, 180) for seed in range(80)]


@pytest.fixture(scope="module")
def radiographs(real_nih):
    paths = sorted((real_nih / "images").iterdir())[::5]
    return paths, [io.read_image(path, mode="grey") for path in paths]


def random_hashes(count, seed):
    return np.random.default_rng(seed).integers(0, 2**64, (count, 4), dtype=np.uint64)


def flipped(hashes, bits, seed):
    """Each hash with its own number of bits flipped."""
    rng = np.random.default_rng(seed)
    unpacked = np.unpackbits(hashes.view(np.uint8), axis=1)
    for row, count in zip(unpacked, bits, strict=True):
        row[rng.choice(256, count, replace=False)] ^= 1
    return np.packbits(unpacked, axis=1).view(np.uint64)


@pytest.mark.parametrize("max_bits", [0, 3, 24, 100, 130, 256])
def test_hamming_matches_equal_a_plain_loop(max_bits):
    a = random_hashes(30, 0)
    b = np.concatenate([flipped(a[:20], range(20), 1), random_hashes(17, 2)])
    expected = [
        (i, j, bits)
        for i, one in enumerate(a.tolist())
        for j, other in enumerate(b.tolist())
        if (bits := sum((x ^ y).bit_count() for x, y in zip(one, other, strict=True))) <= max_bits
    ]
    found = list(zip(*(column.tolist() for column in hamming_matches(a, b, max_bits)), strict=True))
    assert found == expected
    assert len(found) >= min(max_bits + 1, 20)


def test_hamming_matches_across_blocks(monkeypatch):
    a = random_hashes(500, 3)
    b = flipped(a, np.arange(500) % 40, 4)[::-1].copy()
    expected = hamming_matches(a, b, 20)
    assert len(expected[0]) == sum(np.arange(500) % 40 <= 20)
    monkeypatch.setattr(near_duplicates, "HASH_BLOCK", 8192)
    wide = np.concatenate([random_hashes(9000, 5), b])
    rows_a, rows_b, bits = hamming_matches(a, wide, 20)
    assert rows_a.tolist() == expected[0].tolist()
    assert (rows_b - 9000).tolist() == expected[1].tolist()
    assert bits.tolist() == expected[2].tolist()


def test_no_hash_matches_nothing():
    hashes = random_hashes(4, 6)
    hashes[[0, 2]] = 0
    rows_a, rows_b, _ = hamming_matches(hashes, hashes, 24)
    assert rows_a.tolist() == rows_b.tolist() == [1, 3]
    empty = np.zeros((0, 4), np.uint64)
    assert [len(column) for column in hamming_matches(empty, hashes, 256)] == [0, 0, 0]


def test_guard_finds_resized_and_recompressed_copies(pictures):
    originals = fingerprints_of(pictures)
    for label, change in SIMPLE.items():
        rows_a, rows_b, _ = hamming_matches(originals.hashes, fingerprints_of(pictures, change).hashes, STRICT_BITS)
        assert rows_a.tolist() == rows_b.tolist() == list(range(len(pictures))), label


@pytest.mark.parametrize("change", [*SIMPLE, *HARD])
def test_audit_finds_copies_of_smooth_images_and_nothing_else(pictures, change):
    originals = fingerprints_of(pictures[:40])
    copies = fingerprints_of(pictures[20:], (SIMPLE | HARD)[change])
    for a, b in ((originals, copies), (copies, originals)):
        found = find_copies(a, b)
        shift = 20 if a is originals else -20
        assert (found["row_a"] == found["row_b"] + shift).all()
        assert len(found) >= 19


def test_frame_of_pairs(pictures):
    images = [*pictures[:6], resize(0.5)(pictures[4]), crop(left=0.05)(pictures[1])]
    found = find_copies(fingerprints_of(images))
    assert found.columns.tolist() == ["row_a", "row_b", "bits", "correlation"]
    assert sorted(zip(found["row_a"], found["row_b"], strict=True)) == [(1, 7), (4, 6)]
    assert found["correlation"].is_monotonic_decreasing
    hashes = fingerprints_of(images).hashes
    assert found["bits"].tolist() == [int(np.bitwise_count(hashes[i] ^ hashes[j]).sum()) for i, j in ((4, 6), (1, 7))]


def test_images_are_never_their_own_copy():
    framed = pad(0.1, 0)(picture(11))  # seen twice: with and without its frame
    found = find_copies(fingerprints_of([framed, picture(12)]))
    assert len(found) == 0
    assert found.columns.tolist() == ["row_a", "row_b", "bits", "correlation"]


def test_blank_and_unreadable_images_are_no_copies(pictures):
    images = [np.zeros((30, 30, 1), np.uint8), None, pictures[0], np.full((40, 30, 1), 200, np.uint8)]
    fingerprints = fingerprint_images(images)
    assert len(find_copies(fingerprints)) == 0
    assert find_copies(fingerprints, fingerprints_of([pictures[0], images[0]]))[
        ["row_a", "row_b"]
    ].to_numpy().tolist() == [[2, 0]]
    assert len(find_copies(Fingerprints.empty(0), fingerprints)) == 0


def test_many_copies_of_one_image(pictures):
    found = find_copies(fingerprints_of([pictures[0]] * 12))
    assert len(found) == 12 * 11 // 2
    assert (found["correlation"] > 0.99).all()


def test_blocks_do_not_change_the_result(pictures, monkeypatch):
    images = [*pictures[:30], *(HARD["all"](image) for image in pictures[:25]), pad(0.1, 0)(pictures[2])]
    whole = find_copies(fingerprints_of(images))
    monkeypatch.setattr(near_duplicates, "BLOCK", 7)
    blocked = find_copies(fingerprints_of(images))
    columns = ["row_a", "row_b"]
    assert sorted(map(tuple, whole[columns].to_numpy())) == sorted(map(tuple, blocked[columns].to_numpy()))
    assert {(row, row + 30) for row in range(25)} <= set(map(tuple, whole[columns].to_numpy().tolist()))


@pytest.mark.parametrize("pull", [(0.06, 0.0, 0.0, 0.03), (0.0, 0.1, 0.05, 0.0)])
def test_alignment_finds_the_window(pull):
    left, right, top, bottom = pull
    image = picture(21, 640, 640)
    part = crop(left, top, right, bottom)(image)
    outer, inner = fingerprint_images([image, part]).thumbnails.astype(np.float32)[:, None]
    start = np.array([[0, 1, 0, 1]], np.float32)
    found = near_duplicates._align(inner, outer, start)[0]
    np.testing.assert_allclose(found, [left, 1 - right, top, 1 - bottom], atol=0.01)
    back = near_duplicates._align(outer, inner, start)[0]  # the window then reaches beyond the smaller picture
    width, height = 1 - left - right, 1 - top - bottom
    np.testing.assert_allclose(back, [-left / width, 1 + right / width, -top / height, 1 + bottom / height], atol=0.015)


@pytest.mark.real_data
def test_real_radiographs_are_told_apart(radiographs):
    paths, images = radiographs
    originals = fingerprints_of(images)
    found = find_copies(originals)
    patients = [re.match(r"\d+", path.name)[0] for path in paths]
    assert all(patients[i] == patients[j] for i, j in zip(found["row_a"], found["row_b"], strict=True))
    assert len(hamming_matches(originals.hashes, originals.hashes, 40)[0]) == len(images)


@pytest.mark.real_data
@pytest.mark.parametrize(("change", "recall"), [*((name, 0.99) for name in SIMPLE), *((name, 0.95) for name in HARD)])
def test_copies_of_real_radiographs_are_found(radiographs, change, recall):
    _, images = radiographs
    originals, copies = fingerprints_of(images), fingerprints_of(images, (SIMPLE | HARD)[change])
    found = find_copies(originals, copies)
    assert diagonal(found).sum() >= recall * len(images)
    known = find_copies(originals)
    pairs = {frozenset(pair) for pair in known[["row_a", "row_b"]].to_numpy().tolist()}
    assert all({i, j} in pairs for i, j in found.loc[~diagonal(found), ["row_a", "row_b"]].to_numpy().tolist())
    if change in SIMPLE:
        rows_a, rows_b, _ = hamming_matches(originals.hashes, copies.hashes, STRICT_BITS)
        assert (rows_a == rows_b).all()
        assert len(rows_a) >= recall * len(images)
