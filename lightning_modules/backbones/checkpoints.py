"""Load a backbone's weights from any file or name we know, strictly, with a report of what went where."""

import difflib
import functools
import hashlib
import json
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from lightning_modules.backbones.convert import backbone_tensors, bit_tensors, fold_channels
from lightning_modules.backbones.factory import default_config, is_classifier, model_config
from lightning_modules.backbones.layers import first_groups
from lightning_modules.errors import ModelError

ACCEPTED = (
    "a run folder, .ckpt, .safetensors, .pth / .pt / .bin / .pth.tar (a state dict without code), "
    "a BiT .npz, or a timm name such as timm:resnetv2_50x1_bit.goog_in21k"
)
# Where training scripts keep the state dict inside a .pth; averaged weights first, as timm's own loader does.
_STATE_KEYS = ("state_dict_ema", "model_ema", "state_dict", "model")


@dataclass(frozen=True, eq=False)
class LoadedWeights:
    """Weights as they were found, under plain timm names, before any model is involved.

    Attributes:
        state: Tensor by name, on the CPU: the backbone's, and a classifier's where the source has one.
        origin: The file or timm name, for messages.
        architecture: The timm name of the net, where the source says so.
        mean: The mean per channel the net was trained with, for values in [0, 1], where the source says so.
        std: The standard deviation, likewise.
    """

    state: dict[str, Tensor]
    origin: str
    architecture: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


Source = str | Path | LoadedWeights


@dataclass(frozen=True)
class WeightsReport:
    """What `load_weights` did; every name is one of the model's, except in `unexpected`.

    Attributes:
        loaded: Tensors that now hold the source's values.
        missing: Tensors asked for that the source lacks, and may lack: BatchNorm's step counters, or the
            classifier where the source has none.
        unexpected: Tensors of the source that the model has no place for: its classifier, or a buffer that
            timm computes anew.
        reinitialised: Tensors that keep their random values: groups beyond `groups`, and the classifier
            unless it was loaded.
        source_preprocessing: Mean and standard deviation of the net's inputs, where the source says so.
        source_architecture: The timm name of the source's net, where the source says so.
    """

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    reinitialised: tuple[str, ...]
    source_preprocessing: tuple[tuple[float, ...], tuple[float, ...]] | None
    source_architecture: str | None


def read_weights(source: Source) -> LoadedWeights:
    """Read weights from a run folder, a file or timm; nothing in a file is ever executed.

    An existing path wins over a timm name of the same spelling; `timm:NAME` always means timm.

    Raises:
        ModelError: Missing, truncated or unknown file, pickled code, an unknown timm name, no network.
    """
    if isinstance(source, LoadedWeights):
        return source
    text = str(source)
    if text.startswith("timm:"):
        return _read_timm(text.removeprefix("timm:"))
    path = Path(source).expanduser()
    if path.is_dir():
        path = _checkpoint_of_run(path)
    reader = next((read for suffix, read in _READERS.items() if path.name.lower().endswith(suffix)), None)
    if path.is_file():
        if reader is None:
            raise ModelError(f"{path} is not a kind of weights file", valid=ACCEPTED)
        return reader(path)
    if reader is not None or isinstance(source, Path) or "/" in text or not timm.is_model(text.partition(".")[0]):
        near = difflib.get_close_matches(text, timm.list_models(), n=3)
        raise ModelError(
            f"there are no weights at {path}, and timm has no model of that name",
            valid=ACCEPTED,
            hint=f"did you mean {' or '.join(near)}?" if near else "check the path for a typo",
        )
    return _read_timm(text)


def load_weights(model: nn.Module, source: Source, *, head: bool = True, groups: int | None = None) -> WeightsReport:
    """Copy weights into a model in place, and account for every tensor on both sides.

    A stem between grey and colour is folded (see `fold_channels`). When this raises, the model is untouched.

    Args:
        model: A timm model; what is not loaded keeps its values, so pass a freshly built one.
        source: What `read_weights` takes, or what it returned.
        head: Also load the classifier, if all its tensors fit.
        groups: Load only the first so many layer groups (transfer depth); None for all.

    Raises:
        ModelError: The source cannot be read; or no backbone tensor has a place in the model; or the source
            has a backbone tensor unknown to it; or, in the groups asked for, one is missing or misshapen.
    """
    weights = read_weights(source)
    target = model.state_dict()
    backbone = [name for name in target if not is_classifier(name, model)]
    classifier = [name for name in target if is_classifier(name, model)]
    asked = set(backbone)
    if groups is not None:
        asked &= {name for group in first_groups(model, groups) for name in group.tensors}
    state = _fold_stem(weights.state, target, model_config(model).get("first_conv"))
    fits = {name for name in state.keys() & target.keys() if state[name].shape == target[name].shape}
    absent, misshapen = asked - state.keys(), (asked & state.keys()) - fits
    unknown = [name for name in state if name not in target]
    _check_fit(
        weights,
        model,
        overlap=any(name in state for name in backbone),
        missing=[n for n in backbone if n in absent and not n.endswith("num_batches_tracked")],
        unexpected=_foreign(unknown, model),
        misshapen=[f"{n} {tuple(state[n].shape)} for {tuple(target[n].shape)}" for n in backbone if n in misshapen],
    )
    keep = asked & fits
    if head and fits.issuperset(classifier):
        keep |= set(classifier)
    lacking = absent.union(name for name in classifier if head and name not in state)
    model.load_state_dict({name: state[name] for name in keep}, strict=False)
    return WeightsReport(
        loaded=tuple(name for name in target if name in keep),
        missing=tuple(name for name in target if name in lacking),
        unexpected=tuple(unknown),
        reinitialised=tuple(n for n in target if n not in keep | absent),
        source_preprocessing=(weights.mean, weights.std) if weights.mean and weights.std else None,
        source_architecture=weights.architecture,
    )


def weights_hash(source: Source) -> str:
    """Return 16 hexadecimal digits (blake2b) of the backbone's tensors: names, types, shapes and values.

    File name, format, training state and classifier do not enter: a copy or a conversion has the same hash.

    Raises:
        ModelError: The source cannot be read.
    """
    weights = read_weights(source)
    classifier = {f"{name}.{leaf}" for name in _known_classifiers() for leaf in ("weight", "bias")}
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(weights.state.keys() - classifier):
        tensor = weights.state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@functools.cache
def _known_classifiers() -> frozenset[str]:
    """Return every name timm gives to a classifier; none of them is part of any backbone."""
    configs = (timm.models.get_pretrained_cfg(name) for name in timm.list_models())
    names = [config.classifier or () for config in configs]
    return frozenset(name for entry in names for name in ([entry] if isinstance(entry, str) else entry))


def _fold_stem(
    state: Mapping[str, Tensor], target: Mapping[str, Tensor], first_conv: str | Sequence[str] | None
) -> dict[str, Tensor]:
    folded = dict(state)
    for name in [first_conv] if isinstance(first_conv, str) else first_conv or ():
        key = f"{name}.weight"
        if key in state and key in target and state[key].ndim == 4 and state[key].shape != target[key].shape:
            folded[key] = fold_channels(state[key], target[key].shape[1])
    return folded


def _foreign(unknown: Sequence[str], model: nn.Module) -> list[str]:
    """Return those unknown names that are neither a classifier's nor a buffer the model computes."""
    computed = {name for name, _ in model.named_buffers()}
    return [name for name in unknown if name not in computed and not is_classifier(name, model)]


def _check_fit(
    weights: LoadedWeights,
    model: nn.Module,
    *,
    overlap: bool,
    missing: Sequence[str],
    unexpected: Sequence[str],
    misshapen: Sequence[str],
) -> None:
    architecture = model_config(model)["architecture"]
    findings = {
        "missing in the weights": missing,
        "unknown to the model": unexpected,
        "of another shape": misshapen,
    }
    if not overlap:
        findings = {"in the weights": list(weights.state), "in the model": list(model.state_dict())}
    elif not any(findings.values()):
        return
    problem = f"the weights of {weights.origin} do not fit {architecture}"
    if not overlap:
        problem += ": not one name of a backbone tensor is the same"
    for finding, names in findings.items():
        if names:
            more = f", ... ({len(names)} in all)" if len(names) > 4 else ""
            problem += f"\n  {finding}: {', '.join(names[:4])}{more}"
    source = weights.architecture
    raise ModelError(
        problem,
        hint=f"the weights say they are of {source}: set `backbone: {source}`"
        if source and source.partition(".")[0] != architecture
        else "choose the backbone these weights were made with",
    )


def _checkpoint_of_run(run: Path) -> Path:
    """Return the checkpoint of a run folder: the one its summary names, else the best, else the last."""
    checkpoints = run / "checkpoints"
    candidates = [checkpoints / "best.ckpt", checkpoints / "last.ckpt"]
    try:
        summary = json.loads((run / "summary.json").read_text())
    except FileNotFoundError:
        summary = {}
    except ValueError as error:
        raise ModelError(f"{run / 'summary.json'} is not JSON", hint="name the checkpoint file itself") from error
    named = summary.get("checkpoint") if isinstance(summary, dict) else None
    if named:
        candidates = [run / named, checkpoints / Path(named).name]
    found = next((path for path in candidates if path.is_file()), None)
    if found is None:
        raise ModelError(
            f"{run} is not a run with weights: there is no {' or '.join(str(path) for path in candidates)}",
            valid=ACCEPTED,
            hint="wait until the run has written a checkpoint, or name a file",
        )
    return found


def _read_pickle(path: Path) -> LoadedWeights:
    """Read a .ckpt or .pth with `weights_only=True`; a zip is mapped: optimizer states stay on the disk."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # damaged files raise nearly anything
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused is None:
            raise _unreadable(path) from error
        raise ModelError(
            f"{path} is refused: it holds a pickled {refused.group(1)}, and unpickling it could run any code",
            valid=ACCEPTED,
            hint="if you trust it, load it yourself elsewhere and save only its state dict as .safetensors",
        ) from error
    if not isinstance(content, Mapping):
        raise _unreadable(path)
    state = next((content[key] for key in _STATE_KEYS if isinstance(content.get(key), Mapping)), content)
    facts = content.get("hyper_parameters")
    facts = facts if isinstance(facts, Mapping) else {}
    architecture = facts.get("backbone")
    return LoadedWeights(
        backbone_tensors(_tensors(state, path)),
        origin=str(path),
        architecture=architecture if isinstance(architecture, str) else None,
        mean=_numbers(facts.get("mean")),
        std=_numbers(facts.get("std")),
    )


def _read_safetensors(path: Path) -> LoadedWeights:
    try:
        state = safetensors.torch.load_file(path)
    except Exception as error:  # damaged files raise nearly anything
        raise _unreadable(path) from error
    return LoadedWeights(backbone_tensors(_tensors(state, path)), origin=str(path))


def _read_npz(path: Path) -> LoadedWeights:
    """Read an official BiT file; BiT scales images to [-1, 1], which is mean 0.5 and std 0.5."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        state = bit_tensors(arrays)
    except Exception as error:  # damaged files raise nearly anything
        raise _unreadable(path) from error
    return LoadedWeights(_tensors(state, path), origin=str(path), mean=(0.5,) * 3, std=(0.5,) * 3)


def _read_timm(name: str) -> LoadedWeights:
    """Get pretrained weights by their timm name, from timm's cache or the network."""
    config = default_config(name)
    if not config.has_weights:
        raise ModelError(
            f"timm has no pretrained weights for {name}",
            valid=timm.list_pretrained(f"{config.architecture}.*") or "none",
        )
    try:
        model = timm.create_model(name, pretrained=True)
    except Exception as error:  # requests, huggingface_hub and the operating system each have their own
        raise ModelError(
            f"timm could not get the weights of {name}: {type(error).__name__}",
            valid=ACCEPTED,
            hint=f"connect to the network once, or download {config.hf_hub_id or config.url} elsewhere "
            "and give the path of its model.safetensors",
        ) from error
    return LoadedWeights(
        dict(model.state_dict()),
        origin=f"timm:{name}",
        architecture=config.architecture,
        mean=tuple(config.mean),
        std=tuple(config.std),
    )


_READERS: dict[str, Callable[[Path], LoadedWeights]] = {
    ".ckpt": _read_pickle,
    ".pth": _read_pickle,
    ".pt": _read_pickle,
    ".bin": _read_pickle,
    ".pth.tar": _read_pickle,
    ".safetensors": _read_safetensors,
    ".npz": _read_npz,
}


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
