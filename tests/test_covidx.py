"""COVIDx CXR: its lists from both ends of a line, its patients, its leaks and its broken files."""

import time

import numpy as np
import pytest

from datamodules.chest_xray.covidx import COVIDxCXR
from datamodules.errors import DataError
from tests.data import covidx
from tests.datamodule_contract import DataModuleContract, no_image


class TestCOVIDx(DataModuleContract):
    channels = 1

    def create(self):
        covidx.create(self.root)

    def build(self, **arguments):
        return COVIDxCXR(root=str(self.root), **arguments)

    def test_official_facts(self):
        data = self.make()
        table = data.read_table()
        assert (data.task, data.class_names, data.split_policy) == ("binary", ["COVID-19"], "official")
        official = np.array([path.split("/")[0] for path in table.paths])
        assert set(official[table.rows("test")]) == {"test"}
        assert set(official[table.rows("validation")]) == {"train"}  # carved by patient
        site = np.asarray(table.metadata["site"])
        test = table.rows("test")
        assert set(zip(site[test], table.labels[test, 0].tolist(), strict=True)) == {("rsna", 0.0), ("ricord", 1.0)}
        assert set(table.metadata) == {"site"}

    def test_names_with_blanks_and_equal_numbers_of_two_sources(self):
        data = self.make()
        table = data.read_table()
        assert table.paths[:4].tolist() == [
            f"train/case {source} ({image}).jpeg" for source in (0, 1) for image in (0, 1)
        ]
        assert table.groups[:4].tolist() == ["actmed/101"] * 2 + ["cohen/101"] * 2
        data.setup()  # the files are where the table says

    def test_grey_and_rgb_files(self):
        grey, rgb = self.make().read_images([0, 2])
        assert grey.shape == rgb.shape == (32, 32, 1)
        assert min(grey.std(), rgb.std()) > 1

    def test_image_split_keeps_the_official_test_set(self):
        data = self.make(split="cherti2022", val_fraction=0.4)
        with pytest.warns(UserWarning, match="patients in several splits"):
            data.setup()
        official = self.make()
        np.testing.assert_array_equal(data.rows("test"), official.rows("test"))
        assert data.split_policy.startswith("cherti2022: by image")

    def test_no_views(self):
        with pytest.raises(DataError, match="covidx has no view 'PA'"):
            self.make(views=["PA"])

    def test_missing_image_names_list_and_line(self):
        (self.root / "test" / "419639-002001-1.png").unlink()
        with no_image(), pytest.raises(DataError, match="1 images of covidx are missing") as error:
            self.make().setup()
        assert "test.txt, line 4" in str(error.value)

    def test_missing_list(self):
        (self.root / "test.txt").unlink()
        with pytest.raises(DataError, match=r"no list test\.txt"):
            self.make().read_table()


def test_official_validation(tmp_path):
    data = COVIDxCXR(root=str(covidx.create(tmp_path, val=True)))
    table = data.read_table()
    assert {path.split("/")[0] for path in table.paths[table.rows("validation")]} == {"val"}
    assert [len(table.rows(split)) for split in ("train", "validation", "test")] == [48, 24, 24]
    assert table.where(48) == f"{tmp_path / 'val.txt'}, line 1"
    assert table.where(73) == f"{tmp_path / 'test.txt'}, line 2"


def test_three_classes_are_the_same_task(tmp_path):
    two, three = (
        COVIDxCXR(root=str(covidx.create(tmp_path / str(flag), three_classes=flag))).read_table().labels
        for flag in (False, True)
    )
    assert "pneumonia" in (tmp_path / "True" / "train.txt").read_text()
    np.testing.assert_array_equal(two, three)


def test_windows_line_ends_and_tabs(tmp_path):
    covidx.create(tmp_path)
    expected = COVIDxCXR(root=str(tmp_path)).read_table()
    text = (tmp_path / "train.txt").read_text().replace(" negative ", "\tnegative\t").replace("\n", "\r\n")
    (tmp_path / "train.txt").write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\r\n")
    table = COVIDxCXR(root=str(tmp_path)).read_table()
    assert table.paths.tolist() == expected.paths.tolist()
    assert table.metadata["site"].tolist() == expected.metadata["site"].tolist()


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("A9 a.png postive stonybrook", "unknown class 'postive'; did you mean 'positive'"),
        ("A9 a.png positive", "a line has fewer than four fields: 'A9 a.png positive'"),
        ("", "a line has fewer than four fields: ''"),
        ("A9 case 0 (1).jpeg positive stonybrook", r"image 'case 0 \(1\).jpeg' is listed twice"),
    ],
)
@pytest.mark.parametrize("split", ["train", "test"])
def test_bad_line(tmp_path, split, line, problem):
    def change(lines):
        lines[split][4] = line

    covidx.create(tmp_path, change=change)
    with pytest.raises(DataError, match=problem) as error:
        COVIDxCXR(root=str(tmp_path)).read_table()
    assert f"{split}.txt, line 5" in str(error.value)
    if "twice" in problem:
        assert "train.txt, line 2" in error.value.problem


def test_list_that_is_no_text(tmp_path):
    covidx.create(tmp_path)
    (tmp_path / "train.txt").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(DataError, match=r"not a text file(.|\n)*train\.txt"):
        COVIDxCXR(root=str(tmp_path)).read_table()


@pytest.mark.parametrize("source", ["ricord", "midrc"])
def test_patient_on_both_sides(tmp_path, source):
    """Also when the collections call themselves differently: the id is the person's."""

    def change(lines):
        lines["train"].append(f"419639-002001 A000003-0.png positive {source}")
        lines["train"].remove("A000003 A000003-0.png positive stonybrook")

    covidx.create(tmp_path, change=change)
    with pytest.raises(DataError, match=r"1 groups occur in more than one split: 419639-002001 \(test, train\)"):
        COVIDxCXR(root=str(tmp_path), val_fraction=0.0).setup()
    data = COVIDxCXR(root=str(tmp_path), val_fraction=0.0, leaks="record")
    with pytest.warns(UserWarning, match="419639-002001"):
        data.setup()
    assert data.group_leak == "LEAK: 1 patients in several splits"


def test_clean_lists_have_no_leak(tmp_path):
    data = COVIDxCXR(root=str(covidx.create(tmp_path)), leaks="record")
    data.setup()
    assert data.group_leak == ""


def test_speed_of_a_full_list(tmp_path):
    """30,386 lines, as CXR-3 has: well below a second of one core."""
    lines = [f"A{row // 2:06d} A{row // 2:06d}-{row}-1.000000-AP-1-1.jpg positive stonybrook" for row in range(30386)]
    (tmp_path / "train.txt").write_text("\n".join(lines[:-400]))
    (tmp_path / "test.txt").write_text("\n".join(lines[-400:]))
    start = time.process_time()
    table = COVIDxCXR(root=str(tmp_path)).load_table()
    seconds = time.process_time() - start
    assert len(table) == 30386
    assert seconds < 1.0
