"""Tasks that bring pairs together: two views of an image, or an image and its caption. The base of SimCLR and CLIP."""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar, Literal, cast

import torch
from pytorch_lightning.cli import OptimizerCallable
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from lightning_modules.backbones.checkpoints import WeightsReport
from lightning_modules.backbones.factory import create_backbone, preprocessing
from lightning_modules.backbones.partial import load_first_groups
from lightning_modules.backbones.standardisation import set_standardisation_eps
from lightning_modules.backbones.standardisation import standardisation_eps as eps_of
from lightning_modules.base import BaseTask, Batch
from lightning_modules.errors import ModelError
from lightning_modules.metrics import MetricValue
from lightning_modules.pair_evaluation import PairEvaluation
from lightning_modules.schedules import Schedule


def default_optimizer(parameters: Any) -> torch.optim.AdamW:
    """AdamW at the rate and weight decay of Entezari et al. (arXiv 2302.13602)."""
    return torch.optim.AdamW(parameters, lr=0.001, weight_decay=0.1)


class PairTask(BaseTask):
    """Pre-training on pairs whose negatives are all other pairs of the global batch.

    The batch is never accumulated, since that would leave negatives out: a batch that does not fit in memory is encoded
    in parts of `images_at_once`, whose activations are computed again in the backward pass. Loss and gradient are those
    of the whole batch (the gradient caching of Gao et al. 2021, arXiv 2101.06983, by activation checkpoints). Only a
    backbone with BatchNorm sees a difference: its statistics are those of a part, as on a device of its own.

    Args:
        backbone: A timm model; it is built without a classifier.
        in_chans: 3 (grey images are repeated) or 1 (the stem is folded).
        weights: Where the backbone's first weights come from, as in `Classification`; null = random.
        images_at_once: Most images of a device that are encoded at once, in parts of equal size; null = all.
        optimizer: AdamW by default; biases, norms and the temperature get no weight decay. timm.optim.Lars is LARS; it
            wants a weight_decay above 0 (1e-6 in SimCLR's paper), without which it scales no rate.
        lr_scheduler: Schedule of the learning rate; default constant.
        mean: Channel means to normalise with, in [0, 1]; default: those of the weights, else the backbone's.
        std: Channel standard deviations, likewise.
        standardisation_eps: ε of the weight standardisation; default that of the weights.
    """

    def __init__(
        self,
        backbone: str = "resnet50",
        in_chans: Literal[1, 3] = 3,
        weights: str | None = None,
        images_at_once: int | None = None,
        optimizer: OptimizerCallable = default_optimizer,
        lr_scheduler: Schedule | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        standardisation_eps: float | None = None,
    ) -> None:
        super().__init__(optimizer, lr_scheduler)
        self.backbone_name, self.in_chans, self.weights = backbone, in_chans, weights
        if images_at_once is not None and images_at_once < 1:
            raise ModelError(f"images_at_once is {images_at_once}", valid="1 or more, or null for the whole batch")
        self.images_at_once = images_at_once
        self.weights_report: WeightsReport | None = None
        self._given_mean, self._given_std, self._given_eps = mean, std, standardisation_eps

    def build(self) -> None:
        """Build everything; a subclass asks for it when it has kept its own arguments."""
        self.configure_models()
        self.configure_losses()
        self.configure_metrics()

    def configure_models(self) -> None:
        """Build the backbone and load its weights; a subclass adds its projections."""
        self.backbone = create_backbone(self.backbone_name, 0, in_chans=self.in_chans)
        mean, std = preprocessing(self.backbone_name)
        if self.weights is not None:
            self.weights_report = load_first_groups(self.backbone, self.weights, None)
            mean, std = self.weights_report.source_preprocessing or (mean, std)
        if self._given_eps is not None:
            set_standardisation_eps(self.backbone, self._given_eps)
        self.set_normalisation(list(self._given_mean or mean), list(self._given_std or std))

    sides: ClassVar[tuple[str, str] | None] = None
    """What the two sides of a pair are, where they differ."""

    @abstractmethod
    def pair_loss(self, first: Tensor, second: Tensor) -> Tensor:
        """Loss of this rank's pairs (B, D) among those of all ranks; scalar."""

    @abstractmethod
    def evaluation_loss(self, first: Tensor, second: Tensor) -> Tensor:
        """The same among the given pairs (B, D) alone; scalar."""

    @abstractmethod
    def embed_pairs(self, images: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Embeddings (B, D) of both sides of the pairs of a batch, whose normalised images are given."""

    def configure_losses(self) -> None:
        """The loss is the subclass's `pair_loss`."""

    def configure_metrics(self) -> None:
        """Validation in blocks of fixed size, so that its numbers depend on neither batch size nor ranks."""
        self.evaluation = PairEvaluation(self.evaluation_loss, self.sides)

    @property
    def feature_width(self) -> int:
        """Number of pooled features."""
        net = cast(Any, self.backbone)
        return int(getattr(net, "head_hidden_size", net.num_features))

    def hyper_parameters(self) -> dict[str, Any]:
        """Architecture and normalisation."""
        return {
            "method": self.describe()["method"],
            "backbone": self.backbone_name,
            "in_chans": self.in_chans,
            "mean": self.mean.flatten().tolist(),
            "std": self.std.flatten().tolist(),
            "standardisation_eps": eps_of(self.backbone),
        }

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Two groups: what decays, and biases, norms and scalars, which neither decay nor are scaled by LARS."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [parameter for parameter in trained if parameter.ndim > 1]},
            {"params": [parameter for parameter in trained if parameter.ndim <= 1], "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    # Large batches -----------------------------------------------------------------------------------------------

    def in_parts(self, encode: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        """Vectors (N, D) that `encode` makes of images or tokens (N, ...), `images_at_once` of them at a time."""
        size = self.images_at_once
        if size is None or len(inputs) <= size:
            return encode(inputs)
        parts = inputs.tensor_split(-(-len(inputs) // size))  # alike: statistics of a small last part would be poor
        if not torch.is_grad_enabled():
            return torch.cat([encode(part) for part in parts])
        return torch.cat([checkpoint(encode, part, use_reentrant=False, context_fn=self._contexts) for part in parts])

    def _contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Contexts of a part's first pass and of its second, which must not move running statistics again."""
        return nullcontext(), _unmoved_statistics(self.backbone)

    def setup(self, stage: str) -> None:
        """Refuse what would leave negatives out of the loss, or make an image its own negative."""
        super().setup(stage)
        if stage != "fit":
            return
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        if self.trainer.accumulate_grad_batches != 1:
            raise ModelError(
                f"a batch in {self.trainer.accumulate_grad_batches} parts would contrast each part by itself",
                valid="data.init_args.max_batch_per_device: null",
                hint="set model.init_args.images_at_once: the whole batch is then contrasted, and fits in memory",
            )
        images = len(data.rows("train"))
        if not 2 <= data.batch_size <= images:
            raise ModelError(
                f"batch_size {data.batch_size} with {images} training images",
                valid=f"2 to {images}: an image is contrasted with the others of its batch",
            )

    # Steps -------------------------------------------------------------------------------------------------------

    def training_loss(self, images: Tensor, batch: Batch) -> Tensor:
        """Loss of this rank's part of the batch."""
        return self.pair_loss(*self.embed_pairs(images, batch))

    def evaluation_step(self, batch: Batch, split: str) -> None:
        """Collect the embeddings of one batch."""
        first, second = self.embed_pairs(self.normalise(batch["image"]), batch)
        self.evaluation.update(first, second, batch["index"])

    def evaluation_end(self, split: str) -> None:
        """Compute the numbers of all pairs."""
        found = self.evaluation.compute()
        self.evaluation.reset()
        samples = int(found.pop("samples"))
        scores = [
            MetricValue(name, direction, value, samples, samples)
            for (name, _, direction), value in ((key.partition("/"), value) for key, value in found.items())
        ]
        self.keep_scores(split, scores, samples)

    def metric_names(self, split: str) -> list[str]:
        """Names that an evaluation logs."""
        return [f"{split}/{name}" for name in self.evaluation.names()]


@contextmanager
def _unmoved_statistics(model: nn.Module) -> Iterator[None]:
    """Let BatchNorm normalise by its batch inside the block and leave its running statistics as they are."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    kept = [(norm, norm.momentum, cast(Tensor, norm.num_batches_tracked)) for norm in norms]
    try:
        for norm, _, count in kept:
            norm.momentum, norm.num_batches_tracked = 0.0, count.clone()  # SyncBatchNorm wants a counter
        yield
    finally:
        for norm, momentum, count in kept:
            norm.momentum, norm.num_batches_tracked = momentum, count
