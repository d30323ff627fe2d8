"""What all chest X-ray sets share: one grey channel, views, one label vocabulary, the paper's leaky split by name."""

from typing import Any, ClassVar, Literal

import numpy as np

from datamodules import ontology
from datamodules.assignment import SplitSettings, assign_by_image
from datamodules.base import BaseDataModule
from datamodules.errors import DataError, closest
from datamodules.table import Table

LabelRule = Literal["exact", "cherti2022"]


class ChestXray(BaseDataModule):
    """A set of chest radiographs. A subclass states facts and implements `load_table`.

    Args:
        image_size: Side of the images that the model sees, pixels.
        transform: Transform policy by name.
        views: Views to use; default: the set's frontal ones (`default_views`).
        labels: Restrict a multi-label set to these labels, in this order; `cherti2022` reads all labels by paper A's
            rules (substring search, and healthy images by its rule) for reproduction.
        split: official (by patient, hashed where there is no official test set), or cherti2022: paper A's split by
            image, in which a patient's images fall on both sides; result rows say so.
        **kwargs: Arguments shared by all data sets.
    """

    channels: ClassVar[Literal[1, 3]] = 1
    view_names: ClassVar[tuple[str, ...]] = ("PA", "AP")
    """Views that the release tells apart."""
    default_views: ClassVar[tuple[str, ...]] = ("PA", "AP")
    """Views in use where the user chooses none."""
    image_test_fraction: ClassVar[float] = 0.1
    """Share of the images that paper A tests on where there is no official test set."""

    def __init__(
        self,
        *,
        image_size: int = 224,
        transform: str = "chest_xray",
        views: list[str] | None = None,
        labels: list[str] | Literal["cherti2022"] | None = None,
        split: Literal["official", "cherti2022"] = "official",
        **kwargs: Any,
    ) -> None:
        self.label_rule: LabelRule = "cherti2022" if labels == "cherti2022" else "exact"
        self.split_choice = split
        for view in views or []:
            if view not in self.view_names:
                near = closest(view, self.view_names)
                raise DataError(
                    f"{self.name} has no view {view!r}" + (f"; did you mean {near!r}?" if near else ""),
                    where="data.init_args.views",
                    valid=self.view_names,
                )
        self.views = list(views) if views is not None else list(self.default_views)
        names = None if labels == "cherti2022" else labels
        super().__init__(image_size=image_size, transform=transform, labels=names, **kwargs)

    def exclusions(self, table: Table) -> dict[str, np.ndarray]:
        """Rows of other views than the chosen ones."""
        if "view" not in table.metadata or set(self.views) == set(self.view_names):
            return {}
        view = np.asarray(table.metadata["view"], dtype=object)
        return {f"view is not {' or '.join(self.views)}": ~np.isin(view, self.views)}

    @property
    def label_policy(self) -> str | None:
        """The ontology's version and how labels were read."""
        return f"ontology {ontology.version()}, {self.label_rule} labels"

    def leaky_rows(self, table: Table) -> np.ndarray:
        """All rows under paper A's split by image."""
        return np.full(len(table), self.split_choice == "cherti2022")

    def assign(self, table: Table, settings: SplitSettings) -> tuple[Table, str]:
        """Split by patient, or by image where the paper's leaky split is asked for."""
        if self.split_choice == "official":
            return super().assign(table, settings)
        if settings.folds is not None:
            raise DataError(
                "split: cherti2022 has no folds", where="data.init_args.folds", hint="leave one of them out"
            )
        # The paper's share, not the user's: only then is it the paper's split.
        paper = SplitSettings(settings.val_fraction, self.image_test_fraction, settings.seed)
        table = assign_by_image(table, paper, self.release, self.image_strata(table))
        return table, "cherti2022: by image, patients on both sides"

    def image_strata(self, table: Table) -> np.ndarray | None:
        """Strata of paper A's split by image, int64 (N,); None = one stratum."""
        return None
