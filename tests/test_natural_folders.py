"""Caltech-101 and EuroSAT, whose labels are folders; and the downloads of all targets that torchvision reads."""

import shutil
from importlib import import_module
from urllib.error import URLError

import numpy as np
import pytest
import torchvision.datasets
import torchvision.datasets.utils
from PIL import Image

from datamodules.errors import DataError
from datamodules.natural.caltech import BACKGROUND, Caltech101
from datamodules.natural.dtd import DTD
from datamodules.natural.eurosat import EuroSAT
from datamodules.natural.flowers import OxfordFlowers102
from datamodules.natural.pets import OxfordPets
from tests.data import caltech, dtd, eurosat, flowers, pets
from tests.datamodule_contract import DataModuleContract, no_image
from tests.test_natural_targets import by_table, linked


class TestCaltech101(DataModuleContract):
    def create(self):
        linked(caltech.write, self.root)
        self.home = self.root / "caltech101" / "101_ObjectCategories"

    def build(self, **arguments):
        return Caltech101(root=str(self.root), **arguments)

    def test_same_as_torchvision(self):
        reader = torchvision.datasets.Caltech101(self.root)
        data = self.make()
        assert data.class_names == reader.categories
        expected = {
            (f"caltech101/101_ObjectCategories/{reader.categories[label]}/image_{number:04d}.jpg", label)
            for number, label in zip(reader.index, reader.y, strict=True)
        }
        assert by_table(data.raw_table, "") == expected

    def test_hashed_test_set(self):
        data = self.make()
        assert data.split_policy == "hash"
        share = len(data.rows("test")) / len(data.read_table())
        assert 0.1 < share < 0.2

    def test_background_is_the_last_class(self):
        with no_image():
            data, without = self.make(background=True), self.make()
        assert data.class_names == [*without.class_names, BACKGROUND]
        assert (data.label_policy, without.label_policy) == ("with background", "without background")
        labels = data.read_table().labels
        assert np.bincount(labels).tolist() == [6] * 101 + [3]
        test, fewer = ({one.read_table().paths[row] for row in one.rows("test")} for one in (data, without))
        assert fewer == {path for path in test if BACKGROUND not in path}

    def test_a_face_and_its_crop_share_a_group(self):
        table = self.make().read_table()
        faces, crops = table.groups[table.labels == 0], table.groups[table.labels == 1]
        assert faces.tolist() == crops.tolist() == [f"Faces/image_{number:04d}" for number in range(1, 7)]
        assert table.split[table.labels == 0].tolist() == table.split[table.labels == 1].tolist()
        others = table.groups[table.labels > 1]
        assert len(set(others)) == len(others)

    def test_grey_and_cmyk_become_rgb(self):
        path = self.home / "Faces" / "image_0001.jpg"
        path.unlink()
        Image.new("CMYK", (30, 20), (10, 200, 30, 0)).save(path)
        cmyk, grey = self.make().read_images([0, 3])
        assert cmyk.shape == (20, 30, 3)
        np.testing.assert_allclose(cmyk.mean(axis=(0, 1)), (245, 55, 225), atol=3)
        assert (grey[..., 0] == grey[..., 1]).all()
        assert (grey[..., 0] == grey[..., 2]).all()

    @pytest.mark.parametrize(
        "folder", ["", "101_ObjectCategories", "caltech-101/101_ObjectCategories", "caltech101/caltech-101"]
    )
    def test_other_layouts_have_the_same_test_set(self, folder):
        before = self.make()
        groups = before.read_table().groups[before.rows("test")].tolist()
        shutil.move(self.home, self.root / "moved")
        shutil.rmtree(self.root / "caltech101")
        target = self.root / folder if folder != "caltech101/caltech-101" else self.root / folder / self.home.name
        shutil.copytree(self.root / "moved", target, dirs_exist_ok=True)
        shutil.rmtree(self.root / "moved")
        after = self.make()
        assert after.read_table().groups[after.rows("test")].tolist() == groups

    def test_missing_class(self):
        shutil.rmtree(self.home / "wrench")
        with pytest.raises(DataError, match="101_ObjectCategories lacks wrench") as error:
            self.make().read_table()
        assert "caltech-101.zip" in str(error.value)

    def test_unknown_class(self):
        shutil.copytree(self.home / "wrench", self.home / "wrenches")
        with pytest.raises(DataError, match="no class 'wrenches'; did you mean 'wrench'") as error:
            self.make().read_table()
        assert str(self.home) in str(error.value)


class TestEuroSAT(DataModuleContract):
    def create(self):
        linked(eurosat.write, self.root)
        self.home = self.root / "eurosat" / "2750"

    def build(self, **arguments):
        return EuroSAT(root=str(self.root), **arguments)

    def test_same_as_torchvision(self):
        reader = torchvision.datasets.EuroSAT(self.root)
        data = self.make()
        assert data.class_names == reader.classes
        table = data.raw_table
        assert [str(self.root / path) for path in table.paths] == [path for path, _ in reader.samples]
        assert table.labels.tolist() == reader.targets
        assert table.groups[0] == "AnnualCrop/AnnualCrop_1"

    def test_half_unpacked_archive(self):
        for path in sorted((self.home / "SeaLake").iterdir())[5:]:
            path.unlink()
        with pytest.raises(DataError, match="eurosat has 185 JPEG images here, the release has 200") as error:
            self.make().read_table()
        assert "EuroSAT.zip" in str(error.value)
        data = self.make(missing_images="drop")
        with pytest.warns(UserWarning, match="185 JPEG images here"):
            table = data.read_table()
        assert len(table) == 185

    def test_test_set_does_not_depend_on_what_is_missing(self):
        before = self.make()
        test = {before.read_table().groups[row] for row in before.rows("test")}
        for path in sorted((self.home / "River").iterdir())[::2]:
            path.unlink()
        after = self.make(missing_images="drop")
        with pytest.warns(UserWarning, match="190 JPEG images"):
            table = after.read_table()
        assert {table.groups[row] for row in after.rows("test")} == test & set(table.groups)

    @pytest.mark.parametrize("policy", ["error", "drop"])
    def test_more_images_than_the_release(self, policy):
        shutil.copy(self.home / "River" / "River_1.jpg", self.home / "River" / "River_1 copy.jpg")
        with pytest.raises(DataError, match="has 201 JPEG images here, the release has 200"):
            self.make(missing_images=policy).read_table()

    def test_multispectral_release(self):
        for path in self.home.rglob("*.jpg"):
            path.rename(path.with_suffix(".tif"))
        with pytest.raises(DataError, match="has 0 JPEG images here"):
            self.make().read_table()


SETS = {
    OxfordPets: pets.create,
    OxfordFlowers102: flowers.create,
    DTD: dtd.create,
    Caltech101: caltech.write,
    EuroSAT: eurosat.write,
}


@pytest.fixture(autouse=True)
def _small_releases(monkeypatch):
    caltech.shrink(monkeypatch)
    eurosat.shrink(monkeypatch)


@pytest.fixture
def network(monkeypatch):
    """The network's edge: records what torchvision would fetch, and fails as an unplugged cable does."""
    asked = []

    def urlretrieve(url, *_, **__):
        asked.append(url)
        raise URLError("no route to host")

    monkeypatch.setattr(torchvision.datasets.utils, "_urlretrieve", urlretrieve)
    monkeypatch.setattr(torchvision.datasets.utils, "_get_redirect_url", lambda url, **_: url)
    return asked


@pytest.mark.parametrize("cls", SETS)
class TestObtaining:
    def test_absent(self, cls, tmp_path, network):
        root = tmp_path / "none"
        data = cls(root=str(root))
        data.prepare_data()
        with pytest.raises(DataError, match=rf"no usable {cls.name}: .* is not there") as error:
            data.setup()
        for words in ("--data.init_args.download true", str(root / cls.homes[0]), *cls.archives):
            assert words in str(error.value)
        assert str(error.value).count("\n") < 15
        assert not network
        assert not root.exists()

    def test_no_network(self, cls, tmp_path, network):
        with pytest.raises(DataError, match=f"cannot download {cls.name}: .*no route to host") as error:
            cls(root=str(tmp_path / "none"), download=True).prepare_data()
        assert cls.archives[0] in str(error.value)
        assert network[0] == cls.archives[0]

    def test_what_is_there_is_not_fetched_again(self, cls, tmp_path, network):
        root = tmp_path / "data"
        linked(SETS[cls], root)
        cls(root=str(root), download=True).prepare_data()
        assert not network

    def test_torchvision_fetches_and_checks_each_archive(self, cls, tmp_path, monkeypatch):
        """The whole download but for the bytes: the address, the folder and the md5 sum of each archive."""
        fetched, root = [], tmp_path / "data"

        def download_url(url, download_root, filename=None, md5=None, **_):
            assert len(md5) == 32
            fetched.append((url, str(download_root)))

        def extract(url, download_root, extract_root=None, filename=None, md5=None, **_):
            download_url(url, download_root, filename, md5)
            if cls is not OxfordPets or len(fetched) == 2:  # the only archive that is unpacked, or the last one
                linked(SETS[cls], root)
            if cls is Caltech101:  # what the outer archive holds
                (root / "caltech101" / "caltech-101").mkdir()
                (root / "caltech101" / "caltech-101.zip").touch()

        module = import_module(getattr(torchvision.datasets, cls.reader).__module__)
        monkeypatch.setattr(module, "download_and_extract_archive", extract)
        monkeypatch.setattr(module, "download_url", download_url, raising=False)
        if cls is OxfordFlowers102:
            monkeypatch.setattr(module, "check_integrity", lambda path, md5: (root / "flowers-102").is_dir())
        data = cls(root=str(root), download=True, image_size=16)
        data.prepare_data()
        assert [url for url, _ in fetched] == list(cls.archives)
        assert {folder for _, folder in fetched} == {str(root / cls.homes[0].split("/")[0])}
        assert len(data.rows("test"))


@pytest.mark.parametrize(
    ("cls", "part"), [(OxfordPets, "oxford-iiit-pet/annotations/trainval.txt"), (EuroSAT, "eurosat/2750/River")]
)
def test_what_torchvision_takes_for_complete(cls, part, tmp_path, network):
    root = tmp_path / "data"
    linked(SETS[cls], root)
    shutil.move(root / part, tmp_path / "away")
    data = cls(root=str(root), download=True)
    data.prepare_data()
    with pytest.raises(DataError, match=rf"lacks .*{part.rpartition('/')[2]}") as error:
        data.setup()
    assert "complete this folder or move it away" in str(error.value)
    assert not network
