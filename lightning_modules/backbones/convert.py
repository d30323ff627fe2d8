"""Names and layouts of tensors in weight files, mapped to timm's: pure functions."""

import re
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from lightning_modules.errors import ModelError

# BiT's official TensorFlow names (big_transfer's .npz files, without "resnet/") and the names of its PyTorch
# port, which the SLAMPAI checkpoints use. Both number blocks and units from 1, timm's resnetv2 from 0.
_NPZ_NAMES = {
    "root_block/standardized_conv2d/kernel": "stem.conv.weight",
    "group_norm/gamma": "norm.weight",
    "group_norm/beta": "norm.bias",
    "head/conv2d/kernel": "head.fc.weight",
    "head/conv2d/bias": "head.fc.bias",
}
_NPZ_UNIT = re.compile(r"block(\d+)/unit(\d+)/([abc])/(proj/)?(standardized_conv2d|group_norm)/(kernel|gamma|beta)")
_PORT_NAMES = {
    "root.conv.weight": "stem.conv.weight",
    "head.gn.weight": "norm.weight",
    "head.gn.bias": "norm.bias",
    "head.conv.weight": "head.fc.weight",
    "head.conv.bias": "head.fc.bias",
}
_PORT_UNIT = re.compile(r"body\.block(\d+)\.unit(\d+)\.(?:(conv|gn)(\d)|downsample)\.(weight|bias)")


def bit_name_of_npz(name: str) -> str:
    """Map a name of BiT's official .npz files to timm's; other names come back unchanged."""
    name = name.removeprefix("resnet/")
    unit = _NPZ_UNIT.fullmatch(name)
    if unit is None:
        return _NPZ_NAMES.get(name, name)
    block, number, letter, projection, layer, leaf = unit.groups()
    kind = "norm" if layer == "group_norm" else "conv"
    module = "downsample.conv" if projection else f"{kind}{'abc'.index(letter) + 1}"
    return _bit_unit(block, number, module, "bias" if leaf == "beta" else "weight")


def bit_name_of_port(name: str) -> str:
    """Map a name of BiT's PyTorch port (`body.block1.unit01.gn1.weight`) to timm's; others stay."""
    unit = _PORT_UNIT.fullmatch(name)
    if unit is None:
        return _PORT_NAMES.get(name, name)
    block, number, kind, position, leaf = unit.groups()
    module = f"{'norm' if kind == 'gn' else 'conv'}{position}" if kind else "downsample.conv"
    return _bit_unit(block, number, module, leaf)


def _bit_unit(block: str, unit: str, module: str, leaf: str) -> str:
    return f"stages.{int(block) - 1}.blocks.{int(unit) - 1}.{module}.{leaf}"


def bit_tensors(arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Turn the arrays of an official BiT .npz into timm's tensors; 4-D ones go from HWIO to OIHW."""
    return {
        bit_name_of_npz(name): torch.from_numpy(
            np.ascontiguousarray(array.transpose(3, 2, 0, 1) if array.ndim == 4 else array)
        )
        for name, array in arrays.items()
    }


def unwrap(name: str) -> str:
    """Strip what torch.compile (`_orig_mod.`, at any depth) and DDP (`module.`, in front) put into a name."""
    name = name.replace("_orig_mod.", "")
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name


def backbone_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of the backbone under plain timm names.

    Where a state dict has a part `backbone.` (our tasks), that part is the backbone and everything else
    (projection heads, text towers) is dropped; otherwise all of it is. Wrappers' prefixes go, and the
    names of BiT's PyTorch port are mapped.

    Raises:
        ModelError: Two tensors have the same plain name.
    """
    unwrapped = [(unwrap(name), tensor) for name, tensor in state.items()]
    inside = [(name.removeprefix("backbone."), tensor) for name, tensor in unwrapped if name.startswith("backbone.")]
    plain = [(unwrap(name), tensor) for name, tensor in inside or unwrapped]
    if any(name == "root.conv.weight" for name, _ in plain):
        plain = [(bit_name_of_port(name), tensor) for name, tensor in plain]
    tensors = dict(plain)
    if len(tensors) < len(plain):
        names = [name for name, _ in plain]
        twice = next(name for name in names if names.count(name) > 1)
        raise ModelError(f"the weights hold two tensors that are both {twice!r} once wrappers' prefixes are stripped")
    return tensors


def fold_channels(weight: Tensor, in_chans: int) -> Tensor:
    """Adapt a stem convolution (O, I, H, W) between grey and colour: to one channel by sum, from one by / n.

    Both keep the response to a grey image, exactly where the convolution is plain. BiT standardises its
    weights after this, so its folded stem answers with another scale per output channel: there, grey images
    repeated to 3 channels are the exact way. Any other change of channels returns `weight` as it is.
    """
    if in_chans == 1:
        return weight.sum(dim=1, keepdim=True)
    if weight.shape[1] == 1:
        return weight.expand(-1, in_chans, -1, -1) / in_chans
    return weight
