"""Classification: supervised pre-training and every transfer protocol, for one class, one label or many labels."""

from functools import partial
from typing import Any, Literal

from pytorch_lightning.cli import OptimizerCallable
from pytorch_lightning.strategies import DDPStrategy, Strategy
from torch import Tensor, nn

from lightning_modules import losses
from lightning_modules.backbones.checkpoints import WeightsReport
from lightning_modules.backbones.factory import classifier_parameters, create_backbone, preprocessing
from lightning_modules.backbones.layers import Granularity, freeze, layer_groups, set_frozen_eval
from lightning_modules.backbones.partial import load_first_groups
from lightning_modules.backbones.standardisation import set_standardisation_eps
from lightning_modules.backbones.standardisation import standardisation_eps as eps_of
from lightning_modules.base import Batch, default_optimizer
from lightning_modules.errors import ModelError
from lightning_modules.labelled import LabelledTask
from lightning_modules.metrics import Evaluation
from lightning_modules.mixup import mixup
from lightning_modules.optimizers import layer_decay_groups
from lightning_modules.phases import probe_length, within_phase
from lightning_modules.schedules import RunLength, Schedule
from lightning_modules.text_head import set_text_head
from lightning_modules.thresholds import Task


class Classification(LabelledTask):
    """Train a backbone with a new classifier, from scratch or from weights, as deep as asked.

    A protocol is a setting of four arguments. scratch: no `weights`. finetune: `weights`. linear_probe: `weights` and
    `frozen_depth: -1`. lp_ft: `weights` and a `probe_fraction`. depth: the first `transfer_depth` layer groups of the
    `weights`, `frozen_depth` of them fixed.

    lp_ft is one run of two phases. In the first, what comes from the weights stands still as in a linear probe; in the
    second all but the first `frozen_depth` groups train, with the schedule and the optimizer's state begun anew. The
    phase follows from the step alone, so that a run resumes in it.

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
        granularity: What the two depths and `layer_decay` count: coarse = the stem and the stages, block = the stem and
            every block.
        probe_fraction: Share of the run's steps, 0–1, in which only what is new trains, before everything does; null =
            a run of one phase, as is every run from scratch.
        layer_decay: Factor of the learning rate from a layer group to the one before it, 0–1: a group at distance d
            from the classifier (the last one: 1) learns at lr × layer_decay^d; null = all alike.
        head_init: Initial classifier: default = timm's own for the net, zero = weight and bias 0, text = the zero-shot
            classifier of the CLIP run that the weights are of; the data's `captions` say how classes are described.
        class_texts: Texts that describe each class, for `head_init: text`; come from the data.
        optimizer: Optimizer of the parameters that train.
        lr_scheduler: Schedule of the learning rate; default constant.
        mixup_alpha: Beta parameter of mixup, 0 = none; the HyperRule sets its own.
        label_smoothing: Share of the target spread over all classes, 0–1; multi-class only.
        mean: Channel means to normalise with, in [0, 1]; default: those of the weights, else the backbone's.
        std: Channel standard deviations, likewise.
        standardisation_eps: ε of the weight standardisation; default that of the weights, which some bring along.
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
        granularity: Granularity = "coarse",
        probe_fraction: float | None = None,
        layer_decay: float | None = None,
        head_init: Literal["default", "zero", "text"] = "default",
        class_texts: list[list[str]] | None = None,
        optimizer: OptimizerCallable = default_optimizer,
        lr_scheduler: Schedule | None = None,
        mixup_alpha: float = 0.0,
        label_smoothing: float = 0.0,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        standardisation_eps: float | None = None,
    ) -> None:
        super().__init__(optimizer, lr_scheduler)
        if num_classes is None or task is None:
            raise ModelError(
                "num_classes and task are not known",
                hint="they come from the data; without a command line give both",
            )
        if num_classes < 1:
            raise ModelError(
                f"num_classes is {num_classes}: the data has no classes",
                hint="pre-train on it with SimCLR or CLIP, or take a set with labels",
            )
        self.backbone_name, self.num_classes, self.in_chans = backbone, num_classes, in_chans
        self.task: Task = task
        self.class_names = class_names or [str(number) for number in range(num_classes)]
        self.weights, self.transfer_depth, self.frozen_depth = weights, transfer_depth, frozen_depth
        self.granularity: Granularity = granularity
        self.probe_fraction, self.layer_decay, self.head_init = probe_fraction, layer_decay, head_init
        self.class_texts = class_texts
        self.probe_steps = 0  # of the run that is being fitted; known when it begins
        self.mixup_alpha, self.label_smoothing = mixup_alpha, label_smoothing
        self.weights_report: WeightsReport | None = None
        self._given_mean, self._given_std, self._given_eps = mean, std, standardisation_eps
        if len(self.class_names) != num_classes:
            raise ModelError(f"{len(self.class_names)} class names for num_classes {num_classes}")
        if not 0 <= label_smoothing < 1 or mixup_alpha < 0:
            raise ModelError(
                f"label_smoothing {label_smoothing}, mixup_alpha {mixup_alpha}",
                valid="0 ≤ label_smoothing < 1, alpha ≥ 0",
            )
        if label_smoothing and task != "multiclass":
            raise ModelError(
                f"label_smoothing {label_smoothing} with {task} labels would do nothing",
                valid="0, or classes that exclude each other",
            )
        if probe_fraction is not None and not 0 < probe_fraction < 1:
            raise ModelError(f"probe_fraction is {probe_fraction}", valid="above 0 and below 1, or null")
        if layer_decay is not None and not 0 < layer_decay <= 1:
            raise ModelError(f"layer_decay is {layer_decay}", valid="above 0 and at most 1, or null")
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
        if self.head_init == "zero":
            for parameter in classifier_parameters(self.backbone):
                nn.init.zeros_(parameter)
        mean, std = preprocessing(self.backbone_name)
        depth = self._count_groups()
        if self.weights is not None:
            report = load_first_groups(self.backbone, self.weights, self.transfer_depth, self.granularity)
            self.weights_report = report
            if report.source_preprocessing is not None:
                mean, std = report.source_preprocessing
        if self.head_init == "text":
            self._describe_classes()
        self.frozen_depth = depth if self.frozen_depth == -1 else self.frozen_depth
        self.transferred = 0 if self.weights is None else depth if self.transfer_depth is None else self.transfer_depth
        if self.frozen_depth > self.transferred:
            raise ModelError(
                f"frozen_depth {self.frozen_depth} exceeds the {self.transferred} layer groups from the weights",
                valid=f"0 to {self.transferred}",
            )
        if self.transferred == 0:
            self.probe_fraction = None  # nothing to hold still: a protocol of two phases is one from scratch
        if self.probe_fraction is not None and self.frozen_depth == self.transferred:
            raise ModelError(
                f"probe_fraction {self.probe_fraction} with frozen_depth {self.frozen_depth}: both phases are the same",
                valid=f"frozen_depth 0 to {self.transferred - 1}",
            )
        if self._given_eps is not None:
            set_standardisation_eps(self.backbone, self._given_eps)
        self._stand_still(self.frozen_depth)
        self.set_normalisation(list(self._given_mean or mean), list(self._given_std or std))

    def _describe_classes(self) -> None:
        """Begin with the classifier that texts give."""
        if self.task != "multiclass":
            raise ModelError(
                f"head_init text with {self.task} labels",
                valid="classes that exclude each other, or head_init: default",
            )
        if self.weights is None or self.class_texts is None or self.transfer_depth is not None:
            raise ModelError(
                "head_init text needs all layers of a CLIP run's weights, and texts for its classes",
                hint="set model.init_args.weights, and data.init_args.captions: ['a photo of a {}.']",
            )
        set_text_head(self.backbone, self.weights, self.class_texts)

    def _count_groups(self) -> int:
        """Number of layer groups; 0 for the few architectures that timm cuts into none, if nothing here counts them."""
        counted = self.frozen_depth or self.transfer_depth or self.probe_fraction or self.layer_decay
        try:
            return len(layer_groups(self.backbone, self.granularity))
        except ModelError:
            if counted or self.granularity != "coarse":
                raise
            return 0

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
        if self.probe_fraction is not None:
            return "lp_ft"
        if self.frozen_depth == 0 and self.transfer_depth is None:
            return "finetune"
        groups = len(layer_groups(self.backbone, self.granularity))
        if self.frozen_depth == groups:
            return "linear_probe"
        return "finetune" if self.frozen_depth == 0 and self.transfer_depth == groups else "depth"

    def describe(self) -> dict[str, Any]:
        """Architecture, method, protocol and depths."""
        return {
            "architecture": self.backbone_name,
            "method": "supervised",
            "protocol": self.protocol,
            "transfer_depth": None if self.weights is None else self.transferred or self.transfer_depth,
            "frozen_depth": self.frozen_depth,
            "granularity": self.granularity,
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
            "standardisation_eps": eps_of(self.backbone),
        }

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, outputs) of normalised images (B, C, H, W)."""
        logits: Tensor = self.backbone(images)
        return logits

    def train(self, mode: bool = True) -> "Classification":
        """Keep the norms of frozen layer groups in evaluation mode, so that their statistics do not move."""
        super().train(mode)
        set_frozen_eval(self.backbone, self.standing, self.granularity)
        return self

    def _stand_still(self, depth: int) -> None:
        """Let the first `depth` layer groups stand still from now on, and no others."""
        self.standing = depth
        freeze(self.backbone, depth, self.granularity)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The parameters that train in any phase, layer by layer where their rates differ."""
        groups = super().parameter_groups()
        if self.layer_decay is None:
            return groups
        parameters = dict(self.backbone.named_parameters())
        layers = [
            [parameters[name] for name in group.parameters] for group in layer_groups(self.backbone, self.granularity)
        ]
        return layer_decay_groups(groups, layers, self.layer_decay)

    def setup(self, stage: str) -> None:
        """Find out the run's length and where its first phase ends."""
        super().setup(stage)
        if stage == "fit" and self.probe_fraction is not None:
            self._stand_still(self.frozen_depth)  # the optimizer takes what trains now: in one phase or the other
            self.probe_steps = probe_length(self.run_length().total_steps, self.probe_fraction)

    def rate_factor(self, step: int, run: RunLength) -> float:
        """Multiplier of every learning rate: the schedule over the phase that `step` belongs to."""
        return self.schedule.factor(*within_phase(step, self.probe_steps, run))

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seed the random numbers; begin the phase that the step belongs to, also after a resume."""
        super().on_train_batch_start(batch, batch_idx)
        step = self.trainer.global_step
        depth = self.transferred if step < self.probe_steps else self.frozen_depth
        if depth != self.standing:
            self._stand_still(depth)
            self.train()
            _wrap_anew(self.trainer.strategy)
        if self.probe_steps and step == self.probe_steps:  # before each batch of the step, if gradients accumulate
            for optimizer in self.trainer.optimizers:
                optimizer.state.clear()

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


def _wrap_anew(strategy: Strategy) -> None:
    """Let DDP know that other parameters train: it reduces the gradients of those that did when it was set up."""
    if isinstance(strategy, DDPStrategy):
        strategy.model = strategy.lightning_module
        strategy.configure_ddp()
