"""Caltech Camera Traps, CCT-20: animals at camera locations, and how far a model carries to new ones."""

import json
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from datamodules.assignment import SplitSettings
from datamodules.base import BaseDataModule
from datamodules.errors import DataError, closest
from datamodules.table import Table, split_column, strings

ANNOTATIONS = "eccv_18_annotation_files"
IMAGE_FOLDERS = ("eccv_18_all_images_sm", "eccv_18_all_images")
PARTS = ("train", "cis_val", "cis_test", "trans_val", "trans_test")
EMPTY = "empty"
OBTAIN = (
    "from https://lila.science/datasets/caltech-camera-traps fetch eccv_18_annotations.tar.gz (3 MB) and "
    "eccv_18_all_images_sm.tar.gz (6.5 GB), unpack both, and set data.init_args.root to their folder"
)


class CameraTraps(BaseDataModule):
    """Caltech Camera Traps, CCT-20: 57,864 frames of 20 camera locations in the American Southwest, 15 classes.

    Source: https://lila.science/datasets/caltech-camera-traps (Beery, Van Horn and Perona 2018, Recognition in Terra
    Incognita, arXiv 1807.04975). JPEG of at most 1,024 px a side (`_sm`), day and night. Layout:
    `root/eccv_18_annotation_files/{train,cis_val,cis_test,trans_val,trans_test}_annotations.json` (COCO Camera Traps)
    and `root/eccv_18_all_images_sm/`.
    Classes: 14 animals and car, in the order of the release's category numbers. The release has a 16th category, empty,
    that train lacks: as in Entezari et al. 2023 (arXiv 2302.13602, 15 classes) empty frames are left out. Boxes are not
    used; a frame that shows several categories (78 of them) has no single label and is left out. Both are counted.
    Groups are locations, because a location's frames share their background; they are the metadata column site, too.
    Frames of one sequence resemble each other. So few-shot draws take any frames (`one_per_group: false`): ten training
    locations could not give five shots of a class otherwise.
    Split: official. `trans` (13,553 train, 1,725 validation, 23,275 test) has its validation at one location and its
    test at nine that train never sees. `cis` (13,553 / 3,484 / 15,827) tests at the training locations by design:
    result rows say that locations are in several splits. The other split's rows take no part. 224 sequences are both in
    train and in cis_val. Licence: Community Data License Agreement, permissive.

    Args:
        split: trans, at new locations, or cis, at the training locations.
        one_per_group: Few-shot draws take at most one image a location.
        **kwargs: Arguments shared by all data sets.
    """

    name = "camera_traps"
    task = "multiclass"
    class_names = (
        "opossum raccoon squirrel bobcat skunk dog coyote rabbit bird cat badger car deer fox rodent"  # 1 to 99
    ).split()

    def __init__(self, *, split: Literal["trans", "cis"] = "trans", one_per_group: bool = False, **kwargs: Any) -> None:
        self.split_choice = split
        super().__init__(one_per_group=one_per_group, **kwargs)

    @cached_property
    def _frames(self) -> pd.DataFrame:
        """All frames: id, file_name, location, date_captured, part, label (−1 = none), empty and several (bool)."""
        frames = pd.concat([self._read_part(part) for part in PARTS], ignore_index=True)
        twice = np.flatnonzero(frames["id"].duplicated())
        if len(twice):
            frame = frames.iloc[twice[0]]
            raise DataError(
                f"image {frame['id']} is listed twice ({len(twice)} such images)", where=str(self._file(frame["part"]))
            )
        return frames

    def _file(self, part: str) -> Path:
        return self.root / ANNOTATIONS / f"{part}_annotations.json"

    def _read_part(self, part: str) -> pd.DataFrame:
        path = self._file(part)
        content = read_annotations(path)
        images = _records(content, "images", ("id", "file_name", "location", "date_captured"), path)
        seen = _records(content, "annotations", ("image_id", "category_id"), path)
        categories = _records(content, "categories", ("id", "name"), path)
        names = seen["category_id"].map(dict(zip(categories["id"], categories["name"], strict=True)))
        numbers = names.map({**{name: label for label, name in enumerate(CameraTraps.class_names)}, EMPTY: -1})
        bad = np.flatnonzero(numbers.isna())
        if len(bad):
            name = names.iloc[bad[0]]
            shown = f"category {name!r}" if isinstance(name, str) else f"number {seen['category_id'].iloc[bad[0]]}"
            near = closest(name, CameraTraps.class_names) if isinstance(name, str) else None
            raise DataError(
                f"unknown class: {shown} ({len(bad)} such annotations)" + (f"; did you mean {near!r}?" if near else ""),
                where=f"{path}, annotations[{bad[0]}]",
                valid=[*CameraTraps.class_names, EMPTY],
            )
        stray = np.flatnonzero(~seen["image_id"].isin(images["id"]))
        if len(stray):
            raise DataError(
                f"an annotation of image {seen['image_id'].iloc[stray[0]]!r}, which is not listed ({len(stray)} such)",
                where=f"{path}, annotations[{stray[0]}]",
            )
        labels = numbers.groupby(seen["image_id"])
        least, most = (images["id"].map(extreme) for extreme in (labels.min(), labels.max()))
        return images.assign(
            part=part,
            label=most.where(least == most, -1).astype(np.int64),
            empty=(least == -1) & (most == -1),
            several=least.notna() & (least != most),
        )

    def load_table(self) -> Table:
        """Rows of train, cis_val, cis_test, trans_val and trans_test; those of the split not chosen are unused."""
        frames = self._frames
        folder = next((name for name in IMAGE_FOLDERS if (self.root / name).is_dir()), IMAGE_FOLDERS[0])
        splits = {"train": "train", f"{self.split_choice}_val": "validation", f"{self.split_choice}_test": "test"}
        locations = strings(frames["location"].astype(str))
        dates = frames["date_captured"].astype(str).str.extract(r"^(\d{4}-\d\d-\d\d)", expand=False).fillna("")
        return Table(
            paths=strings(f"{folder}/" + frames["file_name"].astype(str)),
            labels=frames["label"].to_numpy(),
            groups=locations,
            split=split_column(frames["part"].map(splits).fillna("")),
            metadata={"site": np.asarray(locations, dtype=object), "date": dates.to_numpy(dtype=object)},
        )

    def exclusions(self, table: Table) -> dict[str, np.ndarray]:
        """Frames without anything to name, and with too much."""
        return {
            "empty frame": self._frames["empty"].to_numpy(),
            "several categories in one frame": self._frames["several"].to_numpy(),
        }

    def assign(self, table: Table, settings: SplitSettings) -> tuple[Table, str]:
        """The official split chosen, or folds that hold locations together."""
        if settings.folds is not None and self.split_choice == "cis":
            raise DataError("split: cis has no folds", where="data.init_args.folds", hint="fold the trans split")
        table, policy = super().assign(table, settings)
        return table, f"{policy} {self.split_choice}" if settings.folds is None else policy

    def leaky_rows(self, table: Table) -> np.ndarray:
        """All rows under cis, which tests at the training locations."""
        return np.full(len(table), self.split_choice == "cis")


def read_annotations(path: Path) -> dict[str, Any]:
    """Read a COCO Camera Traps file.

    Raises:
        DataError: No such file, or it is cut off or no JSON object.
    """
    if not path.is_file():
        raise DataError(f"no {path.name} in {path.parent}", where="data.init_args.root", hint=OBTAIN)
    try:
        content = json.loads(path.read_bytes())
    except json.JSONDecodeError as error:
        raise DataError(
            f"the annotations are cut off or damaged: {error.msg}",
            where=f"{path}, line {error.lineno}, column {error.colno}",
            hint=OBTAIN,
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"the annotations are damaged: {error}", where=str(path), hint=OBTAIN) from error
    if not isinstance(content, dict):
        raise DataError("the annotations are no JSON object", where=str(path), hint=OBTAIN)
    return content


def _records(content: dict[str, Any], key: str, columns: tuple[str, ...], path: Path) -> pd.DataFrame:
    """A list of objects as a frame of these columns."""
    records = content.get(key)
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise DataError(f"no list {key!r} of objects", where=str(path), valid=f"keys {', '.join(content)}", hint=OBTAIN)
    frame = pd.DataFrame({column: [record.get(column) for record in records] for column in columns}, dtype=object)
    for column in columns:
        bad = np.flatnonzero(frame[column].isna())
        if len(bad) and column != "date_captured":  # a frame without a date is fine
            raise DataError(f"an entry without {column}", where=f"{path}, {key}[{bad[0]}]", valid=columns)
    return frame
