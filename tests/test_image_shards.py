"""Tar shards as a data set: tables, labels and class names, links, and samples that cannot be."""

import json
import os
import tarfile

import cv2
import numpy as np
import pytest

from datamodules import shards
from datamodules.errors import DataError
from datamodules.image_shards import ImageShards
from tests.datamodule_contract import DataModuleContract
from tests.test_shards import add


def jpeg(seed, colour):
    image = np.random.default_rng(seed).integers(0, 40, (20, 24, 3)).astype(np.uint8) + np.uint8(colour)
    return cv2.imencode(".jpg", image)[1].tobytes()


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

    def test_a_damaged_index_is_made_again(self):
        first = self.make().read_table()
        (index,) = self.root.glob(".index-*")
        index.write_bytes(index.read_bytes()[:100])
        assert self.make().read_table().paths.tolist() == first.paths.tolist()

    def test_the_name_is_the_users_own(self):
        """By which the guard knows that another set may bear it, too."""
        data = self.make()
        assert data.unnamed_releases == {data.release}

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
    (tmp_path / "classes.txt").write_bytes(b"\xef\xbb\xbfant\r\nbee\r\ncat\r\ndog\r\n\r\n")
    data = ImageShards(root=str(tmp_path), labels=None)
    assert data.class_names == ["ant", "bee", "cat", "dog"]
    assert set(data.read_table().labels) == {0, 1, 2}
    (tmp_path / "classes.txt").write_text("ant\n\ncat\n")
    with pytest.raises(DataError, match=r"without a name[\s\S]*classes.txt, line 2"):
        ImageShards(root=str(tmp_path))


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["0", "2"], ["0", "1", "2"]),
        (["00", "02"], ["00", "02"]),
        (["7", "99999999999"], ["7", "99999999999"]),
        (["nan", "NA"], ["NA", "nan"]),
    ],
)
def test_names_and_numbers(tmp_path, labels, names):
    """Leading zeros are names, and so are numbers too large for indices."""
    samples = [(f"{row}.{kind}", label.encode()) for row, label in enumerate(labels) for kind in ("jpg", "cls")]
    shards.write_shard(tmp_path / "train-0.tar", samples)
    data = ImageShards(root=str(tmp_path), val_fraction=0)
    assert data.class_names == names
    assert [data.class_names[label] for label in data.raw_table.labels] == labels


def test_labels_from_json(tmp_path):
    values = ["1.0", "10.0", "2", "null", "NaN"]
    samples = [(f"{n}.{k}", b'{"y": %s}' % v.encode()) for n, v in enumerate(values) for k in ("jpg", "json")]
    shards.write_shard(tmp_path / "train-0.tar", samples)
    data = ImageShards(root=str(tmp_path), label="json", label_key="y", val_fraction=0)
    assert data.raw_table.labels.tolist() == [1, 10, 2, -1, -1]
    assert data.num_classes == 11


def test_shards_behind_links(tmp_path):
    """A linked folder is read, a shard that several names lead to once."""
    for name in ("train", "val"):
        (tmp_path / "disk" / name).mkdir(parents=True)
        write_set(tmp_path / "disk" / name, names=["0"])
    root = tmp_path / "root"
    (root / "val").mkdir(parents=True)
    (root / "val" / "0.tar").symlink_to(tmp_path / "disk" / "val" / "0.tar")
    (root / "train").symlink_to(tmp_path / "disk" / "train")
    (root / "a").symlink_to(root)
    data = ImageShards(root=str(root))
    assert data.shard_files == [str(root / "train" / "0.tar"), str(root / "val" / "0.tar")]


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
        (
            [("0.jpg", b"x"), ("0.json", b'{"y": [1]}')],
            {"label": "json", "label_key": "y"},
            "neither text nor a number",
        ),
        ([("0.jpg", b"x"), ("0.cls", b"a")], {"class_names": ["a", "b", "a"]}, "label 'a' is the name of several"),
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
