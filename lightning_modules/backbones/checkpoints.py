"""Load weights into a backbone, strictly, with a report of what went where."""

import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import timm
import torch
from torch import Tensor, nn

from lightning_modules.backbones.convert import fold_channels
from lightning_modules.backbones.factory import is_classifier, model_config
from lightning_modules.backbones.layers import first_groups
from lightning_modules.backbones.readers import LoadedWeights
from lightning_modules.backbones.sources import Source, read_weights
from lightning_modules.backbones.standardisation import set_standardisation_eps
from lightning_modules.errors import ModelError

__all__ = ["LoadedWeights", "Source", "WeightsReport", "load_weights", "read_weights", "weights_hash"]


@dataclass(frozen=True)
class WeightsReport:
    """What `load_weights` did; every name is one of the model's, except in `unexpected`.

    Attributes:
        loaded: Tensors that now hold the source's values.
        missing: Tensors asked for that the source lacks, and may lack: BatchNorm's step counters, or the
            classifier where the source has none.
        unexpected: Tensors of the source that the model has no place for: its classifier, a buffer that
            timm computes anew, or what its layout holds beside the weights.
        reinitialised: Tensors that keep their random values: groups beyond `groups`, and the classifier
            unless it was loaded.
        source_preprocessing: Mean and standard deviation of the net's inputs, where the source says so.
        source_architecture: The timm name of the source's net, where the source says so.
        source_layout: The layout that the source was found in, such as "timm" or "official BiT .npz".
        standardisation_eps: ε of weight standardisation that came with the weights; None: timm's own.
    """

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    reinitialised: tuple[str, ...]
    source_preprocessing: tuple[tuple[float, ...], tuple[float, ...]] | None
    source_architecture: str | None
    source_layout: str
    standardisation_eps: float | None


def load_weights(model: nn.Module, source: Source, *, head: bool = True, groups: int | None = None) -> WeightsReport:
    """Copy weights into a model in place, and account for every tensor on both sides.

    A stem between grey and colour is folded (see `fold_channels`). Where anything of the backbone is loaded, the
    model then computes with the ε of weight standardisation that the source's net had. When this raises, the model
    is untouched.

    Args:
        model: A timm model; what is not loaded keeps its values, so pass a freshly built one.
        source: What `read_weights` takes, or what it returned.
        head: Also load the classifier, if all its tensors fit.
        groups: Load only the first so many layer groups (transfer depth); None for all.

    Raises:
        ModelError: The source cannot be read; or no backbone tensor has a place in the model; or the source
            has a backbone tensor unknown to it; or, in the groups asked for, one is missing or misshapen, or not
            finite.
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
    _check_finite(weights, {name: state[name] for name in target if name in keep})
    if asked & fits:
        set_standardisation_eps(model, weights.standardisation_eps)
    lacking = absent.union(name for name in classifier if head and name not in state)
    model.load_state_dict({name: state[name] for name in keep}, strict=False)
    return WeightsReport(
        loaded=tuple(name for name in target if name in keep),
        missing=tuple(name for name in target if name in lacking),
        unexpected=(*unknown, *weights.ignored),
        reinitialised=tuple(n for n in target if n not in keep | absent),
        source_preprocessing=(weights.mean, weights.std) if weights.mean and weights.std else None,
        source_architecture=weights.architecture,
        source_layout=weights.layout,
        standardisation_eps=weights.standardisation_eps,
    )


def weights_hash(source: Source) -> str:
    """Return 16 hexadecimal digits (blake2b) of the backbone's tensors: names, types, shapes and values.

    File name, format, training state and classifier do not enter: a copy or a conversion has the same hash.
    An ε of weight standardisation that is not timm's enters, since the same tensors then give other features.

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
    if weights.standardisation_eps is not None:
        digest.update(f"standardisation_eps {weights.standardisation_eps}\n".encode())
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


def _check_finite(weights: LoadedWeights, kept: Mapping[str, Tensor]) -> None:
    names = [name for name, tensor in kept.items() if not bool(tensor.isfinite().all())]
    if names:
        more = f", ... ({len(names)} in all)" if len(names) > 4 else ""
        raise ModelError(
            f"the weights of {weights.origin} are NaN or infinite in {', '.join(names[:4])}{more}",
            hint="their training diverged, or 16 bits could not hold them: take an earlier checkpoint",
        )


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
