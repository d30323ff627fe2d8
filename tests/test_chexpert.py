"""CheXpert: its releases' layouts, its uncertain and blank cells, and the real table against another reader."""

import gzip
import importlib.util
import os
import shutil
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import pytest

from datamodules.chest_xray.chexpert import CheXpert
from datamodules.errors import DataError
from tests.data import chexpert
from tests.datamodule_contract import DataModuleContract, no_image


class TestCheXpert(DataModuleContract):
    channels = 1
    test: str | None = None

    def create(self):
        chexpert.create(self.root, test=self.test)

    def build(self, **arguments):
        return CheXpert(root=str(self.root), **{"labels": ["Pneumonia", "Effusion"], **arguments})


class TestGroundTruth(TestCheXpert):
    """The radiologists' table of the test set, a row a study: its images come from the study's folder."""

    test = "groundtruth.csv"

    def test_lines_of_studies(self):
        table = self.make().read_table()
        first = int(table.rows("test")[0])
        assert table.paths[first : first + 3].tolist() == [
            f"CheXpert-v1.0-small/test/patient{file}.jpg"
            for file in ("00061/study1/view1_frontal", "00061/study1/view2_lateral", "00062/study1/view1_frontal")
        ]
        assert [table.where(row)[-23:] for row in range(first, first + 3)] == [
            f"groundtruth.csv, line {line}" for line in (2, 2, 3)
        ]

    def test_study_without_a_folder_is_a_missing_image(self):
        for path in sorted(self.root.glob("*/test/patient00062/study1/*")):
            path.unlink()
        with pytest.raises(DataError, match=r"1 images of chexpert are missing.*patient00062") as error:
            self.make().setup()
        assert "groundtruth.csv, line 3" in str(error.value)


@pytest.mark.parametrize(
    "layout",
    [
        {"prefix": "CheXpert-v1.0", "folder": "CheXpert-v1.0"},
        {"folder": ""},  # root is the folder that the paths start with
        {"prefix": ""},
        {"prefix": "", "folder": "", "valid": "val"},
        {"prefix": "CheXpert-v1.0", "folder": "CheXpert-v1.0-small"},
        {"prefix": "CheXpert-v1.0", "batches": True},
        {"prefix": "CheXpert-v1.0", "folder": "CheXpert", "test": "test_labels.csv"},
    ],
)
def test_layouts(tmp_path, layout):
    data = CheXpert(root=str(chexpert.create(tmp_path, **layout)), image_size=16)
    table = data.read_table()
    assert [path for path in table.paths if not (tmp_path / path).is_file()] == []
    assert len(table) == (60 if "test" not in layout else 80) * 3 // 2
    data.setup()


@pytest.mark.parametrize("name", ["test.csv", "test_labels.csv", "groundtruth.csv"])
def test_later_release_has_the_official_test_set(tmp_path, name):
    data = CheXpert(root=str(chexpert.create(tmp_path, test=name)))
    table = data.read_table()
    test = table.rows("test")
    assert data.split_policy == "official"
    assert {path.split("/")[1] for path in table.paths[test]} == {"test"}
    assert len(test) == 30
    lateral = np.array(["lateral" in path for path in table.paths[test]])
    np.testing.assert_array_equal(table.metadata["view"][test] == "L", lateral)
    if name != "test.csv":  # radiologists' labels without sex, age and views
        assert set(table.metadata["sex"][test]) == {""}
        assert np.isnan(table.metadata["age"][test]).all()
        assert set(table.metadata["view"][test][~lateral]) == {"frontal"}
        assert not np.isnan(table.labels[test]).any()


@pytest.fixture
def root(tmp_path):
    return chexpert.create(tmp_path)


def cells(data, report, label, split):
    """Values of one label in the rows of a split whose patients have the report of that number."""
    table = data.read_table()
    rows = [row for row in table.rows(split) if int(table.groups[row][-5:]) % len(chexpert.REPORTS) == report]
    assert rows
    return np.unique(table.labels[rows, data.class_names.index(label)]).tolist()


def test_official_facts(root):
    data = CheXpert(root=str(root))
    table = data.read_table()
    assert (len(data.class_names), data.class_names[:5]) == (
        13,
        ["Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Effusion"],
    )
    assert data.split_policy == "official train and validation, hashed test"
    official = np.array([path.split("/")[1] for path in table.paths])
    assert set(official[table.rows("validation")]) == {"valid"}
    assert set(official[table.rows("test")]) == set(official[table.rows("train")]) == {"train"}
    row = list(table.groups).index("patient00005")
    metadata = {name: table.metadata[name][row] for name in table.metadata}
    assert (metadata["sex"], metadata["view"], np.isnan(metadata["age"])) == ("F", "AP", True)
    assert table.metadata["sex"][list(table.groups).index("patient00009")] == ""
    assert table.where(len(table) - 1).endswith("valid.csv, line 31")
    assert data.label_policy == "ontology 1, exact labels, uncertain ignore, healthy fill"


def test_views(root):
    data = CheXpert(root=str(root), image_size=16)
    data.setup()
    view = data.read_table().metadata["view"]
    assert set(view) == {"AP", "PA", "L", "LL", "RL"}
    assert set(view[np.concatenate([data.rows(split) for split in ("train", "validation", "test")])]) == {"AP", "PA"}
    reasons = {step.reason: len(step.rows) for step in data.excluded}
    assert reasons == {"view is not PA or AP or frontal": int(np.isin(view, ["L", "LL", "RL"]).sum())}
    lateral = CheXpert(root=str(root), views=["L", "LL"], image_size=16)
    assert set(view[lateral.rows("train")]) == {"L", "LL"}


@pytest.mark.parametrize(("policy", "target"), [("ignore", np.nan), ("zeros", 0), ("ones", 1), ("soft", 0.7)])
def test_uncertain_cells_are_a_target_in_training_only(root, policy, target):
    data = CheXpert(root=str(root), uncertainty=policy, test_fraction=0.3)
    np.testing.assert_allclose(cells(data, 2, "Edema", "train"), [target])
    assert np.isnan(cells(data, 2, "Edema", "validation")).all()
    assert np.isnan(cells(data, 2, "Edema", "test")).all()


def test_no_policy_touches_labels_that_another_run_is_tested_on(root):
    """Without training here (protocol direct) the training images may be tested on, too: uncertain stays unknown."""
    data = CheXpert(root=str(root), uncertainty="soft", outputs=["Edema", "Fracture"])
    data.test_on_all()
    labels = data.read_table().labels[data.rows("test")]
    assert np.isin(labels[~np.isnan(labels)], [0, 1]).all()
    assert len(data.rows("test")) > len(CheXpert(root=str(root)).rows("test"))


def test_healthy_images(root):
    fill, paper = CheXpert(root=str(root)), CheXpert(root=str(root), labels="cherti2022")
    assert "healthy cherti2022" in paper.label_policy
    for split in ("train", "validation"):
        assert cells(fill, 0, "Support Devices", split) == [1]
        assert cells(paper, 0, "Support Devices", split) == [0]  # the true label that the paper's rule erases
        assert cells(fill, 0, "Pneumonia", split) == cells(paper, 0, "Pneumonia", split) == [0]
        assert np.isnan(cells(fill, 3, "Support Devices", split)).all()
        assert np.isnan(cells(fill, 1, "Edema", split)).all()  # a blank that nothing fills


def test_folders_are_listed_and_not_files(root):
    with mock.patch("datamodules.chest_xray.chexpert.os.listdir", side_effect=os.listdir) as listed, no_image():
        CheXpert(root=str(root)).read_table()
    assert listed.call_count == 2  # train and valid


def change_cell(row, **changes):
    def change(rows):
        rows[row].update(changes)

    return change


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"Pneumonia": "2.0"}, r"label '2.0' in column 'Pneumonia' is out of range"),
        ({"No Finding": "yes"}, "label 'yes' in column 'No Finding'"),
        ({"Path": ""}, "a row without an image path"),
        ({"Path": "train/patientX/study1/view1_frontal.jpg"}, "a path without a patient: 'train/patientX/"),
        ({"Path": "CheXpert-v1.0/train/patient00001/study1/view1_frontal.jpg"}, "image listed twice"),
        ({"AP/PA": "AX"}, "no view 'Frontal' with direction 'AX'"),
        ({"Frontal/Lateral": "Lateral", "AP/PA": "PA"}, "no view 'Lateral' with direction 'PA'"),
    ],
)
def test_bad_cell_names_its_line(tmp_path, changes, problem):
    chexpert.create(tmp_path, change=change_cell(3, **changes))
    with pytest.raises(DataError, match=problem) as error:
        CheXpert(root=str(tmp_path)).read_table()
    assert "train.csv, line 5" in str(error.value)
    assert len(str(error.value).splitlines()) <= 15


def test_missing_column(root):
    path = root / "CheXpert-v1.0-small" / "valid.csv"
    path.write_text(path.read_text().replace("Pneumonia", "Pneumonai", 1))
    with pytest.raises(DataError, match="no column 'Pneumonia'; did you mean 'Pneumonai'") as error:
        CheXpert(root=str(root)).read_table()
    assert "valid.csv, line 1" in str(error.value)


def test_truncated_table(root):
    path = root / "CheXpert-v1.0-small" / "train.csv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:10], lines[10][:70]]))
    with pytest.raises(DataError, match=r"a row has \d fields") as error:
        CheXpert(root=str(root)).read_table()
    assert "train.csv, line 11" in str(error.value)


def test_no_table(root):
    (root / "CheXpert-v1.0-small" / "valid.csv").unlink()
    with pytest.raises(DataError, match=r"no table .*valid\.csv"):
        CheXpert(root=str(root)).read_table()


def test_patient_in_train_and_valid_stops_the_run(tmp_path):
    def move(rows):
        rows[-1]["Path"] = rows[-1]["Path"].replace("patient00040", "patient00041")

    train = chexpert.create(tmp_path, change=move) / "CheXpert-v1.0-small" / "train"
    shutil.copytree(train / "patient00040", train / "patient00041")
    with pytest.raises(DataError, match=r"patient00041 \(train, validation\)"):
        CheXpert(root=str(tmp_path), test_fraction=0.01).setup()


# The real table, which the package torchxrayvision holds for tests -------------------------------------------------


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """The data set with the real train.csv and a small valid.csv, and the same table as pandas reads it."""
    spec = importlib.util.find_spec("torchxrayvision")
    path = Path(spec.origin).parent / "data" / "chexpert_train.csv.gz" if spec else None
    if path is None or not path.is_file():
        pytest.skip("no real CheXpert table: torchxrayvision is not installed (tests only)")
    root = tmp_path_factory.mktemp("chexpert")
    text = gzip.decompress(path.read_bytes()).decode()
    (root / "train.csv").write_text(text)
    valid = pd.read_csv(path, nrows=50, dtype=str, keep_default_na=False)
    valid["Path"] = valid["Path"].str.replace("train/patient0", "valid/patient9")
    valid.to_csv(root / "valid.csv", index=False)
    return CheXpert(root=str(root)), pd.read_csv(path)


def test_real_table_is_read_fast(real):
    seconds = []
    for _ in range(2):
        start = time.process_time()
        table = CheXpert(root=str(real[0].root)).read_table()
        seconds.append(time.process_time() - start)
    assert len(table) == 223_414 + 50
    assert min(seconds) <= 1.5


def test_real_facts(real):
    data, frame = real
    table = data.read_table()
    train = slice(0, len(frame))
    views = {str(name): int(count) for name, count in pd.Series(table.metadata["view"][train]).value_counts().items()}
    assert views == {"AP": 161_590, "PA": 29_420, "L": 32_387, "LL": 16, "RL": 1}
    sexes = pd.Series(table.metadata["sex"][train]).value_counts()
    assert sexes.to_dict() == {"M": 132_636, "F": 90_777, "": 1}
    age = table.metadata["age"][train]
    assert (np.isnan(age).sum(), np.nanmin(age), np.nanmax(age)) == (3, 18, 90)
    assert len(set(table.groups[train])) == 64_540
    assert len(data.exclusions(table)["view is not PA or AP or frontal"][train].nonzero()[0]) == 32_404
    assert len(table.rows("test")) / len(frame) == pytest.approx(0.15, abs=0.005)
    groups = [set(table.groups[table.rows(split)]) for split in ("train", "validation", "test")]
    assert len(set.union(*groups)) == sum(map(len, groups))


def test_real_healthy_rows(real):
    """22,381 rows of "No Finding"; the paper's rule erases 8,808 support devices, and nothing else."""
    data, frame = real
    healthy = (frame["No Finding"] == 1).to_numpy()
    assert healthy.sum() == 22_381
    paper_rule = CheXpert(root=str(data.root), labels="cherti2022")
    fill, paper = (one.read_table().labels[: len(frame)] for one in (data, paper_rule))
    devices = CheXpert.class_names.index("Support Devices")
    changed = ~((fill == paper) | (np.isnan(fill) & np.isnan(paper)))
    assert not changed[~healthy].any()
    assert set(np.flatnonzero(changed.any(axis=0))) == {devices}
    erased = fill[changed[:, devices], devices]
    # Blank or uncertain → 0 is the rule's other effect: 12,792 blank and 110 uncertain cells, 671 are 0 in any case.
    assert ((erased == 1).sum(), np.isnan(erased).sum()) == (8_808, 12_792 + 110)
    assert (paper[healthy] == 0).all()


def test_real_labels_against_torchxrayvision(real):
    """All 223,414 × 13 cells agree under the defaults (uncertain = unknown, healthy = fill).

    The two rules differ where a healthy row has an explicit 1 or −1 beside support devices: torchxrayvision overwrites
    it, `fill` keeps it. The real table has no such cell, so no difference remains; the next test makes one.
    """
    data, frame = real
    reader = pytest.importorskip("torchxrayvision").datasets.CheX_Dataset
    views = ["PA", "AP", "L", "LL", "RL"]
    theirs = reader(imgpath=".", csvpath=str(data.root / "train.csv"), views=views, unique_patients=False)
    assert list(theirs.pathologies) != CheXpert.class_names  # theirs is sorted under "Pleural Effusion"
    columns = [list(theirs.pathologies).index(name) for name in CheXpert.class_names]
    np.testing.assert_array_equal(data.read_table().labels[: len(frame)], theirs.labels[:, columns])
    others = frame.loc[frame["No Finding"] == 1, chexpert.LABELS[1:-1]]
    assert not others.isin([1, -1]).any(axis=None)


def test_healthy_row_with_a_finding_against_torchxrayvision(tmp_path):
    """The one difference in kind: an explicit finding of a healthy row stays with us, and is 0 with them."""
    chexpert.create(tmp_path, folder="", change=change_cell(3, **{"No Finding": "1.0", "Edema": "1.0"}))
    reader = pytest.importorskip("torchxrayvision").datasets.CheX_Dataset
    views = ["PA", "AP", "L", "LL", "RL"]
    theirs = reader(imgpath=".", csvpath=str(tmp_path / "train.csv"), views=views, unique_patients=False)
    columns = [list(theirs.pathologies).index(name) for name in CheXpert.class_names]
    expected = theirs.labels[:, columns]
    ours = CheXpert(root=str(tmp_path)).read_table().labels[: len(expected)]
    different = np.argwhere(~((ours == expected) | (np.isnan(ours) & np.isnan(expected))))
    assert different.tolist() == [[3, CheXpert.class_names.index("Edema")]]
    assert (ours[3, 3], expected[3, 3]) == (1, 0)
