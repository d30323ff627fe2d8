"""Classifiers from words: what a CLIP network says without having seen a label of the target."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.backbones.factory import classifier_parameters
from lightning_modules.backbones.sources import checkpoint_file
from lightning_modules.clip import CLIP, load_clip
from lightning_modules.contrastive_losses import clamped_scale
from lightning_modules.errors import ModelError


@torch.no_grad()
def class_embeddings(clip: CLIP, class_texts: Sequence[Sequence[str]]) -> Tensor:
    """Embeddings (C, D) of length 1 of classes, each the mean over the texts that describe it.

    Averaging over templates as of Radford et al. 2021 (arXiv 2103.00020, section 3.1.4).

    Args:
        clip: Both towers, in evaluation mode.
        class_texts: For every class in its order, the texts that describe it, equally many.
    """
    texts = [text for described in class_texts for text in described]
    embeddings = torch.cat([clip.embed_texts(texts[start : start + 256]) for start in range(0, len(texts), 256)])
    means = F.normalize(embeddings, dim=1).view(len(class_texts), -1, embeddings.shape[1]).mean(dim=1)
    return F.normalize(means, dim=1)


@torch.no_grad()
def zero_shot_logits(clip: CLIP, images: Tensor, classes: Tensor) -> Tensor:
    """Logits (B, C) of normalised images: cosines with the classes over the learned temperature."""
    return clamped_scale(clip.log_scale) * F.normalize(clip.embed_images(images), dim=1) @ classes.T


@torch.no_grad()
def set_text_head(model: nn.Module, source: str, class_texts: Sequence[Sequence[str]]) -> None:
    """Let a backbone's new classifier say what the CLIP run that it comes from says without training.

    The classifier is linear in the features, the cosine is not: it divides by the length of an image's embedding. Here
    all lengths count as their mean in training. The class that is named first is the same for every image.

    Args:
        model: A timm model with one linear classifier of C outputs.
        source: A run of CLIP, or its checkpoint.
        class_texts: As `class_embeddings` takes them, C classes.

    Raises:
        ModelError: The weights are not of CLIP, or the classifier is not one linear layer that fits.
    """
    clip = load_clip(checkpoint_file(source))
    directions = class_embeddings(clip, class_texts) @ clip.image_projection.weight
    weight = clamped_scale(clip.log_scale) / clip.embedding_length * directions
    parameters = classifier_parameters(model)
    if len(parameters) != 2 or parameters[0].numel() != weight.numel() or parameters[1].shape != (len(class_texts),):
        shapes = [tuple(parameter.shape) for parameter in parameters]
        raise ModelError(
            f"a head from texts needs one linear classifier of {tuple(weight.shape)}, not {shapes}",
            hint="choose the backbone that CLIP was trained with, or head_init: default",
        )
    parameters[0].copy_(weight.view_as(parameters[0]))
    parameters[1].zero_()
