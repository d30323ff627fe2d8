"""The layouts of state dicts that we read, each known by its keys, with what a layout says about its net."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from lightning_modules.backbones import key_maps
from lightning_modules.backbones.convert import unique

# torch's AveragedModel counts its updates here; torchvision's training script saves it with `model_ema`.
_BOOKKEEPING = frozenset({"n_averaged"})
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # torchvision's presets
_HALF = (0.5,) * 3, (0.5,) * 3  # BiT scales images to [-1, 1]
# torchxrayvision scales grey images to [-1024, 1024]: 1024 · (2x − 1) = (x − 1/2) / (1 / 2048) for x in [0, 1].
_XRAYVISION = (0.5,), (1 / 2048,)


def same(tensor: Tensor) -> Tensor:
    """Return the tensor as it is."""
    return tensor


def hwio_to_oihw(tensor: Tensor) -> Tensor:
    """Bring a TensorFlow convolution (H, W, I, O) to torch's (O, I, H, W); other tensors stay."""
    return tensor.permute(3, 2, 0, 1).contiguous() if tensor.ndim == 4 else tensor


def flat_scale(tensor: Tensor) -> Tensor:
    """Flatten a layer scale (C, 1, 1) to (C,); other tensors stay."""
    return tensor.flatten() if tensor.ndim == 3 else tensor


@dataclass(frozen=True)
class Layout:
    """How one library names and shapes the tensors of its nets.

    Attributes:
        name: What it is, for people.
        marks: Names that every state dict of this layout has, and no other; each with its shape where names
            alone do not tell, else None.
        rename: Name → timm's name.
        reshape: Tensor → timm's tensor.
        ignored: Tensors that are no part of the net's weights and are left out knowingly.
        preprocessing: Mean and standard deviation per channel, of values in [0, 1], if the same for all its nets.
        standardisation_eps: ε of weight standardisation, if it is not timm's.
    """

    name: str
    marks: Mapping[str, tuple[int, ...] | None]
    rename: Callable[[str], str]
    reshape: Callable[[Tensor], Tensor] = same
    ignored: frozenset[str] = field(default_factory=frozenset)
    preprocessing: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    standardisation_eps: float | None = None

    def fits(self, state: Mapping[str, Tensor]) -> bool:
        """Say whether all marks are in a state dict."""
        return all(
            name in state and (shape is None or tuple(state[name].shape) == shape) for name, shape in self.marks.items()
        )


LAYOUTS: tuple[Layout, ...] = (
    Layout(
        # Also the published SLAMPAI checkpoints; their natural and radiograph nets differ in mean and std.
        name="PyTorch port of BiT",
        marks={"root.conv.weight": None, "body.block1.unit01.conv1.weight": None},
        rename=key_maps.bit_port,
        standardisation_eps=1e-10,  # bit_pytorch/models.py; trained weights can have σ far below timm's sqrt(1e-8)
    ),
    Layout(
        name="official BiT .npz",
        marks={"resnet/root_block/standardized_conv2d/kernel": None},
        rename=key_maps.bit_npz,
        reshape=hwio_to_oihw,
        preprocessing=_HALF,
    ),
    Layout(
        # Keys are torchvision's; one grey channel and 18 findings tell the two apart.
        name="torchxrayvision DenseNet",
        marks={"features.conv0.weight": (64, 1, 7, 7), "classifier.weight": (18, 1024)},
        rename=key_maps.torchvision_densenet,
        ignored=frozenset({"op_threshs"}),  # operating points of its calibrated outputs
        preprocessing=_XRAYVISION,
    ),
    Layout(
        name="torchvision DenseNet, as published",
        marks={"features.conv0.weight": None, "features.denseblock1.denselayer1.norm.1.weight": None},
        rename=key_maps.torchvision_densenet,
        preprocessing=_IMAGENET,
    ),
    Layout(
        name="torchvision VisionTransformer",
        marks={"class_token": None, "encoder.pos_embedding": None, "conv_proj.weight": None},
        rename=key_maps.torchvision_vit,
        preprocessing=_IMAGENET,
    ),
    Layout(
        name="torchvision ConvNeXt",
        marks={"features.0.0.weight": None, "features.1.0.layer_scale": None},
        rename=key_maps.torchvision_convnext,
        reshape=flat_scale,
        preprocessing=_IMAGENET,
    ),
    # torchvision's ResNets, and its DenseNets as its code names them, have timm's names.
    Layout(name="timm", marks={}, rename=key_maps.timm_name),
)
"""Tried in turn; the last one fits everything."""


def translate(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Layout, tuple[str, ...]]:
    """Bring a backbone's state dict to timm's names and shapes.

    Returns:
        The tensors by timm name; the layout they were found in; the names that were left out knowingly.

    Raises:
        ModelError: Two tensors have the same timm name.
    """
    layout = next(layout for layout in LAYOUTS if layout.fits(state))
    ignored = tuple(name for name in state if name in layout.ignored | _BOOKKEEPING)
    kept = {name: tensor for name, tensor in state.items() if name not in ignored}
    return unique((layout.rename(name), layout.reshape(tensor)) for name, tensor in kept.items()), layout, ignored
