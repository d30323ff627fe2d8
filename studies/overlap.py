"""What two splits or two data sets have in common: equal files, names, pictures and patients."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from datamodules.base import BaseDataModule
from datamodules.exclusions import exclusion_flow, usable_rows
from datamodules.table import SPLITS
from studies.fingerprints import fingerprint_rows
from studies.near_duplicates import find_copies

MIN_DIGITS = 5  # in a file name: img_0001 may be anybody's, 00000061_012 is not
PAIR = ("set_a", "path_a", "split_a", "set_b", "path_b", "split_b", "leak")


@dataclass
class Side:
    """One data set in the audit: the rows that its settings use, in the order of its table.

    Attributes:
        datamodule: The data set.
        label: Its name, with "A: " or "B: " before it where both have the same.
        rows: Table rows in use, int64 (N,).
        split: Their splits, object (N,).
        release: The release that each image belongs to, object (N,); differs from `label` in mixtures and variants.
        image: Name of each image in its release, object (N,).
        patient: Name of each patient in its release, object (N,).
        present: Whether the image file is there, bool (N,).
        unused: Rows that the settings leave out.
        compared: Whether the picture was read and fingerprinted, bool (N,).
        unreadable: Images that could not be decoded.
    """

    datamodule: BaseDataModule
    label: str
    rows: np.ndarray
    split: np.ndarray
    release: np.ndarray
    image: np.ndarray
    patient: np.ndarray
    present: np.ndarray
    unused: int
    compared: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=bool))
    unreadable: list[str] = field(default_factory=list)

    @property
    def has_patients(self) -> bool:
        """Whether patients are known: without them every image is its own group."""
        return bool((self.patient != self.image).any())


def open_side(datamodule: BaseDataModule, label: str) -> Side:
    """Read the metadata of a data set and find the rows in use."""
    table = datamodule.read_table()
    split = np.asarray(table.split, dtype=object)
    rows = np.flatnonzero(usable_rows(table, exclusion_flow(datamodule.exclusion_reasons(table))) & (split != ""))
    names = datamodule.image_names(rows)
    return Side(
        datamodule=datamodule,
        label=label,
        rows=rows,
        split=split[rows],
        release=names.dataset,
        image=names.image,
        patient=names.group,
        present=~np.isin(rows, datamodule.missing_files(table, rows)),
        unused=len(table) - len(rows),
    )


# Equal files, names and pictures ---------------------------------------------------------------------------------


def same_files(sides: Sequence[Side], notes: list[str]) -> pd.DataFrame:
    """Find files of equal content within A and between A and B."""
    files: list[Path | None] = []
    for side in sides:
        found = side.datamodule.image_files(side.rows)
        files += [file[0] if file and there else None for file, there in zip(found, side.present, strict=True)]
        stored = sum(file is None for file in found)
        if stored:
            notes.append(f"{stored} images of {side.label} are no files of their own: only the pictures are compared.")
    keys = content_keys(files)
    return _pairs(sides, np.split(keys, [len(sides[0].rows)])[: len(sides)])


def content_keys(files: Sequence[Path | None]) -> np.ndarray:
    """Give files of equal content equal keys: object (N,), "" for a file that no other equals in size, or is None.

    Only files of equal size are read; the hash is blake2b.
    """
    sizes = pd.Series([_size(file) for file in files], dtype=np.int64)
    keys = np.full(len(files), "", dtype=object)
    for place in np.flatnonzero(sizes.duplicated(keep=False) & (sizes > 0)).tolist():
        keys[place] = _digest(Path(str(files[place])))  # a file that has a size is not None
    return keys


def _size(file: Path | None) -> int:
    try:
        return file.stat().st_size if file is not None else 0
    except OSError:  # a link that leads nowhere is in the listing of its folder
        return 0


def _digest(file: Path) -> str:
    try:
        return hashlib.blake2b(file.read_bytes()).hexdigest()
    except OSError:  # counted as unreadable when its picture is compared
        return ""


def same_ids(sides: Sequence[Side], notes: list[str]) -> pd.DataFrame:
    """Find images of equal name: listed twice in A; in A and B the path in one release, or a distinctive file name."""
    by_path = _pairs(sides, [np.asarray(side.release + "/" + side.image, dtype=object) for side in sides])
    found = [by_path.assign(by="path")]
    if len(sides) == 2:
        stems = [distinctive_names(side.image) for side in sides]
        for side, names in zip(sides, stems, strict=True):
            if vague := int((names == "").sum()):
                notes.append(
                    f"{vague} of {len(names)} file names of {side.label} are not distinctive (repeated within the set, "
                    f"running numbers, or of fewer than {MIN_DIGITS} digits) and are not compared."
                )
        by_name = _pairs(sides, stems)
        found.append(by_name[by_name["within"] == ""].assign(by="name"))
    return pd.concat(found).drop_duplicates(["row_a", "row_b", "within"], ignore_index=True)


def distinctive_names(images: np.ndarray) -> np.ndarray:
    """Last path components without extension, lower case, object (N,); "" where another set may use them by chance."""
    names = pd.Series([str(image).rpartition("/")[2].lower() for image in images], dtype=object)
    stems = names.str.replace(r"\.[^.]*$", "", regex=True)
    vague = stems.duplicated(keep=False) | stems.str.isdigit() | (stems.str.count(r"\d") < MIN_DIGITS)
    return stems.mask(vague, "").to_numpy(dtype=object)


def near_duplicates(sides: Sequence[Side], images: int | None, seed: int, notes: list[str]) -> pd.DataFrame:
    """Find copies of pictures within A and between A and B."""
    prints, places = [], []
    for side in sides:
        chosen = np.flatnonzero(side.present)
        if images is not None and images < len(chosen):
            notes.append(f"{images} of {len(chosen)} images of {side.label} were compared: there may be more copies.")
            chosen = np.sort(np.random.default_rng(seed).permutation(chosen)[:images])
        found = fingerprint_rows(side.datamodule, side.rows[chosen])
        side.compared = np.zeros(len(side.rows), dtype=bool)
        side.compared[chosen[found.readable]] = True
        side.unreadable = [str(side.image[place]) for place in chosen[~found.readable]]
        prints.append(found)
        places.append(chosen)
    frames = [_placed(find_copies(prints[0]), places[0], places[0], sides[0].label)]
    if len(sides) == 2:
        frames.append(_placed(find_copies(prints[0], prints[1]), places[0], places[1], ""))
    return _described(sides, pd.concat(frames, ignore_index=True))


def _placed(copies: pd.DataFrame, places_a: np.ndarray, places_b: np.ndarray, within: str) -> pd.DataFrame:
    rows_a, rows_b = copies["row_a"].to_numpy(dtype=np.int64), copies["row_b"].to_numpy(dtype=np.int64)
    return copies.assign(row_a=places_a[rows_a], row_b=places_b[rows_b], within=within)


def confirm(ids: pd.DataFrame, near: pd.DataFrame, sides: Sequence[Side]) -> pd.DataFrame:
    """Add `same_picture` to pairs of equal name, None where either picture was not compared.

    Where most of the compared pairs show different pictures the names agree by chance: these are no leaks then. Where
    most are the same, the search for copies has missed some.
    """
    keys = ["row_a", "row_b", "within"]
    pictures = pd.MultiIndex.from_frame(near[keys])
    same = pd.MultiIndex.from_frame(ids[keys]).isin(pictures)
    inside, rows_b = (ids["within"] != "").to_numpy(dtype=bool), ids["row_b"].to_numpy(dtype=np.int64)
    compared = sides[0].compared[ids["row_a"].to_numpy(dtype=np.int64)]
    compared[inside] &= sides[0].compared[rows_b[inside]]
    compared[~inside] &= sides[-1].compared[rows_b[~inside]]
    by_chance = compared & ~same if same[compared].sum() * 2 < compared.sum() else np.zeros(len(ids), dtype=bool)
    judged = same.astype(object)
    judged[~compared] = None
    return ids.assign(same_picture=judged, leak=ids["leak"].to_numpy(dtype=bool) & ~by_chance)


def _pairs(sides: Sequence[Side], keys: Sequence[np.ndarray]) -> pd.DataFrame:
    """Pairs of rows with equal keys ("" = none), each row with the first of every split."""
    frames = [
        pd.DataFrame({"key": key, "split": side.split, "row": np.arange(len(key))})[key != ""]
        for side, key in zip(sides, keys, strict=True)
    ]
    firsts = frames[0].drop_duplicates(["key", "split"])[["key", "row"]]
    found = []
    for number, frame in enumerate(frames):
        pairs = firsts.merge(frame, on="key", suffixes=("_a", "_b"))[["row_a", "row_b"]]
        if number == 0:  # within A: every pair once
            ordered = np.sort(pairs.to_numpy(), axis=1)
            pairs = pd.DataFrame(ordered[ordered[:, 0] < ordered[:, 1]], columns=["row_a", "row_b"]).drop_duplicates()
        found.append(pairs.assign(within=sides[0].label if number == 0 else ""))
    return _described(sides, pd.concat(found, ignore_index=True))


def _described(sides: Sequence[Side], pairs: pd.DataFrame) -> pd.DataFrame:
    """Add the columns of `PAIR`; `within` is the set that holds both rows, "" = one is A's and the other B's.

    A pair within A is turned so that the splits come in their order: train, validation, test.
    """
    a, b = sides[0], sides[-1]
    rows = pairs[["row_a", "row_b"]].to_numpy(dtype=np.int64, copy=True)
    inside = (pairs["within"] != "").to_numpy(dtype=bool)
    order = np.array([SPLITS.index(split) for split in a.split], dtype=np.int64)
    turn = inside.copy()
    turn[inside] = order[rows[inside, 0]] > order[rows[inside, 1]]
    rows[turn] = rows[turn, ::-1]

    def other(values_a: np.ndarray, values_b: np.ndarray) -> np.ndarray:
        found = np.empty(len(rows), dtype=object)
        found[inside], found[~inside] = values_a[rows[inside, 1]], values_b[rows[~inside, 1]]
        return found

    split_a, split_b = a.split[rows[:, 0]], other(a.split, b.split)
    return pairs.assign(
        row_a=rows[:, 0],
        row_b=rows[:, 1],
        set_a=a.label,
        path_a=a.image[rows[:, 0]],
        split_a=split_a,
        set_b=np.where(inside, a.label, b.label),
        path_b=other(a.image, b.image),
        split_b=split_b,
        leak=is_leak(split_a, split_b),
    )


def is_leak(split_a: np.ndarray, split_b: np.ndarray) -> np.ndarray:
    """Whether one of two splits is the test set and the other takes part in training or selection, bool (N,)."""
    return np.asarray((split_a == "test") != (split_b == "test"), dtype=bool)


# Patients ----------------------------------------------------------------------------------------------------------


def shared_patients(sides: Sequence[Side], notes: list[str]) -> pd.DataFrame:
    """Find patients that A and B share; only releases that both hold have comparable ids."""
    columns = ["release", "patient", "splits_a", "splits_b", "leak"]
    if len(sides) < 2:
        return pd.DataFrame(columns=columns)
    common = set(sides[0].release) & set(sides[1].release)
    if not common:
        notes.append(f"Patient ids of {sides[0].label} and {sides[1].label} are not comparable: different releases.")
        return pd.DataFrame(columns=columns)
    frames = []
    for side in sides:
        frame = pd.DataFrame({"release": side.release, "patient": side.patient, "splits": side.split})
        frame = frame[frame["release"].isin(common)].drop_duplicates()
        frames.append(frame.sort_values("splits").groupby(["release", "patient"], sort=False)["splits"].agg(", ".join))
    shared = pd.concat(frames, axis=1, join="inner", keys=["splits_a", "splits_b"]).reset_index()
    tests = [shared[name].str.split(", ").map(set) for name in ("splits_a", "splits_b")]
    leak = [
        bool((("test" in a) and (b - {"test"})) or (("test" in b) and (a - {"test"})))
        for a, b in zip(*tests, strict=True)
    ]
    return shared.assign(leak=np.array(leak, dtype=bool))[columns]


def linked_patients(sides: Sequence[Side], near: pd.DataFrame) -> np.ndarray:
    """Patients of all sides below each other, texts (N,), those with copies of one picture taken as one.

    In cross-validation a copy on the other side of a fold would be recognised, not understood.
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    codes, names = pd.factorize(np.concatenate([side.release + "/" + side.patient for side in sides]))
    inside = near["within"].to_numpy() != ""
    shift = np.where(inside, 0, len(sides[0].rows))
    first, second = codes[near["row_a"].to_numpy()], codes[near["row_b"].to_numpy() + shift]
    links = coo_matrix((np.ones(len(near)), (first, second)), shape=(len(names), len(names)))
    components = connected_components(links, directed=False)[1]
    return np.asarray(components[codes].astype(str), dtype=object)
