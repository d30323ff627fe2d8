"""The audit of one or two data sets: shared files, names, pictures and patients, and labels that go with provenance."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from datamodules.base import BaseDataModule
from datamodules.splits import crossing_groups, hash_unit
from studies.overlap import (
    Side,
    confirm,
    linked_patients,
    near_duplicates,
    open_side,
    same_files,
    same_ids,
    shared_patients,
)
from studies.provenance import counts, label_columns, provenance_table
from studies.source_probe import Probe, choose_rows, probe_source, thumbnails

PROVENANCE = ("source", "site", "scanner", "view")
"""Metadata columns that say where an image comes from or how it was taken."""

SET = "data set"
"""The provenance of an image in the audit of two data sets."""


@dataclass(frozen=True)
class Audit:
    """What was found.

    Attributes:
        sides: The data sets, one or two.
        same_files: Pairs of files with equal content; columns `PAIR`. Of many equal files each is paired with the first
            in every split.
        same_ids: Pairs of images with equal names; columns `PAIR`, `by` (path or name), `same_picture` (whether the
            fingerprints agree, None where they were not compared).
        near_duplicates: Pairs of pictures of which one is a copy; columns `PAIR`, `bits`, `correlation`.
        crossing: Patients of A in several splits, as "id (test, train)".
        patients: Patients that both sets have: `release`, `patient`, `splits_a`, `splits_b`, `leak`.
        provenance: Rows of `studies.provenance.provenance_table` with the column `set` before.
        contingency: Table of every flagged set, label and provenance, all splits together.
        probes: The set and what its images tell of each provenance.
        notes: What could not be compared, and why.
    """

    sides: list[Side]
    same_files: pd.DataFrame
    same_ids: pd.DataFrame
    near_duplicates: pd.DataFrame
    crossing: list[str]
    patients: pd.DataFrame
    provenance: pd.DataFrame
    contingency: dict[tuple[str, str, str], pd.DataFrame]
    probes: list[tuple[str, Probe]]
    notes: list[str]


def run_audit(
    a: BaseDataModule, b: BaseDataModule | None = None, *, images: int | None = None, probe: int = 1000, seed: int = 0
) -> Audit:
    """Look within A, across its splits, and between A and B.

    Args:
        a: A data set.
        b: Another one, or another preparation of the same.
        images: Images of each set that are fingerprinted, drawn at random; default all.
        probe: Images of each guess-the-source probe; 0 for none.
        seed: Seed of these draws.
    """
    notes: list[str] = []
    same_name = b is not None and a.name == b.name
    sides = [open_side(one, f"{letter}: {one.name}" if same_name else one.name) for letter, one in _given(a, b)]
    files = same_files(sides, notes)
    near = near_duplicates(sides, images, seed, notes)
    ids = confirm(same_ids(sides, notes), near, sides)
    first = sides[0]
    crossing = crossing_groups(first.patient, first.split)
    if not first.has_patients:
        notes.append(f"{first.label} names no patients: every image counts as its own.")
    found, contingency, probes = label_by_provenance(sides, near, probe, seed)
    return Audit(sides, files, ids, near, crossing, shared_patients(sides, notes), found, contingency, probes, notes)


def label_by_provenance(
    sides: Sequence[Side], near: pd.DataFrame, probe: int, seed: int
) -> tuple[pd.DataFrame, dict[tuple[str, str, str], pd.DataFrame], list[tuple[str, Probe]]]:
    """Tables of label by provenance of A, and of A and B together; and probes of the same provenances."""
    first = sides[0]
    table = first.datamodule.read_table()
    kinds = {
        name: np.asarray(table.metadata[name], dtype=object)[first.rows]
        for name in PROVENANCE
        if name in table.metadata
    }
    jobs = [(first.label, [first], _labels(first), kinds)]
    if len(sides) == 2:
        labels = [_labels(side) for side in sides]
        shared = [name for name in labels[0] if name in labels[1] and name != "class"]
        joined = {name: np.concatenate([columns[name] for columns in labels]) for name in shared}
        origin = np.repeat(np.array([side.label for side in sides], dtype=object), [len(side.rows) for side in sides])
        jobs.append((" + ".join(side.label for side in sides), list(sides), joined, {SET: origin}))
    frames, contingency, probes = [], {}, []
    for name, members, columns, provenances in jobs:
        patients = linked_patients(members, near if len(members) == len(sides) else near[near["within"] != ""])
        split = np.concatenate([side.split for side in members])
        halves = hash_unit(patients, "halves of an audit") < 0.5
        varied = {kind: values for kind, values in provenances.items() if len(pd.unique(values)) > 1}
        found = provenance_table(columns, varied, split, halves)
        frames.append(found.assign(set=name))
        for label, kind in found.loc[found["flagged"], ["label", "provenance"]].drop_duplicates().to_numpy():
            contingency[name, label, kind] = counts(columns[label], varied[kind])
        for kind, values in varied.items() if probe else ():
            if result := _probe(members, kind, values, patients, probe, seed):
                probes.append((name, result))
    table_of_all = pd.concat(frames, ignore_index=True)
    return table_of_all[["set", *table_of_all.columns.drop("set")]], contingency, probes


def _labels(side: Side) -> dict[str, np.ndarray]:
    return label_columns(side.datamodule.read_table().labels[side.rows], side.datamodule.class_names)


def _probe(
    sides: Sequence[Side], kind: str, values: np.ndarray, patients: np.ndarray, count: int, seed: int
) -> Probe | None:
    """Read a sample of images and probe them."""
    present = np.concatenate([side.present for side in sides])
    chosen = choose_rows(np.where(present, values, ""), patients, count, seed)
    ends = np.cumsum([len(side.rows) for side in sides])
    parts = [
        thumbnails(
            side.datamodule,
            side.rows[chosen[(chosen >= end - len(side.rows)) & (chosen < end)] - (end - len(side.rows))],
        )
        for side, end in zip(sides, ends, strict=True)
    ]
    images, readable = (np.concatenate(part) for part in zip(*parts, strict=True))
    chosen = chosen[readable]
    return probe_source(kind, images[readable], values[chosen], patients[chosen], seed)


def _given(a: BaseDataModule, b: BaseDataModule | None) -> list[tuple[str, BaseDataModule]]:
    return [("A", a)] if b is None else [("A", a), ("B", b)]
