"""Read weights from one file, under plain timm names; nothing in a file is ever executed."""

import argparse
import dataclasses
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from lightning_modules.backbones.convert import backbone_tensors
from lightning_modules.backbones.layouts import translate
from lightning_modules.errors import ModelError

ACCEPTED = (
    "a run folder, .ckpt, .safetensors, .pth / .pt / .bin / .pth.tar (a state dict without code), a BiT .npz, "
    "local-dir:FOLDER as timm writes it, hf-hub:OWNER/NAME, or a timm name such as timm:resnetv2_50x1_bit.goog_in21k"
)
# Where training scripts keep the state dict inside a .pth; averaged weights first, as timm's own loader does.
_STATE_KEYS = ("state_dict_ema", "model_ema", "state_dict", "model", "model_state_dict")


@dataclass(frozen=True, eq=False)
class LoadedWeights:
    """Weights as they were found, under plain timm names, before any model is involved.

    Attributes:
        state: Tensor by name, on the CPU: the backbone's, and a classifier's where the source has one.
        origin: The file or name, for messages.
        architecture: The timm name of the net, where the source says so.
        mean: The mean per channel the net was trained with, for values in [0, 1], where the source says so.
        std: The standard deviation, likewise.
        standardisation_eps: ε of weight standardisation that the net computes with; None: timm's own.
        layout: Name of the layout that the tensors were found in.
        ignored: Names of the source that are no weights and were left out knowingly.
    """

    state: dict[str, Tensor]
    origin: str
    architecture: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    standardisation_eps: float | None = None
    layout: str = "timm"
    ignored: tuple[str, ...] = ()


def _read_pickle(path: Path) -> LoadedWeights:
    """Read a .ckpt or .pth with `weights_only=True`; a zip is mapped: optimizer states stay on the disk."""
    try:
        # The training scripts of torchvision and timm keep their arguments, which are no code, in a Namespace.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # damaged files raise nearly anything
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused is None:
            raise _unreadable(path) from error
        raise ModelError(
            f"{path} is refused: it holds a pickled {refused.group(1)}, and unpickling it could run any code",
            valid=ACCEPTED,
            hint="if you trust it, load it yourself elsewhere and save only its state dict as .safetensors; for a "
            "whole pickled model: torch.save(torch.load(FILE, weights_only=False).state_dict(), 'state.pth')",
        ) from error
    if not isinstance(content, Mapping):
        raise _unreadable(path)
    state = next((content[key] for key in _STATE_KEYS if isinstance(content.get(key), Mapping)), content)
    facts = content.get("hyper_parameters")
    return _loaded(_tensors(state, path), path, facts if isinstance(facts, Mapping) else {})


def _read_safetensors(path: Path) -> LoadedWeights:
    try:
        state = safetensors.torch.load_file(path)
    except Exception as error:  # damaged files raise nearly anything
        raise _unreadable(path) from error
    return _loaded(_tensors(state, path), path)


def _read_npz(path: Path) -> LoadedWeights:
    try:
        with np.load(path, allow_pickle=False) as archive:
            state = {name: torch.from_numpy(archive[name]) for name in archive.files}
    except Exception as error:  # damaged files raise nearly anything
        raise _unreadable(path) from error
    return _loaded(_tensors(state, path), path)


READERS: dict[str, Callable[[Path], LoadedWeights]] = {
    ".ckpt": _read_pickle,
    ".pth": _read_pickle,
    ".pt": _read_pickle,
    ".bin": _read_pickle,
    ".pth.tar": _read_pickle,
    ".safetensors": _read_safetensors,
    ".npz": _read_npz,
}
"""By the end of a file's name, in lower case."""


def _loaded(tensors: Mapping[str, Tensor], path: Path, facts: Mapping[Any, Any] | None = None) -> LoadedWeights:
    """Bring a file's tensors to timm's names; what the file says about its net comes before what the layout says."""
    state, layout, ignored = translate(backbone_tensors(tensors))
    mean, std = layout.preprocessing or (None, None)
    weights = LoadedWeights(
        state,
        origin=str(path),
        mean=mean,
        std=std,
        standardisation_eps=layout.standardisation_eps,
        layout=layout.name,
        ignored=ignored,
    )
    return with_facts(weights, facts or {})


def with_facts(weights: LoadedWeights, facts: Mapping[Any, Any]) -> LoadedWeights:
    """Add the facts of a checkpoint's hyper-parameters or a config.json, as far as they have the right type."""
    architecture, eps = facts.get("backbone"), facts.get("standardisation_eps")
    mean, std = _numbers(facts.get("mean")), _numbers(facts.get("std"))
    found = {
        "architecture": architecture if isinstance(architecture, str) else None,
        "mean": mean if std else None,
        "std": std if mean else None,
        "standardisation_eps": eps if isinstance(eps, float) else None,
    }
    return dataclasses.replace(weights, **cast(Any, {key: value for key, value in found.items() if value is not None}))


def _tensors(state: Mapping[Any, Any], path: Path) -> dict[str, Tensor]:
    tensors = {str(name): value for name, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ModelError(
            f"{path} holds no tensors; its keys are {', '.join(map(str, list(state)[:6])) or 'none'}",
            valid=ACCEPTED,
        )
    return tensors


def _numbers(values: object) -> tuple[float, ...] | None:
    """Return a list of numbers as a tuple, and anything else as None."""
    if isinstance(values, list | tuple) and values and all(isinstance(v, int | float) for v in values):
        return tuple(float(value) for value in values)
    return None


def _unreadable(path: Path) -> ModelError:
    return ModelError(
        f"{path} ({path.stat().st_size:,} bytes) is damaged, cut short or not a weights file",
        valid=ACCEPTED,
        hint="copy or download it again, and compare its size",
    )
