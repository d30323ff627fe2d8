"""Backbones by timm name, their weights from anywhere, and their layer groups from input to output."""

from importlib import import_module
from typing import Any

_EXPORTS = {
    "create_backbone": "factory",
    "load_weights": "checkpoints",
    "read_weights": "checkpoints",
    "weights_hash": "checkpoints",
    "WeightsReport": "checkpoints",
    "layer_groups": "layers",
    "LayerGroup": "layers",
    "freeze": "layers",
}
__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(f"lightning_modules.backbones.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module 'lightning_modules.backbones' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(_EXPORTS)
