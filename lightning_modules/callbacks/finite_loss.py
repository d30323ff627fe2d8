"""Stops a run whose loss is no longer finite, before a checkpoint of it can be written."""

from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_modules.errors import NonFiniteLossError

CHECK_EVERY = 20  # batches; on a GPU each check waits for the device


class FiniteLoss(Callback):
    """Raises `NonFiniteLossError` (exit code 3): at once on a CPU, within 20 batches and before any save on a GPU."""

    def __init__(self) -> None:
        self._finite: Tensor | None = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Remember on the device whether every loss so far was finite."""
        finite = torch.isfinite(outputs["loss"].detach()).all()
        self._finite = finite if self._finite is None else self._finite & finite
        if not finite.is_cuda or batch_idx % CHECK_EVERY == 0:
            self._check(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep weights that a non-finite loss has touched out of the run's checkpoints."""
        self._check(trainer)

    def _check(self, trainer: Trainer) -> None:
        if self._finite is not None and not bool(self._finite):
            raise NonFiniteLossError(
                f"the training loss is NaN or infinite at step {trainer.global_step}\n"
                "  next:  lower the learning rate or lengthen the warm-up; the last good checkpoint is kept"
            )
