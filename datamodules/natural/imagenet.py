"""ImageNet-1k (ILSVRC 2012): a tree of WordNet folders, and the released flat validation images with their labels."""

import io
import os
import tarfile
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from datamodules import readers
from datamodules.base import BaseDataModule
from datamodules.errors import DataError, closest, shorten
from datamodules.io import IMAGE_EXTENSIONS
from datamodules.rows import reject_rows
from datamodules.table import SPLITS, Table

LAYOUTS = ("", "ILSVRC/Data/CLS-LOC/")
"""Folder that holds train and val, below root: as unpacked by hand, and as Kaggle's archive has it."""
DEVKIT = "ILSVRC2012_devkit_t12"
GROUND_TRUTH = "data/ILSVRC2012_validation_ground_truth.txt"
META = "data/meta.mat"
KAGGLE_LABELS = "LOC_val_solution.csv"
OBTAIN = (
    "accept the terms at https://image-net.org (or Kaggle's imagenet-object-localization-challenge), unpack "
    "ILSVRC2012_img_train.tar into root/train/<WordNet id>/ and ILSVRC2012_img_val.tar into root/val/, and set "
    "data.init_args.root"
)
TRAIN_IMAGES, VAL_IMAGES = 1_281_167, 50_000
"""Numbers of images in the release."""
_DEVKIT_LIMIT = 1 << 24  # bytes; the largest file of the devkit that is read has 0.2 MB


class ImageNet(BaseDataModule):
    """ImageNet-1k: 1,331,167 photos of 1,000 classes of the ILSVRC 2012 challenge.

    Source: https://image-net.org/challenges/LSVRC/2012 (Russakovsky et al. 2015, arXiv 1409.0575); 138 GB train and
    6 GB val, JPEG of about 500×375. Layout: `root/train/<WordNet id>/*.JPEG` and `root/val/`, also below Kaggle's
    `ILSVRC/Data/CLS-LOC/`. `root/val` holds WordNet folders, or the 50,000 released files as they are; their labels
    then come from `ILSVRC2012_devkit_t12/` or `ILSVRC2012_devkit_t12.tar.gz` (ground truth and `meta.mat`, read without
    unpacking) or from Kaggle's `LOC_val_solution.csv`, whichever is in root. torchvision's `meta.bin` is not read: it
    is a pickle, and torchvision sorts val into folders anyway.
    Classes: WordNet ids in ascending order, the order of every published set of weights; a name is the id and its first
    lemma ("n01440764 tench"), since two pairs of classes share a lemma. A training folder that is missing or empty is
    an error: an interrupted unpacking would otherwise train a smaller task. Read subsets such as ImageNet-100 with
    `ImageFolder`.
    Split: the official val, whose labels the field reports on, is the test set; the labels of the official test set
    were never released. Validation is carved from train. One group an image. Licence: non-commercial research and
    education, by the terms of access.

    Args:
        val_fraction: Share of the training images for validation: 12,811 images, whose accuracy has a standard error
            of at most 0.45 points; the other 99 % train.
        **kwargs: Arguments shared by all data sets.
    """

    name = "imagenet1k"
    task = "multiclass"

    def __init__(self, *, val_fraction: float = 0.01, **kwargs: Any) -> None:
        self.synsets = synsets_1k()
        self.class_names = synset_names(self.synsets)
        super().__init__(val_fraction=val_fraction, **kwargs)

    def load_table(self) -> Table:
        """List one folder a class; rows by split, class and file name, in either layout of val."""
        layout = next((layout for layout in LAYOUTS if (self.root / layout / "train").is_dir()), None)
        if layout is None:
            raise DataError(f"no folder train of {self.name} in {self.root}", where=str(self.root), hint=OBTAIN)
        train = list_classes(self.root, f"{layout}train/", self.synsets)
        self._check_complete(train, TRAIN_IMAGES)
        val = self.root / layout / "val"
        if not val.is_dir():
            raise DataError(f"no folder val of {self.name}", where=str(val.parent), hint=OBTAIN)
        loose = {os.path.splitext(name)[0]: name for name in image_files(val)}
        if loose:
            paths, groups, labels = self._flat(f"{layout}val/", loose)
        else:
            listed = list_classes(self.root, f"{layout}val/", self.synsets)
            self._check_complete(listed, VAL_IMAGES)
            paths, groups, labels = listed.paths, listed.paths_below(layout), listed.labels
        return image_table(
            pa.concat_arrays([train.paths, paths]),
            pa.concat_arrays([train.paths_below(layout), groups]),
            np.concatenate([train.labels, labels]),
            {"train": len(train.labels), "test": len(labels)},
        )

    def missing_files(self, table: Table, rows: np.ndarray) -> np.ndarray:
        """Missing validation images; the training rows are a listing of the files that are there."""
        listed_by_name = self.raw_table.split.codes[rows] == SPLITS.index("test")
        return super().missing_files(table, rows[listed_by_name])

    def _check_complete(self, listed: "ClassListing", size: int) -> None:
        """Stop at a class without images, and say where there are more or fewer images than in the release."""
        folder = self.root / listed.folder
        empty = [synset for synset, count in zip(self.synsets, listed.counts, strict=True) if not count]
        if empty:
            raise DataError(
                f"{len(empty)} of {len(self.synsets):,} class folders hold no image: {shorten(empty)}",
                where=str(folder),
                hint="unpack the archives again",
            )
        if len(listed.paths) != size:
            warnings.warn(
                f"{self.name} has {len(listed.paths):,} images in {folder}, the release has {size:,}; going on with "
                "what is there",
                stacklevel=2,
            )

    def _flat(self, folder: str, files: dict[str, str]) -> tuple[Any, Any, np.ndarray]:
        """Paths, groups and labels of val as released, in the order that class folders would give.

        Args:
            folder: Folder of the images, below root.
            files: File names by their stems.
        """
        stems, labels = self._official_labels()
        strange = sorted(set(files) - set(stems))
        if strange:
            raise DataError(
                f"{len(strange)} images in val have no label, the first is {files[strange[0]]}",
                where=str(self.root / folder),
                hint="val holds either class folders or the released files with the devkit's labels, not both",
            )
        order = np.lexsort((stems.astype(str), labels))
        rows = [(files.get(stems[row], f"{stems[row]}.JPEG"), self.synsets[labels[row]]) for row in order.tolist()]
        # The group is what the path would be in class folders, so that both layouts are one and the same data set.
        return (
            pa.array([f"{folder}{name}" for name, _ in rows], type=pa.large_string()),
            pa.array([f"val/{synset}/{name}" for name, synset in rows], type=pa.large_string()),
            labels[order],
        )

    def _official_labels(self) -> tuple[np.ndarray, np.ndarray]:
        """Stems, object (50,000,), and labels, int64, of the released validation images."""
        if (self.root / KAGGLE_LABELS).is_file():
            return kaggle_labels(self.root / KAGGLE_LABELS, self.synsets)
        if (self.root / DEVKIT).is_dir() or (self.root / f"{DEVKIT}.tar.gz").is_file():
            return devkit_labels(self.root, self.synsets)
        raise DataError(
            "val holds images without class folders, and there is no list of their labels",
            where=str(self.root),
            valid=f"{DEVKIT}/, {DEVKIT}.tar.gz or {KAGGLE_LABELS} in root",
            hint=f"fetch the development kit {DEVKIT}.tar.gz (2.5 MB) from https://image-net.org and put it into root",
        )


TABLES = ("imagenet-1k", "imagenet-21k-goog")
"""timm's tables of WordNet names, the later one counts."""


@cache
def synsets_1k() -> list[str]:
    """The 1,000 WordNet ids, ascending; from timm's tables."""
    from timm.data import ImageNetInfo

    return list(ImageNetInfo("imagenet-1k").label_names())


def synset_names(synsets: Sequence[str]) -> list[str]:
    """Class names: the WordNet id and its first lemma ("n01440764 tench"); the id alone where timm does not know it."""
    from timm.data import ImageNetInfo

    # The large table lacks one of the 1,000 (teddy); where both know a synset, its name stays what it was.
    tables = (ImageNetInfo(name).label_descriptions(detailed=False, as_dict=True) for name in TABLES)
    lemmas = {synset: words for table in tables for synset, words in table.items()}
    return [f"{synset} {lemmas.get(synset, '').split(',')[0]}".rstrip() for synset in synsets]


class ClassListing:
    """The images of class folders, sorted by class and file name.

    Attributes:
        folder: Folder that holds the class folders, below root.
        paths: Paths relative to root, Arrow large_string (N,); Python strings exist for one class at a time.
        counts: Images of every class, int64 (C,).
    """

    def __init__(self, folder: str, paths: Any, counts: np.ndarray) -> None:
        self.folder, self.paths, self.counts = folder, paths, counts

    @property
    def labels(self) -> np.ndarray:
        """Class of every image, int64 (N,)."""
        return np.repeat(np.arange(len(self.counts), dtype=np.int64), self.counts)

    def paths_below(self, prefix: str) -> Any:
        """Paths without their first characters, `prefix`."""
        return pc.utf8_slice_codeunits(self.paths, start=len(prefix)) if prefix else self.paths


def list_classes(root: Path, folder: str, synsets: Sequence[str], *, subset: bool = False) -> ClassListing:
    """List one folder a class.

    Args:
        root: Folder of the data set.
        folder: Folder that holds the class folders, below root, ending in "/".
        synsets: WordNet ids in index order.
        subset: Whether classes may be without a folder here.

    Raises:
        DataError: Folders of other classes, or classes without a folder.
    """
    found = set(synset_folders(root / folder))
    unknown, missing = sorted(found - set(synsets)), [synset for synset in synsets if synset not in found]
    if unknown:
        near = closest(unknown[0], synsets)
        raise DataError(
            f"{len(unknown)} folders are no class of this set: {shorten(unknown)}"
            + (f"; did you mean {near}?" if near else ""),
            where=str(root / folder),
            valid=synsets,
            hint="read another set of classes with ImageFolder",
        )
    if missing and not subset:
        raise DataError(
            f"{len(missing)} of {len(synsets):,} class folders are missing: {shorten(missing)}",
            where=str(root / folder),
            hint="complete the unpacking, or read a subset of the classes with ImageFolder",
        )
    parts = []
    for synset in synsets:
        names = sorted(image_files(root / folder / synset)) if synset in found else []
        parts.append(pa.array([f"{folder}{synset}/{name}" for name in names], type=pa.large_string()))
    return ClassListing(folder, pa.concat_arrays(parts), np.asarray([len(part) for part in parts], dtype=np.int64))


def synset_folders(folder: Path) -> list[str]:
    """Names of the folders in a folder, sorted; hidden ones are skipped."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir())


def image_files(folder: Path) -> list[str]:
    """Names of the image files in a folder by one listing, unsorted; hidden ones are skipped."""
    names = os.listdir(folder)
    return [name for name in names if name[name.rfind(".") :].lower() in IMAGE_EXTENSIONS and name[0] != "."]


def image_table(paths: Any, groups: Any, labels: np.ndarray, sizes: dict[str, int]) -> Table:
    """A table of Arrow columns whose splits are stretches of these sizes, in this order."""
    images = arrow_strings(paths)
    codes = np.repeat(np.asarray([SPLITS.index(split) for split in sizes], dtype=np.int8), list(sizes.values()))
    return Table(
        paths=images,
        labels=labels,
        groups=images if groups is paths else arrow_strings(groups),
        split=pd.Categorical.from_codes(codes, categories=list(SPLITS)),  # type: ignore[call-overload]
    )


def arrow_strings(values: Any) -> Any:
    """An Arrow array as the string column that `table.strings` gives, without a Python string a row."""
    return pd.arrays.ArrowStringArray(pa.chunked_array([values]))  # type: ignore[attr-defined]


def kaggle_labels(path: Path, synsets: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Stems and labels from Kaggle's table: an image, then its class before each of its boxes."""
    frame = readers.read_frame(path, ["ImageId", "PredictionString"])
    reject_rows(frame["ImageId"].duplicated(), frame["ImageId"], "image listed twice:", path)
    names = frame["PredictionString"].str.split(n=1).str[0].fillna("")
    labels = names.map({synset: label for label, synset in enumerate(synsets)})
    reject_rows(labels.isna(), names, "unknown class", path, valid=synsets)
    return frame["ImageId"].to_numpy(dtype=object), labels.to_numpy(dtype=np.int64)


def devkit_labels(root: Path, synsets: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Stems and labels from the development kit, as a folder or as the archive in `root`.

    The ground truth numbers classes 1 to 1,000 in an order of its own, which `meta.mat` translates to WordNet ids.
    """
    from scipy.io import loadmat

    truth_file, truth = _devkit_file(root, GROUND_TRUTH)
    meta_file, meta = _devkit_file(root, META)
    try:
        table = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        wordnet = dict(zip(table["ILSVRC2012_ID"].tolist(), table["WNID"].tolist(), strict=True))
    except Exception as error:  # loadmat raises whatever a damaged file runs into
        raise DataError(f"cannot read the devkit's classes: {error}", where=meta_file) from error
    place = {synset: label for label, synset in enumerate(synsets)}
    number = {str(key): place[name] for key, name in wordnet.items() if name in place}
    cells = pd.Series(truth.decode("ascii", "replace").split("\n")).str.strip()
    cells = cells.iloc[:-1] if len(cells) and cells.iloc[-1] == "" else cells
    labels = cells.map(number)
    bad = np.flatnonzero(labels.isna())
    if len(bad):
        raise DataError(
            f"class number {cells.iloc[bad[0]]!r} is out of range ({len(bad)} such lines)",
            where=f"{truth_file}, line {bad[0] + 1}",
            valid=f"1 to {len(synsets)}, as {META} lists them",
        )
    stems = np.asarray([f"ILSVRC2012_val_{row + 1:08d}" for row in range(len(labels))], dtype=object)
    return stems, labels.to_numpy(dtype=np.int64)


def _devkit_file(root: Path, name: str) -> tuple[str, bytes]:
    """A file of the development kit: (where it is, its bytes)."""
    path, archive = root / DEVKIT / name, root / f"{DEVKIT}.tar.gz"
    try:
        if path.is_file():
            return str(path), path.read_bytes()
        with tarfile.open(archive) as tar:
            member = tar.getmember(f"{DEVKIT}/{name}")
            content = tar.extractfile(member) if member.isreg() and member.size <= _DEVKIT_LIMIT else None
            if content is None:
                raise DataError(f"{name} is no file of the devkit's size", where=str(archive))
            return f"{archive}: {member.name}", content.read()
    except (OSError, EOFError, KeyError, tarfile.TarError) as error:
        raise DataError(
            f"cannot read {name} of the development kit: {error}",
            where=str(path if path.parent.is_dir() else archive),
            hint=f"fetch {DEVKIT}.tar.gz from https://image-net.org again",
        ) from error
