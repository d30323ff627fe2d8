"""NIH ChestX-ray14: 112,120 frontal chest X-rays of 30,805 patients, 14 findings mined from reports."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from datamodules import readers
from datamodules.chest_xray.base import ChestXray
from datamodules.errors import DataError, closest
from datamodules.metadata import sex_column, years_column
from datamodules.rows import reject_rows
from datamodules.table import Origin, Table, split_column, strings

TABLES = ("Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv")
LISTS = {"train_val_list.txt": "train", "test_list.txt": "test"}
COLUMNS = ("Image Index", "Finding Labels", "Patient ID", "Patient Age", "View Position")
SEX_COLUMNS = ("Patient Gender", "Patient Sex")  # the column's name differs between the releases


class NIHChestXray14(ChestXray):
    """NIH ChestX-ray14: 112,120 frontal chest X-rays of 30,805 patients, 14 findings.

    Source: Wang et al., CVPR 2017, arXiv 1705.02315; NIH Clinical Center, https://nihcc.app.box.com/v/ChestXray-NIHCC;
    free to use with attribution. 45 GB of 8-bit PNG, 1024×1024, a few of them RGBA. Layout:
    `root/Data_Entry_2017_v2020.csv`, `train_val_list.txt`, `test_list.txt`, and the images in `images/` or
    `images_001/images/` … `images_012/images/`.
    Labels: 14 findings in alphabetical order, text-mined (> 90 % accurate by its authors), "No Finding" = all 0; no
    label is unknown. Patients: "Patient ID". Split: official, by patient (86,524 / 25,596); validation is carved from
    train by patient. Metadata: sex, age, view.
    """

    name = "nih"
    task = "multilabel"
    class_names = [  # noqa: RUF012
        "Atelectasis",
        "Cardiomegaly",
        "Consolidation",
        "Edema",
        "Effusion",
        "Emphysema",
        "Fibrosis",
        "Hernia",
        "Infiltration",
        "Mass",
        "Nodule",
        "Pleural_Thickening",
        "Pneumonia",
        "Pneumothorax",
    ]

    def load_table(self) -> Table:
        """Read the official table and lists; images are found in one listing of their folders."""
        readers.require_folder(self.root, self.name)
        path = next((self.root / name for name in TABLES if (self.root / name).is_file()), self.root / TABLES[0])
        frame = readers.read_frame(path)
        sex = next((name for name in SEX_COLUMNS if name in frame), SEX_COLUMNS[0])
        for column in (*COLUMNS, sex):
            if column not in frame:
                near = closest(column, frame.columns)
                raise DataError(
                    f"no column {column!r}" + (f"; did you mean {near!r}?" if near else ""),
                    where=f"{path}, line 1",
                    valid=list(frame.columns),
                )
        images, patients = frame["Image Index"], frame["Patient ID"]
        reject_rows(images.duplicated(), images, "image listed twice:", path)
        reject_rows(patients.str.strip() == "", patients, "a row without a patient:", path)
        return Table(
            paths=strings(self._folders(images.tolist())),
            labels=self._findings(frame["Finding Labels"], path),
            groups=strings(patients),
            split=split_column(self._split(images.tolist())),
            metadata={
                "sex": sex_column(frame[sex]),
                "age": years_column(frame["Patient Age"]),
                "view": frame["View Position"].to_numpy(),
            },
            origins=(Origin(path),),
        )

    def _folders(self, images: Sequence[str]) -> list[str]:
        """Prefix every image with its folder; images that are nowhere are looked for in `images/`."""
        home: dict[str, str] = {}
        for folder in [self.root / "images", *sorted(self.root.glob("images_*/images"))]:
            if folder.is_dir():
                prefix = folder.relative_to(self.root).as_posix()
                home |= {entry.name: prefix for entry in folder.iterdir()}
        return [f"{home.get(image, 'images')}/{image}" for image in images]

    def _findings(self, cells: "pd.Series[str]", path: Path) -> np.ndarray:
        names = NIHChestXray14.class_names
        number = {name: column for column, name in enumerate(names)}
        # Few distinct combinations of findings exist, so each is parsed once.
        codes, combinations = pd.factorize(cells.to_numpy(dtype=object))
        labels = np.zeros((len(combinations), len(names)), dtype=np.float32)
        for code, combination in enumerate(combinations):
            for finding in map(str.strip, combination.split("|")):
                if finding in number:
                    labels[code, number[finding]] = 1.0
                elif finding != "No Finding":
                    near = closest(finding, names)
                    raise DataError(
                        f"unknown finding {finding!r}" + (f"; did you mean {near!r}?" if near else ""),
                        where=f"{path}, line {int(np.argmax(codes == code)) + 2}",
                        valid=[*names, "No Finding"],
                    )
        return labels[codes]

    def _split(self, images: Sequence[str]) -> list[str]:
        split = dict.fromkeys(images, "")
        for name, part in LISTS.items():
            path = self.root / name
            if not path.is_file():
                hint = "it comes with the data set"
                raise DataError(f"no list {name}: it holds the official split", where=str(self.root), hint=hint)
            listed = path.read_text().split()
            unknown = [line for line, image in enumerate(listed, start=1) if image not in split]
            if unknown:
                first = listed[unknown[0] - 1]
                raise DataError(
                    f"{name} names {first!r}, which the table does not have ({len(unknown)} such lines)",
                    where=f"{path}, line {unknown[0]}",
                )
            seen: set[str] = set()
            for line, image in enumerate(listed, start=1):
                if split[image] or image in seen:
                    again = f"and in the list of {split[image]}" if split[image] else "twice"
                    raise DataError(f"{image} is in {name} {again}", where=f"{path}, line {line}")
                seen.add(image)
            split |= dict.fromkeys(listed, part)
        return [split[image] for image in images]
