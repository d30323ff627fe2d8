"""COVIDx CXR: COVID-19 or not, gathered from public collections (COVIDx CXR-2, CXR-3 and CXR-4)."""

from pathlib import Path
from typing import ClassVar

import numpy as np
import pandas as pd

from datamodules import readers
from datamodules.chest_xray.base import ChestXray
from datamodules.errors import DataError, closest
from datamodules.table import Origin, Table, split_column, strings

LISTS = {"train": "train", "val": "validation", "test": "test"}
"""Name of each list and of its folder of images, and the split that it stands for; older releases have no `val`."""
OPTIONAL = ("val",)
FIELDS = ("patient", "image", "class", "source")
CLASSES = {"positive": 1.0, "negative": 0.0, "COVID-19": 1.0, "normal": 0.0, "pneumonia": 0.0}
"""Classes of the two-class (B) and three-class (A) lists, and the label: 1 = COVID-19."""
COUNTER = r"\d+[a-z]?"
"""Patient ids such as 101 or 313b that count the cases of one source, and mean somebody else in another one."""


class COVIDxCXR(ChestXray):
    """COVIDx CXR: chest X-rays of patients with and without COVID-19, 30,386 images of 17,026 patients in CXR-3.

    Source: Wang et al., Sci. Rep. 2020, arXiv 2003.09871; CXR-3: Pavlova et al., arXiv 2206.03671; CXR-4 (84,818 images
    of 45,342 patients): Wu et al., arXiv 2311.17677. https://www.kaggle.com/datasets/andyczhao/covidx-cxr2 has the
    releases as its versions. The images keep the terms of the collections they come from; for research, not for
    diagnosis. PNG and JPEG of many sizes, grey and RGB. Layout: `root/train.txt`, `test.txt`, `val.txt` where the
    release has it (CXR-4), and the images in folders of the same names. A line is `patient image class source`,
    without a header.
    Labels: COVID-19, 1 = positive, 0 = negative; the three-class lists (normal, pneumonia, COVID-19), saved under the
    same names, are read as the same task: pneumonia of other causes is a negative in both.
    Patients: the first field. A plain number counts the cases of one source and is joined with it (cohen/101); any
    other id means the same person under every source. One person under two ids cannot be known from the lists.
    Split: official. CXR-3 trains on 15,994 positives and 13,992 negatives and tests on 200 and 200; without `val.txt`
    validation is carved from train by patient.
    Metadata: site, the source collection. View, sex and age are not released.
    Confounds: in the test set of CXR-2 and CXR-3 all negatives come from one collection (rsna) and all positives from
    another (ricord), and mostly so in training, so that a model may learn to tell the institutions apart. The images
    of rsna are from NIH ChestX-ray14 and may be among the training images of a model pre-trained on it.
    """

    name = "covidx"
    task = "binary"
    class_names = ["COVID-19"]  # noqa: RUF012
    view_names: ClassVar[tuple[str, ...]] = ()
    default_views: ClassVar[tuple[str, ...]] = ()

    def load_table(self) -> Table:
        """Read the lists in the order train, validation, test.

        Raises:
            DataError: No list, a line of fewer than four fields, an unknown class, or an image listed twice.
        """
        readers.require_folder(self.root, self.name)
        names = [name for name in LISTS if name not in OPTIONAL or (self.root / f"{name}.txt").is_file()]
        lists = [_read_list(self.root / f"{name}.txt") for name in names]
        sizes = [len(rows) for rows in lists]
        rows = pd.concat(lists, ignore_index=True)
        counter = rows["patient"].str.fullmatch(COUNTER)
        table = Table(
            paths=strings(np.repeat(names, sizes).astype(object) + "/" + rows["image"].to_numpy()),
            labels=rows["class"].map(CLASSES).to_numpy(dtype=np.float32)[:, None],
            groups=strings(rows["patient"].where(~counter, rows["source"] + "/" + rows["patient"])),
            split=split_column(np.repeat([LISTS[name] for name in names], sizes)),
            metadata={"site": rows["source"].to_numpy()},
            origins=tuple(
                Origin(self.root / f"{name}.txt", first_row=int(start), first_line=1)
                for name, start in zip(names, np.cumsum([0, *sizes]), strict=False)
            ),
        )
        _reject_doubles(rows["image"], table)
        return table


def _read_list(path: Path) -> pd.DataFrame:
    """Read one list: its `FIELDS` as text, a row a line."""
    if not path.is_file():
        raise DataError(
            f"no list {path.name}: it holds labels and the official split",
            where=str(path.parent),
            hint="it comes with the data set",
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"not a text file: {error}", where=str(path), hint="download it again") from error
    lines = [_fields(line) for line in text.rstrip().split("\n")]
    short = [number for number, line in enumerate(lines) if len(line) < len(FIELDS)]
    if short:
        raise DataError(
            f"a line has fewer than four fields: {' '.join(lines[short[0]])!r} ({len(short)} such lines)",
            where=f"{path}, line {short[0] + 1}",
            valid="patient image class source, separated by blanks",
        )
    rows = pd.DataFrame(lines, columns=list(FIELDS), dtype=object)
    unknown = np.flatnonzero(~rows["class"].isin(CLASSES))
    if len(unknown):
        value = rows["class"][unknown[0]]
        near = closest(value, CLASSES)
        raise DataError(
            f"unknown class {value!r}"
            + (f"; did you mean {near!r}?" if near else "")
            + f" ({len(unknown)} such lines)",
            where=f"{path}, line {unknown[0] + 1}",
            valid=list(CLASSES),
        )
    return rows


def _fields(line: str) -> list[str]:
    """Split a line from both ends, since the name of an image may hold blanks; fewer fields where it has fewer."""
    patient, *rest = line.split(maxsplit=1) or [""]
    return [patient, *(field for part in rest for field in part.rsplit(maxsplit=2))]


def _reject_doubles(images: "pd.Series[str]", table: Table) -> None:
    """Stop at an image that is listed twice, in one list or in two: then it is in two splits."""
    twice = np.flatnonzero(images.duplicated())
    if len(twice):
        image = images[twice[0]]
        first = int(np.argmax(images == image))
        raise DataError(
            f"image {image!r} is listed twice ({len(twice)} such lines), first in {table.where(first)}",
            where=table.where(int(twice[0])),
            hint="take one of the lines out",
        )
