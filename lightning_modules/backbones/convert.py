"""Tensors of a state dict made ready for timm: wrappers' prefixes, the part that is the backbone, stem channels."""

from collections.abc import Iterable, Mapping

from torch import Tensor

from lightning_modules.errors import ModelError

# Where modules that train a net keep it: ours and many others' say `backbone`, most Lightning modules `model`.
_PARTS = ("backbone.", "model.")


def unwrap(name: str) -> str:
    """Strip what torch.compile (`_orig_mod.`, at any depth) and DDP (`module.`, in front) put into a name."""
    name = name.replace("_orig_mod.", "")
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name


def backbone_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of the backbone under plain names.

    Where a state dict has a part `backbone.` (our tasks), that part is the backbone and everything else
    (projection heads, text towers) is dropped; likewise `model.` (other Lightning modules), and a part of a part.
    Otherwise all of it is. Wrappers' prefixes go.

    Raises:
        ModelError: Two tensors have the same plain name.
    """
    tensors = [(unwrap(name), tensor) for name, tensor in state.items()]
    while part := next((part for part in _PARTS if any(name.startswith(part) for name, _ in tensors)), None):
        tensors = [(unwrap(name.removeprefix(part)), tensor) for name, tensor in tensors if name.startswith(part)]
    return unique(tensors)


def unique(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Turn (name, tensor) pairs into a dict.

    Raises:
        ModelError: Two pairs have the same name.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors:
        if name in found:
            raise ModelError(f"the weights hold two tensors that are both {name!r} under plain timm names")
        found[name] = tensor
    return found


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
