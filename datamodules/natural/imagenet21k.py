"""ImageNet-21k: a folder tree by WordNet id, of any release."""

import re
import warnings
from typing import Any

import numpy as np
import pyarrow as pa

from datamodules.base import BaseDataModule
from datamodules.errors import DataError, shorten
from datamodules.natural.imagenet import image_table, list_classes, synset_folders, synset_names
from datamodules.table import Table

TRAIN = ("train/", "imagenet21k_train/", "")
VAL = ("val/", "imagenet21k_val/")
OBTAIN = (
    "accept the terms at https://image-net.org, fetch fall11_whole.tar (1.3 TB) or winter21_whole.tar.gz (1.1 TB), "
    "unpack each class archive into a folder of its name (root/n00004475/*.JPEG), and set data.init_args.root"
)


class ImageNet21k(BaseDataModule):
    """ImageNet-21k: all of ImageNet, up to 14,197,122 photos of 21,841 WordNet synsets.

    Source: https://image-net.org (Deng et al. 2009). Releases: fall11 (21,841 classes, 14,197,122 images), winter21
    (19,167 classes, 13,153,500), and winter21 as processed by Ridnik et al. 2021 (arXiv 2104.10972; 10,450 classes,
    11,060,223 train and 522,500 val). Any of them, or any part, is read: the class folders that are there are the
    classes. Layout: `root/<WordNet id>/*.JPEG`, or below `train/` and `val/` (also `imagenet21k_train/` and
    `imagenet21k_val/`, as the processed release names them).
    Classes: WordNet ids in ascending order; a name is the id and its first lemma ("n01440764 tench"), the same as in
    ImageNet-1k. A class whose folder is empty keeps its output, with a counted warning, so that taking images out never
    renumbers the others.
    Split: a val folder, where there is one, is the test set, as in ImageNet-1k; its classes may be fewer than train's.
    Otherwise the test set is a fixed hash of the image. One group an image. The 1,000 classes of ImageNet-1k are part
    of fall11. Licence: non-commercial research and education, by the terms of access.

    Args:
        val_fraction: Share of the training images for validation: about 71,000 of fall11.
        test_fraction: Share of the images in the hashed test set: about 71,000 of fall11, three a class, whose accuracy
            has a standard error below 0.2 points; 15 % as elsewhere would cost two million training images.
        **kwargs: Arguments shared by all data sets.
    """

    name = "imagenet21k"
    task = "multiclass"

    def __init__(self, *, val_fraction: float = 0.005, test_fraction: float = 0.005, **kwargs: Any) -> None:
        super().__init__(val_fraction=val_fraction, test_fraction=test_fraction, **kwargs)
        if not self.root.is_dir():
            raise DataError(f"no folder {self.root} for {self.name}", where="data.init_args.root", hint=OBTAIN)
        self.train_folder = next(folder for folder in TRAIN if (self.root / folder).is_dir())
        self.synsets = synset_folders(self.root / self.train_folder)
        strange = [folder for folder in self.synsets if not re.fullmatch(r"n\d{8}", folder)]
        if strange or not self.synsets:
            raise DataError(
                f"{len(strange)} folders are named by no WordNet id: {shorten(strange)}"
                if strange
                else "no class folders of ImageNet-21k",
                where=str(self.root / self.train_folder),
                valid="n and eight digits, such as n01440764",
                hint="move other folders out" if strange else OBTAIN,
            )
        self.class_names = synset_names(self.synsets)
        self.restrict_labels()

    def load_table(self) -> Table:
        """List one folder a class; rows by split, class and file name."""
        train = list_classes(self.root, self.train_folder, self.synsets)
        empty = [synset for synset, count in zip(self.synsets, train.counts, strict=True) if not count]
        if len(empty) == len(self.synsets):
            raise DataError("no images in any class folder", where=str(self.root / train.folder), hint=OBTAIN)
        if empty:
            warnings.warn(
                f"{self.name}: {len(empty)} of {len(self.synsets)} classes have no image, such as {empty[0]} in "
                f"{self.root / train.folder}; they keep their outputs",
                stacklevel=2,
            )
        val = next((folder for folder in VAL if self.train_folder and (self.root / folder).is_dir()), None)
        groups = train.paths_below(self.train_folder)  # the hashed test set is the same whatever the folder's name
        if val is None:
            return image_table(train.paths, groups, train.labels, {"": len(train.labels)})
        test = list_classes(self.root, val, self.synsets, subset=True)
        return image_table(
            pa.concat_arrays([train.paths, test.paths]),
            pa.concat_arrays([groups, test.paths]),
            np.concatenate([train.labels, test.labels]),
            {"train": len(train.labels), "test": len(test.labels)},
        )

    def missing_files(self, table: Table, rows: np.ndarray) -> np.ndarray:
        """None: the table is a listing of the files that are there."""
        return rows[:0]
