"""CheXpert: 224,316 chest X-rays of 65,240 patients, 13 labels mined from reports, radiologists' labels to test on."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import pandas as pd

from datamodules import ontology, readers
from datamodules.chest_xray.chexpert_labels import NO_FINDING, CheXpertLabels, label_columns
from datamodules.errors import DataError
from datamodules.metadata import sex_column, years_column
from datamodules.table import Origin, Table, concatenate, split_column, strings

TABLES = {
    "train": ("train.csv",),
    "validation": ("valid.csv",),
    "test": ("test.csv", "test_labels.csv", "groundtruth.csv"),  # its name differs between the releases
}
FOLDERS = {"train": ("train",), "validation": ("valid", "val"), "test": ("test",)}
DETAILS = ("Sex", "Age", "Frontal/Lateral", "AP/PA", NO_FINDING)  # the test tables may lack these
VIEWS = {
    ("Frontal", "AP"): "AP",
    ("Frontal", "PA"): "PA",
    ("Frontal", "LL"): "LL",
    ("Frontal", "RL"): "RL",
    ("Frontal", ""): "frontal",
    ("Lateral", ""): "L",
}
"""Cells of "Frontal/Lateral" and "AP/PA", and the view that they mean."""


class CheXpert(CheXpertLabels):
    """CheXpert v1.0: 224,316 chest X-rays of 65,240 patients of Stanford Hospital, 2002–2017.

    Source: Irvin et al., AAAI 2019, arXiv 1901.07031; https://stanfordmlgroup.github.io/competitions/chexpert/. Access
    after registration under Stanford's research use agreement: not commercial, not to be passed on. 8-bit grey JPEG,
    439 GB, or `CheXpert-v1.0-small` with the short side at 320 px, 11 GB.
    Layout: `train.csv`, `valid.csv` and, of the later release, `test.csv`, `test_labels.csv` (CheXlocalize) or
    `groundtruth.csv` (a row a study), in `root` or in a folder `CheXpert*` of it. Images: where the paths of the tables
    say, or below `root` itself, `val` for `valid`, or in the four batches of the full release.
    Labels: 13 in alphabetical order: Atelectasis, Cardiomegaly, Consolidation, Edema, Effusion ("Pleural Effusion"),
    Enlarged Cardiomediastinum, Fracture, Lung Lesion, Lung Opacity, Pleural Other, Pneumonia, Pneumothorax, Support
    Devices. In train by the CheXpert labeler (1, 0, −1 = uncertain, blank = not mentioned), in valid by three
    radiologists, in test by five. "No Finding" is no label; it fills the blanks of its row (`healthy`).
    Patients: `patient00001` of the path. Split: official, by patient (223,414 / 234 / 668 images); without the test
    table the test set is a fixed hash of the training patients, with labels from reports.
    Metadata: sex; age in years, 90 = 90 or more, 0 = unknown (three rows; the next age is 18); view. No date.
    Views: AP and PA; "frontal" = frontal, direction unknown, as in test tables; L = lateral; LL and RL, DICOM codes of
    laterals in 17 rows marked frontal, are not used by default.
    """

    name = "chexpert"
    class_names = ontology.labels("chexpert")
    view_names: ClassVar[tuple[str, ...]] = ("PA", "AP", "frontal", "L", "LL", "RL")
    default_views: ClassVar[tuple[str, ...]] = ("PA", "AP", "frontal")

    def load_table(self) -> Table:
        """Read the two or three official tables; images are found by one listing of the folder that holds them."""
        readers.require_folder(self.root, self.name)
        bases = ["", *sorted(f"{entry.name}/" for entry in self.root.glob("CheXpert*") if entry.is_dir())]
        found = {split: self._find_table(bases, split) for split in TABLES}
        table = concatenate([self._read_part(bases, split, path) for split, path in found.items() if path is not None])
        repeated = np.flatnonzero(pd.Series(table.paths).duplicated())
        if len(repeated):
            raise DataError(
                f"image listed twice: {table.paths[repeated[0]]!r} ({len(repeated)} such rows)",
                where=table.where(int(repeated[0])),
            )
        return table

    def _find_table(self, bases: Sequence[str], split: str) -> Path | None:
        """The split's table: the first that exists; only the one of test may be absent."""
        paths = [self.root / base / name for base in bases for name in TABLES[split]]
        return next((path for path in paths if path.is_file()), None if split == "test" else paths[0])

    def _read_part(self, bases: Sequence[str], split: str, path: Path) -> Table:
        """Read one official table, which is one split."""
        present = readers.header(path) if split == "test" else ["Path", *DETAILS]
        key = "Study" if "Study" in present and "Path" not in present else "Path"
        details = [name for name in DETAILS if name in present]
        frame = readers.read_frame(path, [key, *details, *label_columns(self.name)])
        frame = frame.assign(**{name: "" for name in DETAILS if name not in details})
        parts = split_paths(frame[key], path)
        paths = self._place(parts, bases, FOLDERS[split])
        labels = self.report_labels(frame, str(path))
        origins: tuple[Origin, ...] = (Origin(path),)
        if key == "Study":
            rows, paths = self._study_images(paths)
            frame, parts, labels = frame.iloc[rows], parts.iloc[rows], labels[rows]
            origins = tuple(Origin(path, image, row + 2) for image, row in enumerate(rows))
        age = years_column(frame["Age"])
        return Table(
            paths=paths.array,
            labels=labels,
            groups=parts["patient"].array,
            split=split_column([split] * len(frame)),
            metadata={
                "sex": sex_column(frame["Sex"]),
                "age": np.where(age > 0, age, np.float32(np.nan)),
                "view": view_column(frame, paths, path),
            },
            origins=origins,
        )

    def _place(self, parts: pd.DataFrame, bases: Sequence[str], folders: Sequence[str]) -> "pd.Series[str]":
        """Paths relative to root: every patient in the first folder that has it, else where the table says.

        The table may say `CheXpert-v1.0-small/train` where root is that folder's parent, or the folder itself, or where
        the full release's batches hold the patients directly.
        """
        codes, patients = pd.factorize(parts["patient"])
        candidates = [
            *pd.unique(parts["folder"]),
            *(f"{base}{folder}/" for base in bases for folder in folders),
            *bases,
        ]
        home = np.zeros(len(patients), dtype=np.int64)
        unplaced = np.ones(len(patients), dtype=bool)
        for number, folder in enumerate(candidates):
            if unplaced.any() and (self.root / folder).is_dir():
                here = unplaced & patients.isin(os.listdir(self.root / folder))
                home[here] = number
                unplaced &= ~here
        placed: pd.Series[str] = pd.Series(strings(candidates)[home[codes]] + parts["file"].array)
        return placed

    def _study_images(self, studies: "pd.Series[str]") -> tuple[list[int], "pd.Series[str]"]:
        """Image files of every study's folder: (row of the study for each image, paths)."""
        rows: list[int] = []
        paths: list[str] = []
        for row, study in enumerate(studies):
            folder = self.root / study
            names = sorted(os.listdir(folder)) if folder.is_dir() else []
            # Every study has this one; the check of the files then reports what is not there.
            names = [name for name in names if name.startswith("view")] or ["view1_frontal.jpg"]
            rows += [row] * len(names)
            paths += [f"{study}/{name}" for name in names]
        return rows, pd.Series(strings(paths))


def split_paths(paths: "pd.Series[str]", where: Path) -> pd.DataFrame:
    """Split paths as the tables write them into columns folder ("" or with a slash), patient, and file from there on.

    Raises:
        DataError: A blank path, or one without a patient, with its line.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    cells = pa.array(paths)
    patients = pc.struct_field(pc.extract_regex(cells, r"(?P<patient>patient\d+)/"), "patient")
    bad = np.flatnonzero(np.asarray(pc.is_null(patients)))
    if len(bad):
        path = paths.iloc[bad[0]]
        raise DataError(
            f"a path without a patient: {path!r} ({len(bad)} such rows)" if path else "a row without an image path",
            where=f"{where}, line {bad[0] + 2}",
            valid="paths such as CheXpert-v1.0/train/patient00001/study1/view1_frontal.jpg",
        )
    halves = pc.split_pattern(cells, "patient", max_splits=1, reverse=True)  # four times as fast as one expression
    columns = {"folder": pc.list_element(halves, 0), "patient": patients, "file": pc.list_element(halves, 1)}
    parts = pd.DataFrame({name: pd.array(column, dtype="string[pyarrow]") for name, column in columns.items()})
    return parts.assign(file="patient" + parts["file"])


def view_column(frame: pd.DataFrame, paths: "pd.Series[str]", where: Path) -> np.ndarray:
    """View of every row, object (N,), from the table's two columns, or from the file name where the first is blank."""
    sides, directions = frame["Frontal/Lateral"], frame["AP/PA"]
    if (sides == "").any():
        named = np.where(paths.str.contains("_lateral", regex=False), "Lateral", "Frontal")
        sides = pd.Series(np.where(sides == "", named, sides))
    rows, side_names = pd.factorize(sides)
    columns, direction_names = pd.factorize(directions)
    views = np.asarray([[VIEWS.get((side, way)) for way in direction_names] for side in side_names], dtype=object)
    column = views[rows, columns]
    bad = np.flatnonzero(pd.isna(column))
    if len(bad):
        raise DataError(
            f"no view {side_names[rows[bad[0]]]!r} with direction {direction_names[columns[bad[0]]]!r} "
            f"({len(bad)} such rows)",
            where=f"{where}, line {bad[0] + 2}",
            valid=[" ".join(pair).strip() for pair in VIEWS],
        )
    return np.asarray(column)
