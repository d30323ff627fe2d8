"""MIMIC-CXR-JPG in the layout of its releases, with values that the real tables have."""

import csv
import gzip

from tests.data.chexpert import LABELS, REPORTS
from tests.data.images import write_image

COLUMNS = {
    "metadata": [
        "dicom_id", "subject_id", "study_id", "PerformedProcedureStepDescription", "ViewPosition", "Rows", "Columns",
        "StudyDate", "StudyTime", "ProcedureCodeSequence_CodeMeaning", "ViewCodeSequence_CodeMeaning",
        "PatientOrientationCodeSequence_CodeMeaning",
    ],
    "split": ["dicom_id", "study_id", "subject_id", "split"],
    "chexpert": ["subject_id", "study_id", *sorted(LABELS)],
    "negbio": ["subject_id", "study_id", *sorted(LABELS)],
    "patients": ["subject_id", "gender", "anchor_age", "anchor_year", "anchor_year_group", "dod"],
}  # fmt: skip
VIEWS = ["PA", "LATERAL", "AP", "LL"]
UNLABELLED = ("10000021", "50000212")  # subject and study without a row in the label files


def create(root, *, patients=40, image="files/p{0:.2}/p{0}/s{1}/{2}.jpg", gz=True, demography=False, change=None):
    """Write the tables and images.

    `image` is where an image lies by subject, study and image. Of every eight patients one is for test and one for
    validation; each has two studies of two images. `demography` adds MIMIC-IV's patients, without the first one.
    `change` takes {table: rows} and may alter it.
    """
    tables = {name: [] for name in COLUMNS if demography or name != "patients"}
    for patient in range(1, patients + 1):
        subject = str(10000000 + patient if patient % 2 else 11000000 + patient)
        if demography and patient > 1:
            person = {"gender": "FM"[patient % 2], "anchor_age": str(30 + patient), "anchor_year": "2150"}
            tables["patients"].append({"subject_id": subject, **person})
        for number in (1, 2):
            _study(root, image, tables, patient, subject, str(50000000 + 10 * patient + number), number)
    if change:
        change(tables)
    for name, rows in tables.items():
        file = "patients.csv" if name == "patients" else f"mimic-cxr-2.0.0-{name}.csv"
        opened = gzip.open(root / f"{file}.gz", "wt", newline="") if gz else (root / file).open("w", newline="")
        with opened as text:
            writer = csv.DictWriter(text, COLUMNS[name], restval="")
            writer.writeheader()
            writer.writerows(rows)
    return root


def _study(root, image, tables, patient, subject, study, number):
    """One study: two images with their rows, and a row in both label files; the labelers differ on some."""
    ids = {"subject_id": subject, "study_id": study}
    split = {0: "test", 1: "validate"}.get(patient % 8, "train")
    for view in range(2):
        dicom = f"{patient:08x}-{number:08x}-{view:08x}-00000000-deadbeef"
        position = "" if (patient, view) == (2, 1) else VIEWS[(2 * number + view) % 4]
        date = {"StudyDate": str(21500101 + 10000 * number), "StudyTime": "90312.5", "ViewPosition": position}
        tables["metadata"].append({"dicom_id": dicom, **ids, **date, "Rows": "3056", "Columns": "2544"})
        tables["split"].insert(0, {"dicom_id": dicom, **ids, "split": split})  # its order is not the metadata's
        write_image(root / image.format(subject, study, dicom), patient, size=(32, 32), channels=1)
    if (subject, study) == UNLABELLED:
        return
    report = REPORTS[(patient + number) % len(REPORTS)]
    tables["chexpert"].append({**ids, **report})
    tables["negbio"].append({**ids, **{name: cell.replace("-1.0", "1.0") for name, cell in report.items()}})
