"""The 13 labels of CheXpert's labeler, shared by CheXpert and MIMIC-CXR: uncertain cells and healthy images."""

from typing import Any, Literal

import numpy as np
import pandas as pd

from datamodules import ontology
from datamodules.chest_xray.base import ChestXray
from datamodules.chest_xray.labels import Healthy, Uncertainty, fill_healthy, read_cells, resolve_uncertain
from datamodules.table import SPLITS, Table

NO_FINDING = "No Finding"
EXEMPT = "Support Devices"  # "No Finding" speaks of disease: a healthy lung may have a pacemaker beside it


class CheXpertLabels(ChestXray):
    """A set labelled by the CheXpert labeler: 1, 0, −1 = uncertain, blank = not mentioned.

    Args:
        image_size: Side of the images that the model sees, pixels.
        transform: Transform policy by name.
        uncertainty: Uncertain cells of training images become unknown (ignore), 0 (zeros), 1 (ones) or 0.7 (soft); in
            validation and test they are unknown.
        healthy: Blank cells of images with "No Finding" become 0 except Support Devices (fill), or all 13 cells become
            0, explicit ones too (cherti2022, as in paper A). Default: fill, or cherti2022 with `labels: cherti2022`.
        labels: Restrict the set to these labels, in this order; or cherti2022 = paper A's rules.
        **kwargs: Arguments shared by all chest X-ray sets.
    """

    task = "multilabel"

    def __init__(
        self,
        *,
        image_size: int = 224,
        transform: str = "chest_xray",
        uncertainty: Uncertainty = "ignore",
        healthy: Healthy | None = None,
        labels: list[str] | Literal["cherti2022"] | None = None,
        **kwargs: Any,
    ) -> None:
        self.uncertainty: Uncertainty = uncertainty
        self.healthy: Healthy = healthy or ("cherti2022" if labels == "cherti2022" else "fill")
        super().__init__(image_size=image_size, transform=transform, labels=labels, **kwargs)

    @property
    def label_policy(self) -> str | None:
        """The ontology's version and the two policies."""
        return f"{super().label_policy}, uncertain {self.uncertainty}, healthy {self.healthy}"

    def report_labels(self, frame: pd.DataFrame, where: str) -> np.ndarray:
        """Labels of rows with CheXpert's columns, float32 (N, 13), the healthy rule applied, uncertain cells still −1.

        Args:
            frame: Columns of `label_columns()`, as text; "No Finding" may be missing (it is in CheXpert's test labels).
            where: File, for messages.
        """
        columns = label_columns(self.name)
        values = read_cells(frame[columns], where)
        if NO_FINDING not in frame:
            return values
        healthy = read_cells(frame[[NO_FINDING]], where)[:, 0] == 1
        return fill_healthy(values, healthy, self.healthy, exempt=[columns.index(EXEMPT)])

    def resolve_labels(self, table: Table) -> Table:
        """Replace uncertain cells by the policy in training rows, by unknown elsewhere."""
        training = (np.asarray(table.split.codes) == SPLITS.index("train")) & (self.outputs is None)
        return table.relabelled(resolve_uncertain(table.labels, self.uncertainty, training))


def label_columns(source: str) -> list[str]:
    """Column of every label of a source, in the order of its canonical names."""
    return [columns[0] for columns in (ontology.tokens(source)[label] for label in ontology.labels(source))]
