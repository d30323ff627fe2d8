"""A data set read from a prepared folder: the same rows, splits and stream; only where the pixels come from differs."""

import shutil

import numpy as np
import pytest
import torch

from datamodules import ImageFolder, NIHChestXray14
from datamodules.errors import DataError
from tests.data import nih
from tests.data.images import write_image
from tests.datamodule_contract import DataModuleContract


def create(root, *, images=12, size=(200, 150)):
    for split in ("train", "test"):
        for number, name in enumerate(("ant", "bee", "cat")):
            for image in range(images):
                write_image(root / split / name / f"{image:03d}.jpg", 100 * number + image, size=size)


@pytest.fixture
def prepared(tmp_path, run_cli):
    create(tmp_path / "photos")

    def prepare(*words):
        words = ["--root", tmp_path / "photos", "--output", tmp_path / "prepared", "--workers", "1", *words]
        assert run_cli("prepare", "ImageFolder", *words)[::2] == (0, "")
        return ImageFolder(root=str(tmp_path / "photos"), image_size=32, prepared=str(tmp_path / "prepared"), seed=3)

    return prepare


class TestPrepared(DataModuleContract):
    """The whole contract holds; the original images are gone."""

    def create(self):
        from cli import main

        create(self.root / "photos")
        words = ["--output", str(self.root / "prepared"), "--short-side", "64", "--workers", "1"]
        main(["prepare", "ImageFolder", "--root", str(self.root / "photos"), *words])
        for path in (self.root / "photos").rglob("*.jpg"):
            path.write_bytes(b"")  # names stay, for the table; pixels come from the prepared folder

    def build(self, **arguments):
        return ImageFolder(root=str(self.root / "photos"), prepared=str(self.root / "prepared"), **arguments)


def test_small_images_are_copied_to_the_byte(prepared, tmp_path):
    data = prepared("--short-side", "320")
    plain = ImageFolder(root=str(tmp_path / "photos"), image_size=32, seed=3)
    assert list(plain.read_table().paths) == list(data.read_table().paths)
    for first, second in zip(plain.train_dataloader(), data.train_dataloader(), strict=True):
        assert all(torch.equal(first[name], second[name]) for name in ("image", "label", "index"))


def test_shrunk_images_are_close(prepared, tmp_path):
    data = prepared("--short-side", "64", "--quality", "95")
    (small,) = data.images([5])
    assert small.shape == (64, 85, 3)
    plain = ImageFolder(root=str(tmp_path / "photos"), image_size=32)
    first, second = (next(iter(one.test_dataloader()))["image"].float() for one in (plain, data))
    error = ((first - second) ** 2).mean()
    assert 10 * torch.log10(255**2 / error) > 35  # PSNR, dB


def test_a_raw_array(prepared, tmp_path):
    data = prepared("--raw", "true", "--short-side", "320")
    plain = ImageFolder(root=str(tmp_path / "photos"), image_size=32)
    np.testing.assert_array_equal(data.images([3])[0], plain.images([3])[0])


def test_images_that_were_not_prepared_are_missing(prepared, tmp_path):
    prepared()
    shutil.copy(tmp_path / "photos/train/ant/000.jpg", tmp_path / "photos/train/ant/999.jpg")
    arguments = {"root": str(tmp_path / "photos"), "prepared": str(tmp_path / "prepared"), "image_size": 32}
    with pytest.raises(DataError, match=r"1 images of photos are missing.*train/ant/999\.jpg"):
        ImageFolder(**arguments).setup()
    with pytest.warns(UserWarning, match="left out"):
        ImageFolder(**arguments, missing_images="drop").setup()


def test_a_folder_of_another_set_is_refused(prepared, tmp_path):
    prepared()
    (tmp_path / "nih").mkdir()
    nih.create(tmp_path / "nih")
    with pytest.raises(DataError, match="release 'photos', not 'nih'"):
        NIHChestXray14(root=str(tmp_path / "nih"), prepared=str(tmp_path / "prepared")).setup()


def test_a_new_label_policy_needs_no_new_preparing(tmp_path, run_cli):
    (tmp_path / "nih").mkdir()
    nih.create(tmp_path / "nih")
    words = ["--root", tmp_path / "nih", "--output", tmp_path / "prepared", "--workers", "1"]
    assert run_cli("prepare", "NIHChestXray14", *words)[0] == 0
    data = NIHChestXray14(
        root=str(tmp_path / "nih"), prepared=str(tmp_path / "prepared"), labels=["Hernia"], views=["PA"], image_size=16
    )
    batch = next(iter(data.train_dataloader()))
    assert batch["label"].shape[1] == 1
    assert batch["image"].shape[1:] == (1, 16, 16)


def test_in_the_run_the_settings_count_and_not_the_place(prepared, tmp_path):
    from studies.runs import identity

    prepared("--short-side", "64")
    shutil.copytree(tmp_path / "prepared", tmp_path / "moved")
    one, two = (identity({"data": {"init_args": {"prepared": str(tmp_path / name)}}}) for name in ("prepared", "moved"))
    assert one == two
    prepared("--output", tmp_path / "moved2", "--short-side", "48")
    other = identity({"data": {"init_args": {"prepared": str(tmp_path / "moved2")}}})
    assert other != one


def test_the_guard_sees_prepared_images(prepared, tmp_path):
    """Hashes come from where the pixels come from, also where the original files are gone."""
    from studies.fingerprints import hash_rows

    data = prepared("--short-side", "64")
    originals = hash_rows(ImageFolder(root=str(tmp_path / "photos"), image_size=32), range(4))
    for path in (tmp_path / "photos").rglob("*.jpg"):
        path.write_bytes(b"")
    hashes = hash_rows(data, range(4))
    assert hashes.any(axis=1).all()
    assert np.bitwise_count(hashes ^ originals).sum(axis=1).max() < 60
    np.testing.assert_array_equal(hash_rows(data, range(4)), hashes)  # now from the cache


def test_real_photos_through_folder_shards_and_array(real_cifar, tmp_path, run_cli):
    """Tables are identical; pixels, too, since small JPEG files are copied to the byte."""
    for name, raw in (("shards", "false"), ("array", "true")):
        words = ["--root", real_cifar, "--output", tmp_path / name, "--raw", raw, "--verify", "true"]
        assert run_cli("prepare", "ImageFolder", *words)[::2] == (0, "")
    sets = [
        ImageFolder(
            root=str(real_cifar), image_size=32, transform="resize_center", batch_size=64, seed=1, prepared=folder
        )
        for folder in (None, str(tmp_path / "shards"), str(tmp_path / "array"))
    ]
    tables = [data.read_table() for data in sets]
    assert len(tables[0]) == 1200
    for table in tables[1:]:
        assert list(table.paths) == list(tables[0].paths)
        assert list(table.split) == list(tables[0].split)
        np.testing.assert_array_equal(table.labels, tables[0].labels)
    for batches in zip(*(data.train_dataloader() for data in sets), strict=True):
        for other in batches[1:]:
            assert all(torch.equal(batches[0][name], other[name]) for name in ("image", "label", "index"))
    for row in range(0, 1200, 97):
        original = sets[0].images([row])[0]
        assert all(np.array_equal(original, data.images([row])[0]) for data in sets[1:])


def test_the_folder_of_another_set_of_the_same_name(prepared, tmp_path):
    prepared("--short-side", "64")
    other = tmp_path / "elsewhere" / "photos"
    for split in ("train", "test"):
        for number, name in enumerate(("ant", "bee", "cat")):
            for image in range(12):
                write_image(other / split / name / f"{image:03d}.jpg", 5000 + 100 * number + image, size=(200, 150))
    data = ImageFolder(root=str(other), image_size=32, prepared=str(tmp_path / "prepared"))
    with pytest.raises(DataError, match="other pictures than the data set"):
        data.train_dataloader()
    for path in other.rglob("*.jpg"):
        path.write_bytes(b"")  # without originals there is nothing to compare
    data = ImageFolder(root=str(other), image_size=32, prepared=str(tmp_path / "prepared"))
    data.train_dataloader()
