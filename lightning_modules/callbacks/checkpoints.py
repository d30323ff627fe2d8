"""Checkpoints that a kill or a full disk cannot destroy, and the choice between the last and the best weights."""

import os
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
from lightning_fabric.plugins import TorchCheckpointIO
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Checkpoint

from lightning_modules.errors import ModelError

LAST, BEST = "last.ckpt", "best.ckpt"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its destination, syncs it and renames it: the old one stays until the new is whole."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Save plain data only: what Lightning's command line adds to the hyper-parameters is left out."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        if "hyper_parameters" in checkpoint:
            kept = checkpoint["hyper_parameters"].items()
            checkpoint["hyper_parameters"] = {key: value for key, value in kept if key != "_instantiator"}
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, target)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


class Checkpoints(Checkpoint):
    """Keeps `last.ckpt` (every n steps, every epoch, at the end) and, if asked, `best.ckpt` by a validation metric.

    On SIGTERM it saves after the running batch and ends the process with exit code 143.

    Args:
        folder: Where the checkpoints go.
        every_n_steps: Optimizer steps between two saves within an epoch.
        select: Which weights count as the run's result.
        monitor: Validation metric that `best` goes by; losses and calibration errors fall, everything else rises.
    """

    def __init__(
        self,
        folder: Path,
        every_n_steps: int,
        select: Literal["last", "best"] = "last",
        monitor: str = "validation/loss",
    ) -> None:
        self.folder, self.every_n_steps, self.select, self.monitor = (
            Path(folder),
            every_n_steps,
            select,
            monitor,
        )
        self.sign = 1.0 if monitor.endswith(("loss", "ece")) else -1.0
        self.best_score = float("inf")
        self.best_step = 0

    @property
    def selected(self) -> Path:
        """The checkpoint that holds the run's result."""
        return self.folder / (BEST if self.select == "best" else LAST)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a monitor that no evaluation logs before the first step, not after the first epoch."""
        if stage != "fit" or self.select != "best":
            return
        names: list[str] = pl_module.metric_names("validation")  # type: ignore[operator]
        if self.monitor not in names:
            raise ModelError(f"no metric {self.monitor!r} to select by", valid=names[:12], hint="change --monitor")
        if not len(trainer.datamodule.rows("validation")):  # type: ignore[attr-defined]
            raise ModelError("select: best needs validation images", hint="set data.val_fraction, or select: last")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save every n optimizer steps, between two steps only: gradients that accumulate are not in a checkpoint."""
        between = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if trainer.received_sigterm and between:
            trainer.save_checkpoint(self.folder / LAST)
            raise SystemExit(143)
        if between and trainer.global_step % self.every_n_steps == 0:
            trainer.save_checkpoint(self.folder / LAST)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the weights that are the best so far."""
        if self.select != "best" or trainer.sanity_checking or trainer.state.fn != "fit":
            return
        score = trainer.callback_metrics.get(self.monitor)
        if score is not None and self.sign * float(score) < self.best_score:
            self.best_score, self.best_step = self.sign * float(score), trainer.global_step
            trainer.save_checkpoint(self.folder / BEST)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save at the end of an epoch, after its validation; the last epoch's save is the run's end."""
        trainer.save_checkpoint(self.folder / LAST)

    def state_dict(self) -> dict[str, Any]:
        """Best score so far, for a resume."""
        return {"best_score": self.best_score, "best_step": self.best_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the best score so far."""
        self.best_score, self.best_step = state_dict["best_score"], state_dict["best_step"]
