"""Every data set keeps the contract; what is special about each."""

import shutil

import numpy as np
import pandas as pd
import pytest

from datamodules import CIFAR10, CIFAR100, ImageFolder, ImageTable, NIHChestXray14, Synthetic
from datamodules.errors import DataError
from tests.data import cifar, nih, tables
from tests.datamodule_contract import DataModuleContract, no_image

COLUMNS = {"path": "file", "label": ["Pneumonia", "Effusion"], "group": "patient", "site": "site"}


class TestImageFolder(DataModuleContract):
    def create(self):
        tables.create_tree(self.root, splits=("train", "test"))

    def build(self, **arguments):
        return ImageFolder(root=str(self.root), **arguments)

    def test_classes_and_splits(self):
        data = self.make()
        assert data.class_names == tables.CLASSES
        table = data.read_table()
        official = np.array([path.split("/")[0] for path in table.paths])
        assert set(official[table.rows("test")]) == {"test"}
        assert set(official[table.rows("validation")]) == {"train"}
        assert data.split_policy == "official"

    def test_missing_folder(self):
        with pytest.raises(DataError, match=r"did you mean .*data") as error:
            ImageFolder(root=str(self.root.parent / "datas"))
        assert "FARSHOT_DATA" in str(error.value)

    def test_split_with_other_classes(self):
        shutil.copytree(self.root / "train" / "ant", self.root / "test" / "dog")
        with pytest.raises(DataError, match="test has class folders that training lacks: dog"):
            self.make()


class TestPlainTree(DataModuleContract):
    """A folder tree without splits: the test set is a fixed hash."""

    def create(self):
        tables.create_tree(self.root, splits=(), images=20)

    def build(self, **arguments):
        return ImageTable(root=str(self.root), **arguments)

    def test_hashed_test_set_is_independent_of_other_rows(self):
        before = self.make()
        kept = set(before.read_table().paths[before.rows("test")])
        for path in sorted(self.root.glob("cat/*"))[10:]:
            path.unlink()
        after = self.make()
        assert after.split_policy == "hash"
        assert set(after.read_table().paths[after.rows("test")]) == {
            path for path in kept if (self.root / path).exists()
        }


def test_tree_without_a_test_folder_gets_a_hashed_one(tmp_path):
    tables.create_tree(tmp_path, splits=("train", "val"), images=40)
    data = ImageFolder(root=str(tmp_path), image_size=16)
    table = data.read_table()
    official = np.array([path.split("/")[0] for path in table.paths])
    assert len(data.rows("test")) > 5
    assert set(official[table.rows("test")]) == set(official[table.rows("train")]) == {"train"}
    assert set(official[table.rows("validation")]) == {"val"}
    assert data.split_policy == "official train and validation, hashed test"


@pytest.mark.parametrize(
    ("names", "positive"), [(None, "sick"), (["normal", "sick"], "sick"), (["sick", "normal"], "normal")]
)
def test_binary_tree_names_its_positive_class(tmp_path, names, positive):
    for name in ("normal", "sick"):
        tables.create_tree(tmp_path / "unused", splits=(), images=20)
        shutil.copytree(tmp_path / "unused" / "ant", tmp_path / "tree" / name)
    data = ImageTable(root=str(tmp_path / "tree"), task="binary", class_names=names)
    assert (data.class_names, data.num_classes) == ([positive], 1)
    table = data.read_table()
    assert {path.split("/")[0] for path in table.paths[table.labels[:, 0] == 1]} == {positive}


class TestCsv(DataModuleContract):
    """A CSV of patients with two labels, grey images, hashed test set by patient."""

    channels = 1

    def create(self):
        tables.create_csv(self.root)

    def build(self, **arguments):
        return ImageTable(root=str(self.root), table="labels.csv", columns=COLUMNS, mode="grey", **arguments)

    def recreate(self, change):
        shutil.rmtree(self.root)
        self.root.mkdir()
        tables.create_csv(self.root, change=change)

    def test_blank_is_unknown(self):
        labels = self.make().read_table().labels
        assert np.isnan(labels[9, 0])
        assert labels[9, 1] == 0

    def test_labels_restrict_and_reorder(self):
        data = self.make(labels=["Effusion"])
        assert data.class_names == ["Effusion"]
        assert data.read_table().labels.shape == (80, 1)
        with pytest.raises(DataError, match="no label 'Efusion'; did you mean 'Effusion'"):
            self.make(labels=["Efusion"])

    def test_folds_by_site(self):
        data = self.make(folds=2, fold=1, fold_by="site")
        table = data.read_table()
        assert set(np.asarray(table.metadata["site"])[data.rows("test")]) == {"site 1"}
        assert set(np.asarray(table.metadata["site"])[data.rows("train")]) == {"site 0"}

    def test_folds_cover_every_image_once(self):
        tests = [self.make(folds=4, fold=fold).rows("test").tolist() for fold in range(4)]
        assert sorted(row for rows in tests for row in rows) == list(range(80))

    def test_parquet_reads_alike(self):
        pd.read_csv(self.root / "labels.csv").to_parquet(self.root / "labels.parquet")
        parquet = ImageTable(root=str(self.root), table="labels.parquet", columns=COLUMNS, mode="grey")
        np.testing.assert_array_equal(parquet.read_table().labels, self.make().read_table().labels)

    def test_missing_image_is_found_before_training(self):
        (self.root / "images" / "p003_1.png").unlink()
        with no_image(), pytest.raises(DataError, match=r"1 images of data are missing.*p003_1") as error:
            self.make().setup()
        assert "labels.csv, line 9" in str(error.value)

    @pytest.mark.parametrize(
        ("column", "value", "problem"),
        [
            ("Pneumonia", "3", "label '3' in column 'Pneumonia' is out of range"),
            ("patient", "", r"a row without a group \(patient\)"),
            ("file", "", "a row without an image"),
            ("file", "images/p000_0.png", "image listed twice: 'images/p000_0.png'"),
        ],
    )
    def test_bad_cell_names_its_line(self, column, value, problem):
        def change(rows):
            rows[4][column] = value

        self.recreate(change)
        with pytest.raises(DataError, match=problem) as error:
            self.make().read_table()
        assert "labels.csv, line 6" in str(error.value)

    def test_wrong_column(self):
        with pytest.raises(DataError, match="no column 'patent'; did you mean 'patient'") as error:
            ImageTable(root=str(self.root), table="labels.csv", columns={**COLUMNS, "group": "patent"}).read_table()
        assert "line 1" in str(error.value)

    def test_too_few_for_the_shots(self):
        with no_image(), pytest.raises(DataError, match="Pneumonia"):
            self.make(shots=30).setup()

    def test_parquet_with_missing_values_and_booleans(self):
        frame = pd.read_csv(self.root / "labels.csv").assign(sick=lambda rows: rows["Effusion"] == 1)
        frame["number"] = [7.0 + row // 2 for row in range(len(frame))]
        frame["split"] = ["train", "test", None, None] * (len(frame) // 4)
        columns = {"path": "file", "label": ["sick", "Pneumonia"], "group": "number", "split": "split"}

        def read():
            frame.to_parquet(self.root / "labels.parquet")
            settings = {"table": "labels.parquet", "columns": columns, "mode": "grey", "val_fraction": 0.0}
            return ImageTable(root=str(self.root), **settings).read_table()

        table = read()
        assert set(table.groups) == {str(7 + row) for row in range(len(frame) // 2)}
        assert (list(table.split[:4]), table.labels[:4, 0].tolist()) == (["train", "test", "", ""], [0, 0, 1, 1])
        for column, problem in (("file", "a row without an image"), ("number", "a row without a group")):
            kept = frame[column].copy()
            frame.loc[5, column] = None
            with pytest.raises(DataError, match=problem) as error:
                read()
            assert "labels.parquet, row 5" in str(error.value)
            frame[column] = kept

    def test_table_without_rows(self):
        text = (self.root / "labels.csv").read_text().splitlines()[0]
        (self.root / "labels.csv").write_text(text + "\n")
        with pytest.raises(DataError, match="the table has no rows"):
            self.make().read_table()

    def test_few_shot_takes_what_there_is_if_asked(self):
        with pytest.warns(UserWarning, match="all there are were taken"):
            rows = self.make(shots=30, on_small="warn").rows("train")
        assert len(rows) > 10

    def test_binary_column(self):
        data = ImageTable(
            root=str(self.root), table="labels.csv", columns={**COLUMNS, "label": "Effusion"}, task="binary"
        )
        assert (data.task, data.class_names, data.num_classes) == ("binary", ["Effusion"], 1)
        assert data.read_table().labels.shape == (80, 1)

    def test_class_column_and_unknown_label(self):
        columns = {**COLUMNS, "label": "site"}
        data = ImageTable(root=str(self.root), table="labels.csv", columns=columns)
        assert (data.task, data.class_names) == ("multiclass", ["site 0", "site 1"])
        with pytest.raises(DataError, match="unknown label 'site 1'; did you mean 'site 0'") as error:
            ImageTable(
                root=str(self.root), table="labels.csv", columns=columns, class_names=["site 0", "b"]
            ).read_table()
        assert "line 4" in str(error.value)


class TestNIH(DataModuleContract):
    channels = 1
    labels = ("Pneumonia", "Effusion")

    def create(self):
        nih.create(self.root)

    def build(self, **arguments):
        return NIHChestXray14(root=str(self.root), **{"labels": list(self.labels), **arguments})

    def test_official_facts(self):
        data = NIHChestXray14(root=str(self.root))
        table = data.read_table()
        assert len(data.class_names) == 14
        row = list(table.paths).index("images/00000002_001.png")
        named = {name for name, on in zip(data.class_names, table.labels[row], strict=True) if on}
        assert named == {"Edema", "Effusion"}
        assert (table.metadata["sex"][row], table.metadata["age"][row], table.metadata["view"][row]) == (
            "M",
            22,
            "AP",
        )
        assert table.groups[row] == "2"
        assert data.split_policy == "official"

    def test_views(self):
        data = self.make(views=["PA"])
        assert set(data.read_table().metadata["view"][data.rows("train")]) == {"PA"}
        assert len(data.read_table()) == 60

    def test_twelve_folders(self, tmp_path):
        root = tmp_path / "twelve"
        root.mkdir()
        nih.create(root, layout="images_001")
        data = NIHChestXray14(root=str(root), image_size=16)
        data.setup()
        assert data.read_table().paths[0] == "images_002/images/00000001_000.png"

    def test_rgba_file_is_read_as_grey(self):
        data = self.make()
        rgba, grey = (next(iter(data.read_images([row]))) for row in (0, 2))
        assert rgba.shape == grey.shape == (32, 32, 1)
        assert rgba.std() > 1

    @pytest.mark.parametrize(
        ("column", "value", "problem"),
        [
            (1, "Pneumonia|Edma", "unknown finding 'Edma'; did you mean 'Edema'"),
            (3, "", "a row without a patient"),
            (0, "00000001_000.png", "image listed twice"),
        ],
    )
    def test_bad_cell_names_its_line(self, tmp_path, column, value, problem):
        def change(rows):
            rows[7] = [*rows[7]]
            rows[7][column] = value

        root = tmp_path / "bad"
        root.mkdir()
        try:
            nih.create(root, change=change)
        except (TypeError, ValueError):
            pytest.fail("the generator itself failed")
        with pytest.raises(DataError, match=problem) as error:
            NIHChestXray14(root=str(root)).read_table()
        assert "Data_Entry_2017_v2020.csv, line 9" in str(error.value)

    def test_list_that_names_an_unknown_file(self):
        with (self.root / "test_list.txt").open("a") as file:
            file.write("99999999_000.png\n")
        with pytest.raises(DataError, match=r"test_list\.txt names '99999999_000.png'"):
            self.make().read_table()

    def test_image_in_both_lists(self):
        test = (self.root / "test_list.txt").read_text().splitlines()
        with (self.root / "train_val_list.txt").open("a") as file:
            file.write("\n" + test[1])
        with pytest.raises(DataError, match=r"_\d+\.png is in test_list\.txt and in the list of train") as error:
            self.make().read_table()
        assert "test_list.txt, line 2" in str(error.value)

    def test_patient_in_two_splits_stops_the_run(self):
        text = (self.root / "train_val_list.txt").read_text().splitlines()
        test = (self.root / "test_list.txt").read_text().splitlines()
        (self.root / "train_val_list.txt").write_text("\n".join([*text, test[0]]))
        (self.root / "test_list.txt").write_text("\n".join(test[1:]))
        with pytest.raises(DataError, match=r"group|patient"):
            self.make(val_fraction=0.0).setup()


class _CIFARContract(DataModuleContract):
    def create(self):
        cifar.create(self.root, self.monkeypatch, self.reader.__name__, images=self.images)

    def build(self, **arguments):
        return self.reader(root=str(self.root), **arguments)


class TestCIFAR10(_CIFARContract):
    reader, images = CIFAR10, 30

    def test_offline_and_absent(self, tmp_path):
        with pytest.raises(DataError, match="no usable cifar10: it is not there") as error:
            CIFAR10(root=str(tmp_path / "none")).read_table()
        assert "download: true" in str(error.value)

    def test_wrong_checksum(self):
        (self.root / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"broken")
        with pytest.raises(DataError, match="md5"):
            self.make().read_table()

    def test_download_without_a_network(self, tmp_path, monkeypatch):
        from urllib.error import URLError

        import torchvision.datasets.cifar as reader

        def offline(*_, **__):
            raise URLError("no route to host")

        monkeypatch.setattr(reader, "download_and_extract_archive", offline)
        with pytest.raises(DataError, match="cannot download cifar10") as error:
            CIFAR10(root=str(tmp_path / "none"), download=True).prepare_data()
        assert "cifar-10-python.tar.gz" in str(error.value)

    def test_images_keep_their_colours(self):
        data = self.make(transform="resize_center", image_size=32)
        row = int(data.rows("test")[0])
        batch = next(iter(data.evaluation_dataloader(np.array([row]))))
        np.testing.assert_array_equal(batch["image"][0].permute(1, 2, 0).numpy(), data.read_images([row])[0])


class TestCIFAR100(_CIFARContract):
    reader, images = CIFAR100, 400
    shots = 1

    def test_names(self):
        assert len(CIFAR100.class_names) == len(set(CIFAR100.class_names)) == 100


class TestSynthetic(DataModuleContract):
    def build(self, **arguments):
        return Synthetic(**{"num_train": 120, "num_test": 40, "classes": 4, **arguments})

    def test_test_images_do_not_depend_on_the_training_size(self):
        images = []
        for size in (120, 200):
            data = self.make(num_train=size)
            images.append(np.stack(data.read_images(data.rows("test").tolist())))
        np.testing.assert_array_equal(images[0], images[1])


class TestSyntheticRadiographs(DataModuleContract):
    channels = 1

    def build(self, **arguments):
        arguments = {"num_train": 200, "num_test": 40, "classes": 3, "task": "multilabel", **arguments}
        return Synthetic(look="radiograph", **arguments)
