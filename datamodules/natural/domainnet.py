"""DomainNet: one of its domains, by the official lists of the cleaned release."""

from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from datamodules.base import BaseDataModule
from datamodules.errors import DataError, closest
from datamodules.natural.torchvision_set import read_lines
from datamodules.table import Origin, Table, split_column, strings

OBTAIN = (
    "from https://ai.bu.edu/M3SDA (cleaned version) fetch {domain}.zip, {domain}_train.txt and {domain}_test.txt, "
    "unpack the archive as root/{domain}/ with the lists beside it, and set data.init_args.root"
)


class DomainNet(BaseDataModule):
    """DomainNet, real or clipart: 345 classes of things, seen as photos or as clip art.

    Source: https://ai.bu.edu/M3SDA (Peng et al. 2019, arXiv 1812.01754), the cleaned version, whose duplicates are
    removed: 172,947 photos (5.6 GB) and 48,129 clip arts (1.3 GB), JPEG and PNG of many sizes. Layout:
    `root/real/<class>/*.jpg` and `root/real_train.txt`, `root/real_test.txt` with a line an image
    ("real/aircraft_carrier/real_001_000001.jpg 0"); likewise clipart. Both domains share a root, by default
    `$FARSHOT_DATA/domainnet`.
    Classes: the lists' numbers; a name is the class folder's, and all lines of both lists have to agree on it. Split:
    official, by the lists (70 % / 30 %); images that no list names take no part. Validation is carved from train. One
    group an image. Licence: copyrighted images from web search under a fair use notice, for academic research.

    Args:
        domain: real or clipart.
        **kwargs: Arguments shared by all data sets.
    """

    name = "domainnet"
    task = "multiclass"

    def __init__(self, *, domain: Literal["real", "clipart"] = "real", **kwargs: Any) -> None:
        self.domain = domain
        super().__init__(**kwargs)
        self.name = f"domainnet_{domain}"  # type: ignore[misc]  # only now: both domains share the default root
        self.class_names = self._find_classes()
        self.restrict_labels()

    @cached_property
    def _lists(self) -> dict[str, tuple[Path, pd.DataFrame]]:
        """Official lists by split: the file, and its lines as image (its path), class folder and class number."""
        files = {split: self.root / f"{self.domain}_{split}.txt" for split in ("train", "test")}
        for path in files.values():
            if not path.is_file():
                raise DataError(f"no list {path.name} in {self.root}", where="data.init_args.root", hint=self.obtain)
        pattern = rf"(?P<image>{self.domain}/(?P<folder>[^/]+)/[^/]+) (?P<number>\d{{1,5}})"
        valid = f"{self.domain}/CLASS/FILE and a class number"
        lists = {split: (path, read_lines(path, pattern, valid, self.obtain)) for split, path in files.items()}
        return {split: (path, lines.astype({"number": np.int64})) for split, (path, lines) in lists.items()}

    @property
    def obtain(self) -> str:
        """How to obtain the files, for messages."""
        return OBTAIN.format(domain=self.domain)

    def _find_classes(self) -> list[str]:
        path, train = self._lists["train"]
        classes = train.drop_duplicates(["number", "folder"]).sort_values("number")
        doubled = classes[classes.duplicated("number") | classes.duplicated("folder")]
        if len(doubled):
            line, row = int(doubled.index[0]), doubled.iloc[0]
            _stop_at(path, line, f"class {row['folder']!r} has the number {row['number']}, other lines say otherwise")
        gaps = sorted(set(range(int(classes["number"].max()) + 1)) - set(classes["number"]))
        if gaps:
            raise DataError(
                f"no image of class number {gaps[0]} ({len(gaps)} such numbers)",
                where=str(path),
                hint=f"the list may be cut off: {self.obtain}",
            )
        return [str(name) for name in classes["folder"]]

    def load_table(self) -> Table:
        """Rows of the train list, then of the test list."""
        number = {name: label for label, name in enumerate(self.space.own)}
        for path, lines in self._lists.values():
            expected = lines["folder"].map(number)
            bad = np.flatnonzero(expected != lines["number"])
            if len(bad):
                folder, found = lines["folder"].iloc[bad[0]], lines["number"].iloc[bad[0]]
                near = closest(folder, number) if folder not in number else None
                _stop_at(
                    path,
                    int(bad[0]),
                    (f"class {folder!r} has the number {found}, the train list says {number[folder]}")
                    if folder in number
                    else f"class {folder!r} is not in the train list" + (f"; did you mean {near!r}?" if near else ""),
                )
        (train_path, train), (test_path, test) = self._lists.values()
        paths = pd.concat([train["image"], test["image"]], ignore_index=True)
        origins = (Origin(train_path, 0, 1), Origin(test_path, len(train), 1))
        twice = np.flatnonzero(paths.duplicated())
        if len(twice):
            raise DataError(
                f"image {paths.iloc[twice[0]]!r} is listed twice ({len(twice)} such lines)",
                where=origins[int(twice[0] >= len(train))].place(int(twice[0])),
                hint="lists of the uncleaned release have duplicates: fetch those of the cleaned version",
            )
        images = strings(paths)
        return Table(
            paths=images,
            labels=np.concatenate([train["number"], test["number"]]).astype(np.int64),
            groups=images,
            split=split_column(np.repeat(["train", "test"], [len(train), len(test)])),
            origins=origins,
        )


def _stop_at(path: Path, row: int, problem: str) -> None:
    raise DataError(problem, where=f"{path}, line {row + 1}", hint="fetch the official list again")
