"""Pooled features of a backbone's layer groups, all of them by one forward pass."""

from collections.abc import Sequence
from functools import partial
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_modules.backbones.factory import model_config
from lightning_modules.backbones.layers import LayerGroup, layer_groups
from lightning_modules.errors import ModelError


class FeatureReader:
    """Reads pooled features of layer groups; what does not change from batch to batch is found out once.

    The features of a group are what the next group is given; those of the last group are what the classifier is given:
    the pooled output after the final norm. Maps are averaged over space, tokens over the patches, without class and
    register tokens.

    Args:
        model: A timm model, with or without a classifier.
        groups: Names of its layer groups, in any order: stages (stem, stage1, ...) and blocks (block1, ...).

    Attributes:
        groups: The names, each once.
        depths: Number of groups, of the same granularity, from the input to each of them.

    Raises:
        ModelError: There is no group of such a name, or no group was asked for.
    """

    def __init__(self, model: nn.Module, groups: Sequence[str]) -> None:
        stages, blocks = layer_groups(model), layer_groups(model, "block")
        places = {group.name: (cut, depth) for cut in (blocks, stages) for depth, group in enumerate(cut, 1)}
        unknown = [name for name in groups if name not in places]
        if unknown or not groups:
            architecture = model_config(model)["architecture"]
            raise ModelError(
                f"{architecture} has no layer group {unknown[0]!r}" if unknown else "no layer group was asked for",
                valid=[*(group.name for group in stages), f"or {blocks[1].name} to {blocks[-1].name}"],
            )
        self.model, self.groups = model, tuple(dict.fromkeys(groups))
        self.depths = {name: places[name][1] for name in self.groups}
        self._next = {
            name: _own_modules(model, cut[depth])
            for name, (cut, depth) in ((name, places[name]) for name in self.groups)
            if depth < len(cut)
        }
        self._channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC"  # Swin and its kind
        self._prefix = int(getattr(model, "num_prefix_tokens", 0))

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Features by group of normalised images (B, C, H, W): float32 (B, D), in the order asked for.

        The model is evaluated in eval mode and without gradients, and is left in the mode that it was in.

        Raises:
            ModelError: A group was never reached.
        """
        net = cast(Any, self.model)
        found: dict[str, Tensor] = {}
        training = [module for module in self.model.modules() if module.training]
        hooks = []
        try:
            for module in training:
                module.training = False
            for name, modules in self._next.items():
                keep = partial(self._keep, found, name)
                hooks += [module.register_forward_pre_hook(keep, with_kwargs=True) for module in modules]
            with torch.no_grad():
                last = net.forward_head(net.forward_features(images), pre_logits=True)
        finally:
            for hook in hooks:
                hook.remove()
            for module in training:
                module.training = True
        missed = [name for name in self._next if name not in found]
        if missed:
            architecture = model_config(self.model)["architecture"]
            raise ModelError(
                f"no module of {architecture} is given the output of {missed[0]} alone",
                valid=[name for name in self.groups if name not in missed] or None,
            )
        return {name: found[name] if name in self._next else self._pool(last) for name in self.groups}

    def _keep(self, found: dict[str, Tensor], name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Keep the first input that any module of the next group gets; pooled at once, maps are large."""
        if name not in found:
            found[name] = self._pool(next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)))

    def _pool(self, output: Tensor) -> Tensor:
        output = output.float()
        if output.ndim == 4:
            return output.mean(dim=(1, 2) if self._channels_last else (2, 3))
        return output[:, self._prefix :].mean(dim=1) if output.ndim == 3 else output


def group_features(model: nn.Module, images: Tensor, groups: Sequence[str]) -> dict[str, Tensor]:
    """Pooled features of layer groups by one forward pass; see `FeatureReader`, which many batches should share.

    Args:
        model: A timm model, with or without a classifier.
        images: Normalised images (B, C, H, W), on the model's device.
        groups: Names of its layer groups: stages (stem, stage1, ...) and blocks (block1, ...).

    Returns:
        Features by group, float32 (B, D).

    Raises:
        ModelError: There is no group of such a name.
    """
    return FeatureReader(model, groups)(images)


def group_widths(model: nn.Module, groups: Sequence[str] | None = None) -> dict[str, int]:
    """Number of features of each layer group, default all stages, from shapes alone: nothing is computed."""
    config = model_config(model)
    stem = config["first_conv"] if isinstance(config["first_conv"], str) else config["first_conv"][0]
    channels = model.get_parameter(f"{stem}.weight").shape[1]
    images = torch.zeros(1, channels, *config["input_size"][1:], device="meta")
    tensors = chain(model.named_parameters(), model.named_buffers())
    shapes = {f"model.{name}": tensor.detach().to("meta") for name, tensor in tensors}
    names = [group.name for group in layer_groups(model)] if groups is None else groups
    features = torch.func.functional_call(_Features(model, names), shapes, (images,))
    return {name: values.shape[1] for name, values in features.items()}


class _Features(nn.Module):
    """Features as a module's output."""

    def __init__(self, model: nn.Module, groups: Sequence[str]) -> None:
        super().__init__()
        self.model, self.groups = model, groups

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return group_features(self.model, images, self.groups)


def _own_modules(model: nn.Module, group: LayerGroup) -> list[nn.Module]:
    """Modules all of whose tensors, of which there are some, belong to the group."""
    inside = set(group.tensors)
    within: set[str] = set()
    across: set[str] = set()
    for name, _ in chain(model.named_parameters(), model.named_buffers()):
        parts = name.split(".")
        (within if name in inside else across).update(".".join(parts[:length]) for length in range(len(parts)))
    return [model.get_submodule(path) for path in within - across]
