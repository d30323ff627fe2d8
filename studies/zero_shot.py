"""Zero-shot evaluation: a CLIP run names the classes of a data set that it has no labels of."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from datamodules.base import BaseDataModule
from lightning_modules.clip import CLIP
from lightning_modules.metrics import EvaluationResult, evaluate
from lightning_modules.text_head import class_embeddings, zero_shot_logits

CERTAIN = 3.29  # standard errors: two-sided 99.9 %


def evaluate_zero_shot(clip: CLIP, data: BaseDataModule, split: str, device: str) -> EvaluationResult:
    """Logits and numbers of a split's images; of a set with labels the cosine with each label's texts is its logit.

    Args:
        clip: Both towers.
        data: A data set with `captions` as templates and the preprocessing of the run.
        split: "test" or "validation".
        device: Where the images are encoded.
    """
    clip = clip.to(device).eval()
    classes = class_embeddings(clip, data.class_texts or [])
    rows, logits = data.rows(split), []
    with torch.inference_mode():
        for batch in data.evaluation_dataloader(rows):
            images = clip.normalise(batch["image"].to(device, non_blocking=True))
            logits.append(zero_shot_logits(clip, images, classes).float().cpu().numpy())
    found, labels = np.concatenate(logits), data.read_table().labels[rows]
    return EvaluationResult(found, labels, rows, evaluate(found, labels, data.task, data.class_names))


@dataclass(frozen=True)
class NamesCheck:
    """Whether the classes seem to have the right names, judged by what is called what.

    Attributes:
        mean_recall: Mean over the classes of the share that is named rightly, 0–1.
        low: Lower end of its 99.9 % interval.
        chance: 1 / number of classes.
        matched_recall: The same, if every class had the name that suits best, each name once.
        swapped: The classes whose best name is another's, with that name.
    """

    mean_recall: float
    low: float
    chance: float
    matched_recall: float
    swapped: tuple[tuple[str, str], ...]

    @property
    def at_chance(self) -> bool:
        """Whether naming is no better than chance can explain."""
        return self.low <= self.chance

    @property
    def suspicious(self) -> bool:
        """Whether other names would explain the images much better: the order, or the names, are likely wrong."""
        return self.matched_recall - self.mean_recall > max(0.1, self.mean_recall)

    def words(self) -> str:
        """One line for the user; "" where nothing is wrong."""
        if self.suspicious:
            pairs = ", ".join(f"{own!r} as {name!r}" for own, name in self.swapped[:3])
            return (
                f"other names would fit far better ({100 * self.matched_recall:.1f} % against "
                f"{100 * self.mean_recall:.1f} %; the network sees {pairs}): check the order of class_names and the "
                "file of --data.caption_names"
            )
        if self.at_chance:
            return (
                f"no better than chance ({100 * self.mean_recall:.1f} % of each class on average, chance "
                f"{100 * self.chance:.1f} %): the network does not know these classes by these words, or the names are "
                "wrong"
            )
        return ""


def check_names(labels: NDArray[np.int64], predicted: NDArray[np.int64], class_names: Sequence[str]) -> NamesCheck:
    """Compare what is called what with the best one-to-one naming (Hungarian method).

    Entezari et al.'s published zero-shot heads were at chance because names and classes were in different orders.

    Args:
        labels: True classes (N,).
        predicted: Predicted classes (N,).
        class_names: C names.
    """
    size = len(class_names)
    counts = np.zeros((size, size))
    np.add.at(counts, (labels, predicted), 1)
    present = counts.sum(axis=1) > 0
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    recall = shares.diagonal()[present]
    variance = recall * (1 - recall) / counts.sum(axis=1)[present]
    mean, error = float(recall.mean()), float(np.sqrt(variance.sum()) / len(recall))
    own, names = linear_sum_assignment(shares, maximize=True)
    swapped = tuple(
        (class_names[a], class_names[b]) for a, b in zip(own, names, strict=True) if a != b and shares[a, b] > 0
    )
    return NamesCheck(mean, mean - CERTAIN * error, 1 / size, float(shares[own, names][present].mean()), swapped)
