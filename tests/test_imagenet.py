"""ImageNet-1k and 21k: layouts that read alike, official labels, complete classes, a quick listing."""

import shutil
import tracemalloc
from typing import ClassVar

import numpy as np
import pytest

from datamodules.errors import DataError
from datamodules.natural import imagenet as release
from datamodules.natural.imagenet import ImageNet, devkit_labels, kaggle_labels, synset_names, synsets_1k
from datamodules.natural.imagenet21k import ImageNet21k
from datamodules.table import strings
from tests.data import imagenet
from tests.datamodule_contract import DataModuleContract, no_image

TRUTH = "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt"
LAYOUTS = {
    "flat": {"val": "flat"},
    "archive": {"val": "flat", "labels": "archive"},
    "kaggle": {"val": "flat", "labels": "kaggle", "below": "ILSVRC/Data/CLS-LOC"},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One tree for all tests that only read."""
    return imagenet.create(tmp_path_factory.mktemp("imagenet"))


@pytest.fixture
def flat(tmp_path):
    return imagenet.create(tmp_path, images=1, val="flat")


class TestImageNet(DataModuleContract):
    defaults: ClassVar = {}

    @pytest.fixture(autouse=True)
    def _root(self, folders, monkeypatch):
        self.root, self.monkeypatch = folders, monkeypatch

    def build(self, **arguments):
        return ImageNet(root=str(self.root), **{**self.defaults, **arguments})

    def test_two_epochs_differ_and_a_seed_repeats(self):
        self.defaults = {"fraction": 0.1}  # as good as 3,000 images, and quicker
        super().test_two_epochs_differ_and_a_seed_repeats()

    def test_facts(self):
        data = self.make()
        table = data.read_table()
        assert (data.name, data.num_classes, data.split_policy) == ("imagenet1k", 1000, "official")
        assert data.class_names[:2] == ["n01440764 tench", "n01443537 goldfish"]
        assert len(set(data.class_names)) == 1000  # two cranes and two maillots
        folders = [path.split("/")[-2] for path in table.paths]
        assert [data.class_names[label].split()[0] for label in table.labels] == folders
        assert [len(table.rows(split)) for split in ("train", "validation", "test")] == [2970, 30, 1000]
        assert {path.split("/")[0] for path in table.paths[table.rows("test")]} == {"val"}
        assert table.paths.dtype == table.groups.dtype == strings(["a"]).dtype

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_layouts_read_alike(self, layout, tmp_path):
        imagenet.create(tmp_path, **LAYOUTS[layout])
        with no_image():
            expected, data = self.make().read_table(), ImageNet(root=str(tmp_path))
            table = data.read_table()
            data.setup()
        np.testing.assert_array_equal(table.labels, expected.labels)
        np.testing.assert_array_equal(table.groups, expected.groups)
        np.testing.assert_array_equal(table.split.codes, expected.split.codes)
        assert [path.split("/")[-1] for path in table.paths] == [path.split("/")[-1] for path in expected.paths]
        assert not (tmp_path.parent / "outside.txt").exists()
        rows = [0, len(table) - 1]
        for ours, theirs in zip(data.read_images(rows), self.make().read_images(rows), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_incomplete_trees(tmp_path):
    root = imagenet.create(tmp_path, images=1)

    def stops(match, *words):
        with pytest.raises(DataError, match=match) as error:
            ImageNet(root=str(root)).read_table()
        assert all(word in str(error.value) for word in words)

    for split in ("val", "train"):
        folder = root / split / "n01440764"
        folder.rename(root / split / "n01440765")
        stops(r"1 folders are no class .*: n01440765; did you mean n0144076\d\?", str(root / split))
        (root / split / "n01440765").rename(root / "elsewhere")
        stops("1 of 1,000 class folders are missing: n01440764", str(root / split), "ImageFolder")
        (root / "elsewhere").rename(folder)
    (root / "train" / "n01443537" / "n01443537_0.JPEG").unlink()
    stops("1 of 1,000 class folders hold no image: n01443537", str(root / "train"), "unpack")
    (root / "train" / "n01443537" / "n01443537_0.png").hardlink_to(root / "train" / "n01440764" / "n01440764_0.JPEG")
    (image,) = (root / "val" / "n01440764").iterdir()
    image.rename(root / image.name)
    stops("1 of 1,000 class folders hold no image: n01440764", str(root / "val"), "unpack")
    (root / "val").rename(root / "released")
    stops("no folder val", "image-net.org")
    (root / "train").rename(root / "training")
    stops("no folder train of imagenet1k", "image-net.org")


def test_half_unpacked_classes(folders, monkeypatch):
    monkeypatch.setattr(release, "VAL_IMAGES", 1000)
    with pytest.warns(UserWarning, match="has 3,000 images in .*train, the release has 1,281,167") as found:
        ImageNet(root=str(folders)).read_table()
    assert len(found) == 1  # val is whole


def test_listing_holds_the_names_of_one_class_at_a_time(monkeypatch, tmp_path):
    synsets = [f"n{number:08d}" for number in range(200)]
    monkeypatch.setattr(release, "synset_folders", lambda folder: synsets)
    monkeypatch.setattr(release, "image_files", lambda folder: [f"{folder.name}_{n}.JPEG" for n in range(500)])
    tracemalloc.start()
    listing = release.list_classes(tmp_path, "train/", synsets)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(listing.paths) == 100_000
    assert peak < 2_000_000  # Python strings of all of them take 7 MB


def test_flat_without_labels(flat):
    shutil.rmtree(flat / "ILSVRC2012_devkit_t12")
    with pytest.raises(DataError, match="no list of their labels") as error:
        ImageNet(root=str(flat)).read_table()
    assert "LOC_val_solution.csv" in str(error.value)


def test_flat_image_missing(flat):
    (flat / "val" / "ILSVRC2012_val_00000017.JPEG").unlink()
    data = ImageNet(root=str(flat))
    with pytest.raises(DataError, match=r"1 images .* missing, the first is val/ILSVRC2012_val_00000017\.JPEG"):
        data.setup()
    with pytest.warns(UserWarning, match="left out"):
        kept = ImageNet(root=str(flat), missing_images="drop").rows("test")
    assert len(kept) == 999


def test_flat_image_without_label(flat):
    (flat / "val" / "ILSVRC2012_val_00001001.JPEG").hardlink_to(flat / "val" / "ILSVRC2012_val_00000001.JPEG")
    with pytest.raises(DataError, match=r"1 images in val have no label, the first is ILSVRC2012_val_00001001\.JPEG"):
        ImageNet(root=str(flat)).read_table()


def test_ground_truth_out_of_range(tmp_path):
    imagenet.write_labels(tmp_path, "devkit")
    lines = (tmp_path / TRUTH).read_text().splitlines()
    for cell in ("1001", "0", "seven", ""):
        (tmp_path / TRUTH).write_text("\n".join([*lines[:4], cell, *lines[5:]]))
        with pytest.raises(DataError, match=f"class number '{cell}' is out of range") as error:
            devkit_labels(tmp_path, synsets_1k())
        assert f"{TRUTH}, line 5" in str(error.value)


def test_damaged_devkit(tmp_path):
    imagenet.write_labels(tmp_path, "archive")
    archive = tmp_path / "ILSVRC2012_devkit_t12.tar.gz"
    archive.write_bytes(archive.read_bytes()[:200])
    with pytest.raises(DataError, match=r"cannot read data/ILSVRC2012_validation_ground_truth\.txt"):
        devkit_labels(tmp_path, synsets_1k())
    imagenet.write_labels(tmp_path, "devkit")
    (tmp_path / "ILSVRC2012_devkit_t12/data/meta.mat").write_bytes(b"MATLAB 5.0")
    with pytest.raises(DataError, match="cannot read the devkit's classes"):
        devkit_labels(tmp_path, synsets_1k())


def test_bad_kaggle_labels(tmp_path):
    imagenet.write_labels(tmp_path, "kaggle")
    table = tmp_path / "LOC_val_solution.csv"
    lines = table.read_text().splitlines()
    for cells in ("n00000001 1 2 3 4", ""):
        table.write_text("\n".join([*lines[:2], f"ILSVRC2012_val_00000999,{cells}", *lines[3:]]))
        with pytest.raises(DataError, match=f"unknown class '{cells[:9]}'") as error:
            kaggle_labels(table, synsets_1k())
        assert "LOC_val_solution.csv, line 3" in str(error.value)
    table.write_text("\n".join([*lines, lines[-1]]))
    with pytest.raises(DataError, match="image listed twice"):
        kaggle_labels(table, synsets_1k())


def test_names():
    assert synset_names(["n01440764", "n99999999"]) == ["n01440764 tench", "n99999999"]
    assert synsets_1k() == sorted(synsets_1k())


class TestImageNet21k(DataModuleContract):
    def create(self):
        imagenet.create_21k(self.root)

    def build(self, **arguments):
        return ImageNet21k(root=str(self.root), **{"val_fraction": 0.1, "test_fraction": 0.15, **arguments})

    def test_facts(self):
        data = self.make()
        table = data.read_table()
        assert (data.name, data.split_policy) == ("imagenet21k", "hash")
        assert [name.split()[0] for name in data.class_names] == imagenet.SYNSETS_21K
        assert np.bincount(table.labels).tolist() == [20] * 6
        assert table.paths[0] == "n00004475/n00004475_0.JPEG"

    @pytest.mark.parametrize("folder", ["train", "imagenet21k_train"])
    def test_hashed_test_set_is_that_of_any_layout(self, tmp_path, folder):
        imagenet.create_21k(tmp_path / "other", folder=folder)
        data = ImageNet21k(root=str(tmp_path / "other"), val_fraction=0.1, test_fraction=0.15)
        np.testing.assert_array_equal(data.rows("test"), self.make().rows("test"))

    @pytest.mark.parametrize(("folder", "val"), [("train", "val"), ("imagenet21k_train", "imagenet21k_val")])
    def test_official_val_is_the_test_set(self, tmp_path, folder, val):
        root = imagenet.create_21k(tmp_path / "other", folder=folder, val=val)
        shutil.rmtree(root / val / "n00005787")  # a class may be missing from val
        data = ImageNet21k(root=str(root))
        table = data.read_table()
        assert data.split_policy == "official"
        assert np.bincount(table.labels[table.rows("test")]).tolist() == [2, 0, 2, 2, 2, 2]
        assert {path.split("/")[0] for path in table.paths[table.rows("test")]} == {val}
        (root / val / "n00000001").mkdir()
        with pytest.raises(DataError, match="1 folders are no class of this set: n00000001"):
            ImageNet21k(root=str(root)).read_table()

    def test_empty_class_keeps_its_place(self):
        before = self.make()
        for path in (self.root / "n01440764").iterdir():
            path.unlink()
        with pytest.warns(UserWarning, match="1 of 6 classes have no image, such as n01440764"):
            table = self.make().read_table()
        assert self.make().class_names == before.class_names
        assert np.bincount(table.labels).tolist() == [20, 20, 0, 20, 20, 20]

    def test_bad_folders(self):
        (self.root / "cats").mkdir()
        with pytest.raises(DataError, match="1 folders are named by no WordNet id: cats"):
            self.make()
        shutil.rmtree(self.root)
        with pytest.raises(DataError, match="no folder") as error:
            self.make()
        assert "image-net.org" in str(error.value)
        self.root.mkdir()
        with pytest.raises(DataError, match="no class folders of ImageNet-21k"):
            self.make()
        (self.root / "n00004475").mkdir()
        with pytest.raises(DataError, match="no images in any class folder"):
            self.make().read_table()
