"""Preparing that was stopped: killed at random points, between two files, by a full disk, or with files lost since."""

import errno
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from datamodules import shards
from datamodules.errors import DataError
from datamodules.image_table import ImageTable
from datamodules.prepared import PreparedImages
from studies import prepare_parts
from studies.prepare import verify
from tests.test_prepare import FEW, contents, make, write_tree


def processes_below(folder):
    """Processes whose working directory is `folder`."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.readlink(entry / "cwd") == str(folder):
                found.append(entry.name)
        except OSError:
            continue
    return found


@pytest.mark.parametrize("raw", [False, True])
def test_killed_at_random_points(tmp_path, raw):
    """Forked from one loaded process, so that a try costs what it does and not what it imports."""
    write_tree(tmp_path / "data", 120)
    data = ImageTable(root=str(tmp_path / "data"))
    begun = time.monotonic()
    make(data, tmp_path / "whole", raw=raw, workers=2, **FEW)
    duration = time.monotonic() - begun
    rng = random.Random(0)
    out, kills = tmp_path / "out", 0
    parts = set()
    for _ in range(12):
        child = os.fork()
        if child == 0:
            try:
                os.chdir(tmp_path)
                make(data, out, raw=raw, workers=2, **FEW)
            finally:
                os._exit(0)
        time.sleep(rng.uniform(0.1, 0.7) * duration)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        kills += os.WIFSIGNALED(status)
        parts.add(len(list(out.glob("parts/*.parquet"))))
        if (out / "manifest.parquet").is_file():
            break
        with pytest.raises(DataError, match=r"not finished|no settings"):
            PreparedImages(out)
    assert kills
    # Workers notice within moments that their parent is gone, and hold the folder until then.
    deadline = time.monotonic() + 5
    while processes_below(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not processes_below(tmp_path), "workers outlived their parent"
    make(data, out, raw=raw, **FEW)
    assert contents(out) == contents(tmp_path / "whole")


class Killed(BaseException):
    pass


def killed_before_the_first_part(data, folder, monkeypatch, **recipe):
    """The shard, or its stretch of the array, is written; the part that tells of it is not."""

    def kill(*_, **__):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(prepare_parts, "_write_part", kill)
        with pytest.raises(Killed):
            make(data, folder, **recipe, **FEW)


def test_killed_between_a_shard_and_its_part(tmp_path, monkeypatch):
    """A part of an earlier call, without the image that is readable now, must not describe the new shard."""
    write_tree(tmp_path / "data")
    data, image = ImageTable(root=str(tmp_path / "data")), tmp_path / "data" / "a" / "000.png"
    good = image.read_bytes()
    image.write_bytes(good[:50])
    make(data, tmp_path / "out", skip_unreadable=True, **FEW)
    image.write_bytes(good)
    killed_before_the_first_part(data, tmp_path / "out", monkeypatch)
    make(data, tmp_path / "out", skip_unreadable=True, **FEW)
    assert verify(tmp_path / "out") == 40


def test_killed_while_a_lost_array_is_made_again(tmp_path, monkeypatch):
    """The array is there again, but not what the other parts say of it."""
    write_tree(tmp_path / "data")
    data = ImageTable(root=str(tmp_path / "data"))
    make(data, tmp_path / "out", raw=True, **FEW)
    before = contents(tmp_path / "out")
    (tmp_path / "out" / "images.npy").unlink()
    killed_before_the_first_part(data, tmp_path / "out", monkeypatch, raw=True)
    make(data, tmp_path / "out", raw=True, **FEW)
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("raw", [False, True])
def test_files_cut_short_are_made_again(tmp_path, raw):
    write_tree(tmp_path / "data")
    data = ImageTable(root=str(tmp_path / "data"))
    make(data, tmp_path / "out", raw=raw, **FEW)
    before = contents(tmp_path / "out")
    for name in ("images.npy" if raw else "shards/000001.tar", "parts/000002.parquet"):
        content = (tmp_path / "out" / name).read_bytes()
        (tmp_path / "out" / name).write_bytes(content[: len(content) // 3])
    assert 0 < make(data, tmp_path / "out", raw=raw, **FEW).made < 40
    assert contents(tmp_path / "out") == before


def test_a_killed_worker(tmp_path):
    write_tree(tmp_path / "data")
    data, parent = ImageTable(root=str(tmp_path / "data")), os.getpid()
    read = data.read_images

    def read_or_die(rows):
        if os.getpid() != parent and rows[0] > 20:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(rows)

    data.read_images = read_or_die
    with pytest.raises(DataError, match="give fewer --workers"):
        make(data, tmp_path / "out", workers=2, **FEW)
    data.read_images = read
    make(data, tmp_path / "out", workers=2, **FEW)
    make(data, tmp_path / "fresh", **FEW)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


@pytest.mark.parametrize("raw", [False, True])
def test_a_full_disk(tmp_path, raw, monkeypatch):
    write_tree(tmp_path / "data")
    data = ImageTable(root=str(tmp_path / "data"))
    make(data, tmp_path / "whole", raw=raw, **FEW)

    def no_room(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(prepare_parts.os if raw else shards, "fsync" if raw else "write_shard", no_room)
        with pytest.raises(DataError, match=r"disk is full[\s\S]*make room"):
            make(data, tmp_path / "out", raw=raw, **FEW)
    assert not [path for path in (tmp_path / "out").rglob("*.tmp*")]
    make(data, tmp_path / "out", raw=raw, **FEW)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_an_image_that_became_unreadable_is_zeros(tmp_path):
    write_tree(tmp_path / "data")
    data = ImageTable(root=str(tmp_path / "data"))
    make(data, tmp_path / "out", raw=True, **FEW)
    (tmp_path / "out" / "parts" / "000000.parquet").unlink()
    (tmp_path / "data" / "a" / "000.png").write_bytes(b"")
    for folder in ("out", "fresh"):
        make(data, tmp_path / folder, raw=True, skip_unreadable=True, **FEW)
    assert not np.load(tmp_path / "out" / "images.npy")[0].any()
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")
