"""Tuberculosis: images by their stems in any layout, readings of both sites, the split per site."""

import shutil

import cv2
import numpy as np
import pytest
from PIL import Image

from datamodules.chest_xray.tuberculosis import Tuberculosis
from datamodules.errors import DataError
from tests.data import tuberculosis
from tests.datamodule_contract import DataModuleContract, no_image

COLUMNS = ("sex", "age", "site")


def stems(table):
    return [path.split("/")[-1].split(".")[0] for path in table.paths]


class TestTuberculosis(DataModuleContract):
    channels = 1

    def create(self):
        tuberculosis.create(self.root)

    def build(self, **arguments):
        return Tuberculosis(root=str(self.root), **arguments)

    def test_facts(self):
        data = self.make()
        table = data.read_table()
        assert (data.task, data.class_names, data.split_policy) == ("binary", ["Tuberculosis"], "hash")
        assert stems(table) == tuberculosis.stems(60, 30)
        assert table.labels[:, 0].tolist() == [float(stem[-1]) for stem in stems(table)]
        assert np.asarray(table.metadata["site"]).tolist() == ["Shenzhen"] * 60 + ["Montgomery"] * 30
        assert not any("Mask" in path for path in table.paths)

    def test_readings(self):
        table = self.make().read_table()
        sex, age = (np.asarray(table.metadata[name]) for name in ("sex", "age"))
        # Shenzhen's images 1 to 5: "Female , 5 month", "femal24yrs", "male 42", "female 64days", "male 45yrs".
        assert sex[:5].tolist() == ["F", "F", "M", "F", "M"]
        np.testing.assert_allclose(age[:5], [5 / 12, 24, 42, 64 / 365.25, 45], rtol=1e-6)
        assert sex[60:63].tolist() == ["M", "", "F"]  # Montgomery's codes M, O, F
        np.testing.assert_array_equal(age[60:], np.arange(1, 31))

    @pytest.mark.parametrize(
        ("text", "sex", "age"),
        [
            ("", "", np.nan),
            ("??? 12 no idea", "", np.nan),
            ("mass in the left lung", "", np.nan),
            ("male\n3 nodules", "M", np.nan),
            ("\n  Female, 28yrs\n", "F", 28),
            ("male 1year \xff", "M", 1),
            ("Patient's Sex: F\r\nPatient's Age: 090Y\r\n", "F", 90),
            ("Patient's Sex: \nPatient's Age: 090Y", "", np.nan),
        ],
    )
    def test_reading(self, text, sex, age):
        path = self.root / "ChinaSet_AllFiles" / "ClinicalReadings" / "CHNCXR_0007_0.txt"
        path.write_bytes(text.encode("latin-1"))
        table = self.make().read_table()
        assert table.metadata["sex"][6] == sex
        np.testing.assert_array_equal(table.metadata["age"][6], np.float32(age))

    def test_missing_readings(self):
        (self.root / "MontgomerySet" / "ClinicalReadings" / "MCUCXR_0002_0.txt").unlink()
        shutil.rmtree(self.root / "ChinaSet_AllFiles" / "ClinicalReadings")
        table = self.make().read_table()
        assert set(table.metadata["sex"][:60]) == {""}
        assert np.flatnonzero(np.isnan(table.metadata["age"])).tolist() == [*range(60), 61]

    @pytest.mark.parametrize("layout", ["renamed", "flat"])
    def test_layouts_read_alike(self, tmp_path, layout):
        tuberculosis.create(tmp_path / layout, layout=layout)
        expected, table = self.make().read_table(), Tuberculosis(root=str(tmp_path / layout)).read_table()
        assert stems(table) == stems(expected)
        np.testing.assert_array_equal(table.labels, expected.labels)
        np.testing.assert_array_equal(table.split.codes, expected.split.codes)
        for name in COLUMNS:
            np.testing.assert_array_equal(table.metadata[name], expected.metadata[name])

    def test_palette_rgb_and_grey_files(self):
        data = self.make()
        table = data.read_table()
        for row, mode in ((0, "P"), (9, "RGB"), (60, "L")):
            with Image.open(self.root / table.paths[row]) as file:
                assert file.mode == mode
                expected = np.asarray(file.convert("L"), dtype=int)
            (image,) = data.read_images([row])
            assert np.abs(image[:, :, 0].astype(int) - expected).max() <= 1

    def test_split_of_the_paper_is_per_site(self):
        data = self.make(split="cherti2022", val_fraction=0.0, test_fraction=0.5)
        table = data.read_table()
        site = np.asarray(table.metadata["site"])
        test = table.rows("test")
        assert [int((site[test] == name).sum()) for name in ("Shenzhen", "Montgomery")] == [9, 4]  # 15 % of 60 and 30
        assert len(table.rows("train")) == 77
        assert data.split_policy.startswith("cherti2022")

    def test_images_of_a_patient_stay_together(self):
        for number in (162, 166):
            shutil.copy(
                self.root / "MontgomerySet" / "CXR_png" / "MCUCXR_0001_0.png",
                self.root / "MontgomerySet" / "CXR_png" / f"MCUCXR_{number:04d}_1.png",
            )
        table = self.make().read_table()
        assert table.groups[90:].tolist() == ["MCUCXR_0162_1", "MCUCXR_0162_1"]
        assert len(set(table.groups)) == 91
        assert table.split[90] == table.split[91]

    def test_copy_in_another_folder(self):
        """A popular copy repeats 96 images in `test/`; the ones in `CXR_png` count."""
        stem = "CHNCXR_0003_0"
        copy = self.root / "test" / f"{stem}.png"
        copy.parent.mkdir()
        shutil.copy(self.root / "ChinaSet_AllFiles" / "CXR_png" / copy.name, copy)
        table = self.make().read_table()
        assert len(table) == 90
        assert table.paths[2] == f"ChinaSet_AllFiles/CXR_png/{stem}.png"

    def test_two_copies(self):
        shutil.copytree(self.root / "MontgomerySet", self.root / "again")
        with no_image(), pytest.raises(DataError, match="image MCUCXR_0001_0 is there 2 times") as error:
            self.make().read_table()
        assert "again/CXR_png/MCUCXR_0001_0.png" in str(error.value)

    def test_other_files_do_not_count(self):
        for name in ("CHNCXR_0001_0_mask.png", "logo.png"):
            assert cv2.imwrite(str(self.root / name), np.zeros((8, 8), np.uint8))
        assert len(self.make().read_table()) == 90

    def test_label_out_of_range(self):
        assert cv2.imwrite(str(self.root / "CHNCXR_0700_3.png"), np.zeros((8, 8), np.uint8))
        with pytest.raises(DataError, match=r"image 'CHNCXR_0700_3\.png' has the label 3"):
            self.make().read_table()

    def test_folds_by_site(self):
        data = self.make(folds=2, fold=0, fold_by="site")
        site = np.asarray(data.read_table().metadata["site"])
        assert set(site[data.rows("test")]) == {"Montgomery"}
        assert set(site[data.rows("train")]) == {"Shenzhen"}


def test_one_site_alone(tmp_path):
    tuberculosis.create(tmp_path, montgomery=0)
    assert set(Tuberculosis(root=str(tmp_path)).read_table().metadata["site"]) == {"Shenzhen"}


def test_no_images(tmp_path):
    with pytest.raises(DataError, match="no images for tuberculosis") as error:
        Tuberculosis(root=str(tmp_path)).read_table()
    assert "CHNCXR_0001_0.png" in str(error.value)
