"""The first layer groups of a backbone from weights, at any granularity."""

from dataclasses import replace

from torch import nn

from lightning_modules.backbones.checkpoints import Source, WeightsReport, load_weights
from lightning_modules.backbones.layers import Granularity, first_groups, layer_groups


def load_first_groups(
    model: nn.Module, source: Source, depth: int | None, granularity: Granularity = "coarse"
) -> WeightsReport:
    """Copy the first `depth` layer groups of weights into a freshly built model; the rest keeps its random values.

    Args:
        model: A timm model; its classifier is left as it is.
        source: What `load_weights` takes.
        depth: Number of layer groups; None = all.
        granularity: What counts as a layer group.

    Raises:
        ModelError: As `load_weights`; or `depth` is out of range.
    """
    if depth is None or granularity == "coarse":
        return load_weights(model, source, head=False, groups=depth)
    wanted = {name for group in first_groups(model, depth, granularity) for name in group.tensors}
    # Weights are loaded by whole stages: as many as hold these groups, whose other tensors are put back afterwards.
    stages = [set(group.tensors) for group in layer_groups(model)]
    touched = next(count for count in range(len(stages) + 1) if wanted <= set().union(*stages[:count]))
    beyond = set().union(*stages[:touched]) - wanted
    random = {name: value.clone() for name, value in model.state_dict().items() if name in beyond}
    report = load_weights(model, source, head=False, groups=touched)
    model.load_state_dict(random, strict=False)
    return replace(
        report,
        loaded=tuple(name for name in report.loaded if name not in beyond),
        missing=tuple(name for name in report.missing if name not in beyond),
        reinitialised=tuple(name for name in model.state_dict() if name in beyond.union(report.reinitialised)),
    )
