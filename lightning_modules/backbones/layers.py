"""The one enumeration of a backbone's layer groups: for transfer depth, freezing, layer-wise rates and reports."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, cast

from timm.models._manipulate import group_with_matcher
from torch import nn

from lightning_modules.backbones.factory import classifier_names, is_classifier, model_config
from lightning_modules.errors import ModelError

Granularity = Literal["coarse", "block"]
"""How finely a backbone is cut: coarse = stem and stages (BiT: 5), block = stem and all blocks (BiT R50x1: 17)."""

_NAMES: dict[str, str] = {"coarse": "stage", "block": "block"}


@dataclass(frozen=True)
class LayerGroup:
    """A stretch of the backbone between input and output.

    Attributes:
        name: "stem", then "stage1", "stage2", ... (a transformer's stages are its blocks), or "block1", "block2", ...
        parameters: Dotted names of the parameters.
        buffers: Dotted names of the buffers, such as BatchNorm's running statistics.
    """

    name: str
    parameters: tuple[str, ...]
    buffers: tuple[str, ...]

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of parameters and buffers."""
        return self.parameters + self.buffers

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the modules that own these tensors directly; "" is the model itself."""
        return tuple(dict.fromkeys(name.rpartition(".")[0] for name in self.tensors))


def layer_groups(model: nn.Module, granularity: Granularity = "coarse") -> list[LayerGroup]:
    """Return the groups of a timm backbone from input to output: every parameter but the classifier's, once.

    timm's matcher decides; between blocks a downsampling layer goes with the block that it belongs to or feeds. What
    it puts beside the classifier (the final norm, a head's norm or hidden layer) belongs to the last group here: a
    new classifier must not take the trained norm with it.

    Args:
        model: A timm model, with or without a classifier.
        granularity: Stages or blocks. The blocks of one stage follow each other, and make up the stage.

    Raises:
        ModelError: timm does not group this architecture, or there is no such granularity.
    """
    if granularity not in _NAMES:
        raise ModelError(f"granularity is {granularity!r}", valid=list(_NAMES))
    try:
        matcher = cast(Any, model).group_matcher(coarse=granularity == "coarse")
    except (AttributeError, AssertionError) as error:
        raise ModelError(
            f"timm defines no layer groups for {model_config(model)['architecture']}",
            hint="leave transfer_depth, frozen_depth, granularity, probe_fraction and layer_decay unset, or use one of "
            "`python cli.py list models`",
        ) from error
    parameters = [name for name, _ in model.named_parameters()]
    buffers = [name for name, _ in model.named_buffers()]
    # Classifier names stand in where the model was built without one, so that both give the same groups.
    classifiers = {f"{name}.weight" for name in classifier_names(model)}
    names = dict.fromkeys([*parameters, *buffers, *sorted(classifiers)])
    grouping = group_with_matcher(((name, name) for name in names), matcher)
    merged: list[list[str]] = []
    for index in sorted(grouping):
        members = [name for name in grouping[index] if not is_classifier(name, model)]
        if classifiers.intersection(grouping[index]) and merged:
            merged[-1] += members
        elif members:
            merged.append(members)
    groups = []
    for index, members in enumerate(merged):
        inside = set(members)
        groups.append(
            LayerGroup(
                name=f"{_NAMES[granularity]}{index}" if index else "stem",
                parameters=tuple(name for name in parameters if name in inside),
                buffers=tuple(name for name in buffers if name in inside),
            )
        )
    return groups


def first_groups(model: nn.Module, depth: int, granularity: Granularity = "coarse") -> list[LayerGroup]:
    """Return the first `depth` layer groups, counted from the input; none at depth 0, also of a net without groups.

    Raises:
        ModelError: `depth` is negative or larger than the number of groups.
    """
    if depth == 0:
        return []
    groups = layer_groups(model, granularity)
    if not 0 <= depth <= len(groups):
        raise ModelError(
            f"{model_config(model)['architecture']} has {len(groups)} layer groups: no depth of {depth}",
            valid=f"0 (none) to {len(groups)}: {', '.join(group.name for group in groups)}",
        )
    return groups[:depth]


def freeze(model: nn.Module, depth: int, granularity: Granularity = "coarse") -> None:
    """Stop gradients for the first `depth` layer groups and let all others and the classifier train.

    The result depends on `depth` alone, not on what was frozen before.

    Raises:
        ModelError: `depth` is out of range.
    """
    frozen = {name for group in first_groups(model, depth, granularity) for name in group.parameters}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)


def set_frozen_eval(model: nn.Module, depth: int, granularity: Granularity = "coarse") -> None:
    """Put the modules of the first `depth` layer groups into eval mode; call it after every `model.train()`.

    A frozen BatchNorm in training mode would still move its statistics, and dropout would still be random.
    A module counts as frozen when all tensors in it are; its parts without tensors (dropout) follow it.

    Raises:
        ModelError: `depth` is out of range.
    """
    frozen = {name for group in first_groups(model, depth, granularity) for name in group.tensors}
    tensors = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    trained = _owners(name for name in tensors if name not in frozen)
    for name in _owners(frozen) - trained:
        model.get_submodule(name).eval()


def _owners(tensors: Iterable[str]) -> set[str]:
    """Return the names of all modules that hold one of these tensors, directly or further down."""
    owners: set[str] = set()
    for tensor in tensors:
        parts = tensor.split(".")
        owners.update(".".join(parts[:length]) for length in range(len(parts)))
    return owners
