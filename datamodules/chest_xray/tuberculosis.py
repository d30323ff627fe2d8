"""Tuberculosis: the Shenzhen and the Montgomery County chest X-rays, 800 images with and without the disease."""

import re
from pathlib import PurePosixPath
from typing import ClassVar

import numpy as np
import pandas as pd

from datamodules import io, readers
from datamodules.chest_xray.base import ChestXray
from datamodules.errors import DataError
from datamodules.metadata import sex_column, years_column
from datamodules.table import Table, split_column, strings

SITES = {"CHNCXR": "Shenzhen", "MCUCXR": "Montgomery"}
STEM = re.compile(rf"({'|'.join(SITES)})_\d+_(\d)")
"""Site and label in the stem of an image's file name."""
HOME, READINGS = "CXR_png", "ClinicalReadings"
# Sex and age open a reading: "male 45yrs", "Female , 5 month", "femal24yrs"; "Patient's Sex: F", "Patient's Age: 021Y".
READING = (
    r"^\s*(?:Patient's Sex:\s*)?(f(?:em[a-z]*)?|m(?:ale)?|[a-z])(?![a-z])"
    r"(?:\s*Patient's Age:\s*|[^\w\n]*)(\d+)?[^\w\n]*([a-z])?"
)
SAME_PATIENT = {"MCUCXR_0117_1": "MCUCXR_0113_1", "MCUCXR_0166_1": "MCUCXR_0162_1"}
"""Second images of a patient, and the first one. Their clinical readings say "same pt as ..."; named here so that
groups, and with them the hashed test set, are the same where the readings are not on the disk."""


class Tuberculosis(ChestXray):
    """Tuberculosis: 662 chest X-rays from Shenzhen (336 with the disease) and 138 from Montgomery County (58).

    Source: Jaeger et al., Quant. Imaging Med. Surg. 4(6), 2014, and Candemir et al., IEEE Trans. Med. Imaging 33(2),
    2014; U.S. National Library of Medicine, with Shenzhen No. 3 People's Hospital and the Department of Health and
    Human Services of Montgomery County; https://data.lhncbc.nlm.nih.gov/public/Tuberculosis-Chest-X-ray-Datasets; free
    to use with attribution of both. About 4 GB of 8-bit PNG: Shenzhen with a palette or RGB, about 3000×3000,
    Montgomery grey, 4020×4892 or 4892×4020. Layout: `ChinaSet_AllFiles/CXR_png/` and `MontgomerySet/CXR_png/`, or any
    other: images are found by their stems anywhere below `root`, folders with "mask" in their names left out. Where
    an image is in a folder `CXR_png`, its copies elsewhere do not count (some releases repeat images in `test/`).
    Labels: the last digit of the stem, 1 = manifestations of tuberculosis, 0 = normal.
    Patients: one an image, but for two of Montgomery with two images each (`SAME_PATIENT`).
    Split: there is no official one; the test set is a fixed hash of the patient. `split: cherti2022` tests on 15 % of
    the images of each site.
    Metadata: site; sex and age where `ClinicalReadings/` is beside the images or their folder. View is not released.
    Confound: each site has its own devices, sizes and prevalence (51 % and 42 %).
    """

    name = "tuberculosis"
    task = "binary"
    class_names = ["Tuberculosis"]  # noqa: RUF012
    view_names: ClassVar[tuple[str, ...]] = ()
    default_views: ClassVar[tuple[str, ...]] = ()
    image_test_fraction: ClassVar[float] = 0.15

    def load_table(self) -> Table:
        """Find the images in one walk, in the order of their stems, and read sex and age from the clinical readings.

        Raises:
            DataError: No images, an image twice, or a label that is neither 0 nor 1.
        """
        readers.require_folder(self.root, self.name)
        images = _find(io.list_images(self.root))
        if not images:
            raise DataError(
                f"no images for {self.name} in {self.root}",
                where="data.init_args.root",
                valid="CHNCXR_0001_0.png, MCUCXR_0001_0.png, ... in any folder below it",
            )
        stems = list(images)
        parts = [stem.split("_") for stem in stems]
        readings = pd.Series(self._readings(images), dtype=object).str.extract(READING, flags=re.IGNORECASE).fillna("")
        return Table(
            paths=strings(list(images.values())),
            labels=np.array([[float(part[-1])] for part in parts], dtype=np.float32),
            groups=strings([SAME_PATIENT.get(stem, stem) for stem in stems]),
            split=split_column([""] * len(stems)),
            metadata={
                "sex": sex_column(readings[0]),
                "age": years_column(readings[1] + readings[2].str.upper()),
                "site": np.array([SITES[part[0]] for part in parts], dtype=object),
            },
        )

    def image_strata(self, table: Table) -> np.ndarray | None:
        """The site: paper A tests on the same share of both."""
        codes: np.ndarray = pd.factorize(table.metadata["site"])[0].astype(np.int64)
        return codes

    def _readings(self, images: dict[str, str]) -> list[str]:
        """Text of every image's clinical reading; empty where there is none."""
        found = {}
        for parent in {PurePosixPath(path).parent for path in images.values()}:
            folders = [self.root / above / READINGS for above in (parent, parent.parent)]
            found[parent] = next((folder for folder in folders if folder.is_dir()), None)
        texts = []
        for stem, path in images.items():
            folder = found[PurePosixPath(path).parent]
            try:
                # Latin-1 decodes any byte; only ASCII words are looked for.
                texts.append((folder / f"{stem}.txt").read_text(encoding="latin-1") if folder else "")
            except OSError:
                texts.append("")
        return texts


def _find(paths: list[str]) -> dict[str, str]:
    """Choose the images among all image files: stem and path, in the order of the stems."""
    copies: dict[str, list[str]] = {}
    for path in paths:
        file = PurePosixPath(path)
        match = STEM.fullmatch(file.stem)
        if match is None or any("mask" in folder.lower() for folder in file.parts[:-1]):
            continue
        if match[2] not in "01":
            raise DataError(f"image {path!r} has the label {match[2]}", where=path, valid="stems that end in _0 or _1")
        copies.setdefault(file.stem, []).append(path)
    images = {}
    for stem in sorted(copies):
        home = [path for path in copies[stem] if PurePosixPath(path).parent.name == HOME]
        candidates = home or copies[stem]
        if len(candidates) > 1:
            raise DataError(
                f"image {stem} is there {len(candidates)} times",
                where=", ".join(candidates[:3]),
                hint="let root hold one copy of the data set",
            )
        images[stem] = candidates[0]
    return images
