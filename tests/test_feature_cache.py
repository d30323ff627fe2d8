"""The cache of features within a limit: what was used last stays, what is held is never touched."""

import multiprocessing
import os
import shutil
import time
import tracemalloc

import numpy as np
import pytest

from datamodules.errors import DataError
from datamodules.synthetic import Synthetic
from studies import feature_cache
from studies import features as studied
from studies.features import extract_features

FORK = multiprocessing.get_context("fork")
SIZE = 4 * 50 * 10 + 128  # bytes of the files here: 50 images, 10 features


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FARSHOT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "features"


def fill(cache, *names):
    """Folders of one file each, the first used longest ago."""
    for number, name in enumerate(names):
        folder = feature_cache.folder_of(name)
        with feature_cache.locked(folder):
            batches = iter([{"stem": np.full((50, 10), number, np.float32)}])
            feature_cache.write_features(folder, ["stem"], batches, 50)
        assert (folder / "stem.npy").stat().st_size == SIZE
        os.utime(folder / "lock", (1e9 + number, 1e9 + number))


def left(cache):
    return sorted(path.parent.name for path in cache.glob("*/*.npy"))


def allow(monkeypatch, files):
    monkeypatch.setenv("FARSHOT_CACHE_GB", str(files * SIZE / 1e9))


def test_without_a_limit_nothing_is_removed(cache, monkeypatch):
    fill(cache, "a", "b")
    feature_cache.prune(cache / "b")
    monkeypatch.setenv("FARSHOT_CACHE_GB", "")
    feature_cache.prune(cache / "b")
    assert left(cache) == ["a", "b"]


def test_what_was_used_longest_ago_goes_first(cache, monkeypatch):
    fill(cache, "a", "b", "c", "d")
    feature_cache.mark_used(cache / "a")
    allow(monkeypatch, 2)
    feature_cache.prune(cache / "d")
    assert left(cache) == ["a", "d"]
    assert len(list(cache.glob("*/lock"))) == 4
    allow(monkeypatch, 0)
    feature_cache.prune(cache / "d")
    assert left(cache) == ["d"]


def hold(folder, ready, done):
    with feature_cache.locked(folder):
        ready.set()
        done.wait(20)


def test_what_another_process_holds_stays(cache, monkeypatch):
    fill(cache, "a", "b", "c")
    (cache / "b" / ".stem.1.tmp.npy").write_bytes(b"left by a killed process")
    ready, done = FORK.Event(), FORK.Event()
    child = FORK.Process(target=hold, args=(cache / "a", ready, done))
    child.start()
    assert ready.wait(20)
    os.utime(cache / "a" / "lock", (1e9, 1e9))
    allow(monkeypatch, 1)
    feature_cache.prune(cache / "c")
    assert left(cache) == ["a", "c"]
    done.set()
    child.join()
    feature_cache.prune(cache / "c")
    assert left(cache) == ["c"]


def test_features_that_were_read_outlive_their_file(cache, monkeypatch):
    fill(cache, "a", "b")
    values = feature_cache.read_features(cache / "b", ["stem"], 50)["stem"]
    allow(monkeypatch, 0)
    feature_cache.prune(cache / "a")
    assert left(cache) == ["a"]
    assert (values == 1).all()


def test_extraction_prunes_and_a_use_counts(cache, monkeypatch):
    data = Synthetic(num_train=40, num_test=10, image_size=32, classes=3)
    first, second = (np.arange(10) + start for start in (0, 10))
    for rows in (first, second):
        extract_features(None, data, rows, backbone="test_resnet")
    old = min(cache.iterdir(), key=lambda path: (path / "lock").stat().st_mtime_ns).name
    time.sleep(0.02)
    extract_features(None, data, first, backbone="test_resnet")  # a use
    size = next(cache.glob("*/*.npy")).stat().st_size
    monkeypatch.setenv("FARSHOT_CACHE_GB", str(2 * size / 1e9))
    found = extract_features(None, data, np.arange(10) + 20, backbone="test_resnet")["stage4"]
    assert len(left(cache)) == 2
    assert old in left(cache)
    assert np.isfinite(found.values).all()


@pytest.mark.parametrize("text", ["ten", "-1", "nan"])
def test_an_impossible_limit_is_said_before_any_work(cache, monkeypatch, text):
    monkeypatch.setenv("FARSHOT_CACHE_GB", text)
    monkeypatch.delattr(studied, "_read_batches")  # whatever extracts fails
    data = Synthetic(num_train=40, num_test=10, image_size=32, classes=3)
    with pytest.raises(DataError, match=f"FARSHOT_CACHE_GB is '{text}'"):
        extract_features(None, data, np.arange(4), backbone="test_resnet")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_cache_that_can_only_be_read_is_read(cache):
    data = Synthetic(num_train=40, num_test=10, image_size=32, classes=3)
    expected = np.array(extract_features(None, data, np.arange(4), backbone="test_resnet")["stage4"].values)
    (folder,) = cache.iterdir()
    (folder / "lock").chmod(0o444)
    folder.chmod(0o555)
    try:
        found = extract_features(None, data, np.arange(4), backbone="test_resnet")["stage4"].values
        np.testing.assert_array_equal(found, expected)
        with pytest.raises(DataError, match="cannot be written"):
            extract_features(None, data, np.arange(4), backbone="test_resnet", groups=["stem"])
    finally:
        folder.chmod(0o755)
    shutil.rmtree(folder)


def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    count, width = 20_000, 512  # 41 MB
    batches = ({"stem": np.full((100, width), number, np.float32)} for number in range(count // 100))
    tracemalloc.start()
    feature_cache.write_features(tmp_path, ["stem"], batches, count)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4e6
    np.testing.assert_array_equal(np.load(tmp_path / "stem.npy")[::100, 0], np.arange(200))
