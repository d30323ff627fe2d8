"""Tar shards: writing, reading by random access, indexing, hostile archives, and shards as a data set."""

import io as std_io
import json
import os
import pickle
import subprocess
import tarfile
import threading

import cv2
import numpy as np
import pytest

from datamodules import shards
from datamodules.errors import DataError, UnreadableImageError
from datamodules.image_shards import ImageShards
from tests.datamodule_contract import DataModuleContract

MEMBERS = [(f"{number:05d}.jpg", bytes([number]) * (number * 37 + 1)) for number in range(40)]


def add(tar, name, content, **changes):
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    for key, value in changes.items():
        setattr(entry, key, value)
    tar.addfile(entry, std_io.BytesIO(content))


def jpeg(seed, colour):
    image = np.random.default_rng(seed).integers(0, 40, (20, 24, 3)).astype(np.uint8) + np.uint8(colour)
    return cv2.imencode(".jpg", image)[1].tobytes()


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
    for records in (b"20 size=-512\n", b"13 size=-512\n", b"9" * 30 + b" path=x\n"):
        with tarfile.open(tmp_path / "a.tar", "w") as tar:
            add(tar, "x", records, type=tarfile.XHDTYPE)
            add(tar, "a.jpg", b"x")
        with pytest.raises(DataError, match=r"damaged extended header|claims -512 bytes"):
            shards.index_shards([tmp_path / "a.tar"])


def test_names_that_climb_are_only_names(tmp_path):
    """Nothing is extracted: a member that names a file outside stays a row, and a link is refused."""
    folder = tmp_path / "deep" / "root"
    folder.mkdir(parents=True)
    with tarfile.open(folder / "train-0.tar", "w") as tar:
        for number in range(12):
            add(tar, f"../../evil{number}.jpg", jpeg(number, 60))
            add(tar, f"../../evil{number}.cls", b"%d" % (number % 2))
    before = sorted(path for path in tmp_path.rglob("*"))
    data = ImageShards(root=str(folder), image_size=16, batch_size=4)
    assert data.read_images([0])[0].shape == (20, 24, 3)
    new = set(tmp_path.rglob("*")) - set(before)
    assert {path.parent for path in new} == {folder}
    assert all(path.name.startswith(".index-") for path in new)
    with tarfile.open(folder / "train-0.tar", "a") as tar:
        add(tar, "passwd.jpg", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")
    with pytest.raises(DataError, match="no regular file"):
        ImageShards(root=str(folder))


# A data set of shards ------------------------------------------------------------------------------------------------


def write_set(root, label=lambda number: b"%d" % (number % 3), extension="cls", names=("train-0", "train-1", "test-0")):
    for shard, name in enumerate(names):
        members = []
        for number in range(24):
            members += [(f"{number:04d}.jpg", jpeg(100 * shard + number, 80 * (number % 3)))]
            members += [(f"{number:04d}.{extension}", label(number))]
        shards.write_shard(root / f"{name}.tar", members)


class TestImageShards(DataModuleContract):
    shots = 2

    def create(self):
        write_set(self.root)

    def build(self, **arguments):
        return ImageShards(root=str(self.root), **arguments)

    def test_images_labels_and_splits(self):
        data = self.make(class_names=["ant", "bee", "cat"])
        table = data.read_table()
        assert len(table) == 72
        assert table.labels.tolist() == [number % 3 for number in range(24)] * 3
        assert table.rows("test").tolist() == list(range(24))
        assert table.paths[1] == "test-0.tar/0001.jpg"
        image = cv2.imdecode(np.frombuffer(jpeg(201, 80), np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
        np.testing.assert_array_equal(data.read_images([1])[0], image)
        assert data.image_bytes(1) == jpeg(201, 80)

    def test_the_index_is_kept_until_a_shard_changes(self, monkeypatch):
        first = self.make().read_table()
        with monkeypatch.context() as patch:
            patch.setattr(shards, "index_shards", lambda *_: pytest.fail("indexed again"))
            assert self.make().read_table().paths.tolist() == first.paths.tolist()
        write_set(self.root, label=lambda number: b"%d" % (number % 4), names=["train-0"])
        assert self.make().num_classes == 4

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
    def test_a_read_only_root(self):
        self.root.chmod(0o500)
        assert len(self.make().read_table()) == 72


@pytest.mark.parametrize(
    ("extension", "label", "arguments"),
    [
        ("cls", lambda number: b"abc"[number % 3 : number % 3 + 1] + b"\n", {}),
        ("txt", lambda number: b"abc"[number % 3 : number % 3 + 1], {"label": "txt"}),
        ("json", lambda number: json.dumps({"y": number % 3}).encode(), {"label": "json", "label_key": "y"}),
        ("json", lambda number: json.dumps({"y": "abc"[number % 3]}).encode(), {"label": "json", "label_key": "y"}),
    ],
)
def test_kinds_of_labels(tmp_path, extension, label, arguments):
    write_set(tmp_path, label, extension)
    data = ImageShards(root=str(tmp_path), **arguments)
    assert data.read_table().labels.tolist() == [number % 3 for number in range(24)] * 3
    assert data.class_names in (["a", "b", "c"], ["0", "1", "2"])


def test_class_names_from_a_file(tmp_path):
    write_set(tmp_path)
    (tmp_path / "classes.txt").write_text("ant\nbee\ncat\ndog\n")
    data = ImageShards(root=str(tmp_path), labels=None)
    assert data.class_names == ["ant", "bee", "cat", "dog"]
    assert set(data.read_table().labels) == {0, 1, 2}


@pytest.mark.parametrize(
    ("members", "arguments", "words"),
    [
        ([("0.jpg", b"x"), ("0.png", b"x"), ("0.cls", b"0")], {}, "two images or two labels"),
        ([("0.jpg", b"x"), ("0.cls", b"0"), ("1.cls", b"0")], {}, "a label and no image"),
        ([("0.jpg", b"x"), ("0.txt", b"0")], {}, "0 labels named .cls"),
        ([("0.jpg", b"x"), ("0.cls", b"anr")], {"class_names": ["ant", "bee"]}, "did you mean 'ant'"),
        ([("0.jpg", b"x"), ("0.cls", b"2")], {"class_names": ["ant", "bee"]}, "label '2' is no class"),
        ([("0.jpg", b"x"), ("0.cls", b"-1")], {"class_names": ["ant", "bee"]}, "label '-1' is no class"),
        ([(f"{key}.{kind}", b"0") for key in "010" for kind in ("jpg", "cls")], {}, "twice in one shard"),
        ([("0.jpg", b"x"), ("0.json", b"{}")], {"label": "json", "label_key": "y"}, "KeyError"),
        ([("0.jpg", b"x"), ("0.json", b"{}")], {"label": "json"}, "give the key"),
        ([("0.jpg", b"x"), ("0.cls", b"\xff")], {}, "label cannot be read"),
    ],
)
def test_bad_samples(tmp_path, members, arguments, words):
    shards.write_shard(tmp_path / "train-0.tar", members)
    with pytest.raises(DataError, match=words):
        ImageShards(root=str(tmp_path), **arguments).read_table()


def test_bad_folders(tmp_path):
    with pytest.raises(DataError, match="no tar shards"):
        ImageShards(root=str(tmp_path))
    write_set(tmp_path, names=("train-0", "more-0"))
    with pytest.raises(DataError, match=r"more-0\.tar does not say"):
        ImageShards(root=str(tmp_path)).read_table()
    with pytest.raises(DataError, match=r"No such file[\s\S]*none\.tar"):
        ImageShards(root=str(tmp_path), shards=[str(tmp_path / "none.tar")])
