"""Evaluation: collect every sample once, then compute exact numbers from all of them.

The numbers are those of scikit-learn on the known labels. Nothing is averaged over batches or ranks.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_modules.errors import ModelError, NonFiniteLossError
from lightning_modules.thresholds import DEFAULT_THRESHOLD, Floats, Task, decide, probabilities

Bools = npt.NDArray[np.bool_]
Array = npt.NDArray[Any]

# Guo et al. 2017, "On Calibration of Modern Neural Networks": 15 bins of equal width, each (low, high].
CALIBRATION_BINS = 15


@dataclass(frozen=True)
class MetricValue:
    """One number of an evaluation.

    Attributes:
        name: "accuracy", "auroc", ...; "mean_auroc" is the mean of "auroc" over the classes that have one.
        class_name: The class or label; "" for an overall value.
        value: NaN where undefined.
        support: Known labels: samples for multiclass, known cells otherwise.
        positives: Those among them that are positive; in an overall multiclass value, every sample.
    """

    name: str
    class_name: str
    value: float
    support: int
    positives: int

    @property
    def key(self) -> str:
        """The name in logs and files: "accuracy", "auroc/<class>"."""
        return f"{self.name}/{self.class_name}" if self.class_name else self.name


class EvaluationResult:
    """All samples of an evaluation in the order of the table, and the numbers computed from them.

    Not a dataclass: torchmetrics walks into those that `compute` returns, and rejects frozen ones.

    Attributes:
        logits: float32 (N, C) or (N, L).
        labels: int64 (N,), or float32 (N, L) with 1 / 0 / NaN.
        index: int64 (N,), ascending and unique: the row of the table.
        metrics: The overall values first, then those per class.
    """

    def __init__(self, logits: Array, labels: Array, index: npt.NDArray[np.int64], metrics: list[MetricValue]) -> None:
        self.logits = logits
        self.labels = labels
        self.index = index
        self.metrics = metrics


class Evaluation(Metric):  # type: ignore[misc]
    """Collects logits and labels on the device, gathers them once, and evaluates them at the epoch's end.

    Every rank must update at least once; a rank without samples passes one with index -1.

    Args:
        task: "multiclass", "binary" or "multilabel".
        class_names: One per column of the logits; for binary also (negative, positive).

    Raises:
        ModelError: If the task is unknown, or later if shapes, labels or indices are not as `update` says.
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    logits: list[Tensor]
    labels: list[Tensor]
    index: list[Tensor]

    def __init__(self, task: Task, class_names: list[str]) -> None:
        super().__init__()
        self.task = task
        self.class_names = list(class_names)
        self.num_outputs = len(_column_names(task, class_names))
        for state in ("logits", "labels", "index"):
            self.add_state(state, default=[], dist_reduce_fx="cat")

    def update(self, logits: Tensor, labels: Tensor, index: Tensor) -> None:
        """Adds one batch; costs no synchronisation with the device.

        Args:
            logits: (B, C), (B, 1) or (B, L), any float type.
            labels: int64 (B,) for multiclass, otherwise float (B, L) with 1 / 0 / NaN.
            index: int64 (B,), the row of the table; rows below 0 are padding and count for nothing.
        """
        _check_shapes(logits, labels, self.task, self.num_outputs)
        if index.shape != logits.shape[:1]:
            raise ModelError(f"index has shape {tuple(index.shape)} for {len(logits)} samples", valid="one per sample")
        self.logits.append(logits.detach().float())
        self.labels.append(labels.long() if self.task == "multiclass" else labels.float())
        self.index.append(index.long())

    def compute(self) -> EvaluationResult:
        """The collected samples and their metrics, the same for every world size, batch size and order."""
        states = (self.logits, self.labels, self.index) if len(self.index) else self._no_samples()
        logits, labels, index = (_to_numpy(dim_zero_cat(state)) for state in states)
        order = np.argsort(index, kind="stable")
        order = order[index[order] >= 0]
        logits, labels, index = logits[order], labels[order], index[order]
        repeated = np.unique(index[1:][index[1:] == index[:-1]])
        if repeated.size:
            raise ModelError(
                f"{repeated.size} of {len(np.unique(index))} samples were evaluated more than once: "
                f"rows {', '.join(map(str, repeated[:5]))}{', ...' if repeated.size > 5 else ''}",
                hint="evaluate with the datamodule's own loaders and use_distributed_sampler=False; "
                "reset() this metric between epochs",
            )
        return EvaluationResult(logits, labels, index, evaluate(logits, labels, self.task, self.class_names))

    def _no_samples(self) -> tuple[Tensor, Tensor, Tensor]:
        logits, index = torch.empty(0, self.num_outputs), torch.empty(0, dtype=torch.int64)
        return logits, index if self.task == "multiclass" else logits, index


def evaluate(
    logits: Tensor | Array, labels: Tensor | Array, task: Task, class_names: Sequence[str]
) -> list[MetricValue]:
    """All numbers of one evaluation, exact and from the known labels only.

    A per-class value is NaN where it is undefined: auroc, average_precision and balanced_accuracy without
    positives or without negatives; precision, recall and f1 without positives. Means leave those classes out.
    Precision and f1 are 0 where positives exist and none is predicted (scikit-learn's zero_division=0).
    Decisions are argmax, or probability above 0.5. Without samples every value is NaN.

    Args:
        logits: (N, C), (N, 1) or (N, L).
        labels: int (N,) for multiclass, otherwise (N, L) with 1 / 0 / NaN.
        task: "multiclass" (per-class values are one-vs-rest on the softmax), "binary" or "multilabel".
        class_names: One per column of the logits; for binary also (negative, positive).

    Returns:
        The overall values, then those of each class.

    Raises:
        ModelError: If shapes, labels or names do not fit the task.
        NonFiniteLossError: If a logit is NaN or infinite.
    """
    names = _column_names(task, class_names)
    scores, targets = _to_numpy(logits), _to_numpy(labels)
    _check_shapes(scores, targets, task, len(names))
    _check_values(scores, targets, task)
    overall, columns = (_multiclass if task == "multiclass" else _labelwise)(scores, targets, task)

    known = targets[~np.isnan(targets)]
    positives = known.size if task == "multiclass" else int(known.sum())
    per_class: list[MetricValue] = []
    collected: dict[str, list[float]] = {}
    for name, (truth, values) in zip(names, columns, strict=True):
        for metric, value in values.items():
            per_class.append(MetricValue(metric, name, value, truth.size, int(truth.sum())))
            collected.setdefault(metric, []).append(value)
    for metric, series in collected.items():
        overall[f"mean_{metric}"] = _mean(np.array([value for value in series if not np.isnan(value)]))
    if task == "multiclass":
        overall["balanced_accuracy"] = overall["mean_recall"]
    return [MetricValue(metric, "", value, known.size, positives) for metric, value in overall.items()] + per_class


def ranking(truth: Bools, scores: Floats) -> tuple[float, float]:
    """Area under the ROC curve and average precision, ties grouped as scikit-learn does.

    Counts, for each positive, the samples that score at least as high: two sorts instead of two curves.

    Args:
        truth: bool (N,).
        scores: (N,), higher means more likely positive; no NaN.

    Returns:
        Both in [0, 1], or both NaN where positives or negatives are missing.
    """
    positive, everything = np.sort(scores[truth]), np.sort(scores)
    negatives = everything.size - positive.size
    if not positive.size or not negatives:
        return np.nan, np.nan
    below, up_to = (np.searchsorted(everything, positive, side) for side in ("left", "right"))
    positives_below, positives_up_to = (np.searchsorted(positive, positive, side) for side in ("left", "right"))
    # A positive beats the negatives below it and half of those it is tied with.
    beaten = ((below - positives_below) + (up_to - positives_up_to)) / 2
    precision = (positive.size - positives_below) / (everything.size - below)
    return float(beaten.mean() / negatives), float(precision.mean())


def calibration_error(confidence: Floats, correct: Array) -> float:
    """Expected calibration error over 15 equal-width bins.

    Args:
        confidence: (N,), in [0, 1]: of the decision, or of the positive outcome.
        correct: (N,), 1 or true where what the confidence speaks of came about.

    Returns:
        The mean over samples of |mean confidence - mean outcome| in their bin; NaN without samples.
    """
    edges = np.linspace(0, 1, CALIBRATION_BINS + 1)[1:-1]
    gaps = np.bincount(np.digitize(confidence, edges, right=True), confidence - correct)
    return float(np.abs(gaps).sum() / confidence.size) if confidence.size else np.nan


_Columns = Iterable[tuple[Bools, dict[str, float]]]


def _multiclass(logits: Floats, labels: npt.NDArray[np.int64], task: Task) -> tuple[dict[str, float], _Columns]:
    scores = probabilities(logits, task)
    decisions = decide(scores, [], task)
    own = np.take_along_axis(logits, labels[:, None], axis=1)
    overall = {
        "loss": cross_entropy(torch.from_numpy(logits).double(), torch.from_numpy(labels)).item(),
        "accuracy": _mean(decisions == labels),
    }
    if logits.shape[1] > 5:
        # Ties go to the lower class index, as in argmax: equal logits must not earn 100 %.
        ahead = (logits > own) | ((logits == own) & (np.arange(logits.shape[1]) < labels[:, None]))
        overall["top5_accuracy"] = _mean(ahead.sum(axis=1) < 5)
    overall["ece"] = calibration_error(scores.max(axis=1), decisions == labels)
    # Lazily: one-vs-rest copies of all classes at once would not fit for 1,000 classes × 50,000 samples.
    truths = (labels == c for c in range(logits.shape[1]))
    return overall, ((truth, _per_class(truth, scores[:, c], decisions == c)) for c, truth in enumerate(truths))


def _labelwise(logits: Floats, labels: Floats, task: Task) -> tuple[dict[str, float], _Columns]:
    scores = probabilities(logits, task)
    decisions = decide(scores, [DEFAULT_THRESHOLD] * logits.shape[1], task) == 1
    known, positive = ~np.isnan(labels), labels == 1
    cells = torch.from_numpy(logits[known]).double()
    overall = {
        "loss": binary_cross_entropy_with_logits(cells, torch.from_numpy(positive[known]).double()).item(),
        "accuracy": _mean((decisions == positive)[known]),
        "ece": calibration_error(scores[known], positive[known]),
    }

    def column(i: int) -> tuple[Bools, dict[str, float]]:
        truth, decided = positive[known[:, i], i], decisions[known[:, i], i]
        values = _per_class(truth, logits[known[:, i], i], decided)
        values["balanced_accuracy"] = (_recall(truth, decided) + _recall(~truth, ~decided)) / 2
        return truth, values

    return overall, map(column, range(logits.shape[1]))


def _per_class(truth: Bools, scores: Floats, decided: Bools) -> dict[str, float]:
    positives, predicted, hits = truth.sum(), decided.sum(), (truth & decided).sum()
    auroc, average_precision = ranking(truth, scores)
    return {
        "auroc": auroc,
        "average_precision": average_precision,
        "f1": float(2 * hits / (positives + predicted)) if positives else np.nan,
        "precision": float(hits / max(predicted, 1)) if positives else np.nan,
        "recall": _recall(truth, decided),
    }


def _recall(truth: Bools, decided: Bools) -> float:
    return _mean(decided[truth])


def _mean(values: Array) -> float:
    return float(values.mean()) if values.size else np.nan


def _to_numpy(values: Tensor | Array) -> Array:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else values


def _column_names(task: str, class_names: Sequence[str]) -> Sequence[str]:
    """The class that each column of the logits speaks of."""
    if task not in get_args(Task):
        raise ModelError(f"no task {task!r}", valid=get_args(Task))
    if len(set(class_names)) != len(class_names):
        raise ModelError(f"class names repeat: {', '.join(class_names)}", valid="each name once")
    if task == "binary" and len(class_names) not in (1, 2):
        raise ModelError(
            f"a binary task with {len(class_names)} class names: {', '.join(class_names[:5])}",
            valid="(positive,) or (negative, positive)",
        )
    return class_names[-1:] if task == "binary" else class_names


def _check_shapes(logits: Tensor | Array, labels: Tensor | Array, task: Task, num_outputs: int) -> None:
    expected = logits.shape[:1] if task == "multiclass" else logits.shape
    if logits.ndim != 2 or logits.shape[1] != num_outputs or labels.shape != expected:
        wanted = "(N,)" if task == "multiclass" else f"(N, {num_outputs})"
        raise ModelError(
            f"{task} evaluation got logits {tuple(logits.shape)} and labels {tuple(labels.shape)}",
            valid=f"logits (N, {num_outputs}) and labels {wanted}",
            hint="compare the model's num_classes with the datamodule's class_names",
        )


def _check_values(logits: Array, labels: Array, task: Task) -> None:
    broken = ~np.isfinite(logits).all(axis=1)
    if broken.any():
        raise NonFiniteLossError(f"{broken.sum()} of {len(logits)} samples have logits that are NaN or infinite")
    if task == "multiclass":
        wrong, valid = (labels < 0) | (labels >= logits.shape[1]), f"0 to {logits.shape[1] - 1}"
    else:
        wrong, valid = ~(np.isnan(labels) | (labels == 0) | (labels == 1)), "0, 1 or NaN (unknown)"
    if wrong.any():
        raise ModelError(f"{task} evaluation met the label {labels[wrong][0]}", valid=valid)
