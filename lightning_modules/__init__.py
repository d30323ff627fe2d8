"""Everything after the batch: tasks, losses, metrics, optimizers, schedules, backbones and callbacks.

Exports are lazy (PEP 562), so that importing one leaf does not import Lightning.
"""

from importlib import import_module
from typing import Any

_EXPORTS = {
    "BaseTask": "base",
    "Classification": "classification",
    "SimCLR": "simclr",
    "CLIP": "clip",
    "SmallText": "text.transformer",
    "OpenClipText": "text.open_clip",
    "HuggingFaceText": "text.hugging_face",
    "OnlineProbes": "callbacks.online_probes",
    "SGDAGC": "optimizers",
    "ConstantSchedule": "schedules",
    "WarmupStep": "schedules",
    "WarmupCosine": "schedules",
    "HyperRuleSchedule": "schedules",
}
__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(f"lightning_modules.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module 'lightning_modules' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(_EXPORTS)
