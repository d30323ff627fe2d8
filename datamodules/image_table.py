"""Any data set of one's own: a folder tree, a CSV or a Parquet file, described by a config and no code."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from datamodules import dicom, readers
from datamodules.arguments import checked_window
from datamodules.base import BaseDataModule
from datamodules.errors import DataError, closest
from datamodules.label_space import Task
from datamodules.metadata import metadata_column
from datamodules.rows import reject_rows, repeated_rows
from datamodules.table import METADATA, Origin, Table, no_split, split_column, strings

ROLES = ("path", "label", "group", "split", *METADATA)


class ImageTable(BaseDataModule):
    """Images in a folder tree, or listed in a CSV or Parquet file.

    Without `table`, `root` holds one folder a class, below train, val and test where there are splits. With `table`,
    `columns` says which column is what. One label column holds class names (multi-class) or 0 / 1 (`task: binary`); a
    list of columns holds 1, 0 or blank = unknown for each label (multi-label).

    DICOM files (.dcm, .dicom) say more themselves: the roles group (PatientID), sex, age, view, scanner and date that
    `columns` does not map come from their tags. Set `mode: grey` for them.

    Args:
        table: CSV or Parquet file, relative to `root`; None for a folder tree.
        columns: Column of each role: path, label (one name, or a list), and optionally group (the patient), split, sex,
            age, view, scanner, site, date.
        class_names: Classes in index order. Default: the class folders, the values of the label column sorted, or the
            label columns.
        task: multiclass, binary or multilabel; default: multilabel for a list of columns, otherwise multiclass.
        mode: rgb, or grey for one channel.
        window: Intensities that become black and white in images deeper than 8 bits; of a DICOM file default its own.
        dataset_name: Name in results, key of the hashed test split, and default folder in `$FARSHOT_DATA`; default: the
            name of `root`.
        **kwargs: Arguments shared by all data sets.
    """

    name = "images"

    def __init__(
        self,
        *,
        table: str | None = None,
        columns: dict[str, str | list[str]] | None = None,
        class_names: list[str] | None = None,
        task: Task | None = None,
        mode: Literal["rgb", "grey"] = "rgb",
        window: tuple[float, float] | None = None,
        dataset_name: str | None = None,
        **kwargs: Any,
    ) -> None:
        if dataset_name is not None:
            self.name = dataset_name
        self.window = checked_window(window) if window is not None else None
        super().__init__(**kwargs)
        readers.require_folder(self.root, dataset_name or type(self).__name__)
        self.name = dataset_name or self.root.resolve().name  # type: ignore[misc]
        self.channels = 3 if mode == "rgb" else 1  # type: ignore[misc]
        self.table = self.root / table if table is not None else None
        self.columns = dict(columns or {})
        self._check_columns()
        label = self.columns.get("label")
        self.task = task or ("multilabel" if isinstance(label, list) else "multiclass")
        if isinstance(label, str) and self.task == "multilabel":
            raise DataError("a multi-label set needs a list of label columns", where="data.init_args.columns.label")
        self._folders = list(class_names or []) if self.table is None else []
        self.class_names = list(class_names) if class_names else self._find_classes()
        if self.task == "binary":
            if len(self.class_names) > 2:
                raise DataError(f"a binary task has no {len(self.class_names)} classes", valid="negative and positive")
            self.class_names = self.class_names[-1:]  # the positive one
        self.restrict_labels()

    def _check_columns(self) -> None:
        for role in self.columns:
            if role not in ROLES:
                near = closest(role, ROLES)
                raise DataError(
                    f"unknown role {role!r}" + (f"; did you mean {near!r}?" if near else ""),
                    where="data.init_args.columns",
                    valid=ROLES,
                )
        needed = {"path", "label"} - set(self.columns)
        if self.table is not None and needed:
            raise DataError(
                f"columns lacks {' and '.join(sorted(needed))}",
                where="data.init_args.columns",
                valid=readers.header(self.table) if self.table.suffix == ".parquet" and self.table.is_file() else ROLES,
            )
        if self.table is None and self.columns:
            raise DataError("columns needs a table", where="data.init_args.columns", hint="give data.init_args.table")

    def _find_classes(self) -> list[str]:
        if self.table is None:
            return readers.class_folders(self.root)
        label = self.columns["label"]
        frame = readers.read_frame(self.table, _names(label))
        if isinstance(label, list):
            return list(label)
        if self.task == "binary":
            return [label]
        texts = set(readers.text_column(frame[label]).unique()) - {""}
        names = sorted(texts, key=lambda name: (int(name) if name.isdigit() else -1, name))
        if len(names) < 2:
            raise DataError(
                f"label column {label!r} has {len(names)} classes",
                where=f"{self.table}, line 1",
                valid="2 or more",
            )
        return names

    @property
    def unnamed_releases(self) -> frozenset[str]:
        """This set: its name is that of a folder, or the user's choice."""
        return frozenset({self.release})

    def load_table(self) -> Table:
        """Read the folder listing or the table."""
        return self._load_tree() if self.table is None else self._load_file(self.table)

    def _load_tree(self) -> Table:
        folders = readers.class_folders(self.root)
        names = (self._folders if len(self._folders) == 2 else folders) if self.task == "binary" else self.space.own
        if self.task == "binary" and len(folders) != 2:
            raise DataError(f"a binary task needs two class folders, {self.root} has {len(folders)}", valid=folders)
        unknown = [folder for folder in folders if folder not in names]
        if unknown:
            raise DataError(
                f"class folder {unknown[0]!r} is not among class_names",
                where=str(self.root),
                valid=names,
            )
        paths, labels, split = readers.read_tree(self.root, names)
        if not paths:
            raise DataError(
                f"no images in {self.root}",
                where="data.init_args.root",
                valid=".jpg, .png, ... in class folders",
            )
        if self.task == "binary":
            labels = labels[:, None].astype(np.float32)
        tags = dicom.columns(self.root, paths)
        images = strings(paths)
        groups = strings(tags.pop("group")) if "group" in tags else images
        return Table(images, labels, groups, split_column(split), tags)

    def _load_file(self, path: Path) -> Table:
        roles = {role: _names(column) for role, column in self.columns.items()}
        # The labels first and by themselves: as text they would take a third of the memory of a large table.
        labels = self._read_labels(readers.read_frame(path, roles.pop("label")), str(path))
        frame = readers.read_frame(path, [name for names in roles.values() for name in names])
        images = readers.text_column(frame[roles["path"][0]])
        reject_rows(images == "", images, "a row without an image:", path)
        reject_rows(repeated_rows(images), images, "image listed twice:", path)
        split = self._read_split(frame[roles["split"][0]], path) if "split" in roles else no_split(len(frame))
        tags = dicom.columns(self.root, images.array, mapped=roles)
        paths = strings(images)
        groups = strings(tags.pop("group")) if "group" in tags else paths
        if "group" in roles:
            patients = readers.text_column(frame[roles["group"][0]])
            reject_rows(patients == "", patients, "a row without a group (patient):", path)
            groups = strings(patients)
        return Table(
            paths=paths,
            labels=labels,
            groups=groups,
            split=split,
            metadata=tags
            | {role: metadata_column(role, frame[names[0]]) for role, names in roles.items() if role in METADATA},
            origins=(Origin(path),),
        )

    def _read_labels(self, cells: pd.DataFrame, where: str) -> np.ndarray:
        if self.task == "multiclass":
            return readers.class_labels(cells.iloc[:, 0], self.space.own, where)
        return readers.binary_cells(cells, where)

    def _read_split(self, cells: "pd.Series[str]", path: Path) -> pd.Categorical:
        values = readers.text_column(cells).str.lower()
        known = {**readers.SPLIT_FOLDERS, "": ""}
        valid = [*readers.SPLIT_FOLDERS, "blank (unused)"]
        reject_rows(~values.isin(list(known)), cells, "unknown split", path, valid=valid)
        codes, texts = pd.factorize(values)
        return split_column(np.asarray([known[text] for text in texts], dtype=object)[codes])


def _names(column: str | list[str]) -> list[str]:
    return [column] if isinstance(column, str) else list(column)


class ImageFolder(ImageTable):
    """One folder a class, below train, val and test where there are splits.

    The folder case of `ImageTable` under the name people know; all its arguments hold.
    """
