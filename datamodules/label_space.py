"""Which labels of a set a run uses, in which order: all of them, chosen ones, some classes, or a model's outputs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from datamodules.alignment import align_labels
from datamodules.errors import DataError, closest

Task = Literal["multiclass", "binary", "multilabel"]


@dataclass(frozen=True)
class LabelSpace:
    """Names before and after a choice, and how labels go from one to the other.

    Attributes:
        own: All names of the set, in the order of its label columns or class numbers.
        chosen: Places in `own` of the names that may be used, in their order.
        task: Task with the names in use.
        outputs: Outputs of another model that the chosen labels are arranged as; None = none.
    """

    own: list[str]
    chosen: list[int]
    task: Task
    outputs: list[str] | None = None

    def apply(self, labels: np.ndarray) -> np.ndarray:
        """Labels over `own`, int64 (N,) or float32 (N, L), as labels over `names`; a class not in use becomes −1."""
        if len(self.chosen) < len(self.own) or self.chosen != sorted(self.chosen):
            labels = self._choose(labels)
        return labels if self.outputs is None else align_labels(labels, self.annotated, self.outputs)

    def _choose(self, labels: np.ndarray) -> np.ndarray:
        if labels.ndim == 2:
            return np.ascontiguousarray(labels[:, self.chosen])
        number = np.full(len(self.own) + 1, -1, dtype=np.int64)
        number[self.chosen] = np.arange(len(self.chosen))
        return np.asarray(number[labels])

    @property
    def annotated(self) -> list[str]:
        """Names that the set annotates and the run may use."""
        return [self.own[place] for place in self.chosen]

    @property
    def names(self) -> list[str]:
        """Names in use: the outputs of another model, or what is annotated."""
        return self.annotated if self.outputs is None else self.outputs


def choose_labels(
    own: Sequence[str],
    task: Task,
    *,
    dataset: str,
    labels: Sequence[str] | None = None,
    outputs: Sequence[str] | None = None,
    classes: Sequence[int] | None = None,
) -> LabelSpace:
    """Choose the names in use.

    Args:
        own: All names of the set.
        task: Task of the set.
        dataset: Its name, for messages.
        labels: Labels of a multi-label set to keep, in this order.
        outputs: Outputs of a trained model that the labels are arranged as, by canonical name.
        classes: Class numbers of a multi-class set to keep, in this order.

    Raises:
        DataError: Labels of a set that is not multi-label, or a name that it does not have.
    """
    own = list(own)
    if labels is not None and task != "multilabel":
        raise DataError(
            f"labels: restricts multi-label sets; {dataset} is {task}",
            where="data.init_args.labels",
        )
    for label in labels or []:
        if label not in own:
            near = closest(label, own)
            raise DataError(
                f"{dataset} has no label {label!r}" + (f"; did you mean {near!r}?" if near else ""),
                where="data.init_args.labels",
                valid=own,
            )
    chosen = [own.index(label) for label in labels] if labels is not None else list(classes or range(len(own)))
    if outputs is not None and task != "multiclass":
        task = "binary" if len(outputs) == 1 else "multilabel"
    return LabelSpace(own, chosen, task, list(outputs) if outputs is not None else None)
