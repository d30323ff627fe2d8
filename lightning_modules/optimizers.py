"""SGD with adaptive gradient clipping (AGC).

Method: Brock et al. 2021, "High-Performance Large-Scale Image Recognition Without Normalization",
arXiv 2102.06171.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT
from torch.optim.sgd import sgd

from lightning_modules.errors import ModelError

_FUSED_DEVICES = frozenset({"cpu", "cuda"})  # where torch ships a fused SGD kernel; elsewhere its foreach form runs


class SGDAGC(torch.optim.Optimizer):
    """SGD whose gradients are first clipped unit by unit, relative to the norm of the unit's weights.

    A unit is an output row of a tensor with two or more dimensions and the whole of any other tensor. Where
    ``‖gradient‖ > clip_factor · max(‖weights‖, eps)`` the unit's gradient is rescaled to that bound. Weight
    decay is added after the clipping, then SGD follows. A parameter group with ``agc=False`` is
    not clipped: the classifier usually is exempt, see `agc_parameter_groups`.

    `step` rescales ``.grad`` in place: accumulate gradients before it and call ``zero_grad`` after it.
    Non-finite gradients stay non-finite. No step waits for the device. Units need whole rows: DDP keeps them,
    strategies that flatten or shard parameters (FSDP, ZeRO 3) do not.

    Args:
        params: Parameters or parameter groups; a group may override every option below and hold ``agc``.
        lr: Learning rate, >= 0.
        momentum: In [0, 1).
        nesterov: Nesterov momentum; needs ``momentum > 0``.
        weight_decay: L2 factor, >= 0; added to the clipped gradient.
        clip_factor: Largest norm of a gradient as a fraction of the norm of its weights, > 0 (paper: 0.01).
        eps: Smallest norm of weights that is reckoned with, > 0 (paper: 1e-3), so that zero weights can move.

    Raises:
        ModelError: An option is out of its range.
    """

    # GradScaler and Lightning ask whether an optimizer unscales gradients itself, as torch's fused SGD does.
    # This one does not, though it uses the same kernel: clipping must see unscaled gradients.
    _step_supports_amp_scaling = False

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        momentum: float = 0.9,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        clip_factor: float = 0.01,
        eps: float = 1e-3,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "clip_factor": clip_factor,
            "eps": eps,
            "agc": True,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a parameter group after checking its options.

        Raises:
            ModelError: An option is out of its range.
        """
        _check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Clips and updates every parameter that has a gradient; frozen and unused ones are left alone.

        Args:
            closure: Evaluates the model and returns the loss.

        Returns:
            The closure's loss, if there is a closure.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            gradients = [parameter.grad for parameter in parameters]
            if group["agc"]:
                clip_units_(parameters, gradients, group["clip_factor"], group["eps"])
            buffers = self._momentum_buffers(parameters, group["momentum"])
            fused = _fused_kernel_fits(parameters, gradients, buffers)
            sgd(
                parameters,
                gradients,
                buffers,
                fused=fused,
                foreach=not fused,
                weight_decay=group["weight_decay"],
                momentum=group["momentum"],
                lr=group["lr"],
                dampening=0.0,
                nesterov=group["nesterov"],
                maximize=False,
            )
        return loss

    def _momentum_buffers(self, parameters: Sequence[Tensor], momentum: float) -> list[Tensor | None]:
        if momentum == 0:
            return [None] * len(parameters)
        # Buffers start at zero, which without dampening equals torch's start at the first gradient. Torch's
        # fused SGD fails where only some parameters have a buffer, as after unfreezing a layer.
        for parameter in parameters:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return [self.state[parameter]["momentum_buffer"] for parameter in parameters]


def clip_units_(parameters: Sequence[Tensor], gradients: Sequence[Tensor], clip_factor: float, eps: float) -> None:
    """Rescales gradients in place, unit by unit, to at most ``clip_factor · max(‖weights‖, eps)``.

    Args:
        parameters: Weights of any shapes, devices and floating dtypes.
        gradients: One for each parameter, of its shape; changed in place.
        clip_factor: See `SGDAGC`.
        eps: See `SGDAGC`.
    """
    batches: dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, Tensor]]] = {}
    for parameter, gradient in zip(parameters, gradients, strict=True):
        batches.setdefault((parameter.device, parameter.dtype), []).append((parameter, gradient))
    for pairs in batches.values():
        with_rows = [pair for pair in pairs if pair[0].ndim >= 2]
        vectors = [pair for pair in pairs if pair[0].ndim < 2]
        bound = _unit_norms(with_rows, vectors, of=0).clamp_(min=eps).mul_(clip_factor)
        # A zero gradient gives inf, which the clamp turns into 1; NaN passes through.
        scale = bound.div_(_unit_norms(with_rows, vectors, of=1)).clamp_(max=1.0)
        rows = [gradient.shape[0] for _, gradient in with_rows]
        *row_scales, vector_scales = torch.split(scale, [*rows, len(vectors)])
        scales = [
            part.view(-1, *[1] * (gradient.ndim - 1)) for part, (_, gradient) in zip(row_scales, with_rows, strict=True)
        ]
        torch._foreach_mul_([gradient for _, gradient in with_rows + vectors], [*scales, *vector_scales.unbind()])


def agc_parameter_groups(model: nn.Module, classifier_parameters: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
    """Splits a model's trainable parameters into clipped ones and the classifier's, which are exempt.

    The classifier is known by its parameters, bias included, never by its width: other layers may be as wide.

    Args:
        model: The network, classifier included.
        classifier_parameters: The classifier's parameters, as ``model.get_classifier().parameters()``.

    Returns:
        Groups ``{"params": [...], "agc": True}`` and ``{"params": [...], "agc": False}``, without empty ones.

    Raises:
        ModelError: A classifier parameter does not belong to the model.
    """
    parameters = list(model.parameters())
    exempt = {id(parameter) for parameter in classifier_parameters}
    strangers = exempt - {id(parameter) for parameter in parameters}
    if strangers:
        raise ModelError(
            f"{len(strangers)} of {len(exempt)} classifier parameters are not in {type(model).__name__}",
            hint="take them from the same model, after its classifier was replaced",
        )
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [parameter for parameter in trainable if id(parameter) not in exempt], "agc": True},
        {"params": [parameter for parameter in trainable if id(parameter) in exempt], "agc": False},
    ]
    return [group for group in groups if group["params"]]


def layer_decay_groups(
    groups: Iterable[dict[str, Any]], layers: Sequence[Iterable[nn.Parameter]], decay: float
) -> list[dict[str, Any]]:
    """Splits parameter groups so that every layer learns at a rate of its own: less, the further from the output.

    Layer-wise decay as of Howard & Ruder 2018 (ULMFiT, arXiv 1801.06146) and Clark et al. 2020 (ELECTRA,
    arXiv 2003.10555), whose factors are 1 / 2.6 and 0.65 to 0.9.

    Args:
        groups: Parameter groups; all their other options are kept.
        layers: The parameters of each layer from input to output. The last one is at distance 1; what is in none,
            the classifier, is at distance 0.
        decay: Factor from a layer to the one before it, in (0, 1].

    Returns:
        Groups with ``lr_scale`` = ``decay ** distance``, from input to output within each given group; `scale_rates`
        applies it.

    Raises:
        ModelError: `decay` is out of its range.
    """
    if not 0 < decay <= 1:
        raise ModelError(f"layer decay is {decay}", valid="0 < decay <= 1")
    distances = {id(parameter): len(layers) - place for place, layer in enumerate(layers) for parameter in layer}
    split: list[dict[str, Any]] = []
    for group in groups:
        by_distance: dict[int, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            by_distance.setdefault(distances.get(id(parameter), 0), []).append(parameter)
        for distance in sorted(by_distance, reverse=True):
            split.append({**group, "params": by_distance[distance], "lr_scale": decay**distance})
    return split


def scale_rates(optimizer: torch.optim.Optimizer) -> None:
    """Multiplies the rate of every parameter group by its ``lr_scale``, if it has one; before a scheduler is made."""
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * group.get("lr_scale", 1.0)


def _unit_norms(
    with_rows: Sequence[tuple[Tensor, Tensor]], vectors: Sequence[tuple[Tensor, Tensor]], of: Literal[0, 1]
) -> Tensor:
    """L2 norms of all units, of the weights (0) or the gradients (1): first the rows, then the vectors."""
    # At least float32: the norm of a half overflows, and its bound would be coarse.
    dtype = torch.promote_types((with_rows or vectors)[0][of].dtype, torch.float32)
    norms = [torch.linalg.vector_norm(pair[of], dim=tuple(range(1, pair[of].ndim)), dtype=dtype) for pair in with_rows]
    if vectors:
        norms.append(torch.stack(torch._foreach_norm([pair[of] for pair in vectors], dtype=dtype)))
    return torch.cat(norms)


def _fused_kernel_fits(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor], buffers: Sequence[Tensor | None]
) -> bool:
    # The fused kernels walk raw memory and update the wrong elements, without a word, where layouts differ: a
    # channels_last weight with a contiguous gradient, or with a momentum buffer loaded from a contiguous run.
    return all(
        parameter.device.type in _FUSED_DEVICES
        and _same_layout(parameter, gradient)
        and (buffer is None or _same_layout(parameter, buffer))
        for parameter, gradient, buffer in zip(parameters, gradients, buffers, strict=True)
    )


def _same_layout(first: Tensor, second: Tensor) -> bool:
    # Strides of dimensions of size 1 mean nothing, and autograd leaves them different in 1×1 convolutions.
    return first.stride() == second.stride() or all(
        size == 1 or one == other for size, one, other in zip(first.shape, first.stride(), second.stride(), strict=True)
    )


def _check_options(options: dict[str, Any]) -> None:
    ranges = {
        "lr": (options["lr"] >= 0, ">= 0"),
        "momentum": (0 <= options["momentum"] < 1, "0 <= momentum < 1"),
        "weight_decay": (options["weight_decay"] >= 0, ">= 0"),
        "clip_factor": (options["clip_factor"] > 0, "> 0 (a group with agc=False is not clipped)"),
        "eps": (options["eps"] > 0, "> 0"),
    }
    for name, (fits, valid) in ranges.items():
        if not fits:
            raise ModelError(f"SGDAGC: {name} is {options[name]}", valid=valid)
    if options["nesterov"] and options["momentum"] == 0:
        raise ModelError("SGDAGC: Nesterov needs momentum", valid="momentum > 0, or nesterov: false")
