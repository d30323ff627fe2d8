"""What the targets that torchvision downloads share: where their files lie, how to obtain them, how lists are read."""

import warnings
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from datamodules import readers
from datamodules.base import BaseDataModule
from datamodules.errors import DataError, closest, shorten
from datamodules.table import Origin, Table, concatenate, split_column, strings


class TorchvisionSet(BaseDataModule):
    """A set that torchvision downloads. A subclass states facts and implements `load_table`.

    torchvision fetches, verifies and unpacks; the annotations are read here, since its readers name no line, and some
    of them trust a listing or a folder's mere existence.

    Args:
        download: Fetch the archives with torchvision, md5 checked, where files are missing.
        **kwargs: Arguments shared by all data sets.
    """

    task = "multiclass"
    reader: ClassVar[str]
    """Name of torchvision's class."""
    archives: ClassVar[tuple[str, ...]]
    """Addresses of what torchvision fetches."""
    homes: ClassVar[tuple[str, ...]]
    """Folders below `root` where the files may be: torchvision's first, then those of archives unpacked by hand."""

    def __init__(self, *, download: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.download = download

    @property
    @abstractmethod
    def required(self) -> Sequence[str]:
        """Files and folders that the set's folder has to hold."""

    @property
    def folder(self) -> Path:
        """The set's folder, one of `homes`.

        Raises:
            DataError: None of them holds all that is required.
        """
        home, missing = self._best_home()
        if not missing:
            return self.root / home
        partial = len(missing) < len(self.required)
        state = f"lacks {shorten(missing, 4)}" if partial else "is not there"
        first = "complete this folder or move it away, then " if partial else ""
        raise DataError(
            f"no usable {self.name}: {self.root / home} {state}",
            where="data.init_args.root (default: $FARSHOT_DATA/<data set>)",
            valid=[str(self.root / home) for home in self.homes],
            hint=f"{first}set --data.init_args.download true, or {self.obtain}",
        )

    @property
    def prefix(self) -> str:
        """The set's folder relative to `root`, as paths of the table begin: "dtd/dtd/", or empty for `root` itself."""
        home = self.folder.relative_to(self.root).as_posix()
        return "" if home == "." else f"{home}/"

    def _best_home(self) -> tuple[str, list[str]]:
        """The folder that holds most of what is required, and what it lacks."""
        lacking = {
            home: [part for part in self.required if not (self.root / home / part).exists()] for home in self.homes
        }
        home = min(lacking, key=lambda home: len(lacking[home]))
        return home, lacking[home]

    @property
    def obtain(self) -> str:
        """How to obtain the files by hand, for messages."""
        return f"fetch {' and '.join(self.archives)} and unpack in {self.root / Path(self.homes[0]).parts[0]}"

    def prepare_data(self) -> None:
        """Download the archives and check their md5 sums, where `download` says so and files are missing.

        Raises:
            DataError: The download failed.
        """
        if not self.download or not self._best_home()[1]:
            return
        import torchvision.datasets

        try:
            # A list that is not there: torchvision takes folders for complete; `folder` says what they lack.
            with suppress(FileNotFoundError):
                getattr(torchvision.datasets, self.reader)(self.root, download=True)
        except (OSError, RuntimeError) as error:  # URLError is an OSError; a wrong md5 a RuntimeError
            raise DataError(
                f"cannot download {self.name}: {error}",
                where=str(self.root),
                hint=f"where there is a network, {self.obtain}",
            ) from error

    def read_lists(self, lists: Mapping[str, str], pattern: str, names: Sequence[str], valid: str) -> Table:
        r"""Read the official lists, a line an image, into one table; an image is `images/<image>.jpg`, its own group.

        Args:
            lists: List files relative to the set's folder, and their splits.
            pattern: Regular expression of a line, with the groups `image`, `class_name` and optionally `number`: the
                class's number, from 1, which has to agree with its name.
            names: Classes in index order, as the lists spell them.
            valid: What a line looks like, for messages.

        Raises:
            DataError: A missing, unreadable or empty list, a line of another form, an unknown class, a wrong class
                number, or an image that is listed twice; with file and line.
        """
        tables = []
        for name, split in lists.items():
            path = self.folder / name
            lines = read_lines(path, pattern, valid)
            labels = readers.class_labels(lines["class_name"].tolist(), names, str(path), line=1)
            wrong = np.flatnonzero(lines["number"].astype(int) != labels + 1) if "number" in lines else labels[:0]
            if len(wrong):
                row = int(wrong[0])
                number, class_name = lines["number"].iloc[row], lines["class_name"].iloc[row]
                raise DataError(
                    f"class number {number} does not belong to {class_name!r} ({len(wrong)} such lines)",
                    where=f"{path}, line {row + 1}",
                    valid=f"{labels[row] + 1}",
                )
            paths = f"{self.prefix}images/" + lines["image"] + ".jpg"
            split_of_all = split_column(np.full(len(lines), split, dtype=object))
            origin = Origin(path, first_line=1)
            tables.append(Table(strings(paths), labels, strings(lines["image"]), split_of_all, origins=(origin,)))
        table = concatenate(tables)
        twice = np.flatnonzero(pd.Series(table.groups).duplicated())
        if len(twice):
            raise DataError(
                f"image {table.groups[twice[0]]!r} is listed twice ({len(twice)} such lines)",
                where=table.where(int(twice[0])),
                hint="the lists hold every image once: fetch them again",
            )
        return table

    def read_class_folders(self, size: int, ignored: Sequence[str] = ()) -> Table:
        """Read a tree of class folders without lists or official split: JPEG files, sorted; a group is class and stem.

        Args:
            size: Number of images in the release, in which a half-unpacked archive shows.
            ignored: Folders of the release that are no classes.

        Raises:
            DataError: A folder that is no class, or another number of images than the release has.
        """
        names, folder = self.space.own, self.folder
        unknown = [name for name in readers.class_folders(folder) if name not in {*names, *ignored}]
        if unknown:
            near = closest(unknown[0], names)
            raise DataError(
                f"{self.name} has no class {unknown[0]!r}" + (f"; did you mean {near!r}?" if near else ""),
                where=str(folder),
                valid=names,
                hint="read images of one's own with ImageFolder",
            )
        files, labels, _ = readers.read_tree(folder, names)
        images = pd.Series(files, dtype=object)
        jpeg = images.str.endswith(".jpg").to_numpy(dtype=bool)
        images, labels = images[jpeg], labels[jpeg]
        self._check_size(len(images), size)
        return Table(
            paths=strings(self.prefix + images),
            labels=labels,
            groups=strings(images.str.removesuffix(".jpg")),  # the same in every layout, and with it the test set
            split=split_column(np.full(len(images), "", dtype=object)),
        )

    def _check_size(self, found: int, size: int) -> None:
        if found == size:
            return
        problem = f"{self.name} has {found:,} JPEG images here, the release has {size:,}"
        if found > size or self.missing_images == "error":
            go_on = ", or go on with what is there by --data.missing_images drop" if found < size else ""
            raise DataError(problem, where=str(self.folder), hint=self.obtain + go_on)
        warnings.warn(f"{problem}; going on with what is there", stacklevel=2)


def read_lines(path: Path, pattern: str, valid: str, hint: str = "fetch it again") -> pd.DataFrame:
    """Read a list: a row a line, a column each named group of `pattern`; arguments and errors as in `read_lists`."""
    try:
        lines = pd.Series(path.read_text(encoding="utf-8-sig").split("\n"), dtype=object).str.rstrip()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read a list: {error}", where=str(path), hint=hint) from error
    if lines.iloc[-1] == "":
        lines = lines.iloc[:-1]
    if not len(lines):
        raise DataError("a list is empty", where=str(path), hint=hint)
    parts = lines.str.extract(rf"^{pattern}$")
    bad = np.flatnonzero(parts["image"].isna())
    if len(bad):
        raise DataError(
            f"a line is {lines.iloc[bad[0]][:80]!r} ({len(bad)} such lines)",
            where=f"{path}, line {bad[0] + 1}",
            valid=valid,
            hint=f"the list may be cut off or damaged: {hint}",
        )
    return parts
