"""Targets away from ImageNet: DomainNet's lists, Cassava's table, camera traps by location."""

import json
import shutil

import numpy as np
import pytest

from datamodules.errors import DataError
from datamodules.natural.camera_traps import CameraTraps
from datamodules.natural.cassava import Cassava
from datamodules.natural.domainnet import DomainNet
from tests.data import camera_traps, cassava, domainnet
from tests.datamodule_contract import DataModuleContract, no_image


def edit_line(path, number, text):
    """Replace line `number` (the first is 1) of a file; None cuts the file off there."""
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[: number - 1], *([text, *lines[number:]] if text is not None else [])]) + "\n")


class TestDomainNet(DataModuleContract):
    def create(self):
        domainnet.create(self.root)

    def build(self, **arguments):
        return DomainNet(root=str(self.root), **arguments)

    @pytest.mark.parametrize("domain", ["real", "clipart"])
    def test_facts(self, domain):
        data = self.make(domain=domain)
        table = data.read_table()
        assert (data.name, data.split_policy, data.class_names) == (
            f"domainnet_{domain}",
            "official",
            domainnet.CLASSES,
        )
        assert [path.split("/")[1] for path in table.paths] == [domainnet.CLASSES[label] for label in table.labels]
        assert {path.split("/")[0] for path in table.paths} == {domain}
        listed = (self.root / f"{domain}_test.txt").read_text().split()[::2]
        assert table.paths[table.rows("test")].tolist() == listed
        assert len(table) == 40  # not the images that no list names
        assert table.where(31) == f"{self.root / f'{domain}_test.txt'}, line 2"

    def test_default_root_is_shared(self):
        self.monkeypatch.setenv("FARSHOT_DATA", str(self.root.parent))
        self.root.rename(self.root.parent / "domainnet")
        assert len(DomainNet(domain="clipart").read_table()) == 40

    @pytest.mark.parametrize(
        ("part", "line", "text", "problem"),
        [
            ("train", 3, "real/aircraft_carrier/real_001_000009.jpg", "a line is 'real/aircraft_carrier"),
            ("train", 3, "clipart/airplane/clipart_002_000001.png 1", "a line is 'clipart/airplane"),
            ("train", 3, "real/aircraft_carrier/real_001_000009.jpg 12345678901", "a line is"),
            ("train", 3, "real/aircraft_carrier/real_001_000009.jpg 7", "has the number 7, other lines say otherwise"),
            ("test", 4, "real/airplane/real_002_000008.jpg 4", "has the number 4, the train list says 1"),
            ("test", 4, "real/airplan/real_002_000008.jpg 1", "is not in the train list; did you mean 'airplane'"),
            ("test", 4, "real/airplane/real_002_000001.png 1", "is listed twice"),
        ],
    )
    def test_bad_lines(self, part, line, text, problem):
        edit_line(self.root / f"real_{part}.txt", line, text)
        with pytest.raises(DataError, match=problem) as error:
            self.make().read_table()
        assert f"real_{part}.txt, line {line}" in str(error.value)

    def test_windows_lists_with_a_byte_order_mark(self):
        expected = self.make().read_table()
        for path in self.root.glob("*.txt"):
            path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
        assert self.make().read_table().paths.tolist() == expected.paths.tolist()

    def test_damaged_lists(self):
        (self.root / "real_test.txt").write_bytes(b"\x80\x00\xff\xfe")
        with pytest.raises(DataError, match="cannot read a list") as error:
            self.make()
        assert str(self.root / "real_test.txt") in str(error.value)
        assert "https://ai.bu.edu/M3SDA" in str(error.value)

    def test_cut_off_lists(self):
        path = self.root / "real_train.txt"
        edit_line(path, 25, None)
        with pytest.raises(DataError, match="class 't-shirt' is not in the train list"):
            self.make().read_table()
        path.write_text(path.read_text().replace("airplane/", "alarm_clock/"))
        with pytest.raises(DataError, match="other lines say otherwise"):
            self.make()
        path.write_text("")
        with pytest.raises(DataError, match="a list is empty"):
            self.make()
        path.write_text("real/airplane/real_002_000001.png 1\n")
        with pytest.raises(DataError, match="no image of class number 0"):
            self.make()
        path.unlink()
        with pytest.raises(DataError, match=r"no list real_train\.txt") as error:
            self.make()
        assert "https://ai.bu.edu/M3SDA" in str(error.value)

    def test_missing_image(self):
        (self.root / "real" / "airplane" / "real_002_000002.jpg").unlink()
        with pytest.raises(DataError, match="1 images of domainnet_real are missing") as error:
            self.make().setup()
        assert "real_train.txt, line 8" in str(error.value)


class TestCassava(DataModuleContract):
    def create(self):
        cassava.create(self.root)

    def build(self, **arguments):
        return Cassava(root=str(self.root), **arguments)

    def test_facts(self):
        data = self.make()
        table = data.read_table()
        assert (data.name, data.split_policy, data.class_names) == ("cassava", "hash", cassava.NAMES)
        assert np.bincount(table.labels).tolist() == [10, 10, 10, 40, 10]
        assert table.paths[3] == "train_images/1000018088.jpg"

    @pytest.mark.parametrize(
        ("text", "problem"),
        [
            ("1000019065.jpg,5", "unknown label '5'"),
            ("1000019065.jpg,-1", "unknown label '-1'"),
            ("1000015157.jpg,1", "image listed twice: '1000015157.jpg'"),
            (",1", "a row without an image"),
            ("1000019065.jpg", "a row has 1 fields, the header has 2"),
        ],
    )
    def test_bad_rows(self, text, problem):
        edit_line(self.root / "train.csv", 6, text)
        with no_image(), pytest.raises(DataError, match=problem) as error:
            self.make().read_table()
        assert "train.csv, line 6" in str(error.value)

    def test_missing_files(self):
        (self.root / "train_images" / "1000016134.jpg").unlink()
        with pytest.raises(DataError, match="1 images of cassava are missing") as error:
            self.make().setup()
        assert "train.csv, line 3" in str(error.value)
        (self.root / "train.csv").unlink()
        with pytest.raises(DataError, match=r"no train\.csv of cassava") as error:
            self.make().read_table()
        assert "https://www.kaggle.com/c/cassava-leaf-disease-classification" in str(error.value)

    def test_class_names(self):
        path = self.root / "label_num_to_disease_map.json"
        path.write_text(json.dumps({str(n): name for n, name in enumerate(reversed(cassava.NAMES))}))
        with pytest.raises(DataError, match="other classes than those of the 2020 release"):
            self.make().read_table()
        path.write_text('{"0": "Cassava')
        with pytest.raises(DataError, match="cannot read the class names"):
            self.make().read_table()
        path.unlink()
        assert len(self.make().read_table()) == 80


class TestCameraTraps(DataModuleContract):
    def create(self):
        camera_traps.create(self.root)

    def build(self, **arguments):
        return CameraTraps(root=str(self.root), **arguments)

    def content(self, part):
        return json.loads((self.root / "eccv_18_annotation_files" / f"{part}_annotations.json").read_text())

    def write(self, part, content):
        (self.root / "eccv_18_annotation_files" / f"{part}_annotations.json").write_text(json.dumps(content))

    def test_facts(self):
        data = self.make()
        table = data.read_table()
        assert data.class_names == [name for name in camera_traps.CATEGORIES.values() if name != "empty"]
        assert (data.name, data.num_classes, data.split_policy) == ("camera_traps", 15, "official trans")
        assert table.metadata["site"].tolist() == table.groups.tolist()
        assert table.metadata["date"][:3].tolist() == ["", "2012-03-02", "2012-03-03"]
        parts = np.array([path.split("/")[1].split("-")[0] for path in table.paths])
        for split, part in {"train": "train", "validation": "transval", "test": "transtest"}.items():
            assert set(parts[table.rows(split)]) == {part}

    def test_labels_against_the_annotations(self):
        """Frame by frame: the one category of its boxes, else none."""
        table = self.make().read_table()
        labels = dict(zip(table.paths.tolist(), table.labels.tolist(), strict=True))
        for part in camera_traps.IMAGES:
            content = self.content(part)
            for image in content["images"]:
                seen = {box["category_id"] for box in content["annotations"] if box["image_id"] == image["id"]}
                (name,) = seen if len(seen) == 1 else (30,)
                expected = sorted(camera_traps.CATEGORIES).index(name) - (name > 30) if name != 30 else -1
                assert labels.pop(f"eccv_18_all_images_sm/{image['file_name']}") == expected
        assert not labels

    def test_frames_left_out_are_counted(self):
        data = self.make()
        data.setup()
        assert {step.reason: len(step.rows) for step in data.excluded} == {
            "empty frame": 4,
            "several categories in one frame": 2,
        }
        assert len(data.rows("train")) == 15 * 4

    def test_cis_says_that_locations_are_shared(self):
        data = self.make(split="cis")
        with pytest.warns(UserWarning, match="LEAK: 3 patients in several splits"):
            data.setup()
        assert data.group_leak == "LEAK: 3 patients in several splits"
        assert data.split_policy == "official cis"
        table = data.read_table()
        assert set(table.groups[data.rows("test")]) == {"33", "38", "61"}
        with pytest.raises(DataError, match="split: cis has no folds"):
            self.make(split="cis", folds=2).read_table()

    def test_folds_hold_locations_together(self):
        tests = []
        for fold in range(4):  # 3 training locations and the one of validation; no test location takes part
            data = self.make(folds=4, fold=fold)
            table = data.read_table()
            (location,) = set(table.groups[data.rows("test")])
            tests.append(location)
            assert location not in set(table.groups[data.rows("train")])
        assert sorted(tests) == ["125", "33", "38", "61"]
        assert data.split_policy == "4 folds by group"

    def test_truncated_annotations(self):
        path = self.root / "eccv_18_annotation_files" / "cis_val_annotations.json"
        path.write_text(path.read_text()[:900])
        with pytest.raises(DataError, match="the annotations are cut off or damaged") as error:
            self.make().read_table()
        assert f"{path}, line 1, column" in str(error.value)

    @pytest.mark.parametrize(
        ("key", "row", "change", "problem"),
        [
            ("annotations", 5, {"category_id": 98}, "unknown class: number 98"),
            ("categories", 0, {"name": "possum"}, "unknown class: category 'possum'.* did you mean 'opossum'"),
            ("annotations", 5, {"image_id": "gone"}, "an annotation of image 'gone', which is not listed"),
            ("images", 5, {"location": None}, "an entry without location"),
            ("images", 5, {"id": "train-23d2-11e8-a6a3-000000000000"}, "which is not listed|is listed twice"),
        ],
    )
    def test_bad_entries(self, key, row, change, problem):
        content = self.content("cis_test")
        content[key][row] |= change
        self.write("cis_test", content)
        with pytest.raises(DataError, match=problem) as error:
            self.make().read_table()
        assert "cis_test_annotations.json" in str(error.value)

    def test_an_image_in_two_parts(self):
        self.write("trans_test", self.content("train"))
        with pytest.raises(DataError, match=r"is listed twice \(61 such images\)"):
            self.make().read_table()

    def test_no_list(self):
        content = self.content("train")
        self.write("train", {"images": content["images"]})
        with pytest.raises(DataError, match="no list 'annotations' of objects"):
            self.make().read_table()
        self.write("train", [])
        with pytest.raises(DataError, match="no JSON object"):
            self.make().read_table()

    def test_missing_files(self):
        path = self.root / "eccv_18_all_images_sm" / "transtest-23d2-11e8-a6a3-000000000004.jpg"
        path.unlink()
        with pytest.raises(DataError, match="1 images of camera_traps are missing"):
            self.make().setup()
        shutil.rmtree(self.root / "eccv_18_annotation_files")
        with pytest.raises(DataError, match=r"no train_annotations\.json") as error:
            self.make().read_table()
        assert "https://lila.science" in str(error.value)
