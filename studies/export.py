"""A finished run as a folder for others: for timm (`local-dir:`, `hf-hub:`) or for ONNX, checked, with a model card."""

import json
import math
import os
import pickle
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from copy import deepcopy
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from datamodules.atomic import write_text
from datamodules.errors import DataError, shorten
from studies.runs import RunFolder

if TYPE_CHECKING:
    from torch import Tensor, nn

    from datamodules.transforms import Transform
    from lightning_modules.classification import Classification
    from studies.commands.predict import Predictor

TOLERANCE = 1e-4
"""Largest difference of logits, as a share of the largest logit where that exceeds 1: another order of the sums."""
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
PROTOBUF_LIMIT = 1_900_000_000  # bytes in one .onnx file; 2 GiB is protobuf's own limit
_TIMM_FACTS = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
_OF_OTHER_WEIGHTS = (
    *("url", "file", "hf_hub_id", "tag", "license", "description", "origin_url", "paper_name", "paper_ids", "notes"),
    *("test_input_size", "test_crop_pct", "test_pool_size", "label_offset", "label_names", "label_descriptions"),
)
_FILES = {"config.json", "model.safetensors", "model.onnx", "model.onnx.data", "README.md"}


def export(run: Path, output: Path, kind: str, *, overwrite: bool = False) -> None:
    """Write a run's selected weights, classifier included, as a folder; it appears whole or not at all.

    Args:
        run: Folder of a finished run that keeps its weights.
        output: Folder to write: `config.json` and `README.md`, and `model.safetensors` or `model.onnx`.
        kind: timm or onnx.
        overwrite: Replace an earlier export.

    Raises:
        DataError: The run has no weights, or such as cannot be loaded; the folder holds something already, or cannot be
            written; a package is missing; or what was written does not give the run's logits.
        ModelError: The run's checkpoint is damaged.
    """
    from studies.model_card import model_card

    check_output(output, overwrite=overwrite)
    writers = {"timm": _write_timm, "onnx": _write_onnx}
    predictor = _load(RunFolder(run))
    predictor.model.cpu()
    facts = input_facts(predictor)

    def fill(folder: Path) -> None:
        writers[kind](predictor, facts, folder)
        write_text(
            folder / "README.md", model_card(RunFolder(run), predictor.model, facts, kind, output.resolve().name)
        )

    write_folder(output, fill)


def _load(folder: RunFolder) -> "Predictor":
    from lightning_modules.backbones.checkpoints import read_weights
    from studies.commands.predict import load_predictor

    try:
        return load_predictor(folder)
    except (RuntimeError, OSError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
        checkpoint = folder.selected_checkpoint()
        read_weights(checkpoint)  # says so where the file is damaged
        raise DataError(
            f"the net of {folder.path} cannot be built anew: {' '.join(str(error).split())[:300]}",
            where=str(checkpoint),
            hint="its checkpoint is of another version of farshot or of timm: export with that one, or fit again",
        ) from error


def check_output(output: Path, *, overwrite: bool) -> None:
    """Refuse a folder that must not be replaced.

    Raises:
        DataError: There is a file or a folder that is not empty, without `overwrite`; or with something that no export
            wrote.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    foreign = [path.name for path in output.iterdir() if path.name not in _FILES] if output.is_dir() else [output.name]
    if foreign or not overwrite:
        raise DataError(
            f"{output} exists" + (f", with files that are no export's: {shorten(foreign, 4)}" if foreign else ""),
            where="--output",
            hint="choose another folder" + ("" if foreign else ", or replace this export: --overwrite"),
        )


def write_folder(output: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write a folder beside `output`, sync it and move it there; an older one goes only then.

    Raises:
        DataError: The disk is full, or the folder cannot be written.
    """
    from safetensors import SafetensorError

    output = output.resolve()
    temporary, old = (output.with_name(f".{output.name}.{os.getpid()}.{name}") for name in ("tmp", "old"))
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        fill(temporary)
        for path in temporary.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        if output.exists():
            os.rename(output, old)
        try:
            os.rename(temporary, output)
        except OSError:
            with suppress(FileNotFoundError):
                os.rename(old, output)
            raise
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"could not write {output}: {error}",
            where="--output",
            hint="choose a folder that can be written, on a disk with room",
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def input_facts(predictor: "Predictor") -> dict[str, Any]:
    """What must happen to an image before the net, in timm's words and with what timm has no words for.

    Returns:
        input_size, mean, std, interpolation, crop_pct, crop_mode as in timm's `pretrained_cfg`; and `pads` (black
        around an image that is not square), `grey` (one channel is read), `window` (of 16-bit images).
    """
    model = predictor.model
    probe = predictor.transform(np.zeros((8, 8, 1), np.uint8), 0)
    size = probe.shape[-1]
    pads = is_padding(predictor.transform, size)
    mean, std = normalisation(model)
    return {
        "input_size": (model.in_chans, size, size),
        "mean": mean,
        "std": std,
        "interpolation": "bilinear",
        "crop_pct": crop_share(size, predictor.transform.whole or size),
        "crop_mode": "border" if pads else "squash" if is_squashing(predictor.transform, size) else "center",
        "pads": pads,
        "grey": predictor.mode == "grey",
        "window": predictor.window,
    }


def is_squashing(transform: "Transform", size: int) -> bool:
    """Say whether an evaluation transform shows the ends of an image that is not square, at another aspect."""
    image = np.full((size, 2 * size, 1), 255, np.uint8)
    image[:, : size // 4] = 0  # a centre crop begins behind it
    return bool(transform(image, 0)[:, :, 0].max() == 0)


def is_padding(transform: "Transform", size: int) -> bool:
    """Say whether an evaluation transform puts black around an image that is not square: white one stays white else."""
    return bool(transform(np.full((size, 2 * size, 1), 255, np.uint8), 0).min() == 0)


def crop_share(size: int, short_side: int) -> float:
    """Return the `crop_pct` with which timm, which computes floor(size / crop_pct), resizes to this short side."""
    share = size / short_side
    while math.floor(size / share) < short_side:
        share = math.nextafter(share, 0.0)
    return share


def normalisation(model: "Classification") -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and std, one value for each channel that the net takes.

    A net of one channel gets the mean of grey normalised by each of three: (x - mean) / std with the std below.
    """
    mean, std = model.mean.flatten().double(), model.std.flatten().double()
    if model.in_chans == 1:
        scale = 1 / (1 / std).mean()
        mean, std = ((mean / std).mean() * scale)[None], scale[None]
    return tuple(mean.tolist()), tuple(std.tolist())


def _write_timm(predictor: "Predictor", facts: Mapping[str, Any], folder: Path) -> None:
    """Write config.json and model.safetensors as timm does, then load them with timm and compare."""
    import timm
    import torch
    from timm.models import save_for_hf

    from lightning_modules.backbones.standardisation import portable_state

    model = predictor.model
    plain = timm.create_model(
        model.backbone_name,
        num_classes=model.num_classes,
        in_chans=model.in_chans,
        # The run's own facts replace those of the weights that timm has under this name, their licence among them.
        pretrained_cfg_overlay={
            **dict.fromkeys(_OF_OTHER_WEIGHTS),
            **{name: facts[name] for name in _TIMM_FACTS},
            "num_classes": model.num_classes,
            "custom_load": False,
        },
    )
    plain.load_state_dict(portable_state(model.backbone))
    save_for_hf(
        plain,
        str(folder),
        model_config={"label_names": list(model.class_names), "farshot": _meaning(predictor)},
        model_args={"in_chans": model.in_chans} if model.in_chans != 3 else None,
        safe_serialization=True,
    )
    shutil.copymode(folder / "config.json", folder / "model.safetensors")  # safetensors makes it readable by its owner
    with torch.inference_mode():
        normalised = model.normalise(_random_images(facts))
        loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        _compare(loaded(normalised), model(normalised), f"timm {timm.__version__}")


def _write_onnx(predictor: "Predictor", facts: Mapping[str, Any], folder: Path) -> None:
    """Write model.onnx, which takes uint8 images and normalises them itself, then run it and compare."""
    _require(ONNX_PACKAGES)
    import torch

    onnxruntime = import_module("onnxruntime")
    model = predictor.model
    images = _random_images(facts)
    path = folder / "model.onnx"
    try:
        torch.onnx.export(
            _from_pixels(model),
            (images,),
            str(path),
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            dynamo=True,
            external_data=sum(tensor.nbytes for tensor in model.state_dict().values()) > PROTOBUF_LIMIT,
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        raise DataError(
            f"torch {torch.__version__} cannot export {model.backbone_name} to ONNX: {str(error).splitlines()[0]}",
            where="--format onnx",
            hint="--format timm writes the same net",
        ) from error
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for part in (images, images[:1]):
        (logits,) = session.run(None, {"images": part.numpy()})
        with torch.inference_mode():
            expected = model(model.normalise(part))
        _compare(torch.from_numpy(logits), expected, f"onnxruntime {onnxruntime.__version__}")
    described = {"architecture": model.backbone_name, "label_names": list(model.class_names), **_meaning(predictor)}
    shape = ["batch", *images.shape[1:]]
    inside = {name: facts[name] for name in ("mean", "std")}
    described |= {"input": {"name": "images", "type": "uint8", "shape": shape}, "normalised_in_graph": inside}
    write_text(folder / "config.json", json.dumps(described, indent=2))


def _meaning(predictor: "Predictor") -> dict[str, Any]:
    """What the outputs mean, and how images were read."""
    return {
        "task": predictor.model.task,
        "thresholds": predictor.thresholds,
        "grey": predictor.mode == "grey",
        "window": predictor.window,
    }


def _require(packages: tuple[str, ...]) -> None:
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise DataError(
            f"--format onnx needs {', '.join(missing)}",
            where="--format",
            hint="pip install 'farshot[onnx]', or pip install " + " ".join(packages),
        )


def _from_pixels(model: "Classification") -> "nn.Module":
    """Return uint8 images → logits as one module.

    onnxruntime (1.31; its PadFusion) moves zeros that are padded before a max-pool into the pool, where the padding is
    −∞: BiT's stem then gives other values at the border. Any other number than 0 stays where it is.
    """
    from torch import nn

    class FromPixels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = deepcopy(model)
            for layer in self.model.modules():
                if isinstance(layer, nn.ConstantPad2d) and layer.value == 0:
                    layer.value = 1e-30

        def forward(self, images: "Tensor") -> "Tensor":
            logits: Tensor = self.model(self.model.normalise(images))
            return logits

    return FromPixels().eval()


def _random_images(facts: Mapping[str, Any]) -> "Tensor":
    """Return two images as a run's batches have them, uint8 (2, C, H, W), to compare logits on."""
    import torch

    shape = (2, 1 if facts["grey"] else 3, *facts["input_size"][1:])
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def _compare(found: "Tensor", expected: "Tensor", program: str) -> None:
    difference = float((found - expected).abs().max())
    if not difference <= TOLERANCE * max(1.0, float(expected.abs().max())):
        raise DataError(
            f"{program} does not compute the run's logits from what was written: they differ by {difference:.2g}",
            hint="nothing was kept; report the architecture and these versions",
        )
