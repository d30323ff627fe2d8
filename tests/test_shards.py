"""Tar shards: writing, reading by random access, copies of an object store's, indexing, and hostile archives."""

import functools
import http.server
import io as std_io
import os
import pickle
import subprocess
import tarfile
import threading
import time

import numpy as np
import pytest

from datamodules import shards
from datamodules.errors import DataError, UnreadableImageError

MEMBERS = [(f"{number:05d}.jpg", bytes([number]) * (number * 37 + 1)) for number in range(40)]


def add(tar, name, content, **changes):
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    for key, value in changes.items():
        setattr(entry, key, value)
    tar.addfile(entry, std_io.BytesIO(content))


# Writing and reading -------------------------------------------------------------------------------------------------


def test_tar_reads_what_is_written(tmp_path):
    path = tmp_path / "a.tar"
    offsets = shards.write_shard(path, MEMBERS)
    with tarfile.open(path) as tar:
        assert [(entry.name, tar.extractfile(entry).read()) for entry in tar] == MEMBERS
        assert [entry.offset_data for entry in tar.getmembers()] == offsets.tolist()
    listed = subprocess.run(["tar", "tf", path], capture_output=True, text=True, check=True)
    assert listed.stdout.split() == [name for name, _ in MEMBERS]
    assert listed.stderr == ""
    shards.write_shard(tmp_path / "b.tar", MEMBERS)
    assert path.read_bytes() == (tmp_path / "b.tar").read_bytes()


def test_random_access(tmp_path):
    files = [tmp_path / "0.tar", tmp_path / "1.tar"]
    offsets = [shards.write_shard(file, MEMBERS[::step]) for file, step in zip(files, (1, -1), strict=True)]
    reader = pickle.loads(pickle.dumps(shards.ShardReader(files)))
    for shard, order in enumerate((MEMBERS, MEMBERS[::-1])):
        for (_, content), offset in zip(order, offsets[shard].tolist(), strict=True):
            assert reader.read(shard, offset, len(content), shards.checksum(content)) == content


def test_threads_survive_few_descriptors(tmp_path, monkeypatch):
    monkeypatch.setattr(shards.resource, "getrlimit", lambda _: (4, 4))
    files = [tmp_path / f"{number}.tar" for number in range(8)]
    for number, file in enumerate(files):
        shards.write_shard(file, [("0.bin", bytes([number]) * 1000)])
    reader, wrong = shards.ShardReader(files), []
    before = len(os.listdir("/proc/self/fd"))

    def work(seed):
        for number in np.random.default_rng(seed).integers(0, 8, 300).tolist():
            if reader.read(number, 512, 1000) != bytes([number]) * 1000:
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(os.listdir("/proc/self/fd")) - before <= 2


@pytest.mark.parametrize(
    ("place", "error", "words"),
    [
        ((1, 512, 10), DataError, "no shard number 1"),
        ((-1, 512, 10), DataError, "no shard number -1"),
        ((0, -5, 10), DataError, "impossible"),
        ((0, 512, 0), DataError, "impossible"),
        ((0, 512, 1 << 40), DataError, "impossible"),
        ((0, 10_000, 1000), DataError, "ends at byte 10240"),
        ((0, 1 << 62, 10), DataError, "ends at byte 10240"),
        ((0, 513, 100, shards.checksum(b"x" * 100)), UnreadableImageError, "checksum"),
    ],
)
def test_impossible_places(tmp_path, place, error, words):
    shards.write_shard(tmp_path / "a.tar", [("a.jpg", b"x" * 100)])
    with pytest.raises(error, match=words):
        shards.ShardReader([tmp_path / "a.tar"]).read(*place)


def test_a_missing_shard(tmp_path):
    with pytest.raises(DataError, match=r"cannot be opened: No such file[\s\S]*gone.tar"):
        shards.ShardReader([tmp_path / "gone.tar"]).read(0, 512, 10)


def test_what_is_no_regular_file(tmp_path):
    (tmp_path / "folder.tar").mkdir()
    os.mkfifo(tmp_path / "pipe.tar")  # opening it would wait for ever
    for name in ("folder.tar", "pipe.tar"):
        with pytest.raises(DataError, match=rf"no regular file[\s\S]*{name}"):
            shards.index_shards([tmp_path / name])


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="no file at hand whose reading fails")
def test_a_reading_error_says_where():
    with pytest.raises(UnreadableImageError, match=r"cannot be read: Input/output error[\s\S]*/proc/self/mem, byte 0"):
        shards.ShardReader(["/proc/self/mem"]).read(0, 0, 10)


def test_half_a_copy_is_cleared(tmp_path, monkeypatch):
    """A process that was killed while it copied leaves half a file; several that come after it all get the whole."""
    fsspec = pytest.importorskip("fsspec")
    monkeypatch.setenv("FARSHOT_CACHE", str(tmp_path / "cache"))
    shards.write_shard(tmp_path / "a.tar", MEMBERS)
    url = f"file://{tmp_path}/a.tar"

    def killed(_, __, target):
        with open(target, "wb") as file:
            file.write(b"half")
        os._exit(7)

    def copy(patched):
        child = os.fork()
        if child == 0:
            if patched:
                fsspec.get_filesystem_class("file").get_file = killed
            os._exit(int(shards.local_file(url).read_bytes() != (tmp_path / "a.tar").read_bytes()))
        return child

    assert os.waitstatus_to_exitcode(os.waitpid(copy(True), 0)[1]) == 7
    assert len(list((tmp_path / "cache" / "shards").glob(".*.tmp.tar"))) == 1
    children = [copy(False) for _ in range(4)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert sorted(path.suffix for path in (tmp_path / "cache" / "shards").iterdir()) == [".lock", ".tar"]
    monkeypatch.setenv("FARSHOT_CACHE", "/proc/none")
    with pytest.raises(DataError, match="FARSHOT_CACHE names a folder with room"):
        shards.local_file(url)


def test_a_changed_file_on_a_web_server(tmp_path, monkeypatch):
    """fsspec's key of a file over HTTP is its address alone."""
    pytest.importorskip("aiohttp")
    monkeypatch.setenv("FARSHOT_CACHE", str(tmp_path / "cache"))

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        for content in (b"one", b"another"):
            (tmp_path / "a.tar").write_bytes(content)
            assert shards.local_file(f"http://127.0.0.1:{server.server_port}/a.tar").read_bytes() == content
    finally:
        server.shutdown()
        server.server_close()


def test_shards_of_an_object_store_are_copied_once(tmp_path, monkeypatch):
    fsspec = pytest.importorskip("fsspec")
    monkeypatch.setenv("FARSHOT_CACHE", str(tmp_path / "cache"))
    store, url = fsspec.filesystem("memory"), "memory://farshot-test/a.tar"
    shards.write_shard(tmp_path / "a.tar", MEMBERS)
    store.pipe("/farshot-test/a.tar", (tmp_path / "a.tar").read_bytes())
    index = shards.index_shards([url])
    offset, size = (int(index[name][30].as_py()) for name in ("offset", "size"))
    assert shards.ShardReader([url]).read(0, offset, size) == MEMBERS[30][1]
    with monkeypatch.context() as patch:
        patch.setattr(type(store), "get_file", lambda *_, **__: pytest.fail("copied twice"))
        assert shards.ShardReader([url]).read(0, offset, size) == MEMBERS[30][1]
    shards.write_shard(tmp_path / "b.tar", [("b.jpg", b"new")])
    store.pipe("/farshot-test/a.tar", (tmp_path / "b.tar").read_bytes())
    assert shards.ShardReader([url]).read(0, 512, 3) == b"new"
    with pytest.raises(DataError, match="cannot be copied"):
        shards.local_file("memory://farshot-test/none.tar")


# Indexing ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_index_equals_tarfile(tmp_path, form):
    """Long names and names that are not ASCII make tarfile write extended headers in all but the oldest form."""
    names = ["0.jpg", "a.b/c/0001.seg.png", "d/" * 40 + "x" * 60 + ".cls"]
    if form != tarfile.USTAR_FORMAT:
        names += ["é/ö.jpg", "long/" + "n" * 300 + ".json"]
    with tarfile.open(tmp_path / "a.tar", "w", format=form) as tar:
        for number, name in enumerate(names):
            add(tar, name, b"x" * number * 600, mtime=1.5)
    with tarfile.open(tmp_path / "a.tar") as tar:
        entries = tar.getmembers()
    index = shards.index_shards([tmp_path / "a.tar"]).to_pylist()
    assert [f"{row['key']}.{row['extension']}" for row in index] == names == [entry.name for entry in entries]
    assert [row["offset"] for row in index] == [entry.offset_data for entry in entries]
    assert [row["size"] for row in index] == [entry.size for entry in entries]
    assert index[1]["key"] == "a.b/c/0001"
    assert index[1]["extension"] == "seg.png"


def test_folders_and_hidden_members_are_passed_over(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "folder", b"", type=tarfile.DIRTYPE)
        for name in ("__meta__.json", "folder/.hidden.jpg", "noextension", "folder/1.JPG"):
            add(tar, name, b"1")
    assert shards.index_shards([tmp_path / "a.tar"])["key"].to_pylist() == ["folder/1"]
    assert shards.index_shards([tmp_path / "a.tar"])["extension"].to_pylist() == ["jpg"]


def test_only_meta_members_are_passed_over(tmp_path):
    names = ["__1.jpg", "__d/1.jpg", "a\n/b.jpg", "__key__", "__d__/1.jpg"]
    shards.write_shard(tmp_path / "a.tar", [(name, b"1") for name in names])
    assert shards.index_shards([tmp_path / "a.tar"])["key"].to_pylist() == ["__1", "__d/1", "a\n/b"]


def test_names_that_are_no_utf8_stay_different(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.USTAR_FORMAT, encoding="latin-1") as tar:
        add(tar, "é.jpg", b"1")
        add(tar, "è.jpg", b"1")
    assert shards.index_shards([tmp_path / "a.tar"])["key"].to_pylist() == ["\\xe9", "\\xe8"]


def hostile_size(size):
    header = bytearray(tarfile.TarInfo("a.jpg").tobuf(tarfile.USTAR_FORMAT))
    header[124:136] = (b"\xff" if size < 0 else b"\x80") + size.to_bytes(11, "big", signed=True)
    header[148:156] = b"%06o\0 " % (sum(header) - sum(header[148:156]) + 256)
    return bytes(header)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda tar: tar[: 512 + 20], "is cut off"),
        (lambda tar: tar[: 512 + 512 + 100], "end mark is missing"),
        (lambda tar: tar[:1024], "end mark is missing"),
        (lambda tar: b"", "end mark is missing"),
        (lambda tar: b"\x1f\x8b" + tar[2:], "not a tar archive"),
        (lambda tar: b"not a tar" * 200, "not a tar archive"),
        (lambda tar: hostile_size(-512) + tar, "claims -512 bytes"),
        (lambda tar: hostile_size(1 << 60) + tar, "claims 1152921504606846976 bytes"),
        (lambda tar: hostile_size(1 << 27) + tar, "is cut off"),
    ],
)
def test_damaged_and_hostile_archives(tmp_path, damage, words):
    path = tmp_path / "a.tar"
    shards.write_shard(path, [("a.jpg", b"x" * 100), ("b.jpg", b"y" * 100)])
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=words) as caught:
        shards.index_shards([path])
    assert str(path) in str(caught.value)


def test_a_hostile_extended_header(tmp_path):
    many = b"5 a=\n" * 200_000 + b"x"  # 6 s, where each record is cut off what is left
    begun = time.monotonic()
    for records in (b"20 size=-512\n", b"13 size=-512\n", b"9" * 30 + b" path=x\n", b"9" * 5000 + b" path=x\n", many):
        with tarfile.open(tmp_path / "a.tar", "w") as tar:
            add(tar, "x", records, type=tarfile.XHDTYPE)
            add(tar, "a.jpg", b"x")
        with pytest.raises(DataError, match=r"damaged extended header|claims -512 bytes"):
            shards.index_shards([tmp_path / "a.tar"])
    assert time.monotonic() - begun < 3
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "x", b"22 GNU.sparse.major=1\n", type=tarfile.XHDTYPE)
        add(tar, "GNUSparseFile.0/a.cls", b"1\n0\n512\n".ljust(512, b"\0") + b"7")
    with pytest.raises(DataError, match="sparse member"):
        shards.index_shards([tmp_path / "a.tar"])
