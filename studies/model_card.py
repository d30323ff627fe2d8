"""The model card of an exported run: what it is, what it saw, how well it does, and what its data allow."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

import datamodules
from studies.commands.listing import data_card
from studies.known_weights import KnownWeights, recognise
from studies.patient_bootstrap import DRAWS, SEED, estimate
from studies.runs import RunFolder
from studies.training_record import read_history

if TYPE_CHECKING:
    from lightning_modules.classification import Classification

_FRONT = """---
library_name: timm
pipeline_tag: image-classification
tags: [image-classification]
license: other
---"""
_RESTRICTED = """**Medical data.** The sets below are of patients. Check, before you pass these weights on, that the
agreement under which you got each set allows it: some forbid sharing the data *and what is derived from them*, ask for
the same access control, or rule out commercial use. Weights can reveal training images. This net is for research; it is
no medical device, has not been tested in clinical use, and must not decide about patients."""
_OWN = """**Check the terms of the data.** The terms of each set below hold for what is derived from it, as far as its
owners say so. A set that is described only by its folder has terms that only you know: write them here."""


def model_card(folder: RunFolder, model: "Classification", facts: Mapping[str, Any], kind: str, title: str) -> str:
    """Write the README.md of an export.

    Args:
        folder: The run.
        model: Its net.
        facts: What `export.input_facts` says about its input.
        kind: timm or onnx.
        title: Name of the exported folder.
    """
    run = folder.read_summary().get("run", {})
    chain, origin = history(folder)
    used = list(dict.fromkeys(name for step in chain for name in data_classes(step)))
    sections = [
        _FRONT,
        f"# {title}",
        f"`{model.backbone_name}` with {model.num_classes} outputs ({model.task}), trained on {run.get('target', '?')} "
        "with farshot.",
        "## Use\n\n" + _USES[kind].format(**_use_words(model, facts, title)),
        "## Input\n\n" + "\n".join(f"- {line}" for line in _input(facts, kind, model.in_chans)),
        "## Outputs\n\n" + _outputs(folder, model),
        "## Training\n\n" + _training(folder, run, chain, origin),
        "## Results\n\n" + _results(folder, model),
        "## Data: terms and warning\n\n" + _data(used, folder, origin),
    ]
    return "\n\n".join(sections) + "\n"


_USES = {
    "timm": """```python
import timm, torch
from PIL import Image

model = timm.create_model("local-dir:{title}", pretrained=True).eval()  # uploaded: "hf-hub:OWNER/{title}"
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
image = Image.open("image.png"){convert}
with torch.inference_mode():
    logits = model(transform(image)[None])
chances = logits.{activation}
names = model.pretrained_cfg["label_names"]
```""",
    "onnx": """```python
import numpy as np, onnxruntime

session = onnxruntime.InferenceSession("{title}/model.onnx")
images = np.zeros((1, {channels}, {size}, {size}), dtype=np.uint8)  # 0 to 255, as decoded; resized as said below
(logits,) = session.run(["logits"], {{"images": images}})
```

`images`: uint8, (batch, {channels}, {size}, {size}). The division by 255, the mean and the standard deviation are in
the graph: feed it neither floats in [0, 1] nor normalised values. `logits`: float32, (batch, {outputs}); the {function}
of them are the probabilities.""",
}


def _use_words(model: "Classification", facts: Mapping[str, Any], title: str) -> dict[str, object]:
    multiclass = model.task == "multiclass"
    grey = '.convert("L")' if facts["grey"] or model.in_chans == 1 else ""
    return {
        "title": title,
        "convert": grey + ('.convert("RGB")' if model.in_chans == 3 else ""),
        "activation": "softmax(-1)" if multiclass else "sigmoid()",
        "function": "softmax" if multiclass else "sigmoids",
        "channels": 1 if facts["grey"] else 3,
        "size": facts["input_size"][-1],
        "outputs": model.num_classes,
    }


def _input(facts: Mapping[str, Any], kind: str, in_chans: int) -> Iterator[str]:
    size = facts["input_size"][-1]
    yield f"mean {_numbers(facts['mean'])}, standard deviation {_numbers(facts['std'])}, of values in [0, 1]" + (
        " (in the graph)" if kind == "onnx" else ""
    )
    if facts["pads"]:
        yield f"the whole image: the long side to {size} pixels, black around it to a square; never cropped"
        if kind == "timm":
            yield "timm pads with the mean colour and not with black: pad images that are not square yourself"
    elif facts["crop_mode"] == "squash":
        yield f"the whole image at {size} x {size} pixels, whatever its shape; never cropped"
    else:
        yield f"short side to {int(size / facts['crop_pct'])} pixels, centre crop of {size}"
    if kind == "timm":
        yield (
            "training and the results below resized with OpenCV (area averages when shrinking). timm's bilinear resize "
            "differs by 0.3 grey levels on average, and may shift the crop by a pixel where a margin is odd; pixels "
            "that are resized and cropped already give the same logits"
        )
    if facts["grey"]:
        yield "images are grey" + (", repeated to 3 channels" if in_chans == 3 and kind == "timm" else "")
    elif in_chans == 1:
        yield "colour images: the mean of the three channels, not their luminance"
    if facts["window"]:
        low, high = facts["window"]
        yield f"images of more than 8 bits: {low:g} becomes 0 and {high:g} becomes 255, linearly, before all else"


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.6g}" for value in values)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _outputs(folder: RunFolder, model: "Classification") -> str:
    summary = folder.read_summary()
    thresholds = summary.get("thresholds") or [None] * model.num_classes
    rows = [
        f"| {number} | {_cell(name)} |" + (f" {threshold:.4g} |" if threshold is not None else "")
        for number, (name, threshold) in enumerate(zip(model.class_names, thresholds, strict=True))
    ]
    if thresholds[0] is None:
        return "\n".join(["| output | class |", "|---:|---|", *rows])
    source = f"Present above its threshold, a probability; chosen on: {summary.get('thresholds_from', '?')}."
    return "\n".join(["| output | label | threshold |", "|---:|---|---:|", *rows, "", source])


def history(folder: RunFolder) -> tuple[list[RunFolder], KnownWeights | str | None]:
    """Return a run and the runs its weights came from, latest first, and what the first of them began with.

    That is an entry of the known weights, the name of other weights (no path), or None for random values.
    """
    chain = [folder]
    while True:
        weights = chain[-1].read_config().get("model", {}).get("init_args", {}).get("weights")
        if weights is None:
            return chain, None
        path = Path(weights).expanduser()
        source = RunFolder(path.parent.parent if path.parent.name == "checkpoints" else path)
        if not (source.path / "config.yaml").is_file() or source in chain:
            named = weights.startswith(("timm:", "hf-hub:"))
            return chain, recognise(weights) or (weights if named else path.name)
        chain.append(source)


def data_classes(folder: RunFolder) -> list[str]:
    """Return the names of the data set classes that a run's configuration names, those of a mixture included."""

    def walk(value: object) -> Iterator[str]:
        if isinstance(value, Mapping):
            if isinstance(value.get("class_path"), str):
                yield value["class_path"].rpartition(".")[2]
            for inner in value.values():
                yield from walk(inner)
        elif isinstance(value, list):
            for inner in value:
                yield from walk(inner)

    found = walk(folder.read_config().get("data", {}))
    return [name for name in dict.fromkeys(found) if name in datamodules.__all__]


def _training(
    folder: RunFolder, run: Mapping[str, Any], chain: Sequence[RunFolder], origin: KnownWeights | str | None
) -> str:
    lines = ["| step | data | training images | protocol |", "|---|---|---:|---|"]
    if isinstance(origin, KnownWeights):
        lines.append(f"| weights {origin.name} | {origin.data} | – | published, {origin.page} |")
    elif origin is not None:
        lines.append(f"| weights {origin} | unknown | – | – |")
    for step in reversed(chain):
        known = step.read_summary().get("run", {})
        # The method is None where nobody knows how the weights before this run were trained.
        protocol = ", ".join(str(known[name]) for name in ("method", "protocol") if known.get(name)) or "?"
        lines.append(
            f"| run {step.path.name} | {known.get('target', '?')} | {known.get('n_train', '?')} | {protocol} |"
        )
    record, unknown = read_history(str(folder.path))
    distinct = record.drop_duplicates(["dataset", "image"])["dataset"].value_counts()
    counts = ", ".join(f"{name} {count:,}" for name, count in distinct.items())
    if counts:
        lines += ["", f"Distinct training images of the whole history: {counts}."]
    if unknown and counts:
        lines += [
            "",
            f"Not counted, since nobody recorded them: what {', '.join(Path(name).name for name in unknown)} had seen.",
        ]
    words = {
        "shots": "shots a class",
        "num_images": "images drawn",
        "fraction": "share of the training images",
        "dials": "changes to the training data",
        "transfer_depth": "layer groups from the weights",
        "frozen_depth": "layer groups frozen",
        "image_size": "image size",
        "epochs": "epochs",
        "step": "steps",
        "selection": "checkpoint",
        "seed": "seed",
        "label_policy": "labels",
        "split_policy": "split",
        "guard": "leak check",
        "weights_hash": "hash of the weights it began with",
        "code_version": "farshot",
    }
    facts = [f"- {word}: {_plain(run[name])}" for name, word in words.items() if run.get(name) not in (None, "")]
    return "\n".join([*lines, "", *facts])


def _plain(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _results(folder: RunFolder, model: "Classification") -> str:
    frame = pd.read_parquet(folder.predictions) if folder.predictions.is_file() else pd.DataFrame({"split": []})
    frame = frame[frame["split"] == "test"]
    if frame.empty:
        return "Not tested. `python cli.py test --run RUN`, then another export, fills this section."
    names = model.class_names
    logits = frame[[f"logit/{name}" for name in names]].to_numpy()
    labels = frame["label" if model.task == "multiclass" else [f"label/{name}" for name in names]].to_numpy()
    estimates = estimate(logits, labels, frame["group"].to_numpy(), model.task, names)
    rows = ["| metric | class | value | 95 % interval |", "|---|---|---:|---:|"]
    for one in estimates:
        interval = "–" if np.isnan(one.low) else f"{one.low:.3f} to {one.high:.3f}"
        value = "–" if np.isnan(one.value) else f"{one.value:.3f}"
        rows.append(f"| {one.name} | {_cell(one.class_name)} | {value} | {interval} |")
    patients = frame["group"].nunique()
    text = (
        f"Test set: {len(frame):,} images of {patients:,} patients (or other groups). Percentile intervals of "
        f"{DRAWS:,} draws of patients with replacement, seed {SEED}. They say how much the figures depend on which "
        "patients were tested; not how another training run, hospital or scanner would change them."
    )
    return "\n".join([*rows, "", text])


def _data(used: Sequence[str], folder: RunFolder, origin: KnownWeights | str | None) -> str:
    transform = str(folder.read_summary().get("preprocessing", {}).get("transform"))  # of one's own radiographs, too
    medical = transform.startswith("chest_xray") or (isinstance(origin, KnownWeights) and origin.patients)
    medical = medical or any(datamodules.module_of(name).startswith("chest_xray.") for name in used)
    parts = [_RESTRICTED if medical else _OWN]
    if isinstance(origin, KnownWeights):
        parts.append(f"### {origin.name} (published weights)\n\nLicence: {origin.licence}. Data: {origin.data}.")
    elif origin is not None:
        parts.append(
            f"### {origin} (weights)\n\nNot known here: where they are from, their licence and their data, whose terms "
            "hold for this net, too. Write them here."
        )
    for name in used:
        text = re.split(r"^(?:Args|Attributes):", data_card(name), flags=re.MULTILINE)[0].strip()
        parts.append(f"### {name}\n\n{text}")
    return "\n\n".join(parts)
