"""MIMIC-CXR-JPG: four tables joined, two labelers, patients of MIMIC-IV, resized copies."""

import numpy as np
import pytest

from datamodules.chest_xray.mimic import MIMICCXR
from datamodules.errors import DataError
from tests.data import mimic
from tests.datamodule_contract import DataModuleContract

COPIES = [
    "small/p{part}/p{subject_id}/s{study_id}/{dicom_id}.png",
    "flat/{dicom_id}.jpg",
    "p{subject_id}_{dicom_id}.png",
]


class TestMIMIC(DataModuleContract):
    channels = 1

    def create(self):
        mimic.create(self.root)

    def build(self, **arguments):
        return MIMICCXR(root=str(self.root), **{"labels": ["Pneumonia", "Effusion"], **arguments})


@pytest.fixture
def root(tmp_path):
    return mimic.create(tmp_path, demography=True)


def test_official_facts(root):
    data = MIMICCXR(root=str(root), image_size=16)
    table = data.read_table()
    assert data.split_policy == "official"
    assert table.paths[4] == "files/p11/p11000002/s50000021/00000002-00000001-00000000-00000000-deadbeef.jpg"
    assert (table.groups[4], table.split[4]) == ("11000002", "train")
    assert [len(table.rows(split)) for split in ("train", "validation", "test")] == [120, 20, 20]
    split = np.asarray(table.split, dtype=object)
    expected = [{0: "test", 1: "validation"}.get(int(group[-3:]) % 8, "train") for group in table.groups]
    assert split.tolist() == expected
    assert table.metadata["view"][:8].tolist() == ["AP", "LL", "PA", "L", "AP", "", "PA", ""]
    assert table.where(4).endswith("mimic-cxr-2.0.0-metadata.csv.gz, line 6")
    assert data.label_policy.endswith("uncertain ignore, healthy fill, labeler chexpert")
    data.setup()
    assert set(table.metadata["view"][data.rows("train")]) == {"PA", "AP"}


def test_sex_and_age_of_mimic_iv(root, tmp_path_factory):
    metadata = MIMICCXR(root=str(root)).read_table().metadata
    assert metadata["date"][4] == "21510101"
    assert metadata["sex"][:8].tolist() == [*[""] * 4, *["F"] * 4]  # the first patient is not in MIMIC-IV
    np.testing.assert_array_equal(metadata["age"][:8], np.float32([*[np.nan] * 4, 33, 33, 34, 34]))
    without = mimic.create(tmp_path_factory.mktemp("without"), patients=8)
    assert set(MIMICCXR(root=str(without)).read_table().metadata) == {"view", "date"}


def test_labels_are_the_studys(root):
    """Every image has the report of its study; the joined table equals a look-up row by row."""
    data = MIMICCXR(root=str(root))
    table = data.read_table()
    by_image = {path.split("/")[3][1:]: labels for path, labels in zip(table.paths, table.labels, strict=True)}
    column = {name: index for index, name in enumerate(data.class_names)}
    for patient in range(1, 41):
        for number in (1, 2):
            study, report = str(50000000 + 10 * patient + number), mimic.REPORTS[(patient + number) % 5]
            labels = by_image[study]
            if study == mimic.UNLABELLED[1]:
                assert np.isnan(labels).all()
                continue
            healthy = "No Finding" in report
            for name, index in column.items():
                cell = report.get("Pleural Effusion" if name == "Effusion" else name, "")
                blank = 0 if healthy and name != "Support Devices" else np.nan
                expected = blank if cell == "" else np.nan if cell == "-1.0" else float(cell)
                np.testing.assert_equal(labels[index], np.float32(expected))


def test_studies_without_labels_are_counted(root):
    data = MIMICCXR(root=str(root), views=list(MIMICCXR.view_names), image_size=16)
    data.setup()
    assert {step.reason: len(step.rows) for step in data.excluded} == {"no label": 2}


def test_labelers_differ(root):
    chexpert, negbio = (MIMICCXR(root=str(root), labeler=name) for name in ("chexpert", "negbio"))
    assert negbio.label_policy.endswith("labeler negbio")
    edema = chexpert.class_names.index("Edema")
    known, other = chexpert.read_table().labels[:, edema], negbio.read_table().labels[:, edema]
    assert np.isnan(known[other == 1]).all()  # uncertain by one, present by the other
    assert (other == 1).sum() == 32


def test_policies(root):
    edema = MIMICCXR.class_names.index("Edema")
    for policy, target in {"zeros": 0, "ones": 1, "soft": 0.7}.items():
        table = MIMICCXR(root=str(root), uncertainty=policy).read_table()
        uncertain = np.isnan(MIMICCXR(root=str(root)).read_table().labels[:, edema]) & (
            MIMICCXR(root=str(root), labeler="negbio").read_table().labels[:, edema] == 1
        )
        train = np.asarray(table.split) == "train"
        np.testing.assert_allclose(table.labels[uncertain & train, edema], target)
        assert np.isnan(table.labels[uncertain & ~train, edema]).all()


@pytest.mark.parametrize("template", COPIES)
def test_resized_copies(tmp_path, template):
    image = template.replace("{part}", "{0:.2}")
    for number, name in enumerate(("subject_id", "study_id", "dicom_id")):
        image = image.replace(f"{{{name}}}", f"{{{number}}}")
    mimic.create(tmp_path, patients=16, image=image, gz=False)
    data = MIMICCXR(root=str(tmp_path), image_path=template, image_size=16)
    assert [path for path in data.read_table().paths if not (tmp_path / path).is_file()] == []
    with pytest.raises(DataError, match=r"images of mimic are missing, the first is files/p10"):
        MIMICCXR(root=str(tmp_path), image_size=16).setup()


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("files/{dicom}.jpg", "unknown placeholder 'dicom'; did you mean 'dicom_id'"),
        ("files/{subject_id}.jpg", "lacks {dicom_id}"),
        ("files/{dicom_id.jpg", "expected '}'"),
    ],
)
def test_bad_template(template, problem):
    with pytest.raises(DataError) as error:
        MIMICCXR(image_path=template)
    assert problem in str(error.value)


@pytest.mark.parametrize(
    ("table", "changes", "problem", "where"),
    [
        (
            "chexpert",
            {"Pneumonia": "0.5"},
            "label '0.5' in column 'Pneumonia' is out of range",
            "chexpert.csv.gz, line 6",
        ),
        ("chexpert", {"study_id": "50000011", "subject_id": "10000001"}, "listed twice", "chexpert.csv.gz, line 6"),
        ("chexpert", {"subject_id": ""}, "a row without patient in subject_id", "chexpert.csv.gz, line 6"),
        ("metadata", {"subject_id": " "}, "a row without patient in subject_id", "metadata.csv.gz, line 6"),
        ("metadata", {"dicom_id": ""}, "a row without image in dicom_id", "metadata.csv.gz, line 6"),
        (
            "metadata",
            {"dicom_id": "00000001-00000001-00000000-00000000-deadbeef"},
            "image listed twice: '00000001-",
            "metadata.csv.gz, line 6",
        ),
        ("metadata", {"dicom_id": "new"}, "split.csv.gz lacks the image 'new'", "metadata.csv.gz, line 6"),
        ("split", {"split": "valid"}, "no split 'valid'", "split.csv.gz, line 6"),
        ("patients", {"subject_id": "11000002"}, "patient listed twice: '11000002'", "patients.csv.gz, line 6"),
    ],
)
def test_bad_cell_names_its_line(tmp_path, table, changes, problem, where):
    mimic.create(tmp_path, patients=8, demography=True, change=lambda tables: tables[table][4].update(changes))
    with pytest.raises(DataError) as error:
        MIMICCXR(root=str(tmp_path)).read_table()
    assert problem in str(error.value)
    assert where in str(error.value)


def test_split_that_names_an_unknown_image(tmp_path):
    def add(tables):
        tables["split"].append({**tables["split"][0], "dicom_id": "unknown"})

    mimic.create(tmp_path, patients=8, change=add)
    with pytest.raises(DataError, match=r"metadata.csv.gz lacks the image 'unknown'") as error:
        MIMICCXR(root=str(tmp_path)).read_table()
    assert "split.csv.gz, line 34" in str(error.value)


def test_missing_column(tmp_path):
    path = mimic.create(tmp_path, patients=8, gz=False) / "mimic-cxr-2.0.0-metadata.csv"
    path.write_text(path.read_text().replace("ViewPosition", "View Position", 1))
    with pytest.raises(DataError, match="no column 'ViewPosition'; did you mean 'View Position'") as error:
        MIMICCXR(root=str(tmp_path)).read_table()
    assert "metadata.csv, line 1" in str(error.value)


@pytest.mark.parametrize("name", ["chexpert", "split", "metadata"])
def test_truncated_gzip(root, name):
    path = root / f"mimic-cxr-2.0.0-{name}.csv.gz"
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(DataError, match="cannot read the table") as error:
        MIMICCXR(root=str(root)).read_table()
    assert str(path) in str(error.value)


def test_missing_table(root):
    (root / "mimic-cxr-2.0.0-negbio.csv.gz").unlink()
    MIMICCXR(root=str(root)).read_table()  # the labels that are asked for suffice
    with pytest.raises(DataError, match=r"no table .*negbio\.csv\.gz"):
        MIMICCXR(root=str(root), labeler="negbio").read_table()
