"""The full table of NIH ChestX-ray14, read as the package torchxrayvision (tests only) reads it."""

import gzip
import shutil
from pathlib import Path

import numpy as np
import pytest

from datamodules.chest_xray.nih import NIHChestXray14
from datamodules.readers import read_frame


@pytest.fixture(scope="module")
def xrv():
    return pytest.importorskip("torchxrayvision", reason="torchxrayvision is not installed: no full table of NIH")


@pytest.fixture(scope="module")
def root(xrv, tmp_path_factory):
    """The full table, and a split of its patients such as the official lists make it."""
    root = tmp_path_factory.mktemp("full_nih")
    path = root / "Data_Entry_2017_v2020.csv"
    with gzip.open(Path(xrv.__file__).parent / "data" / f"{path.name}.gz") as packed, path.open("wb") as file:
        shutil.copyfileobj(packed, file)
    frame = read_frame(path, ["Image Index", "Patient ID"])
    test = frame["Patient ID"].astype(int) % 4 == 0
    for name, rows in (("test_list.txt", test), ("train_val_list.txt", ~test)):
        (root / name).write_text("\n".join(frame["Image Index"][rows]) + "\n")
    return root


def test_labels_and_metadata_equal_torchxrayvision(xrv, root):
    theirs = xrv.datasets.NIH_Dataset(
        imgpath=str(root), csvpath=str(root / "Data_Entry_2017_v2020.csv"), views=["PA", "AP"], unique_patients=False
    )
    data = NIHChestXray14(root=str(root))
    table = data.read_table()
    assert len(table) == len(theirs.csv) == 112_120
    assert [path.rpartition("/")[2] for path in table.paths] == theirs.csv["Image Index"].tolist()
    assert data.class_names == theirs.pathologies
    np.testing.assert_array_equal(table.labels, theirs.labels)
    assert table.metadata["view"].tolist() == theirs.csv["view"].tolist()
    assert (table.metadata["sex"] == "M").tolist() == theirs.csv["sex_male"].tolist()
    assert (table.metadata["sex"] == "F").tolist() == theirs.csv["sex_female"].tolist()
    assert [int(group) for group in table.groups] == theirs.csv["Patient ID"].astype(int).tolist()
    np.testing.assert_array_equal(table.metadata["age"], theirs.csv["age_years"])
    (other_view,) = NIHChestXray14(root=str(root), views=["PA"]).exclusions(table).values()
    assert other_view.tolist() == (theirs.csv["view"] != "PA").tolist()


def test_patients_and_split(root):
    data = NIHChestXray14(root=str(root))
    table = data.read_table()
    patients = np.asarray(table.groups, dtype=object).astype(int)
    assert len(set(patients)) == 30_805
    assert (table.rows("test") == np.flatnonzero(patients % 4 == 0)).all()
    assert data.split_policy == "official"
