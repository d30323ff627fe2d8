"""Several chest X-ray sets as one: label spaces merged, each source split by itself, sampled as asked."""

import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from datamodules import ontology
from datamodules.alignment import align_labels
from datamodules.assignment import SplitSettings
from datamodules.base import BaseDataModule
from datamodules.errors import DataError
from datamodules.table import ImageNames, Table, concatenate, strings

OWN_ARGUMENTS = ("self", "root", "missing_images", "cache_gb", "leaks", "transform", "image_size")
"""Shared arguments that a source of a mixture may set, or whose values are of no consequence there."""


class ChestXrayMixture(BaseDataModule):
    """Any chest X-ray sets, merged: the pre-training sources of paper A and their controls.

    Each source keeps its own root, views, label policies and split choice; everything else (batch, validation share,
    shots, ...) is set here and holds for all. Every source is split by itself, so its test set is the one that it has
    alone. The table's column `source` holds each row's set, its groups and paths start with the set's name, and result
    rows come with each source's own metrics (subgroup source=NAME).

    Source: the data cards of its parts, whose licences hold. Classes: the labels that all sources annotate
    (intersection, as in paper A: data and label space then change together) or that any does (union, where a label that
    a source does not annotate is unknown), in alphabetical order.

    Args:
        sources: Configurations of the single sets: class_path and init_args each.
        merge: intersection or union of the label names.
        sampling: How often training sees each source: by size (every image once an epoch), uniform (equal shares), or
            temperature (share ∝ size^(1/temperature); 1 = by size, large = uniform).
        temperature: See sampling.
        image_size: Side of the images that the model sees, pixels.
        transform: Transform policy by name.
        **kwargs: Arguments shared by all data sets.
    """

    task = "multilabel"
    channels: ClassVar[Literal[1, 3]] = 1

    def __init__(
        self,
        *,
        sources: list[BaseDataModule],
        merge: Literal["intersection", "union"] = "intersection",
        sampling: Literal["size", "uniform", "temperature"] = "size",
        temperature: float = 2.0,
        image_size: int = 224,
        transform: str = "chest_xray",
        **kwargs: Any,
    ) -> None:
        self.sources, self.merge, self.sampling, self.temperature = list(sources), merge, sampling, temperature
        _check_sources(self.sources)
        # What `predict` reads deep images by; each source reads its own files by its own.
        self.window = next((source.window for source in self.sources if source.window is not None), None)
        self.name = "+".join(source.name for source in self.sources)
        self.class_names = ontology.merge([source.own_class_names for source in self.sources], merge)
        if not self.class_names:
            raise DataError(
                f"no label is annotated by all of {self.name}",
                where="data.init_args.merge",
                hint="merge: union keeps every label",
            )
        super().__init__(image_size=image_size, transform=transform, **kwargs)
        for source in self.sources:
            source.cache = self.cache
        if temperature <= 0:
            raise DataError(f"temperature: {temperature} is out of range", where="data.init_args", valid="above 0")
        if self.balance and sampling != "size":
            raise DataError("balance and sampling exclude each other", where="data.init_args", hint="give one of them")

    # The table ---------------------------------------------------------------------------------------------------

    def load_table(self) -> Table:
        """All sources' rows below each other, splits not yet assigned."""
        return self._merged([source.raw_table for source in self.sources])

    def assigned_table(self, settings: SplitSettings) -> tuple[Table, str]:
        """Split every source by itself and resolve its labels by its own policies."""
        assigned = [source.assigned_table(settings) for source in self.sources]
        tables = [table for table, _ in assigned]
        self._tables = {source.name: table for source, table in zip(self.sources, tables, strict=True)}
        policies = dict.fromkeys(policy for _, policy in assigned)
        named = [f"{source.name}: {policy}" for source, (_, policy) in zip(self.sources, assigned, strict=True)]
        return self._merged(tables), next(iter(policies)) if len(policies) == 1 else "; ".join(named)

    @property
    def all_labels_used(self) -> bool:
        """Not where only the labels that all sources share are left."""
        return super().all_labels_used and self.merge == "union"

    def _merged(self, tables: Sequence[Table]) -> Table:
        return concatenate([self._part(source, table) for source, table in zip(self.sources, tables, strict=True)])

    def _part(self, source: BaseDataModule, table: Table) -> Table:
        """One source's rows with the mixture's labels and with names that no other source has."""
        return Table(
            paths=strings(source.name + "/" + table.paths.astype(object)),
            labels=align_labels(table.labels, source.own_class_names, self.own_class_names),
            groups=strings(source.name + "/" + table.groups.astype(object)),
            split=table.split,
            metadata={**table.metadata, "source": np.full(len(table), source.name, dtype=object)},
            origins=table.origins,
        )

    def exclusions(self, table: Table) -> dict[str, np.ndarray]:
        """Every source's own exclusions, by its name."""
        self.read_table()
        found: dict[str, np.ndarray] = {}
        for source, places, _ in self._by_source(np.arange(len(table))):
            for reason, rows in source.exclusions(self._tables[source.name]).items():
                whole = np.zeros(len(table), dtype=bool)
                whole[places] = rows
                found[f"{source.name}: {reason}"] = whole
        return found

    @property
    def label_policy(self) -> str | None:
        """The merge, and every source's own policy."""
        return "; ".join([f"{self.merge} of labels", *(f"{part.name}: {part.label_policy}" for part in self.sources)])

    def leaky_rows(self, table: Table) -> np.ndarray:
        """Rows of the sources that are split by image, as the paper does."""
        leaky = np.zeros(len(table), dtype=bool)
        for source, places, own_rows in self._by_source(np.arange(len(table))):
            leaky[places] = source.leaky_rows(source.raw_table)[own_rows]
        return leaky

    @property
    def unnamed_releases(self) -> frozenset[str]:
        """Those of the sources."""
        return frozenset[str]().union(*(source.unnamed_releases for source in self.sources))

    # Images and sampling -----------------------------------------------------------------------------------------

    def read_images(self, rows: Sequence[int], at_least: int | None = None) -> Sequence[np.ndarray]:
        """Images by table row, read by the source that each row belongs to."""
        images: list[Any] = [None] * len(rows)
        for source, places, own_rows in self._by_source(np.asarray(rows)):
            for place, image in zip(places.tolist(), source.read_images(own_rows.tolist(), at_least), strict=True):
                images[place] = image
        return images

    def missing_files(self, table: Table, rows: np.ndarray) -> np.ndarray:
        """Those of `rows` whose image is not there."""
        missing = np.zeros(len(rows), dtype=bool)
        for source, places, own_rows in self._by_source(rows):
            missing[places] = np.isin(own_rows, source.missing_files(source.raw_table, own_rows))
        return np.asarray(rows[missing])

    def image_names(self, rows: np.ndarray) -> ImageNames:
        """Each row under the name and id that its source gives it."""
        names = [np.empty(len(rows), dtype=object) for _ in range(3)]
        for source, places, own_rows in self._by_source(rows):
            for column, values in zip(names, source.image_names(own_rows), strict=True):
                column[places] = values
        return ImageNames(*names)

    def image_files(self, rows: np.ndarray) -> list[tuple[Path, str] | None]:
        """The file of every row, as its source knows it."""
        files: list[tuple[Path, str] | None] = [None] * len(rows)
        for source, places, own_rows in self._by_source(rows):
            for place, file in zip(places.tolist(), source.image_files(own_rows), strict=True):
                files[place] = file
        return files

    def sampling_weights(self, rows: np.ndarray) -> np.ndarray | None:
        """Weights (N,) of the training rows, summing to 1, by which each source gets its share."""
        if self.sampling == "size":
            return super().sampling_weights(rows)
        parts = [places for _, places, _ in self._by_source(rows)]
        temperature = np.inf if self.sampling == "uniform" else self.temperature
        weights = np.empty(len(rows))
        for places, share in zip(parts, source_shares([len(places) for places in parts], temperature), strict=True):
            weights[places] = share / len(places)
        return weights

    def _by_source(self, rows: np.ndarray) -> Iterator[tuple[BaseDataModule, np.ndarray, np.ndarray]]:
        """Sources that `rows` (N,) belong to: (source, places in `rows`, rows of the source's own table)."""
        ends = np.cumsum([len(source.raw_table) for source in self.sources])
        numbers = np.searchsorted(ends, rows, side="right")
        for number in np.unique(numbers).tolist():
            places = np.flatnonzero(numbers == number)
            source = self.sources[number]
            yield source, places, rows[places] - (ends[number] - len(source.raw_table))


def source_shares(sizes: Sequence[int], temperature: float) -> np.ndarray:
    """Share of the training draws that goes to sources of the given sizes, float64 summing to 1: ∝ size^(1/T)."""
    shares = np.asarray(sizes, dtype=np.float64) ** (1.0 / temperature)
    return np.asarray(shares / shares.sum())


def _check_sources(sources: Sequence[BaseDataModule]) -> None:
    where = "data.init_args.sources"
    names = [source.name for source in sources]
    if len(set(names)) < max(len(names), 2):
        raise DataError(
            f"a mixture of {', '.join(names) or 'nothing'}", where=where, valid="two or more different sets"
        )
    shared = inspect.signature(BaseDataModule.__init__).parameters
    for number, source in enumerate(sources):
        if source.task == "multiclass" or source.channels != 1:
            raise DataError(
                f"{source.name} cannot be part of a chest X-ray mixture",
                where=f"{where}[{number}]",
                valid="sets of grey images with labels that may occur together",
            )
        for key, parameter in shared.items():
            if key not in OWN_ARGUMENTS and getattr(source, key, parameter.default) != parameter.default:
                raise DataError(
                    f"{key} is set for the source {source.name}",
                    where=f"{where}[{number}].init_args.{key}",
                    hint=f"set {key} once, for the whole mixture",
                )
