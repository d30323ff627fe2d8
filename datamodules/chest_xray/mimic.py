"""MIMIC-CXR-JPG: 377,110 chest X-rays of 65,379 patients, 13 labels mined from reports by two labelers."""

from pathlib import Path
from string import Formatter
from typing import Any, ClassVar, Literal

import numpy as np
import pandas as pd

from datamodules import ontology, readers
from datamodules.chest_xray.chexpert_labels import NO_FINDING, CheXpertLabels, label_columns
from datamodules.errors import DataError, closest
from datamodules.metadata import mapped_column, sex_column, years_column
from datamodules.rows import reject_rows
from datamodules.table import Origin, Table, split_column, strings

TABLE = "mimic-cxr-2.0.0-{}.csv"  # releases 2.0.0 and 2.1.0 name their tables alike
PATIENTS = "patients.csv"
SPLIT_NAMES = {"train": "train", "validate": "validation", "test": "test"}
PLACEHOLDERS = ("part", "subject_id", "study_id", "dicom_id")


class MIMICCXR(CheXpertLabels):
    """MIMIC-CXR-JPG 2.0.0 and 2.1.0: 377,110 chest X-rays, 227,835 studies, 65,379 patients of one Boston hospital.

    Source: Johnson et al., arXiv 1901.07042 and Scientific Data 6:317; https://physionet.org/content/mimic-cxr-jpg/.
    Credentialed access: PhysioNet's training and data use agreement; not to be passed on. 8-bit grey JPEG, 558 GB.
    Layout: `mimic-cxr-2.0.0-{chexpert,negbio,metadata,split}.csv.gz` (or unzipped) in `root`, images as `image_path`
    says. `patients.csv` or `.csv.gz` of MIMIC-IV beside them is optional and gives sex and age.
    Labels: 13 in alphabetical order: Atelectasis, Cardiomegaly, Consolidation, Edema, Effusion ("Pleural Effusion"),
    Enlarged Cardiomediastinum, Fracture, Lung Lesion, Lung Opacity, Pleural Other, Pneumonia, Pneumothorax, Support
    Devices. One row a study, by the CheXpert or the NegBio labeler (1, 0, −1 = uncertain, blank = not mentioned); the
    images of the few studies without a row have no known label. "No Finding" fills the blanks of its row (`healthy`).
    Patients: "subject_id". Split: official, by patient (368,960 / 2,991 / 5,159 images): the test patients are those
    with a report that was read by hand, 500 random others validate. All labels are the labeler's, in test, too.
    Views: PA, AP, L ("LATERAL"), LL, a few others, and "" (15,769 images), of which the release does not say the view.
    Metadata: view; date of the study, shifted by a random time a patient: only differences within a patient mean
    anything. With MIMIC-IV's patients: sex, and age = anchor_age + year of the study − anchor_year (above 89 they all
    have 91 as anchor). The scanner is not in the metadata.

    Args:
        labeler: Which labels: chexpert or negbio.
        image_path: Where images are below `root`, by the columns of the metadata; `part` is p10 … p19 without its p.
            Resized copies: `resized/{dicom_id}.png`, say.
        **kwargs: Arguments shared by all chest X-ray sets with CheXpert's labels.
    """

    name = "mimic"
    class_names = ontology.labels("mimic")
    view_names: ClassVar[tuple[str, ...]] = (
        *("PA", "AP", "L", "LL", "AP AXIAL", "AP LLD", "AP RLD", "PA LLD", "PA RLD", "LAO", "RAO", "LPO"),
        *("SWIMMERS", "XTABLE LATERAL"),
    )

    def __init__(
        self,
        *,
        labeler: Literal["chexpert", "negbio"] = "chexpert",
        image_path: str = "files/p{part}/p{subject_id}/s{study_id}/{dicom_id}.jpg",
        **kwargs: Any,
    ) -> None:
        self.labeler, self.image_path = labeler, image_path
        check_template(image_path)
        super().__init__(**kwargs)

    @property
    def label_policy(self) -> str | None:
        """The ontology's version, the two policies and the labeler."""
        return f"{super().label_policy}, labeler {self.labeler}"

    def load_table(self) -> Table:
        """Join the metadata with the split by image and with the labels by study."""
        readers.require_folder(self.root, self.name)
        path = self._file(TABLE.format("metadata"))
        frame = readers.read_frame(path, ["dicom_id", "subject_id", "study_id", "ViewPosition", "StudyDate"])
        _reject_blanks(frame, {"dicom_id": "image", "subject_id": "patient", "study_id": "study"}, path)
        _reject_doubles(frame["dicom_id"], "image", path)
        dates = frame["StudyDate"].str.strip()
        return Table(
            paths=image_paths(self.image_path, frame),
            labels=self._labels(frame),
            groups=strings(frame["subject_id"]),
            split=self._split(frame["dicom_id"], path),
            metadata={
                "view": mapped_column(frame["ViewPosition"], {"LATERAL": "L"}),
                "date": dates.to_numpy(dtype=object),
                **self._demography(frame["subject_id"], dates),
            },
            origins=(Origin(path),),
        )

    def _file(self, name: str) -> Path:
        """The table of that name, gzipped or not; the gzipped name where neither is there."""
        plain = self.root / name
        return plain if plain.is_file() else plain.with_name(f"{name}.gz")

    def _labels(self, frame: pd.DataFrame) -> np.ndarray:
        """Labels of every image's study, float32 (N, 13); NaN where the label file lacks the study."""
        path = self._file(TABLE.format(self.labeler))
        studies = readers.read_frame(path, ["subject_id", "study_id", NO_FINDING, *label_columns(self.name)])
        _reject_blanks(studies, {"subject_id": "patient", "study_id": "study"}, path)
        names = studies["subject_id"] + " " + studies["study_id"]
        _reject_doubles(names, "study (subject_id study_id)", path)
        labels = self.report_labels(studies, str(path))
        unknown = np.full((1, labels.shape[1]), np.nan, dtype=np.float32)  # the row that index −1 stands for
        rows = pd.Index(names).get_indexer(pd.Index(frame["subject_id"] + " " + frame["study_id"]))
        return np.asarray(np.concatenate([labels, unknown])[rows])

    def _split(self, images: "pd.Series[str]", metadata: Path) -> pd.Categorical:
        """The official split of every image; both files must name the same ones."""
        path = self._file(TABLE.format("split"))
        frame = readers.read_frame(path, ["dicom_id", "split"])
        _reject_doubles(frame["dicom_id"], "image", path)
        codes, names = pd.factorize(frame["split"])
        wrong = np.asarray([name not in SPLIT_NAMES for name in names], dtype=bool)[codes]
        reject_rows(wrong, frame["split"], "no split", path, valid=list(SPLIT_NAMES))
        rows = pd.Index(frame["dicom_id"]).get_indexer(pd.Index(images))
        reject_rows(rows < 0, images, f"{path.name} lacks the image", metadata)
        unknown = np.ones(len(frame), dtype=bool)
        unknown[rows] = False
        reject_rows(unknown, frame["dicom_id"], f"{metadata.name} lacks the image", path)
        return split_column(np.asarray([SPLIT_NAMES[name] for name in names], dtype=object)[codes[rows]])

    def _demography(self, subjects: "pd.Series[str]", dates: "pd.Series[str]") -> dict[str, np.ndarray]:
        """Sex and age of every image's patient at the study, where MIMIC-IV's patients are beside the tables."""
        path = self._file(PATIENTS)
        if not path.is_file():
            return {}
        patients = readers.read_frame(path, ["subject_id", "gender", "anchor_age", "anchor_year"])
        _reject_doubles(patients["subject_id"], "patient", path)
        rows = pd.Index(patients["subject_id"]).get_indexer(pd.Index(subjects))
        # The entry appended stands for patients that MIMIC-IV lacks: index −1.
        born = _years(patients["anchor_year"]) - years_column(patients["anchor_age"])
        sex = sex_column(patients["gender"])
        age = _years(dates.str.slice(0, 4)) - np.append(born, np.nan)[rows]
        return {"sex": np.append(sex, "")[rows], "age": age.astype(np.float32)}


def check_template(template: str) -> None:
    """Make sure that a template of image paths has known placeholders and tells the images apart.

    Raises:
        DataError: Not a template, an unknown placeholder, or `{dicom_id}` is missing.
    """
    try:
        names = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise DataError(f"image_path: {template!r}: {error}", where="data.init_args.image_path") from error
    unknown = [name for name in names if name not in PLACEHOLDERS]
    if unknown or "dicom_id" not in names:
        near = closest(unknown[0], PLACEHOLDERS) if unknown else None
        problem = f"has the unknown placeholder {unknown[0]!r}" if unknown else "lacks {dicom_id}"
        raise DataError(
            f"image_path: {template!r} {problem}" + (f"; did you mean {near!r}?" if near else ""),
            where="data.init_args.image_path",
            valid=[f"{{{name}}}" for name in PLACEHOLDERS],
        )


def image_paths(template: str, frame: pd.DataFrame) -> Any:
    """Fill a template of image paths for every row, strings (N,); see `MIMICCXR`."""
    columns: dict[str, pd.Series[str]] = {name: frame[name] for name in PLACEHOLDERS[1:]}
    columns["part"] = frame["subject_id"].str.slice(0, 2)
    result = pd.Series("", index=frame.index, dtype="string[pyarrow]")
    for text, name, _, _ in Formatter().parse(template):
        result = result + text if name is None else result + text + columns[name].astype("string[pyarrow]")
    return strings(result)


def _years(cells: "pd.Series[str]") -> np.ndarray:
    return pd.to_numeric(cells, errors="coerce").to_numpy(dtype=np.float64)


def _reject_blanks(frame: pd.DataFrame, names: dict[str, str], path: Path) -> None:
    for column, name in names.items():
        reject_rows(frame[column].str.strip() == "", frame[column], f"a row without {name} in {column}:", path)


def _reject_doubles(values: "pd.Series[str]", name: str, path: Path) -> None:
    reject_rows(values.duplicated(), values, f"{name} listed twice:", path)
