"""Zero-shot evaluation: a CLIP run names the classes of a data set that it has no labels of."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from datamodules.base import BaseDataModule
from lightning_modules.clip import CLIP
from lightning_modules.errors import ModelError
from lightning_modules.metrics import EvaluationResult, evaluate
from lightning_modules.text_head import class_embeddings, zero_shot_logits

CERTAIN = 3.29  # standard errors: two-sided 99.9 %
OF_RANKS = ("mean_auroc", "mean_average_precision", "auroc", "average_precision")
"""Metrics of labels that need no threshold: a cosine has none."""


def evaluate_zero_shot(clip: CLIP, data: BaseDataModule, split: str, device: torch.device) -> EvaluationResult:
    """Logits and numbers of a split's images; of a set with labels the cosine with each label's texts is its logit.

    Args:
        clip: Both towers.
        data: A data set with `captions` as templates and the preprocessing of the run.
        split: "test" or "validation".
        device: Where the images are encoded.

    Returns:
        Logits, labels and metrics; of labels, which may occur together, only the metrics that need no threshold.

    Raises:
        ModelError: The net cannot take images of this size.
    """
    clip = clip.to(device).eval()
    classes = class_embeddings(clip, data.class_texts or [])
    rows, logits = data.rows(split), []
    with torch.inference_mode():
        for batch in data.evaluation_dataloader(rows):
            images = clip.normalise(batch["image"].to(device, non_blocking=True))
            try:
                logits.append(zero_shot_logits(clip, images, classes).float().cpu().numpy())
            except (AssertionError, RuntimeError) as error:
                if logits or "out of memory" in str(error):
                    raise  # images of this size went well before
                raise ModelError(
                    f"{clip.backbone_name} cannot take images of {data.image_size} pixels: {str(error)[:200]}",
                    hint="leave --data.image_size out: the run's own size is the default",
                ) from error
    found, labels = np.concatenate(logits), data.read_table().labels[rows]
    metrics = evaluate(found, labels, data.task, data.class_names)
    if data.task != "multiclass":
        metrics = [value for value in metrics if value.name in OF_RANKS]
    return EvaluationResult(found, labels, rows, metrics)


@dataclass(frozen=True)
class NamesCheck:
    """Whether the classes seem to have the right names, judged by what is called what.

    Attributes:
        mean_recall: Mean over the classes of the share that is named rightly, 0–1.
        chance: What it would be on average if the names were given without regard to the images.
        error: Standard error of `mean_recall` then.
        swapped: The classes that have another's name in the best one-to-one naming of a half of the images, with that
            name.
        own_recall: Mean recall of these classes under their own names in the other half.
        matched_recall: The same under the others' names.
        matched_error: Standard error of the difference, if names were given without regard to the images.
    """

    mean_recall: float
    chance: float
    error: float
    swapped: tuple[tuple[str, str], ...] = ()
    own_recall: float = 0.0
    matched_recall: float = 0.0
    matched_error: float = 0.0

    @property
    def at_chance(self) -> bool:
        """Whether naming is no better than chance can explain."""
        return self.mean_recall <= self.chance + CERTAIN * self.error + 1e-9

    @property
    def suspicious(self) -> bool:
        """Whether other names would explain the images much better: the order, or the names, are likely wrong."""
        return self.matched_recall - self.own_recall > max(0.1, self.own_recall, CERTAIN * self.matched_error)

    def words(self) -> str:
        """One line for the user; "" where nothing is wrong."""
        if self.suspicious:
            pairs = ", ".join(f"{own!r} as {name!r}" for own, name in self.swapped[:3])
            return (
                f"{len(self.swapped)} classes fit other names far better ({100 * self.matched_recall:.1f} % against "
                f"{100 * self.own_recall:.1f} % of their images; the network sees {pairs}): check the order of "
                "class_names and the file of --data.caption_names"
            )
        if self.at_chance:
            return (
                f"no better than chance can explain ({100 * self.mean_recall:.1f} % of each class on average, chance "
                f"{100 * self.chance:.1f} %): the network does not know these classes by these words, the names are "
                "wrong, or the images are few"
            )
        return ""


def check_names(labels: NDArray[np.int64], predicted: NDArray[np.int64], class_names: Sequence[str]) -> NamesCheck:
    """Compare what is called what with the best one-to-one naming (Hungarian method).

    The naming is found on one half of each class's images and judged on the other, and the other way round: on its own
    half it fits better even where nothing is to be found. Entezari et al.'s published zero-shot heads were at chance
    because names and classes were in different orders.

    Args:
        labels: True classes (N,), of at least one image; −1 = unknown, passed over.
        predicted: Predicted classes (N,).
        class_names: C names.
    """
    labels, predicted = labels[labels >= 0], predicted[labels >= 0]
    size = len(class_names)
    order = np.argsort(labels, kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(len(order)) - np.searchsorted(labels[order], labels[order])  # within the class
    halves = np.zeros((2, size, size))
    np.add.at(halves, (place % 2, labels, predicted), 1)
    numbers = halves.sum(axis=(0, 2))
    present = numbers > 0
    shares = halves.sum(axis=0)[present] / numbers[present, None]
    given = shares.mean(axis=0)  # how often each name is given, all classes weighing alike
    recall, chances = shares[np.arange(len(shares)), np.flatnonzero(present)], given[present]
    error = np.sqrt((chances * (1 - chances) / numbers[present]).sum()) / len(recall)
    check = NamesCheck(float(recall.mean()), float(chances.mean()), float(error))
    moved = [_move(fitted, judged, given) for fitted, judged in (halves, halves[::-1])]
    own, matched, variance = (np.concatenate(parts) for parts in zip(*(move[2:] for move in moved), strict=True))
    if not len(own):
        return check
    pairs = dict.fromkeys((class_names[a], class_names[b]) for move in moved for a, b in zip(*move[:2], strict=True))
    return replace(
        check,
        swapped=tuple(pairs),
        own_recall=float(own.mean()),
        matched_recall=float(matched.mean()),
        matched_error=float(np.sqrt(variance.sum()) / len(own)),
    )


def _move(
    fitted: NDArray[np.float64], judged: NDArray[np.float64], given: NDArray[np.float64]
) -> tuple[NDArray[Any], ...]:
    """Classes that the best naming of one half (C, C) gives another's name, judged on the other half.

    Returns:
        The classes, their new names, their recall under their own and under the new names, and the variance of the
        difference if names were given without regard to the images.
    """
    own, names = linear_sum_assignment(fitted / np.maximum(fitted.sum(axis=1, keepdims=True), 1), maximize=True)
    numbers = judged.sum(axis=1)
    moved = (own != names) & (fitted[own, names] > 0) & (numbers > 0)
    own, names = own[moved], names[moved]
    shares = judged / np.maximum(numbers[:, None], 1)
    return own, names, shares[own, own], shares[own, names], (given[own] + given[names]) / numbers[own]
