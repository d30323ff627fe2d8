"""PadChest: 160,861 chest X-rays in all views of 67,625 patients, 27 labels from Spanish reports."""

import ast
import os
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from datamodules import few_shot, ontology, readers
from datamodules.arguments import checked_window
from datamodules.chest_xray.base import ChestXray
from datamodules.chest_xray.labels import substring_matrix, token_matrix
from datamodules.errors import DataError, closest
from datamodules.files import split_parents
from datamodules.label_space import Task
from datamodules.metadata import mapped_column, sex_column, years_column
from datamodules.rows import reject_rows
from datamodules.table import Origin, Table, split_column, strings

TABLE = "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv"
COLUMNS = (
    *("ImageID", "ImageDir", "StudyDate_DICOM", "PatientID", "PatientBirth", "PatientSex_DICOM", "Projection"),
    *("Manufacturer_DICOM", "Labels"),
)
BLANK = ("", "nan", "None")
"""How the table writes a cell without a value."""

PAPER_SEED, PAPER_TRAIN = 42, 0.9
"""Seed and training share of the split by image in the code of Cherti & Jitsev (arXiv 2106.00116)."""

_PLAIN_LIST = re.compile(r"\[(?:'[^'\\]*'(?:, *'[^'\\]*')*)?\]")
_QUOTED = re.compile(r"'([^']*)'")


class PadChest(ChestXray):
    """PadChest, multi-label: 160,861 chest X-rays of 67,625 patients, 27 labels.

    Source: Bustos et al., Medical Image Analysis 66, 2020, arXiv 1901.07441; Hospital San Juan de Alicante, studies of
    2007 to 2017; https://bimcv.cipf.es/bimcv-projects/padchest, on request, for research, not to be passed on. 1 TB of
    16-bit grey PNG, up to 4,280 pixels a side. Layout: the table
    `PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv.gz` (or `.csv`) in `root`; the images in `root` or
    `root/images`, flat or in the folders `0` to `54` of the release. Resized 8-bit copies under the same names will do.
    Intensities: the release's PNGs fill the range of 16 bits, 65,535 being white: the authors' notebooks,
    torchxrayvision and paper A all divide by it. That range is the default window.
    Labels, in alphabetical order: the 27 of paper A (Cherti & Jitsev, arXiv 2106.00116), by the exact tokens that
    `datamodules/ontology.yaml` lists; physicians read the reports of 39,053 images, a network those of the others.
    The 103 images without a list of labels, and those with nothing but tokens that say nothing ("unchanged",
    "exclude"), have no label. `labels: cherti2022` searches paper A's substrings instead and reproduces its matrix.
    Patients: "PatientID". Split: there is no official one; the test set is a fixed hash of the patient. `split:
    cherti2022` is paper A's split by image, image for image: the default views' 160,709 images in the table's order,
    shuffled by NumPy's RandomState(42), 90 % for training and 16,071 for testing; 10,919 of the 13,808 patients with
    test images have training images, too. Other views give the split that its code makes of them.
    Left out: 30 files that cannot be read (`padchest_broken.txt`), other views, images without a label.
    Metadata: sex, age (year of the study less year of birth), view, scanner (manufacturer), date.

    Args:
        window: Intensities of 16-bit images that become black and white.
        **kwargs: Arguments of all chest X-ray sets.
    """

    name = "padchest"
    task: Task = "multilabel"
    class_names = [  # noqa: RUF012
        "Air Trapping",
        "Aortic Atheromatosis",
        "Aortic Elongation",
        "Atelectasis",
        "Bronchiectasis",
        "Cardiomegaly",
        "Consolidation",
        "Costophrenic Angle Blunting",
        "Edema",
        "Effusion",
        "Emphysema",
        "Fibrosis",
        "Flattened Diaphragm",
        "Fracture",
        "Granuloma",
        "Hemidiaphragm Elevation",
        "Hernia",
        "Hilar Enlargement",
        "Infiltration",
        "Mass",
        "Nodule",
        "Pleural_Thickening",
        "Pneumonia",
        "Pneumothorax",
        "Scoliosis",
        "Support Devices",
        "Tuberculosis",
    ]
    view_names: ClassVar[tuple[str, ...]] = ("PA", "AP", "AP Supine", "L", "COSTAL", "EXCLUDE", "UNK")
    default_views: ClassVar[tuple[str, ...]] = ("PA", "AP", "AP Supine", "L", "COSTAL")

    def __init__(self, *, window: tuple[float, float] = (0, 65535), **kwargs: Any) -> None:
        self.window = checked_window(window)
        super().__init__(**kwargs)

    def load_table(self) -> Table:
        """Read the table's columns in use; images are found in one listing of their folders.

        Raises:
            DataError: A missing column, a row without image or patient, an image twice, a broken list of labels, or a
                token that the ontology does not know.
        """
        readers.require_folder(self.root, self.name)
        path = next((file for file in (self.root / f"{TABLE}.gz", self.root / TABLE) if file.is_file()), None)
        path = path or self.root / f"{TABLE}.gz"
        frame = readers.read_frame(path, COLUMNS)
        images, patients = frame["ImageID"].str.strip(), frame["PatientID"].str.strip()
        reject_rows(images.isin(BLANK), images, "a row without an image:", path)
        numbers = pd.Series(pd.factorize(images)[0])  # whose duplicates are found three times as fast as those of text
        reject_rows(numbers.duplicated(), images, "image listed twice:", path)
        reject_rows(patients.isin(BLANK), patients, "a row without a patient:", path)
        view = mapped_column(frame["Projection"], {"AP_horizontal": "AP Supine"})
        split = np.full(len(frame), "", dtype=object)
        if self.split_choice == "cherti2022":
            drawn = np.isin(view, self.views) & ~frame["Labels"].isin(BLANK) & ~images.isin(known_broken())
            train, test = paper_split(np.flatnonzero(drawn))
            split[train], split[test] = "train", "test"
        return Table(
            paths=strings(self._paths(images, frame["ImageDir"])),
            labels=self._labels(frame["Labels"], path),
            groups=strings(patients),
            split=split_column(split),
            metadata={
                "sex": sex_column(frame["PatientSex_DICOM"]),
                "age": years_column(frame["StudyDate_DICOM"].str[:4]) - years_column(frame["PatientBirth"]),
                "view": view,
                "scanner": mapped_column(frame["Manufacturer_DICOM"], {}),
                "date": mapped_column(frame["StudyDate_DICOM"], {}),
            },
            origins=(Origin(path),),
        )

    def exclusions(self, table: Table) -> dict[str, np.ndarray]:
        """Rows whose file is known to be broken, and rows of other views."""
        broken = split_parents(table.paths)[1].isin(known_broken()).to_numpy()
        return {"known broken file": broken, **super().exclusions(table)}

    def token_labels(self) -> dict[str, list[str]]:
        """Every token that the table may hold, and the labels it is a positive of."""
        return ontology.token_labels("padchest")

    def _paths(self, images: "pd.Series[str]", folders: "pd.Series[str]") -> "pd.Series[str]":
        """Prefix every image with its folder; images that are nowhere are looked for in `images/`."""
        numbered = [folder for folder in sorted(folders.str.strip().unique()) if folder]
        home: dict[str, str] = {}
        for prefix in ("", "images/", *(f"{place}{folder}/" for place in ("", "images/") for folder in numbered)):
            if (self.root / prefix).is_dir():
                home |= dict.fromkeys(os.listdir(self.root / prefix), prefix)
        return images.map(home).fillna("images/") + images

    def _labels(self, cells: "pd.Series[str]", path: Path) -> np.ndarray:
        """Labels of every row, float32 (N, 27); each distinct cell is parsed once, each distinct token read once."""
        codes, texts = pd.factorize(cells)
        # One flat list: a list for each of 29,000 cells would set the garbage collector to work.
        found: list[str] = []
        ends = np.zeros(len(texts) + 1, dtype=np.int64)
        for code, text in enumerate(texts):
            try:
                found.extend(parse_tokens(text))
            except ValueError as error:
                raise DataError(
                    f"broken list of labels {text!r}",
                    where=f"{path}, line {int(np.argmax(codes == code)) + 2}",
                    valid="\"['normal']\", \"['infiltrates', 'pneumonia']\", ...",
                ) from error
            ends[code + 1] = len(found)
        token_codes, tokens = pd.factorize(np.asarray(found, dtype=object))
        owners = np.repeat(np.arange(len(texts)), np.diff(ends))
        known = self.token_labels()
        for code, token in enumerate(tokens):
            if token not in known:
                near = closest(token, known)
                cell = owners[np.argmax(token_codes == code)]
                raise DataError(
                    f"unknown token {token!r}" + (f"; did you mean {near!r}?" if near else ""),
                    where=f"{path}, line {int(np.argmax(codes == cell)) + 2}",
                    valid=sorted(known),
                    hint="correct the table, or add the token to datamodules/ontology.yaml",
                )
        return _gather(self._token_values(tokens.tolist(), known), token_codes, owners, len(texts))[codes]

    def _token_values(self, tokens: Sequence[str], known: Mapping[str, Sequence[str]]) -> np.ndarray:
        """What each token says, float32 (T, 27): 1, 0, or NaN = nothing."""
        names = PadChest.class_names
        if self.label_rule == "cherti2022":
            # A token has no quotes, so what is found in a cell is found in one of its tokens.
            return substring_matrix([token.lower() for token in tokens], ontology.substrings("padchest"))
        columns = {token: [names.index(label) for label in found] for token, found in known.items()}
        return token_matrix([[token] for token in tokens], columns, len(names), ontology.uninformative("padchest"))


class PadChestCl(PadChest):
    """PadChest-Cl, single-label: the images of PadChest with exactly one of its 27 labels, as 27 classes.

    Source, layout, licence, patients, views and metadata: `PadChest`, in the same folder. Its hashed test set holds the
    same patients, so a model that was pre-trained on PadChest has not seen them.
    Classes: the 27 labels in alphabetical order; 42,129 images. Those with several labels (43,335 of the default views)
    and with none of them (69,047) are left out. Every token of Consolidation is one of Infiltration, too, so a token
    counts for its finer label alone: otherwise Consolidation would have no image (it then has 402; the other classes
    have the same images either way).
    Paper A's variant is `labels: cherti2022` with `split: cherti2022`: exactly one label by its substring rule, 41,540
    images, of which 4,153 for testing, as published, image for image. There Consolidation has no image at all, so its
    scores are undefined and few-shot sets hold the other 26 classes. What remains different: paper A evaluates on the
    test set while it trains and has no validation set; here `val_fraction` takes one from its training images (0 leaves
    them all). Its few-shot draws were silently short where a class has fewer images, and several per patient; here the
    former is an error and the latter a choice (`one_per_group: false`).
    """

    name = "padchest_cl"
    task = "multiclass"

    def __init__(self, root: str | None = None, **kwargs: Any) -> None:
        super().__init__(root=root, **kwargs)
        if root is None:
            self.root = self.root.with_name(PadChest.name)

    @property
    def release(self) -> str:
        """Images and patients are PadChest's."""
        return PadChest.name

    def load_table(self) -> Table:
        """PadChest's table with int64 classes (N,); −1 where an image has not exactly one label."""
        table = super().load_table()
        # NaN where nothing is known: neither one label, nor several, nor none.
        self._positives = table.labels.sum(axis=1)
        return table.relabelled(np.where(self._positives == 1, np.nan_to_num(table.labels).argmax(axis=1), -1))

    def exclusions(self, table: Table) -> dict[str, np.ndarray]:
        """As `PadChest`, and images with several or none of the labels."""
        return {
            **super().exclusions(table),
            "several labels": self._positives > 1,
            "none of the 27 labels": self._positives == 0,
        }

    def token_labels(self) -> dict[str, list[str]]:
        """Every token and its labels, without those that contain another one of them."""
        return finest_labels(super().token_labels(), ontology.tokens("padchest"))

    def draw(self, table: Table, train: np.ndarray) -> np.ndarray:
        """As every set, but of the classes that occur: the paper's rule leaves one of them empty."""
        if self.label_rule != "cherti2022" or self.shots in (None, "full"):
            return super().draw(table, train)
        return few_shot.sample(
            table.labels[train],
            self.shots,
            self.few_shot_seed,
            table.groups[train],
            one_per_group=self.one_per_group,
            on_small=self.on_small,
        )


@lru_cache
def known_broken() -> frozenset[str]:
    """Names of the release's files that cannot be read, from the package's list."""
    text = Path(__file__).with_name("padchest_broken.txt").read_text(encoding="utf-8")
    return frozenset(name for line in text.splitlines() if (name := line.partition("#")[0].strip()))


def paper_split(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shuffle rows and cut them as paper A's code does: (training rows, test rows), int64."""
    order = rows.copy()
    np.random.RandomState(PAPER_SEED).shuffle(order)  # its stream is frozen, and the paper's
    cut = int(len(order) * PAPER_TRAIN)
    return order[:cut], order[cut:]


def parse_tokens(cell: str) -> list[str]:
    """Tokens of a cell such as "['normal', ' pleural effusion', '']", without the blanks around them.

    Raises:
        ValueError: It is no list of strings.
    """
    if cell.strip() in BLANK:
        return []
    if _PLAIN_LIST.fullmatch(cell):  # every cell of the release; ten times as fast as Python's parser
        return [token.strip() for token in _QUOTED.findall(cell)]
    try:
        found = ast.literal_eval(cell)
    except SyntaxError as error:
        raise ValueError(str(error)) from error
    if not isinstance(found, list) or not all(isinstance(token, str) for token in found):
        raise ValueError("no list of strings")
    return [token.strip() for token in found]


def finest_labels(
    token_labels: Mapping[str, Sequence[str]], tokens: Mapping[str, Sequence[str]]
) -> dict[str, list[str]]:
    """Drop a token's label where another of its labels has a proper part of that label's tokens.

    Args:
        token_labels: Tokens and their labels.
        tokens: Labels and all their tokens.
    """
    sets = {label: set(found) for label, found in tokens.items()}
    return {
        token: [label for label in found if not any(sets[other] < sets[label] for other in found)]
        for token, found in token_labels.items()
    }


def _gather(values: np.ndarray, tokens: np.ndarray, owners: np.ndarray, cells: int) -> np.ndarray:
    """Labels of cells from those of their tokens, float32 (cells, L): any 1; NaN where no token says anything.

    Args:
        values: float32 (T, L) of every distinct token; NaN = it says nothing.
        tokens: Row of `values` of every token in the table.
        owners: Its cell.
        cells: Number of cells.
    """

    def any_token(flags: np.ndarray) -> np.ndarray:
        return np.bincount(owners, weights=flags[tokens], minlength=cells) > 0

    positive = np.stack([any_token(column == 1) for column in values.T], axis=1)
    informed = any_token(~np.isnan(values).all(axis=1))
    return np.where(informed[:, None], positive, np.nan).astype(np.float32)
