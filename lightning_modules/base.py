"""The base of every task: one shared step, an exact evaluation, a stream of random numbers that survives a resume."""

from abc import ABC, abstractmethod
from typing import Any, Literal

import numpy as np
import torch
from pytorch_lightning import LightningModule
from pytorch_lightning.cli import OptimizerCallable
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from lightning_modules.backbones.factory import classifier_parameters
from lightning_modules.backbones.standardisation import set_standardisation_eps
from lightning_modules.errors import ModelError
from lightning_modules.metrics import EvaluationResult, MetricValue
from lightning_modules.optimizers import SGDAGC, agc_parameter_groups, scale_rates
from lightning_modules.schedules import ConstantSchedule, RunLength, Schedule

Batch = dict[str, Any]
"""Tensors by name (see `datamodules.dataset`), and `text`, a list of strings, where a task reads captions."""


def default_optimizer(parameters: Any) -> SGDAGC:
    """SGD with adaptive gradient clipping at the transfer rate of Cherti & Jitsev (arXiv 2106.00116)."""
    return SGDAGC(parameters, lr=0.001)


class BaseTask(LightningModule, ABC):
    """What all tasks share. A subclass builds `self.backbone`, and says what its loss and its evaluation are.

    Args:
        optimizer: Optimizer of the parameters that train.
        lr_scheduler: Schedule of the learning rate over the run; default constant.
    """

    backbone: nn.Module
    in_chans: Literal[1, 3]
    weights: str | None = None
    mean: Tensor
    std: Tensor

    def __init__(self, optimizer: OptimizerCallable, lr_scheduler: Schedule | None) -> None:
        super().__init__()
        self.make_optimizer = optimizer
        self.schedule = lr_scheduler if lr_scheduler is not None else ConstantSchedule()
        self.results: dict[str, EvaluationResult] = {}
        """Latest labelled evaluation by split, "validation" and "test": the same on every rank."""
        self.scores: dict[str, list[MetricValue]] = {}
        """Latest numbers by split, of any evaluation."""
        self.samples: dict[str, int] = {}
        """How many samples these come from."""

    @abstractmethod
    def configure_models(self) -> None:
        """Build the network."""

    @abstractmethod
    def configure_losses(self) -> None:
        """Choose the loss."""

    @abstractmethod
    def configure_metrics(self) -> None:
        """Build what collects the samples of each split."""

    @abstractmethod
    def training_loss(self, images: Tensor, batch: Batch) -> Tensor:
        """Loss of one training batch of normalised images."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Result-row columns that the task decides: architecture, method, protocol and depths."""

    @abstractmethod
    def hyper_parameters(self) -> dict[str, Any]:
        """What a checkpoint must say so that its weights can be used, in plain types."""

    # Images ------------------------------------------------------------------------------------------------------

    def set_normalisation(self, mean: list[float], std: list[float]) -> None:
        """Keep the mean and standard deviation that belong to the weights, one value a channel, in [0, 1] units."""
        if len(mean) not in (1, 3) or len(std) != len(mean) or min(std) <= 0:
            raise ModelError(f"mean {mean} and std {std} do not fit", valid="1 or 3 values each, std > 0")
        # Always three values: a checkpoint then fits a model whose normalisation was given in another form.
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1).expand(1, 3, 1, 1).clone())
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1).expand(1, 3, 1, 1).clone())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Accept a normalisation of one value, as checkpoints of the first versions have it."""
        for name in ("mean", "std"):
            stored = state_dict.get(prefix + name)
            if stored is not None and stored.shape == (1, 1, 1, 1):
                state_dict[prefix + name] = stored.expand(1, 3, 1, 1)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def normalise(self, images: Tensor) -> Tensor:
        """Turn uint8 (B, 1 or 3, H, W) images, or floats in [0, 1], into normalised floats on the device.

        They have the backbone's number of channels: grey is repeated, colour averaged to grey.
        """
        scale = 255.0 if images.dtype == torch.uint8 else 1.0
        if self.in_chans == 3:
            return (images.expand(-1, 3, -1, -1).to(self.mean.dtype) / scale - self.mean) / self.std
        grey = images.to(self.mean.dtype).mean(dim=1, keepdim=True) / scale
        return ((grey - self.mean) / self.std).mean(dim=1, keepdim=True)

    def encode(self, images: Tensor) -> Tensor:
        """Pooled features (B, D) of normalised images, after the final norm and before any classifier."""
        features: Tensor = self.backbone.forward_head(self.backbone.forward_features(images), pre_logits=True)  # type: ignore[operator]
        return features.flatten(1)

    # Training ----------------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of one batch; logged every `log_every_n_steps`, since a log call costs 0.2 ms."""
        loss = self.training_loss(self.normalise(batch["image"]), batch)
        if (batch_idx + 1) % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self.log("train/loss", loss, prog_bar=True)
            # The last group is the classifier's: under layer-wise decay its rate is the one that was asked for.
            self.log("train/lr", self.trainer.optimizers[0].param_groups[-1]["lr"])
        return loss

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seed dropout and mixup by (seed, batches done, rank), so that a resumed run draws the same numbers.

        Not by `global_step`, which stands still while gradients accumulate.
        """
        done = self.trainer.fit_loop.epoch_loop.batch_progress.total.ready
        words = (self.stream_seed, done, self.global_rank)
        seed = int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> np.uint64(1))
        # Not torch.manual_seed: with a CUDA build and no GPU each call queues a stack trace for ever (0.8 ms a step).
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    @property
    def stream_seed(self) -> int:
        """The datamodule's stream seed, 0 without one."""
        return int(getattr(getattr(self.trainer, "datamodule", None), "stream_seed", 0))

    def run_length(self) -> RunLength:
        """Length of the run that is being fitted, in optimizer steps."""
        data, trainer = getattr(self.trainer, "datamodule", None), self.trainer
        if data is None or not hasattr(data, "batches_per_epoch"):
            raise ModelError("training needs one of farshot's data modules", hint="pass datamodule= to the trainer")
        per_epoch = int(data.batches_per_epoch)
        total = trainer.max_steps
        if total < 0:
            total = per_epoch * (trainer.max_epochs or 0)
        return RunLength(
            total_steps=total,
            steps_per_epoch=per_epoch,
            global_batch=int(data.batch_size),
            train_size=len(data.rows("train")),
        )

    def setup(self, stage: str) -> None:
        """Let the schedule set the run's length where it has one of its own (the BiT-HyperRule)."""
        if stage != "fit":
            return
        plan = self.schedule.plan(len(self.trainer.datamodule.rows("train")))  # type: ignore[attr-defined]
        if plan is not None:
            self._refuse_other_lengths(plan.total)
            self.trainer.fit_loop.epoch_loop.max_steps = plan.total
            self.follow(plan.mixup_alpha)

    def _refuse_other_lengths(self, steps: int) -> None:
        trainer = self.trainer
        given = {"max_steps": trainer.max_steps, "max_epochs": trainer.max_epochs or -1}
        # 1000 epochs are Lightning's own default where nobody sets a length.
        asked = [f"{name} {value}" for name, value in given.items() if value not in (-1, 1000, steps)]
        if asked:
            raise ModelError(
                f"{' and '.join(asked)} beside a schedule that sets the run's length itself, {steps} steps",
                hint="leave it out of the trainer's settings, or set lr_scheduler.init_args.length",
            )

    def follow(self, mixup_alpha: float) -> None:
        """Take over the mixup that a plan prescribes; tasks without mixup ignore it."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The parameters that train, as the optimizer's groups: the classifier's, the last one, is exempt from AGC."""
        return agc_parameter_groups(self, classifier_parameters(self.backbone))

    def rate_factor(self, step: int, run: RunLength) -> float:
        """Multiplier of every learning rate at optimizer step `step`, counted from 0."""
        return self.schedule.factor(step, run)

    def configure_optimizers(self) -> Any:
        """The optimizer over the parameters that train, and the schedule per step."""
        optimizer = self.make_optimizer(self.parameter_groups())
        scale_rates(optimizer)
        run = self.run_length()
        scheduler = LambdaLR(optimizer, lambda step: self.rate_factor(step, run))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # Evaluation --------------------------------------------------------------------------------------------------

    @abstractmethod
    def evaluation_step(self, batch: Batch, split: str) -> None:
        """Collect one batch of a split."""

    @abstractmethod
    def evaluation_end(self, split: str) -> None:
        """Compute the split's numbers from what was collected, keep them in `scores` and log them."""

    @abstractmethod
    def metric_names(self, split: str) -> list[str]:
        """Names that an evaluation of `split` logs, such as validation/loss."""

    def keep_scores(self, split: str, scores: list[MetricValue], samples: int) -> None:
        """Keep and log the numbers of a split, and check that every sample came exactly once."""
        expected = self._expected(split)
        if expected is not None and samples != expected:
            raise ModelError(f"{split} saw {samples} samples, its table has {expected}")
        self.scores[split], self.samples[split] = scores, samples
        # Not through self.log: one dictionary at once, and torchmetrics has joined the ranks already.
        finite = {f"{split}/{value.key}": value.value for value in scores if np.isfinite(value.value)}
        self.log_dict({**finite, f"{split}/samples": float(samples)})

    def _expected(self, split: str) -> int | None:
        """Samples that the split's table has, or None where the run was asked to see fewer."""
        data, trainer = getattr(self.trainer, "datamodule", None), self.trainer
        limit = trainer.limit_test_batches if split == "test" else trainer.limit_val_batches
        if data is None or not hasattr(data, "rows") or isinstance(limit, int) or limit != 1.0 or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return None
        return len(data.rows(split))

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Collect one validation batch."""
        self.evaluation_step(batch, "validation")

    def on_validation_epoch_end(self) -> None:
        """Evaluate validation."""
        self.evaluation_end("validation")

    # Checkpoints -------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Write plain hyper-parameters, so that every checkpoint loads with `weights_only=True`."""
        checkpoint["hyper_parameters"] = self.hyper_parameters()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another model instead of overriding what the user asked for."""
        saved, mine = checkpoint.get("hyper_parameters", {}), self.hyper_parameters()
        # These belong to the weights and come with them.
        theirs = ("mean", "std", "standardisation_eps")
        differing = [key for key in mine if key in saved and key not in theirs and saved[key] != mine[key]]
        if differing:
            lines = "; ".join(f"{key}: checkpoint {saved[key]}, here {mine[key]}" for key in differing)
            raise ModelError(
                f"the checkpoint belongs to another model ({lines})",
                hint="give the settings that the checkpoint was trained with, or use model.weights to transfer from it",
            )
        set_standardisation_eps(self.backbone, saved.get("standardisation_eps"))
