"""Pets, Flowers-102 and DTD: the targets of torchvision that come with lists of their splits."""

import hashlib
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torchvision.datasets
from PIL import Image
from scipy.io import loadmat, savemat

from datamodules.errors import DataError, UnreadableImageError
from datamodules.natural.dtd import DTD
from datamodules.natural.flowers import OxfordFlowers102
from datamodules.natural.pets import OxfordPets
from tests.data import dtd, flowers, pets
from tests.datamodule_contract import DataModuleContract


def by_torchvision(root, dataset):
    """Path relative to root and label of every image of one of torchvision's data sets."""
    files = dataset._images if hasattr(dataset, "_images") else dataset._image_files
    return {
        (Path(file).relative_to(root).as_posix(), label) for file, label in zip(files, dataset._labels, strict=True)
    }


def by_table(table, *splits):
    rows = np.concatenate([table.rows(split) for split in splits])
    return set(zip(table.paths[rows].tolist(), table.labels[rows].tolist(), strict=True))


def linked(write, root):
    """Have `write` write a set once a session, and link its images under `root`: making files is what takes time.

    A test may remove or rename an image; to change one it has to unlink it first.
    """
    template = root.parent.parent / f"template {write.__module__}"
    if not template.exists():
        write(template)

    def copy(source, target):
        return os.link(source, target) if source.endswith(".jpg") else shutil.copyfile(source, target)

    shutil.copytree(template, root, copy_function=copy, dirs_exist_ok=True)


def replace(path, content):
    path.unlink()
    path.write_bytes(content)


def rewrite(path, change):
    """Edit the lines of a list."""
    path.write_text("\n".join(change(path.read_text().splitlines())) + "\n")


class TestOxfordPets(DataModuleContract):
    def create(self):
        linked(pets.create, self.root)
        self.lists = self.root / "oxford-iiit-pet" / "annotations"

    def build(self, **arguments):
        return OxfordPets(root=str(self.root), **arguments)

    def test_same_as_torchvision(self):
        data = self.make()
        table = data.raw_table
        parts = [torchvision.datasets.OxfordIIITPet(self.root, split=split) for split in ("trainval", "test")]
        assert data.class_names == parts[0].classes
        assert [by_table(table, "train"), by_table(table, "test")] == [
            by_torchvision(self.root, part) for part in parts
        ]

    def test_validation_is_carved_from_trainval(self):
        data = self.make()
        assert data.split_policy == "official"
        assert [len(data.rows(split)) for split in ("train", "validation", "test")] == [100, 11, 74]
        assert set(data.rows("validation")) < set(data.raw_table.rows("train"))

    def test_archives_unpacked_in_root_give_the_same_sets(self):
        before = self.make()
        for part in ("images", "annotations"):
            shutil.move(self.root / "oxford-iiit-pet" / part, self.root / part)
        after = self.make()
        assert after.raw_table.paths[0] == "images/Abyssinian_1.jpg"
        for split in ("train", "validation", "test"):
            assert after.rows(split).tolist() == before.rows(split).tolist()

    def test_windows_lists_with_a_byte_order_mark(self):
        expected = self.make().read_table()
        for path in self.lists.glob("*.txt"):
            path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
        assert self.make().read_table().paths.tolist() == expected.paths.tolist()

    def test_missing_list(self):
        (self.lists / "test.txt").unlink()
        with pytest.raises(DataError, match=r"lacks annotations/test.txt") as error:
            self.make().read_table()
        assert "--data.init_args.download true" in str(error.value)
        assert "annotations.tar.gz" in str(error.value)
        assert str(error.value).count("\n") < 15

    def test_missing_image(self):
        (self.root / "oxford-iiit-pet" / "images" / "beagle_2.jpg").unlink()
        with pytest.raises(DataError, match=r"first is oxford-iiit-pet/images/beagle_2.jpg") as error:
            self.make().setup()
        assert f"{self.lists / 'trainval.txt'}, line 14" in str(error.value)

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("abysinian_9 1 1 1", "unknown label 'abysinian'; did you mean 'Abyssinian'"),
            ("Abyssinian_9 2 1 1", "class number 2 does not belong to 'Abyssinian'"),
            ("Abyssinian_9 1", "a line is 'Abyssinian_9 1'"),
            ("", "a line is ''"),
            ("Abyssinian_1 1 1 1", "image 'Abyssinian_1' is listed twice"),
        ],
    )
    def test_bad_line(self, line, message):
        rewrite(self.lists / "test.txt", lambda lines: [*lines[:6], line, *lines[6:]])
        with pytest.raises(DataError, match=message) as error:
            self.make().read_table()
        assert f"{self.lists / 'test.txt'}, line 7" in str(error.value)

    @pytest.mark.parametrize("content", [b"", b"\x80\x00\xff\xfe"])
    def test_damaged_list(self, content):
        (self.lists / "trainval.txt").write_bytes(content)
        with pytest.raises(DataError, match="a list") as error:
            self.make().read_table()
        assert str(self.lists / "trainval.txt") in str(error.value)

    def test_gif_and_png_named_jpg_are_decoded(self):
        """As Egyptian_Mau_139.jpg and Abyssinian_5.jpg of the release."""
        folder = self.root / "oxford-iiit-pet" / "images"
        colours = np.array([[(200, 30, 30), (30, 200, 30)]], dtype=np.uint8).repeat(8, axis=0).repeat(8, axis=1)
        for name, kind in (("Abyssinian_1.jpg", "GIF"), ("Abyssinian_2.jpg", "PNG")):
            (folder / name).unlink()
            Image.fromarray(colours).save(folder / name, format=kind)
        for image in self.make().read_images([0, 1]):
            np.testing.assert_array_equal(image, colours)

    def test_truncated_image(self):
        path = self.root / "oxford-iiit-pet" / "images" / "Abyssinian_1.jpg"
        replace(path, path.read_bytes()[:-200])
        with pytest.raises(UnreadableImageError, match="Abyssinian_1"):
            self.make().read_images([0])


class _Flowers(DataModuleContract):
    def create(self):
        linked(flowers.create, self.root)
        self.home = self.root / "flowers-102"

    def build(self, **arguments):
        return OxfordFlowers102(root=str(self.root), split=self.split, **arguments)

    def change(self, name, **variables):
        kept = {key: value for key, value in loadmat(self.home / name).items() if not key.startswith("_")}
        savemat(self.home / name, kept | variables)


class TestOxfordFlowers102(_Flowers):
    split = "literature"

    def test_same_as_torchvision(self):
        reader = torchvision.datasets.Flowers102
        sums = {
            key: (name, hashlib.md5((self.home / name).read_bytes()).hexdigest())
            for key, (name, _) in reader._file_dict.items()
            if key != "image"
        }
        self.monkeypatch.setattr(reader, "_file_dict", sums)
        data = self.make()
        assert data.class_names == reader.classes
        for split, ours in (("train", "train"), ("val", "validation"), ("test", "test")):
            expected = by_torchvision(self.root, reader(self.root, split=split))
            assert by_table(data.read_table(), ours) == expected

    def test_official_sizes(self):
        data = self.make(val_fraction=0.5)  # has no say where validation is official
        assert data.split_policy == "official"
        assert [len(data.rows(split)) for split in ("train", "validation", "test")] == [204, 102, 306]

    def test_images_in_no_set_take_no_part(self):
        self.change("setid.mat", tstid=loadmat(self.home / "setid.mat")["tstid"][:, :-5])
        data = self.make()
        assert len(data.read_table()) == 612
        assert len(data.rows("test")) == 301

    def test_missing_image(self):
        (self.home / "jpg" / "image_00007.jpg").unlink()
        with pytest.raises(DataError, match=r"1 images of oxford_flowers102 .* flowers-102/jpg/image_00007.jpg"):
            self.make().setup()

    def test_unknown_class(self):
        labels = loadmat(self.home / "imagelabels.mat")["labels"]
        labels[0, 4] = 103
        self.change("imagelabels.mat", labels=labels)
        with pytest.raises(DataError, match="image 5 has the unknown class 103") as error:
            self.make().read_table()
        assert "imagelabels.mat, labels, entry 5" in str(error.value)
        assert "1 to 102" in str(error.value)

    @pytest.mark.parametrize(
        ("number", "message"), [(900, "image 900 has no label, imagelabels.mat has 612"), (0, "image 0 has no label")]
    )
    def test_set_names_an_unknown_image(self, number, message):
        self.change("setid.mat", valid=np.array([[number]]))
        with pytest.raises(DataError, match=message) as error:
            self.make().read_table()
        assert "setid.mat, valid" in str(error.value)

    def test_image_in_two_sets(self):
        self.change("setid.mat", valid=loadmat(self.home / "setid.mat")["trnid"][:, :1])
        with pytest.raises(DataError, match="is in two sets or twice in one"):
            self.make().read_table()

    @pytest.mark.parametrize("name", ["imagelabels.mat", "setid.mat"])
    def test_damaged_table(self, name):
        content = (self.home / name).read_bytes()
        for damaged in (b"", b"no MATLAB file, though long enough for a header" * 9, content[: len(content) // 2]):
            (self.home / name).write_bytes(damaged)
            with pytest.raises(DataError, match="cannot read the variable") as error:
                self.make().read_table()
            assert str(self.home / name) in str(error.value)

    def test_table_without_the_variable(self):
        savemat(self.home / "setid.mat", {"trnid": [[1]], "valid": [[2]]})
        with pytest.raises(DataError, match="variable 'tstid'"):
            self.make().read_table()


class TestReversedFlowers(_Flowers):
    split = "cherti2022"

    def test_train_and_test_are_reversed(self):
        literature = OxfordFlowers102(root=str(self.root)).read_table()
        data = self.make()
        table = data.read_table()
        expected = np.concatenate([literature.rows("train"), literature.rows("validation")])
        assert data.rows("test").tolist() == sorted(expected)
        carved = np.concatenate([table.rows("train"), table.rows("validation")])
        assert sorted(carved) == literature.rows("test").tolist()
        assert [len(table.rows(split)) for split in ("train", "validation", "test")] == [275, 31, 306]

    def test_rows_name_the_split(self):
        assert self.make().split_policy == "cherti2022: train and test reversed, official"
        assert self.make(folds=4).split_policy == "cherti2022: train and test reversed, 4 folds by group"

    def test_folds_leave_its_test_set_alone(self):
        assert not set(self.make(folds=4).rows("test")) & set(self.make().rows("test"))


class TestDTD(DataModuleContract):
    def create(self):
        linked(dtd.create, self.root)
        self.home = self.root / "dtd" / "dtd"

    def build(self, **arguments):
        return DTD(root=str(self.root), **arguments)

    @pytest.mark.parametrize("partition", [1, 2])
    def test_same_as_torchvision(self, partition):
        data = self.make(partition=partition)
        for split, ours in (("train", "train"), ("val", "validation"), ("test", "test")):
            reader = torchvision.datasets.DTD(self.root, split=split, partition=partition)
            assert reader.classes == data.class_names
            assert by_table(data.read_table(), ours) == by_torchvision(self.root, reader)
        assert [len(data.rows(split)) for split in ("train", "validation", "test")] == [94, 94, 94]

    def test_rows_name_the_partition(self):
        assert self.make().split_policy == "official, partition 1"
        assert self.make(partition=2).split_policy == "official, partition 2"

    @pytest.mark.parametrize("partition", [0, 11])
    def test_no_such_partition(self, partition):
        with pytest.raises(DataError, match=f"DTD has no partition {partition}") as error:
            self.make(partition=partition)
        assert "1 to 10" in str(error.value)

    @pytest.mark.parametrize("folder", ["", "dtd"])
    def test_other_layouts(self, folder):
        before = self.make().read_table()
        shutil.move(self.home, self.root / "moved")
        shutil.rmtree(self.root / "dtd")
        shutil.copytree(self.root / "moved", self.root / folder, dirs_exist_ok=True)
        after = self.make().read_table()
        assert (self.root / after.paths[0]).is_file()
        assert after.groups.tolist() == before.groups.tolist()
        assert after.split.tolist() == before.split.tolist()

    def test_missing_list(self):
        (self.home / "labels" / "val2.txt").unlink()
        with pytest.raises(DataError, match=r"lacks labels/val2.txt"):
            self.make(partition=2).read_table()
        self.make(partition=1).read_table()

    def test_image_in_two_lists(self):
        rewrite(self.home / "labels" / "val1.txt", lambda lines: ["banded/banded_0001.jpg", *lines])
        with pytest.raises(DataError, match="image 'banded/banded_0001' is listed twice") as error:
            self.make().read_table()
        assert "val1.txt, line 1" in str(error.value)

    def test_unknown_class(self):
        rewrite(self.home / "labels" / "test1.txt", lambda lines: [*lines, "stripes/stripes_0001.jpg"])
        with pytest.raises(DataError, match="unknown label 'stripes'; did you mean 'striped'") as error:
            self.make().read_table()
        assert "test1.txt, line 95" in str(error.value)

    def test_missing_image(self):
        (self.home / "images" / "zigzagged" / "zigzagged_0005.jpg").unlink()
        with pytest.raises(DataError, match="1 images of dtd are missing") as error:
            self.make().setup()
        assert "test1.txt, line 94" in str(error.value)
