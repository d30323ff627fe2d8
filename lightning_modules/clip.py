"""CLIP: an image and its caption belong together, other captions do not (Radford et al. 2021, arXiv 2103.00020)."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules import contrastive_losses
from lightning_modules.base import Batch
from lightning_modules.errors import ModelError
from lightning_modules.pairs import PairTask
from lightning_modules.text.tower import TextTower, build
from lightning_modules.text.transformer import SmallText

LENGTH_MEMORY = 100  # steps
FIRST_SCALE = 1 / 0.07  # inverse temperature at the start, as in the paper


class CLIP(PairTask):
    """Pre-train a backbone on images and their captions: symmetric InfoNCE, negatives from all devices.

    The data gives the captions: `ImageTextShards`, or any labelled set with `data.init_args.captions`. Only the
    backbone is transferred; the checkpoint also holds the text tower, for zero-shot evaluation.

    Args:
        text: The text tower: `SmallText` (needs no download; default), `OpenClipText` or `HuggingFaceText`.
        embedding: Width of the space that both towers are projected to; 1,024 in Entezari et al. (arXiv 2302.13602).
        **kwargs: Arguments of `PairTask`: backbone, weights, images_at_once (captions likewise), optimizer, ...
    """

    sides = ("image", "text")
    lengths: Tensor
    """Weighted sum of the mean lengths of image embeddings in training batches, and the sum of the weights."""

    def __init__(self, text: TextTower | None = None, embedding: int = 1024, **kwargs: Any) -> None:
        if embedding < 1:
            raise ModelError(f"embedding is {embedding}", valid="1 or more")
        super().__init__(**kwargs)
        self.embedding = embedding
        self.captions_cut = 0  # of the latest batch: captions longer than the tower's context
        self.text: TextTower = text if text is not None else SmallText()
        self.build()

    def configure_models(self) -> None:
        """Build the image tower, both projections and the temperature."""
        super().configure_models()
        self.image_projection = nn.Linear(self.feature_width, self.embedding, bias=False)
        self.text_projection = nn.Linear(self.text.width, self.embedding, bias=False)
        for layer in (self.image_projection, self.text_projection):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
        self.log_scale = nn.Parameter(torch.tensor(math.log(FIRST_SCALE)))
        self.register_buffer("lengths", torch.zeros(2))

    def embed_images(self, images: Tensor) -> Tensor:
        """Embeddings (B, D) of normalised images, not yet of length 1."""
        embeddings: Tensor = self.image_projection(self.in_parts(self.encode, images))
        return embeddings

    def embed_texts(self, captions: Sequence[str]) -> Tensor:
        """Embeddings (B, D) of captions, not yet of length 1."""
        tokens, self.captions_cut = self.text.tokenize_counted(captions)
        embeddings: Tensor = self.text_projection(self.in_parts(self.text, tokens.to(self.device, non_blocking=True)))
        return embeddings

    def embed_pairs(self, images: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Embeddings (B, D) of the images and of their captions."""
        if "text" not in batch:
            raise ModelError(
                "CLIP needs a caption for every image",
                hint="take ImageTextShards, or give a labelled set data.init_args.captions: ['a photo of a {}.']",
            )
        return self.embed_images(images), self.embed_texts(batch["text"])

    @property
    def embedding_length(self) -> Tensor:
        """Mean length of image embeddings in recent training batches; 1 before the first."""
        total, weight = self.lengths
        return torch.where(weight > 0, total / weight.clamp(min=1e-9), 1.0)

    def pair_loss(self, first: Tensor, second: Tensor) -> Tensor:
        """Symmetric InfoNCE among the pairs of all ranks."""
        with torch.no_grad():
            self.lengths.mul_(1 - 1 / LENGTH_MEMORY)
            self.lengths += torch.stack([first.norm(dim=1).mean(), torch.ones_like(first[0, 0])]).to(self.lengths)
        return contrastive_losses.info_nce(first, second, contrastive_losses.clamped_scale(self.log_scale))

    def evaluation_loss(self, first: Tensor, second: Tensor) -> Tensor:
        """Symmetric InfoNCE among the given pairs."""
        scale = contrastive_losses.clamped_scale(self.log_scale)
        return contrastive_losses.info_nce(first, second, scale, across_ranks=False)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of one batch; the temperature and the share of captions that were cut are logged beside it."""
        loss = super().training_step(batch, batch_idx)
        if (batch_idx + 1) % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self.log("train/scale", self.log_scale.detach().exp())
            self.log("train/captions_cut", self.captions_cut / len(batch["text"]))
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, and keep the inverse temperature at 100 or less."""
        super().optimizer_step(*args, **kwargs)
        contrastive_losses.clamp_log_scale_(self.log_scale)

    def describe(self) -> dict[str, Any]:
        """Architecture and method."""
        return {
            "architecture": self.backbone_name,
            "method": "clip",
            "protocol": "pretrain",
            "transfer_depth": None,
            "frozen_depth": 0,
            "granularity": None,
        }

    def hyper_parameters(self) -> dict[str, Any]:
        """Architecture, text tower, embedding and normalisation."""
        return {**super().hyper_parameters(), "text": self.text.describe(), "embedding": self.embedding}


def load_clip(checkpoint: Path) -> CLIP:
    """Both towers of a CLIP checkpoint, in evaluation mode, on the CPU.

    Raises:
        ModelError: The checkpoint is not one of CLIP.
    """
    content = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    facts = content.get("hyper_parameters") or {}
    if facts.get("method") != "clip":
        found = f"{facts['method']}" if "method" in facts else "no pre-training with captions"
        raise ModelError(f"{checkpoint} has no text tower: it is of {found}", valid="a run of CLIP")
    known = {name: facts[name] for name in ("backbone", "embedding", "in_chans", "mean", "std", "standardisation_eps")}
    model = CLIP(text=build(facts["text"]), **known)
    model.load_state_dict(content["state_dict"])
    return model.eval()
