"""The ε of weight standardisation: a constant of the net that no state dict holds, and small weights feel.

A standardised convolution computes with (w - mean) / sqrt(var + ε). timm's BiT nets have ε = 1e-8, BiT's PyTorch
port has 1e-10. Filters with σ = 1e-4 come out a factor 1.4 apart, and GroupNorm does not undo that behind the sum
with a shortcut.
"""

from typing import Any

from timm.layers import StdConv2d, StdConv2dSame
from torch import Tensor, nn

from lightning_modules.errors import ModelError


def standardisation_eps(model: nn.Module) -> float | None:
    """Return the ε that was set on the model's standardised convolutions, or None where it is timm's own."""
    changed = {layer.eps for layer in _layers(model).values() if layer.eps != _timm_eps(layer)}
    return float(changed.pop()) if changed else None


def set_standardisation_eps(model: nn.Module, eps: float | None) -> None:
    """Let all standardised convolutions of a model compute with this ε; None is timm's own for each of them.

    Raises:
        ModelError: ε is not positive, or the model has no such convolution to set it on.
    """
    layers = _layers(model).values()
    if eps is not None and (not layers or eps <= 0):
        raise ModelError(
            f"standardisation_eps {eps} cannot be set" if layers else "the model does not standardise its weights",
            valid="a number above 0" if layers else None,
            hint=None if layers else f"these weights need standardised convolutions (ε = {eps}): choose a BiT backbone",
        )
    for layer in layers:
        layer.timm_eps = _timm_eps(layer)
        layer.eps = layer.timm_eps if eps is None else eps


def portable_state(model: nn.Module) -> dict[str, Tensor]:
    """Return a state dict that computes the same in a plain timm model, whatever ε was set on this one.

    Standardising c · w with c² · ε is standardising w with ε, so the filters are scaled by sqrt(timm's ε / ε).
    For files that other programs read; training goes on with the weights as they are, since their scale
    sets the effective learning rate.
    """
    state = dict(model.state_dict())
    for name, layer in _layers(model).items():
        if layer.eps != _timm_eps(layer):
            key = f"{name}.weight"
            state[key] = state[key] * (_timm_eps(layer) / layer.eps) ** 0.5
    return state


def _layers(model: nn.Module) -> dict[str, Any]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, StdConv2d | StdConv2dSame)}


def _timm_eps(layer: Any) -> float:
    """Return the ε that timm built the layer with."""
    return float(getattr(layer, "timm_eps", layer.eps))
