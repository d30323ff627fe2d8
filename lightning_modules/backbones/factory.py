"""Backbones by their timm name, their preprocessing, and which of their parameters are the classifier."""

import difflib
from typing import Any, cast

import timm
from torch import nn

from lightning_modules.errors import ModelError


def default_config(name: str) -> Any:
    """Return timm's `PretrainedCfg` of a model name, with or without a pretrained tag.

    Raises:
        ModelError: The name or its tag is unknown to timm.
    """
    architecture, _, tag = name.partition(".")
    try:
        config = timm.models.get_pretrained_cfg(name) if timm.is_model(architecture) else None
    except RuntimeError as error:
        raise ModelError(
            f"timm has no weights {tag!r} for {architecture}",
            valid=timm.list_pretrained(f"{architecture}.*") or "none for this architecture",
        ) from error
    if config is None:  # also names that timm renamed
        raise ModelError(
            f"timm {timm.__version__} has no model {architecture!r}",
            valid=difflib.get_close_matches(architecture, timm.list_models(), n=5, cutoff=0.3) or None,
            hint="`python cli.py list models` lists tested backbones; any name of timm.list_models() works",
        )
    return config


def create_backbone(name: str, num_classes: int, in_chans: int = 3) -> nn.Module:
    """Build a timm model with random weights.

    Args:
        name: A timm model name; a pretrained tag only selects the preprocessing.
        num_classes: Outputs of the classifier: images (B, in_chans, H, W) → logits (B, num_classes).
            0 builds no classifier: the outputs are the pooled features (B, D).
        in_chans: Channels of the input images.

    Raises:
        ModelError: Unknown name, or a number out of range.
    """
    default_config(name)
    if num_classes < 0 or in_chans < 1:
        raise ModelError(
            f"{name} cannot have num_classes={num_classes} and in_chans={in_chans}",
            valid="num_classes 0 or more, in_chans 1 or more",
        )
    model: nn.Module = timm.create_model(name, pretrained=False, num_classes=num_classes, in_chans=in_chans)
    return model


def preprocessing(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and standard deviation per RGB channel, of values in [0, 1], that the net expects.

    Raises:
        ModelError: Unknown name.
    """
    config = default_config(name)
    return tuple(config.mean), tuple(config.std)


def model_config(model: nn.Module) -> dict[str, Any]:
    """Return the configuration that timm attached to a model: architecture, classifier, first_conv, ..."""
    return cast(dict[str, Any], model.pretrained_cfg)


def classifier_names(model: nn.Module) -> tuple[str, ...]:
    """Return the dotted names of the classifier's modules, whether or not the model was built with one.

    The names are timm's own: distilled nets have two, and a width never decides (a backbone's layer can have
    as many outputs as there are classes). Empty for the few architectures that never have a classifier.
    """
    names = model_config(model)["classifier"] or ()
    return (names,) if isinstance(names, str) else tuple(names)


def is_classifier(name: str, model: nn.Module) -> bool:
    """Say whether a tensor's dotted name belongs to the classifier of this model."""
    return name.startswith(tuple(f"{classifier}." for classifier in classifier_names(model)))


def classifier_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the weight and bias of the classifier; an empty list for a model without one."""
    return [parameter for name, parameter in model.named_parameters() if is_classifier(name, model)]
