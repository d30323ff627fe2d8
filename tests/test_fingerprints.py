"""Fingerprints: the hash against a slow version of its definition, robust to resizing, and a cache that never lies."""

import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from scipy.fft import dctn

from datamodules import io
from datamodules.errors import DataError, UnreadableImageError
from studies import fingerprint_cache, fingerprints
from studies.fingerprints import Fingerprints, fingerprint_images, fingerprint_rows, hash_rows
from tests.data.images import picture


def distance(a, b):
    return int(np.bitwise_count(a ^ b).sum())


def same(a, b):
    return all(
        np.array_equal(getattr(a, name), getattr(b, name)) for name in ("hashes", "thumbnails", "contents", "readable")
    )


class Folder:
    """The part of a data module that fingerprints use; counts what it reads."""

    name, prepared = "folder", None

    def __init__(self, root, paths):
        self.root, self.paths, self.reads = Path(root), list(paths), []

    def image_files(self, rows):
        return [(self.root / self.paths[row], "grey") for row in rows]

    def images(self, rows):
        self.reads += list(rows)
        return [io.read_image(self.root / self.paths[row], mode="grey") for row in rows]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FARSHOT_CACHE", str(tmp_path / "cache"))
    for number in range(5):
        (tmp_path / "images").mkdir(exist_ok=True)
        cv2.imwrite(str(tmp_path / "images" / f"{number}.png"), picture(number))
    return Folder(tmp_path / "images", [f"{number}.png" for number in range(5)])


def cache_file(folder):
    (path,) = Path(os.environ["FARSHOT_CACHE"]).iterdir()
    return path


def test_hash_is_phash_with_256_bits():
    image = picture(0, 256, 192)
    # Area averages in a plain loop: 256 = 32 × 8 and 192 = 32 × 6.
    small = np.array([[image[8 * i : 8 * i + 8, 6 * j : 6 * j + 6].mean() for j in range(32)] for i in range(32)])
    low = dctn(small, norm="ortho")[1:17, 1:17].ravel()
    found = fingerprint_images([image])
    bits = np.unpackbits(found.hashes[0].astype("<u8").view(np.uint8))
    assert (bits == (low > np.median(low))).mean() >= 255 / 256  # one coefficient may lie within rounding of the median
    stretched = (small - small.min()) * 255 / np.ptp(small)
    np.testing.assert_allclose(found.thumbnails[0], stretched, atol=1)


def test_shapes_and_types():
    found = fingerprint_images([picture(0), picture(1, 40, 300, channels=3), picture(2, 16, 12)])
    assert found.hashes.shape == (3, 4)
    assert found.hashes.dtype == np.uint64
    assert found.thumbnails.shape == found.contents.shape == (3, 32, 32)
    assert found.thumbnails.dtype == found.contents.dtype == np.uint8
    assert found.readable.tolist() == [True] * 3
    assert len(fingerprint_images([])) == 0


def test_grey_and_repeated_rgb_agree():
    assert same(fingerprint_images([picture(3)]), fingerprint_images([picture(3, channels=3)]))


@pytest.mark.parametrize("size", [(60, 50), (90, 90), (500, 400)])
def test_resized_images_keep_their_hash(size):
    image = picture(4, 240, 200)
    resized = cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA)[:, :, None]
    one, other = fingerprint_images([image, resized]).hashes
    assert distance(one, other) <= 12
    assert distance(one, fingerprint_images([picture(5, 240, 200)]).hashes[0]) > 80


def test_linear_contrast_keeps_the_fingerprint():
    image = picture(6)
    found = fingerprint_images([image, np.rint(image * 0.5 + 40).astype(np.uint8)])
    assert distance(*found.hashes) <= 12
    assert np.abs(np.subtract(*found.thumbnails.astype(int))).max() <= 4


@pytest.mark.parametrize("value", [0, 90, 255])
def test_uniform_borders_are_taken_off(value):
    image = picture(7, 128, 96)
    padded = cv2.copyMakeBorder(image, 0, 0, 16, 16, cv2.BORDER_CONSTANT, value=value)[:, :, None]
    found = fingerprint_images([image, padded])
    assert not found.contents[0].any()
    assert np.abs(found.contents[1].astype(int) - found.thumbnails[0]).max() <= 12


def test_blank_and_unreadable_images_have_no_hash():
    found = fingerprint_images([np.full((50, 40, 1), 30, np.uint8), None, picture(8)])
    assert found.hashes.any(axis=1).tolist() == [False, False, True]
    assert found.readable.tolist() == [True, False, True]
    assert not found.thumbnails[:2].any()


def test_rows_keep_their_order_and_the_cache_answers(folder):
    rows = [3, 0, 4]
    first = fingerprint_rows(folder, rows)
    assert same(first, fingerprint_images(folder.images(rows)))
    folder.reads.clear()
    assert same(fingerprint_rows(folder, [0, 3, 4, 1]).take([1, 0, 2]), first)
    assert folder.reads == [1]


def test_a_changed_file_is_read_again(folder):
    before = fingerprint_rows(folder, range(5))
    cv2.imwrite(str(folder.root / "2.png"), picture(99))
    folder.reads.clear()
    after = fingerprint_rows(folder, range(5))
    assert folder.reads == [2]
    assert [distance(*pair) > 0 for pair in zip(before.hashes, after.hashes, strict=True)] == [
        False,
        False,
        True,
        False,
        False,
    ]


def test_unreadable_rows_are_marked_and_tried_again(folder):
    path = folder.root / "1.png"
    good = path.read_bytes()
    path.write_bytes(good[: len(good) // 2])
    folder.paths.append("missing.png")
    found = fingerprint_rows(folder, range(6))
    assert found.readable.tolist() == [True, False, True, True, True, False]
    folder.reads.clear()
    fingerprint_rows(folder, range(6))
    assert folder.reads == [1, 5]


def test_an_error_about_the_data_set_is_not_swallowed(folder):
    def refuse(rows):
        raise DataError("images deeper than 8 bits need a window")

    folder.images = refuse
    with pytest.raises(DataError, match="need a window"):
        fingerprint_rows(folder, [0])
    assert issubclass(UnreadableImageError, DataError)


@pytest.mark.parametrize("damage", [lambda data: data[:3000], lambda data: b"x" * 100])
def test_a_damaged_cache_is_rebuilt_with_a_warning(folder, damage):
    expected = fingerprint_rows(folder, range(5))
    path = cache_file(folder)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(UserWarning, match="damaged and is made anew"):
        assert same(fingerprint_rows(folder, range(5)), expected)
    folder.reads.clear()
    fingerprint_rows(folder, range(5))
    assert folder.reads == []


def test_an_empty_cache_file_is_filled(folder):
    Path(os.environ["FARSHOT_CACHE"]).mkdir()
    fingerprint_cache.cache_file().touch()
    fingerprint_rows(folder, range(5))
    folder.reads.clear()
    fingerprint_rows(folder, range(5))
    assert folder.reads == []


def test_entries_of_another_size_are_read_again(folder):
    expected = fingerprint_rows(folder, range(5))
    with sqlite3.connect(cache_file(folder)) as database:
        database.execute("UPDATE fingerprints SET thumbnails = x'00'")
    folder.reads.clear()
    assert same(fingerprint_rows(folder, range(5)), expected)
    assert folder.reads == [0, 1, 2, 3, 4]


def test_hashes_alone_are_the_same_and_fill_the_cache_for_both(folder):
    hashes = hash_rows(folder, range(5))
    folder.reads.clear()
    found = fingerprint_rows(folder, range(5))
    np.testing.assert_array_equal(found.hashes, hashes)
    assert folder.reads == []
    assert found.thumbnails.any()
    np.testing.assert_array_equal(hash_rows(folder, [4, 2]), hashes[[4, 2]])


def test_another_way_of_decoding_is_another_entry(folder):
    fingerprint_rows(folder, [0])
    folder.image_files = lambda rows: [(folder.root / folder.paths[row], "window (0, 4095)") for row in rows]
    folder.reads.clear()
    fingerprint_rows(folder, [0])
    assert folder.reads == [0]


def test_processes_write_at_once(folder):
    code = """
import sys
import numpy as np
from studies import fingerprint_cache as cache
first = int(sys.argv[1])
for number in range(first, first + 50):
    cache.add(np.array([number], np.uint64), [b"h" * 32], [b"t" * 2048])
"""
    command = [sys.executable, "-W", "error", "-c", code]
    started = [subprocess.Popen([*command, str(first)], cwd=Path(__file__).parents[1]) for first in (1, 100)]
    assert [process.wait() for process in started] == [0, 0]
    with sqlite3.connect(cache_file(folder)) as database:
        assert database.execute("SELECT COUNT(*) FROM fingerprints").fetchone() == (100,)


def test_a_cache_that_cannot_be_written_only_warns(folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FARSHOT_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="cannot be written"):
        assert fingerprint_rows(folder, [0]).readable.all()


def test_sets_without_files_are_computed_every_time(folder):
    images = [picture(number) for number in range(3)]
    folder.image_files, folder.reads = lambda rows: [None] * len(rows), []
    folder.images = lambda rows: folder.reads.extend(rows) or [images[row] for row in rows]
    for _ in range(2):
        assert same(fingerprint_rows(folder, [2, 1]), fingerprint_images([images[2], images[1]]))
    assert folder.reads == [2, 1, 2, 1]
    assert not Path(os.environ["FARSHOT_CACHE"]).exists()


def test_processes_give_what_one_gives(folder, monkeypatch):
    monkeypatch.setattr(fingerprints, "PARALLEL_FROM", 4)
    monkeypatch.setattr(fingerprints, "TASK_ROWS", 2)
    (folder.root / "2.png").write_bytes(b"")
    assert same(
        fingerprint_rows(folder, range(5), workers=2),
        fingerprint_images([None if row == 2 else folder.images([row])[0] for row in range(5)]),
    )


def test_import_is_light():
    code = (
        "import sys, studies.near_duplicates; print(*{'cv2', 'torch', 'scipy', 'pytorch_lightning'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]
    )
    assert done.stdout.strip() == ""


def test_empty_matches_the_arrays_it_stands_for():
    assert same(Fingerprints.empty(1), fingerprint_images([None]))
