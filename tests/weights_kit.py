"""Models and files that several tests of weights build."""

import re
from pathlib import Path

import numpy as np
import torch
from torch import nn

from lightning_modules.backbones.factory import create_backbone


def trained(name: str, num_classes: int = 5, in_chans: int = 3, seed: int = 1) -> nn.Module:
    """Return a model none of whose tensors has the value it was initialised with."""
    torch.manual_seed(seed)
    model = create_backbone(name, num_classes, in_chans)
    for tensor in model.state_dict().values():
        tensor.add_(torch.rand_like(tensor) if tensor.is_floating_point() else 3)
    return model


def fresh(name: str, num_classes: int = 5, in_chans: int = 3) -> nn.Module:
    torch.manual_seed(2)
    return create_backbone(name, num_classes, in_chans)


def copy_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(state, other, names) -> bool:
    return all(torch.equal(state[name], other[name]) for name in names)


def save_lightning(path: Path, model: nn.Module, **hyper_parameters) -> Path:
    """Write what a Lightning checkpoint of our tasks holds, with an optimizer state and another head."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {f"backbone.{name}": tensor for name, tensor in model.state_dict().items()}
    state["projector.0.weight"] = torch.ones(3)
    momentum = {"momentum_buffer": torch.ones(7)}
    content = {
        "epoch": 3,
        "state_dict": state,
        "hyper_parameters": hyper_parameters,
        "optimizer_states": [{"state": {0: momentum}}],
    }
    torch.save(content, path)
    return path


def npz_arrays(model: nn.Module) -> dict[str, np.ndarray]:
    """Write a BiT model the way Google's files name and lay out its tensors."""

    def kernel(weight):
        return weight.detach().permute(2, 3, 1, 0).numpy()

    arrays = {
        "resnet/root_block/standardized_conv2d/kernel": kernel(model.stem.conv.weight),
        "resnet/group_norm/gamma": model.norm.weight.detach().numpy(),
        "resnet/group_norm/beta": model.norm.bias.detach().numpy(),
        "resnet/head/conv2d/kernel": kernel(model.head.fc.weight),
        "resnet/head/conv2d/bias": model.head.fc.bias.detach().numpy(),
    }
    for b, stage in enumerate(model.stages, start=1):
        for u, block in enumerate(stage.blocks, start=1):
            unit = f"resnet/block{b}/unit{u:02d}"
            for letter, conv, norm in zip(
                "abc",
                (block.conv1, block.conv2, block.conv3),
                (block.norm1, block.norm2, block.norm3),
                strict=True,
            ):
                arrays[f"{unit}/{letter}/standardized_conv2d/kernel"] = kernel(conv.weight)
                arrays[f"{unit}/{letter}/group_norm/gamma"] = norm.weight.detach().numpy()
                arrays[f"{unit}/{letter}/group_norm/beta"] = norm.bias.detach().numpy()
            if block.downsample is not None:
                arrays[f"{unit}/a/proj/standardized_conv2d/kernel"] = kernel(block.downsample.conv.weight)
    return arrays


def port_name(name: str) -> str:
    """Return the name that BiT's PyTorch port, written down from its `bit_pytorch/models.py`, has for one of timm's."""
    unit = re.fullmatch(r"stages\.(\d)\.blocks\.(\d)\.(conv|norm|downsample\.conv)(\d?)\.(\w+)", name)
    if unit is None:
        outside = {"stem.conv": "root.conv", "norm": "head.gn", "head.fc": "head.conv"}
        module, _, leaf = name.rpartition(".")
        return f"{outside[module]}.{leaf}"
    stage, block, kind, position, leaf = unit.groups()
    layer = {"conv": f"conv{position}", "norm": f"gn{position}", "downsample.conv": "downsample"}[kind]
    return f"body.block{int(stage) + 1}.unit{int(block) + 1:02d}.{layer}.{leaf}"


def port_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return a BiT model's state dict under the names of the PyTorch port."""
    return {port_name(name): tensor for name, tensor in model.state_dict().items()}
