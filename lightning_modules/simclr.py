"""SimCLR: two views of an image belong together, those of other images do not (Chen et al. 2020, arXiv 2002.05709)."""

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules import contrastive_losses
from lightning_modules.base import Batch
from lightning_modules.errors import ModelError
from lightning_modules.global_norm import GlobalBatchNorm1d
from lightning_modules.pairs import PairTask


class SimCLR(PairTask):
    """Pre-train a backbone without labels: NT-Xent between two augmented views, negatives from all devices.

    The data gives the views: `data.init_args.augmented_views: 2` and a `transform` such as simclr. Only the backbone is
    transferred; the projection stays behind in the checkpoint.

    Args:
        projection: Widths of the MLP after the pooled features: its hidden layers, each with BatchNorm and ReLU, and
            the embedding. [4096, 256] is the one of Entezari et al. (arXiv 2302.13602), [2048, 128] that of the paper.
        temperature: Of the softmax over similarities, > 0. The paper tunes it: 0.1 for ImageNet, 0.5 for CIFAR-10.
        **kwargs: Arguments of `PairTask`: backbone, weights, images_at_once (two views a pair), optimizer, ...
    """

    def __init__(self, projection: list[int] | None = None, temperature: float = 0.1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.projection_widths = list(projection) if projection is not None else [4096, 256]
        self.temperature = temperature
        if not self.projection_widths or min(self.projection_widths) < 1:
            raise ModelError(f"projection is {projection}", valid="widths of 1 or more, such as [4096, 256]")
        if not 0 < temperature < math.inf:
            raise ModelError(f"temperature is {temperature}", valid="a finite number above 0, such as 0.1")
        self.build()

    def configure_models(self) -> None:
        """Build the backbone and the projection."""
        super().configure_models()
        *hidden, last = pairwise([self.feature_width, *self.projection_widths])
        layers: list[nn.Module] = []
        for width, wider in hidden:
            layers += [nn.Linear(width, wider, bias=False), GlobalBatchNorm1d(wider), nn.ReLU()]
        self.projector = nn.Sequential(*layers, nn.Linear(*last))

    def embed_pairs(self, images: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Projections (B, D) of both views; the norms of backbone and projection see the views together."""
        if "view2" not in batch:
            raise ModelError(
                "SimCLR needs two views of every image",
                hint="set data.init_args.augmented_views: 2 and a transform such as simclr",
            )
        views = torch.cat([images, self.normalise(batch["view2"])])
        first, second = self.projector(self.in_parts(self.encode, views)).chunk(2)
        return first, second

    def pair_loss(self, first: Tensor, second: Tensor) -> Tensor:
        """NT-Xent among the views of all ranks."""
        return contrastive_losses.nt_xent(first, second, self.temperature)

    def evaluation_loss(self, first: Tensor, second: Tensor) -> Tensor:
        """NT-Xent among the given views."""
        return contrastive_losses.nt_xent(first, second, self.temperature, across_ranks=False)

    def describe(self) -> dict[str, Any]:
        """Architecture and method."""
        return {
            "architecture": self.backbone_name,
            "method": "simclr",
            "protocol": "pretrain",
            "transfer_depth": None,
            "frozen_depth": 0,
            "granularity": None,
        }

    def hyper_parameters(self) -> dict[str, Any]:
        """Architecture, projection, temperature and normalisation."""
        facts = {"projection": self.projection_widths, "temperature": self.temperature}
        return {**super().hyper_parameters(), **facts}
