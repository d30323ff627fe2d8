"""Names of tensors in other libraries' state dicts, mapped to timm's: pure functions from name to name.

Every function returns a name that it does not know unchanged, so that the loader can report it.
"""

import re
from collections.abc import Mapping

# BiT's official TensorFlow names (big_transfer's .npz files) and those of its PyTorch port
# (big_transfer's bit_pytorch/models.py). Both number blocks and units from 1, timm's resnetv2 from 0.
_BIT_NPZ = {
    "root_block/standardized_conv2d/kernel": "stem.conv.weight",
    "group_norm/gamma": "norm.weight",
    "group_norm/beta": "norm.bias",
    "head/conv2d/kernel": "head.fc.weight",
    "head/conv2d/bias": "head.fc.bias",
}
_BIT_NPZ_UNIT = re.compile(r"block(\d+)/unit(\d+)/([abc])/(proj/)?(standardized_conv2d|group_norm)/(kernel|gamma|beta)")
_BIT_PORT = {"root.conv.": "stem.conv.", "head.gn.": "norm.", "head.conv.": "head.fc."}
_BIT_PORT_UNIT = re.compile(r"body\.block(\d+)\.unit(\d+)\.(?:(conv|gn)(\d)|downsample)\.(weight|bias)")
_DENSENET_LAYER = re.compile(r"(features\.denseblock\d+\.denselayer\d+\.(?:norm|conv))\.([12]\..+)")
_VIT = {
    "class_token": "cls_token",
    "encoder.pos_embedding": "pos_embed",
    "conv_proj.": "patch_embed.proj.",
    "encoder.ln.": "norm.",
    "heads.head.": "head.",
}
_VIT_LAYER = re.compile(r"encoder\.layers\.encoder_layer_(\d+)\.(.+)")
# torchvision's module has mlp.0 and mlp.3; the files it published have mlp.linear_1 and mlp.linear_2.
_VIT_BLOCK = {
    "ln_1.": "norm1.",
    "ln_2.": "norm2.",
    "self_attention.in_proj_": "attn.qkv.",
    "self_attention.out_proj.": "attn.proj.",
    "mlp.0.": "mlp.fc1.",
    "mlp.3.": "mlp.fc2.",
    "mlp.linear_1.": "mlp.fc1.",
    "mlp.linear_2.": "mlp.fc2.",
}
_CONVNEXT = {"classifier.0.": "head.norm.", "classifier.2.": "head.fc."}
_CONVNEXT_FEATURE = re.compile(r"features\.(\d+)\.(\d+)\.(.+)")
_CONVNEXT_BLOCK = {
    "block.0.": "conv_dw.",
    "block.2.": "norm.",
    "block.3.": "mlp.fc1.",
    "block.5.": "mlp.fc2.",
    "layer_scale": "gamma",
}


def timm_name(name: str) -> str:
    """Return a name that is timm's already."""
    return name


def bit_npz(name: str) -> str:
    """Map a name of BiT's official .npz files, such as `resnet/block1/unit01/a/group_norm/gamma`."""
    plain = name.removeprefix("resnet/")
    unit = _BIT_NPZ_UNIT.fullmatch(plain)
    if unit is None:
        return _BIT_NPZ.get(plain, name)
    block, number, letter, projection, layer, leaf = unit.groups()
    kind = "norm" if layer == "group_norm" else "conv"
    module = "downsample.conv" if projection else f"{kind}{'abc'.index(letter) + 1}"
    return _bit_unit(block, number, module, "bias" if leaf == "beta" else "weight")


def bit_port(name: str) -> str:
    """Map a name of BiT's PyTorch port, such as `body.block1.unit01.gn1.weight`."""
    unit = _BIT_PORT_UNIT.fullmatch(name)
    if unit is None:
        return _swap_prefix(name, _BIT_PORT)
    block, number, kind, position, leaf = unit.groups()
    module = f"{'norm' if kind == 'gn' else 'conv'}{position}" if kind else "downsample.conv"
    return _bit_unit(block, number, module, leaf)


def torchvision_densenet(name: str) -> str:
    """Map a name of the DenseNet files that torchvision published: `norm.1` is `norm1` in its code and in timm."""
    return _DENSENET_LAYER.sub(r"\1\2", name)


def torchvision_vit(name: str) -> str:
    """Map a name of torchvision's VisionTransformer, such as `encoder.layers.encoder_layer_0.ln_1.weight`."""
    layer = _VIT_LAYER.fullmatch(name)
    if layer is None:
        return _swap_prefix(name, _VIT)
    return f"blocks.{layer[1]}.{_swap_prefix(layer[2], _VIT_BLOCK)}"


def torchvision_convnext(name: str) -> str:
    """Map a name of torchvision's ConvNeXt: feature 0 is the stem, odd ones are stages, even ones downsample."""
    feature = _CONVNEXT_FEATURE.fullmatch(name)
    if feature is None:
        return _swap_prefix(name, _CONVNEXT)
    position, index, rest = int(feature[1]), feature[2], feature[3]
    if position == 0:
        return f"stem.{index}.{rest}"
    if position % 2 == 0:
        return f"stages.{position // 2}.downsample.{index}.{rest}"
    return f"stages.{position // 2}.blocks.{index}.{_swap_prefix(rest, _CONVNEXT_BLOCK)}"


def _bit_unit(block: str, unit: str, module: str, leaf: str) -> str:
    return f"stages.{int(block) - 1}.blocks.{int(unit) - 1}.{module}.{leaf}"


def _swap_prefix(name: str, prefixes: Mapping[str, str]) -> str:
    """Replace the first of these prefixes that `name` starts with."""
    old = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
    return name if old is None else prefixes[old] + name.removeprefix(old)
