"""Tasks whose outputs are compared with labels: their evaluation, exact and the same on every rank."""

from abc import abstractmethod
from typing import cast

import numpy as np
from torch import Tensor, nn

from lightning_modules.base import BaseTask, Batch
from lightning_modules.metrics import Evaluation, EvaluationResult, evaluate
from lightning_modules.thresholds import Task


class LabelledTask(BaseTask):
    """A task with logits for named classes or labels. A subclass builds `self.evaluations`, an `Evaluation` a split."""

    evaluations: nn.ModuleDict
    task: Task
    class_names: list[str]

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, outputs) of normalised images (B, C, H, W)."""

    def evaluation_step(self, batch: Batch, split: str) -> None:
        """Collect the logits of one batch."""
        logits = self(self.normalise(batch["image"]))
        self._evaluation(split).update(logits, batch["label"], batch["index"])

    def evaluation_end(self, split: str) -> None:
        """Compute all numbers from the collected samples."""
        evaluation = self._evaluation(split)
        result: EvaluationResult = evaluation.compute()
        evaluation.reset()
        self.results[split] = result
        self.keep_scores(split, result.metrics, len(result.index))

    def metric_names(self, split: str) -> list[str]:
        """Names that an evaluation of `split` logs, such as validation/accuracy."""
        evaluation = self._evaluation(split)
        labels = (
            np.zeros((0,), np.int64) if evaluation.task == "multiclass" else np.zeros((0, len(evaluation.class_names)))
        )
        empty = evaluate(np.zeros((0, len(evaluation.class_names))), labels, evaluation.task, evaluation.class_names)
        return [f"{split}/{value.key}" for value in empty]

    def _evaluation(self, split: str) -> Evaluation:
        return cast(Evaluation, self.evaluations[split])

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Collect one test batch."""
        self.evaluation_step(batch, "test")

    def on_test_epoch_end(self) -> None:
        """Evaluate test."""
        self.evaluation_end("test")

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Logits (B, outputs) and index (B,) of one batch; labels are not looked at."""
        return {"logits": self(self.normalise(batch["image"])), "index": batch["index"]}
