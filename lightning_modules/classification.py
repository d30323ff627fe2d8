"""Classification: supervised pre-training and every transfer protocol, for one class, one label or many labels."""

from functools import partial
from typing import Any, Literal

from pytorch_lightning.cli import OptimizerCallable
from torch import Tensor, nn

from lightning_modules import losses
from lightning_modules.backbones.checkpoints import WeightsReport, load_weights
from lightning_modules.backbones.factory import create_backbone, preprocessing
from lightning_modules.backbones.layers import freeze, layer_groups, set_frozen_eval
from lightning_modules.base import BaseTask, Batch, default_optimizer
from lightning_modules.errors import ModelError
from lightning_modules.metrics import Evaluation
from lightning_modules.mixup import mixup
from lightning_modules.schedules import Schedule
from lightning_modules.thresholds import Task


class Classification(BaseTask):
    """Train a backbone with a new classifier, from scratch or from weights, as deep as asked.

    A protocol is a setting of three arguments. scratch: no `weights`. finetune: `weights`. linear_probe: `weights` and
    `frozen_depth: -1`. depth: the first `transfer_depth` layer groups of the `weights`, `frozen_depth` of them fixed.

    Args:
        backbone: A timm model; `python cli.py list models` shows the tested ones.
        num_classes: Outputs; comes from the data.
        task: multiclass, binary (one logit) or multilabel; comes from the data.
        class_names: Names of the outputs; come from the data.
        in_chans: 3 (grey images are repeated) or 1 (the stem is folded).
        weights: Where the backbone comes from: a run folder, a .ckpt, .safetensors, .pth or BiT .npz file, a timm name,
            or null = from scratch. The classifier is always new.
        transfer_depth: Layer groups that come from the weights; null = all, 0 = none. The rest is initialised anew.
        frozen_depth: Layer groups that do not train, counted from the input; −1 = all of the backbone.
        optimizer: Optimizer of the parameters that train.
        lr_scheduler: Schedule of the learning rate; default constant.
        mixup_alpha: Beta parameter of mixup, 0 = none; the HyperRule sets its own.
        label_smoothing: Share of the target spread over all classes, 0–1; multi-class only.
        mean: Channel means to normalise with, in [0, 1]; default: those of the weights, else the backbone's.
        std: Channel standard deviations, likewise.
    """

    def __init__(
        self,
        backbone: str = "resnetv2_50x1_bit",
        num_classes: int | None = None,
        task: Literal["multiclass", "binary", "multilabel"] | None = None,
        class_names: list[str] | None = None,
        in_chans: Literal[1, 3] = 3,
        weights: str | None = None,
        transfer_depth: int | None = None,
        frozen_depth: int = 0,
        optimizer: OptimizerCallable = default_optimizer,
        lr_scheduler: Schedule | None = None,
        mixup_alpha: float = 0.0,
        label_smoothing: float = 0.0,
        mean: list[float] | None = None,
        std: list[float] | None = None,
    ) -> None:
        super().__init__(optimizer, lr_scheduler)
        if num_classes is None or task is None:
            raise ModelError(
                "num_classes and task are not known",
                hint="they come from the data; without a command line give both",
            )
        self.backbone_name, self.num_classes, self.in_chans = backbone, num_classes, in_chans
        self.task: Task = task
        self.class_names = class_names or [str(number) for number in range(num_classes)]
        self.weights, self.transfer_depth, self.frozen_depth = weights, transfer_depth, frozen_depth
        self.mixup_alpha, self.label_smoothing = mixup_alpha, label_smoothing
        self.weights_report: WeightsReport | None = None
        self._given_mean, self._given_std = mean, std
        if len(self.class_names) != num_classes:
            raise ModelError(f"{len(self.class_names)} class names for num_classes {num_classes}")
        if not 0 <= label_smoothing < 1 or mixup_alpha < 0:
            raise ModelError(
                f"label_smoothing {label_smoothing}, mixup_alpha {mixup_alpha}",
                valid="0 ≤ label_smoothing < 1, alpha ≥ 0",
            )
        if weights is None and (transfer_depth or frozen_depth):
            raise ModelError(
                f"transfer_depth {transfer_depth}, frozen_depth {frozen_depth} without weights",
                hint="set model.init_args.weights, or leave both out to train from scratch",
            )
        self.configure_models()
        self.configure_losses()
        self.configure_metrics()
        self.train()  # the trainer keeps the modes that it finds: frozen norms must be in evaluation mode from here on

    def configure_models(self) -> None:
        """Build the backbone, load its weights as deep as asked, freeze."""
        self.backbone = create_backbone(self.backbone_name, self.num_classes, in_chans=self.in_chans)
        mean, std = preprocessing(self.backbone_name)
        depth = len(layer_groups(self.backbone))
        if self.weights is not None:
            report = load_weights(self.backbone, self.weights, head=False, groups=self.transfer_depth)
            self.weights_report = report
            if report.source_preprocessing is not None:
                mean, std = report.source_preprocessing
        self.frozen_depth = depth if self.frozen_depth == -1 else self.frozen_depth
        transferred = depth if self.transfer_depth is None else self.transfer_depth
        if self.frozen_depth > transferred:
            raise ModelError(
                f"frozen_depth {self.frozen_depth} exceeds the {transferred} layer groups that come from the weights",
                valid=f"0 to {transferred}",
            )
        freeze(self.backbone, self.frozen_depth)
        self.set_normalisation(list(self._given_mean or mean), list(self._given_std or std))

    def configure_losses(self) -> None:
        """Cross-entropy, or binary cross-entropy over the known cells."""
        smoothed = partial(losses.cross_entropy, label_smoothing=self.label_smoothing)
        self.loss = smoothed if self.task == "multiclass" else losses.masked_bce

    def configure_metrics(self) -> None:
        """One exact evaluation a split."""
        self.evaluations = nn.ModuleDict(
            {split: Evaluation(self.task, self.class_names) for split in ("validation", "test")}
        )

    @property
    def protocol(self) -> str:
        """Name of the transfer protocol that the arguments amount to."""
        if self.weights is None or self.transfer_depth == 0:
            return "scratch"
        groups = len(layer_groups(self.backbone))
        if self.frozen_depth == groups:
            return "linear_probe"
        return "finetune" if self.frozen_depth == 0 and self.transfer_depth in (None, groups) else "depth"

    def describe(self) -> dict[str, Any]:
        """Architecture, method, protocol and depths."""
        return {
            "architecture": self.backbone_name,
            "method": "supervised",
            "protocol": self.protocol,
            "transfer_depth": self.transfer_depth,
            "frozen_depth": self.frozen_depth,
        }

    def hyper_parameters(self) -> dict[str, Any]:
        """Architecture, outputs and normalisation."""
        return {
            "backbone": self.backbone_name,
            "num_classes": self.num_classes,
            "task": self.task,
            "class_names": list(self.class_names),
            "in_chans": self.in_chans,
            "mean": self.mean.flatten().tolist(),
            "std": self.std.flatten().tolist(),
        }

    def normalise(self, images: Tensor) -> Tensor:
        """Normalised images with the backbone's number of channels: grey is repeated, colour averaged to grey."""
        if self.in_chans == 3:
            return super().normalise(images.expand(-1, 3, -1, -1))
        grey = images if images.shape[1] == 1 else images.to(self.mean.dtype).mean(dim=1, keepdim=True) / 255.0
        return super().normalise(grey).mean(dim=1, keepdim=True)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, outputs) of normalised images (B, C, H, W)."""
        logits: Tensor = self.backbone(images)
        return logits

    def train(self, mode: bool = True) -> "Classification":
        """Keep the norms of frozen layer groups in evaluation mode, so that their statistics do not move."""
        super().train(mode)
        set_frozen_eval(self.backbone, self.frozen_depth)
        return self

    def follow(self, mixup_alpha: float) -> None:
        """Take over the HyperRule's mixup."""
        self.mixup_alpha = mixup_alpha

    def training_loss(self, images: Tensor, batch: Batch) -> Tensor:
        """Loss of one batch, mixed up after normalising.

        Each device batch averages over its own known cells: with unknown labels, ranks and accumulation weigh a cell by
        the cells that happen to be known beside it.
        """
        images, targets = mixup(images, batch["label"], self.mixup_alpha, self.num_classes)
        return self.loss(self(images), targets)
